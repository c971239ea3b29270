"""The picture of a record of `mep study`: beta used, sweeps and gradient error, over depth and over beta."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from mep.cli.figure import COLOURS, GREY, save
from mep.cli.study_table import family
from mep.cli.studying import COMMON_BETA, COMMON_DEPTH, nearest

Record = dict[str, Any]

PANELS = {"used": "beta used, median", "sweeps": "sweeps", "error": "gradient error against backprop"}
STAGES: dict[str, tuple[Any, Any]] = {"initial": ("--", "none"), "trained": ("-", "full")}


def draw(record: Record, path: Path) -> None:
    """Draw the record into `path`."""
    settings, rows = record["settings"], record["rows"]
    fixed = (
        ("depth", "beta", nearest(settings["betas"], COMMON_BETA)),
        ("beta", "depth", nearest(settings["depths"], COMMON_DEPTH)),
    )
    figure = Figure(figsize=(13, 8), layout="constrained")
    grid = figure.subplots(2, len(PANELS))
    for line, (over, held, value) in zip(grid, fixed, strict=True):
        some = [row for row in rows if row[held] == value]
        for axes, (key, title) in zip(line, PANELS.items(), strict=True):
            _draw(axes, some, over, key)
            axes.set_title(f"{title} ({held} {value:g})", loc="left", fontsize=10)
            axes.set_xlabel("hidden layers" if over == "depth" else "beta asked for")
    names = list(dict.fromkeys(family(row) for row in rows))
    handles = [Line2D([], [], color=colour, label=name) for name, colour in zip(names, COLOURS, strict=False)]
    handles += [
        Line2D([], [], color=GREY, linestyle=style, marker="o", fillstyle=fill, label=stage)
        for stage, (style, fill) in STAGES.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    save(figure, f"Multilayer perceptrons of width {settings['width']} on digits", record, path)


def _draw(axes: Axes, rows: list[dict[str, Any]], over: str, key: str) -> None:
    names = list(dict.fromkeys(family(row) for row in rows))
    for name, colour in zip(names, COLOURS, strict=False):
        for stage, (style, fill) in STAGES.items():
            known = [r for r in rows if family(r) == name and r["stage"] == stage and r[key]]
            points = [r[over] for r in known], [r[key] for r in known]
            axes.plot(*points, style, color=colour, marker="o", fillstyle=fill, markersize=4, linewidth=1.2)
    axes.set_xscale("log")
    if key == "sweeps":
        axes.set_ylim(0)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axes.set_yscale("log")
    places = sorted({row[over] for row in rows})
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
