"""`rlattn eval` where a user's own task or a run's folder is damaged; the model is a stand-in that always says cold."""

import json
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
from opposites import Opposites

from rlattn.errors import UserError
from rlattn.evaluation import answers, figures, run, show
from rlattn.evaluation.plan import check_same_task, make_plan
from rlattn.evaluation.subjects import REFUSED, Subject, out_folder
from rlattn.grpo.held_out import Completion
from rlattn.inspection.inputs import check_model_path
from rlattn.statistics import wilson_interval

MODEL = Subject(name="m", path="m")


def broken(*_):
    raise RuntimeError("broken on purpose")


@dataclass(frozen=True, kw_only=True)
class WrongGold(Opposites):
    def gold(self, row):
        return "never"

    def verify(self, completion, row):
        return 0.0


def planned(subject=MODEL, **options):
    defaults = {"task": None, "data": None, "overrides": [], "samples": 1, "k": None, "temperature": None, "limit": 3}
    return make_plan(subject, **{**defaults, **options})


def plan_of(**methods):
    """Three rows of Opposites, asked one by one, the plan's task with other methods."""
    overrides = ["task={python: 'opposites:Opposites'}", "trainer.per_device_eval_batch_size=1"]
    plan = planned(task="quickstart", overrides=overrides)
    for name, method in methods.items():
        object.__setattr__(plan.task, name, method)  # a frozen dataclass
    return plan


@pytest.fixture
def stand_in(monkeypatch):
    def said(loaded, items):
        return [Completion(text="cold", ids=[1], tokens=1) for _ in items]

    monkeypatch.setattr(answers, "_completions", said)
    monkeypatch.setattr(answers, "progress", lambda *_: nullcontext(lambda *_: None))
    loaded = {"prompt_text": str, "revision": None}
    monkeypatch.setattr(run, "check", lambda one, plan, _: SimpleNamespace(name=one.name, plan=plan, **loaded))
    monkeypatch.setattr(run, "load", lambda checked: checked)


def evaluated(plan, folder):
    """eval.json and the lines of eval-samples.jsonl, read by a parser that takes no NaN."""
    run.run([MODEL], ["MODEL"], plan, folder, probe=None, title="")

    def strict(text):
        return json.loads(text, parse_constant=pytest.fail)

    lines = (folder / "eval-samples.jsonl").read_text().splitlines()
    return strict((folder / "eval.json").read_text()), [strict(line) for line in lines]


@pytest.mark.parametrize(
    ("metrics", "kept"),
    [
        (broken, {}),
        (lambda completion, row: None, {}),
        (lambda completion, row: {"words": "many"}, {}),
        (lambda completion, row: {"words": float("nan")}, {"words": None}),
        (lambda completion, row: {"right_words": 1.5}, {}),
    ],
)
def test_metrics_that_fail_end_no_evaluation(stand_in, tmp_path, metrics, kept):
    report, rows = evaluated(plan_of(metrics=metrics, shares=["right_words"]), tmp_path / "out")
    assert [row["metrics"] for row in rows] == [kept] * 3
    nothing = {"kind": "mean", "value": None, "low": None, "high": None, "count": 0}
    assert report["models"][0]["figures"]["metrics"] == dict.fromkeys(kept, nothing)


@pytest.mark.parametrize("method", ["verify", "gold"])
def test_a_verifier_that_fails_on_an_answer_leaves_it_out_and_is_told(stand_in, tmp_path, method, caplog, capsys):
    def fails_on_the_second(*given):
        return broken() if given[-1] is plan.items[1].row else 1.0

    plan = plan_of(**{"verify": lambda completion, row: 1.0, method: fails_on_the_second})
    report, rows = evaluated(plan, tmp_path / "out")
    assert f"the task's {method}() is left out where it fails: RuntimeError: broken on purpose" in caplog.text
    found = report["models"][0]["figures"]
    assert found["pass@1"]["value"] == 1 and found["problems"] == len(rows) == 3
    assert rows[1]["right" if method == "verify" else "gold"] is None
    assert found.get("verify_failed", 0) == (method == "verify")
    assert ("verify() failed, left out" in capsys.readouterr().out) == (method == "verify")


def test_figures_of_answers_without_a_verdict():
    items = plan_of().items
    rights = [(1.0, None, 0.0), (None, None, None), (1.0, 1.0, 1.0)]
    given = [
        answers.Answer(item=item, sample=sample, text="", tokens=1, thought=0, cut=False, right=one, measured=None)
        for item, scores in zip(items, rights, strict=True)
        for sample, one in enumerate(scores)
    ]
    found = figures.figures(given, (1, 3))
    assert (found["verify_failed"], found["metrics_failed"]) == (4, 9)
    assert (found["pass@1"]["value"], found["pass@3"]["value"]) == (0.75, 1)  # of two problems, of the one with three
    nothing = figures.figures(given[3:6], (1,))["pass@1"]
    assert nothing == {"kind": "share", "value": None, "low": None, "high": None, "count": 0}
    assert figures.comparison(given, given)["problems"] == 2 and figures.comparison(given[3:6], given[3:6]) == {}


def test_a_refusal_in_the_middle_keeps_the_answers(stand_in, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def refuse(answer, gold):
        if answer.item.index:
            raise UserError("task", "refused in the middle.")
        return {"row": 1}

    with monkeypatch.context() as patched:
        patched.setattr(answers, "_row", refuse)
        with pytest.raises(UserError, match=r"in the middle.*answers so far"):
            evaluated(plan_of(), out)
    assert [file.name for file in out.iterdir()] == [REFUSED]
    assert out_folder(out, MODEL) == out  # mended, the same command works
    assert len(evaluated(plan_of(), out)[1]) == 3


def test_a_task_that_rejects_its_own_gold_is_refused_before_it_is_asked():
    with pytest.raises(UserError, match=r"own gold\(\)"):
        planned(task="quickstart", overrides=["task={python: 'test_eval_damage:WrongGold'}"])


@pytest.fixture
def run_folder(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "1 + 1?", "answer": 2}\n')
    return Subject(name="runs/a", path=str(tmp_path / "model"), run=tmp_path)


@pytest.mark.parametrize("text", [b"name: caf\xe9\n", b"", b"- a list\n", b"text\n"])
def test_a_damaged_recipe_of_a_run_gets_a_message(run_folder, text):
    (run_folder.run / "recipe.yaml").write_bytes(text)
    for data in (None, str(run_folder.run / "mine.jsonl")):
        with pytest.raises(UserError, match="is damaged") as raised:
            planned(run_folder, data=data)
        assert raised.value.where.endswith("recipe.yaml")


def test_a_run_without_its_recipe_is_told_so(run_folder, tmp_path):
    with pytest.raises(UserError, match=r"runs/a is of a run without its recipe\.yaml.*--task"):
        planned(run_folder)
    other = Subject(name="runs/b", path="b", run=tmp_path / "b")
    with pytest.raises(UserError, match=r"without its recipe\.yaml"):
        check_same_task(run_folder, other)


def test_a_bare_name_is_a_typo_only_of_what_could_be_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, file in (("quickstart", "environment.json"), ("distilgpt3", "eval.json"), ("opt-mine", "config.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
    with pytest.raises(UserError, match="Did you mean 'quickstart'"):
        check_model_path("quikstart")
    check_model_path("distilgpt2")  # what lies there is an evaluation
    check_model_path("opt")


def test_the_task_says_what_is_a_share_and_not_the_values():
    item = plan_of().items[0]
    answered = [
        answers.Answer(
            item=replace(item, index=index), sample=0, text="cold", tokens=1, thought=0, cut=False, right=1.0,
            measured={"turns": 1.0, "honest": 1.0},
        )
        for index in range(20)
    ]  # fmt: skip
    found = figures.figures(answered, (1,), shares=["honest"])
    low, high = wilson_interval(20, 20)
    assert found["metrics"]["honest"] == {"kind": "share", "value": 1, "low": low, "high": high, "count": 20}
    for count in (found["metrics"]["turns"], found["mean_length"]):
        assert count == {"kind": "mean", "value": 1, "low": None, "high": None, "count": 20}
    shown = show.rows_of_table(found)
    assert (shown["turns"], shown["honest"]) == ("1", f"100.0 % ({100 * low:.1f} to 100.0)")
    assert figures.figures(answered[:1], (1,), shares=["nothing"])["metrics"]["honest"]["kind"] == "mean"


def test_a_mean_over_one_problem_has_no_interval():
    plan = plan_of()
    one = answers.Answer(item=plan.items[0], sample=0, text="cold", tokens=81, thought=0, cut=False, right=0.0)
    found = figures.figures([one], (1,))
    assert found["mean_length"] == {"kind": "mean", "value": 81, "low": None, "high": None, "count": 1}
    assert show.rows_of_table(found)["mean length"] == "81"
    gap = figures.comparison([one, one], [one, one])["difference"]
    assert gap["low"] < 0 < gap["high"]
