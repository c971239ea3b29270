"""The tables of `mep verify`, from its record: the verdict, the parameters, the equilibria."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from mep.cli.layout import print_table, print_text
from mep.verification.report import estimation_table, parameter_table, sentences

Record = dict[str, Any]

PARAMETERS_CAPTION = (
    "The EP gradient beside backprop's: cosine and norm ratio at the smallest beta, order in beta over the three "
    "smallest. FD: relative distance of either gradient from finite differences of the cost, on sampled coordinates. "
    "A dash: backprop's gradient, the error or the difference cannot be told from rounding."
)
EQUILIBRIA_CAPTION = (
    "Beta: that of every example. Error: relative, of the whole gradient against backprop's. Sweeps: the most of any "
    "phase. Unsettled: examples that did not settle. Residual: the largest, as the solver reported it, and recomputed "
    "from the states alone. Off branch: units beyond the kink they started from."
)


def show(record: Record, console: Console) -> None:
    """Print the verdict and the tables: ruled on a terminal, as Markdown anywhere else."""
    report = record["report"]
    for text in sentences(report):
        print_text(console, text)
    for (titles, rows), caption in (
        (parameter_table(report), PARAMETERS_CAPTION),
        (estimation_table(report), EQUILIBRIA_CAPTION),
    ):
        console.print()
        print_table(console, titles, rows)
        print_text(console, caption)
