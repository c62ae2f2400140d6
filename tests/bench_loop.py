"""Seconds of a training step by phase, in turn and overlapped, in one run; with `--peer trl` beside TRL's.

    python tests/bench_loop.py --shape qwen3-0.6b --tensor-parallel-size 1 --max-model-len 1024 \
        --lengths 128 512 --peer trl [any flag of the driver]

Trainer and engine start once, from one checkpoint of random weights, whose answers have full length. For each
length: the engine's mismatch with the trainer, by precision of the trainer's products; rollouts as the loop
asks for them beside plain `LLM.generate`; then `--repeats` steps in turn and as many overlapped, after two
to warm up. Medians count. TRL does the same work afterwards (the same model, prompts, lengths and GPUs, its
engine in BF16). Prints ratios, writes OUTPUT_DIR/loop_SHAPE.json and draws loop_SHAPE.png.
"""

import contextlib
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from unittest import mock

import matplotlib.pyplot as plt
import torch
import tyro
from vllm import SamplingParams
from vllm.utils.network_utils import get_open_port

from harness import connect, driver, write_result
from random_models import build_random_model

WARM_UP = 2
PHASES = ["rollout_s", "train_s", "sync_s"]


@dataclasses.dataclass
class Benchmark(driver.Config):
    """One shape."""

    shape: str = "tiny-opt"
    """A key of SHAPES in random_models.py."""
    lengths: tuple[int, ...] = (16, 32)
    """Completion tokens."""
    repeats: int = 5
    """Measured steps."""
    peer: Literal["none", "trl"] = "none"
    """TRL, with trainer and vLLM server on a GPU each; it must be installed."""


class MeasuredTrainer(driver.Trainer):
    """The driver's, which can compare itself with the engine."""

    def checkpointed(self, rollouts: list[dict]) -> dict:
        """Metrics of training steps with --gradient-checkpointing, the last of three."""
        self.model.gradient_checkpointing_enable()
        self.model.train()
        metrics = [self.train_step(rollouts) for _ in range(3)][-1]
        self.model.gradient_checkpointing_disable()
        self.model.eval()
        return metrics

    @torch.no_grad()
    def mismatch_kl(self, rollouts: list[dict], precision: str) -> float:
        """Nats per token, with products in that precision."""
        usual = self.config
        self.config = dataclasses.replace(usual, matmul_precision=precision)
        batches = [self._pad(part) for part in driver.split_by_tokens(rollouts, usual.tokens_per_microbatch)]
        ours = [self._logprobs(self.model, batch)[batch["mask_BT"]] for batch in batches]
        self.config = usual
        engine = [batch["engine_BT"][batch["mask_BT"]] for batch in batches]
        return driver.measure_mismatch(torch.cat(ours), torch.cat(engine))["mismatch_kl"]


def steps(config: Benchmark, trainer, engines: list, overlap: bool) -> dict[str, float]:
    """Medians of the loop's metrics, the trainer's largest memory, and the first step's mismatch."""
    rows, ahead = [], None
    count = WARM_UP + config.repeats + overlap  # overlapped, the last one generates nothing
    for step in range(count):
        prompts = driver.prompts_of_step(config, driver.PROMPTS, step)
        more = (
            driver.prompts_of_step(config, driver.PROMPTS, step + 1) if overlap and step + 1 < count else None
        )
        *_, row, ahead = driver.rlhf_training_iteration(
            trainer, engines, prompts, config, step, ahead, next_prompts=more
        )
        rows.append(row)
        print(driver.LINE_OF_STEP.format(**row), flush=True)
    measured = rows[WARM_UP : WARM_UP + config.repeats]
    names = [*PHASES, "step_s", "tokens", "mismatch_kl"]
    result = {name: statistics.median(row[name] for row in measured) for name in names}
    result["tokens_per_s"] = result["tokens"] / result["step_s"]
    return result | {"trainer_gib": max(row["trainer_gib"] for row in rows)}


def rollout_rates(config: Benchmark, engine) -> dict[str, float]:
    """Tokens per second: as the loop asks, and by LLM.generate with neither seeds nor log-probabilities."""
    prompts = driver.prompts_of_step(config, driver.PROMPTS, 0)
    params = SamplingParams(
        n=config.samples_per_prompt, max_tokens=config.max_tokens, temperature=config.temperature
    )
    plain = [engine.generate.remote, prompts, params]
    rates = {"loop": [], "plain": []}
    for step in range(1 + 3):  # in turn, so that nothing that drifts favours one
        asked = {"loop": driver.generate([engine], prompts, config, step)}
        asked["plain"] = driver.wait([plain[0](*plain[1:], use_tqdm=False)], 300, "plain generation")[0]
        for name, outputs in asked.items():
            tokens = sum(len(answer.token_ids) for output in outputs for answer in output.outputs)
            rates[name].append(tokens / outputs[0].seconds)
    return {name: statistics.median(each[1:]) for name, each in rates.items()}


def measure(config: Benchmark, path: str, device: str) -> dict[int, dict]:
    """The program's part: for each length its rates, mismatches and medians."""
    found = {}
    with contextlib.ExitStack() as stop:
        stop.enter_context(mock.patch.object(driver, "Trainer", MeasuredTrainer))
        trainer, engines, _ = driver.start(config, path, device, stop)
        driver.prove_sync(trainer, engines, timeout_s=config.timeout_s)
        for length in config.lengths:
            own = dataclasses.replace(config, max_tokens=length)
            outputs = driver.generate(engines, driver.prompts_of_step(own, driver.PROMPTS, 0), own)
            no_advantages = torch.zeros(len(outputs), own.samples_per_prompt)
            rollouts = driver.to_rollouts(outputs, no_advantages)
            kl = {
                precision: driver.wait([trainer.mismatch_kl.remote(rollouts, precision)], 300, "comparing")[0]
                for precision in ("bfloat16", "float32")
            }
            [checkpointed] = driver.wait([trainer.checkpointed.remote(rollouts)], 300, "training")
            found[length] = {
                "mismatch_kl_of_the_first_batch": kl,
                "checkpointed": {name: checkpointed[name] for name in ("train_s", "trainer_gib")},
                "rollout_tokens_per_s": rollout_rates(own, engines[0]),
                "in turn": steps(own, trainer, engines, overlap=False),
                "overlapped": steps(own, trainer, engines, overlap=True),
            }
            print(length, json.dumps(found[length]), flush=True)
    return found


@contextlib.contextmanager
def trl_server(config: Benchmark, path: str) -> Iterator[int]:
    """TRL's vLLM server, on our trainer's GPU, where it takes little memory and idles meanwhile; its port."""
    port = get_open_port()
    command = [sys.executable, "-m", "trl.scripts.vllm_serve", "--model", path, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--max_model_len", str(config.max_model_len), "--dtype", "bfloat16"]
    command += ["--gpu_memory_utilization", "0.3"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "0", "VLLM_SERVER_DEV_MODE": "1"}
    with (config.output_dir / "trl_server.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            yield port
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


def measure_trl(config: Benchmark, path: str, port: int) -> dict[int, dict]:
    """TRL's part: seconds of a step for each length, with its trainer on our engine's GPU."""
    found, give_up = {}, time.monotonic() + 200
    while time.monotonic() < give_up:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            break
        time.sleep(1)
    for length in config.lengths:
        numbers = [WARM_UP + config.repeats + 1, length, config.tokens_per_microbatch // length, port]
        command = [sys.executable, str(Path(__file__).with_name("peer_trl.py")), path, *map(str, numbers)]
        with (config.output_dir / f"trl_{length}.log").open("w") as log:
            output = subprocess.run(
                [*command, json.dumps(driver.PROMPTS)],
                env=os.environ | {"CUDA_VISIBLE_DEVICES": "1"},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                timeout=300,
                check=True,
            ).stdout
        said = json.loads(output.strip().splitlines()[-1])
        seconds = said["step_s"][WARM_UP:]
        found[length] = {"step_s": statistics.median(seconds), "trainer_gib": said["trainer_gib"]}
        print("TRL", length, json.dumps(found[length]), flush=True)
    return found


def main(config: Benchmark) -> dict:
    """Measure, write, print and draw."""
    config.output_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as cleanup:
        path = build_random_model(cleanup.enter_context(tempfile.TemporaryDirectory()), config.shape)
        port = cleanup.enter_context(trl_server(config, path)) if config.peer == "trl" else None
        with contextlib.ExitStack() as stop:
            wanted = dataclasses.replace(config, model=path, reward="letters")
            config, device = driver.resolve(wanted, connect(config, stop))
            result = write_result(config, device, "loop", ours=measure(config, path, device))
        if port:
            result["trl"] = measure_trl(config, path, port)
    (config.output_dir / f"loop_{config.shape}.json").write_text(json.dumps(result, indent=2))
    report(result, config)
    return result


def report(result: dict, config: Benchmark) -> None:
    """Print a table and draw it: a bar for each way, in its phases."""
    work = f"{config.prompts_per_step} x {config.samples_per_prompt} completions"
    title = f"{result['shape']}, {work}, {result['layout']}, {result['device']}"
    print(title)
    names = "".join(f"{name:>9}" for name in ("step", "rollout", "train", "sync", "tokens/s"))
    print(f"{'tokens':>6} {'':10} {names} {'GiB':>6}")
    figure, axes = plt.subplots(1, len(config.lengths), figsize=(9, 3.5), layout="constrained", squeeze=False)
    for axis, length in zip(axes[0], config.lengths, strict=True):
        ours, trl = result["ours"][length], result.get("trl", {}).get(length)
        for way in ("overlapped", "in turn"):
            row, left = ours[way], 0.0
            times = "".join(f"{row[phase]:8.3f}s" for phase in ["step_s", *PHASES])
            more = f"{trl['step_s'] / row['step_s']:.2f} times as fast as TRL" if trl else ""
            print(f"{length:6} {way:10} {times} {row['tokens_per_s']:9.0f} {row['trainer_gib']:6.1f} {more}")
            phases = {phase: row[phase] for phase in PHASES} if way == "in turn" else {}
            for phase, seconds in phases.items():
                axis.barh(way, seconds, left=left, label=phase.removesuffix("_s"))
                left += seconds
            rest = dict(color="grey", label="rest") if phases else dict(color="tab:purple")
            axis.barh(way, row["step_s"] - left, left=left, **rest)
        if trl:
            print(f"{length:6} {'TRL':10} {trl['step_s']:8.3f}s {'':36} {trl['trainer_gib']:6.1f}")
            axis.barh("TRL", trl["step_s"], color="black")
        checkpointed = ours["checkpointed"]
        name, memory = "with --gradient-checkpointing", f"{checkpointed['trainer_gib']:.1f} GiB"
        print(f"{length:6} {name}: train {checkpointed['train_s']:.3f} s, {memory}")
        rates, kl = ours["rollout_tokens_per_s"], ours["mismatch_kl_of_the_first_batch"]
        part = f"{rates['loop'] / rates['plain']:.2f} of plain LLM.generate"
        print(f"{length:6} rollouts: {rates['loop']:.0f} tokens/s, {part}")
        print(f"{length:6} mismatch KL: BF16 products {kl['bfloat16']:.2e}, FP32 {kl['float32']:.2e}")
        axis.set(title=f"{length} tokens", xlabel="seconds a step")
    axes[0][0].legend()
    figure.suptitle(title, fontsize="small")
    figure.savefig(config.output_dir / f"loop_{config.shape}.png", dpi=120)


if __name__ == "__main__":
    import bench_loop  # by this name the actors know its trainer

    bench_loop.main(tyro.cli(bench_loop.Benchmark))
