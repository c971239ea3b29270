"""The nudged equilibria of a contrast: settled with the largest beta within reach, and reported as an estimate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mep.cost import BatchCost
from mep.energy import Energy, nudge
from mep.errors import DivergedError
from mep.estimators.contrast import CONTRASTS
from mep.estimators.estimate import Estimate
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
    for attempt in range(_TRIES):
        found: list[SettledPhase] = []
        for multiple, weight in CONTRASTS[phases]:
            if multiple == 0:
                found.append((weight / beta, energy, free))
                continue
            nudged = nudge(energy, cost, multiple * beta)
            found.append((weight * multiple, nudged, settle(nudged, free.point, solver, known)))
        failed = [s.result for _, _, s in found if s.result is not Result.CONVERGED]
        if not failed or not (solver.beta_limited and solver.adaptive) or attempt == _TRIES - 1:
            break
        beta *= _SHRINK**2 if Result.OUT_OF_REACH in failed else _SHRINK
    if any(s.result is Result.DIVERGED for _, _, s in found):
        raise DivergedError(
            f"Settling diverged at beta={beta:g} with {solver}. Nothing was changed. Way out: "
            + solver.way_out(found[-1][1], free.point)
        )
    return beta, found


def estimate_of(loss: Tensor, beta: float, phases: Sequence[SettledPhase], diagnostics: bool) -> Estimate:
    """What is to be told of these phases."""
    settled = [s for _, _, s in phases]
    unsettled = [s.result for s in settled if s.result is not Result.CONVERGED]
    left = max(e.left_branch(s.point) for _, e, s in phases) if diagnostics else None
    return Estimate(
        loss=loss,
        residual=torch.stack([s.residual for s in settled]).amax(0),
        iterations=max(s.iterations for s in settled),
        beta=beta,
        result=unsettled[0] if unsettled else Result.CONVERGED,
        left_branch=left,
        turns=settled[-1].turns,
    )
