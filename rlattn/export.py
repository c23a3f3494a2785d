"""`rlattn export`: a run's final policy as a folder to share, adapters merged on request, or on the hub."""

import shutil
from pathlib import Path

from rlattn.errors import UserError


def export(run: Path, out: Path, *, merge: bool, push: str | None) -> Path:
    """Copies `RUN/model` to `out`, merging a LoRA adapter into its base model if asked; pushes it if asked.

    Raises:
        UserError: no finished run there, nothing to merge, `out` is taken, or the hub refuses.
    """
    model = run / "model"
    if not (run / "recipe.yaml").is_file():
        raise UserError(str(run), "is no run folder (it has no recipe.yaml).", "Give a run's output_dir.")
    if not model.is_dir():
        raise UserError(
            str(run), "has no model/: the run has not finished.", f"rlattn train {run}/recipe.yaml continues it."
        )
    adapter = (model / "adapter_config.json").is_file()
    if merge and not adapter:
        raise UserError("--merge", f"{model} holds full weights; there is no adapter to merge.", "Leave --merge out.")
    if out.exists():
        raise UserError("--out", f"{out} exists.", "Name another folder.")
    if merge:
        _merge(model, out)
    else:
        shutil.copytree(model, out)
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
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise UserError(
            "--push",
            f"the hub refuses '{repo}' ({type(error).__name__}); the model is in {folder}.",
            "Log in with `hf auth login` and check the name.",
        ) from None
