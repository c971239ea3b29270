"""Time a step of every recipe beside one of backprop: what it costs, how well it settled, what memory it takes.

    mep bench speed
    mep bench speed --model mlp256 --model cnn --only eqprop --threads 1 --no-compile
    mep bench speed --model package.module:factory --batch-size 64 --add "eqprop beta=0.5" --name mine

Writes a record (JSON) and a picture (PNG); `mep plot` draws the picture again, `mep report` makes Markdown of it. All
of it takes about thirteen minutes on two cores, most of that to compile; Ctrl-C keeps the models that are done.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mep.errors import ArgumentError
from mep.lab.recipes import BASELINE, SPEED, Recipe, choose, is_hopfield
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
    VERMILION,
    Cell,
    Row,
    label,
    number,
    plural,
    share,
)

KIND = "mep bench speed"
STOPPED = 130  # the exit code of what Ctrl-C ended

# The batch size of each model that is timed by default: those of the table we are compared with, then larger ones.
MODELS = {
    "mlp256": 32,  # 784-256-256-10
    "mlp": 256,  # 784-128-64-10
    "mlp512": 128,  # 784-512-256-10
    "mlp20": 64,  # 784-128x20-10
    "mlp1024": 128,  # 784-1024x3-10
    "cnn": 64,
    "residual": 64,  # 24 blocks
    "transformer": 8,  # 4 blocks, 64 tokens
}
BATCH_SIZE = 64  # of a model that is not among them


@dataclass(frozen=True)
class Settings:
    """What is measured, and how."""

    models: tuple[str, ...] = tuple(MODELS)  # from tiny to large, and one of every architecture
    threads: tuple[int, ...] = (1,)  # the least noise, what one core of any machine can repeat; and all the others
    data: str = "mnist5k"  # real digits that come with a package: nothing to download
    folder: str | None = None  # only the sets that a user brings live in one
    batch_size: int | None = None  # that of MODELS
    cost: str = "cross_entropy"  # the usual one for classes
    train_steps: int = 150  # of Adam: gradients as they are in training, neither at its start nor at its end
    batches: int = 4  # enough examples for a stable mean of sweeps and residual
    rounds: int = 20  # turns of each recipe at most: enough for quartiles
    seconds: float = 8.0  # of turns for each model and number of threads: the slow ones get fewer rounds
    compile_seconds: float = 300.0  # for each recipe: what takes longer is of little use, and fails with that reason
    device: str = "cpu"  # where the table we are compared with was made


_D = Settings()


def speed(
    model: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(MODELS)}, or package.module:factory; may be repeated.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this preset or label; may be repeated.")] = None,
    without: Annotated[list[str] | None, typer.Option(help="Leave this one out; may be repeated.")] = None,
    add: Annotated[list[str] | None, typer.Option(help='Add a variant: "eqprop beta=0.5"; may be repeated.')] = None,
    no_compile: Annotated[bool, typer.Option("--no-compile", help="Leave out what is compiled.")] = False,
    rounds: Annotated[int, typer.Option(min=2, help="Turns of each recipe, at most.")] = _D.rounds,
    seconds: Annotated[
        float, typer.Option(min=0, help="For the turns of one model and number of threads; 5 rounds at least.")
    ] = _D.seconds,
    compile_seconds: Annotated[
        float, typer.Option(min=0, help="For compiling a recipe; one that takes longer fails.")
    ] = _D.compile_seconds,
    threads: Annotated[
        list[int] | None, typer.Option(min=1, help="CPU threads; may be repeated. Default: 1, and all.")
    ] = None,
    data: Annotated[str, typer.Option(help="digits, mnist5k, mnist or fashion-mnist.")] = _D.data,
    folder: Annotated[str | None, typer.Option(help="Where the files of mnist or fashion-mnist are.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="For all models. Default: each its own.")] = None,
    cost: Annotated[str, typer.Option(help="cross_entropy or mse.")] = _D.cost,
    train_steps: Annotated[int, typer.Option(min=0, help="Steps of Adam before measuring.")] = _D.train_steps,
    batches: Annotated[int, typer.Option(min=1, help="Batches to step on.")] = _D.batches,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = _D.device,
    out: Annotated[Path, typer.Option(help="The folder for record and picture.")] = Path("runs/bench"),
    name: Annotated[str, typer.Option(help="The name of both.")] = "speed",
) -> None:
    """Time; see the head of this file."""
    counts = tuple(dict.fromkeys(threads or (*_D.threads, os.cpu_count() or 1)))
    chosen: dict[str, Any] = {**locals(), "models": tuple(dict.fromkeys(model or _D.models)), "threads": counts}
    settings = Settings(**{key: chosen[key] for key in Settings.__dataclass_fields__})
    path = out / f"{name}.json"
    records.make_parent(path)
    recipes = recipes_to_time(only or (), without or (), add or (), compile=not no_compile)
    measured = _measure(settings, recipes)
    report.publish(measured, path, draw, show)
    if measured["stopped"]:
        raise typer.Exit(STOPPED)


def recipes_to_time(
    only: Collection[str] = (), without: Collection[str] = (), added: Collection[str] = (), compile: bool = True
) -> list[Recipe]:
    """The baseline, and the others that are chosen."""
    if BASELINE.label in without:
        raise ArgumentError(f"--without {BASELINE.label!r}: all others are timed beside it. Leave it in.")
    chosen = choose(SPEED, only, without, added)
    return [BASELINE, *(r for r in chosen if r is not BASELINE and (compile or not r.is_compiled))]


def _measure(settings: Settings, recipes: Sequence[Recipe]) -> Record:
    """The record. After Ctrl-C it has the models that were done; before the first one is done, Ctrl-C ends all."""
    import torch

    from mep.lab.speed_measure import Progress, compare, machine_peak
    from mep.runs import models, training
    from mep.runs.data import load

    torch.set_num_threads(max(settings.threads))
    device = training.pick_device(settings.device)
    record = records.new_record(KIND, device, settings)
    data = training.on_device(load(settings.data, folder=settings.folder), device)
    for name in settings.models:
        models.build(name, data)  # a wrong name is refused now, not after minutes
    record |= {"attainable": [], "models": [], "stopped": None}
    with Progress(Console(stderr=True), len(settings.models)) as progress:
        for count in settings.threads:
            torch.set_num_threads(count)
            record["attainable"].append({"threads": count, **machine_peak(device)})
        for name in settings.models:
            try:
                torch.manual_seed(0)
                size = settings.batch_size or MODELS.get(name, BATCH_SIZE)
                common: dict[str, Any] = {"cost": settings.cost, "batch_size": size}
                model = training.briefly_trained(name, data, optimizer="adam", steps=settings.train_steps, **common)
                fresh = models.build(name, data).to(device)  # for Hopfield networks, whose weights are others
                rows = compare(
                    model,
                    training.other_batches(data, count=settings.batches, **common),
                    recipes,
                    cost=settings.cost,
                    threads=settings.threads,
                    rounds=settings.rounds,
                    seconds=settings.seconds,
                    compile_seconds=settings.compile_seconds,
                    progress=progress,
                    title=name,
                    hopfield=fresh,
                )
            except KeyboardInterrupt:
                if not record["models"]:
                    raise
                record["stopped"] = name
                break
            failed = sum(row["error"] is not None for row in rows)
            rounds = " and ".join(str(time["rounds"]) for time in rows[0]["times"])
            progress.end(f"{rounds} rounds" + (f", {plural(failed, 'recipe')} failed" if failed else ""))
            parameters = sum(p.numel() for p in model.parameters())
            record["models"].append({"model": name, "batch_size": size, "parameters": parameters, "rows": rows})
    return record


# Tables: all models at a glance, then each by itself

FAILED, UNSETTLED = "failed", "*"
SETTLED_SHARE = 0.99  # of the examples: a rare one that falls short changes no median
MIB = 2**20
OVERVIEW_CAPTION = (
    f"Medians over the rounds; in the first row the time itself. {UNSETTLED}: more than 1% of the examples "
    f"did not settle. {FAILED}: the reason stands below. {NONE}: only for models with convolutions."
)
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


def show(record: Record, console: Console) -> None:
    """Print the tables: ruled on a terminal, as Markdown anywhere else, where those of a model can be unfolded."""
    settings, models = record["settings"], record["models"]
    own = any(is_hopfield(row["options"]) for model in models for row in model["rows"])
    others = "; Hopfield networks, whose weights are others, as they are initialised" if own else ""
    report.print_text(
        console, "{data}, after {train_steps} steps of Adam and backprop".format(**settings) + f"{others}."
    )
    if record["stopped"]:
        report.print_text(
            console, f"Stopped by Ctrl-C during {record['stopped']}: what it and later models take is missing."
        )
    for place, count in enumerate(settings["threads"]):
        report.print_text(console, f"Time of a step over that of backprop + SGD, {plural(count, 'thread')}:")
        _show_overview(models, place, console)
    report.print_text(console, OVERVIEW_CAPTION)
    peaks = (
        f"{plural(int(peak['threads']), 'thread')}: {peak['flops'] / 1e9:.0f} GFLOP/s in a matrix product of size "
        f"1024, {peak['bytes'] / 1e9:.0f} GB/s in a copy beyond the caches"
        for peak in record["attainable"]
    )
    report.print_text(console, f"The most that the machine does, {'; '.join(peaks)}.")
    if not record["machine"]["gpu"]:
        times = (time for model in models for row in model["rows"] for time in row["times"])
        report.warn_if_busy(console, (time["running"] for time in times))
    for model in models:
        rounds = sorted({time["rounds"] for row in model["rows"] for time in row["times"]})
        title = "{model}, batch {batch_size}, {parameters:,} parameters, ".format(**model)
        with _folded(title + f"{' or '.join(map(str, rounds))} rounds", console):
            show_rows(model["rows"], console)
    for caption in CAPTIONS:
        report.print_text(console, f"- {caption}")


def _show_overview(models: Sequence[Record], place: int, console: Console) -> None:
    """Print the ratios of all rows on all models with the number of threads at this place, and the baseline's time."""

    def ratio(row: Row | None) -> str:
        if row is None:
            return NONE
        if row["error"] is not None:
            return FAILED
        settled = row["settled"] is None or row["settled"] >= SETTLED_SHARE
        return f"{row['times'][place]['ratio']['median']:.2f}" + ("" if settled else UNSETTLED)

    console.print()
    by_label = [{row["label"]: row for row in model["rows"]} for model in models]
    baseline, *others = _labels(models)
    first = [baseline, *(milliseconds(rows[baseline]["times"][place]["seconds"]["median"]) for rows in by_label)]
    ratios = ([name, *(ratio(rows.get(name)) for rows in by_label)] for name in others)
    report.print_cells(console, ["Recipe", *(model["model"] for model in models)], [first, *ratios])


def show_rows(rows: Sequence[Row], console: Console) -> None:
    """Print the tables of one model, and why some of its rows are not in them."""
    able = [row for row in rows if row["error"] is None]
    for columns in (_time_columns(able), COST):
        console.print()
        report.print_table(console, columns, able)
    report.show_failed(console, rows)


@contextmanager
def _folded(title: str, console: Console) -> Iterator[None]:
    """What is printed within follows its title; in Markdown it is shown on a click."""
    plain: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
    if console.is_terminal:
        console.print()
        report.print_text(console, title)
        yield
    else:
        console.print(f"\n<details><summary>{title}</summary>", **plain)
        yield
        console.print("\n</details>", **plain)


def _labels(models: Sequence[Record]) -> list[str]:
    """Of all rows of all models, each once, in the order of the model that has most."""
    longest_first = sorted(models, key=lambda model: -len(model["rows"]))
    return list(dict.fromkeys(label(row) for model in longest_first for row in model["rows"]))


def _time_columns(rows: Sequence[Row]) -> dict[str, Cell]:
    """Those of `TIMES` for every number of threads."""

    def timed(place: int, cell: Cell) -> Cell:
        return lambda row: cell(row["times"][place])

    columns: dict[str, Cell] = {"Recipe": label}
    for place, time in enumerate(rows[0]["times"]):
        for title, cell in TIMES.items():
            threads = plural(time["threads"], "thread") if title == "step" else time["threads"]
            columns[f"{threads}: {title}"] = timed(place, cell)
    return columns


def milliseconds(seconds: float) -> str:
    """With three digits that say something.

    >>> milliseconds(0.0012345), milliseconds(0.12345)
    ('1.23 ms', '123 ms')
    """
    return f"{1000 * seconds:.{2 if seconds < 0.01 else 1 if seconds < 0.1 else 0}f} ms"


def _rate(key: str) -> Cell:
    return lambda row: NONE if row[key] is None else f"{row[key] / row['times'][0]['seconds']['median'] / 1e9:.1f}"


def _settled(row: Row) -> str:
    return share(row["settled"]) + (f", {row['unsettled']}" if row["unsettled"] else "")


TIMES: dict[str, Cell] = {
    "step": lambda time: milliseconds(time["seconds"]["median"]),
    "mean": lambda time: milliseconds(time["mean"]),
    "/ backprop": lambda time: "{median:.2f} ({low:.2f} to {high:.2f})".format(**time["ratio"]),
    "/ Muon": number("to_muon", "{:.2f}"),
}
COST: dict[str, Cell] = {
    "Recipe": label,
    "Sweeps": number("sweeps", "{:.2f}"),
    "Residual": number("residual", "{:.1e}"),
    "at most": number("residual_max", "{:.1e}"),
    "Settled": _settled,
    "Beta, median": number("beta", "{:.2g}"),
    "Memory": number("memory", "{:.2f} MiB", MIB),
    "Work": number("flops", "{:,.1f} MFLOP", 1e6),
    "GFLOP/s": _rate("flops"),
    "Moved": number("bytes", "{:,.1f} MB", 1e6),
    "GB/s": _rate("bytes"),
}


# Picture

FAMILIES = {
    "backprop": BLACK,
    "sweeps and SGD": GREEN,
    "descent and SGD": VERMILION,
    "sweeps and other updates": BLUE,
    "local": PINK,
    "Hopfield": ORANGE,
}
BESIDE = 4  # models in a line
TICKS = (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


def draw(record: Record, path: Path) -> None:
    """Draw for every model what a step of each recipe costs beside backprop's."""
    models = record["models"]
    names = _labels(models)
    across = min(BESIDE, len(models))
    down = math.ceil(len(models) / across)
    figure = report.new_figure(2.4 + 3.2 * across, 1.4 + down * (0.8 + 0.24 * len(names)))
    every = list(figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flat)
    for axes, model in zip(every, models, strict=False):
        _draw_model(axes, model, names)
    for axes in every[len(models) :]:
        axes.set_axis_off()
    for axes in every[max(0, len(models) - across) : len(models)]:  # the lowest of each column
        axes.set_xlabel("time of a step / that of backprop + SGD", fontsize=9)
        axes.tick_params(axis="x", labelbottom=True)
    every[0].invert_yaxis()  # all share it
    # From the least to the largest median of all models; a quartile may lie beyond.
    rows = [row for model in models for row in model["rows"] if row["error"] is None]
    medians = [time["ratio"]["median"] for row in rows for time in row["times"]]
    every[0].set_xlim(0.9 * min(*medians, 0.8), 1.3 * max(*medians, 2.5))
    shown = {_family(row) for row in rows}
    handles = [report.sample(name, color=colour, marker="o") for name, colour in FAMILIES.items() if name in shown]
    for place, count in enumerate(record["settings"]["threads"]):
        fill = GREY if place == 0 else "white"
        name = plural(count, "thread")
        handles.append(report.sample(name, color=GREY, marker="o", linestyle="", markerfacecolor=fill))
    handles.append(report.sample("quartiles over the rounds", color=GREY))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    report.save(figure, "{data}, after {train_steps} steps of Adam".format(**record["settings"]), record, path)


def _draw_model(axes: Any, model: Record, names: list[str]) -> None:
    """A point for each recipe and number of threads, filled for the first, with a bar from quartile to quartile."""
    axes.axvline(1, color=GREY, linewidth=0.8)
    for row in model["rows"]:
        height, colour = names.index(row["label"]), FAMILIES[_family(row)]
        if row["error"] is not None:
            axes.annotate("failed", (1, height), (6, 0), textcoords="offset points", va="center", color=GREY)
            continue
        for place, time in enumerate(row["times"]):
            ratio, level = time["ratio"], height + 0.22 * place
            axes.plot([ratio["low"], ratio["high"]], [level, level], color=colour, linewidth=1.5)
            fill = colour if place == 0 else "white"
            axes.plot(ratio["median"], level, "o", color=colour, markerfacecolor=fill, markersize=5)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    axes.set_title("{model}, batch {batch_size}".format(**model), loc="left", fontsize=10)
    report.tidy(axes, TICKS)


def _family(row: Row) -> str:
    """What a row is a case of."""
    if row["preset"] in ("sgd", "torch_muon"):
        return "backprop"
    if is_hopfield(row["options"]):
        return "Hopfield"
    if row["preset"] == "local_ep":
        return "local"
    if "settle_lr" in row["options"]:
        return "descent and SGD"
    return "sweeps and SGD" if row["preset"] == "eqprop" else "sweeps and other updates"
