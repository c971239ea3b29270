"""The table of `mep bench`, from its record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Summary = dict[str, Any]


def show(record: dict[str, Any], console: Console) -> None:
    """Print the table: ruled on a terminal, as Markdown and as wide as it needs into a pipe."""
    if console.is_terminal:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    else:
        table, console = Table(box=box.MARKDOWN), Console(width=200)
    table.add_column("Optimizer", no_wrap=True)
    for title in COLUMNS:
        table.add_column(title, justify="right", no_wrap=True)
    for row in record["rows"]:
        table.add_row(row["label"], *(cell(row["summary"]) for cell in COLUMNS.values()))
    console.print(table)
    console.print(_caption(record["settings"]), style="dim", highlight=False, soft_wrap=not console.is_terminal)
    for row in record["rows"]:
        for result in row["seeds"]:
            if result["error"]:
                console.print(f"{row['label']} stopped early on seed {result['seed']}: {result['error']}", markup=False)


def _caption(settings: dict[str, Any]) -> str:
    seeds = f", mean and standard deviation of {settings['seeds']} seeds" if settings["seeds"] > 1 else ""
    return (
        f"{settings['data']}, {settings['model']}, batch {settings['batch_size']}. "
        f"Accuracy: on the test set after {settings['seconds']:g} s of training{seeds}. "
        "/ SGD: cost of a step over that of SGD. Residual: relative distance from equilibrium, mean over all "
        "steps and examples, and at most."
    )


def _cell(key: str, form: str) -> Callable[[Summary], str]:
    return lambda summary: "—" if summary[key] is None else form.format(summary[key])


def _accuracy(summary: Summary) -> str:
    spread = summary["accuracy_spread"]
    return f"{summary['accuracy']:.2f}%" + ("" if spread is None else f" ± {spread:.2f}")


def _seconds(key: str) -> Callable[[Summary], str]:
    def cell(summary: Summary) -> str:
        value = summary[key]
        if value is None:
            return "—"
        return f"{value:.2f} s" if value >= 1 else f"{1000 * value:#.3g}".rstrip(".") + " ms"

    return cell


COLUMNS: dict[str, Callable[[Summary], str]] = {
    "Accuracy": _accuracy,
    "vs SGD": _cell("vs_sgd", "{:+.2f}"),
    "vs Muon": _cell("vs_muon", "{:+.2f}"),
    "Epoch": _seconds("epoch_seconds"),
    "Step": _seconds("step_seconds"),
    "/ SGD": _cell("step_ratio", "{:.2f}"),
    "Residual": _cell("residual", "{:.2g}"),
    "at most": _cell("residual_max", "{:.2g}"),
    "Sweeps": _cell("sweeps", "{:.1f}"),
}
