"""What is examined: a copy of a model with one batch, in the same state for every evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mep.capture import Leaves
from mep.capture.cache import Graphs
from mep.capture.proof import loss_of
from mep.capture.state import Buffers, copied_together
from mep.cost import BatchCost, PerExample, make_cost
from mep.energy import Energy, make_node_energy, nudge
from mep.errors import ArgumentError
from mep.estimators import Backprop, EquilibriumPropagation, Estimate
from mep.estimators.checks import checked_batch
from mep.estimators.estimate import Gradients
from mep.graph import Point
from mep.graph.step_context import StepContext
from mep.guards import generators, set_generators
from mep.solvers import Sweep

CostArgument = str | PerExample | type[BatchCost]


@dataclass(frozen=True)
class Config:
    """How the equilibria are sought: the arguments that every `EquilibriumPropagation` of an examination shares."""

    cost: CostArgument
    solver: Sweep
    branches: str
    leaves: Leaves


class Case:
    """A model of our own and a batch. Every method starts from the same buffers and random numbers.

    So dropout draws the same noise for equilibrium propagation, for backprop and for finite differences.
    """

    def __init__(self, model: nn.Module, x: Any, target: Tensor, how: Config, dtype: torch.dtype | None):
        self.model, cost = _copy(model, how.cost, dtype)
        self.how = how = replace(how, cost=cost)
        self.x, self.target, self.dtype = _cast(x, dtype), _cast(target, dtype), dtype
        self.names = {p: name for name, p in self.model.named_parameters()}
        if isinstance(cost, nn.Module):
            self.names |= {p: f"cost.{name}" for name, p in cost.named_parameters()}
        self.noise, self.buffers = generators(everyones=True), Buffers(self.model)
        self.graphs = Graphs(self.model, how.leaves, "prediction", how.branches, how.cost, proof="amortised")

    def try_out(self) -> None:
        """Run the model once, and raise an ArgumentError where it fails in this precision."""
        try:
            self.mean_cost()
        except RuntimeError as error:
            if self.dtype is None:
                raise
            raise ArgumentError(
                f"verify(dtype={self.dtype}): the model or its cost fails on this batch: {error}. If the precision is "
                "why, dtype=None checks them as they are, as far as their rounding allows."
            ) from error

    def estimate(self, phases: str, beta: float) -> tuple[Gradients, Estimate]:
        """The EP gradient, as a training step would have it."""
        how = self.how
        ep = EquilibriumPropagation(
            self.model,
            how.cost,
            beta,
            how.solver,
            phases=phases,
            branches=how.branches,
            leaves=how.leaves,
            diagnostics=True,
            on_unsettled="ignore",
        )
        ep.share_graphs(self.graphs)
        self._as_found()
        return ep.gradients(self.x, self.target)

    def backprop(self) -> Gradients:
        """The gradient by autograd through the model itself."""
        self._as_found()
        return Backprop(self.model, self.how.cost).gradients(_fresh(self.x), self.target)[0]

    @torch.no_grad()
    def mean_cost(self) -> float:
        """The mean cost of the batch at the parameters as they are now: no autograd, no equilibrium."""
        self._as_found()
        return float(loss_of(self.model, self.how.cost, _fresh(self.x), self.target))

    @torch.no_grad()
    def energy(self, freeze_branches: bool | None = None) -> tuple[Energy, Point]:
        """The free energy of the batch, and its equilibrium; the branches are held as `how` says, unless given."""
        graph = self.graphs.of(self.x, self.target)
        self._as_found()
        hold = self.how.branches == "held" if freeze_branches is None else freeze_branches
        context = StepContext(freeze_branches=hold)
        energy = Energy(graph, make_node_energy("prediction"), graph.bind(self.x), context, checked_batch(self.x))
        point = energy.free_point()
        context.recording = False
        return energy, point

    def nudged(self, energy: Energy, free: Point, beta: float) -> Energy:
        """The energy nudged toward the target."""
        make = make_cost(self.how.cost)
        cost = self.graphs.cost_of(energy.graph, make, energy.inputs, energy.output(free), self.target)
        return nudge(energy, cost, beta)

    def _as_found(self) -> None:
        self.buffers.undo()
        set_generators(self.noise)


def _copy(model: nn.Module, cost: Any, dtype: torch.dtype | None) -> tuple[nn.Module, Any]:
    try:
        twin, cost = copied_together(model, cost)
    except Exception as error:
        raise ArgumentError(
            f"verify({type(model).__name__}): works on a copy, and copy.deepcopy(model) failed: {error}. Way out: pass "
            "a freshly built model; tensors that are results of operations do not belong on a module."
        ) from error
    if dtype is not None:
        twin.to(dtype)
        if isinstance(cost, nn.Module):
            cost.to(dtype)
    return twin, cost


def _cast(x: Any, dtype: torch.dtype | None) -> Any:
    """Tensors of our own, the real numbers among them in the dtype."""
    if isinstance(x, Tensor):
        return x.detach().clone() if dtype is None or not x.is_floating_point() else x.detach().to(dtype, copy=True)
    if isinstance(x, Mapping):
        return {name: _cast(value, dtype) for name, value in x.items()}
    return tuple(_cast(value, dtype) for value in x) if isinstance(x, (tuple, list)) else x


def _fresh(x: Any) -> Any:
    """A copy: a `forward` may write into its input."""
    return _cast(x, None)
