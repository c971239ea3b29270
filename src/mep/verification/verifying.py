"""`verify`: does equilibrium propagation train this model correctly? A proof on a batch, in double precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mep.capture import Leaves
from mep.errors import ArgumentError, DivergedError
from mep.estimators.checks import check_model, checked_batch
from mep.estimators.contrast import CONTRASTS
from mep.graph.graph import share_in_words
from mep.guards import generators_kept
from mep.solvers import Sweep
from mep.verification import verdict
from mep.verification.differences import Difference, differences
from mep.verification.equilibrium import Equilibria
from mep.verification.gradients import ORDERS, Reference, Run, fitted_order
from mep.verification.report import Estimation, Parameter, Report
from mep.verification.subject import Case, Config, CostArgument

_SWEEPS = 200
"""At most: the tolerance is far below that of training."""
_FOLLOWED, _STEP = 4, 4.0
"""So many smaller betas may follow those given, each smaller by this factor."""
_NO_DIFFERENCE = Difference(None, None)


def verify(
    model: nn.Module,
    x: Any,
    y: Tensor,
    *,
    cost: CostArgument = "cross_entropy",
    betas: Sequence[float] = (0.1, 0.03, 0.01),
    phases: Sequence[str] = tuple(CONTRASTS),
    branches: str = "held",
    leaves: Leaves = (),
    tol: float | None = None,
    samples: int = 2,
    dtype: torch.dtype | None = torch.float64,
) -> Report:
    """Compare equilibrium propagation with backprop and with finite differences, on one batch and a copy of the model.

    - The EP gradient of every parameter against backprop's, for both contrasts: cosine, norm ratio, order in beta.
      Where the betas given are too large to settle, or for the limit to show, up to four smaller ones follow.
    - Both against finite differences of the mean cost on sampled coordinates.
    - The residual of every node, recomputed from the states alone, and how it falls from sweep to sweep.
    - The largest beta at which `mep.Sweep()` settles every example, to a factor of two.

    Buffers and random numbers are the same in every evaluation, so dropout draws one noise for all and BatchNorm
    couples the examples as in backprop. `mep.verification.verdict` says what is asserted, and why.

    Args:
        model: in the mode, train or eval, in which it is to be checked. Nothing of it is changed.
        x: the input, [batch, ...]; a tuple or dict for several.
        y: what the cost expects.
        cost: as for `mep.EquilibriumPropagation`, as are `branches` and `leaves`.
        betas: nudging strengths, two at least.
        phases: the contrasts, of "one-sided" and "centered".
        branches: "held" or "exact".
        leaves: modules to keep whole.
        tol: the residual to settle to; by default the square root of the rounding unit, 1.5e-8 in float64.
        samples: coordinates of every parameter for finite differences; 0 leaves them out.
        dtype: of the copy and the batch; None takes them as they are.

    Raises:
        TraceError: the model cannot be traced, or the graph is not the model.
        DivergedError: the loss is not finite, or settling diverges at every beta of a contrast.
        ArgumentError, InputError, ParameterError: as from an estimator.

    Example:
        >>> import mep
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> report = mep.verify(net, torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> report.ok, [round(order) for order in report.orders.values()]
        (True, [1, 2])
    """
    check_model(model, "verify")
    checked_batch(x, y)
    _check(betas, phases, samples, tol)
    with generators_kept():
        solver = Sweep(settle_steps=_SWEEPS, tol=tol or _default_tol(model, dtype))
        subject = Case(model, x, y, Config(cost, solver, branches, leaves), dtype)
        return _report(subject, sorted(set(map(float, betas)), reverse=True), list(phases), samples)


def _report(subject: Case, betas: list[float], phases: list[str], samples: int) -> Report:
    branches, tol = subject.how.branches, subject.how.solver.tol
    subject.try_out()
    exact = Reference.of(subject)
    runs: dict[str, list[Run]] = {}
    notes: list[str] = []
    for name in phases:
        runs[name], diverged = _runs(subject, exact, name, betas)
        notes += [f"settling diverges at beta {beta:.2g} ({name})" for beta in diverged]
    best = max(phases, key=ORDERS.__getitem__)
    near = differences(subject, exact.gradients, runs[best][-1].gradients, samples) if samples else {}
    parameters = tuple(_parameter(subject, exact, p, runs, near.get(p, _NO_DIFFERENCE)) for p in exact.gradients)
    equilibria = Equilibria(subject)
    estimations = tuple(_estimation(equilibria, exact, name, run) for name in phases for run in runs[name])
    reach, beyond = equilibria.reach(phases, betas[0])
    return Report(
        failures=verdict.failures(parameters, estimations, tol, branches),
        notes=(*_notes(subject, exact, equilibria, estimations), *notes),
        tol=tol,
        estimations=estimations,
        orders={
            name: fitted_order([r.estimate.beta for r in fit], [exact.error(r) for r in fit], 100 * tol)
            for name, some in runs.items()
            for fit in [_settled(some)]
        },
        parameters=parameters,
        stall=equilibria.stall(betas[0]),
        reach=reach,
        beyond=beyond,
    )


def _runs(subject: Case, exact: Reference, phases: str, betas: list[float]) -> tuple[list[Run], list[float]]:
    """One gradient a beta, the largest first; and the betas at which settling diverges.

    Smaller betas follow while some example has not settled, or some parameter is not seen to be right: the order is a
    limit.
    """
    runs: list[Run] = []
    diverged: list[float] = []
    for beta in [*betas, *(betas[-1] / _STEP**i for i in range(1, _FOLLOWED + 1))]:
        if beta < betas[-1] and runs and _is_seen_right(subject, exact, phases, runs):
            break
        try:
            runs.append(Run(*subject.estimate(phases, beta)))
        except DivergedError as error:  # a nudge away from the target may have no equilibrium
            diverged.append(beta)
            last = error
    if not runs:
        raise last
    return runs, diverged


def _is_seen_right(subject: Case, exact: Reference, phases: str, runs: list[Run]) -> bool:
    seen = (_parameter(subject, exact, p, {phases: runs}, _NO_DIFFERENCE) for p in exact.gradients)
    return runs[-1].estimate.converged and not any(
        verdict.failure_reason(p, phases, subject.how.branches) for p in seen
    )


def _settled(runs: list[Run]) -> list[Run]:
    """Those of which every example has: the order is one of equilibria."""
    return [run for run in runs if run.estimate.converged]


def _parameter(
    subject: Case, exact: Reference, p: nn.Parameter, runs: dict[str, list[Run]], near: Difference
) -> Parameter:
    matches = {phases: tuple(exact.match(p, run) for run in some) for phases, some in runs.items()}
    floor = exact.floor(p)
    order = {}
    for phases, some in runs.items():
        fit = [exact.match(p, run) for run in _settled(some)]
        order[phases] = fitted_order([m.beta for m in fit], [m.error for m in fit], floor)
    return Parameter(
        name=subject.names[p],
        shape=tuple(p.shape),
        norm=float(exact.gradients[p].norm()),
        rounding=floor,
        matches=matches,
        order=order,
        backprop_difference=near.backprop,
        ep_difference=near.ep,
    )


def _estimation(equilibria: Equilibria, exact: Reference, phases: str, run: Run) -> Estimation:
    estimate = run.estimate
    assert estimate.residual is not None and estimate.settled is not None and estimate.left_branch is not None
    again = equilibria.residual(phases, estimate.beta)
    return Estimation(
        phases=phases,
        beta=estimate.beta,
        error=exact.error(run),
        sweeps=estimate.iterations,
        result=str(estimate.result),
        unsettled=int((~estimate.settled).sum()),
        residual=float(estimate.residual.max()),
        recomputed=again.value,
        rounding=again.rounding,
        worst=again.node,
        left_branch=estimate.left_branch,
    )


def _notes(
    subject: Case, exact: Reference, equilibria: Equilibria, estimations: Sequence[Estimation]
) -> tuple[str, ...]:
    """What to know beside."""
    mode, dtype = "training" if subject.model.training else "evaluation", next(iter(exact.gradients)).dtype
    notes = [f"checked in {mode} mode, in {str(dtype).removeprefix('torch.')}"]
    inside, total = equilibria.energy.graph.share_kept
    if inside:
        notes.append(share_in_words(inside, total))
    if equilibria.is_stochastic:
        notes.append("the model is stochastic: one noise for all evaluations")
    left = [name for p, name in subject.names.items() if p not in exact.gradients]
    if left:
        notes.append(f"not checked, as frozen or not used: {', '.join(left)}")
    flat = [subject.names[p] for p in exact.gradients if exact.floor(p) == 1.0]
    if flat:
        notes.append(f"backprop's gradient vanishes, up to rounding: {', '.join(flat)}")
    for e in estimations:
        if e.unsettled:
            some = f"{e.unsettled} of {equilibria.energy.batch} examples"
            notes.append(f"{some} did not settle at beta {e.beta:.2g} ({e.phases}): {e.result}")
    return tuple(notes)


def _default_tol(model: nn.Module, dtype: torch.dtype | None) -> float:
    trained = (p.dtype for p in model.parameters() if p.requires_grad)
    return math.sqrt(torch.finfo(dtype or next(trained)).eps)


def _check(betas: Sequence[float], phases: Sequence[str], samples: int, tol: float | None) -> None:
    if len(set(betas)) < 2 or not all(isinstance(b, (int, float)) and 0 < b < math.inf for b in betas):
        raise ArgumentError(f"verify(betas={betas!r}): the order needs two different positive numbers at least.")
    if isinstance(phases, str) or not phases or not set(phases) <= set(CONTRASTS):
        raise ArgumentError(f"verify(phases={phases!r}): must be a sequence of some of {list(CONTRASTS)}.")
    if not (isinstance(samples, int) and samples >= 0):
        raise ArgumentError(f"verify(samples={samples!r}): must be an integer >= 0.")
    if tol is not None and not 0 < tol < 1:
        raise ArgumentError(f"verify(tol={tol!r}): must lie between 0 and 1.")
