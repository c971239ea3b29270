"""Recipes that step in turns, so that the ratio of two times is that of neighbours.

All recipes step in one process, on the same batches; after every step the model is put back, so that all steps of a
recipe start from one point. A busy moment of the machine then falls on all alike. A turn is several steps, and the
first of them are not counted: another recipe has emptied the caches, which would hide much of what separates a fast
step from a slow one.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from torch import Tensor, nn

from mep.cli.profile_rows import Recipe
from mep.cli.training import clock

Batch = tuple[Tensor, Tensor]
T = TypeVar("T")


class Stepper:
    """A recipe's optimizer on a copy of the model, which is put back after every step."""

    def __init__(self, recipe: Recipe, model: nn.Module, cost: str):
        self.model = copy.deepcopy(model)
        self.optimizer = recipe.build(self.model, cost)
        self.now = clock(next(model.parameters()).device)
        self.took = self.ran = 0.0
        self._keep_point()

    def step(self, x: Tensor, target: Tensor) -> float:
        """The seconds of one step; `took` sums them, and `ran` those in which this thread was given the processor."""
        seconds = self._stepped(x, target)
        self.put_back()
        return seconds

    def start_within_bounds(self, x: Tensor, target: Tensor) -> None:
        """Start from where a first step leads, so that a bound that the model broke is not met anew in every step."""
        self._stepped(x, target)
        self._keep_point()

    def _stepped(self, x: Tensor, target: Tensor) -> float:
        ran, start = time.thread_time(), self.now()
        self.optimizer.step(x=x, target=target)
        seconds = self.now() - start
        self.took, self.ran = self.took + seconds, self.ran + time.thread_time() - ran
        return seconds

    def _keep_point(self) -> None:
        self._point = {name: value.clone() for name, value in self.model.state_dict().items()}

    def put_back(self) -> None:
        """Give the model the parameters and buffers that every step starts from."""
        self.model.load_state_dict(self._point)

    @property
    def running(self) -> float:
        """The fraction of the time in which the machine was not busy with something else."""
        return min(1.0, self.ran / self.took)


def in_turns(turns: Sequence[Callable[[int], T]], rounds: Iterable[int]) -> list[list[T]]:
    """What every turn returned in every round, of which it is told the number; each round begins with another turn.

    >>> in_turns([lambda number: f"a{number}", lambda number: f"b{number}"], range(3))
    [['a0', 'a1', 'a2'], ['b0', 'b1', 'b2']]
    """
    found: list[list[T]] = [[] for _ in turns]
    for number in rounds:
        for place in range(len(turns)):
            chosen = (place + number) % len(turns)
            found[chosen].append(turns[chosen](number))
    return found


def batches_of(batches: Sequence[Batch], number: int, steps: int) -> list[Batch]:
    """The batches of a turn: those after the ones of the turn before, over and over."""
    return [batches[(number * steps + step) % len(batches)] for step in range(steps)]


def relative(seconds: Sequence[Sequence[float]], yardstick: Sequence[Sequence[float]]) -> dict[str, dict[str, float]]:
    """Quartiles of the seconds of all steps, and over the rounds of their ratio to the yardstick's in the same round.

    Both arguments have a row for every round, the seconds of its steps.

    >>> relative([[2.0, 2.0], [6.0, 6.0]], [[1.0, 1.0], [2.0, 2.0]])["ratio"]
    {'median': 2.5, 'low': 2.25, 'high': 2.75}
    """
    ratios = [statistics.median(a) / statistics.median(b) for a, b in zip(seconds, yardstick, strict=True)]
    return {"seconds": quartiles([step for turn in seconds for step in turn]), "ratio": quartiles(ratios)}


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Of two values or more."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}
