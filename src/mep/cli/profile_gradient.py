"""What settling buys: how far from equilibrium a recipe stops, and how far its gradient is from the exact one.

The exact EP gradient `g*` is that of the same contrast with the same beta for every example, its equilibria settled to
1e-9 in float64. With b the gradient by backprop:

    gap  = |g - g*| / |g*|      the error that is left because settling stopped early
    bias = |g* - b| / |b|       the error that beta causes, however long one settles
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import mep
from mep.cli.profile_rows import Recipe, estimator_of
from mep.cli.turns import Batch
from mep.errors import ArgumentError, NotConvergedError
from mep.estimators.contrast import contrast, settle_phases
from mep.estimators.estimate import finished
from mep.settle import Result, Settled
from mep.verification.case import Case, Config
from mep.verification.equilibrium import Equilibria

EXACT = mep.Sweep(settle_steps=500, tol=1e-9)  # far below what float32 resolves, far above the rounding of float64

COMPARED = ("cosine", "size", "first_cosine", "first_size", "gap", "bias", "backprop_cosine")
FIELDS = ("iterations", "beta", "settled", "residual", "residual_max", *COMPARED)


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

    @torch.no_grad()
    def equilibrium(self, estimator: mep.EquilibriumPropagation, betas: Tensor, place: int) -> Tensor:
        """The exact EP gradient of one batch, of the estimator's contrast, with these betas: [batch].

        Raises:
            NotConvergedError: some example did not settle at its beta.
            ArgumentError: there is no such reference: the energy is another one, the model draws random numbers, or the
                gradient is zero.
        """
        if estimator.node_energy.name != "prediction":
            raise ArgumentError(f"energy={estimator.node_energy.name!r}: only 'prediction' has an exact gradient here.")
        how = Config(estimator.cost, EXACT, estimator.branches, estimator.leaves)
        x, target = self.batches[place]
        equilibria = Equilibria(Case(self.model, x, target, how, dtype=None))
        energy, point = equilibria.energy, equilibria.free
        if energy.context.noise:
            raise ArgumentError(
                f"Node {', '.join(map(repr, energy.context.noise))} draws random numbers in every step, so no two "
                "gradients can be compared. Way out: model.eval()."
            )
        zeros = betas.new_zeros(energy.batch, dtype=torch.float64)
        free = Settled(point, zeros, 0, Result.CONVERGED, zeros)
        nudge = equilibria.nudged(1.0).nudge
        assert nudge is not None
        phases = settle_phases(energy, free, nudge.cost, EXACT, estimator.phases, betas.double())
        for _, nudged, settled in phases:
            if settled.result is not Result.CONVERGED:
                raise NotConvergedError(
                    f"The exact gradient is not known: {int((settled.residual > EXACT.tol).sum())} of {nudged.batch} "
                    f"examples did not settle to {EXACT.tol:g} in float64, at beta {float(betas.min()):.3g} to "
                    f"{float(betas.max()):.3g}. Way out: a smaller beta, or beta=None."
                )
        exact = _flat(equilibria.case.model, finished(contrast(phases, energy.batch)))
        if not exact.any():
            raise ArgumentError(
                "The exact gradient is zero: there is nothing to compare. Way out: other weights or data."
            )
        return exact


def judge(
    recipe: Recipe, model: nn.Module, batches: Sequence[Batch], reference: Reference, cost: str
) -> dict[str, float | None]:
    """Means over the batches, of `residual_max` the largest; of backprop `backprop_cosine` alone, the others None.

    iterations: of an example, mean. beta: the median over the examples. settled: the share of the examples. cosine,
    size: `<g, g*> / |g| |g*|` and `|g| / |g*|`; with `first_`, of the first parameter of two or more dimensions alone,
    which a signal from the output reaches last. backprop_cosine: of g with backprop's gradient.
    """
    estimator = estimator_of(recipe.build(copy.deepcopy(model), cost))
    if estimator is None:
        return dict.fromkeys(FIELDS) | {"backprop_cosine": 1.0}
    first = first_weight(estimator.model)
    found: list[dict[str, float]] = []
    for place, batch in enumerate(batches):
        gradients, estimate = estimator.gradients(*batch)
        assert estimate.residual is not None and estimate.betas is not None
        assert estimate.counts is not None and estimate.settled is not None
        exact = reference.equilibrium(estimator, estimate.betas, place)
        found.append(
            {
                "iterations": float(estimate.counts.double().mean()),
                "beta": estimate.median_beta,
                "settled": float(estimate.settled.double().mean()),
                "residual": float(estimate.residual.mean()),
                "residual_max": float(estimate.residual.max()),
                **compare(_flat(estimator.model, gradients), exact, reference.backprop[place], first),
            }
        )
    summaries = {field: max if field == "residual_max" else statistics.fmean for field in FIELDS}
    return {field: summary(one[field] for one in found) for field, summary in summaries.items()}


def compare(gradient: Tensor, exact: Tensor, backprop: Tensor, first: slice) -> dict[str, float]:
    """The fields `COMPARED` of one gradient, all rows flat."""
    return {
        "cosine": _cosine(gradient, exact),
        "size": _ratio(gradient, exact),
        "first_cosine": _cosine(gradient[first], exact[first]),
        "first_size": _ratio(gradient[first], exact[first]),
        "gap": _ratio(gradient - exact, exact),
        "bias": _ratio(exact - backprop, backprop),
        "backprop_cosine": _cosine(gradient, backprop),
    }


def first_weight(model: nn.Module) -> slice:
    """Where the first parameter of two or more dimensions stands in a row of all; all of it if there is none."""
    start = 0
    for p in model.parameters():
        if p.ndim > 1:
            return slice(start, start + p.numel())
        start += p.numel()
    return slice(None)


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
