"""What a run is made from besides its recipe: code and files of the user's, told when they change between sessions."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlattn.recipe.schema import Recipe
from rlattn.run_folder.checkpoints import file_digest

LARGEST_READ = 2**30  # bytes; of a larger file the size must do


def sources(recipe: Recipe) -> dict[str, str]:
    """Path -> SHA-256 of every local file that the recipe names: modules of `python:`, data, task spaces, DeepSpeed's
    configuration. Cost: reads them once.
    """
    files = {}
    for text in _texts(recipe.model_dump(mode="json", exclude={"output_dir"})):
        module = sys.modules.get(text.partition(":")[0]) if ":" in text else None
        file = Path(getattr(module, "__file__", None) or text)
        try:
            if file.is_file():
                size = file.stat().st_size
                files[str(file)] = file_digest(file) if size <= LARGEST_READ else f"{size} bytes"
        except OSError:  # no path at all, or one that may not be read
            continue
    return files


def changed_sources(before: Any, now: dict[str, Any]) -> list[str]:
    """The files of an earlier session that are there with other bytes; both are what an environment.json holds."""
    old = before.get("sources") if isinstance(before, dict) else None
    known = old if isinstance(old, dict) else {}
    return sorted(file for file, digest in now["sources"].items() if known.get(file, digest) != digest)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
