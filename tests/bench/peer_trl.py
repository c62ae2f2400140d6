"""TRL's GRPO, as it is: one process trains, a vLLM server generates.

    python tests/bench/peer_trl.py --model FOLDER --port 8000 [any flag of Peer]

`bench_loop.py --peer trl` and `bench_transfer.py` start it. Prints a line of JSON: `step_s`, seconds from the
end of an optimizer step to that of the next; `sync_s`, of each update of the server's weights; `rewards`, the
mean of each step; `held_out`, shares of right answers before and after; `trainer_gib`. With `--save-to` also
what the server is `asked` at last, as token ids.
"""

import dataclasses
import itertools
import json
import tempfile
import time
from pathlib import Path

import tests_on_path  # noqa: F401
import torch
import tyro
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from vllm.utils.network_utils import get_open_port

from harness import driver


@dataclasses.dataclass
class Peer:
    """One run."""

    model: str
    """A folder."""
    port: int
    """Of the server, on this machine."""
    steps: int = 3
    """Measured ones; one more comes before them."""
    prompts_per_step: int = 8
    samples_per_prompt: int = 16
    max_tokens: int = 512
    microbatch: int = 16
    """Sequences; divides those of a step."""
    learning_rate: float = 1e-6
    dtype: str = "float32"
    """Of the weights; "bfloat16" is with 8-bit AdamW."""
    gradient_checkpointing: bool = True
    """TRL's default."""
    prompts: tuple[str, ...] = ()
    """Texts, rewarded with their share of lower-case letters."""
    prompts_file: Path | None = None
    """JSON lines as of make_smollm2.py, with its reward."""
    held_out_file: Path | None = None
    """The same, for questions before and after."""
    save_to: Path | None = None
    """A folder for the weights of the last update."""


def timed(call, seconds: list[float]):
    """The same call; its seconds are appended."""

    def measured(*args):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call(*args)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)

    return measured


class Log(TrainerCallback):
    """Notes the end of each step, and its reward."""

    def __init__(self):
        self.ends, self.rewards = [], []

    def on_step_end(self, *_, **__):
        """The optimizer's step is done."""
        self.ends.append(time.perf_counter())

    def on_log(self, args, state, control, logs, **_):
        """TRL's metrics."""
        self.rewards += [logs["reward"]] if "reward" in logs else []


def main(peer: Peer) -> None:
    """Train, and print what was found."""
    log, batch = Log(), peer.prompts_per_step * peer.samples_per_prompt
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=peer.microbatch,
        gradient_accumulation_steps=batch // peer.microbatch,
        num_generations=peer.samples_per_prompt,
        max_completion_length=peer.max_tokens,
        max_steps=1 + peer.steps,
        learning_rate=peer.learning_rate,
        lr_scheduler_type="constant",
        temperature=1.0,
        beta=0.0,
        bf16=True,
        model_init_kwargs={"dtype": peer.dtype},
        optim="adamw_torch_8bit" if peer.dtype == "bfloat16" else "adamw_torch_fused",
        gradient_checkpointing=peer.gradient_checkpointing,
        use_vllm=True,
        vllm_mode="server",
        vllm_server_port=peer.port,
        vllm_group_port=get_open_port(),
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
    )
    rows = [{"prompt": prompt} for prompt in peer.prompts] * peer.prompts_per_step * (1 + peer.steps)
    reward = driver.letters
    if peer.prompts_file:
        from make_smollm2 import exact as reward

        rows = [*map(json.loads, peer.prompts_file.read_text().splitlines())]
    trainer = GRPOTrainer(
        model=peer.model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        callbacks=[log],
    )
    updates, engine = [], trainer.vllm_generation
    engine.sync_weights = timed(engine.sync_weights, updates)
    held_out = []
    if peer.held_out_file:
        held_out = [*map(json.loads, peer.held_out_file.read_text().splitlines())]
    tokenizer, how = trainer.processing_class, dict(tokenize=False, add_generation_prompt=True)
    asked = [row["prompt"] for row in held_out or rows[:4]]
    asked = [each if isinstance(each, str) else tokenizer.apply_chat_template(each, **how) for each in asked]
    asked = [tokenizer(text, add_special_tokens=False).input_ids for text in asked]

    def share_of_right_answers() -> float | None:
        if not held_out:
            return None
        said = engine.vllm_client.generate(prompts=asked, temperature=0.0, max_tokens=peer.max_tokens)
        texts = tokenizer.batch_decode(said["completion_ids"], skip_special_tokens=True)
        pairs = zip(texts, held_out, strict=True)
        return sum(text.strip() == row["answer"] for text, row in pairs) / len(held_out)

    before = share_of_right_answers()
    trainer.train()
    found = {"step_s": [end - began for began, end in itertools.pairwise(log.ends)], "rewards": log.rewards}
    found |= {"sync_s": [*updates], "trainer_gib": torch.cuda.max_memory_allocated() / 2**30}
    if peer.save_to:
        engine.sync_weights()
        trainer.save_model(str(peer.save_to))
        found["asked"] = asked
    found["held_out"] = [before, share_of_right_answers()]
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Peer))
