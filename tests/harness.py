"""What tests, GPU checks and benchmarks share: the seed's loop, and the question whether a sync equals a cold start."""

import contextlib
import statistics
import sys
import time
from pathlib import Path

import ray
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vllm import SamplingParams  # noqa: E402

import rlhf_online_quant as driver  # noqa: E402
from rlhf_utils import named_weights, stateless_init_process_group  # noqa: E402

PROMPTS = ["Hello, my name is", "The capital of France is", "a", "0123456789" * 8]


def call(llm, method: str, *args, timeout_s: float = 300):
    """One collective_rpc, all ranks' answers."""
    return driver.wait([llm.collective_rpc.remote(method, args=args)], timeout_s, method)[0]


def generate(llm, prompts=PROMPTS, max_tokens: int = 16, timeout_s: float = 300) -> list:
    """Greedy (token ids, log-probabilities of the five likeliest tokens at each step) per prompt."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=5, ignore_eos=True)
    [outputs] = driver.wait([llm.generate.remote(prompts, params, use_tqdm=False)], timeout_s, "generating")
    completions = [output.outputs[0] for output in outputs]
    return [
        (list(c.token_ids), [{t: lp.logprob for t, lp in step.items()} for step in c.logprobs]) for c in completions
    ]


def checksums(llm) -> dict:
    """SHA-256 of every tensor of every rank (FP8 bytes and scales one by one), by vLLM's own code."""
    merged = {}
    for rank in call(llm, "compute_weight_checksums"):
        merged |= rank
    return merged


def seed_group(llm, tensor_parallel_size: int, device: torch.device, backend: str | None = None):
    """This process becomes rank 0, as the driver does in the seed."""
    from vllm.utils.network_utils import get_open_port

    port, world_size = get_open_port(), 1 + tensor_parallel_size
    handle = llm.collective_rpc.remote("init_weight_update_group", args=("127.0.0.1", port, 1, world_size, backend))
    group = stateless_init_process_group("127.0.0.1", port, 0, world_size, device, backend=backend)
    ray.get(handle)
    return group


def seed_loop(llm, model, group) -> list[bool]:
    """The seed's own loop: a call and a broadcast per parameter, then `check_weights_changed`."""
    for name, p in named_weights(model).items():
        dtype_name = str(p.dtype).split(".")[-1]
        handle = llm.collective_rpc.remote("update_weight", args=(name, dtype_name, tuple(p.shape)))
        group.broadcast(p, src=0, stream=torch.cuda.current_stream() if p.is_cuda else None)
        ray.get(handle)
    return ray.get(llm.collective_rpc.remote("check_weights_changed"))


def seed_demonstration(llm, folder: str, tensor_parallel_size: int, device: torch.device, backend=None) -> dict:
    """The seed's loop with the engine's own weights (nothing may change) and with zeros (all zero, all finite)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    before, group = checksums(llm), seed_group(llm, tensor_parallel_size, device, backend)
    assert not any(seed_loop(llm, model, group)) and checksums(llm) == before
    for weight in named_weights(model).values():
        weight.data.zero_()
    assert all(seed_loop(llm, model, group))
    assert not any(seed_loop(llm, model, group)), "the same zeros once more change nothing"
    tokens, logprobs = generate(llm)[0]
    after = checksums(llm)
    call(llm, "reset_weights")  # vLLM's own: zeroes every byte, the scales too
    zeros = checksums(llm)
    return {
        "not_zero": [name for name in after if after[name] != zeros[name] and not name.endswith(".scale")],
        "zero_scales": [name for name in after if after[name] == zeros[name] and name.endswith(".scale")],
        "logprobs": sorted({p for step in logprobs for p in step.values()}),
    }


def sync_versus_cold_start(config: driver.Config, path: str, device: str, folder: str, more_syncs: int = 0, then=None) -> dict:
    """Train one step, sync, save, start a fresh engine from what was saved, and compare the two engines.

    Needs a running Ray. `then(llm, folder)` is called before the synced engine stops. Returns what was compared and measured; raises AssertionError where the engines differ.
    """
    result = {}
    with contextlib.ExitStack() as cleanup:
        start = time.perf_counter()
        trainer = driver.start_trainer(config, path, cleanup)
        with contextlib.ExitStack() as first_engine:
            llm = driver.start_engine(config, path, device, first_engine)
            result["ranks"] = driver.prove_fp8(llm, config)
            driver.join(config, device, trainer, llm)
            result["startup_s"] = time.perf_counter() - start
            before = generate(llm)
            pairs = [(list(range(3, 13)), list(range(13 + i, 29 + i))) for i in range(4)]
            result["train"] = driver.wait([trainer.train_step.remote(pairs)], config.timeout_s, "training")[0]

            def sync() -> dict:
                return driver.sync_weights_to_quantized_engine(
                    trainer,
                    llm,
                    bucket_bytes=config.bucket_mib * 2**20,
                    verify=config.verify,
                    timeout_s=config.timeout_s,
                )

            result["sync"] = sync()
            assert result["sync"]["verified"] and result["sync"]["changed"]
            synced, synced_sums = generate(llm), checksums(llm)
            assert synced != before
            again = [sync() for _ in range(more_syncs)]
            if again:
                assert not any(s["changed"] for s in again)
                result["sync_again_s"] = statistics.median(s["seconds"] for s in again)
                result["wire_s"] = statistics.median(s["sender"]["seconds"] for s in again)
                assert generate(llm) == synced
            driver.wait([trainer.save_pretrained.remote(folder)], 10 * config.timeout_s, "saving")
            if then is not None:
                result["then"] = then(llm, folder)
        start = time.perf_counter()
        cold = driver.start_engine(config, folder, device, cleanup)
        driver.prove_fp8(cold, config)
        result["cold_startup_s"] = time.perf_counter() - start
        fresh, fresh_sums = generate(cold), checksums(cold)
        different = [name for name in fresh_sums if fresh_sums[name] != synced_sums[name]]
        result["tensors"] = len(fresh_sums)
        result["float8_tensors"] = sum(name.endswith(".qdata") for name in fresh_sums)
        assert fresh_sums.keys() == synced_sums.keys() and not different, different
        assert fresh == synced, "same bytes, other tokens or log-probabilities"
    return result
