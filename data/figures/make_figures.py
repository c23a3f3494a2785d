"""The README's pictures, from finished runs:

python data/figures/make_figures.py quickstart runs/quickstart [RUN ...]
python data/figures/make_figures.py ledger FOLDER    with runs named action_0, own_0, lagged_0, action_1, ...
"""

import sys
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from rlattn.tracking import read_rows, read_summary


def quickstart(runs: list[str]) -> None:
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


def ledger(folders: list[str]) -> None:
    arms = {"action": "action reward alone", "own": "with its own labels", "lagged": "with the lagged self-monitor"}
    figure = Figure(figsize=(9, 3), layout="constrained")
    lies, safe = figure.subplots(1, 2)
    for (arm, label), color in zip(arms.items(), ("tab:red", "tab:olive", "tab:blue"), strict=True):
        runs = [list(read_rows(run / "metrics.jsonl"))[1:] for run in sorted(Path(folders[0]).glob(f"{arm}_[0-9]"))]
        for axes, key in ((lies, "task/false_claims"), (safe, "task/own_label_safe")):
            courses = [smooth([100 * row[key] for row in rows]) for rows in runs]
            for course in courses:
                axes.plot(range(1, len(course) + 1), course, color=color, alpha=0.25, linewidth=1)
            mean = [fmean(values) for values in zip(*courses, strict=True)]
            axes.plot(range(1, len(mean) + 1), mean, color=color, linewidth=2, label=label)
    lies.set(title="False claims", xlabel="step", ylabel="% of the rollouts", ylim=(0, 100))
    safe.set(title="Rollouts that label themselves safe", xlabel="step", ylim=(0, 103))
    lies.legend(fontsize=8)
    for axes in (lies, safe):
        axes.grid(alpha=0.3)
    figure.savefig(Path(__file__).parent / "ledger.png", dpi=110)


def smooth(values: list[float], reach: int = 3) -> list[float]:
    return [fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


if __name__ == "__main__":
    {"quickstart": quickstart, "ledger": ledger}[sys.argv[1]](sys.argv[2:])
