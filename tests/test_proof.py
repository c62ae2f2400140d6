"""What the proof and the comparison of the second sync must catch, with engines in this process."""

import copy
import shutil
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import SamplingParams
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.sampling_params import BeamSearchParams
from vllm.utils.network_utils import get_open_port

import rlhf_utils
from architectures import ARCHITECTURES, bring, build, send_one_by_one
from harness import driver, helper
from local import CONFIG, Local, local_actors, local_engine, local_pair, wait, worker
from rlhf_utils import Reached, ReloadSession, Replay, record_copies

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
            replay.steps[number][0][0].tensors[0][3][0] *= 2

    replay._quantize_and_copy = quantize_and_copy


@pytest.mark.parametrize(("falsify", "named"), [(drop_a_copy, ""), (double_a_scale, ".weight.scale")])
def test_a_falsified_replay_is_caught_and_sessions_serve(llama, monkeypatch, capsys, falsify, named):
    plain = Replay.__init__

    def init(self, *args):
        plain(self, *args)
        falsify(self)

    monkeypatch.setattr(Replay, "__init__", init)
    with local_pair(llama, CONFIG) as (trainer, engine):
        cold = helper.observe([engine], 60, helper.PROMPTS, 8)
        proof = helper.prove_sync(trainer, engine, max_tokens=8, **SETTINGS)
        assert proof["verified"] and proof["path"] == "session"
        assert (
            f"{named} on worker 0 (engine 0)" in proof["because"]
            and proof["because"].count("(engine 0)") == 1
        )
        assert (
            "Weight syncs are reload sessions, because after a replay these are not as they were"
            in capsys.readouterr().out
        )
        assert not helper.differences([engine], cold, 60)
        change(trainer)
        assert helper.sync_weights_to_quantized_engine(trainer, engine, **SETTINGS)["path"] == "session"
        assert helper.differences([engine], cold, 60), "other weights have come"


class Table:
    """What a kernel computes with."""

    def __init__(self, weight: torch.Tensor):
        self.values = weight.detach().clone()


class Derive(QuantizeMethodBase):
    """A quant method that makes a new kernel with a table whenever it loads, as vLLM does for experts."""

    kernel: Table | None = None

    def create_weights(self, *_, **__): ...

    def apply(self, *_, **__): ...

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.kernel = Table(layer.weight)


def derive(engine: Local, quant_method=None) -> tuple[torch.nn.Module, Table]:
    """The engine's last norm computes with a table made from its weight; returns it and the table."""
    norm = worker(engine.target).get_model().model.norm
    kernel = Table(norm.weight)
    if quant_method:
        norm.quant_method, quant_method.kernel = quant_method, kernel
    else:
        norm.kernel = kernel
    plain = norm.forward
    norm.forward = lambda x, residual=None: plain(
        x * kernel.values / norm.weight, residual * kernel.values / norm.weight
    )
    return norm, kernel


@pytest.mark.parametrize("sees_answers", [True, False])
def test_a_replay_that_leaves_derived_state_is_caught_at_the_start(llama, monkeypatch, sees_answers):
    """By its bytes alone; then sessions serve, and write to the table that was there."""
    if not sees_answers:
        monkeypatch.setattr(
            driver.RolloutLLM, "repeatable", property(lambda self: False, lambda self, _: None)
        )
    with local_pair(llama, CONFIG) as (trainer, engine):
        norm, kernel = derive(engine, Derive())
        proof = helper.prove_sync(trainer, engine, max_tokens=8, **SETTINGS)
        assert proof["path"] == "session" and proof["answers"] == 4 * sees_answers
        assert "model.norm.quant_method.kernel.values on worker 0" in proof["because"]
        for _ in range(2):
            change(trainer)
            assert helper.sync_weights_to_quantized_engine(trainer, engine, **SETTINGS)["path"] == "session"
            assert norm.quant_method.kernel is kernel and torch.equal(kernel.values, norm.weight)


def test_derived_state_that_nobody_makes_again_is_refused(llama):
    with local_pair(llama, CONFIG) as (trainer, engine):
        derive(engine)
        with pytest.raises(
            RuntimeError, match="this model cannot be synced: .*: model.norm.kernel.values on worker 0"
        ):
            helper.prove_sync(trainer, engine, max_tokens=8, **SETTINGS)


def test_a_replay_behind_a_session_that_made_new_objects_is_right(llama):
    """As with experts in FP8: the table's memory is what the replay writes to."""
    with local_pair(llama, CONFIG) as (trainer, engine):
        norm = worker(engine.target).get_model().model.norm
        norm.quant_method = Alias()
        norm.quant_method.process_weights_after_loading(norm)
        assert helper.prove_sync(trainer, engine, max_tokens=8, **SETTINGS)["path"] == "replay"
        kernel = norm.quant_method.kernel
        for mechanism in ("session", "replay", "update_weight", "replay"):
            change(trainer)
            bring(trainer, engine, mechanism, SETTINGS)
            assert norm.quant_method.kernel is kernel and kernel.values is norm.weight


class Alias(Derive):
    """... whose kernel has the layer's own tensor, until a reload exchanges it."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().process_weights_after_loading(layer)
        self.kernel.values = layer.weight


def test_what_others_have_moved_is_put_back(llama):
    """vLLM's own reload from disk, a tensor and memory that were exchanged: the next replay is right."""
    with local_pair(llama, CONFIG) as (trainer, engine):
        assert helper.prove_sync(trainer, engine, max_tokens=8, **SETTINGS)["path"] == "replay"
        cold, model = helper.observe([engine], 60), worker(engine.target).get_model()
        norm, head = model.model.norm, model.lm_head
        for move in (
            lambda: engine.target.collective_rpc("reload_weights"),
            lambda: setattr(
                norm, "weight", torch.nn.Parameter(norm.weight.detach().clone(), requires_grad=False)
            ),
            lambda: setattr(head.weight, "data", head.weight.data.clone()),
        ):
            where = norm.weight, norm.weight.data_ptr(), head.weight.data_ptr()
            move()
            engine.target.collective_rpc("reset_weights")
            assert helper.sync_weights_to_quantized_engine(trainer, engine, **SETTINGS)["path"] == "replay"
            assert not helper.differences([engine], cold, 60)
            assert (norm.weight, norm.weight.data_ptr(), head.weight.data_ptr()) == where


def test_a_tensor_of_another_form_is_refused(llama):
    """Replays and captured graphs refer to the old one."""
    with local_engine(llama, CONFIG) as llm:
        model = worker(llm).get_model()
        reached = Reached(model)
        assert "model.layers.1.mlp.down_proj.weight.qdata" in reached.parameters
        assert not any(
            "kv_cache" in name for name in Reached(model, worker(llm).model_runner.kv_caches).tensors
        )
        model.model.norm.weight = torch.nn.Parameter(torch.ones(3), requires_grad=False)
        with pytest.raises(RuntimeError, match="a reload leaves no model.norm.weight, or in another form"):
            reached.put_back(Reached(model))


def test_a_wrong_session_is_an_error_and_the_engine_stays_torn(llama, monkeypatch):
    def close(self, with_values: bool = True) -> None:
        plain(self, with_values)
        self.model.model.norm.weight.data[3] += 1

    def no_recording(session, _):
        session.close(with_values=False)
        raise rlhf_utils.CannotReplay("this test says so")

    plain = ReloadSession.close
    monkeypatch.setattr(ReloadSession, "close", close)
    monkeypatch.setattr(rlhf_utils, "record_copies", no_recording)
    with local_pair(llama, CONFIG) as (trainer, engine):
        with pytest.raises(
            RuntimeError,
            match=rf"this model cannot be synced: after a session .*: {NORM} on worker 0 \(engine 0",
        ):
            helper.prove_sync(trainer, engine, max_tokens=8, **SETTINGS)
        with pytest.raises(RuntimeError, match="refusing to generate"):
            wait([engine.answer.remote(["a"])], 60, "asking")
        with pytest.raises(RuntimeError, match="an engine has been updated: start it anew"):
            helper.prove_sync(trainer, engine, max_tokens=8, **SETTINGS)


def test_a_model_that_cannot_be_synced_ends_the_run_before_the_first_step(tmp_path, monkeypatch, capsys):
    """What vLLM's loader of GPT-OSS writes, a reload session loses."""
    experts = dict(num_local_experts=4, num_experts_per_tok=2, head_dim=64, intermediate_size=256)
    monkeypatch.setitem(ARCHITECTURES, "gpt-oss", ("GptOssConfig", experts))
    path = build(tmp_path / "model", "gpt-oss")
    settings = dict(model=path, tensor_parallel_size=1, steps=1, output_dir=tmp_path / "outputs")
    with local_actors(), pytest.raises(SystemExit) as end:
        driver.main(driver.Config(**settings))
    printed = capsys.readouterr().err
    assert end.value.code == 1 and "FAILED: this model cannot be synced" in printed
    assert "attn.sinks" in printed and not (tmp_path / "outputs" / "metrics.jsonl").read_text()


def test_a_hybrid_model_runs_without_a_gpu(tmp_path, monkeypatch):
    """vLLM would cut prompts to keep the states of its convolutions, which the program has switched off."""
    own = dict(layer_types=["conv", "full_attention"], conv_dim=256, conv_dim_out=256, block_dim=256)
    own |= dict(block_ff_dim=512, block_multiple_of=256, block_ffn_dim_multiplier=1.0)
    monkeypatch.setitem(ARCHITECTURES, "lfm-2", ("Lfm2Config", own | dict(block_auto_adjust_ff_dim=False)))
    settings = dict(model=build(tmp_path / "model", "lfm-2"), tensor_parallel_size=1, prompts_per_step=2)
    settings |= dict(max_tokens=8, learning_rate=1e-3, output_dir=tmp_path / "outputs")
    with local_actors():
        summary = driver.main(driver.Config(steps=2, **settings))
    assert summary["last_step"]["weights_version"] == 6 and summary["sync"]["verified"]


def test_other_functions_on_both_ends_are_warned_of_once(tmp_path, monkeypatch, capsys):
    """vLLM's RoPE of a part, on the CPU: within FP8's mismatch, and none of it is FP8's."""
    kind, settings = ARCHITECTURES["deepseek-v3"]
    monkeypatch.setitem(ARCHITECTURES, "dense", (kind, settings | dict(first_k_dense_replace=2)))
    flags = dict(model=build(tmp_path / "model", "dense"), tensor_parallel_size=1, prompts_per_step=4)
    flags |= dict(max_tokens=32, samples_per_prompt=4, learning_rate=0, output_dir=tmp_path / "outputs")
    with local_actors():
        sync = driver.main(driver.Config(steps=2, **flags))["sync"]
    assert 5e-3 < sync["mismatch_kl_without_fp8"] < sync["mismatch_kl_at_start"] < 5e-2
    assert capsys.readouterr().err.count("Warning: trainer and engine compute different functions") == 1


def test_a_scheme_that_the_trainer_cannot_compute_is_no_reason_to_fail(llama, tmp_path, capsys):
    """One warning; nothing is claimed."""
    flags = dict(tensor_parallel_size=1, max_tokens=2, prompts_per_step=1, output_dir=tmp_path / "outputs")
    with local_actors(), mock.patch.object(helper, "computing_as", None):
        sync = driver.main(driver.Config(model=str(llama), steps=1, **flags))["sync"]
    assert sync["verified"] and sync["mismatch_kl_at_start"] is sync["mismatch_kl_without_fp8"] is None
    assert "Warning: computing FP8 in the trainer fails, the run goes on: " in capsys.readouterr().err


def test_a_weight_that_the_trainer_does_not_send_is_missed_though_it_is_zero(llama, tmp_path):
    """Set to zero it is what it was, and so is every answer; from the first step on it would be stale."""
    path, bias = shutil.copytree(llama, tmp_path / "zero"), "model.layers.1.self_attn.o_proj.bias"
    weights = load_file(path / "model.safetensors")
    save_file(weights | {bias: torch.zeros_like(weights[bias])}, path / "model.safetensors", {"format": "pt"})
    with local_pair(str(path), CONFIG) as (trainer, engine):
        plain = trainer.target.weights
        trainer.target.weights = lambda: ((name, weight) for name, weight in plain() if name != bias)
        with pytest.raises(RuntimeError, match=f"cannot be synced: .* 1 parameters got no weight .*: {bias}"):
            helper.prove_sync(trainer, engine, max_tokens=8, **SETTINGS)


def test_a_loader_that_fails_is_heard_and_not_what_follows(llama):
    """vLLM loads once more, at the end of the session, what it has kept; the next complete set is right."""
    bad = "model.layers.0.self_attn.k_proj.weight"
    with local_pair(llama, CONFIG) as (trainer, engine):
        helper.prove_sync(trainer, engine, max_tokens=8, **SETTINGS)
        cold, plain = helper.observe([engine], 60), trainer.target.weights
        trainer.target.weights = lambda: ((name, w[1:] if name == bad else w) for name, w in plain())
        with pytest.raises(RuntimeError, match=rf"vLLM's loader failed at {bad} \[127, 256\]: "):
            send_one_by_one(trainer, engine)
        trainer.target.weights = plain
        send_one_by_one(trainer, engine)
        engine.target.collective_rpc("check_weights_changed")
        assert not helper.differences([engine], cold, 60)


def test_a_proof_that_gets_no_answer_leaves_no_other_weights_behind(llama, monkeypatch):
    with local_pair(llama, CONFIG) as (trainer, engine):
        plain, looks = helper.wait, []

        def silent(refs, timeout_s, doing, patience_s=0.0):
            results = plain(refs, timeout_s, doing, patience_s)
            looks.extend([doing] * doing.startswith("reading the engine's tensors"))
            if len(looks) == 3:  # at the start, then behind its own weights, then behind others
                raise TimeoutError("no answer")
            return results

        with monkeypatch.context() as once, pytest.raises(TimeoutError, match="no answer"):
            once.setattr(helper, "wait", silent)
            helper.prove_sync(trainer, engine, max_tokens=8, **SETTINGS)
        with pytest.raises(RuntimeError, match="refusing to generate"):
            plain([engine.answer.remote(["a"])], 60, "asking")


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
            reached = Reached(model)
            where = {name: tensor.data_ptr() for name, tensor in reached.tensors.items()}
            return {name: id(tensor) for name, tensor in live.items()}, where, reached.digests()

        def vandalize(weights) -> None:
            for layer in model.modules():
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
                    record_copies(own._open_session(), manifest)
                except rlhf_utils.CannotReplay as reason:
                    assert (
                        name == "falcon" and "computed" in str(reason) or "KeyError: 'enough'" in str(reason)
                    )
                else:
                    assert name != "falcon" and load_weights is not vandalize
                del model.load_weights
                assert state() == before


def test_experts_that_stay_in_bf16_are_named(tmp_path, capsys, monkeypatch):
    """torchao quantizes linear layers only; the program says so, and what does more."""
    monkeypatch.setattr(helper, "wait", wait)
    with local_engine(build(tmp_path, "qwen-3-moe"), CONFIG) as llm:
        [rank] = helper.prove_fp8([Local("engine", llm)])
    printed = capsys.readouterr().out
    experts = 2 * 2 * 4 * (2 * 128 * 256 + 256 * 128) / 2**30  # layers, bytes, experts
    assert 0 < rank["fp8_gib"] < rank["weights_gib"] - experts
    assert rank["not_fp8"].keys() == {"VocabParallelEmbedding", "ParallelLMHead", "RoutedExperts"}
    assert "not in FP8: RoutedExperts: model.layers.0.mlp.experts" in printed
    assert "--quantization fp8_per_channel" in printed


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
            lambda: llm.beam_search([{"prompt": "a"}], BeamSearchParams(2, 2)),
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


@pytest.mark.parametrize(
    ("name", "leave_out", "named"),
    [
        (
            "llama",
            "layers.0.self_attn.v_proj.weight",
            "qkv_proj.weight (without model.layers.0.self_attn.v_proj",
        ),
        ("llama", "layers.1.self_attn.k_proj.bias", "qkv_proj.bias (without model.layers.1.self_attn.k_proj"),
        (
            "llama",
            "layers.1.mlp.gate_proj.weight",
            "gate_up_proj.weight (without model.layers.1.mlp.gate_proj",
        ),
        ("llama", "model.norm.weight", "stale: model.norm.weight"),
        ("mixtral", "layers.1.block_sparse_moe.experts.2.w3.weight", "w13_weight (without all of its parts)"),
    ],
)
def test_an_update_without_one_weight_is_refused(tmp_path, name, leave_out, named):
    """One of several that vLLM fuses as well; all of them, afterwards, are an update."""
    with local_pair(build(tmp_path, name), CONFIG) as (trainer, engine):
        helper.prove_sync(trainer, engine, max_tokens=8, **SETTINGS)
        cold = helper.observe([engine], 60)
        send_one_by_one(trainer, engine, leave_out=leave_out)
        with pytest.raises(RuntimeError, match="[12] parameters got no weight and are") as error:
            engine.target.collective_rpc("check_weights_changed")
        assert named in str(error.value)
        with pytest.raises(RuntimeError, match="refusing to generate"):
            engine.target.answer()
        send_one_by_one(trainer, engine)
        engine.target.collective_rpc("check_weights_changed")
        assert not helper.differences([engine], cold, 60)


def test_an_update_with_a_weight_twice_is_refused(llama):
    with local_pair(llama, CONFIG) as (trainer, engine):
        with pytest.raises(
            RuntimeError, match=r"loader failed at model.norm.weight .*: it came twice in one"
        ):
            send_one_by_one(trainer, engine, twice=NORM)
        with pytest.raises(RuntimeError, match="an `update_weight` has failed: send all weights again"):
            engine.target.collective_rpc("check_weights_changed")


def test_an_update_whose_first_weight_did_not_come_is_refused(llama):
    """Behind a sync that failed, too, which nothing but a complete set of weights makes good."""
    with local_pair(llama, CONFIG) as (trainer, engine):
        helper.prove_sync(trainer, engine, max_tokens=8, **SETTINGS)
        engine.target.collective_rpc("zero_weights")
        group, worker(engine.target).weight_group = worker(engine.target).weight_group, None
        with pytest.raises(RuntimeError, match="this rank has joined no group"):
            engine.target.collective_rpc("update_weight", args=(NORM, "bfloat16", [256]))
        worker(engine.target).weight_group = group
        with pytest.raises(RuntimeError, match="an `update_weight` has failed: send all weights again"):
            engine.target.collective_rpc("check_weights_changed")
        with pytest.raises(RuntimeError, match="refusing to generate"):
            engine.target.answer(["a"])


def test_what_was_proved_by_sessions_stays_with_them(llama, monkeypatch):
    """Also when both ends agree anew, in a way in which replays would do."""

    def no_replay(session, _):
        session.close(with_values=False)
        raise rlhf_utils.CannotReplay("this test says so")

    with local_pair(llama, CONFIG) as (trainer, engine), monkeypatch.context() as once:
        once.setattr(rlhf_utils, "record_copies", no_replay)
        assert helper.prove_sync(trainer, engine, max_tokens=8, **SETTINGS)["path"] == "session"
        once.undo()
        sync = helper.sync_weights_to_quantized_engine(trainer, engine, bucket_bytes=2**20, timeout_s=60)
        assert sync["path"] == "session"


def test_a_group_knows_its_own_actors_alone(llama):
    """What has died before and was replaced is not what a sync waits for; what loads has a name."""
    with local_pair(llama, CONFIG) as (trainer, engine):
        plain, named = trainer.target.open_rendezvous, []
        trainer.target.open_rendezvous = lambda address: named.append(set(helper.ACTORS)) or plain(address)
        helper.ACTORS["engine (rank 7)"] = "dead"
        helper.join_group(trainer, engine, backend="gloo", timeout_s=60)
        assert [*named, set(helper.ACTORS)] == [{"trainer (rank 0)", "engine (rank 1)"}] * 2


def test_calls_in_another_order_are_right_or_refused_at_once(llama):
    """Sending before both agree; joining again without a rendezvous; weights that change behind a scan."""
    with local_pair(llama, CONFIG) as (trainer, engine):
        with pytest.raises(RuntimeError, match="no weights have been agreed on: call prepare_weights and"):
            trainer.target.send_weights()
        assert helper.prove_sync(trainer, engine, max_tokens=8, **SETTINGS)["path"] == "replay"
        cold = helper.observe([engine], 60)
        trainer.target.check_finite()
        norm = trainer.target.model.model.norm.weight
        kept = norm.detach().clone()
        with torch.no_grad():
            norm.mul_(torch.nan)
            with pytest.raises(RuntimeError, match=f"1 weights hold NaN or infinity .*: {NORM}"):
                helper.sync_weights_to_quantized_engine(trainer, engine, **SETTINGS)
            norm.copy_(kept)
        for holder, name in ((trainer.target.model.model, "norm"), (trainer.target, "model")):
            trainer.target.check_finite()
            there = getattr(holder, name)
            setattr(holder, name, other := copy.deepcopy(there))
            (other if name == "norm" else other.model.norm).weight.data[0] = torch.nan
            with pytest.raises(RuntimeError, match=f"1 weights hold NaN or infinity .*: {NORM}"):
                helper.sync_weights_to_quantized_engine(trainer, engine, **SETTINGS)
            setattr(holder, name, there)
        port = get_open_port()
        joining = helper.on_workers(
            [engine], "init_weight_update_group", "127.0.0.1", port, 1, 2, "gloo", 30.0
        )
        joining.append(trainer.init_weight_update_group.remote("127.0.0.1", port, 2, "gloo", 30.0))
        wait(joining, 60, "joining")
        with pytest.raises(RuntimeError, match="no weights have been agreed on: call prepare_weights and"):
            engine.target.collective_rpc("receive_weights")
        engine.target.collective_rpc("zero_weights", args=("stored",))
        assert helper.sync_weights_to_quantized_engine(trainer, engine, **SETTINGS)["path"] == "replay"
        assert not helper.differences([engine], cold, 60)


def test_an_error_while_generating_blocks_no_sync(llama, monkeypatch):
    """vLLM leaves the requests in its engine, and would refuse to reset the prefix cache for ever."""
    with local_pair(llama, CONFIG) as (trainer, engine):
        helper.prove_sync(trainer, engine, max_tokens=8, **SETTINGS)
        llm, steps = engine.target, []

        def step():
            steps.append(1)
            if len(steps) == 3:
                raise RuntimeError("an error of the engine's own")
            return plain()

        for ask in (
            lambda: llm.generate(helper.PROMPTS, SamplingParams(max_tokens=20), use_tqdm=False),
            lambda: llm.answer(["a", "b"], 20),
        ):
            steps.clear()
            plain = llm.llm_engine.step
            monkeypatch.setattr(llm.llm_engine, "step", step)
            with pytest.raises(RuntimeError, match="an error of the engine's own"):
                ask()
            monkeypatch.setattr(llm.llm_engine, "step", plain)
            assert not llm.llm_engine.has_unfinished_requests()
            change(trainer)
            assert helper.sync_weights_to_quantized_engine(trainer, engine, **SETTINGS)["path"] == "replay"
            assert llm.answer(["a"])[0]["text"]
