"""Is as much learned with FP8 as in BF16, and overlapped as in turn? Writes JSON and a chart.

python tests/bench/bench_learning.py [any flag of the driver]
"""

import dataclasses
import json

import matplotlib.pyplot as plt
import tests_on_path  # noqa: F401
import tyro

from harness import driver

# Name -> what it changes, and how many seeds.
WAYS = {"FP8": ({}, 5), "FP8 overlapped": ({"overlap": True}, 3), "BF16": ({"quantization": "none"}, 3)}


def main(config: driver.Config) -> None:
    """Run the program for every way and seed."""
    folder, curves, right = config.output_dir, {}, {}  # of the tiny model, whose held-out words say it
    for way, (settings, seeds) in WAYS.items():
        for seed in range(seeds):
            name = f"{way}, seed {seed}"
            own = dataclasses.replace(
                config, **settings, seed=seed, output_dir=folder / name.replace(" ", "-")
            )
            right[name] = driver.main(own)["held_out"].get("all_right")
            rows = driver.read_metrics(own.output_dir / "metrics.jsonl")
            curves[name] = [row["reward"] for row in rows]
    means = {name: sum(curve) / len(curve) for name, curve in curves.items()}
    (folder / "learning.json").write_text(
        json.dumps({"curves": curves, "means": means, "all_right": right}, indent=2)
    )
    styles = dict(zip(WAYS, ["-", ":", "--"], strict=True))
    for name, curve in curves.items():
        plt.plot(curve, label=name, linestyle=styles[name.partition(",")[0]])
    plt.xlabel("step")
    plt.ylabel("reward")
    plt.legend()
    plt.savefig(folder / "learning.png")
    for name, curve in curves.items():
        print(
            f"{name}: mean reward {means[name]:.4f}, first {curve[0]:.3f}, last {curve[-1]:.3f}, "
            f"held-out prompts all right before and after {right[name]}"
        )
    for way, (_, seeds) in WAYS.items():
        own = [means[f"{way}, seed {seed}"] for seed in range(seeds)]
        print(f"RESULT {way}: mean reward {sum(own) / seeds:.4f}, between {min(own):.4f} and {max(own):.4f}")


if __name__ == "__main__":
    main(tyro.cli(driver.Config))
