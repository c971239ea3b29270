"""Presets: each function builds an optimizer from an estimator, an update and constraints; its body lists these parts.

All are real `torch.optim.Optimizer`s with `step(x=..., target=...)`. How the states settle, in every preset that has
these arguments:

- `settle_lr`: None uses sweeps, `mep.Sweep`; a number uses gradient descent on the states with this step size,
  `mep.Descent`.
- `settle_steps`: the largest number of iterations. None is 100 for adaptive sweeps, else 30.
- `adaptive`: True stops each example once its residual has been at most `tol` in `patience` iterations in a row; False
  makes exactly `settle_steps` iterations. None is True for sweeps and False for descent.
- `on_unsettled`: what a step does if some example did not settle, see `mep.EquilibriumPropagation`.

With `energy="hopfield"` and no `settle_lr` the states settle by `mep.Relaxation`, whose iterations are sweeps, too.
Large weights give such a network several equilibria, and cross entropy is never done with enlarging them: `cost` is
then "one_hot_mse" by default (the squared error; class labels stand for one-hot vectors), and presets have another
`lr` and `momentum`, see `HOPFIELD_DEFAULTS`.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypedDict

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from mep.capture import Leaves
from mep.cost import BatchCost, PerExample
from mep.energy import GroupEnergy, Hopfield, NodeEnergy, make_node_energy
from mep.errors import A_FLAG, ArgumentError, ParameterError, RemovedArgumentError, UnknownArgumentError, require
from mep.estimators import Backprop, EquilibriumPropagation
from mep.graph.inputs import check_model
from mep.optimizer import Constraint, EPOptimizer
from mep.settle import Solver
from mep.solvers import Descent, Local, Relaxation, Sweep
from mep.updates import Dion, Muon, NaturalGradient, spectral_bound

if TYPE_CHECKING:
    from typing_extensions import Unpack

_Given = ParamSpec("_Given")


class Settling(TypedDict, total=False):
    """How a preset estimates gradients: the keywords that presets have in common."""

    cost: str | PerExample | type[BatchCost]
    beta: float | None
    energy: str | NodeEnergy
    phases: str
    points: int | None
    branches: str
    leaves: Leaves
    groups: Sequence[GroupEnergy]
    readout: nn.Module | None
    settle_steps: int | None
    settle_lr: float | None
    adaptive: bool | None
    tol: float
    patience: int
    on_unsettled: str
    proof: str
    compile: bool
    checkpoint: bool
    low_memory: bool


_DEFAULTS: dict[str, Any] = {
    "cost": "cross_entropy", "beta": None, "energy": "prediction", "phases": "one-sided", "points": None,
    "branches": "held", "leaves": (), "groups": (), "readout": None, "settle_steps": None, "settle_lr": None,
    "adaptive": None, "tol": 1e-2, "patience": 1, "on_unsettled": "warn", "proof": "amortised", "compile": False,
    "checkpoint": False, "low_memory": False,
}  # fmt: skip
HOPFIELD_DEFAULTS: dict[str, dict[str, Any]] = {
    "eqprop": {"lr": 0.3, "momentum": 0.5},
    "natural_ep": {"lr": 0.01},
    **{name: {"lr": 0.005} for name in ("smep", "smep_fast", "sdmep", "O1MemoryEPv2")},
}
"""What a preset has instead of its defaults with `energy="hopfield"`, beside the cost "one_hot_mse"."""
_REMOVED = {"strength": "No nudge is weakened any more: beta is used as given. beta=None chooses one for each example."}
_LACKING = {
    "O1MemoryEPv2": "its states settle by gradient descent, mep.Descent, which does not have this",
    "natural_ep": "it needs the states and errors of all layers at once, of energies of single nodes",
    "local_ep": "it is for the prediction energy, which mep.Local settles node by node and with few settings",
}
"""Why some presets are without keywords that others have."""


def _settles(*without: str, **changed: Any) -> Callable[[Callable[_Given, EPOptimizer]], Callable[_Given, EPOptimizer]]:
    """A decorator of presets: `**settling` holds every keyword of `Settling` but those named, with these defaults.

    The signature that `help` and `inspect` show has them one by one, and an unknown keyword raises with a suggestion.
    """
    defaults = {name: changed.get(name, value) for name, value in _DEFAULTS.items() if name not in without}

    def decorate(recipe: Callable[_Given, EPOptimizer]) -> Callable[_Given, EPOptimizer]:
        own = [p for p in inspect.signature(recipe).parameters.values() if p.kind is not p.VAR_KEYWORD]
        names = [p.name for p in own] + list(defaults)

        @functools.wraps(recipe)
        def build(*args: _Given.args, **given: _Given.kwargs) -> EPOptimizer:
            for name in given.keys() - set(names):
                if name in _REMOVED:
                    raise RemovedArgumentError(f"{recipe.__name__}({name}=...) is gone. {_REMOVED[name]}")
                if name in without:
                    raise UnknownArgumentError(
                        f"{recipe.__name__}({name}=...): {_LACKING[recipe.__name__]}. Leave it out, or use another "
                        f"preset that has it, as mep.eqprop({name}=...)."
                    )
                near = difflib.get_close_matches(name, names, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else f" It takes {', '.join(names)}."
                raise UnknownArgumentError(f"{recipe.__name__}() got an unexpected keyword argument {name!r}.{hint}")
            every: Any = defaults | given
            energy = given.get("energy")
            if energy == "hopfield" or isinstance(energy, Hopfield):
                every = defaults | {"cost": "one_hot_mse"} | HOPFIELD_DEFAULTS.get(recipe.__name__, {}) | given
            return recipe(*args, **every)

        kind = inspect.Parameter.KEYWORD_ONLY
        hints = {n: getattr(hint, "__forward_arg__", hint) for n, hint in Settling.__annotations__.items()}
        more = [inspect.Parameter(n, kind, default=v, annotation=hints[n]) for n, v in defaults.items()]
        build.__signature__ = inspect.Signature([*own, *more], return_annotation="EPOptimizer")  # type: ignore[attr-defined]
        return build

    return decorate


@_settles()
def eqprop(
    params: ParamsT,
    model: nn.Module,
    *,
    lr: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    **settling: Unpack[Settling],
) -> EPOptimizer:
    """Equilibrium propagation with the fewest parts: its gradient, and `torch.optim.SGD`.

    Args:
        params: the parameters to train, or groups of them; they must be the model's (or those of a readout).
        model: the model.
        lr, momentum, weight_decay, nesterov: as in `torch.optim.SGD`.
        cost, beta, energy, phases, points, branches, leaves, groups, readout, compile, checkpoint, proof: as in
            `mep.EquilibriumPropagation`.
        settle_steps, settle_lr, adaptive, tol, patience, on_unsettled: how the states settle, see `mep.presets`.
        low_memory: as in `mep.EPOptimizer`.

    Example:
        >>> import torch, mep
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> opt = mep.eqprop(net.parameters(), model=net, lr=0.1)
        >>> loss = opt.step(x=torch.ones(2, 4), target=torch.tensor([0, 2]))
        >>> opt.last.iterations <= 4, float(opt.last.residual.max()) <= 1e-2
        (True, True)
    """
    estimator = EquilibriumPropagation(model, solver=_solver(settling), **_estimator(settling))
    update = _sgd("eqprop", _listed(params, model), lr, momentum, weight_decay, nesterov)
    return EPOptimizer(estimator, update, low_memory=settling["low_memory"])


@_settles()
def smep(
    params: ParamsT,
    model: nn.Module,
    *,
    lr: float = 0.02,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    nesterov: bool = True,
    gamma: float = 3.0,
    **settling: Unpack[Settling],
) -> EPOptimizer:
    """Spectral Muon EP: equilibrium propagation, Muon, and a bound on the largest singular value of every weight.

    Args:
        params: the parameters to train, or groups of them; they must be the model's (or those of a readout).
        model: the model.
        lr, momentum, weight_decay, nesterov: as in `mep.Muon`.
        gamma: the bound, see `mep.spectral_bound`. Weights of embedding layers are left out.
        cost, beta, energy, phases, points, branches, leaves, groups, readout, compile, checkpoint, proof: as in
            `mep.EquilibriumPropagation`.
        settle_steps, settle_lr, adaptive, tol, patience, on_unsettled: how the states settle, see `mep.presets`.
        low_memory: as in `mep.EPOptimizer`.
    """
    estimator = EquilibriumPropagation(model, solver=_solver(settling), **_estimator(settling))
    update = Muon(_listed(params, model), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
    return EPOptimizer(estimator, update, [_bound(gamma, model)], settling["low_memory"])


@_settles(settle_steps=10, tol=1e-1)
def smep_fast(
    params: ParamsT,
    model: nn.Module,
    *,
    lr: float = 0.01,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    nesterov: bool = True,
    gamma: float = 3.0,
    **settling: Unpack[Settling],
) -> EPOptimizer:
    """`smep` with a larger tolerance, fewer sweeps and a smaller learning rate: for first experiments.

    Takes the arguments of `smep`. Three defaults differ: `tol` is 0.1 (0.01 in `smep`), `settle_steps` is 10 (100), and
    `lr` is 0.01 (0.02). Beta is chosen as in `smep`. A step is faster only where `smep` needs several sweeps.
    """
    estimator = EquilibriumPropagation(model, solver=_solver(settling), **_estimator(settling))
    update = Muon(_listed(params, model), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
    return EPOptimizer(estimator, update, [_bound(gamma, model)], settling["low_memory"])


@_settles()
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
    **settling: Unpack[Settling],
) -> EPOptimizer:
    """Spectral Dion-Muon EP: `smep` with Dion's low-rank update for large weights.

    Takes the arguments of `smep`, and two of `mep.Dion`:

    Args:
        rank_fraction, dion_threshold: as in `mep.Dion`. Weights with fewer entries than the threshold, biases and other
            vectors are updated as by `mep.Muon`; `nesterov` applies to these only.

    Example:
        >>> import torch, mep
        >>> net = torch.nn.Sequential(torch.nn.Linear(200, 100), torch.nn.ReLU(), torch.nn.Linear(100, 3))
        >>> opt = mep.sdmep(net.parameters(), model=net, rank_fraction=0.1)
        >>> loss = opt.step(x=torch.ones(2, 200), target=torch.tensor([0, 2]))
        >>> [tuple(state["right_factor"].shape) for state in opt.state.values() if "right_factor" in state]
        [(100, 10)]
    """
    estimator = EquilibriumPropagation(model, solver=_solver(settling), **_estimator(settling))
    update = Dion(
        _listed(params, model),
        lr=lr,
        momentum=momentum,
        rank_fraction=rank_fraction,
        dion_threshold=dion_threshold,
        nesterov=nesterov,
        weight_decay=weight_decay,
    )
    return EPOptimizer(estimator, update, [_bound(gamma, model)], settling["low_memory"])


@_settles("points", "compile", "checkpoint", settle_steps=30, settle_lr=0.15, adaptive=False)
def O1MemoryEPv2(
    params: ParamsT,
    model: nn.Module,
    *,
    lr: float = 0.02,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    nesterov: bool = True,
    gamma: float = 3.0,
    **settling: Unpack[Settling],
) -> EPOptimizer:
    """`smep` whose states settle by gradient descent, in memory that does not grow with `settle_steps`.

    "O1Memory" means O(1) in the number of iterations; the name is that of an optimizer of an earlier system, kept so
    that its code runs. The forces are computed node by node, in closed form or by a small autograd graph of the node.
    Only the latest states, forces and velocities are kept. Up to rounding the states are those of gradient descent by
    autograd through the whole energy.

    By default it makes exactly `settle_steps` iterations, converged or not: `opt.last.residual` has the residual of
    each example. Takes the arguments of `smep`, but `points`, `compile` and `checkpoint`; `settle_lr` must be a number.

    Example:
        >>> import torch, mep
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> opt = mep.O1MemoryEPv2(net.parameters(), model=net, settle_steps=15)
        >>> loss = opt.step(x=torch.ones(2, 4), target=torch.tensor([0, 2]))
        >>> opt.last.iterations
        15
    """
    if settling["settle_lr"] is None:
        raise ArgumentError("O1MemoryEPv2(settle_lr=None): must be a positive number, the step of gradient descent.")
    estimator = EquilibriumPropagation(model, solver=_solver(settling), **_estimator(settling))
    update = Muon(_listed(params, model), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
    return EPOptimizer(estimator, update, [_bound(gamma, model)], settling["low_memory"])


@_settles("groups", "checkpoint", "low_memory")
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
    **settling: Unpack[Settling],
) -> EPOptimizer:
    """Natural-gradient EP: equilibrium propagation, and natural gradient with the Fisher matrix of the settled states.

    The Kronecker factors of the Fisher matrix are computed from the input and the error of every layer, which settling
    has computed already, so they need no backward pass.

    Args:
        params: the parameters to train, or groups of them; they must be the model's (or those of a readout).
        model: the model.
        lr, momentum, weight_decay, nesterov, damping, kl_clip, decay, factors_every, inverse_every, rank,
            use_diagonal_fisher, orthogonalise: as in `mep.NaturalGradient`. Weight decay is 0.02 by default, because
            natural-gradient steps overfit small data quickly.
        cost, beta, energy, phases, points, branches, leaves, readout, compile, proof: as in
            `mep.EquilibriumPropagation`.
        settle_steps, settle_lr, adaptive, tol, patience, on_unsettled: how the states settle, see `mep.presets`.

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
    estimator = EquilibriumPropagation(model, solver=_solver(settling), observe=update.observe, **_estimator(settling))
    return EPOptimizer(estimator, update)


_FIXED = ("energy", "groups", "points", "branches", "settle_steps", "settle_lr", "adaptive", "patience")


@_settles(*_FIXED, "compile", "checkpoint")
def local_ep(
    params: ParamsT,
    model: nn.Module,
    *,
    lr: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    schedule: str = "there and back",
    **settling: Unpack[Settling],
) -> EPOptimizer:
    """Local equilibrium propagation: each node settles from the values of its neighbours alone; `torch.optim.SGD`.

    A node is computed again when a parent's state or a child's force has changed, until its residual is at most `tol`,
    see `mep.Local`. The gradient of its parameters follows from its own state and error. There is no sweep, no norm
    over other nodes and no orthogonalisation, and SGD updates each parameter by itself. Only `beta=None` uses the whole
    network: it computes the gain, so pass a beta for a strictly local rule.

    Args:
        params: the parameters to train, or groups of them; they must be the model's (or those of a readout).
        model: the model.
        lr, momentum, weight_decay, nesterov: as in `torch.optim.SGD`.
        cost, beta, phases, leaves, readout, on_unsettled, proof: as in `mep.EquilibriumPropagation`.
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
    solver = Local(tol=settling["tol"], schedule=schedule)
    estimator = EquilibriumPropagation(model, solver=solver, **_estimator(settling))
    update = _sgd("local_ep", _listed(params, model), lr, momentum, weight_decay, nesterov)
    return EPOptimizer(estimator, update, low_memory=settling["low_memory"])


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
    """Muon with backpropagation's gradient, to compare `smep` with; without the bound on singular values.

    Args:
        params: the parameters to train, or groups of them; they must be the model's.
        model: the model.
        lr, momentum, weight_decay, nesterov: as in `mep.Muon`.
        cost: as in `mep.EquilibriumPropagation`.
    """
    estimator = Backprop(model, cost)
    update = Muon(_listed(params, model), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
    return EPOptimizer(estimator, update)


def _bound(gamma: float, model: nn.Module) -> Constraint:
    """The bound on all weights but embeddings, whose rows are looked up, not multiplied with."""
    return spectral_bound(gamma, exclude=functools.partial(_embeddings, model))  # a deep copy has the copied model


def _embeddings(model: nn.Module) -> list[Any]:
    """The weights of embedding layers."""
    return [m.weight for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]


def _listed(params: ParamsT, model: nn.Module) -> list[Any]:
    """The parameters or groups as a list, after checking that there are some."""
    if isinstance(params, nn.Module):
        raise ArgumentError(f"params is a {type(params).__name__}, not its parameters: pass model.parameters().")
    listed = list(params)
    if not listed:
        raise ParameterError(
            f"params is empty: pass model.parameters() of {type(model).__name__}; a generator can be read only once."
        )
    return listed


def _sgd(
    call: str, groups: list[Any], lr: float, momentum: float, weight_decay: float, nesterov: bool
) -> torch.optim.Optimizer:
    """`torch.optim.SGD` after checks that raise an `ArgumentError`; by itself it accepts NaN."""
    for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
        require(call, name, value, lambda v: v >= 0, "a number >= 0")
    require(call, "nesterov", nesterov, *A_FLAG)
    if nesterov:
        require(call, "momentum", momentum, lambda m: m > 0, "above 0 with nesterov=True")
    sgd = torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
    for group in sgd.param_groups:
        # On the CPU torch's default is a loop over parameters. In half precision `foreach` rounds the momentum itself.
        is_exact = all(p.device.type == "cpu" and p.dtype in (torch.float32, torch.float64) for p in group["params"])
        if group["foreach"] is None and is_exact:
            group["foreach"] = True
    return sgd


_OF_SOLVER = ("settle_steps", "settle_lr", "adaptive", "tol", "patience")


def _estimator(settling: Settling) -> dict[str, Any]:
    """The keywords of `EquilibriumPropagation` among those of a preset."""
    return {name: value for name, value in settling.items() if name not in (*_OF_SOLVER, "low_memory")}


def _solver(settling: Settling) -> Solver:
    """Descent where a step size is given, else sweeps."""
    steps, settle_lr, adaptive, tol, patience = (settling[name] for name in _OF_SOLVER)  # type: ignore[literal-required]
    energy = make_node_energy(settling.get("energy", "prediction"))
    is_hopfield = isinstance(energy, Hopfield)
    if settle_lr is None and not (energy.has_state or is_hopfield):
        raise ArgumentError(f"energy={energy.name!r} settles by descent: give settle_lr, for instance settle_lr=0.3.")
    adaptive = bool(adaptive) if settle_lr is not None else adaptive is not False
    if not adaptive and patience != 1:
        raise ArgumentError(f"patience={patience} does something only with adaptive=True.")
    steps = (100 if adaptive and settle_lr is None else 30) if steps is None else steps
    if settle_lr is not None:
        return Descent(steps, tol, patience, adaptive, settle_lr)
    return Relaxation(steps, tol, patience, adaptive) if is_hopfield else Sweep(steps, tol, patience, adaptive)
