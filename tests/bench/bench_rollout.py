"""Does FP8 pay? Sampled tokens per second of several engines of one model shape, beside BF16, in one run.

    python tests/bench/bench_rollout.py --shape qwen3-8b --tensor-parallel-size 1 --batches 1 16 64 256 512 \
        --contexts 128x128 4096x128 --engines bf16 fp8 fp8-kv fp8-per-channel bf16-eager fp8-eager \
        [any flag of the driver]

The engines start one after another from random weights, with the same settings; each generates batches of
random prompts to their full length, asked as the loop asks. Prints tokens/s and the ratio to BF16, writes
OUTPUT_DIR/rollout_SHAPE.json and draws rollout_SHAPE.png.
"""

import contextlib
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import tests_on_path  # noqa: F401
import torch
import tyro

from harness import Remote, connect, driver, vllm_arguments, write_result
from random_models import write_config

# Name -> what it changes in the program's settings, and in vLLM's arguments.
EAGER = {"enforce_eager": True}
ENGINES = {
    "bf16": ({"quantization": "none"}, {}),
    "fp8": ({}, {}),
    "fp8-as-shipped": ({}, {"worker_extension_cls": "as_shipped.AsShipped"}),  # torchao's own product
    "fp8-kv": ({}, {"kv_cache_dtype": "fp8"}),
    "fp8-per-channel": ({"quantization": "fp8_per_channel"}, {}),  # vLLM's own online quantization
    "bf16-eager": ({"quantization": "none"}, EAGER),
    "fp8-eager": ({}, EAGER),
}


@dataclasses.dataclass
class Benchmark(driver.Config):
    """One shape."""

    shape: str = "tiny-opt"
    """A key of SHAPES in random_models.py."""
    engines: tuple[str, ...] = ("bf16", "fp8")
    """Keys of ENGINES; the first is what the others are compared with."""
    batches: tuple[int, ...] = (1, 16)
    """Sequences at a time."""
    contexts: tuple[str, ...] = ("16x32",)
    """Tokens of a prompt x tokens of its completion."""
    repeats: int = 3
    """Of each measurement, after one to warm up; the median counts."""
    tensor_parallel_size: int = 1
    """GPUs of an engine."""
    trainer_device: str = "cpu"
    """There is none."""


def random_prompts(batch: int, length: int, repeat: int) -> list[driver.Prompt]:
    """Token ids, other ones each time, so that no prompt is in the prefix cache."""
    ids = torch.randint(
        3, 250, (batch, length), generator=torch.Generator().manual_seed(1000 * batch + repeat)
    )
    return [driver.Prompt("", {}, row, "") for row in ids.tolist()]


def measure(config: Benchmark, llm: Remote) -> dict[str, float]:
    """Tokens per second for each context and batch."""
    result = {}
    for context in config.contexts:
        length, new = map(int, context.split("x"))
        params = dict(max_tokens=new, ignore_eos=True, logprobs=0, flat_logprobs=True, detokenize=False)
        for batch in config.batches:
            seconds = []
            for repeat in range(1 + config.repeats):
                start = time.perf_counter()
                rollouts, *_ = llm.rollout(random_prompts(batch, length, repeat), [params] * batch)
                seconds.append(time.perf_counter() - start)
                assert [len(rollout.completion) for rollout in rollouts] == [new] * batch
            result[f"{context}, batch {batch}"] = batch * new / statistics.median(seconds[1:])
    return result


def main(config: Benchmark) -> dict:
    """Start every engine in turn, measure, write and print."""
    found = {}
    longest = max(sum(map(int, context.split("x"))) for context in config.contexts)
    with contextlib.ExitStack() as cleanup:
        path = write_config(cleanup.enter_context(tempfile.TemporaryDirectory()), config.shape)
        wanted = dataclasses.replace(config, model=path)
        config, device = driver.resolve(wanted, connect(wanted, cleanup))
        for name in config.engines:
            settings, arguments = ENGINES[name]
            fixed = {"load_format": "dummy", "worker_extension_cls": "bench_memory.Extension"}
            arguments = fixed | {"max_model_len": longest} | arguments
            own = dataclasses.replace(config, **settings)
            with contextlib.ExitStack() as stop:
                stop.enter_context(vllm_arguments(**arguments))
                start = time.perf_counter()
                llm = Remote(driver.start_engine(own, device, stop), 900)
                ranks = llm.collective_rpc("inspect_weights")
                found[name] = {
                    "startup_s": time.perf_counter() - start,
                    "weights_gib": max(rank["weights_gib"] for rank in ranks),
                    "kv_cache_tokens": min(llm.collective_rpc("kv_cache_tokens")),
                    "tokens_per_s": measure(own, llm),
                }
            print(name, found[name])
    result = write_result(config, device, "rollout", engines=found)
    report(result, config.output_dir / f"rollout_{config.shape}.png")
    return result


def report(result: dict, picture: Path) -> None:
    """Print tokens/s and ratios, and draw the ratios."""
    engines, layout = result["engines"], result["layout"].partition(",")[0]
    title = f"{result['shape']}, {layout}, {result['device']}"
    rates = {name: engine["tokens_per_s"] for name, engine in engines.items()}
    base = next(iter(rates.values()))
    print(f"{title}, fp8 is {result['quantization']}")
    print(f"{'tokens/s (ratio)':24}" + "".join(f"{name:>18}" for name in engines))
    for case in base:
        cells = (f"{rate[case]:.0f} ({rate[case] / base[case]:.2f})" for rate in rates.values())
        print(f"{case:24}" + "".join(f"{cell:>18}" for cell in cells))
    for key in ("weights_gib", "kv_cache_tokens", "startup_s"):
        print(f"{key:24}" + "".join(f"{engine[key]:18,.2f}" for engine in engines.values()))
    plt.figure(figsize=(9, 4), layout="constrained")
    for name, rate in rates.items():
        plt.plot([rate[case] / base[case] for case in base], "o-", label=name)
    plt.xticks(range(len(base)), list(base), rotation=30, ha="right", fontsize="small")
    plt.ylabel(f"tokens/s, ratio to {next(iter(rates))}")
    plt.title(title)
    plt.legend()
    plt.savefig(picture, dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
