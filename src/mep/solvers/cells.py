"""What the nodes of a strictly local network hold, and what they make of their neighbourhood; see `local.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mep.energy import Energy, State, example_dot, example_norm, relative_residual
from mep.graph import Point
from mep.graph.node import Node, state_from_error
from mep.layout import per_example
from mep.solvers.networks.network import output_residual, spread_length
from mep.solvers.sweep import barzilai_borwein


@dataclass(frozen=True)
class Cell:
    """What a node holds: its state, prediction and scaled error, and what its `vjp` needs.

    `error` is None before a force arrived. In a junction, which owns no state, it is the force that it relays.
    `residual` is that of its last turn, 0 where it has balanced itself since: [batch].
    """

    value: Any
    prediction: Any
    saved: Any
    residual: Tensor
    error: Tensor | None = None


def predict(energy: Energy, node: Node, cell: Cell, values: Mapping[str, Any]) -> Cell:
    """The parents have moved: a new prediction from their `values`, and the state follows with its error."""
    mu, saved = energy.graph.predict(node, values, energy.context)
    if not node.owns_state:
        return replace(cell, value=mu, saved=saved)
    s = mu if cell.error is None else state_from_error(mu, cell.error, energy.beta)
    return replace(cell, value=s, prediction=mu, saved=saved)


def balance(energy: Energy, node: Node, cell: Cell, force: Tensor, tol: float) -> Cell:
    """The children's `force` has changed: where it and the error differ by more than `tol`, the error becomes it."""
    if not node.owns_state:
        return replace(cell, error=force)
    if cell.error is None:
        return _with_error(energy, cell, force)
    residual = relative_residual(cell.error, force, energy.batch)
    loud = ~(residual <= tol)  # what is no number is loud, too
    if not loud.any():
        return replace(cell, residual=residual)
    error = torch.where(per_example(loud, force), force, cell.error)
    return replace(_with_error(energy, cell, error), residual=residual.masked_fill_(loud, 0))


def _with_error(energy: Energy, cell: Cell, error: Tensor) -> Cell:
    return replace(cell, error=error, value=state_from_error(cell.prediction, error, energy.beta))


@dataclass
class Network:
    """The cells, and what has happened around them since their last turn.

    `stale`: nodes with a parent that moved; `mail`: nodes with a child whose force changed; `asking`: the output has
    not yet seen what its last error did. `messages`: child -> its forces on its parents, absent where out of date: a
    parent asks for them. `turns`: how often each node was computed. `first`: the output's first error; `r`: by how much
    dC/ds differed from its error at its last turn, and the `length` of its last step, [batch]; `first_size`: that of
    the largest errors after three rounds.
    """

    cells: dict[str, Cell]
    first: Tensor
    r: Tensor
    length: Tensor
    first_size: Tensor | None = None
    messages: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    stale: set[str] = field(default_factory=set)
    mail: set[str] = field(default_factory=set)
    turns: Counter[str] = field(default_factory=Counter)
    asking: bool = True
    rounds: int = 0

    def copy(self) -> Network:
        """Independent of this one; cells and messages are never changed, only replaced."""
        cells, messages, turns = dict(self.cells), dict(self.messages), Counter(self.turns)
        return replace(self, cells=cells, messages=messages, turns=turns, stale=set(self.stale), mail=set(self.mail))

    @property
    def has_news(self) -> bool:
        """Whether anyone has something to do."""
        return bool(self.asking or self.stale or self.mail)

    def calls(self, energy: Energy, node: Node) -> bool:
        """Whether this node has something to do."""
        return node.name in self.stale or node.name in self.mail or (self.asking and node.name == energy.graph.output)

    def turn(self, energy: Energy, node: Node, tol: float) -> Cell:
        """What the node makes of its neighbourhood."""
        cell = self.cells[node.name]
        if node.name in self.stale:
            values = {p: self.cells[p].value if p in self.cells else energy.inputs[p] for p in node.parents}
            cell = predict(energy, node, cell, values)
        if node.name == energy.graph.output:
            return self._ask(energy, cell, tol)
        return balance(energy, node, cell, self._force(energy, node), tol) if node.name in self.mail else cell

    def tell(self, energy: Energy, node: Node, cell: Cell, tol: float) -> None:
        """Take over what the node did, and let those know whom it concerns."""
        before, self.cells[node.name] = self.cells[node.name], cell
        self.turns[node.name] += 1
        if cell.value is not before.value:
            self.stale.update(reader.name for reader in energy.graph.readers[node.name])
        bends = cell.saved is not before.saved and not (energy.context.freeze_branches and node.is_affine_when_held)
        if cell.error is not None and (cell.error is not before.error or bends):
            self.messages.pop(node.name, None)
            self.mail.update(p for p, flows in zip(node.parents, node.flows, strict=True) if flows)
        if node.name == energy.graph.output:
            self.asking = not bool((cell.residual <= tol).all())

    def largest_error(self, energy: Energy) -> Tensor:
        """The norm of the largest errors of a node, [batch]."""
        errors = [self.cells[node.name].error for node in energy.graph.states]
        return torch.stack([example_norm(error, energy.batch) for error in errors if error is not None]).amax(0)

    def residual(self, energy: Energy) -> Tensor:
        """What the nodes say. While one has yet to look at its neighbours nobody knows, and 1 stands for that."""
        if self.stale or self.mail:
            return torch.ones_like(self.cells[energy.graph.output].residual)
        return torch.stack([cell.residual for cell in self.cells.values()]).amax(0)

    def gathered(self, energy: Energy) -> tuple[Point, State]:
        """The cells as a point, and their errors."""
        cells, states = self.cells, [node.name for node in energy.graph.states]
        values = {**energy.inputs, **{name: cell.value for name, cell in cells.items()}}
        predictions = {name: cells[name].prediction for name in states}
        errors = {name: _or_zeros(cells[name].error, predictions[name]) for name in states}
        return Point(values, predictions, {name: cell.saved for name, cell in cells.items()}), errors

    def _force(self, energy: Energy, node: Node) -> Tensor:
        """The sum of the children's forces on the node."""
        total: Tensor | None = None
        for child in energy.graph.readers[node.name]:
            cell = self.cells[child.name]
            if cell.error is None:
                continue
            if child.name not in self.messages:
                forces = zip(child.parents, child.vjp(cell.saved, cell.error), strict=True)
                self.messages[child.name] = {parent: force for parent, force in forces if force is not None}
            force = self.messages[child.name].get(node.name)
            if force is not None:
                total = force if total is None else total + force
        return _or_zeros(total, self.cells[node.name].value)

    def _ask(self, energy: Energy, cell: Cell, tol: float) -> Cell:
        """The output's turn: its error moves toward `dC/ds`, by Barzilai and Borwein's length from its last turns."""
        if cell.error is None:
            return _with_error(energy, cell, self.first)
        nudge, error, batch = energy.nudge, cell.error, energy.batch
        assert nudge is not None
        wanted = nudge.cost.gradient(cell.value)
        residual = output_residual(error, wanted)
        loud = ~(residual <= tol)
        if not loud.any():
            return replace(cell, residual=residual)
        r = torch.where(per_example(loud, error), wanted - error, self.r)
        y = self.r - r
        length = barzilai_borwein(self.length, example_dot(self.r, y, batch), example_dot(y, y, batch))
        self.length = torch.where(loud, length, self.length)
        self.r = r
        moved = torch.where(per_example(loud, error), error + r * spread_length(self.length, r), error)
        return replace(_with_error(energy, cell, moved), residual=residual)


def _or_zeros(tensor: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tensor is None else tensor
