"""Any graph: the errors of all states are the unknowns, and a sweep evaluates the graph anew.

s_n = mu_n - beta delta_n                                          walk forward, injecting the errors
S_out = dC/ds_out,   S_n = sum_c J_c^T S_c   at these states       walk backward, collecting new ones
r = S - delta                                                      step and residual of every node at once
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mep.energy import Energy, State, example_dot, example_norm
from mep.graph import Point
from mep.layout import replace_rows_, select_examples
from mep.settle import Response
from mep.solvers.networks.network import Network, are_independent, length_by_gain, spread_length

_SAME = 1e-3
"""Values that agree to this fraction are the same: sums over another number of rows are rounded otherwise."""


class GeneralNetwork(Network):
    """The errors delta and the residual r of the examples in play, and the graph where their states are.

    Examples that have settled are left out where the graph can be evaluated for some of them alone. All errors, and the
    graph of all, wait in `all_errors` and `all_now`, where those in play are written at the end.
    """

    def __init__(self, energy: Energy, free: Point, response: Response):
        super().__init__(energy, free, response)
        assert response.errors is not None
        self.is_coupled = not are_independent(energy, free)
        self.in_play = energy
        """The energy of the examples in play."""
        self.now = self.all_now = free
        """The graph where the states are, of the examples in play and of all."""
        self.delta: State = {}
        """Empty at the free point, where every error is zero."""
        self.all_errors: State = {}
        self.r: State = response.errors
        self.moved: State = {}
        """What the last move added to delta: its length times the residual before."""
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
        """`<r, y>` and `<y, y>`, with y the change of r: the shorter of the two lengths of Barzilai and Borwein.

        r before the last move is what that moved by, over its length.
        """
        along, square = [], []
        for name, moved in self.moved.items():
            r = moved / spread_length(self.length, moved)
            y = r - self.r[name]
            along.append(example_dot(r, y, self.in_play.batch))
            square.append(example_dot(y, y, self.in_play.batch))
        sums = torch.stack([torch.stack(along), torch.stack(square)]).sum(1)
        numerator, denominator = sums.sum(1) if self.is_coupled else sums
        return numerator, denominator

    def move(self, a: Tensor) -> None:
        """What has been used is let go at once: that decides how much memory a step needs."""
        self.length = a
        self.moved = {name: r * spread_length(a, r) for name, r in self._emptied(self.r)}
        if self.delta:
            self.delta = {name: self.delta.pop(name) + moved for name, moved in self.moved.items()}
        else:
            self.delta = dict(self.moved)
        self.now = self.free
        if self.rows is None:
            self.all_now, self.all_errors = self.free, self.delta
        self.now = self.in_play.at_errors(self.delta)
        swept = self.in_play.errors_back(self.now.saved, self.in_play.wanted_error(self.now), self.now.predictions)
        norms = []
        for name, delta in self.delta.items():
            S = swept.pop(name)
            self.r[name] = S - delta
            norms.append(torch.stack([example_norm(t, self.in_play.batch) for t in (self.r[name], S, delta)]))
        violated, one, two = torch.stack(norms, 1)
        self.largest = two.amax(0)
        # A node at which nothing arrives but rounding has nothing to balance.
        idle = torch.maximum(one, two) <= 100 * torch.finfo(delta.dtype).eps * self.largest
        violated = violated.masked_fill(idle, 0)
        self.note((violated / torch.maximum(one, two).add_(torch.finfo(violated.dtype).tiny)).amax(0))
        if self.rows is None:
            self.all_now = self.now

    @staticmethod
    def _emptied(state: State) -> Iterator[tuple[str, Tensor]]:
        """All items, each of which is gone when the next is made."""
        for name in list(state):
            yield name, state.pop(name)

    def narrow(self, active: Tensor) -> Tensor | None:
        """Once at most half are active: to put all together again takes a walk, or some operations a node."""
        if self.is_coupled or not self._can_select() or (found := self.remaining(active)) is None:
            return None
        rows, picked = found
        if 2 * len(rows) > self.in_play.batch:
            return None
        self._put_back()
        batch, self.rows = self.in_play.batch, rows
        self.delta, self.r, self.moved = (
            {name: select_examples(t, picked, batch) for name, t in state.items()}
            for state in (self.delta, self.r, self.moved)
        )
        self.length = self.length.index_select(0, picked)
        self.in_play = self.energy.select(rows)
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
        """Write what belongs to the examples in play among all."""
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
        """Whether the graph evaluates some of the examples as it does all; tried once for a graph and size of batch."""
        energy, cost, known = self.energy, self.energy.nudge, self.energy.graph.selects
        assert cost is not None
        if not cost.cost.narrows or energy.context.noise or energy.batch == 1:
            return False
        if energy.batch not in known:
            known[energy.batch] = _evaluates_some(energy, self.free)
        return known[energy.batch]


def _evaluates_some(energy: Energy, free: Point) -> bool:
    if any(node.runs_foreign_code for node in energy.graph.nodes):
        return False  # one try is no proof: its control flow may depend on the other examples
    rows = torch.arange(0, energy.batch, 2, device=energy.output(free).device)
    states = [*free.predictions.values(), *energy.context.branches.values()]
    if any(t.ndim == 0 or len(t) % energy.batch for t in states):
        return False
    try:
        some = energy.select(rows).free_point().predictions
    except Exception:  # whatever a model raises that was made for one size of batch
        return False
    wanted = {name: select_examples(mu, rows, energy.batch) for name, mu in free.predictions.items()}
    return all(
        mu.shape == some[name].shape and bool((some[name] - mu).norm() <= _SAME * mu.norm())
        for name, mu in wanted.items()
    )
