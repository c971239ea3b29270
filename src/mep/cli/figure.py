"""The picture of a record of `mep bench`: accuracy over training time, and what a step costs."""

from __future__ import annotations

from itertools import cycle, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray

from mep.cli.files import write_atomically
from mep.errors import ArgumentError

Record = dict[str, Any]
Row = dict[str, Any]

# Okabe and Ito's palette, which the colour-blind can tell apart, without its yellow, which nobody sees on
# white: https://jfly.uni-koeln.de/color
COLOURS = ("#000000", "#56B4E9", "#E69F00", "#0072B2", "#D55E00", "#CC79A7", "#009E73")
GREYS = ("#333333", "#666666", "#8c8c8c", "#adadad")
FORMATS = (".png", ".svg", ".pdf")
GREY = "#666666"
ACCURACY_TICKS = (0, 20, 40, 60, 70, 80, 85, 90, 92, 94, 96, 98, 99, 100)
ERRORS_AT_TOP = 1.0  # keeps 100% at a finite height


class Look(NamedTuple):
    """How an optimizer is drawn."""

    colour: str
    style: str


def draw(record: Record, path: Path) -> None:
    """Draw the record into `path`."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    _draw_accuracy(left, record)
    _draw_costs(right, record)
    save(figure, _title(record["settings"]), record, path)


def save(figure: Figure, title: str, record: Record, path: Path) -> None:
    """Head the figure with a title and where the record was made, and write it into `path`."""
    if path.suffix not in FORMATS:
        raise ArgumentError(f"Cannot draw {path}: a picture is one of {', '.join(FORMATS)}.")
    figure.suptitle(f"{title}; {_origin(record)}", x=0.01, ha="left", fontsize=10, color=GREY)
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=150))


def _draw_accuracy(axes: Axes, record: Record) -> None:
    """A line for the mean over seeds, a band from the worst to the best seed, a label at the end."""
    settings, rows = record["settings"], record["rows"]
    looks = _looks(rows)
    times = np.geomspace(settings["seconds"] / 400, settings["seconds"], 200)
    ends = [row["summary"]["accuracy"] for row in rows]
    for row, look in zip(rows, looks, strict=True):
        seeds = np.stack([_accuracy_at(times, result["curve"]) for result in row["seeds"]])
        axes.plot(times, seeds.mean(0), color=look.colour, linestyle=look.style, linewidth=1.6)
        axes.fill_between(times, seeds.min(0), seeds.max(0), color=look.colour, alpha=0.1, linewidth=0)
    axes.axhline(settings["target"], color=GREY, linewidth=0.8)
    axes.annotate(f"{settings['target']:g}%", (times[0], settings["target"]), (4, 2), textcoords="offset points")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yscale("function", functions=(_stretch, _unstretch))
    axes.set_yticks(ACCURACY_TICKS)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlim(times[0], times[-1])
    axes.set_ylim(max(0, min(50, *ends) - 5), 0.75 * max(ends) + 25)  # a quarter of the errors is room above
    axes.set(xlabel="training time (s); broken grey lines: backprop; bands: all seeds", ylabel="test accuracy (%)")
    axes.set_title("Accuracy for the time spent", loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    _label_ends(axes, [row["label"] for row in rows], ends, looks)


def _label_ends(axes: Axes, labels: list[str], ends: list[float], looks: list[Look]) -> None:
    """Name each line right of its end, in the order of the ends, as far apart as the letters need."""
    low, high = _stretch(np.array(axes.get_ylim()))
    heights = (_stretch(np.array(ends)) - low) / (high - low)
    for height, place in zip(_apart(sorted(heights), 0.055), np.argsort(heights), strict=True):
        axes.annotate(
            f"{labels[place]}  {ends[place]:.1f}",
            xy=(1, heights[place]),
            xytext=(1.06, height),
            xycoords="axes fraction",
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": looks[place].colour,
                "linestyle": looks[place].style,
                "linewidth": 1.5,
                "relpos": (0, 0.5),
            },
        )


def _apart(heights: list[float], gap: float) -> list[float]:
    """The ascending heights, moved as little as needed to lie `gap` apart and below 1."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else height)
    ceiling = 1.0
    for place in reversed(range(len(placed))):
        placed[place] = min(placed[place], ceiling)
        ceiling = placed[place] - gap
    return placed


def _draw_costs(axes: Axes, record: Record) -> None:
    """A bar for each optimizer, with how it settled written beside it."""
    rows = record["rows"]
    ratios = [row["summary"]["step_ratio"] or 0.0 for row in rows]
    axes.barh([row["label"] for row in rows], ratios, color=[look.colour for look in _looks(rows)], height=0.62)
    column = axes.get_yaxis_transform()  # of the text on how each settled, right of the axes
    for place, (row, ratio) in enumerate(zip(rows, ratios, strict=True)):
        axes.annotate(
            f"{ratio:.2f}x" if ratio else "?", (ratio, place), (5, 0), textcoords="offset points", va="center"
        )
        axes.text(1.04, place, _settled(row), transform=column, va="center")
    axes.axvline(1, color="white", linewidth=1, linestyle=":")
    axes.set_xlim(0, 1.3 * max(1.0, *ratios))  # room for the figure beside the longest bar
    axes.invert_yaxis()
    axes.set_xlabel("time of a step, relative to SGD")
    axes.set_title("Cost of a step, and how well it settled", loc="left")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)


def _settled(row: Row) -> str:
    summary = row["summary"]
    if _is_backprop(row):
        return "backprop"
    return f"{summary['sweeps']:.1f} iterations, residual {summary['residual']:.1g}"


def _title(settings: dict[str, Any]) -> str:
    s = settings
    seeds = f"{s['seeds']} seed{'s' if s['seeds'] > 1 else ''}"
    return f"{s['data']}, {s['model']}, batch {s['batch_size']}, {s['seconds']:g} s, {seeds}"


def _origin(record: Record) -> str:
    machine = record["machine"]
    commit = f", commit {record['commit'][:8]}" if record["commit"] else ""
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    return (machine["gpu"] or f"{machine['processor']}, {threads}") + commit


def _accuracy_at(times: NDArray[np.float64], curve: dict[str, list[float]]) -> NDArray[np.float64]:
    """The accuracy at given times, interpolated between measurements; NaN after a run that ended early."""
    ended_early = curve["seconds"][-1] < times[-1]
    return np.interp(times, curve["seconds"], curve["accuracy"], right=np.nan if ended_early else None)


def _is_backprop(row: Row) -> bool:
    return row["summary"]["residual"] is None


def _looks(rows: list[Row]) -> list[Look]:
    """Greys and broken lines for backprop; for all others the colours, once through in each style."""
    backprop = cycle(map(Look, GREYS, ("--", "-.", ":", "--")))
    settled = cycle(Look(colour, style) for style, colour in product(("-", "-."), (*COLOURS[1:], COLOURS[0])))
    return [next(backprop if _is_backprop(row) else settled) for row in rows]


def _stretch(accuracy: NDArray[np.float64]) -> NDArray[np.float64]:
    """A scale on which halving the errors is the same distance wherever one starts."""
    return -np.log(ERRORS_AT_TOP + 100 - np.minimum(accuracy, 100))


def _unstretch(height: NDArray[np.float64]) -> NDArray[np.float64]:
    return ERRORS_AT_TOP + 100 - np.exp(-height)
