"""The tables of `mep profile`, from its record: what a step costs, and what its settling buys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from mep.cli.layout import print_table, print_text, warn_if_busy

Record = dict[str, Any]
Row = dict[str, Any]
Cell = Callable[[Row], str]
NONE = "—"


def show(record: Record, console: Console) -> None:
    """Print the tables: ruled on a terminal, as Markdown anywhere else."""
    settings = record["settings"]
    print_text(console, "{data}, {model}, batch {batch_size}, after {train_steps} steps of SGD.".format(**settings))
    show_rows(record["rows"], console)


def show_rows(rows: Sequence[Row], console: Console) -> None:
    """Print the tables of these rows."""
    able = [row for row in rows if row["error"] is None]
    for columns, caption in ((COST, COST_CAPTION), (GAIN, GAIN_CAPTION)):
        console.print()
        print_table(console, list(columns), ([cell(row) for cell in columns.values()] for row in able))
        print_text(console, caption)
    warn_if_busy(console, (row["running"] for row in able))
    for row in rows:
        if row["error"] is not None:
            print_text(console, f"{row['label']} failed: {row['error']}")


COST_CAPTION = (
    "Step: median, and half the distance between the quartiles. Then the shares of the free phase (the forward pass), "
    "of settling, of the contrast (for SGD: of backprop), of the update with its constraints, and of the rest: checks "
    "and bookkeeping."
)
GAIN_CAPTION = (
    "Steps: sweeps or steps of descent. Residual: relative distance from equilibrium, mean over the examples, and at "
    "most. Against the exact EP gradient of the same beta: cosine and relative size, of all parameters and of the "
    "first weight alone, and gap, the relative error. Bias: the relative error of that exact gradient itself, against "
    "backprop's; cos BP: the cosine with backprop's of what the recipe found. Bought: by what factor the steps beyond "
    "those of the row above shrink the gap; nothing, where the gap was within the bias before."
)


def _cell(key: str, form: str) -> Cell:
    return lambda row: NONE if row[key] is None else form.format(row[key])


def _label(row: Row) -> str:
    return str(row["label"])


def _seconds(row: Row) -> str:
    return f"{1000 * row['seconds']['median']:.2f} ms"


def _spread(row: Row) -> str:
    times = row["seconds"]
    return f"{(times['high'] - times['low']) / 2 / times['median']:.0%}"


def _share(*phases: str) -> Cell:
    def cell(row: Row) -> str:
        found = [row["shares"][phase] for phase in phases if phase in row["shares"]]
        return f"{sum(found):.0%}" if found else NONE

    return cell


def _bought(row: Row) -> str:
    if row["bought"] is None:
        return NONE
    return "nothing" if row["idle"] else f"÷ {row['bought']:.2g}"


COST: dict[str, Cell] = {
    "Recipe": _label,
    "Step": _seconds,
    "±": _spread,
    "/ backprop": lambda row: f"{row['ratio']['median']:.2f}",
    "Free": _share("free"),
    "Settle": _share("settle"),
    "Contrast": _share("contrast", "backprop"),
    "Update": _share("update"),
    "Rest": _share("rest"),
}
GAIN: dict[str, Cell] = {
    "Recipe": _label,
    "Steps": _cell("iterations", "{:.1f}"),
    "Residual": _cell("residual", "{:.1e}"),
    "at most": _cell("residual_max", "{:.1e}"),
    "Cosine": _cell("cosine", "{:.4f}"),
    "Size": _cell("size", "{:.3f}"),
    "1st: cos": _cell("first_cosine", "{:.4f}"),
    "1st: size": _cell("first_size", "{:.3f}"),
    "Gap": _cell("gap", "{:.1e}"),
    "Bought": _bought,
    "Bias": _cell("bias", "{:.1e}"),
    "cos BP": _cell("backprop_cosine", "{:.4f}"),
}
