"""Which process this is, from the launcher's environment: known before torch is imported."""

import os


def is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def say(text: str) -> None:
    """Prints once, on rank 0."""
    if is_main():
        print(text, flush=True)
