"""A run's jsonl files as a report reads them: what cannot be read is named, never raised."""

from pathlib import Path
from sys import intern
from typing import Any

from rlattn.run_folder.jsonl import read_rows

NAMED = 5  # damaged lines, keys; the others are counted
LONGEST_NAME = 200


def read_log(file: Path, missing: list[str]) -> list[dict[str, Any]]:
    """The rows of a file by step, as far as it can be read."""
    damaged: list[int] = []
    try:
        rows = sorted(read_rows(file, damaged), key=lambda row: row["step"])
    except OSError as error:
        missing.append(f"{file.name} cannot be read ({error.strerror}).")
        return []
    if damaged:
        missing.append(f"{file.name}: lines that cannot be read are left out ({named(damaged)}).")
    return rows


def read_metrics(run: Path, missing: list[str]) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl by step, their finite numbers only."""
    rows = read_log(run / "metrics.jsonl", missing)
    odd = {k[:LONGEST_NAME] for row in rows for k, v in row.items() if v is not None and number(v) is None}
    if odd:
        missing.append(f"metrics.jsonl: what is no finite number is left out ({named(sorted(odd))}).")
    long = {key for row in rows for key in row if len(key) > LONGEST_NAME}
    if long:
        missing.append(f"metrics.jsonl: names of more than {LONGEST_NAME} characters are left out ({len(long)}).")
    return [
        {intern(key): value for key, value in row.items() if number(value) is not None and key not in long}
        for row in rows
    ]


def number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 else None


def named(found: list[Any]) -> str:
    """The first of a list, and how many more."""
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return ", ".join(map(str, found[:NAMED])) + more
