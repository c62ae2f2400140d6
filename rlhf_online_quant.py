"""RL with an FP8 rollout engine that is quantized online: the reference pattern.

    driver (this program, no GPU)
      |-- trainer   Ray actor, GPU 0            full-precision Hugging Face model, AdamW
      `-- engine    Ray actor MyLLM(vllm.LLM)   FP8 through torchao, tensor parallel on GPUs 1-2
            weights: trainer == NCCL broadcast, full precision ==> each worker, quantized on arrival

A step (`rlhf_training_iteration`): the engine samples G answers to each prompt; a function rewards them; the
trainer measures how far the FP8 engine's probabilities are from its own, corrects for it, takes an optimizer
step and sends its weights to the engine. Textbook PPO without a value network (advantages come from the
group) and without generation that runs beside training (every answer comes from the newest weights).

Two things differ from the example that is usually copied:

- `quantization="torchao"` is passed beside the torchao config. The config alone is ignored and the engine
  stays BF16.
- A sync is one reload session, or a replay of the copies that it would make. `load_weights` once per
  parameter leaves a quantized engine with uninitialized memory.

And one thing is added: before the first step, the engine is zeroed and synced, and must then be, byte for
byte and answer for answer, the engine that had started from the checkpoint (`prove_sync`). Otherwise the run
ends there.

Without a GPU the same processes run on the CPU (gloo, weight-only FP8, a tiny random model).

Names of dimensions: P prompts, G samples per prompt, B sequences of a micro-batch, T tokens, V vocabulary, N
all sampled tokens of a step. `rewards_PG` has the shape (P, G).
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import math
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
import ray
import torch
import torchao
import transformers
import tyro
import vllm
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from rich.console import Console
from rich.table import Table
from torchao.core.config import AOBaseConfig, config_from_dict, config_to_dict
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Float8WeightOnlyConfig, PerRow
from vllm import LLM, SamplingParams

from rlhf_utils import BUCKET_BYTES, WeightSender

HERE = Path(__file__).resolve().parent
ACTORS = {}  # Ray's id of an actor -> its name in messages
SYNCING = threading.Lock()  # held while a weight sync runs
PROMPTS = [
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
]
# Log-probabilities of the sampled tokens alone. vLLM would decode every token, and every log-probability's,
# as it comes, and make the GPU wait at hundreds of sequences; `MyLLM.generate` decodes at the end.
ROLLOUT = dict(logprobs=0, flat_logprobs=True, detokenize=False)
# Mismatch KL (nats per token) that is nothing to worry about. "none" is BF16's rounding of the trainer's FP32
# weights.
USUAL_KL = {"none": 5e-3, "fp8": 5e-2}
LINE_OF_STEP = (
    "step {step:4d} | reward {reward:.3f} | KL {mismatch_kl:.2e}, |d| max {mismatch_abs_max:.3f}, ESS "
    "{effective_sample_size:.3f} | {tokens_per_s:.0f} tokens/s | rollout {rollout_s:.2f} s, train {train_s:.2f} s, "
    "sync {sync_s:.3f} s ({sync_gb_per_s:.2f} GB/s) | trainer {trainer_gib:.2f} GiB"
)


@dataclasses.dataclass
class Config:
    """RL with an FP8 vLLM rollout engine, quantized online."""

    model: str = "auto"
    """Hugging Face name, local folder, or `tiny` (random, built here). `auto`: facebook/opt-125m on GPUs,
    else tiny."""
    trainer_device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where the trainer runs; `auto` takes a GPU if the cluster has any."""
    trainer_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the trainer's weights. The engine computes in bfloat16, so that is what goes over the
    wire."""

    tensor_parallel_size: int = 2
    """GPUs of an engine (CPU: processes). The trainer's GPU comes on top."""
    num_engines: int = 1
    """Engines that share the prompts of a step; each has its own tensor-parallel group."""
    quantization: str = "auto"
    """`fp8-dynamic` (`auto` on GPUs), `fp8-weight-only` (`auto` on CPU), `none`, or a torchao config's JSON
    file."""
    enforce_eager: bool = False
    """Start faster and generate much more slowly: no compilation, no CUDA graphs. Always so on the CPU."""
    max_model_len: int = 512
    """Longest prompt plus completion, in tokens."""
    gpu_memory_utilization: float = 0.8
    """Share of each engine GPU that vLLM may fill with weights and KV cache."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """`fp8`: one byte for each element of the KV cache, at a cost in precision; `auto` is BF16."""
    steps: int = 20
    """Training steps: rollouts, rewards, optimizer, sync. 0 only starts, syncs and samples."""
    prompts_file: Path | None = None
    """UTF-8 text, one prompt a line. Default: sums for `--reward arithmetic`, else four prompts of vLLM's
    examples."""
    reward: str = "letters"
    """`letters` (share of a-z, learnable from scratch), `arithmetic` (is the sum right?), or
    `module:function`, which takes a list of prompts and a list of completions (str) and returns a list of
    floats."""
    prompts_per_step: int = 8
    """P, prompts per step."""
    samples_per_prompt: int = 16
    """G, completions per prompt; advantages are relative to their mean."""
    max_tokens: int = 32
    """Longest completion, in tokens. A completion cut off there is rewarded and learned from like any
    other."""
    temperature: float = 1.0
    """Of the rollouts. The samples before and after training are always greedy."""

    learning_rate: float | None = None
    """AdamW's step size. Default: 1e-6, and 5e-4 for the tiny model."""
    epochs: int = 1
    """Optimizer steps per rollout batch, each on all of it. PPO's clipping matters from the second on."""
    clip: float = 0.2
    """PPO: the probability ratio to the policy before the step counts within 1 - clip and 1 + clip."""
    kl_coef: float = 0.0
    """Weight of the KL divergence to the initial policy in the loss; above 0 the trainer keeps a frozen
    copy."""
    correction: Literal["token-truncate", "sequence-mask", "none"] = "token-truncate"
    """How the loss corrects for sampling with FP8: see `importance_weights`."""
    correction_cap: float = 2.0
    """C, the largest importance weight."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    tokens_per_microbatch: int = 8192
    """Longest forward and backward pass (padded tokens); gradients accumulate over as many as the batch
    needs."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""

    output_dir: Path = Path("outputs")
    """Gets metrics.jsonl, curves.png, summary.json, and checkpoint-N."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves at the end only."""
    resume: Path | None = None
    """A checkpoint folder of an earlier run with the same flags: go on from its model, optimizer and step."""
    track: Literal["none", "trackio", "wandb"] = "none"
    """Send the metrics there too (install it yourself)."""
    seed: int = 0
    """Of the tiny model's weights, of prompts and of sampling. The same seed gives the same curve on the
    CPU."""
    bucket_mib: int = 256
    """Weights travel in buckets of this size (MiB), two of which each side keeps; a weight may be cut between
    rows."""
    timeout_s: float = 30.0
    """Longest wait (seconds) for a weight sync, and for a reward function. Start-up, a generation, a training
    step and a checkpoint may take ten times as long."""
    ray_address: str | None = None
    """An existing Ray cluster, such as `auto` or `10.0.0.1:6379`. Default: start a private one."""

    @property
    def world_size(self) -> int:
        """Ranks of the weight-update group: the trainer and every engine's workers."""
        return 1 + self.num_engines * self.tensor_parallel_size


# ----- The engine ----------------------------------------------------------------------------------------------------


class MyLLM(LLM):
    """vLLM with a version for its weights, which refuses to generate while they are incomplete.

    An update begins with `update_weight` or `receive_weights` and ends with `check_weights_changed` or with
    `receive_weights` itself. At the end the prefix cache, which holds the old weights' keys and values, is
    reset.
    """

    weights_version = 0
    torn: str | None = None  # why the weights are not one complete version
    torn_until: str | None = None  # the worker method that completes them
    asked: tuple[list[str], int] = (PROMPTS, 32)  # what `answer` was last asked: prompts, tokens

    # What begins an update, and what ends it.
    UPDATES = {
        "update_weight": "check_weights_changed",
        "receive_weights": "receive_weights",
        "zero_weights": "receive_weights",
        "reset_weights": "receive_weights",  # vLLM's own zeros
    }

    def __repr__(
        self,
    ) -> str:  # LLM's own asks the workers, and Ray would put the answer before every log line
        return "MyLLM"

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        """Call a method of every worker; keeps account of updates."""
        if method in self.UPDATES:
            self.torn_until = self.UPDATES[method]
            self.torn = f"the weight update after version {self.weights_version} has not been completed"
        results = super().collective_rpc(method, timeout, args, kwargs)
        if self.torn and method == self.torn_until:
            if not self.reset_prefix_cache():
                raise RuntimeError("vLLM refused to reset the prefix cache: requests are still running")
            self.weights_version += 1
            self.torn = self.torn_until = None
        return results

    def _refuse_if_torn(self) -> None:
        if self.torn:
            raise RuntimeError(f"refusing to generate: {self.torn}; sync a complete set of weights first")

    def _add_request(self, *args, **kwargs):
        """Every way to ask an LLM for something comes through here: generate, chat, enqueue, beam_search,
        encode, ..."""
        self._refuse_if_torn()
        return super()._add_request(*args, **kwargs)

    def _run_engine(self, *args, **kwargs):
        """... and every way to have it done through here, `wait_for_completion` of earlier requests
        included."""
        self._refuse_if_torn()
        return super()._run_engine(*args, **kwargs)

    def generate(self, *args, **kwargs):
        """LLM.generate; decodes each answer at its end if vLLM did not token by token."""
        outputs, tokenizer = super().generate(*args, **kwargs), self.get_tokenizer()
        for output in outputs:
            for answer in output.outputs:
                answer.text = answer.text or decode(tokenizer, output.prompt_token_ids, answer.token_ids)
        return outputs

    def answer(self, prompts: list[str] | None = None, max_tokens: int = 32) -> list[dict]:
        """A greedy answer to each prompt: `prompt`, `text`, `token_ids`, `logprobs`. Without prompts: to the
        last ones again."""
        self.asked = (prompts, max_tokens) if prompts else self.asked
        self.reset_prefix_cache()  # on GPUs the last bits depend on how much of a prompt was cached
        params = SamplingParams(temperature=0, max_tokens=self.asked[1], **ROLLOUT)
        return [
            {"prompt": output.prompt, "text": answer.text, "token_ids": list(answer.token_ids)}
            | {"logprobs": list(answer.logprobs.logprobs)}
            for output in self.generate(self.asked[0], params, use_tqdm=False)
            for answer in output.outputs
        ]

    def get_weights_version(self) -> int:
        """How many complete updates the weights have had; 0 means as loaded at start-up."""
        return self.weights_version

    def shutdown(self) -> None:
        """Stop the engine's processes."""
        self.llm_engine.engine_core.shutdown()


def decode(tokenizer, prompt: list[int], answer: list[int]) -> str:
    """An answer's text as it follows its prompt; decoded alone, some tokenizers would drop its first
    space."""
    options = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return tokenizer.decode([*prompt[-1:], *answer], **options)[
        len(tokenizer.decode(prompt[-1:], **options)) :
    ]


def torchao_config(quantization: str) -> AOBaseConfig | None:
    """The torchao config behind `--quantization`; None for `none`.

    Raises:
        SystemExit: neither a known name nor a readable torchao config.
    """
    named = {
        # The lower bound keeps an all-zero activation row from being divided by its scale of 0; no other row
        # changes. Inductor's settings stay vLLM's: torchao's tune every kernel by timing, which takes minutes
        # and is not repeatable.
        "fp8-dynamic": Float8DynamicActivationFloat8WeightConfig(
            granularity=PerRow(), activation_value_lb=1e-12, set_inductor_config=False
        ),
        "fp8-weight-only": Float8WeightOnlyConfig(set_inductor_config=False),
        "none": None,
    }
    if quantization in named:
        return named[quantization]
    try:
        return config_from_dict(json.loads(Path(quantization).read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(
            f"--quantization {quantization}: expected {', '.join(named)}, or a file with the JSON of torchao's "
            f"config_to_dict(config). Found: {type(error).__name__}: {error}"
        ) from error


def engine_arguments(config: Config, path: str, device: str) -> dict:
    """Keyword arguments for `LLM`: an FP8 engine whose workers can receive weights."""
    on_cpu = "mp" if config.tensor_parallel_size > 1 else "uni"  # vLLM has no Ray workers on the CPU
    executor = "ray" if device == "cuda" else on_cpu
    arguments = dict(
        model=path,
        dtype="bfloat16",  # torchao's PerRow quantizes nothing else
        tensor_parallel_size=config.tensor_parallel_size,
        distributed_executor_backend=executor,
        worker_extension_cls="rlhf_utils.WorkerExtension",
        enforce_eager=config.enforce_eager or device == "cpu",
        max_model_len=config.max_model_len,
        gpu_memory_utilization=config.gpu_memory_utilization,
        kv_cache_dtype=config.kv_cache_dtype,
        seed=config.seed,
        logprobs_mode="processed_logprobs",  # of the distribution that is sampled from, temperature included
        disable_log_stats=True,
    )
    if quantization := torchao_config(config.quantization):
        as_json = json.dumps(config_to_dict(quantization))
        arguments |= dict(quantization="torchao", hf_overrides={"quantization_config_dict_json": as_json})
    return arguments


# ----- The trainer ---------------------------------------------------------------------------------------------------


class Trainer(WeightSender):
    """The full-precision side: model, optimizer, and, by what it inherits, rank 0 of the weight-update
    group."""

    def __init__(self, config: Config, path: str):
        self.config, self.path = config, path
        model_config = transformers.AutoConfig.from_pretrained(path)
        for name in vars(
            model_config
        ):  # the engine has no dropout: with it, trainer and engine would be two policies
            if "dropout" in name or "layerdrop" in name:
                setattr(model_config, name, 0.0)

        def load(folder: str | Path) -> torch.nn.Module:
            """A model without dropout, in training mode so that it can recompute activations."""
            options = dict(config=model_config, dtype=config.trainer_dtype)
            return (
                transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
                .to(config.trainer_device)
                .train()
            )

        super().__init__(load(config.resume or path), config.trainer_device)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.reference = load(path) if config.kl_coef else None
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.learning_rate)
        self.step = 0
        if config.resume:
            state = torch.load(config.resume / "trainer.pt", map_location=self.device, weights_only=True)
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    def get_step(self) -> int:
        """How many training steps the model has behind it."""
        return self.step

    def train_step(self, rollouts: list[dict]) -> dict:
        """`epochs` AdamW steps on a batch of rollouts; returns metrics (see README's glossary).

        Args:
            rollouts: dicts with `prompt` and `completion` (token ids), `logprobs` (the engine's, one per
                completion token, in nats) and `advantage`.
        """
        config, start = self.config, time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        batches = [self._pad(part) for part in split_by_tokens(rollouts, config.tokens_per_microbatch)]
        tokens = sum(int(batch["mask_BT"].sum()) for batch in batches)
        sums = dict.fromkeys(("loss", "ppo_clipped", "corrected", "reference_kl"), 0.0)
        for epoch in range(config.epochs):
            for batch in batches:
                logprobs_BT = self._logprobs(self.model, batch)
                if epoch == 0:
                    batch["old_BT"] = logprobs_BT.detach()
                    if self.reference:
                        with torch.no_grad():
                            batch["reference_BT"] = self._logprobs(self.reference, batch)
                loss, metrics = compute_ppo_loss(logprobs_BT, batch, config)
                (loss / tokens).backward()
                sums = {name: value + float(metrics[name]) for name, value in sums.items()}
            grad_norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm))
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.step += 1
        self.scan_weights()
        old_N = torch.cat([batch["old_BT"][batch["mask_BT"]] for batch in batches])
        engine_N = torch.cat([batch["engine_BT"][batch["mask_BT"]] for batch in batches])
        on_gpu = self.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated() if on_gpu else psutil.Process().memory_info().rss
        return (
            {name: value / tokens / config.epochs for name, value in sums.items()}
            | measure_mismatch(old_N, engine_N)
            | {"grad_norm": grad_norm, "train_s": time.perf_counter() - start}
            | {"trainer_gib": memory / 2**30}
        )

    def _pad(self, rollouts: list[dict]) -> dict[str, torch.Tensor]:
        """One micro-batch, padded on the right. Position t predicts token t + 1; the mask holds the
        completions'."""
        longest = max(len(rollout["prompt"] + rollout["completion"]) for rollout in rollouts)
        tokens_BL = torch.zeros(len(rollouts), longest, dtype=torch.long)
        attend_BL, mask_BL, engine_BL = torch.zeros_like(tokens_BL), tokens_BL.bool(), tokens_BL.float()
        for row, rollout in enumerate(rollouts):
            start, end = len(rollout["prompt"]), len(rollout["prompt"] + rollout["completion"])
            tokens_BL[row, :end] = torch.tensor(rollout["prompt"] + rollout["completion"])
            attend_BL[row, :end] = 1
            mask_BL[row, start:end] = True
            engine_BL[row, start:end] = torch.tensor(rollout["logprobs"])
        advantages_B1 = torch.tensor([[rollout["advantage"]] for rollout in rollouts])
        batch = {"tokens_BL": tokens_BL, "attend_BL": attend_BL, "advantages_B1": advantages_B1}
        batch |= {"mask_BT": mask_BL[:, 1:], "engine_BT": engine_BL[:, 1:]}
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _logprobs(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probability (nats, at the rollouts' temperature) of each next token, shape (B, T)."""
        tokens_BL = batch["tokens_BL"]
        output = model(input_ids=tokens_BL, attention_mask=batch["attend_BL"], use_cache=False)
        logits_BTV, targets_BT = output.logits[:, :-1].float() / self.config.temperature, tokens_BL[:, 1:]
        losses = torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none"
        )
        return -losses.view_as(targets_BT)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model and tokenizer in Hugging Face format."""
        self.model.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(self.path).save_pretrained(folder)

    def save_checkpoint(self, folder: Path) -> None:
        """Write all that `--resume` needs; the folder appears when it is complete."""
        aside = folder.with_name(folder.name + ".incomplete")
        self.save_pretrained(aside)
        torch.save({"optimizer": self.optimizer.state_dict(), "step": self.step}, aside / "trainer.pt")
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)


# ----- The objective: pure functions of numbers -----------------------------------------------------------------------


def compute_advantages(rewards_PG: torch.Tensor) -> torch.Tensor:
    """Rewards, centred and scaled within each group, as in GRPO (Shao et al. 2024, arXiv:2402.03300, section
    4.1.2).

    >>> compute_advantages(torch.tensor([[0.0, 0.0, 1.0, 1.0], [3.0, 3.0, 3.0, 3.0]]))
    tensor([[-0.8660, -0.8660,  0.8660,  0.8660],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    return centred_PG / (rewards_PG.std(dim=1, keepdim=True) + 1e-6)


def importance_weights(
    old_BT: torch.Tensor, engine_BT: torch.Tensor, mask_BT: torch.Tensor, correction: str, cap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights that correct for tokens having been sampled by the engine and not by the trainer; and where
    `cap` acted.

    With r = trainer's probability / engine's, of the same token under the same weights:
      - `token-truncate`: min(r, cap) for each token. Truncated importance sampling: Ionides 2008, "Truncated
        Importance Sampling"; for rollout engines Yao et al. 2025, "Your Efficient RL Framework Secretly
        Brings You Off-Policy RL".
      - `sequence-mask`: the product of r over the completion, or 0 if that exceeds cap. Liu et al. 2025,
        "When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch".
      - `none`: 1.
    """
    log_ratio_BT = (old_BT - engine_BT) * mask_BT
    if correction == "none":
        return torch.ones_like(old_BT), torch.zeros_like(mask_BT)
    if correction == "token-truncate":
        return log_ratio_BT.exp().clamp(max=cap), log_ratio_BT > math.log(cap)
    log_ratio_BT = log_ratio_BT.sum(dim=1, keepdim=True).expand_as(mask_BT)
    over_BT = log_ratio_BT > math.log(cap)
    return log_ratio_BT.exp().masked_fill(over_BT, 0.0), over_BT


def compute_ppo_loss(logprobs_BT: torch.Tensor, batch: dict[str, torch.Tensor], config: Config) -> tuple:
    """PPO's clipped loss (Schulman et al. 2017, arXiv:1707.06347, equation 7), with importance weights.

    Args:
        logprobs_BT: the policy's log-probabilities, with gradient.
        batch: `old_BT` (the same before the step), `engine_BT` (those that the tokens were sampled with),
            `advantages_B1`, `mask_BT` (True for completion tokens) and, with `kl_coef`, `reference_BT`.

    Returns: The loss, and metrics, both summed over the completions' tokens: dividing by the tokens of the
        whole batch makes every token count the same, however the batch is split (DAPO: Yu et al. 2025,
        arXiv:2503.14476, section 3.3).
    """
    mask_BT, old_BT, advantages_B1 = batch["mask_BT"], batch["old_BT"], batch["advantages_B1"]
    ratio_BT = (logprobs_BT - old_BT).exp()
    clipped_BT = ratio_BT.clamp(1 - config.clip, 1 + config.clip)
    gain_BT = torch.minimum(ratio_BT * advantages_B1, clipped_BT * advantages_B1)
    weights_BT, corrected_BT = importance_weights(
        old_BT, batch["engine_BT"], mask_BT, config.correction, config.correction_cap
    )
    reference_kl_BT = (
        k3(batch["reference_BT"] - logprobs_BT) if config.kl_coef else torch.zeros_like(logprobs_BT)
    )
    loss = (config.kl_coef * reference_kl_BT - weights_BT * gain_BT)[mask_BT].sum()
    return loss, {
        "loss": loss.detach(),
        "ppo_clipped": (clipped_BT * advantages_B1 < ratio_BT * advantages_B1)[mask_BT].sum(),
        "corrected": corrected_BT[mask_BT].sum(),
        "reference_kl": reference_kl_BT.detach()[mask_BT].sum(),
    }


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """Per-sample estimate of KL(q || p) in nats from log p - log q on samples of q: unbiased and never
    negative.

    Schulman 2020, "Approximating KL Divergence", joschu.net/blog/kl-approx.html.
    """
    return torch.expm1(log_ratio) - log_ratio


def measure_mismatch(old_N: torch.Tensor, engine_N: torch.Tensor) -> dict[str, float]:
    """How far the engine's log-probabilities (nats) of its own tokens are from the trainer's, under the same
    weights.

    The effective sample size, (sum r)^2 / sum r^2 with r as in `importance_weights`, is given as a share of
    the tokens (Kong 1992, "A Note on Importance Sampling using Standardized Weights").

    >>> measure_mismatch(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -1.5]))  # doctest: +ELLIPSIS
    {'mismatch_kl': 0.074..., 'mismatch_abs_mean': 0.25, 'mismatch_abs_max': 0.5, 'effective_sample_size': 0.943...}
    """
    log_ratio_N = old_N.double() - engine_N.double()
    ratio_N = log_ratio_N.exp()
    return {
        "mismatch_kl": k3(log_ratio_N).mean().item(),
        "mismatch_abs_mean": log_ratio_N.abs().mean().item(),
        "mismatch_abs_max": log_ratio_N.abs().max().item(),
        "effective_sample_size": (ratio_N.sum() ** 2 / (ratio_N**2).sum() / ratio_N.numel()).item(),
    }


def split_by_tokens(rollouts: list[dict], limit: int) -> list[list[dict]]:
    """Micro-batches of at most `limit` tokens after padding, in the given order; a longer rollout gets its
    own."""
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


# ----- Rewards --------------------------------------------------------------------------------------------------------


def letters(prompts: list[str], completions: list[str]) -> list[float]:
    """The share of characters that are lower-case letters a-z: what a random model can learn from scratch."""
    return [len(re.findall("[a-z]", completion)) / max(1, len(completion)) for completion in completions]


def arithmetic(prompts: list[str], completions: list[str]) -> list[float]:
    """1 where the completion's first number is the sum of the prompt's last two, else 0: for a pretrained
    model."""
    sums = [str(sum(map(int, re.findall(r"\d+", prompt)[-2:]))) for prompt in prompts]
    first = [(re.findall(r"\d+", completion) or [None])[0] for completion in completions]
    return [float(number == right) for number, right in zip(first, sums, strict=True)]


def load_reward(name: str) -> Callable[[list[str], list[str]], list[float]]:
    """The function behind `--reward`."""
    shipped = {"letters": letters, "arithmetic": arithmetic}
    if name in shipped:
        return shipped[name]
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise SystemExit(
            f"--reward {name}: expected {', '.join(shipped)}, or module:function with the module here or installed. "
            f"Found: {type(error).__name__}: {error}"
        ) from error


def compute_rewards(outputs: list, reward: Callable = letters, timeout_s: float = 30.0) -> list[list[float]]:
    """Rewards of every completion, in the shape (P, G).

    Raises:
        RuntimeError: the function raised, or returned anything but one finite number per completion.
        TimeoutError: it has not returned for `timeout_s` seconds.
    """
    prompts = [output.prompt for output in outputs for _ in output.outputs]
    completions = [completion.text for output in outputs for completion in output.outputs]
    answer = queue.Queue()

    def ask() -> None:
        """In a thread of its own, which may hang."""
        try:
            answer.put(([float(value) for value in reward(prompts, completions)], None))
        except Exception as error:  # raised below
            answer.put(([], error))

    threading.Thread(target=ask, daemon=True).start()  # a daemon does not keep the program from ending
    try:
        rewards, error = answer.get(timeout=timeout_s)
    except queue.Empty:
        raise TimeoutError(
            f"reward function {reward.__name__} has not returned for {timeout_s:g} s"
        ) from None
    if error:
        raise RuntimeError(
            f"reward function {reward.__name__} failed: {type(error).__name__}: {error}"
        ) from error
    wrong = [f"{value} for {text!r}" for value, text in zip(rewards, completions) if not math.isfinite(value)]
    if wrong or len(rewards) != len(completions):
        raise RuntimeError(
            f"reward function {reward.__name__}: expected {len(completions)} finite numbers, one per completion; found "
            f"{len(rewards)} numbers, not finite: {wrong[:3] or 'none'}"
        )
    rows = iter(rewards)
    return [[next(rows) for _ in output.outputs] for output in outputs]


# ----- The sync ------------------------------------------------------------------------------------------------------


def wait(refs: list, timeout_s: float, doing: str, patience_s: float = 0.0) -> list:
    """`ray.get(refs)` with a time limit, whose one error names every actor that failed, died or did not
    answer.

    Raises: RuntimeError: an actor failed or died. The others have had 4 more seconds, and `patience_s` from
        the start on,
            because what fails first is not always the cause.
        TimeoutError: it took longer than `timeout_s` seconds.
    """
    start, pending, results, failures = time.monotonic(), list(refs), {}, []
    deadline, next_sign = start + timeout_s, start + 10
    while pending and (left := deadline - time.monotonic()) > 0:
        done, pending = ray.wait(pending, timeout=min(2.0, left))
        for ref in done:
            try:
                results[ref] = ray.get(ref)
            except ray.exceptions.RayTaskError as error:
                failures.append(f"{who(ref)}: {type(error.cause).__name__}: {error.cause}")
            except ray.exceptions.RayError as error:
                failures.append(f"{who(ref)}: {error}")
        if not done and not failures:  # an actor that nothing is asked of at the moment may have died as well
            failures = [f"{name} has died" for actor, name in ACTORS.items() if actor_state(actor) == "DEAD"]
        if failures:
            deadline = min(deadline, max(time.monotonic() + 4, start + patience_s))
        elif time.monotonic() > next_sign:
            next_sign += 10
            print(f"... {doing}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    silent = f"no answer from {', '.join(map(who, pending))}" if pending else ""
    if failures:
        raise RuntimeError(f"{doing}: " + "; ".join(failures + [silent] * bool(silent)))
    if pending:
        raise TimeoutError(f"{doing} took longer than {timeout_s:g} s: {silent}")
    return [results[ref] for ref in refs]


def actor_state(actor: ray.ActorID) -> str:
    """Ray's name for it, such as ALIVE or DEAD."""
    return ray._private.state.actors(actor.hex())["State"]


def who(ref: ray.ObjectRef) -> str:
    """The actor that a call went to, for messages."""
    actor = ref.task_id().actor_id()
    return ACTORS.get(actor, "Ray" if actor.is_nil() else "the trainer")


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Refuse a sync, instead of letting it wait, while another is running."""
    if not SYNCING.acquire(blocking=False):
        raise RuntimeError("refusing to sync: another weight sync is running; ask again when it has ended")
    try:
        yield
    finally:
        SYNCING.release()


def as_list(handles) -> list:
    """One handle, or a list of them."""
    return handles if isinstance(handles, list) else [handles]


def on_workers(engines: list, method: str, *args) -> list:
    """Handles of calls of a method of every worker of every engine."""
    return [llm.collective_rpc.remote(method, args=args) for llm in engines]


def agree_on_weights(trainers: list, engines: list, bucket_bytes: int, timeout_s: float) -> str | None:
    """Check the trainer's weights; if both ends have not agreed on them yet, let them.

    Returns why the updates will be reload sessions, if that is known now.
    """
    preparing = [trainer.prepare_weights.remote(bucket_bytes) for trainer in trainers]
    manifest = wait(preparing, timeout_s, "checking the trainer's weights")[0]
    if manifest is None:
        return None
    asked = on_workers(engines, "agree_on_weights", manifest, bucket_bytes)
    replies = sum(wait(asked, timeout_s, "agreeing on the weights"), [])
    manifest = replies[0][0]
    if any(other != manifest for other, _ in replies):
        raise RuntimeError(
            "the workers want other dtypes for the same weights: start all engines the same way"
        )
    wait([trainers[0].agree_on_weights.remote(manifest, bucket_bytes)], timeout_s, "agreeing on the weights")
    because = "; ".join(sorted({reason for _, reason in replies if reason})) or None
    how = f"reload sessions, because {because}" if because else "replays of what vLLM would copy"
    print(f"Agreed on {len(manifest)} weights; weight syncs are {how}")
    return because


def broadcast_weights(
    trainers: list, engines: list, timeout_s: float, by_session: bool = False
) -> tuple[dict, list[dict]]:
    """What the sender and each worker of each engine say of one broadcast of all weights."""
    sending = [trainer.send_weights.remote() for trainer in trainers]
    receiving = on_workers(engines, "receive_weights", by_session)
    patience_s = (
        timeout_s / 2 + 2
    )  # a rank whose peer has died knows after half the limit in which bucket that was
    results = wait([*sending, *receiving], timeout_s, "broadcasting weights", patience_s)
    return results[0], sum(results[len(sending) :], [])


class Observation(NamedTuple):
    """What engines hold and say: digests of every stored tensor, by engine and worker; greedy answers, by
    engine."""

    digests: list[list[dict[str, int]]]
    answers: list[list[dict]]
    repeatable: bool  # asked twice, the engines say the same twice


def observe(engines: list, timeout_s: float, prompts: list[str] | None = None, max_tokens=32) -> Observation:
    """Look at engines; without `prompts` they are asked what they were asked the last time."""
    digests = wait(on_workers(engines, "stored_digests"), timeout_s, "reading the engine's tensors")
    first, second = (
        wait([llm.answer.remote(prompts, max_tokens) for llm in engines], 10 * timeout_s, "asking the engine")
        for _ in range(2)
    )
    if repr(first) != repr(second):
        print("This engine does not answer the same twice: only its tensors are compared")
    return Observation(digests, first, repr(first) == repr(second))


def differences(engines: list, expected: Observation, timeout_s: float) -> list[str]:
    """Names of the tensors that are not as expected; if all are, the prompts that are answered
    differently."""
    digests = wait(on_workers(engines, "stored_digests"), timeout_s, "reading the engine's tensors")
    different = [
        f"{name} (engine {i}, worker {j})"
        for i, (engine, expected_engine) in enumerate(zip(digests, expected.digests, strict=True))
        for j, (worker, expected_worker) in enumerate(zip(engine, expected_engine, strict=True))
        for name in sorted(worker.keys() | expected_worker.keys())
        if worker.get(name) != expected_worker.get(name)
    ]
    if different or not expected.repeatable:
        return different  # do not ask: wrong weights can leave NaN in the KV cache for ever
    answers = wait([llm.answer.remote() for llm in engines], 10 * timeout_s, "asking the engine")
    return [
        f"the answer to {right['prompt']!r} (engine {i})"
        for i, (given, expected_answers) in enumerate(zip(answers, expected.answers, strict=True))
        for answer, right in zip(given, expected_answers, strict=True)
        if answer != right or any(map(math.isnan, [*answer["logprobs"], *right["logprobs"]]))
    ]


def some(names: list[str]) -> str:
    """Names for a message, not too many of them."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


@one_at_a_time()
def prove_sync(
    train_model,
    quantized_llm,
    prompts: list[str] | None = None,
    max_tokens: int = 32,
    bucket_bytes: int = BUCKET_BYTES,
    timeout_s: float = 30.0,
) -> dict:
    """Prove, before the first step, that a sync makes an engine what vLLM's own loading makes it, or raise.

    Trainer and engines have started from the same checkpoint. Every weight of the engines is set to zero,
    then synced: by replay, and if that is not possible or gives something else, by a reload session, which
    then serves from now on. All stored tensors and the greedy answers to `prompts` must be what they were
    before.

    Args:
        train_model, quantized_llm: as for `sync_weights_to_quantized_engine`.

    Returns: What the sync returns, and `verified`, `path` ("replay" or "session"), `because` (why it is no
        replay), `tensors` and `answers` (how many were compared), and `before`, the first engine's answers.

    Raises:
        RuntimeError: which tensors or answers differ after a session, or why there was none.
    """
    trainers, engines = as_list(train_model), as_list(quantized_llm)
    if any(wait([llm.get_weights_version.remote() for llm in engines], timeout_s, "reading the version")):
        raise RuntimeError(
            "prove_sync compares with a cold start, and an engine has been updated: start it anew"
        )
    cold = observe(engines, timeout_s, prompts or PROMPTS, max_tokens)
    because = agree_on_weights(trainers, engines, bucket_bytes, timeout_s)
    for by_session in (False, True):
        wait(on_workers(engines, "zero_weights"), timeout_s, "setting the engine's weights to zero")
        start, ranks = time.perf_counter(), []
        try:
            sent, ranks = broadcast_weights(trainers, engines, timeout_s, by_session)
            seconds = time.perf_counter() - start
            different = differences(engines, cold, timeout_s)
            wrong = f"these are not as they were at the start: {some(different)}" if different else None
        except RuntimeError as error:
            wrong = str(error)
        replayed = any(rank["path"] == "replay" for rank in ranks) or not (ranks or because or by_session)
        path = "replay" if replayed else "session"
        if wrong is None:
            break
        if path == "session":
            if ranks:  # the broadcast went well: let nobody generate with these weights
                wait(on_workers(engines, "zero_weights"), timeout_s, "setting the engine's weights to zero")
            raise RuntimeError(
                "this model cannot be synced: after a reload session of vLLM's with the weights that the engine has "
                f"started from, {wrong}" + (f". Before, {because}" if because else "")
            )
        because = f"after a replay {wrong}"
        print(f"Weight syncs are reload sessions, because {because}")
        wait(on_workers(engines, "settle_path", because), timeout_s, "choosing sessions")
    return {
        **sync_result(sent, ranks, seconds),
        "verified": wrong is None,
        "path": path,
        "because": because,
        "tensors": sum(len(worker) for engine in cold.digests for worker in engine),
        "answers": sum(map(len, cold.answers)) * cold.repeatable,
        "before": cold.answers[0],
    }


def sync_result(sent: dict, ranks: list[dict], seconds: float) -> dict:
    """What a sync reports."""
    return {
        "bytes": sent["bytes"],
        "seconds": seconds,
        "gb_per_s": sent["bytes"] / seconds / 1e9,
        "path": "session" if any(rank["path"] == "session" for rank in ranks) else "replay",
        "sender": sent,
        "ranks": ranks,
    }


@one_at_a_time()
def sync_weights_to_quantized_engine(
    train_model, quantized_llm, *, bucket_bytes: int = BUCKET_BYTES, timeout_s: float = 30.0
) -> dict:
    """Bring engines to the trainer's weights: broadcast, quantization on arrival, digests, cache reset.

    The first replay that brings other weights than the engine held is followed by a reload session with the
    same ones: what vLLM derives from weights and keeps elsewhere would be the old if replays leave it alone.
    Stored tensors and answers must be the same after both; otherwise sessions serve from now on. Once a run.

    Args:
        train_model: handle of the trainer's actor, a `WeightSender`; of a sharded trainer all ranks, the
            sender first.
        quantized_llm: handle of the `MyLLM` actor, or a list of them, which have joined one group with the
            sender.

    Returns: `bytes` on the wire, `seconds` from the call to the reset prefix cache, `gb_per_s` (1e9), `path`
        ("replay" or "session"), `compared` (whether this was that sync), `sender` and per-rank details.

    Raises: RuntimeError: what is wrong with which weight on which rank, or who died. Unless no byte has
        moved, the engine refuses
            to generate. Or: another sync is running.
        TimeoutError: the group did not finish in `timeout_s` seconds.
    """
    trainers, engines, start = as_list(train_model), as_list(quantized_llm), time.perf_counter()
    agree_on_weights(trainers, engines, bucket_bytes, timeout_s)
    sent, ranks = broadcast_weights(trainers, engines, timeout_s)
    compared = any(rank["compare"] for rank in ranks)
    if compared:
        replayed = observe(engines, timeout_s)
        sent, ranks = broadcast_weights(trainers, engines, timeout_s, by_session=True)
        if different := differences(engines, replayed, timeout_s):
            because = f"a replay and a session of the same new weights differ in {some(different)}"
            print(f"Weight syncs are reload sessions from now on, because {because}")
            wait(on_workers(engines, "settle_path", because), timeout_s, "choosing sessions")
        else:
            wait(on_workers(engines, "settle_path"), timeout_s, "choosing replays")
            print("A replay and a session of the first other weights gave the same tensors and answers")
    return sync_result(sent, ranks, time.perf_counter() - start) | {"compared": compared}


# ----- The loop -------------------------------------------------------------------------------------------------------


def generate(engines: list, prompts: list[str], config: Config, seeds: list[int], **sampling) -> list:
    """One vLLM RequestOutput per prompt, in order; each engine generates for an equal share of them.

    Raises RuntimeError while a weight sync is running. (A call to the actor itself waits for its turn.)
    """
    if SYNCING.locked():
        raise RuntimeError("refusing to generate: a weight sync is running; ask again when it has ended")
    params = [
        SamplingParams(seed=seed, max_tokens=config.max_tokens, **ROLLOUT, **sampling) for seed in seeds
    ]
    share = -(-len(prompts) // len(engines))
    calls = [
        llm.generate.remote(prompts[i : i + share], params[i : i + share], use_tqdm=False)
        for llm, i in zip(engines, range(0, len(prompts), share))
    ]
    return sum(wait(calls, 10 * config.timeout_s, "generating"), [])


def rlhf_training_iteration(
    train_model, quantized_llm: list, prompts: list[str], config: Config, step: int = 0
) -> tuple[list, list[list[float]], dict]:
    """Rollouts, rewards, one training step, sync. Returns vLLM's outputs, rewards (P, G), and the step's
    metrics."""
    start, samples = time.perf_counter(), config.samples_per_prompt
    seeds = [
        (config.seed * 10**6 + step * len(prompts) + i) * samples for i in range(len(prompts))
    ]  # + sample's index
    outputs = generate(quantized_llm, prompts, config, seeds, n=samples, temperature=config.temperature)
    rollout_s = time.perf_counter() - start
    rewards_PG = compute_rewards(outputs, load_reward(config.reward), config.timeout_s)
    advantages_PG = compute_advantages(torch.tensor(rewards_PG))
    rollouts = [
        {"prompt": list(output.prompt_token_ids), "completion": list(completion.token_ids)}
        | {"logprobs": list(completion.logprobs.logprobs), "advantage": advantage}
        for output, advantages_G in zip(outputs, advantages_PG.tolist(), strict=True)
        for completion, advantage in zip(output.outputs, advantages_G, strict=True)
    ]
    [trained] = wait([train_model.train_step.remote(rollouts)], 10 * config.timeout_s, "the training step")
    sync = sync_weights_to_quantized_engine(
        train_model, quantized_llm, bucket_bytes=config.bucket_mib * 2**20, timeout_s=config.timeout_s
    )
    versions = wait(
        [llm.get_weights_version.remote() for llm in quantized_llm], config.timeout_s, "reading the version"
    )
    tokens = sum(len(rollout["completion"]) for rollout in rollouts)
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
        "weights_version": versions[0],
    }
    return outputs, rewards_PG, metrics


def train(config: Config, trainer, engines: list, prompts: list[str]) -> list[dict]:
    """Run the steps that are left; print, log and return their metrics, and save checkpoints."""
    [first] = wait([trainer.get_step.remote()], config.timeout_s, "reading the step")
    file = config.output_dir / "metrics.jsonl"
    rows = read_metrics(config.output_dir)[:first] if config.resume else []
    with contextlib.ExitStack() as cleanup:
        log = cleanup.enter_context(file.open("w"))
        log.writelines(json.dumps(row) + "\n" for row in rows)
        if config.track != "none":
            tracker = importlib.import_module(config.track)
            tracker.init(
                project="rlhf-online-quant", config=json.loads(json.dumps(vars(config), default=str))
            )
            cleanup.callback(tracker.finish)
        for step in range(first, config.steps):
            batch = prompts_of_step(config, prompts, step)
            try:
                outputs, rewards_PG, metrics = rlhf_training_iteration(trainer, engines, batch, config, step)
            except (RuntimeError, TimeoutError) as error:
                raise type(error)(f"step {step}: {error}") from error
            rows.append(metrics)
            log.write(json.dumps(metrics) + "\n")
            log.flush()
            if config.track != "none":
                tracker.log(metrics, step=step)
            print(LINE_OF_STEP.format(**metrics))
            if metrics["mismatch_kl"] > (
                usual := USUAL_KL["none" if config.quantization == "none" else "fp8"]
            ):
                print(
                    f"WARNING: mismatch KL above {usual:g}. If --quantization none shows it too, from the first step on, the "
                    "trainer computes something else than the engine. If only FP8 does, lower the learning rate."
                )
            if step % 10 == 0:
                text, advantage = (
                    outputs[0].outputs[0].text,
                    compute_advantages(torch.tensor(rewards_PG))[0, 0],
                )
                reward = f"reward {rewards_PG[0][0]:.3f}, advantage {advantage:+.2f}"
                print(f"  sample: {outputs[0].prompt!r} -> {text!r} | {reward}")
            if step + 1 == config.steps or config.save_every and (step + 1) % config.save_every == 0:
                folder = config.output_dir.absolute() / f"checkpoint-{step + 1}"
                wait([trainer.save_checkpoint.remote(folder)], 10 * config.timeout_s, f"saving {folder}")
    return rows


# ----- Start, run, report, stop --------------------------------------------------------------------------------------


def resolve(config: Config, gpus: int) -> tuple[Config, str]:
    """Fill in every `auto` for a cluster with that many GPUs; returns the config and the engines' device.

    Raises: SystemExit: flags that contradict each other; too few GPUs, with the count found, the count needed
        and the command
            that fits.
    """
    if config.samples_per_prompt < 2 or config.temperature <= 0:
        raise SystemExit(
            f"Found --samples-per-prompt {config.samples_per_prompt} --temperature {config.temperature:g}; expected 2 or "
            "more samples above temperature 0, because advantages compare different answers to one prompt"
        )
    device = "cuda" if gpus else "cpu"
    trainer_device = device if config.trainer_device == "auto" else config.trainer_device
    needed = (config.world_size - 1) * (device == "cuda") + (trainer_device == "cuda")
    if gpus < needed:
        fits = "--num-engines 1 " * (config.num_engines > 1) + "--tensor-parallel-size 1 " * bool(gpus)
        fits += "--trainer-device cpu" * (gpus < 2)
        raise SystemExit(
            f"Found {gpus} GPU(s), need {needed}: {needed - (trainer_device == 'cuda')} for the engine "
            f"(--num-engines x --tensor-parallel-size) and {int(trainer_device == 'cuda')} for the trainer.\n"
            f"What fits here: python {Path(sys.argv[0]).name} {fits.strip()}"
        )
    if not gpus:
        print(
            "No GPU found: running the same processes on the CPU (gloo; by default weight-only FP8, a tiny model)."
        )
    model, quantization = ("facebook/opt-125m", "fp8-dynamic") if gpus else ("tiny", "fp8-weight-only")
    model = model if config.model == "auto" else config.model
    learning_rate = 5e-4 if model == "tiny" else 1e-6
    return dataclasses.replace(
        config,
        model=model,
        quantization=quantization if config.quantization == "auto" else config.quantization,
        trainer_device=trainer_device,
        learning_rate=learning_rate if config.learning_rate is None else config.learning_rate,
        resume=config.resume and config.resume.absolute(),
    ), device


def find_model(model: str, folder: str, seed: int) -> str:
    """Check that a model can be had before any process starts; builds `tiny` in `folder`."""
    if model == "tiny":
        from tests.random_models import build_random_model

        return build_random_model(folder, seed=seed)
    try:
        transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"--model {model}: expected a model on the Hugging Face hub (reachable, and public or logged in), a local "
            f"folder with config.json, or `tiny`. Found: {error}"
        ) from error
    return model


def read_prompts(path: Path | None) -> list[str]:
    """The non-empty lines of a UTF-8 file; without one, the prompts of vLLM's examples."""
    if path is None:
        return PROMPTS
    try:
        prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(
            f"--prompts-file {path}: expected UTF-8 text, one prompt a line. Found: {error}"
        ) from error
    if not prompts:
        raise SystemExit(f"--prompts-file {path}: expected one prompt a line, found no line with text")
    return prompts


def check_prompts(prompts: list[str], path: str, max_model_len: int) -> None:
    """Raise SystemExit, with all of them, for prompts that leave no room for an answer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    lengths = [len(tokenizer(prompt).input_ids) for prompt in prompts]
    too_long = [
        f"prompt {i + 1} has {length} tokens" for i, length in enumerate(lengths) if length >= max_model_len
    ]
    if too_long:
        raise SystemExit(
            f"Found {len(too_long)} prompts that leave no room for an answer: {', '.join(too_long[:8])}. Expected fewer "
            f"than --max-model-len {max_model_len}; shorten them or raise it"
        )


def prompts_of_step(config: Config, prompts: list[str], step: int) -> list[str]:
    """P prompts: the next ones in turn, or sums of their own for `--reward arithmetic` without a file."""
    count = config.prompts_per_step
    if config.reward == "arithmetic" and config.prompts_file is None:
        draw = random.Random(f"{config.seed} {step}").randrange
        return [f"Question: What is {draw(100)} + {draw(100)}? Answer:" for _ in range(count)]
    return [prompts[(step * count + i) % len(prompts)] for i in range(count)]


def actor_environment() -> dict[str, str]:
    """Environment of every process of the run; what the user has set wins."""
    environment = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore::FutureWarning",
        # Without a GPU: two ranks share one NUMA node and a few cores, which vLLM refuses by default; KV
        # cache in GiB.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # vLLM's scheduler runs inside the actor: one process less to start, and batches that do not depend on
        # timing.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    return {name: os.environ.get(name, value) for name, value in environment.items()}


# A process of its own that knows Ray's processes below the driver, waits for the driver's clean-up or its
# end, gives them 4 s and kills those that are left: what is stopped or stuck in a collective does not end by
# itself.
REAPER = """
import contextlib, select, sys, psutil
seen = set()
while not select.select([sys.stdin], [], [], 0.5)[0]:  # readable when the driver's end of the pipe is closed
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(int(sys.argv[1])).children():
            with contextlib.suppress(psutil.Error):
                if "/ray/" in " ".join(child.cmdline()):
                    seen.update([child, *child.children(recursive=True)])
for process in psutil.wait_procs(seen - {psutil.Process()}, timeout=4)[1]:
    with contextlib.suppress(psutil.Error):
        process.kill()  # not another process with the same number
"""


def connect(config: Config, cleanup: contextlib.ExitStack) -> int:
    """Connect to Ray or start a private cluster, of which `cleanup` leaves nothing; returns the number of
    GPUs."""
    os.environ.setdefault(
        "RAY_process_group_cleanup_enabled", "true"
    )  # a killed actor takes its children along
    reaper = [sys.executable, "-c", REAPER, str(os.getpid())]
    cleanup.enter_context(subprocess.Popen(reaper, stdin=subprocess.PIPE, start_new_session=True))
    cleanup.callback(ray.shutdown)  # it kills the raylet after a second and may orphan the others
    private = {} if config.ray_address else {"num_cpus": 1 + config.world_size, "include_dashboard": False}
    modules = [
        str(HERE / "rlhf_online_quant.py"),
        str(HERE / "rlhf_utils.py"),
    ]  # imported by actors on any node
    environment = {"env_vars": actor_environment(), "py_modules": modules}
    ray.init(config.ray_address or "local", runtime_env=environment, **private)
    return int(ray.cluster_resources().get("GPU", 0))


def start(config: Config, path: str, device: str, cleanup: contextlib.ExitStack) -> tuple:
    """Trainer and engines, loaded side by side and joined in one group.

    Returns the trainer's handle, the engines' handles, and what `prove_fp8` found.
    """
    trainer = start_trainer(config, path, cleanup)  # first, so that it gets GPU 0
    first_ranks = range(1, config.world_size, config.tensor_parallel_size)
    weights = str(config.resume or path)  # those of the trainer
    engines = [start_engine(config, weights, device, cleanup, first_rank) for first_rank in first_ranks]
    join_group(config, device, trainer, engines)
    return trainer, engines, prove_fp8(engines, config)


def start_trainer(config: Config, path: str, cleanup: contextlib.ExitStack):
    """Start loading the trainer and return the actor's handle; `cleanup` kills it."""
    gpus = int(config.trainer_device == "cuda")
    group = reserve([{"CPU": 1, "GPU": gpus}], config.timeout_s, cleanup)
    trainer = (
        ray.remote(Trainer)
        .options(num_cpus=1, num_gpus=gpus, scheduling_strategy=PlacementGroupSchedulingStrategy(group))
        .remote(config, path)
    )
    ACTORS[trainer._actor_id] = "trainer (rank 0)"
    cleanup.callback(ray.kill, trainer)
    cleanup.callback(ACTORS.pop, trainer._actor_id, None)
    return trainer


def start_engine(config: Config, path: str, device: str, cleanup: contextlib.ExitStack, first_rank: int = 1):
    """Start loading the engine, one GPU bundle per worker, and return the actor's handle; `cleanup` stops
    it."""
    bundle = {"GPU": 1} if device == "cuda" else {"CPU": 1}
    placement = PlacementGroupSchedulingStrategy(
        reserve([bundle] * config.tensor_parallel_size, config.timeout_s, cleanup),
        placement_group_bundle_index=0,
        placement_group_capture_child_tasks=True,
    )
    llm = (
        ray.remote(MyLLM)
        .options(num_cpus=0, num_gpus=0, scheduling_strategy=placement)
        .remote(**engine_arguments(config, path, device))
    )
    ranks = range(first_rank, first_rank + config.tensor_parallel_size)
    ACTORS[llm._actor_id] = f"engine (rank {', '.join(map(str, ranks))})"
    cleanup.callback(stop_engine, llm)
    cleanup.callback(ACTORS.pop, llm._actor_id, None)
    return llm


def join_group(config: Config, device: str, trainer, engines: list) -> None:
    """Wait until all have loaded, and make trainer (rank 0) and workers (engine by engine) one group."""
    one_node = sum(node["Alive"] for node in ray.nodes()) == 1
    rendezvous = trainer.open_rendezvous.remote("127.0.0.1" if one_node else None)
    loaded = [rendezvous, *[llm.get_weights_version.remote() for llm in engines]]
    (address, port), *_ = wait(loaded, 10 * config.timeout_s, "starting trainer and engine")
    backend = "nccl" if device == config.trainer_device == "cuda" else "gloo"
    limit = config.timeout_s / 2  # the ranks know more than the driver, so they speak first
    rest = (config.world_size, backend, limit)
    joining = [trainer.init_weight_update_group.remote(address, port, *rest)]
    for i, llm in enumerate(engines):
        arguments = (address, port, 1 + i * config.tensor_parallel_size, *rest)
        joining.append(llm.collective_rpc.remote("init_weight_update_group", args=arguments))
    wait(joining, config.timeout_s, f"joining the {backend} group of {config.world_size}")


def reserve(bundles: list[dict], timeout_s: float, cleanup: contextlib.ExitStack) -> PlacementGroup:
    """A placement group that is ready, and is removed by `cleanup`."""
    group = placement_group(bundles)
    cleanup.callback(remove_placement_group, group)
    wait([group.ready()], timeout_s, f"reserving {bundles} in the Ray cluster")
    return group


def stop_engine(llm) -> None:
    """Let vLLM stop its processes; kill the actor in any case."""
    try:
        ray.get(llm.shutdown.remote(), timeout=5)
    except (ray.exceptions.RayError, TimeoutError) as error:
        print(
            f"The engine did not shut down by itself ({type(error).__name__}); killing it.", file=sys.stderr
        )
    ray.kill(llm)


def prove_fp8(engines: list, config: Config) -> list[dict]:
    """Print and return what each rank of each engine holds.

    Raises:
        SystemExit: quantization was asked for and some rank has no FP8 layer.
    """
    ranks = sum(wait(on_workers(engines, "inspect_weights"), config.timeout_s, "inspecting the engine"), [])
    for number, rank in enumerate(ranks):
        print(
            f"engine rank {number}: {rank['fp8_linear_layers']} linear layers in FP8, weights "
            f"{rank['weights_gib']:.4f} GiB, in BF16 they would take {rank['bf16_weights_gib']:.4f} GiB"
        )
    print(f"  not in FP8: {some(ranks[0]['unquantized'])}")
    if config.quantization != "none" and not all(rank["fp8_linear_layers"] for rank in ranks):
        raise SystemExit(
            f"--quantization {config.quantization} had no effect: an engine rank has no Float8Tensor layer. Use a "
            "torchao FP8 config and shard dimensions that are multiples of 16, or --quantization none"
        )
    return ranks


@contextlib.contextmanager
def one_message() -> Iterator[None]:
    """Say what went wrong in one message, before the clean-up, and end the program with exit code 1."""
    try:
        yield
    except (RuntimeError, OSError, ray.exceptions.RayError) as error:  # a TimeoutError is an OSError
        print(f"FAILED: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error


def main(config: Config) -> dict:
    """Run once and return what summary.json holds."""
    began = psutil.Process().create_time()
    prompts = read_prompts(config.prompts_file)
    load_reward(config.reward)
    if config.resume and not (config.resume / "trainer.pt").is_file():
        raise SystemExit(
            f"--resume {config.resume}: expected checkpoint-N of an earlier run, found no trainer.pt there"
        )
    if config.track != "none" and importlib.util.find_spec(config.track) is None:
        raise SystemExit(f"--track {config.track}: not installed here; pip install {config.track}")
    config.output_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as cleanup, one_message():
        config, device = resolve(config, connect(config, cleanup))
        signal.signal(
            signal.SIGTERM, lambda *_: sys.exit(1)
        )  # Ray's own handler would kill the cluster at once
        torchao_config(config.quantization)  # what is wrong with it should show before anything starts
        scratch = cleanup.enter_context(tempfile.TemporaryDirectory())
        path = find_model(config.model, scratch, config.seed)
        check_prompts(prompts, path, config.max_model_len)
        print(
            f"Starting trainer ({config.trainer_device}) and {config.num_engines} engine(s) ({device}, "
            f"TP={config.tensor_parallel_size}) ..."
        )
        startup = {"imports and Ray": time.time() - began}
        trainer, engines, ranks = start(config, path, device, cleanup)
        startup["trainer and engine"] = time.time() - began - sum(startup.values())
        samples = prompts_of_step(config, prompts, 0)[:4]
        bucket_bytes = config.bucket_mib * 2**20
        try:
            sync = prove_sync(trainer, engines, samples, config.max_tokens, bucket_bytes, config.timeout_s)
        except RuntimeError as error:
            raise RuntimeError(f"{config.model}: {error}") from error
        before = sync.pop("before")
        print(
            f"Proved: set to zero and synced by {sync['path']}, the engine is what it was when it had started, in "
            f"{sync['tensors']} tensors and {sync['answers']} answers"
        )
        startup |= {"proof": time.time() - began - sum(startup.values()), "all": time.time() - began}
        print(f"Start-up: {', '.join(f'{phase} {s:.1f} s' for phase, s in startup.items())}")
        rows = train(config, trainer, engines, prompts)
        [after] = wait([engines[0].answer.remote()], 10 * config.timeout_s, "asking the engine")
        version = wait([engines[0].get_weights_version.remote()], config.timeout_s, "reading the version")[0]

    summary = {
        "device": device,
        "model": config.model,
        "world_size": config.world_size,
        "quantization": config.quantization,
        "fp8_linear_layers": ranks[0]["fp8_linear_layers"],
        **{key: sum(rank[key] for rank in ranks) for key in ("weights_gib", "bf16_weights_gib")},
        "ranks": ranks,
        "sync": sync,
        "weights_version": version,
        "startup_seconds": startup,
        "last_step": rows[-1] if rows else None,
        "samples": [
            {"prompt": old["prompt"], "before": old["text"], "after": new["text"]}
            for old, new in zip(before, after, strict=True)
        ],
        "versions": {"python": sys.version.split()[0]}
        | {library.__name__: library.__version__ for library in (torch, vllm, torchao, ray, transformers)},
    }
    (config.output_dir / "summary.json").write_text(json.dumps(summary, indent=2))
    plot_curves(config.output_dir)
    report(summary, config.output_dir)
    return summary


def read_metrics(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl, one per step."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def plot_curves(folder: Path) -> None:
    """Draw curves.png from metrics.jsonl: reward, mismatch, and where the time went, by step."""
    import matplotlib.pyplot as plt

    panels = {
        "reward": ["reward"],
        "engine against trainer": ["mismatch_kl", "mismatch_abs_mean"],
        "seconds a step": ["rollout_s", "train_s", "sync_s"],
    }
    rows = read_metrics(folder)
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), layout="constrained")
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        for name in names:
            axis.plot([row["step"] for row in rows], [row[name] for row in rows], label=name)
        axis.set(title=title, xlabel="step")
        axis.legend()
    axes[1].set_yscale("log")
    figure.savefig(folder / "curves.png")


def report(summary: dict, folder: Path) -> None:
    """Print the samples and the figures."""
    samples = Table("prompt", "before training", "after training", title="Greedy samples")
    for sample in summary["samples"]:
        samples.add_row(*map(repr, sample.values()))
    sync, last = summary["sync"], summary["last_step"]
    rows = {
        "FP8 linear layers per rank": str(summary["fp8_linear_layers"]),
        "engine weights, all ranks": f"{summary['weights_gib']:.4f} GiB (BF16: {summary['bf16_weights_gib']:.4f} GiB)",
        "first sync": f"{sync['bytes'] / 1e9:.4f} GB in {sync['seconds']:.3f} s = {sync['gb_per_s']:.2f} GB/s",
        "verified": str(sync["verified"]),
        "equal to the cold start": f"{sync['tensors']} tensors, {sync['answers']} answers, by {sync['path']}",
        "reward of the last step": f"{last['reward']:.3f}" if last else "no step",
        "weights version": str(summary["weights_version"]),
        "start-up": f"{summary['startup_seconds']['all']:.1f} s",
    }
    figures = Table("what", "value", title="RL with verified FP8 weight syncs")
    for row in rows.items():
        figures.add_row(*row)
    for table in (samples, figures):
        Console().print(table)
    print(f"Wrote summary.json, metrics.jsonl and curves.png to {folder}")


if __name__ == "__main__":
    main(tyro.cli(Config))
