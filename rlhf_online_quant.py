"""RL with an FP8 rollout engine that is quantized online: the reference pattern.

    driver (this program, no GPU)
      |-- trainer   Ray actor, GPU 0            full-precision Hugging Face model, AdamW
      `-- engine    Ray actor MyLLM(vllm.LLM)   FP8 by torchao or vLLM, tensor parallel on GPUs 1-2
            weights: trainer == NCCL broadcast, BF16, not quantized ==> each worker, quantized on arrival

    prove_sync(trainer, engines)                            # syncs are right, or the run ends here
    for every step:                                         # `rlhf_training_iteration`
        outputs = engines.generate(prompts)                 # G answers to each, with log-probabilities
        advantages = compute_advantages(compute_rewards(outputs))
        trainer.train_step(to_rollouts(outputs, advantages))  # PPO's loss, corrected for FP8
        sync_weights_to_quantized_engine(trainer, engines)  # the next answers come from these weights

Left out, because it hides the pattern: a value network (advantages come from the group), rollouts that are
older than `--overlap` makes them, sharded trainers (rlhf_utils.py, which has both ends of the wire, takes
them). Without a GPU the same processes run on the CPU (gloo, weight-only FP8, a tiny model).

Names of dimensions: P prompts, G samples per prompt, B sequences of a micro-batch, L tokens of a sequence,
T = L - 1 predicted ones, H hidden size, V vocabulary, N all sampled tokens at hand. `rewards_PG` has the
shape (P, G).
"""

import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import inspect
import json
import logging
import math
import multiprocessing.forkserver
import os
import pkgutil
import random
import re
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal
from unittest import mock

# What every process of a run has in its environment, if the user has not set it.
ENVIRONMENT = {
    # Without a GPU: two workers share a NUMA node, which vLLM refuses by default; and KV cache in GiB.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # vLLM's scheduler runs inside the actor: a process less, and batches that do not depend on timing.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
QUIET = os.environ.get("VLLM_LOGGING_LEVEL", "ERROR") == "ERROR"  # libraries print their errors only
if QUIET:
    ENVIRONMENT |= {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TORCH_LOGS": "-torch.utils._pytree",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
if __name__ == "__main__":
    os.environ |= {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}
    print("Importing PyTorch, vLLM and Ray ...", flush=True)
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # until `main` can say more
if os.environ.get("VLLM_LOGGING_LEVEL") == "ERROR":  # in the program's processes; some warn on import
    for name in ("torchao", "vllm", "ray", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if os.environ.get("PYTHONWARNINGS") == "ignore":
        warnings.simplefilter("ignore")

import psutil
import ray
import tokenizers
import torch
import torchao
import transformers
import tyro
import vllm
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch.utils.checkpoint import checkpoint
from torchao.core.config import AOBaseConfig, config_from_dict, config_to_dict
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Float8WeightOnlyConfig, PerRow
from transformers.modeling_layers import GradientCheckpointingLayer
from vllm import LLM, SamplingParams
from vllm.v1.engine import output_processor
from vllm.v1.engine.logprobs import FlatLogprobs, LogprobsProcessor

from rlhf_utils import (
    ACTORS,
    PROMPTS,
    SYNCING,
    MyLLM,
    WeightSender,
    cause_of,
    join_group,
    prove_fp8,
    prove_sync,
    some,
    sync_weights_to_quantized_engine,
    wait,
)

# ----- 1. Config --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    """RL with an FP8 vLLM rollout engine, quantized online."""

    model: str = "auto"
    """Hugging Face name, local folder, or `tiny` (made here). `auto`: facebook/opt-125m on GPUs, or tiny."""
    trainer_device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where the trainer runs; `auto` takes a GPU if the cluster has any."""
    trainer_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the trainer's weights and optimizer. In bfloat16 small steps are lost in rounding. (Products are in
    bfloat16 on GPUs, by autocast, whatever this says.)"""
    tensor_parallel_size: int = 2
    """GPUs of an engine (CPU: processes). The trainer's GPU comes on top."""
    num_engines: int = 1
    """Engines that share the prompts of a step; each has its own tensor-parallel group."""
    quantization: str = "auto"
    """torchao's `fp8-dynamic` (`auto` on GPUs), `fp8-weight-only` (`auto` on CPU) or a file with a torchao
    config; vLLM's `fp8_per_channel`, `fp8_per_block`, `fp8_per_tensor` (experts, too); or `none`."""
    enforce_eager: bool = False
    """Start faster and generate much more slowly: no compilation, no CUDA graphs. Always so on the CPU."""
    max_model_len: int = 512
    """Longest prompt plus completion, in tokens."""
    engine_args: str = "{}"
    """JSON with any other keyword of vllm.LLM: '{"gpu_memory_utilization": 0.5, "kv_cache_dtype": "fp8"}'."""

    steps: int = 20
    """Training steps: rollouts, rewards, optimizer, sync. 0 only starts, proves and samples."""
    prompts_file: Path | None = None
    """UTF-8 text, one prompt a line. Default: what the reward asks for, else vLLM's four examples."""
    reward: str = "auto"
    """`backwards` (`auto` for the tiny model without a prompts file), `letters` (share of a-z; `auto` for
    others), or `module:function`; see `compute_rewards`."""
    prompts_per_step: int = 32
    """P, prompts per step."""
    samples_per_prompt: int = 16
    """G, completions per prompt; advantages are relative to their mean."""
    max_tokens: int = 32
    """Longest completion, in tokens. One that is cut off is rewarded and learned from like any other."""
    temperature: float = 1.0
    """Of the rollouts. The samples before and after training are always greedy."""
    learning_rate: float | None = None
    """AdamW's step size. Default: 1e-6, and 2e-3 for the tiny model."""
    epochs: int | None = None
    """Optimizer steps per rollout batch, each on all of it. PPO's clipping matters from the second on.
    Default: 1, and 2 for the tiny model."""
    overlap: bool = False
    """Generate the next batch while this one is trained on, by weights that are then one step old."""
    kl_coef: float = 0.0
    """Weight of the KL divergence to the initial policy; above 0 the trainer keeps a frozen copy."""
    tokens_per_microbatch: int = 8192
    """Longest forward and backward pass (padded tokens); gradients accumulate over as many as it takes."""
    gradient_checkpointing: bool = True
    """Compute activations of two layers in three again in the backward pass: less memory, more time."""

    output_dir: Path = Path("outputs")
    """Gets metrics.jsonl, curves.png, summary.json, and checkpoint-N."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves at the end only (and, if it can, when a run fails)."""
    resume: Path | None = None
    """A checkpoint-N of an earlier run with the same flags: go on from its model, optimizer and step."""
    track: Literal["none", "trackio", "wandb"] = "none"
    """Send the metrics there too (install it yourself)."""
    seed: int = 0
    """Of the tiny model, prompts and sampling. On the CPU the same seed gives the same curve."""
    timeout_s: float = 30.0
    """Longest wait (seconds) for a sync or a reward function; ten times that for all that takes longer."""
    ray_address: str | None = None
    """A running cluster (`auto`, `10.0.0.1:6379`) whose nodes share local folders. Default: a private one."""

    @property
    def world_size(self) -> int:
        """Ranks of the weight-update group: the trainer and every engine's workers."""
        return 1 + self.num_engines * self.tensor_parallel_size

    @property
    def draws_prompts(self) -> bool:
        """Does the reward bring its own prompts, new ones for each step?"""
        return self.reward == "backwards" and self.prompts_file is None


@contextlib.contextmanager
def expected(flag: str, what: str) -> Iterator[None]:
    """What the block raises, because of what the user gave, becomes a ValueError: expected and found."""
    try:
        yield
    except (Exception, SystemExit) as error:  # a module of the user's may raise whatever it likes
        raise ValueError(f"{flag}: expected {what}. Found: {type(error).__name__}: {error}") from error


# ----- 2. The loop ------------------------------------------------------------------------------------------


def rlhf_training_iteration(
    train_model,
    quantized_llm: list,
    prompts: list[str],
    config: Config,
    step: int = 0,
    outputs: list | None = None,
    next_prompts: list[str] | None = None,
) -> tuple[list, list[list[float]], dict, list]:
    """Rollouts, rewards, a training step, sync. Returns vLLM's outputs, rewards (P, G) and metrics.

    With `next_prompts` (`--overlap`) the engines generate for the next step while the trainer learns from
    this one; what they return comes last, and is the next call's `outputs`.
    """
    start = time.perf_counter()
    outputs = outputs or generate(quantized_llm, prompts, config, step)
    ahead = start_generating(quantized_llm, next_prompts, config, step + 1) if next_prompts else []
    rewards_PG = compute_rewards(outputs, load_reward(config.reward), config.timeout_s)
    rollouts = to_rollouts(outputs, compute_advantages(torch.tensor(rewards_PG, dtype=torch.float64)))
    [trained] = wait([train_model.train_step.remote(rollouts)], 10 * config.timeout_s, "the training step")
    # An engine that generates cannot be synced.
    ahead = sum(wait(ahead, 10 * config.timeout_s, "generating for the next step"), [])
    sync = sync_weights_to_quantized_engine(train_model, quantized_llm, timeout_s=config.timeout_s)
    versions = [llm.get_weights_version.remote() for llm in quantized_llm]
    tokens = sum(len(rollout["completion"]) for rollout in rollouts)
    rollout_s = max(output.seconds for output in outputs)
    finished = [completion.finish_reason == "stop" for output in outputs for completion in output.outputs]
    metrics = {
        "step": step,
        "reward": sum(map(sum, rewards_PG)) / len(rollouts),
        "tokens": tokens,
        "tokens_per_s": tokens / rollout_s,
        "truncated": 1 - sum(finished) / len(finished),
        **trained,
        "rollout_s": rollout_s,
        "sync_s": sync["seconds"],
        "sync_path": sync["path"],
        "sync_gb_per_s": sync["gb_per_s"],
        "step_s": time.perf_counter() - start,
        "sampled_version": min(output.weights_version for output in outputs),
        "weights_version": wait(versions, config.timeout_s, "reading the version")[0],
    }
    return outputs, rewards_PG, metrics, ahead


def generate(engines: list, prompts: list[str], config: Config, step: int = 0) -> list:
    """One vLLM RequestOutput per prompt, in order; see `start_generating`."""
    calls = start_generating(engines, prompts, config, step)
    return sum(wait(calls, 10 * config.timeout_s, "generating"), [])


def start_generating(engines: list, prompts: list[str], config: Config, step: int = 0) -> list[ray.ObjectRef]:
    """Ask each engine for an equal share of the prompts' completions.

    Raises RuntimeError while a weight sync is running. (A call to the actor itself waits for its turn.)
    """
    if SYNCING.locked():
        raise RuntimeError("refusing to generate: a weight sync is running; ask again when it has ended")
    samples, first = config.samples_per_prompt, config.seed * 10**6 + step * len(prompts)
    sampling = dict(n=samples, temperature=config.temperature, max_tokens=config.max_tokens, **ROLLOUT)
    seeds = [(first + i) * samples % 2**62 for i in range(len(prompts))]  # vLLM adds the sample's index
    params = [SamplingParams(seed=seed, **sampling) for seed in seeds]
    share = math.ceil(len(prompts) / len(engines))
    return [
        llm.generate.remote(prompts[i : i + share], params[i : i + share], use_tqdm=False)
        for llm, i in zip(engines, range(0, len(prompts), share))
    ]


def to_rollouts(outputs: list, advantages_PG: torch.Tensor) -> list[dict]:
    """What `Trainer.train_step` takes: token ids, the engine's log-probabilities (nats), advantages.

    Raises RuntimeError if the engine gave a log-probability that is not finite.
    """
    rollouts = [
        {
            "prompt": list(output.prompt_token_ids),
            "completion": list(completion.token_ids),
            "logprobs": list(completion.logprobs.logprobs),
            "advantage": advantage,
        }
        for output, advantages_G in zip(outputs, advantages_PG.tolist(), strict=True)
        for completion, advantage in zip(output.outputs, advantages_G, strict=True)
    ]
    wrong = [rollout for rollout in rollouts if not all(map(math.isfinite, rollout["logprobs"]))]
    if wrong:
        raise RuntimeError(
            f"the engine's log-probabilities of {len(wrong)} of {len(rollouts)} completions are not finite; "
            "nothing was learned from them. Lower --learning-rate, or see whether --quantization none helps"
        )
    return rollouts


def backwards(prompts: list[str], completions: list[str]) -> list[float]:
    """The share of letters that are right and in place, of the prompt's last word written backwards.

    Only who reads the prompt can do it: a word of random letters says nothing about the next one.

    >>> backwards(["Backwards: abcde ->"] * 3, [" edcba", " edxba", " edcbaedcba"])
    [1.0, 0.8, 0.5]
    """
    words = [(re.findall(r"\w+", prompt) or [""])[-1][::-1] for prompt in prompts]
    pairs = list(zip(words, map(str.strip, completions), strict=True))
    right = [sum(letter == other for letter, other in zip(*pair)) for pair in pairs]
    return [count / max(1, *map(len, pair)) for count, pair in zip(right, pairs)]


def letters(prompts: list[str], completions: list[str]) -> list[float]:
    """The share of characters that are lower-case letters a-z: what a random model can learn from scratch."""
    return [len(re.findall("[a-z]", completion)) / max(1, len(completion)) for completion in completions]


def load_reward(name: str) -> Callable[..., list[float]]:
    """The function behind `--reward`. Raises ValueError if there is none."""
    shipped = {"backwards": backwards, "letters": letters}
    if name in shipped:
        return shipped[name]
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    with expected(f"--reward {name}", f"{', '.join(shipped)}, or module:function, here or installed"):
        reward = pkgutil.resolve_name(name)
        if not callable(reward):
            raise TypeError(f"a {type(reward).__name__}, not a function")
        return reward


def compute_rewards(outputs: list, reward: Callable = letters, timeout_s: float = 30.0) -> list[list[float]]:
    """Rewards of every completion, in the shape (P, G).

    Args:
        reward: gets a list of prompts and one of completions (without special tokens) and returns as many
            floats. By parameters of these names it gets `finish_reasons`, too ("length" for a completion that
            was cut off, else "stop"), and `completion_ids`, all token ids.

    Raises:
        RuntimeError: the function raised, or returned anything but one finite number per completion.
        TimeoutError: it has not returned for `timeout_s` seconds. (Not if it never lets go of Python's lock,
            as a regular expression that backtracks for ever.)
    """
    name = getattr(reward, "__name__", repr(reward))
    prompts = [output.prompt for output in outputs for _ in output.outputs]
    completions = [completion for output in outputs for completion in output.outputs]
    answer = concurrent.futures.Future()

    def ask() -> None:
        """In a thread of its own, which may hang."""
        try:
            wanted, more = {}, {}
            with contextlib.suppress(TypeError, ValueError):  # not all that is written in C has a signature
                wanted = inspect.signature(reward).parameters
            if "finish_reasons" in wanted:
                more["finish_reasons"] = [completion.finish_reason for completion in completions]
            if "completion_ids" in wanted:
                more["completion_ids"] = [list(completion.token_ids) for completion in completions]
            rewards = reward(prompts, [completion.text for completion in completions], **more)
            answer.set_result([float(value) for value in rewards])
        except BaseException as error:  # raised below; SystemExit would end this thread without a word
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()  # a daemon does not keep the program from ending
    if not concurrent.futures.wait([answer], timeout_s).done:
        raise TimeoutError(f"reward function {name} has not returned for {timeout_s:g} s")
    if error := answer.exception():
        message = f"reward function {name} failed: {type(error).__name__}: {error}"
        if "main thread" in str(error):  # signal.alarm, by which math_verify limits its time
            message += ". It runs in a thread, where signals cannot be set: switch its own time limit off "
            message += "(math_verify: timeout_seconds=None, parsing_timeout=None); --timeout-s is one"
        raise RuntimeError(message) from error
    rewards, largest = answer.result(), torch.finfo(torch.float32).max
    wrong = [f"{value} for {c.text!r}" for value, c in zip(rewards, completions) if not abs(value) <= largest]
    if wrong or len(rewards) != len(completions):
        what = f"expected {len(completions)} finite numbers, one per completion; found {len(rewards)} numbers"
        raise RuntimeError(f"reward function {name}: {what}, not finite: {wrong[:3] or 'none'}")
    rows = iter(rewards)
    return [[next(rows) for _ in output.outputs] for output in outputs]


def compute_advantages(rewards_PG: torch.Tensor) -> torch.Tensor:
    """Rewards, centred and scaled within each group, as in GRPO.

    Shao et al. 2024, arXiv:2402.03300, section 4.1.2. A group of equal rewards has no advantages, whatever
    rounding makes of their mean.

    >>> compute_advantages(torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.7, 0.7, 0.7, 0.7]]))
    tensor([[-0.8660, -0.8660,  0.8660,  0.8660],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    equal_P1 = (rewards_PG == rewards_PG[:, :1]).all(dim=1, keepdim=True)
    return (centred_PG / (rewards_PG.std(dim=1, keepdim=True) + 1e-6)).masked_fill(equal_P1, 0.0)


def prompts_of_step(config: Config, prompts: list[str], step: int) -> list[str]:
    """P prompts: the next in turn; for `backwards`, without a file, new words."""
    count = config.prompts_per_step
    if config.draws_prompts:
        return ask_backwards(f"{config.seed} {step}", count)
    return [prompts[(step * count + i) % len(prompts)] for i in range(count)]


def ask_backwards(seed: str, count: int, held_out: bool = False) -> list[str]:
    """Prompts with random words of 5 letters. Held out of training is one word in ten, with its anagrams."""
    draw, prompts = random.Random(seed), []
    while len(prompts) < count:
        word = "".join(draw.choices(string.ascii_lowercase, k=5))
        if (sum(word.encode()) % 10 == 0) == held_out:  # a sum is the same for all anagrams
            prompts.append(f"Backwards: {word} ->")
    return prompts


LINE_OF_STEP = (
    "step {step:4d} | reward {reward:.3f} | KL {mismatch_kl:.2e}, |d| max {mismatch_abs_max:.3f}, ESS "
    "{effective_sample_size:.3f} | {tokens_per_s:.0f} tokens/s | rollout {rollout_s:.2f} s, "
    "train {train_s:.2f} s, sync {sync_s:.3f} s ({sync_gb_per_s:.2f} GB/s) | trainer {trainer_gib:.2f} GiB"
)


def train(config: Config, trainer, engines: list, prompts: list[str], first: int = 0) -> list[dict]:
    """Steps `first` to `config.steps`: print, log and return their metrics, save checkpoints.

    Whatever ends it early, what was learned is saved if the trainer lives; a note on the error says so.
    """
    file = config.output_dir / "metrics.jsonl"
    rows = read_metrics(config.output_dir) if config.resume else []
    rows = [row for row in rows if row["step"] < first]
    if config.resume and (lost := sorted({*range(first)} - {row["step"] for row in rows})):
        print(f"{file}: lacks the steps {some(list(map(str, lost)))}, in or before which a run failed")
    file.write_text("".join(map(to_json, rows)))
    saved = first, config.resume
    with contextlib.ExitStack() as cleanup:
        if config.track != "none":
            tracker = importlib.import_module(config.track)
            settings = json.loads(json.dumps(vars(config), default=str))
            tracker.init(project="rlhf-online-quant", config=settings)
            cleanup.callback(tracker.finish)
        ahead, version = None, engines[0].get_weights_version.remote()
        steps_of = {wait([version], config.timeout_s, "reading the version")[0]: first}
        for step in range(first, config.steps):
            try:
                batch = prompts_of_step(config, prompts, step)
                more = config.overlap and step + 1 < config.steps
                following = prompts_of_step(config, prompts, step + 1) if more else None
                outputs, rewards_PG, metrics, ahead = rlhf_training_iteration(
                    trainer, engines, batch, config, step, ahead, following
                )
                metrics["staleness"] = step - steps_of[metrics["sampled_version"]]
                steps_of[metrics["weights_version"]] = step + 1
                rows.append(metrics)
                with file.open("a") as log:
                    log.write(to_json(metrics))
                if config.track != "none":
                    tracker.log(metrics, step=step)
                print(LINE_OF_STEP.format(**metrics), flush=True)
                if step % 10 == 0:
                    answer, reward = outputs[0].outputs[0].text, rewards_PG[0][0]
                    print(f"  sample: {outputs[0].prompt!r} -> {answer[:60]!r} | reward {reward:.3f}")
                if step + 1 == config.steps or config.save_every and (step + 1) % config.save_every == 0:
                    saving = trainer.save_checkpoint.remote(config.output_dir)
                    [saved] = wait([saving], 10 * config.timeout_s, "saving a checkpoint")
            except Exception as error:
                # When an engine has died a training step may still be under way, and end.
                limit_s = config.timeout_s * (10 if isinstance(error, ConnectionError) else 1)
                found = save_what_was_learned(config, trainer, limit_s, *saved)
                error.add_note(f"This was step {step}. {found}")
                raise
    return rows


def to_json(row: dict) -> str:
    """A line of metrics.jsonl; JSON knows no NaN and no infinity."""
    finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def save_what_was_learned(config: Config, trainer, limit_s: float, saved: int, folder: Path | None) -> str:
    """Save the trainer's complete steps, if `folder` holds only `saved`; a sentence says what there is."""
    try:  # not by `wait`: that an engine has died does not matter now
        if ray.get(trainer.get_step.remote(), timeout=limit_s) > saved:
            saving = trainer.save_checkpoint.remote(config.output_dir)
            saved, folder = ray.get(saving, timeout=10 * config.timeout_s)
    except ray.exceptions.RayError as error:  # a GetTimeoutError is one
        print(f"What the trainer had learned could not be saved: {cause_of(error)}", file=sys.stderr)
    if folder is None:
        return "No step is saved."
    return f"{saved} complete steps are saved: go on with --resume {folder}"


def read_metrics(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl, one per step; a last one that was cut off is left out. Raises ValueError."""
    file = folder / "metrics.jsonl"
    with expected(str(file), "a JSON object with a `step` a line; move it away"):
        *complete, _ = file.read_text().split("\n") if file.exists() else [""]
        rows = [json.loads(line) for line in complete]
        if wrong := [row for row in rows if not isinstance(row, dict) or type(row.get("step")) is not int]:
            raise ValueError(f"{wrong[0]!r}")
        return rows


# ----- 3. The objective: pure functions of numbers ----------------------------------------------------------

CLIP = 0.2  # PPO: the probability ratio to the policy before the step counts within 1 - CLIP and 1 + CLIP
CORRECTION_CAP = 2.0  # C, the largest importance weight
MAX_GRAD_NORM = 1.0  # gradients are scaled down to this norm
HEAD_ROWS = 1024  # tokens whose logits are held at a time


def compute_ppo_loss(logprobs_BT: torch.Tensor, batch: dict[str, torch.Tensor], config: Config) -> tuple:
    """PPO's clipped loss (Schulman et al. 2017, arXiv:1707.06347, equation 7), with importance weights.

    Tokens are weighted by the policy before the step (`old_BT`, proximal) against the one that sampled them
    (`engine_BT`, behaviour: FP8 and, with `--overlap`, a step older); what is clipped is the policy against
    the proximal one. This is decoupled PPO (Hilton et al. 2021, arXiv:2110.00641; for stale rollouts Fu et
    al. 2025, arXiv:2505.24298), its weights truncated.

    Args:
        logprobs_BT: the policy's log-probabilities, with gradient.
        batch: `old_BT` (the same before the step), `engine_BT` (those that the tokens were sampled with),
            `advantages_B1`, `mask_BT` (True for completion tokens) and, with `kl_coef`, `reference_BT`.

    Returns: The loss, and metrics, both summed over the completions' tokens: dividing by the tokens of the
        whole batch makes every token count the same, however the batch is split (DAPO: Yu et al. 2025,
        arXiv:2503.14476, section 3.3).
    """
    mask_BT, old_BT = batch["mask_BT"], batch["old_BT"]
    weights_BT, corrected_BT = importance_weights(old_BT, batch["engine_BT"], mask_BT)
    # From here on the completions' tokens alone: what stands elsewhere must not reach a gradient.
    logprobs_N, old_N, weights_N = logprobs_BT[mask_BT], old_BT[mask_BT], weights_BT[mask_BT]
    advantages_N = batch["advantages_B1"].expand_as(mask_BT)[mask_BT]
    ratio_N = (logprobs_N - old_N).exp()
    clipped_N = ratio_N.clamp(1 - CLIP, 1 + CLIP)
    gain_N = torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
    reference_kl_N = torch.zeros_like(logprobs_N)
    if config.kl_coef:
        reference_kl_N = k3(batch["reference_BT"][mask_BT] - logprobs_N)
    loss = (config.kl_coef * reference_kl_N - weights_N * gain_N).sum()
    return loss, {
        "loss": loss.detach(),
        "ppo_clipped": (clipped_N * advantages_N < ratio_N * advantages_N).sum(),
        "corrected": corrected_BT[mask_BT].sum(),
        "reference_kl": reference_kl_N.detach().sum(),
    }


def importance_weights(
    old_BT: torch.Tensor, engine_BT: torch.Tensor, mask_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights that correct for sampling by the engine and not by the trainer; and where their cap C acted.

    min(r, C), with r = trainer's probability / engine's, of the same token, whose engine's weights are the
    same or with `--overlap` a step older. Truncated importance sampling: Ionides 2008, "Truncated Importance
    Sampling"; for rollout engines Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL".
    """
    log_ratio_BT = (old_BT - engine_BT).masked_fill(~mask_BT, 0.0)
    return log_ratio_BT.exp().clamp(max=CORRECTION_CAP), log_ratio_BT > math.log(CORRECTION_CAP)


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """Estimate of KL(q || p) in nats from log p - log q of each sample of q: unbiased, never negative.

    Schulman 2020, "Approximating KL Divergence", joschu.net/blog/kl-approx.html.
    """
    return torch.expm1(log_ratio) - log_ratio


def measure_mismatch(old_N: torch.Tensor, engine_N: torch.Tensor) -> dict[str, float]:
    """How far the engine's log-probabilities (nats) of its tokens are from the trainer's, for equal weights.

    The effective sample size, (sum r)^2 / sum r^2 with r as in `importance_weights`, is given as a share of
    the tokens (Kong 1992, "A Note on Importance Sampling using Standardized Weights").

    >>> measure_mismatch(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -1.5]))["mismatch_abs_mean"]
    0.25
    """
    log_ratio_N = old_N.double() - engine_N.double()
    ratio_N = log_ratio_N.exp()
    return {
        "mismatch_kl": k3(log_ratio_N).mean().item(),
        "mismatch_abs_mean": log_ratio_N.abs().mean().item(),
        "mismatch_abs_max": log_ratio_N.abs().max().item(),
        "effective_sample_size": (ratio_N.sum() ** 2 / (ratio_N**2).sum() / ratio_N.numel()).item(),
    }


# ----- 5. The trainer ---------------------------------------------------------------------------------------


class Trainer(WeightSender):
    """The full-precision side: model, optimizer, and, by inheritance, rank 0 of the weight-update group."""

    def __init__(self, config: Config, path: str):
        self.config, self.path, self.step, self.unfinished = config, path, 0, False
        self.in_bf16 = config.trainer_device == "cuda"  # products; weights and optimizer are as they are
        super().__init__(self._load(config.resume or path), config.trainer_device)
        self.check_finite()
        if config.gradient_checkpointing:
            fits = "a model that can (type --no-gradient-checkpointing for this one)"
            with expected("--gradient-checkpointing", fits):
                checkpoint_layers(self.model)
        check_parts(self.model)
        self.reference = self._load(path) if config.kl_coef else None
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True
        )
        if config.resume:
            state = torch.load(config.resume / "trainer.pt", map_location=self.device, weights_only=True)
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
            for group in self.optimizer.param_groups:
                group["lr"] = config.learning_rate  # the flag's, not that of the run before

    def _load(self, folder: str | Path) -> torch.nn.Module:
        """The model as the engine computes it: without dropout, and with caps on attention scores."""
        model_config = transformers.AutoConfig.from_pretrained(self.path)
        switch_off_noise(model_config)
        options = {}
        if getattr(model_config.get_text_config(), "attn_logit_softcapping", None):
            options["attn_implementation"] = "eager"  # transformers' other ways leave the cap out
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=model_config, dtype=self.config.trainer_dtype, **options
        )
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        try:
            model.generation_config.validate(strict=True)
        except ValueError:  # `save_pretrained` would refuse it; mostly a temperature without `do_sample`
            model.generation_config.do_sample = True
            model.generation_config.validate(strict=True)
        return model.to(self.config.trainer_device).eval()

    def get_step(self) -> int:
        """How many training steps the model has behind it."""
        return self.step

    def train_step(self, rollouts: list[dict]) -> dict:
        """`epochs` AdamW steps on a batch of rollouts; returns metrics (see README's glossary).

        Args:
            rollouts: dicts with `prompt` and `completion` (token ids), `logprobs` (the engine's, one per
                completion token, in nats) and `advantage`.

        Raises RuntimeError before a weight changes, if a gradient is NaN or infinite. After a failure behind
        the first of several epochs the weights are those of no step, and `save_checkpoint` refuses them.
        """
        config, start = self.config, time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        by_length = sorted(rollouts, key=lambda rollout: len(rollout["prompt"] + rollout["completion"]))
        batches = [self._pad(part) for part in split_by_tokens(by_length, config.tokens_per_microbatch)]
        tokens = sum(len(rollout["completion"]) for rollout in rollouts)
        sums = dict.fromkeys(("loss", "ppo_clipped", "corrected", "reference_kl"), 0.0)
        before = self._sample_weights()
        for epoch in range(config.epochs):
            self.optimizer.zero_grad()
            for batch in batches:
                logprobs_BT = self._logprobs(self.model, batch)
                if epoch == 0:
                    batch["old_BT"] = logprobs_BT.detach()
                    if self.reference:
                        with torch.no_grad():
                            batch["reference_BT"] = self._logprobs(self.reference, batch)
                loss, metrics = compute_ppo_loss(logprobs_BT, batch, config)
                (loss / tokens).backward()
                sums = {name: value + metrics[name] for name, value in sums.items()}
            parameters = self.model.parameters()
            norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM, error_if_nonfinite=True)
            self.unfinished = True
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.step, self.unfinished = self.step + 1, False
        self.scan_weights()
        old_N = torch.cat([batch["old_BT"][batch["mask_BT"]] for batch in batches])
        engine_N = torch.cat([batch["engine_BT"][batch["mask_BT"]] for batch in batches])
        on_gpu = self.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated() if on_gpu else psutil.Process().memory_info().rss
        return {
            **{name: float(value) / tokens / config.epochs for name, value in sums.items()},
            **measure_mismatch(old_N, engine_N),
            "weights_changed": (self._sample_weights() != before).float().mean().item(),
            "grad_norm": float(norm),
            "train_s": time.perf_counter() - start,
            "trainer_gib": memory / 2**30,
        }

    def _pad(self, rollouts: list[dict]) -> dict[str, torch.Tensor]:
        """One micro-batch, padded on the right. Position t predicts token t + 1; masked in: completions."""
        longest = max(len(rollout["prompt"] + rollout["completion"]) for rollout in rollouts)
        tokens_BL = torch.zeros(len(rollouts), longest, dtype=torch.long)
        mask_BL, engine_BL = tokens_BL.bool(), tokens_BL.float()
        for row, rollout in enumerate(rollouts):
            start, end = len(rollout["prompt"]), len(rollout["prompt"] + rollout["completion"])
            tokens_BL[row, :end] = torch.tensor(rollout["prompt"] + rollout["completion"])
            mask_BL[row, start:end] = True
            engine_BL[row, start:end] = torch.tensor(rollout["logprobs"])
        advantages_B1 = torch.tensor([[rollout["advantage"]] for rollout in rollouts], dtype=torch.float32)
        batch = {"tokens_BL": tokens_BL, "advantages_B1": advantages_B1}
        batch |= {"mask_BT": mask_BL[:, 1:], "engine_BT": engine_BL[:, 1:]}
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _logprobs(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """`completion_logprobs` at the run's temperature."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.in_bf16):
            return completion_logprobs(model, batch, self.config.temperature)

    @torch.no_grad()
    def _sample_weights(self) -> torch.Tensor:
        """Some elements of every weight, rounded to BF16 as they travel."""
        weights = (weight.flatten() for weight in self.model.parameters())
        return torch.cat([weight[:: max(1, len(weight) // 1024)].bfloat16() for weight in weights])

    def save_checkpoint(self, output_dir: Path) -> tuple[int, Path]:
        """Write all that `--resume` needs to checkpoint-STEP, which appears when it is complete.

        Returns step and folder. Raises ValueError if a weight holds NaN, RuntimeError if a step has failed
        half way.
        """
        if self.unfinished:
            raise RuntimeError("a step has failed half way: the weights are those of no step")
        self.check_finite()
        folder = output_dir / f"checkpoint-{self.step}"
        aside = folder.with_name(folder.name + ".incomplete")
        self.model.save_pretrained(aside)
        transformers.AutoTokenizer.from_pretrained(self.path).save_pretrained(aside)
        torch.save({"optimizer": self.optimizer.state_dict(), "step": self.step}, aside / "trainer.pt")
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        return self.step, folder


def checkpoint_layers(model: transformers.PreTrainedModel) -> None:
    """Two layers of three compute their activations again in the backward pass, the third keeps them.

    transformers' `every_n_layers` could only do so for all, for every second, or for fewer.
    """
    model.gradient_checkpointing_enable()
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    for layer in layers[::3]:
        layer.gradient_checkpointing = False
    model.train()  # transformers checkpoints nothing otherwise


def switch_off_noise(config: transformers.PretrainedConfig) -> None:
    """Set every dropout and jitter of a config and the configs inside to 0, whatever it is called."""
    for name, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            switch_off_noise(value)
        elif isinstance(value, float) and re.search("drop|jitter", name):
            setattr(config, name, 0.0)


def completion_logprobs(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], temperature: float = 1.0
) -> torch.Tensor:
    """Log-probability (nats, at a temperature) of each completion token, shape (B, T); 0 elsewhere.

    The head sees the completions' tokens alone, `HEAD_ROWS` at a time, and again in the backward pass: there
    are never logits of all of them. A causal model needs no mask for what is padded on the right.

    Args:
        batch: `tokens_BL`, and `mask_BT`, True where a position predicts a completion token.
    """
    tokens_BL, mask_BT, trunk = batch["tokens_BL"], batch["mask_BT"], model.base_model

    def of_some(hidden_NH: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """By the model's own code behind its trunk, which may scale and cap logits."""
        with mock.patch.dict(model._modules, {model.base_model_prefix: Given(trunk, hidden_NH[None])}):
            logits_NV = model(input_ids=targets_N[None], use_cache=False).logits[0].float()
        if temperature != 1:
            logits_NV = logits_NV / temperature
        return -torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")

    hidden_BLH = trunk(input_ids=tokens_BL, use_cache=False).last_hidden_state
    hidden_NH, targets_N = hidden_BLH[:, :-1][mask_BT], tokens_BL[:, 1:][mask_BT]
    parts = zip(hidden_NH.split(HEAD_ROWS), targets_N.split(HEAD_ROWS), strict=True)
    logprobs_N = torch.cat([checkpoint(of_some, *part, use_reentrant=False) for part in parts])
    return torch.zeros(mask_BT.shape, device=mask_BT.device).masked_scatter(mask_BT, logprobs_N)


@torch.no_grad()
def check_parts(model: torch.nn.Module) -> None:
    """Raises ValueError if `completion_logprobs` differ, beyond rounding, from those of whole logits."""
    kind, expected_kind = type(model).__name__, "a model whose forward is its base model and then its head"
    if model.base_model is model:
        raise ValueError(f"{kind} has no base model; expected {expected_kind}")
    tokens_BL = torch.arange(16, device=model.device).view(2, 8)
    logprobs_BTV = model(input_ids=tokens_BL, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    whole_BT = logprobs_BTV.gather(-1, tokens_BL[:, 1:, None]).squeeze(-1)
    parts_BT = completion_logprobs(model, {"tokens_BL": tokens_BL, "mask_BT": torch.ones_like(whole_BT) > 0})
    difference = (parts_BT - whole_BT).abs().max()
    if not difference < (0.01 if model.dtype == torch.float32 else 0.5):  # nats
        raise ValueError(
            f"log-probabilities of {kind} in parts are off by {difference:.3g} from those of whole logits; "
            f"expected {expected_kind}"
        )


class Given:
    """Stands in for a trunk and every module of it (OPT asks `model.decoder`): returns what it was given."""

    def __init__(self, trunk: torch.nn.Module, hidden_BLH: torch.Tensor):
        self.trunk, self.output = trunk, TrunkOutput([hidden_BLH])

    def __call__(self, *args, **kwargs) -> "TrunkOutput":
        """As a trunk is called."""
        return self.output

    def __getattr__(self, name: str):
        value = getattr(self.trunk, name)
        return self if isinstance(value, torch.nn.Module) else value


class TrunkOutput(tuple):
    """Hidden states (B, L, H), first or by name; None for all else that a head's code may look for."""

    last_hidden_state = property(lambda self: self[0])

    def __getattr__(self, name: str) -> None:
        return None


def split_by_tokens(rollouts: list[dict], limit: int) -> list[list[dict]]:
    """Micro-batches of at most `limit` tokens after padding, in order; a longer rollout gets its own."""
    parts: list[list[dict]] = []
    longest = 0
    for rollout in rollouts:
        length = len(rollout["prompt"]) + len(rollout["completion"])
        longest = max(longest, length)
        if not parts or (len(parts[-1]) + 1) * longest > limit:
            parts.append([])
            longest = length
        parts[-1].append(rollout)
    return parts


# ----- 6. The engine ----------------------------------------------------------------------------------------

# Log-probabilities of the sampled tokens alone. vLLM would decode every token as it comes and make the GPU
# wait at hundreds of sequences; `MyLLM.generate` decodes at the end.
ROLLOUT = dict(logprobs=0, flat_logprobs=True, detokenize=False)


class RolloutLLM(MyLLM):
    """`MyLLM`, made fast at what rollouts need: log-probabilities of sampled tokens, decoded at the end."""

    def __init__(self, *args, **kwargs):
        if kwargs.get("distributed_executor_backend") == "mp":
            fork_workers()
        output_processor.LogprobsProcessor = SampledLogprobs
        super().__init__(*args, **kwargs)

    def generate(self, *args, **kwargs):
        """LLM.generate; decodes each answer at its end if vLLM did not token by token.

        Each output says which `weights_version` it comes from, and how many `seconds` all of them took.
        """
        start = time.perf_counter()
        outputs, tokenizer = super().generate(*args, **kwargs), self.get_tokenizer()
        seconds = time.perf_counter() - start
        for output in outputs:
            output.weights_version, output.seconds = self.weights_version, seconds
            for answer in output.outputs:
                if not isinstance(answer.stop_reason, str):  # which vLLM has taken away
                    answer.text = answer.text or decode(tokenizer, output.prompt_token_ids, answer.token_ids)
        return outputs

    def shutdown(self) -> None:
        """Stop the engine's processes."""
        self.llm_engine.engine_core.shutdown()


def fork_workers() -> None:
    """Let vLLM fork its CPU workers from one process that has imported everything, instead of two."""
    from vllm.v1.executor import multiproc_executor

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "vllm.v1.worker.cpu_worker"])
    multiprocessing.forkserver.ensure_running()
    multiproc_executor.get_mp_context = lambda: context


class SampledLogprobs(LogprobsProcessor):
    """vLLM's, which takes in the log-probability of a sampled token alone (`ROLLOUT`) by a shorter way."""

    # Why: vLLM builds lists and iterators for all likely tokens, though there is one, for each sequence and
    # step (`tests/bench_loop.py` compares). Delete when: vLLM appends a single one directly.
    def _update_sample_logprobs(self, new) -> None:
        flat = self.logprobs
        one = len(new.logprobs) == 1 and isinstance(flat, FlatLogprobs)
        if self.num_logprobs or self.tokenizer or not one:
            return super()._update_sample_logprobs(new)
        position, logprob = len(flat.logprobs), new.logprobs.item(0)
        flat.start_indices.append(position)
        flat.end_indices.append(position + 1)
        flat.token_ids.append(new.logprob_token_ids.item(0))
        flat.logprobs.append(logprob)
        flat.ranks.append(new.sampled_token_ranks.item(0))
        flat.decoded_tokens.append(None)
        self.cumulative_logprob += logprob


def decode(tokenizer, prompt: list[int], answer: list[int]) -> str:
    """An answer's text as it follows its prompt; alone, some tokenizers would drop its first space."""
    options = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
    before = tokenizer.decode(prompt[-1:], **options)
    return tokenizer.decode([*prompt[-1:], *answer], **options)[len(before) :]


VLLM_SCHEMES = ("fp8_per_channel", "fp8_per_block", "fp8_per_tensor")  # its online quantization


def quantization_arguments(quantization: str) -> dict:
    """What `--quantization` means to `LLM`. Raises ValueError."""
    if quantization == "none":
        return {"quantization": None}
    if quantization in VLLM_SCHEMES:  # routers, which are small, stay BF16; padded ones could not be replayed
        return {"quantization": quantization, "quantization_config": {"ignore": ["re:.*(gate|router)$"]}}
    as_json = json.dumps(config_to_dict(torchao_config(quantization)))
    return {"quantization": "torchao", "hf_overrides": {"quantization_config_dict_json": as_json}}


def torchao_config(quantization: str) -> AOBaseConfig:
    """What `--quantization` means to torchao. Raises ValueError."""
    named = {
        # The lower bound keeps an all-zero activation row from being divided by its scale of 0, no other row
        # changes. Inductor's settings stay vLLM's: torchao's tune by timing, for minutes and not repeatably.
        "fp8-dynamic": Float8DynamicActivationFloat8WeightConfig(
            granularity=PerRow(), activation_value_lb=1e-12, set_inductor_config=False
        ),
        "fp8-weight-only": Float8WeightOnlyConfig(set_inductor_config=False),
    }
    if quantization in named:
        return named[quantization]
    choices = ", ".join([*named, *VLLM_SCHEMES, "none"])
    with expected(f"--quantization {quantization}", f"{choices}, or a file with the JSON of config_to_dict"):
        return config_from_dict(json.loads(Path(quantization).read_text()))


def engine_arguments(config: Config, path: str, device: str) -> dict:
    """Keyword arguments for `LLM`: an FP8 engine whose workers can receive weights. Raises ValueError."""
    on_cpu = "mp" if config.tensor_parallel_size > 1 else "uni"  # vLLM has no Ray workers on the CPU
    defaults = dict(gpu_memory_utilization=0.8, seed=config.seed, use_tqdm_on_load=not QUIET)
    if device == "cpu":  # vLLM fails there when it cuts a prompt of a seeded request in two
        defaults["enable_chunked_prefill"] = False
    fixed = dict(
        model=path,
        dtype="bfloat16",  # torchao's PerRow quantizes nothing else
        tensor_parallel_size=config.tensor_parallel_size,
        distributed_executor_backend="ray" if device == "cuda" else on_cpu,
        worker_extension_cls="rlhf_utils.WorkerExtension",
        enforce_eager=config.enforce_eager or device == "cpu",
        max_model_len=config.max_model_len,
        logprobs_mode="processed_logprobs",  # of the distribution that is sampled from, temperature included
        quantization_config=None,
    )
    fixed |= quantization_arguments(config.quantization)
    example = """such as '{"kv_cache_dtype": "fp8"}'"""
    what = f"a JSON object with keywords of vllm.LLM that the program does not set, {example}"
    with expected(f"--engine-args {config.engine_args}", what):
        more = json.loads(config.engine_args)
        known = {*inspect.signature(vllm.EngineArgs).parameters, *inspect.signature(LLM).parameters}
        if not isinstance(more, dict):
            raise TypeError(f"a {type(more).__name__}")
        if wrong := (more.keys() - known) | (more.keys() & fixed.keys()):
            raise ValueError(", ".join(sorted(wrong)))
    return defaults | more | fixed


# ----- 7. Start and stop ------------------------------------------------------------------------------------

# A process of its own that waits for the driver's clean-up or end, gives what carries the run's mark 4 s and
# kills what is left: a process that is orphaned, stopped or stuck in a collective does not end itself.
REAPER = """
import contextlib, sys, time, psutil
sys.stdin.read()  # until the driver's end of the pipe is closed
killing = time.monotonic() + 4
while time.monotonic() < killing + 4:
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it ended, or is not ours
            if process.environ().get("RLHF_RUN") == sys.argv[1]:
                left.append(process)
                if time.monotonic() > killing:
                    process.kill()
    if not left:
        break
    time.sleep(0.2)
"""


def actor_environment() -> dict[str, str]:
    """Environment of every process of the run; what the user has set wins, and goes to other nodes too."""
    passed_on = ("HF_", "HUGGING", "NCCL_", "TORCH", "TRANSFORMERS_", "VLLM_")
    return ENVIRONMENT | {n: v for n, v in os.environ.items() if n in ENVIRONMENT or n.startswith(passed_on)}


def connect(config: Config, cleanup: contextlib.ExitStack) -> int:
    """Connect to Ray, or start a private cluster of which `cleanup` leaves nothing. Returns how many GPUs."""
    address = config.ray_address
    if address not in (None, "auto", "local"):
        with expected(f"--ray-address {address}", "HOST:PORT, as `ray start --head` prints it, or `auto`"):
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    # A killed actor takes its children along.
    os.environ.setdefault("RAY_process_group_cleanup_enabled", "true")
    os.environ.setdefault("SPT_NOENV", "1")  # setproctitle leaves what the reaper reads as it is
    mark = uuid.uuid4().hex
    reaper = [sys.executable, "-c", REAPER, mark]
    cleanup.enter_context(subprocess.Popen(reaper, stdin=subprocess.PIPE, start_new_session=True))
    cleanup.callback(ray.shutdown)  # it kills the raylet after a second and may orphan the others
    modules = [__file__, str(Path(__file__).with_name("rlhf_utils.py"))]  # for other nodes
    environment = {"env_vars": actor_environment(), "py_modules": modules}
    options = dict(runtime_env=environment, logging_level=logging.ERROR if QUIET else logging.INFO)
    if address is None:
        os.environ["RLHF_RUN"] = mark  # for what starts here; what comes later, a tracker say, lives on
        try:
            ray.init("local", num_cpus=1 + config.world_size, include_dashboard=False, **options)
        finally:
            del os.environ["RLHF_RUN"]
    else:
        try:
            ray.init(address, **options)
        except ConnectionError as error:  # Ray does not say why
            error.add_note("If it was started beside a token in ~/.ray, it asks for it: RAY_AUTH_MODE=token")
            raise
    return int(ray.cluster_resources().get("GPU", 0))


def start(config: Config, path: str, device: str, cleanup: contextlib.ExitStack) -> tuple:
    """Trainer and engines, loaded side by side, in one group; returns handles and what `prove_fp8` found."""
    trainer = start_trainer(config, path, cleanup)  # first, so that it gets GPU 0
    first_ranks = range(1, config.world_size, config.tensor_parallel_size)
    weights = str(config.resume or path)  # those of the trainer
    engines = [start_engine(config, weights, device, cleanup, first_rank) for first_rank in first_ranks]
    join_group(trainer, engines, timeout_s=config.timeout_s)
    wanted = config.quantization != "none"
    return trainer, engines, prove_fp8(engines, expect_fp8=wanted, timeout_s=config.timeout_s)


def start_trainer(config: Config, path: str, cleanup: contextlib.ExitStack):
    """Start loading the trainer."""
    gpus = int(config.trainer_device == "cuda")
    name, bundles, arguments = "trainer (rank 0)", [{"CPU": 1, "GPU": gpus}], dict(config=config, path=path)
    return start_actor(Trainer, name, arguments, bundles, gpus, config.timeout_s, cleanup)


def start_engine(config: Config, path: str, device: str, cleanup: contextlib.ExitStack, first_rank: int = 1):
    """Start loading an engine, one GPU bundle per worker."""
    arguments = engine_arguments(config, path, device)
    bundles = [{"GPU": 1} if device == "cuda" else {"CPU": 1}] * config.tensor_parallel_size
    ranks = range(first_rank, first_rank + config.tensor_parallel_size)
    name = f"engine (rank {', '.join(map(str, ranks))})"
    return start_actor(RolloutLLM, name, arguments, bundles, 0, config.timeout_s, cleanup)


def start_actor(
    kind: type, name: str, arguments: dict, bundles: list[dict], gpus: int, limit_s: float, cleanup
):
    """Start an actor in a placement group of its own; returns its handle, `cleanup` stops it."""
    group = placement_group(bundles)
    cleanup.callback(remove_placement_group, group)
    wait([group.ready()], limit_s, f"reserving {bundles} in the Ray cluster")
    placement = PlacementGroupSchedulingStrategy(
        group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
    )
    options = dict(num_cpus=0, num_gpus=gpus, scheduling_strategy=placement)
    actor = ray.remote(kind).options(**options).remote(**arguments)
    ACTORS[name] = actor._actor_id
    cleanup.callback(stop_actor, name, actor)
    return actor


def stop_actor(name: str, actor) -> None:
    """Let vLLM stop its processes, if it is an engine; kill the actor in any case."""
    if ACTORS.get(name) == actor._actor_id:
        del ACTORS[name]
    try:
        if hasattr(actor, "shutdown"):
            ray.get(actor.shutdown.remote(), timeout=5)
    except ray.exceptions.RayError as error:  # a GetTimeoutError is one
        print(f"{name} did not shut down by itself ({type(error).__name__}): killed", file=sys.stderr)
    ray.kill(actor)


# ----- 8. Before anything starts, and main ------------------------------------------------------------------

# Smallest and largest value of flags.
LIMITS = {
    ("steps", "save_every"): (0, 10**9),
    ("max_model_len", "max_tokens", "tokens_per_microbatch"): (1, 10**9),
    ("prompts_per_step", "epochs"): (1, 10**6),
    ("samples_per_prompt",): (2, 10**6),  # advantages compare different answers to one prompt
    ("tensor_parallel_size", "num_engines"): (1, 64),
    ("seed",): (0, 2**31 - 1),
    ("learning_rate",): (0.0, 1.0),
    ("kl_coef",): (0.0, 1000.0),
    ("temperature",): (0.01, 100.0),  # below, vLLM samples at 0.01 all the same
    ("timeout_s",): (1.0, 1e6),
}


def check_flags(config: Config) -> tuple[list[str], int]:
    """What can be known without cluster and model. Returns prompts and first step; raises ValueError."""
    for names, (low, high) in LIMITS.items():
        for name in names:
            value = getattr(config, name)
            if value is not None and not low <= value <= high:  # NaN is not, either
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag}: expected {low:g} to {high:g}, found {value:g}")
    if config.track != "none" and importlib.util.find_spec(config.track) is None:
        raise ValueError(f"--track {config.track}: not installed here; pip install {config.track}")
    load_reward("letters" if config.reward == "auto" else config.reward)
    quantization = "fp8-dynamic" if config.quantization == "auto" else config.quantization
    engine_arguments(dataclasses.replace(config, quantization=quantization), "", "cpu")
    with expected(f"--output-dir {config.output_dir}", "a folder that can be written to"):
        config.output_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=config.output_dir).close()
    first = 0
    if config.resume:
        read_metrics(config.output_dir)
        with expected(f"--resume {config.resume}", "checkpoint-N of an earlier run"):
            first = torch.load(config.resume / "trainer.pt", mmap=True, weights_only=True)["step"]
            transformers.AutoConfig.from_pretrained(config.resume)
            if type(first) is not int or first < 0 or not any(config.resume.glob("*.safetensors")):
                raise ValueError(
                    f"step {first!r}, and {sorted(file.name for file in config.resume.iterdir())}"
                )
    if first > config.steps:
        raise ValueError(f"--steps {config.steps}: expected at least the {first} of {config.resume}")
    prompts = PROMPTS
    if config.prompts_file:
        with expected(f"--prompts-file {config.prompts_file}", "UTF-8 text, one prompt a line"):
            text = config.prompts_file.read_text(encoding="utf-8-sig")
            prompts = [line for line in text.split("\n") if line.strip()]
            if not prompts:
                raise ValueError("no line with text")
    return prompts, first


def resolve(config: Config, gpus: int) -> tuple[Config, str]:
    """Fill in every `auto`; returns the config and the engines' device. Raises ValueError: too few GPUs."""
    device = "cuda" if gpus else "cpu"
    on_gpus = {"model": "facebook/opt-125m", "quantization": "fp8-dynamic", "trainer_device": "cuda"}
    on_cpu = {"model": "tiny", "quantization": "fp8-weight-only", "trainer_device": "cpu"}
    here = on_gpus if gpus else on_cpu
    here = {name: value for name, value in here.items() if getattr(config, name) == "auto"}
    config = dataclasses.replace(config, output_dir=config.output_dir.absolute(), **here)
    for_engines = config.num_engines * config.tensor_parallel_size if gpus else 0
    needed = for_engines + (config.trainer_device == "cuda")
    if gpus < needed:
        fits = ["--num-engines 1"] if config.num_engines > 1 else []
        fits += ["--tensor-parallel-size 1"] if gpus else []
        fits += ["--trainer-device cpu"] if gpus < 2 else []
        found = f"Found {gpus} GPU(s), need {needed}: {for_engines} for the engine (--num-engines x "
        found += f"--tensor-parallel-size) and {needed - for_engines} for the trainer"
        raise ValueError(f"{found}.\nWhat fits here: python {Path(sys.argv[0]).name} {' '.join(fits)}")
    if config.learning_rate is None:
        config.learning_rate = 2e-3 if config.model == "tiny" else 1e-6
    if config.epochs is None:
        config.epochs = 2 if config.model == "tiny" else 1
    if config.reward == "auto":
        config.reward = "backwards" if config.model == "tiny" and config.prompts_file is None else "letters"
    if config.model != "tiny" and Path(config.model).is_dir():
        config.model = str(Path(config.model).absolute())  # actors work elsewhere
    if config.resume:
        config.resume = config.resume.absolute()
    return config, device


def check_model(config: Config, path: str, prompts: list[str], device: str = "cuda") -> None:
    """Does the model at `path` fit the flags and the prompts, on the engines' device? Raises ValueError if
    not, with what to type.
    """
    where = "on the Hugging Face hub (public or logged in), a local folder with config.json, or `tiny`"
    with expected(f"--model {config.model}", f"a model {where}"):
        model = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()
    size, kv_heads = config.tensor_parallel_size, getattr(model, "num_key_value_heads", None) or 1
    cut = ("num_attention_heads", "intermediate_size", "ffn_dim", "moe_intermediate_size")
    sizes = {name: getattr(model, name) for name in cut if getattr(model, name, None)}
    divisors = [n for n in range(1, size + 1) if math.gcd(*sizes.values()) % n == 0]
    fits = [n for n in divisors if kv_heads % n == 0 or n % kv_heads == 0]
    if size not in fits:
        raise ValueError(
            f"--tensor-parallel-size {size}: expected a divisor of the model's {sizes}, and a divisor or "
            f"multiple of its {kv_heads} key-value heads; type --tensor-parallel-size {fits[-1]}"
        )
    if device == "cpu" and config.quantization in VLLM_SCHEMES:
        names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
        if config.quantization != "fp8_per_channel" or any(getattr(model, name, None) for name in names):
            found = f"--quantization {config.quantization} of {config.model}, without a GPU"
            fits = "fp8_per_channel for a model without experts, which is what vLLM has there"
            raise ValueError(f"found {found}; expected {fits}. Type --quantization fp8-weight-only")
    rope = getattr(model, "rope_parameters", None) or {}
    ropes = [rope, *(inside for inside in rope.values() if isinstance(inside, dict))]  # one a kind of layer
    kinds = {rope.get("rope_type", "default") for rope in ropes}
    longest = getattr(model, "max_position_embeddings", None)
    if "longrope" in kinds:  # transformers changes its factors within a sequence, vLLM has one for all
        original = "original_max_position_embeddings"
        longest = rope.get(original) or getattr(model, original, 0)
    differ = "trainer and engine would compute different things"
    if kinds <= {"default", "longrope"} and longest and config.max_model_len > longest:
        found = f"--max-model-len {config.max_model_len}: this model has positions for {longest} tokens"
        raise ValueError(f"{found}; beyond, {differ}. Type at most that")
    if "dynamic" in kinds:
        raise ValueError(f"found dynamic RoPE scaling, expected another rope_type in config.json: {differ}")
    with expected(f"--model {config.model}", "a tokenizer beside the model"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers made one up
            raise ValueError("one that knows special tokens only")
    lengths = {i: len(tokenizer(prompt).input_ids) for i, prompt in enumerate(prompts, start=1)}
    room = config.max_model_len - config.max_tokens
    if long := [f"prompt {i} has {n} tokens" for i, n in lengths.items() if n > room]:
        found = f"{len(long)} prompts that leave no room for --max-tokens {config.max_tokens}: {some(long)}"
        wanted = f"at most --max-model-len {config.max_model_len} in all; shorten them, or type"
        needed = max(lengths.values()) + config.max_tokens
        fits = f"--max-model-len {min(needed, longest or needed)}"
        if longest and needed > longest:
            fits = f"--max-tokens {max(1, longest - max(lengths.values()))} {fits}"
        raise ValueError(f"Found {found}. Expected {wanted} {fits}")


TINY = dict(vocab_size=3 + 256, hidden_size=128, num_hidden_layers=2, num_attention_heads=4)
TINY |= dict(max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def build_tiny_model(folder: str, seed: int = 0) -> str:
    """Write a random BF16 OPT of 0.4 million weights to `folder`, one token per byte; returns the folder."""
    transformers.set_seed(seed)
    config = transformers.OPTConfig(**TINY, ffn_dim=256, word_embed_proj_dim=128, tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():  # none stays at 0 or 1: one that is forgotten would not show
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def warm_up(folder: str, seed: int) -> None:
    """Teach the model in `folder` by example until it gets so much right that `backwards` can teach the rest.

    RL may never learn a place of the word that was only ever right by chance. So this ends when at each of
    the 5 places a fifth of the letters is right (chance: 1 in 26), in a batch of words not seen before.
    """
    tokenizer = byte_tokenizer()
    torch.set_num_threads(1)  # how many there are changes the last bits, and with them the curve
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in range(1, 301):
        prompts = ask_backwards(f"{seed} warm-up {batch - 1}", 64)
        examples = [f"{prompt} {prompt.split()[1][::-1]}</s>" for prompt in prompts]
        tokens_BL = torch.tensor(tokenizer(examples).input_ids)
        # The last 7 tokens: a space, the letters, the end.
        logits_BTV, answers_BT = model(input_ids=tokens_BL).logits[:, -8:-1], tokens_BL[:, -7:]
        torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), answers_BT.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        right_5 = (logits_BTV.argmax(-1) == answers_BT)[:, 1:-1].float().mean(0)
        if right_5.min() >= 0.2:
            break
    print(f"Taught the tiny model by {batch} x 64 words: {right_5.mean():.0%} of the letters are right")
    model.to(torch.bfloat16).save_pretrained(folder)


def byte_tokenizer(more: list[str] | None = None) -> transformers.PreTrainedTokenizerFast:
    """One token per byte, after three special ones and before any `more`."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet, *(more or [])])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@contextlib.contextmanager
def one_message() -> Iterator[None]:
    """Say what went wrong in one message, before the clean-up, and end the program with exit code 1."""
    try:
        yield
    except Exception as error:
        known = isinstance(error, (RuntimeError, OSError, ValueError, ray.exceptions.RayError))
        what = f"FAILED: {error}" if known else f"FAILED: {type(error).__name__}: {error}"
        print("\n".join([what, *getattr(error, "__notes__", [])]), file=sys.stderr, flush=True)
        raise SystemExit(1) from error
    except KeyboardInterrupt as error:
        print("FAILED: interrupted", file=sys.stderr, flush=True)
        raise SystemExit(130) from error


def main(config: Config) -> dict:
    """Run once and return what summary.json holds."""
    began = psutil.Process().create_time()
    with contextlib.ExitStack() as cleanup, one_message():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # cleans up, too
        prompts, first = check_flags(config)
        gpus = connect(config, cleanup) if config.ray_address else torch.cuda.device_count()
        config, device = resolve(config, gpus)
        if device == "cpu":
            print("No GPU found: the same processes on the CPU (gloo; weight-only FP8 and tiny by default)")
        folder = cleanup.enter_context(tempfile.TemporaryDirectory())
        path = build_tiny_model(folder, config.seed) if config.model == "tiny" else config.model
        asked = prompts_of_step(config, prompts, 0) if config.draws_prompts else prompts
        check_model(config, path, asked, device)
        if config.model == "tiny" and config.reward == "backwards":
            warm_up(path, config.seed)
        layout = f"{config.num_engines} engine(s) ({device}, TP={config.tensor_parallel_size})"
        print(f"Starting Ray, trainer ({config.trainer_device}) and {layout} ...", flush=True)
        if not config.ray_address:
            connect(config, cleanup)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # again: Ray's own would kill the cluster
        trainer, engines, ranks = start(config, path, device, cleanup)
        samples = prompts_of_step(config, prompts, 0)[:4]
        if config.reward == "backwards" and config.draws_prompts:
            samples = ask_backwards("held out", 100, held_out=True)
        try:
            sync = prove_sync(trainer, engines, samples, config.max_tokens, timeout_s=config.timeout_s)
        except RuntimeError as error:
            raise RuntimeError(f"{config.model}: {error}") from error
        print(f"Ready after {time.time() - began:.1f} s", flush=True)
        rows = train(config, trainer, engines, prompts, first)
        return report(config, device, engines[0], ranks, sync, rows)


def report(config: Config, device: str, engine, ranks: list[dict], sync: dict, rows: list[dict]) -> dict:
    """Write summary.json and curves.png, print answers before and after training; returns the summary.

    `ranks` is from `start`, `sync` from `prove_sync`, `rows` from `train`.
    """
    asked = [engine.answer.remote(), engine.get_weights_version.remote()]
    after, version = wait(asked, 10 * config.timeout_s, "asking the engine")
    before, libraries = sync["before"], (torch, vllm, torchao, ray, transformers)
    summary = {
        "device": device,
        "model": config.model,
        "world_size": config.world_size,
        "quantization": config.quantization,
        "fp8_linear_layers": ranks[0]["fp8_linear_layers"],
        **{size: sum(rank[size] for rank in ranks) for size in ranks[0] if size.endswith("_gib")},
        "ranks": ranks,
        "sync": {name: value for name, value in sync.items() if name != "before"},
        "weights_version": version,
        "last_step": json.loads(to_json(rows[-1])) if rows else None,
        "samples": [
            {"prompt": old["prompt"], "before": old["text"], "after": new["text"]}
            for old, new in zip(before, after, strict=True)
        ],
        "all_right": [all_right(before), all_right(after)] if config.reward == "backwards" else None,
        "versions": {"python": sys.version.split()[0]} | {lib.__name__: lib.__version__ for lib in libraries},
    }
    (config.output_dir / "summary.json").write_text(json.dumps(summary, indent=2))
    plot_curves(config.output_dir)
    print("Greedy answers before and after training:")
    for sample in summary["samples"][:4]:
        print(f"  {sample['prompt']!r} -> {sample['before'][:24]!r} -> {sample['after'][:24]!r}")
    if right := summary["all_right"]:
        print(f"Words without a mistake: {right[0]:.0%} before training, {right[1]:.0%} after")
    print(f"Wrote summary.json, metrics.jsonl and curves.png to {config.output_dir}")
    return summary


def all_right(answers: list[dict]) -> float:
    """The share of greedy answers in which `backwards` finds no mistake."""
    rewards = backwards([answer["prompt"] for answer in answers], [answer["text"] for answer in answers])
    return rewards.count(1.0) / len(rewards)


def plot_curves(folder: Path) -> None:
    """Draw curves.png from metrics.jsonl: reward, mismatch, and where the time went, by step."""
    import matplotlib.pyplot as plt

    rows = read_metrics(folder)
    panels = [["reward"], ["mismatch_kl", "mismatch_abs_mean"], ["rollout_s", "train_s", "sync_s"]]
    figure, axes = plt.subplots(1, len(panels), figsize=(15, 4), layout="constrained")
    for axis, names in zip(axes, panels, strict=True):
        for name in names:
            axis.plot([row["step"] for row in rows], [row.get(name) for row in rows], label=name)
        axis.set_xlabel("step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
    axes[1].set_yscale("log")
    figure.savefig(folder / "curves.png")


if __name__ == "__main__":
    program = importlib.import_module(Path(__file__).stem)  # by the name that actors and workers know, too
    signal.signal(signal.SIGINT, signal.default_int_handler)
    program.main(tyro.cli(program.Config))
