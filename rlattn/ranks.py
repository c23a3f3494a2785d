"""Which process this is, from the launcher's environment: known before torch is imported."""

import os

from rlattn.errors import UserError

LAUNCHER = "RLATTN_LAUNCHER"  # in a rank's environment: the process id of the `rlattn train --ranks` that started it


def rank() -> int:
    return _number("RANK", 0)


def is_main() -> bool:
    return rank() == 0


def world_size() -> int:
    return _number("WORLD_SIZE", 1)


def orphaned() -> bool:
    """Whether the `rlattn train --ranks` that started this process is gone. False under any other launcher."""
    return os.environ.get(LAUNCHER, str(os.getppid())) != str(os.getppid())


def say(text: str) -> None:
    """Prints once, on rank 0."""
    if is_main():
        print(text, flush=True)


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise UserError(variable, f"the environment variable is {text!r}, no number.", "Launchers set it; unset it.")
    return int(text)
