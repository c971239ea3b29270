"""The picture of a record of `mep study`: how networks settle, and the gradient error, over depth and over beta."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from mep.cli.figure import COLOURS, GREY, save
from mep.cli.study_table import family, sections
from mep.cli.studying import DEFAULT

Record = dict[str, Any]

NAMES = {
    "median_beta": "beta, median",
    "settled": "examples that settled",
    "sweeps": "sweeps of an example, mean",
    "error": "gradient error against backprop",
}
STAGES: dict[str, tuple[Any, Any]] = {"initial": ("--", "none"), "trained": ("-", "full")}


def draw(record: Record, path: Path) -> None:
    """Draw the record into `path`."""
    settings = record["settings"]
    figure = Figure(figsize=(13, 11), layout="constrained")
    grid = figure.subplots(3, 3)
    for line, (title, over, rows) in zip(grid, sections(record), strict=True):
        is_chosen = all(row["beta"] is DEFAULT for row in rows)
        named = [row for row in rows if row[over] is not None]  # the default has no place on an axis of betas
        for axes, key in zip(line, ("median_beta" if is_chosen else "settled", "sweeps", "error"), strict=True):
            _draw(axes, named, over, key)
            axes.set_title(f"{NAMES[key]}\n{title}", loc="left", fontsize=10)
            axes.set_xlabel("hidden layers" if over == "depth" else "beta")
    names = list(dict.fromkeys(family(row) for row in record["rows"]))
    handles = [Line2D([], [], color=colour, label=name) for name, colour in zip(names, COLOURS, strict=False)]
    handles += [
        Line2D([], [], color=GREY, linestyle=style, marker="o", fillstyle=fill, label=stage)
        for stage, (style, fill) in STAGES.items()
    ]
    handles.append(Line2D([], [], color=GREY, linestyle="", marker="x", label="some example did not settle"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    save(figure, f"Multilayer perceptrons of width {settings['width']} on digits", record, path)


def _draw(axes: Axes, rows: list[dict[str, Any]], over: str, key: str) -> None:
    """A line for each network and stage; a cross where some example did not settle."""
    names = list(dict.fromkeys(family(row) for row in rows))
    for name, colour in zip(names, COLOURS, strict=False):
        for stage, (style, fill) in STAGES.items():
            known = [r for r in rows if family(r) == name and r["stage"] == stage and r[key] is not None]
            points = [r[over] for r in known], [r[key] for r in known]
            axes.plot(*points, style, color=colour, marker="o", fillstyle=fill, markersize=4, linewidth=1.2)
            short = [r for r in known if r["settled"] < 1]
            axes.plot([r[over] for r in short], [r[key] for r in short], "x", color=colour, markersize=8)
    axes.set_xscale("log")
    if key == "settled":
        axes.set_ylim(0, 1.05)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    elif key == "sweeps":
        axes.set_ylim(0)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axes.set_yscale("log")
    places = sorted({row[over] for row in rows})
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
