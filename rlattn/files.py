"""Where a recipe and the files it names lie: beside it, in the working directory, or among the shipped files."""

import difflib
import os
from pathlib import Path
from typing import Literal

from rlattn.errors import UserError, did_you_mean

SOURCE_ROOT = Path(__file__).parent.parent
SHIPPED = Path(__file__).parent / "shipped"  # where the wheel puts recipes, launch and data


def find_recipe(path: str | Path) -> Path:
    """The recipe file: as given, or a shipped one by path or bare name."""
    if not str(path).strip():
        raise UserError("recipe", "its name is empty.", "See `rlattn recipes` for the shipped ones.")
    shipped = shipped_dir("recipes")
    given = expanded(path)
    for candidate in (given, shipped.parent / path, shipped / path, shipped / f"{path}.yaml"):
        if is_there(candidate) and candidate.is_file():
            return candidate.absolute()
    if is_there(given):
        raise UserError(str(path), "is a folder; expected a recipe file.", "See `rlattn recipes` for the shipped ones.")
    names = [file.stem for file in shipped.glob("*.yaml")]
    if is_there(given.parent):
        names += [file.name for file in given.parent.glob("*.y*ml")]
    raise UserError(str(path), "no such recipe.", did_you_mean(given.name.removesuffix(".yaml"), names))


def shipped_dir(name: Literal["recipes", "launch", "data"]) -> Path:
    """The folder of shipped files: inside the installed package, or beside it in a checkout."""
    packaged = SHIPPED / name
    return packaged if packaged.is_dir() else SOURCE_ROOT / name


def find_file(path: str, base: Path) -> Path | None:
    """A path of a recipe: beside the recipe, then in the working directory, then among the shipped files."""
    given = expanded(path)
    for root in (base, Path.cwd(), shipped_dir("data").parent):
        if is_there(root / given):
            return (root / given).absolute()
    return None


def expanded(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~nobody
        return Path(path)


def is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, or with a NUL in it
        return False


def looks_local(path: str, base: Path) -> bool:
    """A path whose folder is there, its last part is not: a typo rather than a hub id."""
    parent = Path(path).parent
    return parent != Path() and any((root / parent).is_dir() for root in (base, Path.cwd()))


def nearest_file(path: str, base: Path) -> str:
    folders = [base / Path(path).parent, Path.cwd() / Path(path).parent, shipped_dir("data").parent / Path(path).parent]
    names = [entry.name for folder in folders if folder.is_dir() for entry in folder.iterdir()]
    near = difflib.get_close_matches(Path(path).name, names, n=1)
    looked = "Looked beside the recipe, in the working directory and among the shipped files."
    return f"Did you mean '{Path(path).parent / near[0]}'? {looked}" if near else looked


def check_writable(folder: Path) -> None:
    """Raises UserError where a run's folder could not be made."""
    try:
        parent = next((path for path in (folder, *folder.parents) if path.exists()), None)
    except OSError as error:
        raise UserError("output_dir", f"cannot be looked for: {error.strerror}.", "Name another.") from None
    if folder.is_symlink() and not folder.exists():
        raise UserError("output_dir", f"{folder} is a link that leads nowhere.", "Remove it, or name another.")
    if parent is None or not parent.is_dir():
        raise UserError("output_dir", f"{folder} cannot be made: {parent} is no folder.", "Name another.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError("output_dir", f"{folder} cannot be made: {parent} is not writable.", "Name another.")
