"""Optimizers train in one process, in turns of a fraction of a second, each on its own clock.

A busy moment of the machine then falls on all of them alike, and the ratio of two step costs is that of two
measurements made side by side. A clock counts what training costs, the drawing of batches included, and
stands still while accuracy is measured; the cost of a step is that of the optimizer alone.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from mep.cli import models, optimizers
from mep.cli.contestants import Contestant
from mep.cli.training import Batches, Tally, accuracy, clock, targets
from mep.data import DataSet
from mep.errors import MepError

SHORTEST = 0.01  # seconds a turn: some steps at least
RESOLUTION = 0.05  # of a turn, relative to the time so far


class Racer:
    """A contestant on one seed: its model, its clock and what was measured."""

    def __init__(
        self, contestant: Contestant, data: DataSet, *, model: str, cost: str, batch_size: int, seed: int
    ) -> None:
        torch.manual_seed(seed)
        self.seed = seed
        self.device = data.train_x.device
        self.now = clock(self.device)
        self.model = models.build(model, data).to(self.device)
        self.optimizer = optimizers.build_to_compare(contestant.name, self.model, {"cost": cost, **contestant.options})
        self.batches = Batches(data.train_x, targets(data, cost), batch_size, seed)
        self.test = data.test_x, data.test_y
        self.tally = Tally()
        self.seconds = self.ran = 0.0
        self.step_seconds: list[float] = []
        self.batch_seconds: list[float] = []
        self.curve: dict[str, list[float]] = {"seconds": [], "epochs": [], "accuracy": []}
        self.error: str | None = None
        self.measure()

    def advance(self, until: float) -> None:
        """Train until the own clock shows `until` seconds, then measure. A contestant that failed stays where it is."""
        if self.error or self.seconds >= until:
            return
        try:
            while self.seconds < until:
                self.step()
            self.measure()
        except MepError as error:
            self.error = str(error)

    def step(self) -> None:
        """Train on the next batch, and count; `ran` is the time in which this thread was given the processor."""
        ran, start = time.thread_time(), self.now()
        x, y = self.batches.next()
        drawn = self.now()
        self.optimizer.step(x=x, target=y)
        end = self.now()
        self.seconds += end - start
        self.ran += time.thread_time() - ran
        self.step_seconds.append(end - drawn)
        self.batch_seconds.append(end - start)
        self.tally.add(self.optimizer.last, len(x))

    def measure(self) -> None:
        """Add a point to the curve of accuracy over training time."""
        if not math.isfinite(self.tally.means()["loss"] or 0.0):
            self.error = "the cost is no longer finite"
        percent = accuracy(self.model, self.optimizer, *self.test)
        point = {"seconds": self.seconds, "epochs": self.batches.epochs, "accuracy": percent}
        for key, value in point.items():
            self.curve[key].append(value)

    def result(self) -> dict[str, Any]:
        """All that was measured."""
        return {
            "seed": self.seed,
            "accuracy": self.curve["accuracy"][-1],
            "seconds": self.seconds,
            "epochs": self.batches.epochs,
            "steps": self.tally.steps,
            "step_seconds": _median(self.step_seconds),
            "epoch_seconds": _median([self.batches.per_epoch * seconds for seconds in self.batch_seconds]),
            "running": min(1.0, self.ran / self.seconds) if self.seconds else None,
            **self.tally.means(),
            "error": self.error,
            "curve": self.curve,
        }


def _median(times: list[float]) -> float | None:
    return statistics.median(times) if times else None


def race(racers: Sequence[Racer], seconds: float, longest: float, progress: Callable[[float], None]) -> None:
    """Let all racers train for `seconds`, in turns of at most `longest`; who begins changes from turn to turn."""
    for turn, (start, end) in enumerate(pairwise(deadlines(seconds, longest))):
        first = turn % len(racers)
        for racer in (*racers[first:], *racers[:first]):
            racer.advance(until=end)
            progress(end - start)


def deadlines(seconds: float, longest: float) -> list[float]:
    """0, then where each turn ends: a time until an accuracy is reached has to be known to RESOLUTION.

    >>> deadlines(0.03, 0.25)
    [0.0, 0.01, 0.02, 0.03]
    """
    ends = [0.0]
    while ends[-1] < seconds:
        length = min(longest, max(SHORTEST, RESOLUTION * ends[-1]))
        ends.append(min(seconds, ends[-1] + length))
    return ends
