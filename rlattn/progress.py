"""Progress on the terminal: a bar where somebody watches, a line every few seconds where a file does."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_SECONDS = 5.0


@contextmanager
def progress(label: str, total: int, start: int = 0) -> Iterator[Callable[[int, str], None]]:
    """Yields `update(done, text)`. `start`: what an earlier session had done, so that the time left is right."""
    began = time.monotonic()

    def time_left(done: int) -> str:
        seconds = (time.monotonic() - began) / max(done - start, 1) * (total - done)
        return f", {duration(seconds)} left" if start + 1 < done < total else ""  # the first one tells too little

    if not sys.stderr.isatty():
        last = -LINE_SECONDS

        def line(done: int, text: str) -> None:
            nonlocal last
            if time.monotonic() - last >= LINE_SECONDS or done == total:
                last = time.monotonic()
                print(f"{label} {done}/{total}: {text}{time_left(done)}", file=sys.stderr, flush=True)

        yield line
        return

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (
        TextColumn(label),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        bar = bars.add_task(label, total=total, completed=start, text="")
        yield lambda done, text: bars.update(bar, completed=done, text=text + time_left(done))


def duration(seconds: float) -> str:
    """`48 s`, `3 min 05 s`, `2 h 10 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def visible(text: str) -> str:
    """Model text as a terminal may show it: control characters and escape sequences as symbols, one line."""
    return "".join(c if c.isprintable() else "␊" if c == "\n" else "·" for c in text)
