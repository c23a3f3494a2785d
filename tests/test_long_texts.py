"""Texts that a policy may write without end: every parser returns, at a cost that grows with the length alone."""

import pytest

from rlattn.formats.final_answer import final_answer
from rlattn.formats.transcript import read_transcript
from rlattn.tasks import Questions
from rlattn.tasks.questions.wording import answer_allows, read_specification

LENGTH = 200_000
TASK = Questions(train_rows=1, eval_rows=1)
ROW = TASK.rows("eval")[0]


@pytest.mark.parametrize("piece", ["answer is", "Answer:", "the answer is\n"])
def test_an_answer_that_is_never_given_is_none(piece):
    assert final_answer(piece + " " * LENGTH) is None
    assert final_answer(piece + " " * LENGTH + "7") == "7"


def test_unclosed_tags_hold_nothing():
    specs, replies = "<spec>" * (LENGTH // 6), "<reply>" * (LENGTH // 7)
    assert read_specification(TASK.space, specs) is None
    assert read_transcript(replies) == [(replies, None)]
    assert TASK.verify(specs, ROW) == TASK.verify(replies, ROW) == 0


def test_stray_tags_do_not_hide_what_is_whole():
    text = "</reply> a <reply> b <reply> c </reply> </reply> d <reply> e"
    assert read_transcript(text) == [("</reply> a", "b <reply> c"), ("</reply> d <reply> e", None)]
    size = "<spec> size = small </spec>"
    assert read_specification(TASK.space, f"</spec> {size} </spec> <spec> size = large") == {"size": "small"}


def test_a_long_answer_is_read():
    text = "not small or " * (LENGTH // 13)
    assert answer_allows(TASK.space.attributes["size"], text) == {"medium", "large"}
