"""What is verified: a copy of a model with one batch, in the same state for every evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mep.capture import Leaves
from mep.capture.cache import Graphs
from mep.capture.state import Buffers, copied_together
from mep.cost import BatchCost, PerExample
from mep.energy import GroupEnergy, NodeEnergy, Prediction
from mep.errors import ArgumentError
from mep.estimators import EquilibriumPropagation
from mep.estimators.checks import with_readout
from mep.graph.inputs import check_model, checked_batch
from mep.guards import generators, set_generators
from mep.settle import Solver

CostArgument = str | PerExample | type[BatchCost]


@dataclass(frozen=True)
class Config:
    """How equilibria are computed: the arguments of `EquilibriumPropagation` that all evaluations share."""

    cost: CostArgument
    solver: Solver
    branches: str
    leaves: Leaves
    energy: NodeEnergy = field(default_factory=Prediction)
    groups: tuple[GroupEnergy, ...] = ()
    readout: nn.Module | None = None

    @property
    def is_forward(self) -> bool:
        """Whether the free equilibrium is the forward pass, so that backpropagation gives the gradient."""
        return self.energy.is_forward and not self.groups

    @property
    def whole_cost(self) -> Any:
        """The cost, behind the readout if there is one."""
        return self.cost if self.readout is None else with_readout(self.cost, self.readout)


class Case:
    """A copy of a model and a batch. `restore` before an evaluation gives it the same buffers and random numbers.

    So dropout draws the same noise for equilibrium propagation, for backprop and for finite differences. As a context
    manager it leaves all random number generators as it found them.

    Args:
        model, x, target: what is copied; nothing of it is changed.
        config: see `Config`; readout, groups, and a cost that is a module or reads the model are copied with it.
        dtype: of the copies; None keeps theirs.

    Attributes:
        model, x, target, config, dtype: the copies.
        batch: the number of examples.
        names: parameter -> its name, also of the parameters of cost, readout and groups.
        graphs: the graphs of the model.
    """

    def __init__(self, model: nn.Module, x: Any, target: Tensor, config: Config, dtype: torch.dtype | None):
        check_model(model, "verify")
        self.batch = checked_batch(x, target, config.cost, finite=False)
        self.noise = generators(everyones=True)
        self.model, cost, readout, groups = _copy(model, config, dtype)
        self.config = config = replace(config, cost=cost, readout=readout, groups=groups)
        self.x, self.target, self.dtype = _cast(x, dtype), _cast(target, dtype), dtype
        self.names = {p: name for name, p in self.model.named_parameters()}
        others = {"cost": cost, "readout": readout, **{f"groups.{i}": group for i, group in enumerate(groups)}}
        for prefix, other in others.items():
            if isinstance(other, nn.Module):
                self.names |= {p: f"{prefix}.{name}" for name, p in other.named_parameters()}
        self.buffers = Buffers(self.model)
        states = "hopfield" if config.energy.behind_activations else "prediction"
        self.graphs = Graphs(self.model, config.leaves, states, config.branches, config.whole_cost, "amortised")

    def __enter__(self) -> Case:
        return self

    def __exit__(self, *error: object) -> None:
        set_generators(self.noise)

    def restore(self) -> None:
        """Buffers and random number generators as they were at first."""
        self.buffers.undo()
        set_generators(self.noise)

    def estimator(self, phases: str, beta: float | None, solver: Solver | None = None) -> EquilibriumPropagation:
        """As a training step would have it; by the solver of the case unless another is named."""
        config = self.config
        ep = EquilibriumPropagation(
            self.model,
            config.cost,
            beta,
            solver or config.solver,
            config.energy,
            phases,
            config.branches,
            config.leaves,
            diagnostics=True,
            on_unsettled="ignore",
            groups=config.groups,
            readout=config.readout,
        )
        ep.share_graphs(self.graphs)
        return ep

    def fresh_input(self) -> Any:
        """A copy of the input: a `forward` may write into it."""
        return _cast(self.x, None)


def _copy(model: nn.Module, config: Config, dtype: torch.dtype | None) -> tuple[Any, ...]:
    """Copies of the model, of cost and readout, and of the groups."""
    try:
        found = copied_together(model, config.cost, config.readout, config.groups)
    except Exception as error:
        raise ArgumentError(
            f"verify({type(model).__name__}): works on a copy, and copy.deepcopy(model) failed: {error}. Way out: pass "
            "a freshly built model; tensors that are results of operations do not belong on a module."
        ) from error
    if dtype is not None:
        for part in (*found[:-1], *found[-1]):
            if isinstance(part, nn.Module):
                part.to(dtype)
    return found


def _cast(x: Any, dtype: torch.dtype | None) -> Any:
    """Copies of all tensors, floating-point ones in the dtype."""
    if isinstance(x, Tensor):
        return x.detach().clone() if dtype is None or not x.is_floating_point() else x.detach().to(dtype, copy=True)
    if isinstance(x, Mapping):
        return {name: _cast(value, dtype) for name, value in x.items()}
    return tuple(_cast(value, dtype) for value in x) if isinstance(x, (tuple, list)) else x
