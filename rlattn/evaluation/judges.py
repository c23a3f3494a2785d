"""Who judges: a model on the disk or the hub, or an OpenAI-compatible endpoint."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING

from rlattn.errors import UserError, describe
from rlattn.evaluation.plan import Plan
from rlattn.evaluation.subjects import Subject
from rlattn.progress import progress
from rlattn.recipe.schema import TINY_POLICY, Policy
from rlattn.rewards.external_monitor import ask_all, ask_endpoint

if TYPE_CHECKING:
    from rlattn.evaluation.answers import Checked, Loaded

TIMEOUT = 120.0  # seconds for one answer
AT_ONCE = 8
MOST_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Who says what a reply is."""

    ask: Callable[[Sequence[str]], list[str | None]]
    """From questions to what was answered; None where nothing was, in time."""
    check: Callable[[], object] = lambda: None
    """What is left to be checked before the policy answers, and needs no weights. Raises UserError."""


def is_endpoint(judge: str) -> bool:
    return re.match(r"https?://[^/]", judge, re.IGNORECASE) is not None


def check_judge(judge: str | None, model: str, key_env: str | None) -> None:
    """Raises UserError where an endpoint's options have none, or its address is not one that can be asked."""
    if judge is None or not is_endpoint(judge):
        for option, value in (("--judge-model", model), ("--judge-key-env", key_env)):
            if value:
                fix = "Add --judge, such as http://localhost:8000/v1, or leave it out."
                raise UserError(option, "is for a judge behind an endpoint, and --judge names none.", fix)
    if judge is not None and "://" in judge:
        shown = re.sub(r"//\S*@", "//", judge)
        if shown != judge:
            problem = f"an address must not hold a name or a password, as that of {shown} does."
            raise UserError("--judge", problem, "Take it out, and name the variable with the key: --judge-key-env.")
        if not is_endpoint(judge):
            raise UserError("--judge", f"expected an address such as http://localhost:8000/v1, got {shown}.")


def endpoint_judge(url: str, model: str, key_env: str | None) -> Judge:
    """A judge behind an OpenAI-compatible endpoint; asked one word at once, so that a dead one is known beforehand.

    Raises:
        UserError: there is no such variable, or it does not answer.
    """
    if key_env is not None and key_env not in os.environ:
        # what looks like no variable's name may be the key itself
        name = key_env if re.fullmatch(r"[A-Z_][A-Z0-9_]*", key_env) else "of that name"
        raise UserError("--judge-key-env", f"the environment has no variable {name}.", "Set it to the key.")
    ask = partial(ask_endpoint, url, model, key_env, timeout=TIMEOUT)
    try:
        ask("Reply with the word ready.")
    except (OSError, ValueError, LookupError, TypeError) as error:  # unreachable, or its reply is no answer
        fix = "Check address, --judge-model and --judge-key-env."
        raise UserError("--judge", f"{url} does not answer: {describe(error)[:200]}.", fix) from None

    def judge(questions: Sequence[str]) -> list[str | None]:
        answers: list[str | None] = []
        first_problem = ""
        with progress("judged", len(questions)) as update:
            for start in range(0, len(questions), AT_ONCE):
                part = [(question,) for question in questions[start : start + AT_ONCE]]
                given, problem = ask_all(ask, part, timeout=TIMEOUT, workers=AT_ONCE)
                answers += given
                first_problem = first_problem or problem
                update(len(answers), f"{answers.count(None)} open")
        if first_problem:
            print(f"warning: the judge left {answers.count(None)} open: {first_problem}", file=sys.stderr, flush=True)
        return answers

    return Judge(ask=judge)


def local_judge(subject: Subject, plan: Plan) -> Judge:
    """A model as the judge, greedy, asked without the policy's system prompt; loaded when it is first asked, beside
    the policy. Raises UserError where it cannot be one.
    """
    if subject.path == TINY_POLICY:
        raise UserError("--judge", f"{TINY_POLICY} cannot judge.", "Name a chat model's folder or hub id.")
    recipe = plan.recipe.model_copy(update={"policy": Policy(path=subject.path)})
    own = replace(plan, recipe=recipe, task=None, items=[], own_data=True)

    @cache
    def checked() -> "Checked":
        from rlattn.evaluation.answers import check

        return check(subject, own, "--judge")

    @cache
    def loaded() -> "Loaded":
        from rlattn.evaluation.answers import load

        return load(checked())

    def judge(questions: Sequence[str]) -> list[str | None]:
        from rlattn.evaluation.answers import write_all

        return [one.text for one in write_all(loaded(), list(questions), "judged", MOST_TOKENS)] if questions else []

    return Judge(ask=judge, check=checked)
