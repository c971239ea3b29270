"""Backpropagation behind the interface of an estimator: the yardstick."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mep.cost import BatchCost, PerExample, make_cost
from mep.errors import ArgumentError, DivergedError
from mep.estimators.estimate import Estimate, Gradients, accumulate, finished
from mep.estimators.inputs import batch_size, call_model, check_mode, check_model, check_target, undone_on_error
from mep.settle import Result


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
        self.model = model
        self.cost = cost
        self._cost = make_cost(cost)

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
        batch_size(x)
        check_target(target)
        check_model(self.model, "Backprop")
        with undone_on_error(self.model) as buffers, torch.enable_grad():
            output = call_model(self.model, x)
            buffers.keep_writes()
            loss = self._cost(output.detach(), target).value(output).mean()
            value = float(loss.detach())
            if not math.isfinite(value):
                raise DivergedError(f"The loss is {value}: check target and weights. Nothing was changed.")
            trained = [p for p in self.model.parameters() if p.requires_grad]
            found = torch.autograd.grad(loss, trained, allow_unused=True)
            gradients = finished({p: g for p, g in zip(trained, found, strict=True) if g is not None})
            estimate = Estimate(loss.detach(), None, 0, Result.BACKPROP)
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
