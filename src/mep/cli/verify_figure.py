"""The picture of a record of `mep verify`: where settling stalls, and how the error of the gradient falls with beta."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from mep.cli.figure import COLOURS, GREY, save

Record = dict[str, Any]

CONTRASTS = {"one-sided": COLOURS[4], "centered": COLOURS[3]}
NAMED = 8
"""Nodes that fit into a legend; of more, the slowest are named."""


def draw(record: Record, path: Path) -> None:
    """Draw the record into `path`."""
    report = record["report"]
    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_stall(left, report)
    _draw_errors(right, report)
    for axes in (left, right):
        axes.set_yscale("log")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, frameon=False)
    settings = record["settings"]
    source = settings["data"] if settings["shape"] is None else f"random {settings['shape']}"
    verdict = "OK" if report["ok"] else f"NOT OK ({len(report['failures'])})"
    save(figure, f"{verdict}: {settings['model']} on {source}, batch {settings['batch_size']}", record, path)


def _draw_stall(axes: Axes, report: Record) -> None:
    """The residual of every node over the sweeps, from the input (dark) to the output (light)."""
    stall, tol = report["stall"], report["tol"]
    curves = {node: [max(r, tol / 10) for r in curve] for node, curve in stall["residuals"].items() if curve}
    slowest = sorted(curves, key=lambda node: sum(map(math.log, curves[node])), reverse=True)[:NAMED]
    for place, (node, curve) in enumerate(curves.items()):
        colour = colormaps["viridis"](0.9 * place / max(1, len(curves) - 1))
        label = node if node in slowest else None
        axes.plot(stall["sweeps"], curve, "o-", color=colour, linewidth=1.4, markersize=4, label=label)
    axes.axhline(tol, color=GREY, linewidth=0.8)
    axes.annotate(f"tol {tol:.1e}", (1, tol), (2, 4), textcoords="offset points", color=GREY)
    axes.set_ylim(tol / 15, 2 * max(map(max, curves.values()), default=1.0))
    axes.set_xscale("log")
    axes.set_xticks(stall["sweeps"], map(str, stall["sweeps"]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("sweeps")
    axes.set_ylabel("relative residual, the worst example (at the bottom: less)")
    some = "" if len(curves) <= NAMED else f" (the {NAMED} slowest of {len(curves)} nodes named)"
    axes.set_title(f"Where settling stalls, beta {stall['beta']:.2g}{some}", loc="left")


def _draw_errors(axes: Axes, report: Record) -> None:
    """The error of the whole gradient over beta, and faintly that of every parameter."""
    for phases, order in report["orders"].items():
        colour = CONTRASTS[phases]
        for parameter in report["parameters"]:
            matches = [m for m in parameter["matches"][phases] if m["cosine"] is not None]
            betas, errors = [m["beta"] for m in matches], [m["error"] for m in matches]
            axes.plot(betas, errors, color=colour, linewidth=0.6, alpha=0.3)
        whole = [e for e in report["estimations"] if e["phases"] == phases]
        label = phases if order is None else f"{phases}: order {order:.2f}"
        axes.plot([e["beta"] for e in whole], [e["error"] for e in whole], "o-", color=colour, label=label)
    axes.plot([], [], color=GREY, linewidth=0.6, alpha=0.5, label="single parameters")
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=20))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("beta")
    axes.set_ylabel("relative error against backprop")
    axes.set_title("The error of the gradient falls with beta", loc="left")
