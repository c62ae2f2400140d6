"""The real thing on the CPU: vLLM engines, torchao's FP8, Ray actors, gloo."""

import contextlib
import dataclasses

import pytest
import ray
import torch
import transformers
from harness import (
    PROMPTS,
    Remote,
    driver,
    generate,
    observe,
    seed_demonstration,
    seed_group,
    seed_loop,
    sync,
    sync_versus_cold_start,
)
from rlhf_utils import BUCKET_BYTES, WeightSender, make_manifest
from vllm import SamplingParams

CPU = torch.device("cpu")


def rejoin(config, pair) -> None:
    """Put the trainer actor back in the group after a test was rank 0 itself."""
    driver.join_group(config, "cpu", pair.trainer, [pair.actor])


def compare(pair, model, group) -> list[dict]:
    """What `verify_weights` finds when this process sends a model."""
    manifest = make_manifest(model, torch.bfloat16)
    ray.get(pair.actor.collective_rpc.remote("agree_on_weights", args=(manifest,)))
    comparing = pair.actor.collective_rpc.remote("verify_weights")
    WeightSender(model, manifest, group, CPU, BUCKET_BYTES).send()
    return ray.get(comparing)


@pytest.mark.parametrize("shape", ["tiny-opt", "tiny-qwen3", "tiny-llama"])
@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_sync_equals_cold_start(config, models, tmp_path, shape, tensor_parallel_size):
    """Guards against stale, swapped, half-loaded or twice-rounded weights, and a tied head's packed old copy."""
    config = dataclasses.replace(
        config, tensor_parallel_size=tensor_parallel_size, bucket_mib=1, learning_rate=1e-2
    )
    if shape == "tiny-llama":  # options that these cases may as well have
        option = {"kv_cache_dtype": "fp8"} if tensor_parallel_size == 1 else {"quantize_head": True}
        config = dataclasses.replace(config, **option)
    result = sync_versus_cold_start(config, models(shape)[0], str(tmp_path), "cpu", more_syncs=1)
    assert (
        result["sync"]["compared_tensors"] == result["tensors"]
    )  # --verify looked at every tensor of every rank
    assert [result[which]["path"] for which in ("sync", "again", "session")] == [
        "replay",
        "replay",
        "session",
    ]
    assert result["sync"]["weights_version"] == 1 and result["again"]["weights_version"] == 2
    assert [rank["fp8_linear_layers"] for rank in result["ranks"]] == [
        8 + config.quantize_head
    ] * tensor_parallel_size


def test_unquantized_sync_equals_cold_start(config, models, tmp_path, capfd):
    """The BF16 control. On the CPU vLLM hides its linear weights in packed copies, so only outputs can tell."""
    config = dataclasses.replace(config, tensor_parallel_size=1, quantization="none", learning_rate=1e-2)
    result = sync_versus_cold_start(config, models("tiny-qwen3")[0], str(tmp_path), "cpu")
    assert result["ranks"][0]["fp8_linear_layers"] == 0 and len(result["sync"]["hidden_tensors"]) == 8
    assert result["sync"]["path"] == "session"
    assert "syncs are reload sessions, because vLLM's CPU backend has packed" in capfd.readouterr().out


def test_recording_is_made_anew_when_it_no_longer_fits(config, models, capfd):
    """New parameters in the trainer, tensors that moved in the engine, another size of buckets; and when it must not be."""
    config, (old, new) = (
        dataclasses.replace(config, tensor_parallel_size=1, verify=False),
        models("tiny-llama"),
    )

    def replace_a_weight(trainer):
        head = trainer.model.lm_head
        head.weight = torch.nn.Parameter(head.weight.detach().clone())

    def move_a_tensor(llm):
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        norm = worker.get_model().model.norm
        norm.weight.data = norm.weight.data.clone()

    def derive_in_attention(llm, sinks: bool):
        """As FlashInfer's attention, which makes something of its own of sinks, if the model has any."""
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        impl = worker.get_model().model.layers[0].self_attn.attn.impl
        hook = {"process_weights_after_loading": lambda self, dtype: None}
        impl.__class__ = type("Derives", (type(impl),), hook)
        impl._sinks_source = torch.ones(4) if sinks else None

    def derive_in_a_method(llm):
        """As a quantization method that makes something of its own of the loaded weight."""
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        worker.get_model().model.norm.quant_method = object()

    with contextlib.ExitStack() as cleanup:
        trainer = driver.start_trainer(config, new, cleanup)
        actor = driver.start_engine(config, old, "cpu", cleanup)
        driver.join_group(config, "cpu", trainer, [actor])
        llm = Remote(actor)

        def sync_twice(agreements: int, **settings) -> dict:
            """Replays of what was recorded for these weights and tensors; all bytes were zero before."""
            llm.collective_rpc("reset_weights")
            assert [sync(config, trainer, actor, **settings)["path"] for _ in range(2)] == [
                "replay",
                "replay",
            ]
            assert capfd.readouterr().out.count("Agreed on 21 weights") == agreements
            return observe(llm)

        expected = sync_twice(1)
        ray.get(trainer.__ray_call__.remote(replace_a_weight))
        assert sync_twice(1) == expected
        ray.get(actor.__ray_call__.remote(move_a_tensor))
        assert sync_twice(0) == expected
        assert sync_twice(1, bucket_bytes=100_000) == expected
        ray.get(actor.__ray_call__.remote(derive_in_attention, False))
        assert sync_twice(1) == expected
        for number, (derive, name) in enumerate(
            [
                ((derive_in_attention, True), "model.layers.0.self_attn.attn"),
                ((derive_in_a_method,), "model.norm"),
            ]
        ):
            ray.get(actor.__ray_call__.remote(*derive))
            assert sync(config, trainer, actor, bucket_bytes=10**6 + number)["path"] == "session"
            assert (
                f"because vLLM derives more than FP8 rows from the weights of {name}"
                in capfd.readouterr().out
            )
            assert observe(llm) == expected
            ray.get(actor.__ray_call__.remote(derive_in_attention, False))


def test_answers_read_as_vllm_decodes_them(pair):
    """Decoded at their end, all of them; letters and spaces only, because vLLM drops half a character at the end."""
    letters = pair.llm.get_tokenizer()("abc xyz.").input_ids
    same = dict(max_tokens=12, seed=0, n=3, allowed_token_ids=letters)
    answers = [
        [
            answer.text
            for output in pair.llm.generate(PROMPTS, params, use_tqdm=False)
            for answer in output.outputs
        ]
        for params in (SamplingParams(**same), SamplingParams(**same | driver.ROLLOUT))
    ]
    assert (
        answers[0] == answers[1] and len(set(answers[0])) > 6 and all(len(text) == 12 for text in answers[0])
    )


def test_prefix_cache_is_reset(config, pair):
    """The same prompt before and after: old keys and values would answer for the new weights."""
    params = SamplingParams(temperature=0, max_tokens=1)

    def cached() -> int:
        return pair.llm.generate([PROMPTS[-1]], params, use_tqdm=False)[0].num_cached_tokens

    cached()
    assert cached() > 0, "the test needs a prompt that the cache can serve"
    sync(config, pair.trainer, pair.actor)
    assert cached() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_seed_loop(config, pair, dtype):
    """The seed's calls, verbatim in shape, from a trainer of each dtype: non-zero, zero, and each twice in a row."""
    sync(config, pair.trainer, pair.actor)
    group = seed_group(pair.llm, 2, CPU)
    model = transformers.AutoModelForCausalLM.from_pretrained(pair.old, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    assert all(seed_loop(pair.llm, model, group)), "new weights change every rank"
    first = observe(pair.llm)
    assert not any(seed_loop(pair.llm, model, group)) and observe(pair.llm) == first

    assert compare(pair, model, group) == [{"compared": 36, "different": [], "hidden": []}] * 2

    shown = seed_demonstration(pair.llm, group, pair.old, CPU, dtype)
    assert shown["not_zero"] == [] and shown["zero_scales"] == []
    vocabulary = model.config.vocab_size
    assert shown["logprobs"] == pytest.approx([-torch.tensor(float(vocabulary)).log().item()]), (
        "finite and uniform"
    )
    rejoin(config, pair)


def test_verify_sees_one_wrong_byte(config, pair):
    """A comparison that cannot fail proves nothing: the sender's weights are not the engine's here."""
    sync(config, pair.trainer, pair.actor)
    group = seed_group(pair.llm, 2, CPU)
    model = transformers.AutoModelForCausalLM.from_pretrained(pair.new, dtype=torch.float32)
    with torch.no_grad():
        model.model.decoder.layers[1].self_attn.v_proj.weight[-1, -1] += (
            10  # the last row of rank 1's fused q, k, v
        )
    rank0, rank1 = compare(pair, model, group)
    name = "model.decoder.layers.1.self_attn.qkv_proj.weight"
    assert rank0["different"] == [] and rank1["different"] == [f"{name} qdata", f"{name} scale"]
    rejoin(config, pair)


def test_wrong_manifest_is_refused_before_a_byte_moves(config, pair):
    """Every mistake in one message, and the engine goes on with what it has."""
    sync(config, pair.trainer, pair.actor)
    before = observe(pair.llm)
    manifest = ray.get(pair.trainer.weight_manifest.remote())
    (first, *_), *rest = manifest
    wrong = [[first, "int64", [3, 3]], *rest[:-1], rest[0], ["model.lora", "bfloat16", [1]]]
    with pytest.raises(RuntimeError) as error:
        ray.get(pair.actor.collective_rpc.remote("agree_on_weights", args=(wrong,)))
    for line in (
        f"misshapen: {first} is [3, 3], the engine's model has [259, 128]",
        f"dtype: {first} is 'int64', expected a float type",
        f"duplicate: {rest[0][0]}",
        "unexpected: model.lora [1]",
        f"missing: {rest[-1][0]}",
    ):
        assert line in str(error.value)
    assert observe(pair.llm) == before


def test_engine_refuses_to_generate_while_torn(config, pair):
    """Half an update is no version: refused until a complete sync, which then is right."""
    sync(config, pair.trainer, pair.actor)
    before = observe(pair.llm)
    version = pair.llm.get_weights_version()
    group = seed_group(pair.llm, 2, CPU)
    weight = torch.randn(128)
    updating = pair.actor.collective_rpc.remote(
        "update_weight", args=("model.decoder.final_layer_norm.weight", "float32", [128])
    )
    group.broadcast(weight, src=0)
    ray.get(updating)
    with pytest.raises(RuntimeError, match="refusing to generate"):
        generate(pair.llm)
    with pytest.raises(RuntimeError, match="missing: model.decoder.embed_tokens.weight"):
        pair.llm.collective_rpc("check_weights_changed")
    with pytest.raises(RuntimeError, match="refusing to generate"):
        generate(pair.llm)
    rejoin(config, pair)
    result = sync(config, pair.trainer, pair.actor)
    assert result["weights_version"] == version + 1 and observe(pair.llm) == before


def test_no_fp8_layer_is_an_error(config, models, tmp_path):
    """The commonest silent failure: a torchao config that quantizes nothing."""
    from torchao.core.config import config_to_dict
    from torchao.quantization import ModuleFqnToConfig

    file = tmp_path / "nothing.json"
    file.write_text(driver.json.dumps(config_to_dict(ModuleFqnToConfig({"_default": None}))))
    config = dataclasses.replace(config, tensor_parallel_size=1, quantization=str(file))
    with driver.contextlib.ExitStack() as cleanup:
        actor = driver.start_engine(config, models("tiny-opt")[0], "cpu", cleanup)
        Remote(actor).get_weights_version()
        with pytest.raises(SystemExit, match="had no effect: an engine rank has no Float8Tensor layer"):
            driver.prove_fp8([actor], config)
