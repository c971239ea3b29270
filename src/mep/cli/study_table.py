"""The tables of `mep study`, from its record: over depth, and over beta."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console

from mep.cli.layout import print_table, print_text
from mep.cli.studying import COMMON_BETA, COMMON_DEPTH, nearest

Record = dict[str, Any]
Row = dict[str, Any]

CAPTION = (
    "Each cell: initialised / trained. Used: the median over the examples, each at most the one asked for, and less "
    "where it answers strongly (`mep.Sweep(strength=...)`). Sweeps: an asterisk where some example did not settle. "
    "Error: of the whole gradient against backprop's, relative. A dash: nothing to compare: the gradient vanishes, or "
    "the loss is not finite."
)


def show(record: Record, console: Console) -> None:
    """Print the tables: ruled on a terminal, as Markdown anywhere else."""
    settings, rows = record["settings"], record["rows"]
    beta, depth = nearest(settings["betas"], COMMON_BETA), nearest(settings["depths"], COMMON_DEPTH)
    print_text(
        console,
        f"Multilayer perceptrons of width {settings['width']} on digits, batch {settings['batch_size']}, tolerance "
        f"{settings['tol']:g}, as initialised and after {settings['train_steps']} steps of Adam.",
    )
    for title, over, fixed in (
        (f"over depth, beta {beta:g}", "depth", {"beta": beta}),
        (f"over beta, {depth} hidden layers", "beta", {"depth": depth}),
    ):
        some = [row for row in rows if all(row[key] == value for key, value in fixed.items())]
        for name, cell in CELLS.items():
            console.print()
            print_text(console, f"{name}, {title}:")
            _show(console, some, over, cell)
    print_text(console, CAPTION)


def _show(console: Console, rows: list[Row], over: str, cell: Callable[[Row], str]) -> None:
    places = sorted({row[over] for row in rows})
    lines: dict[str, dict[tuple[Any, str], str]] = {}
    for row in rows:
        lines.setdefault(family(row), {})[row[over], row["stage"]] = cell(row)
    titles = ["Network", *(f"{place:g}" for place in places)]
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


def _number(key: str, form: str) -> Callable[[Row], str]:
    return lambda row: "—" if row[key] is None else form.format(row[key])


def _sweeps(row: Row) -> str:
    return "—" if row["sweeps"] is None else f"{row['sweeps']}{'' if row['converged'] else '*'}"


CELLS: dict[str, Callable[[Row], str]] = {
    "Beta used": _number("used", "{:.2g}"),
    "Sweeps": _sweeps,
    "Error": _number("error", "{:.0e}"),
}
