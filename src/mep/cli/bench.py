"""Compare optimizers on real digits: accuracy after a time budget, cost per step, and how well EP settled.

    mep bench
    mep bench --data mnist --folder data/mnist --seconds 60
    mep bench --only smep --only eqprop --add "eqprop tol=0.1 beta=0.5" --name tolerance
    mep bench speed --help

Writes a record (JSON) and a picture (PNG); `mep plot` draws the picture again, `mep report` makes Markdown of it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from mep.errors import ArgumentError

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
    model: Annotated[str, typer.Option(help="mlp, cnn, or yours: package.module:factory.")] = _D.model,
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

    import torch
    from rich.console import Console

    from mep.cli import contestants, kinds, records
    from mep.cli.championship import hold
    from mep.cli.files import make_parent
    from mep.cli.training import pick_device

    path = out / f"{name or settings.data}.json"
    make_parent(path)
    compared = contestants.choose(only or (), without or (), add or ())
    torch.set_num_threads(settings.threads)
    here = pick_device(settings.device)
    record = records.header(KIND, here) | {"settings": asdict(settings)}
    record["rows"] = hold(settings, compared, here, Console(stderr=True))
    kinds.publish(record, path)


def _refuse_options(ctx: typer.Context, command: str) -> None:
    """Options of `mep bench` say nothing to the command that follows them."""
    for name in ctx.params:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flag = "--" + name.replace("_", "-")
            raise ArgumentError(f"mep bench {flag} ... {command}: options of `{command}` go behind it.")
