"""Compare optimizers on real digits: accuracy after a time budget, cost per step, and how well EP settled.

    mep bench
    mep bench --data mnist --folder data/mnist --seconds 60
    mep bench --only smep --only eqprop --add "eqprop tol=0.1 beta=0.5" --name tolerance
    mep bench speed --help

Writes a record (JSON) and a picture (PNG); `mep plot` draws the picture again, `mep report` makes Markdown of it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise, product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console, Group
from rich.live import Live

from mep.errors import ArgumentError
from mep.lab.recipes import BENCH, EARLIER, EARLIER_TASK, choose
from mep.runs import records, report
from mep.runs.records import Record
from mep.runs.report import GREY, NONE, Cell, Row, label, number, plural, share

KIND = "mep bench"


@dataclass(frozen=True)
class Settings:
    """What is compared, and how."""

    data: str = "mnist5k"  # real digits that come with a package: nothing to download
    folder: str | None = None  # only the sets that a user brings live in one
    model: str = "mlp"  # 784-128-64-10
    cost: str = "cross_entropy"  # the usual one for classes; the same for all
    batch_size: int = 256  # large enough that arithmetic, not Python, decides the cost of a step
    seconds: float = 15.0  # of training for each optimizer and seed, as in the table we are compared with
    seeds: int = 3  # enough to see a spread, few enough to wait for
    turn: float = 0.25  # seconds at most: shorter than most disturbances of a machine
    target: float = 92.12  # percent: what SGD reached in the table we are compared with; we time the way to it
    threads: int = 1  # the least noise, and what one core of any machine can repeat
    device: str = "cpu"  # where the table we are compared with was made


QUICK = {"seconds": 1.0, "seeds": 1}  # shows that everything works; the accuracies mean little
_D = Settings()


def bench(
    ctx: typer.Context,
    data: Annotated[str, typer.Option(help="digits, mnist5k, mnist or fashion-mnist.")] = _D.data,
    folder: Annotated[str | None, typer.Option(help="Where the files of mnist or fashion-mnist are.")] = None,
    model: Annotated[str, typer.Option(help="mlp, mlp256, cnn, ..., or yours: package.module:factory.")] = _D.model,
    cost: Annotated[str, typer.Option(help="cross_entropy or mse.")] = _D.cost,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples a step.")] = _D.batch_size,
    seconds: Annotated[
        float | None, typer.Option(min=0.01, help=f"Training time of each. Default: {_D.seconds}.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help=f"Runs of each. Default: {_D.seeds}.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = _D.threads,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = _D.device,
    target: Annotated[float, typer.Option(help="Accuracy in percent to time the way to.")] = _D.target,
    only: Annotated[list[str] | None, typer.Option(help="Compare only this one; may be repeated.")] = None,
    without: Annotated[list[str] | None, typer.Option(help="Leave this one out; may be repeated.")] = None,
    add: Annotated[list[str] | None, typer.Option(help='Add a variant: "eqprop tol=0.1"; may be repeated.')] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A smoke test: 1 second, one seed.")] = False,
    out: Annotated[Path, typer.Option(help="The folder for record and picture.")] = Path("runs/bench"),
    name: Annotated[str | None, typer.Option(help="The name of both. Default: that of the data.")] = None,
) -> None:
    """Compare, unless a command follows; see the head of this file."""
    if ctx.invoked_subcommand is not None:
        _refuse_options(ctx, ctx.invoked_subcommand)
        return
    given = {key: value for key, value in locals().items() if value is not None}
    chosen = {key: given[key] for key in Settings.__dataclass_fields__ if key in given}
    settings = Settings(**((QUICK if quick else {}) | chosen))
    path = out / f"{name or settings.data}.json"
    records.make_parent(path)
    recipes = choose(BENCH, only or (), without or (), add or ())
    if not recipes:
        raise ArgumentError("--only and --without leave nothing to compare. Name a recipe in --only alone.")

    import torch

    from mep.lab.bench_measure import run_bench
    from mep.runs.data import load
    from mep.runs.training import on_device, pick_device

    torch.set_num_threads(settings.threads)
    here = pick_device(settings.device)
    record = records.new_record(KIND, here, settings)
    examples = on_device(load(settings.data, folder=settings.folder), here)
    with Progress(settings, Console(stderr=True)) as progress:
        record["rows"] = run_bench(
            recipes,
            examples,
            model=settings.model,
            cost=settings.cost,
            batch_size=settings.batch_size,
            seconds=settings.seconds,
            seeds=settings.seeds,
            turn=settings.turn,
            after_turn=progress.after_turn,
        )
    summarise(record["rows"], settings.target)
    report.publish(record, path, draw, show)


def _refuse_options(ctx: typer.Context, command: str) -> None:
    """Options of `mep bench` say nothing to the command that follows them."""
    for name in ctx.params:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flag = "--" + name.replace("_", "-")
            raise ArgumentError(f"mep bench {flag} ... {command}: options of `{command}` go behind it.")


class Progress:
    """Shows the rows while they are measured: the table itself on a terminal, lines where the output is piped.

    It draws between two turns only, never from a thread of its own, which would take time from the runs.
    """

    REFRESH = 1.0  # seconds between two drawings of the table
    REPEAT = 15.0  # seconds between two lines on the runs that go on

    def __init__(self, settings: Settings, console: Console):
        self.settings, self.console = settings, console
        self._live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop")
        self._finished: set[tuple[int, str]] = set()
        self._drawn = time.monotonic()

    def __enter__(self) -> Progress:
        """Begin to show."""
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        """Remove the table: the final one follows on standard output."""
        self._live.stop()

    def after_turn(self, rows: Sequence[Row], runs: Sequence[Any]) -> None:
        """Show the results so far: of the seeds that are done, and of the runs on the present one."""
        seed, since = len(rows[0]["seeds"]), time.monotonic() - self._drawn
        title = f"seed {seed + 1} of {self.settings.seeds}"
        if not self.console.is_terminal:
            for run in runs:
                if (seed, run.label) not in self._finished and (run.error or run.seconds >= self.settings.seconds):
                    self._finished.add((seed, run.label))
                    self._print(f"{title}, {run.label}: {_in_words(run.result())}")
            going_on = [run for run in runs if (seed, run.label) not in self._finished]
            if since > self.REPEAT and going_on:
                found = ", ".join(f"{run.label} {run.curve['accuracy'][-1]:.1f}%" for run in going_on)
                self._print(
                    f"{title}, {min(run.seconds for run in going_on):.1f} of {self.settings.seconds:g} s: {found}"
                )
        elif since > self.REFRESH:
            partial = [{**row, "seeds": [*row["seeds"], run.result()]} for row, run in zip(rows, runs, strict=True)]
            summarise(partial, self.settings.target)
            columns = {"Optimizer": label, **_figures(self.settings.target)}
            cells = [[cell(row) for cell in columns.values()] for row in partial]
            part = report.tables(list(columns), cells, self.console.width)[0]
            seconds = min(run.seconds for run in runs)
            self._live.update(Group(part, f"{title}, {seconds:.1f} of {self.settings.seconds:g} s"), refresh=True)
            self._drawn = time.monotonic()

    def _print(self, line: str) -> None:
        self._drawn = time.monotonic()
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _in_words(result: Row) -> str:
    parts = [f"accuracy {result['accuracy']:.2f}%"]
    if result["step_seconds"] is not None:
        parts.append(f"{_seconds('step_seconds')({'summary': result})} a step")
    if result["sweeps"] is not None:
        parts.append(f"{result['sweeps']:.1f} sweeps, residual {result['residual']:.2g}")
    if result["error"]:
        parts.append(f"stopped early: {result['error']}")
    return ", ".join(parts)


# The figures of the table, from the results per seed


def summarise(rows: Sequence[Row], target: float) -> None:
    """Add to each row of a record its `summary` over the seeds, beside those of SGD and Muon."""
    by_name = {row["name"]: row["seeds"] for row in reversed(rows)}  # of variants, the first counts
    sgd, muon = by_name.get("sgd", []), by_name.get("muon_backprop", [])
    for row in rows:
        own = row["seeds"]
        accuracies = [result["accuracy"] for result in own]
        # Step costs are compared seed by seed, since those were measured in the same minutes.
        pairs = [(a["step_seconds"], b["step_seconds"]) for a, b in zip(own, sgd, strict=False)]
        to_target = statistics.median(time_to(target, result["curve"]) for result in own)
        row["summary"] = {
            "accuracy": statistics.mean(accuracies),
            "accuracy_spread": statistics.stdev(accuracies) if len(own) > 1 else None,
            "vs_sgd": _difference(own, sgd),
            "vs_muon": _difference(own, muon),
            "target_seconds": to_target if math.isfinite(to_target) else None,
            "epoch_seconds": _mean(result["epoch_seconds"] for result in own),
            "step_seconds": _mean(result["step_seconds"] for result in own),
            "step_ratio": _mean(a / b for a, b in pairs if a and b),
            "running": _mean(result["running"] for result in own),
            "residual": _mean(result["residual"] for result in own),
            "residual_max": max((r["residual_max"] for r in own if r["residual_max"] is not None), default=None),
            "sweeps": _mean(result["sweeps"] for result in own),
            "settled": _mean(result["settled"] for result in own),
        }


def time_to(target: float, curve: dict[str, list[float]]) -> float:
    """The training time at which accuracy first reached the target, linear between two measurements; or infinity.

    >>> time_to(90.0, {"seconds": [0.0, 1.0, 3.0], "accuracy": [10.0, 80.0, 100.0]})
    2.0
    """
    points = list(zip(curve["seconds"], curve["accuracy"], strict=True))
    if points[0][1] >= target:
        return points[0][0]
    for (start, before), (end, after) in pairwise(points):
        if after >= target:
            return start + (end - start) * (target - before) / (after - before)
    return math.inf


def _mean(values: Any) -> float | None:
    """Of those that are there."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _difference(own: Sequence[Row], reference: Sequence[Row]) -> float | None:
    """Of the mean accuracies; None without a reference."""
    if not reference:
        return None
    return statistics.mean(r["accuracy"] for r in own) - statistics.mean(r["accuracy"] for r in reference)


# Table


def show(record: Record, console: Console) -> None:
    """Print the table: ruled on a terminal, as Markdown anywhere else."""
    columns = _columns(record, wide=not console.is_terminal)
    report.print_table(console, columns, record["rows"])
    report.print_text(console, _caption(record["settings"], columns))
    if not record["machine"]["gpu"]:
        report.warn_if_busy(console, (row["summary"]["running"] for row in record["rows"]))
    for row in record["rows"]:
        for result in row["seeds"]:
            if result["error"]:
                report.print_text(console, f"{row['label']} stopped early on seed {result['seed']}: {result['error']}")


def _columns(record: Record, wide: bool) -> dict[str, Cell]:
    """The columns that have something to say, by title."""
    columns = {"Optimizer": label, **_figures(record["settings"]["target"])}
    if any(row["summary"]["settled"] not in (None, 1.0) for row in record["rows"]):
        columns["Settled"] = lambda row: share(row["summary"]["settled"])
    if wide and record["settings"].items() >= EARLIER_TASK.items():
        columns["Earlier system"] = _earlier
    return columns


def _figures(target: float) -> dict[str, Cell]:
    return {
        "Accuracy": _accuracy,
        "vs SGD": _figure("vs_sgd", "{:+.2f}"),
        "vs Muon": _figure("vs_muon", "{:+.2f}"),
        f"to {target:g}%": _seconds("target_seconds"),
        "Epoch": _seconds("epoch_seconds"),
        "Step": _seconds("step_seconds"),
        "/ SGD": _figure("step_ratio", "{:.2f}"),
        "Residual": _figure("residual", "{:.2g}"),
        "at most": _figure("residual_max", "{:.2g}"),
        "Sweeps": _figure("sweeps", "{:.1f}"),
    }


def _caption(settings: dict[str, Any], columns: dict[str, Cell]) -> str:
    many = settings["seeds"] > 1
    parts = [
        f"{settings['data']}, {settings['model']}, batch {settings['batch_size']}.",
        f"Accuracy: on the test set after {settings['seconds']:g} s of training"
        + (f", mean and standard deviation of {settings['seeds']} seeds." if many else "."),
        f"To {settings['target']:g}%: training time until the test accuracy first reached it, linear between two "
        + ("measurements, the median over seeds." if many else "measurements."),
        "Epoch, Step: training time, batches drawn included in the first. / SGD: cost of a step over that of SGD.",
        "Residual: relative distance from equilibrium, mean over all steps and examples, and the largest (at most).",
        "Sweeps: of an example, or its steps of descent; mean over all steps and examples.",
    ]
    if "Settled" in columns:
        parts.append("Settled: share of the examples whose residual came within the tolerance.")
    if "Earlier system" in columns:
        parts.append("Earlier system: accuracy and / SGD as reported for a system of the same name, another machine.")
    return " ".join(parts)


def _figure(key: str, form: str) -> Cell:
    cell = number(key, form)
    return lambda row: cell(row["summary"])


def _accuracy(row: Row) -> str:
    summary = row["summary"]
    spread = summary["accuracy_spread"]
    return f"{summary['accuracy']:.2f}%" + ("" if spread is None else f" ± {spread:.2f}")


def _seconds(key: str) -> Cell:
    def cell(row: Row) -> str:
        value = row["summary"][key]
        if value is None:
            return NONE
        return f"{value:.2f} s" if value >= 1 else f"{1000 * value:#.3g}".rstrip(".") + " ms"

    return cell


def _earlier(row: Row) -> str:
    if row["label"] not in EARLIER:
        return ""
    accuracy, ratio = EARLIER[row["label"]]
    return f"{accuracy:.2f}%, {ratio:.2f}"


# Picture

GREYS = ("#333333", "#666666", "#8c8c8c", "#adadad")
ACCURACY_TICKS = (0, 20, 40, 60, 70, 80, 85, 90, 92, 94, 96, 98, 99, 100)
ERRORS_AT_TOP = 1.0  # keeps 100% at a finite height


class Look(NamedTuple):
    """How an optimizer is drawn."""

    colour: str
    style: str


def draw(record: Record, path: Path) -> None:
    """Draw accuracy over training time, and what a step costs, into `path`."""
    figure = report.new_figure(13, 6)
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    _draw_accuracy(left, record)
    _draw_costs(right, record)
    s = record["settings"]
    title = f"{s['data']}, {s['model']}, batch {s['batch_size']}, {s['seconds']:g} s, {plural(s['seeds'], 'seed')}"
    report.save(figure, title, record, path)


def _draw_accuracy(axes: Any, record: Record) -> None:
    """A line for the mean over seeds, a band from the worst to the best seed, a label at the end."""
    import numpy as np

    settings, rows = record["settings"], record["rows"]
    looks = _looks(rows)
    times = np.geomspace(settings["seconds"] / 400, settings["seconds"], 200)
    ends = [row["summary"]["accuracy"] for row in rows]
    for row, look in zip(rows, looks, strict=True):
        # Interpolated between measurements; no line where some run ended early.
        curves = [result["curve"] for result in row["seeds"]]
        after = [np.nan if curve["seconds"][-1] < times[-1] else None for curve in curves]
        lines = [np.interp(times, c["seconds"], c["accuracy"], right=a) for c, a in zip(curves, after, strict=True)]
        seeds = np.stack(lines)
        axes.plot(times, seeds.mean(0), color=look.colour, linestyle=look.style, linewidth=1.6)
        axes.fill_between(times, seeds.min(0), seeds.max(0), color=look.colour, alpha=0.1, linewidth=0)
    axes.axhline(settings["target"], color=GREY, linewidth=0.8)
    axes.annotate(f"{settings['target']:g}%", (times[0], settings["target"]), (4, 2), textcoords="offset points")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yscale("function", functions=(_stretch, _unstretch))
    axes.set_yticks(ACCURACY_TICKS)
    axes.yaxis.minorticks_off()
    axes.set_xlim(times[0], times[-1])
    axes.set_ylim(max(0, min(50, *ends) - 5), 0.75 * max(ends) + 25)  # a quarter of the errors is room above
    axes.set(xlabel="training time (s); broken grey lines: backprop; bands: all seeds", ylabel="test accuracy (%)")
    axes.set_title("Accuracy for the time spent", loc="left")
    axes.grid(alpha=0.25)
    report.tidy(axes)
    _label_ends(axes, [row["label"] for row in rows], ends, looks)


def _label_ends(axes: Any, labels: list[str], ends: list[float], looks: list[Look]) -> None:
    """Name each line right of its end, in the order of the ends, as far apart as the letters need."""
    low, high = map(_stretch, axes.get_ylim())
    heights = [(_stretch(end) - low) / (high - low) for end in ends]
    order = sorted(range(len(ends)), key=heights.__getitem__)
    for height, place in zip(_apart([heights[place] for place in order], 0.055), order, strict=True):
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


def _draw_costs(axes: Any, record: Record) -> None:
    """A bar for each optimizer, with how it settled written beside it."""
    rows = record["rows"]
    ratios = [row["summary"]["step_ratio"] or 0.0 for row in rows]
    axes.barh([row["label"] for row in rows], ratios, color=[look.colour for look in _looks(rows)], height=0.62)
    column = axes.get_yaxis_transform()  # of the text on how each settled, right of the axes
    for place, (row, ratio) in enumerate(zip(rows, ratios, strict=True)):
        text = f"{ratio:.2f}x" if ratio else "?"
        axes.annotate(text, (ratio, place), (5, 0), textcoords="offset points", va="center")
        settled = "{sweeps:.1f} iterations, residual {residual:.1g}"
        settled = "backprop" if _is_backprop(row) else settled.format(**row["summary"])
        axes.text(1.04, place, settled, transform=column, va="center")
    axes.axvline(1, color="white", linewidth=1, linestyle=":")
    axes.set_xlim(0, 1.3 * max(1.0, *ratios))  # room for the figure beside the longest bar
    axes.invert_yaxis()
    axes.set_xlabel("time of a step, relative to SGD")
    axes.set_title("Cost of a step, and how well it settled", loc="left")
    axes.tick_params(axis="y", length=0)
    report.tidy(axes)


def _is_backprop(row: Row) -> bool:
    return row["summary"]["residual"] is None


def _looks(rows: list[Row]) -> list[Look]:
    """Greys and broken lines for backprop; for all others the colours, once through in each style."""
    backprop = cycle(map(Look, GREYS, ("--", "-.", ":", "--")))
    black, *colours = report.COLOURS
    settled = cycle(Look(colour, style) for style, colour in product(("-", "-."), (*colours, black)))
    return [next(backprop if _is_backprop(row) else settled) for row in rows]


def _stretch(accuracy: Any) -> Any:
    """A scale on which halving the errors is the same distance wherever one starts."""
    import numpy as np

    return -np.log(ERRORS_AT_TOP + 100 - np.minimum(accuracy, 100))


def _unstretch(height: Any) -> Any:
    import numpy as np

    return ERRORS_AT_TOP + 100 - np.exp(-height)
