"""The picture of a record of `mep profile`: where the time of a step goes, and what settling longer buys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from mep.cli.figure import COLOURS, GREY, save

Record = dict[str, Any]
Row = dict[str, Any]

BLACK, SKY, ORANGE, BLUE, VERMILION, PINK, GREEN = COLOURS
PHASES = {
    "backprop": ("backprop", BLACK),
    "free": ("free phase", SKY),
    "settle": ("settling", ORANGE),
    "contrast": ("contrast", BLUE),
    "update": ("update", PINK),
    "rest": ("rest", "#bbbbbb"),
}
LADDERS = {"descent": VERMILION, "sweep": GREEN}
STEP_TICKS = (1, 2, 3, 5, 10, 15, 20, 30)


def draw(record: Record, path: Path) -> None:
    """Draw the record into `path`."""
    rows = [row for row in record["rows"] if row["error"] is None]
    figure = Figure(figsize=(13, 6), layout="constrained")
    climbing = [row for row in rows if row["ladder"]]
    every = figure.subplots(1, 2 if climbing else 1, squeeze=False).flat
    _draw_times(every[0], rows)
    if climbing:
        _draw_gains(every[1], climbing)
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False)
    title = "{data}, {model}, batch {batch_size}, after {train_steps} steps".format(**record["settings"])
    save(figure, title, record, path)


def _draw_times(axes: Axes, rows: list[Row]) -> None:
    """A bar for each recipe, of its phases one after the other."""
    labels = [row["label"] for row in rows]
    ratios = [row["ratio"]["median"] for row in rows]
    starts = [0.0] * len(rows)
    for phase, (name, colour) in PHASES.items():
        widths = [row["shares"].get(phase, 0.0) * ratio for row, ratio in zip(rows, ratios, strict=True)]
        axes.barh(labels, widths, left=starts, color=colour, height=0.68, label=name)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    for place, ratio in enumerate(ratios):
        axes.annotate(f"{ratio:.2f}x", (ratio, place), (5, 0), textcoords="offset points", va="center")
    axes.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 1.12 * max(ratios))  # room for the figure beside the longest bar
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("time of a step, relative to backprop + SGD")
    axes.set_title("Where the time of a step goes", loc="left")


def _draw_gains(axes: Axes, rows: list[Row]) -> None:
    """Residual and gap over the number of steps, a colour for each ladder; hollow where steps bought nothing."""
    for ladder, colour in LADDERS.items():
        climbing = [row for row in rows if row["ladder"] == ladder]
        if not climbing:
            continue
        steps = [row["iterations"] for row in climbing]
        axes.plot(steps, [row["gap"] for row in climbing], color=colour, label=f"{ladder}: gap")
        axes.plot(steps, [row["residual"] for row in climbing], "--", color=colour, label=f"{ladder}: residual")
        for row in climbing:
            _mark(axes, row, colour)
        _draw_bias(axes, climbing[-1], colour)
    axes.add_line(Line2D([], [], color=GREY, marker="o", markerfacecolor="white", linestyle="", label="bought nothing"))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(0.9, 33)
    axes.set_xticks(STEP_TICKS, map(str, STEP_TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.25)
    axes.set_xlabel("steps of settling (mean over examples)")
    axes.set_ylabel("gap: relative error of the gradient; residual")
    axes.set_title("What settling buys", loc="left")


def _mark(axes: Axes, row: Row, colour: str) -> None:
    place = row["iterations"], row["gap"]
    axes.plot(*place, "o", color=colour, markerfacecolor="white" if row["idle"] else colour)
    if "tol" in row["options"]:
        text, plate = f"tol {row['options']['tol']:g}", {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.annotate(text, place, (9, -3), textcoords="offset points", bbox=plate)


def _draw_bias(axes: Axes, row: Row, colour: str) -> None:
    """The error that beta causes: a gap far below it brings the gradient of the loss no nearer."""
    axes.axhline(row["bias"], color=colour, linewidth=0.8, linestyle=":")
    text = f"{row['ladder']}: bias, median beta {row['beta']:.2g}"
    axes.annotate(text, (1, row["bias"]), (2, 4), textcoords="offset points", color=colour)
