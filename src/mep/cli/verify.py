"""Prove on a batch that a model trains correctly by equilibrium propagation, or see where it does not.

    mep verify
    mep verify --model package.module:factory --shape 3,32,32 --classes 10
    mep verify --model package.module:factory --data mnist5k --leaf encoder.0 --branches exact

Against backprop and finite differences, in float64. Exit code 0 if all is well, 1 if not, 2 if the model is refused.
Writes a record (JSON) and a picture (PNG); `mep plot` draws the picture again, `mep report` makes Markdown of it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

KIND = "mep verify"


@dataclass(frozen=True)
class Settings:
    """What is checked, and how."""

    data: str = "digits"  # comes with a package and loads at once
    folder: str | None = None  # only the sets that a user brings live in one
    shape: str | None = None  # of random examples instead of data
    classes: int = 10  # of random examples
    model: str = "mlp"  # the model of the benchmarks
    cost: str = "cross_entropy"  # the usual one for classes
    batch_size: int = 16  # enough for BatchNorm, few enough for finite differences
    betas: tuple[float, ...] = (0.1, 0.03, 0.01)  # on the way to the limit, down to the default of training
    branches: str = "held"  # the default of training
    leaves: tuple[str, ...] = ()  # modules to keep whole
    samples: int = 2  # the largest coordinate of every parameter, and one more
    evaluation: bool = False  # dropout and BatchNorm are checked as they train
    seed: int = 0  # any, but fixed: two runs are alike unless asked otherwise
    device: str = "cpu"  # float64 is slow on most GPUs


_D = Settings()


def verify(
    model: Annotated[str, typer.Option(help="mlp, cnn, or yours: package.module:factory.")] = _D.model,
    data: Annotated[str, typer.Option(help="digits, mnist5k, mnist or fashion-mnist.")] = _D.data,
    folder: Annotated[str | None, typer.Option(help="Where the files of mnist or fashion-mnist are.")] = None,
    shape: Annotated[str | None, typer.Option(help="Random examples of this shape instead: 3,32,32.")] = None,
    classes: Annotated[int, typer.Option(min=2, help="Classes of random examples.")] = _D.classes,
    cost: Annotated[str, typer.Option(help="cross_entropy or mse.")] = _D.cost,
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

    from mep.cli import kinds, records
    from mep.cli.files import make_parent
    from mep.cli.training import pick_device
    from mep.cli.verifying import verify_settings

    path = out / f"{name or settings.model.replace(':', '.')}.json"
    make_parent(path)
    here = pick_device(settings.device)
    report = verify_settings(settings, here).as_dict()
    record = records.header(KIND, here) | {"settings": asdict(settings), "report": report}
    kinds.publish(record, path)
    raise typer.Exit(0 if report["ok"] else 1)
