"""How long an FP8 engine takes to start, phase by phase, cold and with what the first start compiled; in one run.

    python tests/bench_startup.py --shape qwen3-0.6b --tensor-parallel-size 1 [any flag of the driver]

Each start is a process of its own (the driver's part: trainer, engine, group), and both share a fresh cache folder of
vLLM's. On the CPU, where vLLM compiles more simply, its way for GPUs is switched on. Writes
OUTPUT_DIR/startup_SHAPE.json.
"""

import contextlib
import dataclasses
import importlib
import tempfile
from pathlib import Path

import torch
import tyro
from harness import Remote, connect, driver, generate, write_result
from random_models import build_random_model
from rich.console import Console
from rich.table import Table


@dataclasses.dataclass
class Benchmark(driver.Config):
    """One shape."""

    shape: str = "tiny-qwen3"
    """A key of SHAPES in random_models.py."""
    tensor_parallel_size: int = 1
    """GPUs of the engine."""


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


class CompilingOnCPU(driver.MyLLM):
    """The engine, compiled on the CPU as well."""

    def __init__(self, **arguments):
        super().__init__(**arguments | compile_as_on_gpus())


def main(config: Benchmark) -> dict:
    """Start twice, write and print."""
    starts, outputs = {}, []
    actor_environment = driver.actor_environment
    with contextlib.ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
        path = build_random_model(folder / "model", config.shape)
        torch.cuda.empty_cache()
        driver.actor_environment = lambda: actor_environment() | {"VLLM_CACHE_ROOT": str(folder / "cache")}
        config, device = driver.resolve(config, connect(config, cleanup))
        if device == "cpu":
            driver.MyLLM = importlib.import_module("bench_startup").CompilingOnCPU  # by its name, not as __main__'s
        for name in ("first start", "second start"):
            with contextlib.ExitStack() as engine:
                _, [llm], _, starts[name] = driver.start(config, path, device, engine)
                outputs.append(generate(Remote(llm)))
            starts[name]["all of these"] = sum(starts[name].values()) - starts[name]["of which compilation"]
    assert outputs[0] == outputs[1], "what was stored computes something else"
    result = write_result(config, device, "startup", seconds=starts)
    table = Table("seconds", *starts, "ratio", title=f"{config.shape}, {result['layout']}, {result['device']}")
    for phase, (first, second) in zip(starts["first start"], zip(*(start.values() for start in starts.values()))):
        table.add_row(phase, f"{first:.1f}", f"{second:.1f}", f"{second / first:.2f}" if first else "-")
    Console().print(table)
    return result


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
