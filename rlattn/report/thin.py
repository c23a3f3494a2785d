"""What keeps a report small, however long the run: curves thinned, steps chosen evenly, texts shortened. Pure."""

import json
import math
from typing import Any

POINTS = 600  # of a curve


def thinned(points: list[list[float]], count: int = POINTS) -> list[list[float]]:
    """At most about `count` points: of every stretch its lowest and its highest, and the two ends."""
    if len(points) <= count:
        return points
    stretch = math.ceil(2 * len(points) / (count - 2))
    kept = [points[0]]
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        ends = {id(p): p for p in (min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1]))}
        kept += sorted(ends.values())
    return [*kept, points[-1]]


def evenly(items: list[Any], count: int) -> list[Any]:
    """At most `count` of them, evenly spaced, the first and the last included."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def spread(items: list[Any]) -> list[Any]:
    """All of them, in an order whose every beginning is spread over the whole: the ends, the middle, the quarters."""
    last = len(items) - 1
    places, gaps = list(dict.fromkeys([0, max(0, last)])), [(0, last)]
    for low, high in gaps:
        if high - low > 1:
            middle = (low + high) // 2
            places.append(middle)
            gaps += [(low, middle), (middle, high)]
    return [items[place] for place in places] if items else []


def shortened(text: str, room: int) -> str:
    """The two ends of a text that takes more than `room` bytes as JSON, and how much was left out between them."""
    size = len(json.dumps(text))
    if size <= room:
        return text
    end = len(text) * room // size // 2
    return f"{text[:end]} [… {len(text) - 2 * end} characters left out …] {text[len(text) - end :]}"
