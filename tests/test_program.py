"""The whole program in a process of its own: what it prints, writes and leaves behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import transformers
import tyro
import vllm
from matplotlib.image import imread
from ray.cluster_utils import Cluster

from harness import PROMPTS, driver, fork_server, generate
from local import local_actors, local_engine

PROGRAM = Path(__file__).resolve().parent.parent / "rlhf_online_quant.py"
HELD_OUT = driver.TINY / "held_out.jsonl"


def be_program(flags: tuple[str, ...], cwd: str, mark: str, as_typed: bool) -> None:
    """In a new process: run the program, for which a forked process need not import anything."""
    os.chdir(cwd)
    for name in driver.ENVIRONMENT if as_typed else ():  # it is to set what it needs itself
        os.environ.pop(name, None)
    os.environ |= dict([mark.split("=")])
    log = os.open("log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    if as_typed:  # by a link, in a notebook's terminal that knows ASCII alone
        os.environ |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONIOENCODING": "ascii"}
        Path("run").symlink_to(PROGRAM)
        os.execv(sys.executable, [sys.executable, "run", *flags])
    driver.main(tyro.cli(driver.Config, args=flags))


class Program:
    """A running program whose processes, and theirs, can be found by a mark in their environment."""

    def __init__(self, *flags: str, cwd: Path, as_typed: bool = False):
        self.mark, self.log = f"RLHF_TEST_MARK={uuid.uuid4()}", cwd / "log"
        self.log.touch()
        arguments = (flags, str(cwd), self.mark, as_typed)
        self.process = fork_server().Process(target=be_program, args=arguments, daemon=True)
        self.process.start()

    def wait(self, timeout_s: float) -> int | None:
        """The exit code; None if it has not ended."""
        self.process.join(timeout_s)
        return self.process.exitcode

    def printed(self) -> str:
        return self.log.read_text()

    def processes(self) -> dict[int, str]:
        """Pid -> command line of everything that carries the mark."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                own = int(folder.name) == self.process.pid and self.process.is_alive()
                if own or self.mark.encode() in (folder / "environ").read_bytes():
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # it ended while we looked
        return found

    def wait_until_printed(self, text: str, timeout_s: float = 240) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.printed():
            assert self.wait(0) is None and time.monotonic() < deadline, self.printed()[-3000:]
            time.sleep(0.5)

    def ends_by(self, how: int) -> float:
        """It gets a signal and ends, without a traceback and with everything; seconds until all is gone."""
        began = time.monotonic()
        os.kill(self.process.pid, how)
        expected = {signal.SIGINT: 130, signal.SIGTERM: 130, signal.SIGKILL: -signal.SIGKILL}
        assert self.wait(60) == expected[how] and "Traceback" not in self.printed(), self.printed()[-5000:]
        self.assert_nothing_left()
        return time.monotonic() - began

    def assert_nothing_left(self, timeout_s: float = 30) -> None:
        deadline = time.monotonic() + timeout_s
        while left := self.processes():
            assert time.monotonic() < deadline, f"{timeout_s} s after the end there still run: {left}"
            time.sleep(0.5)


def run_default(folder: Path) -> tuple:
    """A newcomer's command, from another directory, but with half its prompts, one rank of an engine, and a
    checkpoint half way: that directory, and what is there at the end.
    """
    (folder := folder / "läuft").mkdir()
    smaller = ["--prompts-per-step", "16", "--tensor-parallel-size", "1"]
    program = Program("--save-every", "10", *smaller, cwd=folder, as_typed=True)
    assert program.wait(600) == 0, program.printed()[-5000:]
    program.assert_nothing_left()
    summary = json.loads((folder / "outputs" / "summary.json").read_text())
    return folder, summary, driver.read_metrics(folder / "outputs" / "metrics.jsonl"), program.printed()


@pytest.fixture(scope="module")
def default_run(background):
    return background["default_run"][0].result()


TRACKER = """
def init(**_): pass
def log(metrics, step): raise ConnectionError("an outage")
def finish(): raise SystemExit(3)
"""


def test_overlapped_steps_learn_from_weights_one_step_old(tmp_path, monkeypatch, capsys):
    """Every version is known; the batch of a run's first step is fresh, also of a resumed one. A tracker
    that fails is no reason to fail.
    """
    (tmp_path / "trackio.py").write_text(TRACKER)
    monkeypatch.syspath_prepend(tmp_path)
    # 17 x 16 prompts are more than vLLM takes in at a time; none may be cut in two.
    settings = dict(overlap=True, prompts_per_step=17, max_tokens=8, tensor_parallel_size=1, track="trackio")
    settings["output_dir"] = tmp_path
    with local_actors():
        driver.main(driver.Config(steps=3, **settings))
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "metrics.jsonl").write_text(lines[0] + lines[2])  # as if a run had failed in step 1
        driver.main(driver.Config(steps=5, resume=tmp_path / "checkpoint-3", **settings))
    rows = driver.read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["staleness"]) for row in rows] == [(0, 0), (2, 1), (3, 0), (4, 1)]
    assert [row["sampled_version"] for row in rows] == [4, 5, 4, 4]  # a proof syncs four times
    assert rows[0]["mismatch_kl"] < rows[1]["mismatch_kl"], "there is a step between"
    warned = "Warning: --track trackio fails, the run goes on: ConnectionError('an outage')\n"
    printed = capsys.readouterr().err
    assert warned in printed and printed.count("Warning: ") == 1


def test_two_unquantized_engines_on_two_nodes_show_no_mismatch(tmp_path):
    """The control, with weights that stay as they are: what FP8 shows is quantization and not a broken sync.

    Not at temperature 1, so that both sides must mean the distribution that is sampled from. Each engine has
    a bundle of its own, both are in one group; actors on another node find the modules. A termination saves
    what was learned and leaves nothing reserved.
    """
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=2)
        flags = ["--ray-address", cluster.address, "--num-engines", "2", "--tensor-parallel-size", "1"]
        control = ["--quantization", "none", "--learning-rate", "0", "--temperature", "0.7"]
        control += ["--steps", "1000", "--prompts-per-step", "8"]
        program = Program(*flags, *control, cwd=tmp_path)
        program.wait_until_printed("step    1 |")
        program.ends_by(signal.SIGTERM)
        saved = re.search(r"(\d+) complete steps are saved: go on with --resume (.*)", program.printed())
        assert int(saved[1]) >= 2 and (Path(saved[2]) / "trainer.pt").exists()
        assert re.findall(r"worker \(rank (\d)\): (\d) linear", program.printed()) == [("1", "0"), ("2", "0")]
        proved = r"Proved by replay .* is what it was: 80 tensors \(.*\), 8 answers"
        assert re.search(proved, program.printed())
        rows = driver.read_metrics(tmp_path / "outputs" / "metrics.jsonl")
        assert [row["weights_version"] for row in rows[:2]] == [5, 6]
        assert all(row["mismatch_kl"] < 1e-4 for row in rows)
        look = "import ray, sys; ray.init(sys.argv[1]); groups = ray.util.placement_group_table().values(); "
        look += "print([group['state'] for group in groups])"
        states = subprocess.run(
            [sys.executable, "-c", look, cluster.address], capture_output=True, text=True, check=True
        )
        assert eval(states.stdout) == ["REMOVED"] * 3
    finally:
        cluster.shutdown()


def test_default_run(loading, default_run):
    """A proved sync, and a summary with everything in it. (Meanwhile the actors of the next files load.)"""
    folder, summary, _, printed = default_run
    assert "curves.png to " in printed and "l\\xe4uft/outputs" in printed
    assert summary["device"] == "cpu" and summary["model"] == str(driver.TINY) and summary["world_size"] == 2
    assert summary["quantization"] == "fp8-weight-only"
    assert summary["fp8_linear_layers"] == 8
    for rank in summary["ranks"]:
        assert rank["fp8_linear_layers"] == 8
        assert 0 < rank["fp8_gib"] < rank["weights_gib"] < rank["bf16_weights_gib"]
        assert rank["not_fp8"].keys() == {"VocabParallelEmbedding", "OPTLearnedPositionalEmbedding"}
    assert len(summary["ranks"]) == 1 and summary["last_step"]["step"] == 19
    assert summary["last_step"]["weights_version"] == 24  # four of the proof, one for each step
    sync = summary["sync"]
    assert sync["verified"] is True and sync["path"] == "replay" and sync["because"] is None
    # 44 parameters (8 with scales) and buffers, and copies of two scales in both attentions.
    assert sync["tensors"] == 48 > sync["changed"] >= 36 and sync["answers"] == 4
    assert 1e-4 < sync["mismatch_kl_at_start"] < 1e-2, "FP8's"
    assert 0 <= sync["mismatch_kl_without_fp8"] < sync["mismatch_kl_at_start"] / 10
    assert sync["gb_per_s"] == pytest.approx(sync["bytes"] / sync["seconds"] / 1e9)
    layer = (
        4 * (128 * 128 + 128) + (128 * 256 + 256) + (256 * 128 + 128) + 2 * 2 * 128
    )  # q, k, v, out; fc1; fc2; norms
    assert sync["bytes"] == 2 * ((259 + 514) * 128 + 2 * layer + 2 * 128)
    assert any(sample["before"] != sample["after"] for sample in summary["samples"])
    assert set(summary["versions"]) == {"torch", "vllm", "torchao", "ray", "transformers"}
    assert f"trainer (cpu) and 1 engine(s) (cpu, TP=1): {driver.TINY} ..." in printed
    assert "worker (rank 1): 8 linear layers in FP8, 0." in printed
    said = f"the engine is what it was: 48 tensors ({sync['changed']} follow the weights), 4 answers"
    assert re.search(
        r"Proved by replay in \d+\.\d s: set to zero and synced, and again behind other", printed
    )
    assert said in printed
    curves = imread(folder / "outputs" / "curves.png")
    assert curves.shape[1] > curves.shape[0] > 100 and curves.std() > 0


def test_it_learns(default_run):
    """To write words backwards that training never saw; the engine's noise stays in its usual range."""
    _, summary, rows, printed = default_run
    assert [row["step"] for row in rows] == list(range(20))
    assert rows[0]["reward"] < 0.5 and rows[-1]["reward"] > 0.8
    means, shares = summary["held_out"]["reward"], summary["held_out"]["all_right"]
    assert means[0] < 0.8 and means[1] > 0.9 and shares[0] <= 0.1 and shares[1] > 0.6
    for name, (before, after) in summary["held_out"].items():
        assert f"Held-out prompts, {name}: {before:.3f} before training, {after:.3f} after\n" in printed
    asked = [json.loads(line)["prompt"] for line in HELD_OUT.read_text().splitlines()[:4]]
    assert [sample["prompt"] for sample in summary["samples"]] == asked
    assert rows[0]["mismatch_kl"] > 1e-4, "FP8's noise, which the control below does not have"
    assert all(row["mismatch_kl"] < 0.05 for row in rows)
    assert (
        all(0.9 < row["effective_sample_size"] <= 1 for row in rows) and rows[0]["effective_sample_size"] < 1
    )
    assert any(row["ppo_clipped"] > 0 for row in rows), "in the second epoch the policy has moved"
    assert all(row["staleness"] == 0 for row in rows)
    assert len(re.findall(r"^step +\d+ \| reward .* tokens/s .* GB/s\) .* GiB$", printed, re.MULTILINE)) == 20


def test_a_first_run_is_short_and_quiet(default_run):
    """No warning and no progress bar of any library; what takes long is announced, if need be often."""
    lines = [line for line in default_run[3].splitlines() if not re.match(r"\.\.\. .*: \d+ s$", line)]
    ours = (
        r"Importing|Starting|worker \(rank \d\)|  not in FP8|Agreed on|Proved|Ready after|step |  sample|"
        r"Mismatch KL|Held-out prompts|Wrote "
    )
    assert len(lines) <= 40 and not [line for line in lines if not re.match(ours, line)]


def test_resumed_run_gives_the_same_curve(default_run, tmp_path):
    """Model, optimizer, step, prompts and sampling all go on where they were, here in the test's process and
    without Ray; that also shows that a run repeats.
    """
    folder, _, rows, _ = default_run
    flags = dict(resume=folder / "outputs" / "checkpoint-10", steps=12, output_dir=tmp_path)
    flags |= dict(prompts_per_step=16, tensor_parallel_size=1)
    with local_actors():
        driver.main(driver.Config(**flags))
    resumed = driver.read_metrics(tmp_path / "metrics.jsonl")
    changing = {
        "rollout_s",
        "train_s",
        "sync_s",
        "step_s",
        "tokens_per_s",
        "sync_gb_per_s",
        "trainer_gib",
        "sampled_version",
        "weights_version",
        "sync_path",
    }
    stable = [
        [{k: v for k, v in row.items() if k not in changing} for row in run] for run in (rows[10:12], resumed)
    ]
    assert len(resumed) == 2 and len(stable[0][0]) > 10 and stable[0] == stable[1]


def test_checkpoint_is_a_model_for_others(default_run):
    """Transformers writes held-out words backwards; plain vLLM agrees with it on greedy tokens."""
    checkpoint = str(default_run[0] / "outputs" / "checkpoint-20")
    config = driver.Config(quantization="none", tensor_parallel_size=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    plain = dict(worker_extension_cls="", distributed_executor_backend="mp")  # in a worker that is untouched
    with local_engine(checkpoint, config, vllm.LLM, **plain) as llm:
        tokens = [answer[0] for answer in generate(llm)]
    rows = [json.loads(line) for line in HELD_OUT.read_text().splitlines()]
    inputs = tokenizer([row["prompt"] for row in rows], return_tensors="pt")
    answers = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs.input_ids.shape[1] :]
    said = tokenizer.batch_decode(answers, skip_special_tokens=True)
    rewards = driver.backwards(said, [row["answer"] for row in rows])
    assert len(rewards) == 100 and rewards.count(1.0) > 60
    for prompt, generated in zip(PROMPTS[:3], tokens):
        inputs = tokenizer(prompt, return_tensors="pt")
        expected = model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1]
        assert expected == generated[0]


ENDS = [  # Ctrl-C at the start; a killed driver, of whose workers one is stopped and cannot see the end
    ("Starting Ray, trainer", None, signal.SIGINT),
    ("step    1 |", "VLLM::Worker_TP1", signal.SIGKILL),
]


def end(tmp_path: Path, after: str, stopped: str | None, how: int) -> str:
    """A program that gets a signal, after one of its processes was stopped, as soon as it has printed
    something, takes every process along; how long that took.
    """
    program = Program("--steps", "1000", "--prompts-per-step", "4", cwd=tmp_path)
    try:
        program.wait_until_printed(after)
        if stopped:
            [pid] = [pid for pid, command in program.processes().items() if command.startswith(stopped)]
            os.kill(pid, signal.SIGSTOP)
        time.sleep(1)
        gone_s = program.ends_by(how)
        return f"FAULT {how!r} after {after!r}, {stopped} stopped: all gone {gone_s:.1f} s later"
    finally:
        for pid in program.processes():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def ends(background):
    return [ending.result() for ending in background["ends"]]


def test_nothing_is_left_behind(ends):
    """Of neither of the programs. The one on two nodes is terminated."""
    print(*ends, sep="\n")
