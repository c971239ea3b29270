"""Optimizers by name: every preset of the library, and the backprop baselines `sgd` and `adam`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from mep import Estimate, presets
from mep.cli.backprop import BASELINES
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
