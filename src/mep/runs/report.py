"""How results reach the reader: tables, ruled on a terminal and Markdown anywhere else, and pictures."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from mep.errors import ArgumentError
from mep.runs import records
from mep.runs.records import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
Cell = Callable[[Row], str]
"""What a column shows of a row of a record."""
NONE = "—"
BUSY_BELOW = 0.9  # of the time in which we were given the processor: with less, times are in doubt

# Okabe and Ito's palette, whose colours look different to the colour-blind, too, without its yellow, which is hardly
# seen on white: https://jfly.uni-koeln.de/color
COLOURS = ("#000000", "#56B4E9", "#E69F00", "#0072B2", "#D55E00", "#CC79A7", "#009E73", "#882255")
BLACK, SKY, ORANGE, BLUE, VERMILION, PINK, GREEN, WINE = COLOURS
GREY = "#666666"
PICTURES = (".png", ".svg", ".pdf")


def publish(
    record: Record, path: Path, draw: Callable[[Record, Path], None], show: Callable[[Record, Console], None]
) -> None:
    """Write a new record, draw its picture beside it, print its tables, and say where both are."""
    picture = path.with_suffix(".png")
    records.write(path, record)
    draw(record, picture)
    show(record, output())
    print(f"\nRecord: {path}\nPicture: {picture}")


# Tables


def output(markdown: bool = False) -> Console:
    """Standard output, as it is; `markdown=True` writes Markdown to a terminal, too."""
    return Console(force_terminal=False if markdown else None)


def print_table(console: Console, columns: Mapping[str, Cell], rows: Sequence[Row]) -> None:
    """Print a table of these rows, with a title and a cell for each column; see `print_cells`."""
    print_cells(console, list(columns), [[cell(row) for cell in columns.values()] for row in rows])


def print_cells(console: Console, titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; its first column is text, the others are numbers.

    On a terminal, columns that do not fit stand in a table below, beside the first column once more.
    """
    rows = list(rows)
    if console.is_terminal:
        for number, part in enumerate(tables(titles, rows, console.width)):
            if number:
                console.print()
            console.print(part, markup=False)
    else:
        console.print(markdown_table(titles, rows), markup=False, highlight=False, soft_wrap=True)


def tables(titles: Sequence[str], rows: Sequence[Sequence[str]], available: int) -> list[Table]:
    """The table in ruled parts, none of them wider than `available` characters."""
    # A long title takes two lines, so that the numbers decide how wide a column is; a long first cell, several.
    rows = [[textwrap.fill(row[0], available // 2), *row[1:]] for row in rows]
    widest = [max((len(row[place]) for row in rows), default=0) for place in range(len(titles))]
    titles = [_two_lines(title, width) for title, width in zip(titles, widest, strict=True)]
    widths = [
        max(len(line) for cell in column for line in cell.split("\n")) for column in zip(titles, *rows, strict=True)
    ]
    parts = []
    for places in columns_that_fit(widths, available):
        part = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
        for place in places:
            part.add_column(titles[place], justify="right" if place else "left", overflow="fold", vertical="bottom")
        for row in rows:
            part.add_row(*(row[place] for place in places))
        parts.append(part)
    return parts


def _two_lines(title: str, width: int) -> str:
    """The title in two lines at most, and if possible in no more than this width."""
    for wide in range(max(width, 1), len(title)):
        # A slash stays with the word behind it.
        lines = textwrap.wrap(title.replace("/ ", "/\0"), wide, break_long_words=False)
        if len(lines) <= 2 and max(map(len, lines)) <= wide:
            return "\n".join(lines).replace("\0", " ")
    return title


def columns_that_fit(widths: Sequence[int], available: int) -> list[list[int]]:
    """The places of the columns of each table, if no table is to be wider than what is available.

    Every table has column 0; columns stand two spaces apart.

    >>> columns_that_fit([5, 10, 10, 10], available=32)
    [[0, 1, 2], [0, 3]]
    """
    tables, free = [[0]], available - widths[0]
    for place, width in enumerate(widths[1:], start=1):
        if width + 2 > free and len(tables[-1]) > 1:
            tables.append([0])
            free = available - widths[0]
        tables[-1].append(place)
        free -= width + 2
    return tables


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


def print_text(console: Console, text: str) -> None:
    """Print a paragraph, a caption for instance; Markdown gets it on one line, after an empty one."""
    if not console.is_terminal:
        text = f"\n{text}"
    console.print(text, style="dim", markup=False, highlight=False, soft_wrap=not console.is_terminal)


def warn_if_busy(console: Console, running: Iterable[float | None]) -> None:
    """Say so if times are in doubt; `running` are the shares of them in which we were given the processor."""
    least = min((share for share in running if share is not None), default=1.0)
    if least < BUSY_BELOW:
        print_text(
            console,
            f"The machine was busy with something else up to {1 - least:.0%} of the time, which lengthens long steps "
            "more than short ones: measure again on a quiet one.",
        )


def show_failed(console: Console, rows: Iterable[Row]) -> None:
    """Print why some rows are in no table."""
    for row in rows:
        if row["error"] is not None:
            print_text(console, f"{row['label']} failed: {row['error']}")


# Cells


def label(row: Row) -> str:
    """The label of a row."""
    return str(row["label"])


def number(key: str, form: str, unit: float = 1.0) -> Cell:
    """A cell with the number under this key, in this unit; a dash where there is none."""
    return lambda row: NONE if row[key] is None else form.format(row[key] / unit)


def share(fraction: float | None) -> str:
    """A share in percent, rounded down: 100% are all of them.

    >>> share(1.0), share(0.99996), share(0.5)
    ('100%', '99.9%', '50%')
    """
    return NONE if fraction is None else f"{math.floor(round(1000 * fraction, 6)) / 10:g}%"


def plural(count: int, noun: str) -> str:
    """The count and the noun, with an s but for one."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


# Pictures


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size, in inches, whose parts make room for each other."""
    from matplotlib.figure import Figure  # heavy, and of no use to a command that draws nothing

    return Figure(figsize=(width, height), layout="constrained")


def tidy(axes: Any, ticks: Sequence[float] | None = None) -> None:
    """Remove the frame above and to the right; with `ticks`, make the x axis logarithmic with these alone."""
    axes.spines[["top", "right"]].set_visible(False)
    if ticks is not None:
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.minorticks_off()


def sample(label: str, **style: Any) -> Any:
    """A line or marker for a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **style)


def save(figure: Figure, title: str, record: Record, path: Path) -> None:
    """Head the figure with a title and where the record was made, and write it into `path`."""
    if path.suffix not in PICTURES:
        raise ArgumentError(f"Cannot draw {path}: a picture is one of {', '.join(PICTURES)}.")
    machine = record["machine"]
    made = machine["gpu"] or f"{machine['processor']}, {plural(machine['threads'], 'thread')}"
    if record["commit"]:
        made += f", commit {record['commit'][:8]}"
    figure.suptitle(f"{title}; {made}", x=0.01, ha="left", fontsize=10, color=GREY)
    records.write_atomically(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=150))
