"""What an evaluation says: a table on the terminal, what to do next, eval.json. Names and texts are never markup."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlattn.evaluation.subjects import EVALUATION, SAMPLES
from rlattn.formats.strict_json import to_json
from rlattn.report.tables import printable
from rlattn.run_folder.folder import installed_version, write_text

MUCH_CUT = 0.05
CLEAR = 0.05  # p below which a difference is called one
FAILED = {"verify_failed": "verify() failed, left out", "metrics_failed": "metrics() failed, left out"}
PACKAGES = ("rlattn", "torch", "transformers")


def write_report(folder: Path, report: dict[str, Any]) -> Path:
    """Writes eval.json, whole or not at all."""
    file = folder / EVALUATION
    versions = {package: installed_version(package) for package in PACKAGES}
    write_text(file, to_json({**report, "versions": versions}, indent=1, default=str) + "\n")
    return file


def show(report: dict[str, Any], folder: Path) -> None:
    """The table, what the comparison says, and what to do next."""
    console = Console(highlight=False)
    console.print(_table(report))
    for line in [*_comparison_lines(report), *report["notes"]]:
        console.print(Text(line), soft_wrap=True)
    console.print(Text(f"\n{folder / EVALUATION}: every figure; {SAMPLES}: every answer"), soft_wrap=True)
    console.print(Text(f"Next: {next_step(report, folder)}"), soft_wrap=True)


def next_step(report: dict[str, Any], folder: Path) -> str:
    """What a reader of these figures does now."""
    cut = max(found["figures"].get("cut_share", 0.0) for found in report["models"])
    if cut > MUCH_CUT:
        limit = report["settings"]["max_new_tokens"]
        return f"{100 * cut:.0f} % of the answers were cut: again with trainer.max_completion_length={2 * limit}"
    found = report.get("comparison")
    if found and "mcnemar_p" in found and found["mcnemar_p"] >= CLEAR:
        return "no clear difference on these items: give more of them, or several seeds"
    if found:
        return f"read where they differ: {folder / SAMPLES}"
    if len(report["models"]) > 1:
        return f"read the answers: {folder / SAMPLES}"
    return "the same command with --against OTHER holds it against another model, on the same items"


def rows_of_table(figures: dict[str, Any]) -> dict[str, str]:
    """Label -> text of every figure, in order."""
    rows: dict[str, str] = {}
    for name, value in figures.items():
        if name == "metrics":
            rows |= {metric: _text(found) for metric, found in value.items()}
        elif name == "efforts":
            for at in value:
                words = f"{_text(at['pass@1'])}, {at['thought_tokens']['value']:.0f} tokens of thought"
                rows[f"effort {at['effort']:.2f}"] = words
        elif name == "cut_share":
            rows["cut at the limit"] = f"{100 * value:.1f} %"
        elif isinstance(value, list):
            continue  # rows by name, in eval.json
        elif isinstance(value, dict):
            rows[name.replace("_", " ")] = _text(value)
        elif name in FAILED:
            rows[FAILED[name]] = str(value)
        else:
            rows[name] = "–" if value is None else str(value)
    return rows


def _table(report: dict[str, Any]) -> Table:
    table = Table(title=Text(report["title"]), title_justify="left", box=box.SIMPLE, pad_edge=False)
    columns = [rows_of_table(found["figures"]) for found in report["models"]]
    table.add_column("")
    for found in report["models"]:
        table.add_column(Text(found["name"]), overflow="fold")
    for label in dict.fromkeys(label for column in columns for label in column):
        table.add_row(Text(printable(label)), *(Text(printable(column.get(label, "–"))) for column in columns))
    return table


def _comparison_lines(report: dict[str, Any]) -> list[str]:
    found = report.get("comparison")
    if not found:
        return []
    first, second = (one["name"] for one in report["models"])
    gap = found["difference"]
    points = f"{100 * gap['value']:+.1f} points (95 % interval {100 * gap['low']:+.1f} to {100 * gap['high']:+.1f})"
    lines = [f"{first} against {second} on the same {found['problems']} problems: {points}"]
    if "mcnemar_p" in found:
        lines.append(
            f"right where the other is wrong: {found['only_first_right']} and {found['only_second_right']}; McNemar's "
            f"exact test p = {found['mcnemar_p']:.3g}"
        )
    return lines


def _text(found: dict[str, Any]) -> str:
    value, low, high = (found[name] for name in ("value", "low", "high"))
    share = found["kind"] == "share"
    if value is None:
        return "–"
    if low is None:
        return f"{100 * value:.1f} %" if share else f"{value:.4g}"
    if share:
        return f"{100 * value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
    return f"{value:.4g} ({low:.4g} to {high:.4g})"
