"""What the four kinds of network have in common, as sweeps see them.

A network holds the scaled errors delta of all states, as far as it must, and moves them by `delta <- delta + a r` along
the residual `r = S(delta) - delta` of the last sweep:

| | Jacobians | unknown | file |
|---|---|---|---|
| `AffineNetwork` | constant: branches held, affine operations | the output error | affine.py |
| `CheckpointedNetwork` | the same, in little memory | the output error | checkpointed.py |
| `GeneralNetwork` | of any kind | the errors of all states | general.py |
| `NonsmoothNetwork` | with kinks at which units may rest | the output error | nonsmooth.py |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mep.cost import BatchCost
from mep.energy import Energy, example_dot
from mep.graph import Point
from mep.graph.node import Node, expand_beta
from mep.layout import numbers_like, per_example
from mep.settle import Response

_SHORTEST, _LONGEST = 1e-4, 1.5
_RUNAWAY = 1e2
"""Errors so many times the first ones are on their way to infinity."""
_SECANTS = 2
"""Steps of the secant method for the first length."""


class Network(ABC):
    """The errors of the examples in play, `rows` of the batch (None: all).

    Args:
        energy: nudged.
        free: its free equilibrium.
        response: that of the free equilibrium.

    Attributes:
        residual: of every example of the batch after the last move, [batch].
        is_coupled: whether examples are one group, which moves with one length.
    """

    is_coupled = False

    def __init__(self, energy: Energy, free: Point, response: Response):
        self.energy, self.free, self.response = energy, free, response
        self.rows: Tensor | None = None
        output = response.error
        self.residual = output.new_ones(energy.batch, dtype=torch.promote_types(output.dtype, torch.float32))

    @abstractmethod
    def result(self) -> tuple[Point, Mapping[str, Tensor]]:
        """The graph of all examples where their states are now, and the errors of all states."""

    @abstractmethod
    def error_size(self) -> Tensor:
        """The norm of the largest errors of a node, or of the output's where the others follow, of those in play."""

    @abstractmethod
    def first_move(self, tol: float, may_stop: bool) -> Tensor:
        """The first move, along backpropagation's errors as far as is expected to balance them.

        Where that takes no walk, examples that balance to `tol` at length one keep it; if all do, and it `may_stop` for
        that, nothing more is computed.

        Returns:
            Its length, [batch] or one for the group.
        """

    @abstractmethod
    def products(self) -> tuple[Tensor, Tensor]:
        """The inner products whose quotient is Barzilai and Borwein's length over the last one."""

    @abstractmethod
    def move(self, a: Tensor) -> None:
        """`delta <- delta + a r`, with the states that follow, the new r, and its size in `residual`."""

    def narrow(self, active: Tensor) -> Tensor | None:
        """Leave out the examples that are not active ([batch]); which of those in play remain, None if all do."""
        return None

    def mine(self, values: Tensor) -> Tensor:
        """Of `[batch]` values those of the examples in play."""
        return values if self.rows is None else values.index_select(0, self.rows)

    def first_size(self) -> Tensor:
        """`error_size` after the first move, [batch]."""
        return self.response.size

    def runs_away(self) -> bool:
        """Whether some example's errors have grown beyond hope since the first move; small ones may be disturbed.

        The residuals of those are infinite from then on.
        """
        grown = has_grown(self.error_size(), self.first_size(), self.rows)
        if not grown.any():
            return False
        self.note(self.mine(self.residual).masked_fill(grown, torch.inf))
        return True

    def note(self, residual: Tensor) -> None:
        """The residuals of the examples in play."""
        self.residual = residual if self.rows is None else self.residual.index_copy(0, self.rows, residual)

    def remaining(self, active: Tensor) -> tuple[Tensor, Tensor] | None:
        """The active examples as rows of the batch, and as places among those in play; None if these are all active."""
        rows = active.nonzero().squeeze(1)
        if len(rows) == (self.energy.batch if self.rows is None else len(self.rows)):
            return None
        return rows, rows if self.rows is None else active[self.rows].nonzero().squeeze(1)


def has_grown(size: Tensor, first: Tensor, rows: Tensor | None = None) -> Tensor:
    """Which errors are on their way to infinity; small ones are measured by the mean of those of all examples."""
    first = torch.maximum(first, first.mean())
    return size > _RUNAWAY * (first if rows is None else first.index_select(0, rows))


def output_residual(error: Tensor, wanted: Tensor) -> Tensor:
    """The residual of the output by row, `|x - dC/ds|` over the larger of the two."""
    rows = torch.stack([error - wanted, error, wanted])
    rows = rows if rows.ndim == 3 else rows.reshape(*rows.shape[:2], -1)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    violated, one, two = torch.linalg.vector_norm(rows, dim=2, dtype=dtype).unbind()
    return violated / torch.maximum(one, two).add_(torch.finfo(violated.dtype).tiny)


def within(a: Tensor) -> Tensor:
    """A length, or one of that modulus, not too short to move nor so long that one wrong estimate does harm."""
    if a.is_complex():
        size = a.abs()
        return a * (size.clamp(_SHORTEST, _LONGEST) / size)
    return a.clamp(_SHORTEST, _LONGEST)


def length_by_gain(energy: Energy, free: Point, response: Response, is_group: bool) -> Tensor:
    """The first length if the network were its gain, M = k I: the root of `a x = dC(free - beta k a x)` along x."""
    x, k = response.error, response.group_gain if is_group else response.gain
    assert energy.nudge is not None
    with no_autocast(x.device):
        shift = x * spread_length(k, x) * expand_beta(energy.beta, x)
        return length_along(energy.nudge.cost, energy.output(free), x, shift, x, is_group)


def length_along(
    cost: BatchCost,
    free: Tensor,
    x: Tensor,
    shift: Tensor,
    metric: Tensor,
    is_group: bool,
    gradient: Tensor | None = None,
) -> Tensor:
    """The a at which the errors `a A^T x` balance along themselves: the root of `<metric, a x - dC(free - a shift)>`.

    By the secant method, from a = 0, where dC is x, and a = 1, where it is `gradient` if that is given.
    """
    batch = len(free)

    def product(gradient: Tensor) -> Tensor:
        each = example_dot(metric, gradient, batch)
        return each.sum() if is_group else each

    size = product(x)
    a = torch.ones_like(size)
    for _ in range(_SECANTS):
        if gradient is None:
            gradient = cost.gradient(free - shift * spread_length(a, shift))
        slope = a * size - product(gradient) + size  # times a: what the secant through 0 rises
        gradient = None
        # Without curvature there is nothing to balance along x: the length stays.
        a = torch.where((slope.real > 0) & (size.real > 0), a * size / slope, a)
    return within(a)


def spread_length(a: Tensor, like: Tensor) -> Tensor:
    """A length, one an example or one for all, ready to be multiplied with a state."""
    return (per_example(a, like) if a.ndim else a).to(numbers_like(like, a) if a.is_complex() else like.dtype)


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Entering an autocast context takes as long as a few small operations, so only where there is one to leave."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def are_independent(energy: Energy, free: Point) -> bool:
    """Whether the Jacobians at a point couple no two examples, and the cost does not either.

    Then the nudged energy is a sum over examples, each with an equilibrium, a beta and a step length of its own. If
    not, as with batch normalisation in training, the batch is one group.

    Computed from the first batch of a graph that has two examples at least, by some backward walks, and kept there. A
    point that saves nothing (`checkpoint=True`) is one of an affine graph, whose operations couple none.
    """
    graph = energy.graph
    if graph.is_separable is None and energy.batch > 1:
        output = energy.output(free)
        place = torch.arange(energy.batch, device=output.device)
        digits = [(place >> digit) % 2 == 1 for digit in range((energy.batch - 1).bit_length())]  # no two have the same
        halves = [half for digit in digits for half in (digit, ~digit)]
        assert energy.nudge is not None
        graph.is_separable = not any(
            (bool(free.saved) and _forces_cross(energy, free, half)) or _cost_crosses(energy.nudge.cost, output, half)
            for half in halves
        )
    return energy.batch == 1 or bool(graph.is_separable)


def _forces_cross(energy: Energy, free: Point, some: Tensor) -> bool:
    """Whether forces on the output of other examples reach these."""
    graph, batch, output = energy.graph, energy.batch, energy.output(free)
    uneven = torch.arange(output.numel(), device=output.device).cos().view_as(output).to(output.dtype)
    found: list[Tensor] = []

    def transmit(node: Node, force: Tensor | None) -> Tensor | None:
        if force is not None:
            crossing = force if force.ndim == 0 or len(force) % batch else force * per_example(some, force)
            found.append(crossing.count_nonzero())
        return force

    graph.vjp(free.saved, uneven * per_example(~some, uneven), transmit)
    return bool(torch.stack(found).any())


def _cost_crosses(cost: BatchCost, output: Tensor, some: Tensor) -> bool:
    """Whether the gradient of other examples changes with the outputs of these."""
    if cost.narrows:
        return False
    others = per_example(~some, output)
    moved = torch.where(others, output, 1.1 * output + 0.1)
    return not torch.equal(cost.gradient(output) * others, cost.gradient(moved) * others)
