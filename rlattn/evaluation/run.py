"""Runs an evaluation: the models answer one after the other; the results are written and shown."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlattn.errors import UserError
from rlattn.evaluation.answers import Answer, answer_items, check, load
from rlattn.evaluation.figures import comparison, figures
from rlattn.evaluation.plan import Plan
from rlattn.evaluation.probes import Prepared
from rlattn.evaluation.show import show, write_report
from rlattn.evaluation.subjects import REFUSED, SAMPLES, Subject
from rlattn.formats.strict_json import to_json
from rlattn.tasks.guarded_metrics import shares_of


def run(
    subjects: Sequence[Subject], options: Sequence[str], plan: Plan, folder: Path, *, probe: Prepared | None, title: str
) -> None:
    """Evaluates one or two models, or probes them, into `folder`.

    Args:
        options: what the user gave each subject as, for messages.

    Raises:
        UserError: a model cannot be asked, told before any answers; its weights, the task or the judge fail later on.
    """
    is_new = not folder.exists()
    try:
        report = _evaluate(subjects, options, plan, folder, probe, title)
    except KeyboardInterrupt:
        kept = f"; the answers so far: {folder / SAMPLES}" if (folder / SAMPLES).exists() else ""
        print(f"\nrlattn: interrupted{kept}", file=sys.stderr, flush=True)
        sys.exit(130)
    except UserError as error:
        raise _with_answers(error, folder) from None
    finally:
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    write_report(folder, report)
    show(report, folder)


def _evaluate(
    subjects: Sequence[Subject], options: Sequence[str], plan: Plan, folder: Path, probe: Prepared | None, title: str
) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    answers: list[list[Answer]] = []
    models = [check(subject, plan, option) for subject, option in zip(subjects, options, strict=False)]
    if probe is not None:
        for checked in models:
            probe.check(checked)
    folder.mkdir(parents=True, exist_ok=True)
    for subject, checked in zip(subjects, models, strict=True):
        loaded = load(checked)
        keep = _keeper(folder / SAMPLES, subject.name)
        if probe is not None:
            told = probe.run(loaded, keep)
        else:
            answers.append(answer_items(loaded, keep))
            told = figures(answers[-1], plan.ks, shares_of(plan.task))
        found.append({"name": subject.name, "path": subject.path, "figures": told})
        del loaded  # the next one needs its room
    report: dict[str, Any] = {
        "title": title or f"{type(plan.task).__name__}, {len({item.index for item in plan.items})} problems",
        "models": found,
        "task": plan.recipe.task.model_dump(mode="json"),
        "settings": plan.settings,
        "notes": [
            *(f"note: {subject.note}" for subject in subjects if subject.note),
            *(f"note: {one.name} is read at the recipe's revision {one.revision}" for one in models if one.revision),
        ],
    }
    if len(answers) == 2:
        report["comparison"] = comparison(*answers)
    return report


def _with_answers(error: UserError, folder: Path) -> UserError:
    """A refusal in the middle: the corrected command may write into the same folder, and no answer is lost."""
    if not (folder / SAMPLES).exists():
        return error
    os.replace(folder / SAMPLES, folder / REFUSED)
    return UserError(error.where, error.problem, f"{error.fix} The answers so far: {folder / REFUSED}".lstrip())


def _keeper(file: Path, name: str) -> Callable[[dict[str, Any]], None]:
    # line by line: an evaluation that is interrupted has not written for nothing, and a refused one leaves no file
    def keep(row: dict[str, Any]) -> None:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(to_json({"model": name, **row}, default=str) + "\n")

    return keep
