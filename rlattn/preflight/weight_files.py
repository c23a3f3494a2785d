"""Whether a folder holds a model's weights or an adapter's, as far as its files tell; imports no torch."""

import json
import zipfile
from pathlib import Path

from rlattn.errors import UserError, describe
from rlattn.files import expanded

# what transformers looks for, in its order; other files may lie beside
MODEL = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
ADAPTER_CONFIG = "adapter_config.json"


def base_of(model: str | Path) -> tuple[str, str | None] | None:
    """The base model of the adapter in a folder, and the base's revision; None where there is no adapter.

    `transformers` reads the first of the two alone, and would take the hub's main revision. Raises OSError, ValueError
    or KeyError where the adapter's configuration is damaged.
    """
    file = expanded(model) / ADAPTER_CONFIG
    if not file.is_file():
        return None
    config = json.loads(file.read_text(encoding="utf-8"))
    return str(config["base_model_name_or_path"]), config.get("revision")


def check_no_adapter(policy: str) -> None:
    """Raises UserError where the policy's folder holds an adapter: TRL would train it as a whole model."""
    if (expanded(policy) / ADAPTER_CONFIG).is_file():
        raise adapter_as_policy(policy)


def adapter_as_policy(policy: str) -> UserError:
    folder = expanded(policy)
    run = folder.parent if folder.name == "model" and folder.is_dir() else "RUN"
    fix = f"Merge it first, `rlattn export {run} --merge --out FOLDER`, and name that folder."
    return UserError("policy.path", f"{policy} holds a LoRA adapter, not a whole model.", fix)


def check_weight_files(model: str, option: str) -> None:
    """Raises UserError where a local folder has no weights, lacks one of their files or holds a torn one."""
    folder = expanded(model)
    if not folder.is_dir():
        return
    found = [next((folder / name for name in names if (folder / name).is_file()), None) for names in (MODEL, ADAPTER)]
    if not any(found):
        if _names_other_weights(folder / "config.json"):
            return
        raise UserError(option, f"{model} has no weights.", "Name a folder saved by save_pretrained.")
    for named in filter(None, found):
        file = named  # which the message names: the index, or the part that is at fault
        try:
            for file in _parts(named):
                _open(file)
        except Exception as error:
            problem = f"{model} holds no loadable weights: {file.name}: {describe(error)[:200]}."
            raise UserError(option, problem, "Copy or save it anew.") from None


def _parts(file: Path) -> list[Path]:
    """The files that an index names; of any other file itself."""
    if file.suffix != ".json":
        return [file]
    weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
    return [file.parent / part for part in sorted({*weight_map.values()})]


def _open(file: Path) -> None:
    """Reads a file's header; raises where it is torn or not there."""
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="numpy"):
            return
    with file.open("rb") as content:
        torn = content.read(2) == b"PK" and not zipfile.is_zipfile(file)
    if torn:
        raise ValueError("its end is missing")


def _names_other_weights(config: Path) -> bool:
    try:
        return "transformers_weights" in json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
