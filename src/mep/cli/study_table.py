"""The tables of `mep study`, from its record: over depth, and over beta."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console

from mep.cli.layout import print_table, print_text, share
from mep.cli.studying import COMMON_BETA, COMMON_DEPTH, DEFAULT, nearest

Record = dict[str, Any]
Row = dict[str, Any]
Cell = Callable[[Row], str]

UNSETTLED = "*"
CAPTION = (
    "Each cell: initialised / trained. Default: beta=None chooses one for each example. Sweeps: of an example, mean. "
    "Settled: share of the examples whose residual came within the tolerance. Error: of the whole gradient against "
    f"backprop's, relative. {UNSETTLED}: some example did not settle; the gradient is that of where settling stopped. "
    "A dash: nothing to compare: the gradient vanishes, or is not finite."
)


def show(record: Record, console: Console) -> None:
    """Print the tables: ruled on a terminal, as Markdown anywhere else."""
    settings = record["settings"]
    print_text(
        console,
        f"Multilayer perceptrons of width {settings['width']} on digits, batch {settings['batch_size']}, tolerance "
        f"{settings['tol']:g}, as initialised and after {settings['train_steps']} steps of Adam.",
    )
    for title, over, rows in sections(record):
        for name, cell in CELLS.items():
            if is_informative(name, rows):
                console.print()
                print_text(console, f"{name}, {title}:")
                _show(console, rows, over, cell)
    print_text(console, CAPTION)


def sections(record: Record) -> list[tuple[str, str, list[Row]]]:
    """The rows that differ in depth or in beta alone: a title, "depth" or "beta", and the rows."""
    settings, rows = record["settings"], record["rows"]
    beta, depth = nearest(settings["betas"], COMMON_BETA), nearest(settings["depths"], COMMON_DEPTH)
    return [
        ("over depth, default beta", "depth", [row for row in rows if row["beta"] is DEFAULT]),
        (f"over depth, beta {beta:g}", "depth", [row for row in rows if row["beta"] == beta]),
        (f"over beta, {depth} hidden layers", "beta", [row for row in rows if row["depth"] == depth]),
    ]


def is_informative(name: str, rows: list[Row]) -> bool:
    """Beta only where it is chosen and not the title itself; the share that settled only where some did not."""
    if name == "Beta, median":
        return all(row["beta"] is DEFAULT for row in rows)
    return name != "Settled" or any(row["settled"] != 1 for row in rows)


def _show(console: Console, rows: list[Row], over: str, cell: Cell) -> None:
    places = sorted({row[over] for row in rows}, key=lambda place: -1 if place is DEFAULT else place)
    lines: dict[str, dict[tuple[Any, str], str]] = {}
    for row in rows:
        lines.setdefault(family(row), {})[row[over], row["stage"]] = cell(row)
    titles = ["Network", *("default" if place is DEFAULT else f"{place:g}" for place in places)]
    print_table(
        console,
        titles,
        ([name, *(f"{cells[p, 'initial']} / {cells[p, 'trained']}" for p in places)] for name, cells in lines.items()),
    )


def family(row: Row) -> str:
    """What a network is called."""
    shortcuts = "" if row["shortcuts"] == "plain" else "residual "
    start = "" if row["start"] == "torch" else f", {row['start'].capitalize()}"
    return f"{shortcuts}{row['activation']}{start}"


def percent(fraction: float) -> str:
    """In percent, with two digits at least.

    >>> percent(0.00123), percent(0.0456), percent(0.999)
    ('0.12%', '4.6%', '100%')
    """
    return f"{100 * fraction:{'.0f' if fraction >= 0.1 else '.2g'}}%"


def _cell(key: str, form: Callable[[float], str], mark: str = "") -> Cell:
    """A number, and a mark behind it where some example did not settle."""

    def cell(row: Row) -> str:
        return "—" if row[key] is None else form(row[key]) + (mark if row["settled"] < 1 else "")

    return cell


CELLS: dict[str, Cell] = {
    "Beta, median": _cell("median_beta", "{:.2g}".format),
    "Settled": _cell("settled", share),
    "Sweeps": _cell("sweeps", "{:.1f}".format, UNSETTLED),
    "Error": _cell("error", percent, UNSETTLED),
}
