"""What tests, GPU checks and benchmarks share: the seed's loop, and the question whether a sync equals a cold
start.
"""

import contextlib
import dataclasses
import gc
import json
import multiprocessing.forkserver
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDERS = [str(HERE), str(HERE / "bench"), str(HERE.parent)]  # of all modules that tests and benchmarks name
sys.path[:0] = FOLDERS
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # before the driver is imported
gc.disable()  # while the driver is imported: on some CPUs a quarter of the time

import ray  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.v1.executor import multiproc_executor  # noqa: E402

import rlhf_online_quant as driver  # noqa: E402
import rlhf_utils as helper  # noqa: E402
from rlhf_utils import BUCKET_BYTES, WorkerExtension, stateless_init_process_group  # noqa: E402

gc.enable()
os.environ |= driver.ENVIRONMENT | os.environ
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPTS = ["Hello, my name is", "The capital of France is", "a", "0123456789" * 30]


class Extension(WorkerExtension):
    """What tests need of a worker besides."""

    def get_pid(self) -> int:
        """Of the worker's process."""
        return os.getpid()


def fork_server():
    """A context that starts processes as forks of one that has imported everything; of one for all who ask,
    forks and Ray's actors, too.
    """
    context, server = multiprocessing.get_context("forkserver"), multiprocessing.forkserver._forkserver
    context.set_forkserver_preload(["harness", "vllm.v1.worker.cpu_worker"])
    if not server._forkserver_address and "TEST_FORK_SERVER" in os.environ:
        server._forkserver_address, server._forkserver_alive_fd = os.environ["TEST_FORK_SERVER"], os.pipe()[1]
        server.ensure_running = lambda: None
    if multiprocessing.parent_process():
        server.ensure_running = lambda: None
    server.ensure_running()
    os.environ["TEST_FORK_SERVER"] = server._forkserver_address
    return context


class RolloutLLM(driver.RolloutLLM):
    """The driver's, whose workers are forked from one process instead of importing everything each."""

    def __init__(self, *args, **kwargs):
        if kwargs.get("distributed_executor_backend") == "mp":
            multiproc_executor.get_mp_context = fork_server
        super().__init__(*args, **kwargs)


def connect(config: driver.Config, cleanup: contextlib.ExitStack) -> int:
    """The driver's `connect`, with the modules of tests and benchmarks for the actors."""
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([*FOLDERS, before])
    try:
        return driver.connect(config, cleanup)
    finally:
        os.environ["PYTHONPATH"] = before


@contextlib.contextmanager
def vllm_arguments(**more):
    """Engines that are started meanwhile get these arguments of vLLM's as well."""
    plain = driver.engine_arguments
    driver.engine_arguments = lambda *which: plain(*which) | more
    try:
        yield
    finally:
        driver.engine_arguments = plain


def with_length(config: driver.Config, length: int = 512) -> driver.Config:
    """An engine's longest sequence, unless `--engine-args` has it; the program's `check` would find it."""
    more = {"max_model_len": length} | json.loads(config.engine_args)
    return dataclasses.replace(config, engine_args=json.dumps(more))


def to_prompts(model: str, texts: list[str] = helper.PROMPTS) -> list[driver.Prompt]:
    """As the program reads them, for a model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    return [driver.to_prompt({"prompt": text}, tokenizer) for text in texts]


class Remote:
    """A MyLLM actor that answers like a local LLM."""

    def __init__(self, actor, timeout_s: float = 300):
        self.actor, self.timeout_s = actor, timeout_s

    def __getattr__(self, method):
        def call(*args, **kwargs):
            return driver.wait([getattr(self.actor, method).remote(*args, **kwargs)], self.timeout_s, method)[
                0
            ]

        return call


def write_result(config, device: str, name: str, **found) -> dict:
    """What a benchmark found and on what, which it also writes to OUTPUT_DIR/NAME_SHAPE.json."""
    eager = device == "cpu" or json.loads(config.engine_args).get("enforce_eager")
    result = {
        "shape": config.shape,
        "layout": f"TP={config.tensor_parallel_size}, trainer {config.trainer_device} {config.trainer_dtype}",
        "mode": "eager" if eager else "compiled, CUDA graphs",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "quantization": config.quantization,
        **found,
    }
    config.output_dir.mkdir(parents=True, exist_ok=True)
    (config.output_dir / f"{name}_{config.shape}.json").write_text(json.dumps(result, indent=2))
    return result


def generate(llm, prompts=PROMPTS, max_tokens: int = 16) -> list:
    """Greedy [token ids, log-probabilities of the five likeliest tokens a step] per prompt; LLM or Remote."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=5, ignore_eos=True)
    llm.reset_prefix_cache()  # on GPUs the last bits depend on how much of a prompt was cached
    completions = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    return [
        [list(c.token_ids), [[[t, lp.logprob] for t, lp in sorted(step.items())] for step in c.logprobs]]
        for c in completions
    ]


def checksums(llm) -> dict[str, str]:
    """SHA-256 of every tensor of every rank (FP8 bytes and scales one by one), by vLLM's own code."""
    return {
        name: digest
        for rank in llm.collective_rpc("compute_weight_checksums")
        for name, digest in rank.items()
    }


@contextlib.contextmanager
def fresh_engine(config: driver.Config, device: str, visible_gpus: str = ""):
    """Start a fresh engine of `config.model` in a process of its own; yields a function that waits for what
    it says.

    It is no part of any group and knows nothing of a sync: outputs and checksums of what vLLM and torchao
    load.
    """
    executor = "mp" if config.tensor_parallel_size > 1 else "uni"
    own = dict(distributed_executor_backend=executor, worker_extension_cls="harness.Extension")
    arguments = driver.engine_arguments(config, device) | own
    # As Ray sets it for the engine: the count changes the last bits on the CPU.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if device == "cuda":
        environment |= {"CUDA_VISIBLE_DEVICES": visible_gpus, "VLLM_CACHE_ROOT": f"{config.model}/vllm_cache"}
    process = subprocess.Popen(
        [sys.executable, __file__, json.dumps(arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def observed(timeout_s: float = 600) -> dict:
        out, err = process.communicate(timeout=timeout_s)
        assert process.returncode == 0, err[-5000:]
        return json.loads(next(line for line in reversed(out.splitlines()) if line.startswith("{")))

    try:
        yield observed
    finally:
        process.kill()


def observe(llm) -> dict:
    """Outputs and checksums; equal for two engines only if they are the same in every bit that counts."""
    return {"outputs": generate(llm), "checksums": checksums(llm)}


def assert_same(synced: dict, fresh: dict) -> None:
    """The synced engine holds the fresh one's bytes and says the same, log-probability by log-probability."""
    assert synced["checksums"].keys() == fresh["checksums"].keys()
    different = [name for name, value in fresh["checksums"].items() if synced["checksums"][name] != value]
    assert not different, f"{len(different)} of {len(fresh['checksums'])} tensors differ: {different[:10]}"
    assert synced["outputs"] == fresh["outputs"], "same weights, other tokens or log-probabilities"


def sync(config: driver.Config, trainer, llm, **overrides) -> dict:
    """The driver's sync with a config's settings."""
    settings = dict(bucket_bytes=bucket_bytes(config), timeout_s=config.timeout_s)
    return helper.sync_weights_to_quantized_engine(trainer, llm, **settings | overrides)


def bucket_bytes(config: driver.Config) -> int:
    """Of the settings of a benchmark; else the default."""
    return getattr(config, "bucket_mib", BUCKET_BYTES // 2**20) * 2**20


def account_for_fp8(engines: list, config: driver.Config) -> list[dict]:
    """As the driver asks for it."""
    wanted = config.quantization != "none"
    return helper.prove_fp8(engines, expect_fp8=wanted, timeout_s=config.timeout_s)


def prove(config: driver.Config, trainer, llm) -> dict:
    """The driver's proof with a config's settings."""
    return helper.prove_sync(
        trainer, llm, bucket_bytes=bucket_bytes(config), timeout_s=config.timeout_s, max_tokens=16
    )


def zero_and_sync(config: driver.Config, trainer, llm, by_session: bool = False) -> float:
    """A sync into an engine of zeros, so that what it skips would show; seconds."""
    which = "all" if by_session else "stored"
    driver.wait(helper.on_workers([llm], "zero_weights", which), config.timeout_s, "setting weights to zero")
    start = time.perf_counter()
    helper.bring_weights([trainer], [llm], config.timeout_s, by_session=by_session)
    return time.perf_counter() - start


def load_weights(trainer, folder: str) -> None:
    """In the trainer: take over the weights of a checkpoint, in place."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=trainer.model.dtype)
    trainer.model.load_state_dict(model.state_dict())


def sync_versus_cold_start(
    config: driver.Config,
    old: str,
    new: str,
    device: str,
    more_syncs: int = 0,
    visible_gpus="",
    then=None,
    kill_a_worker: bool = False,
) -> dict:
    """Trainer and engine start from checkpoint `old` and are proved; the trainer takes `new`; compare with an
    engine of it.

    Needs a running Ray. `more_syncs` times the weights change to `old` and back. `then(llm, new)` is called
    at the end. Returns measurements, some of them medians.
    """
    result, start = {}, time.perf_counter()
    config, later = (dataclasses.replace(config, model=folder) for folder in (old, new))
    with contextlib.ExitStack() as cleanup:
        trainer = driver.start_trainer(config, cleanup)
        with vllm_arguments(worker_extension_cls="harness.Extension"):
            actor = driver.start_engine(config, device, cleanup)
        fresh = cleanup.enter_context(fresh_engine(later, device, visible_gpus))
        helper.join_group(trainer, [actor], timeout_s=config.timeout_s)
        result["ranks"] = account_for_fp8([actor], config)
        result["startup_s"] = time.perf_counter() - start
        result["proof"] = prove(config, trainer, actor)
        result["proof_s"] = time.perf_counter() - start - result["startup_s"]
        llm = Remote(actor)

        def bring(folder: str) -> dict:
            loading = trainer.__ray_call__.remote(load_weights, folder)
            driver.wait([loading], 10 * config.timeout_s, "loading")
            return sync(config, trainer, actor)

        before = observe(llm)
        result["sync"] = bring(new)
        synced = observe(llm)
        assert synced["outputs"] != before["outputs"]
        zero_and_sync(config, trainer, actor)
        assert observe(llm) == synced
        again = []
        for _ in range(more_syncs):  # other weights each time, and a session between
            again.append(bring(old))
            assert observe(llm) == before
            zero_and_sync(config, trainer, actor, by_session=True)
            again.append(bring(new))
            assert observe(llm) == synced
        if again:
            result["path"] = again[-1]["path"]
            result["again_s"] = statistics.median(s["seconds"] for s in again)
            result["sender_s"] = statistics.median(s["sender_s"] for s in again)
        result["session_s"] = zero_and_sync(config, trainer, actor, by_session=True)
        assert observe(llm) == synced
        if then is not None:
            result["then"] = then(llm, new)
        assert_same(synced, fresh())
        result["tensors"] = len(synced["checksums"])
        if kill_a_worker:
            pid = llm.collective_rpc("get_pid")[-1]
            driver.wait(
                [trainer.__ray_call__.remote(act_before_bucket, None, pid, signal.SIGKILL)], 30, "preparing"
            )
            began = time.perf_counter()
            try:
                sync(config, trainer, actor)
            except (RuntimeError, OSError) as error:
                result["killed"] = (
                    f"worker killed in a sync, after {time.perf_counter() - began:.1f} s: {error}"
                )
    return result


@contextlib.contextmanager
def products_in(precision: str):
    """The trainer's products are meanwhile in that precision, whatever the device."""
    plain = torch.autocast

    def autocast(*device, **how):
        if how.keys() == {"enabled"}:  # the trainer's; what it has compiled names more
            how = {"enabled": precision == "bfloat16"}
        return plain(*device, **how)

    torch.autocast = autocast
    try:
        yield
    finally:
        torch.autocast = plain


@torch.no_grad()
def mismatch_kl(trainer: driver.Trainer, rollouts: list[driver.Rollout], precision: str) -> float:
    """In the trainer: the engine's mismatch in nats per token, with products in that precision."""
    limit = trainer.config.tokens_per_microbatch
    batches = [trainer._pad(part) for part in driver.split_by_tokens(rollouts, limit)]
    with products_in(precision):
        temperature = trainer.config.temperature
        found = [driver.completion_logprobs(trainer.model, batch, temperature) for batch in batches]
    ours = [logprobs_BT[batch["mask_BT"]] for logprobs_BT, batch in zip(found, batches, strict=True)]
    engine = [batch["engine_BT"][batch["mask_BT"]] for batch in batches]
    return driver.measure_mismatch(torch.cat(ours), torch.cat(engine))["mismatch_kl"]


def sampled(config: driver.Config, engines: list) -> list[driver.Rollout]:
    """Rollouts of the first step, without advantages."""
    prompts = driver.prompts_of_step(config, to_prompts(config.model), 0)
    return driver.take_in(driver.ask(engines, prompts, config), config)[0]


def act_before_bucket(trainer, number: int | None, pid: int | None, how: int) -> None:
    """In the trainer: before it broadcasts that bucket (None: the middle one) of the next sync, send a signal
    to a process (None: to itself).
    """
    buckets = trainer.buckets
    plain, number = buckets.start, len(buckets.buckets) // 2 if number is None else number

    def start(tensor):
        if len(buckets.events) == number:
            time.sleep(0.2)  # the buckets before have arrived
            os.kill(pid or os.getpid(), how)
            time.sleep(0.2)
        plain(tensor)

    buckets.start = start


def seed_group(llm, tensor_parallel_size: int, device: torch.device, backend: str | None = None):
    """This process becomes rank 0, as the driver does in the seed."""
    from vllm.utils.network_utils import get_open_port

    port, world_size = get_open_port(), 1 + tensor_parallel_size
    arguments = ("127.0.0.1", port, 1, world_size, backend)
    handle = llm.actor.collective_rpc.remote("init_weight_update_group", args=arguments)
    group = stateless_init_process_group("127.0.0.1", port, 0, world_size, device, backend)
    ray.get(handle)
    return group


def seed_loop(llm, model, group) -> list[bool]:
    """The seed's own loop: a call and a broadcast per parameter, then `check_weights_changed`."""
    for name, p in model.named_parameters():
        dtype_name = str(p.dtype).split(".")[-1]
        handle = llm.actor.collective_rpc.remote("update_weight", args=(name, dtype_name, p.shape))
        group.broadcast(p, src=0, stream=torch.cuda.current_stream() if p.is_cuda else None)
        ray.get(handle)
    return ray.get(llm.actor.collective_rpc.remote("check_weights_changed"))


def seed_demonstration(
    llm, group, path: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> dict:
    """The seed's loop with a checkpoint, then with zeros as the seed has it: every byte zero, every scale
    finite.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)
    seed_loop(llm, model, group)
    loaded = observe(llm)
    for _, p in model.named_parameters():
        p.data.zero_()
    assert all(seed_loop(llm, model, group))
    assert not any(seed_loop(llm, model, group)), "the same zeros once more change nothing"
    outputs, zeroed = generate(llm), checksums(llm)
    llm.collective_rpc("reset_weights")  # vLLM's own: zeroes every byte, the scales too
    zeros = checksums(llm)
    return {
        "loaded": loaded,
        "not_zero": [name for name in zeroed if zeroed[name] != zeros[name] and not name.endswith(".scale")],
        "zero_scales": [name for name in zeroed if zeroed[name] == zeros[name] and name.endswith(".scale")],
        "logprobs": sorted({logprob for _, steps in outputs for step in steps for _, logprob in step}),
    }


if __name__ == "__main__":  # fresh_engine's process
    engine = LLM(**json.loads(sys.argv[1]))
    print("\n" + json.dumps(observe(engine)))
