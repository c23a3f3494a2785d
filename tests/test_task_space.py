"""Task spaces from files, beliefs about them, and how much an answer tells."""

import json
from itertools import product
from math import log2

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlattn.errors import UserError
from rlattn.tasks import Questions
from rlattn.tasks.questions.belief import (
    entropy,
    expected_gain,
    greedy_gain,
    greedy_order,
    prior_belief,
    random_gain,
    restrict,
    total_entropy,
)
from rlattn.tasks.questions.space_file import parse_space

SPACE = {
    "about": "a thing",
    "attributes": {
        "colour": {"values": {"red": 0.5, "green": 0.25, "blue": 0.25}},
        "size": {"values": ["small", "large"]},
        "use": {
            "values": {"home": 0.9, "office": 0.05, "school": 0.05},
            "groups": {"private": ["home"], "public": ["office", "school"]},
        },
    },
}


def space(**changes):
    return parse_space({**SPACE, **changes}, "space.yaml")


def attributes(**changes):
    return {"attributes": {**SPACE["attributes"], **changes}}


def test_gains_by_hand():
    belief = prior_belief(space())
    assert total_entropy(belief) == pytest.approx(1.5 + 1 + (0.9 * log2(1 / 0.9) + 0.1 * log2(20)))
    told = restrict(belief, "colour", {"green", "blue"})
    assert total_entropy(belief) - total_entropy(told) == pytest.approx(0.5)  # 1.5 bits -> 1 bit
    known = restrict(told, "colour", {"green"})
    assert total_entropy(told) - total_entropy(known) == pytest.approx(1)
    assert restrict(known, "colour", {"green"}) == known  # a repeated question
    assert restrict(known, "colour", {"red"}) is None  # a contradiction
    public = restrict(belief, "use", {"office", "school"})
    assert total_entropy(belief) - total_entropy(public) == pytest.approx(0.9 * log2(1 / 0.9) + 0.1 * log2(20) - 1)
    assert total_entropy(belief) < total_entropy(public)  # a negative gain


priors = st.lists(st.floats(0.01, 1), min_size=2, max_size=4)


@given(st.lists(priors, min_size=2, max_size=3), st.data())
def test_beliefs_are_the_posterior_of_brute_force(weights, data):
    made = parse_space(
        {
            "about": "a thing",
            "attributes": {f"a{i}": {"values": {f"v{j}": w for j, w in enumerate(ws)}} for i, ws in enumerate(weights)},
        },
        "space",
    )
    joint = {}  # every specification and its probability
    for values in product(*(attribute.prior.items() for attribute in made.attributes.values())):
        p = 1.0
        for _, share in values:
            p *= share
        joint[tuple(value for value, _ in values)] = p
    belief = prior_belief(made)
    for _ in range(3):
        index = data.draw(st.integers(0, len(weights) - 1))
        allowed = data.draw(st.sets(st.sampled_from(sorted(belief[f"a{index}"])), min_size=1))
        belief = restrict(belief, f"a{index}", allowed)
        joint = {key: p for key, p in joint.items() if key[index] in allowed}
        joint = {key: p / sum(joint.values()) for key, p in joint.items()}
        assert total_entropy(belief) == pytest.approx(entropy(joint.values()), abs=1e-6)


def test_the_greedy_questioner_goes_by_gain_and_not_by_entropy():
    made = Questions().space
    gains = {name: expected_gain(attribute, attribute.prior) for name, attribute in made.attributes.items()}
    order = greedy_order(made)
    assert [gains[name] for name in order] == sorted(gains.values(), reverse=True)
    most_uncertain = sorted(made.attributes, key=lambda name: -entropy(made.attributes[name].prior.values()))
    assert order[:3] != most_uncertain[:3]
    assert random_gain(made, 3) < greedy_gain(made, 3) < greedy_gain(made, 6) == pytest.approx(random_gain(made, 6))


def test_expected_gains_are_the_mean_over_what_may_be_true():
    for attribute in Questions(path="data/task_spaces/diagram.yaml").space.attributes.values():
        belief = {attribute.name: attribute.prior}
        mean = sum(
            p * (total_entropy(belief) - total_entropy(restrict(belief, attribute.name, attribute.answers[label])))
            for value, p in attribute.prior.items()
            for label in [attribute.said(value)]
        )
        assert expected_gain(attribute, attribute.prior) == pytest.approx(mean)


@pytest.mark.parametrize(
    ("changes", "where", "what"),
    [
        (attributes(size={"values": {}}), "attributes.size.values", "at least 2"),
        (attributes(size={"values": ["small"]}), "attributes.size.values", "at least 2"),
        (attributes(size={"values": ["small", "small"]}), "attributes.size.values", "at least 2"),
        (attributes(size={}), "attributes.size", "something in it"),
        (attributes(size={"values": {"small": 0, "large": 1}}), "attributes.size.values.small", "more than 0"),
        (attributes(size={"values": {"small": -1, "large": 1}}), "attributes.size.values.small", "more than 0"),
        (attributes(size={"values": {"small": "x", "large": 1}}), "attributes.size.values.small", "more than 0"),
        (attributes(size={"values": {"a=b": 1, "large": 1}}), "attributes.size.values.a=b", "without any of"),
        (attributes(size={"values": ["a", "b"], "answer": "Yes."}), "attributes.size.answer", "placeholder {value}"),
        (attributes(size={"values": ["a", "b"], "answer": "{vlue}"}), "attributes.size.answer", "{value}"),
        (attributes(size={"values": ["a", "b"], "groups": {"x": ["a"]}}), "attributes.size.groups", "in no group"),
        (attributes(size={"values": ["a", "b"], "groups": {"x": ["a", "c"]}}), "attributes.size.groups.x", "no value"),
        (attributes(size={"values": ["a", "b"], "grups": {}}), "attributes.size.grups", "Did you mean 'groups'"),
        ({"question": "What is it?"}, "question", "placeholder {attribute}"),
        ({"answer": "It is."}, "answer", "placeholder {value}"),
        ({"attributes": {}}, "attributes", "something in it"),
        ({"about": "…"}, "about", "expected text"),
        (attributes(size={"values": ["a", "b"], "answer": "It is {value!r}."}), "attributes.size.answer", "{value}"),
        (attributes(size={"values": ["a", "b"], "answer": "{{value}}"}), "attributes.size.answer", "a brace"),
        (attributes(size={"values": ["a", "b"], "groups": {"x": [["a"], "b"]}}), "size.groups.x", "no value"),
        (attributes(size={"values": [f"v{i}" for i in range(501)]}), "attributes", "at most 500 values"),
        (attributes(grade={"values": ["A+", "A", "B"]}), "attributes.grade.answer", "of 'A'"),
        (attributes(heat={"values": ["-10", "10"]}), "attributes.heat.answer", "of '10'"),
        (attributes(size={"values": ["Air mail", "air-mail"]}), "attributes.size.answer", "of 'air-mail'"),
        (attributes(size={"values": ["wide\nopen", "shut"]}), "attributes.size.values.wide open", "one line"),
        (
            attributes(size={"values": ["x+", "x"], "groups": {"some": ["x+"], "more": ["x"]}}),
            "attributes.size.values.x+",
            "read as 'x'",
        ),
        (attributes(Colour={"values": ["a", "b"], "question": "Which?"}), "attributes.colour.values.red", "nothing"),
        (
            attributes(size={"values": ["a", "b"], "question": "what is - the COLOUR"}),
            "attributes.size.question",
            "same question as that of 'colour'",
        ),
        ({"abut": "x"}, "abut", "Did you mean 'about'"),
        (attributes(size={"values": ["a", "b"], "question": "What is the colour?"}), "question", "same question"),
    ],
)
def test_an_unsound_space_is_refused_by_key(changes, where, what):
    with pytest.raises(UserError) as refused:
        space(**changes)
    assert where in refused.value.where
    assert refused.value.where.startswith("space.yaml")
    assert what in str(refused.value)


def test_a_space_may_be_json_and_a_missing_one_is_said(tmp_path, monkeypatch):
    (tmp_path / "mine.json").write_text(json.dumps(SPACE))
    monkeypatch.chdir(tmp_path)
    assert list(Questions(path="mine.json").space.attributes) == ["colour", "size", "use"]
    assert Questions(path="mine.json").questions == 1
    with pytest.raises(UserError, match=r"task\.path: no file 'yours\.json'"):
        Questions(path="yours.json")
    (tmp_path / "bad.yaml").write_text("about: [")
    with pytest.raises(UserError, match="not readable as YAML"):
        Questions(path="bad.yaml")
    with pytest.raises(ValueError, match="turn_limit: expected 1 to 1, half of the 3 attributes, found 2"):
        Questions(path="mine.json", turn_limit=2)
