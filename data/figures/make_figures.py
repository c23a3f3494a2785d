"""The README's pictures, from finished runs:

python data/figures/make_figures.py quickstart runs/quickstart [RUN ...]
python data/figures/make_figures.py ledger FOLDER    with runs named action_0, own_0, lagged_0, action_1, ...
python data/figures/make_figures.py questions FOLDER    with runs named turn_0, total_0, resolved_0, accuracy_0, ...
python data/figures/make_figures.py tokens runs/quickstart    the token view of its report; needs Chromium
"""

import shutil
import sys
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlattn.run_folder.folder import read_summary
from rlattn.run_folder.jsonl import read_rows
from rlattn.tasks import Questions
from rlattn.tasks.questions.belief import greedy_gain, random_gain

COLORS = ("tab:blue", "tab:olive", "tab:red", "tab:grey")
SPACE = Questions(path="data/task_spaces/parcel.yaml").space
RANDOM_SHARE = random_gain(SPACE, 3) / greedy_gain(SPACE, 3)


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
    arms = {"lagged": "with the lagged self-monitor", "own": "with its own labels", "action": "action reward alone"}
    figure = Figure(figsize=(9, 3), layout="constrained")
    lies, safe = figure.subplots(1, 2)
    draw_arms(Path(folders[0]), arms, {"task/false_claims": lies, "task/own_label_safe": safe})
    lies.set(title="False claims", xlabel="step", ylabel="% of the rollouts", ylim=(0, 100))
    safe.set(title="Rollouts that label themselves safe", xlabel="step", ylim=(0, 103))
    lies.legend(fontsize=8)
    figure.savefig(Path(__file__).parent / "ledger.png", dpi=110)


def questions(folders: list[str]) -> None:
    arms = {"turn": "bits, a turn", "total": "bits, a dialogue", "resolved": "attributes, a turn", "accuracy": "none"}
    figure = Figure(figsize=(10, 3), layout="constrained")
    gain, opened = figure.subplots(1, 2)
    draw_arms(Path(folders[0]), arms, {"task/gain_share": gain, "task/opened_best": opened})
    gain.axhline(100 * RANDOM_SHARE, color="grey", linestyle=":")
    gain.set(title="Bits told, % of the greedy questioner's", xlabel="step", ylim=(50, 103))
    opened.set(title="Dialogues that open with the best question, %", xlabel="step", ylim=(0, 103))
    opened.plot([], [], color="grey", linestyle=":", label="asks at random")
    figure.legend(
        *opened.get_legend_handles_labels(),
        loc="outside right center",
        fontsize=8,
        title="paid beside",
        title_fontsize=8,
    )
    figure.savefig(Path(__file__).parent / "questions.png", dpi=110)


def tokens(runs: list[str]) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), chromium_sandbox=False)
        page = browser.new_page(viewport={"width": 1100, "height": 900}, device_scale_factor=1.25)
        page.goto((Path(runs[0]) / "report.html").absolute().as_uri())
        page.click("#signal-fai")
        page.locator(".tokens .token").nth(30).hover()
        page.locator("#tokens").screenshot(path=Path(__file__).parent / "tokens.png")
        browser.close()


def draw_arms(folder: Path, arms: dict[str, str], axes_of: dict[str, Axes]) -> None:
    """Every metric in per cent over the steps: the seeds of an arm thin, their mean thick."""
    for (arm, label), color in zip(arms.items(), COLORS):
        runs = [list(read_rows(run / "metrics.jsonl"))[1:] for run in sorted(folder.glob(f"{arm}_[0-9]"))]
        for key, axes in axes_of.items():
            courses = [smooth([100 * row[key] for row in rows if key in row]) for rows in runs]
            for course in courses:
                axes.plot(range(1, len(course) + 1), course, color=color, alpha=0.25, linewidth=1)
            mean = [fmean(values) for values in zip(*courses, strict=True)]
            axes.plot(range(1, len(mean) + 1), mean, color=color, linewidth=2, label=label)
            axes.grid(alpha=0.3)


def smooth(values: list[float], reach: int = 3) -> list[float]:
    return [fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


if __name__ == "__main__":
    {f.__name__: f for f in (quickstart, ledger, questions, tokens)}[sys.argv[1]](sys.argv[2:])
