"""Sequences of syncs for many architectures: at TP=1 in this process, meanwhile at TP=2 in another one."""

import json
import os
import signal
import subprocess
import sys

import pytest

from architectures import ARCHITECTURES, MECHANISMS, follow
from harness import HERE

# One of each kind of sharding: two of fused attention, experts, MLA, a padded vocabulary; the program's tests
# have OPT. The others at 2: by hand, see RESULTS.md.
AT_TWO = ["falcon", "phi-3", "mixtral", "deepseek-v3", "llama-321@fp8_per_channel"]
COMPUTED = {"gpt2", "bloom", "falcon", "mamba-2", "deepseek-v3"}  # vLLM's loaders, or what it derives
PACKED = {"mixtral", "qwen-2-moe", "qwen-3-moe", "glm-4-moe", "olmoe", "granite-moe"}  # experts, on the CPU


@pytest.fixture(scope="module")
def found_at_two():
    """A function of a name that waits for what architectures.py found at TP=2."""
    # An engine takes 5 s to start here: one fresh one for each, behind all that has come.
    command = [sys.executable, HERE / "architectures.py", "2:3", *AT_TWO]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        found = {}

        def wait(name: str) -> dict:
            if not found:
                out, err = process.communicate(timeout=400)
                lines = [line[6:] for line in out.splitlines() if line.startswith("FOUND ")]
                assert lines, err[-3000:]
                found.update(item for line in lines for item in json.loads(line).items())
            return found[name]

        yield wait
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its workers too


def check(found: dict, name: str, tensor_parallel_size: int) -> None:
    """Proved by the expected path; then four other sets of weights, each as in a fresh engine."""
    assert "error" not in found, found["error"]
    path = "session" if name in COMPUTED | PACKED else "replay"
    proof = found["proof"]
    assert proof["verified"] and proof["path"] == path
    assert proof["tensors"] > proof["changed"] > 15 * tensor_parallel_size
    assert proof["answers"] == (1 if "@" in name else 4)
    expected = [path if mechanism == "replay" else "session" for mechanism in MECHANISMS]
    assert found["paths"] == expected and found["wrong"] == []
    assert found["as_in_file"] and found["fp8"] >= 4 and found["repeatable"]
    assert found["buckets"] > 10, "weights are cut between buckets"


@pytest.mark.parametrize("name", [*ARCHITECTURES, "opt@fp8_per_channel"])
def test_engine_equals_fresh_ones_behind_every_sync(found_at_two, tmp_path, name):
    check(follow(name, 1, str(tmp_path)), name, 1)


@pytest.mark.parametrize("name", AT_TWO)
def test_engine_equals_fresh_ones_behind_every_sync_at_two(found_at_two, name):
    check(found_at_two(name), name, 2)
