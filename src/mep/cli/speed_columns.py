"""The columns of the tables of one model in `mep bench speed`, from the rows of its record, and what they mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mep.cli.layout import share

Row = dict[str, Any]
Cell = Callable[[Row], str]
NONE = "—"
MIB = 2**20


def threads(number: int) -> str:
    """In words."""
    return f"{number} thread{'s' if number > 1 else ''}"


def times(rows: Sequence[Row]) -> dict[str, Cell]:
    """The columns of times: those of `TIMES` for every number of threads."""
    columns: dict[str, Cell] = {"Recipe": label}
    for place, time in enumerate(rows[0]["times"]):
        number = time["threads"]
        for title, cell in TIMES.items():
            columns[f"{threads(number) if title == 'step' else number}: {title}"] = _timed(place, cell)
    return columns


def labels(models: Sequence[dict[str, Any]]) -> list[str]:
    """Of all rows of all models, each once, in the order of the model that has most."""
    longest_first = sorted(models, key=lambda model: -len(model["rows"]))
    return list(dict.fromkeys(label(row) for model in longest_first for row in model["rows"]))


def label(row: Row) -> str:
    """Of a row."""
    return str(row["label"])


def milliseconds(seconds: float) -> str:
    """With three digits that say something.

    >>> milliseconds(0.0012345), milliseconds(0.12345)
    ('1.23 ms', '123 ms')
    """
    return f"{1000 * seconds:.{2 if seconds < 0.01 else 1 if seconds < 0.1 else 0}f} ms"


def _timed(place: int, cell: Cell) -> Cell:
    return lambda row: cell(row["times"][place])


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _ratio(ratio: dict[str, float]) -> str:
    return "{median:.2f} ({low:.2f} to {high:.2f})".format(**ratio)


def _cell(key: str, form: str, unit: float = 1.0) -> Cell:
    return lambda row: NONE if row[key] is None else form.format(row[key] / unit)


def _rate(key: str) -> Cell:
    return lambda row: NONE if row[key] is None else f"{row[key] / row['times'][0]['seconds']['median'] / 1e9:.1f}"


def _settled(row: Row) -> str:
    if row["settled"] is None:
        return NONE
    return share(row["settled"]) + (f", {row['unsettled']}" if row["unsettled"] else "")


TIMES: dict[str, Cell] = {
    "step": lambda time: milliseconds(time["seconds"]["median"]),
    "mean": lambda time: milliseconds(time["mean"]),
    "/ backprop": lambda time: _ratio(time["ratio"]),
    "/ Muon": lambda time: _number(time["to_muon"]),
}
COST: dict[str, Cell] = {
    "Recipe": label,
    "Sweeps": _cell("sweeps", "{:.2f}"),
    "Residual": _cell("residual", "{:.1e}"),
    "at most": _cell("residual_max", "{:.1e}"),
    "Settled": _settled,
    "Beta, median": _cell("beta", "{:.2g}"),
    "Memory": _cell("memory", "{:.2f} MiB", MIB),
    "Work": _cell("flops", "{:,.1f} MFLOP", 1e6),
    "GFLOP/s": _rate("flops"),
    "Moved": _cell("bytes", "{:,.1f} MB", 1e6),
    "GB/s": _rate("bytes"),
}

CAPTIONS = (
    "Step: median. Mean: of the same steps; higher where one of them works for many, as on the factors of NaturalEP.",
    "/ backprop: median over the rounds of the ratio to backprop + SGD in the same round, and its quartiles. / Muon: "
    "median of the ratio to backprop + Muon, torch's own.",
    "Sweeps: of an example, or its steps of descent, mean. Residual: relative distance from equilibrium, mean over the "
    "examples, and the largest (at most). Settled: share of the examples whose residual came within the tolerance, and "
    "how most of the steps ended in which some did not. Beta: median over the examples; a recipe that names none has "
    "one for each example.",
    "Memory: the most that is alive in a step beyond parameters and the optimizer's state: activations, states, "
    "gradients; what compiled code allocates cannot be seen.",
    "Work: floating-point operations of matrix products, convolutions and attention, of a compiled step those of the "
    "same step not compiled; pointwise ones are not counted. Moved: every operation's inputs and outputs, as if "
    "nothing stayed in a cache: weights, activations, errors, gradients and the optimizer's state. /s: these over the "
    "median of the first number of threads; more bytes than a copy moves come out of the caches.",
)
