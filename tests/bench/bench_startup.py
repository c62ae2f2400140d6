"""How long a start takes, cold and with what the first start compiled; in one run.

    python tests/bench/bench_startup.py --shape qwen3-0.6b --tensor-parallel-size 1 [any flag of the driver]

Each start is the driver's (trainer, engine, group), in new processes, and both share a fresh cache folder of
vLLM's. On the CPU, where vLLM compiles more simply, its way for GPUs is switched on. Writes
OUTPUT_DIR/startup_SHAPE.json.
"""

import contextlib
import dataclasses
import importlib
import os
import tempfile
import time
from pathlib import Path
from unittest import mock

import tests_on_path  # noqa: F401
import torch
import tyro

from harness import Remote, connect, driver, generate, vllm_arguments, with_length, write_result
from random_models import build_random_model
from rlhf_utils import WorkerExtension


@dataclasses.dataclass
class Benchmark(driver.Config):
    """One shape."""

    shape: str = "tiny-qwen3"
    """A key of SHAPES in random_models.py."""
    tensor_parallel_size: int = 1
    """GPUs of the engine."""


class Extension(WorkerExtension):
    """What this benchmark asks a worker besides."""

    def compilation_s(self) -> float:
        """Seconds for compiling, or for loading what has been compiled."""
        return self.vllm_config.compilation_config.compilation_time


def compile_as_on_gpus() -> dict:
    """In the engine's process: undo what vLLM's CPU platform changes; returns the engine's arguments."""
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    check_and_update_config = CpuPlatform.check_and_update_config

    def check(vllm_config) -> None:
        check_and_update_config(vllm_config)
        vllm_config.compilation_config.mode = CompilationMode.VLLM_COMPILE
        vllm_config.compilation_config.compile_sizes = []

    CpuPlatform.check_and_update_config = staticmethod(check)
    without = {"fuse_norm_quant": False, "fuse_act_quant": False}  # kernels that the CPU build lacks
    return {"enforce_eager": False, "compilation_config": {"pass_config": without}}


class CompilingOnCPU(driver.RolloutLLM):
    """The engine, compiled on the CPU as well."""

    def __init__(self, **arguments):
        super().__init__(**arguments | compile_as_on_gpus())


def main(config: Benchmark) -> dict:
    """Start twice, write and print."""
    seconds, outputs = {"start": [], "of which compilation": []}, []
    with contextlib.ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
        path = build_random_model(folder / "model", config.shape)
        torch.cuda.empty_cache()
        cleanup.enter_context(mock.patch.dict(os.environ, VLLM_CACHE_ROOT=str(folder / "cache")))
        wanted = with_length(dataclasses.replace(config, model=path))
        config, device = driver.resolve(wanted, connect(wanted, cleanup))
        if device == "cpu":  # by its module's name, which is not __main__ for the actors
            kind = importlib.import_module("bench_startup").CompilingOnCPU
            cleanup.enter_context(mock.patch.object(driver, "RolloutLLM", kind))
        cleanup.enter_context(vllm_arguments(worker_extension_cls="bench_startup.Extension"))
        for _ in ("first", "second"):
            with contextlib.ExitStack() as stop:
                began = time.perf_counter()
                _, [actor], _ = driver.start(config, device, stop)
                seconds["start"].append(time.perf_counter() - began)
                llm = Remote(actor)
                seconds["of which compilation"].append(max(llm.collective_rpc("compilation_s")))
                outputs.append(generate(llm))
    assert outputs[0] == outputs[1], "what was stored computes something else"
    result = write_result(config, device, "startup", seconds=seconds)
    print(f"{config.shape}, {result['layout']}, {result['device']}")
    print(f"{'seconds':24}{'first':>10}{'second':>10}{'ratio':>10}")
    for phase, (first, second) in seconds.items():
        print(f"{phase:24}{first:10.1f}{second:10.1f}{second / first:10.2f}")
    return result


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
