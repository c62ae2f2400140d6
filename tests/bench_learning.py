"""Does FP8 change what is learned? Three seeds with FP8 and a BF16 control; writes JSON and a chart.

python tests/bench_learning.py [any flag of the driver]
"""

import dataclasses
import json

import matplotlib.pyplot as plt
import tyro

from harness import driver

SEEDS = 0, 1, 2


def main(config: driver.Config) -> None:
    folder, curves = config.output_dir, {}
    for seed, quantization in [(seed, config.quantization) for seed in SEEDS] + [(SEEDS[0], "none")]:
        name = f"seed {seed} {'BF16' if quantization == 'none' else 'FP8'}"
        settings = dict(seed=seed, quantization=quantization, output_dir=folder / name.replace(" ", "-"))
        driver.main(dataclasses.replace(config, **settings))
        curves[name] = [row["reward"] for row in driver.read_metrics(settings["output_dir"])]
    means = {name: sum(curve) / len(curve) for name, curve in curves.items()}
    *fp8, control = means.values()
    inside = min(fp8) <= control <= max(fp8)
    steps = sum(min(fp8) <= bf16 <= max(fp8) for *fp8, bf16 in zip(*curves.values()))
    found = {"curves": curves, "means": means, "inside": inside}
    (folder / "learning.json").write_text(json.dumps(found, indent=2))
    for name, curve in curves.items():
        plt.plot(curve, label=name, linestyle="--" if "BF16" in name else "-")
    plt.xlabel("step")
    plt.ylabel("reward")
    plt.legend()
    plt.savefig(folder / "learning.png")
    for name, curve in curves.items():
        print(f"{name}: mean reward {means[name]:.4f}, first {curve[0]:.3f}, last {curve[-1]:.3f}")
    where = f"{inside} in the mean, at {steps} of {config.steps} steps"
    print(f"RESULT control within the spread of the seeds: {where}")


if __name__ == "__main__":
    main(tyro.cli(driver.Config))
