"""What is verified: a copy of a model with one batch, in the same state for every evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mep.capture import Leaves
from mep.capture.cache import Graphs
from mep.capture.state import Buffers, copied_together
from mep.cost import BatchCost, PerExample
from mep.errors import ArgumentError
from mep.graph.inputs import check_model, checked_batch
from mep.guards import generators, set_generators
from mep.solvers import Sweep

CostArgument = str | PerExample | type[BatchCost]


@dataclass(frozen=True)
class Config:
    """How equilibria are computed: the arguments of `EquilibriumPropagation` that all evaluations share."""

    cost: CostArgument
    solver: Sweep
    branches: str
    leaves: Leaves


class Case:
    """A copy of a model and a batch. `restore` before an evaluation gives it the same buffers and random numbers.

    So dropout draws the same noise for equilibrium propagation, for backprop and for finite differences. As a context
    manager it leaves all random number generators as it found them.

    Args:
        model, x, target: what is copied; nothing of it is changed.
        config: see `Config`; a cost that is a module, or reads the model, is copied with it.
        dtype: of the copies; None keeps theirs.

    Attributes:
        model, x, target, config, dtype: the copies.
        batch: the number of examples.
        names: parameter -> its name, also of the cost's parameters.
        graphs: the graphs of the model.
    """

    def __init__(self, model: nn.Module, x: Any, target: Tensor, config: Config, dtype: torch.dtype | None):
        check_model(model, "verify")
        self.batch = checked_batch(x, target, config.cost, finite=False)
        self.noise = generators(everyones=True)
        self.model, cost = _copy(model, config.cost, dtype)
        self.config = config = replace(config, cost=cost)
        self.x, self.target, self.dtype = _cast(x, dtype), _cast(target, dtype), dtype
        self.names = {p: name for name, p in self.model.named_parameters()}
        if isinstance(cost, nn.Module):
            self.names |= {p: f"cost.{name}" for name, p in cost.named_parameters()}
        self.buffers = Buffers(self.model)
        self.graphs = Graphs(self.model, config.leaves, "prediction", config.branches, cost, proof="amortised")

    def __enter__(self) -> Case:
        return self

    def __exit__(self, *error: object) -> None:
        set_generators(self.noise)

    def restore(self) -> None:
        """Buffers and random number generators as they were at first."""
        self.buffers.undo()
        set_generators(self.noise)

    def fresh_input(self) -> Any:
        """A copy of the input: a `forward` may write into it."""
        return _cast(self.x, None)


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
    """Copies of all tensors, floating-point ones in the dtype."""
    if isinstance(x, Tensor):
        return x.detach().clone() if dtype is None or not x.is_floating_point() else x.detach().to(dtype, copy=True)
    if isinstance(x, Mapping):
        return {name: _cast(value, dtype) for name, value in x.items()}
    return tuple(_cast(value, dtype) for value in x) if isinstance(x, (tuple, list)) else x
