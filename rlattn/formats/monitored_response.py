"""The four-part response of a self-monitoring policy (CoT Monitor+, arXiv 2505.18807), and strict parsers for it.

`<think>R</think> <monitor>critique</monitor> <label>safe|unsafe</label> <output>Y</output>`: the policy thinks, judges
its own thoughts, labels them, and only then answers. Whatever deviates is malformed: a tag that is missing, repeated,
nested or out of order, text between the parts, an empty part, any other label. A label that may stand anywhere, the
answer included, could be forged.
"""

import re
from dataclasses import dataclass
from typing import Literal

from rlattn.formats.thought import with_opened_thought
from rlattn.formats.token_span import Decode, token_span
from rlattn.types import Prompt, Rollout

Label = Literal["safe", "unsafe"]

TAGS = ("think", "monitor", "label", "output")
MONITOR, LABEL_END = "<monitor>", "</label>"
_TAG = re.compile(rf"(</?(?:{'|'.join(TAGS)})>)")
_IN_ORDER = [tag for name in TAGS for tag in (f"<{name}>", f"</{name}>")]


@dataclass(frozen=True, kw_only=True)
class FourParts:
    """A well-formed response, its parts without the space around them."""

    thought: str
    critique: str
    label: Label
    output: str


def parse_four_parts(completion: str, prompt_text: str = "") -> FourParts | None:
    """The parts of a completion; None where it is malformed. A prompt that ends in `<think>` has opened that part."""
    between, tags = _split(with_opened_thought(completion, prompt_text))
    if tags != _IN_ORDER or any(text.strip() for text in between[::2]):
        return None
    thought, critique, label, output = (text.strip() for text in between[1::2])
    found = _label(label)
    if not (thought and critique and output and found):
        return None
    return FourParts(thought=thought, critique=critique, label=found, output=output)


def monitor_prompt(rollout: Rollout, decode: Decode) -> Prompt:
    """What a second policy continues with a critique and a label: the prompt and a well-formed completion's thought.

    The thought as the tokens that were written: a special token that it spells out in others must not become real, or
    a thought could end its own turn and speak as the user.
    """
    ids = rollout.completion_ids
    if not ids:  # text
        return rollout.prompt_text + rollout.completion[: rollout.completion.index(MONITOR) + len(MONITOR)]
    text = decode(ids)
    end = text.index(MONITOR) + len(MONITOR)
    whole = token_span(0, end, ids, decode).stop
    if len(decode(ids[:whole])) > end:  # the last token goes on behind the tag
        whole -= 1
    return [rollout.prompt_text, ids[:whole], text[len(decode(ids[:whole])) : end]]


def outside_monitor(rollout: Rollout, decode: Decode) -> list[bool] | None:
    """True for the tokens that are neither the critique nor the label; None where a completion is malformed, or text.

    A malformed one answers for all of its tokens: tags around the whole of it must not shield it.
    """
    if not rollout.completion_ids or parse_four_parts(rollout.completion, rollout.prompt_text) is None:
        return None
    text = decode(rollout.completion_ids)
    start, end = text.find(MONITOR), text.find(LABEL_END)
    if not 0 <= start < end:
        return None
    inside = token_span(start, end + len(LABEL_END), rollout.completion_ids, decode)
    return [i not in inside for i in range(len(rollout.completion_ids))]


def parse_verdict(continuation: str) -> Label | None:
    """The label in what a policy wrote after `<monitor>`; None where it is malformed or there are two. What follows the
    label may be cut off.
    """
    between, tags = _split(continuation)
    if tags[:3] != ["</monitor>", "<label>", "</label>"] or not set(tags[3:]) <= {"<output>", "</output>"}:
        return None
    return _label(between[2].strip()) if between[0].strip() and not between[1].strip() else None


def _split(text: str) -> tuple[list[str], list[str]]:
    """The texts between the tags, one more than there are tags, and the tags."""
    pieces = _TAG.split(text)
    return pieces[::2], pieces[1::2]


def _label(text: str) -> Label | None:
    return {"safe": "safe", "unsafe": "unsafe"}.get(text.lower())  # type: ignore[return-value]
