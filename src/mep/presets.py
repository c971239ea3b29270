"""Named recipes: each body lists its parts. All are real `torch.optim.Optimizer`s with `step(x=..., target=...)`.

Settling, in every preset: without `settle_lr` the sweep solver runs, with `settle_steps` as its limit; giving
`settle_lr` selects gradient descent on the states with that step. `adaptive=True` stops once every example's relative
residual has been at most `tol` for `patience` iterations, `adaptive=False` runs exactly `settle_steps`; left at None it
is True for sweeps and False for descent. `settle_steps` left at None is 100 for adaptive sweeps, else 30.
`on_unsettled` says what a step does with examples that did not settle, see `mep.EquilibriumPropagation`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from mep.capture import Leaves
from mep.cost import BatchCost, PerExample
from mep.errors import A_FLAG, ArgumentError, ParameterError, removed_arguments, require
from mep.estimators import Backprop, EquilibriumPropagation
from mep.estimators.inputs import check_model
from mep.optimizer import EPOptimizer
from mep.settle import Solver
from mep.solvers import Descent, Local, Sweep
from mep.updates import Dion, Muon, NaturalGradient, spectral_bound

_STRENGTH = "No nudge is weakened any more: beta is used as given. beta=None chooses one for each example."


@removed_arguments(strength=_STRENGTH)
def eqprop(
    params: ParamsT,
    model: nn.Module,
    *,
    lr: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    cost: str | PerExample | type[BatchCost] = "cross_entropy",
    beta: float | None = None,
    energy: str = "prediction",
    phases: str = "one-sided",
    branches: str = "held",
    leaves: Leaves = (),
    settle_steps: int | None = None,
    settle_lr: float | None = None,
    adaptive: bool | None = None,
    tol: float = 1e-2,
    patience: int = 1,
    on_unsettled: str = "warn",
    proof: str = "amortised",
    compile: bool = False,
    checkpoint: bool = False,
    low_memory: bool = False,
) -> EPOptimizer:
    """Vanilla equilibrium propagation: its gradient, and `torch.optim.SGD`.

    Args:
        params: the parameters to train, or groups of them; they must be the model's.
        model: the model.
        lr, momentum, weight_decay, nesterov: as in `torch.optim.SGD`.
        cost, beta, energy, phases, branches, leaves, compile, checkpoint, proof: as in `mep.EquilibriumPropagation`.
        settle_steps, settle_lr, adaptive, tol, patience, on_unsettled: how to settle, see `mep.presets`.
        low_memory: as in `mep.EPOptimizer`.

    Example:
        >>> import torch, mep
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> opt = mep.eqprop(net.parameters(), model=net, lr=0.1)
        >>> loss = opt.step(x=torch.ones(2, 4), target=torch.tensor([0, 2]))
        >>> opt.last.iterations <= 4, float(opt.last.residual.max()) <= 1e-2
        (True, True)
    """
    solver = _solver(energy, settle_steps, settle_lr, adaptive, tol, patience)
    estimator = EquilibriumPropagation(
        model,
        cost,
        beta,
        solver,
        energy,
        phases,
        branches,
        leaves,
        compile=compile,
        checkpoint=checkpoint,
        on_unsettled=on_unsettled,
        proof=proof,
    )
    update = _sgd("eqprop", _listed(params, model), lr, momentum, weight_decay, nesterov)
    return EPOptimizer(estimator, update, low_memory=low_memory)


@removed_arguments(strength=_STRENGTH)
def smep(
    params: ParamsT,
    model: nn.Module,
    *,
    lr: float = 0.02,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    nesterov: bool = True,
    gamma: float = 3.0,
    cost: str | PerExample | type[BatchCost] = "cross_entropy",
    beta: float | None = None,
    energy: str = "prediction",
    phases: str = "one-sided",
    branches: str = "held",
    leaves: Leaves = (),
    settle_steps: int | None = None,
    settle_lr: float | None = None,
    adaptive: bool | None = None,
    tol: float = 1e-2,
    patience: int = 1,
    on_unsettled: str = "warn",
    proof: str = "amortised",
    compile: bool = False,
    checkpoint: bool = False,
    low_memory: bool = False,
) -> EPOptimizer:
    """Spectral Muon EP: equilibrium propagation, Muon, and a bound on every weight's largest singular value.

    Args:
        params: the parameters to train, or groups of them; they must be the model's.
        model: the model.
        lr, momentum, weight_decay, nesterov: as in `mep.Muon`.
        gamma: the bound, see `mep.spectral_bound`.
        cost, beta, energy, phases, branches, leaves, compile, checkpoint, proof: as in `mep.EquilibriumPropagation`.
        settle_steps, settle_lr, adaptive, tol, patience, on_unsettled: how to settle, see `mep.presets`.
        low_memory: as in `mep.EPOptimizer`.
    """
    solver = _solver(energy, settle_steps, settle_lr, adaptive, tol, patience)
    estimator = EquilibriumPropagation(
        model,
        cost,
        beta,
        solver,
        energy,
        phases,
        branches,
        leaves,
        compile=compile,
        checkpoint=checkpoint,
        on_unsettled=on_unsettled,
        proof=proof,
    )
    update = Muon(_listed(params, model), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
    return EPOptimizer(estimator, update, [spectral_bound(gamma, exclude=partial(_embeddings, model))], low_memory)


@removed_arguments(strength=_STRENGTH)
def smep_fast(
    params: ParamsT,
    model: nn.Module,
    *,
    lr: float = 0.01,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    nesterov: bool = True,
    gamma: float = 3.0,
    cost: str | PerExample | type[BatchCost] = "cross_entropy",
    beta: float | None = None,
    energy: str = "prediction",
    phases: str = "one-sided",
    branches: str = "held",
    leaves: Leaves = (),
    settle_steps: int = 10,
    settle_lr: float | None = None,
    adaptive: bool | None = None,
    tol: float = 1e-1,
    patience: int = 1,
    on_unsettled: str = "warn",
    proof: str = "amortised",
    compile: bool = False,
    checkpoint: bool = False,
    low_memory: bool = False,
) -> EPOptimizer:
    """`smep` with a looser tolerance and fewer steps: for prototyping.

    Takes the arguments of `smep`. One or two sweeps a step suffice.
    """
    solver = _solver(energy, settle_steps, settle_lr, adaptive, tol, patience)
    estimator = EquilibriumPropagation(
        model,
        cost,
        beta,
        solver,
        energy,
        phases,
        branches,
        leaves,
        compile=compile,
        checkpoint=checkpoint,
        on_unsettled=on_unsettled,
        proof=proof,
    )
    update = Muon(_listed(params, model), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
    return EPOptimizer(estimator, update, [spectral_bound(gamma, exclude=partial(_embeddings, model))], low_memory)


@removed_arguments(strength=_STRENGTH)
def sdmep(
    params: ParamsT,
    model: nn.Module,
    *,
    lr: float = 0.02,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    nesterov: bool = True,
    rank_fraction: float = 0.2,
    dion_threshold: int = 8192,
    gamma: float = 3.0,
    cost: str | PerExample | type[BatchCost] = "cross_entropy",
    beta: float | None = None,
    energy: str = "prediction",
    phases: str = "one-sided",
    branches: str = "held",
    leaves: Leaves = (),
    settle_steps: int | None = None,
    settle_lr: float | None = None,
    adaptive: bool | None = None,
    tol: float = 1e-2,
    patience: int = 1,
    on_unsettled: str = "warn",
    proof: str = "amortised",
    compile: bool = False,
    checkpoint: bool = False,
    low_memory: bool = False,
) -> EPOptimizer:
    """Spectral Dion-Muon EP: `smep` with Dion's low-rank step for the large weights.

    Takes the arguments of `smep`, and of Dion:

    Args:
        rank_fraction, dion_threshold: as in `mep.Dion`. Weights with fewer entries than the threshold, biases and gains
            take Muon's step; `nesterov` concerns only these.

    Example:
        >>> import torch, mep
        >>> net = torch.nn.Sequential(torch.nn.Linear(200, 100), torch.nn.ReLU(), torch.nn.Linear(100, 3))
        >>> opt = mep.sdmep(net.parameters(), model=net, rank_fraction=0.1)
        >>> loss = opt.step(x=torch.ones(2, 200), target=torch.tensor([0, 2]))
        >>> [tuple(state["right_factor"].shape) for state in opt.state.values() if "right_factor" in state]
        [(100, 10)]
    """
    solver = _solver(energy, settle_steps, settle_lr, adaptive, tol, patience)
    estimator = EquilibriumPropagation(
        model,
        cost,
        beta,
        solver,
        energy,
        phases,
        branches,
        leaves,
        compile=compile,
        checkpoint=checkpoint,
        on_unsettled=on_unsettled,
        proof=proof,
    )
    update = Dion(
        _listed(params, model),
        lr=lr,
        momentum=momentum,
        rank_fraction=rank_fraction,
        dion_threshold=dion_threshold,
        nesterov=nesterov,
        weight_decay=weight_decay,
    )
    return EPOptimizer(estimator, update, [spectral_bound(gamma, exclude=partial(_embeddings, model))], low_memory)


def O1MemoryEPv2(
    params: ParamsT,
    model: nn.Module,
    *,
    lr: float = 0.02,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    nesterov: bool = True,
    gamma: float = 3.0,
    cost: str | PerExample | type[BatchCost] = "cross_entropy",
    beta: float | None = None,
    energy: str = "prediction",
    phases: str = "one-sided",
    branches: str = "held",
    leaves: Leaves = (),
    settle_steps: int = 30,
    settle_lr: float = 0.15,
    adaptive: bool = False,
    tol: float = 1e-2,
    patience: int = 1,
    on_unsettled: str = "warn",
    proof: str = "amortised",
    low_memory: bool = False,
) -> EPOptimizer:
    """`smep` that settles by gradient descent with closed-form forces: its memory does not grow with `settle_steps`.

    The states are those of descent by autograd on the whole energy, up to rounding, but no graph ever spans more than
    one node, and only the latest states, forces and velocities are kept. Takes the arguments of `smep`; without
    sweeps to choose from, `settle_lr` must be a number.

    Example:
        >>> import torch, mep
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> opt = mep.O1MemoryEPv2(net.parameters(), model=net, settle_steps=15)
        >>> loss = opt.step(x=torch.ones(2, 4), target=torch.tensor([0, 2]))
        >>> opt.last.iterations
        15
    """
    solver = _descent(settle_steps, settle_lr, adaptive, tol, patience)
    estimator = EquilibriumPropagation(
        model, cost, beta, solver, energy, phases, branches, leaves, on_unsettled=on_unsettled, proof=proof
    )
    update = Muon(_listed(params, model), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
    return EPOptimizer(estimator, update, [spectral_bound(gamma, exclude=partial(_embeddings, model))], low_memory)


@removed_arguments(strength=_STRENGTH)
def natural_ep(
    params: ParamsT,
    model: nn.Module,
    *,
    lr: float = 0.05,
    momentum: float = 0.8,
    weight_decay: float = 0.02,
    nesterov: bool = False,
    damping: float = 0.03,
    kl_clip: float | None = 0.02,
    decay: float = 0.9,
    factors_every: int = 20,
    inverse_every: int = 20,
    rank: int | None = 32,
    use_diagonal_fisher: bool = False,
    orthogonalise: bool = False,
    cost: str | PerExample | type[BatchCost] = "cross_entropy",
    beta: float | None = None,
    phases: str = "one-sided",
    branches: str = "held",
    leaves: Leaves = (),
    settle_steps: int | None = None,
    settle_lr: float | None = None,
    adaptive: bool | None = None,
    tol: float = 1e-2,
    patience: int = 1,
    on_unsettled: str = "warn",
    proof: str = "amortised",
    compile: bool = False,
) -> EPOptimizer:
    """Natural-gradient EP: equilibrium propagation, and a Fisher matrix from the settled states.

    Its Kronecker factors are made of the inputs and errors that settling leaves behind, without a backward pass. The
    energy is "prediction", whose errors they are.

    Args:
        params: the parameters to train, or groups of them; they must be the model's.
        model: the model.
        lr, momentum, weight_decay, nesterov, damping, kl_clip, decay, factors_every, inverse_every, rank,
            use_diagonal_fisher, orthogonalise: as in `mep.NaturalGradient`. Some weight decay is the default: steps
            this long fit a small training set at once.
        cost, beta, phases, branches, leaves, compile: as in `mep.EquilibriumPropagation`.
        settle_steps, settle_lr, adaptive, tol, patience, on_unsettled: how to settle, see `mep.presets`.

    Example:
        >>> import torch, mep
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> opt = mep.natural_ep(net.parameters(), model=net, use_diagonal_fisher=True)
        >>> loss = opt.step(x=torch.ones(2, 4), target=torch.tensor([0, 2]))
        >>> opt.state[net[0].weight]["moments"]["diagonal"].shape
        torch.Size([8, 5])
    """
    check_model(model, "natural_ep")
    update = NaturalGradient(
        _listed(params, model),
        lr=lr,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        damping=damping,
        kl_clip=kl_clip,
        decay=decay,
        factors_every=factors_every,
        inverse_every=inverse_every,
        rank=rank,
        use_diagonal_fisher=use_diagonal_fisher,
        orthogonalise=orthogonalise,
    )
    solver = _solver("prediction", settle_steps, settle_lr, adaptive, tol, patience)
    estimator = EquilibriumPropagation(
        model,
        cost,
        beta,
        solver,
        phases=phases,
        branches=branches,
        leaves=leaves,
        observe=update.observe,
        compile=compile,
        on_unsettled=on_unsettled,
        proof=proof,
    )
    return EPOptimizer(estimator, update)


def local_ep(
    params: ParamsT,
    model: nn.Module,
    *,
    lr: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    cost: str | PerExample | type[BatchCost] = "cross_entropy",
    beta: float | None = None,
    phases: str = "one-sided",
    leaves: Leaves = (),
    tol: float = 1e-2,
    schedule: str = "there and back",
    on_unsettled: str = "warn",
    proof: str = "amortised",
    low_memory: bool = False,
) -> EPOptimizer:
    """Strictly local equilibrium propagation: nodes that see only their neighbours, and `torch.optim.SGD`.

    A node answers its parents' states and its children's forces until it is quiet, see `mep.Local`; its weights then
    follow from what it holds. No sweep, no norm over other nodes, no orthogonalisation: SGD is local to each weight.

    Args:
        params: the parameters to train, or groups of them; they must be the model's.
        model: the model.
        lr, momentum, weight_decay, nesterov: as in `torch.optim.SGD`.
        cost, beta, phases, leaves, on_unsettled, proof: as in `mep.EquilibriumPropagation`.
        tol, schedule: as in `mep.Local`.
        low_memory: as in `mep.EPOptimizer`.

    Example:
        >>> import torch, mep
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> opt = mep.local_ep(net.parameters(), model=net, schedule="random")
        >>> loss = opt.step(x=torch.ones(2, 4), target=torch.tensor([0, 2]))
        >>> opt.last.converged
        True
    """
    solver = Local(tol=tol, schedule=schedule)
    estimator = EquilibriumPropagation(
        model, cost, beta, solver, phases=phases, leaves=leaves, on_unsettled=on_unsettled, proof=proof
    )
    update = _sgd("local_ep", _listed(params, model), lr, momentum, weight_decay, nesterov)
    return EPOptimizer(estimator, update, low_memory=low_memory)


def muon_backprop(
    params: ParamsT,
    model: nn.Module,
    *,
    lr: float = 0.02,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    nesterov: bool = True,
    cost: str | PerExample | type[BatchCost] = "cross_entropy",
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


def _embeddings(model: nn.Module) -> list[Any]:
    """The tables of a model: rows that are looked up, and stretch nothing."""
    return [m.weight for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]


def _listed(params: ParamsT, model: nn.Module) -> list[Any]:
    """The parameters or groups as a list, after checking that there are some."""
    listed = list(params)
    if not listed:
        raise ParameterError(
            f"params is empty: pass model.parameters() of {type(model).__name__}; a generator can be read only once."
        )
    return listed


def _sgd(
    call: str, groups: list[Any], lr: float, momentum: float, weight_decay: float, nesterov: bool
) -> torch.optim.Optimizer:
    """`torch.optim.SGD`, which would let NaN pass, and raises errors of its own for the rest."""
    for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
        require(call, name, value, lambda v: v >= 0, "a number >= 0")
    require(call, "nesterov", nesterov, *A_FLAG)
    if nesterov:
        require(call, "momentum", momentum, lambda m: m > 0, "above 0 with nesterov=True")
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)


def _solver(
    energy: str, steps: int | None, settle_lr: float | None, adaptive: bool | None, tol: float, patience: int
) -> Solver:
    if settle_lr is not None:
        return _descent(30 if steps is None else steps, settle_lr, bool(adaptive), tol, patience)
    if energy != "prediction":
        raise ArgumentError(f"energy={energy!r} settles by descent: give settle_lr, for instance settle_lr=0.3.")
    adaptive = adaptive is not False
    _check_patience(patience, adaptive)
    steps = (100 if adaptive else 30) if steps is None else steps
    return Sweep(settle_steps=steps, tol=tol, patience=patience, adaptive=adaptive)


def _descent(settle_steps: int, settle_lr: float, adaptive: bool, tol: float, patience: int) -> Solver:
    _check_patience(patience, adaptive)
    return Descent(settle_steps, tol, patience, adaptive, settle_lr)


def _check_patience(patience: int, adaptive: bool) -> None:
    if not adaptive and patience != 1:
        raise ArgumentError(f"patience={patience} does something only with adaptive=True.")
