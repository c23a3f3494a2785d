"""`rlattn bench credit`, from a subject's name to what is told of it."""

from typing import Any

from rlattn.bench.credit import measure_credit, rules_of
from rlattn.bench.credit_oracle import check_whole_groups
from rlattn.bench.credit_show import as_json, show
from rlattn.bench.credit_subject import Subject, check_recipe, rolling_out, subject_of
from rlattn.formats.strict_json import to_json
from rlattn.rank import is_main
from rlattn.report.fidelity import fidelity_file
from rlattn.run.run import end_ranks
from rlattn.run_folder.folder import write_text


def bench_credit(name: str, overrides: list[str], batches: int, minutes: float, oracle: int) -> dict[str, Any]:
    """Measures, prints the tables and the verdict on rank 0, and gives every figure. Those of a run's policy, measured
    without overrides, are kept in the run's folder for its report. Collective.
    """
    subject = subject_of(name, overrides)
    recipe = subject.recipe
    check_recipe(recipe, oracle)
    with rolling_out(subject) as (port, own):
        if oracle:
            check_whole_groups(port)
        rule = (recipe.credit.kind or str(recipe.credit.python)) if recipe.credit else ""
        rules = rules_of(own, rule)
        permuted = next((rule for rule, one in rules.items() if one == own), "coupled_rhythm")
        found = measure_credit(port, rules, permuted, recipe.attention, batches=batches, minutes=minutes, oracle=oracle)
        show(found)
        end_ranks(port)
    figures = as_json(found)
    if not overrides:
        _keep(subject, figures)
    return figures


def _keep(subject: Subject, figures: dict[str, Any]) -> None:
    if subject.run is None or not is_main():
        return
    file = fidelity_file(subject.run, subject.step)
    try:
        file.parent.mkdir(exist_ok=True)
        write_text(file, to_json(figures, indent=1) + "\n")
        print(f"Kept in {file}; `rlattn report {subject.run}` shows it.")
    except OSError as error:
        print(f"warning: not kept in {file} ({error.strerror}).")
