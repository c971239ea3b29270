"""How an affine graph answers an output error: through its constant Jacobians, without evaluating anything anew.

While branches are held, a network of linear layers, convolutions, pooling and piecewise-linear activations is affine:

    delta_n = sum_c J_c^T delta_c            backward
    t_n     = delta_n + sum_p J_p t_p        forward: how far the states move, s_n = free_n - beta t_n

are the same equations as in `walks.py`, to rounding and without its cancellation: t is of order 1 for every beta. All
nodes but the output balance exactly. Examples do not see each other, so those that have settled are left out.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mep.energy import Energy, State
from mep.graph import Point
from mep.nodes import Node


class Response:
    """The errors so far, and how far they have moved what the weights are applied to (`arriving`)."""

    def __init__(self, energy: Energy, free: Point):
        self.energy, self.free = energy, free
        self.errors: State = {}
        self.arriving: State = {}
        self.narrows = all(len(free.values[node.name]) == energy.batch for node in energy.graph.states)
        """Whether examples can be left out: the rows of every state are the examples."""

    def answer(self, x: Tensor, rows: Tensor | None, active: Tensor | None) -> Tensor:
        """The output of these rows (None: all) that follows their output error x."""
        graph = self.energy.graph
        saved = self.free.saved if rows is None else graph.rows(self.free.saved, rows)
        errors = self._errors(saved, x)
        tangents, arriving = graph.push(saved, errors)
        if rows is None:
            self.errors, self.arriving = errors, arriving
        else:
            for known, new in ((self.errors, errors), (self.arriving, arriving)):
                for name, value in new.items():
                    known[name].index_copy_(0, rows, value)
        free = self.energy.output(self.free)
        free = free if rows is None else free.index_select(0, rows)
        return free.add(tangents[graph.output], alpha=-self.energy.beta)

    def _errors(self, saved: dict[str, Any], x: Tensor) -> State:
        """The errors of all nodes that balance the output error x."""
        errors: State = {}
        output = self.energy.graph.output

        def transmit(node: Node, force: Tensor | None) -> Tensor | None:
            if node.name == output:
                force = x
            if node.owns_state:
                shape = self.free.values[node.name].shape[1:]
                errors[node.name] = x.new_zeros(len(x), *shape) if force is None else force
            return force

        self.energy.graph.pull(saved, None, transmit)
        return errors

    @property
    def point(self) -> Point:
        """Where the states are now."""
        return Moved(self)


class Moved(Point):
    """An affine graph after its states have followed the errors; what nobody asks for is not computed."""

    def __init__(self, response: Response):
        energy = response.energy
        self.graph, self.free, self.beta = energy.graph, response.free, energy.beta
        self.errors, self.arriving = dict(response.errors), dict(response.arriving)

    @cached_property
    def values(self) -> dict[str, Any]:  # type: ignore[override]
        """Of every node and input."""
        tangents, _ = self.graph.push(self.free.saved, self.errors)
        moved = {name: torch.add(self.free.values[name], t, alpha=-self.beta) for name, t in tangents.items()}
        return self.free.values | moved

    @cached_property
    def predictions(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Of every state: it is off by its error."""
        return {name: torch.add(self.values[name], error, alpha=self.beta) for name, error in self.errors.items()}

    @cached_property
    def saved(self) -> dict[str, Any]:  # type: ignore[override]
        """What `pull` and `contract` need."""
        saved = dict(self.free.saved)
        for node in self.graph.nodes:
            if node.name in self.arriving:
                saved[node.name] = node.moved(saved[node.name], self.arriving[node.name], -self.beta)
        return saved
