"""vLLM's weight transfer by its own backend and by the helper's, in one run on one GPU.

    NCCL_MULTI_RANK_GPU_ENABLE=1 VLLM_NCCL_SO_PATH=LIBNCCL python tests/bench/bench_backends.py \
        --shape qwen3-8b --quantization fp8_per_channel

Two threads of one process are vLLM's own sender and an engine, and two ranks that share the GPU: NCCL 2.30
or newer allows it, and moves their bytes at the speed of the GPU's memory. (Two processes would take turns
on it.) Every update brings other weights, by which all bytes in FP8 change; the last brings back those of
the start, which every tensor and answer must show. Then come new weights: by the last backend, once more by
vLLM's own, which reloads them in the same engine, and in a fresh one.
Prints lines, writes OUTPUT_DIR/backends_NAME_QUANTIZATION.json.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import tests_on_path  # noqa: F401
import torch
import tyro
from bench_transfer import Subject
from safetensors.torch import load_file, save_file
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer import nccl_common, packed_tensor
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.utils.network_utils import get_open_port

from harness import helper
from local import CONFIG, local_engine, worker

ASKED = (["Hello, my name is", "The capital of France is", "a b c", "1 2 3 4"], 24)


@dataclasses.dataclass
class Benchmark(Subject):
    """A backend after another, in one engine."""

    repeats: int = 6
    """Measured updates of each, after two to warm up; even, since every other one brings the same."""
    output_dir: Path = Path("outputs/backends")


class Together:
    """A communicator whose broadcasts both threads begin at once and wait for: a kernel that waits for the
    other end can block whatever a thread does next with the GPU, such as to allocate memory."""

    barrier = threading.Barrier(2)

    def __init__(self, group):
        vars(self)["group"] = group

    def __getattr__(self, name):
        return getattr(self.group, name)

    def __setattr__(self, name, value):
        setattr(self.group, name, value)

    def broadcast(self, *args, **kwargs):
        """Both ends are here; both have asked for it."""
        self.barrier.wait(60)
        self.group.broadcast(*args, **kwargs)
        self.barrier.wait(60)


@functools.cache
def streams(thread: int, device: int, count: int) -> tuple:
    """vLLM's sender and receiver each have their own, as in two processes."""
    return tuple(torch.cuda.Stream(device) for _ in range(count))


class Pair:
    """An engine, and a sender of its checkpoint's weights in a thread."""

    def __init__(self, llm, path: str):
        self.llm, self.pool = llm, ThreadPoolExecutor(1, initializer=use_gpu)
        self.worker, self.weights = worker(llm), {}
        for file in sorted(Path(path).glob("*.safetensors")):
            self.weights |= load_file(file, device="cuda")
        names, shapes = [*self.weights], [list(weight.shape) for weight in self.weights.values()]
        self.update = dict(names=names, dtype_names=["bfloat16"] * len(names), shapes=shapes)

    def use(self, backend: str) -> float:
        """Both ends join a new group; seconds of the engine, its proof among them."""
        self.worker.shutdown_weight_transfer_engine()
        config = WeightTransferConfig(backend=backend)
        where = config, self.worker.vllm_config, self.worker.device, self.worker.get_model()
        self.worker.weight_transfer_engine = transfer = WeightTransferEngineFactory.create_engine(*where)
        info = dict(master_address="127.0.0.1", master_port=get_open_port(), rank_offset=1, world_size=2)
        joining = self.pool.submit(nccl_common.trainer_init, info)
        start = time.perf_counter()
        self.llm.collective_rpc("init_weight_transfer_engine", args=(info | {"packed": True},))
        seconds = time.perf_counter() - start
        self.group = Together(joining.result())
        transfer.model_update_group = Together(transfer.model_update_group)
        return seconds

    def broadcast(self, group) -> None:
        """4 GiB, as vLLM's sender sends them."""
        memory, stream = torch.empty(2**30, dtype=torch.uint8, device="cuda"), torch.cuda.Stream()
        for _ in range(4):
            group.broadcast(memory, src=0, stream=stream)
        stream.synchronize()

    def wire_gb_per_s(self) -> float:
        """Of the group, the second time."""
        for _ in range(2):
            start = time.perf_counter()
            sending = self.pool.submit(self.broadcast, self.group)
            self.broadcast(self.worker.weight_transfer_engine.model_update_group)
            sending.result()
        return 4 * 2**30 / (time.perf_counter() - start) / 1e9

    def send(self) -> None:
        """As vLLM's trainers do."""
        items = iter(self.weights.items())
        packed_tensor.packed_nccl_broadcast_producer(items, self.group, 0, lambda item: item[1])

    def sync(self) -> float:
        """Seconds of an update, from the trainer's side."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        self.llm.collective_rpc("start_weight_update")
        sending = self.pool.submit(self.send)
        self.llm.collective_rpc("update_weights", args=(self.update,))
        sending.result()
        self.llm.collective_rpc("finish_weight_update")
        self.llm.reset_prefix_cache()
        torch.cuda.synchronize()
        return time.perf_counter() - start


def use_gpu() -> None:
    """In a thread."""
    torch.cuda.set_device(0)


def engine(config: Benchmark, path: str):
    """In this process, with little memory for its cache: compiled, with CUDA graphs."""
    more = dict(kv_cache_memory_bytes=2**30, max_model_len=256, max_num_seqs=64, max_num_batched_tokens=2048)
    more |= dict(weight_transfer_config=WeightTransferConfig(backend="nccl"), enforce_eager=False)
    return local_engine(path, dataclasses.replace(CONFIG, quantization=config.quantization), **more)


def differences(found: dict, expected: dict) -> dict:
    """Of two `MyLLM.observe`: counts of tensors and of answers with other bytes, tokens or probabilities; how
    far the log-probabilities of first tokens are apart at most."""
    names = found["digests"].keys() | expected["digests"].keys()
    tensors = [name for name in names if found["digests"].get(name) != expected["digests"].get(name)]
    pairs = [*zip(found["answers"], expected["answers"], strict=True)]
    apart = max(abs(one["logprobs"][0] - two["logprobs"][0]) for one, two in pairs)
    counts = {"tensors": len(tensors), "of": len(names), "answers": sum(one != two for one, two in pairs)}
    return counts | {"first_token": apart, "some": helper.some(tensors)}


def measure(pair: Pair, backend: str, cold: dict, repeats: int) -> dict:
    """Seconds and memory of both ends together, in GiB beyond that before joining: at most in an update, and
    behind one."""
    before, found = torch.cuda.memory_allocated(), {"join_s": pair.use(backend)}
    found["wire_gb_per_s"], seconds, factors = pair.wire_gb_per_s(), [], [-2.0, -0.5]  # undone exactly
    torch.cuda.reset_peak_memory_stats()
    for number in range(2 + repeats):
        torch._foreach_mul_([*pair.weights.values()], factors[number % 2])
        seconds.append(pair.sync())
    found |= {"seconds": statistics.median(seconds[2:]), "all_seconds": seconds}
    found["extra_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    found["kept_gib"] = (torch.cuda.memory_allocated() - before) / 2**30
    found["because"] = getattr(pair.worker.weight_transfer_engine, "because", "vLLM's")
    return found | {"as_before": differences(pair.llm.observe(*ASKED), cold)}


def bring_new_weights(pair: Pair, path: str, folder: Path) -> dict:
    """By the last backend, twice; they become a checkpoint. Returns what the engine is then."""
    random = torch.Generator("cuda").manual_seed(1)
    for weight in pair.weights.values():
        noise = torch.randn(weight.shape, generator=random, device="cuda", dtype=weight.dtype)
        weight.add_(noise * weight.float().std().to(weight.dtype) * 0.3)
    pair.sync()
    pair.sync()
    shutil.copytree(path, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    weights = {name: weight.cpu() for name, weight in pair.weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return pair.llm.observe(*ASKED)


@contextlib.contextmanager
def own_streams() -> Iterator[None]:
    """vLLM keeps two for each GPU, which sender and receiver would share here."""
    plain = packed_tensor._get_streams
    packed_tensor._get_streams = lambda *which: streams(threading.get_ident(), *which)
    try:
        yield
    finally:
        packed_tensor._get_streams = plain


def main(config: Benchmark) -> None:
    """Measure, compare, print, write."""
    config.output_dir.mkdir(parents=True, exist_ok=True)
    title, found = f"RESULT {config.name} {config.quantization}", {}
    with tempfile.TemporaryDirectory(dir=config.output_dir) as folder, own_streams():
        path, new = config.path(Path(folder)), Path(folder) / "new"
        torch.cuda.empty_cache()
        with engine(config, path) as llm:
            pair, cold = Pair(llm, path), llm.observe(*ASKED)
            assert cold["repeatable"], "greedy answers differ from one time to the next"
            for backend in config.backends:
                found[backend] = measure(pair, backend, cold, config.repeats)
                print(f"{title} {backend}: {json.dumps(found[backend])}", flush=True)
            last = bring_new_weights(pair, path, new)
            if config.backends[-1] != "nccl" and "nccl" in config.backends:
                pair.use("nccl")
                pair.sync()
                found["as_by_nccl"] = differences(pair.llm.observe(*ASKED), last)
            del pair, llm
        with engine(config, str(new)) as fresh:
            found["fresh"] = differences(last, fresh.observe(*ASKED))
    medians = [found[backend]["seconds"] for backend in config.backends]
    ends = {name: found[name] for name in ("as_by_nccl", "fresh") if name in found}
    print(f"{title}: {json.dumps(ends)}; {medians[0] / medians[-1]:.2f} times as fast", flush=True)
    found |= {"device": torch.cuda.get_device_name()}
    file = config.output_dir / f"backends_{config.name}_{config.quantization}.json"
    file.write_text(json.dumps(dataclasses.asdict(config) | found, default=str, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
