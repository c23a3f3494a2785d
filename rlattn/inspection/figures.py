"""The figures of `rlattn inspect`, drawn from what inspect.json holds and nothing else.

Colours are of Okabe and Ito, told apart by colour-blind eyes too: blue is local, vermilion global, green both coupled.
"""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from rlattn.report.tables import printable

LOCAL, GLOBAL, COUPLED, OTHER = "#0072B2", "#D55E00", "#009E73", "#767676"
RULE_COLOURS = {"local_chunk": LOCAL, "global_anchor": GLOBAL, "coupled_rhythm": COUPLED}
UNDEFINED = "#e3e3e3"
LABEL = 14  # characters of a token that its label shows
LABELLED = 60  # heads that an axis can name
INCHES_PER_TOKEN = 0.155
NO_GLYPH = "\N{WHITE SQUARE}"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture everywhere
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "text.parse_math": False,  # a token may be a dollar sign
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def draw_rhythm(report: dict[str, Any], file: Path) -> None:
    """One text: attention of local and global heads, WAAD, FAI and entropy, and what the credit rules pick."""
    drawn = report["figure"]
    text, shown = report["texts"][drawn["text"]], drawn["tokens"]
    weights = {rule: values[:shown] for rule, values in text["weights"].items()}
    low, high = report["horizon"]
    with matplotlib.rc_context(STYLE):
        width = max(9.0, 1.6 + INCHES_PER_TOKEN * shown)
        map_height = [min(0.42 * width, 7.5)] if drawn["local_map"] else []
        heights = [*map_height, 1.5, 1.5, 1.5, 0.9]
        figure = Figure(figsize=(width, sum(heights) + 3.2), layout="constrained")
        grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
        figure.suptitle(_drawable(report["model"]) + f"\n{_caption(text, shown)}", fontsize=10)
        if map_height:
            _draw_map(figure.add_subplot(grid[0, 0]), drawn["local_map"], "Attention, mean of the local heads", LOCAL)
            _draw_map(
                figure.add_subplot(grid[0, 1]), drawn["global_map"], "Attention, mean of the global heads", GLOBAL
            )
        waad, fai, entropy, rules = (figure.add_subplot(grid[len(map_height) + i, :]) for i in range(4))
        _draw_signal(waad, text["waad"][:shown], LOCAL, "local_chunk", weights["local_chunk"])
        waad.set_title(f"WAAD: how far back a token looks, in tokens, at most {report['window']}")
        _draw_signal(fai, text["fai"][:shown], GLOBAL, "global_anchor", weights["global_anchor"])
        fai.set_title(f"FAI: attention received from the tokens {low} to {high} later")
        _draw_signal(entropy, text["entropy"][:shown], OTHER)
        entropy.set_title("Entropy the token was drawn with, in nats")
        _draw_weights(rules, weights)
        for axes in (waad, fai, entropy, rules):
            axes.set_xlim(-0.8, shown - 0.2)
        rules.set_xticks(range(shown), [token_label(token) for token in text["tokens"][:shown]])
        rules.tick_params(axis="x", labelrotation=90, labelsize=8, length=2)
        figure.savefig(file, format="png", dpi=110)


def draw_heads(report: dict[str, Any], file: Path) -> None:
    """Every head of the chosen layers: how far it looks back, how spiky what it looks at is, which sets it is in."""
    heads = sorted(report["heads"], key=lambda head: head["span"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(9.0, min(18.0, 6 + 0.16 * len(heads))), 4.8), layout="constrained")
        figure.suptitle(
            f"{_drawable(report['model'])}: {len(heads)} heads of layers {', '.join(map(str, report['layers']))}, "
            f"mean over {len(report['texts'])} text{'s' * (len(report['texts']) > 1)}",
            fontsize=11,
        )
        ranked, spiky = figure.subplots(1, 2, width_ratios=[3, 2])
        _scatter_heads(ranked, range(len(heads)), [head["span"] for head in heads], heads)
        ranked.set(title="Span: how far back a head looks on average", ylabel="tokens", xlabel="layer.head")
        every = math.ceil(len(heads) / LABELLED)
        labels = [f"{head['layer']}.{head['head']}" for head in heads]
        ranked.set_xticks(range(0, len(heads), every), labels[::every], rotation=90, fontsize=8)
        known = [head for head in heads if head["kurtosis"] is not None]
        _scatter_heads(spiky, [head["span"] for head in known], [head["kurtosis"] for head in known], known)
        spiky.set(title="Kurtosis of what a head's tokens receive", xlabel="span, tokens", ylabel="excess kurtosis")
        keys = [_dot(LOCAL, "local set"), _dot(GLOBAL, "global set"), _dot(OTHER, "neither")]
        keys.append(_dot("white", "ringed: receiver set (highest kurtosis)", edge="black"))
        figure.legend(handles=keys, loc="outside lower center", ncols=4)
        for axes in (ranked, spiky):
            axes.grid(alpha=0.25)
        figure.savefig(file, format="png", dpi=110)


def token_label(token: str) -> str:
    """A token as it can be drawn on one line: control characters escaped, glyphs that the font lacks as a square."""
    text = token.strip(" ") or "\N{OPEN BOX}" * len(token)
    escaped = printable(text)
    return _drawable(escaped if len(escaped) <= LABEL else escaped[: LABEL - 1] + "…")


def _drawable(text: str) -> str:
    return "".join(char if ord(char) in _glyphs() else NO_GLYPH for char in printable(text))


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def _caption(text: dict[str, Any], shown: int) -> str:
    count = len(text["tokens"])
    whole = f"the response to {_drawable(text['where'])}, {count} token{'s' * (count > 1)}"
    return whole if shown == count else f"{whole}: the first {shown} are drawn, signals are of the whole response"


def _draw_map(axes: Axes, map_TT: list[list[float]], title: str, colour: str) -> None:
    # Attention is heavy-tailed: with a square root, small weights can be told from none.
    shades = LinearSegmentedColormap.from_list(title, ["white", colour, "black"])
    image = axes.imshow(map_TT, cmap=shades, norm=PowerNorm(0.5, vmin=0), interpolation="nearest")
    axes.set(title=title, xlabel="token that is looked at", ylabel="token that looks")
    axes.figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02, label="attention weight")


def _draw_signal(
    axes: Axes, values: Sequence[float | None], colour: str, rule: str = "", weights: Sequence[float] = ()
) -> None:
    numbers = [math.nan if value is None else value for value in values]
    axes.plot(numbers, color=colour, linewidth=1.1, marker="o", markersize=3, markerfacecolor="white")
    keys: list[Any] = []
    if rule:
        picked = [place for place, weight in enumerate(weights) if weight > 1]
        axes.plot(picked, [numbers[place] for place in picked], "o", color=colour, markersize=4.5)
        keys.append(_dot(colour, f"picked by {rule}"))
    undefined = [place for place, number in enumerate(numbers) if math.isnan(number)]
    if undefined:
        axes.bar(undefined, 1, width=1, color=UNDEFINED, transform=axes.get_xaxis_transform(), zorder=0)
        keys.append(Patch(color=UNDEFINED, label="undefined"))
    axes.set_xticks(range(0, len(values), 10 if len(values) > 30 else 1))
    axes.set_ylim(0, 1.08 * max((number for number in numbers if number > 0), default=1))
    axes.grid(alpha=0.25)
    if keys:  # above the plot, beside its title: it can hide nothing there
        axes.legend(handles=keys, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1, ncols=len(keys))


def _draw_weights(axes: Axes, weights: dict[str, list[float]]) -> None:
    """One row of cells a rule, the darker the higher the weight."""
    highest = max(max(values) for values in weights.values())
    for row, (rule, values) in enumerate(weights.items()):
        shades = LinearSegmentedColormap.from_list(rule, ["#f2f2f2", RULE_COLOURS[rule]])
        edges = [place - 0.5 for place in range(len(values) + 1)]
        cells: dict[str, Any] = {
            "edgecolors": "white",
            "linewidth": 0.8,
            "cmap": shades,
            "vmin": 1,
            "vmax": max(highest, 1.5),
        }
        axes.pcolormesh(edges, [row - 0.42, row + 0.42], [values], **cells)
    axes.set_ylim(len(weights) - 0.5, -0.5)
    axes.set_yticks(range(len(weights)), list(weights))
    for label, rule in zip(axes.get_yticklabels(), weights, strict=True):
        label.set_color(RULE_COLOURS[rule])
    axes.tick_params(axis="y", length=0)
    axes.set_title(f"Weight of a token by credit rule: grey 1, darkest {highest:g}")


def _scatter_heads(axes: Axes, x: Sequence[float], y: Sequence[float], heads: Sequence[dict[str, Any]]) -> None:
    axes.scatter(
        x,
        y,
        s=46 if len(heads) <= LABELLED else 22,
        c=[_colour(head) for head in heads],
        edgecolors=[(0, 0, 0, head["receiver"]) for head in heads],
        linewidths=1.6 if len(heads) <= LABELLED else 1.1,
    )


def _colour(head: dict[str, Any]) -> str:
    """Of the set that the head is in for most texts."""
    share, colour = max((head["local"], LOCAL), (head["global"], GLOBAL))
    return colour if share >= 0.5 else OTHER


def _dot(colour: str, label: str, edge: str | None = None) -> Line2D:
    return Line2D([], [], marker="o", linestyle="", color=colour, markeredgecolor=edge or colour, label=label)
