"""Which model is meant: a run folder, a checkpoint, a model or adapter folder, a hub id. Reads names, no weights."""

import os
from dataclasses import dataclass
from pathlib import Path

from rlattn.errors import UserError
from rlattn.files import expanded, is_there
from rlattn.inspection.inputs import check_model_path
from rlattn.preflight.hub import go_offline_if_unreachable
from rlattn.recipe.schema import TINY_POLICY
from rlattn.run_folder.checkpoints import newest_sound, problem
from rlattn.run_folder.folder import is_run

EVALUATION, SAMPLES = "eval.json", "eval-samples.jsonl"  # what an evaluation's folder holds
REFUSED = "eval-samples.refused.jsonl"  # the answers of one that was refused in the middle; its folder can be had again


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that is to be evaluated."""

    name: str
    """As the user gave it."""
    path: str
    """The folder that loads, a hub id, or `tiny-reasoner`, whose recipe says how it is made."""
    run: Path | None = None
    """The run it comes from, whose recipe says what it was trained on."""
    note: str = ""
    """What the user should know about the choice."""

    def same_as(self, other: "Subject") -> bool:
        paths = [str(Path(one.path).resolve()) if one.is_local else one.path for one in (self, other)]
        return paths[0] == paths[1]

    @property
    def is_local(self) -> bool:
        return self.path == TINY_POLICY or is_there(Path(self.path))


def find_subject(model: str, option: str) -> Subject:
    """The model behind a name. Raises UserError that names `option` where there is none.

    Of a hub id only whether the hub answers is looked at: its clients read that once, when they are imported.
    """
    folder = expanded(model)
    if model == TINY_POLICY:
        return Subject(name=model, path=model)
    if model.strip() and is_there(folder) and is_run(folder):
        return _of_run(model, folder, option)
    check_model_path(model, option)
    if not folder.is_dir():
        go_offline_if_unreachable()
        return Subject(name=model, path=model)
    if (folder / "manifest.json").is_file() and (damage := problem(folder, hashes=False)):
        raise UserError(option, f"{model} is damaged: {damage}.", "Name another checkpoint.")
    parents = folder.absolute().parents
    run = next((parent for parent in parents[:2] if is_run(parent)), None)
    return Subject(name=model, path=str(folder), run=run)


def _of_run(model: str, run: Path, option: str) -> Subject:
    final = run / "model"
    if (final / "config.json").is_file() or (final / "adapter_config.json").is_file():
        return Subject(name=model, path=str(final), run=run.absolute())
    newest, _ = newest_sound(run / "checkpoints", hashes=False)
    if newest is None:
        fix = f"`rlattn train {run}/recipe.yaml` goes on with it."
        raise UserError(option, f"{model} has neither model/ nor a sound checkpoint yet.", fix)
    note = f"{model} has not finished: this is its {newest.name}"
    return Subject(name=model, path=str(newest), run=run.absolute(), note=note)


def check_length(path: str | Path, option: str) -> None:
    """Raises UserError where a path cannot even be looked for: a name longer than the file system allows."""
    try:
        expanded(path).exists()
    except OSError as error:
        raise UserError(option, f"no file or folder '{path}': {error.strerror}.", "Give another name.") from None


def out_folder(out: Path | None, subject: Subject) -> Path:
    """A new folder for what is written, not made yet: `out`, or one beside the model.

    Raises:
        UserError: it holds something, or could not be made.
    """
    if out is None:
        if subject.run is not None:
            inside = Path(subject.path).name.startswith("checkpoint-")
            wanted = subject.run / (f"eval-{Path(subject.path).name}" if inside else "eval")
        else:
            local = expanded(subject.path)
            wanted = (local.parent if local.is_dir() else Path()) / f"{local.name}-eval"
        number, out = 1, wanted
        while out.exists():  # never over an earlier evaluation
            number += 1
            out = wanted.with_name(f"{wanted.name}-{number}")
    elif out.exists() and (not out.is_dir() or any(inside.name != REFUSED for inside in out.iterdir())):
        held = "holds an evaluation" if (out / EVALUATION).is_file() else "is not an empty folder"
        raise UserError("--out", f"{out} {held}.", "Name a new folder.")
    parent = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError("--out", f"{out} cannot be made in {parent}.", "Name another folder.")
    return out
