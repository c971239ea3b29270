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

from mep.errors import MepError
from mep.lab.recipes import Recipe
from mep.runs import models, optimizers
from mep.runs.data import DataSet
from mep.runs.training import Batches, Tally, accuracy, clock, targets

SHORTEST = 0.01  # seconds a turn: some steps at least
RESOLUTION = 0.05  # of a turn, relative to the time so far

Row = dict[str, Any]


def run_bench(
    recipes: Sequence[Recipe],
    data: DataSet,
    *,
    model: str,
    cost: str,
    batch_size: int,
    seconds: float,
    seeds: int,
    turn: float,
    after_turn: Callable[[Sequence[Row], Sequence[TimedRun]], None],
) -> list[Row]:
    """Train every recipe on every seed; returns a row for each recipe, with its `seeds`, see `TimedRun.result`.

    Args:
        recipes: what is compared.
        data: on the device to train on.
        model: by name, see `mep.runs.models`; the same for all, as is `cost`.
        cost: "cross_entropy" or "mse".
        batch_size: of all steps.
        seconds: of training for each recipe and seed.
        seeds: how many; they are 0, 1, ...
        turn: seconds, the longest.
        after_turn: called after the turn of any recipe, with the rows of the seeds before and the runs on this one.
    """

    def new_runs(seed: int) -> list[TimedRun]:
        return [TimedRun(r, data, model=model, cost=cost, batch_size=batch_size, seed=seed) for r in recipes]

    # One step each, not counted, so that one-time costs of torch are not charged to the first recipe.
    for run in new_runs(seed=0):
        run.advance(until=1e-9)
    rows: list[Row] = [
        {"name": recipe.preset, "label": recipe.label, "options": recipe.options, "seeds": []} for recipe in recipes
    ]
    for seed in range(seeds):
        runs = new_runs(seed)
        for number, (_, end) in enumerate(pairwise(deadlines(seconds, turn))):
            first = number % len(runs)  # another one begins in every round, so that none always follows the same one
            for run in (*runs[first:], *runs[:first]):
                run.advance(until=end)
                after_turn(rows, runs)
        for row, run in zip(rows, runs, strict=True):
            row["seeds"].append(run.result())
    return rows


def deadlines(seconds: float, longest: float) -> list[float]:
    """0, then where each turn ends: short at first, since the time to an accuracy is to be known to RESOLUTION.

    >>> deadlines(0.03, 0.25)
    [0.0, 0.01, 0.02, 0.03]
    """
    ends = [0.0]
    while ends[-1] < seconds:
        length = min(longest, max(SHORTEST, RESOLUTION * ends[-1]))
        ends.append(min(seconds, ends[-1] + length))
    return ends


class TimedRun:
    """A recipe on one seed: its model, its clock and what was measured."""

    def __init__(self, recipe: Recipe, data: DataSet, *, model: str, cost: str, batch_size: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.label, self.seed = recipe.label, seed
        self.now = clock(data.train_x.device)
        self.model = models.build(model, data).to(data.train_x.device)
        self.optimizer = optimizers.build_to_compare(recipe.preset, self.model, {"cost": cost, **recipe.options})
        self.batches = Batches(data.train_x, targets(data, cost), batch_size, seed)
        self.test = data.test_x, data.test_y
        self.tally = Tally()
        self.seconds = self.running = 0.0
        self.step_seconds: list[float] = []
        self.batch_seconds: list[float] = []
        self.curve: dict[str, list[float]] = {"seconds": [], "epochs": [], "accuracy": []}
        self.error: str | None = None
        self.measure()

    def advance(self, until: float) -> None:
        """Train until the own clock shows `until` seconds, then measure. A run that failed stays where it is."""
        if self.error or self.seconds >= until:
            return
        try:
            while self.seconds < until:
                self.step()
            self.measure()
        except MepError as error:
            self.error = str(error)

    def step(self) -> None:
        """Train on the next batch, and count; `running` is the time in which this thread was given the processor."""
        running, start = time.thread_time(), self.now()
        x, y = self.batches.next()
        drawn = self.now()
        self.optimizer.step(x=x, target=y)
        end = self.now()
        self.seconds += end - start
        self.running += time.thread_time() - running
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

    def result(self) -> Row:
        """All that was measured so far."""
        return {
            "seed": self.seed,
            "accuracy": self.curve["accuracy"][-1],
            "seconds": self.seconds,
            "epochs": self.batches.epochs,
            "steps": self.tally.steps,
            "step_seconds": _median(self.step_seconds),
            "epoch_seconds": _median([self.batches.per_epoch * seconds for seconds in self.batch_seconds]),
            "running": min(1.0, self.running / self.seconds) if self.seconds else None,
            **self.tally.means(),
            "error": self.error,
            "curve": self.curve,
        }


def _median(times: list[float]) -> float | None:
    return statistics.median(times) if times else None
