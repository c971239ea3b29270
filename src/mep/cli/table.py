"""The table of `mep bench`, from its record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console

from mep.cli.contestants import EARLIER, EARLIER_TASK
from mep.cli.layout import print_table, print_text, share, warn_if_busy

Record = dict[str, Any]
Row = dict[str, Any]
Cell = Callable[[Row], str]


def show(record: Record, console: Console) -> None:
    """Print the table: ruled on a terminal, as Markdown anywhere else."""
    columns = _columns(record, wide=not console.is_terminal)
    print_table(console, list(columns), ([cell(row) for cell in columns.values()] for row in record["rows"]))
    print_text(console, _caption(record["settings"], columns))
    if not record["machine"]["gpu"]:
        warn_if_busy(console, (row["summary"]["running"] for row in record["rows"]))
    for row in record["rows"]:
        for result in row["seeds"]:
            if result["error"]:
                print_text(console, f"{row['label']} stopped early on seed {result['seed']}: {result['error']}")


def _columns(record: Record, wide: bool) -> dict[str, Cell]:
    """The columns that have something to say, by title."""
    columns = {"Optimizer": _label, **FIGURES}
    columns = {title.format(**record["settings"]): cell for title, cell in columns.items()}
    if any(row["summary"]["settled"] not in (None, 1.0) for row in record["rows"]):
        columns["Settled"] = _settled
    if wide and record["settings"].items() >= EARLIER_TASK.items():
        columns["Earlier system"] = _earlier
    return columns


def _caption(settings: dict[str, Any], columns: dict[str, Cell]) -> str:
    many = settings["seeds"] > 1
    parts = [
        f"{settings['data']}, {settings['model']}, batch {settings['batch_size']}.",
        f"Accuracy: on the test set after {settings['seconds']:g} s of training"
        + (f", mean and standard deviation of {settings['seeds']} seeds." if many else "."),
        f"To {settings['target']:g}%: training time until the test accuracy first reached it, linear between two "
        + ("measurements, the median over seeds." if many else "measurements."),
        "Epoch, Step: training time, batches drawn included in the first. / SGD: cost of a step over that of SGD.",
        "Residual: relative distance from equilibrium, mean over all steps and examples, and the largest (at most).",
        "Sweeps: of an example, or its steps of descent; mean over all steps and examples.",
    ]
    if "Settled" in columns:
        parts.append("Settled: share of the examples whose residual came within the tolerance.")
    if "Earlier system" in columns:
        parts.append("Earlier system: accuracy and / SGD as reported for a system of the same name, another machine.")
    return " ".join(parts)


def _label(row: Row) -> str:
    return str(row["label"])


def _earlier(row: Row) -> str:
    if row["label"] not in EARLIER:
        return ""
    accuracy, ratio = EARLIER[row["label"]]
    return f"{accuracy:.2f}%, {ratio:.2f}"


def _cell(key: str, form: str) -> Cell:
    def cell(row: Row) -> str:
        value = row["summary"][key]
        return "—" if value is None else form.format(value)

    return cell


def _settled(row: Row) -> str:
    value = row["summary"]["settled"]
    return "—" if value is None else share(value)


def _accuracy(row: Row) -> str:
    summary = row["summary"]
    spread = summary["accuracy_spread"]
    return f"{summary['accuracy']:.2f}%" + ("" if spread is None else f" ± {spread:.2f}")


def _seconds(key: str) -> Cell:
    def cell(row: Row) -> str:
        value = row["summary"][key]
        if value is None:
            return "—"
        return f"{value:.2f} s" if value >= 1 else f"{1000 * value:#.3g}".rstrip(".") + " ms"

    return cell


FIGURES: dict[str, Cell] = {
    "Accuracy": _accuracy,
    "vs SGD": _cell("vs_sgd", "{:+.2f}"),
    "vs Muon": _cell("vs_muon", "{:+.2f}"),
    "to {target:g}%": _seconds("target_seconds"),
    "Epoch": _seconds("epoch_seconds"),
    "Step": _seconds("step_seconds"),
    "/ SGD": _cell("step_ratio", "{:.2f}"),
    "Residual": _cell("residual", "{:.2g}"),
    "at most": _cell("residual_max", "{:.2g}"),
    "Sweeps": _cell("sweeps", "{:.1f}"),
}
