"""TRL as it is against `vllm serve`: vLLM's own weight transfer, and the helper's backend, in one run.

    python tests/bench/bench_transfer.py --shape qwen3-0.6b --quantization fp8_per_channel [any flag]

For each backend a server of its own starts, and TRL's GRPO (`peer_trl.py`) trains against one after another.
Then the tensors and greedy answers of the helper's server are compared with those of a fresh one, of the
weights of TRL's last update. Prints lines, writes OUTPUT_DIR/transfer.json. Needs trl==1.16.0 "datasets<5".
"""

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import tests_on_path  # noqa: F401
import tyro
from peak_memory import PeakMemory
from vllm.utils.network_utils import get_open_port

from harness import driver, helper
from random_models import build_random_model

PROJECT = Path(__file__).resolve().parents[2]
STARTED: dict[int, subprocess.Popen] = {}  # servers by port


class OwnExtension(PeakMemory, helper.WorkerExtension):
    """README's, and what the benchmark asks a worker besides."""


@dataclasses.dataclass
class Subject:
    """One shape, one quantization."""

    shape: str = "qwen3-0.6b"
    """A key of SHAPES in random_models.py; a model of random weights."""
    model: Path | None = None
    """A folder with a model, instead; it must be there."""
    quantization: str = "fp8_per_channel"
    """As the driver's flag."""
    backends: tuple[str, ...] = ("nccl", "online-quant")
    """Of vLLM's weight transfer."""

    @property
    def name(self) -> str:
        """Of the model."""
        return self.model.name if self.model else self.shape

    def path(self, folder: Path) -> str:
        """Of the model; one of random weights may have to be built there."""
        path = self.model or folder / self.shape
        return str(path) if self.model or path.exists() else build_random_model(path, self.shape)


@dataclasses.dataclass
class Benchmark(Subject):
    """A server and TRL's process for each backend."""

    max_tokens: int = 128
    gpus: tuple[str, str] = ("0", "1")
    """Of TRL, of the servers."""
    server_args: str = "--gpu-memory-utilization=0.4"
    """More for `vllm serve`."""
    max_model_len: int = 512
    peer_args: str = "--learning-rate=1e-5"
    """More for peer_trl.py."""
    output_dir: Path = Path("outputs/transfer")

    @property
    def learned(self) -> Path:
        """A checkpoint of TRL's last update."""
        return self.output_dir / "learned"


@contextlib.contextmanager
def server(config: Benchmark, model: str, name: str, backend: str | None) -> Iterator[int]:
    """`vllm serve` as README has it; its port. Without a backend it only answers."""
    port, arguments = get_open_port(), driver.quantization_arguments(config.quantization)
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "bfloat16", "--max-model-len", str(config.max_model_len)]
    command += ["--logprobs-mode", "processed_logprobs", *shlex.split(config.server_args)]
    for key, value in arguments.items():
        text = value if isinstance(value, str) else json.dumps(value)
        command += [f"--{key.replace('_', '-')}", text] if value else []
    extension = "peak_memory.PeakMemory" if backend == "nccl" else "bench_transfer.OwnExtension"
    command += ["--worker-extension-cls", extension]
    if backend:
        command += ["--weight-transfer-config", json.dumps({"backend": backend})]
    environment = {"CUDA_VISIBLE_DEVICES": config.gpus[1], "VLLM_SERVER_DEV_MODE": "1"}
    folders = [PROJECT, PROJECT / "tests", PROJECT / "tests" / "bench"]
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, folders)), "TORCHINDUCTOR_DETERMINISTIC": "1"}
    with (config.output_dir / f"server_{name}.log").open("w") as log:
        how = dict(env=os.environ | environment, stdout=log, stderr=log, start_new_session=True)
        process = STARTED[port] = subprocess.Popen(command, **how)
        try:
            yield port
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def wait_for_server(port: int, limit_s: float = 400) -> None:
    """Until it answers."""
    give_up = time.monotonic() + limit_s
    while True:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
        except OSError as error:
            if STARTED[port].poll() is not None or time.monotonic() > give_up:
                raise TimeoutError("the server is not up: see its log") from error
            time.sleep(1)


def post(port: int, path: str, body: dict) -> dict:
    """What the server answers."""
    data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", data, kind)
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.loads(response.read())


def ask_workers(port: int, method: str) -> list:
    """What each of them returns."""
    return post(port, "collective_rpc", {"method": method})["results"]


def answer(port: int, model: str, prompt: list[int]) -> str:
    """Greedy."""
    body = dict(model=model, prompt=prompt, temperature=0, max_tokens=32)
    return post(port, "v1/completions", body)["choices"][0]["text"]


def look(port: int, model: str, asked: list[list[int]]) -> tuple[list[dict], list[str]]:
    """Digests of what the workers' models reach; greedy answers, which come first, one at a time."""
    answers = [answer(port, model, prompt) for prompt in asked]
    return ask_workers(port, "reached_digests"), answers


def differences(one: list[dict], two: list[dict]) -> int:
    """Count of the tensors that differ, by their digests on each worker."""
    pairs = zip(one, two, strict=True)
    return sum(a.get(name) != b.get(name) for a, b in pairs for name in a | b)


def train(config: Benchmark, model: str, port: int, backend: str) -> dict:
    """What TRL's process says; of the helper's backend it saves the last weights, in `learned`."""
    flags, learned = {"model": model, "port": port, "max-tokens": config.max_tokens}, config.learned
    flags |= {} if backend == "nccl" else {"save-to": learned}
    command = [sys.executable, str(Path(__file__).with_name("peer_trl.py")), "--prompts", *helper.PROMPTS]
    command += [*(f"--{name}={value}" for name, value in flags.items()), *shlex.split(config.peer_args)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": config.gpus[0]}
    with (config.output_dir / f"trl_{backend}.log").open("w") as log:
        how = dict(stdout=subprocess.PIPE, stderr=log, text=True, timeout=580, check=True)
        output = subprocess.run(command, env=environment, **how).stdout
    return json.loads(output.strip().splitlines()[-1])


def main(config: Benchmark) -> None:
    """Measure, compare, print, write."""
    config.output_dir.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(config.learned, ignore_errors=True)
    model, found, seen = config.path(config.output_dir), {}, {}
    title = f"RESULT {config.name} {config.quantization}"
    with contextlib.ExitStack() as servers:
        ports = {each: servers.enter_context(server(config, model, each, each)) for each in config.backends}
        for port in ports.values():
            wait_for_server(port)
        for backend, port in ports.items():
            answer(port, model, [1, 2, 3])  # as a user does who tries it before training
            before = ask_workers(port, "reached_digests") if backend != "nccl" else []
            ask_workers(port, "start_peak")
            found[backend] = train(config, model, port, backend)
            found[backend]["extra_gib"] = [float(gib) for gib in ask_workers(port, "extra_gib")]
            if backend != "nccl":
                seen[backend] = look(port, model, found[backend]["asked"])
                found[backend]["changed"] = differences(before, seen[backend][0])
            said = {"step_s": statistics.median(found[backend]["step_s"])}
            said |= {"sync_s": statistics.median(found[backend]["sync_s"][1:])}  # behind the first
            more = ("extra_gib", "trainer_gib", "held_out", "changed")
            said |= {key: found[backend][key] for key in more if key in found[backend]}
            print(f"{title} {backend}: {json.dumps(said)}", flush=True)
    for backend, (digests, answers) in seen.items():
        learned = str(config.learned)
        with server(config, learned, "fresh", None) as port:
            wait_for_server(port)
            fresh, said = look(port, learned, found[backend]["asked"])
        different = differences(digests, fresh)
        same = sum(one == two for one, two in zip(answers, said, strict=True))
        found[backend] |= {"different": different, "same_answers": same}
        line = f"{different} of {sum(map(len, digests))} tensors differ from a fresh server's"
        print(f"{title} {backend}: {line}, {same} of {len(said)} answers are equal", flush=True)
    (config.output_dir / "transfer.json").write_text(
        json.dumps(dataclasses.asdict(config) | found, default=str)
    )


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
