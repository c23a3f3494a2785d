"""Whether a folder holds a model's weights, as far as its files' headers tell; imports no torch."""

import json

from rlattn.errors import UserError, describe
from rlattn.paths import expanded

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")


def check_weight_files(model: str, option: str) -> None:
    """Raises UserError where a local folder has no weights, lacks one of their files or holds a torn one."""
    from safetensors import safe_open

    folder = expanded(model)
    if not folder.is_dir():
        return
    if not any(found for pattern in WEIGHT_FILES for found in folder.glob(pattern)):
        raise UserError(option, f"{model} has no weights.", "Name a folder saved by save_pretrained.")
    file = folder / "model.safetensors.index.json"
    try:
        parts = json.loads(file.read_text(encoding="utf-8"))["weight_map"].values() if file.is_file() else ()
        for file in sorted({*folder.glob("*.safetensors"), *(folder / part for part in parts)}):
            with safe_open(file, framework="numpy"):
                pass
    except Exception as error:
        problem = f"{model} holds no loadable weights: {file.name}: {describe(error)[:200]}."
        raise UserError(option, problem, "Copy or save it anew.") from None
