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

PROGRAM = Path(__file__).resolve().parent.parent / "rlhf_online_quant.py"


class Program:
    """A running program whose processes, and theirs, can be found by a mark in their environment."""

    def __init__(self, *flags: str, cwd: Path):
        self.mark = f"RLHF_TEST_MARK={uuid.uuid4()}"
        environment = os.environ | dict([self.mark.split("=")])
        self.log = (cwd / "log").open("w+")
        command = [sys.executable, str(PROGRAM), *flags]
        self.process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=self.log, stderr=subprocess.STDOUT)

    def printed(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def processes(self) -> dict[int, str]:
        """Pid -> command line of everything that carries the mark."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes():
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # it ended while we looked
        return found

    def wait_until_printed(self, text: str, timeout_s: float = 240) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.printed():
            assert self.process.poll() is None and time.monotonic() < deadline, self.printed()[-3000:]
            time.sleep(0.5)

    def assert_nothing_left(self, timeout_s: float = 30) -> None:
        deadline = time.monotonic() + timeout_s
        while left := self.processes():
            assert time.monotonic() < deadline, f"{timeout_s} s after the end there still run: {left}"
            time.sleep(0.5)


def test_default_run(tmp_path):
    """A newcomer's command, from another directory: a verified sync, and a summary with everything in it."""
    program = Program("--verify", cwd=tmp_path)
    assert program.process.wait(600) == 0, program.printed()[-5000:]
    program.assert_nothing_left()
    summary = json.loads((tmp_path / "outputs" / "summary.json").read_text())
    assert summary["device"] == "cpu" and summary["model"] == "tiny" and summary["world_size"] == 3
    assert summary["quantization"] == "fp8-weight-only"
    assert summary["fp8_linear_layers"] == 8 and summary["unquantized_linear_layers"] == 1
    assert 0 < summary["weights_gib"] < summary["bf16_weights_gib"]
    assert summary["weights_version"] == 1
    sync = summary["sync"]
    assert sync["verified"] is True and sync["changed"] is True and sync["compared_tensors"] == 72
    assert sync["gb_per_s"] == pytest.approx(sync["bytes"] / sync["seconds"] / 1e9)
    layer = 4 * (128 * 128 + 128) + (128 * 256 + 256) + (256 * 128 + 128) + 2 * 2 * 128  # q, k, v, out; fc1; fc2; norms
    assert sync["bytes"] == 2 * ((259 + 514) * 128 + 2 * layer + 2 * 128)
    assert any(sample["before"] != sample["after"] for sample in summary["samples"])
    assert summary["train"]["tokens"] > 0 and summary["train"]["loss"] > 0
    assert set(summary["versions"]) == {"python", "torch", "vllm", "torchao", "ray", "transformers"}
    printed = program.printed()
    assert "No GPU found: running the same processes on the CPU" in printed
    assert "engine rank 1: 8 linear layers in FP8, 1 not" in printed and "One verified FP8 weight sync" in printed


def end(program: Program, how: str) -> None:
    """Interrupt the driver, terminate it, or kill an actor."""
    if how == "SIGINT":
        program.process.send_signal(signal.SIGINT)
    elif how == "SIGTERM":
        program.process.send_signal(signal.SIGTERM)
    else:
        [victim] = [pid for pid, command in program.processes().items() if re.match(how, command)]
        os.kill(victim, signal.SIGKILL)


@pytest.mark.parametrize(
    ("after", "how"),
    [
        ("Starting trainer", "SIGINT"),
        ("engine rank 1", "SIGTERM"),
        ("Starting trainer", "ray::Trainer"),
        ("engine rank 1", "ray::MyLLM"),
    ],
)
def test_nothing_is_left_behind(tmp_path, after, how):
    """Ctrl-C, a termination or a killed actor ends the program with an error and takes every process along."""
    program = Program("--max-tokens", "400", cwd=tmp_path)
    try:
        program.wait_until_printed(after)
        if how.startswith("ray::"):
            deadline = time.monotonic() + 60
            while not any(re.match(how, command) for command in program.processes().values()):
                assert time.monotonic() < deadline, program.processes()
                time.sleep(0.2)
        time.sleep(1)
        end(program, how)
        assert program.process.wait(120) != 0
        program.assert_nothing_left()
    finally:
        for pid in program.processes():
            os.kill(pid, signal.SIGKILL)
