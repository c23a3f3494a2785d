"""Several runs side by side: curves over each other, final tables, intervals over seeds, how the recipes differ.

Runs whose recipes differ in their seeds alone (and where they are stored) are one setting.
"""

import json
import math
import re
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rlattn.errors import UserError, describe
from rlattn.formats.yaml import parse_yaml
from rlattn.recipe.load import parse_recipe
from rlattn.recipe.schema import flat
from rlattn.report.data import HIDDEN, caption, curves
from rlattn.report.logs import read_metrics
from rlattn.report.metrics import describe_metric
from rlattn.report.thin import POINTS
from rlattn.run_folder.folder import holds_run, read_summary
from rlattn.statistics import t95

SEEDS = ("seed", "policy.warm_start.seed")
FIRST = ("reward", "eval/accuracy", "completions/mean_length", "entropy", "kl", "grad_norm", "time/step")
# what a task, its rewards and its policy are judged by; the rest is in the curves
TABLED = re.compile(r"(task|self_monitor|effort)/.*|rewards/\w+/mean|completions/mean_length|entropy|eval/.*")
UNTABLED = re.compile(r"eval/(accuracy|low|high|rows|seconds)")
MOST_POINTS = 150_000  # of all curves: a few megabytes


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
        rows[name] = read_metrics(run, lost)
        recipes[name] = flat_recipe(run, lost)
        missing += [f"{name}: {line}" for line in [*lost, *([] if rows[name] else ["no step can be read."])]]
        done, asked = max((row["step"] for row in rows[name]), default=0), recipes[name].get("trainer.max_steps")
        if isinstance(asked, int | float) and 0 < done < asked:
            missing.append(f"{name}: its end is step {done} of {asked:.0f}.")
    keys = {key for recipe in recipes.values() for key in recipe}
    known = [recipe for recipe in recipes.values() if recipe]
    different = sorted(key for key in keys if any(recipe.get(key) != known[0].get(key) for recipe in known))
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
    settings = settings_of(names, recipes)
    if several := [members for members in settings if len(members) > 1]:
        tables.append(
            {
                "title": "Over seeds",
                "about": "Mean and 95 % interval (Student's t) over the runs that differ in their seeds alone.",
                "columns": ["setting", "runs", "accuracy after", "reward"],
                "rows": [over_seeds(members, finals) for members in several],
            }
        )
    tables.append(at_the_end(settings, rows))
    tables.append(
        {
            "title": "Recipe differences",
            "about": "Every key in which the runs differ, apart from where they are stored and followed."
            if different
            else "The recipes that can be read ask for the same."
            if len(known) > 1
            else "Fewer than two recipes can be read.",
            "columns": ["key", *names],
            "rows": [[key, *(as_written(recipes[name].get(key, "–")) for name in names)] for key in different],
        }
    )
    name = f"{len(runs)} runs compared"
    return {"kind": "compare", "name": name, "missing": missing, "tables": tables, "curves": overlay(rows)}


def is_comparison(file: Path) -> bool:
    """Whether a file is a page that `rlattn compare` wrote: nothing else is ever replaced."""
    try:
        return file.is_file() and '"kind":"compare"' in file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


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
    try:  # its paths may be another machine's
        recipe = parse_recipe(parse_yaml((run / "recipe.yaml").read_text(encoding="utf-8"), "recipe.yaml"))
    except UserError as error:
        missing.append(f"its recipe is not compared: {error}")
        return {}
    except (OSError, UnicodeDecodeError) as error:
        missing.append(f"its recipe is not compared: {describe(error)}.")
        return {}
    # 1 and 1.0 ask for the same
    plain = json.loads(
        json.dumps(recipe.model_dump(mode="json", exclude={"output_dir", "tracking", "resume", "name"})),
        parse_int=float,
    )
    return flat(plain)


def final(run: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The last figures of a run; None where it has none."""
    evaluated = [row for row in rows if "eval/accuracy" in row]
    seconds = [row["time/step"] for row in rows if "time/step" in row]
    reward = late_mean(rows, "reward")
    before, after = (evaluated[0], evaluated[-1]) if evaluated else ({}, {})
    accuracy, low, high = (after.get(f"eval/{name}") for name in ("accuracy", "low", "high"))
    tokens = max((row["num_tokens"] for row in rows if "num_tokens" in row), default=None)
    steps = f"{max((row['step'] for row in rows), default=0)}{'' if read_summary(run) else ' (not finished)'}"
    shown = [
        steps,
        percent(before.get("eval/accuracy")),
        percent(accuracy),
        "–" if low is None or high is None else f"{percent(low)} to {percent(high)}",
        "–" if reward is None else f"{reward:.3f}",
        "–" if tokens is None else f"{tokens:.0f}",
        f"{fmean(seconds):.2f}" if seconds else "–",
    ]
    return {"accuracy": accuracy, "reward": reward, "shown": shown}


def settings_of(names: list[str], recipes: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The runs that differ in their seeds alone, together; one whose recipe cannot be read stands alone."""
    settings: dict[str, list[str]] = {}
    for name in names:
        recipe = {key: value for key, value in recipes[name].items() if key not in SEEDS}
        settings.setdefault(json.dumps(recipe, sort_keys=True) if recipe else name, []).append(name)
    return list(settings.values())


def over_seeds(members: list[str], finals: dict[str, Any]) -> list[str]:
    accuracy, reward = ([finals[name][figure] for name in members] for figure in ("accuracy", "reward"))
    return [", ".join(members), str(len(members)), interval(accuracy, 100, 1, " %"), interval(reward, 1, 3)]


def at_the_end(settings: list[list[str]], rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """One line a number, one column a setting."""
    keys = sorted({k for of_run in rows.values() for row in of_run for k in row if tabled(k)})
    late = {name: {key: late_mean(of_run, key) for key in keys} for name, of_run in rows.items()}
    return {
        "title": "At the end",
        "about": "Mean over the last tenth of the steps; what is evaluated (eval/…), at its last one; shares are of 1. "
        "With several seeds, their mean and its 95 % interval (of two runs very wide: 12.7 standard errors).",
        "columns": ["number", *(_heading(members) for members in settings)],
        "rows": [[key, *(spread([late[name][key] for name in members]) for members in settings)] for key in keys],
    }


def _heading(members: list[str]) -> str:
    """`a`, `a, b` or `a … e (5 runs)`."""
    return ", ".join(members) if len(members) < 3 else f"{members[0]} … {members[-1]} ({len(members)} runs)"


def late_mean(rows: list[dict[str, Any]], key: str) -> float | None:
    """Over the last tenth of the run's steps; the last value where none of those steps has one."""
    end = max((row["step"] for row in rows), default=0)
    values = [(row["step"], row[key]) for row in rows if key in row]
    if not values:
        return None
    late = [value for step, value in values if step > 0.9 * end and not key.startswith("eval/")]
    return fmean(late) if late else values[-1][1]


def spread(values: list[float | None]) -> str:
    """A number as it is, several as `mean ± interval`, with four digits of the mean."""
    found = [value for value in values if value is not None]
    if len(found) < 2:
        return f"{found[0]:.4g}" if found else "–"
    size = max(abs(fmean(found)), 1e-3)
    return interval(values, 1, max(0, 3 - math.floor(math.log10(size))))


def tabled(key: str) -> bool:
    return bool(TABLED.fullmatch(key)) and not UNTABLED.fullmatch(key)


def interval(values: list[float | None], scale: float, digits: int, unit: str = "") -> str:
    """`86.3 ± 1.3 %`: mean and half the width of the 95 % interval."""
    found = [scale * value for value in values if value is not None]
    if len(found) < 2:
        return "–"
    free = len(found) - 1
    half = t95(free) * stdev(found) / math.sqrt(len(found))
    of_fewer = f" (n = {len(found)})" if len(found) < len(values) else ""
    return f"{fmean(found):.{digits}f} ± {half:.{digits}f}{unit}{of_fewer}"


def as_written(value: Any) -> str:
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def overlay(rows: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One chart a metric, one curve a run: first what says whether a run learned, the rest folded away."""
    kept = {name: [{k: row[k] for k in row if k not in HIDDEN or k == "step"} for row in rows[name]] for name in rows}
    curves_in_all = sum(len({k for row in of_run for k in row}) for of_run in kept.values())
    points = max(20, min(POINTS, MOST_POINTS // max(1, curves_in_all)))
    charts: dict[str, dict[str, Any]] = {}
    for name, of_run in kept.items():
        for chart in (chart for chart in curves(of_run, points) if "x" not in chart):  # over the steps
            for one in chart["series"]:
                first = one["name"] in FIRST or re.fullmatch(r"rewards/\w+/mean", one["name"])
                section = "Learning" if first else "Everything else"
                known = describe_metric(one["name"])
                told = {"unit": known.unit if known else "", "about": caption(one["name"])}
                target = charts.setdefault(
                    one["name"], {**chart, **told, "title": one["name"], "section": section, "series": []}
                )
                target["series"].append({"name": name, "label": name, "points": one["points"]})
    order = {key: place for place, key in enumerate(FIRST)}
    return sorted(charts.values(), key=lambda chart: order.get(chart["title"], len(order)))
