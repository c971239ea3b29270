"""Where the time of a step goes, and what each settling step buys.

    mep profile
    mep profile --data digits --model cnn --batch-size 64
    mep profile --model package.module:factory --threads 4 --name mine

Writes a record (JSON) and a picture (PNG); `mep plot` draws the picture again, `mep report` makes Markdown of it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

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
    model: Annotated[str, typer.Option(help="mlp, cnn, or yours: package.module:factory.")] = _D.model,
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

    import torch
    from rich.console import Console

    from mep.cli import kinds, records
    from mep.cli.files import make_parent
    from mep.cli.profiling import profile_settings
    from mep.cli.training import pick_device

    path = out / f"{name or settings.data}.json"
    make_parent(path)
    torch.set_num_threads(settings.threads)
    here = pick_device(settings.device)
    record = records.header(KIND, here) | {"settings": asdict(settings)}
    record["rows"] = profile_settings(settings, here, Console(stderr=True))
    kinds.publish(record, path)
