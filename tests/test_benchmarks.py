"""The benchmarks in their small form, so that they go on working."""

import contextlib
import dataclasses
import itertools
import json
import types
from pathlib import Path

import bench_loop
import bench_memory
import bench_rollout
import bench_weight_sync as weight_sync
import pytest
import torch
import tyro
from torch._inductor.graph import GraphLowering

from local import CONFIG, local_actors, local_engine


@pytest.fixture(autouse=True)
def here():
    """Trainers and engines in this process."""
    with local_actors():
        yield


def test_engines_of_one_process_choose_kernels_by_rules(monkeypatch):
    """Not by time, or two of the same weights may answer differently; each compilation switches that off."""
    chosen, plain = [], GraphLowering.codegen

    def codegen(graph):
        chosen.append(torch._inductor.config.deterministic)
        return plain(graph)

    monkeypatch.delenv("TORCH_COMPILE_DISABLE")
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    monkeypatch.setattr(GraphLowering, "codegen", codegen)
    torch.compile(torch.neg, backend="eager")(torch.ones(1))
    tiny = str(Path(__file__).with_name("tiny"))
    with (
        torch.compiler.config.patch(force_disable_caches=True),
        local_engine(tiny, CONFIG, enforce_eager=False),
    ):
        assert chosen and all(chosen)


def test_weight_sync(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_DETERMINISTIC", "1")  # as it sets for its actors
    flags = ["--tensor-parallel-size", "1", "--repeats", "2", "--output-dir", str(tmp_path)]
    weight_sync.main(tyro.cli(weight_sync.Benchmark, args=flags))
    result = json.loads((tmp_path / "weight_sync_tiny-opt.json").read_text())
    different = {method: row["different"] for method, row in result["rows"].items() if "different" in row}
    assert different.pop(weight_sync.PUBLISHED), "that is what the published calls do"
    assert different == {weight_sync.PROOF: [], weight_sync.SESSION: [], weight_sync.OURS: []}
    assert result["path"] == "replay" and result["tensors"] == 48 and result["answers"] == 4
    assert (tmp_path / "weight_sync.png").stat().st_size > 10_000


def test_rollout(tmp_path):
    names = ["bf16", "fp8"]
    flags = ["--engines", *names, "--batches", "1", "4", "--repeats", "1", "--output-dir", str(tmp_path)]
    bench_rollout.main(tyro.cli(bench_rollout.Benchmark, args=flags))
    engines = json.loads((tmp_path / "rollout_tiny-opt.json").read_text())["engines"]
    assert list(engines) == names and set(names) <= set(bench_rollout.ENGINES)
    assert 0.6 < engines["fp8"]["weights_gib"] / engines["bf16"]["weights_gib"] < 0.9
    for engine in engines.values():
        assert engine["kv_cache_tokens"] > 10_000
        assert list(engine["tokens_per_s"]) == ["16x32, batch 1", "16x32, batch 4"]
        assert 1 < engine["tokens_per_s"]["16x32, batch 1"] < engine["tokens_per_s"]["16x32, batch 4"]
    assert (tmp_path / "rollout_tiny-opt.png").stat().st_size > 10_000


def test_loop(tmp_path, capsys, monkeypatch):
    """Both modes of gradient checkpointing; TRL's part needs GPUs, here is what its process would say."""

    def peer(command, **_):
        slow = "--gradient-checkpointing" in command
        said = {"step_s": [9.0, 9.0, 3.0 if slow else 2.0, 8.0, 1.0], "rewards": [0.5, 0.6]}
        said |= {"sync_s": [9.0, 9.0, 0.5, 0.5], "trainer_gib": 5.0, "held_out": [None, None]}
        return types.SimpleNamespace(stdout=f"a warning\n{json.dumps(said)}\n")

    server = lambda config, *_: contextlib.nullcontext(config.max_model_len)  # as its port
    monkeypatch.setattr(bench_loop.bench_transfer, "server", server)
    monkeypatch.setattr(bench_loop.bench_transfer, "wait_for_server", lambda port: port)
    monkeypatch.setattr(bench_loop, "subprocess", types.SimpleNamespace(run=peer, PIPE=None))
    flags = ["--tensor-parallel-size", "1", "--prompts-per-step", "2", "--lengths", "8", "--repeats", "2"]
    flags += ["--peer", "trl", "--output-dir", str(tmp_path)]
    bench_loop.main(tyro.cli(bench_loop.Benchmark, args=flags))
    found = json.loads((tmp_path / "loop_tiny-opt.json").read_text())["lengths"]["8"]
    for mode, way in itertools.product(("on", "off"), ("in turn", "overlapped")):
        row = found[mode][way]
        assert 0 < row["train_s"] < row["step_s"] and 100 < row["tokens"] <= 2 * 16 * 8
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["step_s"], rel=0.3)
    row = found["on"]["in turn"]
    assert row["rollout_s"] + row["train_s"] < row["step_s"] * 1.05
    assert found["on"]["TRL"]["step_s"] == 3.0 and found["off"]["TRL"]["step_s"] == 2.0
    assert found["on"]["TRL"]["sync_s"] == 0.5
    rates, kl = found["rollout_tokens_per_s"], found["mismatch_kl_of_the_first_batch"]
    assert set(rates) == {"loop", "plain"} and min(rates.values()) > 0
    assert kl["bfloat16"] != kl["float32"] and kl["float32"] == pytest.approx(2.5e-3, rel=0.5)
    printed = capsys.readouterr().out
    assert printed.count("times as fast as TRL") == 4 and printed.count("of plain LLM.generate") == 1
    assert f"{2.0 / found['off']['in turn']['step_s']:.2f} times as fast" in printed
    assert (tmp_path / "loop_tiny-opt.png").stat().st_size > 10_000


@pytest.mark.parametrize("mode", ["on", "off"])
def test_the_measured_trainer_switches(models, mode):
    """What is kept for the backward pass, in bytes, says whether activations are computed again."""
    path, settings = models("tiny-opt")[0], dict(trainer_device="cpu", learning_rate=0.0, epochs=1)
    trainer = bench_loop.MeasuredTrainer(bench_loop.driver.Config(model=path, **settings))
    for other in ("off", "on", mode):
        trainer.checkpoint_activations(other)
    layers = trainer.model.model.decoder.layers
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        for layer in layers:
            layer(torch.ones(1, 64, 128, requires_grad=True))
            kept.append(-sum(kept))
    assert not trainer.model.training
    first, second = (-size for size in kept if size < 0)
    assert (second < first / 5) == (mode == "on"), (
        "the first layer keeps its activations, the second does not"
    )


def test_compare_memory(models, tmp_path, capsys):
    """FP8 halves the linear layers and nothing else."""
    settings = dict(model=models("tiny-llama")[0], tensor_parallel_size=1, output_dir=tmp_path)
    settings["prompts_per_step"] = 2
    config, _ = bench_memory.driver.resolve(bench_memory.driver.Config(**settings), 0)
    found = bench_memory.compare_memory(config, "cpu")
    assert found == json.loads((tmp_path / "memory.json").read_text())
    bf16, fp8 = found.values()
    assert 0.5 < fp8["linear_gib"] / bf16["linear_gib"] < 0.53, "bytes, and a scale of 4 for each row"
    assert bf16["weights_gib"] - fp8["weights_gib"] == pytest.approx(bf16["linear_gib"] - fp8["linear_gib"])
    assert bf16["kv_cache_tokens"] > 10_000 and min(bf16.values()) > 0
    assert (
        "Saved on each rank: 0.0003 GiB of weights, of which linear layers 0.0003" in capsys.readouterr().out
    )
    with pytest.raises(SystemExit, match="expected what BF16 is to be compared with"):
        bench_memory.compare_memory(dataclasses.replace(config, quantization="none"), "cpu")
