"""`rlattn export`: a run's final policy as a folder to share, adapters merged on request, or on the hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlattn.errors import UserError, describe
from rlattn.preflight.weight_files import base_of
from rlattn.run_folder.folder import is_run

if TYPE_CHECKING:
    import torch

TOKENS_COMPARED = 64
ROUNDING = 1e-3  # of a log-probability in float32, at most
MOST_LOST = 0.01  # of what training moved a log-probability by


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
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(str(run / "model"), f"cannot be exported: {describe(error)[:300]}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    if push:
        _push(out, push)
    return out


def _merge(model: Path, out: Path) -> None:
    """Writes the adapter's base with the adapter merged into it, in float32: bfloat16 has no digits for most of what
    RL changes in a weight.

    Raises:
        UserError: what was written is another policy than the adapter over its base.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = base_of(model)
    assert found is not None  # check_export
    base, revision = found
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, revision=revision, dtype=torch.float32), str(model)
    )
    trained = _log_probabilities(adapted)
    with adapted.disable_adapter():
        moved = float((trained - _log_probabilities(adapted)).abs().max())
    adapted.merge_and_unload().save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    del adapted  # there may be room for one only
    merged = _log_probabilities(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32))
    off = float((trained - merged).abs().max())
    if not off <= max(ROUNDING, MOST_LOST * moved):
        raise UserError(
            str(model),
            f"merged, it would be another policy: log-probabilities would be off by up to {off:.2g}, where training "
            f"moved them by up to {moved:.2g}.",
            "An adapter on embeddings that the output layer shares cannot be merged. Leave --merge out.",
        )


def _log_probabilities(model: Any) -> torch.Tensor:
    """Of every next token, in a text of tokens from all over the vocabulary."""
    import torch

    ids_T = torch.linspace(0, model.get_input_embeddings().weight.shape[0] - 1, TOKENS_COMPARED).long()
    with torch.inference_mode():
        return model.eval()(ids_T[None]).logits.log_softmax(-1)


def _push(folder: Path, repo: str) -> None:
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo, exist_ok=True, private=True)
        api.upload_folder(repo_id=repo, folder_path=folder)
    except Exception as error:
        raise UserError(
            "--push",
            f"'{repo}' could not be pushed ({describe(error)[:200]}); the model is in {folder}.",
            "Log in with `hf auth login` and check the name and the network.",
        ) from None
