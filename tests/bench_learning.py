"""Does FP8 change what is learned? Three seeds with FP8, three in BF16; writes JSON and a chart.

python tests/bench_learning.py [any flag of the driver]
"""

import dataclasses
import json

import matplotlib.pyplot as plt
import tyro

from harness import driver

SEEDS = 0, 1, 2


def main(config: driver.Config) -> None:
    folder, curves, right = config.output_dir, {}, {}
    for quantization, seed in [(kind, seed) for kind in (config.quantization, "none") for seed in SEEDS]:
        name = f"seed {seed} {'BF16' if quantization == 'none' else 'FP8'}"
        settings = dict(seed=seed, quantization=quantization, output_dir=folder / name.replace(" ", "-"))
        right[name] = driver.main(dataclasses.replace(config, **settings))["all_right"]
        curves[name] = [row["reward"] for row in driver.read_metrics(settings["output_dir"])]
    means = {name: sum(curve) / len(curve) for name, curve in curves.items()}
    fp8, bf16 = list(means.values())[: len(SEEDS)], list(means.values())[len(SEEDS) :]
    inside = min(fp8) <= sum(bf16) / len(bf16) <= max(fp8)
    found = {"curves": curves, "means": means, "all_right": right, "inside": inside}
    (folder / "learning.json").write_text(json.dumps(found, indent=2))
    for name, curve in curves.items():
        plt.plot(curve, label=name, linestyle="--" if "BF16" in name else "-")
    plt.xlabel("step")
    plt.ylabel("reward")
    plt.legend()
    plt.savefig(folder / "learning.png")
    for name, curve in curves.items():
        print(
            f"{name}: mean reward {means[name]:.4f}, first {curve[0]:.3f}, last {curve[-1]:.3f}, "
            f"words without a mistake before and after {right[name]}"
        )
    print(f"RESULT the mean of the BF16 runs lies within the spread of the FP8 seeds: {inside}")


if __name__ == "__main__":
    main(tyro.cli(driver.Config))
