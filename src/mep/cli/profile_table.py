"""The tables of `mep profile`, from its record: what a step costs, and what its settling buys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from mep.cli.layout import print_table, print_text, share, warn_if_busy

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
    for columns, caption in ((COST, COST_CAPTION), (SETTLING, SETTLING_CAPTION), (GRADIENT, GRADIENT_CAPTION)):
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
SETTLING_CAPTION = (
    "Steps: sweeps of an example, or its steps of descent, mean. Beta: median over the examples; a recipe that names "
    "none has one for each example. Settled: share of the examples whose residual came within the tolerance. Residual: "
    "relative distance from equilibrium, mean over the examples, and the largest (at most)."
)
GRADIENT_CAPTION = (
    "Cosine, Size: of the gradient, against the exact EP gradient with the same beta for every example; 1st: of the "
    "first weight alone. Gap: relative error against that exact gradient. Bias: relative error of the exact gradient "
    "against backprop's. cos BP: cosine of the recipe's gradient with backprop's. Bought: the factor by which the gap "
    "is smaller than in the row above; nothing, where it was below the bias there already."
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


def _settled(row: Row) -> str:
    return NONE if row["settled"] is None else share(row["settled"])


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
SETTLING: dict[str, Cell] = {
    "Recipe": _label,
    "Steps": _cell("iterations", "{:.2f}"),
    "Beta, median": _cell("beta", "{:.2g}"),
    "Settled": _settled,
    "Residual": _cell("residual", "{:.1e}"),
    "at most": _cell("residual_max", "{:.1e}"),
}
GRADIENT: dict[str, Cell] = {
    "Recipe": _label,
    "Cosine": _cell("cosine", "{:.4f}"),
    "Size": _cell("size", "{:.3f}"),
    "1st: cos": _cell("first_cosine", "{:.4f}"),
    "1st: size": _cell("first_size", "{:.3f}"),
    "Gap": _cell("gap", "{:.1e}"),
    "Bought": _bought,
    "Bias": _cell("bias", "{:.1e}"),
    "cos BP": _cell("backprop_cosine", "{:.4f}"),
}
