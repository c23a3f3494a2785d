"""The README's picture, from finished quickstart runs: python data/figures/make_figures.py runs/quickstart [RUN ...]"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from rlattn.tracking import read_rows, read_summary


def main(runs: list[str]) -> None:
    figure = Figure(figsize=(9, 3), layout="constrained")
    reward, accuracy = figure.subplots(1, 2)
    for index, run in enumerate(runs):
        rows = list(read_rows(Path(run) / "metrics.jsonl"))
        steps = [row["step"] for row in rows if "reward" in row]
        reward.plot(steps, [row["reward"] for row in rows if "reward" in row], color="tab:blue", alpha=0.7)
        held_out = [row for row in rows if "eval/accuracy" in row]
        steps = [row["step"] for row in held_out]
        low, high, mean = ([row[f"eval/{key}"] for row in held_out] for key in ("low", "high", "accuracy"))
        accuracy.fill_between(steps, low, high, alpha=0.15, color="tab:blue")
        accuracy.plot(steps, mean, "o-", color="tab:blue", label="RL" if index == 0 else None)
        summary = read_summary(Path(run)) or {}
        if control := summary.get("supervised_control"):
            label = "supervised training on instead, same compute" if index == 0 else None
            accuracy.plot(steps[-1], control["accuracy"], "s", color="tab:orange", label=label)
    reward.set(title="Reward", xlabel="step")
    accuracy.set(title="Held-out accuracy", xlabel="step", ylim=(0, 1))
    accuracy.legend(loc="lower right", fontsize=8)
    for axes in (reward, accuracy):
        axes.grid(alpha=0.3)
    figure.savefig(Path(__file__).parent / "quickstart.png", dpi=120)


if __name__ == "__main__":
    main(sys.argv[1:])
