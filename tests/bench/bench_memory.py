"""What an engine holds in memory, in BF16 and with `--quantization`; in one run.

    python tests/bench/bench_memory.py --model Qwen/Qwen3-8B --tensor-parallel-size 1 [any flag of the driver]

Prints both and their ratio, and writes OUTPUT_DIR/memory.json.
"""

import contextlib
import dataclasses
import json

import psutil
import tests_on_path  # noqa: F401
import torch
import tyro

from harness import connect, driver, helper, sampled, vllm_arguments, with_length
from rlhf_utils import Reached, WorkerExtension


class Extension(WorkerExtension):
    """What the benchmarks ask a worker besides."""

    def kv_cache_tokens(self) -> int:
        """How many fit."""
        cache = self.vllm_config.cache_config
        return cache.num_gpu_blocks * cache.block_size

    def linear_gib(self) -> float:
        """Of linear layers alone, as stored; counted as `inspect_weights` counts all layers."""
        from vllm.model_executor.layers.linear import LinearBase

        layers = [module for module in self.get_model().modules() if isinstance(module, LinearBase)]
        reached = [Reached(layer) for layer in layers]
        return sum(one.tensors[name].nbytes for one in reached for name in one.parameters) / 2**30

    def peak_memory_gib(self) -> float:
        """Most that torch has allocated since the last call or vLLM's own reset; on the CPU resident now."""
        if self.device.type == "cpu":
            return psutil.Process().memory_info().rss / 2**30
        peak = torch.cuda.max_memory_allocated(self.device) / 2**30
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak


def measure_inference_memory(
    model_name: str,
    use_quantization: bool = False,
    config: driver.Config | None = None,
    device: str | None = None,
) -> dict[str, float]:
    """What an engine of a model holds with `config`, or with the same in BF16; it and a trainer start for
    this and end.

    Without `config` and `device` it uses the defaults and connects to Ray itself. Returns, each the most of
    all engine ranks: `weights_gib`; `linear_gib`, of linear layers alone; `kv_cache_tokens`; and the most GiB
    of GPU memory that torch had allocated (CPU: resident at the end) in `startup_gib` (since vLLM's own
    reset), `sync_gib` and `generation_gib`.
    """
    with contextlib.ExitStack() as cleanup:
        if config is None:
            config, device = driver.resolve(driver.Config(), connect(driver.Config(), cleanup))
        quantization = config.quantization if use_quantization else "none"
        config = with_length(dataclasses.replace(config, model=model_name, quantization=quantization))
        cleanup.enter_context(vllm_arguments(worker_extension_cls="bench_memory.Extension"))
        trainer, engines, ranks = driver.start(config, device, cleanup)

        def most(method: str) -> float:
            """Of all ranks."""
            return max(sum(driver.wait(helper.on_workers(engines, method), config.timeout_s, method), []))

        memory = {"weights_gib": max(rank["weights_gib"] for rank in ranks)}
        memory |= {method: most(method) for method in ("linear_gib", "kv_cache_tokens")}
        memory["startup_gib"] = most("peak_memory_gib")
        helper.sync_weights_to_quantized_engine(trainer, engines, timeout_s=config.timeout_s)
        memory["sync_gib"] = most("peak_memory_gib")
        sampled(config, engines)
        memory["generation_gib"] = most("peak_memory_gib")
    return memory


def compare_memory(config: driver.Config, device: str) -> dict:
    """Print, and write to memory.json, what the same memory holds in BF16 and with `--quantization`."""
    if config.quantization == "none":
        raise SystemExit("--quantization none: expected what BF16 is to be compared with: fp8-dynamic")
    found = {
        name: measure_inference_memory(config.model, name != "BF16", config, device)
        for name in ("BF16", config.quantization)
    }
    bf16, fp8 = found.values()
    print(f"Each engine rank of {config.model}, TP={config.tensor_parallel_size}, {device}")
    print(f"{'':16}" + "".join(f"{name:>18}" for name in (*found, "ratio")))
    for key in bf16:
        form = "18,d" if key == "kv_cache_tokens" else "18.4f"
        print(f"{key:16}{bf16[key]:{form}}{fp8[key]:{form}}{fp8[key] / bf16[key]:18.2f}")
    saved = {key: bf16[key] - fp8[key] for key in bf16}
    size = "what is left of --gpu-memory-utilization" if device == "cuda" else "of fixed size on the CPU"
    print(
        f"Saved on each rank: {saved['weights_gib']:.4f} GiB of weights, of which linear layers "
        f"{saved['linear_gib']:.4f}; embeddings, output head and norms stay BF16. The KV cache ({size}) "
        f"holds {-saved['kv_cache_tokens']:+,} tokens"
    )
    config.output_dir.mkdir(parents=True, exist_ok=True)
    (config.output_dir / "memory.json").write_text(json.dumps(found, indent=2))
    return found


def main(config: driver.Config) -> None:
    """Connect, compare."""
    with contextlib.ExitStack() as cleanup:
        config, device = driver.resolve(config, connect(config, cleanup))
        compare_memory(config, device)


if __name__ == "__main__":
    main(tyro.cli(driver.Config))
