"""RL with an FP8 rollout engine that is quantized online: the reference pattern.

    driver (this program, no GPU)
      |-- trainer   Ray actor, GPU 0            full-precision Hugging Face model, AdamW
      `-- engine    Ray actor MyLLM(vllm.LLM)   FP8 by torchao or vLLM, tensor parallel on GPUs 1-2
            weights: trainer == NCCL broadcast, BF16, not quantized ==> each worker, quantized on arrival

    prove_sync(trainer, engines)                            # syncs are right, or the run ends here
    for every step:                                         # `rlhf_training_iteration`
        rollouts = engines.rollout(prompts)                 # G answers to each, with log-probabilities
        rollouts.advantage = compute_advantages(compute_rewards(prompts, rollouts))
        trainer.train_step(rollouts)                        # PPO's loss, corrected for FP8
        sync_weights_to_quantized_engine(trainer, engines)  # the next answers come from these weights

How weights are sent, quantized and proved is in rlhf_utils.py: both ends of the wire, to be copied alone.
Left out: a value network, sharded trainers. Without a GPU: gloo, weight-only FP8, the model in tests/tiny.

Dimensions: P prompts, G samples per prompt, B sequences of a micro-batch, L tokens of a sequence, T = L - 1
predicted ones, H hidden size, V vocabulary, N sampled tokens at hand; `rewards_PG` has the shape (P, G).
"""

import concurrent.futures
import contextlib
import copy
import dataclasses
import fcntl
import functools
import importlib.util
import inspect
import json
import logging
import math
import os
import pkgutil
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Annotated, Literal
from unittest import mock

# What every process of a run has in its environment, unless the user has set it.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # vLLM's scheduler in the actor: batches do not depend on timing
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # without a GPU two workers share a NUMA node
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "RAY_process_group_cleanup_enabled": "true",  # a killed actor's children end, too
    "SPT_NOENV": "1",  # setproctitle leaves what the reaper reads as it is
}
if __name__ == "__main__":
    os.environ |= ENVIRONMENT | os.environ | {"MPLBACKEND": "agg"}  # a notebook's would not be found
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a terminal may know ASCII alone
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # until `main` can say more
    print("Importing PyTorch, vLLM and Ray ...", flush=True)

import psutil
import ray
import torch
import torchao
import transformers
import tyro
import vllm
from matplotlib.figure import Figure
from pydantic import Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch.utils.checkpoint import checkpoint
from torchao.core.config import config_from_dict, config_to_dict
from torchao.optim import AdamW8bit
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Float8WeightOnlyConfig, PerRow
from transformers.modeling_layers import GradientCheckpointingLayer

import rlhf_utils
from rlhf_utils import PROMPTS, MyLLM, WeightSender, prove_sync, sync_weights_to_quantized_engine, tell, wait

# ----- 1. Config --------------------------------------------------------------------------------------------
TINY = Path(__file__).resolve().parent / "tests" / "tiny"  # a model like any other, with prompts


@dataclass
class Config:
    """RL with an FP8 vLLM rollout engine, quantized online."""

    model: str = "auto"  # Hugging Face name or folder; `auto`: facebook/opt-125m on GPUs, tests/tiny without
    trainer_device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: a GPU if there is any; products in BF16
    trainer_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: float32 if that fits its GPU
    gradient_checkpointing: bool = True  # compute 2 layers in 3 or more again, as memory wants: slower
    tensor_parallel_size: PositiveInt = 2  # GPUs of an engine (CPU: processes), besides the trainer's
    num_engines: PositiveInt = 1  # they share the prompts of a step, each with GPUs of its own
    quantization: str = "auto"
    """torchao's `fp8-dynamic` (`auto` on GPUs), `fp8-weight-only` (`auto` on CPU) or a file with a torchao
    config; vLLM's `fp8_per_channel`, `fp8_per_block`, `fp8_per_tensor` (experts, too); or `none`."""
    engine_args: str = "{}"  # JSON with any other keywords of vllm.LLM: '{"enforce_eager": true}'
    steps: NonNegativeInt = 20  # rollouts, rewards, optimizer, sync; 0 only starts, proves and samples
    prompts_file: Path | None = None
    """Text, one prompt a line; or JSON lines: `prompt` (text or chat messages), columns for the reward."""
    held_out_file: Path | None = None  # prompts whose greedy answers are rewarded before and after training
    reward: str = "auto"  # letters (share of a-z), backwards (tests/tiny), module:function (called as by TRL)
    prompts_per_step: PositiveInt = 32  # P, the next of the file, in turn
    samples_per_prompt: Annotated[int, Field(ge=2)] = 16  # G; advantages are relative to their mean
    max_tokens: PositiveInt = 32  # longest completion; one that is cut off counts like any other
    temperature: Annotated[float, Field(ge=0.01, le=100)] = 1.0  # of the rollouts (vLLM's least is 0.01)
    learning_rate: Annotated[float, Field(ge=0, le=1)] | None = None  # default: 1e-6 (tests/tiny: 2e-3)
    epochs: PositiveInt | None = None  # optimizer steps on each batch, all of it; default: 1 (tests/tiny: 3)
    overlap: bool = False  # generate the next batch while this is trained on: by weights one step older
    kl_coef: Annotated[float, Field(ge=0, le=1000)] = 0.0  # weight of the KL to a frozen initial policy
    tokens_per_microbatch: PositiveInt = 8192  # longest pass (padded tokens); gradients add up over all
    output_dir: Path = Path("outputs")  # gets metrics.jsonl, curves.png, summary.json, and checkpoint-N
    save_every: NonNegativeInt = 0  # steps between checkpoints; 0: at the end only, and when a run fails
    resume: Path | None = None  # checkpoint-N of a run with the same flags: its model, optimizer and step
    track: Literal["none", "trackio", "wandb"] = "none"  # send metrics there, too (install it yourself)
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0  # of sampling; on the CPU the same gives the same curve
    timeout_s: Annotated[float, Field(ge=1, le=1e6)] = 30.0  # seconds for a sync, a reward; others: ten times
    ray_address: str | None = None  # a cluster (auto, 10.0.0.1:6379) whose nodes share folders; or a new one

    @property
    def world_size(self) -> int:
        """Ranks of the weight-update group: the trainer and every engine's workers."""
        return 1 + self.num_engines * self.tensor_parallel_size


@contextlib.contextmanager
def expected(flag: str, what: str) -> Iterator[None]:
    """What the block raises, because of what the user gave, becomes a ValueError: expected and found."""
    try:
        yield
    except (Exception, SystemExit) as error:  # a module of the user's may raise whatever it likes
        raise ValueError(f"{flag}: expected {what}. Found: {type(error).__name__}: {error}") from error


# ----- 2. The loop ------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Prompt:
    """A line of a prompts file, and how the model reads it."""

    source: str | list[dict]  # as it is in the file: text, or chat messages
    columns: dict  # what else the line has, for the reward
    token_ids: list[int]
    text: str


@dataclasses.dataclass
class Rollout:
    """A completion of a prompt: token ids, and the engine's log-probability (nats) of each completed one."""

    prompt: list[int]
    completion: list[int]
    logprobs: list[float]
    text: str = ""  # of the completion, without special tokens
    finish_reason: str = "stop"  # "length" if it was cut off
    advantage: float = 0.0


def rlhf_training_iteration(train_model, quantized_llm, prompts, reward, config, step, pending=(), ahead=()):
    """Rollouts, rewards, a training step, sync. With the next prompts given as `ahead` (`--overlap`), engines
    generate while the trainer learns. Returns metrics, rollouts, those calls: the next step's `pending`."""
    start, limit_s = time.perf_counter(), config.timeout_s
    rollouts, rollout_s, sampled = take_in(pending or ask(quantized_llm, prompts, config, step), config)
    pending = ask(quantized_llm, ahead, config, step + 1) if ahead else []
    rewards_PG = compute_rewards(prompts, rollouts, reward, limit_s)
    for rollout, advantage in zip(rollouts, compute_advantages(rewards_PG).flatten().tolist(), strict=True):
        rollout.advantage = advantage
    [trained] = wait([train_model.train_step.remote(rollouts)], 10 * limit_s, "the training step")
    wait(pending, 10 * limit_s, "generating for the next step")  # a busy engine cannot be synced
    sync = sync_weights_to_quantized_engine(train_model, quantized_llm, timeout_s=limit_s)
    [version] = wait([quantized_llm[0].get_weights_version.remote()], limit_s, "reading the version")
    tokens = sum(len(rollout.completion) for rollout in rollouts)
    cut_off = sum(rollout.finish_reason == "length" for rollout in rollouts)
    metrics = {"step": step, "reward": rewards_PG.mean().item(), "truncated": cut_off / len(rollouts)}
    metrics |= {"tokens": tokens, "tokens_per_s": tokens / rollout_s, "rollout_s": rollout_s, **trained}
    metrics |= {"sync_path": sync["path"], "sync_gb_per_s": sync["gb_per_s"], "sync_s": sync["seconds"]}
    metrics |= {"sampled_version": sampled, "weights_version": version, "staleness": version - 1 - sampled}
    return metrics | {"step_s": time.perf_counter() - start}, rollouts, pending


LINE_OF_STEP = (
    "step {step:4d} | reward {reward:.3f} | mismatch KL {mismatch_kl:.2e}, |d| max {mismatch_abs_max:.3f}, "
    "ESS {effective_sample_size:.3f} | {tokens_per_s:.0f} tokens/s | rollout {rollout_s:.2f} s, "
    "train {train_s:.2f} s, sync {sync_s:.3f} s ({sync_gb_per_s:.2f} GB/s) | trainer {trainer_gib:.2f} GiB"
)


def train(config: Config, trainer, engines: list, prompts: list, reward: Callable, first: int) -> list[dict]:
    """Steps from `first` on; returns all metrics. If one fails, what was learned is saved if it can be."""
    file, pending, saved = config.output_dir / "metrics.jsonl", None, (first, config.resume)
    rows = [row for row in read_metrics(file) if row["step"] < first] if config.resume else []
    file.write_text("".join(map(to_json, rows)))
    tracker, telling = None, rlhf_utils.only_told(f"--track {config.track}")  # a decorator
    with contextlib.ExitStack() as cleanup:
        if config.track != "none":
            with rlhf_utils.only_told(f"--track {config.track}"):
                tracker = importlib.import_module(config.track)
                cleanup.callback(telling(tracker.finish))
                flags = json.loads(json.dumps(vars(config), default=str))
                tracker.init(project="rlhf-online-quant", config=flags)
        for step in range(first, config.steps):
            batch, next_batch = (prompts_of_step(config, prompts, number) for number in (step, step + 1))
            ahead = next_batch if config.overlap and step + 1 < config.steps else None
            try:
                done = rlhf_training_iteration(trainer, engines, batch, reward, config, step, pending, ahead)
                metrics, rollouts, pending = done
                rows.append(metrics)
                with file.open("a") as lines:
                    lines.write(to_json(metrics))
                if tracker:
                    telling(tracker.log)(metrics, step=step)
                tell(LINE_OF_STEP.format(**metrics), flush=True)
                if step % 10 == 0:
                    tell(f"  sample: {batch[0].text[-60:]!r} -> {rollouts[0].text[:60]!r}")
                if step + 1 == config.steps or config.save_every and (step + 1) % config.save_every == 0:
                    saving = trainer.save_checkpoint.remote(config.output_dir)
                    [saved] = wait([saving], 10 * config.timeout_s, "saving a checkpoint")
            except (Exception, KeyboardInterrupt) as error:
                # A training step may still be under way, and end; but a silent trainer has had its time.
                limit_s = config.timeout_s * (1 if "no answer from trainer" in str(error) else 10)
                try:  # not by `wait`: that an engine has died does not matter now
                    saved = ray.get(trainer.save_checkpoint.remote(config.output_dir), timeout=limit_s)
                except ray.exceptions.RayError as why:  # a GetTimeoutError is one
                    error.add_note(f"What was learned since could not be saved: {rlhf_utils.cause_of(why)}")
                kept = f"{saved[0]} complete steps are saved: go on with --resume {saved[1]}"
                error.add_note(f"This was step {step}. {kept if saved[1] else 'No step is saved.'}")
                raise
    return rows


def prompts_of_step(config: Config, prompts: list[Prompt], step: int) -> list[Prompt]:
    """P prompts, which follow those of the step before; behind the last comes the first again."""
    start = step * config.prompts_per_step
    return [prompts[i % len(prompts)] for i in range(start, start + config.prompts_per_step)]


def to_json(row: dict) -> str:
    """A line of metrics.jsonl; JSON knows no NaN and no infinity."""
    finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def read_metrics(file: Path) -> list[dict]:
    """The rows of metrics.jsonl, but for a last one that was cut off. Raises ValueError."""
    with expected(str(file), "a JSON object with a `step` a line; move it away"):
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return [row | {"step": int(row["step"])} for row in map(json.loads, lines)]


# ----- 3. Rollouts and rewards ------------------------------------------------------------------------------
def ask(engines: list, prompts: list[Prompt], config: Config, step: int = 0, greedy: bool = False) -> list:
    """Have each engine complete its share of the prompts, G times, or once; the calls go to `take_in`."""
    samples, temperature = (1, 0) if greedy else (config.samples_per_prompt, config.temperature)
    params = dict(n=samples, temperature=temperature, max_tokens=config.max_tokens, logprobs=0)
    params |= dict(flat_logprobs=True, detokenize=False)  # `rollout` makes text of all tokens at once
    first, share = config.seed * 10**6 + step * len(prompts), math.ceil(len(prompts) / len(engines))
    seeded = [params | {"seed": (first + i) * samples % 2**62} for i in range(len(prompts))]  # vLLM counts on
    parts = zip(engines, range(0, len(prompts), share))
    return [llm.rollout.remote(prompts[i : i + share], seeded[i : i + share]) for llm, i in parts]


def take_in(pending: list, config: Config) -> tuple[list[Rollout], float, int]:
    """All rollouts in order, the slowest engine's seconds, the oldest version. Raises RuntimeError."""
    shares, seconds, versions = zip(*wait(pending, 10 * config.timeout_s, "generating"), strict=True)
    rollouts = sum(shares, [])
    if wrong := sum(not all(map(math.isfinite, rollout.logprobs)) for rollout in rollouts):
        found = f"the engine's log-probabilities of {wrong} of {len(rollouts)} completions are not finite"
        raise RuntimeError(f"{found}. Lower --learning-rate, or see whether --quantization none helps")
    return rollouts, max(seconds), min(versions)


def letters(completions: list, **_) -> list[float]:
    """The share of characters that are lower-case letters a-z: what a random model can learn from scratch."""
    texts = [said if isinstance(said, str) else said[0]["content"] for said in completions]
    return [sum("a" <= letter <= "z" for letter in text) / max(1, len(text)) for text in texts]


def backwards(completions: list[str], answer: list[str], **_) -> list[float]:
    """The share of letters that are right and in place: of "edcba", 0.8 in "edxba", 0.5 in "edcbaedcba"."""
    pairs = list(zip(answer, map(str.strip, completions), strict=True))
    right = [sum(letter == other for letter, other in zip(*pair)) for pair in pairs]
    return [count / max(1, *map(len, pair)) for count, pair in zip(right, pairs)]


def load_reward(name: str, columns: set[str]) -> Callable[..., list[float]]:
    """`--reward`, made callable by more names than it takes. Raises ValueError if it wants others."""
    given = {"prompts", "completions", "completion_ids", "finish_reasons"}
    known = given | columns
    sys.path.append(os.getcwd())
    with expected(f"--reward {name}", "backwards, letters, or module:function, here or installed"):
        reward = {"backwards": backwards, "letters": letters}.get(name) or pkgutil.resolve_name(name)
        if inspect.isclass(reward) or any(map(inspect.iscoroutinefunction, (reward, type(reward).__call__))):
            raise TypeError(f"{reward!r}, not a plain function")
        if double := given & columns:
            raise ValueError(f"columns {sorted(double)} in the file, which the program fills: rename them")
        signature = inspect.signature(reward)
    takes_all = any(wanted.kind == wanted.VAR_KEYWORD for wanted in signature.parameters.values())
    names = known if takes_all else known & signature.parameters.keys()
    with expected(f"--reward {name}", f"a function of some of {', '.join(sorted(known))}, called by name"):
        signature.bind(**dict.fromkeys(names))
    return lambda **given: reward(**{name: given[name] for name in names})


def compute_rewards(prompts: list[Prompt], rollouts: list[Rollout], reward, timeout_s=30.0) -> torch.Tensor:
    """Rewards of every completion, shape (P, G), float64.

    `reward` is called by name, as TRL calls it, with lists that have an entry for each completion: `prompts`
    as in the file, `completions` (text; to chat messages [{"role": "assistant", "content": text}]),
    `completion_ids`, `finish_reasons` ("length": cut off; "stop"), the file's columns. Raises RuntimeError
    unless it returns one finite number for each; TimeoutError (if it frees Python's lock)."""
    samples, answer = len(rollouts) // len(prompts), concurrent.futures.Future()
    of_each = [prompt for prompt in prompts for _ in range(samples)]
    rows = [copy.deepcopy(prompt.columns | {"prompts": prompt.source}) for prompt in of_each]  # its own
    given = {name: [row[name] for row in rows] for name in rows[0]} | {"completions": []}
    for prompt, rollout in zip(of_each, rollouts, strict=True):
        said = [{"role": "assistant", "content": rollout.text}]
        given["completions"].append(rollout.text if isinstance(prompt.source, str) else said)
    given["completion_ids"] = [[*rollout.completion] for rollout in rollouts]
    given["finish_reasons"] = [rollout.finish_reason for rollout in rollouts]

    def run() -> None:
        try:
            found = reward(**given)
            if isinstance(found, (str, bytes, bytearray, Mapping, Set)):
                raise TypeError(f"it returned a {type(found).__name__}, not a list of numbers")
            answer.set_result([float(value + 0) for value in found])  # a text is no number
        except BaseException as error:  # raised below; SystemExit would end this thread without a word
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # it may hang, and does not keep the program alive
    if not concurrent.futures.wait([answer], timeout_s).done:
        raise TimeoutError(f"the reward function has not returned for {timeout_s:g} s, the --timeout-s")
    if error := answer.exception():
        found = f"{type(error).__name__}: {error} {traceback.extract_tb(error.__traceback__)[-1]}"
        raise RuntimeError(f"the reward function failed: {found}") from error
    rewards, largest = answer.result(), torch.finfo(torch.float32).max
    wrong = [f"{value} for {r.text!r}" for value, r in zip(rewards, rollouts) if not abs(value) <= largest]
    if wrong or len(rewards) != len(rollouts):
        found = f"{len(rewards)} numbers, not finite: {wrong[:3] or 'none'}"
        raise RuntimeError(f"the reward function: expected {len(rollouts)} finite numbers; found {found}")
    return torch.tensor(rewards, dtype=torch.float64).view(len(prompts), samples)


# ----- 4. The objective: pure functions of numbers ----------------------------------------------------------
CLIP = 0.2  # PPO: the probability ratio to the policy before the step counts within 1 - CLIP and 1 + CLIP
CORRECTION_CAP = 2.0  # the largest importance weight
MAX_GRAD_NORM = 1.0  # gradients are scaled down to this norm
HEAD_ROWS = 1024  # tokens whose logits are held at a time


def compute_advantages(rewards_PG: torch.Tensor) -> torch.Tensor:
    """Rewards, centred and scaled within each group, as in GRPO (Shao et al. 2024, arXiv:2402.03300, 4.1.2).

    >>> compute_advantages(torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.7, 0.7, 0.7, 0.7]]))
    tensor([[-0.8660, -0.8660,  0.8660,  0.8660],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    equal_P1 = (rewards_PG == rewards_PG[:, :1]).all(dim=1, keepdim=True)  # their mean may be rounded
    return (centred_PG / (rewards_PG.std(dim=1, keepdim=True) + 1e-6)).masked_fill(equal_P1, 0.0)


def compute_ppo_loss(logprobs_BT: torch.Tensor, batch: dict[str, torch.Tensor], config: Config) -> tuple:
    """PPO's clipped loss (Schulman et al. 2017, arXiv:1707.06347, equation 7), with importance weights.

    Clipped is the ratio of the policy (`logprobs_BT`) to that before the step (`old_BT`). The latter's ratio
    to the one that sampled (`engine_BT`: FP8; with `--overlap` a step older) is a weight, with a cap:
    truncated importance sampling (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL"; with clipping Hilton et al. 2021, arXiv:2110.00641). Both results are sums over completion
    tokens, so that each counts the same (DAPO: Yu et al. 2025, arXiv:2503.14476, 3.3)."""
    mask_BT = batch["mask_BT"]  # what stands elsewhere must not reach a gradient
    logprobs_N, old_N = logprobs_BT[mask_BT], batch["old_BT"][mask_BT]
    weights_N = (old_N - batch["engine_BT"][mask_BT]).exp().clamp(max=CORRECTION_CAP)
    advantages_N = batch["advantages_B1"].expand_as(mask_BT)[mask_BT]
    ratio_N = (logprobs_N - old_N).exp()
    plain_N, clipped_N = ratio_N * advantages_N, ratio_N.clamp(1 - CLIP, 1 + CLIP) * advantages_N
    kl_N = k3(batch["reference_BT"][mask_BT] - logprobs_N) if config.kl_coef else 0 * logprobs_N
    loss = (config.kl_coef * kl_N - weights_N * torch.minimum(plain_N, clipped_N)).sum()
    metrics = {"loss": loss.detach(), "reference_kl": kl_N.detach().sum()}
    metrics |= {"ppo_clipped": (clipped_N < plain_N).sum(), "corrected": (weights_N == CORRECTION_CAP).sum()}
    return loss, metrics


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """KL(q || p) in nats, estimated from log p - log q of samples of q (Schulman 2020, "Approximating KL
    Divergence", joschu.net/blog/kl-approx.html): unbiased, never negative."""
    return torch.expm1(log_ratio) - log_ratio


def measure_mismatch(old_N: torch.Tensor, engine_N: torch.Tensor) -> dict[str, float]:
    """How far the engine's log-probabilities (nats) are from the trainer's. The effective sample size is,
    for ratios r, (sum r)^2 / sum r^2 / N (Kong 1992, Importance Sampling using Standardized Weights)."""
    log_ratio_N = old_N.double() - engine_N.double()
    ratio_N, distance_N = log_ratio_N.exp(), log_ratio_N.abs()
    found = {"mismatch_kl": k3(log_ratio_N).mean(), "mismatch_abs_mean": distance_N.mean()}
    found["mismatch_abs_max"] = distance_N.max()
    found["effective_sample_size"] = ratio_N.sum() ** 2 / (ratio_N**2).sum() / len(ratio_N)
    return {name: value.item() for name, value in found.items()}


# ----- 5. The trainer ---------------------------------------------------------------------------------------
class Trainer(WeightSender):
    """Model and optimizer in full precision; by inheritance rank 0 of the weight-update group."""

    def __init__(self, config: Config):
        self.config, self.step, self.unfinished = config, 0, False
        super().__init__(self._load(config.resume or config.model), config.trainer_device)
        transformers.AutoTokenizer.from_pretrained(config.model, trust_remote_code=False)  # fetches its files
        folder = Path(transformers.utils.cached_file(config.model, "config.json")).parent
        kinds = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm", ".bpe", ".vocab")
        ours = [file for pattern in ("*", "additional_chat_templates/*") for file in folder.glob(pattern)]
        ours = [file for file in ours if file.suffix in kinds or file.name.startswith("tokenizer.")]
        self.beside = {f.relative_to(folder): f.read_bytes() for f in ours if "index" not in f.name}
        del self.beside[Path("config.json")]  # a checkpoint's says its own dtype
        self.reference = self._load(config.model).requires_grad_(False) if config.kl_coef else None
        if config.gradient_checkpointing:
            checkpoint_layers(self.model, config)
        how = dict(lr=config.learning_rate, weight_decay=0.0)
        if config.trainer_dtype == "bfloat16":
            how["lr"] = torch.tensor(config.learning_rate)  # it is compiled, and refuses a number later
            self.optimizer = AdamW8bit(self.model.parameters(), **how, bf16_stochastic_round=True)
            for module in self.model.modules() if self.device.type == "cuda" else ():  # one kernel for many
                if type(module).__name__.endswith(("Norm", "MLP")):
                    module.compile(dynamic=True)
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), **how, fused=True)
        self.random = torch.cuda if self.device.type == "cuda" else torch
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")  # freed pieces can be used
        if config.resume:
            state = torch.load(config.resume / "trainer.pt", map_location="cpu", weights_only=True)
            self.optimizer.load_state_dict(state["optimizer"])
            self.optimizer.param_groups[0] |= how  # the flag's learning rate, not that of the run before
            if self.device.type in state.get("random", {}):
                self.random.set_rng_state(state["random"][self.device.type])
            self.step = state["step"]
        self.saved = self.step, config.resume

    def _load(self, folder: str | Path) -> torch.nn.Module:
        """As the engine computes it: in evaluation mode, whatever attention config.json names."""
        model_config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        caps = getattr(model_config, "attn_logit_softcapping", None)  # on attention: "eager" alone has them
        model_config._attn_implementation = "eager" if caps else None
        if (getattr(model_config, "pad_token_id", 0) or 0) >= model_config.vocab_size:
            model_config.pad_token_id = None  # nothing is padded with it
        how = dict(dtype=self.config.trainer_dtype.replace("auto", "float32"), trust_remote_code=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, config=model_config, **how)
        model.generation_config = transformers.GenerationConfig()  # not used; the file is kept as it came
        return model.to(self.config.trainer_device).eval()

    def train_step(self, rollouts: list[Rollout]) -> dict:
        """`epochs` AdamW steps; returns metrics (README). Raises if a gradient or weight is not finite."""
        config, start = self.config, time.perf_counter()
        if on_gpu := self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        batches = [self._pad(part) for part in split_by_tokens(rollouts, config.tokens_per_microbatch)]
        tokens = sum(len(rollout.completion) for rollout in rollouts)
        sums = dict.fromkeys(("loss", "ppo_clipped", "corrected", "reference_kl"), 0.0)
        for epoch in range(config.epochs):
            self.optimizer.zero_grad()
            for batch in batches:
                logprobs_BT = completion_logprobs(self.model, batch, config.temperature)
                if epoch == 0:
                    batch["old_BT"] = logprobs_BT.detach()
                    if self.reference:
                        batch["reference_BT"] = completion_logprobs(self.reference, batch, config.temperature)
                loss, metrics = compute_ppo_loss(logprobs_BT, batch, config)
                (loss / tokens).backward()
                sums = {name: value + metrics[name] for name, value in sums.items()}
            weights = self.model.parameters()
            norm = torch.nn.utils.clip_grad_norm_(weights, MAX_GRAD_NORM, error_if_nonfinite=True)
            self.unfinished = True  # if another epoch fails, the weights are those of no step
            self.optimizer.step()
        self.step, self.unfinished = self.step + 1, False
        self.check_finite()
        of_all = lambda name: torch.cat([batch[name][batch["mask_BT"]] for batch in batches])
        memory = torch.cuda.max_memory_allocated() if on_gpu else psutil.Process().memory_info().rss
        means = {name: float(value) / tokens / config.epochs for name, value in sums.items()}
        means |= measure_mismatch(of_all("old_BT"), of_all("engine_BT")) | {"grad_norm": float(norm)}
        return means | {"train_s": time.perf_counter() - start, "trainer_gib": memory / 2**30}

    def _pad(self, rollouts: list[Rollout]) -> dict[str, torch.Tensor]:
        """One micro-batch, padded on the right. Position t predicts token t + 1; masked in: completions."""
        pad = lambda rows: torch.nn.utils.rnn.pad_sequence([*map(torch.tensor, rows)], batch_first=True)
        tokens_BL = pad([each.prompt + each.completion for each in rollouts])
        mask_BL = pad([[False] * len(each.prompt) + [True] * len(each.completion) for each in rollouts])
        engine_BL = pad([[0.0] * len(each.prompt) + each.logprobs for each in rollouts])
        batch = {"tokens_BL": tokens_BL, "mask_BT": mask_BL[:, 1:], "engine_BT": engine_BL[:, 1:]}
        batch["advantages_B1"] = torch.tensor([[each.advantage] for each in rollouts])
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    @torch.no_grad()
    def score(self, rollouts: list[Rollout], names: dict[str, list]) -> tuple[float, float, float]:
        """Mismatch KL of rollouts; what is left if layers by `names` are computed as in the engine; what is
        not seen, and taken off: twice what noise of BF16's size makes, rounded up here, down there."""
        config, found, known = self.config, {}, (*TORCHAO_CONFIGS, "fp8_per_channel", "none")
        if config.quantization not in known or "kv_cache_dtype" in config.engine_args:
            raise ValueError(f"the trainer does not know how {config.quantization} or FP8 keys are rounded")
        batches = [self._pad(part) for part in split_by_tokens(rollouts, config.tokens_per_microbatch)]
        compute = lambda batch: completion_logprobs(self.model, batch, config.temperature)[batch["mask_BT"]]
        measure = lambda: torch.cat([*map(compute, batches)])
        own_N, engine_N = measure(), torch.cat([batch["engine_BT"][batch["mask_BT"]] for batch in batches])
        for noise in (0, 2**-9):
            how = names, config.tensor_parallel_size, TORCHAO_CONFIGS.get(config.quantization), noise
            with rlhf_utils.computing_as(self.model, *how):
                found[noise] = measure()
        pairs = (own_N, engine_N), (found[0], engine_N), (found[2**-9], found[0])
        kl, left, of_noise = (measure_mismatch(*pair)["mismatch_kl"] for pair in pairs)
        return kl, max(left - 2 * of_noise, 0.0), 2 * of_noise

    def save_checkpoint(self, output_dir: Path) -> tuple[int, Path | None]:
        """Write all that `--resume` needs to checkpoint-STEP, which appears when it is complete. Returns the
        last step that is saved, and where. Raises ValueError (a weight is NaN) or RuntimeError."""
        if self.step == self.saved[0]:
            return self.saved
        if self.unfinished:
            raise RuntimeError("a step has failed half way: the weights are those of no step")
        self.check_finite()
        folder = output_dir / f"checkpoint-{self.step}"
        aside = folder.with_name(folder.name + ".incomplete")
        self.model.save_pretrained(aside)
        (aside / "generation_config.json").unlink(missing_ok=True)
        for name, content in self.beside.items():  # tokenizer, templates, generation settings, as they came
            (aside / name).parent.mkdir(exist_ok=True)
            (aside / name).write_bytes(content)
        state = {"optimizer": self.optimizer.state_dict(), "step": self.step}
        state["random"] = {self.device.type: self.random.get_rng_state()}
        torch.save(state, aside / "trainer.pt")
        for file in aside.glob("*.safetensors"):  # which are written for their owner alone
            file.chmod((aside / "trainer.pt").stat().st_mode)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        self.saved = self.step, folder
        return self.saved


def checkpoint_layers(model: torch.nn.Module, config: Config) -> None:
    """Layers compute activations again in the backward pass; one in three keeps them, or as many as fit.
    (transformers' own way wants the model in training mode.) Raises ValueError: it has no such layers."""
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layers for it; type --no-gradient-checkpointing")
    keep = math.ceil(len(layers) / 3)
    if model.device.type == "cuda":
        (free, total), more = torch.cuda.mem_get_info(), 13 if model.dtype == torch.float32 else 4
        free -= total / 10 + model.num_parameters() * more  # gradients, moments, FP32's copies for products
        keep = sum(activation_bytes(config, model.config, n) < free for n in range(1, keep + 1))
    for number in {*range(len(layers))} - {i * len(layers) // keep for i in range(keep)}:
        layers[number].forward = functools.partial(checkpoint, layers[number].forward, use_reentrant=False)


def activation_bytes(config: Config, model: transformers.PretrainedConfig, keep: int = 0) -> float:
    """About what a micro-batch takes, and a sync; of all layers but `keep` activations are computed again."""
    tokens = max(config.tokens_per_microbatch, json.loads(config.engine_args).get("max_model_len") or 0)
    width, layers = model.hidden_size, model.num_hidden_layers
    of_layer = 26 * width + 8 * (getattr(model, "intermediate_size", None) or 4 * width)  # seen: Qwen3-8B
    of_all = (4 * layers + 10) * width + (1 + keep) * of_layer
    return tokens * of_all + 16 * HEAD_ROWS * model.vocab_size + 2**31


def completion_logprobs(model, batch: dict[str, torch.Tensor], temperature: float = 1.0) -> torch.Tensor:
    """Log-probability (nats, at a temperature) of each completion token, shape (B, T); 0 elsewhere.

    Logits, `HEAD_ROWS` at a time, are made again in the backward pass: never all at once, which would take
    more than the model. Products are BF16's on a GPU. Padding on the right needs no mask."""
    tokens_BL, mask_BT, decoder = batch["tokens_BL"], batch["mask_BT"], model.get_decoder()

    def of_some(hidden_NH: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        given = type(output)(last_hidden_state=hidden_NH[None])
        # What comes behind the decoder (head, scales, caps) is done by the model's own forward, on these.
        with mock.patch.object(decoder, "forward", lambda *_, **__: given):
            logits_NV = model(input_ids=targets_N[None], use_cache=False).logits[0].float().div_(temperature)
        return -torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")

    with torch.autocast(tokens_BL.device.type, torch.bfloat16, enabled=tokens_BL.is_cuda):
        output = decoder(input_ids=tokens_BL, use_cache=False)
        hidden_NH, targets_N = output.last_hidden_state[:, :-1][mask_BT], tokens_BL[:, 1:][mask_BT]
        parts = zip(hidden_NH.split(HEAD_ROWS), targets_N.split(HEAD_ROWS), strict=True)
        logprobs_N = torch.cat([checkpoint(of_some, *part, use_reentrant=False) for part in parts])
    return torch.zeros(mask_BT.shape, device=mask_BT.device).masked_scatter(mask_BT, logprobs_N)


def split_by_tokens(rollouts: list[Rollout], limit: int) -> list[list[Rollout]]:
    """Micro-batches of at most `limit` tokens after padding, short ones first; a longer one gets its own."""
    parts: list[list[Rollout]] = []
    for rollout in sorted(rollouts, key=lambda each: len(each.prompt + each.completion)):
        length = len(rollout.prompt + rollout.completion)  # the longest so far
        if not parts or (len(parts[-1]) + 1) * length > limit:
            parts.append([])
        parts[-1].append(rollout)
    return parts


# ----- 6. The engine ----------------------------------------------------------------------------------------
class RolloutLLM(MyLLM):
    def rollout(self, prompts: list[Prompt], params: list[dict]) -> tuple[list[Rollout], float, int]:
        """All completions, prompt by prompt; seconds; version of the weights. `params`: of SamplingParams."""
        start, inputs = time.perf_counter(), [{"prompt_token_ids": each.token_ids} for each in prompts]
        outputs = self.generate(inputs, [vllm.SamplingParams(**each) for each in params], use_tqdm=False)
        seconds, tokenizer, rollouts = time.perf_counter() - start, self.get_tokenizer(), []
        how = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for prompt, output in zip(prompts, outputs, strict=True):
            last = prompt.token_ids[-1:]  # without it some tokenizers would drop an answer's first space
            for said in output.outputs:
                ids, logprobs = list(said.token_ids), list(said.logprobs.logprobs)
                text = tokenizer.decode([*last, *ids], **how)[len(tokenizer.decode(last, **how)) :]
                rollouts.append(Rollout(prompt.token_ids, ids, logprobs, text, said.finish_reason))
        return rollouts, seconds, self.weights_version


VLLM_SCHEMES = ("fp8_per_channel", "fp8_per_block", "fp8_per_tensor")  # its online quantization
# Activation rows of zeros get no scale of 0. Inductor's settings stay vLLM's: torchao's tune for minutes.
BY_ROWS = dict(granularity=PerRow(), activation_value_lb=1e-12, set_inductor_config=False)
TORCHAO_CONFIGS = {"fp8-dynamic": Float8DynamicActivationFloat8WeightConfig(**BY_ROWS)}
TORCHAO_CONFIGS["fp8-weight-only"] = Float8WeightOnlyConfig(set_inductor_config=False)


def quantization_arguments(quantization: str) -> dict:
    """What `--quantization` means to `LLM`. Raises ValueError."""
    if quantization == "none":
        return {"quantization": None}
    if quantization in VLLM_SCHEMES:  # routers, which are small, stay BF16; padded ones could not be replayed
        return {"quantization": quantization, "quantization_config": {"ignore": ["re:.*(gate|router)$"]}}
    choices = ", ".join([*TORCHAO_CONFIGS, *VLLM_SCHEMES, "none"])
    with expected(f"--quantization {quantization}", f"{choices}, or a file with the JSON of config_to_dict"):
        config = TORCHAO_CONFIGS.get(quantization)
        config = config or config_from_dict(json.loads(Path(quantization).read_text()))
        as_json = json.dumps(config_to_dict(config))
    return {"quantization": "torchao", "hf_overrides": {"quantization_config_dict_json": as_json}}


def engine_arguments(config: Config, device: str) -> dict:
    """Keyword arguments for `LLM`: an FP8 engine whose workers can receive weights. Raises ValueError."""
    tp, model = config.tensor_parallel_size, str(config.resume or config.model)  # the trainer's weights
    workers = "ray" if device == "cuda" else "mp" if tp > 1 else "uni"  # vLLM has no Ray workers on the CPU
    defaults = dict(gpu_memory_utilization=0.8, seed=config.seed, enforce_eager=device == "cpu")
    # On the CPU vLLM fails when it cuts a seeded prompt in two, and cannot reload what AMX has of MLA.
    defaults |= dict(enable_chunked_prefill=False, attention_backend="CPU_MLA") if device == "cpu" else {}
    fixed = {"quantization_config": None} | quantization_arguments(config.quantization)
    fixed |= dict(model=model, tensor_parallel_size=tp, distributed_executor_backend=workers)
    fixed |= dict(worker_extension_cls="rlhf_utils.WorkerExtension", dtype="bfloat16")  # PerRow's only one
    fixed |= dict(logprobs_mode="processed_logprobs")  # of what is sampled from, temperature included
    fixed |= dict(trust_remote_code=False, pipeline_parallel_size=1, data_parallel_size=1)
    what = """a JSON object of keywords that the program does not set, such as '{"kv_cache_dtype": "fp8"}'"""
    with expected(f"--engine-args {config.engine_args}", what):
        more = dict(**json.loads(config.engine_args))
        inspect.signature(vllm.EngineArgs).bind(**more)
        if wrong := more.keys() & fixed.keys():
            raise ValueError(", ".join(sorted(wrong)))
    return defaults | more | fixed


# ----- 7. Start and stop ------------------------------------------------------------------------------------
# A shell waits until the driver ($1) is no longer its parent, and kills what is left after 4 s with the run's
# mark ($0) in its environment: what is orphaned, stopped or stuck in a collective does not end itself.
REAPER = """exec >/dev/null 2>&1; while grep -q "^PPid:.$1$" /proc/$$/status; do sleep 0.5; done
marked() { grep -ls "$0" /proc/[0-9]*/environ | tr -dc '0-9\\n'; }
for moment in 1 2 3 4 5 6 7 8; do [ "$(marked)" ] && sleep 0.5; done; kill -9 $(marked)"""


def connect(config: Config, cleanup: contextlib.ExitStack) -> int:
    """Connect to Ray, or start a private cluster of which `cleanup` leaves nothing. Returns how many GPUs."""
    address, mark = config.ray_address, f"{os.getpid()}.{time.time_ns()}"
    reaper = ["sh", "-c", REAPER, f"RLHF_RUN={mark}"]
    subprocess.Popen([*reaper, str(os.getpid())], start_new_session=True)
    cleanup.callback(subprocess.run, reaper)  # the same for what is left by the next line
    cleanup.callback(ray.shutdown)
    passed_on = ("HF_", "HUGGING", "NCCL_", "TORCH", "TRANSFORMERS_", "VLLM_")
    variables = {name: value for name, value in os.environ.items() if name.startswith(passed_on)}
    modules = [__file__, str(Path(__file__).with_name("rlhf_utils.py"))]  # for other nodes
    options = dict(runtime_env={"env_vars": ENVIRONMENT | variables, "py_modules": modules})
    options |= dict(log_to_driver=False, logging_level="ERROR")
    if address is None:
        os.environ["RLHF_RUN"] = mark
        ray.init("local", num_cpus=1 + config.world_size, include_dashboard=False, **options)
        del os.environ["RLHF_RUN"]  # what starts later, a tracker say, lives on
    else:
        with expected(f"--ray-address {address}", "auto, or HOST:PORT of a cluster (RAY_AUTH_MODE=token?)"):
            if address != "auto":  # Ray would try for minutes
                host, _, port = address.removeprefix("ray://").rpartition(":")
                socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            ray.init(address, **options)
    has = {name: int(ray.cluster_resources().get(name, 0)) for name in ("CPU", "GPU")}
    if has["CPU"] < (needed := 1 if has["GPU"] else config.world_size):
        raise ValueError(f"the Ray cluster has {has['CPU']} CPUs; trainer and engines need {needed}")
    return has["GPU"]


def start(config: Config, device: str, cleanup: contextlib.ExitStack) -> tuple:
    """Trainer and engines, loaded side by side, in one group; returns handles and what `prove_fp8` found."""
    trainer = start_trainer(config, cleanup)  # first, so that it gets GPU 0
    first_ranks = range(1, config.world_size, config.tensor_parallel_size)
    engines = [start_engine(config, device, cleanup, first_rank) for first_rank in first_ranks]
    rlhf_utils.join_group(trainer, engines, timeout_s=config.timeout_s)
    wanted = config.quantization != "none"
    return trainer, engines, rlhf_utils.prove_fp8(engines, expect_fp8=wanted, timeout_s=config.timeout_s)


def start_trainer(config: Config, cleanup: contextlib.ExitStack):
    """Start loading the trainer; returns its handle."""
    gpus = int(config.trainer_device == "cuda")
    return start_actor(Trainer, "trainer (rank 0)", [{"CPU": 1, "GPU": gpus}], gpus, cleanup, config=config)


def start_engine(config: Config, device: str, cleanup: contextlib.ExitStack, first_rank: int = 1):
    """Start loading an engine, one GPU bundle per worker."""
    bundles = [{"GPU": 1} if device == "cuda" else {"CPU": 1}] * config.tensor_parallel_size
    name = f"engine (rank {', '.join(str(first_rank + i) for i in range(len(bundles)))})"
    return start_actor(RolloutLLM, name, bundles, 0, cleanup, **engine_arguments(config, device))


def start_actor(kind: type, name: str, bundles: list[dict], gpus: int, cleanup, **arguments):
    """Start an actor in a placement group of its own; returns its handle, `cleanup` stops it."""
    group = ray.util.placement_group(bundles)
    cleanup.callback(ray.util.remove_placement_group, group)
    wait([group.ready()], 30, f"reserving {bundles} in the Ray cluster")
    inside = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
    options = dict(num_cpus=0, num_gpus=gpus, scheduling_strategy=inside)
    actor = ray.remote(kind).options(**options).remote(**arguments)
    rlhf_utils.ACTORS[name] = actor._actor_id
    cleanup.callback(ray.kill, actor)
    cleanup.callback(rlhf_utils.ACTORS.pop, name, None)
    return actor


# ----- 8. Before anything starts, and main ------------------------------------------------------------------
def resolve(config: Config, gpus: int) -> tuple[Config, str]:
    """Fill in every `auto` and None; returns the config and the engines' device. Raises ValueError."""
    home = {n: type(v)(os.path.expanduser(v)) for n, v in vars(config).items() if str(v).startswith("~")}
    config = dataclasses.replace(config, **home)
    model = config.model if config.model != "auto" else "facebook/opt-125m" if gpus else str(TINY)
    model = str(Path(model).resolve()) if Path(model).is_dir() else model  # actors work elsewhere
    tiny, own = model == str(TINY), model == str(TINY) and config.prompts_file is None
    defaults = dict(trainer_device="cuda" if gpus else "cpu", reward="backwards" if own else "letters")
    defaults["quantization"] = "fp8-dynamic" if gpus else "fp8-weight-only"
    defaults |= dict(learning_rate=2e-3, epochs=3) if tiny else dict(learning_rate=1e-6, epochs=1)
    if own:
        defaults |= dict(prompts_file=TINY / "prompts.jsonl", held_out_file=TINY / "held_out.jsonl")
    missing = {name: value for name, value in defaults.items() if getattr(config, name) in ("auto", None)}
    missing |= dict(model=model, output_dir=config.output_dir.absolute())
    config = dataclasses.replace(config, **missing, resume=config.resume and config.resume.absolute())
    for_engines, for_trainer = config.world_size - 1 if gpus else 0, int(config.trainer_device == "cuda")
    if gpus < for_engines + for_trainer:
        wanted = f"{for_trainer} for the trainer, {for_engines} for --num-engines x --tensor-parallel-size"
        fits = f"--num-engines 1 --tensor-parallel-size 1{' --trainer-device cpu' if gpus < 2 else ''}"
        raise ValueError(f"found {gpus} GPU(s); expected {wanted}. What fits here: {fits}")
    capability = vllm.platforms.current_platform.get_device_capability() if gpus else None
    if capability and capability.to_int() < 89 and config.quantization != "none":
        raise ValueError(f"GPU capability {capability.as_version_str()}; FP8 needs 8.9: --quantization none")
    return config, "cuda" if gpus else "cpu"


def check(config: Config, device: str) -> tuple[Config, list[Prompt], list[Prompt], Callable, int]:
    """What is known before the start: config, prompts, held-out ones, reward, first step. Or ValueError."""
    if config.track != "none" and importlib.util.find_spec(config.track) is None:
        raise ValueError(f"--track {config.track}: not installed here; pip install {config.track}")
    with expected(f"--output-dir {config.output_dir}", "a folder that can be written to"):
        config.output_dir.mkdir(parents=True, exist_ok=True)
        (config.output_dir / "metrics.jsonl").open("a").close()
    kept = sorted(config.output_dir.glob("checkpoint-*[0-9]"), key=lambda folder: (len(folder.name), folder))
    own = config.resume and config.resume.resolve().parent == config.output_dir.resolve()
    if not own and (kept or (config.output_dir / "metrics.jsonl").stat().st_size):
        what = f"another folder{f', or --resume {kept[-1]}' if kept else ''}"
        raise ValueError(f"--output-dir {config.output_dir}: found another run in it; expected {what}")
    what = "a language model of text alone, not quantized, and its tokenizer: a folder or a name (log in?)"
    with expected(f"--model {config.model}", what):
        model = transformers.AutoConfig.from_pretrained(config.model, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.model, trust_remote_code=False)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers made one up
            raise ValueError("a tokenizer that knows special tokens only")
        of_text = type(model) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and model.get_text_config() is model
        if not of_text or getattr(model, "is_encoder_decoder", False):
            raise ValueError(f"a model of type {model.model_type}")
        files = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "adapter_config.json")
        found = [key for key in ("quantization_config", "compression_config") if getattr(model, key, None)]
        found += [file for file in files if transformers.utils.hub.has_file(config.model, file)]
        if found:
            raise ValueError(f"{found[0]}: give the BF16 model, adapters merged, without it")
    first = 0
    if config.resume:
        read_metrics(config.output_dir / "metrics.jsonl")
        what = f"checkpoint-N of a run with --model {config.model}, N at most --steps {config.steps}"
        with expected(f"--resume {config.resume}", what):
            first = torch.load(config.resume / "trainer.pt", "cpu", mmap=True, weights_only=True)["step"]
            if first not in range(config.steps + 1) or not [*config.resume.glob("*.safetensors")]:
                raise ValueError(f"step {first!r}, or no weights")
            saved = transformers.AutoConfig.from_pretrained(config.resume, trust_remote_code=False)
            dtype = str(saved.dtype).removeprefix("torch.")
            if config.trainer_dtype not in ("auto", dtype):
                raise ValueError(f"weights in {dtype}, not in --trainer-dtype {config.trainer_dtype}")
            config = dataclasses.replace(config, trainer_dtype=dtype)
            aside = {*vars(transformers.GenerationConfig()), "_name_or_path", "architectures", "dtype"}
            saved, given = {"model_type": ""} | saved.to_dict(), model.to_dict()
            if names := [n for n in saved | given if n not in aside and saved.get(n) != given.get(n)]:
                raise ValueError(f"another model's; different are {', '.join(names[:9])}")
    examples = [to_prompt({"prompt": prompt}, tokenizer) for prompt in PROMPTS]
    prompts = read_prompts("--prompts-file", config.prompts_file, tokenizer) or examples
    held_out = read_prompts("--held-out-file", config.held_out_file, tokenizer, like=prompts)
    reward = load_reward(config.reward, {*prompts[0].columns})
    for prompt in prompts + held_out:
        if (token := max(prompt.token_ids, default=None)) not in range(rows := model.vocab_size):
            raise ValueError(f"prompt {prompt.text[:60]!r}: found token {token}; embeddings have {rows} rows")
    longest = config.max_tokens + max(len(prompt.token_ids) for prompt in prompts + held_out)
    check_model(config, model, longest, device)
    length = engine_arguments(config, device).get("max_model_len", longest)
    if type(length) is int and 0 < length < longest:
        raise ValueError(f"--engine-args: max_model_len {length}; prompts and --max-tokens need {longest}")
    more = json.loads(config.engine_args) | {"max_model_len": length}
    if device == "cpu" and any("conv" in name or "mamba" in name for name in vars(model)):
        more = {"enable_prefix_caching": False} | more  # to keep a state's prefixes vLLM would cut prompts
    config = dataclasses.replace(config, engine_args=json.dumps(more))
    config = dataclasses.replace(config, trainer_dtype=choose_dtype(config, model))
    return config, prompts, held_out, reward, first


def choose_dtype(config: Config, model: transformers.PretrainedConfig) -> str:
    """`--trainer-dtype auto`: float32 if that fits the trainer's GPU, else bfloat16. Raises ValueError."""
    dtype = config.trainer_dtype.replace("auto", "float32")
    if config.trainer_dtype == "auto" and config.trainer_device == "cuda":
        with torch.device("meta"):
            count = transformers.AutoModelForCausalLM.from_config(model).num_parameters()
        memory = lambda: vllm.platforms.current_platform.get_device_total_memory()  # without a CUDA context
        asked = ray.remote(memory).options(num_gpus=1).remote() if config.ray_address else None
        has = wait([asked], 300, "looking at the trainer's GPU")[0] if asked else memory()
        sizes = {"float32": 21, "bfloat16": 8} if config.kl_coef else {"float32": 17, "bfloat16": 6}
        keep = 0 if config.gradient_checkpointing else model.num_hidden_layers
        takes = {name: count * size + activation_bytes(config, model, keep) for name, size in sizes.items()}
        found = ", ".join(f"{size / 2**30:.0f} GiB in {name}" for name, size in takes.items())
        found = f"{count / 1e9:.2f}B parameters take {found}; the trainer's GPU has {has / 2**30:.0f}"
        dtype = next((name for name, size in takes.items() if size < 0.95 * has), None)
        if dtype is None:
            most = max(0, count - (takes["bfloat16"] - 0.95 * has) / sizes["bfloat16"])
            raise ValueError(f"{found}: at most {most / 1e9:.1f}B, or fewer --tokens-per-microbatch")
        print(f"{found}: --trainer-dtype {dtype}", flush=True)
    if dtype == "bfloat16" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise ValueError(f"--trainer-dtype {dtype}: its optimizer is compiled; install g++, or type float32")
    return dtype


def check_model(config: Config, model: transformers.PretrainedConfig, longest: int, device: str) -> None:
    """What would fail late, or make trainer and engine compute different things. Raises ValueError."""
    experts = any("expert" in name and value for name, value in vars(model).items())
    if device == "cpu" and config.quantization in VLLM_SCHEMES[0 if experts else 1 :]:
        raise ValueError(f"--quantization {config.quantization}: on GPUs only; type fp8-weight-only instead")
    rope = getattr(model, "rope_parameters", None) or {}
    known = getattr(model, "max_position_embeddings", None) or longest
    kinds = {each.get("rope_type", "default") for each in (rope, *rope.values()) if isinstance(each, dict)}
    if "dynamic" in kinds:
        raise ValueError("found dynamic RoPE scaling, which trainer and engine compute differently")
    if "longrope" in kinds:  # transformers changes its factors within a sequence, vLLM has one for all
        original = "original_max_position_embeddings"
        known = rope.get(original) or getattr(model, original, 0)
    if kinds <= {"default", "longrope"} and longest > known:
        found = f"a prompt of {longest - config.max_tokens} tokens with --max-tokens {config.max_tokens}"
        raise ValueError(f"found {found}; expected at most the {known} that the model has positions for")


def read_prompts(flag: str, file: Path | None, tokenizer, like: list[Prompt] = ()) -> list[Prompt]:
    """The prompts of a file; none without one. Raises ValueError: other columns than those `like` it, too."""
    if file is None:
        return []
    what = "UTF-8 text, a prompt a line, or JSON lines: `prompt` (text or chat messages) and equal columns"
    with expected(f"{flag} {file}", what):
        lines = file.read_text(encoding="utf-8-sig").split("\n")
        in_json, prompts = "".join("".join(lines).lstrip()[:99].split()).startswith(("{", "[{")), []
        for number, line in enumerate(lines, start=1):
            with expected(f"line {number}", "a prompt like those before"):
                if line.strip():
                    row = json.loads(line) if in_json else {"prompt": line}
                    prompts.append(to_prompt(row, tokenizer))
                    columns, known = prompts[-1].columns, (like or prompts)[0].columns
                    if columns.keys() != known.keys():
                        raise ValueError(f"columns {[*columns]}, not {[*known]}")
        if not prompts:
            raise ValueError("no line with text")
    return prompts


def to_prompt(row: dict, tokenizer) -> Prompt:
    """A line as the model is to read it: chat messages by the tokenizer's own template, and no second BOS."""
    source, columns = row["prompt"], {name: value for name, value in row.items() if name != "prompt"}
    if source and isinstance(source, str):
        return Prompt(source, columns, tokenizer(source).input_ids, source)
    if not source or not isinstance(source, list) or not all(isinstance(each, dict) for each in source):
        raise ValueError(f"{str(source)[:80]}, neither text nor a list of messages")
    begun = source[-1].get("role") == "assistant"  # the completion goes on from there
    how = dict(tokenize=False, add_generation_prompt=not begun, continue_final_message=begun)
    text = tokenizer.apply_chat_template(source, **how)
    return Prompt(source, columns, tokenizer(text, add_special_tokens=False).input_ids, text)


@contextlib.contextmanager
def one_message() -> Iterator[None]:
    """Say what went wrong in one message, before the clean-up, and end the program with exit code 1."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        known = (RuntimeError, OSError, ValueError, KeyboardInterrupt, ray.exceptions.RayError)
        what = str(error) if str(error) and isinstance(error, known) else f"{type(error).__name__}: {error}"
        print("\n".join([f"FAILED: {what}", *getattr(error, "__notes__", [])]), file=sys.stderr, flush=True)
        raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 1) from error


def stop(*_) -> None:
    """A first Ctrl-C or SIGTERM ends a run as an error does, which saves; another Ctrl-C at once."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt("interrupted")


def main(config: Config) -> dict:
    """Run once and return what summary.json holds."""
    with contextlib.ExitStack() as cleanup, one_message():
        gpus = connect(config, cleanup) if config.ray_address else torch.cuda.device_count()
        config, device = resolve(config, gpus)
        config, prompts, held_out, reward, first = check(config, device)
        cleanup.callback(os.close, lock := os.open(config.output_dir, os.O_RDONLY))
        with expected(f"--output-dir {config.output_dir}", "a folder in which no other run is under way"):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        layout = f"{config.num_engines} engine(s) ({device}, TP={config.tensor_parallel_size})"
        print(f"Starting Ray, trainer ({config.trainer_device}) and {layout}: {config.model} ...", flush=True)
        if not config.ray_address:
            connect(config, cleanup)
        signal.signal(signal.SIGTERM, stop)  # Ray's own would kill the cluster
        trainer, engines, ranks = start(config, device, cleanup)
        samples = [{"prompt_token_ids": p.token_ids, "prompt": p.text} for p in (held_out or prompts)[:4]]
        sync = prove_sync(trainer, engines, samples, config.max_tokens, timeout_s=config.timeout_s)
        tell(f"Ready after {time.time() - psutil.Process().create_time():.1f} s", flush=True)
        if config.trainer_device == device:  # else it takes long, and rounds otherwise
            sync |= explain_mismatch(config, trainer, engines[0], prompts[:4], ranks[0]["names"])
        before = ask_held_out(config, engines, held_out, reward)
        rows = train(config, trainer, engines, prompts, reward, first)
        after = ask_held_out(config, engines, held_out, reward)
        [answers] = wait([engines[0].answer.remote()], 10 * config.timeout_s, "asking the engine")
        pairs = zip(sync.pop("before"), answers, strict=True)
        texts = [{"prompt": old["prompt"], "before": old["text"], "after": new["text"]} for old, new in pairs]
        versions = {each.__name__: each.__version__ for each in (torch, vllm, torchao, ray, transformers)}
        summary = {name: getattr(config, name) for name in ("model", "quantization", "world_size")}
        summary |= {"device": device, "versions": versions, "ranks": ranks, "sync": sync, "samples": texts}
        summary["fp8_linear_layers"] = ranks[0]["fp8_linear_layers"]
        summary["held_out"] = {name: [before[name], after[name]] for name in before}
        summary["last_step"] = json.loads(to_json(rows[-1])) if rows else None
        report(config, summary)
        return summary


def explain_mismatch(config: Config, trainer, engine, prompts: list[Prompt], layers: dict) -> dict:
    """Mismatch KL of some answers, what rounding does not explain, and what is too small to be seen."""
    few = dict(max_tokens=min(config.max_tokens, 64), samples_per_prompt=min(config.samples_per_prompt, 8))
    rollouts, *_ = take_in(ask([engine], prompts, dataclasses.replace(config, **few)), config)
    names, found = ("mismatch_kl_at_start", "mismatch_kl_without_fp8", "mismatch_kl_not_seen"), [None] * 3
    with rlhf_utils.only_told("computing FP8 in the trainer"):
        [found] = wait([trainer.score.remote(rollouts, layers)], 10 * config.timeout_s, "scoring answers")
        tell("Mismatch KL {:.1e}, not explained by rounding {:.1e} (below {:.1e}: not seen)".format(*found))
        if not found[1] <= 5e-3:  # nats a token, which rounding to BF16 may make
            print("Warning: trainer and engine compute different functions; see README", file=sys.stderr)
    return json.loads(to_json(dict(zip(names, found, strict=True))))


def ask_held_out(config: Config, engines: list, held_out: list[Prompt], reward: Callable) -> dict[str, float]:
    """Mean reward of the greedy answers to held-out prompts, and the share that is rewarded with 1."""
    if not held_out:
        return {}
    rollouts, *_ = take_in(ask(engines, held_out, config, greedy=True), config)
    rewards = compute_rewards(held_out, rollouts, reward, config.timeout_s)
    return {"reward": rewards.mean().item(), "all_right": (rewards == 1).double().mean().item()}


def report(config: Config, summary: dict) -> None:
    """Write summary.json and curves.png, print what held-out prompts were rewarded with."""
    (config.output_dir / "summary.json").write_text(json.dumps(summary, indent=2))
    rows, figure = read_metrics(config.output_dir / "metrics.jsonl"), Figure((20, 4), layout="constrained")
    names = ("reward", "mismatch_kl", "mismatch_abs_mean", "rollout_s", "train_s", "sync_s")
    for axis, name in zip(figure.subplots(1, len(names)), names, strict=True):
        axis.plot([row["step"] for row in rows], [row.get(name) for row in rows])
        axis.set(xlabel="step", title=name, yscale="log" if "mismatch" in name else "linear")
    with rlhf_utils.only_told("drawing curves.png"):
        figure.savefig(config.output_dir / "curves.png")
    for name, (before, after) in summary["held_out"].items():
        tell(f"Held-out prompts, {name}: {before:.3f} before training, {after:.3f} after")
    tell(f"Wrote summary.json, metrics.jsonl and curves.png to {config.output_dir}")


if __name__ == "__main__":
    program = importlib.import_module(Path(__file__).resolve().stem)  # the name that actors know, too
    signal.signal(signal.SIGINT, program.stop)
    program.main(tyro.cli(program.Config))
