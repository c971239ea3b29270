"""See what makes an equilibrium hard to reach: depth, beta, activation, initialisation, shortcuts, training.

    mep study
    mep study --depth 5 --depth 50 --beta 0.1
    mep plot runs/study/study.json

Settles multilayer perceptrons and Hopfield networks on scikit-learn's digits, freshly
initialised and after some steps of training: at the default, beta=None, and at the betas
that are named. Writes a record (JSON) and a picture (PNG).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mep.runs import records, report
from mep.runs.records import Record
from mep.runs.report import GREY, NONE, Cell, Row, share

KIND = "mep study"


@dataclass(frozen=True)
class Settings:
    """Which networks are settled, and how."""

    depths: tuple[int, ...] = (5, 10, 20, 50, 100, 200)  # hidden layers: from shallow to hopeless
    betas: tuple[float, ...] = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0)  # around 0.01, the largest that beta=None chooses
    width: int = 32  # enough for digits; what matters here is depth
    batch_size: int = 64  # enough for the worst of them to mean something
    train_steps: int = 100  # of Adam and backprop: the loss has left its plateau, where there is a way
    tol: float = 1e-2  # the default
    seed: int = 0  # any, but fixed
    threads: int = 1  # the least noise


_D = Settings()


def study(
    depth: Annotated[list[int], typer.Option(min=1, help="Hidden layers; may be repeated.")] = list(_D.depths),  # noqa: B006
    beta: Annotated[list[float], typer.Option(help="Named beta; may be repeated.")] = list(_D.betas),  # noqa: B006
    width: Annotated[int, typer.Option(min=1, help="Units in a hidden layer.")] = _D.width,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples to settle, and a step of training.")] = _D.batch_size,
    train_steps: Annotated[int, typer.Option(min=1, help="Steps of Adam for the trained networks.")] = _D.train_steps,
    tol: Annotated[float, typer.Option(help="Residual at which an example has settled.")] = _D.tol,
    seed: Annotated[int, typer.Option(help="For weights and examples.")] = _D.seed,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = _D.threads,
    out: Annotated[Path, typer.Option(help="The folder for record and picture.")] = Path("runs/study"),
    name: Annotated[str, typer.Option(help="The name of both.")] = "study",
) -> None:
    """Study; see the head of this file."""
    given: dict[str, Any] = {**locals(), "depths": tuple(sorted(depth)), "betas": tuple(sorted(beta))}
    settings = Settings(**{key: given[key] for key in Settings.__dataclass_fields__})
    path = out / f"{name}.json"
    records.make_parent(path)

    import torch

    from mep.lab.study_measure import run_study

    torch.set_num_threads(settings.threads)
    record = records.new_record(KIND, torch.device("cpu"), settings)
    # Beta varies at one depth, and depth at one beta, beside the default.
    common_depth, common_beta = nearest(settings.depths, COMMON_DEPTH), nearest(settings.betas, COMMON_BETA)
    cases = [
        (count, (DEFAULT, *(settings.betas if count == common_depth else [common_beta]))) for count in settings.depths
    ]
    record["rows"] = run_study(
        cases,
        width=settings.width,
        batch_size=settings.batch_size,
        train_steps=settings.train_steps,
        tol=settings.tol,
        seed=settings.seed,
        console=Console(stderr=True),
    )
    report.publish(record, path, draw, show)


# Tables: over depth, and over beta

COMMON_DEPTH, COMMON_BETA = 20, 0.01
"""Where one of the two varies, the other one is this, or the nearest that is among the settings."""
DEFAULT = None
"""The beta of rows in which the estimator chooses one for each example."""
UNSETTLED = "*"
CAPTION = (
    "Each cell: initialised / trained. Default: beta=None chooses one for each example. Sweeps: of an example, mean. "
    "Settled: share of the examples whose residual came within the tolerance. Error: of the whole gradient against "
    "backprop's, relative; of Hopfield networks, which have no forward pass, against recurrent backprop's at rest. "
    f"{UNSETTLED}: some example did not settle; the gradient is that of where settling stopped. "
    "A dash: nothing to compare: the gradient vanishes, is not finite, or the equilibrium has none, since its coupling "
    "is too strong."
)


def show(record: Record, console: Console) -> None:
    """Print the tables: ruled on a terminal, as Markdown anywhere else."""
    settings = record["settings"]
    report.print_text(
        console,
        f"Multilayer perceptrons of width {settings['width']} on digits, batch {settings['batch_size']}, tolerance "
        f"{settings['tol']:g}, as initialised and after {settings['train_steps']} steps of Adam.",
    )
    for title, over, rows in sections(record):
        for name, cell in CELLS.items():
            if is_informative(name, rows):
                console.print()
                report.print_text(console, f"{name}, {title}:")
                _show(console, rows, over, cell)
    report.print_text(console, CAPTION)


def sections(record: Record) -> list[tuple[str, str, list[Row]]]:
    """The rows that differ in depth or in beta alone: a title, "depth" or "beta", and the rows."""
    settings, rows = record["settings"], record["rows"]
    beta, depth = nearest(settings["betas"], COMMON_BETA), nearest(settings["depths"], COMMON_DEPTH)
    return [
        ("over depth, default beta", "depth", [row for row in rows if row["beta"] is DEFAULT]),
        (f"over depth, beta {beta:g}", "depth", [row for row in rows if row["beta"] == beta]),
        (f"over beta, {depth} hidden layers", "beta", [row for row in rows if row["depth"] == depth]),
    ]


def is_informative(name: str, rows: list[Row]) -> bool:
    """Beta only where it is chosen and not the title itself; the share that settled only where some did not."""
    if name == "Beta, median":
        return all(row["beta"] is DEFAULT for row in rows)
    return name != "Settled" or any(row["settled"] != 1 for row in rows)


def _show(console: Console, rows: list[Row], over: str, cell: Cell) -> None:
    places = sorted({row[over] for row in rows}, key=lambda place: -1 if place is DEFAULT else place)
    lines: dict[str, dict[tuple[Any, str], str]] = {}
    for row in rows:
        lines.setdefault(family(row), {})[row[over], row["stage"]] = cell(row)
    titles = ["Network", *("default" if place is DEFAULT else f"{place:g}" for place in places)]
    report.print_cells(
        console,
        titles,
        ([name, *(f"{cells[p, 'initial']} / {cells[p, 'trained']}" for p in places)] for name, cells in lines.items()),
    )


def family(row: Row) -> str:
    """What a network is called."""
    kind = {"plain": "", "residual": "residual ", "hopfield": "Hopfield, "}[row["kind"]]
    start = {"torch": "", "he": ", He", "xavier": ", Xavier", "halved": ", halved"}[row["start"]]
    return f"{kind}{row['activation']}{start}"


def nearest(values: Sequence[Any], wanted: float) -> Any:
    """The value that is nearest to the one wanted."""
    return min(values, key=lambda value: abs(value - wanted))


def percent(fraction: float) -> str:
    """In percent, with two digits at least.

    >>> percent(0.00123), percent(0.0456), percent(0.999)
    ('0.12%', '4.6%', '100%')
    """
    return f"{100 * fraction:{'.0f' if fraction >= 0.1 else '.2g'}}%"


def _cell(key: str, form: Callable[[float], str], mark: str = "") -> Cell:
    """A number, and a mark behind it where some example did not settle."""
    return lambda row: NONE if row[key] is None else form(row[key]) + (mark if row["settled"] < 1 else "")


CELLS: dict[str, Cell] = {
    "Beta, median": _cell("median_beta", "{:.2g}".format),
    "Settled": _cell("settled", share),
    "Sweeps": _cell("sweeps", "{:.1f}".format, UNSETTLED),
    "Error": _cell("error", percent, UNSETTLED),
}


# Picture

NAMES = {
    "median_beta": "beta, median",
    "settled": "examples that settled",
    "sweeps": "sweeps of an example, mean",
    "error": "gradient error against backprop",
}
STAGES: dict[str, tuple[Any, Any]] = {"initial": ("--", "none"), "trained": ("-", "full")}


def draw(record: Record, path: Path) -> None:
    """Draw how networks settle, and the gradient error, over depth and over beta, into `path`."""
    settings = record["settings"]
    figure = report.new_figure(13, 11)
    grid = figure.subplots(3, 3)
    for line, (title, over, rows) in zip(grid, sections(record), strict=True):
        is_chosen = all(row["beta"] is DEFAULT for row in rows)
        named = [row for row in rows if row[over] is not None]  # the default has no place on an axis of betas
        for axes, key in zip(line, ("median_beta" if is_chosen else "settled", "sweeps", "error"), strict=True):
            _draw(axes, named, over, key)
            axes.set_title(f"{NAMES[key]}\n{title}", loc="left", fontsize=10)
            axes.set_xlabel("hidden layers" if over == "depth" else "beta")
    names = list(dict.fromkeys(family(row) for row in record["rows"]))
    handles = [report.sample(name, color=colour) for name, colour in zip(names, cycle(report.COLOURS))]
    handles += [
        report.sample(stage, color=GREY, linestyle=style, marker="o", fillstyle=fill)
        for stage, (style, fill) in STAGES.items()
    ]
    handles.append(report.sample("some example did not settle", color=GREY, linestyle="", marker="x"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    report.save(figure, f"Multilayer perceptrons of width {settings['width']} on digits", record, path)


def _draw(axes: Any, rows: list[Row], over: str, key: str) -> None:
    """A line for each network and stage; a cross where some example did not settle."""
    names = list(dict.fromkeys(family(row) for row in rows))
    for name, colour in zip(names, cycle(report.COLOURS)):
        for stage, (style, fill) in STAGES.items():
            known = [r for r in rows if family(r) == name and r["stage"] == stage and r[key] is not None]
            points = [r[over] for r in known], [r[key] for r in known]
            axes.plot(*points, style, color=colour, marker="o", fillstyle=fill, markersize=4, linewidth=1.2)
            short = [r for r in known if r["settled"] < 1]
            axes.plot([r[over] for r in short], [r[key] for r in short], "x", color=colour, markersize=8)
    if key == "settled":
        axes.set_ylim(0, 1.05)
        axes.yaxis.set_major_formatter("{x:.0%}")
    elif key == "sweeps":
        most = max(row[key] for row in rows if row[key] is not None)
        axes.set_yscale("log")
        axes.set_yticks([tick for tick in (1, 2, 5, 10, 20, 50, 100) if tick <= 1.5 * most])
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_yscale("log")
    report.tidy(axes, sorted({row[over] for row in rows}))
    axes.minorticks_off()
    axes.grid(alpha=0.25)
