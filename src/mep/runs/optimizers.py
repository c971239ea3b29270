"""Optimizers by name: every preset of the library, and torch's own optimizers fed by `loss.backward()`.

The latter, `BASELINES`, are written as a user would write them, so that a comparison with them is one with plain torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mep import Estimate, presets
from mep.errors import ArgumentError


class Optimizer(Protocol):
    """What the commands need of an optimizer."""

    @property
    def last(self) -> Estimate:
        """What the last step found."""

    def step(self, *, x: Tensor, target: Tensor) -> Tensor:
        """One update on a batch; returns the mean cost before it."""

    def predict(self, x: Tensor) -> Tensor:
        """The output that accuracy is measured on."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, beside the parameters."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


def build(name: str, model: nn.Module, options: Mapping[str, Any]) -> Optimizer:
    """The optimizer called `name` for all parameters of `model`; refuses an option that it does not take."""
    factory = _factory(name)
    taken = [key for key in inspect.signature(factory).parameters if key not in ("params", "model")]
    for option in options:
        if option not in taken:
            flag = "--" + option.replace("_", "-")
            raise ArgumentError(f"The preset `{name}` has no {flag}. Its options are {', '.join(taken)}.")
    return factory(model.parameters(), model=model, **options)


def build_to_compare(name: str, model: nn.Module, options: Mapping[str, Any]) -> Optimizer:
    """As `build`, but without a warning where examples do not settle: the tables have the share that did."""
    quiet = {"on_unsettled": "ignore"} if "on_unsettled" in inspect.signature(_factory(name)).parameters else {}
    return build(name, model, {**quiet, **options})


def names() -> list[str]:
    """All names, presets first."""
    functions = inspect.getmembers(presets, inspect.isfunction)
    own = [name for name, value in functions if value.__module__ == presets.__name__ and name[0] != "_"]
    return [*own, *BASELINES]


def _factory(name: str) -> Callable[..., Any]:
    if name not in names():
        raise ArgumentError(f"Unknown preset {name!r}. Choose one of {', '.join(names())}.")
    return BASELINES.get(name) or getattr(presets, name)


class Backprop:
    """Torch optimizers, each for parameters of its own, and the backward pass that feeds them.

    compile: `torch.compile` the loss, forward and backward.
    """

    def __init__(self, model: nn.Module, cost: str, *updates: torch.optim.Optimizer, compile: bool = False) -> None:
        if cost not in COSTS:
            raise ArgumentError(f"Unknown --cost {cost!r}. Choose one of {', '.join(COSTS)}.")
        self.model, self.cost, self.updates = model, COSTS[cost], updates
        self._loss = torch.compile(self._eager_loss) if compile else self._eager_loss
        self.last: Estimate

    def _eager_loss(self, x: Tensor, target: Tensor) -> Tensor:
        return self.cost(self.model(x), target)

    def step(self, *, x: Tensor, target: Tensor) -> Tensor:
        """One update; returns the mean cost before it."""
        for update in self.updates:
            update.zero_grad()
        loss = self._loss(x, target)
        loss.backward()
        for update in self.updates:
            update.step()
        self.last = Estimate.exact(loss.detach(), len(target))
        return self.last.loss

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """The model's output."""
        return self.model(x)

    def state_dict(self) -> dict[str, Any]:
        """The states of the updates."""
        return {"updates": [update.state_dict() for update in self.updates]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for update, own in zip(self.updates, state["updates"], strict=True):
            update.load_state_dict(own)


COSTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}


def sgd(
    params: Iterable[Tensor],
    *,
    model: nn.Module,
    lr: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    cost: str = "cross_entropy",
    compile: bool = False,
) -> Backprop:
    """Backprop and stochastic gradient descent with momentum."""
    update = torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
    return Backprop(model, cost, update, compile=compile)


def adam(
    params: Iterable[Tensor],
    *,
    model: nn.Module,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    cost: str = "cross_entropy",
) -> Backprop:
    """Backprop and Adam."""
    return Backprop(model, cost, torch.optim.Adam(params, lr=lr, weight_decay=weight_decay))


def torch_muon(
    params: Iterable[Tensor],
    *,
    model: nn.Module,
    lr: float = 0.02,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    nesterov: bool = True,
    cost: str = "cross_entropy",
) -> Backprop:
    """Backprop and torch's own Muon, which takes matrices alone; SGD with the same settings for all else."""
    if not hasattr(torch.optim, "Muon"):
        raise ArgumentError(
            f"torch_muon: torch has its Muon since 2.9, and this is {torch.__version__}. Install a newer torch, or use "
            "muon_backprop; `mep bench` goes without it by --without torch_muon."
        )
    every = list(params)
    matrices, others = [p for p in every if p.ndim == 2], [p for p in every if p.ndim != 2]
    muon = torch.optim.Muon(matrices, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
    rest = torch.optim.SGD(others, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
    return Backprop(model, cost, muon, rest)


BASELINES: dict[str, Callable[..., Backprop]] = {"sgd": sgd, "adam": adam, "torch_muon": torch_muon}
