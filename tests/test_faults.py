"""What goes wrong, with the real processes: who is named, how long it takes, and that no engine serves half a
version.

With 2 GPUs the deaths can be had over NCCL as well:
`python -m pytest -rP tests/test_faults.py -k "dies or stalls or never"`.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import pickle
import re
import signal
import socket
import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import ray
import torch

from harness import (
    DEVICE,
    PROMPTS,
    Remote,
    act_before_bucket,
    driver,
    generate,
    helper,
    observe,
    sync,
    to_prompts,
    vllm_arguments,
    zero_and_sync,
)
from local import local_actors, worker
from rlhf_utils import stateless_init_process_group

CPU = torch.device("cpu")
SHAPE, BUCKET_BYTES = {"cpu": ("tiny-opt", 100_000), "cuda": ("opt-125m", 32 * 2**20)}[
    DEVICE
]  # a sync takes 8 buckets
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import this file


def on(actor, function, *args):
    """Run a function of the actor's object in the actor's process."""
    return driver.wait([actor.__ray_call__.remote(function, *args)], 60, function.__name__)[0]


def start_engine(config, models, cleanup, shape: str = SHAPE):
    """An engine from a checkpoint, whose workers say their pids."""
    kv_cache = {"kv_cache_memory_bytes": 2**30} if DEVICE == "cuda" else {}
    with vllm_arguments(worker_extension_cls="harness.Extension", **kv_cache):
        return driver.start_engine(dataclasses.replace(config, model=models(shape)[0]), DEVICE, cleanup)


def start(config, models, cleanup, shape: str = SHAPE):
    """An engine from one checkpoint and a trainer with another, joined, of which a test may kill what it
    likes.
    """
    trainer_only, new = cleanup.enter_context(contextlib.ExitStack()), models(shape)[1]
    trainer = driver.start_trainer(dataclasses.replace(config, model=new), trainer_only)
    actor = start_engine(config, models, cleanup, shape)
    helper.join_group(trainer, [actor], timeout_s=config.timeout_s)
    return SimpleNamespace(
        trainer=trainer,
        trainer_only=trainer_only,
        actor=actor,
        llm=Remote(actor),
        old=models(shape)[0],
        new=new,
    )


@pytest.fixture
def mortal(quick, models, request):
    """An engine with a trainer that a test may kill and replace."""
    if DEVICE == "cpu":
        yield request.getfixturevalue("pair")
    else:
        with contextlib.ExitStack() as cleanup:
            yield start(quick, models, cleanup)


@pytest.fixture
def quick(config):
    """The program's settings with a limit of 10 s."""
    return dataclasses.replace(config, timeout_s=10.0)


def failing_sync(config, pair, error=RuntimeError) -> str:
    """The message of a sync that has to fail within the limit."""
    began = time.monotonic()
    with pytest.raises(error) as caught:
        sync(config, pair.trainer, pair.actor, bucket_bytes=BUCKET_BYTES)
    seconds = time.monotonic() - began
    print(f"FAULT after {seconds:.1f} s of at most {config.timeout_s:g}: {caught.value}")
    assert seconds < config.timeout_s + 0.5
    return str(caught.value)


@contextlib.contextmanager
def as_it_was(pair):
    """Gives the shared trainer its weights, learning rate and step back, and the engine the weights."""

    def keep(trainer) -> None:
        trainer.kept = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        trainer.kept_rate, trainer.kept_step = trainer.optimizer.param_groups[0]["lr"], trainer.step

    def restore(trainer) -> None:
        trainer.model.load_state_dict(trainer.kept)
        trainer.optimizer.state.clear()
        trainer.optimizer.param_groups[0]["lr"], trainer.step = trainer.kept_rate, trainer.kept_step
        trainer.looked = None

    on(pair.trainer, keep)
    try:
        yield
    finally:
        on(pair.trainer, restore)
        helper.sync_weights_to_quantized_engine(pair.trainer, pair.actor)


def assert_as_by_session(config, pair) -> None:
    """The engine holds and says what a reload session with the trainer's weights gives."""
    replayed = observe(pair.llm)
    zero_and_sync(config, pair.trainer, pair.actor, by_session=True)
    assert observe(pair.llm) == replayed


def refuses(pair) -> bool:
    with pytest.raises(RuntimeError, match="refusing to generate"):
        generate(pair.llm)
    return True


# ----- Deaths -----------------------------------------------------------------------------------------------


def test_trainer_dies_before_and_during_a_broadcast(quick, mortal, request):
    """The engine outlives it, serves only complete versions, and is right again with the next trainer's first
    sync.
    """
    pair = mortal

    def load():
        trainer_only = contextlib.ExitStack()
        own = dataclasses.replace(quick, model=pair.new)
        return driver.start_trainer(own, trainer_only), trainer_only

    spares = request.getfixturevalue("loading").trainers[1:] if DEVICE == "cpu" else []

    def join() -> None:
        helper.join_group(pair.trainer, [pair.actor], timeout_s=quick.timeout_s)
        sync(quick, pair.trainer, pair.actor, bucket_bytes=BUCKET_BYTES)

    def next_trainer() -> None:
        pair.trainer_only.close()  # its GPU is free again
        pair.trainer, pair.trainer_only = spares.pop() if spares else load()
        join()

    join()
    expected = observe(pair.llm)
    generating = pair.actor.__ray_call__.remote(lambda _: time.sleep(5))
    ray.kill(pair.trainer)  # after a sync, before the next; nothing is asked of it now
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=r"generating: trainer \(rank 0\) has died") as caught:
        driver.wait([generating], 30, "generating")
    print(f"FAULT after {time.monotonic() - began:.1f} s of at most 30: {caught.value}")
    ray.get(generating)
    assert observe(pair.llm) == expected
    assert "trainer (rank 0): The actor" in failing_sync(quick, pair, ConnectionError)
    next_trainer()
    on(pair.trainer, act_before_bucket, 3, None, signal.SIGKILL)
    message = failing_sync(quick, pair, ConnectionError)
    assert "trainer (rank 0): The actor" in message and "rank 1, bucket 4 of 8 (" in message
    assert refuses(pair)
    next_trainer()
    assert observe(pair.llm) == expected


# ----- The rendezvous ---------------------------------------------------------------------------------------


def join(rank: int, port: int, timeout_s: float, results: dict, **settings) -> threading.Thread:
    def call() -> None:
        try:
            results[rank] = stateless_init_process_group(
                "127.0.0.1", port, rank, 3, torch.device(DEVICE), timeout_s=timeout_s, **settings
            )
        except (TimeoutError, OSError) as error:
            results[rank] = error

    thread = threading.Thread(target=call)
    thread.start()
    return thread


def test_a_peer_that_never_joins_is_named():
    listening, results = socket.create_server(("127.0.0.1", 0)), {}
    port = listening.getsockname()[1]
    for thread in [join(0, port, 2, results, listen_socket=listening), join(1, port, 2, results)]:
        thread.join(10)
    assert "rank 0 waited 2 s" in str(results[0]) and "in vain for ranks [2]" in str(results[0])
    assert isinstance(results[1], Exception)
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    join(2, port, 2, results).join(20)  # and if there is no rank 0
    assert f"rank 2 found no rank 0 at 127.0.0.1:{port} in 2 s" in str(results[2])


def test_strangers_and_taken_ports(tmp_path):
    """Garbage on the rendezvous port is no rank and stops nobody, pickled code stays asleep; a taken port is
    an error.
    """
    listening, results = socket.create_server(("127.0.0.1", 0)), {}
    port = listening.getsockname()[1]
    with pytest.raises(OSError, match="Address already in use"):
        stateless_init_process_group("127.0.0.1", port, 0, 3, CPU)
    threads = [join(0, port, 20, results, listen_socket=listening)]
    garbage = [b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), b"\0" * 64, b"\xff" * 4096]
    garbage.append(pickle.dumps(Malicious(tmp_path / "canary")))
    strangers = []
    for rank in (1, 2):
        for data in garbage:
            strangers.append(socket.create_connection(("127.0.0.1", port)))
            strangers[-1].sendall(data)
        threads.append(join(rank, port, 20, results))
    for thread in threads:
        thread.join(30)
    sent = torch.arange(1000.0)
    received = [sent, torch.zeros(1000), torch.zeros(1000)]
    threads = [
        threading.Thread(target=results[rank].broadcast, args=(received[rank], 0)) for rank in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert all(torch.equal(tensor, sent) for tensor in received) and not list(tmp_path.iterdir())
    pickle.loads(garbage[-1])
    assert list(tmp_path.iterdir()), "unpickled, it would have shown"


# ----- Errors that the engine survives ----------------------------------------------------------------------


def test_weights_that_are_not_finite_are_not_sent(quick, pair):
    """An optimizer step that overflows; the engine goes on with what it had."""
    helper.join_group(pair.trainer, [pair.actor], timeout_s=quick.timeout_s)
    sync(quick, pair.trainer, pair.actor)
    before = observe(pair.llm)

    def overflow(trainer) -> None:
        plain, weights = trainer.optimizer.step, list(trainer.model.parameters())
        trainer.optimizer.step = lambda: [weight.data.mul_(3e38).mul_(10) for weight in weights]
        rollouts = [driver.Rollout([3, 4], [6, 7], [-5.0] * 2, advantage=value) for value in (1.0, -0.5)]
        with pytest.raises(ValueError, match="weights hold NaN or infinity and were not sent"):
            trainer.train_step(rollouts)
        trainer.optimizer.step = plain

    with as_it_was(pair):
        on(pair.trainer, overflow)
        message = failing_sync(quick, pair)
        assert (
            "trainer (rank 0): ValueError:" in message
            and "weights hold NaN or infinity and were not sent" in message
        )
        assert "model.decoder.embed_tokens.weight" in message
        assert observe(pair.llm) == before
    assert observe(pair.llm) == before


def test_a_changed_model_is_refused_with_every_difference(quick, pair):
    """Renamed, missing, added, reshaped, all between two syncs; not a byte moves."""
    helper.join_group(pair.trainer, [pair.actor], timeout_s=quick.timeout_s)
    sync(quick, pair.trainer, pair.actor)
    before = observe(pair.llm)

    def change(trainer) -> None:
        trainer.kept, decoder = trainer.model.model.decoder, trainer.model.model.decoder
        trainer.model.model.decoder = changed = torch.nn.Module()
        for name, child in decoder.named_children():
            changed.add_module("embed_places" if name == "embed_positions" else name, child)
        changed.final_layer_norm = torch.nn.LayerNorm(64)
        changed.counter = torch.nn.Parameter(torch.zeros(2, dtype=torch.int32), requires_grad=False)

    on(pair.trainer, change)
    message = failing_sync(quick, pair)
    for line in (
        "unexpected: model.decoder.embed_places.weight is",
        "missing: model.decoder.embed_positions.weight is None, the engine's model has [514, 128]",
        "misshapen: model.decoder.final_layer_norm.weight is [64], the engine's model has [128]",
        "unexpected: model.decoder.counter is [2]",
    ):
        assert line in message
    assert observe(pair.llm) == before
    on(pair.trainer, lambda trainer: setattr(trainer.model.model, "decoder", trainer.kept))
    sync(quick, pair.trainer, pair.actor)
    assert observe(pair.llm) == before


def test_failed_loads_and_resets_leave_a_torn_engine_until_a_sync_succeeds(quick, models):
    """An exception and no memory, in a session and in a replay; vLLM refuses to empty the prefix cache."""
    config = dataclasses.replace(quick, tensor_parallel_size=1)

    def fail(*_, **__):
        raise torch.OutOfMemoryError("no memory left for this test")

    def break_loader(llm):
        worker(llm).get_model().load_weights = fail

    def mend_loader(llm):
        del worker(llm).get_model().load_weights

    def break_replay(llm):
        worker(llm).replay.steps[3] = ([None], ())

    def mend_replay(llm):
        worker(llm).replay = None

    def break_reset(llm):
        llm.reset_prefix_cache = lambda: False

    def mend_reset(llm):
        del llm.reset_prefix_cache

    with local_actors(), contextlib.ExitStack() as cleanup:
        pair = start(config, models, cleanup, "tiny-llama")
        on(pair.actor, break_loader)
        assert "OutOfMemoryError: no memory left for this test" in failing_sync(config, pair) and refuses(
            pair
        )
        on(pair.actor, mend_loader)
        assert sync(config, pair.trainer, pair.actor, bucket_bytes=BUCKET_BYTES)["path"] == "session"
        expected = observe(pair.llm)
        helper.join_group(pair.trainer, [pair.actor], timeout_s=config.timeout_s)  # both ends agree anew
        assert sync(config, pair.trainer, pair.actor, bucket_bytes=BUCKET_BYTES)["path"] == "replay"
        for break_it, mend_it, message in (
            (break_replay, mend_replay, "receive_weights failed. engine rank 0:"),
            (break_reset, mend_reset, "vLLM refused to reset the prefix cache"),
        ):
            on(pair.actor, break_it)
            assert message in failing_sync(config, pair) and refuses(pair)
            on(pair.actor, mend_it)
            sync(config, pair.trainer, pair.actor, bucket_bytes=BUCKET_BYTES)
            assert observe(pair.llm) == expected
        on(pair.trainer, lambda trainer: setattr(trainer.model, "forward", fail))
        step = pair.trainer.train_step.remote([driver.Rollout([3], [4], [-1.0], advantage=1.0)])
        with pytest.raises(
            RuntimeError, match=r"training: trainer \(rank 0\): OutOfMemoryError: no memory left"
        ):
            driver.wait([step], 30, "training")


def test_generation_and_syncs_asked_for_during_a_sync(quick, pair):
    """Another sync waits; so does who asks for answers, and gets those of the complete new weights."""
    prompts = to_prompts(pair.old, PROMPTS)
    helper.join_group(pair.trainer, [pair.actor], timeout_s=quick.timeout_s)
    sync(quick, pair.trainer, pair.actor)
    expected, results = observe(pair.llm)["outputs"], []
    rollouts, _, version = driver.take_in(driver.ask([pair.actor], prompts, quick), quick)
    on(pair.trainer, act_before_bucket, 0, None, signal.SIGCONT)  # a signal that does nothing, and 0.4 s
    pair.llm.collective_rpc("reset_weights")
    syncing = threading.Thread(target=lambda: results.append(sync(quick, pair.trainer, pair.actor)))
    syncing.start()
    time.sleep(0.1)
    asked = driver.ask([pair.actor], prompts, quick)
    assert syncing.is_alive()
    sync(quick, pair.trainer, pair.actor)
    syncing.join()
    again, _, new_version = driver.take_in(asked, quick)
    assert results and new_version == version + 1 and again == rollouts
    assert pair.llm.get_weights_version() == version + 2 and generate(pair.llm) == expected
    assert_as_by_session(quick, pair)


def test_a_hundred_syncs_do_not_drift(quick, pair):
    """Neither memory nor handles nor time; and the last is as exact as the first."""
    helper.join_group(pair.trainer, [pair.actor], timeout_s=quick.timeout_s)
    sync(quick, pair.trainer, pair.actor)

    def move(trainer) -> None:
        with torch.no_grad():
            torch._foreach_mul_(list(trainer.model.parameters()), 1.01)

    def usage() -> tuple[float, int]:
        pids = [on(actor, lambda _: os.getpid()) for actor in (pair.trainer, pair.actor)]
        processes = [psutil.Process(pids[0]), psutil.Process(pids[1]), *psutil.Process(pids[1]).children()]
        return sum(p.memory_info().rss for p in processes) / 2**20, sum(p.num_fds() for p in processes)

    times, before = [], None
    with as_it_was(pair):
        for i in range(100):
            on(pair.trainer, move)
            result = sync(quick, pair.trainer, pair.actor)
            assert result["path"] == "replay"
            times.append(result["seconds"])
            before = usage() if i == 49 else before
        after = usage()
        assert_as_by_session(quick, pair)
    assert after[0] - before[0] < 20 and after[1] <= before[1] + 2, (before, after)
    assert sorted(times[-25:])[12] < 2 * sorted(times[25:50])[12]


# ----- Disks, rewards, input --------------------------------------------------------------------------------


def test_full_disk_leaves_the_last_complete_checkpoint(tmp_path, models, monkeypatch):
    path, rollouts = models("tiny-opt")[0], [driver.Rollout([3], [4], [-1.0], advantage=1.0)]
    config = driver.Config(model=path, trainer_device="cpu", learning_rate=1e-3, epochs=1)
    trainer = driver.Trainer(config)
    trainer.train_step(rollouts)
    _, folder = trainer.save_checkpoint(tmp_path)
    weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train_step(rollouts)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.save_checkpoint(tmp_path)
    assert folder == tmp_path / "checkpoint-1" and not (tmp_path / "checkpoint-2").exists()
    resumed = driver.Trainer(dataclasses.replace(config, resume=folder))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in resumed.model.state_dict().items())


@pytest.mark.parametrize("fails", ["the disk", "the reward"])
def test_what_was_learned_is_saved_when_a_run_dies(quick, pair, tmp_path, capfd, fails):
    """A line of the metrics that cannot be written is an error, not a hole in the curve; one message names it
    all.
    """
    config = dataclasses.replace(quick, model=pair.new, steps=1000, prompts_per_step=4, output_dir=tmp_path)
    calls, prompts = [], to_prompts(pair.new, PROMPTS[:2])

    def reward(completions, **_):
        calls.append(len(completions))
        if fails == "the reward" and len(calls) == 3:
            return [math.nan] * len(completions)
        return driver.letters(completions)

    if fails == "the disk":
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    helper.join_group(pair.trainer, [pair.actor], timeout_s=config.timeout_s)
    with as_it_was(pair), pytest.raises(SystemExit) as end, driver.one_message():
        on(pair.trainer, lambda trainer: setattr(trainer, "step", 0))
        driver.train(config, pair.trainer, [pair.actor], prompts, reward, first=0)
    printed, steps = capfd.readouterr().err, {"the disk": 1, "the reward": 2}[fails]
    message = {
        "the disk": "[Errno 28] No space left on device",
        "the reward": "the reward function: expected",
    }
    assert end.value.code == 1 and f"FAILED: {message[fails]}" in printed
    assert f"{steps} complete steps are saved: go on with --resume {tmp_path}/checkpoint-{steps}\n" in printed
    resumed = driver.Trainer(dataclasses.replace(config, resume=tmp_path / f"checkpoint-{steps}"))
    assert resumed.step == steps


class Malicious:
    """Pickled, it would make a file when it is loaded."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


def test_corrupt_and_unsafe_models(models, tmp_path):
    """A pickle that would run code, code beside the weights, weights and configs cut short: one error,
    nothing is run.
    """
    import shutil

    from vllm.model_executor.model_loader.weight_utils import pt_weights_iterator

    good, canary = models("tiny-opt")[0], tmp_path / "canary"

    def config(folder) -> driver.Config:
        return driver.Config(model=str(folder), trainer_device="cpu", learning_rate=1e-3, epochs=1)

    def check(folder) -> None:
        own = dataclasses.replace(config(folder), quantization="none", output_dir=tmp_path / "out")
        driver.check(dataclasses.replace(own, reward="letters"), "cpu")

    check(good)
    evil = tmp_path / "evil"
    shutil.copytree(good, evil, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"lm_head.weight": Malicious(canary)}, evil / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed|weights_only"):
        driver.Trainer(config(evil))
    with pytest.raises(
        pickle.UnpicklingError, match="Weights only load failed|weights_only"
    ):  # vLLM's reader
        list(pt_weights_iterator([str(evil / "pytorch_model.bin")], False))
    assert not canary.exists()

    short = tmp_path / "short"
    shutil.copytree(good, short)
    weights = short / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(Exception, match="incomplete|Incomplete|invalid"):
        driver.Trainer(config(short))

    remote = tmp_path / "remote"
    shutil.copytree(good, remote)
    settings = json.loads((remote / "config.json").read_text())
    settings |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MineConfig"}}
    (remote / "config.json").write_text(json.dumps(settings))
    (remote / "mine.py").write_text(f"open({str(canary)!r}, 'w')")
    with pytest.raises(ValueError, match="--model .*remote: expected a language model"):
        check(remote)
    (remote / "config.json").write_text("{")
    with pytest.raises(ValueError, match="--model .*remote: expected a language model"):
        check(remote)
    assert not canary.exists()


def test_a_worker_that_stalls_in_a_sync_is_named(quick, models):
    """And the bucket with its weights, within the limit. On GPUs the worker's goes on and takes in all; its
    host does not answer.
    """
    apart = dict(distributed_executor_backend="mp", worker_extension_cls="harness.Extension")
    with (
        local_actors(**apart) if DEVICE == "cpu" else contextlib.nullcontext(),
        contextlib.ExitStack() as own,
    ):
        pair = start(quick, models, own)
        sync(quick, pair.trainer, pair.actor, bucket_bytes=BUCKET_BYTES)
        workers = Remote(pair.actor).collective_rpc("get_pid")
        own.callback(os.kill, workers[-1], signal.SIGCONT)
        on(pair.trainer, act_before_bucket, 3, workers[-1], signal.SIGSTOP)
        message = failing_sync(quick, pair, TimeoutError if DEVICE == "cuda" else RuntimeError)
        assert "engine (rank 1" in message
    if DEVICE == "cpu":
        assert re.search(r"rank 0, bucket [4-8] of 8 \(.*\.(weight|bias) \.\. .*\.(weight|bias)\)", message)
    if len(workers) > 1:
        assert "Ranks 1 failed" in message, "of those that live, the engine names who does not"


# ----- The last engine -------------------------------------------------------------------------------------


def train_with_a_dying_worker(config, pair, worker: int, folder) -> None:
    """In the sync of the second step of a run with `--overlap`, which then saves what the trainer has."""
    config = dataclasses.replace(config, steps=1000, prompts_per_step=2, overlap=True, output_dir=folder)
    calls = []
    on(pair.trainer, lambda trainer: vars(trainer).update(step=0, saved=(0, None)))

    def reward(completions, **_):
        calls.append(1)
        if len(calls) == 2:
            on(pair.trainer, act_before_bucket, 0, worker, signal.SIGKILL)
        return driver.letters(completions)

    with pytest.raises(RuntimeError, match=r"engine \(rank 1, 2\)") as error:
        prompts = to_prompts(pair.old, PROMPTS[:2])
        driver.train(config, pair.trainer, [pair.actor], prompts, reward, first=0)
    saved, rows = folder / "checkpoint-2", driver.read_metrics(folder / "metrics.jsonl")
    assert f"2 complete steps are saved: go on with --resume {saved}" in error.value.__notes__[-1]
    assert (saved / "trainer.pt").exists() and len(rows) == 1
    with pytest.raises(RuntimeError, match=r"asking: engine \(rank .*a worker has died"):
        driver.wait(helper.on_workers([pair.actor], "get_pid"), 10, "asking")


def test_a_run_whose_worker_dies_in_a_sync_is_saved(quick, models, request, tmp_path):
    """Named is the engine, and then nothing of it is left. Also on the CPU, where it is that of `pair`: this
    test is the last.
    """
    with contextlib.ExitStack() as cleanup:
        if DEVICE == "cpu":
            pair = request.getfixturevalue("pair")
            cleanup.enter_context(request.getfixturevalue("loading").engine[1])
            helper.join_group(pair.trainer, [pair.actor], timeout_s=quick.timeout_s)
        else:
            pair = start(quick, models, cleanup)
        workers = Remote(pair.actor).collective_rpc("get_pid")
        train_with_a_dying_worker(quick, pair, workers[-1], tmp_path)
    deadline = time.monotonic() + 20
    while left := [pid for pid in workers if psutil.pid_exists(pid)]:
        assert time.monotonic() < deadline, [psutil.Process(pid) for pid in left]
        time.sleep(0.2)
