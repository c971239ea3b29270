"""Strictly local settling: each node reads its neighbours only, and a node with nothing to do is not computed.

A node holds its state `s_n`, its prediction `mu_n` and its scaled error `delta_n = (mu_n - s_n) / beta`. An **update**
of it reads its parents' states and its children's forces `J_c^T delta_c`, nothing else. It is **active** if

    a parent's state has changed                           predict:  mu_n    <- mu_n(parents)
    |delta_n - sum_c J_c^T delta_c| > tol (relative)       balance:  delta_n <- sum_c J_c^T delta_c, per example

Both move `s_n = mu_n - beta delta_n`, after which its children are active, and its parents if delta_n changed. The
output balances `dC/ds` in place of children, by steps toward it of Barzilai and Borwein's length (`sweep.py`), computed
from its own last two updates. In a **round** every node that is active is updated, in the order of a schedule.

At the free equilibrium only the output is active. Once no node is, each has checked its own balance: that is the nudged
equilibrium to the tolerance, whatever the order of the updates.

Whittington and Bogacz 2017 (doi:10.1162/NECO_a_00949) relax the same energy by descent on the states.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mep.energy import Energy, NodeEnergy, State, example_dot, example_norm, relative_residual
from mep.errors import ArgumentError, one_of, require
from mep.graph import Point
from mep.graph.node import Node, expand_beta, state_from_error
from mep.layout import accurate, per_example
from mep.settle import Iterate, Solver, Start
from mep.solvers.networks import has_grown, output_residual, spread_length
from mep.solvers.networks.nonsmooth import worst_residual
from mep.solvers.sweep import barzilai_borwein

_WATCHED_FROM = 3
"""The round from which errors are compared with those of this round, to detect divergence; most settle before."""

Groups = Sequence[Sequence[Node]]
SCHEDULES: dict[str, Callable[[Sequence[Node], int], Groups]] = {
    "there and back": lambda nodes, _: [[node] for node in (*nodes, *reversed(nodes[:-1]))],
    "together": lambda nodes, _: [nodes],
    "forward": lambda nodes, _: [[node] for node in nodes],
    "backward": lambda nodes, _: [[node] for node in reversed(nodes)],
    "random": lambda nodes, rounds: [[node] for node in random.Random(rounds).sample(nodes, len(nodes))],
}
"""Name -> the order of a round: one group of nodes after another; a group reads what was there before it."""


@dataclass(frozen=True)
class Local(Solver):
    """Updates of single nodes from their neighbours, until no node is active.

    Args:
        settle_steps: the largest number of rounds, or with `adaptive=False` the exact one. In a round every node is
            updated if it is active.
        tol: relative residual up to which a node is left as it is.
        patience: consecutive rounds in which no node is active.
        adaptive: stop when no node is active.
        schedule: the order within a round: "there and back", "forward", "backward" or "random", one node after another,
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
        one = x.new_ones(energy.batch, dtype=accurate(x))
        nodes = {
            node.name: NodeState(
                value=point.values[node.name],
                prediction=point.predictions.get(node.name),
                saved=point.saved[node.name],
                residual=one if node.name == energy.graph.output else torch.zeros_like(one),
            )
            for node in energy.graph.nodes
        }
        network = LocalNetwork(nodes, OutputStep(x, torch.ones_like(one)))
        return Iterate(one, point, exact=False, state=network)

    def step(self, energy: Energy, iterate: Iterate, active: Tensor | None) -> Iterate:
        """One round. `active` is not needed: nothing changes in an example that has settled."""
        network: LocalNetwork = iterate.state.copy()
        for group in SCHEDULES[self.schedule](energy.graph.nodes, network.rounds):
            # The updates of a group all read the values from before it: compute every one, then commit them.
            updates = [(n, network.update(energy, n, self.tol)) for n in group if network.is_active(energy, n)]
            for node, _ in updates:
                network.needs_prediction.discard(node.name)
                network.needs_balance.discard(node.name)
            for node, updated in updates:
                network.commit(energy, node, updated, self.tol)
        network.rounds += 1

        diverging = False
        if network.rounds >= _WATCHED_FROM:
            size = network.largest_error(energy)
            network.early_size = size if network.early_size is None else network.early_size
            diverging = bool(has_grown(size, network.early_size).any())
        residual, counts = network.residual(energy), network.update_counts
        return replace(iterate, residual=residual, turns=counts, diverging=diverging, state=network)

    def finalize(self, energy: Energy, iterate: Iterate) -> Iterate:
        """The point and its errors; where settling was cut short, with all predictions and the residual up to date."""
        network: LocalNetwork = iterate.state
        if network.rounds == 0:
            return iterate
        point, errors = network.gathered(energy)
        if not network.any_active:
            return replace(iterate, point=point, errors=errors, exact=True)
        # The states stay where they are, so an error grows by what its prediction moves: delta = (mu - s) / beta.
        now = energy.at(energy.state(point))
        for name, error in errors.items():
            moved = now.predictions[name] - point.predictions[name]
            errors[name] = error + moved / expand_beta(energy.beta, moved)
        return replace(iterate, point=now, errors=errors, residual=worst_residual(energy, now, errors), exact=True)


@dataclass(frozen=True)
class NodeState:
    """What a node holds: its state, prediction and scaled error, and what its `vjp` needs (`saved`).

    `error` is None before a force has arrived. In a junction, which owns no state, it is the force that it passes on.
    `residual` is that of its last update, 0 where that balanced it: [batch].
    """

    value: Any
    prediction: Any
    saved: Any
    residual: Tensor
    error: Tensor | None = None

    def with_error(self, energy: Energy, error: Tensor) -> NodeState:
        """With this error, and the state that follows: `s = mu - beta delta`."""
        return replace(self, error=error, value=state_from_error(self.prediction, error, energy.beta))


@dataclass
class OutputStep:
    """The output's own record of its steps: `r = dC/ds - delta` at its last update, and that step's length, [batch]."""

    r: Tensor
    length: Tensor


@dataclass
class LocalNetwork:
    """The nodes, and what has changed around them since their last update.

    Attributes:
        nodes: name -> what the node holds; entries are replaced, never changed.
        output_step: what the output needs for its next step.
        messages: child -> its forces on its parents `J_c^T delta_c`; absent where out of date, computed on demand.
        needs_prediction: nodes with a parent whose state changed.
        needs_balance: nodes with a child whose force changed.
        output_pending: whether the output's last step has still to be compared with dC/ds.
        update_counts: how often each node was updated.
        rounds: how many were made.
        early_size: `largest_error` after the first rounds.
    """

    nodes: dict[str, NodeState]
    output_step: OutputStep
    messages: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    needs_prediction: set[str] = field(default_factory=set)
    needs_balance: set[str] = field(default_factory=set)
    output_pending: bool = True
    update_counts: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    early_size: Tensor | None = None

    def copy(self) -> LocalNetwork:
        """Independent of this one; the tensors are shared."""
        return replace(
            self,
            nodes=dict(self.nodes),
            output_step=replace(self.output_step),
            messages=dict(self.messages),
            needs_prediction=set(self.needs_prediction),
            needs_balance=set(self.needs_balance),
            update_counts=Counter(self.update_counts),
        )

    @property
    def any_active(self) -> bool:
        """Whether some node is active."""
        return bool(self.output_pending or self.needs_prediction or self.needs_balance)

    def is_active(self, energy: Energy, node: Node) -> bool:
        """Whether an update of this node is due."""
        is_pending = self.output_pending and node.name == energy.graph.output
        return is_pending or node.name in self.needs_prediction or node.name in self.needs_balance

    def update(self, energy: Energy, node: Node, tol: float) -> NodeState:
        """What the node will hold, from what it and its neighbours hold; `commit` puts it in place."""
        held = self.nodes[node.name]
        if node.name in self.needs_prediction:
            values = {p: self.nodes[p].value if p in self.nodes else energy.inputs[p] for p in node.parents}
            mu, saved = energy.graph.predict(node, values, energy.context)
            if not node.owns_state:
                held = replace(held, value=mu, saved=saved)
            else:  # the error stays, so that the state follows its prediction
                s = mu if held.error is None else state_from_error(mu, held.error, energy.beta)
                held = replace(held, value=s, prediction=mu, saved=saved)
        if node.name == energy.graph.output:
            return self._step_output(energy, held, tol)
        return self._balance(energy, node, held, tol) if node.name in self.needs_balance else held

    def commit(self, energy: Energy, node: Node, updated: NodeState, tol: float) -> None:
        """Replace what the node holds, and mark the neighbours that this concerns."""
        before, self.nodes[node.name] = self.nodes[node.name], updated
        self.update_counts[node.name] += 1
        if updated.value is not before.value:
            self.needs_prediction.update(child.name for child in energy.graph.readers[node.name])
        # Its forces J^T delta change with its error, and with its Jacobian unless that is constant.
        is_constant = energy.context.freeze_branches and node.is_affine_when_held
        new_jacobian = updated.saved is not before.saved and not is_constant
        if updated.error is not None and (updated.error is not before.error or new_jacobian):
            self.messages.pop(node.name, None)
            self.needs_balance.update(p for p, flows in zip(node.parents, node.flows, strict=True) if flows)
        if node.name == energy.graph.output:
            self.output_pending = not bool((updated.residual <= tol).all())

    def _balance(self, energy: Energy, node: Node, held: NodeState, tol: float) -> NodeState:
        """`delta_n <- sum_c J_c^T delta_c`, in the examples in which the two differ by more than `tol`."""
        force = self._force(energy, node)
        if not node.owns_state:
            return replace(held, error=force)
        if held.error is None:
            return held.with_error(energy, force)
        residual = relative_residual(held.error, force, energy.batch)
        unbalanced = ~(residual <= tol)  # NaN counts as not converged
        if not unbalanced.any():
            return replace(held, residual=residual)
        error = torch.where(per_example(unbalanced, force), force, held.error)
        return replace(held.with_error(energy, error), residual=residual.masked_fill_(unbalanced, 0))

    def _force(self, energy: Energy, node: Node) -> Tensor:
        """`sum_c J_c^T delta_c` over the children that have an error."""
        total: Tensor | None = None
        for child in energy.graph.readers[node.name]:
            held = self.nodes[child.name]
            if held.error is None:
                continue
            if child.name not in self.messages:
                forces = zip(child.parents, child.vjp(held.saved, held.error), strict=True)
                self.messages[child.name] = {parent: force for parent, force in forces if force is not None}
            force = self.messages[child.name].get(node.name)
            if force is not None:
                total = force if total is None else total + force
        return torch.zeros_like(self.nodes[node.name].value) if total is None else total

    def _step_output(self, energy: Energy, held: NodeState, tol: float) -> NodeState:
        """`delta <- delta + a r` with `r = dC/ds - delta`, in the examples in which r is larger than `tol` (relative).

        The length a is Barzilai and Borwein's, from r at the last update and now; the first one is 1.
        """
        last = self.output_step
        if held.error is None:
            return held.with_error(energy, last.r)
        assert energy.nudge is not None
        error, batch = held.error, energy.batch
        gradient = energy.nudge.cost.gradient(held.value)
        residual = output_residual(error, gradient)
        unbalanced = ~(residual <= tol)  # NaN counts as not converged
        if not unbalanced.any():
            return replace(held, residual=residual)
        moves = per_example(unbalanced, error)
        r = torch.where(moves, gradient - error, last.r)
        y = last.r - r
        a = barzilai_borwein(last.length, example_dot(last.r, y, batch), example_dot(y, y, batch))
        last.r, last.length = r, torch.where(unbalanced, a, last.length)
        stepped = torch.where(moves, error + r * spread_length(last.length, r), error)
        return replace(held.with_error(energy, stepped), residual=residual)

    def largest_error(self, energy: Energy) -> Tensor:
        """The norm of the largest error of a node, [batch]."""
        errors = [self.nodes[node.name].error for node in energy.graph.states]
        return torch.stack([example_norm(error, energy.batch) for error in errors if error is not None]).amax(0)

    def residual(self, energy: Energy) -> Tensor:
        """The largest of the nodes' residuals, [batch]; 1 while some node has not been updated after a change."""
        if self.needs_prediction or self.needs_balance:
            return torch.ones_like(self.nodes[energy.graph.output].residual)
        return torch.stack([held.residual for held in self.nodes.values()]).amax(0)

    def gathered(self, energy: Energy) -> tuple[Point, State]:
        """What the nodes hold as a point, and the errors of all states; zero where no force has arrived."""
        nodes, states = self.nodes, [node.name for node in energy.graph.states]
        values = {**energy.inputs, **{name: held.value for name, held in nodes.items()}}
        predictions = {name: nodes[name].prediction for name in states}
        errors = {n: torch.zeros_like(mu) if (e := nodes[n].error) is None else e for n, mu in predictions.items()}
        return Point(values, predictions, {name: held.saved for name, held in nodes.items()}), errors
