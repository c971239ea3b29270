"""What is examined: a copy of a model with one batch, in the same state for every evaluation."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mep.cost import BatchCost, PerExample, make_cost
from mep.energy import Energy, make_coupling, nudge
from mep.errors import ArgumentError
from mep.estimators import Backprop, EquilibriumPropagation, Estimate
from mep.estimators.estimate import Gradients
from mep.estimators.inputs import batch_size, call_model
from mep.graph import Point
from mep.nodes import Held
from mep.snapshot import Buffers, generators, set_generators
from mep.solvers import Sweep
from mep.tracing import Leaves, argument_names, trace, trace_kinks

CostArgument = str | PerExample | type[BatchCost]


@dataclass(frozen=True)
class How:
    """How the equilibria are sought: the arguments that every `EquilibriumPropagation` of an examination shares."""

    cost: CostArgument
    solver: Sweep
    branches: str
    leaves: Leaves


class Subject:
    """A model of our own and a batch. Every method starts from the same buffers and random numbers.

    So dropout draws the same noise for equilibrium propagation, for backprop and for finite differences.
    """

    def __init__(self, model: nn.Module, x: Any, target: Tensor, how: How, dtype: torch.dtype | None):
        self.model = _copy(model, dtype)
        self.x, self.target, self.how, self.dtype = _cast(x, dtype), _cast(target, dtype), how, dtype
        self.names = {p: name for name, p in self.model.named_parameters()}
        self.noise, self.buffers = generators(everyones=True), Buffers(self.model)

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
        output = call_model(self.model, _fresh(self.x))
        return float(make_cost(self.how.cost)(output, self.target).value(output).mean())

    @torch.no_grad()
    def energy(self, hold_branches: bool | None = None) -> tuple[Energy, Point]:
        """The free energy of the batch, and its equilibrium; the branches are held as `how` says, unless given."""
        reading = trace if self.how.branches == "held" else trace_kinks
        graph = reading(self.model, self.how.leaves, argument_names(self.model, self.x))
        self._as_found()
        hold = self.how.branches == "held" if hold_branches is None else hold_branches
        held = Held(hold_branches=hold, buffers=self.buffers)
        energy = Energy(graph, make_coupling("prediction"), graph.bind(self.x), held, batch_size(self.x))
        point = energy.rest()
        held.recording = False
        return energy, point

    def nudged(self, energy: Energy, free: Point, beta: float) -> Energy:
        """The energy nudged toward the target."""
        return nudge(energy, make_cost(self.how.cost)(energy.output(free), self.target), beta)

    def _as_found(self) -> None:
        self.buffers.undo()
        set_generators(self.noise)


def _copy(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        raise ArgumentError(
            f"verify({type(model).__name__}): works on a copy, and copy.deepcopy(model) failed: {error}. Way out: pass "
            "a freshly built model; tensors that are results of operations do not belong on a module."
        ) from error
    return twin if dtype is None else twin.to(dtype)


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
