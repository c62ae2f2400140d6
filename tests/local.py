"""Trainers and engines in this process, which has imported everything: seconds instead of half a minute.

The sync, its proof, vLLM, torchao and gloo are the real ones; `Local` stands in for Ray's handles.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import pickle
import signal
from collections.abc import Callable, Iterator
from unittest import mock

import ray
import torch
from vllm import LLM
from vllm.model_executor.models import registry
from vllm.model_executor.models.transformers import base
from vllm.v1.executor import multiproc_executor

from harness import DEVICE, account_for_fp8, driver, fork_server, helper

if DEVICE == "cuda":
    from vllm.v1.worker.gpu_worker import Worker
else:
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker

    register_kernels = functools.cache(CpuPlatform.register_triton_kernel_overrides)

CONFIG = driver.Config(
    trainer_device=DEVICE, tensor_parallel_size=1, learning_rate=1e-3, quantization="fp8-weight-only"
)
# A gigabyte of KV cache takes 1 s to fill with zeros and to give back; on GPUs engines share the memory.
SMALL = {"cpu": dict(num_gpu_blocks_override=256), "cuda": dict(kv_cache_memory_bytes=2**28)}[DEVICE]
if DEVICE == "cuda":
    SMALL |= dict(distributed_executor_backend="uni", gpu_memory_utilization=0.02)
    SMALL |= dict(compilation_config={"cudagraph_capture_sizes": [1, 2, 4]})


class Local:
    """A handle of an object in this process: `handle.method.remote(...)` runs in a thread of its own."""

    def __init__(self, name: str, target):
        self.name, self.target, self.pool = name, target, concurrent.futures.ThreadPoolExecutor(1)
        self._actor_id = name

    def run(self, function: Callable, *args):
        """Ray's `__ray_call__`: a copy of the function, as if it had travelled to another process."""
        return pickle.loads(ray.cloudpickle.dumps(function))(self.target, *args)

    def __getattr__(self, method: str):
        call = self.run if method == "__ray_call__" else getattr(self.target, method)

        def remote(*args, **kwargs):
            future = self.pool.submit(call, *args, **kwargs)
            future.who = self.name
            return future

        remote.remote = remote
        return remote


def wait(refs: list, timeout_s: float, doing: str, patience_s: float = 0.0) -> list:
    """The driver's `wait` for local handles, and Ray's."""
    futures = [ref.future() if isinstance(ref, ray.ObjectRef) else ref for ref in refs]
    errors = [future.exception(timeout=timeout_s) for future in futures]
    failed = [
        f"{getattr(future, 'who', 'Ray')}: {type(error).__name__}: {error}"
        for future, error in zip(futures, errors)
        if error
    ]
    if failed:
        raise RuntimeError(f"{doing}: " + "; ".join(failed))
    return [future.result() for future in futures]


@contextlib.contextmanager
def local_engine(
    path: str, config: driver.Config, kind: type[LLM] = driver.RolloutLLM, **more
) -> Iterator[LLM]:
    """An engine of the model at `path` in this process."""
    arguments = driver.engine_arguments(dataclasses.replace(config, model=path), DEVICE) | SMALL | more
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(torch.set_default_dtype, torch.get_default_dtype())  # an error may leave vLLM's
        # vLLM looks at the class of each model in a process of its own: 5 s each, unless it is in a cache.
        cleanup.enter_context(mock.patch.object(registry, "_run_in_subprocess", lambda look: look()))
        # Engines of one model have the same kernels, not those that were fastest that time. (Each compilation
        # switches this off for the next: Dynamo restores PyTorch's own determinism, which sets it, too.)
        cleanup.enter_context(torch._inductor.config.patch(deterministic=True))
        if DEVICE == "cpu":
            # It collects garbage nine times for each engine, among all that has been imported: 2 s.
            cleanup.enter_context(mock.patch.object(gc, "collect", lambda *_: 0))
            # Nothing is compiled; and what vLLM has decorated for that, transformers could not build again.
            plain = mock.patch.object(base, "support_torch_compile", lambda **_: lambda cls: cls)
            cleanup.enter_context(plain)
            # Its kernels for the CPU are registered once, not for each engine: 0.3 s.
            once = dict(register_triton_kernel_overrides=lambda *_: register_kernels())
            cleanup.enter_context(mock.patch.multiple(CpuPlatform, **once))
        else:
            cleanup.callback(torch.cuda.empty_cache)
            cleanup.callback(gc.collect)
        cleanup.callback(setattr, Worker, "__bases__", Worker.__bases__)  # vLLM adds the extension
        if arguments["distributed_executor_backend"] == "mp":
            forked = mock.patch.object(multiproc_executor, "get_mp_context", fork_server)
            cleanup.enter_context(forked)
        llm = kind(**{"max_model_len": 512} | arguments)
        cleanup.callback(llm.llm_engine.engine_core.shutdown)
        yield llm


@contextlib.contextmanager
def local_actors(**more) -> Iterator[None]:
    """Meanwhile the driver's trainer and engines (with more arguments) start in this process, without Ray."""

    def start_trainer(config, cleanup):
        return Local("trainer (rank 0)", driver.Trainer(config))

    def start_engine(config, device, cleanup, first_rank=1):
        engine = local_engine(str(config.resume or config.model), config, **more)
        return Local(f"engine (rank {first_rank})", cleanup.enter_context(engine))

    parts = dict(wait=wait, start_trainer=start_trainer, start_engine=start_engine, connect=lambda *_: 0)
    one_node = mock.patch.object(ray, "nodes", lambda: [{"Alive": True}])
    in_helper = mock.patch.multiple(helper, wait=wait, ACTORS={})
    with mock.patch.multiple(driver, **parts), in_helper, one_node, contextlib.ExitStack() as cleanup:
        # `main` sets its own.
        cleanup.callback(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        yield


@contextlib.contextmanager
def local_pair(path: str, config: driver.Config, **more) -> Iterator[tuple[Local, Local]]:
    """Handles of a trainer and an engine of the model at `path` in this process, in one gloo group."""
    config = dataclasses.replace(config, model=path)
    with local_actors(**more), contextlib.ExitStack() as cleanup:
        trainer = driver.start_trainer(config, cleanup)
        engine = driver.start_engine(config, DEVICE, cleanup)
        helper.join_group(trainer, [engine], backend="gloo", timeout_s=config.timeout_s)
        account_for_fp8([engine], config)
        yield trainer, engine


def worker(llm: LLM):
    """The worker object of an engine with one, in the engine's process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
