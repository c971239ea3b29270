"""Operations with closed forms, and the branches of the piecewise-linear ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mep.activations.closed_forms import of_call, of_module, own_state
from mep.activations.maxima import (
    Largest,
    MaxPool,
    Windows,
    gathered,
    largest,
    pair,
    pool_of_call,
    pool_of_module,
    reduced,
)
from mep.activations.pointwise import Activation, leaking

__all__ = [
    "Activation",
    "Kink",
    "Largest",
    "MaxPool",
    "Windows",
    "gathered",
    "kink_of_call",
    "largest",
    "leaking",
    "of_call",
    "of_module",
    "own_state",
    "pair",
    "pool_of_call",
    "pool_of_module",
    "reduced",
]

Kink = Activation | Largest
"""What the exact equilibrium knows a rule for."""


def kink_of_call(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Activation | MaxPool | None:
    """The operation with kinks that a call on `args[0]` is, or None."""
    activation = of_call(target, args, kwargs)
    if activation is not None:
        return activation if activation.kinks else None
    return pool_of_call(target, args, kwargs)
