"""What moves the states during descent: the forces where they stand, and one step of all that a force has reached.

A signal moves one node per step. Where it has not arrived yet nothing is computed: a node predicts anew only when a
parent's state has moved, and pulls on its parents only once its own state has left its prediction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mep.energy import Energy, State, inside_box
from mep.graph import Point
from mep.layout import per_example
from mep.nodes import Node


class Flow(ABC):
    """Where the states stand, and what forces are on them there."""

    @abstractmethod
    def step(self, lr: float, momentum: float, active: Tensor | None) -> None:
        """`v <- momentum v + force`, `s <- s - lr v`; an example that is not `active` ([batch]) stays where it is."""

    @abstractmethod
    def forces(self) -> State:
        """dF/ds of every state that a force has reached, in a unit of its own."""

    @abstractmethod
    def residual(self) -> Tensor:
        """The relative residual of every example's worst node: [batch]."""

    @abstractmethod
    def ended(self) -> tuple[Point, State | None]:
        """The graph at these states, and the scaled errors if it works with them."""


class AnyFlow(Flow):
    """Any graph and energy: each node predicts anew from the states and pulls with `-de/dmu`."""

    def __init__(self, energy: Energy, point: Point):
        self.energy = energy
        self.velocity: State = {}
        self._stand_at(point)

    def step(self, lr: float, momentum: float, active: Tensor | None) -> None:
        """A state that no force has reached stays the same object: by that the graph knows it."""
        energy, state = self.energy, self.energy.state(self.point)
        reached = [node for node in energy.graph.states if node.name in self.force]
        for node in reached:
            name, s = node.name, state[node.name]
            v = self.force[name]
            v = v.add(self.velocity[name], alpha=momentum) if name in self.velocity else v
            moved = inside_box(node, s.sub(v, alpha=lr))
            self.velocity[name] = v
            state[name] = moved if active is None else torch.where(per_example(active, s), moved, s)
        place = lambda node, mu: state[node.name]  # noqa: E731
        self._stand_at(energy.graph.evaluate(energy.inputs, energy.held, place, self.point))

    def forces(self) -> State:
        return self.force

    def residual(self) -> Tensor:
        pulls = {
            n: self.pulls[n] if n in self.pulls else torch.zeros_like(mu) for n, mu in self.point.predictions.items()
        }
        return torch.stack(list(self.energy.residuals(self.point, pulls).values())).amax(0)

    def ended(self) -> tuple[Point, State | None]:
        return self.point, None

    def _stand_at(self, point: Point) -> None:
        """The forces there, and the children's part in them (`pulls`), where they have been reached."""
        energy, pulls, forces = self.energy, {}, {}

        def transmit(node: Node, pull: Tensor | None) -> Tensor | None:
            if not node.owns_state:
                return pull
            name, s, mu = node.name, point.values[node.name], point.predictions[node.name]
            error = None if s is mu else s - mu
            if pull is not None:
                pulls[name] = pull
                forces[name] = pull.neg() if error is None else error - pull
            elif error is not None:
                forces[name] = error
            return error if energy.coupling.vanishes_when_free else energy.coupling.tension(s, mu)

        gradient = energy.cost_gradient(point)
        energy.graph.pull(point.saved, None if gradient is None else -energy.beta * gradient, transmit)
        self.point, self.pulls, self.force = point, pulls, forces
