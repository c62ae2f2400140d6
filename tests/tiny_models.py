"""Tiny random models with a byte-level tokenizer, built on the spot: what the CPU run and the tests need, no download."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    set_seed,
)

SPECIAL = ["<pad>", "<s>", "</s>"]
VOCAB_SIZE = len(SPECIAL) + 256
COMMON = dict(
    vocab_size=VOCAB_SIZE, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
CONFIGS = {
    "opt": OPTConfig(**COMMON, ffn_dim=256, word_embed_proj_dim=128, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**COMMON, intermediate_size=256, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True),
    "llama": LlamaConfig(**COMMON, intermediate_size=256, num_key_value_heads=2, tie_word_embeddings=False),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, three special tokens."""
    vocab = {token: i for i, token in enumerate(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )


def build_tiny_model(folder: str | Path, architecture: str = "opt", seed: int = 0) -> str:
    """Write a random model of "opt", "qwen3" or "llama" in Hugging Face format to `folder`; returns the folder.

    No weight is left at 0 or 1 (biases, norms), so that a swapped or forgotten tensor shows.
    """
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture], dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)
