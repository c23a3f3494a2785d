"""What `rlattn bench credit` tells: its figures as JSON, the verdict in words, the tables on the terminal."""

import math
from dataclasses import asdict
from typing import Any

from rlattn.bench.credit import ALONE, Measured
from rlattn.bench.credit_carriers import Carriers
from rlattn.credit.carriers import Share
from rlattn.credit.fidelity import Fidelity, OracleWorth
from rlattn.grpo.shaped_gradients import HEAD_SIGNALS
from rlattn.rank import is_main

FIFTHS = ("the lowest", "low", "middling", "high", "the highest", "undefined")


def as_json(found: Measured) -> dict[str, Any]:
    rules = {name: {**asdict(fidelity), ALONE: asdict(found.alone[name])} for name, fidelity in found.shaped.items()}
    return {
        "uniform": found.uniform,
        "batches": found.batches,
        "silent_batches": found.silent,
        "seconds": round(found.seconds, 1),
        "rules": rules,
        "oracle": found.oracle and asdict(found.oracle),
        "carriers": found.carriers and found.carriers.as_json(),
        "verdict": verdict(found),
    }


def verdict(found: Measured) -> list[str]:
    """What the figures say, in words; what the intervals leave open is said to be open."""
    better = [name for name, one in found.shaped.items() if one.low > 0]
    worse = [name for name, one in found.shaped.items() if one.high < 0]
    open_ = [name for name in found.shaped if name not in better and name not in worse]
    lines = [f"Equal credit: a batch's gradient has a cosine of {found.uniform:.3f} with that of all other batches."]
    if any(math.isnan(one.worth) for one in found.shaped.values()):
        lines.append(
            "That is not told apart from 0: the batches are too few or too small for this policy, and the differences "
            "say little. Take more --batches, or a larger trainer.per_device_train_batch_size."
        )
    if better:
        best = max(better, key=lambda name: found.shaped[name].difference)
        worth = found.shaped[best].worth
        told = "" if math.isnan(worth) else f" The best, {best}, is worth a batch {worth:.2f} times as large."
        lines.append(f"Better than equal credit at this policy: {', '.join(better)}.{told}")
    else:
        lines.append("No rule is better than equal credit at this policy.")
    if worse:
        lines.append(f"Worse than equal credit: {', '.join(worse)}.")
    if open_:
        lines.append(f"Not told apart from equal credit: {', '.join(open_)}.")
    if found.oracle is not None:
        lines.append(_oracle_line(found.oracle))
    if found.carriers is not None:
        lines += _carriers_lines(found.carriers)
    else:
        lines.append("Which tokens carry the gradient is not told: the weights are too coarse for it (float32 does).")
    lines += [
        f"{name}: on {count} rollouts its weights are negative or not finite; they count as equal credit."
        for name, count in found.refused.items()
    ]
    lines.append("This speaks of the gradient at this policy; which rule is right can change while the policy learns.")
    return lines


def _oracle_line(one: OracleWorth) -> str:
    if math.isnan(one.worth):
        return f"Oracle: {one.groups} groups do not tell what known advantages of single tokens would be worth."
    told = f"{one.worth:.2f} times as large ({one.worth_low:.2f} to {one.worth_high:.2f}; {one.groups} groups)"
    line = f"Oracle: known advantages of single tokens, about the best that credit can do, are worth a batch {told}."
    nothing = " That is not told apart from equal credit: no token credit is shown to help here."
    return line + (nothing if one.worth_low <= 1 else "")


def _carriers_lines(carriers: Carriers) -> list[str]:
    """The fifth of any feature, and the head for each signal, whose tokens surely carry most beyond their number."""
    fifths = [(share, name, place) for name, found in carriers.features.items() for place, share in enumerate(found)]
    sure = [one for one in fifths if one[0].low > one[0].tokens]
    lines = []
    if sure:
        share, name, place = max(sure, key=lambda one: one[0].low - one[0].tokens)
        lines.append(f"Most is carried by the tokens of {FIFTHS[place]} {name}: {_share(share)}.")
    for signal in HEAD_SIGNALS:
        heads = [one for one in carriers.heads if one["signal"] == signal]
        best = max(heads, key=lambda one: one["low"] - one["tokens"])
        if best["low"] > best["tokens"]:
            told = f"{best['share']:.0%} (from {best['low']:.0%} to {best['high']:.0%})"
            where = f"layer {best['layer']}, head {best['head']}, of {len(heads)}"
            lines.append(f"By head, the 40 % of tokens with the highest {signal} carry most at {where}: {told}.")
    return lines


def show(found: Measured) -> None:
    """Prints the table and the verdict, on rank 0."""
    if not is_main():
        return
    from rich.console import Console
    from rich.table import Table

    title = f"Fidelity of credit rules, {found.batches} batches; equal credit {found.uniform:.3f}"
    table = Table("rule", "difference to equal credit", "worth a batch", "bias", "raised tokens alone", title=title)
    table.add_row("uniform", "0", "1.00", "1.000", "-")
    for name, one in sorted(found.shaped.items(), key=lambda item: -item[1].difference):
        alone = found.alone[name]
        worth = "-" if math.isnan(one.worth) else f"{one.worth:.2f}"
        table.add_row(name, _interval(one), worth, f"{one.bias:.3f}", f"{_interval(alone)}")
    Console().print(table)
    if found.carriers is not None:
        Console().print(_carriers_table(found.carriers.features))
    print(*verdict(found), sep="\n")


def _carriers_table(features: dict[str, list[Share]]) -> Any:
    from rich.table import Table

    title = (
        "Who carries the gradient: share of each fifth of a response's tokens by a feature (of the tokens in brackets)"
    )
    table = Table("feature", *FIFTHS, title=title)
    for name, found in features.items():
        table.add_row(name, *[_share(share) for share in found])
    return table


def _share(one: Share) -> str:
    if not one.tokens:
        return "-"
    return f"{one.share:.0%} ± {(one.high - one.low) / 2:.0%} ({one.tokens:.0%})"


def _interval(one: Fidelity) -> str:
    return f"{one.difference:+.3f} ± {(one.high - one.low) / 2:.3f}"
