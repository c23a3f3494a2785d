"""`rlattn eval`: the command. Everything that needs no weights is checked before torch is imported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from rlattn.errors import UserError

SAMPLES = "eval-samples.jsonl"


def evaluate(
    model: Annotated[
        str, typer.Argument(help="A run, a checkpoint, a model or adapter folder, or a hub id.", metavar="MODEL")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Overrides of the recipe: trainer.max_completion_length=200.", metavar="[KEY=VALUE]..."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="The recipe whose held-out rows are asked; else the run's own.", metavar="RECIPE")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Instead: a file, folder or hub id with `prompt` and `answer` in every row.", metavar="FILE"),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, max=100_000, help="Answers a problem.")] = 1,
    k: Annotated[str | None, typer.Option(help="For pass@k: 1,4,8; up to --samples.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=100, help="Greedy for one answer, the recipe's for several, unless set.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="A second model, on the same problems: a paired comparison.", metavar="OTHER")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask the first so many rows only.")] = None,
    out: Annotated[Path | None, typer.Option(help="A new folder for what is written; else beside the model.")] = None,
) -> None:
    """Evaluate a model on a task or your data: pass@k with intervals, against another model."""
    from rlattn.evaluation.plan import check_same_task, check_tiny, make_plan
    from rlattn.evaluation.subjects import find_subject, out_folder

    subjects = [find_subject(model, "MODEL")]
    if against is not None:
        subjects.append(find_subject(against, "--against"))
        if subjects[0].path == subjects[1].path:
            raise UserError("--against", f"{against} is the same model.", "Name another.")
        if task is None and data is None:
            check_same_task(*subjects)
    plan = make_plan(
        subjects[0],
        task=task,
        data=data,
        overrides=overrides or [],
        samples=samples,
        k=k,
        temperature=temperature,
        limit=limit,
    )
    options = ("MODEL", "--against")
    for subject, option in zip(subjects, options, strict=False):
        check_tiny(subject, plan, option)
    folder = out_folder(out, subjects[0])
    from rlattn.quiet import quiet

    quiet()
    from rlattn.evaluation.answers import Answer, answer_items, load
    from rlattn.evaluation.figures import comparison, figures
    from rlattn.evaluation.show import show, write_report

    answers: list[list[Answer]] = []
    for subject, option in zip(subjects, options, strict=False):
        loaded = load(subject, plan, option)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / SAMPLES).open("a", encoding="utf-8") as lines:
            answers.append(answer_items(loaded, _writer(lines, subject.name, plan)))
        del loaded  # the second needs its room
    report: dict[str, Any] = {
        "title": f"{type(plan.task).__name__}, {len({item.index for item in plan.items})} problems",
        "models": [
            {"name": subject.name, "path": subject.path, "figures": figures(of_model, plan.ks)}
            for subject, of_model in zip(subjects, answers, strict=True)
        ],
        "task": plan.recipe.task.model_dump(mode="json"),
        "settings": plan.settings,
        "notes": [f"note: {subject.note}" for subject in subjects if subject.note],
    }
    if against is not None:
        report["comparison"] = comparison(*answers)
    write_report(folder, report)
    show(report, folder)


def _writer(lines: Any, name: str, plan: Any) -> Callable[[Any], None]:
    """One line an answer, at once: an evaluation that is interrupted has not written for nothing."""

    def write(answer: Any) -> None:
        item = answer.item
        row = {
            "model": name,
            "row": item.index + 1,
            "sample": answer.sample,
            "effort": item.effort,
            "prompt": item.prompt,
            "completion": answer.text,
            "gold": plan.task.gold(item.row),
            "right": answer.right,
            "tokens": answer.tokens,
            "thought_tokens": answer.thought,
            "cut": answer.cut,
            "metrics": answer.measured,
        }
        lines.write(json.dumps(row, default=str) + "\n")
        lines.flush()

    return write
