"""A run folder -> everything its report shows, as plain data. Reads only; whatever is missing or damaged is named."""

from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from rlattn.errors import UserError
from rlattn.formats.effort import by_effort
from rlattn.formats.strict_json import finite
from rlattn.formats.yaml import parse_yaml
from rlattn.progress import duration
from rlattn.report.alarms import find_alarms, onset
from rlattn.report.fidelity import read_fidelity
from rlattn.report.logs import number, read_log, read_metrics
from rlattn.report.metrics import METRICS, Metric, describe_metric
from rlattn.report.thin import POINTS, evenly, shortened, thinned
from rlattn.report.tokens import read_tokens
from rlattn.run_folder.folder import ALARMS, FAILURES, read_summary

SERIES = 8  # of a chart
SAMPLES, TEXT = 30, 6000  # held-out completions, and bytes of each text
HEAD_VALUES = 200_000  # of all heads and steps
MOST_POINTS = 300_000  # of all curves: a few megabytes

# (section, title, metrics.jsonl names); a curve that a run did not log is left out
CURVES = (
    ("Learning", "Reward", ("reward",)),
    ("Learning", "Rewards", ("rewards/*/mean",)),
    ("Learning", "Share of the advantage", ("rewards/*/share",)),
    ("Learning", "Held-out accuracy", ("eval/accuracy",)),
    ("Learning", "Completion length", ("completions/mean_length", "eval/mean_length")),
    ("Learning", "Entropy", ("entropy",)),
    ("Learning", "KL", ("kl",)),
    ("Learning", "Gradient norm", ("grad_norm",)),
    ("Learning", "Groups without a signal", ("groups_without_signal",)),
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
EQUAL = {"kind": "none, GRPO's equal credit"}
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
        "setup": setup_of(recipe),
        "tiles": tiles(rows, summary, recipe),
        "missing": missing,
        "alarms": read_alarms(run, rows, missing),
        "tables": read_fidelity(run, missing),
        "failures": read_failures(run, missing),
        "curves": curves(rows),
        "heads": heads,
        "tokens": tokens,
        "samples": samples,
        "recipe": recipe,
        "environment": _text_of(run / "environment.json"),
        "metrics": [[metric.name, metric.meaning, metric.unit, metric.healthy] for metric in logged_metrics(rows)],
    }


def logged_metrics(rows: list[dict[str, Any]]) -> list[Metric]:
    """The lines of the table of metrics that the run's numbers have."""
    found = [describe_metric(key) for key in {key for row in rows for key in row}]
    return [metric for metric in METRICS if metric in found]


def setup_of(recipe: str) -> list[list[str]]:
    """What tells one run from another at a glance: [[label, value]]; empty where the recipe cannot be read."""
    try:
        parsed: Any = parse_yaml(recipe, "recipe.yaml")
        credit = {k: v for k, v in (parsed["credit"] or EQUAL).items() if v not in (None, 0, "both")}
        rewards = [f"{name} × {spec['weight']:g}" for name, spec in parsed["rewards"].items() if isinstance(spec, dict)]
        task, trainer = parsed["task"], parsed["trainer"]
        rule = credit.pop("kind", None) or credit.pop("python", "")
        found = {
            "policy": parsed["policy"]["path"],
            "task": task.get("kind") or task.get("python"),
            "rewards": ", ".join(rewards) + f" ({parsed['rewards']['combine']})" * (len(rewards) > 1),
            "credit": ", ".join([str(rule), *(f"{key} {value}" for key, value in credit.items())]),
            "learning rate": trainer.get("learning_rate"),
            "seed": parsed["seed"],
        }
        return [[label, shortened(str(value), 300)] for label, value in found.items() if value is not None]
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return []


def tiles(rows: list[dict[str, Any]], summary: dict[str, Any], recipe: str) -> list[dict[str, str]]:
    """The first glance: [{label, value, note}]."""
    found = []
    evaluated = [row for row in rows if "eval/accuracy" in row]
    if evaluated:
        before, after = evaluated[0], evaluated[-1]
        gain = 100 * (after["eval/accuracy"] - before["eval/accuracy"])
        found.append({"label": "Held-out accuracy, first", "value": _percent(before), "note": _interval(before)})
        if after is not before:
            best = max(evaluated, key=lambda row: row["eval/accuracy"])
            note = f"{gain:+.1f} points; {_interval(after)}; best {_percent(best)} at step {best['step']}"
            found.append({"label": "Held-out accuracy, last", "value": _percent(after), "note": note})
    control = summary.get("supervised_control")
    if isinstance(control, dict) and number(control.get("accuracy")) is not None:
        note = "supervised training on, on the compute that RL had"
        found.append({"label": "Control", "value": f"{100 * control['accuracy']:.1f} %", "note": note})
    rewards = [row for row in rows if "reward" in row]
    if rewards:
        tenth = rewards[-1]["step"] / 10
        early = fmean(row["reward"] for row in rewards if row is rewards[0] or row["step"] <= tenth)
        late = fmean(row["reward"] for row in rewards if row is rewards[-1] or row["step"] > 9 * tenth)
        note = "mean of the first and of the last tenth of the steps"
        found.append({"label": "Reward", "value": f"{early:.3g} → {late:.3g}", "note": note})
    steps = max((row["step"] for row in rows), default=0)
    wanted = _from_recipe(recipe, "max_steps")
    state = "finished" if summary else "running, or stopped early"
    found.append({"label": "Steps", "value": f"{steps}" + (f" of {wanted}" if wanted else ""), "note": state})
    seconds = None if summary.get("start_step") else number(summary.get("seconds"))  # else of the last session only
    befores = [0, *(row["step"] for row in rows)]  # a line may speak for several steps
    seconds = seconds or sum(
        row.get(f"time/{part}", 0) * max(1, row["step"] - before)
        for before, row in zip(befores, rows, strict=False)
        for part in ("step", "evaluation")
    )
    found.append({"label": "Time", "value": duration(seconds), "note": ""})
    return found


def curves(rows: list[dict[str, Any]], points: int = POINTS) -> list[dict[str, Any]]:
    """Charts in order: {section, title, unit, about, series: [{name, points, band}]}, each of so many points."""
    keys = sorted({key for row in rows for key in row} - HIDDEN)
    points = max(20, min(points, MOST_POINTS // max(1, len(keys))))
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
            for part in parts:
                charts.append(_chart(section, title if part is parts[0] else f"{title}, more", part, rows, points))
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
    series: list[dict[str, Any]] = [{"name": key, "points": thinned(points_of(rows, key), count)} for key in keys]
    if keys == ["eval/accuracy"]:
        bands = [[row["step"], row.get("eval/low"), row.get("eval/high")] for row in rows]
        series[0]["band"] = [band for band in bands if None not in band]
    captions = [caption(key) for key in keys]
    if len(set(captions)) > 1:  # one for each curve
        for one, text in zip(series, captions, strict=True):
            one["about"] = text
    return {
        "section": section,
        "title": title or keys[0],
        "unit": known.unit if known else "",
        "about": captions[0] if len(set(captions)) == 1 else "",
        "series": series,
    }


def caption(key: str) -> str:
    known = describe_metric(key)
    if known is None:
        return ""
    return f"{known.meaning}. Healthy: {known.healthy}." if known.healthy else f"{known.meaning}."


def points_of(rows: list[dict[str, Any]], key: str) -> list[list[float]]:
    return [[row["step"], float(f"{row[key]:.5g}")] for row in rows if key in row]


def read_alarms(run: Path, rows: list[dict[str, Any]], missing: list[str]) -> list[dict[str, Any]]:
    """What is wrong at the end, since when; and with `over` what was told in between and is not so any more."""
    told = {str(row.get("name", "")): row for row in read_log(run / ALARMS, missing)[::-1]}
    standing = find_alarms(rows)
    found = [
        {**asdict(alarm), "since": told[alarm.name]["step"] if alarm.name in told else onset(rows, alarm.name)}
        for alarm in standing
    ]
    over = [row for name, row in told.items() if name not in {alarm.name for alarm in standing}]
    texts = [{key: shortened(str(row.get(key, "")), TEXT) for key in ("name", "found", "advice")} for row in over]
    past = [{**text, "since": row["step"], "over": True} for text, row in zip(texts, over, strict=True)]
    return [*found, *past[:SAMPLES]]


def read_failures(run: Path, missing: list[str]) -> list[dict[str, Any]]:
    """The first failure of every reward, and how many rollouts it failed on in all."""
    first: dict[str, dict[str, Any]] = {}
    count: dict[str, int] = {}
    for row in read_log(run / FAILURES, missing):
        name = str(row.get("reward", ""))
        first.setdefault(name, row)
        count[name] = count.get(name, 0) + int(number(row.get("failed")) or 0)
    return [
        {
            "reward": name,
            "step": row["step"],
            "problem": shortened(str(row.get("problem", "")), TEXT),
            "completion": shortened(str(row.get("completion", "")), TEXT),
            "count": count[name],
        }
        for name, row in first.items()
    ][:SAMPLES]


def read_heads(run: Path, missing: list[str]) -> dict[str, Any] | None:
    """How far every head looks back (None where unknown), by step: {layers, steps: [{step, span, local, global}]}."""
    rows = [row for row in map(finite, read_log(run / "heads.jsonl", missing)) if _heads_shape(row)]
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
    rows = f" of {row['eval/rows']:.0f} rows" if "eval/rows" in row else ""
    return f"step {row['step']}; 95 % interval {100 * low:.1f} to {100 * high:.1f}{rows}"


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    texts = {name: shortened(str(row.get(name, "")), TEXT) for name in ("prompt", "completion", "gold")}
    score = number(row.get("score"))
    return {"step": row["step"], "right": None if score is None else score >= 1, **texts}


def _heads_shape(row: dict[str, Any]) -> tuple[int, int] | None:
    """Layers and heads of a row of heads.jsonl; None where it is no such row."""
    try:
        L, H = len(row["layers"]), len(row["span"][0])
        even = all([len(line) for line in row[name]] == [H] * L for name in HEADS) and H > 0
        values = [value for name in HEADS for line in row[name] for value in line if value is not None]
        return (L, H) if even and all(number(value) is not None for value in (*row["layers"], *values)) else None
    except (KeyError, IndexError, TypeError):
        return None


def _from_recipe(recipe: str, key: str) -> str:
    """A number of the resolved recipe, without parsing what may be damaged."""
    lines = (line.strip().partition(":") for line in recipe.splitlines())
    return next((value.strip() for name, _, value in lines if name == key and value.strip().isdecimal()), "")


def _text_of(file: Path) -> str:
    """Of a plain file of the run's own: a link may lead anywhere, and a report is shared."""
    try:
        if not file.is_file() or file.resolve().parent != file.parent.resolve():
            return ""
        with file.open(encoding="utf-8", errors="replace") as text:
            return text.read(200_000)
    except OSError:
        return ""
