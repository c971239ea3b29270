"""Gradient descent on the states: what an analog circuit does, and the yardstick for everything faster.

    v <- momentum v + dF/ds,    s <- s - settle_lr v        (then back into the box)

States behind an activation f that is no projection move by their pulls: `s <- f(f^-1(s) - settle_lr v)`, the membrane
equation of Hopfield 1984 (https://doi.org/10.1073/pnas.81.10.3088). They never leave the range of f.

Every energy settles this way. A step takes at most one forward and one backward evaluation, in closed form: never a
graph through the network. A signal moves one node per step, so a deep network needs at least as many steps as nodes;
nodes that it has not reached yet are not computed.

States are kept, not errors: where a nudge is so weak that its response drowns in their rounding, the residual shows it.

How large a step may be depends on the **stiffness**, the largest eigenvalue of `d2F/ds2`: the iteration converges while

    settle_lr * stiffness < 2 (1 + momentum)

(heavy ball: Polyak 1964, https://doi.org/10.1016/0041-5553(64)90137-5). It grows with the weights, many times over
while a network learns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mep.energy import Energy, State, example_norm
from mep.errors import require
from mep.graph import Point
from mep.graph.node import Node, expand_beta
from mep.layout import per_example
from mep.settle import Iterate, Solver, Start

_RUNAWAY = 1e2
"""Forces this many times the first ones do not tend to zero any more."""
_MARGIN = 0.8
"""A step above this fraction of the largest one may be too large: power iteration overestimates that by up to 1/4."""
_DIGITS = 1e4
"""A tolerance of fewer units in the last place may be out of reach: a displacement is a small part of its state."""
_POWER_ITERATIONS = 8
"""They come within a fifth or so of the stiffness, from below."""
_DISTANCE = 0.1
"""Over which forces are compared: far above rounding, and short enough for the energy to be smooth."""


@dataclass(frozen=True)
class Descent(Solver):
    """Gradient descent with momentum on all states at once.

    Args:
        settle_steps: the largest number of steps, or with `adaptive=False` the exact one.
        settle_lr: step size; the curvature of the prediction energy is about `1 + |J|^2`. None: half of the largest
            step that converges, measured in every batch at the cost of about eight steps.
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
    settles_groups = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.settle_lr is not None:
            require("Descent", "settle_lr", self.settle_lr, lambda lr: 0 < lr < math.inf, "a positive number, or None")
        require("Descent", "momentum", self.momentum, lambda m: 0 <= m < 1, "at least 0 and below 1")

    def init(self, energy: Energy, point: Point, start: Start) -> Iterate:
        """Without velocity, at the free equilibrium, or off it by the errors of an earlier one."""
        lr = largest_step(energy, point, self.momentum) / 2 if self.settle_lr is None else self.settle_lr
        current = _forces(energy, point if start.errors is None else energy.at_errors(start.errors))
        current = replace(current, lr=lr, first_size=current.size(energy.batch))
        return self._iterate(energy, current, self.adaptive)

    def step(self, energy: Energy, iterate: Iterate, active: Tensor | None) -> Iterate:
        """One step of every state that a force has reached; the others stay the same tensors, so nothing follows."""
        current: DescentState = iterate.state
        state, names = energy.state(current.point), list(current.forces)

        # v <- momentum v + dF/ds; where a signal has just arrived, v is the force itself.
        velocity = dict(current.forces)
        if moving := list(current.velocity):
            forces, before = [current.forces[name] for name in moving], list(current.velocity.values())
            velocity.update(zip(moving, torch._foreach_add(forces, before, alpha=self.momentum), strict=True))

        # s <- s - lr v, into the box, in the examples that have not settled
        before = [energy.potential_of(energy.graph.by_name[name]).inverse(state[name]) for name in names]
        moved = torch._foreach_sub(before, [velocity[name] for name in names], alpha=current.lr)
        for name, pull in zip(names, moved, strict=True):
            s = energy.respond(energy.graph.by_name[name], pull)
            state[name] = s if active is None else torch.where(per_example(active, s), s, state[name])

        place = lambda node, mu: state[node.name]  # noqa: E731
        there = _forces(energy, energy.graph.evaluate(energy.inputs, energy.context, place, current.point))
        there = replace(there, velocity=velocity, lr=current.lr, first_size=current.first_size)
        return self._iterate(energy, there, self.adaptive)

    def finalize(self, energy: Energy, iterate: Iterate) -> Iterate:
        """With its residual, if that was not measured on the way."""
        return iterate if iterate.exact else self._iterate(energy, iterate.state, True)

    def failure_hint(self, energy: Energy, point: Point) -> str:
        """A smaller step, if that would help; or more digits, where `tol` is near the rounding of the states."""
        largest = largest_step(energy, point, self.momentum)
        if self.settle_lr is None or self.settle_lr < _MARGIN * largest:
            if self.tol < _DIGITS * torch.finfo(energy.output(point).dtype).eps:
                return (
                    "a larger tol, a larger beta, or float64: residuals count the rounding of the states, which may be "
                    "all that is left. Else more settle_steps."
                )
            return "more settle_steps, a smaller beta, or mep.Sweep."
        return (
            f"a smaller settle_lr, well below {largest:.2g}: for a larger one the energy is too stiff, the more so the "
            "more the model learns. mep.Descent(settle_lr=None) measures it in every batch; mep.Sweep needs none."
        )

    def _iterate(self, energy: Energy, current: DescentState, is_measured: bool) -> Iterate:
        """The iterate; if it is measured, with its residual, and with whether its forces grow without bound."""
        point = current.point
        if not is_measured:
            return Iterate(torch.ones_like(current.first_size), point, exact=False, state=current)
        # An example whose first forces were small is compared with the mean over all examples.
        limit = _RUNAWAY * torch.maximum(current.first_size, current.first_size.mean())
        diverging = bool((current.size(energy.batch) > limit).any())
        return Iterate(_residual(energy, current), point, diverging=diverging, state=current)


@dataclass(frozen=True)
class DescentState:
    """A point, and what the next step needs: entries only for states that a signal has reached.

    Attributes:
        point: the graph where the states are.
        forces: dF/ds of the states.
        incoming_forces: the children's part in them.
        velocity: v of the states.
        lr: the step size.
        first_size: `size` at the start, [batch].
    """

    point: Point
    forces: State
    incoming_forces: State
    velocity: State = field(default_factory=dict)
    lr: float = 0.0
    first_size: Tensor = field(default_factory=lambda: torch.zeros(()))

    def size(self, batch: int) -> Tensor:
        """The norm of the largest force of a node, [batch]."""
        return _norms(self.forces.values(), batch).amax(0)


def _forces(energy: Energy, point: Point) -> DescentState:
    """`dF/ds_n = de/ds_n - sum_c J_c^T (-de/dmu)_c - leftover_n`, in one walk backward; -beta dC/ds at the output.

    The leftover is the force that the free phase left (`Nudge.free`).
    """
    incoming_forces, forces, of_groups = State(), State(), energy.group_forces(point)
    free = energy.nudge.free if energy.nudge else None

    def transmit(node: Node, incoming: Tensor | None) -> Tensor | None:
        if not node.owns_state:
            return incoming
        name, s, mu = node.name, point.values[node.name], point.predictions[node.name]
        # A state on its prediction, where no signal has arrived: nothing acts there, and nothing is computed below.
        is_calm = s is mu and energy.is_forward
        ds, onward = (None, None) if is_calm else energy.node_energy.at(node).forces(s, mu)
        if name in of_groups:
            incoming = of_groups[name] if incoming is None else incoming + of_groups[name]
        if incoming is not None:
            incoming_forces[name] = incoming
        if incoming is not None or ds is not None:
            force = ds if incoming is None else incoming.neg() if ds is None else ds - incoming
            assert force is not None
            forces[name] = force - free[name].leftover if free else force
        return onward

    gradient = energy.cost_gradient(point)
    nudge = None if gradient is None else -gradient * expand_beta(energy.beta, gradient)
    energy.graph.vjp(point.saved, nudge, transmit)
    return DescentState(point, forces, incoming_forces)


def _residual(energy: Energy, current: DescentState) -> Tensor:
    """Of every example's worst node among those that a signal has reached: [batch]."""
    found = []
    for name in current.forces:
        s, mu = current.point.values[name], current.point.predictions[name]
        incoming = current.incoming_forces.get(name)
        found.append(energy.residual(name, s, mu, torch.zeros_like(mu) if incoming is None else incoming))
    return torch.stack(found).amax(0)


def largest_step(energy: Energy, point: Point, momentum: float) -> float:
    """The step size at which descent ceases to converge near this point, for the stiffest example."""
    return 2 * (1 + momentum) / float(stiffness(energy, point).max())


def stiffness(energy: Energy, point: Point) -> Tensor:
    """The largest eigenvalue of every example's Hessian `H = d2F/ds2`, by power iteration: [batch].

    `H d ~ dF/ds(s + d) - dF/ds(s)`. Where states move by their pulls it is that of `H f'`, for `s + f' d`. The start is
    random, from generators of its own: the global ones do not move.
    """
    state, rest = energy.state(point), energy.forces(point)
    source = {device: torch.Generator(device).manual_seed(0) for device in {s.device for s in state.values()}}
    product = {name: torch.empty_like(s).normal_(generator=source[s.device]) for name, s in state.items()}
    norm = _norms(product.values(), energy.batch).norm(dim=0)
    for _ in range(_POWER_ITERATIONS):
        scale = _DISTANCE / norm.clamp(min=torch.finfo(norm.dtype).tiny)  # d = product * scale has length _DISTANCE
        there = {}
        for name, s in state.items():  # a state moves by its pull, with the slope of its activation
            potential = energy.potential_of(energy.graph.by_name[name])
            there[name] = s + potential.slope(s, product[name] * per_example(scale, s))
        product = {name: force - rest[name] for name, force in energy.forces(energy.at(there)).items()}
        norm = _norms(product.values(), energy.batch).norm(dim=0)
    return norm / _DISTANCE


def _norms(tensors: Iterable[Tensor], batch: int) -> Tensor:
    """The norm of each tensor's part of every example, [tensors, batch]."""
    return torch.stack([example_norm(t, batch) for t in tensors])
