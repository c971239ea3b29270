"""How a graph answers an output error, by two walks: backward for new errors, forward for the states that follow them.

    delta_out = x,   delta_n = sum_c J_c^T delta_c            walk backward, collecting errors
    s_n = mu_n - beta delta_n                                 walk forward, injecting them

Works for every graph. Units that rest at a kink (`kinks.py`) have an error of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mep.activations import Kink
from mep.energy import Energy, State, example_norm, relative_residual
from mep.graph import Point
from mep.layout import per_example
from mep.nodes import Node, Strength, displaced
from mep.solvers import kinks
from mep.solvers.output import Answer, output_residual, wanted_error
from mep.solvers.strength import alike, weaker, within_reach

Behind = dict[str, tuple[Tensor, Kink]]
"""State -> what pulls on it through a kink, or where it rests, and the operation that has the kink."""


class Walks:
    """The present point and its errors.

    `sent` are the errors that the last backward walk handed down, `errors` those that the states then really have.
    `resting` holds, for every state before a kink, where a unit rests at it (NaN: it does not), and the kink; `gains`,
    how far errors come back through the layers below.

    Where there is a largest strength, `most`, examples that answer more strongly are nudged less before any state has
    moved. If they shall be `like_first`, so are those whose second errors are unlike the first: their states had gone
    where the network bends. They keep the first, which are good for any nudge that is weak enough.
    """

    narrows = False
    """Examples may be coupled, so that all are evaluated in every sweep."""

    @property
    def weakens(self) -> bool:
        """Whether examples can be nudged less than others."""
        return self.most is not None

    def __init__(self, energy: Energy, free: Point, most: Strength | None, like_first: bool):
        self.energy, self.free, self.point, self.most, self.like_first = energy, free, free, most, like_first
        self.sent: State = {}
        self.answers = 0
        self.errors: State = {}
        self.resting: Behind = {}
        self.gains = kinks.gains(energy.graph, free) if energy.kinks else {}

    def answer(self, x: Tensor, rows: Tensor | None, active: Tensor | None) -> Answer:
        """What follows the output error x. Examples that are not active keep their other errors."""
        before, factor = self.sent, None
        self.sent, self.resting = self._back(x, active)
        if self.most is not None and self.answers == 0:
            self.energy = weaker(self.energy, self._within_reach(x, self.most))
        elif self.most is not None and self.like_first and self.answers == 1:
            factor = self._taken_back(before, self.most)
            self.energy = weaker(self.energy, factor)
        self.answers += 1
        self.point, self.errors = self._forward()
        return Answer(self.sent[self.energy.graph.output], self.energy.output(self.point), factor)

    def _within_reach(self, x: Tensor, most: Strength) -> Tensor | None:
        """By the gain `<x, M x> / |x|^2 = sum_n |A_n^T x|^2 / |x|^2` of every example."""
        batch, nudge = self.energy.batch, self.energy.nudge
        assert nudge is not None
        answers = torch.stack([example_norm(error, batch) for error in self.sent.values()]) / example_norm(x, batch)
        return within_reach(nudge.cost, nudge.beta * answers.square().sum(0), most)

    def _taken_back(self, first: State, most: Strength) -> Tensor | None:
        """By what the second errors are unlike the first, which then stand again."""
        factor = alike(first, self.sent, self.energy.graph.output, self.energy.batch, most)
        if factor is not None:
            self.sent = {
                name: torch.where(per_example(factor < 1, error), first[name], error)
                for name, error in self.sent.items()
            }
        return factor

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
            name, mu = node.name, self.point.predictions[node.name]
            delta = x if name == energy.graph.output else torch.zeros_like(mu) if force is None else force
            if name in behind_kink:
                u, kink = behind_kink[name]
                x0, before, rested = self.free.values[name], self.sent.get(name), self.resting.get(name)
                delta, rest = kinks.relax(mu, delta, u, energy.beta, kink, x0, before, self.gains[name])
                resting[name] = _keep(rest, rested[0] if rested else None, active), kink
            sent[name] = _keep(delta, self.sent.get(name), active)
            return sent[name]

        energy.graph.pull(self.point.saved, None, transmit)
        return sent, resting

    def _forward(self) -> tuple[Point, State]:
        """The states that follow the errors, and the errors that they then really have."""
        energy, errors = self.energy, dict(self.sent)

        def place(node: Node, mu: Tensor) -> Tensor:
            s = displaced(mu, self.sent[node.name], energy.beta)
            if node.name in self.resting:
                rest, kink = self.resting[node.name]
                s = kinks.placed(s, rest, kink)
                errors[node.name] = torch.where(rest.isnan(), self.sent[node.name], (mu - s) / energy.beta)
            return s

        return energy.graph.evaluate(energy.inputs, energy.held, place), errors


def worst_residual(energy: Energy, point: Point, errors: State) -> Tensor:
    """The relative residual of each example's worst node: one backward walk, with the errors as they are."""
    batch, wanted = energy.batch, wanted_error(energy, point)
    found: list[Tensor] = []
    norms: list[tuple[Tensor, Tensor, Tensor]] = []  # of the force, the error and the pull, of every node
    behind_kink: Behind = {}

    def transmit(node: Node, force: Tensor | None) -> Tensor | None:
        if _is_stopped_at_kink(energy, node, force, behind_kink):
            return None
        if not node.owns_state:
            return force
        name, s, delta = node.name, point.values[node.name], errors[node.name]
        if name == energy.graph.output:
            found.append(output_residual(delta, wanted, s))
            return delta
        if name in behind_kink:
            pull = torch.zeros_like(s) if force is None else force
            pull = kinks.balancing_pull(s, delta, pull, *behind_kink[name], energy.beta)
            found.append(relative_residual(delta, pull, s, batch))
        elif force is not None:  # where nothing pulls there is no error
            norms.append((example_norm(delta - force, batch), example_norm(delta, batch), example_norm(force, batch)))
        return delta

    energy.graph.pull(point.saved, None, transmit)
    if norms:
        violated, error, pull = (torch.stack(each) for each in zip(*norms, strict=True))
        found.append((violated / torch.maximum(error, pull).add_(torch.finfo(pull.dtype).tiny)).amax(0))
    return torch.stack(found).amax(0)


def _is_stopped_at_kink(energy: Energy, node: Node, force: Tensor | None, behind_kink: Behind) -> bool:
    """Whether a node is a kink: what passes it, the state before it must decide; its force is laid by for that."""
    kink = energy.kinks.get(node.name)
    if kink is not None and force is not None:
        behind_kink[node.parents[0]] = force, kink
    return kink is not None


def _keep(new: Tensor, old: Tensor | None, active: Tensor | None) -> Tensor:
    return new if active is None or old is None else torch.where(per_example(active, new), new, old)
