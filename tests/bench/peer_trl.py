"""TRL's GRPO at the loop's work: one process trains, its vLLM server generates on another GPU.

`bench_loop.py --peer trl` starts it:
peer_trl.py MODEL STEPS MAX_TOKENS MICROBATCH PORT MODE PROMPTS DTYPE. MICROBATCH counts sequences and
divides 8 x 16; MODE, of gradient checkpointing, is `on`, TRL's default, or `off`; PROMPTS is a list in JSON;
DTYPE, of the weights, is `float32`, or `bfloat16` with 8-bit AdamW. Prints a line of JSON: `step_s`, seconds
from the end of an optimizer step to that of the next, and `trainer_gib`.
"""

import itertools
import json
import re
import sys
import tempfile
import time

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def reward(prompts, completions, **_):
    """The loop's `letters`."""
    return [len(re.findall("[a-z]", completion)) / max(1, len(completion)) for completion in completions]


class Stopwatch(TrainerCallback):
    """Notes the end of each step."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, *_, **__):
        """The optimizer's step is done."""
        self.ends.append(time.perf_counter())


def main(model, steps: int, max_tokens: int, microbatch: int, port: int, mode, prompts: list, dtype) -> None:
    """Train for one step, and STEPS that are measured, of 8 prompts x 16 completions."""
    stopwatch = Stopwatch()
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=microbatch,
        gradient_accumulation_steps=128 // microbatch,
        num_generations=16,
        max_completion_length=max_tokens,
        max_steps=1 + steps,
        learning_rate=1e-6,
        temperature=1.0,
        beta=0.0,
        bf16=True,
        model_init_kwargs={"dtype": dtype},
        optim="adamw_torch_8bit" if dtype == "bfloat16" else "adamw_torch_fused",
        gradient_checkpointing=mode == "on",
        use_vllm=True,
        vllm_mode="server",
        vllm_server_port=port,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    data = Dataset.from_list([{"prompt": prompt} for prompt in prompts] * 8 * (1 + steps))
    trainer = GRPOTrainer(
        model=model, reward_funcs=reward, args=arguments, train_dataset=data, callbacks=[stopwatch]
    )
    trainer.train()
    seconds = [end - began for began, end in itertools.pairwise(stopwatch.ends)]
    print(json.dumps({"step_s": seconds, "trainer_gib": torch.cuda.max_memory_allocated() / 2**30}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:6]), sys.argv[6], json.loads(sys.argv[7]), sys.argv[8])
