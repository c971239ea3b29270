"""What settling buys: how far from equilibrium a recipe stops, and how far its gradient is from the exact one.

The exact EP gradient `g*` is that of the same contrast at the same beta, its equilibria settled to rounding in float64.

    gap  = |g - g*| / |g*|      what more settling would mend
    bias = |g* - b| / |b|       what EP at this beta differs from backprop's gradient b, and no settling mends
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import mep
from mep.cli.profile_rows import Recipe, estimator_of
from mep.cli.turns import Batch

EXACT = mep.Sweep(settle_steps=200, tol=1e-9)  # float64 has digits beyond, and float32 none

COMPARED = ("cosine", "size", "first_cosine", "first_size", "gap", "bias", "backprop_cosine")
FIELDS = ("iterations", "beta", "residual", "residual_max", *COMPARED)


@dataclass(frozen=True)
class Reference:
    """A float64 copy of a model and of some batches, and backprop's gradients of them."""

    model: nn.Module
    batches: list[Batch]
    backprop: list[Tensor]

    @classmethod
    def of(cls, model: nn.Module, batches: Sequence[Batch], cost: str) -> Reference:
        """The reference for this model and these batches."""
        model = copy.deepcopy(model).double()
        doubled = [(_double(x), _double(target)) for x, target in batches]
        backprop = mep.Backprop(model, cost)
        return cls(model, doubled, [_flat(model, backprop.gradients(*batch)[0]) for batch in doubled])

    def equilibrium(self, estimator: mep.EquilibriumPropagation, beta: float, place: int) -> Tensor | None:
        """The exact EP gradient of one batch, of the estimator's contrast; None if out of reach at this beta."""
        exact = mep.EquilibriumPropagation(
            self.model,
            estimator.cost,
            beta,
            EXACT,
            phases=estimator.phases,
            branches=estimator.branches,
            leaves=estimator.leaves,
        )
        gradients, estimate = exact.gradients(*self.batches[place])
        return _flat(self.model, gradients) if estimate.converged and estimate.beta == beta else None


def judge(
    recipe: Recipe, model: nn.Module, batches: Sequence[Batch], reference: Reference, cost: str
) -> dict[str, float | None]:
    """Means over the batches, of `residual_max` the largest; None where there is nothing to compare.

    cosine, size: `<g, g*> / |g| |g*|` and `|g| / |g*|`; with `first_`, of the first parameter of two or more dimensions
    alone, which a signal from the output reaches last. backprop_cosine: of g with backprop's gradient.
    """
    estimator = estimator_of(recipe.build(copy.deepcopy(model), cost))
    if estimator is None:
        return dict.fromkeys(FIELDS) | {"backprop_cosine": 1.0}
    first = first_weight(estimator.model)
    found: list[dict[str, float | None]] = []
    for place, batch in enumerate(batches):
        gradients, estimate = estimator.gradients(*batch)
        gradient, backprop = _flat(estimator.model, gradients), reference.backprop[place]
        exact = reference.equilibrium(estimator, estimate.beta, place)
        assert estimate.residual is not None
        settled = {"iterations": float(estimate.iterations), "beta": estimate.beta}
        settled |= {"residual": float(estimate.residual.mean()), "residual_max": float(estimate.residual.max())}
        found.append({**settled, **compare(gradient, exact, backprop, first)})
    return {field: _summary(field, [one[field] for one in found]) for field in FIELDS}


def compare(gradient: Tensor, exact: Tensor | None, backprop: Tensor, first: slice) -> dict[str, float | None]:
    """The fields `COMPARED` of one gradient, all rows flat."""
    found: dict[str, float | None] = dict.fromkeys(COMPARED) | {"backprop_cosine": _cosine(gradient, backprop)}
    if exact is None:
        return found
    for prefix, part in (("", slice(None)), ("first_", first)):
        found[f"{prefix}cosine"] = _cosine(gradient[part], exact[part])
        found[f"{prefix}size"] = _ratio(gradient[part], exact[part])
    return found | {"gap": _ratio(gradient - exact, exact), "bias": _ratio(exact - backprop, backprop)}


def first_weight(model: nn.Module) -> slice:
    """Where the first parameter of two or more dimensions stands in a row of all; all of it if there is none."""
    start = 0
    for p in model.parameters():
        if p.ndim > 1:
            return slice(start, start + p.numel())
        start += p.numel()
    return slice(None)


def _summary(field: str, values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return max(known) if field == "residual_max" else sum(known) / len(known)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _flat(model: nn.Module, gradients: dict[Any, Tensor]) -> Tensor:
    """All gradients in one float64 row, in the order of the parameters."""
    rows = [gradients[p] if p in gradients else torch.zeros_like(p) for p in model.parameters()]
    return torch.cat([row.detach().double().flatten() for row in rows])


def _cosine(a: Tensor, b: Tensor) -> float:
    """0 where one of the two vanishes."""
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale else 0.0


def _ratio(a: Tensor, b: Tensor) -> float:
    return float(a.norm() / b.norm())
