"""Settling: go to an equilibrium of an energy, and measure how near. The only settling loop.

A solver proposes the next point; the loop counts, lets each example stop on its own, and judges by the residuals alone.
"""

from __future__ import annotations

import enum
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from mep.cost import BatchCost
from mep.energy import Energy, NodeEnergy, State, example_dot, example_norm
from mep.errors import A_FLAG, require, whole_number
from mep.graph import Point

_FREE = 100
"""The free phase is settled so many times better than the nudged ones, whose residuals count what it leaves."""


class Result(str, enum.Enum):
    """How settling ended."""

    CONVERGED = "converged"
    """Every example's residual is at most the tolerance (or nothing was to be settled)."""
    FIXED_STEPS = "ran the fixed number of steps"
    """`adaptive=False`: exactly `settle_steps`, and some example is still above the tolerance."""
    STEP_LIMIT = "reached the step limit"
    """`settle_steps` did not suffice for some example."""
    STALLED = "its residuals did not fall any more"
    """Some example is above the tolerance, and more steps would not help."""
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
            empty it, and `input_tangents`, once they are replaced, to free their memory: pass a `copy` to keep them.
        shift: `M x`; None where Jacobians may change.
        input_tangents: how far the weighted inputs move, see `Graph.jvp`; None without `shift` or `errors`.
    """

    batch: int
    error: Tensor
    errors: State | None = None
    shift: Tensor | None = None
    input_tangents: State | None = None

    def copy(self) -> Response:
        """The same tensors in dictionaries of their own."""
        errors, input_tangents = (
            None if state is None else dict(state) for state in (self.errors, self.input_tangents)
        )
        return replace(self, errors=errors, input_tangents=input_tangents)

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

    `cost`: with an energy that is not nudged yet, the one that will be: it says how well the free phase has to settle.
    """

    response: Response | None = None
    errors: State | None = None
    cost: BatchCost | None = None


@dataclass(frozen=True)
class Settled:
    """Where settling ended.

    `residual` is `[batch]`, that of the worst node (`Energy.residuals`), and `tol` what it was to fall to; `errors` are
    the scaled errors `(mu - s) / beta` of every node, where the solver works with them. `counts`: the iterations of
    every example, [batch]; `turns`: how often each node was computed, where the solver counts.
    """

    point: Point
    residual: Tensor
    iterations: int
    result: Result
    counts: Tensor
    tol: float
    errors: Mapping[str, Tensor] | None = None
    turns: Mapping[str, int] | None = None


@dataclass
class Iterate:
    """A point on the way.

    `residual` may be a lower bound as long as it exceeds the tolerance, or until it is `exact`. `point`, `errors` and
    `turns`, as in `Settled`, may lag behind until `finalize`. `diverging`: the forces grow without bound. `stuck`: no
    further step would help. `state` is the solver's own.
    """

    residual: Tensor
    point: Point
    errors: Mapping[str, Tensor] | None = None
    turns: Mapping[str, int] | None = None
    diverging: bool = False
    exact: bool = True
    stuck: bool = False
    state: Any = field(default=None, repr=False)


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
    uses_response: ClassVar[bool] = False
    """Whether it begins with the response of the free equilibrium, which it computes itself if it is not given."""
    uses_warm_start: ClassVar[bool] = False
    """Whether it can begin at an earlier equilibrium of the same examples."""
    settles_groups: ClassVar[bool] = False
    """Whether it settles energies of groups of nodes (`mep.GroupEnergy`)."""
    settles_fields: ClassVar[bool] = False
    """Whether it settles states that are drawn by a vector field without an energy (`feedback`)."""
    compiles: ClassVar[bool] = False
    """Whether it has `unrolled`, a fixed number of steps without decisions, from which a program is compiled."""
    holds_branches: ClassVar[bool] = False
    """Whether a free phase that has to settle leaves the branches in the energy's context as they are where it ends."""
    checkpoints: ClassVar[bool] = False
    """Whether it settles from the output and the input alone, without the states of all nodes."""

    settles_complex: ClassVar[bool] = False
    """Whether it settles nudged energies with a complex beta (`phases="holomorphic"`)."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        require(name, "settle_steps", self.settle_steps, *whole_number(1))
        require(name, "patience", self.patience, *whole_number(1))
        require(name, "tol", self.tol, lambda tol: 0 < tol < 1, "above 0 and below 1")
        require(name, "adaptive", self.adaptive, *A_FLAG)

    @property
    def tolerance(self) -> float:
        """`tol`, or less where errors are known to exceed residuals by much."""
        return self.tol

    def check(self, node_energy: NodeEnergy) -> None:  # noqa: B027 - most solvers settle all energies
        """Raise an ArgumentError if this solver does not settle such an energy."""

    @abstractmethod
    def init(self, energy: Energy, point: Point, start: Start) -> Iterate:
        """The first iterate, at the free equilibrium `point`."""

    @abstractmethod
    def step(self, energy: Energy, iterate: Iterate, active: Tensor | None) -> Iterate:
        """The next iterate; where `active` ([batch], None for all) is False, an example may stay where it is."""

    def finalize(self, energy: Energy, iterate: Iterate) -> Iterate:
        """The same iterate with its point, its errors and its exact residual, where `step` was content with less."""
        return iterate

    def snapshot(self, energy: Energy, iterate: Iterate) -> Iterate:
        """The same iterate with its point and its errors, to look at; settling goes on as if nothing had happened."""
        return self.finalize(energy, iterate)

    def diagnosis(self) -> tuple[float | None, float | None]:
        """As last measured: the fraction of states inside their boxes, and the coupling's largest eigenvalue."""
        return None, None

    def state_dict(self) -> dict[str, Any]:
        """What it carries from batch to batch: tensors, numbers, and dictionaries of these."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most solvers carry nothing
        """Continue from `state_dict`."""

    def for_field(self) -> Solver:
        """For states that are drawn by a vector field without an energy; only where `settles_fields`."""
        return self

    def for_free_phase(self) -> Solver:
        """For a free phase that has to settle: nudged phases count what it leaves."""
        return replace(self, tol=self.tol / _FREE)

    def unrolled(self, energy: Energy, point: Point, start: Start, steps: int) -> tuple[Iterate, Tensor]:
        """Where so many steps lead, and the residuals after each, [steps, batch]; only where `compiles`.

        Without a decision that depends on a number. Of an energy without a nudge: the free phase, where that has to
        settle; what it leaves counts in the residuals of the nudged ones.
        """
        raise NotImplementedError

    def needs_eager_step(self) -> bool:
        """Whether the next step is to be made without a program, because it measures what the others depend on."""
        return False

    def count_compiled_step(self) -> None:  # noqa: B027 - most solvers count nothing
        """A step was made by a program."""

    def failure_hint(self, energy: Energy, point: Point) -> str:
        """What to do where this has diverged, or not settled, from a point."""
        return "a smaller beta (beta=None chooses one for each example), or more settle_steps."


def settle(
    energy: Energy,
    point: Point,
    solver: Solver,
    start: Start = Start(),
    watch: Callable[[int, Iterate], None] | None = None,
) -> Settled:
    """Run `solver` on `energy` from `point` until every example has settled or the steps are used up.

    Whether an example has anything to settle is judged once, at `point`, by the cost gradient alone: on the way a state
    may well pass where that vanishes.

    Args:
        energy, point: where to begin; with a nudge `point` is the free equilibrium.
        solver: proposes the iterates.
        start: what it may begin with.
        watch: called with the number of iterations and each iterate, complete with its point.
    """
    idle: Tensor | None = None  # which examples have nothing to settle, once some example has not settled
    iterate = solver.init(energy, point, start)
    tolerance, dtype = solver.tolerance, iterate.residual.dtype
    tol = rounded(tolerance, dtype)
    active: Tensor | None = None  # all of them
    calm: Tensor | None = None  # for how many iterations in a row each example has been settled
    counts: Tensor | None = None  # all alike
    worst = 1.0

    def measured(residual: Tensor) -> tuple[Tensor, float]:
        """The residuals, 0 where there is nothing to settle, and the worst of them."""
        nonlocal idle
        residual = residual if idle is None else residual.masked_fill(idle, 0)
        worst = float(residual.max())
        if idle is None and energy.nudge and not worst <= tol:
            idle = energy.has_nothing_to_settle(point, start.response.size if start.response else None)
            residual = residual.masked_fill(idle, 0)
            worst = float(residual.max())
        return residual, worst

    for iterations in range(solver.settle_steps + 1):
        is_measured = iterations > 0 or iterate.exact
        if is_measured:
            iterate.residual, worst = measured(iterate.residual)
        if watch is not None:
            watch(iterations, solver.snapshot(energy, iterate))
        # Which examples have settled: by their residuals, and by nothing else.
        if solver.adaptive and is_measured:
            if worst <= tol:  # unless the solver has found that errors exceed residuals by more
                tolerance = solver.tolerance
                tol = rounded(tolerance, dtype)
            if solver.patience == 1 and worst <= tol:
                break
            active = ~(iterate.residual <= tol)
            if solver.patience > 1:
                calm = torch.where(active, 0, 1 if calm is None else calm + 1)
                active = calm < solver.patience
                if not active.any():
                    break
        if iterations == solver.settle_steps or iterate.diverging or iterate.stuck or not math.isfinite(worst):
            break
        if active is not None:
            counts = active + (torch.full_like(active, iterations, dtype=torch.long) if counts is None else counts)
        iterate = solver.step(energy, iterate, active)
    last = solver.finalize(energy, iterate)
    if last.residual is not iterate.residual:
        last.residual, worst = measured(last.residual)
    if last.diverging or not math.isfinite(worst):
        result = Result.DIVERGED
    elif worst <= tol:
        result = Result.CONVERGED
    else:
        result = Result.STEP_LIMIT if solver.adaptive else Result.FIXED_STEPS
        if iterate.stuck and iterations < solver.settle_steps:
            result = Result.STALLED
    if counts is None:
        counts = last.residual.new_full((energy.batch,), iterations, dtype=torch.long)
    return Settled(last.point, last.residual, iterations, result, counts, tolerance, last.errors, last.turns)


@cache
def rounded(tol: float, dtype: torch.dtype) -> float:
    """The tolerance as residuals of that dtype are compared with it, one by one or the worst of them."""
    return torch.tensor(tol, dtype=dtype).item()
