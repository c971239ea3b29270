"""The nudged equilibria of a contrast: settled with the largest beta within reach, and reported as an estimate."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from mep.cost import BatchCost
from mep.energy import Energy, nudge
from mep.errors import DivergedError
from mep.estimators.contrast import CONTRASTS
from mep.estimators.estimate import Estimate
from mep.nodes import Strength, magnitude
from mep.settle import Known, Result, Settled, Solver, settle

_SHRINK = 0.5
_GROWTH = 1.02
_TRIES = 16

SettledPhase = tuple[float, Energy, Settled]
"""As `mep.estimators.contrast.Phase`, with all that settling tells."""


def next_beta(largest: float, reach: float) -> float:
    """As large as it may be, after the last one that was within reach."""
    return min(largest, reach * _GROWTH)


def settle_phases(
    energy: Energy, free: Settled, cost: BatchCost, solver: Solver, phases: str, beta: float, known: Known
) -> tuple[float, list[SettledPhase]]:
    """Settle every phase of the contrast, with a smaller beta as long as one is out of reach; the beta that was used.

    Raises:
        DivergedError: even the smallest beta leads out of the finite numbers.
    """
    multiples = [multiple for multiple, _ in CONTRASTS[phases] if multiple]
    for attempt in range(_TRIES):
        nudged = _alike(energy, free, cost, solver, multiples, beta, known)
        failed = [s.result for s in nudged.values() if s.result is not Result.CONVERGED]
        if not failed or not (solver.beta_limited and solver.adaptive) or attempt == _TRIES - 1:
            break
        beta *= _SHRINK**2 if Result.OUT_OF_REACH in failed else _SHRINK
    found = [
        (weight * multiple, nudged[multiple].energy, nudged[multiple]) if multiple else (weight / beta, energy, free)
        for multiple, weight in CONTRASTS[phases]
    ]
    if Result.DIVERGED in failed:
        raise DivergedError(
            f"Settling diverged at beta={beta:g} with {solver}. Nothing was changed. Way out: "
            + solver.way_out(found[-1][1], free.point)
        )
    return beta, found


def _alike(
    energy: Energy,
    free: Settled,
    cost: BatchCost,
    solver: Solver,
    multiples: Sequence[float],
    beta: float,
    known: Known,
) -> dict[float, Settled]:
    """Settle at these multiples of beta; an example that is nudged less in one of them is so in all."""
    strength: Strength = beta
    found: dict[float, Settled] = {}
    while left := [m for m in multiples if m not in found or not _is_same(found[m].energy.beta, m * strength)]:
        multiple = left[0]
        found[multiple] = settle(nudge(energy, cost, multiple * strength), free.point, solver, known)
        if len(multiples) == 1:
            break
        strength = magnitude(found[multiple].energy.beta)
        if len(found) == len(multiples) and any(settled.result is not Result.CONVERGED for settled in found.values()):
            break
    return found


def _is_same(one: Strength, other: Strength) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return one == other


def estimate_of(loss: Tensor, beta: float, phases: Sequence[SettledPhase], diagnostics: bool) -> Estimate:
    """What is to be told of these phases."""
    each = magnitude(phases[-1][1].beta)
    betas = each if isinstance(each, Tensor) else None
    settled = [s for _, _, s in phases]
    unsettled = [s.result for s in settled if s.result is not Result.CONVERGED]
    left = max(e.left_branch(s.point) for _, e, s in phases) if diagnostics else None
    return Estimate(
        loss=loss,
        residual=reduce(torch.maximum, [s.residual for s in settled]),
        iterations=max(s.iterations for s in settled),
        beta=beta if betas is None else float(betas.min()),
        result=unsettled[0] if unsettled else Result.CONVERGED,
        left_branch=left,
        turns=settled[-1].turns,
        betas=betas,
    )
