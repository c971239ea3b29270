"""Backpropagation behind the interface of an estimator: the yardstick."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from mep.capture.state import Buffers, check_state, trained_parameters
from mep.cost import BatchCost, PerExample, make_cost, mean_cost
from mep.errors import ArgumentError, DivergedError
from mep.estimators.contrast import accumulate, finished
from mep.estimators.estimate import Estimate, Gradients
from mep.graph.inputs import (
    call_model,
    check_mode,
    check_model,
    checked_batch,
    dtype_errors,
    undone_on_error,
    warn_of_inputs,
)
from mep.guards import without_hooks


class Backprop:
    """`loss.backward()`, called like `EquilibriumPropagation`.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> estimate = Backprop(net, cost="mse")(torch.ones(1, 2), torch.zeros(1, 1))
        >>> estimate.result.name, net.weight.grad.shape
        ('BACKPROP', torch.Size([1, 2]))
    """

    def __init__(self, model: nn.Module, cost: str | PerExample | type[BatchCost] = "cross_entropy"):
        check_model(model, "Backprop")
        check_state(model, hooks=False)
        self.model = model
        self.cost = cost
        make_cost(cost)
        self._is_new = True

    def __call__(self, x: Any, target: Tensor) -> Estimate:
        """Accumulate the gradient into `p.grad`."""
        gradients, estimate = self.gradients(x, target)
        accumulate(gradients)
        return estimate

    def gradients(self, x: Any, target: Tensor, indices: Tensor | None = None) -> tuple[Gradients, Estimate]:
        """The gradient of every trained parameter that the loss reaches."""
        if indices is not None:
            raise ArgumentError("Backprop: there is no equilibrium to begin at; leave indices out.")
        check_mode()
        batch = checked_batch(x, target, self.cost, finite=False)
        check_model(self.model, "Backprop")
        if self._is_new:
            self._is_new = False
            warn_of_inputs(type(self.model).__name__, x)
        trained = trained_parameters(self.model, self.cost)
        buffers = Buffers(self.model)
        try:
            with undone_on_error(x), dtype_errors(self.model), without_hooks(trained), torch.enable_grad():
                loss = mean_cost(self.cost, call_model(self.model, x), target)
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise DivergedError(f"The loss is {value}: check target and weights. Nothing was changed.")
                found = torch.autograd.grad(loss, trained, allow_unused=True)
                dense = {p: g.to_dense() for p, g in zip(trained, found, strict=True) if g is not None}
                # Of a sum of parameters autograd returns one tensor for all, and of a mean one number for many.
                uses = Counter(g.untyped_storage().data_ptr() for g in dense.values())
                shared = {p for p, g in dense.items() if uses[g.untyped_storage().data_ptr()] > 1 or 0 in g.stride()}
                gradients = finished({p: g.clone().contiguous() if p in shared else g for p, g in dense.items()})
                estimate = Estimate.exact(loss.detach(), batch)
        except BaseException:
            buffers.undo()
            raise
        return gradients, estimate

    def predict(self, x: Any) -> Tensor:
        """The model's output."""
        with torch.no_grad():
            return call_model(self.model, x)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: it has no memory."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""
