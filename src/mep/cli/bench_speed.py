"""Time a step of every recipe beside one of backprop: what it costs, how well it settled, what memory it takes.

    mep bench speed
    mep bench speed --model mlp256 --model cnn --only eqprop --threads 1 --no-compile
    mep bench speed --model package.module:factory --batch-size 64 --add "eqprop beta=0.5" --name mine

Writes a record (JSON) and a picture (PNG); `mep plot` draws the picture again, `mep report` makes Markdown of it. All
of it takes about thirteen minutes on two cores, most of that to compile; Ctrl-C keeps the models that are done.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

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
    numbers = tuple(dict.fromkeys(threads or (*_D.threads, os.cpu_count() or 1)))
    chosen: dict[str, Any] = {**locals(), "models": tuple(dict.fromkeys(model or _D.models)), "threads": numbers}
    settings = Settings(**{key: chosen[key] for key in Settings.__dataclass_fields__})

    import torch
    from rich.console import Console

    from mep.cli import kinds, records, speed_rows
    from mep.cli.files import make_parent
    from mep.cli.speed_display import Display
    from mep.cli.speeding import measure
    from mep.cli.training import pick_device

    path = out / f"{name}.json"
    make_parent(path)
    recipes = speed_rows.choose(only or (), without or (), add or (), compile=not no_compile)
    torch.set_num_threads(max(settings.threads))
    here = pick_device(settings.device)
    record = records.header(KIND, here) | {"settings": asdict(settings)}
    with Display(Console(stderr=True), len(settings.models)) as display:
        record |= measure(settings, recipes, here, display)
    kinds.publish(record, path)
    if record["stopped"]:
        raise typer.Exit(STOPPED)
