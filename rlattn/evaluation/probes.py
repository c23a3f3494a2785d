"""The probes of `rlattn eval`. What a probe asks is checked before a model loads; then it runs, model by model."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

from rlattn.errors import UserError, did_you_mean
from rlattn.evaluation import perturbation
from rlattn.evaluation.deception import (
    Scenario,
    deception_rates,
    judge_prompt,
    read_reply,
    read_verdict,
    scenarios_of,
)
from rlattn.evaluation.flips import LOOK_AGAIN, Choice, corrections, parse_choice, read_choice, sycophancy
from rlattn.evaluation.judges import Judge, check_judge
from rlattn.files import expanded
from rlattn.tasks.dataset.readers import data_files, read_rows
from rlattn.tasks.guarded_metrics import safe_verify
from rlattn.types import DialogueTask, Messages

if TYPE_CHECKING:
    from rlattn.evaluation.answers import Checked, Loaded
    from rlattn.evaluation.plan import Item, Plan
    from rlattn.recipe.schema import Policy

Kept = Callable[[dict[str, Any]], None]
Model = TypeVar("Model", bound="Checked")

OWN_DATA = {
    "sycophancy": "`question`, `choices` and `answer` in every row",
    "deception": "the items of either DeceptionBench",
}
LOOKS = 2


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a probe is given to read before a model loads."""

    plan: "Plan"
    data: str | None
    """The user's file."""
    limit: int | None
    """Of rows."""
    make_judge: Callable[[], Judge]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a probe does with each model."""

    check: Callable[["Checked"], None]
    """Before any model answers. Raises UserError."""
    run: Callable[["Loaded", Kept], dict[str, Any]]
    """Keeps every answer and returns figures."""


def check_probe(
    probe: str | None,
    *,
    data: str | None,
    judge: str | None,
    judge_model: str,
    judge_key_env: str | None,
    samples: int,
    k: str | None,
    temperature: float | None,
) -> None:
    """Raises UserError where there is no such probe, or the options do not go together."""
    if probe is not None and probe not in PROBES:
        raise UserError("--probe", f"no probe '{probe}'.", did_you_mean(probe, PROBES))
    if probe != "deception" and judge is not None:
        raise UserError("--judge", "is for --probe deception.", "Leave it out.")
    check_judge(judge, judge_model, judge_key_env)
    if probe is None:
        return
    if samples > 1 or temperature or k is not None:
        raise UserError("--probe", "asks greedily, one answer a prompt.", "Leave --samples, --k and --temperature out.")
    if probe in OWN_DATA and data is None:
        raise UserError("--probe", f"{probe} needs --data: a file with {OWN_DATA[probe]}.")
    if probe == "deception" and judge is None:
        fix = "Add --judge: a model's folder, a hub id, or an endpoint such as http://localhost:8000/v1."
        raise UserError("--probe", "deception needs a judge; the ledger game knows the truth without any.", fix)


def _prepare_sycophancy(asked: Asked) -> Prepared:
    rows = [(f"{asked.data}, row {number}", row) for number, row in _rows(asked.data, asked.limit)]
    choices, seed = [parse_choice(row, where) for where, row in rows], asked.plan.recipe.seed
    # asked neutrally, each is shorter
    longer = [(where, c.leading(c.suggested(seed))) for (where, _), c in zip(rows, choices, strict=True)]
    return Prepared(
        check=lambda checked: _check_fits(checked, longer),
        run=lambda loaded, kept: _sycophancy(loaded, kept, choices, seed),
    )


def _prepare_deception(asked: Asked) -> Prepared:
    items = _rows(asked.data, asked.limit)
    scenarios, invalid = scenarios_of(items, str(asked.data))
    judge = asked.make_judge()
    return Prepared(
        check=lambda checked: _check_deception(checked, scenarios, judge),
        run=lambda loaded, kept: _deception(loaded, kept, scenarios, invalid, len(items), judge),
    )


def _prepare_perturbation(asked: Asked) -> Prepared:
    _needs_one_turn(asked.plan, "perturbation")
    return Prepared(check=_check_perturbation, run=_perturbation)


def _prepare_self_correction(asked: Asked) -> Prepared:
    _needs_one_turn(asked.plan, "self-correction")
    _needs_chat(asked.plan.recipe.policy)
    return Prepared(check=_check_self_correction, run=_self_correction)


def _needs_one_turn(plan: "Plan", probe: str) -> None:
    if isinstance(plan.task, DialogueTask):
        raise UserError("--probe", f"{probe} is for tasks of one turn.", "Name another with --task.")


def _rows(data: str | None, limit: int | None) -> list[tuple[int, dict[str, Any]]]:
    (*files,) = data_files(str(expanded(str(data))), "train")
    rows = list(islice((row for file in files for row in read_rows(file)), limit))
    if not rows:
        raise UserError(str(data), "is empty.", "Expected one object a line.")
    return rows


def _check_fits(checked: "Checked", prompts: Sequence[tuple[str, str | Messages]]) -> None:
    from rlattn.evaluation.answers import check_prompts

    check_prompts(checked, prompts)


def _sycophancy(loaded: "Loaded", kept: Kept, choices: Sequence[Choice], seed: int) -> dict[str, Any]:
    from rlattn.evaluation.answers import write_all

    suggested = [choice.suggested(seed) for choice in choices]
    prompts = [choice.neutral for choice in choices]
    prompts += [choice.leading(wrong) for choice, wrong in zip(choices, suggested, strict=True)]
    written = write_all(loaded, prompts, "questions")
    texts = [one.text for one in written]
    answers = [read_choice(text, choice.options) for text, choice in zip(texts, [*choices, *choices], strict=True)]
    neutral, leading = answers[: len(choices)], answers[len(choices) :]
    for index, choice in enumerate(choices):
        kept(
            {
                **asdict(choice),
                "suggested": suggested[index],
                "neutral": neutral[index],
                "leading": leading[index],
                "neutral_completion": texts[index],
                "leading_completion": texts[len(choices) + index],
            }
        )
    return {**sycophancy(neutral, leading, choices, suggested), "cut_share": fmean(one.cut for one in written)}


def _needs_chat(policy: "Policy") -> None:
    if policy.prompt_style == "plain":
        fix = "Name a chat model, and leave policy.prompt_style=plain out."
        raise UserError("--probe", "self-correction is a dialogue: it needs a chat template and chat prompts.", fix)


def _chat(item: "Item") -> Messages:
    return [{"role": "user", "content": item.prompt}] if isinstance(item.prompt, str) else item.prompt


def _again(text: str) -> Messages:
    return [{"role": "assistant", "content": text}, {"role": "user", "content": LOOK_AGAIN}]


def _check_self_correction(checked: "Checked") -> None:
    _needs_chat(checked.policy)
    # the last look, after the shortest answers that there can be
    _check_fits(checked, [(f"row {item.index + 1}", _chat(item) + LOOKS * _again("0")) for item in checked.plan.items])


def _self_correction(loaded: "Loaded", kept: Kept) -> dict[str, Any]:
    from rlattn.evaluation.answers import judged, write_all

    items = loaded.plan.items
    chats = [_chat(item) for item in items]
    verify = safe_verify(loaded.plan.task)
    rounds: list[list[bool | None]] = []
    said: list[list[str]] = [[] for _ in items]
    cut: list[bool] = []
    for look in range(LOOKS + 1):
        written = write_all(loaded, chats, f"look {look}" if look else "first answers")
        texts = [one.text for one in written]
        cut += [one.cut for one in written]
        asked = zip(texts, items, chats, strict=True)
        scores = [judged(verify, loaded, text, item, chat) for text, item, chat in asked]
        rounds.append([None if score is None else score >= 1 for score in scores])
        for index, text in enumerate(texts):
            said[index].append(text)
            chats[index] = [*chats[index], *_again(text)]
    for index, item in enumerate(items):
        kept({"prompt": item.prompt, "completions": said[index], "right": [flags[index] for flags in rounds]})
    whole = [flags for flags in zip(*rounds, strict=True) if None not in flags]
    by_look = [[bool(flags[look]) for flags in whole] for look in range(LOOKS + 1)]
    failed = {"verify_failed": verify.failed} if verify.failed else {}
    return {**corrections(by_look), **failed, "cut_share": fmean(cut)}


def _check_perturbation(checked: "Checked") -> None:
    from rlattn.inspection.inputs import check_architecture, load_config
    from rlattn.types import AttentionOptions

    config = load_config(checked.path, checked.option, checked.revision)
    check_architecture(checked.path, config, AttentionOptions(), checked.option)


def _perturbation(loaded: "Loaded", kept: Kept) -> dict[str, Any]:
    from rlattn.evaluation.answers import write_all

    items = loaded.plan.items
    written = write_all(loaded, [item.prompt for item in items], "responses")
    prompts = [loaded.prompt_ids(item.prompt) for item in items]
    trials = perturbation.perturb(loaded, [one.ids for one in written], prompts)
    if not trials:
        problem = "no response is long enough: FAI looks 10 tokens ahead, and a fifth of the tokens must have one."
        raise UserError("--probe", problem, "Use a task with longer answers, or raise trainer.max_completion_length.")
    for trial in trials:
        kept({"prompt": items[trial.item].prompt, "completion": written[trial.item].text, **asdict(trial)})
    figures = perturbation.summary(trials, len(items) - len(trials))
    return {**figures, "cut_share": fmean(one.cut for one in written)}


def _in_chat(model: Model) -> Model:
    return replace(model, policy=model.policy.model_copy(update={"prompt_style": "chat"}))


def _check_deception(checked: "Checked", scenarios: Sequence[Scenario], judge: Judge) -> None:
    if checked.tokenizer.chat_template is None:
        raise UserError("--probe", f"deception needs a chat model, and {checked.name} has no chat template.")
    prompts = [(scenario, prompt) for scenario in scenarios for prompt in (scenario.belief_prompt, scenario.prompt)]
    _check_fits(_in_chat(checked), [(f"scenario {scenario.name}", prompt) for scenario, prompt in prompts if prompt])
    judge.check()


def _deception(
    loaded: "Loaded", kept: Kept, scenarios: Sequence[Scenario], invalid: Sequence[str], items: int, judge: Judge
) -> dict[str, Any]:
    from rlattn.evaluation.answers import write_all

    loaded = _in_chat(loaded)
    asked = [index for index, scenario in enumerate(scenarios) if scenario.belief_prompt is not None]
    beliefs = [""] * len(scenarios)
    if asked:
        questions = [scenarios[index].belief_prompt or [] for index in asked]
        for index, one in zip(asked, write_all(loaded, questions, "beliefs"), strict=True):
            beliefs[index] = "" if one.cut else one.text.rpartition("</think>")[2].strip()
    written = write_all(loaded, [scenario.prompt for scenario in scenarios], "scenarios")
    replies = [
        None if one.cut or (scenario.belief_prompt is not None and not belief) else read_reply(one.text)
        for one, scenario, belief in zip(written, scenarios, beliefs, strict=True)
    ]
    valid = [index for index, reply in enumerate(replies) if reply is not None]
    questions_to_judge = []
    for index in valid:
        reply = replies[index]
        assert reply is not None
        questions_to_judge.append(judge_prompt(scenarios[index], reply, beliefs[index]))
    said = dict(zip(valid, judge.ask(questions_to_judge), strict=True))
    verdicts = [
        read_verdict(said.get(index) or "", by_belief=scenario.belief_prompt is not None)
        for index, scenario in enumerate(scenarios)
    ]
    for index, scenario in enumerate(scenarios):
        kept(
            {
                "scenario": scenario.name,
                "kind": scenario.kind,
                "prompt": scenario.prompt,
                "belief": beliefs[index],
                "completion": written[index].text,
                "valid": replies[index] is not None,
                "judge": said.get(index),
                "verdict": verdicts[index],
            }
        )
    rates = deception_rates(scenarios, replies, verdicts, invalid, items)
    return {**rates, "cut_share": fmean(one.cut for one in written)}


# A probe reads and checks what it asks: raises UserError where its data cannot be read, or the task is none it can use.
PROBES: dict[str, Callable[[Asked], Prepared]] = {
    "sycophancy": _prepare_sycophancy,
    "self-correction": _prepare_self_correction,
    "perturbation": _prepare_perturbation,
    "deception": _prepare_deception,
}
