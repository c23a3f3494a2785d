"""A run outlives its terminal: what can no longer be written there is dropped, instead of ending the run."""

import io
import sys
from typing import Any


class Unheard(io.FileIO):
    """A terminal, pipe or file that swallows what it can no longer take: closed (EIO), unread (EPIPE) or full."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def outlive_terminal() -> None:
    """Makes standard output and error of this process such; before anything else holds on to them."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):  # a test's, a notebook's
            continue
        stream.flush()
        raw = Unheard(stream.fileno(), "w", closefd=False)
        by_line = stream.line_buffering or stream.write_through  # PYTHONUNBUFFERED
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, stream.errors, None, by_line))
