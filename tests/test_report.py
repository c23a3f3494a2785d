"""The report of a run folder: complete, self-contained, and safe against what a policy may write."""

import json

from rlattn.report import write_report
from rlattn.tracking import append_row


def run_folder(folder, completion="<answer> 4 </answer>"):
    (folder / "recipe.yaml").write_text("name: x\n")
    (folder / "environment.json").write_text("{}")
    for step in range(3):
        row = {"step": step, "reward": 0.1 * step, "entropy": float("nan")}
        if step != 1:
            row |= {"eval/accuracy": 0.5, "eval/low": 0.4, "eval/high": 0.6}
        append_row(folder / "metrics.jsonl", row)
    append_row(
        folder / "samples.jsonl", {"step": 2, "prompt": "2 + 2 ?", "completion": completion, "gold": "4", "score": 1.0}
    )
    return folder


def test_a_report_holds_curves_samples_and_recipe_and_needs_no_network(tmp_path):
    html = write_report(run_folder(tmp_path)).read_text()
    for part in ("data:image/png;base64,", "2 + 2 ?", "name: x", "has not finished"):
        assert part in html
    assert "http://" not in html
    assert "https://" not in html
    assert "<script" not in html


def test_hostile_text_stays_text(tmp_path):
    html = write_report(
        run_folder(tmp_path, "</script><script>alert(1)</script><img src=x onerror=alert(1)>")
    ).read_text()
    assert "<script" not in html
    assert "<img src=x" not in html
    assert "&lt;script&gt;alert(1)" in html


def test_a_finished_run_shows_its_summary(tmp_path):
    evaluation = {"accuracy": 0.75, "low": 0.7, "high": 0.8, "rows": 256, "mean_length": 9.0}
    summary = {
        "max_steps": 2,
        "seconds": 3,
        "before": evaluation,
        "after": evaluation,
        "supervised_control": evaluation,
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    html = write_report(run_folder(tmp_path)).read_text()
    assert html.count("75.0 %") == 3


def test_an_empty_log_and_a_torn_line_still_make_a_report(tmp_path):
    run_folder(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward": 1}\n{"step": 1, "rew')
    assert write_report(tmp_path).is_file()
    (tmp_path / "metrics.jsonl").write_text("")
    assert "Nothing logged yet" in write_report(tmp_path).read_text()
