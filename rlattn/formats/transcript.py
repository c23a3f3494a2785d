"""A dialogue as one text: the policy's turns, and between them what it was told, as `<reply> … </reply>`. Pure.

    What is the size of the parcel? <reply> The size is small. </reply> … <reply> … </reply> <spec> … </spec>

Rewards and metrics read this text. Only an environment writes these tags: a policy's own are disarmed, so that it
cannot put words into another's mouth.
"""

import re
from collections.abc import Iterable, Sequence

OPENING, CLOSING = "<reply>", "</reply>"
TAG, DISARMED = re.compile(r"<(/?)reply>"), r"(\1reply)"
NOTHING = "…"  # a turn without a word, so that turns can be counted


def write_transcript(segments: Iterable[tuple[str, bool]]) -> str:
    """From the segments of a completion, each with whether the policy wrote it."""
    return " ".join(
        (TAG.sub(DISARMED, text).strip() or NOTHING) if own else f"<reply> {TAG.sub(DISARMED, text).strip()} </reply>"
        for text, own in segments
    )


def read_transcript(text: str) -> list[tuple[str, str | None]]:
    """The policy's turns, each with the reply to it; None where the dialogue ended."""
    turns: list[tuple[str, str | None]] = []
    start = 0
    # by `find`: a regex is quadratic in unclosed tags
    while (opening := text.find(OPENING, start)) >= 0 and (closing := text.find(CLOSING, opening)) >= 0:
        turns.append((text[start:opening].strip(), text[opening + len(OPENING) : closing].strip()))
        start = closing + len(CLOSING)
    last = text[start:].strip()
    return [*turns, (last, None)] if last else turns


def runs(mask: Sequence[bool]) -> list[tuple[int, int, bool]]:
    """Start, end and value of every stretch of equal flags: the segments of a completion, in order."""
    starts = [place for place in range(len(mask)) if place == 0 or mask[place] != mask[place - 1]]
    return [(start, end, bool(mask[start])) for start, end in zip(starts, [*starts[1:], len(mask)], strict=True)]
