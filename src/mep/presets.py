"""Named recipes: each body lists its parts. All are real `torch.optim.Optimizer`s with `step(x=..., target=...)`.

Settling, in every preset: without `settle_lr` the sweep solver runs, with `settle_steps` as its limit; giving
`settle_lr` selects gradient descent on the states with that step. `adaptive=True` stops once every example's relative
residual has been at most `tol` for `patience` iterations, `adaptive=False` runs exactly `settle_steps`; left at None it
is True for sweeps and False for descent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from mep.constraints import spectral_bound
from mep.cost import Cost, PerExample
from mep.errors import ArgumentError, ParameterError
from mep.estimators import Backprop, EquilibriumPropagation
from mep.optimizer import EPOptimizer
from mep.settle import Solver
from mep.solvers import Descent, Sweep
from mep.tracing import Leaves
from mep.updates import Muon


def eqprop(
    params: ParamsT,
    model: nn.Module,
    *,
    lr: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    cost: str | PerExample | Cost = "cross_entropy",
    beta: float = 0.1,
    energy: str = "prediction",
    phases: str = "one-sided",
    branches: str = "held",
    leaves: Leaves = (),
    settle_steps: int = 30,
    settle_lr: float | None = None,
    adaptive: bool | None = None,
    tol: float = 1e-2,
    patience: int = 1,
) -> EPOptimizer:
    """Vanilla equilibrium propagation: its gradient, and `torch.optim.SGD`.

    Args:
        params: the parameters to train, or groups of them; they must be the model's.
        model: the model.
        lr, momentum, weight_decay, nesterov: as in `torch.optim.SGD`.
        cost, beta, energy, phases, branches, leaves: as in `mep.EquilibriumPropagation`.
        settle_steps, settle_lr, adaptive, tol, patience: how to settle, see `mep.presets`.

    Example:
        >>> import torch, mep
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> opt = mep.eqprop(net.parameters(), model=net, lr=0.1)
        >>> loss = opt.step(x=torch.ones(2, 4), target=torch.tensor([0, 2]))
        >>> opt.last.iterations <= 4, float(opt.last.residual.max()) <= 1e-2
        (True, True)
    """
    solver = _solver(energy, settle_steps, settle_lr, adaptive, tol, patience)
    estimator = EquilibriumPropagation(model, cost, beta, solver, energy, phases, branches, leaves)
    _check_sgd(lr=lr, momentum=momentum, weight_decay=weight_decay)
    groups = _listed(params, model)
    update = torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
    return EPOptimizer(estimator, update)


def smep(
    params: ParamsT,
    model: nn.Module,
    *,
    lr: float = 0.02,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    nesterov: bool = True,
    gamma: float = 3.0,
    cost: str | PerExample | Cost = "cross_entropy",
    beta: float = 0.1,
    energy: str = "prediction",
    phases: str = "one-sided",
    branches: str = "held",
    leaves: Leaves = (),
    settle_steps: int = 30,
    settle_lr: float | None = None,
    adaptive: bool | None = None,
    tol: float = 1e-2,
    patience: int = 1,
) -> EPOptimizer:
    """Spectral Muon EP: equilibrium propagation, Muon, and a bound on every weight's largest singular value.

    Args:
        params: the parameters to train, or groups of them; they must be the model's.
        model: the model.
        lr, momentum, weight_decay, nesterov: as in `mep.Muon`.
        gamma: the bound, see `mep.spectral_bound`.
        cost, beta, energy, phases, branches, leaves: as in `mep.EquilibriumPropagation`.
        settle_steps, settle_lr, adaptive, tol, patience: how to settle, see `mep.presets`.
    """
    solver = _solver(energy, settle_steps, settle_lr, adaptive, tol, patience)
    estimator = EquilibriumPropagation(model, cost, beta, solver, energy, phases, branches, leaves)
    update = Muon(_listed(params, model), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
    return EPOptimizer(estimator, update, [spectral_bound(gamma)])


def smep_fast(
    params: ParamsT,
    model: nn.Module,
    *,
    lr: float = 0.01,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    nesterov: bool = True,
    gamma: float = 3.0,
    cost: str | PerExample | Cost = "cross_entropy",
    beta: float = 0.01,
    energy: str = "prediction",
    phases: str = "one-sided",
    branches: str = "held",
    leaves: Leaves = (),
    settle_steps: int = 10,
    settle_lr: float | None = None,
    adaptive: bool | None = None,
    tol: float = 1e-1,
    patience: int = 1,
) -> EPOptimizer:
    """`smep` with a looser tolerance, a weaker nudge and fewer steps: for prototyping.

    Takes the arguments of `smep`. One or two sweeps a step suffice.
    """
    solver = _solver(energy, settle_steps, settle_lr, adaptive, tol, patience)
    estimator = EquilibriumPropagation(model, cost, beta, solver, energy, phases, branches, leaves)
    update = Muon(_listed(params, model), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
    return EPOptimizer(estimator, update, [spectral_bound(gamma)])


def muon_backprop(
    params: ParamsT,
    model: nn.Module,
    *,
    lr: float = 0.02,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    nesterov: bool = True,
    cost: str | PerExample | Cost = "cross_entropy",
) -> EPOptimizer:
    """Muon fed by backpropagation: the yardstick for `smep`.

    Args:
        params: the parameters to train, or groups of them; they must be the model's.
        model: the model.
        lr, momentum, weight_decay, nesterov: as in `mep.Muon`.
        cost: as in `mep.EquilibriumPropagation`.
    """
    estimator = Backprop(model, cost)
    update = Muon(_listed(params, model), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
    return EPOptimizer(estimator, update)


def _listed(params: ParamsT, model: nn.Module) -> list[Any]:
    """The parameters or groups as a list, after checking that there are some."""
    listed = list(params)
    if not listed:
        raise ParameterError(
            f"params is empty: pass model.parameters() of {type(model).__name__}; a generator can be read only once."
        )
    return listed


def _check_sgd(**settings: float) -> None:
    """torch lets NaN pass, and raises errors of its own for the rest."""
    for name, value in settings.items():
        if not (isinstance(value, (int, float, torch.Tensor)) and value >= 0):
            raise ArgumentError(f"eqprop({name}={value!r}): must be a number >= 0.")


def _solver(
    energy: str, steps: int, settle_lr: float | None, adaptive: bool | None, tol: float, patience: int
) -> Solver:
    if settle_lr is None:
        if energy != "prediction":
            raise ArgumentError(f"energy={energy!r} settles by descent: give settle_lr, for instance settle_lr=0.3.")
        adaptive = adaptive is not False
    if not adaptive and patience != 1:
        raise ArgumentError(f"patience={patience} does something only with adaptive=True.")
    if settle_lr is None:
        return Sweep(settle_steps=steps, tol=tol, patience=patience, adaptive=bool(adaptive))
    return Descent(steps, tol, patience, bool(adaptive), settle_lr)
