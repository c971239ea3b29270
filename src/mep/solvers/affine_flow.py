"""Descent on an affine graph, through its constant Jacobians: nothing is evaluated anew (`response.py` says which).

    t_n     = (free_n - s_n) / beta                how far a state has moved
    delta_n = t_n - sum_p J_p t_p                  its scaled error, as the states below have moved its prediction
    force_n = delta_n - sum_c J_c^T delta_c        less dC/ds at the output

In the unit `-beta` this is descent on the states, to rounding and without its cancellation: t is of order 1 for every
beta. One product with each weight forward and one back is all that a step costs.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from mep.energy import Energy, State, example_norm, per_example, relative_residual, rounding
from mep.graph import Point
from mep.nodes import Node, displaced
from mep.solvers.flow import Flow
from mep.solvers.response import saved_after


def is_affine_at_rest(energy: Energy, point: Point) -> bool:
    """Whether a nudged energy has an affine graph, states of one dtype, and this free equilibrium."""
    at_rest = energy.coupling.vanishes_when_free and all(point.values[n] is mu for n, mu in point.predictions.items())
    alike = len({(mu.dtype, mu.device) for mu in point.predictions.values()}) == 1
    return energy.nudge is not None and energy.is_affine and at_rest and alike


class AffineFlow(Flow):
    """All t stand in one row of memory, and so do velocities, forces and deltas: a step is two operations.

    The states follow one another from the output down, so that those that the signal has not reached are the end of the
    row. The velocity is kept as the running mean of the forces: `lr / (1 - momentum)` times it is the step.

    What is still zero has no entry in `shift` (the t of states and junctions), `delta`, `force`, `arriving` (see
    `Graph.push`).

    Args:
        energy: nudged, of an affine graph.
        free: its free equilibrium.
        errors: scaled errors to begin with, or None to begin at rest.
    """

    def __init__(self, energy: Energy, free: Point, errors: State | None):
        self.energy, self.free = energy, free
        states = {node.name: free.values[node.name] for node in reversed(energy.graph.states)}
        sizes = [s.numel() for s in states.values()]
        self.ends = dict(zip(states, accumulate(sizes), strict=True))
        self.rows = energy.output(free).new_zeros(4, sum(sizes)).unbind()
        split = [zip(states.items(), row.split(sizes), strict=True) for row in self.rows]
        self.t, self.velocity, self._force, self._delta = ({n: v.view(s.shape) for (n, s), v in row} for row in split)
        self.reached = 0
        self.force: State = {}
        self.delta: State = {}
        self.arriving: State = {}
        self.shift: State = {}
        if errors is not None:
            tangents, _ = energy.graph.push(free.saved, errors)
            self.shift = {name: self.t[name].copy_(tangents[name]) for name in states}
        self._look()

    def step(self, lr: float, momentum: float, active: Tensor | None) -> None:
        t, v, force = self.live
        v.lerp_(force, 1 - momentum)
        size = lr / (1 - momentum)
        if active is None:
            t.sub_(v, alpha=size)
        else:
            for name in self.force:
                v = self.velocity[name]
                self.t[name].sub_(torch.where(per_example(active, v), v, 0), alpha=size)
        self.shift = {name: self.t[name] for name in self.force}
        self._look()

    def residual(self) -> Tensor:
        """In the unit of the forces."""
        batch, beta, found = self.energy.batch, self.energy.beta, []
        for name, force in self.force.items():
            delta = self.delta.get(name, self._delta[name])
            found.append(relative_residual(delta, delta - force, self._value(name) / beta, batch))
        nudged, output = example_norm(self.gradient * beta, batch), self._value(self.energy.graph.output)
        return torch.stack(found).amax(0) * (nudged > 10 * rounding(output, batch))

    def ended(self) -> tuple[Point, State | None]:
        energy, free = self.energy, self.free
        values = free.values | {name: self._value(name) for name in self.shift}
        errors = {name: self.delta.get(name, d) for name, d in self._delta.items()}
        predictions = {name: displaced(values[name], error, -energy.beta) for name, error in errors.items()}
        return Point(values, predictions, saved_after(energy, free, dict(self.arriving))), errors

    def _look(self) -> None:
        """The deltas and forces where the states stand now."""
        energy, free = self.energy, self.free
        for node in energy.graph.nodes:
            name, predicted = node.name, None
            shifts = [self.shift.get(parent) for parent in node.parents]
            if not node.clamped and any(t is not None for t in shifts):
                predicted, arriving = node.push(free.saved[name], shifts)
                if arriving is not None:
                    self.arriving[name] = arriving
            if not node.owns_state:
                if predicted is not None:
                    self.shift[name] = predicted
            elif predicted is not None:
                self.delta[name] = torch.sub(self.t[name], predicted, out=self._delta[name])
            elif name in self.shift:
                self.delta[name] = self.t[name]
        assert energy.nudge is not None
        self.gradient = energy.nudge.cost.gradient(self._value(energy.graph.output))
        energy.graph.pull(free.saved, self.gradient, self._transmit)

    def _transmit(self, node: Node, pull: Tensor | None) -> Tensor | None:
        """Note the force on a state, and hand its delta on."""
        if not node.owns_state:
            return pull
        name = node.name
        delta = self.delta.get(name)
        if pull is None and delta is None:
            return None
        if name not in self.force:
            self.force[name] = self._force[name]
            self.reached = max(self.reached, self.ends[name])
            self.live = [row[: self.reached] for row in self.rows[:3]]
        if pull is None:
            self._force[name].copy_(delta)
        else:
            torch.sub(self._delta[name] if delta is None else delta, pull, out=self._force[name])
        return delta

    def _value(self, name: str) -> Tensor:
        """Of a node."""
        free, shift = self.free.values[name], self.shift.get(name)
        return free if shift is None else displaced(free, shift, self.energy.beta)
