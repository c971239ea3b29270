"""Training: the order of examples, sums over steps, accuracy, a run and its checkpoints, the device and its clock."""

from __future__ import annotations

import math
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mep import Estimate, Result
from mep.errors import ArgumentError, MepError
from mep.runs import models, optimizers
from mep.runs.data import DataSet
from mep.runs.optimizers import Optimizer
from mep.runs.records import write_atomically

TRAIN_SAMPLE = 1000  # examples that the training accuracy is estimated on: right to about a point
CHECKPOINT_FORMAT = "mep train checkpoint"
CHECKPOINT_VERSION = 2
CHECKPOINT_CONTENTS = {"settings", "data", "run", "random"}


class Batches:
    """An endless stream of shuffled batches; `epoch` and `position` suffice to rejoin it anywhere."""

    def __init__(self, x: Tensor, y: Tensor, size: int, seed: int) -> None:
        if size < 1:
            raise ArgumentError(f"--batch-size must be at least 1, not {size}.")
        self.x, self.y, self.size, self.seed = x, y, size, seed
        self.epoch, self.position = 0, 0
        self._order, self._order_epoch = torch.empty(0), -1

    @property
    def epochs(self) -> float:
        """Passes over the data so far, fractions included."""
        return self.epoch + self.position / len(self.x)

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch."""
        return math.ceil(len(self.x) / self.size)

    def next(self) -> tuple[Tensor, Tensor]:
        """The next batch; the last of an epoch may be smaller."""
        if self._order_epoch != self.epoch:
            self._order = epoch_order(len(self.x), self.seed, self.epoch).to(self.x.device)
            self._order_epoch = self.epoch
        chosen = self._order[self.position : self.position + self.size]
        self.position += self.size
        if self.position >= len(self.x):
            self.epoch, self.position = self.epoch + 1, 0
        return self.x[chosen], self.y[chosen]


def epoch_order(length: int, seed: int, epoch: int) -> Tensor:
    """A permutation that depends on the seed and the epoch alone."""
    # torch's CPU generator keeps only the low 32 bits of a seed, so the two must be mixed within them.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**32)
    return torch.randperm(length, generator=generator)


class Tally:
    """Sums over steps. They stay on the device until `means` reads them: no step waits for the host."""

    def __init__(self) -> None:
        self.steps = self.examples = self.nudged = 0
        # On the CPU until the first step; a sum with a tensor on the GPU is on the GPU.
        self.loss, self.residual, self.residual_max = torch.zeros(3, dtype=torch.float64).unbind()
        self.sweeps, self.settled = torch.zeros(2, dtype=torch.long).unbind()

    def add(self, estimate: Estimate, examples: int) -> None:
        """Count one step."""
        self.steps += 1
        self.examples += examples
        self.loss = self.loss + estimate.loss.double() * examples
        if estimate.result is not Result.BACKPROP:
            residual = estimate.residual.double()
            self.nudged += examples
            self.residual = self.residual + residual.sum()
            self.residual_max = torch.maximum(self.residual_max, residual.max())
            self.sweeps = self.sweeps + estimate.counts.sum()
            self.settled = self.settled + estimate.settled.sum()

    def means(self) -> dict[str, float | None]:
        """Over all examples so far: the mean cost; mean and largest residual, mean sweeps, and the share that settled.

        None where there is nothing to take it of; backprop has only the cost.
        """
        return {
            "loss": float(self.loss) / self.examples if self.examples else None,
            "residual": float(self.residual) / self.nudged if self.nudged else None,
            "residual_max": float(self.residual_max) if self.nudged else None,
            "sweeps": float(self.sweeps) / self.nudged if self.nudged else None,
            "settled": float(self.settled) / self.nudged if self.nudged else None,
        }

    def state_dict(self) -> dict[str, Any]:
        """All sums."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        vars(self).update(state)


def targets(data: DataSet, cost: str | None) -> Tensor:
    """What the cost compares outputs with in training: the labels, or for `mse` one-hot rows of them."""
    return F.one_hot(data.train_y, data.classes).float() if cost == "mse" else data.train_y


def accuracy(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, batch_size: int = 1000) -> float:
    """The percentage of `x` whose largest output is the right class, in evaluation mode."""
    model.eval()
    pairs = zip(x.split(batch_size), y.split(batch_size), strict=True)
    right = sum(int((optimizer.predict(part).argmax(1) == label).sum()) for part, label in pairs)
    model.train()
    return 100.0 * right / len(y)


class Run:
    """A model, its optimizer, its place in the data and its history."""

    def __init__(
        self, data: DataSet, *, model: str, preset: str, options: Mapping[str, Any], batch_size: int, seed: int
    ) -> None:
        torch.manual_seed(seed)
        self.device = data.train_x.device
        self.model = models.build(model, data).to(self.device)
        self.optimizer = optimizers.build(preset, self.model, options)
        self.batches = Batches(data.train_x, targets(data, options.get("cost")), batch_size, seed)
        self.test = data.test_x, data.test_y
        self.train_sample = data.train_x[:TRAIN_SAMPLE], data.train_y[:TRAIN_SAMPLE]
        self.tally = Tally()
        self.history: list[dict[str, Any]] = []
        self.steps = 0
        self.seconds = 0.0

    def step(self) -> None:
        """Train on the next batch; at the end of an epoch, measure and add a line to the history."""
        start = time.perf_counter()
        x, y = self.batches.next()
        self.optimizer.step(x=x, target=y)
        self.tally.add(self.optimizer.last, len(x))
        self.steps += 1
        ended = self.batches.position == 0
        if ended and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - start
        if ended:
            self._close_epoch()

    def result(self) -> dict[str, Any]:
        """Where the run is now: test accuracy, epochs, steps, seconds of training."""
        measured = self.history and self.batches.position == 0
        return {
            "test_accuracy": self.history[-1]["test_accuracy"] if measured else self._accuracy(self.test),
            "epochs": self.batches.epochs,
            "steps": self.steps,
            "seconds": self.seconds,
        }

    def _accuracy(self, examples: tuple[Tensor, Tensor]) -> float:
        return accuracy(self.model, self.optimizer, *examples)

    def _close_epoch(self) -> None:
        self.history.append(
            {
                "epoch": self.batches.epoch,
                **self.tally.means(),
                "train_accuracy": self._accuracy(self.train_sample),
                "test_accuracy": self._accuracy(self.test),
                "seconds": self.seconds,
            }
        )
        self.tally = Tally()

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on from here, but the random state."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "tally": self.tally.state_dict(),
            "epoch": self.batches.epoch,
            "position": self.batches.position,
            "history": self.history,
            "steps": self.steps,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.tally.load_state_dict(state["tally"])
            self.batches.epoch, self.batches.position = state["epoch"], state["position"]
            self.history, self.steps, self.seconds = state["history"], state["steps"], state["seconds"]
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"The checkpoint does not fit this model and optimizer: {error}") from error


def fingerprint(data: DataSet) -> str:
    """A line that is different for another data set of the same name, unless shapes and labels are the same."""
    labels = zlib.crc32(data.train_y.numpy().tobytes())
    shape = "x".join(str(n) for n in data.train_x.shape)
    return f"{data.name}, {shape} train, {len(data.test_x)} test, labels {labels:08x}"


class CheckpointError(MepError, ValueError):
    """A checkpoint is damaged, foreign, or of another run."""


def save_checkpoint(path: Path, settings: dict[str, Any], data: str, run: dict[str, Any]) -> None:
    """Write the state of a run, with torch's random state as it is now; whole or not at all."""
    contents = {
        "format": CHECKPOINT_FORMAT,
        "version": CHECKPOINT_VERSION,
        "settings": settings,
        "data": data,
        "run": run,
        # The order of examples follows from seed and epoch alone; dropout and its like need torch's generators.
        "random": {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        },
    }
    write_atomically(path, lambda file: torch.save(contents, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, as data and never as code; refuses everything else."""
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint {path}. `mep train --checkpoint {path}` starts one.")
    try:
        # A checkpoint is a zip archive with a checksum for each part, which torch writes but does not read.
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(damaged)
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types on a damaged or hostile file
        raise CheckpointError(
            f"{path} is not a whole checkpoint: it is truncated, damaged or of another program."
        ) from error
    if not isinstance(contents, dict) or contents.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(f"{path} was not written by `mep train`; resume from a file that --checkpoint wrote.")
    if contents.get("version") != CHECKPOINT_VERSION:
        found = contents.get("version")
        raise CheckpointError(
            f"{path} has checkpoint version {found}, this mep reads version {CHECKPOINT_VERSION}: "
            "resume with the mep that wrote it."
        )
    if not contents.keys() >= CHECKPOINT_CONTENTS:
        missing = ", ".join(sorted(CHECKPOINT_CONTENTS - contents.keys()))
        raise CheckpointError(f"{path} lacks {missing}; it cannot be resumed.")
    return contents


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the generators; those of GPUs only where the number of GPUs is the same."""
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def briefly_trained(name: str, data: DataSet, *, optimizer: str, cost: str, batch_size: int, steps: int) -> nn.Module:
    """The model called `name` after some steps: gradients as they are in training, not at its start."""
    model = models.build(name, data).to(data.train_x.device)
    stepping = optimizers.build(optimizer, model, {"cost": cost})
    stream = Batches(data.train_x, targets(data, cost), batch_size, seed=0)
    for _ in range(steps):
        x, target = stream.next()
        stepping.step(x=x, target=target)
    return model


def other_batches(data: DataSet, *, cost: str, batch_size: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Full batches in another order than `briefly_trained` saw; fewer than `count` where the data have no more."""
    stream = Batches(data.train_x, targets(data, cost), batch_size, seed=1)
    whole = max(1, len(data.train_x) // batch_size)  # the last batch of an epoch may be smaller
    return [stream.next() for _ in range(min(count, whole))]


def on_device(data: DataSet, device: torch.device) -> DataSet:
    """The whole data set on the device, so that no step waits for a transfer."""
    parts = ("train_x", "train_y", "test_x", "test_y")
    return replace(data, **{part: getattr(data, part).to(device) for part in parts})


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ArgumentError(f"Unknown --device {name!r}. Choose auto, cpu or cuda.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("--device cuda: this torch sees no GPU. Use --device cpu, or install a CUDA build.")
    return device


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds, once the device is done with what is queued."""
    if device.type != "cuda":
        return time.perf_counter

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now
