"""Affine graphs in little memory: what a sweep needs is computed again, part by part.

The equations are those of `affine.py`. Only the output error x is kept; everything else follows from it and the input,
a part of the nodes (in topological order) at a time:

    forward over the parts, noting the values where each begins
    backward over the parts, noting the forces where each ends, while the values that are done with are dropped
    forward over the parts: with the values where it begins and the forces where it ends, each has its states and errors

and what is a part in this is walked in the same way, down to a few nodes. With k parts of k parts of k of N nodes,
`k = N^(1/3)`, at most `2 k` values and forces are noted, and the inputs and errors of k nodes held: O(N^(1/3)). A sweep
takes up to six products with each weight forward, three backward and one to push; the contrast is one sweep more.
On such recursions: Griewank and Walther 2000, doi:10.1145/347837.347846.
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
from mep.graph.step_context import StepContext
from mep.settle import Response
from mep.solvers.networks.affine import AffineNetwork, LazyMapping

Forces = dict[str, Tensor | None]
Visit = tuple[Node, Any, Tensor | None]
"""A node, what its `param_vjp` needs at the nudged equilibrium, and its error."""


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
    """The output errors of all examples; the states and the other errors are computed again when they are read."""

    _recomputed: Recomputed

    def note(self, residual: Tensor) -> None:
        """Every move ends here, with new output errors."""
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
        """With more inputs than one it is not known which of them have the examples as rows."""
        return self.cost.narrows and len([v for v in self.energy.inputs.values() if isinstance(v, Tensor)]) == 1


class Recomputed:
    """All that follows an output error x, computed again on each access."""

    def __init__(self, energy: Energy, x: Tensor):
        self.energy, self.x = energy, x
        self.parts = max(2, round(len(energy.graph.nodes) ** (1 / 3)))
        self._place = {node.name: i for i, node in enumerate(energy.graph.nodes)}
        self._visits: Iterator[Visit] = iter(())
        self._latest: Visit | None = None

    def shift(self) -> Tensor:
        """The response of the output, `M x`."""
        tangents: State = {}
        for _ in self.walk(tangents):
            pass
        return tangents[self.energy.graph.output]

    def at(self, name: str) -> Visit:
        """The visit of one node; to go back a new walk is begun."""
        if self._latest is None or self._place[name] < self._place[self._latest[0].name]:
            self._visits = self.walk({})
            self._latest = next(self._visits)
        while self._latest[0].name != name:
            self._latest = None  # before the next is made
            self._latest = next(self._visits)
        return self._latest

    def walk(self, tangents: State) -> Iterator[Visit]:
        """Visit the nodes in their order; `tangents` is filled with those that no later node reads."""
        values, forces = dict(self.energy.inputs), Forces()
        return self._walk(self.energy.graph.nodes, values, forces, tangents)

    def _walk(self, nodes: Sequence[Node], values: dict[str, Any], forces: Forces, tangents: State) -> Iterator[Visit]:
        """From the values where these nodes begin, which become those where they end, and the forces there."""
        if len(nodes) <= self.parts:
            yield from self._visit(nodes, values, forces, tangents)
            return
        parts = self._split(nodes)
        starts, ends = self._starts(parts, values), []
        for part in reversed(parts[1:]):
            ends.append(dict(forces))
            self._pull(part, starts.pop(), forces)
        ends.append(forces)
        for part in parts:
            yield from self._walk(part, values, ends.pop(), tangents)

    def _pull(self, nodes: Sequence[Node], values: dict[str, Any], forces: Forces) -> None:
        """Turn the forces where these nodes end into those where they begin."""
        if len(nodes) <= self.parts:
            saved = _forward(self.energy, nodes, values)
            self.energy.graph.vjp_through(nodes, saved, forces, self._transmit)
            return
        parts = self._split(nodes)
        starts = [dict(values), *self._starts(parts, values)]
        values.clear()
        for part in reversed(parts):
            self._pull(part, starts.pop(), forces)

    def _visit(self, nodes: Sequence[Node], values: dict[str, Any], forces: Forces, tangents: State) -> Iterator[Visit]:
        """A few nodes, of which all is held at once."""
        saved, errors, graph = _forward(self.energy, nodes, values), State(), self.energy.graph

        def transmit(node: Node, force: Tensor | None) -> Tensor | None:
            force = self._transmit(node, force)
            if node.owns_state:
                errors[node.name] = values[node.name].new_zeros(values[node.name].shape) if force is None else force
            return force

        graph.vjp_through(nodes, saved, forces, transmit)
        for node in nodes:
            own = saved.pop(node.name)
            h = graph.jvp_through(node, own, errors, tangents, forget=True)
            own = own if h is None else node.moved(own, h, self.energy.beta)
            yield node, own, errors.pop(node.name, None)

    def _transmit(self, node: Node, force: Tensor | None) -> Tensor | None:
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
    """What `vjp` and `jvp` need of these nodes; `values` become those where they end."""
    saved: dict[str, Any] = {}
    for node in nodes:
        values[node.name], saved[node.name] = energy.graph.predict(node, values, energy.context)
        energy.context.branches.clear()  # they are those of the free equilibrium, each time they are asked for
        for name in energy.graph.last_read[node.name]:
            del values[name]
    return saved


def _skip(energy: Energy, nodes: Sequence[Node], values: dict[str, Any]) -> None:
    for node in nodes:
        _forward(energy, [node], values)
