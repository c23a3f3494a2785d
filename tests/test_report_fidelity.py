"""What `bench credit` kept of a run's policies, in its report; whatever lies in those files."""

import json

import pytest

from rlattn.report import page, read_run
from rlattn.report.fidelity import COLUMNS, fidelity_file


def keep(run, step, rules, **other):
    figures = {name: {"difference": one, "low": one - 0.01, "high": one + 0.01} for name, one in rules.items()}
    file = fidelity_file(run, step)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"uniform": 0.3, "rules": figures, "verdict": [f"of step {step}."], **other}))
    return file


def test_one_column_a_policy_the_newest_verdict_and_dashes_for_what_was_not_measured(tmp_path):
    keep(tmp_path, 1_000_000, {"entropy": 0.02, "mine:<b>Rule": -0.5}, uniform=None)
    keep(tmp_path, 24, {"entropy": 0.01})
    data = read_run(tmp_path)
    (table,) = data["tables"]
    assert table["columns"] == ["rule", "step 24", "step 1000000"] and table["about"].endswith("of step 1000000.")
    assert table["rows"] == [
        ["uniform", "0.300", "-"],
        ["entropy", "+0.010 ± 0.010", "+0.020 ± 0.010"],
        ["mine:<b>Rule", "-", "-0.500 ± 0.010"],
    ]
    assert "<b>Rule" not in page(data)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"uniform": 1, "verdict": [], "rules": {"a": {"difference": "x", "low": 0, "high": 0}}}',
     '{"uniform": 1, "verdict": [], "rules": {"a": null}}', '{"uniform": 1, "verdict": 5, "rules": {}}', "\ud800"],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_named_and_the_others_are_shown(text, tmp_path):
    keep(tmp_path, 24, {"entropy": 0.01})
    fidelity_file(tmp_path, 30).write_bytes(text.encode("utf-8", "surrogatepass"))
    data = read_run(tmp_path)
    assert data["tables"][0]["columns"] == ["rule", "step 24"]
    assert "fidelity/step-000030.json cannot be read." in data["missing"]


def test_many_policies_and_long_texts_stay_small(tmp_path):
    for step in range(100):
        keep(tmp_path, step, {"x" * 10_000: 0.1}, verdict=["y" * 100_000])
    (table,) = read_run(tmp_path)["tables"]
    assert len(table["columns"]) == 1 + COLUMNS and table["columns"][-1] == "step 99"
    assert len(json.dumps(table)) < 10_000
