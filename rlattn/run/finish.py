"""The end of a run: the supervised control, summary.json, the report, what to do next. One rank, nothing collective."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rlattn.formats.effort import by_effort
from rlattn.formats.strict_json import to_json
from rlattn.grpo.dialogues import plain_dialogues
from rlattn.grpo.held_out import Evaluation, in_dialogue, in_one_turn, score_greedy, summarise
from rlattn.policy.generate import write_hf
from rlattn.progress import duration, progress, visible
from rlattn.rank import say
from rlattn.recipe.constraints import number
from rlattn.recipe.schema import Recipe
from rlattn.report import write_report
from rlattn.run.build import Setup, taught_task
from rlattn.run_folder.folder import write_text
from rlattn.run_folder.jsonl import read_rows
from rlattn.types import DialogueTask, Example, WarmStart, WarmStartable

SAMPLE_SHOWN = 240  # characters


def finish(setup: Setup, after: Evaluation | None, result: Any, seconds: float, start_step: int) -> None:
    """The control, the summary, the report, and what to do next. One rank, nothing collective."""
    recipe, run = setup.recipe, setup.recipe.run_dir
    rows = list(read_rows(run / "metrics.jsonl"))
    before = next((row for row in rows if row["step"] == 0 and "eval/accuracy" in row), None)
    tokens = next((row["num_tokens"] for row in reversed(rows) if row.get("num_tokens")), 0)
    summary = {
        "name": recipe.name,
        "max_steps": result.global_step,
        "start_step": start_step,  # of this session, whose seconds these are
        "seconds": round(seconds, 1),
        "tokens": tokens,
        "before": {k.removeprefix("eval/"): v for k, v in before.items() if k.startswith("eval/")} if before else None,
        "after": after.flat() if after else None,
    }
    write_text(run / "summary.json", to_json(summary, indent=2))  # the control may be interrupted
    if recipe.policy.supervised_control:
        write_report(run)
        summary["supervised_control"] = supervised_control(setup, tokens).flat()
    write_text(run / "summary.json", to_json(summary, indent=2))
    report = write_report(run)
    say(closing_words(recipe, summary, report))


def supervised_control(setup: Setup, rl_tokens: int) -> Evaluation:
    """The warm start's own training continued on as much compute as RL had, from the same policy, on the same rows.

    RL spends 2P a token to generate and 6P to train, supervised training 6P (P parameters), hence 4/3 of RL's tokens.
    """
    from rlattn.policy.tiny import train_supervised

    recipe, tokenizer = setup.recipe, setup.policy.tokenizer
    warm_start = recipe.policy.warm_start or WarmStart()
    task = taught_task(recipe, setup.task)
    assert isinstance(task, WarmStartable)
    budget = math.ceil(rl_tokens * 4 / 3)
    model = AutoModelForCausalLM.from_pretrained(setup.policy.path, dtype=torch.float32)
    say("\nRL is done. For comparison: the same compute spent on more supervised training (tokens).")
    with progress("supervised control", budget) as update:
        train_supervised(
            model,
            tokenizer,
            task,
            noise=warm_start.noise,
            batch_size=warm_start.batch_size,
            learning_rate=warm_start.learning_rate,
            seed=recipe.seed + 1,
            system_prompt=recipe.policy.system_prompt,
            token_budget=budget,
            progress=lambda done, of, loss: update(done, f"loss {loss:.3f}"),
        )
    batch = number(recipe, "per_device_eval_batch_size", 8)
    most_tokens, kwargs = number(recipe, "max_completion_length", 512), recipe.template_kwargs

    write = partial(write_hf, model, tokenizer, stop_strings=recipe.policy.stop_strings)

    def converse(examples: Sequence[Example]) -> list[tuple[list[int], list[bool]]]:
        task: Any = setup.task
        turn = partial(write, max_new_tokens=task.turn_tokens)
        return plain_dialogues(turn, tokenizer, task, examples, most_tokens=most_tokens, template_kwargs=kwargs)

    if isinstance(setup.task, DialogueTask):
        generate = in_dialogue(converse, tokenizer)
    else:
        generate = in_one_turn(partial(write, max_new_tokens=most_tokens), tokenizer, kwargs)
    outcomes, _ = score_greedy(
        generate,
        tokenizer,
        setup.task,
        setup.examples,
        calls=math.ceil(len(setup.examples) / batch),
        batch_size=batch,
        filler=setup.examples[0],
        template_kwargs=kwargs,
    )
    return summarise(outcomes)


def closing_words(recipe: Recipe, summary: dict[str, Any], report: Path) -> str:
    run = recipe.run_dir
    steps = summary["max_steps"] - summary["start_step"]
    whole = f", {summary['max_steps']} in all" if summary["start_step"] else ""
    lines = [f"\n{recipe.name}: {steps} steps in {duration(summary['seconds'])}{whole}"]
    before, after, control = summary["before"], summary["after"], summary.get("supervised_control")
    if before and after and "accuracy" in after:
        gain = 100 * (after["accuracy"] - before["accuracy"])
        lines += [
            f"  held-out accuracy before  {_evaluation_words(before)}",
            f"  held-out accuracy after   {_evaluation_words(after)}: {gain:+.1f} points",
        ]
    at_start = by_effort(before)
    for effort, (accuracy, tokens) in by_effort(after).items():
        was = ""
        if effort in at_start:
            was = f" (before {100 * at_start[effort][0]:.1f} %, {at_start[effort][1]:.0f} tokens)"
        lines.append(f"  at effort {effort}  {100 * accuracy:.1f} %, {tokens:.0f} tokens of thought{was}")
    if control:
        lines.append(f"  supervised training on, same compute, instead of RL: {_evaluation_words(control)}")
    samples = [sample for sample in read_rows(run / "samples.jsonl") if sample["step"] == summary["max_steps"]]
    for sample in samples[:1]:
        verdict = "not judged" if sample["score"] is None else "right" if sample["score"] >= 1 else "wrong"
        lines.append(f"  a held-out completion ({verdict}): {_short(sample['completion'])}")
    lines += [
        f"  model    {run / 'model'}",
        f"  report   {report}",
        f"  metrics  {run / 'metrics.jsonl'}",
        f"Next: open the report; `rlattn export {run}` to share the model; the same command again says it is complete.",
    ]
    return "\n".join(lines)


def _short(text: str) -> str:
    line = visible(" ".join(text.split()))
    return line if len(line) <= SAMPLE_SHOWN else f"{line[: SAMPLE_SHOWN // 2]} … {line[-SAMPLE_SHOWN // 2 :]}"


def _evaluation_words(values: dict[str, Any]) -> str:
    names = Evaluation.__dataclass_fields__
    unknown = dict.fromkeys(("accuracy", "low", "high"))
    return str(Evaluation(**{**unknown, **{name: values[name] for name in names if name in values}}))
