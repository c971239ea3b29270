"""The tables of `mep bench speed`, from its record: all models at a glance, then each by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from mep.cli.layout import print_table, print_text, warn_if_busy

Record = dict[str, Any]
Row = dict[str, Any]
Cell = Callable[[Row], str]
NONE = "—"
FAILED = "failed"


def show(record: Record, console: Console) -> None:
    """Print the tables: ruled on a terminal, as Markdown anywhere else."""
    settings, models = record["settings"], record["models"]
    print_text(
        console,
        f"{settings['data']}, after {settings['train_steps']} steps of Adam and backprop. "
        f"Time of a step over that of backprop + SGD, {threads(settings['threads'][0])}:",
    )
    show_overview(models, console)
    for model in models:
        console.print()
        print_text(
            console, "{model}, batch {batch_size}, {parameters:,} parameters".format(**model) + _rounds(model["rows"])
        )
        show_rows(model["rows"], console)
    print_text(console, f"{TIMES_CAPTION} {COST_CAPTION}")
    print_text(console, describe(record["attainable"]))
    if not record["machine"]["gpu"]:
        warn_if_busy(console, (time["running"] for model in models for row in model["rows"] for time in row["times"]))


def show_overview(models: Sequence[Record], console: Console) -> None:
    """Print the ratios of all rows on all models."""
    console.print()
    labels = dict.fromkeys(row["label"] for model in models for row in model["rows"])
    found = [{row["label"]: row for row in model["rows"]} for model in models]
    titles = ["Recipe", *(model["model"] for model in models)]
    print_table(console, titles, ([label, *(_overview(rows[label]) for rows in found)] for label in labels))


def show_rows(rows: Sequence[Row], console: Console) -> None:
    """Print the tables of one model, and why some of its rows are not in them."""
    able = [row for row in rows if row["error"] is None]
    for columns in ({"Recipe": _label, **_times(able)}, COST):
        console.print()
        print_table(console, list(columns), ([cell(row) for cell in columns.values()] for row in able))
    for row in rows:
        if row["error"] is not None:
            print_text(console, f"{row['label']} failed: {row['error']}")


def threads(number: int) -> str:
    """In words."""
    return f"{number} thread{'s' if number > 1 else ''}"


def describe(attainable: Sequence[dict[str, float]]) -> str:
    """What the machine can do, in a sentence."""
    parts = (
        f"{threads(int(one['threads']))}: {one['flops'] / 1e9:.0f} GFLOP/s in a matrix product of size 1024, "
        f"{one['bytes'] / 1e9:.0f} GB/s in a copy beyond the caches"
        for one in attainable
    )
    return f"The most that the machine does, {'; '.join(parts)}."


TIMES_CAPTION = (
    "Step: median. Mean: of the same steps; higher where one of them works for many, as on the factors of NaturalEP. "
    "/ backprop: median over the rounds of the ratio to backprop + SGD in the same round, and its quartiles. / Muon: "
    "median of the ratio to backprop + Muon, torch's own."
)
COST_CAPTION = (
    "Sweeps: mean number of them, or of steps of descent. Residual: relative distance from equilibrium, mean and at "
    "most. Settled: share of the steps that came within their tolerance. Beta: the nudge that was used, median. "
    "Memory: the most that is alive in a step beyond parameters and the optimizer's state: activations, states, "
    "gradients; what compiled code allocates cannot be seen. Work: floating-point operations of matrix products, "
    "convolutions and attention, of a compiled step those of the same step not compiled; pointwise ones are not "
    "counted. Moved: every operation's inputs and outputs, as if nothing stayed in a cache: weights, activations, "
    "errors, gradients and the optimizer's state. /s: these over the median of the first number of threads; more bytes "
    "than a copy moves come out of the caches."
)


def _rounds(rows: Sequence[Row]) -> str:
    numbers = sorted({time["rounds"] for row in rows for time in row["times"]})
    return f", {' or '.join(map(str, numbers))} rounds:"


def _overview(row: Row) -> str:
    return FAILED if row["error"] is not None else f"{row['times'][0]['ratio']['median']:.2f}"


def _label(row: Row) -> str:
    return str(row["label"])


def _cell(key: str, form: str, unit: float = 1.0) -> Cell:
    return lambda row: NONE if row[key] is None else form.format(row[key] / unit)


def _rate(key: str) -> Cell:
    return lambda row: NONE if row[key] is None else f"{row[key] / row['times'][0]['seconds']['median'] / 1e9:.1f}"


def _times(rows: Sequence[Row]) -> dict[str, Cell]:
    """Four columns for every number of threads."""
    columns: dict[str, Cell] = {}
    for place, time in enumerate(rows[0]["times"]):
        number = time["threads"]
        for title, cell in TIMES.items():
            columns[f"{threads(number) if title == 'step' else number}: {title}"] = _timed(place, cell)
    return columns


def _timed(place: int, cell: Cell) -> Cell:
    return lambda row: cell(row["times"][place])


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _ratio(ratio: dict[str, float]) -> str:
    return "{median:.2f} ({low:.2f} to {high:.2f})".format(**ratio)


TIMES: dict[str, Cell] = {
    "step": lambda time: _ms(time["seconds"]["median"]),
    "mean": lambda time: _ms(time["mean"]),
    "/ backprop": lambda time: _ratio(time["ratio"]),
    "/ Muon": lambda time: _number(time["to_muon"]),
}
MIB = 2**20
COST: dict[str, Cell] = {
    "Recipe": _label,
    "Sweeps": _cell("sweeps", "{:.1f}"),
    "Residual": _cell("residual", "{:.1e}"),
    "at most": _cell("residual_max", "{:.1e}"),
    "Settled": _cell("converged", "{:.0%}"),
    "Beta": _cell("beta", "{:.2g}"),
    "Memory": _cell("memory", "{:.2f} MiB", MIB),
    "Work": _cell("flops", "{:,.1f} MFLOP", 1e6),
    "GFLOP/s": _rate("flops"),
    "Moved": _cell("bytes", "{:,.1f} MB", 1e6),
    "GB/s": _rate("bytes"),
}
