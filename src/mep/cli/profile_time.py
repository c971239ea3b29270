"""What a step costs, and where its time goes.

All recipes step in turns, in one process, on the same batches; after every step the model is put back, so that all
steps of all recipes start from one point. A busy moment of the machine then falls on all alike, and the ratio of two
times is that of neighbours. A turn is several steps, and the first of them are not counted: another recipe has emptied
the caches, which would hide much of what separates a fast step from a slow one. Reading the clock between phases costs
time itself (a GPU must be waited for), so each recipe takes two turns: one for the whole step, one for its parts.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import mep
from mep.cli.backprop import Backprop
from mep.cli.profile_gradient import Batch
from mep.cli.profile_rows import Recipe, estimator_of
from mep.cli.training import clock

METHODS = {"free": "_free", "settle": "_nudged", "contrast": "_contrast"}
"""The phases of a step of EP, each with the method of the estimator that does it."""
TURN = 8
UNCOUNTED = 3
"""Steps in a turn, and those at its head that fill the caches."""


class Stepper:
    """A recipe's optimizer on a copy of the model, which is put back after every step."""

    def __init__(self, recipe: Recipe, model: nn.Module, cost: str):
        self.model = copy.deepcopy(model)
        self.optimizer = recipe.build(self.model, cost)
        self.now = clock(next(model.parameters()).device)
        self.took = self.ran = 0.0
        self._point = {name: value.clone() for name, value in self.model.state_dict().items()}

    def step(self, x: Tensor, target: Tensor) -> float:
        """The seconds of one step; `took` sums them, and `ran` those in which this thread was given the processor."""
        ran, start = time.thread_time(), self.now()
        self.optimizer.step(x=x, target=target)
        seconds = self.now() - start
        self.took, self.ran = self.took + seconds, self.ran + time.thread_time() - ran
        self.model.load_state_dict(self._point)
        return seconds


class PhasedStepper(Stepper):
    """Also reads the clock between the phases of a step."""

    def __init__(self, recipe: Recipe, model: nn.Module, cost: str):
        super().__init__(recipe, model, cost)
        self._seconds: dict[str, float] = {}
        self._update_began = 0.0
        estimator = estimator_of(self.optimizer)
        self._remainder = "rest" if estimator else "backprop"
        for phase, method in METHODS.items() if estimator else ():
            setattr(estimator, method, self._timed(phase, getattr(estimator, method)))
        _first_update(self.optimizer).register_step_pre_hook(self._begin_update)

    def phases(self, x: Tensor, target: Tensor) -> dict[str, float]:
        """The seconds of every phase of one step; its constraints belong to the update."""
        self._seconds = {}
        start = self.now()
        self.optimizer.step(x=x, target=target)
        end = self.now()
        self.model.load_state_dict(self._point)
        known = {**self._seconds, "update": end - self._update_began}
        return {**known, self._remainder: end - start - sum(known.values())}

    def _timed(self, phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            found = method(*args, **kwargs)
            self._seconds[phase] = self._seconds.get(phase, 0.0) + self.now() - start
            return found

        return run

    def _begin_update(self, *_: Any) -> None:
        self._update_began = self.now()


def time_steps(
    recipes: Sequence[Recipe], model: nn.Module, batches: Sequence[Batch], cost: str, rounds: Iterable[int]
) -> list[dict[str, Any]]:
    """For every recipe the seconds of a step, their ratio to those of the first recipe, and the shares of its phases.

    Medians with quartiles: of the seconds over all steps, of the ratio over the rounds. `running` is the fraction of
    the time in which the machine was not busy with something else.
    """
    whole = [Stepper(recipe, model, cost) for recipe in recipes]
    parts = [PhasedStepper(recipe, model, cost) for recipe in recipes]
    seconds: list[list[list[float]]] = [[] for _ in recipes]  # of every recipe, round and step
    phases: list[list[dict[str, float]]] = [[] for _ in recipes]
    for number in rounds:
        turn = [batches[(number * TURN + step) % len(batches)] for step in range(TURN)]
        for place in _rotated(len(recipes), number):
            seconds[place].append([whole[place].step(*batch) for batch in turn][UNCOUNTED:])
            phases[place] += [parts[place].phases(*batch) for batch in turn][UNCOUNTED:]
    yardstick = [statistics.median(turn) for turn in seconds[0]]
    return [
        {
            "seconds": _quartiles([step for turn in own for step in turn]),
            "ratio": _quartiles([statistics.median(turn) / b for turn, b in zip(own, yardstick, strict=True)]),
            "shares": _shares(own_phases),
            "running": min(1.0, stepper.ran / stepper.took),
        }
        for own, own_phases, stepper in zip(seconds, phases, whole, strict=True)
    ]


def _rotated(length: int, by: int) -> list[int]:
    """All places, beginning with another one each time."""
    return [(place + by) % length for place in range(length)]


def _quartiles(values: Sequence[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def _shares(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median seconds of every phase, as fractions of their sum."""
    medians = {phase: statistics.median(step[phase] for step in steps) for phase in steps[0]}
    return {phase: median / sum(medians.values()) for phase, median in medians.items()}


def _first_update(optimizer: Any) -> torch.optim.Optimizer:
    assert isinstance(optimizer, (mep.EPOptimizer, Backprop))
    return optimizer.update if isinstance(optimizer, mep.EPOptimizer) else optimizer.updates[0]
