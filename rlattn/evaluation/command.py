"""`rlattn eval`: the command. Everything that needs no weights is checked before torch is imported."""

from pathlib import Path
from typing import Annotated

import typer

from rlattn.errors import UserError, file_faults


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
    probe: Annotated[
        str | None,
        typer.Option(
            help="Instead of accuracy: does the answer follow a hint, a second look, a changed token? Does it deceive?",
            metavar="sycophancy|self-correction|perturbation|deception",
        ),
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="For deception: a model's folder, a hub id, or http://localhost:8000/v1.")
    ] = None,
    judge_model: Annotated[str, typer.Option(help="The endpoint's name of the model.")] = "",
    judge_key_env: Annotated[
        str | None, typer.Option(help="The environment variable that holds the endpoint's key.", metavar="NAME")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask the first so many rows only.")] = None,
    out: Annotated[Path | None, typer.Option(help="A new folder for what is written; else beside the model.")] = None,
) -> None:
    """Evaluate a model on a task or your data: pass@k with intervals, against another model, or under a probe."""
    from rlattn.evaluation.judges import Judge, endpoint_judge, is_endpoint, local_judge
    from rlattn.evaluation.plan import check_same_task, check_tiny, make_plan
    from rlattn.evaluation.probes import OWN_DATA, PROBES, Asked, check_probe
    from rlattn.evaluation.subjects import check_length, find_subject, out_folder

    for option, path in (("--data", data), ("--out", out)):
        if path is not None:
            check_length(path, option)
    check_probe(
        probe,
        data=data,
        judge=judge,
        judge_model=judge_model,
        judge_key_env=judge_key_env,
        samples=samples,
        k=k,
        temperature=temperature,
    )
    with file_faults(data or model):
        subjects = [find_subject(model, "MODEL")]
        if against is not None:
            subjects.append(find_subject(against, "--against"))
            if subjects[0].same_as(subjects[1]):
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
            probe_reads=probe in OWN_DATA,
        )
    options = ("MODEL", "--against")
    for subject, option in zip(subjects, options, strict=False):
        check_tiny(subject, plan, option)

    def make_judge() -> Judge:
        name = judge or ""
        if is_endpoint(name):
            return endpoint_judge(name, judge_model, judge_key_env)
        return local_judge(find_subject(name, "--judge"), plan)

    asked = Asked(plan=plan, data=data, limit=limit, make_judge=make_judge)
    run_probe = PROBES[probe](asked) if probe is not None else None
    folder = out_folder(out, subjects[0])
    from rlattn.processes.imports import heavy_imports

    with heavy_imports():
        from rlattn.evaluation.run import run

    run(subjects, options, plan, folder, probe=run_probe, title=f"probe: {probe}" if probe else "")
