"""Sync equals cold start, on GPUs, for one shape: python tests/check_on_gpus.py --shape qwen3-0.6b [any flag of the driver].

Prints one line with what was measured; every difference is an AssertionError.
"""

import contextlib
import dataclasses
import json
import tempfile
from pathlib import Path

import ray
import torch
import tyro
from harness import driver, seed_demonstration, sync_versus_cold_start
from random_models import build_random_model


@dataclasses.dataclass
class Check(driver.Config):
    """One shape, one layout."""

    shape: str = "opt-125m"
    """A key of SHAPES in random_models.py."""
    more_syncs: int = 5
    """Repetitions for the median."""
    seed_loop: bool = False
    """Also run the seed's per-parameter loop, with the engine's own weights and with zeros."""


def main(check: Check) -> None:
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(ray.shutdown)
        config, device = driver.resolve(check, driver.connect(check))
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
        path = build_random_model(folder / "start", check.shape)
        torch.cuda.empty_cache() if torch.cuda.is_available() else None

        def demonstrate(llm, trained: str) -> dict:
            own_device = torch.device("cuda:0" if config.trainer_device == "cuda" else "cpu")
            backend = "nccl" if config.trainer_device == device == "cuda" else "gloo"
            return seed_demonstration(llm, trained, config.tensor_parallel_size, own_device, backend)

        result = sync_versus_cold_start(
            config, path, device, str(folder / "trained"), check.more_syncs, demonstrate if check.seed_loop else None
        )
    config.output_dir.mkdir(parents=True, exist_ok=True)
    layout = f"{check.shape} TP={check.tensor_parallel_size} trainer={config.trainer_device} eager={check.enforce_eager}"
    (config.output_dir / f"{layout.replace(' ', '_')}.json").write_text(json.dumps(result, indent=2))
    sync, rank = result["sync"], result["ranks"][0]
    print(
        f"RESULT {layout}: equal to a cold start in {result['tensors']} tensors; fp8 layers {rank['fp8_linear_layers']}, "
        f"weights/rank {rank['weights_gib']:.3f} GiB (BF16 {rank['bf16_weights_gib']:.3f}), "
        f"start {result['startup_s']:.1f} s, cold {result['cold_startup_s']:.1f} s, "
        f"first sync {sync['seconds']:.3f} s, again {result.get('sync_again_s', 0):.4f} s (sender {result.get('wire_s', 0):.4f} s), "
        f"{sync['bytes'] / 1e9:.3f} GB, extra GiB sender {sync['sender']['extra_gib']} "
        f"engine {[r['extra_gib'] for r in sync['ranks']]}, then {result.get('then')}"
    )


if __name__ == "__main__":
    main(tyro.cli(Check))
