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


def restarts() -> int:
    """How often torchrun has started the ranks anew."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0)


def check_launcher() -> None:
    """Raises UserError where the environment does not name a rank among others: what it says must hold together."""
    if not 0 <= rank() < world_size():
        problem = f"RANK={rank()} with WORLD_SIZE={world_size()} is no rank of a run."
        raise UserError("RANK", problem, "Launchers set both; unset them to train in one process.")
    local = _number("LOCAL_RANK", 0)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if world_size() > 1 and missing:
        raise UserError(missing[0], f"is not set, with WORLD_SIZE={world_size()}.", "Launchers set it: see launch/.")
    wrong = "LOCAL_RANK" if local >= world_size() else ""
    if world_size() > 1 and not 0 < _number("MASTER_PORT", 0) < 2**16:
        wrong = "MASTER_PORT"
    if wrong:
        problem = f"the launcher's environment does not hold together: it is {os.environ.get(wrong)}."
        raise UserError(wrong, problem, "Launchers set it: see launch/.")


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
