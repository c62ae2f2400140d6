"""The program with random models, several steps; then its engine beside a fresh one from its checkpoint.

    python tests/bench/check_program.py --shapes small-mixtral --quantization fp8_per_channel [any flag]

Prints a line for each.
"""

import contextlib
import dataclasses
import json
import os
import tempfile
from pathlib import Path
from unittest import mock

import ray
import tests_on_path  # noqa: F401
import torch
import transformers
import tyro

from harness import Remote, assert_same, driver, fresh_engine, helper, observe, vllm_arguments, with_length
from random_models import build_random_model, write_config


@dataclasses.dataclass
class Check(driver.Config):
    """Some shapes, one after another."""

    shapes: tuple[str, ...] = ("tiny-opt",)
    """Keys of SHAPES in random_models.py."""
    steps: int = 3
    """Training steps, each with a sync."""
    learning_rate: float | None = 1e-3
    """Large, so that every tensor changes in every step."""
    dummy: bool = False
    """For a model that finds no room for a checkpoint and AdamW: the trainer's weights are made in place, the
    engine's by `load_format="dummy"`, and each gradient is used where it arises, by its sign. At the end the
    engine is compared with itself, zeroed and brought by a session."""


class DummyTrainer(driver.Trainer):
    """Memory for weights alone."""

    def __init__(self, config: Check):
        def made(folder: str, dtype: str, **_) -> torch.nn.Module:
            shape = transformers.AutoConfig.from_pretrained(folder)
            with torch.device(config.trainer_device):
                return transformers.AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, dtype))

        with mock.patch.object(transformers.AutoModelForCausalLM, "from_pretrained", made):
            super().__init__(config)
        for parameter in self.model.parameters():
            parameter.register_post_accumulate_grad_hook(self._use)

    @torch.no_grad()
    def _use(self, parameter: torch.nn.Parameter) -> None:
        parameter.sub_(parameter.grad.sign_(), alpha=self.config.learning_rate)
        parameter.grad = None

    def save_checkpoint(self, output_dir: Path, **_) -> tuple[int, Path]:
        """Nowhere."""
        return self.step, output_dir


def run(check: Check) -> tuple[dict, dict, driver.Config]:
    """The program's summary; what its engine held and said at the end (`harness.observe`); its config."""
    seen, plain_start, plain_report = [], driver.start, driver.report

    def start(*args):
        trainer, [engine], ranks = plain_start(*args)
        if check.dummy:  # the trainer's weights, as if the engine had started from them
            helper.find_agreement([trainer], [engine], helper.BUCKET_BYTES, check.timeout_s)
            helper.bring_weights([trainer], [engine], check.timeout_s, by_session=True)
            ray.get(engine.__ray_call__.remote(lambda llm: setattr(llm, "weights_version", 0)))
        seen.extend([trainer, engine])
        return trainer, [engine], ranks

    def report(config, summary):
        trainer, engine = seen
        then = observe(Remote(engine))
        if check.dummy:
            driver.wait(helper.on_workers([engine], "zero_weights"), 60, "setting weights to zero")
            helper.bring_weights([trainer], [engine], config.timeout_s, by_session=True)
            assert_same(then, observe(Remote(engine)))
        seen[:] = then, config
        plain_report(config, summary)

    kind = DummyTrainer if check.dummy else driver.Trainer
    with mock.patch.multiple(driver, start=start, report=report, Trainer=kind):
        summary = driver.main(check)
    return summary, *seen


def main(check: Check) -> None:
    os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"  # two compilations of one model choose the same kernels
    for shape in check.shapes:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as cleanup:
            path = (write_config if check.dummy else build_random_model)(f"{folder}/model", shape)
            torch.cuda.empty_cache()
            own = with_length(dataclasses.replace(check, model=path, output_dir=Path(folder)))
            with vllm_arguments(**({"load_format": "dummy"} if check.dummy else {})):
                summary, seen, config = run(own)
            if not check.dummy:
                learned = dataclasses.replace(config, model=f"{folder}/checkpoint-{check.steps}")
                fresh = fresh_engine(learned, summary["device"], "0,1")
                assert_same(seen, cleanup.enter_context(fresh)())
        proof, last = summary["sync"], summary["last_step"]
        found = (
            f"{proof['tensors']} tensors, {proof['changed']} follow the weights, because {proof['because']}"
        )
        layout = f"{shape} {summary['quantization']} TP={check.tensor_parallel_size}"
        other = "zeroed and brought by a session" if check.dummy else "a fresh engine"
        print(f"RESULT {layout}: proof by {proof['path']} in {proof['proof_s']:.1f} s ({found}); behind step")
        print(
            f"  {check.steps} {len(seen['checksums'])} tensors and {len(seen['outputs'])} answers as {other}"
        )
        print(f"  {json.dumps(last)}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Check))
