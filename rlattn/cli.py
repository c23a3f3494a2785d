"""The command line. Nothing heavy is imported before a command needs it."""

import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from rlattn.errors import UserError, file_faults, names_too_long
from rlattn.evaluation.command import evaluate
from rlattn.processes.imports import heavy_imports, quiet

RANK_PATIENCE = 4.0  # seconds; below the watchdog's

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="RL fine-tuning with attention-aware credit. Start with: rlattn train recipes/quickstart.yaml",
)
bench = typer.Typer(no_args_is_help=True, help="Measure speed, as ratios, both sides in one run.")
app.add_typer(bench, name="bench")
app.command("eval")(evaluate)
RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.", metavar="RECIPE")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Overrides: key.path=value, such as trainer.max_steps=20.", metavar="[KEY=VALUE]..."),
]


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. A UserError ends it with one message and exit code 2, without a traceback."""
    try:
        with names_too_long():
            app(arguments)
    except UserError as error:
        text = os.environ.get("RANK", "0")
        rank = int(text) if text.isdecimal() else 0
        if rank:
            # Every rank finds the same mistake, and rank 0 says it: torchrun ends the others in this time. A rank that
            # is still here failed alone.
            time.sleep(RANK_PATIENCE)
        print(f"rlattn{f' (rank {rank})' if rank else ''}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None,
        typer.Option(
            min=1, max=1024, help="Train on so many processes of this machine, one a GPU.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the rendered prompt, do one step, project the time.")
    ] = False,
) -> None:
    """Train from a recipe; the same command again continues the run."""
    from rlattn.preflight.preflight import preflight
    from rlattn.processes.launch import launch, ranks_to_start, strategy_of_accelerate
    from rlattn.processes.stdio import outlive_terminal
    from rlattn.rank import check_launcher, world_size
    from rlattn.recipe.load import load_recipe
    from rlattn.run_folder.folder import open_run

    outlive_terminal()
    check_launcher()
    started = ranks_to_start(ranks)
    parsed = load_recipe(recipe, [*(overrides or []), *strategy_of_accelerate()])
    found = preflight(parsed, started or world_size(), "run")  # before TRL's seconds of imports
    open_run(parsed)
    if started:
        arguments = [recipe, *(overrides or []), *(["--dry-run"] if dry_run else [])]
        grace, on_gpus = parsed.resume.grace_seconds, not parsed.trainer.get("use_cpu")
        sys.exit(launch(arguments, ranks=started, grace_seconds=grace, on_gpus=on_gpus))
    with heavy_imports():
        from rlattn.run import run as training

    (training.dry_run if dry_run else training.train)(parsed, found)


@app.command()
def check(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, max=1_000_000, help="Processes it would run on.")] = 1,
    gpu_memory: Annotated[
        float | None, typer.Option(min=0, max=1e6, help="GB of one GPU: fail where the run would not fit.")
    ] = None,
) -> None:
    """Validate a recipe and estimate its memory, in seconds, without loading a model."""
    from rlattn.preflight.check import check as check_all
    from rlattn.recipe.load import load_recipe

    parsed = load_recipe(recipe, overrides or [])
    print("\n".join(check_all(parsed, ranks=ranks, gpu_memory=gpu_memory)))
    arguments = shlex.join([recipe, *(overrides or []), *(["--ranks", str(ranks)] if ranks > 1 else [])])
    print(f"\nOK. Next: rlattn train {arguments} --dry-run")


@app.command()
def score(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    completions: Annotated[
        Path, typer.Option(help="jsonl: `completion` and the task's columns on every line.", show_default=False)
    ] = Path(),
    out: Annotated[Path | None, typer.Option(help="Write every line's scores here, as jsonl.")] = None,
) -> None:
    """Score stored completions with a recipe's rewards; no policy needed."""
    from rlattn.evaluation.score_file import score_file, summary_lines
    from rlattn.formats.strict_json import to_json
    from rlattn.recipe.load import load_recipe

    if completions == Path():
        raise UserError("--completions", "is required.", "Expected a jsonl file with `completion` on every line.")
    if out and (out.exists() or not out.absolute().parent.is_dir()):
        raise UserError("--out", f"{out} {'exists' if out.exists() else 'lies in no folder'}.", "Name a new file.")
    with file_faults(completions):
        scored = score_file(load_recipe(recipe, overrides or []), completions)
    print("\n".join(summary_lines(scored)))
    if out:
        with file_faults(out):
            out.write_text("".join(to_json(row) + "\n" for row in scored), encoding="utf-8")
        print(f"\nEvery line's scores: {out}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A finished run's folder.", metavar="RUN")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge the LoRA adapter into its base model.")] = False,
    push: Annotated[
        str | None, typer.Option(help="Upload to this hub repository (made private).", metavar="REPO")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where to; RUN/export unless given.")] = None,
) -> None:
    """Export a run's final policy as a folder, or to the hub."""
    from rlattn.preflight.weight_files import base_of
    from rlattn.run_folder import export as exporting

    target = out or run / "export"
    exporting.check_export(run, target, merge=merge)
    quiet()
    folder = exporting.export(run, target, merge=merge, push=push)
    print(f"exported to {folder}" + (f" and https://huggingface.co/{push}" if push else ""))
    base = base_of(folder)
    pin = f", revision='{base[1]}'" if base and base[1] else ""  # which transformers does not take from an adapter
    print(f"Next: AutoModelForCausalLM.from_pretrained('{folder}'{pin})")


@app.command()
def inspect(
    model: Annotated[str, typer.Option(help="A decoder-only model: a local folder or a hub id.")],
    prompt: Annotated[str | None, typer.Option(help="A prompt.")] = None,
    response: Annotated[str | None, typer.Option(help="What followed it; else the model writes it, greedily.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Instead: jsonl with `prompt` and `response` (or `completion`) a line.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for inspect.json, rhythm.png and heads.png.")] = Path("inspect"),
    layers: Annotated[
        str | None, typer.Option(help="Layers to read, from 0: 12,15,18. Else five of the middle third.")
    ] = None,
    window: Annotated[int, typer.Option(help="W of WAAD, in tokens.")] = 10,
    horizon: Annotated[
        tuple[int, int], typer.Option(help="How much later FAI looks, in tokens: --horizon 10 100.", metavar="LOW HIGH")
    ] = (10, 100),
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--plain", help="Put the prompt into the chat template, or not. Default: where there is one."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a response that the model writes.")] = 256,
) -> None:
    """Show the rhythm of a text: what a model's attention says about its tokens.

    Local heads look back least, global ones most; receiver heads spread what they look at least evenly (the highest
    kurtosis, arXiv 2506.19143).
    """
    from rlattn.files import expanded
    from rlattn.inspection.inputs import attention_options, check_model_path, make_folder, texts_of
    from rlattn.preflight.hub import go_offline_if_unreachable

    with file_faults(data or model):
        texts = texts_of(prompt, response, data)
        options = attention_options(layers, window, horizon)
        check_model_path(model)
        make_folder(output)
        if not expanded(model).is_dir():
            go_offline_if_unreachable()
    with heavy_imports():
        from rlattn.inspection.report import make_report, write_outputs
        from rlattn.inspection.rhythm import read_rhythms
        from rlattn.inspection.terminal import show

    reading = read_rhythms(model, texts, chat=chat, options=options, max_new_tokens=max_new_tokens)
    report = make_report(reading, model, options)
    with file_faults(output):
        files = write_outputs(report, output)
    show(report, files, model)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run's folder, finished or not.", metavar="RUN")],
) -> None:
    """Write RUN/report.html: one page with curves, credited tokens and warnings; also while the run trains."""
    from rlattn.report import write_report
    from rlattn.run_folder.folder import holds_run

    try:
        if not run.is_dir() or not (holds_run(run) or not any(run.iterdir())):
            expected = "Expected the folder that `rlattn train` wrote, runs/NAME."
            raise UserError(str(run), "is no run's folder.", expected)
        print(f"Open in a browser: {write_report(run)}")
    except OSError as error:  # what cannot be read is told in the report itself
        problem = f"report.html cannot be written there ({error.strerror})."
        raise UserError(str(run), problem, "Copy the run elsewhere.") from None


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.", metavar="RUN...")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("compare.html"),
) -> None:
    """Overlay runs: curves, a final table with intervals over seeds, and what their recipes differ in."""
    from rlattn.formats.strict_json import to_json
    from rlattn.report import page
    from rlattn.report.compare import compare as compare_runs
    from rlattn.report.compare import is_comparison
    from rlattn.report.tables import printable, show_tables
    from rlattn.run_folder.folder import write_text

    if not out.absolute().parent.is_dir() or out.is_dir():
        raise UserError("--out", f"{out} cannot be written.", "Name a file in a folder that exists.")
    tables = out.with_name(f"{out.stem}-tables.json")
    for file in (out, tables):
        if file.exists() and not is_comparison(file):
            raise UserError("--out", f"{file} is there and no earlier comparison.", "Name a new file.")
    with file_faults(out):
        found = compare_runs(runs)
        write_text(out, page(found))
        kept = {name: found[name] for name in ("kind", "name", "missing", "tables")}
        write_text(tables, to_json(kept, separators=(",", ":"), ensure_ascii=False) + "\n")
    show_tables(found["tables"])
    for line in found["missing"]:
        print(f"\n{printable(line)}")
    print(f"\nOpen in a browser: {out} (its tables: {tables})")


@app.command()
def schema() -> None:
    """Print the recipe's JSON schema, for editors: every key, and the options of tasks, rewards and rules by kind."""
    import json

    from rlattn.recipe.json_schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=1))


@app.command()
def recipes() -> None:
    """The shipped recipes, one line each."""
    from rlattn.files import shipped_dir

    for file in sorted(shipped_dir("recipes").glob("*.yaml")):
        comments = file.read_text(encoding="utf-8").splitlines()[:2]  # the schema for editors, then what it is
        print(f"recipes/{file.name:32} {comments[1].removeprefix('# ')}")
    print("\nNext: rlattn check recipes/NAME.yaml, then rlattn train recipes/NAME.yaml")


@bench.command("step")
def bench_step(
    rounds: Annotated[int, typer.Option(min=1, help="How often each side is measured.")] = 7,
    steps: Annotated[int, typer.Option(min=1, help="Training steps a measurement.")] = 6,
) -> None:
    """One training step, without and with credit, against plain TRL's; on the CPU, in turn."""
    with heavy_imports():
        from rlattn.bench.step import bench_step as measure

    measure(rounds, steps, print)


@bench.command("attention")
def bench_attention(
    tokens: Annotated[int, typer.Option(min=16, max=1_000_000, help="Length of the text.")] = 4096,
    rounds: Annotated[int, typer.Option(min=1, help="How often each side is measured.")] = 3,
    curve: Annotated[bool, typer.Option("--curve", help="Also one layer's metrics at 512 to 16384 tokens.")] = False,
    backend: Annotated[Literal["auto", "torch", "triton"], typer.Option(help="What computes the metrics.")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here.")] = None,
) -> None:
    """WAAD and FAI against a plain forward and against eager attention maps, on CUDA where there is a GPU."""
    if json_file and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):
        raise UserError("--json", f"{json_file} cannot be written.", "Name a file in a folder that exists.")
    import torch

    from rlattn.formats.strict_json import to_json

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if backend == "triton" and device == "cpu":
        raise UserError("--backend", "triton needs a CUDA GPU.", "Use torch.")
    from rlattn.bench.attention import CURVE, Sizes
    from rlattn.bench.attention import bench_attention as measure

    found = measure(Sizes(tokens=tokens, device=device, backend=backend), rounds=rounds, curve=CURVE if curve else ())
    if json_file:
        json_file.write_text(to_json(found, indent=1) + "\n", encoding="utf-8")


@bench.command("credit")
def bench_credit(
    subject: Annotated[str, typer.Argument(help="A recipe, a run's folder, or a checkpoint.", metavar="SUBJECT")],
    overrides: Overrides = None,
    batches: Annotated[int, typer.Option(min=3, max=10_000, help="Generation batches, at most.")] = 32,
    minutes: Annotated[float, typer.Option(min=0.1, help="Fewer batches where more would take longer.")] = 10,
    oracle: Annotated[
        int, typer.Option(min=0, help="Groups (3 or more) of which every token is judged by Monte Carlo: dear.")
    ] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every number here.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the differences here, as a PNG.")] = None,
) -> None:
    """Is a credit rule right for this policy and task? Every rule's gradient against that of many rollouts."""
    for option, file in (("--json", json_file), ("--figure", figure)):
        if file and (file.is_dir() or not os.access(file.absolute().parent, os.W_OK)):
            raise UserError(option, f"{file} cannot be written.", "Name a file in a folder that exists.")
    if 0 < oracle < 3:
        raise UserError("--oracle", f"an interval needs at least 3 groups, got {oracle}.", "Take 48, or leave it out.")
    with heavy_imports():
        from rlattn.bench.credit_command import bench_credit as measure
        from rlattn.formats.strict_json import to_json
        from rlattn.rank import is_main

    found = measure(subject, overrides or [], batches, minutes, oracle)
    if not is_main():
        return
    if json_file:
        json_file.write_text(to_json(found, indent=1) + "\n", encoding="utf-8")
    if figure:
        from rlattn.bench.credit_figure import draw_credit

        draw_credit(found, subject, figure)


@bench.command("resume")
def bench_resume(
    kills: Annotated[int, typer.Option(min=1, max=1000, help="SIGKILLs in all, spread over the settings.")] = 40,
    seed: Annotated[int, typer.Option(help="Draws the moments.")] = 0,
    folder: Annotated[Path, typer.Option(help="Where the runs are kept.")] = Path("bench-resume"),
) -> None:
    """Kill runs at random moments, go on, compare with the unbroken runs; about 40 minutes."""
    from rich.console import Console
    from rich.table import Table

    from rlattn.bench.resume import CHECKS, RESTART_SECONDS
    from rlattn.bench.resume import bench_resume as measure

    rows = measure(kills, seed, folder.absolute(), lambda text: print(text, flush=True))
    table = Table("setting", "kills", "in", *(f"same {name}" for name in CHECKS), "slowest restart")
    for row in rows:
        same = ["yes" if row[name] else "NO" for name in CHECKS]
        restart = f"{row['restart']:.0f} s" if row["restart"] else "-"
        table.add_row(row["setting"], str(row["kills"]), row["in"], *same, restart)
    Console().print(table)
    if not all(row[name] for row in rows for name in CHECKS) or max(r["restart"] for r in rows) > RESTART_SECONDS:
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
