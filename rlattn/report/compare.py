"""Several runs side by side: curves over each other, a final table, intervals over seeds, how the recipes differ.

Runs whose recipes differ in their seed alone (and where they are stored) are one setting.
"""

import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rlattn.errors import UserError
from rlattn.recipe import load_recipe
from rlattn.report.data import curves
from rlattn.report.logs import read_metrics
from rlattn.tracking import holds_run, read_summary

# Two-sided 95 % quantiles of Student's t by degrees of freedom; beyond them, the next lower one is a little too wide.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 14: 2.145, 29: 2.045}
OVERLAID = ("reward", "eval/accuracy", "completions/mean_length", "entropy", "kl", "grad_norm", "time/step")
TABLED = ("step", "eval/low", "eval/high", "num_tokens")


def compare(runs: list[Path]) -> dict[str, Any]:
    """What the comparison page and the terminal show.

    Raises:
        UserError: a folder that holds no run, or fewer than two.
    """
    if len(runs) < 2:
        raise UserError("RUN", "expected at least two runs to compare.", "`rlattn report RUN` shows one.")
    for run in runs:
        if not holds_run(run):
            raise UserError(
                str(run), "is no run's folder.", "Expected the folder that `rlattn train` wrote, runs/NAME."
            )
    names, missing = labels(runs), []
    rows, recipes = {}, {}
    for name, run in zip(names, runs):
        lost: list[str] = []
        rows[name] = [{k: row[k] for k in row if k in TABLED or overlaid(k)} for row in read_metrics(run, lost)]
        recipes[name] = flat_recipe(run, lost)
        missing += [f"{name}: {line}" for line in [*lost, *([] if rows[name] else ["no step can be read."])]]
    keys = {key for recipe in recipes.values() for key in recipe}
    known = [recipe for recipe in recipes.values() if recipe]
    different = sorted(key for key in keys if len({str(recipe.get(key)) for recipe in known}) > 1)
    finals = {name: final(run, rows[name]) for name, run in zip(names, runs)}
    tables = [
        {
            "title": "Final figures",
            "about": "Accuracy: greedy, held out, in per cent, with its 95 % interval over the rows. "
            "Reward: mean of the last tenth of the steps.",
            "columns": [
                "run",
                "steps",
                "accuracy before",
                "accuracy after",
                "interval",
                "reward",
                "tokens",
                "seconds a step",
            ],
            "rows": [[name, *finals[name]["shown"]] for name in names],
        }
    ]
    settings = over_seeds(names, recipes, finals)
    if settings:
        tables.append(
            {
                "title": "Over seeds",
                "about": "Mean and 95 % interval (Student's t) over the runs that differ in their seed alone.",
                "columns": ["setting", "runs", "accuracy after", "reward"],
                "rows": settings,
            }
        )
    tables.append(
        {
            "title": "Recipe differences",
            "about": "Every key in which the runs differ, apart from where they are stored and followed."
            if different
            else "The recipes ask for the same.",
            "columns": ["key", *names],
            "rows": [[key, *(str(recipes[name].get(key, "–")) for name in names)] for key in different],
        }
    )
    name = f"{len(runs)} runs compared"
    return {"kind": "compare", "name": name, "missing": missing, "tables": tables, "curves": overlay(rows)}


def labels(runs: list[Path]) -> list[str]:
    """Folder names, with as many parents as it takes to tell the runs apart.

    Raises:
        UserError: the same run twice.
    """
    paths = [run.resolve() for run in runs]
    if len(set(paths)) < len(paths):
        raise UserError("RUN", "the same run was given twice.")
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def flat_recipe(run: Path, missing: list[str]) -> dict[str, Any]:
    """Dotted key -> value of what a run was asked to train; empty where its recipe is damaged, which `missing` says."""
    try:
        recipe = load_recipe(run / "recipe.yaml")
    except (UserError, OSError):
        missing.append("recipe.yaml is missing, damaged or of another version; it is not compared.")
        return {}
    plain = recipe.model_dump(mode="json", exclude={"output_dir", "tracking", "resume", "name"})
    flat: dict[str, Any] = {}

    def walk(value: Any, prefix: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{prefix}.{key}" if prefix else key)
        else:
            flat[prefix] = value

    walk(plain, "")
    return flat


def final(run: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The last figures of a run; None where it has none."""
    evaluated = [row for row in rows if "eval/accuracy" in row]
    rewards = [row["reward"] for row in rows if "reward" in row]
    seconds = [row["time/step"] for row in rows if "time/step" in row]
    tenth = max(1, len(rewards) // 10)
    reward = fmean(rewards[-tenth:]) if rewards else None
    before, after = (evaluated[0], evaluated[-1]) if evaluated else ({}, {})
    accuracy, low, high = (after.get(f"eval/{name}") for name in ("accuracy", "low", "high"))
    tokens = max((row["num_tokens"] for row in rows if "num_tokens" in row), default=None)
    steps = f"{max((row['step'] for row in rows), default=0)}{'' if read_summary(run) else ' (not finished)'}"
    shown = [
        steps,
        percent(before.get("eval/accuracy")),
        percent(accuracy),
        f"{percent(low)} to {percent(high)}",
        "–" if reward is None else f"{reward:.3f}",
        "–" if tokens is None else f"{tokens:.0f}",
        f"{fmean(seconds):.2f}" if seconds else "–",
    ]
    return {"accuracy": accuracy, "reward": reward, "shown": shown}


def over_seeds(names: list[str], recipes: dict[str, dict[str, Any]], finals: dict[str, Any]) -> list[list[str]]:
    """One line a setting with several seeds."""
    settings: dict[str, list[str]] = {}
    for name in names:
        recipe = {key: value for key, value in recipes[name].items() if key != "seed"}
        if recipe:
            settings.setdefault(str(sorted(recipe.items(), key=lambda item: item[0])), []).append(name)
    lines = []
    for members in settings.values():
        if len(members) > 1:
            accuracy = [finals[name]["accuracy"] for name in members]
            reward = [finals[name]["reward"] for name in members]
            lines.append(
                [", ".join(members), str(len(members)), interval(accuracy, 100, 1, " %"), interval(reward, 1, 3)]
            )
    return lines


def interval(values: list[float | None], scale: float, digits: int, unit: str = "") -> str:
    """`86.3 ± 1.3 %`: mean and half the width of the 95 % interval."""
    found = [scale * value for value in values if value is not None]
    if len(found) < 2:
        return "–"
    free = len(found) - 1
    half = T95[max(known for known in T95 if known <= free)] * stdev(found) / math.sqrt(len(found))
    return f"{fmean(found):.{digits}f} ± {half:.{digits}f}{unit}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def overlay(rows: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One chart a metric, one curve a run."""
    charts: dict[str, dict[str, Any]] = {}
    for name, of_run in rows.items():
        kept = [{k: row[k] for k in row if k == "step" or overlaid(k)} for row in of_run]
        for chart in curves(kept):
            for one in chart["series"]:
                target = charts.setdefault(
                    one["name"], {**chart, "title": one["name"], "section": "Learning", "series": []}
                )
                target["series"].append({"name": name, "points": one["points"]})
    return list(charts.values())


def overlaid(key: str) -> bool:
    return key in OVERLAID or (key.startswith("rewards/") and key.endswith("/mean"))
