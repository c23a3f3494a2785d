"""Adds to W&B the recipe, sampled tokens as tables and as a heat map, and one run id for all sessions.

transformers' own callback starts the run and logs the metrics. Offline, wandb starts a folder a session; `wandb sync`
puts them together again under the id.
"""

import os
import re
import secrets
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlattn.errors import UserError
from rlattn.rank import say
from rlattn.recipe.schema import Recipe
from rlattn.report import page
from rlattn.report.tokens import read_tokens
from rlattn.run_folder.folder import token_files, write_text

ID_FILE = "wandb-id.txt"


def wandb_environment(run_dir: Path) -> dict[str, str]:
    """The variables that let every session of a run folder go on with the same W&B run. Writes the id's file."""
    file = run_dir / ID_FILE
    if not file.is_file():
        write_text(file, secrets.token_hex(4))
    run_id = file.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"[\w-]{1,64}", run_id):
        raise UserError(str(file), "holds no W&B run id.", "Remove it: the run then goes on as a new W&B run.")
    return {"WANDB_RUN_ID": run_id, "WANDB_RESUME": "allow"}


class WandbRun(TrainerCallback):
    """On rank 0, after transformers' callback and the token files."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.sent = 0  # the last step whose tokens are there

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        import wandb

        self.sent = state.global_step
        if wandb.run:
            wandb.run.config.update({"recipe": self.recipe.model_dump(mode="json")}, allow_val_change=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        import wandb

        if not wandb.run or not (files := [pair for pair in token_files(self.recipe.run_dir) if pair[0] > self.sent]):
            return
        self.sent, file = files[-1]
        view = page(
            {
                "name": f"{self.recipe.name}, step {self.sent}",
                "tokens": read_tokens(self.recipe.run_dir, [], files[-1:]),
            }
        )
        found = {"tokens": _table(self.sent, file), "token_view": wandb.Html(view, inject=False)}
        wandb.log(found, commit=not control.should_log)  # else they wait for the step's numbers

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        import wandb

        if wandb.run and wandb.run.offline:
            folders = sorted((Path(os.environ["WANDB_DIR"]) / "wandb").glob(f"offline-run-*-{wandb.run.id}"))
            say(f"W&B was offline; to upload: wandb sync --id {wandb.run.id} {' '.join(map(str, folders))}")


def _table(step: int, file: Path) -> Any:
    import pyarrow.parquet as pq
    import wandb

    columns = [name for name in pq.read_schema(file).names if name != "prompt"]
    rows = pq.read_table(file, columns=columns).to_pydict()
    data = [[step, *values] for values in zip(*(rows[name] for name in columns), strict=True)]
    return wandb.Table(columns=["step", *columns], data=data)
