"""`rlattn compare`: which runs are one setting, what their recipes differ in, intervals over seeds."""

import json
import re

import pytest
from conftest import command_without

from rlattn.cli import main
from rlattn.errors import UserError
from rlattn.recipe.load import load_recipe
from rlattn.report import page
from rlattn.report.compare import compare, interval
from rlattn.report.metrics import describe_metric
from rlattn.run_folder.jsonl import append_row


def run_folder(folder, accuracy, *overrides):
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(load_recipe("quickstart", [f"output_dir={folder}", *overrides]).to_yaml())
    (folder / "environment.json").write_text('{"rlattn": "0"}')
    append_row(folder / "metrics.jsonl", {"step": 0, "eval/accuracy": 0.25, "eval/low": 0.2, "eval/high": 0.3})
    row = {"step": 1, "reward": accuracy, "eval/accuracy": accuracy, "eval/low": 0.1, "eval/high": 0.9, "num_tokens": 9}
    append_row(folder / "metrics.jsonl", row)
    return folder


@pytest.fixture
def runs(tmp_path):
    return [
        run_folder(tmp_path / "a/0", 0.5, "seed=0"), run_folder(tmp_path / "a/1", 0.7, "seed=1"),
        run_folder(tmp_path / "b/0", 0.4, "credit=null"),
    ]  # fmt: skip


def test_seeds_of_one_setting_are_averaged_and_differences_named(runs):
    found = compare(runs)
    final, seeds, _, different = found["tables"]
    assert [row[0] for row in final["rows"]] == ["a/0", "a/1", "b/0"]
    assert final["rows"][0][1:5] == ["1 (not finished)", "25.0 %", "50.0 %", "10.0 % to 90.0 %"]
    assert seeds["rows"] == [["a/0, a/1", "2", "60.0 ± 127.1 %", "0.600 ± 1.271"]]
    keys = [row[0] for row in different["rows"]]
    assert "seed" in keys and "credit.kind" in keys and "output_dir" not in keys
    reward = next(curve for curve in found["curves"] if curve["title"] == "reward")
    assert [one["name"] for one in reward["series"]] == ["a/0", "a/1", "b/0"]


def test_a_warm_starts_seed_is_a_seed(tmp_path):
    runs = [run_folder(tmp_path / f"{i}", 0.5, f"seed={i}", f"policy.warm_start.seed={i}") for i in (0, 1)]
    assert compare(runs)["tables"][1]["rows"][0][0] == "0, 1"


def test_what_a_task_is_judged_by_is_told_setting_by_setting(runs):
    for run, lies in zip(runs, (0.5, 0.7, 0.1), strict=True):
        for step in (2, 19, 20):
            row = {"step": step, "task/false_claims": lies if step > 18 else 9.0, "credit/gini": 0.1, "time/x": 1}
            append_row(run / "metrics.jsonl", row)
        append_row(run / "metrics.jsonl", {"step": 20, "eval/dtr": lies, "eval/effort_0.25/tokens": 3, "eval/low": 1})
    found = compare(runs)
    table = found["tables"][2]
    assert table["columns"] == ["number", "a/0, a/1", "b/0"]
    assert table["rows"] == [
        ["eval/dtr", "0.6000 ± 1.2706", "0.1"], ["eval/effort_0.25/tokens", "3.000 ± 0.000", "3"],
        ["task/false_claims", "0.6000 ± 1.2706", "0.1"],
    ]  # fmt: skip
    sections = {curve["title"]: curve["section"] for curve in found["curves"]}
    assert sections["reward"] == "Learning" and sections["credit/gini"] == "Everything else"
    assert found["curves"][0]["title"] == "reward" and not any(title.startswith("step") for title in sections)


def test_a_comparison_of_many_long_runs_stays_small(tmp_path):
    names = [f"task/m{i}" for i in range(60)]
    for i in range(12):
        run = run_folder(tmp_path / f"{i}", 0.5, f"seed={i}")
        lines = (json.dumps({"step": step} | dict.fromkeys(names, step / 7)) for step in range(2, 1000))
        with (run / "metrics.jsonl").open("a") as file:
            file.write("\n".join(lines))
    assert len(page(compare([tmp_path / f"{i}" for i in range(12)]))) < 6e6


def test_recipes_of_another_machine_are_compared_and_numbers_count_as_numbers(tmp_path):
    runs = []
    for name, temperature in (("a", "1"), ("b", "1.0")):
        run = run_folder(tmp_path / name, 0.5, f"seed={len(runs)}", "policy={path: Qwen/Qwen3-0.6B}")
        recipe = (run / "recipe.yaml").read_text()
        recipe = re.sub(r"temperature: .*", f"temperature: {temperature}", recipe)
        (run / "recipe.yaml").write_text(recipe.replace("Qwen/Qwen3-0.6B", "/nowhere/model"))
        runs.append(run)
    found = compare(runs)
    assert [line for line in found["missing"] if "recipe" in line] == []
    assert found["tables"][1]["title"] == "Over seeds" and [row[0] for row in found["tables"][-1]["rows"]] == ["seed"]


def test_what_stopped_early_is_said_and_what_fewer_runs_have_is_counted(runs):
    append_row(runs[0] / "metrics.jsonl", {"step": 40, "task/lies": 0.5})
    append_row(runs[1] / "metrics.jsonl", {"step": 9, "reward": 1.0})
    found = compare(runs)
    assert "a/1: its end is step 9 of 40." in found["missing"]
    assert not any("a/0: its end" in line for line in found["missing"])
    assert interval([0.5, None, 0.7], 100, 1, " %") == "60.0 ± 127.1 % (n = 2)"


def test_every_chart_of_a_comparison_has_its_own_meaning(runs):
    names = ("self_monitor/safe", "self_monitor/own_safe", "completions/clipped_ratio", "completions/duplicates")
    append_row(runs[0] / "metrics.jsonl", {"step": 2, **dict.fromkeys(names, 0.5)})
    charts = {chart["title"]: chart for chart in compare(runs)["curves"]}
    for name in names:
        assert charts[name]["about"].startswith(describe_metric(name).meaning)


def test_only_a_comparison_is_replaced(runs, tmp_path, capsys):
    out = str(runs[0] / "metrics.jsonl")
    with pytest.raises(SystemExit) as end:
        main(["compare", *map(str, runs), "--out", out])
    assert end.value.code == 2 and "no earlier comparison" in capsys.readouterr().err
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            main(["compare", *map(str, runs), "--out", str(tmp_path / "c.html")])
        assert end.value.code == 0


def test_a_runs_name_is_no_escape_sequence(runs, tmp_path, capsys):
    red = runs.pop().rename(tmp_path / "red\x1b[31m")
    with pytest.raises(SystemExit):
        main(["compare", str(red), *map(str, runs), "--out", str(tmp_path / "c.html")])
    assert "\x1b[31m" not in capsys.readouterr().out


def test_intervals_are_students():
    assert interval([0.859, 0.848, 0.867, 0.867, 0.875], 100, 1) == "86.3 ± 1.3"
    assert interval([0.5, None], 1, 1) == "–"


def test_what_is_no_run_is_refused(runs, tmp_path):
    for wrong in ([runs[0]], [runs[0], tmp_path], [runs[0], runs[0]]):
        with pytest.raises(UserError):
            compare(wrong)


def test_a_damaged_run_is_compared_as_far_as_it_goes(runs, tmp_path, capsys):
    with (runs[1] / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 2, "reward": 1' + 400 * "0" + '}\n{"step": 3, "rew')
    for name in ("recipe.yaml", "metrics.jsonl"):
        (runs[2] / name).write_text("\0")
    with pytest.raises(SystemExit) as end:
        main(["compare", *map(str, runs), "--out", str(tmp_path / "c.html")])
    assert end.value.code == 0
    told = capsys.readouterr().out
    assert "a/1: metrics.jsonl: lines that cannot be read are left out (4)." in told
    assert "a/1: metrics.jsonl: what is no finite number is left out (reward)." in told
    assert "b/0: its recipe is not compared: recipe.yaml: not readable as YAML" in told
    assert "b/0: no step can be read." in told
    assert "0.600 ± 1.271" in told and "credit.kind" not in told
    assert "b/0: no step can be read." in (tmp_path / "c.html").read_text()


def test_what_cannot_be_written_is_the_users_error(runs, tmp_path, capsys):
    (runs[0] / "report.html").mkdir()
    for command in (["report", str(runs[0])], ["compare", *map(str, runs), "--out", "/proc/c.html"]):
        with pytest.raises(SystemExit) as end:
            main(command)
        assert end.value.code == 2
        assert "written" in capsys.readouterr().err


def test_a_report_is_written_into_runs_only(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(SystemExit) as end:
        main(["report", str(tmp_path)])
    assert end.value.code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_commands_write_pages_without_torch(runs, tmp_path):
    heavy = {"torch", "trl", "matplotlib"}
    command_without(heavy, "report", str(runs[0]), cwd=tmp_path)
    result = command_without(heavy, "compare", *map(str, runs), "--out", str(tmp_path / "c.html"), cwd=tmp_path)
    assert result.stdout.endswith("\n0\n")
    assert "60.0 ± 127.1 %" in result.stdout and "credit.kind" in result.stdout
    assert (runs[0] / "report.html").is_file()
    assert json.dumps("a/0") in (tmp_path / "c.html").read_text()
