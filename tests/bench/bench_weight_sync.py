"""What a weight sync costs, beside a raw broadcast of the same bytes and what others do; for one model shape,
in one run.

    python tests/bench/bench_weight_sync.py --shape qwen3-8b --tensor-parallel-size 1 [any flag of the driver]

Trainer and engine start from one checkpoint of random weights. The sync is proved, and each method begins
with an engine whose weights are all zero; afterwards every stored tensor and every answer is compared with
those of the engine's cold start. With `--dummy` there is no checkpoint (vLLM's `load_format="dummy"`, a
trainer made in place): for shapes that do not fit the disk; only times then. Writes
OUTPUT_DIR/weight_sync_SHAPE.json and draws weight_sync.png from all such files there.
"""

import contextlib
import dataclasses
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import tests_on_path  # noqa: F401
import torch
import tyro
from transformers import AutoModelForCausalLM
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from harness import (
    Extension,
    Remote,
    account_for_fp8,
    connect,
    driver,
    helper,
    mismatch_kl,
    prove,
    sampled,
    sync,
    vllm_arguments,
    with_length,
    write_result,
    zero_and_sync,
)
from random_models import SHAPES, build_random_model, write_config
from rlhf_utils import Buckets, WeightSender, collective

RAW, PUBLISHED, VLLM = (
    "raw broadcast",
    "per-parameter calls, as published",
    "vLLM's NCCL weight transfer, packed",
)
SESSION, PROOF, OURS = "reload session", "proof (agrees, records, syncs, compares)", "ours"
BACKEND = "the same sender, our backend"


@dataclasses.dataclass
class Benchmark(driver.Config):
    """One shape."""

    shape: str = "tiny-opt"
    """A key of SHAPES in random_models.py."""
    repeats: int = 10
    """Of each method, after one to warm up; the median counts."""
    slow_repeats: int = 1
    """Of the per-parameter calls, which take seconds to minutes; 0 leaves them out."""
    dummy: bool = False
    """No checkpoint, no comparison."""
    kv_cache_gib: float = 0.5
    """Fixed, because engines that share a GPU cannot measure what is free."""
    bucket_mib: int = 256
    """Size of a bucket."""
    gpu_memory_utilization: float = 0.1
    """Only what must be free at the start."""


# ----- What runs in the trainer and in the workers ----------------------------------------------------------


def broadcast_raw(buckets: Buckets, repeats: int) -> list[float]:
    """Both ends: seconds for the same bytes in the same buckets, with nothing to pack, quantize or check."""
    seconds = []
    for _ in range(repeats + 1):
        buckets.events = []
        buckets.start(buckets.digests)  # both ends are here
        buckets.finish(0)
        start = time.perf_counter()
        buckets.events = []
        for memory, _ in buckets.buckets:
            buckets.start(memory)
        buckets.streams.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def allocated_gib(device: torch.device, peak: bool = False) -> float:
    """GPU memory of this process now, or at most since the last call without `peak`; 0 on the CPU."""
    if device.type != "cuda":
        return 0.0
    if not peak:
        torch.cuda.reset_peak_memory_stats(device)
    return (torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated)(device) / 2**30


class BenchmarkExtension(Extension):
    """What the benchmark needs of a worker besides."""

    def broadcast_raw(self, repeats: int) -> list[float]:
        return broadcast_raw(self.buckets, repeats)

    def published_update_weight(self, name: str, dtype_name: str, shape: list[int]) -> None:
        weight = torch.empty(shape, dtype=getattr(torch, dtype_name), device=self.device)
        self.weight_group.broadcast(weight, src=0)
        self.get_model().load_weights([(name, weight)])

    @collective
    def do_nothing(self) -> None:
        pass

    def use_backend(self, backend: str) -> None:
        """Of vLLM's weight transfer, from now on."""
        self.shutdown_weight_transfer_engine()
        config = WeightTransferConfig(backend=backend)
        where = config, self.vllm_config, self.device, self.get_model()
        self.weight_transfer_engine = WeightTransferEngineFactory.create_engine(*where)

    def allocated_gib(self, peak: bool) -> float:
        return allocated_gib(self.device, peak)


def send_as_published(trainer: driver.Trainer, llm) -> None:
    """The trainer in the place of the seed's driver."""
    for name, weight in trainer.weights():
        args = (name, "bfloat16", list(weight.shape))
        handle = llm.collective_rpc.remote("published_update_weight", args=args)
        trainer.group.broadcast(weight.detach().to(torch.bfloat16), src=0)
        driver.wait([handle], 60, f"loading {name}")


def join_vllm(trainer: driver.Trainer, llm, world_size: int) -> None:
    """Connect vLLM's own sender with its own receivers."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.nccl_engine import (
        NCCLTrainerInitInfo,
        NCCLTrainerWeightTransferEngine,
    )
    from vllm.utils.network_utils import get_open_port

    class Client:
        """vLLM's client protocol: its four methods are the workers' methods of the same names."""

        def __getattr__(self, method: str):
            return lambda *args: driver.wait([llm.collective_rpc.remote(method, args=args)], 300, method)

    class Source(WeightSource):
        """The weights as ours go over the wire: with the file's names, in BF16."""

        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, torch.bfloat16, tuple(w.shape)) for name, w in trainer.weights()]

        def __iter__(self):
            return ((name, weight.detach().to(torch.bfloat16)) for name, weight in trainer.weights())

    info = NCCLTrainerInitInfo(
        master_address="127.0.0.1", master_port=get_open_port(), world_size=world_size, rank=0
    )
    trainer.vllm_sender = NCCLTrainerWeightTransferEngine.trainer_init(info, client=Client(), source=Source())


class DummyTrainer(WeightSender):
    """A trainer whose model is made in place, in BF16, without an optimizer."""

    def __init__(self, config: Benchmark):
        with torch.device(config.trainer_device):
            model = AutoModelForCausalLM.from_config(SHAPES[config.shape], dtype=torch.bfloat16)
        super().__init__(model, config.trainer_device)


# ----- The driver -------------------------------------------------------------------------------------------


def main(config: Benchmark) -> dict:
    """Start everything, measure every method, write and print."""
    os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"
    with contextlib.ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
        path = (write_config if config.dummy else build_random_model)(folder / "model", config.shape)
        torch.cuda.empty_cache()
        wanted = with_length(dataclasses.replace(config, model=path))
        config, device = driver.resolve(wanted, connect(wanted, cleanup))
        own = {"worker_extension_cls": "bench_weight_sync.BenchmarkExtension"}
        own |= {"gpu_memory_utilization": config.gpu_memory_utilization}
        own |= {"load_format": "dummy"} if config.dummy else {}
        if device == "cuda":
            own |= dict(kv_cache_memory_bytes=int(config.kv_cache_gib * 2**30), max_num_batched_tokens=2048)
            own |= {"weight_transfer_config": {"backend": "nccl"}}
        if config.dummy:
            driver.Trainer = DummyTrainer
            config = dataclasses.replace(config, trainer_dtype="bfloat16")  # as DummyTrainer makes it
        start = time.perf_counter()
        with vllm_arguments(**own):
            trainer = driver.start_trainer(config, cleanup)
            actor = driver.start_engine(config, device, cleanup)
            helper.join_group(trainer, [actor], timeout_s=config.timeout_s)
        ranks = account_for_fp8([actor], config)
        startup_s = time.perf_counter() - start
        found = measure(config, device, trainer, actor)
        found |= {"startup_s": startup_s, "weights_gib": ranks[0]["weights_gib"]}
        result = write_result(config, device, "weight_sync", **found)
    draw(config.output_dir)
    report(result)
    return result


def on_trainer(config: Benchmark, trainer, function: Callable, *args):
    """What a function of the trainer's object returns in the trainer's process."""
    call = trainer.__ray_call__.remote(function, *args)
    return driver.wait([call], 10 * config.timeout_s, function.__name__)[0]


def timed(call: Callable, *args) -> float:
    """Seconds."""
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


def measure_raw(config: Benchmark, trainer, actor) -> list[float]:
    """Seconds of each raw broadcast of the buckets that both ends have agreed on, of the slowest rank."""
    handle = actor.collective_rpc.remote("broadcast_raw", args=(config.repeats,))
    sent = on_trainer(config, trainer, lambda trainer: broadcast_raw(trainer.buckets, config.repeats))
    received = driver.wait([handle], config.timeout_s, "receiving")[0]
    return [max(all_ranks) for all_ranks in zip(sent, *received)]


def measure(config: Benchmark, device: str, trainer, actor) -> dict:
    """Every method: seconds, extra memory of both sides, and is the engine then as at its cold start?"""
    llm, rows, ask_trainer = Remote(actor), {}, functools.partial(on_trainer, config, trainer)
    [cold] = helper.observe([actor], config.timeout_s, helper.PROMPTS, 16)
    syncs, factors = [], [2.0, 0.5]

    def our_sync() -> float:
        ask_trainer(scale_weights, factors[0])  # other weights each time
        factors.reverse()
        ask_trainer(WeightSender.check_finite)  # as the training step does it, before the sync
        syncs.append(sync(config, trainer, actor))
        return syncs[-1]["seconds"]

    def digests_differ() -> list[str]:
        """For what is no update to MyLLM, which therefore would not answer."""
        found = llm.digests()
        return [name for name, right in cold["digests"].items() if found[name] != right]

    def memory_gib(peak: bool) -> list[float]:  # of the trainer and the engine's ranks
        own = ask_trainer(lambda trainer: allocated_gib(trainer.device, peak))
        return [own, *llm.collective_rpc("allocated_gib", args=(peak,))]

    def add(
        method: str, run: Callable[[], float], repeats: int, warm_up: int = 1, zero=True, ours=True
    ) -> None:
        for _ in range(warm_up):
            run()
        if zero:
            llm.collective_rpc("zero_weights", args=("all" if method == SESSION else "stored",))
        before = memory_gib(False)
        seconds = [run() for _ in range(repeats)]
        extra = [peak - start for peak, start in zip(memory_gib(True), before)]
        if factors[0] < 1:
            our_sync()  # back to the weights of the start
        different = helper.differences([actor], [cold], config.timeout_s) if ours else digests_differ()
        different = ["not compared"] if config.dummy else different
        rows[method] = {"seconds": statistics.median(seconds), "all_seconds": seconds, "extra_gib": extra}
        rows[method]["different"] = different
        print(method, rows[method], file=sys.stderr)

    found = {}
    if config.dummy:
        helper.find_agreement([trainer], [actor], config.bucket_mib * 2**20, config.timeout_s)
    else:
        proof = functools.partial(timed, lambda: syncs.append(prove(config, trainer, actor)))
        add(PROOF, proof, 1, warm_up=0, zero=False)
        rollouts = sampled(config, [actor])
        found["mismatch_kl"] = ask_trainer(
            mismatch_kl, rollouts, "bfloat16" if config.trainer_device == "cuda" else "float32"
        )
    session = functools.partial(zero_and_sync, config, trainer, actor, by_session=True)
    add(SESSION, session, config.repeats)
    add(OURS, our_sync, config.repeats)
    last, path = syncs[-1], syncs[-1]["path"]
    seconds = measure_raw(config, trainer, actor)
    raw = {"seconds": statistics.median(seconds), "all_seconds": seconds, "extra_gib": []}
    calls = {
        "an empty call": statistics.median(timed(llm.collective_rpc, "do_nothing") for _ in range(20)),
        "the check of all weights, in the training step": statistics.median(
            ask_trainer(time_scan) for _ in range(5)
        ),
    }
    if config.slow_repeats:
        slow = functools.partial(timed, ask_trainer, send_as_published, actor)
        add(PUBLISHED, slow, config.slow_repeats, warm_up=0, ours=False)
    if config.trainer_device == device == "cuda":
        for method, backend in ((VLLM, "nccl"), (BACKEND, "online-quant")):
            our_sync()
            our_sync()  # the weights of the start, by which the backend proves itself
            llm.collective_rpc("use_backend", args=(backend,))
            ask_trainer(join_vllm, actor, config.world_size)
            theirs = functools.partial(timed, ask_trainer, lambda trainer: trainer.vllm_sender.send_weights())
            add(method, theirs, config.repeats, ours=False)
        our_sync()
        our_sync()
        different = [] if config.dummy else helper.differences([actor], [cold], config.timeout_s)
        assert not different, f"a sync of ours must repair what the calls before it did: {different}"
    memory = ask_trainer(lambda trainer: {m.data_ptr(): m.nbytes for m, _ in trainer.buckets.buckets[:2]})
    buckets_gib = sum(memory.values()) / 2**30 if device == "cuda" else 0.0
    for method in (SESSION, OURS):  # the proof's row has allocated them itself
        rows[method]["extra_gib"] = [gib + buckets_gib for gib in rows[method]["extra_gib"]]
    rows = {RAW: raw, **rows}
    for row in rows.values():
        row["gb_per_s"] = last["bytes"] / row["seconds"] / 1e9
        row["ratio"] = row["seconds"] / raw["seconds"]
    found |= {
        "bytes": last["bytes"],
        "bucket_mib": config.bucket_mib,
        "buckets": ask_trainer(lambda trainer: len(trainer.buckets.buckets)),
    }
    return found | {
        "path": path,
        "tensors": len(cold["digests"]),
        "answers": len(cold["answers"]),
        "calls": calls,
        "rows": rows,
    }


def scale_weights(trainer: WeightSender, factor: float) -> None:
    """Other weights; a power of two can be undone exactly."""
    with torch.no_grad():
        torch._foreach_mul_(list(trainer.model.parameters()), factor)


def time_scan(trainer: WeightSender) -> float:
    """Seconds that the trainer takes to look at every weight."""
    return timed(trainer.prepare_weights, trainer.prepared[1])


def report(result: dict) -> None:
    """Print the table and one line to search for."""
    title = (
        f"{result['shape']}, {result['bytes'] / 1e9:.3f} GB, {result['layout']}, {result['mode']}, "
        f"{result['device']}, {result['quantization']}, by {result['path']}"
    )
    print(f"{title}\n{'':42} {'ms':>10} {'GB/s':>7} {'x raw':>8}  extra GiB: trainer, ranks | as before?")
    for method, row in result["rows"].items():
        extra = ", ".join(f"{gib:.2f}" for gib in row["extra_gib"])
        equal = helper.some(row["different"]) or "yes" if "different" in row else ""
        figures = f"{1e3 * row['seconds']:10.2f} {row['gb_per_s']:7.2f} {row['ratio']:8.2f}"
        print(f"{method:42} {figures}  {extra} | {equal}")
    calls = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in result["calls"].items())
    counts = f"compared {result['tensors']} tensors, {result['answers']} answers"
    counts = counts if PROOF in result["rows"] else "not compared"
    kl = f", mismatch KL {result['mismatch_kl']:.2e}" if "mismatch_kl" in result else ""
    print(f"RESULT {title}: ours {result['rows'][OURS]['ratio']:.2f} x raw; {counts}{kl}; {calls}")


def draw(folder: Path) -> None:
    """Bars of every method by shape; and how the cost grows with the bytes."""
    results = [json.loads(file.read_text()) for file in folder.glob("weight_sync_*.json")]
    results.sort(key=lambda result: result["bytes"])
    figure, (bars, growth) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    methods = [m for m in (RAW, OURS, SESSION, VLLM, BACKEND, PUBLISHED) if m in results[-1]["rows"]]
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        chosen = [(x, result) for x, result in enumerate(results) if method in result["rows"]]
        positions, gigabytes = [x for x, _ in chosen], [result["bytes"] / 1e9 for _, result in chosen]
        milliseconds = [1e3 * result["rows"][method]["seconds"] for _, result in chosen]
        bars.bar(
            [x + (i - len(methods) / 2 + 0.5) * width for x in positions], milliseconds, width, label=method
        )
        growth.plot(gigabytes, milliseconds, "o-")
    shapes = [result["shape"] for result in results]
    bars.set(yscale="log", ylabel="ms a sync", xticks=range(len(results)), xticklabels=shapes)
    growth.set(xscale="log", yscale="log", xlabel="GB on the wire", ylabel="ms a sync")
    figure.legend(loc="outside upper center", ncols=3, fontsize="small")
    figure.savefig(folder / "weight_sync.png", dpi=100)


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
