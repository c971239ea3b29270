"""Strictly local settling: nodes answer their neighbours, and nothing surveys the network.

A node holds its state `s_n`, its prediction `mu_n` and its scaled error `delta_n = (mu_n - s_n) / beta`. It sees its
parents' states and its children's forces `J_c^T delta_c`, nothing else, and it has something to do when

    a parent's state has moved                             then it predicts anew
    |delta_n - sum_c J_c^T delta_c| > tol (relative)       then delta_n <- sum_c J_c^T delta_c, per example

Both move `s_n = mu_n - beta delta_n`, which the neighbours notice. The output balances `dC/ds` in place of children; it
knows the cost, and how its state answered its last error, so it takes a secant step. A node to which neither happens is
**quiet** and is not computed. At the free equilibrium all are quiet but the output. Once all are quiet again each has
certified its own balance: this is the nudged equilibrium to the tolerance, in whatever order they acted.

Whittington and Bogacz 2017 (doi:10.1162/NECO_a_00949) relax the same energy by descent on the states.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mep.energy import Energy
from mep.errors import ArgumentError
from mep.graph import Point
from mep.layout import accurate
from mep.nodes import Node
from mep.settle import Iterate, Known, Solver
from mep.solvers.cells import Cell, Network
from mep.solvers.output import first_error, require_prediction, wanted_error
from mep.solvers.walks import worst_residual

Groups = Sequence[Sequence[Node]]


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

    Only for `energy="prediction"`. When the equilibrium is out of reach the estimator tries a smaller beta.

    Example:
        >>> Local(tol=1e-3, schedule="together").settle_steps
        200
    """

    settle_steps: int = 200
    tol: float = 1e-2
    patience: int = 1
    adaptive: bool = True
    schedule: str = "there and back"

    usual_beta = 0.01  # errors are carried as such, not as differences of states: little bias, and no digits lost
    prediction_only = True
    beta_limited = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule not in SCHEDULES:
            raise ArgumentError(f"Local(schedule={self.schedule!r}): choose one of {list(SCHEDULES)}.")

    def start(self, energy: Energy, point: Point, known: Known) -> Iterate:
        """The free equilibrium: the output has a question, and nobody else has heard anything."""
        require_prediction(self, energy)
        if energy.kinks:
            raise ArgumentError(
                f"Local cannot rest at the kinks of {list(energy.kinks)} (branches='exact'). Use branches='held', or "
                "solver=mep.Sweep(...)."
            )
        free, nudge, question = energy.output(point), energy.nudge, wanted_error(energy, point)
        assert nudge is not None
        unanswered = free.new_ones(energy.batch, dtype=accurate(free))
        quiet, cells = torch.zeros_like(unanswered), {}
        for node in energy.graph.nodes:
            mu, residual = point.predictions.get(node.name), unanswered if node.name == energy.graph.output else quiet
            cells[node.name] = Cell(point.values[node.name], mu, point.saved[node.name], residual)
        first = first_error(energy, free, question, known)
        return Iterate(point, unanswered, memory=Network(cells, free, question, first))

    def advance(self, energy: Energy, iterate: Iterate, active: Tensor | None) -> Iterate:
        """One round. `active` is not asked: in an example at rest no node has anything to do."""
        network: Network = iterate.memory.copy()
        for group in SCHEDULES[self.schedule](energy.graph.nodes, network.rounds):
            # Those of a group act on one and the same past: first all actions, then all consequences.
            acted = [(node, network.turn(energy, node, self.tol)) for node in group if network.calls(energy, node)]
            for node, _ in acted:
                network.stale.discard(node.name)
                network.mail.discard(node.name)
            for node, cell in acted:
                network.tell(energy, node, cell, self.tol)
        network.rounds += 1
        moved = replace(iterate, residual=network.residual(energy), gain=network.gain, memory=network)
        moved.turns = network.turns
        moved.out_of_reach = self.adaptive and network.expands
        return moved

    def certify(self, energy: Energy, iterate: Iterate) -> Iterate:
        """The point and its errors. Where settling was cut short, also what the nodes have not yet seen themselves."""
        network: Network = iterate.memory
        if network.rounds == 0:
            return iterate
        point, errors = network.gathered(energy)
        if not network.has_news:
            return replace(iterate, point=point, errors=errors)
        now = energy.at(energy.state(point))
        errors = {
            name: e + (now.predictions[name] - point.predictions[name]) / energy.beta for name, e in errors.items()
        }
        return replace(iterate, point=now, errors=errors, residual=worst_residual(energy, now, errors))
