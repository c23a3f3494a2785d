"""Task spaces that are small, skewed, huge or ambiguous: a run gets both splits, or one clear refusal."""

from itertools import product

import pytest

from rlattn.errors import UserError
from rlattn.formats.yaml import parse_yaml
from rlattn.tasks import Arithmetic, Countdown, Ledger, Questions
from rlattn.tasks.questions.task import MOST_QUESTIONS


def written(folder, attributes):
    file = folder / "space.yaml"
    lines = "".join(f"  {name}: {spec}\n" for name, spec in attributes.items())
    file.write_text(f"about: a thing\nattributes:\n{lines}")
    return str(file)


PAIRS = ("[small, large]", "[yes, no]", "[day, night]", "[round, square]", "{common: 1, rare: 1e-9}")


@pytest.mark.parametrize(("first", "second"), [*product(PAIRS, PAIRS)])
def test_the_smallest_spaces_have_both_splits_and_share_nothing(tmp_path, first, second):
    path = written(tmp_path, {"size": f"{{values: {first}}}", "kind": f"{{values: {second}}}"})
    task = Questions(path=path, train_rows=20, eval_rows=20)
    rows = {split: [tuple(row["specification"].values()) for row in task.rows(split)] for split in ("train", "eval")}
    assert len(rows["train"]) == len(rows["eval"]) == 20
    assert not set(rows["train"]) & set(rows["eval"])


def test_a_split_that_is_all_but_never_drawn_is_refused(tmp_path):
    values = ", ".join([*(f"x{i}: 1e-9" for i in range(40)), "common: 1"])
    path = written(tmp_path, {"size": f"{{values: {{{values}}}}}", "kind": f"{{values: {{{values}}}}}"})
    with pytest.raises(UserError, match=r"task\.path: .* too seldom"):
        [Questions(path=path, train_rows=20, eval_rows=20).rows(split) for split in ("train", "eval")]


@pytest.mark.parametrize("task", [Arithmetic, Countdown, Ledger, Questions])
def test_rows_are_counted_before_they_are_made(task):
    with pytest.raises(ValueError, match="train_rows: expected 1 to 1000000, found 100000000"):
        task(train_rows=100_000_000)
    with pytest.raises(ValueError, match="eval_rows: expected 1 to 1000000, found 0"):
        task(eval_rows=0)


def test_a_space_is_a_file_of_a_sensible_size(tmp_path):
    with pytest.raises(UserError, match="regular file"):
        Questions(path="/dev/zero")
    (tmp_path / "large.yaml").write_text("#" * 1_000_000)
    with pytest.raises(UserError, match="regular file of at most"):
        Questions(path=str(tmp_path / "large.yaml"))


def test_nested_aliases_are_refused_and_plain_ones_are_not():
    assert parse_yaml("a: &a [1, 2]\nb: *a", "r.yaml") == {"a": [1, 2], "b": [1, 2]}
    nested = [f"{name}: &{name} [{','.join([f'*{last}'] * 9)}]\n" for last, name in zip("abcdefgh", "bcdefghi")]
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(nested)
    with pytest.raises(UserError, match=r"aliases"):
        parse_yaml(bomb, "r.yaml")


def test_a_large_space_leaves_a_turn_for_the_specification(tmp_path):
    path = written(tmp_path, {f"thing{i}": f"{{values: [x{i}, y{i}]}}" for i in range(150)})
    assert Questions(path=path).questions == MOST_QUESTIONS == 63
    with pytest.raises(ValueError, match="turn_limit: expected 1 to 63, the most, found 64"):
        Questions(path=path, turn_limit=64)


def test_groups_that_tell_nothing_anywhere_are_refused(tmp_path):
    silent = dict.fromkeys(("size", "kind"), "{values: [a, b], groups: {any of them: [a, b]}}")
    with pytest.raises(UserError, match="none tells anything"):
        Questions(path=written(tmp_path, silent))
    assert Questions(path=written(tmp_path, {**silent, "size": "{values: [a, b]}"})).questions == 1
