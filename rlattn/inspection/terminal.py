"""What `rlattn inspect` says on the terminal: heads, statistics, where the files are and what to do next."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from rlattn.report.tables import printable

HEADS = 3  # of either end
FEW_TEXTS = 10
WRITTEN = 300  # characters
STATISTICS = {
    "entropy_at_waad_peaks": "entropy at WAAD peaks",
    "receiver_at_global_peaks": "receiver peaks at global peaks",
    "fai_at_or_after_waad_peaks": "FAI peaks at or after WAAD's",
}


def show(report: dict[str, Any], files: Sequence[Path], model: str) -> None:
    console = Console(highlight=False)
    texts = report["texts"]
    tokens = sum(len(text["tokens"]) for text in texts)
    plural = "s" * (len(texts) > 1)
    layers = ", ".join(map(str, report["layers"]))
    console.print(f"{len(texts)} text{plural}, {tokens} response tokens; layers {layers}", markup=False)
    if texts[0]["written_by_the_model"]:
        written = " ".join(texts[0]["response"].split())
        console.print(f"the model writes: {printable(written[:WRITTEN])}{'…' * (len(written) > WRITTEN)}", markup=False)
    console.print(_heads_table(report["heads"]))
    console.print(_statistics_table(report["statistics"]))
    for line in notes(report):
        console.print(line, markup=False)
    console.print()
    what = ("every number shown or drawn", "maps, WAAD, FAI, entropy and what the rules pick", "every head")
    for file, content in zip(files, what, strict=True):
        console.print(printable(f"{file}: {content}"), markup=False, soft_wrap=True)
    console.print(f"\nNext: {printable(_next(texts, model))}", markup=False, soft_wrap=True)


def notes(report: dict[str, Any]) -> list[str]:
    """What a reader of these numbers must know."""
    found = []
    texts = report["texts"]
    low, high = report["horizon"]
    short = sum(all(value is None for value in text["fai"]) for text in texts)
    if short:
        which = "the response has" if len(texts) == 1 else f"{short} of {len(texts)} responses have"
        found.append(f"note: {which} no more than {low} tokens, so FAI is undefined there (horizon {low} to {high}).")
    shared = report["receivers_in_global_set"]
    if shared:
        found.append(
            f"note: {100 * shared:.0f} % of the receiver heads are global heads too, whose peaks are the same."
        )
    if len(texts) < FEW_TEXTS:
        found.append(f"note: {len(texts)} text{'s say' if len(texts) > 1 else ' says'} little about a model.")
    return found


def _heads_table(heads: Sequence[dict[str, Any]]) -> Table:
    """The heads that look back least and most."""
    by_span = sorted(heads, key=lambda head: head["span"])
    ends = by_span if len(by_span) <= 2 * HEADS else [*by_span[:HEADS], None, *by_span[-HEADS:]]
    table = _table(f"Heads by span, {len(heads)} in all; how often a set holds them")
    for name in ("layer.head", "span", "local", "global", "receiver", "kurtosis"):
        table.add_column(name, justify="right")
    for head in ends:
        if head is None:
            table.add_row(*"…" * 6)
            continue
        shares = [f"{100 * head[name]:.0f} %" for name in ("local", "global", "receiver")]
        kurtosis = "-" if head["kurtosis"] is None else f"{head['kurtosis']:.1f}"
        table.add_row(f"{head['layer']}.{head['head']}", f"{head['span']:.1f}", *shares, kurtosis)
    return table


def _statistics_table(statistics: dict[str, dict[str, Any]]) -> Table:
    table = _table("Rhythm (arXiv 2510.13554, table 2)")
    for name in ("", "here", "shuffled", "paper (chance)", "peaks"):
        table.add_column(name, justify="left" if not name else "right")
    table.caption = "shuffled: as many peaks at random tokens, mean ± spread; a mere trend along a text beats it"
    for name, values in statistics.items():
        change = name == "entropy_at_waad_peaks"  # told as a gain over the mean, the others as shares
        here, chance, paper, paper_chance = (
            _percent(values[key], change) for key in ("value", "chance", "paper", "paper_chance")
        )
        spread = f" ± {100 * values['chance_std']:.0f}" if values["peaks"] else ""
        table.add_row(STATISTICS[name], here, chance + spread, f"{paper} ({paper_chance})", str(values["peaks"]))
    return table


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", caption_justify="left", box=box.SIMPLE, pad_edge=False
    )


def _percent(value: float | None, change: bool) -> str:
    if value is None:
        return "-"
    return f"{100 * (value - 1):+.0f} %" if change else f"{100 * value:.0f} %"


def _next(texts: Sequence[dict[str, Any]], model: str) -> str:
    if len(texts) < FEW_TEXTS:
        return f"many texts: rlattn inspect --model {shlex.quote(model)} --data FILE (jsonl: prompt, response)"
    return "train with this credit: rlattn train RECIPE 'credit={kind: coupled_rhythm}'"
