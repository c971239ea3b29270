"""How tables reach the reader: ruled on a terminal, as Markdown anywhere else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

QUIET = 0.9  # of the time, at least: else the times say little


def output(markdown: bool = False) -> Console:
    """Standard output, as it is; `markdown=True` writes Markdown to a terminal, too."""
    return Console(force_terminal=False if markdown else None)


def print_table(console: Console, titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; its first column is text, the others are numbers.

    On a terminal, columns that do not fit stand in a table below, beside the first column once more.
    """
    rows = list(rows)
    if not console.is_terminal:
        console.print(markdown_table(titles, rows), markup=False, highlight=False, soft_wrap=True)
        return
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for places in columns_that_fit(widths, console.width):
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for place in places:
            table.add_column(titles[place], justify="right" if place else "left", no_wrap=True)
        for row in rows:
            table.add_row(*(row[place] for place in places))
        console.print(table, markup=False)


def columns_that_fit(widths: Sequence[int], available: int) -> list[list[int]]:
    """The places of the columns of each table, if no table is to be wider than what is available.

    Every table has column 0. A column of width w takes w + 2, and a table one more.

    >>> columns_that_fit([5, 10, 10, 10], available=32)
    [[0, 1, 2], [0, 3]]
    """
    tables, free = [[0]], available - widths[0] - 3
    for place, width in enumerate(widths[1:], start=1):
        if width + 2 > free and len(tables[-1]) > 1:
            tables.append([0])
            free = available - widths[0] - 3
        tables[-1].append(place)
        free -= width + 2
    return tables


def print_text(console: Console, text: str) -> None:
    """Print a paragraph, a caption for instance; Markdown gets it on one line, after an empty one."""
    if not console.is_terminal:
        text = f"\n{text}"
    console.print(text, style="dim", markup=False, highlight=False, soft_wrap=not console.is_terminal)


def share(fraction: float) -> str:
    """A share in percent, rounded down: 100% are all of them.

    >>> share(1.0), share(0.99996), share(0.5)
    ('100%', '99.9%', '50%')
    """
    return f"{math.floor(round(1000 * fraction, 6)) / 10:g}%"


def warn_if_busy(console: Console, running: Iterable[float | None]) -> None:
    """Say so if times are in doubt; `running` are the shares of them in which we were given the processor."""
    least = min((share for share in running if share is not None), default=1.0)
    if least < QUIET:
        print_text(
            console,
            f"The machine was busy with something else up to {1 - least:.0%} of the time, which lengthens long steps "
            "more than short ones: measure again on a quiet one.",
        )


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The table in Markdown, its columns as wide as they need to be.

    >>> print(markdown_table(["name", "size"], [["a", "10"], ["long name", "2"]]))
    | name      | size |
    |:----------|-----:|
    | a         |   10 |
    | long name |    2 |
    """
    lines = [titles, *rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(titles))]
    rule = [":" + "-" * (widths[0] + 1), *("-" * (width + 1) + ":" for width in widths[1:])]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    head, *body = [f"| {' | '.join(cells)} |" for cells in padded]
    return "\n".join([head, f"|{'|'.join(rule)}|", *body])
