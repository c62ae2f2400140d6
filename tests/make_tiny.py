"""Makes the tiny model of tests/tiny, and the prompts that it learns from.

    python tests/make_tiny.py [FOLDER]

A random BF16 OPT of 0.4 million weights, one token per byte, is taught by example to write words backwards,
until it gets so much right that RL can teach it the rest. Beside it go prompts.jsonl, to learn from, and
held_out.jsonl, to ask before and after. The same files each time, on one kind of machine.
"""

import json
import random
import string
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, OPTConfig, PreTrainedTokenizerFast, set_seed

FOLDER = Path(__file__).resolve().parent / "tiny"
TINY = dict(vocab_size=3 + 256, hidden_size=128, num_hidden_layers=2, num_attention_heads=4)
TINY |= dict(max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def make(folder: str | Path) -> str:
    """Write model, tokenizer, prompts.jsonl and held_out.jsonl to `folder`; returns the folder."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # how many there are changes the last bits
    try:
        model = random_model()
        teach(model)
    finally:
        torch.set_num_threads(threads)
    model.to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    for name, rows in {
        "prompts.jsonl": ask_backwards("prompts", 1280),
        "held_out.jsonl": ask_backwards("held out", 100, held_out=True),
    }.items():
        (Path(folder) / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def random_model() -> torch.nn.Module:
    """An OPT of 0.4 million random weights in float32, each of which BF16 can hold."""
    set_seed(0)
    config = OPTConfig(**TINY, ffn_dim=256, word_embed_proj_dim=128, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():  # none stays at 0 or 1: one that is forgotten would not show
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.float()


def teach(model: torch.nn.Module) -> None:
    """Teach the model by example until RL can teach it the rest.

    RL may never learn a place of the word that was only ever right by chance. So this ends when at each of
    the 5 places three letters in ten are right (chance: 1 in 26), in a batch of words not seen before.
    """
    tokenizer = byte_tokenizer()
    model.eval()  # no dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in range(300):
        rows = ask_backwards(f"teach {batch}", 64)
        examples = [f"{row['prompt']} {row['answer']}</s>" for row in rows]
        tokens_BL = torch.tensor(tokenizer(examples).input_ids)
        # The last 7 tokens: a space, the letters, the end.
        logits_BTV, answers_BT = model(input_ids=tokens_BL).logits[:, -8:-1], tokens_BL[:, -7:]
        torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), answers_BT.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        right_5 = (logits_BTV.argmax(-1) == answers_BT)[:, 1:-1].float().mean(0)
        if right_5.min() >= 0.3:
            print(f"Taught by {batch + 1} x 64 words: {right_5.mean():.0%} of the letters are right")
            return
    raise RuntimeError(f"expected three letters in ten right at each place; found {right_5.tolist()}")


def ask_backwards(seed: int | str, count: int, held_out: bool = False) -> list[dict]:
    """Rows with random words of 5 letters. Held out of training is one word in ten, with its anagrams.

    >>> ask_backwards(0, 1)
    [{'prompt': 'Backwards: vtkgn ->', 'answer': 'ngktv'}]
    """
    draw, rows = random.Random(seed), []
    while len(rows) < count:
        word = "".join(draw.choices(string.ascii_lowercase, k=5))
        if (sum(word.encode()) % 10 == 0) == held_out:  # a sum is the same for all anagrams
            rows.append({"prompt": f"Backwards: {word} ->", "answer": word[::-1]})
    return rows


def byte_tokenizer(more: list[str] | None = None) -> PreTrainedTokenizerFast:
    """One token per byte, after three special ones and before any `more`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet, *(more or [])])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


if __name__ == "__main__":
    print(f"Wrote {make(sys.argv[1] if len(sys.argv) > 1 else FOLDER)}")
