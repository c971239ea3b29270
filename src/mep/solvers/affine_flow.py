"""Descent on an affine graph, through its constant Jacobians: nothing is evaluated anew (`response.py` says which).

    t_n     = (free_n - s_n) / beta                how far a state has moved
    delta_n = t_n - sum_p J_p t_p                  its scaled error, as the states below have moved its prediction
    force_n = delta_n - sum_c J_c^T delta_c        less dC/ds at the output

In the unit `-beta` this is descent on the states, to rounding and without its cancellation: t is of order 1 for every
beta. One product with each weight forward and one back is nearly all that a step costs (`links.py`).
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from mep.energy import Energy, State, example_norm, relative_residual, rounding
from mep.graph import Point
from mep.layout import layout, per_example
from mep.nodes import Node, displaced
from mep.solvers.flow import Flow
from mep.solvers.links import Branches, Place, linked, only_reader
from mep.solvers.response import Moved


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
    `Graph.push`). For a state in `through`, z stands in the place of t (`links.py`).

    Args:
        energy: nudged, of an affine graph.
        free: its free equilibrium.
        errors: scaled errors to begin with, or None to begin at rest.
    """

    def __init__(self, energy: Energy, free: Point, errors: State | None):
        self.energy, self.free = energy, free
        graph, states = energy.graph, energy.graph.states[::-1]
        readers = {node.name: reader for node in states if (reader := only_reader(graph, node))}
        branches = {n: Branches(reader, free.saved[reader.name], free.values[n]) for n, reader in readers.items()}
        at_rest = [node.name for node in states if node.clamped and node.name in readers and errors is None]
        self.through = {name: branches[name] for name in at_rest if branches[name].are_apart}
        seen = {name: own.seen for name, own in self.through.items()}
        self._make_room({node.name: seen.get(node.name, free.values[node.name]) for node in states})
        self.saved, links = dict(free.saved), dict[str, Node]()
        for name, reader in readers.items():
            places = self.places[reader.name], self.places[name]
            links[reader.name], self.saved[reader.name] = linked(branches[name], *places, name in self.through)
        self.nodes = [links.get(node.name, node) for node in graph.nodes]
        self.ahead = [node for node in self.nodes if not node.clamped]
        self.reached, self.new = 0, list[str]()
        self.force: State = {}
        self.delta: State = {}
        self.arriving: State = {}
        self.shift: State = {}
        if errors is not None:
            tangents, _ = graph.push(free.saved, errors)
            self.shift = {name: place.t.copy_(tangents[name]) for name, place in self.places.items()}
            self.delta = {node.name: self.places[node.name].delta for node in states if node.clamped}
        self._look()

    def _make_room(self, like: State) -> None:
        """Four rows, and what belongs to each state."""
        sizes = [s.numel() for s in like.values()]
        self.ends = dict(zip(like, accumulate(sizes), strict=True))
        self.rows = self.energy.output(self.free).new_zeros(4, sum(sizes)).unbind()
        self.places = {}
        for (name, s), *pieces in zip(like.items(), *(row.split(sizes) for row in self.rows), strict=True):
            t, velocity, force, delta = (_shaped(piece, s) for piece in pieces)
            is_clamped = self.energy.graph.by_name[name].clamped
            self.places[name] = Place(t, velocity, force, t if is_clamped else delta)

    def step(self, lr: float, momentum: float, active: Tensor | None) -> None:
        t, v, force = self.live
        v.lerp_(force, 1 - momentum)
        size = lr / (1 - momentum)
        if active is None:
            t.sub_(v, alpha=size)
        else:
            for place in map(self.places.__getitem__, self.force):
                v = place.velocity
                place.t.sub_(torch.where(per_example(active, v), v, 0), alpha=size)
        while self.new:
            name = self.new.pop()
            self.shift[name] = self.places[name].t
            if self.energy.graph.by_name[name].clamped:
                self.delta[name] = self.places[name].delta
        self._look()

    def forces(self) -> State:
        return {name: self._as_felt(name, force) for name, force in self.force.items()}

    def residual(self) -> Tensor:
        """In the unit of the forces."""
        batch, beta, found = self.energy.batch, self.energy.beta, []
        for name, force in self.forces().items():
            delta = self._as_felt(name, self.places[name].delta)
            state = self.through[name].seen if name in self.through else self._value(name)
            found.append(relative_residual(delta, delta - force, state / beta, batch))
        nudged, output = example_norm(self.gradient * beta, batch), self._value(self.energy.graph.output)
        return torch.stack(found).amax(0) * (nudged > 10 * rounding(output, batch))

    def ended(self) -> tuple[Point, State | None]:
        errors = {
            name: self.through[name].pull(place.delta) if name in self.through else place.delta
            for name, place in self.places.items()
        }
        return Moved(self.energy, self.free, errors, self.arriving), errors

    def _look(self) -> None:
        """The deltas and forces where the states stand now."""
        for node in self.ahead:
            name = node.name
            shifts = [t for parent in node.parents if (t := self.shift.get(parent)) is not None]
            if shifts:
                predicted, arriving = node.push(self.saved[name], shifts)
                assert predicted is not None
                if arriving is not None:
                    self.arriving[name] = arriving
                if node.owns_state:
                    place = self.places[name]
                    is_delta = predicted is place.delta
                    self.delta[name] = predicted if is_delta else torch.sub(place.t, predicted, out=place.delta)
                else:
                    self.shift[name] = predicted
            elif name in self.shift:
                self.delta[name] = self.places[name].delta.copy_(self.shift[name])
        energy = self.energy
        assert energy.nudge is not None
        self.gradient = energy.nudge.cost.gradient(self._value(energy.graph.output))
        energy.graph.pull_through(self.nodes, self.saved, {energy.graph.output: self.gradient}, self._transmit)

    def _transmit(self, node: Node, pull: Tensor | None) -> Tensor | None:
        """Note the force on a state, and hand its delta on."""
        if not node.owns_state:
            return pull
        name = node.name
        delta = self.delta.get(name)
        if pull is None and delta is None:
            return None
        place = self.places[name]
        if name not in self.force:
            self.force[name] = place.force
            self.new.append(name)
            self.reached = max(self.reached, self.ends[name])
            self.live = [row[: self.reached] for row in self.rows[:3]]
        if pull is None:
            place.force.copy_(place.delta)
        elif pull is not place.force:
            torch.sub(place.delta, pull, out=place.force)
        return delta

    def _as_felt(self, name: str, z: Tensor) -> Tensor:
        """With the norm that `B^T z` has."""
        return z * self.through[name].slopes if name in self.through else z

    def _value(self, name: str) -> Tensor:
        """Of a node that is not in `through`."""
        free, shift = self.free.values[name], self.shift.get(name)
        return free if shift is None else displaced(free, shift, self.energy.beta)


def _shaped(piece: Tensor, like: Tensor) -> Tensor:
    """Memory as a tensor of that shape and layout."""
    if layout(like) is torch.channels_last:
        batch, channels, height, width = like.shape
        return piece.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return piece.view(like.shape)
