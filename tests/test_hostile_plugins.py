"""Rewards and tasks of a user's own that say nonsense about themselves: `rlattn check` has one message."""

import pytest

from rlattn.errors import UserError
from rlattn.preflight.check import check
from rlattn.recipe.load import load_recipe

SCORE = "    def score(self, rollout): return 1.0\n"
PROPERTY = "    @property\n    def {name}(self): raise RuntimeError('not yet')\n"
REWARDS = {
    "needs_text": (SCORE + "    needs = 'environment'\n", r"rewards\.x\.needs: expected a tuple of names"),
    "needs_number": (SCORE + "    needs = 5\n", r"rewards\.x\.needs: expected a tuple of names"),
    "needs_images": (
        SCORE + "    needs = ('images',)\n",
        r"rewards\.x: needs images, and the policy of a recipe reads",
    ),
    "methods_text": (SCORE + "    needs_of_task = 'payoff'\n", r"rewards\.x\.needs_of_task: expected a tuple"),
    "methods_none": (SCORE + "    needs_of_task = None\n", r"rewards\.x\.needs_of_task: expected a tuple"),
    "score": (PROPERTY.format(name="score"), "reading its 'score' fails: RuntimeError: not yet"),
    "prepare": (SCORE + PROPERTY.format(name="prepare"), "reading its 'prepare' fails: RuntimeError: not yet"),
    "lag": (SCORE + PROPERTY.format(name="lag"), "reading its 'lag' fails: RuntimeError: not yet"),
    "first_policy": (SCORE + PROPERTY.format(name="first_policy"), "reading its 'first_policy' fails"),
    "many_parts": (
        SCORE + "    part_count, part_weight = 10**10, 1.0\n    def parts(self, rollout): return []\n",
        r"rewards\.x\.part_count: .* 1 to 1024, got 10000000000",
    ),
}
TASK = """
class T:
    questions, turn_tokens, style = 2, 16, "text"
    def rows(self, split): return [{"prompt": "a"}]
    def verify(self, completion, row): return 1.0
    def gold(self, row): return ""
    def trace(self, row, rng, noise): return ""
    def reply(self, turn, row): return None
"""


def checked(recipe, *overrides):
    return check(load_recipe(recipe, list(overrides)), ranks=1, gpu_memory=None)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", REWARDS)
def test_what_a_reward_says_of_itself_is_looked_at(name, folder):
    body, message = REWARDS[name]
    (folder / f"hostile_{name}.py").write_text(f"class R:\n{body}")
    with pytest.raises(UserError, match=message):
        checked("quickstart", f"rewards.x={{python: 'hostile_{name}:R'}}")


def test_only_a_credit_rule_is_given_the_step(folder):
    (folder / "hostile_step.py").write_text("class R:\n    def score(self, rollout, step): return 1.0\n")
    with pytest.raises(UserError, match=r"score\(\) must take 1 argument: missing a required argument: 'step'"):
        checked("quickstart", "rewards.x={python: 'hostile_step:R'}")


def test_a_property_of_a_task_that_raises_is_named(folder):
    (folder / "hostile_task.py").write_text(TASK + PROPERTY.format(name="metrics"))
    with pytest.raises(UserError, match=r"task\.python: reading its 'metrics' fails: RuntimeError: not yet"):
        checked("quickstart", "task={python: 'hostile_task:T'}")


def test_a_property_of_a_credit_rule_that_raises_is_named(folder):
    body = "class C:\n    def __call__(self, signals): pass\n"
    (folder / "hostile_rule.py").write_text(body + PROPERTY.format(name="needs_entropy"))
    with pytest.raises(UserError, match=r"credit\.python: reading its 'needs_entropy' fails: RuntimeError: not yet"):
        checked("quickstart", "credit={python: 'hostile_rule:C'}")


def rule(folder, arguments):
    name = f"rule_{abs(hash(arguments))}"
    (folder / f"{name}.py").write_text(f"class C:\n    def __call__({arguments}): pass\n")
    return f"credit={{python: '{name}:C'}}"


@pytest.mark.parametrize("step", ["step", "step=0", "*, step"])
def test_a_credit_rule_may_ask_for_the_step_in_any_way_it_is_given(step, folder):
    assert any(line.startswith("credit   C") for line in checked("quickstart", rule(folder, f"self, signals, {step}")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("self", r"must take 1 argument: too many positional"),
        ("self, signals, *, stp", r"missing a required.*'stp'"),
        ("self, signals, step, /", r"'step'"),
    ],
)
def test_a_credit_rule_that_cannot_be_called_is_refused(arguments, message, folder):
    with pytest.raises(UserError, match=rf"credit\.python: __call__\(\) .*{message}"):
        checked("quickstart", rule(folder, arguments))


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ("{information_gain: {weight: 0}, accuracy: {}}", r"rewards\.information_gain: needs a task with replay\(\)"),
        ("{specification: {}}", r"rewards\.specification: needs a task with metrics\(\).*questions"),
    ],
)
def test_a_dialogue_task_without_what_a_reward_reads_is_refused(rewards, message, folder):
    (folder / "bare_dialogue.py").write_text(TASK)
    with pytest.raises(UserError, match=message):
        checked("questions_tiny", "task={python: 'bare_dialogue:T'}", f"rewards={rewards}")


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        ("questions_tiny", "rewards.information_gain.turn_cost=.nan", r"gain\.turn_cost: expected 0 to"),
        ("questions_tiny", "rewards.information_gain.turn_cost=.inf", r"gain\.turn_cost: expected 0 to"),
        ("questions_tiny", "rewards.information_gain.turn_weight=1e300", r"gain\.turn_weight: expected"),
        ("quickstart", "rewards.brevity={points: .nan}", r"rewards\.brevity\.points: expected a number"),
        ("quickstart", "rewards.format={tags: [think, think]}", r"rewards\.format\.tags: expected every tag once"),
    ],
)
def test_options_that_are_no_sensible_numbers_or_names(recipe, override, message):
    with pytest.raises(UserError, match=message):
        checked(recipe, override)
