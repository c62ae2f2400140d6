"""TRL's GRPO at the loop's work: one process trains, its vLLM server generates on another GPU.

`bench_loop.py --peer trl` starts it:  peer_trl.py MODEL STEPS MAX_TOKENS MICROBATCH PORT PROMPTS
MICROBATCH counts sequences and divides 8 x 16; PROMPTS is a list in JSON. Measures STEPS steps with gradient
checkpointing, TRL's default, and as many without. Prints a line of JSON, for `on` and `off`: `step_s`,
seconds from one optimizer step's end to the next, and `trainer_gib`.
"""

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
    """Notes seconds and memory of each step; half way it switches gradient checkpointing off."""

    def __init__(self, steps: int):
        self.steps, self.end = steps, None
        self.found = {mode: {"step_s": [], "trainer_gib": 0.0} for mode in ("on", "off")}

    def on_step_end(self, args, state, control, model, **_):
        """The first step has begun before the clock, so there is one more of them."""
        now, mode = time.perf_counter(), self.found["on" if model.is_gradient_checkpointing else "off"]
        if self.end:
            mode["step_s"].append(now - self.end)
        mode["trainer_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if state.global_step == 1 + self.steps:
            model.gradient_checkpointing_disable()
            torch.cuda.reset_peak_memory_stats()
        self.end = now


def main(model: str, steps: int, max_tokens: int, microbatch: int, port: int, prompts: list[str]) -> None:
    """Train for twice as many steps of 8 prompts x 16 completions, and one."""
    stopwatch = Stopwatch(steps)
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=microbatch,
        gradient_accumulation_steps=128 // microbatch,
        num_generations=16,
        max_completion_length=max_tokens,
        max_steps=2 * steps + 1,
        learning_rate=1e-6,
        temperature=1.0,
        beta=0.0,
        bf16=True,
        gradient_checkpointing=True,
        use_vllm=True,
        vllm_mode="server",
        vllm_server_port=port,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    data = Dataset.from_list([{"prompt": prompt} for prompt in prompts] * 8 * (2 * steps + 1))
    trainer = GRPOTrainer(
        model=model, reward_funcs=reward, args=arguments, train_dataset=data, callbacks=[stopwatch]
    )
    trainer.train()
    print(json.dumps(stopwatch.found))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:6]), json.loads(sys.argv[6]))
