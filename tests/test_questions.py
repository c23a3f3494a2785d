"""Questions, answers and specifications as people write them; dialogues replayed; the task's promises."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlattn.formats.transcript import read_transcript, runs, write_transcript
from rlattn.rewards import REWARDS
from rlattn.rewards.information_gain import turn_parts, turn_values
from rlattn.tasks import Questions
from rlattn.tasks.questions.belief import greedy_gain, random_gain
from rlattn.tasks.questions.task import UNCLEAR
from rlattn.tasks.questions.wording import answer_allows, question_about, read_specification
from rlattn.types import DialogueTask, Rollout, WarmStartable

PARCEL = Questions(train_rows=50, eval_rows=20)
DIAGRAM = Questions(path="data/task_spaces/diagram.yaml", train_rows=50, eval_rows=20)
SPACE = PARCEL.space
ROW = {
    "prompt": "?",
    "specification": {
        "destination": "japan", "contents": "batteries", "service": "express", "size": "small", "payment": "card",
        "signature": "none",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "attribute"),
    [
        ("Where does the parcel go?", "destination"),
        ("where does the parcel go", "destination"),
        ("Could you tell me the destination, please?", "destination"),
        ("And the SIZE?", "size"),
        ("Which sizes?", "size"),
        ("Is it small or large?", "size"),
        ("Shall we send it express?", "service"),
        ("Where is it supposed to go?", "destination"),
        ("What will it be carried by?", None),
        ("What is the size and the destination?", None),
        ("Small, and to Japan?", None),
        ("Hello!", None),
        ("", None),
    ],
)
def test_which_attribute_a_question_is_about(text, attribute):
    assert question_about(SPACE, text) == attribute


SIZE = {"small", "medium", "large"}


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("The size is small.", {"small"}),
        ("Well, the size is SMALL, I think.", {"small"}),
        ("Small.", {"small"}),
        ("small or medium", {"small", "medium"}),
        ("Either small or medium, I think.", {"small", "medium"}),
        ("Not large.", {"small", "medium"}),
        ("It isn't large", {"small", "medium"}),
        ("neither small nor large", {"medium"}),
        ("Not small, but large.", {"large"}),
        ("It's medium, not small.", {"medium"}),
        ("I have no preference.", SIZE),
        ("I don't know", SIZE),
        ("not small, not medium, not large", None),
        ("Huge!", None),
        ("", None),
    ],
)
def test_what_an_answer_allows(text, allowed):
    assert answer_allows(SPACE.attributes["size"], text) == allowed


def test_partial_answers_and_values_that_look_like_negations():
    contents = SPACE.attributes["contents"]
    assert answer_allows(contents, "Something dangerous is in it.") == {"batteries", "perfume"}
    assert answer_allows(contents, "nothing dangerous, so not dangerous") == {"documents", "clothes"}
    assert answer_allows(contents, "just perfumes") == {"perfume"}
    assert answer_allows(SPACE.attributes["signature"], "A signature is none.") == {"none"}


def test_specifications_are_read_as_written():
    assert read_specification(SPACE, "<spec> size = small ; payment: Cash, colour = red </spec>") == {
        "size": "small",
        "payment": "cash",
    }
    assert read_specification(SPACE, "<spec>size = small\nsize = large</spec>") == {}
    assert read_specification(SPACE, "<spec>size = small</spec> or <spec>size = large</spec>") == {"size": "large"}
    assert read_specification(SPACE, "<spec> size = small") is None


@given(st.text())
def test_no_text_makes_a_parser_raise(text):
    question_about(SPACE, text)
    for attribute in SPACE.attributes.values():
        answer_allows(attribute, text)
    row = PARCEL.rows("eval")[0]
    assert PARCEL.reply(text, row) is None or isinstance(PARCEL.reply(text, row), str)
    assert PARCEL.verify(text, row) in (0, 1)
    PARCEL.metrics(text, row)


@pytest.mark.parametrize("task", [PARCEL, DIAGRAM])
def test_the_oracle_is_understood_about_everything(task):
    for row in task.rows("train"):
        for name, attribute in task.space.attributes.items():
            assert question_about(task.space, attribute.question) == name
            reply = task.reply(attribute.question, row)
            allowed = answer_allows(attribute, reply)
            assert row["specification"][name] in allowed
            assert allowed in attribute.answers.values()


@pytest.mark.parametrize("task", [PARCEL, DIAGRAM])
def test_gold_scores_one_and_splits_share_no_specification(task):
    assert isinstance(task, WarmStartable)
    assert isinstance(task, DialogueTask)
    train, held_out = list(task.rows("train")), list(task.rows("eval"))
    for row in train + held_out:
        assert task.verify(task.gold(row), row) == 1
        measured = task.metrics(task.gold(row), row)
        assert measured["attributes_right"] == measured["opened_best"] == 1
        assert measured["malformed"] == measured["unparsed"] == measured["contradictions"] == 0
    specifications = [tuple(row["specification"].values()) for row in train]
    assert not set(specifications) & {tuple(row["specification"].values()) for row in held_out}


def test_traces_ask_worse_with_noise():
    rng, rows = Random(0), Questions(train_rows=300).rows("train")
    shares = [
        sum(PARCEL.metrics(PARCEL.trace(row, rng, noise), row)["gain_share"] for row in rows) / len(rows)
        for noise in (0.0, 0.5, 1.0)
    ]
    assert shares[0] > 0.97
    assert shares[0] > shares[1] + 0.1 > shares[2] + 0.2
    assert shares[2] == pytest.approx(random_gain(PARCEL.space, 3) / greedy_gain(PARCEL.space, 3), abs=0.03)


def said(*turns):
    return write_transcript([(text, own) for text, own in turns])


def test_a_dialogue_is_replayed_turn_by_turn():
    text = said(
        ("What is the size?", True), ("The size is small.", False),
        ("And the size again?", True), ("The size is small.", False),
        ("Hm.", True), (UNCLEAR, False),
        ("What is in the parcel?", True), ("Something dangerous is in it.", False),
        ("Which size?", True), ("The size is large.", False),
        ("How will the customer pay?", True), ("Who knows", False),
        ("<spec> size = small </spec>", True),
    )  # fmt: skip
    turns = PARCEL.replay(text)
    assert [turn.kind for turn in turns] == [
        "question", "question", "malformed", "question", "question", "question", "specification",
    ]  # fmt: skip
    assert turns[0].gain == pytest.approx(1.4855, abs=1e-4)  # .5, .3, .2
    assert turns[1].gain == 0
    assert turns[3].gain == pytest.approx(1.7855 - 1, abs=1e-4)  # two equally likely values are left
    assert [turn.resolved for turn in turns] == [1, 0, 0, 0, 0, 0, 0]
    assert turns[4].problem == "contradiction"
    assert turns[5].problem == "unparsed"
    assert turns[4].gain == turns[5].gain == 0
    values = turn_values(PARCEL, text, "gain", 0.1)
    assert values[1] == values[2] == values[4] == pytest.approx(-0.1)
    assert values[-1] == 0
    assert turn_values(PARCEL, text, "resolved", 0)[0] == 1
    measured = PARCEL.metrics(text, ROW)
    assert (measured["malformed"], measured["unparsed"], measured["contradictions"]) == (1, 1, 1)
    assert measured["turns"] == 6


def test_a_rare_partial_answer_has_a_negative_gain_and_keeps_it():
    text = said(("Which arrows?", True), ("The arrows should be special.", False), ("<spec> </spec>", True))
    assert DIAGRAM.replay(text)[0].gain == pytest.approx(0.8476 - 1.585, abs=1e-3)


def test_the_policy_cannot_put_words_into_the_customers_mouth():
    forged = "What is the size? <reply> The size is small. </reply> Where does the parcel go?"
    turns = read_transcript(said((forged, True), (UNCLEAR, False), ("<spec> size = small </spec>", True)))
    assert len(turns) == 2
    assert turns[0][1] == UNCLEAR
    assert [turn.gain for turn in PARCEL.replay(said((forged, True), (UNCLEAR, False)))] == [0]


def test_only_the_last_turn_may_be_the_specification():
    asked = ("What is the size?", True), ("The size is small.", False)
    early = PARCEL.replay(said(("<spec> size = small </spec>", True), ("Sorry?", False), *asked))
    assert [turn.kind for turn in early] == ["malformed", "question"]


def test_a_replys_nested_tags_make_no_reply():
    assert len(read_transcript(said(("Who?", True), ("<re<reply>ply> big </re</reply>ply> x", False)))) == 1


def test_a_thought_is_not_said_aloud():
    thinking = "<think> size or destination? </think> What is the size?"
    assert PARCEL.reply(thinking, ROW) == "The size is small."
    assert PARCEL.reply("<think> the size? small </think> <spec> size = small </spec>", ROW) is None
    assert PARCEL.reply("<think> <spec> size = small </spec> What is the size", ROW) == UNCLEAR
    assert PARCEL.replay(said((thinking, True), ("The size is small.", False)))[0].gain > 1


def test_only_the_last_turn_may_give_the_answer():
    right = PARCEL.gold(ROW)
    assert PARCEL.verify(right, ROW) == 1
    assert PARCEL.verify(said((right.rpartition("</reply>")[2], True), ("The size is small.", False)), ROW) == 0


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_every_turn_speaks_for_its_own_tokens(mask):
    spans = [(start, end) for start, end, own in runs(mask) if own]
    rollout = Rollout(
        prompt="", prompt_text="", completion="", completion_ids=tuple(range(len(mask))), policy_mask=tuple(mask),
        row=ROW, task=PARCEL,
    )  # fmt: skip
    if not any(mask):
        return
    parts = turn_parts(rollout, [float(number) for number in range(len(spans))])
    assert [sum(flags) for flags in zip(*(flags for _, flags in parts))] == [int(own) for own in mask]
    for number, (value, flags) in enumerate(parts):
        assert value == number
        assert all(flags[slice(*spans[number])])


def test_rewards_of_a_transcript():
    gold = PARCEL.gold(ROW)
    rollout = Rollout(prompt="", prompt_text="", completion=gold, row=ROW, task=PARCEL)
    assert REWARDS["accuracy"]().score(rollout) == REWARDS["specification"]().score(rollout) == 1
    half = Rollout(prompt="", prompt_text="", completion="<spec> size = small </spec>", row=ROW, task=PARCEL)
    assert REWARDS["specification"]().score(half) == pytest.approx(1 / 6)
    assert REWARDS["information_gain"](turn_cost=0).score(rollout) == pytest.approx(6.0029, abs=1e-3)
    assert REWARDS["information_gain"](turn_cost=0.5).score(rollout) == pytest.approx(4.5029, abs=1e-3)
    assert REWARDS["information_gain"](measure="resolved", turn_cost=0).score(rollout) == 3
    assert REWARDS["information_gain"](turn_credit=False).parts(rollout) == []
