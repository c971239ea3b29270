"""Strictly local settling: nodes answer their neighbours, and nothing surveys the network.

A node holds its state `s_n`, its prediction `mu_n` and its scaled error `delta_n = (mu_n - s_n) / beta`. It sees its
parents' states and its children's forces `J_c^T delta_c`, nothing else, and it has something to do when

    a parent's state has moved                             then it predicts anew
    |delta_n - sum_c J_c^T delta_c| > tol (relative)       then delta_n <- sum_c J_c^T delta_c, per example

Both move `s_n = mu_n - beta delta_n`, which the neighbours notice. The output balances `dC/ds` in place of children, by
steps toward it of Barzilai and Borwein's length (`sweep.py`), which it has from its own last two turns. A node to
which neither happens is **quiet** and is not computed. At the free equilibrium all are quiet but the output. Once all
are quiet again each has certified its own balance: this is the nudged equilibrium to the tolerance, in whatever order
they acted.

Whittington and Bogacz 2017 (doi:10.1162/NECO_a_00949) relax the same energy by descent on the states.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mep.energy import Energy, NodeEnergy
from mep.errors import ArgumentError, one_of, require
from mep.graph import Point
from mep.graph.node import Node, expand_beta
from mep.layout import accurate
from mep.settle import Iterate, Solver, Start
from mep.solvers.cells import Cell, Network
from mep.solvers.networks.network import has_grown
from mep.solvers.networks.nonsmooth import worst_residual

Groups = Sequence[Sequence[Node]]
_GROWN = 3
"""The round after which the growth of errors is watched; most often all is settled before."""


def _shuffled(nodes: Sequence[Node], rounds: int) -> Groups:
    return [[node] for node in random.Random(rounds).sample(nodes, len(nodes))]


SCHEDULES: dict[str, Callable[[Sequence[Node], int], Groups]] = {
    "there and back": lambda nodes, _: [[node] for node in (*nodes, *reversed(nodes[:-1]))],
    "together": lambda nodes, _: [nodes],
    "forward": lambda nodes, _: [[node] for node in nodes],
    "backward": lambda nodes, _: [[node] for node in reversed(nodes)],
    "random": _shuffled,
}
"""Name -> who has a turn in a round: one group after another, those of a group at once."""


@dataclass(frozen=True)
class Local(Solver):
    """Nodes that act on what they see of their neighbours, until all are quiet.

    Args:
        settle_steps: the largest number of rounds, or with `adaptive=False` the exact one. In a round every node has a
            turn, and takes it if it has something to do.
        tol: relative residual up to which a node is quiet.
        patience: consecutive rounds in which all are quiet.
        adaptive: stop when all are quiet.
        schedule: the order of the turns: "there and back", "forward", "backward" or "random", one node after another,
            or "together", all at once. The equilibrium is the same.

    Only for `energy="prediction"`.

    Example:
        >>> Local(tol=1e-3, schedule="together").settle_steps
        200
    """

    settle_steps: int = 200
    tol: float = 1e-2
    patience: int = 1
    adaptive: bool = True
    schedule: str = "there and back"

    carries_errors = True

    def check(self, node_energy: NodeEnergy) -> None:
        if not node_energy.is_quadratic:
            raise ArgumentError(
                f"{type(self).__name__} does not settle energy={node_energy.name!r}: it works with the errors mu - s. "
                "Use solver=mep.Descent(...)."
            )

    def __post_init__(self) -> None:
        super().__post_init__()
        require("Local", "schedule", self.schedule, *one_of(SCHEDULES))

    def init(self, energy: Energy, point: Point, start: Start) -> Iterate:
        """The free equilibrium: only the output is active."""
        self.check(energy.node_energy)
        if energy.kinks:
            raise ArgumentError(
                f"Local cannot rest at the kinks of {list(energy.kinks)} (branches='exact'). Use branches='held', or "
                "solver=mep.Sweep(...)."
            )
        x = start.response.error if start.response else energy.wanted_error(point)
        unanswered = x.new_ones(energy.batch, dtype=accurate(x))
        quiet, cells = torch.zeros_like(unanswered), {}
        for node in energy.graph.nodes:
            mu, residual = point.predictions.get(node.name), unanswered if node.name == energy.graph.output else quiet
            cells[node.name] = Cell(point.values[node.name], mu, point.saved[node.name], residual)
        network = Network(cells, first=x, r=x, length=torch.ones_like(unanswered))
        return Iterate(unanswered, point, exact=False, state=network)

    def step(self, energy: Energy, iterate: Iterate, active: Tensor | None) -> Iterate:
        """One round. `active` is not needed: in an example at rest no node has anything to do."""
        network: Network = iterate.state.copy()
        for group in SCHEDULES[self.schedule](energy.graph.nodes, network.rounds):
            # Those of a group act on one and the same past: first all actions, then all consequences.
            acted = [(node, network.turn(energy, node, self.tol)) for node in group if network.calls(energy, node)]
            for node, _ in acted:
                network.stale.discard(node.name)
                network.mail.discard(node.name)
            for node, cell in acted:
                network.tell(energy, node, cell, self.tol)
        network.rounds += 1
        diverging = False
        if network.rounds >= _GROWN:
            size = network.largest_error(energy)
            if network.first_size is None:
                network.first_size = size
            diverging = bool(has_grown(size, network.first_size).any())
        residual = network.residual(energy)
        return replace(iterate, residual=residual, turns=network.turns, diverging=diverging, state=network)

    def finalize(self, energy: Energy, iterate: Iterate) -> Iterate:
        """The point and its errors. Where settling was cut short, also what the nodes have not yet seen themselves."""
        network: Network = iterate.state
        if network.rounds == 0:
            return iterate
        point, errors = network.gathered(energy)
        if not network.has_news:
            return replace(iterate, point=point, errors=errors, exact=True)
        now = energy.at(energy.state(point))
        errors = {
            name: e + (mu - point.predictions[name]) / expand_beta(energy.beta, mu)
            for (name, e), mu in zip(errors.items(), (now.predictions[name] for name in errors), strict=True)
        }
        return replace(iterate, point=now, errors=errors, residual=worst_residual(energy, now, errors), exact=True)
