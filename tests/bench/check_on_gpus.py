"""Sync equals cold start, on GPUs, for one shape and layout; prints one line with what was measured.

    python tests/bench/check_on_gpus.py --shape qwen3-0.6b --tensor-parallel-size 1 [any flag of the driver]

A second engine, fresh from the trainer's checkpoint, starts beside the synced one: on the trainer's GPU if it
has one.
"""

import contextlib
import dataclasses
import json
import os
import tempfile
from pathlib import Path

import tests_on_path  # noqa: F401
import torch
import tyro

from harness import (
    connect,
    driver,
    seed_demonstration,
    seed_group,
    sync_versus_cold_start,
    vllm_arguments,
    with_length,
)
from random_models import build_random_model


@dataclasses.dataclass
class Check(driver.Config):
    """One shape, one layout."""

    shape: str = "opt-125m"
    """A key of SHAPES in random_models.py."""
    more_syncs: int = 5
    """How often the weights change to those of the start and back, by a replay each; sessions in between."""
    seed_loop: bool = False
    """Also run the seed's per-parameter loop, with the trainer's weights and with zeros."""
    fresh_gpus: str | None = None
    """GPUs of the fresh engine; default: the first ones."""
    bucket_mib: int = 256
    """Size of a bucket."""
    gpu_memory_utilization: float = 0.1
    """Only what must be free at the start."""
    kill_a_worker: bool = False
    """At the end kill the last worker in the middle of a sync, and print what the user sees."""
    kv_cache_gib: float = 0.5
    """Fixed, because engines that share a GPU cannot measure what is free."""


def main(check: Check) -> None:
    os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"  # two compilations of one model choose the same kernels
    with contextlib.ExitStack() as cleanup:
        own = {"kv_cache_memory_bytes": int(check.kv_cache_gib * 2**30)}
        own |= {"gpu_memory_utilization": check.gpu_memory_utilization}
        cleanup.enter_context(vllm_arguments(**own))
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
        old, new = (build_random_model(folder / str(seed), check.shape, seed=seed) for seed in (1, 2))
        torch.cuda.empty_cache()
        wanted = with_length(dataclasses.replace(check, model=old))
        config, device = driver.resolve(wanted, connect(wanted, cleanup))
        own_device = torch.device("cuda:0" if config.trainer_device == "cuda" else "cpu")

        def demonstrate(llm, path: str) -> dict:
            backend = "nccl" if config.trainer_device == device == "cuda" else "gloo"
            group = seed_group(llm, config.tensor_parallel_size, own_device, backend)
            shown = seed_demonstration(llm, group, path, own_device)
            return {key: value for key, value in shown.items() if key != "loaded"}

        result = sync_versus_cold_start(
            config,
            old,
            new,
            device,
            check.more_syncs,
            visible_gpus=check.fresh_gpus or ",".join(map(str, range(config.tensor_parallel_size))),
            then=demonstrate if check.seed_loop else None,
            kill_a_worker=check.kill_a_worker,
        )
    config.output_dir.mkdir(parents=True, exist_ok=True)
    mode = "eager" if json.loads(check.engine_args).get("enforce_eager") else "compiled"
    layout = f"{check.shape} TP={check.tensor_parallel_size} trainer={config.trainer_device} {mode}"
    (config.output_dir / f"{layout.replace(' ', '_').replace('=', '')}.json").write_text(
        json.dumps(result, indent=2)
    )
    proof, rank = result["proof"], result["ranks"][0]
    why = f", because {proof['because']}" if proof["because"] else ""
    gigabytes = proof["bytes"] / 1e9
    parts = [
        f"RESULT {layout}: proof by {proof['path']} ({proof['tensors']} tensors, {proof['answers']} answers, "
        f"{result['proof_s']:.1f} s{why})",
        f"with other weights {result['tensors']} tensors and all outputs equal a cold start",
        f"FP8 layers {rank['fp8_linear_layers']}, weights/rank {rank['weights_gib']:.3f} GiB (BF16 "
        f"{rank['bf16_weights_gib']:.3f})",
        f"start-up {result['startup_s']:.1f} s",
        f"{gigabytes:.3f} GB, sync by {result['path']} {result['again_s']:.4f} s = "
        f"{gigabytes / result['again_s']:.1f} GB/s (sender {result['sender_s']:.4f} s), by session "
        f"{result['session_s']:.4f} s",
        *(str(result[key]) for key in ("then", "killed") if key in result),
    ]
    print("; ".join(parts))


if __name__ == "__main__":
    main(tyro.cli(Check))
