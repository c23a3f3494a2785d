"""Tasks: where the prompts come from and how an answer is judged. One file a task, one line here.

A task is a frozen dataclass; its fields are its options in a recipe (`task: {kind: countdown, numbers: [3, 4]}`).
"""

from rlattn.tasks.arithmetic import Arithmetic
from rlattn.tasks.countdown import Countdown
from rlattn.tasks.dataset.task import DatasetTask
from rlattn.tasks.ledger import Ledger
from rlattn.tasks.questions.task import Questions

TASKS: dict[str, type] = {
    "arithmetic": Arithmetic,
    "countdown": Countdown,
    "dataset": DatasetTask,
    "ledger": Ledger,
    "questions": Questions,
}
