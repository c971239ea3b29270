"""Gradient descent on the states: what an analog circuit does, and the yardstick for everything faster.

    v <- momentum v + dF/ds,    s <- s - settle_lr v        (then back into the box)

At most one forward and one backward evaluation a step, in closed form: never a graph through the network. Every energy
settles this way. A signal moves one node per step, so a deep network needs at least as many steps as nodes; where it
has not arrived yet nothing is computed.

States are kept, not errors: where a nudge is so weak that its response drowns in their rounding, the residual says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mep.energy import Energy, State, example_norm
from mep.errors import require
from mep.graph import Point
from mep.graph.node import Node, expand_beta
from mep.layout import per_example
from mep.settle import Iterate, Solver, Start
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
        tol: residual, in units of the nudge.
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

    uses_warm_start = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.settle_lr is not None:
            require("Descent", "settle_lr", self.settle_lr, lambda lr: 0 < lr < math.inf, "a positive number, or None")
        require("Descent", "momentum", self.momentum, lambda m: 0 <= m < 1, "at least 0 and below 1")

    def init(self, energy: Energy, point: Point, start: Start) -> Iterate:
        """Without velocity, at the free equilibrium, or off it by the errors of an earlier one."""
        lr = largest_step(energy, point, self.momentum) / 2 if self.settle_lr is None else self.settle_lr
        there = _forces(energy, point if start.errors is None else energy.at_errors(start.errors))
        there = replace(there, lr=lr, first=there.size(energy.batch))
        return self._iterate(energy, there, self.adaptive)

    def step(self, energy: Energy, iterate: Iterate, active: Tensor | None) -> Iterate:
        """One step of every state that a force has reached; where none has, a state stays the same object."""
        there: _Place = iterate.state
        state, velocity, names = energy.state(there.point), dict(there.forces), list(there.forces)
        if moving := list(there.velocity):
            fresh = [there.forces[name] for name in moving]
            known = list(there.velocity.values())
            velocity.update(zip(moving, torch._foreach_add(fresh, known, alpha=self.momentum), strict=True))
        before = [state[name] for name in names]
        moved = torch._foreach_sub(before, [velocity[name] for name in names], alpha=there.lr)
        for name, s, s_before in zip(names, moved, before, strict=True):
            s = energy.in_box(energy.graph.by_name[name], s)
            state[name] = s if active is None else torch.where(per_example(active, s), s, s_before)
        place = lambda node, mu: state[node.name]  # noqa: E731
        there_next = _forces(energy, energy.graph.evaluate(energy.inputs, energy.context, place, there.point))
        there_next = replace(there_next, velocity=velocity, lr=there.lr, first=there.first)
        return self._iterate(energy, there_next, self.adaptive)

    def finalize(self, energy: Energy, iterate: Iterate) -> Iterate:
        """With its residual, if that was not measured on the way."""
        return iterate if iterate.exact else self._iterate(energy, iterate.state, True)

    def failure_hint(self, energy: Energy, point: Point) -> str:
        """A smaller step, if that would help."""
        largest = largest_step(energy, point, self.momentum)
        if self.settle_lr is None or self.settle_lr < _MARGIN * largest:
            return "more settle_steps, a smaller beta, or mep.Sweep."
        return (
            f"a smaller settle_lr, well below {largest:.2g}: for a larger one the energy is too stiff, the more so the "
            "more the model learns. mep.Descent(settle_lr=None) measures it in every batch; mep.Sweep needs none."
        )

    def _iterate(self, energy: Energy, there: _Place, is_measured: bool) -> Iterate:
        """A place, and if it is measured its residual, and whether the forces have grown beyond hope."""
        if not is_measured:
            return Iterate(torch.ones_like(there.first), there.point, exact=False, state=there)
        limit = _RUNAWAY * torch.maximum(there.first, there.first.mean())
        diverging = bool((there.size(energy.batch) > limit).any())
        return Iterate(_residual(energy, there), there.point, diverging=diverging, state=there)


@dataclass(frozen=True)
class _Place:
    """A point, the forces on its states and the children's part in them, where a signal has arrived.

    `velocity` by state, the step size `lr`, and how large the `first` forces were, [batch].
    """

    point: Point
    forces: State
    incoming_forces: State
    velocity: State = field(default_factory=dict)
    lr: float = 0.0
    first: Tensor = field(default_factory=lambda: torch.zeros(()))

    def size(self, batch: int) -> Tensor:
        """The norm of the largest force on an example: [batch]."""
        return torch.stack([example_norm(force, batch) for force in self.forces.values()]).amax(0)


def _forces(energy: Energy, point: Point) -> _Place:
    """One backward walk: `de/ds` less the forces of the children, and less `-beta dC/ds` at the output."""
    incoming_forces, forces = State(), State()
    noted = energy.nudge.free if energy.nudge else None

    def transmit(node: Node, incoming: Tensor | None) -> Tensor | None:
        if not node.owns_state:
            return incoming
        name, s, mu = node.name, point.values[node.name], point.predictions[node.name]
        # A state on its prediction, where no signal has arrived: nothing acts there.
        is_calm = s is mu and energy.node_energy.is_forward
        ds, onward = (None, None) if is_calm else energy.node_energy.forces(s, mu)
        if incoming is not None:
            incoming_forces[name] = incoming
        if incoming is not None or ds is not None:
            force = ds if incoming is None else incoming.neg() if ds is None else ds - incoming
            assert force is not None
            forces[name] = force - noted[name].leftover if noted else force
        return onward

    gradient = energy.cost_gradient(point)
    nudge = None if gradient is None else -gradient * expand_beta(energy.beta, gradient)
    energy.graph.vjp(point.saved, nudge, transmit)
    return _Place(point, forces, incoming_forces)


def _residual(energy: Energy, there: _Place) -> Tensor:
    """Of every example's worst node among those that a signal has reached: [batch]."""
    found = []
    for name in there.forces:
        s, mu = there.point.values[name], there.point.predictions[name]
        incoming = there.incoming_forces.get(name)
        found.append(energy.residual(name, s, mu, torch.zeros_like(mu) if incoming is None else incoming))
    return torch.stack(found).amax(0)
