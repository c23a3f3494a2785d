"""The figure of `rlattn bench credit`, drawn from what its JSON holds and nothing else."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlattn.credit.carriers import QUANTILES
from rlattn.inspection.figures import LOCAL, OTHER, STYLE

MARKERS = "osD^v"
CLIPPED = 3.0  # times the width that the differences at the rules' own amplification take; longer bars are cut there


def draw_credit(found: dict[str, Any], title: str, file: Path) -> None:
    """Every rule's difference to equal credit with its 95 % interval, best on top, and beside it which tokens carry the
    gradient; told apart without colours too.
    """
    rules = sorted(found["rules"].items(), key=lambda item: item[1]["difference"])
    widest = max(max(abs(one["low"]), abs(one["high"])) for _, one in rules) or 1e-3
    with matplotlib.rc_context(STYLE):
        carriers = found["carriers"]
        figure = Figure(figsize=(12 if carriers else 8, 1.4 + 0.42 * len(rules)), layout="constrained")
        axes, *beside = figure.subplots(1, 1 + bool(carriers), squeeze=False)[0]
        axes.axvline(0, color="black", linewidth=1)
        for place, (_, one) in enumerate(rules):
            alone = one["alone"]
            axes.plot([alone["low"], alone["high"]], [place - 0.18] * 2, color=OTHER, linewidth=1, linestyle=":")
            axes.plot(alone["difference"], place - 0.18, "s", color=OTHER, markerfacecolor="white", markersize=5)
            if abs(alone["difference"]) > CLIPPED * widest:
                side, edge = ("left", -CLIPPED) if alone["difference"] < 0 else ("right", CLIPPED)
                told: dict[str, Any] = {"color": OTHER, "fontsize": 8, "ha": side, "va": "center"}
                axes.text(edge * widest, place - 0.18, f" {alone['difference']:+.2f} ", **told)
            axes.plot([one["low"], one["high"]], [place + 0.12] * 2, color=LOCAL, linewidth=2)
            axes.plot(one["difference"], place + 0.12, "o", color=LOCAL, markersize=6)
        axes.plot([], [], "o-", color=LOCAL, label="as the rule weighs, 95 %")
        axes.plot([], [], "s:", color=OTHER, markerfacecolor="white", label="raised tokens alone")
        axes.set_yticks(range(len(rules)), [name for name, _ in rules])
        axes.set_xlim(-CLIPPED * widest, CLIPPED * widest)
        axes.set(
            title=f"{title}: fidelity less equal credit's, {found['uniform']:.3f} ({found['batches']} batches)",
            xlabel="worse than equal credit   |   better",
        )
        axes.grid(axis="x", alpha=0.25)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2)
        for one in beside:
            _draw_carriers(one, carriers)
        figure.savefig(file, format="png", dpi=110)


def _draw_carriers(axes: Axes, carriers: dict[str, Any]) -> None:
    """What each fifth of the tokens carries, feature by feature."""
    features = {name: shares[:QUANTILES] for name, shares in carriers.items() if name != "heads"}
    for place, ((name, shares), marker) in enumerate(zip(features.items(), MARKERS, strict=False)):
        where = [fifth + 0.08 * (place - 2) for fifth in range(QUANTILES)]
        spread = [100 * (one["high"] - one["low"]) / 2 for one in shares]
        shown = [100 * one["share"] for one in shares]
        axes.errorbar(where, shown, spread, marker=marker, linewidth=1, markersize=5, elinewidth=0.8, label=name)
    axes.axhline(100 / QUANTILES, color="black", linewidth=1, linestyle=":")
    axes.set_xticks(range(QUANTILES), ["lowest", "low", "middling", "high", "highest"])
    axes.set(title="Who carries the gradient", ylabel="% of the way", xlabel="fifth of a response's tokens by")
    axes.grid(alpha=0.25)
    axes.legend(loc="best", fontsize=8)
