"""Long runs outside CI: the loop for minutes on end, and signals at random moments of many short runs.

    python tests/bench/soak.py --minutes 15 --signals 20

Prints memory, handles and the time of a sync over the run, and for each signal in which phase it came and how
long it took until every process was gone. Fails if anything drifts or stays.
"""

import dataclasses
import os
import random
import re
import signal
import statistics
import tempfile
import time
from pathlib import Path

import psutil
import tests_on_path  # noqa: F401
import tyro
from test_program import Program

from harness import driver


@dataclasses.dataclass
class Soak:
    """How much."""

    minutes: float = 15
    """Of the loop, without the start."""
    signals: int = 20
    """Runs that are ended by SIGINT, SIGTERM or SIGKILL in turn."""
    seed: int = 0
    """Of the moments."""


def usage(program: Program) -> dict[str, tuple[float, int]]:
    """Resident MiB and handles of the trainer, the engine and its workers."""
    found = {}
    for process in (psutil.Process(pid) for pid in program.processes()):
        name = " ".join(process.cmdline())
        if name.startswith(("ray::Trainer", "ray::RolloutLLM", "VLLM::Worker")):
            found[re.split("[. ]", name)[0]] = (process.memory_info().rss / 2**20, process.num_fds())
    return found


def loop(minutes: float, folder: Path) -> None:
    """Run the loop and compare its end with its second minute."""
    program = Program("--steps", "1000000", "--save-every", "100", cwd=folder)
    program.wait_until_printed("step    0")
    time.sleep(60)
    first = usage(program)
    time.sleep(60 * minutes - 60)
    last = usage(program)
    os.kill(program.process.pid, signal.SIGTERM)
    program.wait(30)
    program.assert_nothing_left()
    rows = driver.read_metrics(folder / "outputs" / "metrics.jsonl")
    early, late = (statistics.median(row["sync_s"] for row in part) for part in (rows[10:60], rows[-50:]))
    syncs = f"{1e3 * early:.1f} ms at first, {1e3 * late:.1f} at last"
    print(f"{len(rows)} steps in {minutes:g} minutes; median sync {syncs}")
    for name, (mib, handles) in last.items():
        print(f"  {name}: {first[name][0]:.0f} -> {mib:.0f} MiB, {first[name][1]} -> {handles} handles")
        assert mib < 1.1 * first[name][0] + 20 and handles <= first[name][1] + 2
    assert late < 2 * early


def signals(count: int, folder: Path) -> None:
    """End runs at random moments between their start and their regular end."""
    for number in range(count):
        how, after = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)[number % 3], random.uniform(0, 60)
        (folder / str(number)).mkdir()
        program = Program("--save-every", "1", cwd=folder / str(number), as_typed=how == signal.SIGINT)
        ended = program.wait(after) is not None
        if not ended:
            os.kill(program.process.pid, how)
        began = time.monotonic()
        code = program.wait(30)
        program.assert_nothing_left()
        where = (program.printed().splitlines() or ["nothing printed"])[-1][:60]
        gone = time.monotonic() - began
        print(f"{how.name} after {after:4.1f} s ({where}): code {code}, all gone {gone:.1f} s later")
        assert ended or code != 0


def main(soak: Soak) -> None:
    random.seed(soak.seed)
    with tempfile.TemporaryDirectory() as folder:
        signals(soak.signals, Path(folder))
        if soak.minutes:
            (Path(folder) / "loop").mkdir()
            loop(soak.minutes, Path(folder) / "loop")


if __name__ == "__main__":
    main(tyro.cli(Soak))
