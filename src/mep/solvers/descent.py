"""Gradient descent on the states: what an analog circuit does, and the yardstick for everything faster.

    v <- momentum v + dF/ds,    s <- s - settle_lr v        (then back into the box)

At most one forward and one backward evaluation a step, in closed form (`flow.py`): never a graph through the network.
Every energy settles this way. A signal moves one node per step: a deep network needs at least as many steps as nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mep.energy import Energy, example_norm
from mep.errors import ArgumentError
from mep.graph import Point
from mep.settle import Iterate, Known, Solver
from mep.solvers.affine_flow import AffineFlow, is_affine_at_rest
from mep.solvers.flow import AnyFlow, Flow

_RUNAWAY = 1e2
"""A force so many times the first one is not on its way to zero."""


@dataclass(frozen=True)
class Descent(Solver):
    """Gradient descent with momentum on all states at once.

    Args:
        settle_steps: the largest number of steps, or with `adaptive=False` the exact one.
        settle_lr: step size; the curvature of the prediction energy is about `1 + |J|^2`.
        momentum: in [0, 1).
        adaptive: stop when every example's residual was at most `tol` in `patience` consecutive steps.
        tol: relative residual.
        patience: consecutive steps.

    Example:
        >>> Descent(settle_steps=10, settle_lr=0.2).momentum
        0.5
    """

    settle_steps: int = 30
    tol: float = 1e-2
    patience: int = 1
    adaptive: bool = False
    settle_lr: float = 0.15
    momentum: float = 0.5

    recalls = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.settle_lr, (int, float)) and 0 < self.settle_lr < math.inf):
            raise ArgumentError(f"Descent(settle_lr={self.settle_lr!r}): must be a positive number.")
        if not (isinstance(self.momentum, (int, float)) and 0 <= self.momentum < 1):
            raise ArgumentError(f"Descent(momentum={self.momentum!r}): must lie in [0, 1).")

    def start(self, energy: Energy, point: Point, known: Known) -> Iterate:
        """At rest, without velocity: at the free equilibrium, or off it by the errors known from earlier."""
        if is_affine_at_rest(energy, point):
            flow: Flow = AffineFlow(energy, point, known.errors)
        else:
            flow = AnyFlow(energy, point if known.errors is None else energy.following(known.errors))
        scale = _size(flow, energy.batch)
        there = Iterate(point, torch.ones_like(scale), memory=_Memory(flow, scale, known.look_from))
        return self._measured(there) if self.adaptive else there

    def advance(self, energy: Energy, iterate: Iterate, active: Tensor | None) -> Iterate:
        """One step of every state that a force has reached."""
        memory: _Memory = iterate.memory
        memory.flow.step(self.settle_lr, self.momentum, active)
        memory.steps += 1
        there = replace(iterate, exact=False) if iterate.exact else iterate
        return self._measured(there) if self.adaptive and memory.steps >= memory.look_from else there

    def certify(self, energy: Energy, iterate: Iterate) -> Iterate:
        """With its point, and its residual if that was not measured on the way."""
        point, errors = iterate.memory.flow.ended()
        return replace(iterate if iterate.exact else self._measured(iterate), point=point, errors=errors)

    def _measured(self, iterate: Iterate) -> Iterate:
        """With its residual, and whether the forces have grown beyond hope since the first."""
        flow, scale = iterate.memory.flow, iterate.memory.scale
        diverging = bool((_size(flow, len(scale)) > _RUNAWAY * torch.maximum(scale, scale.mean())).any())
        return replace(iterate, residual=flow.residual(), diverging=diverging, exact=True)


@dataclass
class _Memory:
    """What moves the states, how large it was at first ([batch]), and the steps made.

    `look_from` as in `Known`; unless `adaptive` nobody looks on the way.
    """

    flow: Flow
    scale: Tensor
    look_from: int
    steps: int = 0


def _size(flow: Flow, batch: int) -> Tensor:
    """The norm of the largest force on an example: [batch]."""
    return torch.stack([example_norm(force, batch) for force in flow.force.values()]).amax(0)
