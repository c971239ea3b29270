"""The nudged equilibria of a contrast: settled at the beta that was named or chosen, and reported as an estimate."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from mep.cost import BatchCost
from mep.energy import Energy, Free, State, nudge
from mep.errors import DivergedError
from mep.estimators.beta import chosen_beta
from mep.estimators.contrast import CONTRASTS
from mep.estimators.estimate import Estimate
from mep.graph.node import Beta
from mep.settle import Result, Settled, Solver, Start, settle
from mep.solvers.networks import linear_response

SettledPhase = tuple[float, Energy, Settled]
"""As `mep.estimators.contrast.Phase`, with all that settling reports."""


def settle_phases(
    energy: Energy,
    free: Settled,
    cost: BatchCost,
    solver: Solver,
    phases: str,
    beta: Beta | None,
    errors: State | None = None,
) -> list[SettledPhase]:
    """Settle every phase of the contrast at exactly its multiple of beta; the weights are over that multiple.

    Args:
        energy: without a nudge, and `free` its equilibrium.
        cost: of the batch.
        solver: for all phases.
        phases: the name of the contrast.
        beta: that of every example, or one each, [batch]; None to choose it, see `mep.estimators.beta`.
        errors: scaled errors to begin with, for solvers that recall.

    Raises:
        DivergedError: settling a phase leads out of the finite numbers.
    """
    noted = None if energy.coupling.vanishes_when_free else _noted(energy, free)
    unit = nudge(energy, cost, 1.0, noted)
    response = linear_response(unit, free.point) if beta is None or solver.uses_response else None
    if beta is None:
        assert response is not None
        beta = chosen_beta(unit, free.point, response, solver)
    found: list[SettledPhase] = []
    last = [multiple for multiple, _ in CONTRASTS[phases] if multiple][-1]
    for multiple, weight in CONTRASTS[phases]:
        nudged = nudge(energy, cost, (multiple or 1.0) * beta, noted)
        if multiple:
            start = Start(response if response is None or multiple == last else response.copy(), errors)
            settled = settle(nudged, free.point, solver, start)
            found.append((weight * multiple, nudged, settled))
        elif not energy.coupling.vanishes_when_free:
            found.append((weight, nudged, free))
        else:
            continue
        if found[-1][2].result is Result.DIVERGED:
            raise DivergedError(
                f"Settling diverged at {_named(beta)} with {solver}. Nothing was changed. Way out: "
                + solver.failure_hint(nudged, free.point)
            )
    return found


def _noted(energy: Energy, free: Settled) -> dict[str, Free]:
    """The free equilibrium, node by node, and the forces left there; what a face of the box holds back is none."""
    point, incoming_forces, noted = free.point, energy.incoming_forces(free.point), {}
    for node in energy.graph.states:
        s, drive = point.values[node.name], point.predictions[node.name] + incoming_forces[node.name]
        noted[node.name] = Free(s, torch.where(s == drive.clamp(*node.box), 0, s - drive))
    return noted


def _named(beta: Beta) -> str:
    return f"beta={float(beta.min()):.3g} and more" if isinstance(beta, Tensor) else f"beta={beta:g}"


def estimate_of(
    loss: Tensor,
    free: Settled,
    phases: Sequence[SettledPhase],
    tol: float,
    diagnostics: bool,
    in_leaves: tuple[int, int] = (0, 0),
) -> Estimate:
    """What is reported of these phases. What the free one has left is part of the residuals of the nudged ones."""
    nudged = [settled for _, _, settled in phases if settled is not free]
    residual = reduce(torch.maximum, [settled.residual for settled in nudged])
    failed = [settled.result for settled in nudged if settled.result is not Result.CONVERGED]
    _, energy, last = phases[-1]
    return Estimate(
        loss=loss,
        residual=residual,
        iterations=max(settled.iterations for settled in (free, *nudged)),
        result=failed[0] if failed else Result.CONVERGED,
        betas=betas_of(energy.beta, energy.batch, residual.device),
        counts=reduce(torch.maximum, [settled.counts for settled in (free, *nudged)]),
        tol=tol,
        left_branch=max(e.left_branch(settled.point) for _, e, settled in phases) if diagnostics else None,
        turns=last.turns,
        in_leaves=in_leaves,
    )


def betas_of(beta: Beta, batch: int, device: torch.device) -> Tensor:
    """The strengths of all examples, toward the target or away from it."""
    if isinstance(beta, Tensor):
        return beta.abs().expand(batch)
    return torch.full((batch,), abs(beta), dtype=torch.float64, device=device)
