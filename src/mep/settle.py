"""Settling: go to an equilibrium of an energy, and measure how near. The only settling loop.

A solver proposes the next point; the loop counts, lets each example stop on its own, and judges by the residuals alone.
"""

from __future__ import annotations

import enum
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from mep.energy import Energy, State, example_dot, example_norm
from mep.errors import A_FLAG, require, whole_number
from mep.graph import Point


class Result(str, enum.Enum):
    """How settling ended."""

    CONVERGED = "converged"
    """Every example's residual is at most the tolerance (or nothing was to be settled)."""
    FIXED_STEPS = "ran the fixed number of steps"
    """`adaptive=False`: exactly `settle_steps`, and some example is still above the tolerance."""
    STEP_LIMIT = "reached the step limit"
    """`settle_steps` did not suffice for some example."""
    DIVERGED = "diverged"
    """The forces grow without bound, or are not finite."""
    BACKPROP = "exact: backpropagation, nothing to settle"
    """The estimator does not settle."""

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Response:
    """How the free equilibrium responds to the cost, to first order in beta: the same for every beta.

    A backward walk at the free point gives backpropagation's errors, `A_n^T x` with `x = dC/ds_out` and
    `A_n = ds_out/ds_n`. Where Jacobians are constant a forward walk gives the output's response `M x`,
    `M = sum_n A_n A_n^T`, too.

    Attributes:
        batch: the number of examples.
        error: x, in the shape of the output.
        errors: backpropagation's errors of all states; None where they are not kept (`checkpoint=True`). A solver may
            empty it, and `arriving`, once they are replaced, so that their memory is free: pass a `copy` to keep them.
        shift: `M x`; None where Jacobians may change.
        arriving: how far the weighted inputs move, see `Graph.jvp`; None without `shift` or `errors`.
    """

    batch: int
    error: Tensor
    errors: State | None = None
    shift: Tensor | None = None
    arriving: State | None = None

    def copy(self) -> Response:
        """The same tensors in dictionaries of their own."""
        errors, arriving = (None if state is None else dict(state) for state in (self.errors, self.arriving))
        return replace(self, errors=errors, arriving=arriving)

    @cached_property
    def size(self) -> Tensor:
        """`|x|` of every example, [batch], never zero."""
        size = example_norm(self.error, self.batch)
        return size.add_(torch.finfo(size.dtype).tiny)

    @cached_property
    def gain(self) -> Tensor:
        """`k = <x, M x> / <x, x> = sum_n |A_n^T x|^2 / |x|^2` of every example, [batch]."""
        if self.shift is not None:
            return example_dot(self.error, self.shift, self.batch) / self.size.square()
        assert self.errors is not None
        return torch.stack([example_norm(e, self.batch) for e in self.errors.values()]).div(self.size).square().sum(0)

    @property
    def group_gain(self) -> Tensor:
        """The same of all examples together, one number."""
        size = self.size.square()
        return (self.gain * size).sum() / size.sum()

    @property
    def amplification(self) -> Tensor:
        """`|M x| / |x|`, which is k at least, where M x is known; else k: [batch]."""
        if self.shift is None:
            return self.gain
        return example_norm(self.shift, self.batch) / self.size


@dataclass(frozen=True)
class Start:
    """What a solver may begin with: it decides how soon settling ends, not where.

    `response`: that of the free equilibrium, if it was computed already. `errors`: scaled errors of the same examples
    at an earlier equilibrium, 0 where there is none; only for solvers that recall.
    """

    response: Response | None = None
    errors: State | None = None


@dataclass(frozen=True)
class Settled:
    """Where settling ended.

    `residual` is `[batch]`, that of the worst node (`Energy.residuals`); `errors` are the scaled errors `(mu - s) /
    beta` of every node, where the solver works with them. `counts`: the iterations of every example, [batch]; `turns`:
    how often each node was computed, where the solver counts.
    """

    point: Point
    residual: Tensor
    iterations: int
    result: Result
    counts: Tensor
    errors: Mapping[str, Tensor] | None = None
    turns: Mapping[str, int] | None = None


@dataclass
class Iterate:
    """A point on the way.

    `residual` may be a lower bound as long as it exceeds the tolerance, or until it is `exact`. `point`, `errors` and
    `turns`, as in `Settled`, may lag behind until `finalize`. `diverging`: the forces grow without bound. `state` is
    the solver's own.
    """

    residual: Tensor
    point: Point
    errors: Mapping[str, Tensor] | None = None
    turns: Mapping[str, int] | None = None
    diverging: bool = False
    exact: bool = True
    state: Any = field(default=None, repr=False)

    @cached_property
    def worst(self) -> float:
        """The largest residual; read it once this iterate is complete."""
        return float(self.residual.max())


@dataclass(frozen=True)
class Solver(ABC):
    """One algorithm for going to an equilibrium: `init`, then `step` until settled, then `finalize`.

    A solver never changes the energy, and so neither beta: an example that it cannot settle is reported.

    Args:
        settle_steps: the largest number of iterations, or with `adaptive=False` the exact one.
        tol: an example has settled when its residual is at most this.
        patience: ... in this many consecutive iterations.
        adaptive: stop when every example has settled.
    """

    settle_steps: int
    tol: float
    patience: int
    adaptive: bool

    carries_errors: ClassVar[bool] = False
    """Whether it works with scaled errors, not with differences of states: no beta is too small for its digits."""
    prediction_only: ClassVar[bool] = False
    """Whether it settles the energy "prediction" alone."""
    uses_response: ClassVar[bool] = False
    """Whether it begins with the response of the free equilibrium, which it computes itself if it is not given."""
    uses_warm_start: ClassVar[bool] = False
    """Whether it can begin at an earlier equilibrium of the same examples."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        require(name, "settle_steps", self.settle_steps, *whole_number(1))
        require(name, "patience", self.patience, *whole_number(1))
        require(name, "tol", self.tol, lambda tol: 0 < tol < 1, "above 0 and below 1")
        require(name, "adaptive", self.adaptive, *A_FLAG)

    @abstractmethod
    def init(self, energy: Energy, point: Point, start: Start) -> Iterate:
        """The first iterate, at the free equilibrium `point`."""

    @abstractmethod
    def step(self, energy: Energy, iterate: Iterate, active: Tensor | None) -> Iterate:
        """The next iterate; where `active` ([batch], None for all) is False, an example may stay where it is."""

    def finalize(self, energy: Energy, iterate: Iterate) -> Iterate:
        """The same iterate with its point, its errors and its exact residual, where `step` was content with less."""
        return iterate

    def failure_hint(self, energy: Energy, point: Point) -> str:
        """What to do where this has diverged, or not settled, from a point."""
        return "a smaller beta (beta=None chooses one for each example), or more settle_steps."


def settle(energy: Energy, point: Point, solver: Solver, start: Start = Start()) -> Settled:
    """Run `solver` on `energy` from `point` until every example has settled or the steps are used up.

    Whether an example has anything to settle is judged once, at `point`, by the cost gradient alone: on the way a state
    may well pass where that vanishes.
    """
    size = start.response.size if start.response else None
    idle = energy.has_nothing_to_settle(point, size) if energy.nudge else None
    iterate = _without(idle, solver.init(energy, point, start))
    tol = rounded(solver.tol, iterate.residual.dtype)
    active: Tensor | None = None  # all of them
    calm: Tensor | None = None
    counts: Tensor | None = None  # all alike
    for iterations in range(solver.settle_steps + 1):
        if solver.adaptive and (iterations > 0 or iterate.exact):
            if solver.patience == 1 and iterate.worst <= tol:
                break
            active = ~(iterate.residual <= tol)
            if solver.patience > 1:
                calm = torch.where(active, 0, 1 if calm is None else calm + 1)
                active = calm < solver.patience
                if not active.any():
                    break
        if iterations == solver.settle_steps or iterate.diverging or not math.isfinite(iterate.worst):
            break
        if active is not None:
            counts = active + (torch.full_like(active, iterations, dtype=torch.long) if counts is None else counts)
        iterate = _without(idle, solver.step(energy, iterate, active))
    if counts is None:
        counts = iterate.residual.new_full((energy.batch,), iterations, dtype=torch.long)
    last = solver.finalize(energy, iterate)
    last = last if last.residual is iterate.residual else _without(idle, last)
    return _judged(solver, last, iterations, counts)


@cache
def rounded(tol: float, dtype: torch.dtype) -> float:
    """The tolerance as residuals of that dtype are compared with it, one by one or the worst of them."""
    return torch.tensor(tol, dtype=dtype).item()


def _without(idle: Tensor | None, iterate: Iterate) -> Iterate:
    """With a residual of zero where there is nothing to settle."""
    if idle is not None:
        iterate.residual = iterate.residual.masked_fill(idle, 0)
    return iterate


def _judged(solver: Solver, iterate: Iterate, iterations: int, counts: Tensor) -> Settled:
    worst = iterate.worst
    if iterate.diverging or not math.isfinite(worst):
        result = Result.DIVERGED
    elif worst <= rounded(solver.tol, iterate.residual.dtype):
        result = Result.CONVERGED
    else:
        result = Result.STEP_LIMIT if solver.adaptive else Result.FIXED_STEPS
    return Settled(iterate.point, iterate.residual, iterations, result, counts, iterate.errors, iterate.turns)
