"""Tables on the terminal, as plain text: what a run wrote into them is never read as markup."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def show_tables(tables: list[dict[str, Any]]) -> None:
    console = Console()
    for one in tables:
        console.print(Text(f"\n{one['title']}. {one['about']}"))
        if not one["rows"]:
            continue
        table = Table(box=None, pad_edge=False)
        for column in one["columns"]:
            table.add_column(Text(printable(column)), overflow="fold")
        for row in one["rows"]:
            table.add_row(*(Text(printable(cell)) for cell in row))
        console.print(table)


def printable(text: str) -> str:
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
