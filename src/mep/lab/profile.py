"""Where the time of a step goes, and by how much each settling step reduces the gradient's error.

    mep profile
    mep profile --data digits --model cnn --batch-size 64
    mep profile --model package.module:factory --threads 4 --name mine

Writes a record (JSON) and a picture (PNG); `mep plot` draws the picture again, `mep report` makes Markdown of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mep.runs import records, report
from mep.runs.records import Record
from mep.runs.report import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    NONE,
    ORANGE,
    PINK,
    SKY,
    VERMILION,
    Cell,
    Row,
    label,
    number,
    share,
)

KIND = "mep profile"


@dataclass(frozen=True)
class Settings:
    """What is measured, and how."""

    data: str = "mnist5k"  # real digits that come with a package: nothing to download
    folder: str | None = None  # only the sets that a user brings live in one
    model: str = "mlp256"  # 784-256-256-10, as in the table we are compared with
    cost: str = "cross_entropy"  # the usual one for classes
    batch_size: int = 32  # as in the table we are compared with
    train_steps: int = 150  # about an epoch: gradients as they are in training, neither at its start nor at its end
    batches: int = 8  # enough examples for a stable mean of what settling buys
    rounds: int = 20  # turns of 5 timed steps: enough for quartiles, in less than a minute
    threads: int = 1  # the least noise, and what one core of any machine can repeat
    device: str = "cpu"  # where the table we are compared with was made


_D = Settings()


def profile(
    data: Annotated[str, typer.Option(help="digits, mnist5k, mnist or fashion-mnist.")] = _D.data,
    folder: Annotated[str | None, typer.Option(help="Where the files of mnist or fashion-mnist are.")] = None,
    model: Annotated[str, typer.Option(help="mlp, mlp256, cnn, ..., or yours: package.module:factory.")] = _D.model,
    cost: Annotated[str, typer.Option(help="cross_entropy or mse.")] = _D.cost,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples a step.")] = _D.batch_size,
    train_steps: Annotated[int, typer.Option(min=0, help="Steps of SGD before measuring.")] = _D.train_steps,
    batches: Annotated[int, typer.Option(min=1, help="Batches to step on.")] = _D.batches,
    rounds: Annotated[int, typer.Option(min=2, help="Turns of each recipe, of 5 timed steps.")] = _D.rounds,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = _D.threads,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = _D.device,
    out: Annotated[Path, typer.Option(help="The folder for record and picture.")] = Path("runs/profile"),
    name: Annotated[str | None, typer.Option(help="The name of both. Default: that of the data.")] = None,
) -> None:
    """Measure; see the head of this file."""
    given = locals()
    settings = Settings(**{key: given[key] for key in Settings.__dataclass_fields__})
    path = out / f"{name or settings.data}.json"
    records.make_parent(path)

    import torch

    from mep.lab import profile_measure
    from mep.runs.data import load
    from mep.runs.training import briefly_trained, on_device, other_batches, pick_device

    torch.set_num_threads(settings.threads)
    here = pick_device(settings.device)
    record = records.new_record(KIND, here, settings)
    torch.manual_seed(0)
    examples = on_device(load(settings.data, folder=settings.folder), here)
    common: dict[str, Any] = {"cost": settings.cost, "batch_size": settings.batch_size}
    trained = briefly_trained(settings.model, examples, optimizer="sgd", steps=settings.train_steps, **common)
    chosen = other_batches(examples, count=settings.batches, **common)
    record["rows"] = profile_measure.profile(
        trained, chosen, cost=settings.cost, rounds=settings.rounds, console=Console(stderr=True)
    )
    report.publish(record, path, draw, show)


# Tables

COST_CAPTION = (
    "Step: median, and half the distance between the quartiles. Then the shares of the free phase (the forward pass), "
    "of settling, of the contrast (for SGD: of backprop), of the update with its constraints, and of the rest: checks "
    "and bookkeeping."
)
SETTLING_CAPTION = (
    "Steps: sweeps of an example, or its steps of descent, mean. Beta: median over the examples; a recipe that names "
    "none has one for each example. Settled: share of the examples whose residual came within the tolerance. Residual: "
    "relative distance from equilibrium, mean over the examples, and the largest (at most)."
)
GRADIENT_CAPTION = (
    "Cosine, Size: of the gradient, against the exact EP gradient with the same beta for every example; 1st: of the "
    "first weight alone. Gap: relative error against that exact gradient. Bias: relative error of the exact gradient "
    "against backprop's. cos BP: cosine of the recipe's gradient with backprop's. Bought: the factor by which the gap "
    "is smaller than in the row above; nothing, where it was below the bias there already."
)


def show(record: Record, console: Console) -> None:
    """Print the tables: ruled on a terminal, as Markdown anywhere else."""
    title = "{data}, {model}, batch {batch_size}, after {train_steps} steps of SGD."
    report.print_text(console, title.format(**record["settings"]))
    show_rows(record["rows"], console)


def show_rows(rows: Sequence[Row], console: Console) -> None:
    """Print the tables of these rows."""
    able = [row for row in rows if row["error"] is None]
    for columns, caption in ((COST, COST_CAPTION), (SETTLING, SETTLING_CAPTION), (GRADIENT, GRADIENT_CAPTION)):
        console.print()
        report.print_table(console, columns, able)
        report.print_text(console, caption)
    report.warn_if_busy(console, (row["running"] for row in able))
    report.show_failed(console, rows)


def _seconds(row: Row) -> str:
    return f"{1000 * row['seconds']['median']:.2f} ms"


def _spread(row: Row) -> str:
    times = row["seconds"]
    return f"{(times['high'] - times['low']) / 2 / times['median']:.0%}"


def _share(*phases: str) -> Cell:
    def cell(row: Row) -> str:
        found = [row["shares"][phase] for phase in phases if phase in row["shares"]]
        return f"{sum(found):.0%}" if found else NONE

    return cell


def _error_reduction(row: Row) -> str:
    if row["bought"] is None:
        return NONE
    return "nothing" if row["idle"] else f"÷ {row['bought']:.2g}"


COST: dict[str, Cell] = {
    "Recipe": label,
    "Step": _seconds,
    "±": _spread,
    "/ backprop": lambda row: f"{row['ratio']['median']:.2f}",
    "Free": _share("free"),
    "Settle": _share("settle"),
    "Contrast": _share("contrast", "backprop"),
    "Update": _share("update"),
    "Rest": _share("rest"),
}
SETTLING: dict[str, Cell] = {
    "Recipe": label,
    "Steps": number("iterations", "{:.2f}"),
    "Beta, median": number("beta", "{:.2g}"),
    "Settled": lambda row: share(row["settled"]),
    "Residual": number("residual", "{:.1e}"),
    "at most": number("residual_max", "{:.1e}"),
}
GRADIENT: dict[str, Cell] = {
    "Recipe": label,
    "Cosine": number("cosine", "{:.4f}"),
    "Size": number("size", "{:.3f}"),
    "1st: cos": number("first_cosine", "{:.4f}"),
    "1st: size": number("first_size", "{:.3f}"),
    "Gap": number("gap", "{:.1e}"),
    "Bought": _error_reduction,
    "Bias": number("bias", "{:.1e}"),
    "cos BP": number("backprop_cosine", "{:.4f}"),
}


# Picture

PHASES = {
    "backprop": ("backprop", BLACK),
    "free": ("free phase", SKY),
    "settle": ("settling", ORANGE),
    "contrast": ("contrast", BLUE),
    "update": ("update", PINK),
    "rest": ("rest", "#bbbbbb"),
}
SETTLE_SERIES = {"descent": VERMILION, "sweep": GREEN}
STEP_TICKS = (1, 2, 3, 5, 10, 15, 20, 30)


def draw(record: Record, path: Path) -> None:
    """Draw where the time of a step goes, and what settling longer buys, into `path`."""
    rows = [row for row in record["rows"] if row["error"] is None]
    in_series = [row for row in rows if row["ladder"]]
    figure = report.new_figure(13, 6)
    every = figure.subplots(1, 2 if in_series else 1, squeeze=False).flat
    _draw_times(every[0], rows)
    if in_series:
        _draw_gains(every[1], in_series)
    for axes in every:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False)
    title = "{data}, {model}, batch {batch_size}, after {train_steps} steps".format(**record["settings"])
    report.save(figure, title, record, path)


def _draw_times(axes: Any, rows: list[Row]) -> None:
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
    report.tidy(axes)


def _draw_gains(axes: Any, rows: list[Row]) -> None:
    """Residual and gap over the number of steps, a colour for each series; hollow where steps bought nothing."""
    for series, colour in SETTLE_SERIES.items():
        own = [row for row in rows if row["ladder"] == series]
        if not own:
            continue
        steps = [row["iterations"] for row in own]
        axes.plot(steps, [row["gap"] for row in own], color=colour, label=f"{series}: gap")
        axes.plot(steps, [row["residual"] for row in own], "--", color=colour, label=f"{series}: residual")
        for row in own:
            place = row["iterations"], row["gap"]
            axes.plot(*place, "o", color=colour, markerfacecolor="white" if row["idle"] else colour)
            if "tol" in row["options"]:
                text, plate = f"tol {row['options']['tol']:g}", {"facecolor": "white", "edgecolor": "none", "pad": 1}
                axes.annotate(text, place, (9, -3), textcoords="offset points", bbox=plate)
        # The error that beta causes: a gap far below it brings the gradient of the loss no nearer.
        last = own[-1]
        axes.axhline(last["bias"], color=colour, linewidth=0.8, linestyle=":")
        text = f"{series}: bias, median beta {last['beta']:.2g}"
        axes.annotate(text, (1, last["bias"]), (2, 4), textcoords="offset points", color=colour)
    axes.add_line(report.sample("bought nothing", color=GREY, marker="o", markerfacecolor="white", linestyle=""))
    axes.set_yscale("log")
    axes.grid(alpha=0.25)
    axes.set_xlabel("steps of settling (mean over examples)")
    axes.set_ylabel("gap: relative error of the gradient; residual")
    axes.set_title("What settling buys", loc="left")
    report.tidy(axes, STEP_TICKS)
    axes.set_xlim(0.9, 33)
