"""Random models with a byte-level tokenizer, built on the spot: what the tests and the benchmarks need."""

import copy
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
    set_seed,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from make_tiny import TINY, byte_tokenizer  # noqa: E402

IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
QWEN3 = IDS | dict(vocab_size=151936, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960)
SMALL_MOE = TINY | dict(
    hidden_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, num_experts_per_tok=2
)
SHAPES = {
    "tiny-opt": OPTConfig(**TINY, ffn_dim=256, word_embed_proj_dim=128, tie_word_embeddings=True),
    "tiny-qwen3": Qwen3Config(
        **TINY, intermediate_size=256, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True
    ),
    "tiny-llama": LlamaConfig(
        **TINY, intermediate_size=256, num_key_value_heads=2, tie_word_embeddings=False
    ),
    "odd-llama": LlamaConfig(  # no multiple of 16
        **TINY, intermediate_size=264, num_key_value_heads=2, tie_word_embeddings=False
    ),
    "opt-125m": OPTConfig(**IDS, tie_word_embeddings=True),  # the defaults are those of facebook/opt-125m
    "small-mixtral": MixtralConfig(**SMALL_MOE, intermediate_size=512, num_local_experts=8),
    "small-qwen3-moe": Qwen3MoeConfig(
        **SMALL_MOE, intermediate_size=1024, moe_intermediate_size=256, num_experts=8, head_dim=64
    ),
    "qwen3-30b-a3b": Qwen3MoeConfig(
        **QWEN3 | dict(num_key_value_heads=4),
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    ),
    **{
        f"qwen3-{name}": Qwen3Config(
            **QWEN3,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            tie_word_embeddings=tied,
        )
        for name, hidden, intermediate, layers, heads, tied in [
            ("0.6b", 1024, 3072, 28, 16, True),
            ("1.7b", 2048, 6144, 28, 16, True),
            ("4b", 2560, 9728, 36, 32, True),
            ("8b", 4096, 12288, 36, 32, False),
            ("14b", 5120, 17408, 40, 40, False),
        ]
    },
}


def tokenizer_of(vocab_size: int) -> PreTrainedTokenizerFast:
    """The tiny model's, with numbers in base 36 for the ids that are left (output only)."""
    used = TINY["vocab_size"]
    return byte_tokenizer([np.base_repr(i + 36**3, 36).lower() for i in range(used, vocab_size)])


def build_random_model(folder: str | Path, shape: str = "tiny-opt", seed: int = 0) -> str:
    """Write a random BF16 model of one of SHAPES in Hugging Face format to `folder`; returns the folder.

    No weight stays at 0 or 1 (biases, norms), so that a swapped or forgotten tensor shows.
    """
    set_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.no_grad():
        model = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.bfloat16)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1 if shape.startswith("tiny") else 0.01)
    model.save_pretrained(folder)
    tokenizer_of(model.config.vocab_size).save_pretrained(folder)
    return str(folder)


def write_config(folder: str | Path, shape: str) -> str:
    """Config and tokenizer alone, for engines with vLLM's `load_format="dummy"`; returns the folder."""
    config = copy.deepcopy(SHAPES[shape])
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.save_pretrained(folder)
    tokenizer_of(config.vocab_size).save_pretrained(folder)
    return str(folder)
