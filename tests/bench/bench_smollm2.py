"""Does a real model learn as much from FP8 rollouts as from BF16's? One engine, many runs; writes JSON.

    python tests/bench/make_smollm2.py smollm2
    python tests/bench/bench_smollm2.py --model smollm2/model --quantization fp8-dynamic [any flag]

The runs of WAYS, each with seeds 0, 1 and 2, start from the same weights in one engine. Afterwards
`bench_smollm2.py plot FOLDER ...` draws what several calls have found, and prints tables.
"""

import contextlib
import dataclasses
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

import make_smollm2
import matplotlib.pyplot as plt
import psutil
import tests_on_path  # noqa: F401
import tyro

from harness import connect, driver, helper

# Name -> flags that it changes, and whether importance weights correct for the engine.
WAYS = {"in turn": ({}, True), "overlapped": ({"overlap": True}, True), "not corrected": ({}, False)}


@dataclasses.dataclass
class Benchmark(driver.Config):
    """Runs of a model on sums and products."""

    ways: tuple[str, ...] = tuple(WAYS)
    """Keys of WAYS."""
    seeds: int = 3
    """0, 1 and so on."""


def start_again(trainer: driver.Trainer, config: driver.Config, corrected: bool) -> None:
    """The trainer becomes one that has just started; in the actor."""
    module, group = sys.modules["rlhf_online_quant"], trainer.group
    trainer.__init__(config)
    trainer.group = group
    plain = getattr(module, "plain_loss", module.compute_ppo_loss)
    module.plain_loss = plain

    def loss(logprobs_BT, batch, config):
        return plain(logprobs_BT, batch if corrected else batch | {"engine_BT": batch["old_BT"]}, config)

    module.compute_ppo_loss = loss


def run(config: Benchmark, trainer, engines, prompts, held_out, names: dict, corrected: bool) -> dict:
    """One run from the start: rows of metrics, held-out answers and mismatch before and after, seconds."""
    config.output_dir.mkdir(parents=True, exist_ok=True)
    driver.wait([trainer.__ray_call__.remote(start_again, config, corrected)], 300, "starting again")
    helper.sync_weights_to_quantized_engine(trainer, engines, timeout_s=300)
    # Outside of the time that is taken.
    look = lambda: driver.explain_mismatch(config, trainer, engines[0], prompts[:8], names)
    ask = lambda: driver.ask_held_out(config, engines, held_out, make_smollm2.exact)
    mismatch, answers, start = [look()], [ask()], time.perf_counter()
    rows = driver.train(config, trainer, engines, prompts, make_smollm2.exact, 0)
    seconds = time.perf_counter() - start
    return {
        "rows": rows,
        "seconds": seconds,
        "held_out": [*answers, ask()],
        "mismatch": [*mismatch, look()],
    }


def main(config: Benchmark) -> None:
    """All ways and seeds with one engine."""
    config = dataclasses.replace(config, reward="make_smollm2:exact")
    found = {}
    with contextlib.ExitStack() as cleanup:
        config, device = driver.resolve(config, connect(config, cleanup))
        config, prompts, held_out, *_ = driver.check(config, device)
        trainer, engines, ranks = driver.start(config, device, cleanup)
        helper.prove_sync(trainer, engines, max_tokens=config.max_tokens, timeout_s=config.timeout_s)
        print(f"Ready after {time.time() - psutil.Process().create_time():.1f} s", flush=True)
        for way in config.ways:
            changes, corrected = WAYS[way]
            for seed in range(config.seeds):
                folder = config.output_dir / f"{way}-{seed}".replace(" ", "-")
                own = dataclasses.replace(config, **changes, seed=seed, output_dir=folder)
                name, names = f"{config.quantization}, {way}, seed {seed}", ranks[0]["names"]
                found[name] = run(own, trainer, engines, prompts, held_out, names, corrected)
                shutil.rmtree(folder / f"checkpoint-{own.steps}")
                print(name, {key: value for key, value in found[name].items() if key != "rows"}, flush=True)
                (config.output_dir / "smollm2.json").write_text(json.dumps(found))


def plot(folders: list[str]) -> None:
    """Tables, and a chart of the rewards, of several benchmarks."""
    found = {}
    for folder in folders:
        found |= json.loads((Path(folder) / "smollm2.json").read_text())
    groups: dict[str, list[dict]] = {}
    for name, each in found.items():
        groups.setdefault(name.rpartition(", ")[0], []).append(each)
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for number, (name, runs) in enumerate(groups.items()):
        color, style = f"C{number}", "-" if "in turn" in name else ":" if "overlap" in name else "--"
        for key, axis in zip(("reward", "mismatch_kl"), axes, strict=True):
            of_steps = zip(*([row[key] for row in each["rows"]] for each in runs), strict=True)
            means = [*map(statistics.mean, of_steps)]
            smooth = [statistics.mean(means[max(0, i - 9) : i + 1]) for i in range(len(means))]
            axis.plot(smooth, style, color=color, label=name)
        right = [each["held_out"] for each in runs]
        mean = lambda key: statistics.mean(row[key] for each in runs for row in each["rows"])
        median = lambda key: statistics.median(
            row[key] for each in runs for row in each["rows"][2 * (len(each["rows"]) > 2) :]
        )
        after = [f"{100 * last['all_right']:.1f}%" for _, last in right]
        print(
            f"RESULT {name}: held out {100 * right[0][0]['all_right']:.1f}% before, {', '.join(after)} after"
        )
        curve = [statistics.mean(row["reward"] for row in each["rows"]) for each in runs]
        print(f"  mean reward {', '.join(f'{value:.3f}' for value in curve)}")
        keys = ("mismatch_kl", "effective_sample_size", "corrected", "ppo_clipped", "truncated")
        print("  mean " + ", ".join(f"{key} {mean(key):.2e}" for key in keys))
        keys = ("step_s", "rollout_s", "train_s", "sync_s")
        print("  median " + ", ".join(f"{key} {median(key):.3f}" for key in keys), end="; ")
        walls, tokens = [f"{each['seconds']:.0f}" for each in runs], []
        for each in runs:
            tokens += [each["rows"][0]["tokens"], each["rows"][-1]["tokens"]]
        print(f"wall {', '.join(walls)} s; tokens of the first and last step {tokens}")
        for when in (0, 1):
            print(f"  mismatch {('before', 'after')[when]}: {[each['mismatch'][when] for each in runs]}")
    for axis, title in zip(axes, ("reward", "mismatch KL, nats a token"), strict=True):
        axis.set(xlabel="step", title=f"{title}: mean of the seeds and of 10 steps")
    axes[1].set_yscale("log")
    axes[0].legend(fontsize=7)
    plt.savefig(Path(folders[0]) / "smollm2.png", dpi=65)


if __name__ == "__main__":
    if sys.argv[1:2] == ["plot"]:
        plot(sys.argv[2:])
    else:
        main(tyro.cli(Benchmark))
