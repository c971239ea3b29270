"""How an affine graph answers an output error in little memory: what a sweep needs is computed again, part by part.

The equations are those of `response.py`. Nothing is kept but the output error x; everything else follows from it and
the input, a part of the nodes (in topological order) at a time:

    forward over the parts, noting the values where each begins
    backward over the parts, noting the forces where each ends, while the values that are done with are dropped
    forward over the parts: with the values where it begins and the forces where it ends, each has its states and errors

and what is a part in this is walked in the same way, down to a few nodes. With k parts of k parts of k of N nodes,
`k = N^(1/3)`, at most `2 k` values and forces are noted, and the inputs and errors of k nodes held: O(N^(1/3)). A sweep
takes up to six products with each weight forward, three backward and one to push; the contrast is one sweep more.
On such recursions: Griewank and Walther 2000, doi:10.1145/347837.347846.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from mep.energy import Energy, State
from mep.errors import ArgumentError
from mep.graph import Point
from mep.layout import per_example
from mep.nodes import Held, Node, Strength, displaced, of_rows
from mep.solvers.gram import Gram, in_parts
from mep.solvers.output import Answer
from mep.solvers.response import OnDemand, multiplications
from mep.solvers.strength import limited

Forces = dict[str, Tensor | None]
Visit = tuple[Node, Any, Tensor | None]
"""A node, what its `contract` needs at the nudged equilibrium, and its error."""


class Forgotten(Point):
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


class Checkpointed:
    """The output error of the last sweep, and walks that tell the rest. `free` is what `Forgotten` left."""

    def __init__(self, energy: Energy, free: Point, most: Strength | None = None):
        self.energy, self.free, self.most = energy, free, most
        self.parts = max(2, round(len(energy.graph.nodes) ** (1 / 3)))
        self.narrows = self.weakens = len([value for value in energy.inputs.values() if isinstance(value, Tensor)]) == 1

    def answer(self, x: Tensor, rows: Tensor | None, active: Tensor | None) -> Answer:
        """What follows the output error x of these rows (None: all)."""
        free = self.energy.output(self.free)
        if rows is None:
            self._set(x)
            (moved, self.work), factor = self._moved(), None
            if self.narrows and self.most is not None:
                self.energy, factor = limited(self.energy, x, moved, self.most)
            self.most = None
            return Answer(x, displaced(free, moved, self.energy.beta), factor)
        self._set(self.x.index_copy(0, rows, x))
        moved, _ = self._of(rows, x)._moved()
        return Answer(x, displaced(free.index_select(0, rows), moved, of_rows(self.energy.beta, rows)))

    def gains(self, rows: Tensor) -> Tensor:
        """As `Response.gains`."""
        return in_parts(self._gains, rows, self.energy.output(self.free))

    def _gains(self, rows: Tensor) -> Tensor:
        total = Gram(self.energy.output(self.free), len(rows))
        for node, _, error in self._of(rows.repeat_interleave(total.units), total.every).walk({}):
            if node.owns_state and error is not None:
                total.add(error)
        return total.sum

    def _of(self, rows: Tensor, x: Tensor) -> Checkpointed:
        """The walks of some of the examples, with these output errors."""
        inputs = {
            name: value.index_select(0, rows) if isinstance(value, Tensor) else value
            for name, value in self.energy.inputs.items()
        }
        assert self.energy.nudge is not None
        nudge = replace(self.energy.nudge, beta=of_rows(self.energy.beta, rows))
        energy = replace(self.energy, inputs=inputs, batch=len(rows), held=Held(), nudge=nudge)
        some = Checkpointed(energy, self.free)
        some._set(x)
        return some

    def _set(self, x: Tensor) -> None:
        self.x, self._cursor = x, _Cursor(self)

    def _moved(self) -> tuple[Tensor, int]:
        """How far the output moves, over `-beta`; and the multiplications that took."""
        tangents: State = {}
        work = sum(multiplications(node, error) for node, _, error in self.walk(tangents))
        return tangents[self.energy.graph.output], work

    def rescale(self, a: Tensor, rows: Tensor | None) -> None:
        """As if the output errors of these rows (None: all), just answered, had been `a` times as large."""
        if rows is not None:
            a = a.new_ones(len(self.x)).index_copy(0, rows, a)
        self._set(self.x * per_example(a, self.x))

    @property
    def point(self) -> Point:
        """Where the states are now: what `contract` needs, for the nodes in their order."""
        return Point(self.free.values, {}, OnDemand(self.energy.graph.by_name, lambda name: self._cursor.at(name)[1]))

    @property
    def errors(self) -> Any:
        """The errors, for the nodes in their order."""
        return OnDemand(self.energy.graph.by_name, lambda name: self._cursor.at(name)[2])

    def walk(self, tangents: State) -> Iterator[Visit]:
        """Visit the nodes in their order; `tangents` is filled with those that nobody has read."""
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
            self.energy.graph.pull_through(nodes, saved, forces, self._transmit)
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

        graph.pull_through(nodes, saved, forces, transmit)
        for node in nodes:
            own = saved.pop(node.name)
            h = graph.push_through(node, own, errors, tangents, forget=True)
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


class _Cursor:
    """The visits of one walk by name; whoever goes back begins a new walk."""

    def __init__(self, answers: Checkpointed):
        self.answers = answers
        self.place = {node.name: i for i, node in enumerate(answers.energy.graph.nodes)}
        self.visits: Iterator[Visit] = iter(())
        self.latest: Visit | None = None

    def at(self, name: str) -> Visit:
        """What belongs to that node."""
        if self.latest is None or self.place[name] < self.place[self.latest[0].name]:
            self.visits = self.answers.walk({})
            self.latest = next(self.visits)
        while self.latest[0].name != name:
            self.latest = None  # before the next is made
            self.latest = next(self.visits)
        return self.latest


def _forward(energy: Energy, nodes: Sequence[Node], values: dict[str, Any]) -> dict[str, Any]:
    """What `pull` and `push` need of these nodes; `values` become those where they end."""
    saved: dict[str, Any] = {}
    for node in nodes:
        values[node.name], saved[node.name] = node.evaluate([values[p] for p in node.parents], energy.held)
        energy.held.branches.clear()  # they are those of the free equilibrium, each time they are asked for
        for name in energy.graph.last_read[node.name]:
            del values[name]
    return saved


def _skip(energy: Energy, nodes: Sequence[Node], values: dict[str, Any]) -> None:
    for node in nodes:
        _forward(energy, [node], values)
