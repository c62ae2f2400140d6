"""RL with an FP8 rollout engine that is quantized online: the reference pattern.

    driver (this program, no GPU)
      |-- trainer   Ray actor, GPU 0            full-precision Hugging Face model, AdamW
      `-- engine    Ray actor MyLLM(vllm.LLM)   FP8 through torchao, tensor parallel on GPUs 1-2
            weights: trainer == NCCL broadcast, full precision ==> each worker, quantized on arrival

It starts both sides, proves that the engine is FP8, generates, takes an optimizer step, syncs, verifies what arrived,
and generates again. Two things differ from the example that is usually copied:

- `quantization="torchao"` is passed beside the torchao config. The config alone is ignored and the engine stays BF16.
- A sync is one reload session. `load_weights` once per parameter leaves a quantized engine with uninitialized memory.

Without a GPU the same processes run on the CPU (gloo, weight-only FP8, a tiny random model).
"""

import contextlib
import dataclasses
import json
import math
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import psutil
import ray
import torch
import torchao
import transformers
import tyro
import vllm
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from rich.console import Console
from rich.table import Table
from torchao.core.config import AOBaseConfig, config_from_dict, config_to_dict
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Float8WeightOnlyConfig, PerRow
from vllm import LLM, SamplingParams

from rlhf_utils import (
    BUCKET_BYTES,
    make_manifest,
    peak_memory_gib,
    reset_peak_memory,
    send_weights,
    stateless_init_process_group,
)

HERE = Path(__file__).resolve().parent
PROMPTS = [
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
]


@dataclasses.dataclass
class Config:
    """RL with an FP8 vLLM rollout engine, quantized online: one verified weight sync, before and after."""

    model: str = "auto"
    """Hugging Face name, local folder, or `tiny` (random, built here). `auto`: facebook/opt-125m on GPUs, else tiny."""
    tensor_parallel_size: int = 2
    """GPUs of the engine (CPU: processes). The trainer's GPU comes on top."""
    trainer_device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where the trainer runs; `auto` takes a GPU if the cluster has any."""
    quantization: str = "auto"
    """`fp8-dynamic` (`auto` on GPUs), `fp8-weight-only` (`auto` on CPU), `none`, or a torchao config's JSON file."""
    trainer_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the trainer's weights. The engine computes in bfloat16, so that is what goes over the wire."""
    learning_rate: float = 1e-4
    """AdamW's step size."""
    enforce_eager: bool = False
    """Start faster and generate much more slowly: no compilation, no CUDA graphs. Always so on the CPU."""
    max_model_len: int = 512
    """Longest prompt plus completion, in tokens."""
    gpu_memory_utilization: float = 0.8
    """Share of each engine GPU that vLLM may fill with weights and KV cache."""
    prompts_file: Path | None = None
    """UTF-8 text, one prompt a line. Default: the four prompts of vLLM's examples."""
    max_tokens: int = 32
    """Longest completion, in tokens."""
    temperature: float = 0.7
    """Of the rollouts that the trainer learns from; 0 is greedy. The samples before and after are always greedy."""
    top_p: float = 1.0
    """Rollouts sample from the smallest set of tokens that holds this probability."""
    seed: int = 0
    """Of the tiny model's weights and of sampling."""
    bucket_mib: int = 256
    """Weights travel in buckets of this size (MiB); a larger weight gets its own."""
    verify: bool = False
    """After the sync, quantize the trainer's weights independently and compare every shard bit for bit."""
    timeout_s: float = 120.0
    """Longest wait (seconds) for one sync, generation or training step; start-up may take ten times as long."""
    ray_address: str | None = None
    """An existing Ray cluster, such as `auto` or `10.0.0.1:6379`. Default: start a private one."""
    output_dir: Path = Path("outputs")
    """Gets summary.json."""


# ----- The engine ----------------------------------------------------------------------------------------------------


class MyLLM(LLM):
    """vLLM with a version for its weights, which refuses to generate while they are incomplete.

    An update begins with `update_weight` or `receive_weights` and ends with `check_weights_changed` or with
    `receive_weights` itself. At the end the prefix cache, which holds the old weights' keys and values, is reset.
    """

    weights_version = 0
    torn: str | None = None  # why the weights are not one complete version

    def __repr__(self) -> str:  # LLM's own asks the workers, and Ray would put the answer before every log line
        return "MyLLM"

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        """Call a method of every worker; keeps account of updates."""
        if method in ("update_weight", "receive_weights"):
            self.torn = f"the weight update after version {self.weights_version} has not been completed"
        results = super().collective_rpc(method, timeout, args, kwargs)
        if self.torn and method in ("check_weights_changed", "receive_weights"):
            if not self.reset_prefix_cache():
                raise RuntimeError("vLLM refused to reset the prefix cache: requests are still running")
            self.weights_version += 1
            self.torn = None
        return results

    def generate(self, *args, **kwargs):
        """LLM.generate, unless the weights are torn."""
        if self.torn:
            raise RuntimeError(f"refusing to generate: {self.torn}; sync a complete set of weights first")
        return super().generate(*args, **kwargs)

    def get_weights_version(self) -> int:
        """How many complete updates the weights have had; 0 means as loaded at start-up."""
        return self.weights_version

    def shutdown(self) -> None:
        """Stop the engine's processes."""
        self.llm_engine.engine_core.shutdown()


def torchao_config(quantization: str) -> AOBaseConfig | None:
    """The torchao config behind `--quantization`; None for `none`.

    Raises:
        SystemExit: neither a known name nor a readable torchao config.
    """
    named = {
        # The lower bound keeps an all-zero activation row from being divided by its scale of 0; nothing else changes.
        "fp8-dynamic": Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), activation_value_lb=1e-12),
        "fp8-weight-only": Float8WeightOnlyConfig(),
        "none": None,
    }
    if quantization in named:
        return named[quantization]
    try:
        return config_from_dict(json.loads(Path(quantization).read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(
            f"--quantization {quantization}: expected {', '.join(named)}, or a file with the JSON of torchao's "
            f"config_to_dict(config). Found: {type(error).__name__}: {error}"
        ) from error


def engine_arguments(config: Config, path: str, device: str) -> dict:
    """Keyword arguments for `LLM`: an FP8 engine whose workers can receive weights."""
    on_cpu = "mp" if config.tensor_parallel_size > 1 else "uni"  # vLLM has no Ray workers on the CPU
    executor = "ray" if device == "cuda" else on_cpu
    arguments = dict(
        model=path,
        dtype="bfloat16",  # torchao's PerRow quantizes nothing else
        tensor_parallel_size=config.tensor_parallel_size,
        distributed_executor_backend=executor,
        worker_extension_cls="rlhf_utils.WorkerExtension",
        enforce_eager=config.enforce_eager or device == "cpu",
        max_model_len=config.max_model_len,
        gpu_memory_utilization=config.gpu_memory_utilization,
        seed=config.seed,
        disable_log_stats=True,
    )
    if quantization := torchao_config(config.quantization):
        as_json = json.dumps(config_to_dict(quantization))
        arguments |= dict(quantization="torchao", hf_overrides={"quantization_config_dict_json": as_json})
    return arguments


# ----- The trainer ---------------------------------------------------------------------------------------------------


class Trainer:
    """The full-precision side: model, optimizer, and rank 0 of the weight-update group."""

    def __init__(self, model: str, device: str, dtype: str, learning_rate: float):
        self.device = torch.device(device)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=learning_rate)

    def train_step(self, rollouts: list[tuple[list[int], list[int]]]) -> dict:
        """One AdamW step on the mean negative log-likelihood (nats per token) of the completions' tokens.

        Args:
            rollouts: (prompt token ids, completion token ids) pairs.
        """
        start = time.perf_counter()
        longest = max(len(prompt) + len(completion) for prompt, completion in rollouts)
        tokens_BT = torch.zeros(len(rollouts), longest, dtype=torch.long)
        attend_BT, learn_BT = torch.zeros_like(tokens_BT), torch.zeros_like(tokens_BT, dtype=torch.bool)
        for row, (prompt, completion) in enumerate(rollouts):
            end = len(prompt) + len(completion)
            tokens_BT[row, :end] = torch.tensor(prompt + completion)
            attend_BT[row, :end] = 1
            learn_BT[row, len(prompt) : end] = True
        tokens_BT, attend_BT, learn_BT = (t.to(self.device) for t in (tokens_BT, attend_BT, learn_BT))
        logits_BTV = self.model(input_ids=tokens_BT, attention_mask=attend_BT).logits[:, :-1].float()
        nll_N = torch.nn.functional.cross_entropy(
            logits_BTV[learn_BT[:, 1:]], tokens_BT[:, 1:][learn_BT[:, 1:]], reduction="none"
        )
        loss = nll_N.mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"loss": loss.item(), "tokens": nll_N.numel(), "seconds": time.perf_counter() - start}

    def open_rendezvous(self, address: str | None) -> tuple[str, int]:
        """Hold a listening socket on `address` (None: this node's own) and a free port; returns both."""
        address = address or ray.util.get_node_ip_address()
        self.listen_socket = socket.create_server((address, 0))
        return address, self.listen_socket.getsockname()[1]

    def init_weight_update_group(self, address: str, port: int, world_size: int, backend: str, timeout_s: float):
        """Join as rank 0, beside the workers' method of the same name."""
        self.group = stateless_init_process_group(
            address, port, 0, world_size, self.device, backend, timeout_s, self.listen_socket
        )

    def weight_manifest(self) -> list[list]:
        """Names, wire dtype and shapes of the weights, in sending order."""
        return make_manifest(self.model, torch.bfloat16)

    def send_weights(self, manifest: list[list], bucket_bytes: int) -> dict:
        """Broadcast every weight, beside the workers' `receive_weights` or `verify_weights`."""
        before, start = reset_peak_memory(self.device), time.perf_counter()
        buckets = send_weights(self.model, manifest, self.group, self.device, bucket_bytes)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return {
            "buckets": buckets,
            "seconds": time.perf_counter() - start,
            "extra_gib": peak_memory_gib(self.device, before),
        }

    def save_pretrained(self, folder: str) -> None:
        """Write model and tokenizer in Hugging Face format."""
        self.model.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(self.model.name_or_path).save_pretrained(folder)


# ----- The sync ------------------------------------------------------------------------------------------------------


def wait(refs: list, timeout_s: float, doing: str) -> list:
    """`ray.get(refs)` that raises the first failure when it happens, and TimeoutError after `timeout_s` seconds."""
    deadline, pending = time.monotonic() + timeout_s, list(refs)
    while pending:
        done, pending = ray.wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            raise TimeoutError(f"{doing} took longer than {timeout_s:g} s")
        ray.get(done)
    return ray.get(refs)


def sync_weights_to_quantized_engine(
    train_model, quantized_llm, *, bucket_bytes: int = BUCKET_BYTES, verify: bool = False, timeout_s: float = 120.0
) -> dict:
    """Bring the engine to the trainer's weights: manifest, broadcast into one reload session, digests, cache reset.

    Args:
        train_model, quantized_llm: handles of the `Trainer` and `MyLLM` actors, which have joined one group.
        verify: broadcast a second time and compare every shard with an independent quantization, bit for bit.

    Returns:
        `bytes` on the wire, `seconds` from the first byte to the reset prefix cache, `gb_per_s` (1e9), `verified` (on
        every rank, the digest of every bucket equals the sender's), `changed` (on any rank), and per-rank details.

    Raises:
        ray.exceptions.RayTaskError: what is wrong with which weight on which rank. Unless no byte has moved, the engine
            refuses to generate.
        RuntimeError: with `verify`, the tensors that differ.
        TimeoutError: the group did not finish in `timeout_s` seconds.
    """
    [manifest] = wait([train_model.weight_manifest.remote()], timeout_s, "listing the trainer's weights")
    check = quantized_llm.collective_rpc.remote("check_weight_manifest", args=(manifest,))
    wait([check], timeout_s, "checking the manifest")

    def broadcast_to(method: str) -> tuple[dict, list[dict]]:
        receiving = quantized_llm.collective_rpc.remote(method, args=(manifest, bucket_bytes))
        sending = train_model.send_weights.remote(manifest, bucket_bytes)
        return wait([sending, receiving], timeout_s, f"broadcasting weights to {method}")

    start = time.perf_counter()
    sent, ranks = broadcast_to("receive_weights")
    seconds = time.perf_counter() - start
    size = sum(2 * math.prod(shape) for _, _, shape in manifest)
    result = {
        "bytes": size,
        "seconds": seconds,
        "gb_per_s": size / seconds / 1e9,
        "verified": all(rank["buckets_matched"] == sent["buckets"] for rank in ranks),
        "changed": any(rank["changed"] for rank in ranks),
        "compared_tensors": 0,
        "sender": sent,
        "ranks": ranks,
    }
    if verify:
        _, comparisons = broadcast_to("verify_weights")
        result["compared_tensors"] = sum(comparison["compared"] for comparison in comparisons)
        result["hidden_tensors"] = [
            f"rank {rank}: {name}" for rank, c in enumerate(comparisons) for name in c["hidden"]
        ]
        if different := [f"rank {rank}: {name}" for rank, c in enumerate(comparisons) for name in c["different"]]:
            raise RuntimeError(f"{len(different)} tensors of the engine are not the trainer's: {', '.join(different)}")
    [result["weights_version"]] = wait([quantized_llm.get_weights_version.remote()], timeout_s, "reading the version")
    return result


# ----- Start, run, report, stop --------------------------------------------------------------------------------------


def resolve(config: Config, gpus: int) -> tuple[Config, str]:
    """Fill in every `auto` for a cluster with that many GPUs; returns the config and the engine's device.

    Raises:
        SystemExit: too few GPUs; the message has the count found, the count needed and the command that fits.
    """
    device = "cuda" if gpus else "cpu"
    trainer_device = device if config.trainer_device == "auto" else config.trainer_device
    needed = (config.tensor_parallel_size if device == "cuda" else 0) + (trainer_device == "cuda")
    if gpus < needed:
        fits = "--tensor-parallel-size 1" * bool(gpus) + " --trainer-device cpu" * (gpus < 2)
        raise SystemExit(
            f"Found {gpus} GPU(s), need {needed}: {needed - (trainer_device == 'cuda')} for the engine "
            f"(--tensor-parallel-size) and {int(trainer_device == 'cuda')} for the trainer.\n"
            f"What fits here: python {Path(sys.argv[0]).name} {fits.strip()}"
        )
    if not gpus:
        print("No GPU found: running the same processes on the CPU (gloo; by default weight-only FP8, a tiny model).")
    model, quantization = ("facebook/opt-125m", "fp8-dynamic") if gpus else ("tiny", "fp8-weight-only")
    return dataclasses.replace(
        config,
        model=model if config.model == "auto" else config.model,
        quantization=quantization if config.quantization == "auto" else config.quantization,
        trainer_device=trainer_device,
    ), device


def find_model(model: str, folder: str, seed: int) -> str:
    """Check that a model can be had before any process starts; builds `tiny` in `folder`."""
    if model == "tiny":
        from tests.random_models import build_random_model

        return build_random_model(folder, seed=seed)
    try:
        transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"--model {model}: expected a model on the Hugging Face hub (reachable, and public or logged in), a local "
            f"folder with config.json, or `tiny`. Found: {error}"
        ) from error
    return model


def read_prompts(path: Path | None) -> list[str]:
    """The non-empty lines of a UTF-8 file."""
    if path is None:
        return PROMPTS
    try:
        prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"--prompts-file {path}: expected UTF-8 text, one prompt a line. Found: {error}") from error
    if not prompts:
        raise SystemExit(f"--prompts-file {path}: expected one prompt a line, found no line with text")
    return prompts


def actor_environment() -> dict[str, str]:
    """Environment of every process of the run; what the user has set wins."""
    environment = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore::FutureWarning",
        # Without a GPU: two ranks share one NUMA node and a few cores, which vLLM refuses by default; KV cache in GiB.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    environment = {name: os.environ.get(name, value) for name, value in environment.items()}
    path = [str(HERE), os.environ.get("PYTHONPATH")]  # vLLM's workers import rlhf_utils from wherever they are
    return environment | {"PYTHONPATH": os.pathsep.join(filter(None, path))}


def connect(config: Config) -> int:
    """Connect to Ray or start a private cluster; returns the number of GPUs."""
    os.environ.setdefault("RAY_process_group_cleanup_enabled", "true")  # a killed actor takes its children along
    private = {} if config.ray_address else {"num_cpus": 2 + config.tensor_parallel_size, "include_dashboard": False}
    ray.init(config.ray_address or "local", runtime_env={"env_vars": actor_environment()}, **private)
    return int(ray.cluster_resources().get("GPU", 0))


def disconnect() -> None:
    """Leave Ray; of a private cluster nothing stays (Ray kills its raylet after a second and may orphan its agents)."""
    started = psutil.Process().children(recursive=True)
    ray.shutdown()
    for process in psutil.wait_procs(started, timeout=5)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def start_trainer(config: Config, path: str, cleanup: contextlib.ExitStack):
    """Start loading the trainer and return the actor's handle; `cleanup` kills it."""
    gpus = int(config.trainer_device == "cuda")
    group = reserve([{"CPU": 1, "GPU": gpus}], config.timeout_s, cleanup)
    trainer = (
        ray.remote(Trainer)
        .options(num_cpus=1, num_gpus=gpus, scheduling_strategy=PlacementGroupSchedulingStrategy(group))
        .remote(path, config.trainer_device, config.trainer_dtype, config.learning_rate)
    )
    cleanup.callback(ray.kill, trainer)
    return trainer


def start_engine(config: Config, path: str, device: str, cleanup: contextlib.ExitStack):
    """Start loading the engine, one GPU bundle per worker, and return the actor's handle; `cleanup` stops it."""
    bundle = {"GPU": 1} if device == "cuda" else {"CPU": 1}
    placement = PlacementGroupSchedulingStrategy(
        reserve([bundle] * config.tensor_parallel_size, config.timeout_s, cleanup),
        placement_group_bundle_index=0,
        placement_group_capture_child_tasks=True,
    )
    llm = (
        ray.remote(MyLLM)
        .options(num_cpus=0, num_gpus=0, scheduling_strategy=placement)
        .remote(**engine_arguments(config, path, device))
    )
    cleanup.callback(stop_engine, llm)
    return llm


def join_group(config: Config, device: str, trainer, llm) -> None:
    """Wait for both sides to have loaded, and make trainer (rank 0) and workers (ranks 1..TP) one group."""
    one_node = sum(node["Alive"] for node in ray.nodes()) == 1
    rendezvous = trainer.open_rendezvous.remote("127.0.0.1" if one_node else None)
    loaded = [rendezvous, llm.get_weights_version.remote()]
    (address, port), _ = wait(loaded, 10 * config.timeout_s, "starting trainer and engine")
    world_size = 1 + config.tensor_parallel_size
    backend = "nccl" if device == config.trainer_device == "cuda" else "gloo"
    rest = (world_size, backend, config.timeout_s)
    workers = llm.collective_rpc.remote("init_weight_update_group", args=(address, port, 1, *rest))
    wait(
        [workers, trainer.init_weight_update_group.remote(address, port, *rest)],
        config.timeout_s,
        f"joining the {backend} group of {world_size}",
    )


def reserve(bundles: list[dict], timeout_s: float, cleanup: contextlib.ExitStack) -> PlacementGroup:
    """A placement group that is ready, and is removed by `cleanup`."""
    group = placement_group(bundles)
    cleanup.callback(remove_placement_group, group)
    wait([group.ready()], timeout_s, f"reserving {bundles} in the Ray cluster")
    return group


def stop_engine(llm) -> None:
    """Let vLLM stop its processes; kill the actor in any case."""
    try:
        ray.get(llm.shutdown.remote(), timeout=10)
    except (ray.exceptions.RayError, TimeoutError) as error:
        print(f"The engine did not shut down by itself ({type(error).__name__}); killing it.", file=sys.stderr)
    ray.kill(llm)


def prove_fp8(llm, config: Config) -> list[dict]:
    """Print and return what each rank of the engine holds.

    Raises:
        SystemExit: quantization was asked for and some rank has no FP8 layer.
    """
    [ranks] = wait([llm.collective_rpc.remote("inspect_quantization")], config.timeout_s, "inspecting the engine")
    for rank in ranks:
        print(
            f"engine rank {rank['rank']}: {rank['fp8_linear_layers']} linear layers in FP8, "
            f"{rank['unquantized_linear_layers']} not; weights {rank['weights_gib']:.4f} GiB, "
            f"in BF16 they would take {rank['bf16_weights_gib']:.4f} GiB"
        )
    for reason, names in ranks[0]["unquantized"].items():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        print(f"  not in FP8 because {reason}: {', '.join(names[:4])}{more}")
    if config.quantization != "none" and not all(rank["fp8_linear_layers"] for rank in ranks):
        raise SystemExit(
            f"--quantization {config.quantization} had no effect: an engine rank has no Float8Tensor layer. Reasons "
            "are above; use a torchao FP8 config and shard dimensions that are multiples of 16, or --quantization none"
        )
    return ranks


def main(config: Config) -> dict:
    """Run once and return what summary.json holds."""
    began = time.perf_counter()
    prompts = read_prompts(config.prompts_file)
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(disconnect)
        config, device = resolve(config, connect(config))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # Ray's own handler would kill the cluster at once
        torchao_config(config.quantization)  # what is wrong with it should show before anything starts
        path = find_model(config.model, cleanup.enter_context(tempfile.TemporaryDirectory()), config.seed)
        print(f"Starting trainer ({config.trainer_device}) and engine ({device}, TP={config.tensor_parallel_size}) ...")
        trainer = start_trainer(config, path, cleanup)  # first, so that it gets GPU 0
        llm = start_engine(config, path, device, cleanup)
        join_group(config, device, trainer, llm)
        ranks = prove_fp8(llm, config)
        startup_s = time.perf_counter() - began

        def generate(**sampling) -> list:
            params = SamplingParams(max_tokens=config.max_tokens, seed=config.seed, logprobs=0, **sampling)
            call = llm.generate.remote(prompts, params, use_tqdm=False)
            return wait([call], config.timeout_s, "generating")[0]

        before = generate(temperature=0)
        rollouts = generate(temperature=config.temperature, top_p=config.top_p)
        pairs = [(list(output.prompt_token_ids), list(output.outputs[0].token_ids)) for output in rollouts]
        [step] = wait([trainer.train_step.remote(pairs)], config.timeout_s, "the training step")
        sync = sync_weights_to_quantized_engine(
            trainer, llm, bucket_bytes=config.bucket_mib * 2**20, verify=config.verify, timeout_s=config.timeout_s
        )
        after = generate(temperature=0)

    summary = {
        "device": device,
        "model": config.model,
        "world_size": 1 + config.tensor_parallel_size,
        "quantization": config.quantization,
        **{key: ranks[0][key] for key in ("fp8_linear_layers", "unquantized_linear_layers")},
        **{key: sum(rank[key] for rank in ranks) for key in ("weights_gib", "bf16_weights_gib")},
        "ranks": ranks,
        "train": step,
        "sync": sync,
        "weights_version": sync["weights_version"],
        "startup_seconds": startup_s,
        "samples": [
            {"prompt": old.prompt, "before": old.outputs[0].text, "after": new.outputs[0].text}
            for old, new in zip(before, after, strict=True)
        ],
        "versions": {"python": sys.version.split()[0]}
        | {library.__name__: library.__version__ for library in (torch, vllm, torchao, ray, transformers)},
    }
    config.output_dir.mkdir(parents=True, exist_ok=True)
    (config.output_dir / "summary.json").write_text(json.dumps(summary, indent=2))
    report(summary, config.output_dir)
    return summary


def report(summary: dict, folder: Path) -> None:
    """Print the samples and the figures."""
    samples = Table("prompt", "before the sync", "after the sync", title="Greedy samples")
    for sample in summary["samples"]:
        samples.add_row(*map(repr, sample.values()))
    sync = summary["sync"]
    rows = {
        "FP8 linear layers per rank": f"{summary['fp8_linear_layers']} ({summary['unquantized_linear_layers']} not)",
        "engine weights, all ranks": f"{summary['weights_gib']:.4f} GiB (BF16: {summary['bf16_weights_gib']:.4f} GiB)",
        "sync": f"{sync['bytes'] / 1e9:.4f} GB in {sync['seconds']:.3f} s = {sync['gb_per_s']:.2f} GB/s",
        "verified / changed": f"{sync['verified']} / {sync['changed']}",
        "compared bit for bit": f"{sync['compared_tensors']} tensors, all equal" if "hidden_tensors" in sync else "no",
        "weights version": str(summary["weights_version"]),
        "start-up": f"{summary['startup_seconds']:.1f} s",
    }
    figures = Table("what", "value", title="One verified FP8 weight sync")
    for row in rows.items():
        figures.add_row(*row)
    for table in (samples, figures):
        Console().print(table)
    print(f"Wrote {folder / 'summary.json'}")


if __name__ == "__main__":
    main(tyro.cli(Config))
