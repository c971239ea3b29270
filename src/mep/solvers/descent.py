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
from mep.solvers.stiffness import largest_step

_RUNAWAY = 1e2
"""A force so many times the first one is not on its way to zero."""

_MARGIN = 0.8
"""A step so near the largest one that converges may be too large: that one is known from above."""


@dataclass(frozen=True)
class Descent(Solver):
    """Gradient descent with momentum on all states at once.

    Args:
        settle_steps: the largest number of steps, or with `adaptive=False` the exact one.
        settle_lr: step size; the curvature of the prediction energy is about `1 + |J|^2`. None: half of the largest
            step that converges, measured in every batch for the price of about eight steps (`stiffness.py`).
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
    settle_lr: float | None = 0.15
    momentum: float = 0.5

    recalls = True

    def __post_init__(self) -> None:
        super().__post_init__()
        is_number = isinstance(self.settle_lr, (int, float)) and 0 < self.settle_lr < math.inf
        if not (is_number or self.settle_lr is None):
            raise ArgumentError(f"Descent(settle_lr={self.settle_lr!r}): must be a positive number, or None.")
        if not (isinstance(self.momentum, (int, float)) and 0 <= self.momentum < 1):
            raise ArgumentError(f"Descent(momentum={self.momentum!r}): must lie in [0, 1).")

    def start(self, energy: Energy, point: Point, known: Known) -> Iterate:
        """At rest, without velocity: at the free equilibrium, or off it by the errors known from earlier."""
        if is_affine_at_rest(energy, point):
            flow: Flow = AffineFlow(energy, point, known.errors)
        else:
            flow = AnyFlow(energy, point if known.errors is None else energy.following(known.errors))
        scale = _size(flow, energy.batch)
        lr = largest_step(energy, point, self.momentum) / 2 if self.settle_lr is None else self.settle_lr
        there = Iterate(point, torch.ones_like(scale), memory=_Memory(flow, scale, lr, known.look_from))
        return self._measured(there) if self.adaptive else there

    def advance(self, energy: Energy, iterate: Iterate, active: Tensor | None) -> Iterate:
        """One step of every state that a force has reached."""
        memory: _Memory = iterate.memory
        memory.flow.step(memory.lr, self.momentum, active)
        memory.steps += 1
        there = replace(iterate, exact=False) if iterate.exact else iterate
        return self._measured(there) if self.adaptive and memory.steps >= memory.look_from else there

    def certify(self, energy: Energy, iterate: Iterate) -> Iterate:
        """With its point, and its residual if that was not measured on the way."""
        point, errors = iterate.memory.flow.ended()
        return replace(iterate if iterate.exact else self._measured(iterate), point=point, errors=errors)

    def way_out(self, energy: Energy, point: Point) -> str:
        """What to do where this has diverged from a point: a smaller step, if that would help."""
        largest = largest_step(energy, point, self.momentum)
        if self.settle_lr is None or self.settle_lr < _MARGIN * largest:
            return super().way_out(energy, point)
        return (
            f"a smaller settle_lr, well below {largest:.2g}: for a larger one the energy is too stiff, the more so the "
            "more the model learns. mep.Descent(settle_lr=None) measures it in every batch; mep.Sweep needs none."
        )

    def _measured(self, iterate: Iterate) -> Iterate:
        """With its residual, and whether the forces have grown beyond hope since the first."""
        flow, scale = iterate.memory.flow, iterate.memory.scale
        diverging = bool((_size(flow, len(scale)) > _RUNAWAY * torch.maximum(scale, scale.mean())).any())
        return replace(iterate, residual=flow.residual(), diverging=diverging, exact=True)


@dataclass
class _Memory:
    """What moves the states, how large it was at first ([batch]), the step size, and the steps made.

    `look_from` as in `Known`; unless `adaptive` nobody looks on the way.
    """

    flow: Flow
    scale: Tensor
    lr: float
    look_from: int
    steps: int = 0


def _size(flow: Flow, batch: int) -> Tensor:
    """The norm of the largest force on an example: [batch]."""
    return torch.stack([example_norm(force, batch) for force in flow.forces().values()]).amax(0)
