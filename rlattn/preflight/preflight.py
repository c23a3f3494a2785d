"""Every check of a recipe before weights load, in one order: for check, train, --ranks, --dry-run, eval and score.

What a single key may be, the schema says (`recipe/schema.py`); what must hold between keys, `recipe/constraints.py`;
what a task or a reward asks of a recipe, its own `check`. Imports neither torch nor TRL.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlattn.errors import UserError
from rlattn.files import check_writable
from rlattn.preflight.data_rows import look_at_data
from rlattn.preflight.hub import go_offline_if_unreachable
from rlattn.preflight.policy_files import check_policy, strategy_of
from rlattn.preflight.wandb_login import check_wandb
from rlattn.preflight.weight_files import check_weight_files
from rlattn.rank import is_main
from rlattn.recipe.build import build_credit, build_rewards, build_task
from rlattn.recipe.constraints import check_built, check_installed, check_recipe
from rlattn.recipe.schema import TINY_POLICY, Recipe
from rlattn.rewards.protocol import lags_of
from rlattn.types import CreditRule, Messages, Reward, Task

Depth = Literal["parts", "files", "run"]


@dataclass(frozen=True, kw_only=True)
class Cleared:
    """What a recipe names, built and checked, and what was found on the way."""

    task: Task
    rewards: dict[str, Reward]
    credit: CreditRule | None
    warnings: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    """The policy's config.json; empty for the tiny policy."""
    prompts: list[str | Messages] = field(default_factory=list)
    """The longest ones of those that were looked at."""
    unread: str = ""
    """What of the data could not be looked at."""


def preflight(recipe: Recipe, ranks: int, depth: Depth) -> Cleared:
    """Checks a recipe for so many ranks. Cost: reading small files; 1 to 2 seconds.

    Args:
        depth: `parts` builds task, rewards and rule by themselves, all that scoring and evaluation take of a recipe;
            `files` adds what must hold between them, the rows and the policy's configuration, as on a login node, where
            a missing package is a warning; `run` adds what the machine must have: packages, weights, a W&B key.

    Raises:
        UserError: the first thing that would keep the recipe from running, or from doing what it says.
    """
    if recipe.hub_ids:
        go_offline_if_unreachable()
    task, rewards, credit = build_task(recipe), build_rewards(recipe), build_credit(recipe)
    if depth == "parts":
        return Cleared(task=task, rewards=rewards, credit=credit)
    check_writable(recipe.run_dir)
    warnings = check_recipe(recipe, ranks)
    try:
        check_installed(recipe)
    except UserError as missing:
        if depth == "run":
            raise
        warnings.append(f"on this machine, {missing}")
    warnings += check_built(recipe, task, rewards, credit, ranks)
    prompts, unread, about_rows = look_at_data(recipe, task, ranks)
    _check_lagged(recipe, rewards)
    config = check_policy(recipe, task)
    if depth == "run" and recipe.policy.path != TINY_POLICY:
        check_weight_files(recipe.policy.path, "policy.path")
    if depth == "run" and is_main() and "wandb" in recipe.tracking.report_to:
        check_wandb(os.environ, Path.home())
    return Cleared(
        task=task,
        rewards=rewards,
        credit=credit,
        warnings=warnings + about_rows,
        config=config,
        prompts=prompts,
        unread=unread,
    )


def _check_lagged(recipe: Recipe, rewards: dict[str, Reward]) -> None:
    if any(lags_of(reward) for reward in rewards.values()) and strategy_of(recipe) in ("zero3", "fsdp"):
        raise UserError(
            "rewards",
            f"a lagged policy needs whole weights on every rank, which {strategy_of(recipe)} spreads.",
            "Use DDP or ZeRO-2; self_monitor also works with source own or external and held_out_every 0.",
        )
