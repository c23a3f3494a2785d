"""JSON lines: one object a line, appended whole, and read even where a line is damaged."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlattn.formats.strict_json import to_json

LAST_STEP = 10**12


def read_rows(path: Path, damaged: list[int] | None = None) -> Iterator[dict[str, Any]]:
    """The objects of a jsonl file. Other lines, such as a torn last one that a kill leaves, are left out; their
    numbers, from 1, go to `damaged`.
    """
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            step = row.get("step") if isinstance(row, dict) else None
            if type(step) is int and 0 <= step < LAST_STEP:
                yield row
            elif damaged is not None and line.strip():
                damaged.append(number)


def named_as_in_file(logs: dict[str, Any]) -> dict[str, Any]:
    """A step's numbers under the names of metrics.jsonl: `eval/…` where transformers wants `eval_…`."""
    return {f"eval/{k.removeprefix('eval_')}" if k.startswith("eval_") else k: v for k, v in logs.items()}


def append_row(path: Path, row: dict[str, Any]) -> None:
    """One object, one line."""
    with path.open("a", encoding="utf-8") as lines:
        lines.write(to_json(row) + "\n")
