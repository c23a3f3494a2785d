"""Format: 1 where the completion is made of the expected tags, else 0 (DeepSeek-R1, arXiv 2501.12948, section 2.2)."""

import re
from dataclasses import dataclass

from rlattn.types import Rollout


@dataclass(frozen=True, kw_only=True)
class Format:
    """Every tag opened once, closed once, in this order, with something in it and nothing but space between them.

    A tag that the prompt opened (chat templates that end in `<think>`) counts as the completion's own.
    """

    tags: tuple[str, ...] = ("think", "answer")
    trailing_text: bool = False  # text after the last tag is allowed: `<think>…</think> The answer is \boxed{4}`

    def __post_init__(self) -> None:
        if not self.tags or not all(re.fullmatch(r"[A-Za-z][\w-]*", tag) for tag in self.tags):
            raise ValueError("tags: expected at least one tag name without brackets, such as [think, answer]")
        if len(set(self.tags)) < len(self.tags):
            raise ValueError(f"tags: expected every tag once, got {list(self.tags)}")

    def score(self, rollout: Rollout) -> float:
        text = rollout.completion.strip()
        if rollout.prompt_text.rstrip().endswith(f"<{self.tags[0]}>"):
            text = f"<{self.tags[0]}>{text}"
        if any(text.count(mark) != 1 for tag in self.tags for mark in (f"<{tag}>", f"</{tag}>")):
            return 0.0
        for tag in self.tags:
            opening, closing = f"<{tag}>", f"</{tag}>"
            body, _, rest = text.removeprefix(opening).partition(closing)
            if not text.startswith(opening) or not body.strip():
                return 0.0
            text = rest.lstrip()
        return float(not text or self.trailing_text)
