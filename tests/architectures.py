"""The sync of many architectures: one process that starts engines one after another, without a start of
Python for each.

    python tests/architectures.py 1 opt falcon opt@fp8_per_channel    # TP, names of ARCHITECTURES [@scheme]

A tiny random model is written, trainer and engine start from it, the sync is proved, the weights change, and
the engine follows; for names in FRESH it is then compared with a fresh engine from the saved checkpoint.
Trainers and engines are those of local.py. Prints JSON."""

import dataclasses
import json
import sys
import tempfile

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, set_seed

from harness import driver
from local import CONFIG, local_engine, local_pair
from random_models import tokenizer_of

SMALL = dict(
    vocab_size=320,
    hidden_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=512,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MOE = dict(num_experts_per_tok=2, moe_intermediate_size=128)
# Name -> class of the config, what differs from SMALL.
ARCHITECTURES = {
    "opt": ("OPTConfig", dict(ffn_dim=512, word_embed_proj_dim=256)),
    "gpt2": ("GPT2Config", dict(n_embd=256, n_layer=2, n_head=4, n_positions=512)),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "bloom": ("BloomConfig", dict(n_layer=2, n_head=4)),
    "falcon": ("FalconConfig", dict(new_decoder_architecture=True, num_kv_heads=2, alibi=False, bias=False)),
    "phi-2": ("PhiConfig", {}),
    "phi-3": ("Phi3Config", {}),
    "starcoder2": ("Starcoder2Config", {}),
    "olmo-2": ("Olmo2Config", {}),
    "cohere": ("CohereConfig", {}),
    "gemma-2": ("Gemma2Config", dict(head_dim=64, query_pre_attn_scalar=64, sliding_window=128)),
    "gemma-3": ("Gemma3TextConfig", dict(head_dim=64, query_pre_attn_scalar=64, sliding_window=128)),
    "granite": ("GraniteConfig", {}),
    "mistral": ("MistralConfig", {}),
    "qwen-2": ("Qwen2Config", {}),
    "qwen-3": ("Qwen3Config", dict(head_dim=64, tie_word_embeddings=True)),
    "llama": ("LlamaConfig", dict(attention_bias=True, mlp_bias=True)),
    "llama-321": ("LlamaConfig", dict(vocab_size=321)),
    "mixtral": ("MixtralConfig", dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen-2-moe": ("Qwen2MoeConfig", MOE | dict(num_experts=4, shared_expert_intermediate_size=256)),
    "glm-4-moe": (  # vLLM keeps its router in FP32
        "Glm4MoeConfig",
        MOE
        | dict(
            n_routed_experts=4,
            n_shared_experts=1,
            head_dim=64,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
        ),
    ),
    "qwen-3-moe": ("Qwen3MoeConfig", MOE | dict(num_experts=4, head_dim=64)),
    "mamba-2": ("Mamba2Config", dict(num_heads=8, head_dim=64, state_size=16, n_groups=2, chunk_size=16)),
}

# One of each kind: a replay; sessions because of a transposed and a computed weight; a head with a bias;
# vLLM's Transformers backend; experts; a convolution.
FRESH = {
    "opt",
    "gpt2",
    "falcon",
    "phi-2",
    "mamba-2",
    "qwen-3-moe",
    "mixtral",
    "gemma-3",
    "opt@fp8_per_channel",
    "glm-4-moe",
}


def build(folder, name: str, seed: int = 0, dtype=torch.bfloat16) -> str:
    """Write a random model of one of ARCHITECTURES and a byte-level tokenizer; returns the folder."""
    class_name, differs = ARCHITECTURES[name.partition("@")[0]]
    config = getattr(transformers, class_name)(**SMALL | differs)
    set_seed(seed)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder)
    tokenizer_of(config.vocab_size).save_pretrained(folder)
    return str(folder)


def follow(name: str, tensor_parallel_size: int, folder: str) -> dict:
    """Prove one architecture, change its weights, sync; what was found."""
    scheme = name.partition("@")[2]
    config = dataclasses.replace(CONFIG, tensor_parallel_size=tensor_parallel_size)
    config.quantization = scheme or config.quantization
    old, new = build(f"{folder}/old", name), f"{folder}/new"
    settings = dict(bucket_bytes=100_000, timeout_s=60)
    asked = (["a"], 2) if scheme else (driver.PROMPTS, 8)  # the CPU's product for vLLM's schemes is slow
    with local_pair(old, config) as (trainer, engine):
        proof = driver.prove_sync(trainer, engine, *asked, **settings)
        with torch.no_grad():
            for parameter in trainer.target.model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
        sync = driver.sync_weights_to_quantized_engine(trainer, engine, **settings)
        trainer.target.save_pretrained(new)
        in_file = {
            name: (list(t.shape), str(t.dtype)) for name, t in load_file(f"{new}/model.safetensors").items()
        }
        travels = {name: (list(t.shape), str(t.dtype)) for name, t in trainer.target.weights()}
        [synced] = driver.observe([engine], 60)
    found = {
        "proof": {key: proof[key] for key in ("verified", "path", "because", "tensors", "answers")},
        "path": sync["path"],
        "compared": sync["compared"],
        "buckets": sync["sender"]["buckets"],
        "as_in_file": travels == in_file,
        "fp8": sum("weight_scale on " in name or ".qdata on " in name for name in synced["digests"]),
    }
    if name in FRESH:
        with local_engine(new, config) as llm:
            llm.collective_rpc("inspect_weights")
            answers = llm.answer(*asked)
            found["fresh"] = llm.digests() == synced["digests"] and answers == synced["answers"]
    return found


def main(tensor_parallel_size: int, names: list[str]) -> None:
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = follow(name, tensor_parallel_size, folder)
            except Exception as error:
                found = {"error": f"{type(error).__name__}: {error}"}
        print("FOUND " + json.dumps({name: found}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:] or list(ARCHITECTURES))
