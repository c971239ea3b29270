"""What a step costs, and where its time goes.

Reading the clock between phases costs time itself (a GPU must be waited for), so each recipe takes two turns: one for
the whole step, one for its parts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import mep
from mep.cli.backprop import Backprop
from mep.cli.profile_rows import Recipe, estimator_of
from mep.cli.turns import Batch, Stepper, batches_of, in_turns, relative

PHASES = ("free", "settle", "contrast")
"""The phases of a step of EP. The first and the last are methods of the estimator; settling is what lies between."""
TURN = 8
UNCOUNTED = 3
"""Steps in a turn, and those at its head that fill the caches."""
Turn = tuple[list[float], list[dict[str, float]]]  # the seconds of its steps, and of their phases


class PhasedStepper(Stepper):
    """Also reads the clock between the phases of a step."""

    def __init__(self, recipe: Recipe, model: nn.Module, cost: str):
        super().__init__(recipe, model, cost)
        self._times: list[float] = []
        self._update_began = 0.0
        self._estimator = estimator_of(self.optimizer)
        for method in ("_free", "_contrast") if self._estimator else ():
            setattr(self._estimator, method, self._timed(getattr(self._estimator, method)))
        _first_update(self.optimizer).register_step_pre_hook(self._begin_update)

    def phases(self, x: Tensor, target: Tensor) -> dict[str, float]:
        """The seconds of every phase of one step; its constraints belong to the update."""
        self._times = []
        start = self.now()
        self.optimizer.step(x=x, target=target)
        end = self.now()
        self.put_back()
        seconds = [b - a for a, b in pairwise(self._times)]
        known = dict(zip(PHASES, seconds, strict=True)) if self._estimator else {}
        known["update"] = end - self._update_began
        return {**known, "rest" if self._estimator else "backprop": end - start - sum(known.values())}

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, which also notes when it begins and when it ends."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._times.append(self.now())
            found = method(*args, **kwargs)
            self._times.append(self.now())
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

    def turn(place: int, number: int) -> Turn:
        given = batches_of(batches, number, TURN)
        seconds = [whole[place].step(*batch) for batch in given][UNCOUNTED:]
        return seconds, [parts[place].phases(*batch) for batch in given][UNCOUNTED:]

    found = in_turns([partial(turn, place) for place in range(len(recipes))], rounds)
    seconds = [[one for one, _ in turns] for turns in found]
    return [
        {
            **relative(own, seconds[0]),
            "shares": _shares([step for _, steps in turns for step in steps]),
            "running": stepper.running,
        }
        for own, turns, stepper in zip(seconds, found, whole, strict=True)
    ]


def _shares(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median seconds of every phase, as fractions of their sum."""
    medians = {phase: statistics.median(step[phase] for step in steps) for phase in steps[0]}
    return {phase: median / sum(medians.values()) for phase, median in medians.items()}


def _first_update(optimizer: Any) -> torch.optim.Optimizer:
    assert isinstance(optimizer, (mep.EPOptimizer, Backprop))
    return optimizer.update if isinstance(optimizer, mep.EPOptimizer) else optimizer.updates[0]
