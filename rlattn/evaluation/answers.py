"""Loads a model from a folder or the hub and lets it answer items, batch by batch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlattn.errors import UserError, describe
from rlattn.evaluation.plan import Item, Plan
from rlattn.evaluation.subjects import Subject
from rlattn.formats.thought import with_opened_thought
from rlattn.grpo.dialogues import check_dialogues, plain_dialogues
from rlattn.grpo.held_out import Completion, in_dialogue, in_one_turn
from rlattn.inspection.inputs import check_decoder_only, load_config, load_tokenizer
from rlattn.policy.generate import end_tokens, write_hf
from rlattn.policy.load import check_vocabulary, load_model, make_tiny_policy
from rlattn.policy.prompts import chat_or_plain, decode, render_ids, render_text
from rlattn.preflight.tokenizer_files import check_system_prompt
from rlattn.preflight.weight_files import check_weight_files
from rlattn.progress import progress
from rlattn.recipe.schema import TINY_POLICY, Policy
from rlattn.run.build import taught_task, warm_start_progress
from rlattn.tasks.guarded_metrics import Safe, metrics_of, safe_text, safe_verify
from rlattn.types import DialogueTask, Example, Messages

SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One completion of one item, and what the task says of it."""

    item: Item
    sample: int
    text: str
    """Of a dialogue the transcript."""
    tokens: int
    """Of the policy's own."""
    thought: int
    """Tokens of the `<think>` block; 0 in a dialogue."""
    cut: bool
    """Whether it reached the length limit before its end."""
    right: float | None
    """None where the task's verifier failed."""
    measured: dict[str, float] | None = field(default_factory=dict)
    """None where its metrics failed."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """One greedy completion, whatever it was asked for."""

    ids: list[int]
    text: str
    cut: bool


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A model of which all is sound that can be known without its weights, and how it is asked."""

    name: str
    path: str
    revision: str | None
    option: str
    """What the user named it with, for messages."""
    tokenizer: PreTrainedTokenizerBase
    policy: Policy
    context: int | None
    plan: Plan

    def prompt_ids(self, prompt: str | Messages) -> list[int]:
        """A prompt as a task wrote it, as the model reads it."""
        return list(render_ids(self.tokenizer, chat_or_plain(prompt, self.policy), self.plan.template_kwargs))

    def prompt_text(self, prompt: str | Messages) -> str:
        return render_text(self.tokenizer, chat_or_plain(prompt, self.policy), self.plan.template_kwargs)


@dataclass(frozen=True, kw_only=True)
class Loaded(Checked):
    """A model that can answer."""

    model: PreTrainedModel

    @property
    def ends(self) -> set[int]:
        return end_tokens(self.model, self.tokenizer)

    def write(
        self, prompt_ids: list[list[int]], *, max_new_tokens: int | None = None, temperature: float = 0.0
    ) -> list[list[int]]:
        """One completion a prompt, as token ids up to and with the end token."""
        trainer = self.plan.recipe.trainer
        return write_hf(
            self.model,
            self.tokenizer,
            prompt_ids,
            max_new_tokens=max_new_tokens or self.plan.max_new_tokens,
            temperature=temperature,
            stop_strings=self.policy.stop_strings,
            **{name: trainer[name] for name in SAMPLING if trainer.get(name) is not None},
        )


def check(subject: Subject, plan: Plan, option: str) -> Checked:
    """Everything that configuration, tokenizer and prompts tell, so that no model answers before all can.

    Raises:
        UserError: it cannot be had, is no decoder-only model, cannot be asked this way, or its context is too short.
    """
    path, policy = subject.path, plan.recipe.policy
    revision = policy.revision if path == policy.path else None  # the recipe's pin, of the recipe's policy
    if path == TINY_POLICY:
        path = str(_tiny(plan))
    config, tokenizer = load_config(path, option, revision), load_tokenizer(path, option, revision)
    check_decoder_only(path, config, option)
    check_weight_files(path, option)
    if policy.prompt_style == "chat" and tokenizer.chat_template is None:
        if not plan.own_data:
            raise UserError(option, f"{subject.name} has no chat template.", "Add policy.prompt_style=plain.")
        policy = policy.model_copy(update={"prompt_style": "plain"})
    check_vocabulary(path, option, tokenizer, config)
    check_system_prompt(policy, lambda chat: render_text(tokenizer, chat, plan.template_kwargs))
    if isinstance(plan.task, DialogueTask):
        check_dialogues(plan.task, tokenizer, plan.template_kwargs)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    checked = Checked(
        name=subject.name,
        path=path,
        revision=revision,
        option=option,
        tokenizer=tokenizer,
        policy=policy,
        context=context,
        plan=plan,
    )
    check_prompts(checked, [(f"row {item.index + 1}", item.prompt) for item in plan.items])
    return checked


def check_prompts(checked: Checked, prompts: Iterable[tuple[str, str | Messages]]) -> None:
    """Every prompt, named for messages, must be one that the chat template takes, and leave room for an answer.

    Raises:
        UserError: one is not.
    """
    longest, limit = 0, checked.plan.max_new_tokens
    for where, prompt in prompts:
        if not isinstance(prompt, str) and checked.tokenizer.chat_template is None:
            problem = f"holds chat messages, and {checked.name} has no chat template."
            raise UserError(where, problem, "Use text prompts.")
        try:
            longest = max(longest, len(checked.prompt_ids(prompt)))
        except Exception as error:  # a chat template is a program of the model's
            fix = "Try policy.prompt_style=plain." if isinstance(prompt, str) else "Use text prompts or another model."
            problem = f"the chat template of {checked.name} refuses it: {describe(error)[:200]}."
            raise UserError(where, problem, fix) from None
    if checked.context is not None and longest and longest + limit > checked.context:
        raise _too_long(checked.name, limit, longest, checked.context)


def load(checked: Checked) -> Loaded:
    """Its weights. Raises UserError where they cannot be loaded."""
    return Loaded(model=load_model(checked.path, checked.option, checked.revision), **vars(checked))


def judged(verify: Safe[float], loaded: Loaded, text: str, item: Item, prompt: str | Messages) -> float | None:
    """What the task's verifier says of an answer to a prompt; None where it fails."""
    return verify(with_opened_thought(text, loaded.prompt_text(prompt)), item.row)


def answer_items(loaded: Loaded, keep: Callable[[dict[str, Any]], None]) -> list[Answer]:
    """Every item's answers, `keep` called with a row for each as soon as it is there.

    Cost: one completion an item and sample.
    """
    plan = loaded.plan
    task: Any = plan.task
    verify, measure, gold = safe_verify(task), metrics_of(task), safe_text(task, "gold")
    jobs = [(item, sample) for item in plan.items for sample in range(plan.samples)]
    torch.manual_seed(plan.recipe.seed)
    answers: list[Answer] = []
    with progress(loaded.name, len(jobs)) as update, memory_named(plan):
        for batch in batches(jobs, plan.batch_size):
            for (item, sample), written in zip(batch, _completions(loaded, [item for item, _ in batch]), strict=True):
                text = written.text
                answers.append(
                    Answer(
                        item=item,
                        sample=sample,
                        text=text,
                        tokens=written.tokens,
                        thought=written.thought,
                        cut=is_cut(loaded, written.ids, plan.max_new_tokens),
                        right=judged(verify, loaded, text, item, item.prompt),
                        measured=measure(text, item.row),
                    )
                )
                keep(_row(answers[-1], gold(item.row)))
            share = sum((answer.right or 0) >= 1 for answer in answers) / max(1, len(answers) - verify.failed)
            update(len(answers), f"{100 * share:.1f} % right")
    return answers


def write_all(
    loaded: Loaded, prompts: Sequence[str | Messages], label: str, most_tokens: int | None = None
) -> list[Written]:
    """One greedy completion a prompt, for the probes.

    Raises:
        UserError: a prompt and an answer do not fit into the model's context.
    """
    limit = most_tokens or loaded.plan.max_new_tokens
    ids = [loaded.prompt_ids(prompt) for prompt in prompts]
    longest = max(len(one) for one in ids)
    if loaded.context is not None:
        limit = min(limit, loaded.context - longest) if most_tokens else limit
        if limit < 1 or longest + limit > loaded.context:
            raise _too_long(loaded.name, limit, longest, loaded.context)
    found: list[Written] = []
    with progress(label, len(ids)) as update, memory_named(loaded.plan):
        for batch in batches(ids, loaded.plan.batch_size):
            for one in loaded.write(list(batch), max_new_tokens=limit):
                text, cut = decode(loaded.tokenizer, one, loaded.ends), is_cut(loaded, one, limit)
                found.append(Written(ids=one, text=text, cut=cut))
            update(len(found), f"{sum(one.cut for one in found)} cut")
    return found


def batches(jobs: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(jobs), size):
        yield jobs[start : start + size]


@contextmanager
def memory_named(plan: Plan) -> Iterator[None]:
    """A GPU that is too small is a setting's fault, not a traceback."""
    try:
        yield
    except torch.OutOfMemoryError:
        problem = f"{plan.batch_size} answers at once do not fit into the GPU's memory."
        raise UserError("trainer.per_device_eval_batch_size", problem, "Add it with a smaller number.") from None


def _row(answer: Answer, gold: str | None) -> dict[str, Any]:
    item = answer.item
    return {
        "row": item.index + 1,
        "sample": answer.sample,
        "effort": item.effort,
        "prompt": item.prompt,
        "completion": answer.text,
        "gold": gold,
        "right": answer.right,
        "tokens": answer.tokens,
        "thought_tokens": answer.thought,
        "cut": answer.cut,
        "metrics": answer.measured or {},
    }


def _completions(loaded: Loaded, items: Sequence[Item]) -> list[Completion]:
    plan, tokenizer = loaded.plan, loaded.tokenizer
    task, kwargs = plan.task, plan.template_kwargs
    examples = [Example(prompt=chat_or_plain(item.prompt, loaded.policy), row=item.row) for item in items]
    if not isinstance(task, DialogueTask):
        write = partial(loaded.write, temperature=plan.temperature)
        return in_one_turn(write, tokenizer, kwargs, loaded.ends)(examples)
    held = partial(
        plain_dialogues,
        partial(loaded.write, max_new_tokens=task.turn_tokens, temperature=plan.temperature),
        tokenizer,
        task,
        most_tokens=plan.max_new_tokens,
        template_kwargs=kwargs,
        ends=loaded.ends,
    )
    return in_dialogue(held, tokenizer, loaded.ends)(examples)


def is_cut(loaded: Loaded, ids: list[int], limit: int) -> bool:
    return len(ids) >= limit and ids[-1] not in loaded.ends


def _tiny(plan: Plan) -> Path:
    assert plan.task is not None
    task = taught_task(plan.recipe, plan.task)
    with warm_start_progress() as show:
        return make_tiny_policy(plan.recipe.policy, task, show)


def _too_long(name: str, limit: int, longest: int, context: int) -> UserError:
    problem = f"{limit} and the longest prompt ({longest} tokens) exceed the context of {name}, {context} tokens."
    fix = f"Add trainer.max_completion_length={context - longest}." if longest < context else "Ask shorter prompts."
    return UserError("trainer.max_completion_length", problem, fix)
