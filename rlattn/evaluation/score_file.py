"""`rlattn score`: a recipe's rewards on stored completions, without a policy. How one debugs a reward."""

import atexit
import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from rlattn.errors import UserError
from rlattn.preflight.preflight import preflight
from rlattn.progress import visible
from rlattn.recipe.schema import Recipe
from rlattn.rewards.protocol import score_safely
from rlattn.rewards.timeout import ScoreWorker
from rlattn.tasks.rows import check_row
from rlattn.types import Reward, Rollout

SAMPLE = {"step", "prompt", "completion", "gold", "score", "row"}  # a line of a run's samples.jsonl
FAILURE = {"step", "prompt", "completion", "row", "reward", "failed", "problem"}  # a line of its failures.jsonl


def score_file(recipe: Recipe, completions: Path) -> list[dict[str, Any]]:
    """One dict a line of `completions`: its number, every reward (None: neutral) and what failed.

    A line is a JSON object with `completion` and the columns that the task's rows have (`answer`, `numbers`, …), in an
    object `row`, as in a run's samples.jsonl and failures.jsonl, or beside the completion; `prompt` is text or chat
    messages, and may be left out.

    Raises:
        UserError: the file or a line of it cannot be read.
    """
    found = preflight(recipe, 1, "parts")
    task, rewards = found.task, found.rewards
    scorers = {name: _scorer(reward, recipe.rewards.named[name].timeout) for name, reward in rewards.items()}
    scored = []
    for number, line in _lines(completions):
        prompt = line.get("prompt", "")
        if not isinstance(prompt, str):
            check_row(line, f"line {number}")
        row = line["row"] if isinstance(line.get("row"), dict) and line.keys() <= SAMPLE | FAILURE else line
        if row is line and line.keys() >= SAMPLE - {"row"}:
            fix = "Samples of a new run hold them; elsewhere add the task's columns to each line."
            raise UserError(f"{completions}, line {number}", "a sample without the task's row.", fix)
        rollout = Rollout(
            prompt=prompt,
            prompt_text=prompt if isinstance(prompt, str) else "\n".join(str(m.get("content", "")) for m in prompt),
            completion=line["completion"],
            row=row,
            task=task,
        )
        results = {name: score_one(rollout) for name, score_one in scorers.items()}
        for name, spec in recipe.rewards.named.items():
            if spec.requires:
                met = results[spec.requires][0]
                results[name] = (None if met is None else results[name][0] if met >= 1 else 0.0, results[name][1])
        scored.append(
            {
                "line": number,
                **{name: value for name, (value, _) in results.items()},
                "failed": {name: _with_columns(problem, row) for name, (_, problem) in results.items() if problem},
            }
        )
    return scored


def _with_columns(problem: str, row: dict[str, Any]) -> str:
    """What went wrong, and what columns there are where one was missed."""
    missed = re.match("KeyError: '([^']*)'", problem)
    if not missed or missed[1] in row:
        return problem
    columns = ", ".join(name for name in row if name not in ("prompt", "completion")) or "none"
    return f"{problem}: the line has no column '{missed[1]}' (it has {columns})"


def _scorer(reward: Reward, timeout: float | None) -> Callable[[Rollout], tuple[float | None, str]]:
    """One rollout -> its score and what went wrong; a reward that needs a run is neutral and says so."""
    if needs := set(getattr(reward, "needs", ())) & {"group", "policy", "environment", "images"}:
        return lambda rollout: (None, f"needs a run ({', '.join(sorted(needs))}): not scored here")
    if timeout is None:
        return lambda rollout: score_safely(reward, rollout)
    worker = ScoreWorker(reward, timeout)
    atexit.register(worker.stop)
    return lambda rollout: worker.score([rollout])[0]


SHOWN = 10  # lines of a file whose scores are printed


def summary_lines(scored: list[dict[str, Any]]) -> list[str]:
    """The first lines' scores, then mean, spread, neutral and failed counts of every reward."""
    names = [key for key in scored[0] if key not in ("line", "failed")]
    width = max(10, *(len(name) + 2 for name in names))
    lines = ["line".ljust(8) + "".join(name.rjust(width) for name in names)]
    for row in scored[:SHOWN]:
        cells = ["neutral" if row[name] is None else f"{row[name]:.3f}" for name in names]
        lines.append(str(row["line"]).ljust(8) + "".join(cell.rjust(width) for cell in cells))
    if len(scored) > SHOWN:
        lines.append(f"… {len(scored) - SHOWN} more")
    values = {name: [row[name] for row in scored if row[name] is not None] for name in names}
    statistics = {
        "mean": [f"{fmean(values[n]):.3f}" if values[n] else "-" for n in names],
        "std": [f"{pstdev(values[n]):.3f}" if values[n] else "-" for n in names],
        "neutral": [str(len(scored) - len(values[n])) for n in names],
        "failed": [str(sum(n in row["failed"] for row in scored)) for n in names],
    }
    lines += [label.ljust(8) + "".join(cell.rjust(width) for cell in cells) for label, cells in statistics.items()]
    first_failures = {name: problem for row in reversed(scored) for name, problem in row["failed"].items()}
    return lines + [f"'{name}' fails first with: {visible(problem)}" for name, problem in first_failures.items()]


def _lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    if not path.is_file():
        raise UserError("--completions", f"no file '{path}'.", "Expected jsonl, one object with `completion` a line.")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}", f"not JSON: {error}.") from None
        if not isinstance(row, dict) or not isinstance(row.get("completion"), str):
            raise UserError(f"{path}, line {number}", "expected an object with a text `completion`.")
        rows.append((number, row))
    if not rows:
        raise UserError(str(path), "is empty.", "Expected one JSON object with `completion` a line.")
    return rows
