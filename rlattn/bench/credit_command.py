"""`rlattn bench credit`, from a subject's name to what is told of it."""

from typing import Any

from rlattn.bench.credit import measure_credit, rules_of
from rlattn.bench.credit_show import as_json, show
from rlattn.bench.credit_subject import check_recipe, recipe_of, rolling_out
from rlattn.run.run import end_ranks


def bench_credit(subject: str, overrides: list[str], batches: int, minutes: float) -> dict[str, Any]:
    """Measures, prints the tables and the verdict on rank 0, and gives every figure. Collective."""
    recipe, adapter, step = recipe_of(subject, overrides)
    check_recipe(recipe)
    with rolling_out(recipe, adapter, step) as (port, own):
        name = (recipe.credit.kind or str(recipe.credit.python)) if recipe.credit else ""
        rules = rules_of(own, name)
        permuted = next((rule for rule, one in rules.items() if one == own), "coupled_rhythm")
        found = measure_credit(port, rules, permuted, recipe.attention, batches, minutes)
        show(found)
        end_ranks(port)
        return as_json(found)
