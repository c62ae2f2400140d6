"""vLLM's own weight transfer with the helper's backend, on the CPU: what vLLM's sender would broadcast."""

import concurrent.futures
import dataclasses
import itertools
import weakref
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.packed_tensor import pack_tensors

from architectures import build
from harness import helper
from local import CONFIG, local_engine, worker

CONFIGURED = WeightTransferConfig(backend="online-quant")


def sent(weights: dict, size: int = 100_000) -> tuple:
    """A group in which vLLM's sender broadcasts, and what it tells of the weights."""
    items = iter(weights.items())
    chunks = iter(lambda: pack_tensors(items, lambda item: item[1], size), None)
    recorded = iter([chunk.packed_tensor for chunk in chunks])
    group = SimpleNamespace(rank=1, timeout_s=5.0, destroy=lambda: None)
    group.broadcast = lambda tensor, src, stream: tensor.copy_(next(recorded))
    dtypes = [str(weight.dtype)[6:] for weight in weights.values()]
    shapes = [list(weight.shape) for weight in weights.values()]
    return group, SimpleNamespace(names=[*weights], dtype_names=dtypes, shapes=shapes)


def join(transfer, failing_ranks: tuple = ()) -> None:
    """A sender's group, which is there already."""

    def joins(transfer, _) -> None:
        assert torch.get_default_dtype() == torch.float32  # all ranks warm up with the same type
        if transfer.worker.rank in failing_ranks:
            transfer.packed_buffer_size_bytes = 1
            raise TimeoutError("no sender has come")

    with mock.patch.object(helper.NCCLWeightTransferEngine, "init_transfer_engine", joins):
        group, transfer.model_update_group = transfer.model_update_group, SimpleNamespace(destroy=bool)
        try:
            transfer.init_transfer_engine(None)
        finally:
            transfer.model_update_group = group


def receive(llm, weights: dict, update: bool = True) -> None:
    """What a worker does when a sender starts an update and broadcasts."""
    transfer = worker(llm).weight_transfer_engine
    transfer.packed, transfer.packed_buffer_size_bytes = True, 100_000
    transfer.model_update_group, info = sent(weights)
    if transfer.known is None:
        join(transfer)
    if update:
        llm.collective_rpc("start_weight_update")
    transfer.receive_weights(info)


def finish(llm) -> None:
    llm.collective_rpc("finish_weight_update")
    llm.reset_prefix_cache()


def refuses(llm) -> None:
    with pytest.raises(RuntimeError, match="refusing to generate: a weight update is not complete"):
        llm.answer(["a"], 2)


def seen(llm) -> dict:
    found = llm.observe(["Hello, my name is", "The capital"], 8)
    assert found["repeatable"]
    return found


@pytest.mark.parametrize("name", ["llama", "gemma-3", "mixtral", "gpt2"])
def test_an_engine_follows_vllm_s_own_sender(tmp_path, name):
    """In FP32, in another order, in two parts, and back; as fresh engines of the same checkpoints."""
    old, new = (build(tmp_path / str(seed), name, seed=seed) for seed in (0, 1))
    with local_engine(new, CONFIG) as llm:
        fresh = seen(llm)
    with local_engine(old, CONFIG, weight_transfer_config=CONFIGURED) as llm:
        own, others = (load_file(f"{path}/model.safetensors") for path in (old, new))
        cold = seen(llm)
        receive(llm, dict(sorted(((key, w.float()) for key, w in others.items()), reverse=True)))
        finish(llm)
        assert seen(llm) == fresh
        receive(llm, own)
        finish(llm)
        assert seen(llm) == cold
        half = len(others) // 2
        receive(llm, dict(itertools.islice(others.items(), half)))
        receive(llm, dict(itertools.islice(others.items(), half, None)), update=False)
        finish(llm)
        assert seen(llm) == fresh
        assert worker(llm).buckets is None  # a session needs none
        receive(llm, own)
        finish(llm)
        assert seen(llm) == cold


def test_buckets_that_no_longer_fit_make_room_first(tmp_path, monkeypatch):
    """At 8B they take more than two GiB."""
    path, plain, left = build(tmp_path / "model", "llama"), helper.Buckets, []

    def buckets(manifest, *args, as_vllm=False):
        if not as_vllm and left:
            assert left[-1]() is None, "both are there at once"
        made = plain(manifest, *args, as_vllm=as_vllm)
        left.extend([] if as_vllm else [weakref.ref(made)])
        return made

    monkeypatch.setattr(helper, "Buckets", buckets)
    with local_engine(path, CONFIG, weight_transfer_config=CONFIGURED) as llm:
        receive(llm, load_file(f"{path}/model.safetensors"))
        finish(llm)
    assert len(left) == 2


def test_it_may_be_asked_before_the_first_update(tmp_path):
    """What requests leave behind is no weight: the proof does not zero it, and does not want it back."""
    old, new = (build(tmp_path / str(seed), "llama", seed=seed) for seed in (0, 1))
    with local_engine(new, CONFIG) as llm:
        fresh = seen(llm)
    with local_engine(old, CONFIG, weight_transfer_config=CONFIGURED) as llm:
        model = worker(llm).get_model()
        model.lm_head.scratch = torch.ones(4)  # as kernels hold memory to work in, since a request
        receive(llm, load_file(f"{new}/model.safetensors"))
        finish(llm)
        assert worker(llm).weight_transfer_engine.because is None
        assert model.lm_head.scratch.tolist() == [1.0] * 4
        del model.lm_head.scratch
        assert seen(llm) == fresh


def test_a_sender_may_follow_one_that_has_died(tmp_path, monkeypatch):
    """In an update: before the proof, which mends it, the engine serves; later not, until all has come."""
    old, new = (build(tmp_path / str(seed), "llama", seed=seed) for seed in (0, 1))
    with local_engine(new, CONFIG) as llm:
        fresh = seen(llm)
    weights = load_file(f"{new}/model.safetensors")
    joins = lambda transfer, _: setattr(transfer, "model_update_group", sent(weights)[0])
    monkeypatch.setattr(helper.NCCLWeightTransferEngine, "init_transfer_engine", joins)
    with local_engine(old, CONFIG, weight_transfer_config=CONFIGURED) as llm:
        cold, transfer = seen(llm), worker(llm).weight_transfer_engine
        llm.collective_rpc("start_weight_update")
        transfer.init_transfer_engine(None)
        assert seen(llm) == cold
        llm.collective_rpc("start_weight_update")
        transfer.init_transfer_engine(None)
        refuses(llm)
        receive(llm, weights)
        finish(llm)
        assert seen(llm) == fresh


def test_an_engine_without_a_checkpoint_is_refused(tmp_path):
    """Before a sender broadcasts anything; and it serves on."""
    path = build(tmp_path / "model", "llama")
    with local_engine(path, CONFIG, weight_transfer_config=CONFIGURED, load_format="dummy") as llm:
        cold = seen(llm)
        with pytest.raises(RuntimeError, match="DummyModelLoader"):
            join(worker(llm).weight_transfer_engine)
        assert seen(llm) == cold


def test_an_engine_without_room_for_buckets_serves_on(tmp_path, monkeypatch):
    """Nothing was set to zero yet; when there is room, the next sender is welcome."""
    path, plain = build(tmp_path / "model", "llama"), helper.Buckets

    def no_room(manifest, *args, as_vllm=False):
        raise torch.OutOfMemoryError("tried to allocate 2.32 GiB")

    with local_engine(path, CONFIG, weight_transfer_config=CONFIGURED) as llm:
        cold, transfer = seen(llm), worker(llm).weight_transfer_engine
        monkeypatch.setattr(helper, "Buckets", no_room)
        with pytest.raises(RuntimeError, match="cannot be synced: OutOfMemoryError: tried to allocate"):
            join(transfer)
        assert transfer.last is worker(llm).buckets is None
        assert seen(llm) == cold
        worker(llm).get_model().lm_head.scratch = torch.ones(4)  # since a request
        monkeypatch.setattr(helper, "Buckets", plain)
        receive(llm, load_file(f"{path}/model.safetensors"))
        finish(llm)
        assert transfer.because is None
        del worker(llm).get_model().lm_head.scratch
        assert seen(llm) == cold


def test_an_update_that_is_not_complete_is_not_served(tmp_path):
    """Nothing came, or not all: an error with names, and no answers; also while one is under way."""
    path, left_out = build(tmp_path / "model", "llama"), "model.layers.1.self_attn.v_proj.weight"
    weights = load_file(f"{path}/model.safetensors")
    less = {name: weight for name, weight in weights.items() if name != left_out}
    with local_engine(path, CONFIG, weight_transfer_config=CONFIGURED) as llm:
        cold = seen(llm)

        def refused_until_all_came() -> None:
            refuses(llm)
            receive(llm, weights)
            finish(llm)
            assert seen(llm) == cold

        receive(llm, less)
        with pytest.raises(RuntimeError, match=rf"1 parameters got no weight .*without {left_out}"):
            llm.collective_rpc("finish_weight_update")
        refused_until_all_came()
        llm.collective_rpc("start_weight_update")
        with pytest.raises(RuntimeError, match="parameters got no weight .*embed_tokens"):
            llm.collective_rpc("finish_weight_update")
        refused_until_all_came()
        transfer = worker(llm).weight_transfer_engine
        llm.collective_rpc("start_weight_update")
        transfer.model_update_group, info = sent(weights)
        plain, came = transfer.model_update_group.broadcast, []

        def dies(tensor, src, stream) -> None:
            came.append(tensor)
            if len(came) == 5:
                raise RuntimeError("connection closed by peer")
            plain(tensor, src, stream)

        transfer.model_update_group.broadcast = dies
        with pytest.raises(RuntimeError, match="bucket 5 of .*connection closed by peer"):
            transfer.receive_weights(info)
        refused_until_all_came()


def test_a_replay_that_forgets_is_found_before_it_serves(tmp_path, monkeypatch, capsys):
    """It is not proved by the checkpoint, so sessions serve; if they forget, too, nothing does."""
    old, new = (build(tmp_path / str(seed), "llama", seed=seed) for seed in (0, 1))
    with local_engine(new, CONFIG) as llm:
        fresh = seen(llm)
    weights, plain = load_file(f"{new}/model.safetensors"), helper.bind
    load, norm = helper.ReloadSession.load, "model.norm.weight"
    forgets = lambda copy, name, *rest: None if name == norm else plain(copy, name, *rest)
    monkeypatch.setattr(helper, "bind", forgets)
    loads_less = lambda session, weights: load(session, ((n, w) for n, w in weights if n != norm))
    for broken in (False, True):
        with local_engine(old, CONFIG, weight_transfer_config=CONFIGURED) as llm:
            if broken:
                transfer = worker(llm).weight_transfer_engine
                transfer.packed, transfer.packed_buffer_size_bytes = True, 100_000
                transfer.model_update_group, info = sent(weights)
                monkeypatch.setattr(helper.ReloadSession, "load", loads_less)
                monkeypatch.setattr(helper.ReloadSession, "complete", helper.ReloadSession.close)
                for _ in range(2):  # what a failed proof has left is not what was loaded
                    with pytest.raises(RuntimeError, match="cannot be synced: not as it was before: "):
                        join(transfer)
                    refuses(llm)
                llm.collective_rpc("start_weight_update")
                with pytest.raises(RuntimeError, match="cannot be synced: not as it was before: "):
                    transfer.receive_weights(info)  # of a sender that goes on all the same
                refuses(llm)
                continue
            receive(llm, weights)
            finish(llm)
            assert seen(llm) == fresh
    said = capsys.readouterr().out
    assert (
        "proved by session" in said
        and "by a session, because not as it was before: model.norm.weight" in said
    )


class Extension(helper.WorkerExtension):
    """Workers of an engine with two, whose sender is in the test's process, over gloo."""

    def fail_once(self) -> None:
        plain = self._take_in

        def fail(*_, **__) -> None:
            self._take_in = plain
            raise RuntimeError("out of memory")

        self._take_in = fail if self.rank == 1 else plain

    def join(self, failing_ranks: tuple) -> None:
        join(self.weight_transfer_engine, failing_ranks)

    def look(self) -> tuple[int, bool]:
        transfer = self.weight_transfer_engine
        return transfer.packed_buffer_size_bytes, transfer.last is None

    def why_no_replays(self) -> str | None:
        return self.weight_transfer_engine.because

    def receive_from(self, info: dict) -> None:
        transfer = self.weight_transfer_engine
        transfer.model_update_group, transfer.packed = self.weight_group, True
        transfer.packed_buffer_size_bytes = 100_000
        try:
            transfer.receive_weights(SimpleNamespace(**info))
        finally:
            transfer.model_update_group = None


@pytest.mark.parametrize("one_cannot", [False, True])
def test_two_workers_stay_in_step(tmp_path, one_cannot):
    """Replays, a session, and an error that one of them has, in its proof or later; by a real broadcast."""
    old, new = (build(tmp_path / str(seed), "llama", seed=seed) for seed in (0, 1))
    config = dataclasses.replace(CONFIG, tensor_parallel_size=2)
    with local_engine(new, config) as llm:
        fresh = seen(llm)
    more = dict(weight_transfer_config=CONFIGURED, worker_extension_cls="test_transfer.Extension")
    with local_engine(old, config, **more) as llm, helper.listen("127.0.0.1") as listening:
        cold, port = seen(llm), listening.getsockname()[1]
        weights = {path: load_file(f"{path}/model.safetensors") for path in (old, new)}
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            joining = pool.submit(
                llm.collective_rpc, "init_weight_update_group", args=("127.0.0.1", port, 1, 3, "gloo", 20.0)
            )
            where = "127.0.0.1", port, 0, 3, "cpu", "gloo", 20.0, listening
            group = helper.stateless_init_process_group(*where)
            joining.result()

            def bring(these: dict) -> None:
                names, shapes = [*these], [list(weight.shape) for weight in these.values()]
                info = dict(names=names, dtype_names=["bfloat16"] * len(names), shapes=shapes)
                receiving = pool.submit(llm.collective_rpc, "receive_from", args=(info,))
                items = iter(these.items())
                while chunk := pack_tensors(items, lambda item: item[1], 100_000):
                    group.broadcast(chunk.packed_tensor, 0)
                receiving.result(60)

            def follow() -> None:
                for path, expected in ((new, fresh), (old, cold)):
                    llm.collective_rpc("start_weight_update")
                    bring(weights[path])
                    finish(llm)
                    assert seen(llm) == expected

            for failing_ranks in ((0, 1), (0,), (1,)):
                found = "engine rank 0: .* no sender has come; engine rank 1: .* no sender has come"
                with pytest.raises(RuntimeError, match=found):
                    llm.collective_rpc("join", args=(failing_ranks,))
                assert seen(llm) == cold
            assert all(size > 1 for size, _ in llm.collective_rpc("look"))  # as a sender before has it
            if one_cannot:
                llm.collective_rpc("fail_once")
            llm.collective_rpc("join", args=((),))
            follow()
            because = llm.collective_rpc("why_no_replays")
            if one_cannot:
                assert because == ["RuntimeError: out of memory"] * 2
                return
            assert because == [None, None]
            llm.collective_rpc("start_weight_update")
            bring(dict(list(weights[new].items())[1:]))
            with pytest.raises(RuntimeError, match="parameters got no weight"):
                llm.collective_rpc("finish_weight_update")
            follow()
            llm.collective_rpc("fail_once")
            llm.collective_rpc("start_weight_update")
            with pytest.raises(RuntimeError, match="engine rank 1: RuntimeError: out of memory"):
                bring(weights[new])
            assert llm.collective_rpc("look") == [(100_000, True)] * 2  # they agree anew, or none does
            follow()
