"""What `rlattn bench credit` found about a run's checkpoints, as a table of its report."""

import json
from pathlib import Path
from typing import Any

from rlattn.report.logs import number
from rlattn.report.thin import evenly, shortened

COLUMNS = 8  # of the policies that were measured
NAME, TEXT = 200, 4000  # bytes of a rule's name, and of the verdict
FIDELITY = "fidelity"  # the folder, with one file a policy


def fidelity_file(run: Path, step: int) -> Path:
    return run / FIDELITY / f"step-{step:06d}.json"


def read_fidelity(run: Path, missing: list[str]) -> list[dict[str, Any]]:
    """[{title, about, columns, rows}]: every rule's difference to equal credit, policy by policy; empty where none was
    measured. A file that cannot be read is named in `missing`.
    """
    found: list[tuple[int, dict[str, str], str]] = []
    for file in sorted((run / FIDELITY).glob("step-*.json")):
        try:
            measured = json.loads(file.read_text(encoding="utf-8"))
            equal = number(measured["uniform"])
            cells = {"uniform": "-" if equal is None else f"{equal:.3f}"}
            cells |= {shortened(name, NAME): _difference(one) for name, one in measured["rules"].items()}
            found.append((int(file.stem.removeprefix("step-")), cells, shortened(" ".join(measured["verdict"]), TEXT)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            missing.append(f"{FIDELITY}/{file.name} cannot be read.")
    if not found:
        return []
    shown = evenly(sorted(found, key=lambda one: one[0]), COLUMNS)
    names = dict.fromkeys(name for _, cells, _ in shown for name in cells)
    about = (
        "Each rule's fidelity less that of equal credit (uniform, whose own is shown), with 95 % intervals: above 0, a "
        "batch's gradient lies nearer to the direction of many rollouts. Of the newest: "
    )
    return [
        {
            "title": "Is a credit rule right here?",
            "about": about + shown[-1][2],
            "columns": ["rule", *(f"step {step}" for step, _, _ in shown)],
            "rows": [[name, *(cells.get(name, "-") for _, cells, _ in shown)] for name in names],
        }
    ]


def _difference(one: dict[str, float]) -> str:
    return f"{one['difference']:+.3f} ± {(one['high'] - one['low']) / 2:.3f}"
