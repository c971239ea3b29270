"""Train a model on a data set by equilibrium propagation.

    mep train --data digits --epochs 5
    mep train --data mnist5k --preset eqprop --beta 0.1 --seconds 15 --json runs/eqprop.json
    mep train --checkpoint runs/smep.pt --epochs 20

After a stop, `mep train --resume runs/smep.pt` goes on from the checkpoint, bit for bit on the same machine.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mep.errors import ArgumentError
from mep.runs import records
from mep.runs.report import share

KIND = "mep train"


@dataclass(frozen=True)
class Settings:
    """What is trained, and how."""

    data: str = "mnist5k"  # real digits that come with a package: nothing to download
    folder: str | None = None  # only the sets that a user brings live in one
    model: str = "mlp"  # 784-128-64-10, the model of the benchmarks
    preset: str = "smep"  # equilibrium propagation with the update that suits it
    batch_size: int = 256  # that of the benchmarks
    seed: int = 0  # any, but fixed: two runs with the same options are alike
    device: str = "auto"  # the GPU where there is one
    threads: int | None = None  # torch chooses
    epochs: int | None = None  # EPOCHS, unless seconds are given
    seconds: float | None = None  # as long as the epochs take
    options: dict[str, Any] = field(default_factory=dict)  # what was given to the preset, which has its own defaults


EPOCHS = 10  # a good model of mnist5k within seconds
GOAL = ("epochs", "seconds")
CHANGEABLE = {*GOAL, "folder", "device", "threads"}  # on resuming; the others decide what is computed

_D = Settings()
_RUN, _FILES = "What to train", "Files"
_PRESET = "Options of the preset (which has its own defaults)"


def _option(panel: str, help: str, default: object = None) -> Any:
    shown = "" if default is None else f" Default: {default}."
    return typer.Option(help=help + shown, rich_help_panel=panel)


def train(
    data: Annotated[str | None, _option(_RUN, "digits, mnist5k, mnist, fashion-mnist.", _D.data)] = None,
    folder: Annotated[str | None, _option(_RUN, "Where the files of mnist or fashion-mnist are.")] = None,
    model: Annotated[str | None, _option(_RUN, "mlp, mlp256, cnn, ..., or package.module:factory.", _D.model)] = None,
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
    cost: Annotated[str | None, _option(_PRESET, "cross_entropy, mse or one_hot_mse.")] = None,
    energy: Annotated[str | None, _option(_PRESET, "prediction or hopfield.")] = None,
    beta: Annotated[float | None, _option(_PRESET, "Nudging strength; without it, each example has its own.")] = None,
    phases: Annotated[str | None, _option(_PRESET, "one-sided, centered, random-sign or holomorphic.")] = None,
    points: Annotated[int | None, _option(_PRESET, "Betas on the circle of holomorphic phases.")] = None,
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

    stopped_by = train_and_save(given, **files)
    if stopped_by:
        raise typer.Exit(128 + stopped_by)


def decide(given: Mapping[str, Any], saved: Mapping[str, Any] | None = None) -> Settings:
    """The settings of a new run, or of one resumed from `saved`, which wins wherever nothing is given."""
    names = {item.name for item in fields(Settings)} - {"options"}
    own = {key: value for key, value in given.items() if key in names}
    options = {key: value for key, value in given.items() if key not in names}
    _check(own)
    if saved is None:
        if not any(key in own for key in GOAL):
            own["epochs"] = EPOCHS
        return Settings(**own, options=options)
    for key, value in (own | options).items():
        before = saved[key] if key in names else saved["options"].get(key)
        if key not in CHANGEABLE and value != before:
            flag = "--" + key.replace("_", "-")
            made = f"with {flag} {before}" if before is not None else f"without {flag}"
            raise ArgumentError(
                f"The checkpoint was made {made}, and {flag} is now {value}. "
                f"Leave {flag} out to go on, or start a new run without --resume."
            )
    if any(key in own for key in GOAL):
        saved = {**saved, **dict.fromkeys(GOAL)}
    return Settings(**{**saved, **own})


def _check(given: Mapping[str, Any]) -> None:
    if all(key in given for key in GOAL):
        raise ArgumentError("--epochs and --seconds are two ways to say how long to train. Give one of them.")
    for key in ("epochs", "seconds", "batch_size", "threads"):
        if key in given and not given[key] > 0:
            raise ArgumentError(f"--{key.replace('_', '-')} must be above 0, not {given[key]}.")


def train_and_save(
    given: Mapping[str, Any],
    *,
    checkpoint: Path | None,
    checkpoint_every: int | None,
    resume: Path | None,
    json: Path | None,
) -> int | None:
    """Start or resume a run and train it to its goal; returns the signal that stopped it, if one did."""
    import torch

    from mep.runs import training
    from mep.runs.data import load

    saved = training.load_checkpoint(resume) if resume else None
    settings = decide(given, saved["settings"] if saved else None)
    save_to = _save_to(checkpoint, checkpoint_every, resume)
    for path in filter(None, (save_to, json)):
        records.make_parent(path)

    if settings.threads:
        torch.set_num_threads(settings.threads)
    data = load(settings.data, folder=settings.folder)
    mark = training.fingerprint(data)
    run = training.Run(
        training.on_device(data, training.pick_device(settings.device)),
        model=settings.model,
        preset=settings.preset,
        options=settings.options,
        batch_size=settings.batch_size,
        seed=settings.seed,
    )
    if saved:
        if saved["data"] != mark:
            raise training.CheckpointError(f"{resume} was made with other data: {saved['data']}; these are {mark}.")
        run.load_state_dict(saved["run"])
        training.restore_random_state(saved["random"])

    def save() -> None:
        if save_to:
            training.save_checkpoint(save_to, settings=asdict(settings), data=mark, run=run.state_dict())

    with StopRequest() as stop, TrainingProgress(settings.epochs, settings.seconds) as progress:
        while not (stop.signal or _reached(run, settings)):
            run.step()
            progress.update(run)
            if run.batches.position == 0:
                progress.epoch(run.history[-1])
                save()
            elif checkpoint_every and run.steps % checkpoint_every == 0:
                save()
        if run.batches.position != 0:
            save()

    result = run.result()
    if json:
        record = records.new_record(KIND, run.device, settings) | {"data": mark, "result": result}
        records.write(json, record | {"stopped_by_signal": stop.signal, "history": run.history})
    if stop.signal:
        print(f"Stopped.{f' Go on with: mep train --resume {save_to}' if save_to else ''}")
    print("test accuracy {test_accuracy:.2f}% after {epochs:.4g} epochs, {seconds:.1f} s of training".format(**result))
    return stop.signal


def _save_to(checkpoint: Path | None, every: int | None, resume: Path | None) -> Path | None:
    if checkpoint and checkpoint != resume and checkpoint.exists():
        raise ArgumentError(f"{checkpoint} exists. Go on from it with --resume {checkpoint}, or remove it first.")
    path = checkpoint or resume
    if every is not None and (every < 1 or not path):
        raise ArgumentError("--checkpoint-every needs a number of steps above 0, and --checkpoint to say where.")
    return path


def _reached(run: Any, settings: Settings) -> bool:
    if settings.seconds is not None:
        return bool(run.seconds >= settings.seconds)
    return bool(run.batches.epoch >= (settings.epochs or 0))


class StopRequest:
    """Notes the first Ctrl-C or termination signal; a second one acts as if this were not here."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> StopRequest:
        """Take over the signals."""
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        """Hand them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        self.__exit__()


REFRESH = 0.2  # seconds between readings of the loss: the only times that a step waits for the device


class TrainingProgress:
    """Shows a run's way to its goal, a number of epochs or of training seconds."""

    def __init__(self, epochs: int | None, seconds: float | None) -> None:
        self.console = Console(stderr=True)
        self.epochs, self.seconds = epochs, seconds
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=seconds or epochs, figures="")
        self._next = 0.0

    def __enter__(self) -> TrainingProgress:
        """Start the bar."""
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        """Take the bar away; the lines stay."""
        self.bar.stop()

    def update(self, run: Any) -> None:
        """After a step: move the bar, now and then."""
        if self.bar.disable or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + REFRESH
        known = {"test_accuracy": run.history[-1]["test_accuracy"]} if run.history else {}
        done = run.seconds if self.seconds else run.batches.epochs
        figures = describe(run.tally.means() | known)
        self.bar.update(self.task, completed=done, description=f"epoch {run.batches.epoch + 1}", figures=figures)

    def epoch(self, line: dict[str, Any]) -> None:
        """After an epoch: a line that stays."""
        self.console.print(
            f"epoch {line['epoch']:3d}  {describe(line)}  {line['seconds']:.1f} s",
            highlight=False,
            soft_wrap=True,
        )


def describe(line: dict[str, Any]) -> str:
    """The figures of a line of history that exist, in words; the share that settled only where some did not.

    >>> describe({"loss": 0.5, "sweeps": 1.25, "settled": 0.75})
    'loss 0.5000  sweeps 1.2  settled 75%'
    """
    formats = {
        "loss": "loss {:.4f}",
        "train_accuracy": "train {:.1f}%",
        "test_accuracy": "test {:.1f}%",
        "residual": "residual {:.1e}",
        "sweeps": "sweeps {:.1f}",
    }
    figures = [form.format(line[key]) for key, form in formats.items() if line.get(key) is not None]
    if line.get("settled") not in (None, 1):
        figures.append(f"settled {share(line['settled'])}")
    return "  ".join(figures)
