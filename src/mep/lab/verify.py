"""Prove on a batch that a model trains correctly by equilibrium propagation, or see where it does not.

    mep verify
    mep verify --model package.module:factory --shape 3,32,32 --classes 10
    mep verify --model package.module:factory --data mnist5k --leaf encoder.0 --branches exact
    mep verify --energy hopfield

Against backprop and finite differences, in float64. Exit code 0 if all is well, 1 if not, 2 if the model is refused.
Writes a record (JSON) and a picture (PNG); `mep plot` draws the picture again, `mep report` makes Markdown of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mep.errors import ArgumentError
from mep.runs import records, report
from mep.runs.records import Record
from mep.runs.report import BLUE, GREY, VERMILION

KIND = "mep verify"


@dataclass(frozen=True)
class Settings:
    """What is checked, and how."""

    data: str = "digits"  # comes with a package and loads at once
    folder: str | None = None  # only the sets that a user brings live in one
    shape: str | None = None  # of random examples instead of data
    classes: int = 10  # of random examples
    model: str = "mlp"  # the model of the benchmarks
    energy: str = "prediction"  # the default of training
    cost: str | None = None  # the usual one for classes: cross_entropy, or one_hot_mse for Hopfield networks
    batch_size: int = 16  # enough for BatchNorm, few enough for finite differences
    betas: tuple[float, ...] = (0.1, 0.03, 0.01)  # on the way to the limit, down to the default of training
    branches: str = "held"  # the default of training
    leaves: tuple[str, ...] = ()  # modules to keep whole
    samples: int = 2  # the largest coordinate of every parameter, and one more
    evaluation: bool = False  # dropout and BatchNorm are checked as they train
    seed: int = 0  # any, but fixed: two runs with the same options are alike
    device: str = "cpu"  # float64 is slow on most GPUs


_D = Settings()


def verify(
    model: Annotated[str, typer.Option(help="mlp, mlp256, cnn, ..., or yours: package.module:factory.")] = _D.model,
    data: Annotated[str, typer.Option(help="digits, mnist5k, mnist or fashion-mnist.")] = _D.data,
    folder: Annotated[str | None, typer.Option(help="Where the files of mnist or fashion-mnist are.")] = None,
    shape: Annotated[str | None, typer.Option(help="Random examples of this shape instead: 3,32,32.")] = None,
    classes: Annotated[int, typer.Option(min=2, help="Classes of random examples.")] = _D.classes,
    energy: Annotated[str, typer.Option(help="prediction or hopfield.")] = _D.energy,
    cost: Annotated[
        str | None, typer.Option(help="cross_entropy, mse or one_hot_mse. Default: that of the presets.")
    ] = _D.cost,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples.")] = _D.batch_size,
    beta: Annotated[list[float], typer.Option(help="Nudging strengths, two or more.")] = list(_D.betas),  # noqa: B006
    branches: Annotated[str, typer.Option(help="held or exact, for ReLU and its like.")] = _D.branches,
    leaf: Annotated[list[str] | None, typer.Option(help="A module to keep whole, by its path.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="Finite differences a parameter.")] = _D.samples,
    evaluation: Annotated[bool, typer.Option("--eval", help="Check in evaluation mode.")] = _D.evaluation,
    seed: Annotated[int, typer.Option(help="For weights and examples.")] = _D.seed,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = _D.device,
    out: Annotated[Path, typer.Option(help="The folder for record and picture.")] = Path("runs/verify"),
    name: Annotated[str | None, typer.Option(help="The name of both. Default: that of the model.")] = None,
) -> None:
    """Verify; see the head of this file."""
    given: dict[str, Any] = {**locals(), "betas": tuple(beta), "leaves": tuple(leaf or ())}
    settings = Settings(**{key: given[key] for key in Settings.__dataclass_fields__})
    path = out / f"{name or settings.model.replace(':', '.')}.json"
    records.make_parent(path)

    from mep.runs.training import pick_device

    here = pick_device(settings.device)
    found = verify_settings(settings, here).as_dict()
    report.publish(records.new_record(KIND, here, settings) | {"report": found}, path, draw, show)
    raise typer.Exit(0 if found["ok"] else 1)


def verify_settings(settings: Settings, device: Any) -> Any:
    """Build the model, draw a batch, verify; returns a `mep.verification.Report`."""
    import torch

    import mep
    from mep.runs import models
    from mep.runs.data import DataSet, load
    from mep.runs.training import Batches, on_device, targets

    torch.manual_seed(settings.seed)
    if settings.shape is None:
        data = load(settings.data, folder=settings.folder)
    else:  # one batch of normal noise with random labels
        x = torch.randn(settings.batch_size, *_sizes(settings.shape))
        y = torch.randint(settings.classes, (settings.batch_size,))
        data = DataSet("random", x, y, x, y, settings.classes)
    data = on_device(data, device)
    model = models.build(settings.model, data).to(device).train(not settings.evaluation)
    cost = settings.cost or ("one_hot_mse" if settings.energy == "hopfield" else "cross_entropy")
    x, target = Batches(data.train_x, targets(data, cost), settings.batch_size, settings.seed).next()
    return mep.verify(
        model,
        x,
        target,
        cost=cost,
        energy=settings.energy,
        betas=settings.betas,
        branches=settings.branches,
        leaves=settings.leaves,
        samples=settings.samples,
    )


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise ArgumentError(f"--shape {text!r}: give positive integers with commas between, as 3,32,32.")
    return sizes


# Tables

PARAMETERS_CAPTION = (
    "Norm: of backprop's gradient. The EP gradient beside it: cosine and norm ratio at the smallest beta, order in "
    "beta over the three smallest. FD: relative distance of either gradient from finite differences of the cost, on "
    "sampled coordinates. A dash: backprop's gradient, the error or the difference is no more than rounding."
)
EQUILIBRIA_CAPTION = (
    "Beta: that of every example. Error: relative, of the whole gradient against backprop's. Sweeps: the most of any "
    "phase. Unsettled: examples that did not settle. Residual: the largest, as the solver reported it, and recomputed "
    "from the states alone. Off branch: units beyond the kink they started from."
)


def show(record: Record, console: Console) -> None:
    """Print the verdict and the tables: ruled on a terminal, as Markdown anywhere else."""
    from mep.verification.report import estimation_table, parameter_table, sentences

    found = record["report"]
    for text in sentences(found):
        report.print_text(console, text)
    for (titles, rows), caption in (
        (parameter_table(found), PARAMETERS_CAPTION),
        (estimation_table(found), EQUILIBRIA_CAPTION),
    ):
        console.print()
        report.print_cells(console, titles, rows)
        report.print_text(console, caption)


# Picture

CONTRASTS = {"one-sided": VERMILION, "centered": BLUE}
NAMED = 8
"""Nodes that fit into a legend; of more, the slowest are named."""


def draw(record: Record, path: Path) -> None:
    """Draw where settling stalls, and how the error of the gradient falls with beta, into `path`."""
    found = record["report"]
    figure = report.new_figure(13, 6)
    left, right = figure.subplots(1, 2)
    _draw_stall(left, found)
    _draw_errors(right, found)
    for axes in (left, right):
        axes.set_yscale("log")
        axes.grid(alpha=0.25)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, frameon=False)
    settings = record["settings"]
    source = settings["data"] if settings["shape"] is None else f"random {settings['shape']}"
    verdict = "OK" if found["ok"] else f"NOT OK ({len(found['failures'])})"
    report.save(figure, f"{verdict}: {settings['model']} on {source}, batch {settings['batch_size']}", record, path)


def _draw_stall(axes: Any, found: Record) -> None:
    """The residual of every node over the sweeps, from the input (dark) to the output (light)."""
    from matplotlib import colormaps

    stall, tol = found["stall"], found["tol"]
    curves = {node: [max(r, tol / 10) for r in curve] for node, curve in stall["residuals"].items() if curve}
    slowest = sorted(curves, key=lambda node: sum(map(math.log, curves[node])), reverse=True)[:NAMED]
    for place, (node, curve) in enumerate(curves.items()):
        colour = colormaps["viridis"](0.9 * place / max(1, len(curves) - 1))
        label = node if node in slowest else None
        axes.plot(stall["sweeps"], curve, "o-", color=colour, linewidth=1.4, markersize=4, label=label)
    axes.axhline(tol, color=GREY, linewidth=0.8)
    axes.annotate(f"tol {tol:.1e}", (1, tol), (2, 4), textcoords="offset points", color=GREY)
    axes.set_ylim(tol / 15, 2 * max(map(max, curves.values()), default=1.0))
    report.tidy(axes, stall["sweeps"])
    axes.set_xlabel("sweeps")
    axes.set_ylabel("relative residual, the worst example (at the bottom: less)")
    some = "" if len(curves) <= NAMED else f" (the {NAMED} slowest of {len(curves)} nodes named)"
    axes.set_title(f"Where settling stalls, beta {stall['beta']:.2g}{some}", loc="left")


def _draw_errors(axes: Any, found: Record) -> None:
    """The error of the whole gradient over beta, and faintly that of every parameter."""
    for phases, order in found["orders"].items():
        colour = CONTRASTS[phases]
        for parameter in found["parameters"]:
            matches = [m for m in parameter["matches"][phases] if m["cosine"] is not None]
            betas, errors = [m["beta"] for m in matches], [m["error"] for m in matches]
            axes.plot(betas, errors, color=colour, linewidth=0.6, alpha=0.3)
        whole = [e for e in found["estimations"] if e["phases"] == phases]
        label = phases if order is None else f"{phases}: order {order:.2f}"
        axes.plot([e["beta"] for e in whole], [e["error"] for e in whole], "o-", color=colour, label=label)
    axes.plot([], [], color=GREY, linewidth=0.6, alpha=0.5, label="single parameters")
    report.tidy(axes, sorted({e["beta"] for e in found["estimations"]}))
    axes.set_xlabel("beta")
    axes.set_ylabel("relative error against backprop")
    axes.set_title("The error of the gradient falls with beta", loc="left")
