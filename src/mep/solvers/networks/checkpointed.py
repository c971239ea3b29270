"""Affine graphs in little memory: only the output error x is kept, everything else is recomputed part by part.

The equations are those of `affine.py`: errors walk backward from x, `delta_n = sum_c J_c^T delta_c`, and tangents t
forward, `t_n = delta_n + sum_p J_p t_p`. A *part* is a run of nodes in topological order. With k parts,

    1. forward over the parts, keeping the values where each begins
    2. backward over the parts, keeping the forces where each ends, and dropping the values that are done with
    3. forward over the parts: with the values where it begins and the forces where it ends, each part is walked in the
       same way, down to k nodes or fewer, of which states, errors and tangents are held at once

With k parts of k parts of k of N nodes, `k = N^(1/3)`, at most `2 k` values and forces are kept, and the inputs and
errors of k nodes: O(N^(1/3)). A sweep takes up to six products with each weight forward, three backward and one for the
tangents; the contrast is one sweep more. On such recursions: Griewank and Walther 2000, doi:10.1145/347837.347846.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from mep.energy import Energy, State
from mep.errors import ArgumentError
from mep.graph import Point
from mep.graph.node import Node, select_beta
from mep.graph.ops import StepContext
from mep.settle import Response
from mep.solvers.networks.affine import AffineNetwork, LazyMapping

Forces = dict[str, Tensor | None]
Visit = tuple[Node, Any, Tensor | None]
"""A node, what its `param_vjp` needs at the nudged equilibrium, and its error (None in a junction)."""


class CheckpointedPoint(Point):
    """The free equilibrium, of which only the input and the output are kept."""

    def __init__(self, energy: Energy):
        curved = [node.name for node in energy.graph.nodes if not (node.clamped or node.is_affine_when_held)]
        if not energy.is_affine:
            raise ArgumentError(
                f"checkpoint=True: the Jacobian of {curved[:3]} changes with the state, so that a sweep needs the last "
                "states, which cannot be computed again. Leave checkpoint out, or use linear layers, convolutions, "
                "pooling and piecewise-linear activations."
            )
        values = dict(energy.inputs)
        _skip(energy, energy.graph.nodes, values)
        super().__init__(values, {}, {})


class CheckpointedNetwork(AffineNetwork):
    """Keeps the output errors of all examples only; states and other errors are recomputed when they are read."""

    _recomputed: Recomputed

    def note(self, residual: Tensor) -> None:
        """Every move ends here, with a new x."""
        super().note(residual)
        assert self.x is not None
        x = self.x if self.rows is None else self._recomputed.x.index_copy(0, self.rows, self.x)
        self._recomputed = Recomputed(self.energy, x)

    def result(self) -> tuple[Point, Mapping[str, Tensor]]:
        """What `param_vjp` needs and the errors, for the nodes in their order."""
        saved = LazyMapping(self.energy.graph.by_name, lambda name: self._recomputed.at(name)[1])
        errors = LazyMapping(self.energy.graph.by_name, lambda name: self._recomputed.at(name)[2])
        return Point(self.free.values, {}, saved), errors

    def _hold(self, response: Response) -> None:
        self._recomputed = Recomputed(self.energy, response.error)

    def _walk(self, x: Tensor) -> Tensor:
        energy, rows = self.energy, self.rows
        if rows is None:
            return Recomputed(energy, x).shift()
        inputs = {n: v.index_select(0, rows) if isinstance(v, Tensor) else v for n, v in energy.inputs.items()}
        assert energy.nudge is not None
        nudge = replace(energy.nudge, beta=select_beta(energy.beta, rows))
        return Recomputed(
            replace(energy, inputs=inputs, batch=len(rows), context=StepContext(), nudge=nudge), x
        ).shift()

    def _can_select(self) -> bool:
        """Not with several inputs: it is unknown which of them have the examples as rows."""
        return self.cost.narrows and len([v for v in self.energy.inputs.values() if isinstance(v, Tensor)]) == 1


class Recomputed:
    """All that follows from an output error x, recomputed on each access.

    `shift` and `at` are the interface. In the private methods `values` and `forces` hold what crosses the border of a
    part (name -> value, name -> force, None for none) and are changed in place as the walk moves on.
    """

    def __init__(self, energy: Energy, x: Tensor):
        self.energy, self.x = energy, x
        self.parts = max(2, round(len(energy.graph.nodes) ** (1 / 3)))
        self._place = {node.name: i for i, node in enumerate(energy.graph.nodes)}
        self._visits: Iterator[Visit] = iter(())
        self._latest: Visit | None = None

    def shift(self) -> Tensor:
        """The response of the output, `M x`: its tangent."""
        tangents: State = {}
        for _ in self._from_start(tangents):
            pass
        return tangents[self.energy.graph.output]

    def at(self, name: str) -> Visit:
        """The visit of one node. In topological order that is one walk; to go back, a new one is begun."""
        if self._latest is None or self._place[name] < self._place[self._latest[0].name]:
            self._visits = self._from_start({})
            self._latest = next(self._visits)
        while self._latest[0].name != name:
            self._latest = None  # freed before the next is computed
            self._latest = next(self._visits)
        return self._latest

    def _from_start(self, tangents: State) -> Iterator[Visit]:
        """Visit all nodes in their order; at the end `tangents` has those that no later node reads."""
        return self._walk(self.energy.graph.nodes, dict(self.energy.inputs), Forces(), tangents)

    def _walk(self, nodes: Sequence[Node], values: dict[str, Any], forces: Forces, tangents: State) -> Iterator[Visit]:
        """Visit these nodes, from the values where they begin and the forces where they end."""
        if len(nodes) <= self.parts:
            yield from self._visit(nodes, values, forces, tangents)
            return
        parts = self._split(nodes)
        starts, ends = self._starts(parts, values), []  # step 1
        for part in reversed(parts[1:]):  # step 2
            ends.append(dict(forces))
            self._pull_back(part, starts.pop(), forces)
        ends.append(forces)
        for part in parts:  # step 3
            yield from self._walk(part, values, ends.pop(), tangents)

    def _pull_back(self, nodes: Sequence[Node], values: dict[str, Any], forces: Forces) -> None:
        """Turn the forces where these nodes end into those where they begin; `values` are used up."""
        if len(nodes) <= self.parts:
            saved = _forward(self.energy, nodes, values)
            self.energy.graph.vjp_through(nodes, saved, forces, self._error_of)
            return
        parts = self._split(nodes)
        starts = [dict(values), *self._starts(parts, values)]
        values.clear()
        for part in reversed(parts):
            self._pull_back(part, starts.pop(), forces)

    def _visit(self, nodes: Sequence[Node], values: dict[str, Any], forces: Forces, tangents: State) -> Iterator[Visit]:
        """A few nodes: states forward, errors backward, tangents forward."""
        saved, errors, graph = _forward(self.energy, nodes, values), State(), self.energy.graph

        def transmit(node: Node, force: Tensor | None) -> Tensor | None:
            force = self._error_of(node, force)
            if node.owns_state:
                errors[node.name] = values[node.name].new_zeros(values[node.name].shape) if force is None else force
            return force

        graph.vjp_through(nodes, saved, forces, transmit)
        for node in nodes:
            own = saved.pop(node.name)
            _, moved = graph.jvp({node.name: own}, errors, True, [node], tangents)
            own = node.moved(own, moved[node.name], self.energy.beta) if moved else own
            yield node, own, errors.pop(node.name, None)

    def _error_of(self, node: Node, force: Tensor | None) -> Tensor | None:
        """The error of a node: the force that arrives there, and x at the output."""
        return self.x if node.name == self.energy.graph.output else force

    def _split(self, nodes: Sequence[Node]) -> list[Sequence[Node]]:
        size = -(-len(nodes) // self.parts)
        return [nodes[i : i + size] for i in range(0, len(nodes), size)]

    def _starts(self, parts: Sequence[Sequence[Node]], values: dict[str, Any]) -> list[dict[str, Any]]:
        """The values where each part but the first begins."""
        starts, ahead = [], dict(values)
        for part in parts[:-1]:
            _skip(self.energy, part, ahead)
            starts.append(dict(ahead))
        return starts


def _forward(energy: Energy, nodes: Sequence[Node], values: dict[str, Any]) -> dict[str, Any]:
    """What `vjp` and `jvp` need of these nodes; `values` become those where the nodes end."""
    saved: dict[str, Any] = {}
    for node in nodes:
        values[node.name], saved[node.name] = energy.graph.predict(node, values, energy.context)
        energy.context.branches.clear()  # every evaluation is at the free equilibrium, and finds the same ones
        for name in energy.graph.last_read[node.name]:
            del values[name]
    return saved


def _skip(energy: Energy, nodes: Sequence[Node], values: dict[str, Any]) -> None:
    """Move the values to where these nodes end, holding what one node needs at a time."""
    for node in nodes:
        _forward(energy, [node], values)
