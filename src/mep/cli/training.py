"""What the commands share: the order of examples, sums over steps, accuracy, the device and its clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mep import Estimate
from mep.cli import models, optimizers
from mep.cli.optimizers import Optimizer
from mep.data import DataSet
from mep.errors import ArgumentError


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
        if estimate.residual is not None:
            assert estimate.counts is not None and estimate.settled is not None
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
