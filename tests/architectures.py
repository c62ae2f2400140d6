"""The sync of many architectures: one process that starts engines one after another, without a start of
Python for each.

    python tests/architectures.py 1 opt falcon opt@fp8_per_channel@eager    # TP, NAME[@scheme[@eager]]

A tiny random model is written, trainer and engine start from it, and the sync is proved. Then other weights
and those of the start come in turn, twice each, each time by another mechanism; each time the engine is
compared with a fresh one from the others' checkpoint, or with what it was. Trainers and engines are those of
local.py. Prints JSON."""

import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, set_seed

from harness import DEVICE, driver, helper
from local import CONFIG, Local, local_engine, local_pair
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
    "gpt-neox": ("GPTNeoXConfig", dict(num_key_value_heads=4)),  # it has no groups
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
    "olmoe": ("OlmoeConfig", dict(num_experts=4, num_experts_per_tok=2, intermediate_size=128)),
    "granite-moe": (
        "GraniteMoeConfig",
        dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=128),
    ),
    "deepseek-v3": (  # MLA, with the head sizes that vLLM's kernels have
        "DeepseekV3Config",
        MOE
        | dict(
            q_lora_rank=64,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            num_key_value_heads=4,
            first_k_dense_replace=1,
            topk_method="noaux_tc",
            n_routed_experts=4,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
        ),
    ),
    "qwen-3-moe": ("Qwen3MoeConfig", MOE | dict(num_experts=4, head_dim=64)),
    "mamba-2": ("Mamba2Config", dict(num_heads=8, head_dim=64, state_size=16, n_groups=2, chunk_size=16)),
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


# A session takes a replay's place where none serves.
MECHANISMS = ["replay", "session", "update_weight", "replay"]


def bring(trainer: Local, engine: Local, mechanism: str, settings: dict) -> str:
    """The trainer's weights, by one mechanism; returns the path that they took."""
    if mechanism == "update_weight":
        send_one_by_one(trainer, engine)
        assert all(engine.target.collective_rpc("check_weights_changed"))
        return "session"
    helper.find_agreement([trainer], [engine], settings["bucket_bytes"], settings["timeout_s"])
    by_session = mechanism == "session"
    return helper.bring_weights([trainer], [engine], settings["timeout_s"], by_session=by_session)["path"]


def send_one_by_one(
    trainer: Local, engine: Local, leave_out: str = "nothing", twice: str = "nothing"
) -> None:
    """Weights as `update_weight` takes them; all, but for those whose names end so."""
    for name, weight in [*trainer.target.weights()]:
        weight = weight.detach().contiguous()
        described = (name, str(weight.dtype).removeprefix("torch."), list(weight.shape))
        for _ in range(0 if name.endswith(leave_out) else 2 if name.endswith(twice) else 1):
            updating = engine.collective_rpc.remote("update_weight", args=described)
            trainer.target.group.broadcast(weight, src=0)
            updating.result()


def mismatch(trainer: driver.Trainer, engine, answers: list[dict]) -> list[float]:
    """KL of the engine's answers, and what FP8 does not explain."""
    encode = engine.get_tokenizer()
    asked = [encode(each["prompt"]).input_ids for each in answers]
    pairs = zip(asked, answers, strict=True)
    rollouts = [driver.Rollout(ids, each["token_ids"], each["logprobs"]) for ids, each in pairs]
    return [*trainer.score(rollouts, engine.collective_rpc("inspect_weights")[0]["names"])[:2]]


def follow(name: str, tensor_parallel_size: int, folder: str, **more) -> dict:
    """Prove one architecture; then bring it other weights and its own in turn, each time by another
    mechanism, and compare all that it reaches and says with a fresh engine of the others, or with what it was
    at the start. What was found.
    """
    _, scheme, mode = [*name.split("@"), "", ""][:3]
    config = dataclasses.replace(CONFIG, tensor_parallel_size=tensor_parallel_size)
    config.quantization = scheme or config.quantization
    more |= {"enforce_eager": True} if mode == "eager" else {}
    old = build(f"{folder}/old", name)
    settings = dict(bucket_bytes=100_000, timeout_s=60)
    slow = scheme and DEVICE == "cpu"  # vLLM's product is
    asked = (["a"], 2) if slow else (helper.PROMPTS, 4 if DEVICE == "cpu" else 8)
    found, observed = {"paths": []}, []
    with local_pair(old, config, **more) as (trainer, engine):
        proof = helper.prove_sync(trainer, engine, *asked, **settings)
        found["kl"] = mismatch(trainer.target, engine.target, proof["before"])
        cold, model = engine.target.observe(), trainer.target.model  # as it was loaded, says the proof
        parameters = [parameter.detach() for parameter in model.parameters()]
        own = [parameter.clone() for parameter in parameters]
        others = [parameter + 0.01 * torch.randn_like(parameter) for parameter in parameters]
        for step, mechanism in enumerate(MECHANISMS):
            torch._foreach_copy_(parameters, own if step % 2 else others)
            found["paths"].append(bring(trainer, engine, mechanism, settings))
            observed.append(engine.target.observe())
            if step == 0:
                model.save_pretrained(f"{folder}/others")
                tokenizer_of(model.config.vocab_size).save_pretrained(f"{folder}/others")
        in_file = load_file(f"{folder}/others/model.safetensors").items()
        travels = {name: (list(t.shape), t.dtype) for name, t in trainer.target.weights()}
        found["as_in_file"] = travels == {name: (list(t.shape), t.dtype) for name, t in in_file}
        found["buckets"] = len(trainer.target.buckets.buckets)
    found["proof"] = {key: value for key, value in proof.items() if key != "before"}
    names = observed[-1]["digests"]
    found["fp8"] = sum("weight_scale on " in name or ".qdata on " in name for name in names)
    found["repeatable"] = observed[-1]["repeatable"]
    found["wrong"] = []
    shutil.rmtree(old)
    shutil.move(f"{folder}/others", old)  # one path, for which vLLM compiles once
    with local_engine(old, config, **more) as llm:
        fresh = {"answers": llm.answer(*asked), "digests": llm.digests()}
    for step, seen in enumerate(observed):
        expected = cold if step % 2 else fresh
        wrong = [key for key, value in seen["digests"].items() if expected["digests"].get(key) != value]
        if seen["repeatable"]:
            pairs = zip(expected["answers"], seen["answers"])
            wrong += [was["prompt"] for was, now in pairs if now != was]
        found["wrong"] += [f"{what} after {step + 1}, {MECHANISMS[step]}" for what in wrong]
    return found


def follow_all(tensor_parallel_size: int, names: list[str]) -> Iterator[tuple[str, dict]]:
    """Each with what was found, or an error."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            try:
                yield name, follow(name, tensor_parallel_size, folder)
            except Exception as error:
                yield name, {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    for found in follow_all(int(sys.argv[1]), sys.argv[2:] or list(ARCHITECTURES)):
        print("FOUND " + json.dumps(dict([found])), flush=True)
