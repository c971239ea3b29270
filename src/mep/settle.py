"""Settling: go to an equilibrium of an energy, and say how near one came. The only settling loop.

A solver proposes the next point; the loop counts, measures, lets each example stop on its own, and judges.
"""

from __future__ import annotations

import enum
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from mep.energy import Energy, State
from mep.errors import ArgumentError
from mep.graph import Point
from mep.nodes import Strength

_SEEN, _LATE = 4, 6
"""The pace of settling is judged by its last few iterations, once there were some more."""


class Result(str, enum.Enum):
    """How settling ended."""

    CONVERGED = "converged"
    """Every example's residual is at most the tolerance (or nothing was to be settled)."""
    FIXED_STEPS = "ran the fixed number of steps"
    """`adaptive=False`: exactly `settle_steps`, and some example is still above the tolerance."""
    STEP_LIMIT = "reached the step limit"
    """`settle_steps` did not suffice for some example."""
    OUT_OF_REACH = "nudge too strong for the equilibrium to be reached"
    """The iteration expands: only a smaller beta helps."""
    DIVERGED = "diverged"
    """The forces grow without bound."""
    BACKPROP = "exact: backpropagation, nothing to settle"
    """The estimator does not settle."""

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Known:
    """What earlier steps taught a solver, None where nothing: it decides where settling begins, not where it ends.

    `gain`: how far the output moves when an error is injected there, `<x, M x> / <x, x>`, the mean over the examples.
    `errors`: the scaled errors of the same examples at an earlier equilibrium, 0 where there is none. `look_from`: the
    iteration before which no residual need be measured, safely below where settling has ended of late. `most`: the
    strength of nudges at which examples settle without delay, see `mep.solvers.strength`.
    """

    gain: Strength | None = None
    errors: State | None = None
    look_from: int = 0
    most: Strength | None = None

    def after(self, iterations: int, gain: Tensor | None, most: Strength | None = None) -> Known:
        """What is known after a settling that ended then: the first look follows down at once, and up slowly.

        Where no strength was limited, what was known of that remains.
        """
        safe = 3 * iterations // 4
        look_from = safe if safe < self.look_from else self.look_from + (safe - self.look_from + 7) // 8
        return Known(None if gain is None else float(gain), None, look_from, self.most if most is None else most)


@dataclass(frozen=True)
class Settled:
    """Where settling ended.

    `energy` is that whose equilibrium it is: the one asked for, or with a weaker nudge for some examples. `residual` is
    `[batch]`, the largest relative residual over the nodes (see `mep.energy.relative_residual`); `errors` are the
    scaled errors `(mu - s) / beta` of every node, where the solver works with them. `known` is what the next step may
    begin with; `turns`: how often each node was computed, where the solver counts.
    """

    energy: Energy
    point: Point
    residual: Tensor
    iterations: int
    result: Result
    errors: Mapping[str, Tensor] | None = None
    known: Known = Known()
    turns: Mapping[str, int] | None = None


@dataclass
class Iterate:
    """A point on the way. `memory` is the solver's own; `point` and `errors` may lag behind it until `certify`.

    `residual` may be a lower bound as long as it exceeds the tolerance, or until it is `exact`. `out_of_reach`: the
    iteration expands, and a smaller beta would help; `diverging`: it runs away for good. `gain` and `most` as in
    `Known`, `turns` as in `Settled`, and `energy` where it is not the one asked for. `weakened`: some example has just
    been nudged less, so that how settling went before says nothing of how it will go on.
    """

    point: Point
    residual: Tensor
    errors: Mapping[str, Tensor] | None = None
    out_of_reach: bool = False
    diverging: bool = False
    exact: bool = False
    gain: Tensor | None = None
    most: Strength | None = None
    turns: Mapping[str, int] | None = None
    energy: Energy | None = None
    weakened: bool = False
    memory: Any = None

    @cached_property
    def worst(self) -> float:
        """The largest residual; read it once this iterate is complete."""
        return float(self.residual.max())


@dataclass(frozen=True)
class Solver(ABC):
    """One algorithm for going to an equilibrium.

    Args:
        settle_steps: the largest number of iterations, or with `adaptive=False` the exact one.
        tol: an example has settled when its relative residual is at most this.
        patience: ... in this many consecutive iterations.
        adaptive: stop when every example has settled.
    """

    settle_steps: int
    tol: float
    patience: int
    adaptive: bool

    usual_beta: ClassVar[float] = 0.1
    """The nudging strength of an estimator that is given none: enough to stand out from rounding and tolerance."""
    beta_limited = False
    """Whether a smaller beta makes an equilibrium easier to reach."""
    gives_up: ClassVar[bool] = False
    """Whether settling ends as soon as it is too slow to reach `tol` within `settle_steps`."""
    prediction_only: ClassVar[bool] = False
    """Whether it settles the energy "prediction" alone."""
    recalls = False
    """Whether it begins at an earlier equilibrium of the same examples, if there is one."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not (isinstance(self.settle_steps, int) and self.settle_steps >= 1):
            raise ArgumentError(f"{name}(settle_steps={self.settle_steps!r}): must be an integer >= 1.")
        if not (isinstance(self.patience, int) and self.patience >= 1):
            raise ArgumentError(f"{name}(patience={self.patience!r}): must be an integer >= 1.")
        if not (isinstance(self.tol, (int, float)) and 0 < self.tol < 1):
            raise ArgumentError(f"{name}(tol={self.tol!r}): must lie between 0 and 1.")

    @abstractmethod
    def start(self, energy: Energy, point: Point, known: Known) -> Iterate:
        """The first iterate, at `point`."""

    @abstractmethod
    def advance(self, energy: Energy, iterate: Iterate, active: Tensor | None) -> Iterate:
        """The next iterate; where `active` ([batch], None for all) is False, an example stays where it is."""

    def for_beta(self, beta: float) -> Solver:
        """The same for nudges of at most this strength: what was left to it is chosen."""
        return self

    def way_out(self, energy: Energy, point: Point) -> str:
        """What to do where this has diverged from a point."""
        return "a smaller beta, or mep.Sweep."

    def certify(self, energy: Energy, iterate: Iterate) -> Iterate:
        """The same iterate with its point, its errors and its exact residual, where `advance` was content with less."""
        return iterate


def settle(energy: Energy, point: Point, solver: Solver, known: Known = Known()) -> Settled:
    """Run `solver` on `energy` from `point` until every example has settled or the steps are used up."""
    iterate = solver.start(energy, point, known)
    active: Tensor | None = None  # an example that has settled rests, until another one disturbs it
    quiet: Tensor | None = None
    course: list[float] = []
    tol = _rounded(solver.tol, iterate.residual.dtype)
    for iterations in range(solver.settle_steps + 1):
        worst = iterate.worst
        if solver.adaptive and (iterations > 0 or iterate.exact):
            if solver.patience == 1 and worst <= tol:
                break
            active = iterate.residual > tol
            if solver.patience > 1:
                quiet = torch.where(active, 0, 1 if quiet is None else quiet + 1)
                active = quiet < solver.patience
                if not active.any():
                    break
        if iterate.weakened:
            course.clear()
        course.append(worst)
        hopeless = iterate.out_of_reach or not math.isfinite(worst) or _is_too_slow(solver, course, bool(energy.kinks))
        if iterations == solver.settle_steps or hopeless:
            break
        iterate = solver.advance(energy, iterate, active)
    return _judged(energy, solver, solver.certify(energy, iterate), iterations, known)


@cache
def _rounded(tol: float, dtype: torch.dtype) -> float:
    """The tolerance as residuals of that dtype are compared with it, one by one or the worst of them."""
    return torch.tensor(tol, dtype=dtype).item()


def _is_too_slow(solver: Solver, course: list[float], has_kinks: bool) -> bool:
    """Whether the worst residual falls so slowly of late that it would not reach `tol` in the iterations left.

    Where units come to rest at kinks it falls in fits and starts, and says nothing of the kind.
    """
    if has_kinks or not (solver.gives_up and solver.adaptive and len(course) > _SEEN + _LATE):
        return False
    best, before = min(course), min(course[:-_LATE])
    left = solver.settle_steps + 1 - len(course)
    return best > solver.tol and math.log(solver.tol / best) < left / _LATE * math.log(best / before)


def _judged(energy: Energy, solver: Solver, iterate: Iterate, iterations: int, known: Known) -> Settled:
    worst = iterate.worst
    if iterate.diverging or not math.isfinite(worst):
        result = Result.DIVERGED
    elif worst <= _rounded(solver.tol, iterate.residual.dtype):
        result = Result.CONVERGED
    elif not solver.adaptive:
        result = Result.FIXED_STEPS
    else:
        result = Result.OUT_OF_REACH if iterate.out_of_reach else Result.STEP_LIMIT
    return Settled(
        iterate.energy or energy,
        iterate.point,
        iterate.residual,
        iterations,
        result,
        iterate.errors,
        known.after(iterations, iterate.gain, iterate.most),
        iterate.turns,
    )
