"""Glue: the models answer one after the other; what they did is written and shown."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlattn.evaluation.answers import Answer, answer_items, load
from rlattn.evaluation.figures import comparison, figures
from rlattn.evaluation.plan import Plan
from rlattn.evaluation.probes import Run
from rlattn.evaluation.show import show, write_report
from rlattn.evaluation.subjects import SAMPLES, Subject


def run(
    subjects: Sequence[Subject], options: Sequence[str], plan: Plan, folder: Path, *, probe: Run | None, title: str
) -> None:
    """Evaluates one or two models, or probes them, into `folder`.

    Args:
        options: what the user gave each subject as, for messages.
    """
    try:
        report = _evaluate(subjects, options, plan, folder, probe, title)
    except KeyboardInterrupt:
        print(f"\nrlattn: interrupted; the answers so far: {folder / SAMPLES}", file=sys.stderr, flush=True)
        sys.exit(130)
    write_report(folder, report)
    show(report, folder)


def _evaluate(
    subjects: Sequence[Subject], options: Sequence[str], plan: Plan, folder: Path, probe: Run | None, title: str
) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    answers: list[list[Answer]] = []
    for subject, option in zip(subjects, options, strict=False):
        loaded = load(subject, plan, option)
        folder.mkdir(parents=True, exist_ok=True)
        # line by line: an evaluation that is interrupted has not written for nothing
        with (folder / SAMPLES).open("a", encoding="utf-8") as lines:
            keep = _keeper(lines, subject.name)
            if probe is not None:
                told = probe(loaded, keep)
            else:
                answers.append(answer_items(loaded, keep))
                told = figures(answers[-1], plan.ks)
        found.append({"name": subject.name, "path": subject.path, "figures": told})
        del loaded  # the next one needs its room
    report: dict[str, Any] = {
        "title": title or f"{type(plan.task).__name__}, {len({item.index for item in plan.items})} problems",
        "models": found,
        "task": plan.recipe.task.model_dump(mode="json"),
        "settings": plan.settings,
        "notes": [f"note: {subject.note}" for subject in subjects if subject.note],
    }
    if len(answers) == 2:
        report["comparison"] = comparison(*answers)
    return report


def _keeper(lines: Any, name: str) -> Callable[[dict[str, Any]], None]:
    def keep(row: dict[str, Any]) -> None:
        lines.write(json.dumps({"model": name, **row}, default=str) + "\n")
        lines.flush()

    return keep
