"""Adaptive effort: the line in the prompt, who gets which effort, what a thought's length is, and what it earns."""

import json
from random import Random
from statistics import fmean

import pytest
from conftest import rlattn

from rlattn.errors import UserError
from rlattn.formats.effort import AtEveryEffort, EffortDraw, at_effort, thought_tokens, with_effort_line
from rlattn.grpo.held_out import Outcome, summarise
from rlattn.grpo.trl_rows import eval_examples
from rlattn.preflight.check import check
from rlattn.recipe.load import load_recipe
from rlattn.recipe.schema import Policy
from rlattn.report.data import read_run
from rlattn.rewards.adaptive_effort import AdaptiveEffort, Thought, gated, update_averages
from rlattn.rewards.protocol import score_safely
from rlattn.tasks import Arithmetic, Countdown, DatasetTask
from rlattn.types import RewardBatch, Rollout

EFFORTS = (0.25, 0.5, 0.75, 1.0)
TASK = Arithmetic(terms=(2, 2), checks=(0, 8), train_rows=8, eval_rows=4)
ROWS = TASK.rows("train")
DRAW = EffortDraw(efforts=EFFORTS, seed=3)


def example(row):
    return {"prompt": [{"role": "user", "content": row["prompt"]}], "row": row}


# The line -------------------------------------------------------------------------------------------------------------


def test_the_line_stands_before_the_text_or_the_last_user_message():
    assert with_effort_line("What is 1 + 1?", 0.5) == "Effort: 0.50\nWhat is 1 + 1?"
    chat = [
        {"role": "system", "content": "Think."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "1 + 1?"},
    ]
    written = with_effort_line(chat, 1.0)
    assert [message["content"] for message in written] == ["Think.", "Hello", "Hi", "Effort: 1.00\n1 + 1?"]
    assert chat[3]["content"] == "1 + 1?"
    image = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    assert with_effort_line(image, 0.25)[0]["content"][0] == {"type": "text", "text": "Effort: 0.25\n"}
    with pytest.raises(UserError, match="no user message"):
        with_effort_line([{"role": "system", "content": "Think."}], 0.5)


def test_the_row_carries_the_effort_and_keeps_the_prompt_as_it_was():
    asked = at_effort(example(ROWS[0]), 0.75)
    assert asked["row"] == {**ROWS[0], "effort": 0.75}
    assert asked["prompt"][0]["content"] == f"Effort: 0.75\n{ROWS[0]['prompt']}"
    with pytest.raises(UserError, match="a column 'effort' of their own"):
        at_effort(example({**ROWS[0], "effort": "low"}), 0.75)


def test_a_row_meets_every_effort_once_in_as_many_epochs_and_another_in_the_next():
    drawn = [[DRAW(example(row), epoch)["row"]["effort"] for epoch in range(8)] for row in ROWS]
    assert all(sorted(efforts[:4]) == sorted(efforts[4:]) == list(EFFORTS) for efforts in drawn)
    assert len({tuple(efforts) for efforts in drawn}) > 4
    again = [[DRAW(example(row), epoch)["row"]["effort"] for epoch in range(8)] for row in ROWS]
    other_seed = EffortDraw(efforts=EFFORTS, seed=4)
    assert drawn == again
    assert drawn != [[other_seed(example(row), epoch)["row"]["effort"] for epoch in range(8)] for row in ROWS]


def test_evaluation_asks_every_row_at_every_effort_and_counts_it_once():
    policy = Policy(path="tiny-reasoner", system_prompt="Think.")
    for task in (TASK, Countdown(numbers=(3,), train_rows=8, eval_rows=2), words()):
        swept = eval_examples(task, policy, EFFORTS)
        assert [e["effort"] for e in swept[:4]] == list(EFFORTS)
        assert swept[0]["prompt"][0]["content"] == "Think."
        assert swept[0]["prompt"][-1]["content"].startswith("Effort: 0.25\n")
    outcomes = [
        Outcome(right=float(effort == 1 or row == 0), tokens=9, thought=int(8 * effort), effort=effort, measured={})
        for row in range(2)
        for effort in EFFORTS
    ]
    result = summarise(outcomes).flat()
    assert (result["accuracy"], result["rows"]) == (5 / 8, 2)
    assert (result["effort_0.25/accuracy"], result["effort_0.25/tokens"]) == (0.5, 2)
    assert (result["effort_1.00/accuracy"], result["effort_1.00/tokens"]) == (1, 8)


def words():
    return DatasetTask(path="data/word_problems.jsonl", columns={"prompt": "question"}, eval_rows=2)


def test_the_warm_start_reads_the_line_and_leans_its_checks_on_it():
    taught = AtEveryEffort(task=TASK, efforts=EFFORTS)
    rows = taught.rows("train")
    assert len(rows) == 4 * len(ROWS)
    assert rows[1]["prompt"] == f"Effort: 0.50\n{ROWS[0]['prompt']}"
    checks = [fmean(taught.trace(row, Random(i), 0.5).count("check") for i in range(300)) for row in rows[:4]]
    assert checks == pytest.approx([8 * (0.25 + 0.4 * effort) for effort in EFFORTS], abs=0.4)
    assert taught.verify(taught.gold(rows[1]), rows[1]) == 1


# Lengths --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "length"),
    [
        (["<think>", " a", " b", "</think>", " 7"], 4),
        ([" ", "<th", "ink", ">", " a", " b", "</", "think", "> 7", " end"], 9),  # a tag of several tokens
        (["so ", "<think>", " a", "</think>", " 7"], 5),  # thought before the block
        (["<think>", "</think>", *[" a"] * 9, " 7"], 12),  # thought after it
        (["<think>", *[" a"] * 10, "</think>", *[" a"] * 3], 12),  # an answer of a quarter of it
        (["<think>", *[" a"] * 10, "</think>", *[" a"] * 12], 21),  # half of the solution behind it
        ([" a"] * 10 + ["</think>"] + [" a"] * 10, 21),  # nobody opened the block that this closes
        (["<think>", " a", " b", " c"], 4),  # cut
        (["</think>", "<think>", " a", " b"], 4),
        (["<think>", "</think>", "<think>", " a", "</think>", " 7"], 6),
        ([" a"] * 9 + ["</think>", " 7", "<think>"], 12),  # thought in one block, shown another
        (["7", " apples", "<end>"], 3),
        (["<think>", "</think>", "7"], 3),
        ([], 0),
    ],
)
def test_a_thought_is_counted_in_tokens_of_its_block(pieces, length):
    assert thought_tokens(range(len(pieces)), lambda ids: "".join(pieces[i] for i in ids), "P") == length


@pytest.mark.parametrize(
    ("pieces", "length"),
    [
        ([" a", " b", " c", "</think>", " 7"], 4),
        (["</think>", *[" a"] * 9, " 7"], 11),
        (["<think>", " a", "</think>", " 7"], 4),  # opened twice
    ],
)
def test_a_thought_that_the_prompt_opened_counts_as_one(pieces, length):
    def decode(ids):
        return "".join(pieces[i] for i in ids)

    assert thought_tokens(range(len(pieces)), decode, "P <think>\n") == length


# The reward -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gate", "effort", "length", "value"),
    [
        ("soft", 0.5, 60, 40 / 60),
        ("soft", 0.5, 40, 1),
        ("soft", 0.5, 10, 1),
        ("soft", 0.25, 160, 0.125),
        ("hard", 0.5, 41, 0),
        ("hard", 0.5, 40, 1),
    ],
)
def test_gates_worked_by_hand(gate, effort, length, value):
    assert gated(gate, effort, length, average=80) == pytest.approx(value)
    row = {**ROWS[0], "effort": effort}
    right, wrong = TASK.gold(ROWS[0]), "<answer> 9999 </answer>"
    reward = AdaptiveEffort(gate=gate)
    assert reward.score(rollout(right, row, note=Thought(length, 80))) == pytest.approx(value)
    assert reward.score(rollout(wrong, row, note=Thought(length, 80))) == 0


def rollout(completion, row, *, ids=(), group=0, note=None):
    shared = {"prompt": "", "prompt_text": "", "task": TASK}
    return Rollout(completion=completion, completion_ids=tuple(ids), row=row, group=group, note=note, **shared)


@pytest.mark.parametrize("gate", ["soft", "hard"])
def test_gold_scores_1_at_the_largest_effort_however_long(gate):
    row = {**ROWS[0], "effort": 1.0}
    for note in (None, Thought(10**6, 1)):
        assert AdaptiveEffort(gate=gate).score(rollout(TASK.gold(row), row, note=note)) == 1


def test_the_running_average_starts_at_its_group_and_moves_by_rate():
    averages = {}
    update_averages(averages, [("a", 10), ("a", 30), ("b", 7)], 0.25)
    assert averages == {"a": 20, "b": 7}
    update_averages(averages, [("a", 40), ("a", 80)], 0.25)
    assert averages == {"a": 30, "b": 7}


def prepared(reward, per_rank):
    """What `prepare` gives on every rank, and its metrics; the gather is that of all ranks together."""
    facts = []

    def batch(rollouts, gather, log):
        how = {"generate": None, "decode": lambda ids: "x" * len(ids), "log": log}
        return RewardBatch(rollouts=tuple(rollouts), step=0, gather=gather, **how)

    logged = {}
    for rollouts in per_rank:  # first what every rank would send
        AdaptiveEffort().prepare(batch(rollouts, lambda own: facts.extend(own) or own, lambda *_: None))
    notes, states = [], []
    for rollouts in per_rank:
        copy = AdaptiveEffort(gate=reward.gate, average=reward.average, rate=reward.rate)
        copy.load_state_dict(json.loads(json.dumps(reward.state_dict())))
        notes += copy.prepare(batch(rollouts, lambda own: facts, logged.__setitem__))
        states.append(copy.averages)
    assert all(state == states[0] for state in states), "ranks disagree"
    reward.load_state_dict({"averages": states[0]})
    return notes, logged


def group(row, effort, lengths, number):
    return [rollout("", {**row, "effort": effort}, ids=range(length), group=number) for length in lengths]


@pytest.mark.parametrize("average", ["ema", "group"])
def test_averages_are_the_same_however_a_batch_is_split_over_ranks(average):
    first = [*group(ROWS[0], 0.25, [10, 20, 30, 40], 0), *group(ROWS[1], 1.0, [8, 8, 8, 16], 1)]
    # the first query again at another effort, twice in one batch
    second = [*group(ROWS[0], 1.0, [60, 60, 80, 80], 0), *group(ROWS[0], 0.5, [10, 10, 20, 20], 1)]
    results = []
    for cuts in ([8], [6, 2], [3, 5], [1, 7]):
        reward = AdaptiveEffort(average=average, rate=0.5)
        found = []
        for rollouts in (first, second):
            parts = [rollouts[: cuts[0]], rollouts[cuts[0] :]] if len(cuts) > 1 else [rollouts]
            found.append(prepared(reward, parts))
        results.append(found)
    assert all(result == results[0] for result in results)
    (notes, logged), (later, later_logged) = results[0]
    assert [(note.length, note.average) for note in notes] == [
        (length, 25) for length in (10, 20, 30, 40)
    ] + [(length, 10) for length in (8, 8, 8, 16)]  # fmt: skip
    if average == "group":
        assert [note.average for note in later] == [70] * 4 + [15] * 4
    else:
        assert [note.average for note in later] == [25 + 0.5 * (42.5 - 25)] * 8
    assert logged["effort/0.25/tokens"] == 25
    assert logged["effort/0.25/within"] == 0
    assert logged["effort/1.00/within"] == 0.75
    assert set(later_logged) == {f"effort/{e}/{what}" for e in ("0.50", "1.00") for what in ("tokens", "within")} | {
        "effort/average"
    }


@pytest.mark.parametrize("effort", [None, "0.5", 0, 1.5, True, float("nan")])
def test_a_row_without_a_sound_effort_is_said(effort):
    row = {**ROWS[0], **({} if effort is None else {"effort": effort})}
    bad = rollout(TASK.gold(ROWS[0]), row, ids=range(5))
    notes, _ = prepared(AdaptiveEffort(), [[bad]])  # must not keep other ranks waiting
    assert notes[0].length == 5
    value, problem = score_safely(AdaptiveEffort(), bad)
    assert value is None
    assert "set task.efforts" in problem


# Recipes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task={kind: arithmetic}"], r"task.efforts: is required by rewards.adaptive_effort.*Add efforts"),
        (["task.efforts=[0.5, 1.5]"], r"task.efforts: expected numbers above 0 and up to 1.*got 1.5"),
        (["task.efforts=[0, 1]"], r"task.efforts: .*got 0"),
        (["task.efforts=[0.125, 1]"], "two decimals"),
        (["task.efforts=[0.5, 0.75]"], "expected 1.0 among them"),
        (["task.efforts=[1, 1]"], "at least two different"),
        (["task.efforts=[low, 1]"], r"task.efforts.0: expected a valid number.*'low'"),
        (["rewards.adaptive_effort={gate: firm}"], r"rewards.adaptive_effort.gate: expected one of soft, hard"),
        (["rewards.adaptive_effort={rate: 0}"], r"rewards.adaptive_effort.rate: expected more than 0"),
        (["task.checks=[3, 1]"], r"task.checks: expected \[fewest, most\]"),
    ],
)
def test_bad_input_is_refused_by_check(overrides, message):
    with pytest.raises(UserError, match=message):
        check(load_recipe("recipes/effort_tiny.yaml", overrides), ranks=1, gpu_memory=None)


# A run ----------------------------------------------------------------------------------------------------------------

QUICK = (
    "policy.warm_start={steps: 8, batch_size: 16}",
    "task={kind: arithmetic, terms: [2, 2], checks: [0, 2], eval_rows: 6, rl_rows: 4, efforts: [0.5, 1.0]}",
    "rewards.accuracy={weight: 0.1}",
    "trainer={max_steps: 2, num_generations: 4, per_device_train_batch_size: 6, max_completion_length: 32,"
    " learning_rate: 1e-3, gradient_checkpointing: false, save_steps: 2, per_device_eval_batch_size: 8}",
)


def test_a_run_on_two_ranks_sweeps_the_efforts_and_keeps_the_averages(tmp_path):
    result = rlattn("train", "effort_tiny", *QUICK, cwd=tmp_path, ranks=2)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs/effort-tiny"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in (rows[0], rows[-1]):
        assert row["eval/rows"] == 6
        halves = [row["eval/effort_0.50/accuracy"], row["eval/effort_1.00/accuracy"]]
        assert sum(halves) / 2 == pytest.approx(row["eval/accuracy"])
        assert row["eval/effort_0.50/tokens"] > 0
    assert all(row["rewards/adaptive_effort/failed"] == 0 and row["effort/average"] > 0 for row in rows[1:])
    averages = json.loads((run / "checkpoints/checkpoint-2/rewards.json").read_text())["adaptive_effort"]["averages"]
    assert 3 <= len(averages) <= 4  # three groups a step, on four rows
    assert "at effort 0.50" in result.stdout
    sweep = next(chart for chart in read_run(run)["curves"] if chart["title"] == "Thought against effort")
    assert [series["name"] for series in sweep["series"]] == ["step 0", "step 2"]
    assert [effort for effort, _ in sweep["series"][0]["points"]] == [0.5, 1]
