"""Graphs with kinks at which units may rest (`branches="exact"`): the exact equilibrium of the nonsmooth energy.

A unit behind which a function has a kink minimises a nonsmooth function of its own (`kinks.py`): its error is that of
the minimum, not a step toward it. So the output error x alone is the unknown here, `r = dC/ds_out - x`, and all other
errors follow it in one walk backward, the states in one forward.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mep.energy import Energy, State, example_dot, example_norm, relative_residual
from mep.graph import Point
from mep.graph.closed_forms import Kink
from mep.graph.node import Node, expand_beta, state_from_error
from mep.layout import per_example
from mep.settle import Response
from mep.solvers.networks import kinks
from mep.solvers.networks.network import Network, are_independent, length_by_gain, output_residual, spread_length

Behind = dict[str, tuple[Tensor, Kink]]
"""State -> what pulls on it through a kink, or where it rests, and the operation that has the kink."""


class NonsmoothNetwork(Network):
    """The present point and its errors.

    `sent` are the errors that the last backward walk handed down, `errors` those that the states then really have.
    `resting` holds, for every state before a kink, where a unit rests at it (NaN: it does not), and the kink; `gains`,
    how far errors come back through the layers below.
    """

    def __init__(self, energy: Energy, free: Point, response: Response):
        super().__init__(energy, free, response)
        self.is_coupled = not are_independent(energy, free)
        self.now = free
        self.x: Tensor | None = None
        self.r = self.r_before = response.error
        self.sent: State = {}
        self.had: State = {}
        self.resting: Behind = {}
        self.gains = kinks.gains(energy.graph, free)

    def error_size(self) -> Tensor:
        assert self.x is not None
        return example_norm(self.x, len(self.x))

    def first_move(self, tol: float, may_stop: bool) -> Tensor:
        a = length_by_gain(self.energy, self.free, self.response, self.is_coupled)
        self.move(a)
        return a

    def products(self) -> tuple[Tensor, Tensor]:
        """As in `general.py`, of the output alone."""
        r, y = self.r_before, self.r_before - self.r
        along, square = example_dot(r, y, self.energy.batch), example_dot(y, y, self.energy.batch)
        return (along.sum(), square.sum()) if self.is_coupled else (along, square)

    def move(self, a: Tensor) -> None:
        """An example of which the output error does not move keeps the other errors, too."""
        step = self.r * spread_length(a, self.r)
        active = a != 0 if a.ndim else None
        self.x = step if self.x is None else self.x + step
        self.sent, self.resting = self._back(self.x, active)
        self.now, self.had = self._forward()
        self.r_before, self.r = self.r, self.energy.wanted_error(self.now) - self.x
        self.note(worst_residual(self.energy, self.now, self.had))

    def result(self) -> tuple[Point, Mapping[str, Tensor]]:
        return self.now, self.had

    def _back(self, x: Tensor, active: Tensor | None) -> tuple[State, Behind]:
        """New errors for every node, from the output's; and where units come to rest at a kink."""
        energy = self.energy
        sent: State = {}
        resting: Behind = {}
        behind_kink: Behind = {}

        def transmit(node: Node, force: Tensor | None) -> Tensor | None:
            if _is_stopped_at_kink(energy, node, force, behind_kink):
                return None
            if not node.owns_state:
                return force
            name, mu = node.name, self.now.predictions[node.name]
            delta = x if name == energy.graph.output else torch.zeros_like(mu) if force is None else force
            if name in behind_kink:
                u, kink = behind_kink[name]
                x0, before, rested = self.free.values[name], self.sent.get(name), self.resting.get(name)
                delta, rest = kinks.relax(
                    mu, delta, u, expand_beta(energy.beta, mu), kink, x0, before, self.gains[name]
                )
                resting[name] = _keep(rest, rested[0] if rested else None, active), kink
            sent[name] = _keep(delta, self.sent.get(name), active)
            return sent[name]

        energy.graph.vjp(self.now.saved, None, transmit)
        return sent, resting

    def _forward(self) -> tuple[Point, State]:
        """The states that follow the errors, and the errors that they then really have."""
        energy, errors = self.energy, dict(self.sent)

        def place(node: Node, mu: Tensor) -> Tensor:
            s = state_from_error(mu, self.sent[node.name], energy.beta)
            if node.name in self.resting:
                rest, kink = self.resting[node.name]
                s = kinks.placed(s, rest, kink)
                errors[node.name] = torch.where(
                    rest.isnan(), self.sent[node.name], (mu - s) / expand_beta(energy.beta, s)
                )
            return s

        return energy.graph.evaluate(energy.inputs, energy.context, place), errors


def worst_residual(energy: Energy, point: Point, errors: State) -> Tensor:
    """The residual of each example's worst node: one backward walk, with the errors as they are."""
    batch, wanted = energy.batch, energy.wanted_error(point)
    found: list[Tensor] = []
    behind_kink: Behind = {}

    def transmit(node: Node, force: Tensor | None) -> Tensor | None:
        if _is_stopped_at_kink(energy, node, force, behind_kink):
            return None
        if not node.owns_state:
            return force
        name, s, delta = node.name, point.values[node.name], errors[node.name]
        if name == energy.graph.output:
            found.append(output_residual(delta, wanted))
        else:
            incoming = torch.zeros_like(s) if force is None else force
            if name in behind_kink:
                incoming = kinks.balancing_force(s, delta, incoming, *behind_kink[name], expand_beta(energy.beta, s))
            found.append(relative_residual(delta, incoming, batch))
        return delta

    energy.graph.vjp(point.saved, None, transmit)
    return torch.stack(found).amax(0)


def _is_stopped_at_kink(energy: Energy, node: Node, force: Tensor | None, behind_kink: Behind) -> bool:
    """Whether a node is a kink: what passes it, the state before it must decide; its force is laid by for that."""
    kink = energy.kinks.get(node.name)
    if kink is not None and force is not None:
        behind_kink[node.parents[0]] = force, kink
    return kink is not None


def _keep(new: Tensor, old: Tensor | None, active: Tensor | None) -> Tensor:
    return new if active is None or old is None else torch.where(per_example(active, new), new, old)
