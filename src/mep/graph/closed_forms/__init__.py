"""Operations with closed forms, in tables keyed by the name of the ATen operation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mep.graph.closed_forms.activations import Activation, activation_of
from mep.graph.closed_forms.maxima import Largest, MaxPool, Windows, pool_of
from mep.graph.closed_forms.potentials import FREE_STATE, Potential, Quadratic, Softmax

__all__ = [
    "FREE_STATE", "Activation", "Kink", "Largest", "MaxPool", "Potential", "Quadratic", "Softmax", "Windows",
    "activation_of", "kink_of_call", "pool_of",
]  # fmt: skip

Kink = Activation | Largest
"""Operations with a rule for `branches="exact"`."""


def kink_of_call(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Activation | MaxPool | None:
    """The operation with kinks that a call is, given its arguments after the input, or None."""
    activation = activation_of(name, args, kwargs)
    if activation is not None:
        return activation if activation.kinks else None
    return pool_of(name, args, kwargs)
