"""What the proof and the comparison of the second sync must catch, with engines in this process."""

import json
import subprocess
import sys

import pytest
import torch
from vllm import SamplingParams
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

import rlhf_utils
from architectures import ARCHITECTURES, build
from harness import HERE, driver
from local import CONFIG, Local, local_actors, local_engine, local_pair, wait, worker
from rlhf_utils import ReloadSession, Replay, digests_of, record_copies

SETTINGS = dict(bucket_bytes=100_000, timeout_s=60)
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return build(tmp_path_factory.mktemp("llama"), "llama")


def change(trainer) -> None:
    with torch.no_grad():
        for parameter in trainer.target.model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)


def drop_a_copy(replay: Replay) -> None:
    """As if a loader's copy had not been seen."""
    number = next(number for number, (_, plain) in enumerate(replay.steps) if plain and len(plain[0]) > 1)
    rows, (targets, sources) = replay.steps[number]
    replay.steps[number] = (rows, (targets[1:], sources[1:]))


def double_a_scale(replay: Replay) -> None:
    """As if another rounding had been used."""
    plain, first = (
        replay._quantize_and_copy,
        next(number for number, (rows, _) in enumerate(replay.steps) if rows),
    )

    def quantize_and_copy(number: int) -> None:
        plain(number)
        if number == first:
            replay.steps[number][0][0].rows[0].scale[0] *= 2

    replay._quantize_and_copy = quantize_and_copy


@pytest.mark.parametrize(("falsify", "named"), [(drop_a_copy, ""), (double_a_scale, ".weight.scale")])
def test_a_falsified_replay_is_caught_and_sessions_serve(llama, monkeypatch, capsys, falsify, named):
    plain = Replay.__init__

    def init(self, *args):
        plain(self, *args)
        falsify(self)

    monkeypatch.setattr(Replay, "__init__", init)
    with local_pair(llama, CONFIG) as (trainer, engine):
        cold = driver.observe([engine], 60, driver.PROMPTS, 8)
        proof = driver.prove_sync(trainer, engine, max_tokens=8, **SETTINGS)
        assert proof["verified"] and proof["path"] == "session"
        assert (
            f"{named} on worker 0 (engine 0)" in proof["because"]
            and proof["because"].count("(engine 0)") == 1
        )
        assert (
            "Weight syncs are reload sessions, because after a replay these are not as they were"
            in capsys.readouterr().out
        )
        assert not driver.differences([engine], cold, 60)
        change(trainer)
        assert driver.sync_weights_to_quantized_engine(trainer, engine, **SETTINGS)["path"] == "session"
        assert driver.differences([engine], cold, 60), "other weights have come"


class Derive(QuantizeMethodBase):
    """Keeps a function of the loaded weight elsewhere, as vLLM does for MLA; it computes with that."""

    def create_weights(self, *_, **__): ...

    def apply(self, *_, **__): ...

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        layer.derived = layer.weight.detach().clone()


def test_a_replay_that_leaves_derived_state_is_caught_at_the_second_sync(llama, tmp_path, capsys):
    with local_pair(llama, CONFIG) as (trainer, engine):
        norm = worker(engine.target).get_model().model.norm
        norm.quant_method, plain = Derive(), norm.forward
        norm.quant_method.process_weights_after_loading(norm)
        norm.forward = lambda x, residual=None: plain(
            x * norm.derived / norm.weight, residual * norm.derived / norm.weight
        )
        assert driver.prove_sync(trainer, engine, max_tokens=8, **SETTINGS)["path"] == "replay", (
            "the weights are the same"
        )
        change(trainer)
        sync = driver.sync_weights_to_quantized_engine(trainer, engine, **SETTINGS)
        assert sync["compared"] and sync["path"] == "session"
        assert (
            "a replay and a session of the same new weights differ in the answer to"
            in capsys.readouterr().out
        )
        assert torch.equal(norm.derived, norm.weight)
        change(trainer)
        sync = driver.sync_weights_to_quantized_engine(trainer, engine, **SETTINGS)
        assert not sync["compared"] and sync["path"] == "session" and torch.equal(norm.derived, norm.weight)


def test_a_wrong_session_is_an_error_and_the_engine_stays_torn(llama, monkeypatch):
    def close(self) -> None:
        plain(self)
        self.model.model.norm.weight.data[3] += 1

    def no_recording(*_):
        raise rlhf_utils.CannotReplay("this test says so")

    plain = ReloadSession.close
    monkeypatch.setattr(ReloadSession, "close", close)
    monkeypatch.setattr(rlhf_utils, "record_copies", no_recording)
    with local_pair(llama, CONFIG) as (trainer, engine):
        with pytest.raises(
            RuntimeError,
            match=rf"this model cannot be synced: after a reload session .*: {NORM} on worker 0 \(engine 0",
        ):
            driver.prove_sync(trainer, engine, max_tokens=8, **SETTINGS)
        with pytest.raises(RuntimeError, match="refusing to generate"):
            engine.target.answer(["a"])
        with pytest.raises(RuntimeError, match="an engine has been updated: start it anew"):
            driver.prove_sync(trainer, engine, max_tokens=8, **SETTINGS)


def test_a_model_that_cannot_be_synced_ends_the_run_before_the_first_step(tmp_path, monkeypatch, capsys):
    """What vLLM's loader of GPT-OSS writes, a reload session loses."""
    experts = dict(num_local_experts=4, num_experts_per_tok=2, head_dim=64, intermediate_size=256)
    monkeypatch.setitem(ARCHITECTURES, "gpt-oss", ("GptOssConfig", experts))
    path = build(tmp_path / "model", "gpt-oss")
    settings = dict(model=path, tensor_parallel_size=1, steps=1, output_dir=tmp_path / "outputs")
    with local_actors(), pytest.raises(SystemExit) as end:
        driver.main(driver.Config(**settings))
    printed = capsys.readouterr().err
    assert end.value.code == 1 and f"FAILED: {path}: this model cannot be synced" in printed
    assert "attn.sinks" in printed and not (tmp_path / "outputs" / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", ["falcon", "phi-2", "gemma-3"])
def test_recording_leaves_the_model_as_it_was(tmp_path, name):
    """Loaders that concatenate, that register a parameter, that only copy; and one that does all it should
    not.
    """
    with local_pair(build(tmp_path, name), CONFIG) as (trainer, engine):
        own = worker(engine.target)
        model, manifest = (
            own.get_model(),
            [[n, str(w.dtype)[6:], list(w.shape)] for n, w in trainer.target.weights()],
        )

        def state() -> tuple:
            live = rlhf_utils.named_tensors(model)
            where = {
                key: (id(t), [p.data_ptr() for p in rlhf_utils.plain_tensors(key, t).values()])
                for key, t in live.items()
            }
            return list(live), where, digests_of(model), [list(vars(layer)) for layer in model.modules()]

        def vandalize(weights) -> None:
            for layer in model.modules():
                layer.visited = True
                for parameter in layer.parameters(recurse=False):
                    parameter.data.fill_(7)
            first = next(iter(model.children()))
            first.register_parameter("more", torch.nn.Parameter(torch.zeros(2)))
            list(weights)
            raise KeyError("enough")

        before = state()
        with set_current_vllm_config(own.vllm_config):
            for load_weights in (model.load_weights, vandalize):
                model.load_weights = load_weights
                try:
                    record_copies(model, manifest)
                except rlhf_utils.CannotReplay as reason:
                    assert (
                        name == "falcon" and "computed" in str(reason) or "KeyError: 'enough'" in str(reason)
                    )
                else:
                    assert name != "falcon" and load_weights is not vandalize
                del model.load_weights
                assert state() == before


def test_experts_that_stay_in_bf16_are_counted_apart(tmp_path, capsys, monkeypatch):
    """torchao quantizes linear layers only; the program says so, and what does more."""
    monkeypatch.setattr(driver, "wait", wait)
    with local_engine(build(tmp_path, "qwen-3-moe"), CONFIG) as llm:
        [rank] = driver.prove_fp8([Local("engine", llm)], CONFIG)
    printed = capsys.readouterr().out
    assert rank["experts_gib"] * 2**30 == 2 * 2 * 4 * (2 * 128 * 256 + 256 * 128)  # layers, bytes, experts
    assert rank["experts_fp8_gib"] == 0 < rank["fp8_gib"] < rank["weights_gib"] - rank["experts_gib"]
    assert rank["not_fp8"].keys() == {"embeddings and heads", "routed experts"}
    assert "(of experts 0.0000 of 0.0015)" in printed and "--quantization fp8_per_channel" in printed


def test_a_torn_engine_refuses_every_way_to_ask(llama):
    with local_engine(llama, CONFIG) as llm:
        params = SamplingParams(max_tokens=2)
        llm.enqueue(["before"], params)
        llm.collective_rpc("reset_weights")
        for ask in (
            lambda: llm.generate(["a"], params, use_tqdm=False),
            lambda: llm.chat(
                [{"role": "user", "content": "a"}], params, chat_template="{{ messages[0].content }}"
            ),
            lambda: llm.enqueue(["a"], params),
            lambda: llm.beam_search([{"prompt": "a"}], driver.vllm.sampling_params.BeamSearchParams(2, 2)),
            lambda: llm.wait_for_completion(use_tqdm=False),
            lambda: llm.answer(["a"]),
        ):
            with pytest.raises(
                RuntimeError, match="refusing to generate: the weight update after version 0 has not"
            ):
                ask()
        assert llm.collective_rpc("check_weights_changed") == [True]
        with pytest.raises(RuntimeError, match="refusing to generate"):
            llm.generate(["a"], params, use_tqdm=False)


def test_importing_patches_nothing():
    """And vLLM is not imported; the worker's one function patches torchao, once."""
    code = """
import json, sys, torch
from torchao.quantization import Float8Tensor
from torchao.quantization.quantize_.workflows.float8 import float8_tensor
def state():
    table = Float8Tensor._ATEN_OP_TABLE[Float8Tensor]
    return [id(float8_tensor.addmm_float8_unwrapped_inference), len(table)]
before = state()
import rlhf_utils
imported = state(), "vllm" in sys.modules
rlhf_utils.patch_libraries()
print(json.dumps([before == imported[0], imported[1], before == state()]))
"""
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE.parent, capture_output=True, text=True, check=True
    )
    assert json.loads(printed.stdout.splitlines()[-1]) == [True, False, False]
