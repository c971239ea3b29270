"""Train a model on a data set by equilibrium propagation.

    mep train --data digits --epochs 5
    mep train --data mnist5k --preset eqprop --beta 0.1 --seconds 15 --json runs/eqprop.json
    mep train --checkpoint runs/smep.pt --epochs 20

After a stop, `mep train --resume runs/smep.pt` goes on from the checkpoint, bit for bit on the same machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mep.cli.settings import EPOCHS, Settings

_D = Settings()
_RUN, _FILES = "What to train", "Files"
_PRESET = "Options of the preset (which has its own defaults)"


def _option(panel: str, help: str, default: object = None) -> Any:
    shown = "" if default is None else f" Default: {default}."
    return typer.Option(help=help + shown, rich_help_panel=panel)


def train(
    data: Annotated[str | None, _option(_RUN, "digits, mnist5k, mnist, fashion-mnist.", _D.data)] = None,
    folder: Annotated[str | None, _option(_RUN, "Where the files of mnist or fashion-mnist are.")] = None,
    model: Annotated[str | None, _option(_RUN, "mlp, cnn, or package.module:factory.", _D.model)] = None,
    preset: Annotated[str | None, _option(_RUN, "eqprop, smep, ...; or sgd, adam.", _D.preset)] = None,
    epochs: Annotated[int | None, _option(_RUN, "Train up to this epoch.", EPOCHS)] = None,
    seconds: Annotated[float | None, _option(_RUN, "Train for so long instead.")] = None,
    batch_size: Annotated[int | None, _option(_RUN, "Examples a step.", _D.batch_size)] = None,
    seed: Annotated[int | None, _option(_RUN, "For the weights and the order of examples.", _D.seed)] = None,
    device: Annotated[str | None, _option(_RUN, "auto, cpu or cuda.", _D.device)] = None,
    threads: Annotated[int | None, _option(_RUN, "CPU threads.", "torch's choice")] = None,
    lr: Annotated[float | None, _option(_PRESET, "Learning rate.")] = None,
    momentum: Annotated[float | None, _option(_PRESET, "Momentum of the update.")] = None,
    weight_decay: Annotated[float | None, _option(_PRESET, "Weight decay of the update.")] = None,
    nesterov: Annotated[bool | None, _option(_PRESET, "Look ahead along the momentum.")] = None,
    cost: Annotated[str | None, _option(_PRESET, "cross_entropy or mse.")] = None,
    energy: Annotated[str | None, _option(_PRESET, "prediction or hopfield.")] = None,
    beta: Annotated[float | None, _option(_PRESET, "Nudging strength; without it, each example has its own.")] = None,
    phases: Annotated[str | None, _option(_PRESET, "one-sided or centered.")] = None,
    branches: Annotated[str | None, _option(_PRESET, "held or exact, for ReLU and its like.")] = None,
    tol: Annotated[float | None, _option(_PRESET, "Residual at which settling stops.")] = None,
    settle_steps: Annotated[int | None, _option(_PRESET, "Largest number of iterations of settling.")] = None,
    settle_lr: Annotated[float | None, _option(_PRESET, "Settle by gradient descent with this step.")] = None,
    adaptive: Annotated[bool | None, _option(_PRESET, "Stop at tol, or run all settle steps.")] = None,
    patience: Annotated[int | None, _option(_PRESET, "Iterations in a row that must reach tol.")] = None,
    on_unsettled: Annotated[
        str | None, _option(_PRESET, "warn, raise or ignore, where an example does not settle.")
    ] = None,
    gamma: Annotated[float | None, _option(_PRESET, "Bound on each weight's largest singular value.")] = None,
    rank_fraction: Annotated[float | None, _option(_PRESET, "Directions of a Dion step, of the shorter side.")] = None,
    dion_threshold: Annotated[int | None, _option(_PRESET, "Entries from which a matrix takes Dion's step.")] = None,
    checkpoint: Annotated[Path | None, _option(_FILES, "Save here after every epoch and at the end.")] = None,
    checkpoint_every: Annotated[int | None, _option(_FILES, "Save after so many steps, too.")] = None,
    resume: Annotated[Path | None, _option(_FILES, "Go on from this checkpoint, and save there.")] = None,
    json: Annotated[Path | None, _option(_FILES, "Write settings, history and machine here.")] = None,
) -> None:
    """Train; see the head of this file."""
    given = {key: value for key, value in locals().items() if value is not None}
    files = {key: given.pop(key, None) for key in ("checkpoint", "checkpoint_every", "resume", "json")}

    from mep.cli.loop import train_and_save

    signal = train_and_save(given, **files)
    if signal:
        raise typer.Exit(128 + signal)
