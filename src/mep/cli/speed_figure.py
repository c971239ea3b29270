"""The picture of a record of `mep bench speed`: for every model, what a step of each recipe costs beside backprop's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from mep.cli.figure import COLOURS, GREY, save
from mep.cli.speed_columns import labels, threads

Record = dict[str, Any]
Row = dict[str, Any]

BLACK, SKY, ORANGE, BLUE, VERMILION, PINK, GREEN = COLOURS
FAMILIES = {
    "backprop": BLACK,
    "sweeps and SGD": GREEN,
    "descent and SGD": VERMILION,
    "sweeps and other updates": BLUE,
    "local": PINK,
}
BESIDE = 4  # models in a line
TICKS = (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


def draw(record: Record, path: Path) -> None:
    """Draw the record into `path`."""
    models = record["models"]
    names = labels(models)
    across = min(BESIDE, len(models))
    down = math.ceil(len(models) / across)
    figure = Figure(figsize=(2.4 + 3.2 * across, 1.4 + down * (0.8 + 0.24 * len(names))), layout="constrained")
    every = list(figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flat)
    for axes, model in zip(every, models, strict=False):
        _draw(axes, model, names)
    for axes in every[len(models) :]:
        axes.set_axis_off()
    for axes in every[max(0, len(models) - across) : len(models)]:  # the lowest of each column
        axes.set_xlabel("time of a step / that of backprop + SGD", fontsize=9)
        axes.tick_params(axis="x", labelbottom=True)
    every[0].invert_yaxis()  # all share it
    every[0].set_xlim(*_limits(models))
    figure.legend(handles=_legend(record["settings"]["threads"]), loc="outside lower center", ncols=4, frameon=False)
    title = "{data}, after {train_steps} steps of Adam".format(**record["settings"])
    save(figure, title, record, path)


def family(row: Row) -> str:
    """What a row is a case of."""
    if row["preset"] in ("sgd", "torch_muon"):
        return "backprop"
    if row["preset"] == "local_ep":
        return "local"
    if "settle_lr" in row["options"]:
        return "descent and SGD"
    return "sweeps and SGD" if row["preset"] == "eqprop" else "sweeps and other updates"


def _draw(axes: Axes, model: Record, names: list[str]) -> None:
    """A point for each recipe and number of threads, filled for the first, with a bar from quartile to quartile."""
    axes.axvline(1, color=GREY, linewidth=0.8)
    for row in model["rows"]:
        height, colour = names.index(row["label"]), FAMILIES[family(row)]
        if row["error"] is not None:
            axes.annotate("failed", (1, height), (6, 0), textcoords="offset points", va="center", color=GREY)
            continue
        for place, time in enumerate(row["times"]):
            ratio, level = time["ratio"], height + 0.22 * place
            axes.plot([ratio["low"], ratio["high"]], [level, level], color=colour, linewidth=1.5)
            fill = colour if place == 0 else "white"
            axes.plot(ratio["median"], level, "o", color=colour, markerfacecolor=fill, markersize=5)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    axes.set_title("{model}, batch {batch_size}".format(**model), loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _limits(models: list[Record]) -> tuple[float, float]:
    """From the least to the largest median of all models; a quartile may lie beyond."""
    rows = [row for model in models for row in model["rows"] if row["error"] is None]
    medians = [time["ratio"]["median"] for row in rows for time in row["times"]]
    return 0.9 * min(*medians, 0.8), 1.3 * max(*medians, 2.5)


def _legend(numbers: list[int]) -> list[Line2D]:
    handles = [Line2D([], [], color=colour, marker="o", label=name) for name, colour in FAMILIES.items()]
    for place, number in enumerate(numbers):
        fill = GREY if place == 0 else "white"
        mark: dict[str, Any] = {"marker": "o", "linestyle": "", "markerfacecolor": fill}
        handles.append(Line2D([], [], color=GREY, label=threads(number), **mark))
    return [*handles, Line2D([], [], color=GREY, label="quartiles over the rounds")]
