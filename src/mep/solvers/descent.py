"""Gradient descent on the states: what an analog circuit does, and the yardstick for everything faster.

    v <- momentum v + dF/ds,    s <- s - settle_lr v        (then back into the box)

One forward and one backward evaluation a step, in closed form: never a graph through the network. Every energy
settles this way. A signal moves one node per step, so a deep network needs at least as many steps as nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mep.energy import Energy, State, example_norm, inside_box, per_example
from mep.errors import ArgumentError
from mep.graph import Point
from mep.settle import Iterate, Solver

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

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.settle_lr, (int, float)) and 0 < self.settle_lr < math.inf):
            raise ArgumentError(f"Descent(settle_lr={self.settle_lr!r}): must be a positive number.")
        if not (isinstance(self.momentum, (int, float)) and 0 <= self.momentum < 1):
            raise ArgumentError(f"Descent(momentum={self.momentum!r}): must lie in [0, 1).")

    def start(self, energy: Energy, point: Point) -> Iterate:
        """At rest, without velocity."""
        return self._measured(energy, energy.at(energy.state(point)), {}, None)

    def advance(self, energy: Energy, iterate: Iterate, active: Tensor | None) -> Iterate:
        """One step of every state against its force."""
        force, before, scale = iterate.memory
        state: State = {}
        velocity: State = {}
        for node in energy.graph.states:
            s, g = iterate.point.values[node.name], force[node.name]
            v = g.add(before[node.name], alpha=self.momentum) if before else g
            moved = inside_box(node, s.sub(v, alpha=self.settle_lr))
            velocity[node.name] = v
            state[node.name] = moved if active is None else torch.where(per_example(active, s), moved, s)
        return self._measured(energy, energy.at(state), velocity, scale)

    def _measured(self, energy: Energy, point: Point, velocity: State, scale: Tensor | None) -> Iterate:
        pulls = energy.pulls(point)
        residual = torch.stack(list(energy.residuals(point, pulls).values())).amax(0)
        force = energy.forces(point, pulls)
        size = torch.stack([example_norm(g, energy.batch) for g in force.values()]).amax(0)
        scale = size if scale is None else scale
        diverging = bool((size > _RUNAWAY * torch.maximum(scale, scale.mean())).any())
        return Iterate(point, residual, diverging=diverging, memory=(force, velocity, scale))
