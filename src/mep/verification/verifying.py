"""`verify`: does equilibrium propagation train this model correctly? A proof on a batch, in double precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mep.errors import ArgumentError
from mep.estimators.contrast import CONTRASTS
from mep.estimators.inputs import batch_size, check_model, check_target
from mep.snapshot import generators_kept
from mep.solvers import Sweep
from mep.tracing import Leaves
from mep.verification import verdict
from mep.verification.differences import Difference, differences
from mep.verification.equilibrium import Equilibria
from mep.verification.gradients import ORDERS, Exact, Run, fitted_order
from mep.verification.report import Estimation, Parameter, Report
from mep.verification.subject import CostArgument, How, Subject

_SWEEPS = 60
_FOLLOWED = 4
_STEP = 4.0
_UNTOLD = Difference(None, None)


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
      Where the betas given are too large for the limit to show, up to four smaller ones follow.
    - Both against finite differences of the mean cost on sampled coordinates.
    - The residual of every node, recomputed from the states alone, and how it falls from sweep to sweep.
    - The largest beta that settles with `mep.Sweep()`, to a factor of two.

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
        ArgumentError, InputError, ParameterError, DivergedError: as from an estimator.

    Example:
        >>> import mep
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> report = mep.verify(net, torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> report.ok, [round(order) for order in report.orders.values()]
        (True, [1, 2])
    """
    check_model(model, "verify")
    batch_size(x)
    check_target(y)
    _check(betas, phases, samples, tol)
    with generators_kept():
        solver = Sweep(settle_steps=_SWEEPS, tol=tol or _default_tol(model, dtype), strength=math.inf)
        subject = Subject(model, x, y, How(cost, solver, branches, leaves), dtype)
        return _report(subject, sorted(set(map(float, betas)), reverse=True), list(phases), samples)


def _report(subject: Subject, betas: list[float], phases: list[str], samples: int) -> Report:
    branches, tol = subject.how.branches, subject.how.solver.tol
    subject.try_out()
    runs = _runs(subject, phases, betas)
    exact = Exact.of(subject)
    for name in phases:
        _follow(subject, exact, name, runs[name])
    best = max(phases, key=ORDERS.__getitem__)
    near = differences(subject, exact.gradients, runs[best][-1].gradients, samples) if samples else {}
    parameters = tuple(_parameter(subject, exact, p, runs, near.get(p, _UNTOLD)) for p in exact.gradients)
    equilibria = Equilibria(subject)
    estimations = tuple(_estimation(equilibria, exact, name, run) for name in phases for run in runs[name])
    largest = max(e.beta for e in estimations)
    reach, beyond = equilibria.reach(phases, largest)
    return Report(
        failures=verdict.failures(parameters, estimations, tol, branches),
        notes=_notes(subject, exact, equilibria, estimations),
        tol=tol,
        estimations=estimations,
        orders={
            name: fitted_order([r.estimate.beta for r in some], [exact.error(r) for r in some], 100 * tol)
            for name, some in runs.items()
        },
        parameters=parameters,
        stall=equilibria.stall(largest),
        reach=reach,
        beyond=beyond,
    )


def _runs(subject: Subject, phases: Sequence[str], betas: Sequence[float]) -> dict[str, list[Run]]:
    """One gradient a contrast and beta, the largest beta first; where one is out of reach, the others shrink alike."""
    shrunk = 1.0
    runs: dict[str, list[Run]] = {}
    for name in phases:
        runs[name] = []
        for beta in betas:
            run = _run(subject, name, beta, beta * shrunk)
            shrunk = min(shrunk, run.estimate.beta / beta)
            runs[name].append(run)
    return runs


def _run(subject: Subject, phases: str, asked: float, beta: float) -> Run:
    """One gradient, at the beta that all examples can have: the order is that of one beta."""
    gradients, estimate = subject.estimate(phases, beta)
    while estimate.betas is not None:
        gradients, estimate = subject.estimate(phases, estimate.beta)
    return Run(asked, gradients, estimate)


def _follow(subject: Subject, exact: Exact, phases: str, runs: list[Run]) -> None:
    """Go on to smaller betas while some parameter is not seen to be right: the order is a limit."""
    for _ in range(_FOLLOWED):
        seen = (_parameter(subject, exact, p, {phases: runs}, _UNTOLD) for p in exact.gradients)
        if not any(verdict.complaint(parameter, phases, subject.how.branches) for parameter in seen):
            break
        beta = runs[-1].estimate.beta / _STEP
        runs.append(_run(subject, phases, beta, beta))


def _parameter(
    subject: Subject, exact: Exact, p: nn.Parameter, runs: dict[str, list[Run]], near: Difference
) -> Parameter:
    matches = {phases: tuple(exact.match(p, run) for run in some) for phases, some in runs.items()}
    floor = exact.floor(p)
    return Parameter(
        name=subject.names[p],
        shape=tuple(p.shape),
        norm=float(exact.gradients[p].norm()),
        rounding=floor,
        matches=matches,
        order={n: fitted_order([m.beta for m in some], [m.error for m in some], floor) for n, some in matches.items()},
        backprop_difference=near.backprop,
        ep_difference=near.ep,
    )


def _estimation(equilibria: Equilibria, exact: Exact, phases: str, run: Run) -> Estimation:
    estimate = run.estimate
    assert estimate.residual is not None and estimate.left_branch is not None
    again = equilibria.residual(phases, estimate.beta)
    return Estimation(
        phases=phases,
        asked=run.asked,
        beta=estimate.beta,
        error=exact.error(run),
        sweeps=estimate.iterations,
        result=str(estimate.result),
        residual=float(estimate.residual.max()),
        recomputed=again.value,
        rounding=again.rounding,
        worst=again.node,
        left_branch=estimate.left_branch,
    )


def _notes(
    subject: Subject, exact: Exact, equilibria: Equilibria, estimations: Sequence[Estimation]
) -> tuple[str, ...]:
    """What to know beside."""
    mode, dtype = "training" if subject.model.training else "evaluation", next(iter(exact.gradients)).dtype
    notes = [f"checked in {mode} mode, in {str(dtype).removeprefix('torch.')}"]
    if equilibria.is_stochastic:
        notes.append("the model is stochastic: one noise for all evaluations")
    left = [name for p, name in subject.names.items() if p not in exact.gradients]
    if left:
        notes.append(f"not checked, as frozen or not used: {', '.join(left)}")
    flat = [subject.names[p] for p in exact.gradients if exact.floor(p) == 1.0]
    if flat:
        notes.append(f"backprop's gradient vanishes, up to rounding: {', '.join(flat)}")
    least = min(estimations, key=lambda e: e.beta / e.asked)
    if least.beta < least.asked:
        used = f"{least.beta:.2g} was used, and others in proportion"
        notes.append(
            f"beta {least.asked:.2g} ({least.phases}) is out of reach at tol {subject.how.solver.tol:.1e}: {used}"
        )
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
