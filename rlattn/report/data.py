"""A run folder -> everything its report shows, as plain data. Reads only; whatever is missing or damaged is named."""

from pathlib import Path
from typing import Any

from rlattn.effort import by_effort
from rlattn.progress import duration
from rlattn.report.alarms import find_alarms
from rlattn.report.logs import number, read_log, read_metrics
from rlattn.report.metrics import METRICS, describe_metric
from rlattn.report.thin import POINTS, evenly, shortened, thinned
from rlattn.report.tokens import read_tokens
from rlattn.tracking import read_summary

SERIES = 6  # of a chart
SAMPLES, TEXT = 30, 6000  # held-out completions, and bytes of each text
HEAD_VALUES = 200_000  # of all heads and steps

# (section, title, metrics.jsonl names); a curve that a run did not log is left out
CURVES = (
    ("Learning", "Reward", ("reward",)),
    ("Learning", "Rewards", ("rewards/*/mean",)),
    ("Learning", "Held-out accuracy", ("eval/accuracy",)),
    ("Learning", "Completion length", ("completions/mean_length", "eval/mean_length")),
    ("Learning", "Entropy", ("entropy",)),
    ("Learning", "KL", ("kl",)),
    ("Learning", "Gradient norm", ("grad_norm",)),
    ("Learning", "Groups without a signal", ("frac_reward_zero_std",)),
    ("Learning", "Cut and repeated rollouts", ("completions/clipped_ratio", "completions/duplicates")),
    ("Learning", "Time", ("time/*",)),
    ("Effort", "Held-out accuracy by effort", ("eval/effort_*/accuracy",)),
    ("Effort", "Held-out tokens of thought by effort", ("eval/effort_*/tokens",)),
    ("Effort", "Tokens of thought in training", ("effort/*/tokens", "effort/average")),
    ("Effort", "Rollouts within their effort", ("effort/*/within",)),
    ("Self-monitor", "Flagged", ("self_monitor/flag_rate", "self_monitor/held_out_flag_rate")),
    ("Self-monitor", "Called safe", ("self_monitor/safe", "self_monitor/own_safe")),
    (
        "Self-monitor",
        "Against the task's truth",
        ("self_monitor/precision", "self_monitor/recall", "self_monitor/held_out_recall"),
    ),
    ("Self-monitor", "Lambda", ("self_monitor/lambda",)),
    ("Task", "", ("task/*",)),
    ("Credit", "", ("credit/*",)),
)
HEADS = ("span", "local", "global")
HIDDEN = {"step", "epoch", "eval/low", "eval/high", "eval/rows", "eval/seconds"}


def read_run(run: Path) -> dict[str, Any]:
    """Everything about a run, finished or not, whatever is left of its folder."""
    missing: list[str] = []
    rows = read_metrics(run, missing)
    if len(rows) > POINTS:
        missing.append("Curves show the lowest and the highest of every stretch; all steps are in metrics.jsonl.")
    summary = read_summary(run) or {}
    tokens = read_tokens(run, missing)
    heads = read_heads(run, missing)
    recipe = _text_of(run / "recipe.yaml")
    samples = [_sample(row) for row in read_log(run / "samples.jsonl", missing)[-SAMPLES:][::-1]]
    for name, why, there in (
        ("metrics.jsonl", "no step was logged yet", rows),
        ("summary.json", "the run has not finished", summary),
        ("samples.jsonl", "no held-out completions", samples),
        ("recipe.yaml", "what was asked for", recipe),
        ("tokens/", "tracking.token_rollouts was 0, or an older version made this run", tokens),
        ("heads.jsonl", "written with credit only", heads),
    ):
        if not there:
            lost = (run / name).exists()
            missing.append(f"Nothing to be read in {name}." if lost else f"Not there: {name} ({why}).")
    return {
        "kind": "run",
        "name": run.absolute().name,
        "tiles": tiles(rows, summary, recipe),
        "missing": missing,
        "alarms": [{"found": alarm.found, "advice": alarm.advice} for alarm in find_alarms(rows)],
        "curves": curves(rows),
        "heads": heads,
        "tokens": tokens,
        "samples": samples,
        "recipe": recipe,
        "environment": _text_of(run / "environment.json"),
        "metrics": [[metric.name, metric.meaning, metric.unit, metric.healthy] for metric in METRICS],
    }


def tiles(rows: list[dict[str, Any]], summary: dict[str, Any], recipe: str) -> list[dict[str, str]]:
    """The first glance: [{label, value, note}]."""
    found = []
    evaluated = [row for row in rows if "eval/accuracy" in row]
    if evaluated:
        before, after = evaluated[0], evaluated[-1]
        gain = 100 * (after["eval/accuracy"] - before["eval/accuracy"])
        note = f"at step {before['step']}" + (f"; {gain:+.1f} points since" if after is not before else "")
        found.append({"label": "Held-out accuracy, first", "value": _percent(before), "note": note})
        if after is not before:
            found.append({"label": "Held-out accuracy, last", "value": _percent(after), "note": _interval(after)})
    control = summary.get("supervised_control")
    if isinstance(control, dict) and number(control.get("accuracy")) is not None:
        note = "supervised training on, on the compute that RL had"
        found.append({"label": "Control", "value": f"{100 * control['accuracy']:.1f} %", "note": note})
    rewards = [row["reward"] for row in rows if "reward" in row]
    if rewards:
        tenth = max(1, len(rewards) // 10)
        early, late = (sum(part) / tenth for part in (rewards[:tenth], rewards[-tenth:]))
        note = "mean of the first and of the last tenth of the steps"
        found.append({"label": "Reward", "value": f"{early:.3g} → {late:.3g}", "note": note})
    steps = max((row["step"] for row in rows), default=0)
    wanted = _from_recipe(recipe, "max_steps")
    state = "finished" if summary else "running, or stopped early"
    found.append({"label": "Steps", "value": f"{steps}" + (f" of {wanted}" if wanted else ""), "note": state})
    seconds = None if summary.get("start_step") else number(summary.get("seconds"))  # else of the last session only
    seconds = seconds or sum(row.get(f"time/{part}", 0) for row in rows for part in ("step", "evaluation"))
    found.append({"label": "Time", "value": duration(seconds), "note": ""})
    return found


def curves(rows: list[dict[str, Any]], points: int = POINTS) -> list[dict[str, Any]]:
    """Charts in order: {section, title, unit, about, series: [{name, points, band}]}, each of so many points."""
    keys = sorted({key for row in rows for key in row} - HIDDEN)
    left = dict.fromkeys(keys)
    charts = []
    for section, title, patterns in CURVES:
        wanted = [key for key in left if any(_like(pattern, key) for pattern in patterns)]
        for key in wanted:
            del left[key]
        if not title:
            charts += [_chart(section, "", [key], rows, points) for key in wanted]
        else:
            parts = [wanted[i : i + SERIES] for i in range(0, len(wanted), SERIES)]
            charts += [_chart(section, title, part, rows, points) for part in parts]
    return charts + against_effort(rows) + [_chart("Everything else", "", [key], rows, points) for key in left]


def against_effort(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Held-out accuracy and thought of the first and of the last evaluation, effort by effort."""
    swept = [
        (row["step"], found) for row in rows if (found := by_effort({k.removeprefix("eval/"): row[k] for k in row}))
    ]
    charts = []
    for place, title, unit in (
        (0, "Held-out accuracy against effort", "share"),
        (1, "Thought against effort", "tokens"),
    ):
        series = [
            {"name": f"step {step}", "points": [[float(effort), pair[place]] for effort, pair in found.items()]}
            for step, found in dict([swept[0], swept[-1]] if swept else []).items()
        ]
        if series:
            charts.append(
                {"section": "Effort", "title": title, "unit": unit, "about": "", "x": "effort", "series": series}
            )
    return charts


def _chart(section: str, title: str, keys: list[str], rows: list[dict[str, Any]], count: int) -> dict[str, Any]:
    known = describe_metric(keys[0])
    series = [{"name": key, "points": thinned(points_of(rows, key), count)} for key in keys]
    if keys == ["eval/accuracy"]:
        bands = [[row["step"], row.get("eval/low"), row.get("eval/high")] for row in rows]
        series[0]["band"] = [band for band in bands if None not in band]
    return {
        "section": section,
        "title": title or keys[0],
        "unit": known.unit if known else "",
        "about": f"{known.meaning}. Healthy: {known.healthy}."
        if known and known.healthy
        else known.meaning
        if known
        else "",
        "series": series,
    }


def points_of(rows: list[dict[str, Any]], key: str) -> list[list[float]]:
    return [[row["step"], float(f"{row[key]:.5g}")] for row in rows if key in row]


def read_heads(run: Path, missing: list[str]) -> dict[str, Any] | None:
    """How far every head looks back, by step: {layers, steps: [{step, span, local, global}]}."""
    rows = [row for row in read_log(run / "heads.jsonl", missing) if _heads_shape(row)]
    if not rows:
        return None
    layers, shape = rows[-1]["layers"], _heads_shape(rows[-1])
    assert shape
    same = [row for row in rows if row["layers"] == layers and _heads_shape(row) == shape]
    shown = evenly(same, max(2, min(200, HEAD_VALUES // (3 * shape[0] * shape[1]))))
    return {"layers": layers, "steps": [{name: row[name] for name in ("step", *HEADS)} for row in shown]}


def _like(pattern: str, key: str) -> bool:
    start, star, end = pattern.partition("*")
    return key.startswith(start) and key.endswith(end) and len(key) > len(start + end) if star else key == pattern


def _percent(row: dict[str, Any]) -> str:
    return f"{100 * row['eval/accuracy']:.1f} %"


def _interval(row: dict[str, Any]) -> str:
    low, high = row.get("eval/low"), row.get("eval/high")
    if low is None or high is None:
        return f"at step {row['step']}"
    return f"95 % interval {100 * low:.1f} to {100 * high:.1f}, at step {row['step']}"


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    texts = {name: shortened(str(row.get(name, "")), TEXT) for name in ("prompt", "completion", "gold")}
    return {"step": row["step"], "right": (number(row.get("score")) or 0) >= 1, **texts}


def _heads_shape(row: dict[str, Any]) -> tuple[int, int] | None:
    """Layers and heads of a row of heads.jsonl; None where it is no such row."""
    try:
        L, H = len(row["layers"]), len(row["span"][0])
        even = all([len(line) for line in row[name]] == [H] * L for name in HEADS) and H > 0
        values = [*row["layers"], *(value for name in HEADS for line in row[name] for value in line)]
        return (L, H) if even and all(number(value) is not None for value in values) else None
    except (KeyError, IndexError, TypeError):
        return None


def _from_recipe(recipe: str, key: str) -> str:
    """A number of the resolved recipe, without parsing what may be damaged."""
    lines = (line.strip().partition(":") for line in recipe.splitlines())
    return next((value.strip() for name, _, value in lines if name == key and value.strip().isdecimal()), "")


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")[:200_000]
    except OSError:
        return ""
