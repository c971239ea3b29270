"""See what makes an equilibrium hard to reach: depth, beta, activation, initialisation, shortcuts, training.

    mep study
    mep study --depth 5 --depth 50 --beta 0.1
    mep plot runs/study/study.json

Settles multilayer perceptrons on scikit-learn's digits, freshly initialised
and after some steps of training: at the default, beta=None, and at the betas
that are named. Writes a record (JSON) and a picture (PNG).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

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

    import torch
    from rich.console import Console

    from mep.cli import kinds, records
    from mep.cli.files import make_parent
    from mep.cli.studying import study_settings

    path = out / f"{name}.json"
    make_parent(path)
    torch.set_num_threads(settings.threads)
    record = records.header(KIND, torch.device("cpu")) | {"settings": asdict(settings)}
    record["rows"] = study_settings(settings, Console(stderr=True))
    kinds.publish(record, path)
