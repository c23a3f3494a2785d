"""A run folder -> one static HTML file: what was asked, how it went, what the policy writes. Needs no network."""

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment

from rlattn.effort import by_effort
from rlattn.tracking import read_rows, read_summary, write_text

# (title, metrics.jsonl keys, unit); a curve whose keys a run did not log is left out
CURVES = (
    ("Reward", ("reward",), ""),
    ("Held-out accuracy", ("eval/accuracy",), "share right"),
    ("Completion length", ("completions/mean_length", "eval/mean_length"), "tokens"),
    ("Entropy", ("entropy",), "nats a token"),
    ("Gradient norm", ("grad_norm",), ""),
    ("Seconds a step", ("time/step",), "s"),
)


def write_report(run: Path) -> Path:
    """Writes `report.html` into a run folder and returns its path. Model text is escaped."""
    rows = list(read_rows(run / "metrics.jsonl"))
    samples = list(read_rows(run / "samples.jsonl"))
    summary = read_summary(run)
    html = (
        Environment(autoescape=True)
        .from_string(PAGE)
        .render(
            name=run.name,
            summary=summary,
            efforts=by_effort((summary or {}).get("after")),
            efforts_before=by_effort((summary or {}).get("before")),
            curves=_curves(rows),
            samples=samples[::-1],
            recipe=(run / "recipe.yaml").read_text(encoding="utf-8"),
            environment=(run / "environment.json").read_text(encoding="utf-8"),
        )
    )
    write_text(run / "report.html", html)
    return run / "report.html"


def _curves(rows: list[dict[str, Any]]) -> str:
    """The figure as a data URI."""
    from matplotlib.figure import Figure

    rewards = {key for row in rows for key in row if key.startswith("rewards/") and key.endswith("/mean")}
    curves = [
        (title, tuple(sorted(rewards | {"reward"})) if title == "Reward" else keys, unit)
        for title, keys, unit in CURVES
    ]
    swept = sorted({key for row in rows for key in row if key.startswith("eval/effort_")})
    for what, unit in (("accuracy", "share right"), ("tokens", "tokens of thought")):
        keys = tuple(key for key in swept if key.endswith(f"/{what}"))
        curves.append((f"Held-out {what} by effort", keys, unit))
    curves = [curve for curve in curves if any(row.get(key) is not None for row in rows for key in curve[1])]
    if not curves:
        return ""
    sweeps = [row for row in rows if any(key in row for key in swept)]
    height = (len(curves) + 2 * bool(sweeps) + 2) // 3
    figure = Figure(figsize=(12, 3 * height), layout="constrained")
    for index, (title, keys, unit) in enumerate(curves):
        axes = figure.add_subplot(height, 3, index + 1)
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                axes.plot(*zip(*points), marker="o" if key.startswith("eval/") else None, markersize=4, label=key)
        if title == "Held-out accuracy":
            band = [
                (row["step"], row["eval/low"], row["eval/high"])
                for row in rows
                if row.get("eval/high") is not None and row.get("eval/low") is not None
            ]
            if band:
                steps, low, high = zip(*band)
                axes.fill_between(steps, low, high, alpha=0.2)
            axes.set_ylim(0, 1)
        axes.set(title=title, xlabel="step", ylabel=unit)
        axes.grid(alpha=0.3)
        if len(keys) > 1:
            axes.legend(fontsize=7)
    for place, what in enumerate(("accuracy", "tokens"), start=len(curves) + 1) if sweeps else ():
        axes = figure.add_subplot(height, 3, place)
        for row in (sweeps[0], sweeps[-1]):
            numbers = by_effort({key.removeprefix("eval/"): row[key] for key in swept})
            points = [(float(e), pair[what == "tokens"]) for e, pair in numbers.items() if None not in pair]
            axes.plot(*zip(*points), marker="o", label=f"step {row['step']}")
        axes.set(title=f"Held-out {what} against effort", xlabel="effort", ylabel=what)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ name }} - rlattn</title>
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100%; background: #fff; border-radius: 6px }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #8881; padding: .6rem .8rem; border-radius: 6px }
table { border-collapse: collapse } td, th { padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top }
.right { color: #18794e } .wrong { color: #cd2b31 }
@media (prefers-color-scheme: dark) { .right { color: #4cc38a } .wrong { color: #ff8b8d } }
</style></head><body>
<h1>{{ name }}</h1>
{% macro percent(e) %}{{ "%.1f" % (100 * e.accuracy) }} %
<small>(95 % interval {{ "%.1f" % (100 * e.low) }} to {{ "%.1f" % (100 * e.high) }},
n = {{ "%.0f" % e.rows }})</small>{% endmacro %}
{% if summary %}<table>
<tr><th>Steps</th><td>{{ summary.max_steps }} in {{ summary.seconds }} s</td></tr>
{% if summary.before %}<tr><th>Held-out accuracy before</th><td>{{ percent(summary.before) }}</td></tr>{% endif %}
{% if summary.after %}<tr><th>Held-out accuracy after</th><td>{{ percent(summary.after) }}</td></tr>{% endif %}
{% for effort, now in efforts.items() %}<tr><th>At effort {{ effort }}</th>
<td>{{ "%.1f" % (100 * now[0]) }} % right, {{ "%.0f" % now[1] }} tokens of thought
{% if effort in efforts_before %}<small>(before {{ "%.1f" % (100 * efforts_before[effort][0]) }} %,
{{ "%.0f" % efforts_before[effort][1] }})</small>{% endif %}</td></tr>{% endfor %}
{% if summary.supervised_control %}<tr><th>Supervised training on, same compute, instead of RL</th>
<td>{{ percent(summary.supervised_control) }}</td></tr>{% endif %}
</table>{% else %}<p>This run has not finished.</p>{% endif %}
<h2>Curves</h2>
{% if curves %}<img alt="Curves over training steps" src="{{ curves }}">{% else %}<p>Nothing logged yet.</p>{% endif %}
<h2>Held-out completions</h2>
{% for sample in samples %}<details {% if loop.index <= 3 %}open{% endif %}>
<summary>Step {{ sample.step }}: <b class="{{ 'right' if (sample.score or 0) >= 1 else 'wrong' }}">
{{ 'right' if (sample.score or 0) >= 1 else 'wrong' }}</b></summary>
<pre>{{ sample.prompt }}</pre><pre>{{ sample.completion }}</pre><p>Gold: <code>{{ sample.gold }}</code></p></details>
{% else %}<p>None kept.</p>{% endfor %}
<h2>Recipe</h2><pre>{{ recipe }}</pre>
<h2>Environment</h2><pre>{{ environment }}</pre>
</body></html>
"""
