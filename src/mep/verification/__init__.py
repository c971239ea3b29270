"""`verify`: does equilibrium propagation train this model correctly? A proof on a batch, in double precision.

| file | what is in it |
|---|---|
| case.py | a copy of the model and the batch, in the same state for every evaluation |
| gradients.py | the gradient by equilibrium propagation, by backprop, and by finite differences |
| equilibrium.py | residuals from the states alone, their trace over the sweeps, the largest beta that settles |
| recurrent.py | the same, and the exact gradient, where the free equilibrium is no forward pass |
| report.py | the numbers, what is asserted of them and why, and their tables |
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mep.capture import Leaves
from mep.energy import GroupEnergy, NodeEnergy, Prediction, make_node_energy
from mep.errors import ArgumentError, DivergedError
from mep.estimators.equilibrium import default_solver
from mep.graph.graph import share_in_words
from mep.verification.case import Case, Config, CostArgument
from mep.verification.equilibrium import Equilibria, largest_beta
from mep.verification.gradients import (
    Difference,
    Reference,
    Run,
    differences,
    fitted_order,
    mean_cost,
    run_backprop,
    run_ep,
    try_out,
)
from mep.verification.recurrent import FixedPoint
from mep.verification.report import ORDERS, Estimation, Parameter, Report, failure_reason, failures

__all__ = ["Report", "verify"]

_LONGER = 4
"""Times as many steps as by default: the tolerance is far below that of training."""
_MORE_BETAS, _FACTOR = 4, 4.0
"""So many betas may follow below those given and below the one of `beta=None`, each smaller by this factor."""


def verify(
    model: nn.Module,
    x: Any,
    y: Tensor,
    *,
    cost: CostArgument = "cross_entropy",
    betas: Sequence[float] = (0.1, 0.03, 0.01),
    phases: Sequence[str] = tuple(ORDERS),
    branches: str = "held",
    leaves: Leaves = (),
    tol: float | None = None,
    samples: int = 2,
    dtype: torch.dtype | None = torch.float64,
    energy: str | NodeEnergy = "prediction",
    groups: Sequence[GroupEnergy] = (),
    readout: nn.Module | None = None,
) -> Report:
    """Compare equilibrium propagation with backprop and with finite differences, on one batch and a copy of the model.

    - The EP gradient of every parameter against backprop's, for both contrasts: cosine, norm ratio, order in beta.
      Where the betas given are too large to settle, or for the limit to show, smaller ones follow: up to four that are
      also smaller than what `beta=None` chooses.
    - Both against finite differences of the mean cost on sampled coordinates.
    - The residual of every node, recomputed from the states alone, and how it falls from sweep to sweep.
    - The largest beta at which the default solver settles every example, to a factor of two.

    Where the free equilibrium is no forward pass (`energy="hopfield"`, groups, energies of one's own), the reference is
    recurrent backpropagation at the equilibrium (Almeida 1987; Pineda 1987), and finite differences settle anew.

    Buffers and random numbers are the same in every evaluation, so dropout draws one noise for all and BatchNorm
    couples the examples as in backprop. `mep.verification.report` lists what is asserted, and why.

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
        energy, groups, readout: as for `mep.EquilibriumPropagation`.

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
        >>> mep.verify(net, torch.randn(5, 4), torch.eye(3)[[0, 1, 2, 0, 1]], cost="mse", energy="hopfield").ok
        True
    """
    _check(betas, phases, samples, tol)
    if tol is None:
        trained = [p.dtype for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
        tol = math.sqrt(torch.finfo(dtype or next(iter(trained), torch.float64)).eps)
    node_energy = make_node_energy(energy)
    solver = default_solver(node_energy, groups)
    solver = replace(solver, settle_steps=math.ceil(_LONGER * solver.settle_steps), tol=tol)
    config = Config(cost, solver, branches, leaves, node_energy, tuple(groups), readout)
    with Case(model, x, y, config, dtype) as case:
        return _report(case, sorted(set(map(float, betas)), reverse=True), list(phases), samples)


def _report(case: Case, betas: list[float], phases: list[str], samples: int) -> Report:
    try_out(case)
    config, tol = case.config, case.config.solver.tol
    rest = None if isinstance(config.energy, Prediction) and not config.groups else FixedPoint(case)
    cost: Callable[[], float] = partial(mean_cost, case)
    if rest is None or config.is_forward:
        exact = Reference.of(case, run_backprop(case))
    else:
        exact, cost = Reference.of(case, rest.gradients()), rest.mean_cost

    # Gradients.
    runs: dict[str, list[Run]] = {}
    diverged: list[str] = []
    for name in phases:
        runs[name], without = _runs(case, exact, name, betas)
        diverged += [f"settling diverges at beta {beta:.2g} ({name})" for beta in without]
    orders = {
        name: fitted_order([r.estimate.beta for r in fit], [exact.error(r) for r in fit], 100 * tol)
        for name, some in runs.items()
        for fit in [_settled(some)]
    }
    best = runs[max(phases, key=ORDERS.__getitem__)][-1].gradients
    near = differences(case, cost, exact.gradients, best, samples) if samples else {}
    parameters = tuple(_parameter(case, exact, p, runs, near.get(p, Difference())) for p in exact.gradients)

    # Equilibria.
    equilibria = Equilibria(case) if rest is None else rest
    estimations = tuple(_estimation(equilibria, exact, name, run) for name in phases for run in runs[name])
    usual = default_solver(config.energy, config.groups)
    reach, beyond = largest_beta(lambda beta: equilibria.all_settle(phases, beta, usual), betas[0])
    return Report(
        failures=(
            *(rest.wrong_derivatives() if rest else ()),
            *failures(parameters, estimations, tol, case.config.branches),
        ),
        notes=(*_notes(equilibria, exact, estimations), *diverged),
        tol=tol,
        estimations=estimations,
        orders=orders,
        parameters=parameters,
        stall=equilibria.trace(betas[0]),
        reach=reach,
        beyond=beyond,
    )


def _runs(case: Case, exact: Reference, phases: str, betas: list[float]) -> tuple[list[Run], list[float]]:
    """One gradient a beta, the largest first; and the betas at which settling diverges.

    Smaller betas follow until all examples settle and every parameter is right: the order is a limit.
    """
    runs: list[Run] = []
    diverged: list[float] = []
    for beta in itertools.chain(betas, _smaller(case, phases, betas[-1])):
        if beta < betas[-1] and runs and runs[-1].estimate.converged:
            found = (_parameter(case, exact, p, {phases: runs}, Difference()) for p in exact.gradients)
            if not any(failure_reason(p, phases, case.config.branches) for p in found):
                break
        try:
            runs.append(run_ep(case, phases, beta))
        except DivergedError as error:  # a nudge away from the target may have no equilibrium
            diverged.append(beta)
            last = error
    if not runs:
        raise last
    return runs, diverged


def _smaller(case: Case, phases: str, beta: float) -> Iterator[float]:
    """Betas below this one and below what an estimator chooses: the larger the network's gain, the smaller that is."""
    least = beta / _FACTOR
    yield least
    with contextlib.suppress(DivergedError):
        beta = min(beta, float(run_ep(case, phases, None).estimate.betas.abs().min()))
    while least > beta / _FACTOR**_MORE_BETAS:
        least /= _FACTOR
        yield least


def _settled(runs: list[Run]) -> list[Run]:
    """Those in which every example has settled: the order is one of equilibria."""
    return [run for run in runs if run.estimate.converged]


def _parameter(
    case: Case, exact: Reference, p: nn.Parameter, runs: dict[str, list[Run]], near: Difference
) -> Parameter:
    order = {}
    for phases, some in runs.items():
        fit = [exact.match(p, run) for run in _settled(some)]
        order[phases] = fitted_order([m.beta for m in fit], [m.error for m in fit], exact.floor(p))
    return Parameter(
        name=case.names[p],
        shape=tuple(p.shape),
        norm=float(exact.gradients[p].norm()),
        rounding=exact.floor(p),
        matches={phases: tuple(exact.match(p, run) for run in some) for phases, some in runs.items()},
        order=order,
        backprop_difference=near.backprop,
        ep_difference=near.ep,
    )


def _estimation(equilibria: Equilibria | FixedPoint, exact: Reference, phases: str, run: Run) -> Estimation:
    estimate = run.estimate
    assert estimate.left_branch is not None
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


def _notes(equilibria: Equilibria | FixedPoint, exact: Reference, estimations: Sequence[Estimation]) -> tuple[str, ...]:
    """How the check was made, and what it leaves out."""
    case, energy = equilibria.case, equilibria.energy
    mode, dtype = "training" if case.model.training else "evaluation", next(iter(exact.gradients)).dtype
    notes = [f"checked in {mode} mode, in {str(dtype).removeprefix('torch.')}"]
    if not case.config.is_forward:
        notes.append("the free equilibrium is no forward pass: backprop is recurrent backpropagation there")
    inside, total = energy.graph.share_kept
    if inside:
        notes.append(share_in_words(inside, total))
    if energy.context.noise:
        notes.append("the model is stochastic: one noise for all evaluations")
    left = [name for p, name in case.names.items() if p not in exact.gradients]
    if left:
        notes.append(f"not checked, as frozen or not used: {', '.join(left)}")
    flat = [case.names[p] for p in exact.gradients if exact.floor(p) == 1.0]
    if flat:
        notes.append(f"backprop's gradient is no larger than what rounding and tol may leave: {', '.join(flat)}")
    for e in estimations:
        if e.unsettled:
            some = f"{e.unsettled} of {energy.batch} examples"
            notes.append(f"{some} did not settle at beta {e.beta:.2g} ({e.phases}): {e.result}")
    return tuple(notes)


def _check(betas: Sequence[float], phases: Sequence[str], samples: int, tol: float | None) -> None:
    if len(set(betas)) < 2 or not all(isinstance(b, (int, float)) and 0 < b < math.inf for b in betas):
        raise ArgumentError(f"verify(betas={betas!r}): the order needs two different positive numbers at least.")
    if isinstance(phases, str) or not phases or not set(phases) <= set(ORDERS):
        raise ArgumentError(f"verify(phases={phases!r}): must be a sequence of some of {list(ORDERS)}.")
    if not (isinstance(samples, int) and samples >= 0):
        raise ArgumentError(f"verify(samples={samples!r}): must be an integer >= 0.")
    if tol is not None and not 0 < tol < 1:
        raise ArgumentError(f"verify(tol={tol!r}): must lie between 0 and 1.")
