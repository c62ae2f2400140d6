"""The proof for many architectures: at TP=1 in this process, meanwhile at TP=2 in another one."""

import json
import os
import signal
import subprocess
import sys

import pytest

from architectures import ARCHITECTURES, FRESH, follow
from harness import HERE

# One of each kind of sharding: separate and (in three ways) fused attention, transposed and fused MLP, a
# padded vocabulary, experts. The others at 2: by hand, see RESULTS.md.
AT_TWO = ["opt", "gpt2", "gpt-neox", "falcon", "phi-3", "llama-321", "mixtral", "llama-321@fp8_per_channel"]
BY_SESSION = {
    "gpt2",
    "bloom",
    "falcon",
    "mamba-2",
    "mixtral",
    "qwen-2-moe",
    "qwen-3-moe",
    "glm-4-moe",
}  # on the CPU


@pytest.fixture(scope="module")
def found_at_two():
    """A function of a name that waits for what architectures.py found at TP=2."""
    command = [sys.executable, HERE / "architectures.py", "2", *AT_TWO]
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
    """Zeroed and synced it is as at its start, by the expected path; with other weights as a fresh engine."""
    assert "error" not in found, found["error"]
    path = "session" if name in BY_SESSION else "replay"
    assert found["proof"]["verified"] and found["proof"]["path"] == path
    assert found["proof"]["tensors"] > 20 * tensor_parallel_size
    assert found["proof"]["answers"] == (1 if "@" in name else 4)
    assert found["compared"] == (path == "replay"), (
        "the first other weights are replayed and loaded by session"
    )
    assert found["as_in_file"] and found["fp8"] >= 4 and found["buckets"] > 10, (
        "weights are cut between buckets"
    )
    assert found.get("fresh") is (True if name in FRESH else None)


@pytest.mark.parametrize("name", [*ARCHITECTURES, "opt@fp8_per_channel"])
def test_engine_equals_its_cold_start_and_follows(found_at_two, tmp_path, name):
    check(follow(name, 1, str(tmp_path)), name, 1)


@pytest.mark.parametrize("name", AT_TWO)
def test_engine_equals_its_cold_start_and_follows_at_two(found_at_two, name):
    check(found_at_two(name), name, 2)
