"""The yardsticks: torch's own optimizers fed by `loss.backward()`, behind the interface of the presets.

Written as a user would write them, so that a comparison with them is one with plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mep import Estimate, Result
from mep.errors import ArgumentError


class Backprop:
    """A torch optimizer and the backward pass that feeds it."""

    def __init__(self, model: nn.Module, update: torch.optim.Optimizer, cost: str) -> None:
        if cost not in COSTS:
            raise ArgumentError(f"Unknown --cost {cost!r}. Choose one of {', '.join(COSTS)}.")
        self.model, self.update, self.cost = model, update, COSTS[cost]
        self.last: Estimate

    def step(self, *, x: Tensor, target: Tensor) -> Tensor:
        """One update; returns the mean cost before it."""
        self.update.zero_grad()
        loss = self.cost(self.model(x), target)
        loss.backward()
        self.update.step()
        self.last = Estimate(loss.detach(), residual=None, iterations=0, beta=0.0, result=Result.BACKPROP)
        return self.last.loss

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """The model's output."""
        return self.model(x)

    def state_dict(self) -> dict[str, Any]:
        """The update's state."""
        return self.update.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.update.load_state_dict(state)


COSTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}


def sgd(
    params: Iterable[Tensor],
    *,
    model: nn.Module,
    lr: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    cost: str = "cross_entropy",
) -> Backprop:
    """Backprop and stochastic gradient descent with momentum."""
    return Backprop(model, torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay), cost)


def adam(
    params: Iterable[Tensor],
    *,
    model: nn.Module,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    cost: str = "cross_entropy",
) -> Backprop:
    """Backprop and Adam."""
    return Backprop(model, torch.optim.Adam(params, lr=lr, weight_decay=weight_decay), cost)


BASELINES: dict[str, Callable[..., Backprop]] = {"sgd": sgd, "adam": adam}
