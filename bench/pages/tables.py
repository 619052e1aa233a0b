"""Tables for the terminal and for pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def show(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[str]) -> None:
    """Print a table at its full width. The columns in `left` are aligned to the left."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for name in headings:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    needed = Console(width=1000).measure(table).maximum
    Console(width=max(Console().width, needed)).print(table)


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[str]) -> str:
    rules = [":--" if name in left else "--:" for name in headings]
    return "\n".join(f"| {' | '.join(line)} |" for line in [headings, rules, *rows])
