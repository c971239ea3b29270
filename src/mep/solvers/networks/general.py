"""Any graph: the errors of all states are the unknowns, and a sweep evaluates the graph anew.

    s_n = mu_n - beta delta_n                                          walk forward, injecting the errors
    S_out = dC/ds_out,   S_n = sum_c J_c^T S_c   at these states       walk backward, collecting new ones
    r = S - delta                                                      step and residual of every node at once

Examples that have settled are left out where the graph can be evaluated for the others alone; the rest are *in play*.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mep.energy import Energy, State, example_dot, example_norm
from mep.graph import Point
from mep.layout import replace_rows_, select_examples
from mep.settle import Response
from mep.solvers.networks import Network, are_independent, length_by_gain, spread_length

_SAME = 1e-3
"""Values that agree to this fraction count as equal: sums over another number of rows are rounded differently."""


class GeneralNetwork(Network):
    """The errors delta and the residual r of the examples in play, and the point where their states are.

    Attributes:
        energy_in_play: the energy of the examples in play.
        now: the point of the examples in play.
        delta, r: their errors (empty at the free point, where all are zero) and the residual.
        moved: what the last move added to delta, `length r` with the r before it.
        length: that of the last move, [in play] or one for the group.
        largest: the norm of the largest errors of a node, [in play]; `largest_at_first`, [batch], after the first move.
        all_now, all_errors: those of the whole batch, where the examples in play are written before others are left out
            and at the end.
    """

    def __init__(self, energy: Energy, free: Point, response: Response):
        super().__init__(energy, free, response)
        assert response.errors is not None
        self.is_coupled = not are_independent(energy, free)
        self.energy_in_play = energy
        self.now = self.all_now = free
        self.delta: State = {}
        self.all_errors: State = {}
        self.r: State = response.errors
        self.moved: State = {}
        self.length = self.largest = self.largest_at_first = self.residual

    def error_size(self) -> Tensor:
        return self.largest

    def first_size(self) -> Tensor:
        return self.largest_at_first

    def first_move(self, tol: float, may_stop: bool) -> Tensor:
        a = length_by_gain(self.energy, self.free, self.response, self.is_coupled)
        self.move(a)
        self.largest_at_first = self.largest
        return a

    def products(self) -> tuple[Tensor, Tensor]:
        """`<y, r>` and `<y, y>`, with y the decrease of r: the shorter of the two lengths of Barzilai and Borwein."""
        along, square, batch = [], [], self.energy_in_play.batch
        for name, moved in self.moved.items():
            r = moved / spread_length(self.length, moved)  # as it was before the last move
            y = r - self.r[name]
            along.append(example_dot(y, r, batch))
            square.append(example_dot(y, y, batch))
        sums = torch.stack([torch.stack(along), torch.stack(square)]).sum(1)
        numerator, denominator = sums.sum(1) if self.is_coupled else sums
        return numerator, denominator

    def move(self, a: Tensor) -> None:
        """One sweep. Each tensor is dropped as soon as it is used: that decides how much memory a step needs."""
        energy, self.length = self.energy_in_play, a

        # delta <- delta + a r
        def scaled(r: Tensor) -> Tensor:
            return r * spread_length(a, r)

        self.moved = {name: scaled(self.r.pop(name)) for name in list(self.r)}
        if self.delta:
            self.delta = {name: self.delta.pop(name) + moved for name, moved in self.moved.items()}
        else:
            self.delta = dict(self.moved)

        # Forward, the states that follow the errors; the last point is dropped before there is a new one.
        self.now = self.free
        if self.rows is None:
            self.all_now, self.all_errors = self.free, self.delta
        self.now = energy.at_errors(self.delta)

        # Backward, S; then r = S - delta, and per node |r|, |S|, |delta|.
        swept = energy.errors_back(self.now.saved, energy.wanted_error(self.now), self.now.predictions)
        norms = []
        for name, delta in self.delta.items():
            S = swept.pop(name)
            self.r[name] = S - delta
            norms.append(torch.stack([example_norm(t, energy.batch) for t in (self.r[name], S, delta)]))
        violated, one, two = torch.stack(norms, 1)
        self.largest = two.amax(0)
        # A node at which nothing but rounding arrives has nothing to balance.
        idle = torch.maximum(one, two) <= 100 * torch.finfo(delta.dtype).eps * self.largest
        violated = violated.masked_fill(idle, 0)
        self.note((violated / torch.maximum(one, two).add_(torch.finfo(violated.dtype).tiny)).amax(0))
        if self.rows is None:
            self.all_now = self.now

    def narrow(self, active: Tensor) -> Tensor | None:
        """Leave out examples once at most half are active: to put all together again costs up to a walk."""
        if self.is_coupled or not self._can_select() or (found := self.remaining(active)) is None:
            return None
        rows, picked = found
        if 2 * len(rows) > self.energy_in_play.batch:
            return None
        self._put_back()
        batch, self.rows = self.energy_in_play.batch, rows
        self.delta, self.r, self.moved = (
            {name: select_examples(t, picked, batch) for name, t in state.items()}
            for state in (self.delta, self.r, self.moved)
        )
        self.length = self.length.index_select(0, picked)
        self.energy_in_play = self.energy.select(rows)
        return picked

    def result(self) -> tuple[Point, Mapping[str, Tensor]]:
        self._put_back()
        if self.rows is not None and not self._can_replace_rows:
            self.all_now = self.energy.at_errors(self.all_errors)
        return self.all_now, self.all_errors

    @property
    def _can_replace_rows(self) -> bool:
        return all(node.clamped or node.can_replace_rows for node in self.energy.graph.nodes)

    def _put_back(self) -> None:
        """Write the errors and the point of the examples in play into those of the whole batch."""
        if self.rows is None:
            return
        rows, batch = self.rows, self.energy.batch
        for name, delta in self.delta.items():
            replace_rows_(self.all_errors[name], delta, rows, batch)
        if not self._can_replace_rows:
            return
        for node in self.energy.graph.nodes:
            if not node.clamped:
                replace_rows_(self.all_now.saved[node.name], self.now.saved[node.name], rows, batch)
            if node.owns_state:
                for whole, some in (
                    (self.all_now.values, self.now.values),
                    (self.all_now.predictions, self.now.predictions),
                ):
                    replace_rows_(whole[node.name], some[node.name], rows, batch)

    def _can_select(self) -> bool:
        """Whether examples have the same values alone as among all; tried once for a graph and batch size."""
        energy, nudge, found = self.energy, self.energy.nudge, self.energy.graph.selects
        assert nudge is not None
        if not nudge.cost.narrows or energy.context.noise or energy.batch == 1:
            return False
        if energy.batch not in found:
            found[energy.batch] = _evaluates_some(energy, self.free)
        return found[energy.batch]


def _evaluates_some(energy: Energy, free: Point) -> bool:
    if any(node.runs_foreign_code for node in energy.graph.nodes):
        return False  # one try proves nothing: its control flow may depend on the other examples
    rows = torch.arange(0, energy.batch, 2, device=energy.output(free).device)
    states = [*free.predictions.values(), *energy.context.branches.values()]
    if any(t.ndim == 0 or len(t) % energy.batch for t in states):
        return False
    try:
        some = energy.select(rows).free_point().predictions
    except Exception:  # anything that a model made for one batch size may raise
        return False
    expected = {name: select_examples(mu, rows, energy.batch) for name, mu in free.predictions.items()}
    return all(
        mu.shape == some[name].shape and bool((some[name] - mu).norm() <= _SAME * mu.norm())
        for name, mu in expected.items()
    )
