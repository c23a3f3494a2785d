"""What `rlattn bench credit` measures: the recipe behind a name, and the trainer that rolls it out without training."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rlattn.errors import UserError
from rlattn.evaluation.subjects import find_subject
from rlattn.files import expanded, is_there
from rlattn.grpo.port import Port
from rlattn.preflight.policy_files import strategy_of
from rlattn.recipe.build import build_task
from rlattn.recipe.load import load_recipe
from rlattn.recipe.schema import Recipe
from rlattn.run.build import make_trainer, prepare
from rlattn.run_folder.checkpoints import checkpoint_step
from rlattn.run_folder.folder import read_summary
from rlattn.types import CreditRule, DialogueTask


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is measured."""

    recipe: Recipe
    adapter: Path | None = None
    """The adapter whose weights are put into the recipe's policy."""
    run: Path | None = None
    """The run's folder that the policy comes from."""
    step: int = 0
    """The step that it comes from."""


def subject_of(subject: str, overrides: list[str]) -> Subject:
    """The recipe, and the policy, behind a name.

    Args:
        subject: a recipe, a run's folder, or a checkpoint inside of one.

    Raises:
        UserError: there is no such thing, or no recipe that says its task.
    """
    folder = expanded(subject)
    if not (is_there(folder) and folder.is_dir()):
        return Subject(recipe=load_recipe(subject, overrides))
    found = find_subject(subject, "SUBJECT")
    if found.run is None or not (found.run / "recipe.yaml").is_file():
        problem = f"{subject} lies in no run's folder, whose recipe would say the task."
        raise UserError("SUBJECT", problem, "Give a recipe with policy.path, a run's folder, or a checkpoint of one.")
    weights = Path(found.path)
    step = checkpoint_step(weights) if weights.name.startswith("checkpoint-") else 0
    step = step or int((read_summary(found.run) or {}).get("max_steps", 0))
    if (weights / "adapter_config.json").is_file():
        recipe = load_recipe(found.run / "recipe.yaml", overrides)
        return Subject(recipe=recipe, adapter=weights, run=found.run, step=step)
    own = [
        f"policy.path={weights}",
        "policy.revision=null",
        "policy.warm_start=null",
        "policy.supervised_control=false",
    ]
    return Subject(recipe=load_recipe(found.run / "recipe.yaml", [*own, *overrides]), run=found.run, step=step)


def check_recipe(recipe: Recipe, oracle: int = 0) -> None:
    """Raises UserError where a gradient cannot be read, has no weight a token, or a text cannot be gone on with."""
    if oracle and isinstance(build_task(recipe), DialogueTask):
        raise UserError("--oracle", "a dialogue cannot be gone on with from its middle.", "Leave it out.")
    strategy = strategy_of(recipe)
    if strategy in ("zero3", "fsdp"):
        key = "trainer.deepspeed" if strategy == "zero3" else "trainer.fsdp"
        problem = "spreads the weights over ranks, and their gradients are read whole."
        raise UserError(key, problem, f"Add {key}=null; an adapter (policy.lora) makes a large policy fit.")
    if recipe.trainer.get("importance_sampling_level") == "sequence":
        problem = "sequence gives a rollout one ratio, so that no token has a weight of its own."
        raise UserError("trainer.importance_sampling_level", problem, "Use token.")


@contextmanager
def rolling_out(subject: Subject) -> Iterator[tuple[Port, CreditRule | None]]:
    """The trainer's port, and the recipe's rule, which the trainer itself does not have. Leaves nothing behind."""
    recipe, adapter, step = subject.recipe, subject.adapter, subject.step
    setup = prepare(recipe)
    with tempfile.TemporaryDirectory(prefix="rlattn-bench-credit-") as folder:
        trainer = make_trainer(
            replace(setup, credit=None), Path(folder), [], save_strategy="no", report_to="none", deepspeed=None
        )
        if adapter is not None:
            from peft import set_peft_model_state_dict
            from safetensors.torch import load_file

            set_peft_model_state_dict(trainer.port.policy, load_file(adapter / "adapter_model.safetensors"))
        state = trainer.port.state
        state.global_step, state.max_steps = step, max(recipe.trainer.get("max_steps", 0), step)
        yield trainer.port, setup.credit
