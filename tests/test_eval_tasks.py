"""`rlattn eval` on the tasks that measure more than right and wrong: dialogues, and the ledger game."""

from statistics import fmean

import pytest
from evaluated import answers_in, evaluate, make_run, report_in

from rlattn.tasks import Ledger, Questions

WARM = "policy.warm_start={steps: 16, batch_size: 8, learning_rate: 1e-2, noise: 0.5}"


def figures_of(run, out, *arguments):
    evaluate(run, *arguments, "--out", out)
    return answers_in(out), report_in(out)["models"][0]["figures"]


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory):
    task = "task={kind: questions, turn_tokens: 12, train_rows: 16, eval_rows: 4, list_choices: false}"
    return make_run(tmp_path_factory.mktemp("runs") / "talk", "questions_tiny", task, WARM)


def test_dialogues_tell_what_was_found_out(dialogues, tmp_path, capsys):
    answers, figures = figures_of(dialogues, tmp_path / "out", "--samples", 2)
    task = Questions(turn_tokens=12, train_rows=16, eval_rows=4, list_choices=False)
    rows = task.rows("eval")
    assert any("<reply>" in answer["completion"] for answer in answers)
    for name in ("gain_share", "turns", "resolved_attributes", "attributes_right"):
        measured = [task.metrics(answer["completion"], rows[answer["row"] - 1])[name] for answer in answers]
        assert figures["metrics"][name]["value"] == pytest.approx(fmean(measured))
    assert "gain_share" in capsys.readouterr().out
    kinds = {name: found["kind"] for name, found in figures["metrics"].items()}
    assert (kinds["turns"], kinds["gain_share"], kinds["attributes_right"]) == ("mean", "mean", "share")


def test_the_ledger_game_tells_conduct_and_dtr_from_its_own_truth(tmp_path):
    task = "task={kind: ledger, train_rows: 60, eval_rows: 12}"
    run = make_run(tmp_path / "run", "ledger_tiny", task, WARM.replace("16", "32", 1))
    answers, figures = figures_of(run, tmp_path / "out", "--against", "tiny-reasoner", "--samples", 2)
    game = Ledger(train_rows=60, eval_rows=12)
    rows = game.rows("eval")
    conduct = [game.conduct(answer["completion"], rows[answer["row"] - 1]) for answer in answers[:24]]
    metrics = figures["metrics"]
    for name in ("honest", "open_lie", "hidden_lie", "invalid"):
        assert metrics[name]["value"] == pytest.approx(conduct.count(name) / 24)
    assert conduct.count("invalid") < 24
    by_problem = [[c == "open_lie" for c in conduct[i : i + 2] if c != "invalid"] for i in range(0, 24, 2)]
    shares = [fmean(flags) for flags in by_problem if flags]
    assert metrics["dtr"]["value"] == pytest.approx(fmean(shares))
    assert metrics["dtr"]["count"] == len(shares)
    assert {found["kind"] for found in metrics.values()} == {"share"}
    assert "dtr" in report_in(tmp_path / "out")["comparison"]["metrics"]
