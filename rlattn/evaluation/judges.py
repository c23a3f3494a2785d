"""Who judges: a model on the disk or the hub, or an OpenAI-compatible endpoint."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from rlattn.errors import UserError, describe
from rlattn.evaluation.plan import Plan
from rlattn.evaluation.subjects import Subject
from rlattn.progress import progress
from rlattn.recipe import TINY_POLICY, Policy
from rlattn.rewards.external_monitor import ask_all, ask_endpoint

if TYPE_CHECKING:
    from rlattn.evaluation.answers import Loaded

Judge = Callable[[Sequence[str]], list[str | None]]
"""From questions to what was answered; None where nothing was, in time."""

TIMEOUT = 120.0  # seconds for one answer
AT_ONCE = 8
MOST_TOKENS = 1024


def is_endpoint(judge: str) -> bool:
    return re.match(r"https?://[^/]", judge) is not None


def endpoint_judge(url: str, model: str, key_env: str | None) -> Judge:
    """A judge behind an OpenAI-compatible endpoint; asked one word at once, so that a dead one is known beforehand.

    Raises:
        UserError: there is no such variable, or it does not answer.
    """
    if key_env is not None and key_env not in os.environ:
        raise UserError("--judge-key-env", f"the environment has no variable {key_env}.", "Set it to the key.")
    ask = partial(ask_endpoint, url, model, key_env, timeout=TIMEOUT)
    try:
        ask("Reply with the word ready.")
    except Exception as error:
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

    return judge


def local_judge(subject: Subject, plan: Plan) -> Judge:
    """A model as the judge, greedy, asked without the policy's system prompt; loaded when it is first asked, beside
    the policy. Raises UserError where it cannot be one.
    """
    if subject.path == TINY_POLICY:
        raise UserError("--judge", f"{TINY_POLICY} cannot judge.", "Name a chat model's folder or hub id.")
    recipe = plan.recipe.model_copy(update={"policy": Policy(path=subject.path)})
    own = replace(plan, recipe=recipe, task=None, items=[], own_data=True)
    loaded: list[Loaded] = []

    def judge(questions: Sequence[str]) -> list[str | None]:
        from rlattn.evaluation.answers import load, write_all

        if not loaded:
            loaded.append(load(subject, own, "--judge"))
        return [one.text for one in write_all(loaded[0], list(questions), "judged", MOST_TOKENS)] if questions else []

    return judge
