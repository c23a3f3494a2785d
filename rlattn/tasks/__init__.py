"""Tasks: where the prompts come from and how an answer is judged. One file a task, one line here.

A task is a frozen dataclass; its fields are its options in a recipe (`task: {kind: countdown, numbers: [3, 4]}`).
"""

from collections.abc import Iterable, Mapping
from random import Random
from typing import Any, Literal, Protocol, runtime_checkable

from rlattn.tasks.arithmetic import Arithmetic
from rlattn.tasks.countdown import Countdown
from rlattn.tasks.dataset.task import DatasetTask
from rlattn.tasks.ledger import Ledger
from rlattn.tasks.questions.task import Questions

Row = Mapping[str, Any]
Split = Literal["train", "eval"]


@runtime_checkable
class Task(Protocol):
    """What rlattn needs of a task. Your own: a dataclass with these methods, named by `python:` in a recipe.

    It may also have `metrics(completion, row) -> dict[str, float]`: numbers about a completion besides its being right.
    Their means are logged as `task/<name>` in training and `eval/<name>` on held-out rows; a completion on which it
    fails is left out, and the first cause told.
    """

    def rows(self, split: Split) -> Iterable[Row]:
        """The rows of a split: a list of dicts, a `datasets.Dataset` or a `datasets.IterableDataset`.

        Every row has `prompt` (text, or chat messages) and whatever `verify` reads. Train and eval are disjoint.
        """
        ...

    def verify(self, completion: str, row: Row) -> float:
        """1.0 where the final answer of `completion` is right, else 0.0. Never raises on what a policy may write."""
        ...

    def gold(self, row: Row) -> str:
        """A completion that `verify` scores 1.0."""
        ...


@runtime_checkable
class WarmStartable(Task, Protocol):
    """A task that can also teach a tiny policy its format before RL."""

    def trace(self, row: Row, rng: Random, noise: float) -> str:
        """A worked response in the task's format. `noise`: chance that a worked step goes wrong, in [0, 1]."""
        ...


@runtime_checkable
class DialogueTask(Task, Protocol):
    """A task whose rows are dialogues; `completion` is then the transcript (`rlattn/formats/transcript.py`).

    It also has `questions`, the most turns that are replied to; `turn_tokens`, the longest turn of the policy's; and
    `style`: `text`, or `tools` where the policy asks by calling the tool `ask`.
    """

    @property
    def questions(self) -> int: ...

    @property
    def turn_tokens(self) -> int: ...

    @property
    def style(self) -> Literal["text", "tools"]: ...

    def reply(self, turn: str, row: Row) -> str | None:
        """What is said to a turn of the policy's; None where it ends the dialogue. Pure; never raises."""
        ...


TASKS: dict[str, type] = {
    "arithmetic": Arithmetic,
    "countdown": Countdown,
    "dataset": DatasetTask,
    "ledger": Ledger,
    "questions": Questions,
}
