"""What a weight sync costs, beside a raw broadcast of the same bytes and what others do; for one model shape, in one run.

    python tests/bench_weight_sync.py --shape qwen3-8b --tensor-parallel-size 1 [any flag of the driver]

The engine starts from random weights of vLLM's (`load_format="dummy"`), the trainer from others. Each method begins with an
engine whose weights are all zero, and the result is compared with a fresh engine that was started from the trainer's
checkpoint: every tensor, token and log-probability. Writes OUTPUT_DIR/weight_sync_SHAPE.json and draws weight_sync.png from
all such files there.
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
import torch
import tyro
from harness import Extension, Remote, connect, driver, fresh_engine, generate, sync, vllm_arguments, write_result
from random_models import build_random_model
from rich.console import Console
from rich.table import Table

import rlhf_utils
from rlhf_utils import agreed, announce, named_weights

RAW, PUBLISHED, VLLM = "raw broadcast", "per-parameter calls, as published", "vLLM's NCCL weight transfer, packed"
SESSION, FIRST, OURS = "reload session", "ours, first (agrees, records)", "ours, later"


@dataclasses.dataclass
class Benchmark(driver.Config):
    """One shape."""

    shape: str = "tiny-opt"
    """A key of SHAPES in random_models.py."""
    repeats: int = 10
    """Of each method, after one to warm up; the median counts."""
    slow_repeats: int = 1
    """Of the per-parameter calls, which take seconds to minutes; 0 leaves them out."""
    fresh_gpus: str | None = None
    """GPUs of the fresh engine; default: the first ones."""
    kv_cache_gib: float = 0.5
    """Fixed, because engines that share a GPU cannot measure what is free."""
    gpu_memory_utilization: float = 0.1
    """Only what must be free at the start."""


# ----- What runs in the trainer and in the workers -------------------------------------------------------------------


def broadcast_raw(buckets: rlhf_utils.Buckets, repeats: int) -> list[float]:
    """Both ends: seconds for the same bytes in the same buckets, with nothing to pack, quantize or check."""
    seconds = []
    for _ in range(repeats + 1):
        announce(buckets.group, buckets.digests.device)
        start = time.perf_counter()
        buckets.events = []
        for number, bucket in enumerate(buckets.buckets):
            buckets.broadcast(number, bucket)
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


STAMPS = []  # of this process: when the last sync reached what


def stamp_syncs() -> None:
    """In the trainer and in the workers: write down when a sync had been announced and when all of it had been issued."""
    plain_announce, plain_wait = rlhf_utils.announce, rlhf_utils.Buckets.wait_on_host

    def announce(*args) -> bool:
        STAMPS[:] = [time.time()]
        announced = plain_announce(*args)
        STAMPS.append(time.time())
        return announced

    def wait_on_host(buckets, number: int) -> None:
        STAMPS.extend([time.time()] * (number == 0))
        plain_wait(buckets, number)

    rlhf_utils.announce, rlhf_utils.Buckets.wait_on_host = announce, wait_on_host


class BenchmarkExtension(Extension):
    """What the benchmark needs of a worker besides."""

    def stamp_syncs(self) -> None:
        stamp_syncs()

    def receive_weights(self) -> dict | None:
        result = super().receive_weights()
        return result and result | {"stamps": [*STAMPS, time.time()]}

    def broadcast_raw(self, repeats: int) -> list[float]:
        return broadcast_raw(self.buckets, repeats)

    def published_update_weight(self, name: str, dtype_name: str, shape: list[int]) -> None:
        weight = torch.empty(shape, dtype=getattr(torch, dtype_name), device=self.device)
        self.weight_group.broadcast(weight, src=0)
        self.get_model().load_weights([(name, weight)])

    @agreed
    def do_nothing(self) -> None:
        pass

    def allocated_gib(self, peak: bool) -> float:
        return allocated_gib(self.device, peak)


def send_as_published(trainer: driver.Trainer, llm) -> None:
    """The trainer in the place of the seed's driver."""
    for name, weight in named_weights(trainer.model).items():
        args = (name, "bfloat16", list(weight.shape))
        handle = llm.collective_rpc.remote("published_update_weight", args=args)
        trainer.group.broadcast(weight.detach().to(torch.bfloat16), src=0)
        driver.wait([handle], 60, f"loading {name}")


def join_vllm(trainer: driver.Trainer, llm, world_size: int) -> None:
    """Connect vLLM's own sender with its own receivers."""
    from vllm.distributed.weight_transfer.base import ModuleSource, ParamMeta
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine
    from vllm.utils.network_utils import get_open_port

    class Client:
        """vLLM's client protocol: its four methods are the workers' methods of the same names."""

        def __getattr__(self, method: str) -> Callable:
            return lambda *args: driver.wait([llm.collective_rpc.remote(method, args=args)], 300, method)

    class Source(ModuleSource):
        """The weights in BF16, as ours go over the wire."""

        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(meta.name, torch.bfloat16, meta.shape) for meta in super().metadata()]

        def __iter__(self):
            return ((name, weight.detach().to(torch.bfloat16)) for name, weight in super().__iter__())

    info = NCCLTrainerInitInfo(master_address="127.0.0.1", master_port=get_open_port(), world_size=world_size, rank=0)
    trainer.vllm_sender = NCCLTrainerWeightTransferEngine.trainer_init(
        info, client=Client(), source=Source(trainer.model)
    )


# ----- The driver ----------------------------------------------------------------------------------------------------


def main(config: Benchmark) -> dict:
    """Start everything, measure every method, write and print."""
    os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"  # two compilations of one model choose the same kernels
    with contextlib.ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
        path = build_random_model(folder / "model", config.shape)
        torch.cuda.empty_cache()
        config, device = driver.resolve(config, connect(config, cleanup))
        if device == "cuda":  # little memory, because two engines and a trainer may share a GPU
            small = dict(kv_cache_memory_bytes=int(config.kv_cache_gib * 2**30), max_num_batched_tokens=2048)
            cleanup.enter_context(vllm_arguments(**small))
        trainer = driver.start_trainer(config, path, cleanup)
        own = {"worker_extension_cls": "bench_weight_sync.BenchmarkExtension", "load_format": "dummy"}
        with vllm_arguments(**own, **({"weight_transfer_config": {"backend": "nccl"}} if device == "cuda" else {})):
            actor = driver.start_engine(config, path, device, cleanup)
        gpus = config.fresh_gpus or ",".join(map(str, range(config.tensor_parallel_size)))
        fresh = cleanup.enter_context(fresh_engine(config, path, device, gpus))
        driver.join_group(config, device, trainer, [actor])
        driver.prove_fp8([actor], config)
        result = write_result(config, device, "weight_sync", **measure(config, device, trainer, actor, fresh()))
    draw(config.output_dir)
    report(result)
    return result


def on_trainer(config: Benchmark, trainer, function: Callable, *args):
    """What a function of the trainer's object returns in the trainer's process."""
    return driver.wait([trainer.__ray_call__.remote(function, *args)], 10 * config.timeout_s, function.__name__)[0]


def timed(call: Callable, *args) -> float:
    """Seconds."""
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


def measure_raw(config: Benchmark, trainer, actor) -> list[float]:
    """Seconds of each raw broadcast of the buckets that both ends have agreed on, of the slowest rank."""
    handle = actor.collective_rpc.remote("broadcast_raw", args=(config.repeats,))
    sent = on_trainer(config, trainer, lambda trainer: broadcast_raw(trainer.sender.buckets, config.repeats))
    received = driver.wait([handle], config.timeout_s, "receiving")[0]
    return [max(all_ranks) for all_ranks in zip(sent, *received)]


def measure_phases(config: Benchmark, trainer, actor) -> dict[str, float]:
    """Seconds of an empty call, and of each phase of a sync of ours; medians."""
    llm = Remote(actor)
    phases = {"empty call": statistics.median(timed(llm.collective_rpc, "do_nothing") for _ in range(20))}
    on_trainer(config, trainer, lambda trainer: stamp_syncs())
    llm.collective_rpc("stamp_syncs")
    seconds = []
    for _ in range(config.repeats):
        start = time.time()
        result = sync(config, trainer, actor, verify=False)
        stamps = [start, *max(rank["stamps"] for rank in result["ranks"]), time.time()]
        seconds.append([end - begin for begin, end in zip(stamps, stamps[1:])])
    names = ("call reaches the worker", "announced", "issued", "waited", "answered")
    return phases | dict(zip(names, map(statistics.median, zip(*seconds)), strict=True))


def measure(config: Benchmark, device: str, trainer, actor, expected: dict) -> dict:
    """Every method: seconds, extra memory of both sides, and whether the engine then equals a cold start."""
    llm, rows, syncs, session_outputs = Remote(actor), {}, [], []

    ask_trainer = functools.partial(on_trainer, config, trainer)

    def our_sync() -> float:
        syncs.append(sync(config, trainer, actor, verify=False))
        return syncs[-1]["seconds"]

    def session() -> float:
        llm.collective_rpc("forget_replay")
        return our_sync()

    def first() -> float:
        ask_trainer(lambda trainer: setattr(trainer, "sender", None))
        return timed(our_sync)

    def memory_gib(peak: bool) -> list[float]:  # of the trainer and the engine's ranks
        own = ask_trainer(lambda trainer: allocated_gib(trainer.device, peak))
        return [own, *llm.collective_rpc("allocated_gib", args=(peak,))]

    def equal() -> dict[str, bool]:
        """To a cold start; and, so that two compilations cannot hide a difference, to what a session made of this engine."""
        assert llm.reset_prefix_cache()
        if llm.collective_rpc("tensor_digests") != expected["digests"]:  # do not generate: NaN would stay in the KV cache
            return dict.fromkeys(("tensors", "outputs", "outputs_as_after_session"), False)
        outputs = generate(llm)
        session_outputs.append(outputs)
        return {
            "tensors": True,
            "outputs": outputs == expected["outputs"],
            "outputs_as_after_session": outputs == session_outputs[0],
        }

    def add(method: str, run: Callable[[], float], repeats: int, warm_up: int = 1) -> None:
        for _ in range(warm_up):
            run()
        llm.collective_rpc("zero_weights")
        before = memory_gib(False)
        seconds = [run() for _ in range(repeats)]
        rows[method] = {
            "seconds": statistics.median(seconds),
            "all_seconds": seconds,
            "extra_gib": [peak - start for peak, start in zip(memory_gib(True), before)],
            "equal": equal(),
        }
        print(method, rows[method], file=sys.stderr)

    our_sync()
    buckets = ask_trainer(lambda trainer: {b.data_ptr(): b.nbytes for b in trainer.sender.buckets.buckets[:2]})
    buckets_gib = sum(buckets.values()) / 2**30 if device == "cuda" else 0.0
    seconds, ranks = measure_raw(config, trainer, actor), 1 + config.tensor_parallel_size
    rows[RAW] = {"seconds": statistics.median(seconds), "all_seconds": seconds, "extra_gib": [0.0] * ranks}
    add(SESSION, session, config.repeats)
    add(FIRST, first, config.repeats)
    add(OURS, our_sync, config.repeats)
    last = syncs[-config.repeats :]
    breakdown = measure_phases(config, trainer, actor)
    if config.slow_repeats:
        add(PUBLISHED, lambda: timed(ask_trainer, send_as_published, actor), config.slow_repeats, warm_up=0)
    if config.trainer_device == device == "cuda":
        ask_trainer(join_vllm, actor, config.world_size)
        add(VLLM, lambda: timed(ask_trainer, lambda trainer: trainer.vllm_sender.send_weights()), config.repeats)
    our_sync()
    repaired = equal()
    assert repaired == rows[OURS]["equal"], f"a sync of ours must repair what the calls before it did: {repaired}"
    for method in (RAW, SESSION, FIRST, OURS):
        rows[method]["extra_gib"] = [gib + buckets_gib for gib in rows[method]["extra_gib"]]
    for row in rows.values():
        row["gb_per_s"] = last[-1]["bytes"] / row["seconds"] / 1e9
        row["ratio"] = row["seconds"] / rows[RAW]["seconds"]
    return {
        "bytes": last[-1]["bytes"],
        "bucket_mib": config.bucket_mib,
        "buckets": last[-1]["sender"]["buckets"],
        "path": last[-1]["path"],
        "breakdown": breakdown,
        "rows": rows,
    }


def report(result: dict) -> None:
    """Print the table and one line to search for."""
    title = (
        f"{result['shape']}, {result['bytes'] / 1e9:.3f} GB, {result['layout']}, {result['mode']}, {result['device']}"
    )
    table = Table(
        "method", "ms", "GB/s", "x raw", "extra GiB: trainer, engine ranks", "tensors, outputs of a cold start", title=title
    )
    for method, row in result["rows"].items():
        extra = ", ".join(f"{gib:.2f}" for gib in row["extra_gib"])
        figures = [f"{1e3 * row['seconds']:.2f}", f"{row['gb_per_s']:.2f}", f"{row['ratio']:.2f}"]
        equal = [("no", "yes")[row["equal"][key]] for key in ("tensors", "outputs") if "equal" in row]
        table.add_row(method, *figures, extra, ", ".join(equal))
    Console(width=150).print(table)
    split = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in result["breakdown"].items())
    print(f"RESULT {title}: ours {result['rows'][OURS]['ratio']:.2f} x raw ({result['path']}); {split}")


def draw(folder: Path) -> None:
    """Bars of every method by shape; and how the cost grows with the bytes."""
    results = [json.loads(file.read_text()) for file in folder.glob("weight_sync_*.json")]
    results.sort(key=lambda result: result["bytes"])
    figure, (bars, growth) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    methods = [method for method in (RAW, OURS, FIRST, SESSION, VLLM, PUBLISHED) if method in results[-1]["rows"]]
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        chosen = [(x, result) for x, result in enumerate(results) if method in result["rows"]]
        positions, gigabytes = [x for x, _ in chosen], [result["bytes"] / 1e9 for _, result in chosen]
        milliseconds = [1e3 * result["rows"][method]["seconds"] for _, result in chosen]
        bars.bar([x + (i - len(methods) / 2 + 0.5) * width for x in positions], milliseconds, width, label=method)
        growth.plot(gigabytes, milliseconds, "o-")
    bars.set(yscale="log", ylabel="ms a sync", xticks=range(len(results)), xticklabels=[r["shape"] for r in results])
    growth.set(xscale="log", yscale="log", xlabel="GB on the wire", ylabel="ms a sync")
    figure.legend(loc="outside upper center", ncols=3, fontsize="small")
    figure.savefig(folder / "weight_sync.png", dpi=100)


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
