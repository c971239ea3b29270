"""Gradient descent on the states: what an analog circuit does, and the yardstick for everything faster.

    v <- momentum v + dF/ds,    s <- s - settle_lr v        (then back into the box)

At most one forward and one backward evaluation a step, in closed form: never a graph through the network. Every energy
settles this way. A signal moves one node per step, so a deep network needs at least as many steps as nodes. Where it
has not arrived yet nothing is computed: a node predicts anew only when a parent's state has moved, and pulls on its
parents only once its own state has left its prediction.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mep.energy import Energy, State, example_norm, inside_box, per_example
from mep.errors import ArgumentError
from mep.graph import Point
from mep.nodes import Node
from mep.settle import Iterate, Known, Solver

REST = os.environ.get("REST", "")
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
        if known.errors is not None:
            point = energy.following(known.errors)
        return self._measured(energy, self._forced(energy, point, _Memory(look_from=known.look_from)))

    def advance(self, energy: Energy, iterate: Iterate, active: Tensor | None) -> Iterate:
        """One step of every state that a force has reached; the others stay the same objects."""
        memory: _Memory = iterate.memory
        state, velocity = energy.state(iterate.point), {}
        for node in energy.graph.states:
            name, s = node.name, state[node.name]
            if name in memory.force:
                v = memory.force[name]
                v = v.add(memory.velocity[name], alpha=self.momentum) if name in memory.velocity else v
                moved = inside_box(node, s.sub(v, alpha=self.settle_lr))
                velocity[name] = v
                state[name] = moved if active is None else torch.where(per_example(active, s), moved, s)
        point = energy.graph.evaluate(energy.inputs, energy.held, lambda node, mu: state[node.name], iterate.point)
        memory = replace(memory, velocity=velocity, steps=memory.steps + 1)
        there = self._forced(energy, point, memory, iterate)
        looks = self.adaptive and memory.steps >= memory.look_from
        return self._measured(energy, there) if looks else there

    def certify(self, energy: Energy, iterate: Iterate) -> Iterate:
        """With its residual, if that was not measured on the way."""
        return iterate if iterate.exact else self._measured(energy, iterate)

    def _forced(self, energy: Energy, point: Point, memory: _Memory, before: Iterate | None = None) -> Iterate:
        """The forces at a point; its residual is not known yet."""
        pulls, reached = _pulls(energy, point)
        force = {name: g for name, g in energy.forces(point, pulls).items() if name in reached}
        unknown = energy.output(point).new_ones(energy.batch) if before is None else before.residual
        return Iterate(point, unknown, memory=replace(memory, force=force, pulls=pulls))

    def _measured(self, energy: Energy, iterate: Iterate) -> Iterate:
        """With its residual, and whether the forces have grown beyond hope since the first."""
        memory: _Memory = iterate.memory
        residual = torch.stack(list(energy.residuals(iterate.point, memory.pulls).values())).amax(0)
        size = torch.stack([example_norm(g, energy.batch) for g in memory.force.values()]).amax(0)
        scale = size if memory.scale is None else memory.scale
        diverging = bool((size > _RUNAWAY * torch.maximum(scale, scale.mean())).any())
        return replace(iterate, residual=residual, diverging=diverging, exact=True, memory=replace(memory, scale=scale))


@dataclass(frozen=True)
class _Memory:
    """Forces and velocities of the states that a force has reached, and what all pull on each state.

    `scale`: the size of the first force, [batch]. `look_from` as in `Known`; unless `adaptive` nobody looks on the way.
    """

    force: State = field(default_factory=dict)
    velocity: State = field(default_factory=dict)
    pulls: State = field(default_factory=dict)
    scale: Tensor | None = None
    steps: int = 0
    look_from: int = 0


def _pulls(energy: Energy, point: Point) -> tuple[State, set[str]]:
    """As `Energy.pulls`, but a state that still stands on its prediction pulls nobody; and whom a force has reached."""
    pulls: State = {}
    reached: set[str] = set()

    def transmit(node: Node, force: Tensor | None) -> Tensor | None:
        if not node.owns_state:
            return force
        name, s, mu = node.name, point.values[node.name], point.predictions[node.name]
        pulls[name] = torch.zeros_like(s) if force is None else force
        if force is not None or s is not mu:
            reached.add(name)
        return None if s is mu and energy.coupling.vanishes_when_free else energy.coupling.tension(s, mu)

    gradient = energy.cost_gradient(point)
    energy.graph.pull(point.saved, None if gradient is None else -energy.beta * gradient, transmit)
    return pulls, reached
