"""Seconds of a training step by phase, in turn and overlapped, in one run; with `--peer trl` beside TRL's.

    python tests/bench/bench_loop.py --shape qwen3-0.6b --tensor-parallel-size 1 --lengths 128 512 \
        --peer trl [any flag of the driver]

Trainer and engine start once, from one checkpoint of random weights, whose answers have full length. For each
length: the engine's mismatch with the trainer, by precision of the trainer's products; rollouts as the loop
asks for them beside plain `LLM.generate`; then, with gradient checkpointing and without, `--repeats` steps
in turn and as many overlapped, after two to warm up. Medians count. TRL does the same work afterwards: the
same model, prompts, lengths, GPUs and modes, its engine in BF16, with an 8-bit AdamW where weights are in
BF16. Prints ratios within a mode, writes OUTPUT_DIR/loop_SHAPE.json and draws loop_SHAPE.png.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal
from unittest import mock

import bench_transfer
import matplotlib.pyplot as plt
import tests_on_path  # noqa: F401
import transformers
import tyro
from vllm import SamplingParams

from harness import connect, driver, helper, mismatch_kl, sampled, to_prompts, with_length, write_result
from random_models import build_random_model

WARM_UP = 2
PHASES = ["rollout_s", "train_s", "sync_s"]
COLORS = {  # of each way what it is drawn in; what no phase explains is the rest
    "TRL": {"TRL": "black"},
    "in turn": {"rollout_s": "tab:blue", "train_s": "tab:orange", "sync_s": "tab:green", "rest": "grey"},
    "overlapped": {"overlapped": "tab:purple"},
}


@dataclasses.dataclass
class Benchmark(driver.Config):
    """One shape."""

    shape: str = "tiny-opt"
    """A key of SHAPES in random_models.py."""
    lengths: tuple[int, ...] = (16, 32)
    """Completion tokens."""
    repeats: int = 5
    """Measured steps."""
    modes: tuple[Literal["on", "off"], ...] = ("on", "off")
    """Of gradient checkpointing; without it 8B does not fit."""
    peer: Literal["none", "trl"] = "none"
    """TRL, with trainer and vLLM server on a GPU each; it must be installed."""
    gpus: tuple[str, str] = ("1", "0")
    """Of TRL, of its server. Its server is on our trainer's GPU, where it idles meanwhile."""
    peer_server_args: str = "--gpu-memory-utilization=0.3"
    """More for `vllm serve`."""


class MeasuredTrainer(driver.Trainer):
    """The driver's, which can switch gradient checkpointing."""

    checkpointed: dict = {}  # layer -> its forward

    def checkpoint_activations(self, mode: str) -> None:
        """From now on, as the driver's flag does it at the start."""
        for layer in self.model.modules():
            own = vars(layer).pop("forward", None)  # what the driver has put before the class's
            self.checkpointed |= {layer: own} if own else {}
        for layer, forward in self.checkpointed.items() if mode == "on" else ():
            layer.forward = forward


def steps(config: Benchmark, trainer, engines: list, prompts: list, overlap: bool) -> dict[str, float]:
    """Medians of the loop's metrics, the trainer's largest memory, and the first step's mismatch."""
    rows, asked = [], None
    count = WARM_UP + config.repeats + overlap  # overlapped, the last one generates nothing
    for step in range(count):
        batch, following = (driver.prompts_of_step(config, prompts, number) for number in (step, step + 1))
        more = following if overlap and step + 1 < count else None
        row, _, asked = driver.rlhf_training_iteration(
            trainer, engines, batch, driver.letters, config, step, asked, more
        )
        rows.append(row)
        print(driver.LINE_OF_STEP.format(**row), flush=True)
    measured = rows[WARM_UP : WARM_UP + config.repeats]
    names = [*PHASES, "step_s", "tokens", "mismatch_kl"]
    result = {name: statistics.median(row[name] for row in measured) for name in names}
    result["tokens_per_s"] = result["tokens"] / result["step_s"]
    return result | {"trainer_gib": max(row["trainer_gib"] for row in rows)}


def generate_plainly(llm, prompts: list[list[int]], params: SamplingParams) -> float:
    """In the engine: tokens per second of vLLM's own `generate`."""
    start = time.perf_counter()
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(asked, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    return sum(len(answer.token_ids) for output in outputs for answer in output.outputs) / seconds


def rollout_rates(config: Benchmark, engine, prompts: list) -> dict[str, float]:
    """Tokens per second: `loop`, as the loop asks; `plain`, LLM.generate with neither seeds nor
    log-probabilities.
    """
    batch, rates = driver.prompts_of_step(config, prompts, 0), {"loop": [], "plain": []}
    samples = dict(n=config.samples_per_prompt, temperature=config.temperature)
    plainly = [prompt.token_ids for prompt in batch], SamplingParams(max_tokens=config.max_tokens, **samples)
    for step in range(5):  # in turn, so that nothing that drifts favours one
        rollouts, seconds, _ = driver.take_in(driver.ask([engine], batch, config, step), config)
        rates["loop"].append(sum(len(rollout.completion) for rollout in rollouts) / seconds)
        plain = engine.__ray_call__.remote(generate_plainly, *plainly)
        rates["plain"] += driver.wait([plain], 300, "plain generation")
    return {name: statistics.median(each) for name, each in rates.items()}


def measure(config: Benchmark, device: str, port: int | None) -> dict[int, dict]:
    """The program's part: for each length its rates, mismatches, and medians by mode and way."""
    found, prompts = {}, to_prompts(config.model)
    with contextlib.ExitStack() as stop:
        stop.enter_context(mock.patch.object(driver, "Trainer", MeasuredTrainer))
        trainer, engines, _ = driver.start(config, device, stop)
        helper.prove_sync(trainer, engines, timeout_s=config.timeout_s)
        if port:
            bench_transfer.wait_for_server(port)  # its start would be measured, too
        for length in config.lengths:
            own = dataclasses.replace(config, max_tokens=length)
            rollouts, kl = sampled(own, engines), {}
            for precision in ("bfloat16", "float32"):
                comparing = trainer.__ray_call__.remote(mismatch_kl, rollouts, precision)
                [kl[precision]] = driver.wait([comparing], 300, "comparing")
            found[length] = {
                "mismatch_kl_of_the_first_batch": kl,
                "rollout_tokens_per_s": rollout_rates(own, engines[0], prompts),
            }
            for mode in config.modes:
                driver.wait([trainer.checkpoint_activations.remote(mode)], 60, "switching")
                found[length][mode] = {
                    "in turn": steps(own, trainer, engines, prompts, overlap=False),
                    "overlapped": steps(own, trainer, engines, prompts, overlap=True),
                }
            print(length, json.dumps(found[length]), flush=True)
    return found


def measure_trl(config: Benchmark, port: int) -> dict[int, dict]:
    """TRL's part: seconds of a step by length and mode, each in a process of its own, on our engine's GPU."""
    found = {length: {} for length in config.lengths}
    for length, mode in itertools.product(config.lengths, config.modes):
        flags = dict(
            model=config.model, port=port, steps=WARM_UP + config.repeats, dtype=config.trainer_dtype
        )
        flags |= {"max-tokens": length, "microbatch": config.tokens_per_microbatch // length}
        command = [sys.executable, str(Path(__file__).with_name("peer_trl.py")), "--prompts", *helper.PROMPTS]
        command += [f"--{name}={value}" for name, value in flags.items()]
        command += ["--gradient-checkpointing" if mode == "on" else "--no-gradient-checkpointing"]
        with (config.output_dir / f"trl_{length}_{mode}.log").open("w") as log:
            output = subprocess.run(
                command,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": config.gpus[0]},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                timeout=300,
                check=True,
            ).stdout
        said = json.loads(output.strip().splitlines()[-1])
        print("TRL", length, mode, json.dumps(said), flush=True)
        medians = {name: statistics.median(said[name][WARM_UP:]) for name in ("step_s", "sync_s")}
        found[length][mode] = said | medians
    return found


def main(config: Benchmark) -> dict:
    """Measure, write, print and draw."""
    config.output_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as cleanup:
        path = build_random_model(cleanup.enter_context(tempfile.TemporaryDirectory()), config.shape)
        config = with_length(dataclasses.replace(config, model=path), 64 + max(config.lengths))
        port = None
        if config.peer == "trl":
            longest = json.loads(config.engine_args)["max_model_len"]
            serving = dict(server_args=config.peer_server_args, max_model_len=longest)
            serving |= dict(quantization="none", gpus=config.gpus, output_dir=config.output_dir)
            serving = bench_transfer.Benchmark(**serving)
            port = cleanup.enter_context(bench_transfer.server(serving, path, "trl", "nccl"))
        with contextlib.ExitStack() as stop:
            config, device = driver.resolve(config, connect(config, stop))
            dtype = driver.choose_dtype(config, transformers.AutoConfig.from_pretrained(path))
            config = dataclasses.replace(config, trainer_dtype=dtype)
            result = write_result(config, device, "loop", lengths=measure(config, device, port))
        if port:
            for length, said in measure_trl(config, port).items():
                for mode in config.modes:
                    result["lengths"][length][mode]["TRL"] = said[mode]
    (config.output_dir / f"loop_{config.shape}.json").write_text(json.dumps(result, indent=2))
    report(result, config)
    return result


def report(result: dict, config: Benchmark) -> None:
    """Print a table and draw it: a bar for each length, mode and way; steps in turn in their phases."""
    work = f"{config.prompts_per_step} x {config.samples_per_prompt} completions"
    title = f"{result['shape']}, {work}, {result['layout']}, {result['device']}"
    print(title)
    names = "".join(f"{name:>9}" for name in ("step", "rollout", "train", "sync", "tokens/s", "GiB"))
    print(f"{'tokens':>6} {'checkpointing':>13} {'':10}{names}")
    size = dict(figsize=(10, 4), layout="constrained")
    figure, axes = plt.subplots(1, len(config.lengths), sharey=True, squeeze=False, **size)
    for axis, length in zip(axes[0], config.lengths, strict=True):
        found, bars = result["lengths"][length], {}
        for mode, way in itertools.product(config.modes, COLORS):
            if way not in found[mode]:
                continue
            row, trl = found[mode][way], found[mode].get("TRL")
            numbers = [f"{row[name]:8.3f}s" if name in row else f"{'':9}" for name in ["step_s", *PHASES]]
            numbers += [f"{row['tokens_per_s']:9.0f}" if way != "TRL" else f"{'':9}"]
            numbers += [f"{row['trainer_gib']:9.1f}"]
            if trl and way != "TRL":
                numbers += [f"  {trl['step_s'] / row['step_s']:.2f} times as fast as TRL"]
            print(f"{length:6} {mode:>13} {way:10}{''.join(numbers)}")
            bars[f"{way}, {mode}"] = y = len(bars) + (0.5 if mode == "off" else 0.0)
            left = 0.0
            for name, color in COLORS[way].items():
                seconds = row[name] if name in PHASES else row["step_s"] - left
                axis.barh(y, seconds, left=left, color=color, label=name.removesuffix("_s"))
                left += seconds
            axis.text(left, y, f" {left:.2f}", va="center", fontsize="small")
        rates, kl = found["rollout_tokens_per_s"], found["mismatch_kl_of_the_first_batch"]
        part = f"{rates['loop'] / rates['plain']:.2f} of plain LLM.generate"
        print(f"{length:6} rollouts: {rates['loop']:.0f} tokens/s, {part}")
        print(f"{length:6} mismatch KL: BF16 products {kl['bfloat16']:.2e}, FP32 {kl['float32']:.2e}")
        axis.set(title=f"{length} tokens", xlabel="seconds a step", yticks=[*bars.values()])
        axis.set_yticklabels(bars)
        axis.margins(x=0.12)
    axes[0][0].set_ylabel("way, gradient checkpointing")
    axes[0][0].invert_yaxis()
    handles = {label: handle for handle, label in zip(*axes[0][0].get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), fontsize="small")
    figure.suptitle(title, fontsize="small")
    figure.savefig(config.output_dir / f"loop_{config.shape}.png", dpi=120)


if __name__ == "__main__":
    import bench_loop  # by this name the actors know its trainer

    bench_loop.main(tyro.cli(bench_loop.Benchmark))
