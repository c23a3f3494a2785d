"""`rlattn export`: a run's final policy as a folder to share, adapters merged on request, or on the hub."""

import shutil
from pathlib import Path

from rlattn.errors import UserError
from rlattn.run_folder.folder import is_run


def check_export(run: Path, out: Path, *, merge: bool) -> None:
    """Raises UserError: no finished run there, nothing to merge, or `out` is taken. Imports nothing heavy."""
    model = run / "model"
    if not is_run(run):
        raise UserError(str(run), "is no run folder of rlattn's.", "Give a run's output_dir.")
    adapter = (model / "adapter_config.json").is_file()
    if not adapter and not (model / "config.json").is_file():
        fix = f"`rlattn train {run}/recipe.yaml` continues it."
        raise UserError(str(run), "has no model/: the run has not finished.", fix)
    if merge and not adapter:
        raise UserError("--merge", f"{model} holds full weights; there is no adapter to merge.", "Leave --merge out.")
    if out.exists():
        raise UserError("--out", f"{out} exists.", "Name another folder.")
    if model.absolute() in out.absolute().parents:
        raise UserError("--out", f"{out} lies inside the model itself.", "Name another folder.")
    if not out.absolute().parent.is_dir():
        raise UserError("--out", f"{out.absolute().parent} is no folder.", "Make it first, or name another.")


def export(run: Path, out: Path, *, merge: bool, push: str | None) -> Path:
    """Copies `RUN/model` to `out`, merging a LoRA adapter into its base model if asked; pushes it if asked.

    `out` is whole or not there at all.

    Raises:
        UserError: what check_export refuses, a model that cannot be read, or a hub that refuses.
    """
    check_export(run, out, merge=merge)
    beside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        _merge(run / "model", beside) if merge else shutil.copytree(run / "model", beside)
        beside.rename(out)
    except (OSError, ValueError, KeyError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise UserError(str(run / "model"), f"cannot be exported: {' '.join(str(error).split())}") from None
    if push:
        _push(out, push)
    return out


def _merge(model: Path, out: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    merged = AutoPeftModelForCausalLM.from_pretrained(model).merge_and_unload()
    merged.save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)


def _push(folder: Path, repo: str) -> None:
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo, exist_ok=True, private=True)
        api.upload_folder(repo_id=repo, folder_path=folder)
    except Exception as error:
        raise UserError(
            "--push",
            f"the hub refuses '{repo}' ({type(error).__name__}); the model is in {folder}.",
            "Log in with `hf auth login` and check the name and the network.",
        ) from None
