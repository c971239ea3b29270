"""What an estimator refuses: batches that cannot be used, settings out of range, and those that do not go together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mep.capture.state import check_state
from mep.cost import BatchCost, PerExample, WithReadout
from mep.energy import GroupEnergy, Hopfield
from mep.errors import A_FLAG, ArgumentError, one_of, require
from mep.estimators.compiled_step import MOST_SWEEPS
from mep.estimators.contrast import CONTRASTS
from mep.graph import Graph
from mep.graph.inputs import check_mode
from mep.guards import generators, set_generators
from mep.settle import Solver

_CALL = "EquilibriumPropagation"


@contextmanager
def noise_undone_on_error() -> Iterator[None]:
    """On an error, an interruption included, torch's random number generators end as they began."""
    noise = generators()
    try:
        yield
    except BaseException:
        set_generators(noise)
        raise


def check_solver(solver: Any) -> None:
    """Refuse what is no solver."""
    if not isinstance(solver, Solver):
        raise ArgumentError(f"{_CALL}(solver={solver!r}): must be a mep.Sweep, mep.Descent, ...")


def with_readout(cost: str | PerExample | type[BatchCost], readout: Any) -> WithReadout:
    """The cost behind the readout, if that can be one."""
    require(_CALL, "readout", readout, lambda module: isinstance(module, nn.Module), "a torch.nn.Module")
    whole = WithReadout(readout, cost)
    check_state(whole)
    return whole


def check_groups(groups: Sequence[GroupEnergy], graph: Graph) -> None:
    """Refuse groups of nodes that have no state in the graph."""
    names = [node.name for node in graph.states]
    for group in groups:
        if not group.nodes or not set(group.nodes) <= set(names):
            raise ArgumentError(
                f"{type(group).__name__}.nodes = {group.nodes}: must be names of nodes with a state, which are "
                f"{', '.join(names)}; see print(mep.trace(model, x))."
            )


def check_relax(ep: Any, clamp: Any, start: Any, held: Any) -> None:
    """Refuse what `relax` cannot hold, or would ignore."""
    check_mode()
    if not isinstance(ep.node_energy, Hopfield):
        raise ArgumentError(
            f"relax: only Hopfield networks run backward, and this is energy={ep.node_energy.name!r}. Use "
            "energy='hopfield'."
        )
    for name, given in (("clamp", clamp), ("start", start or {}), ("held", held or {})):
        if not isinstance(given, Mapping) or not all(isinstance(v, Tensor) and v.ndim for v in given.values()):
            raise ArgumentError(f"relax({name}=...): must be a mapping from names to tensors [batch, ...].")
    if not clamp and not start:
        raise ArgumentError("relax(clamp={}): nothing is given. Hold something, or say where the states start.")


def check_settings(ep: Any) -> None:
    """Raise an ArgumentError, with what to write instead, where the settings of an estimator do not fit."""
    _check_values(ep)
    if ep.compile:
        _check_compile(ep)
    if ep.checkpoint:
        _check_checkpoint(ep)


def _check_values(ep: Any) -> None:
    if ep.beta is not None:
        require(_CALL, "beta", ep.beta, lambda beta: 0 < beta < math.inf, "a positive number, or None to choose it")
    require(_CALL, "phases", ep.phases, *one_of(sorted(CONTRASTS)))
    require(_CALL, "branches", ep.branches, *one_of(("held", "exact")))
    require(_CALL, "on_unsettled", ep.on_unsettled, *one_of(("warn", "raise", "ignore")))
    require(_CALL, "proof", ep.proof, *one_of(("amortised", "always", "never")))
    for name in ("compile", "checkpoint", "diagnostics"):
        require(_CALL, name, getattr(ep, name), *A_FLAG)
    if ep.observe is not None:
        require(_CALL, "observe", ep.observe, callable, "callable, as update.observe")
    for group in ep.groups:
        if not isinstance(group, GroupEnergy):
            raise ArgumentError(f"{_CALL}(groups=[{group!r}]): must be objects derived from mep.GroupEnergy.")
    if ep.groups and not ep.solver.settles_groups:
        raise ArgumentError(
            f"{_CALL}(groups=..., solver={ep.solver}): {type(ep.solver).__name__} does not settle energies of groups. "
            "Use solver=mep.Descent(...)."
        )
    if ep.observe is not None and (ep.groups or not ep.node_energy.is_forward):
        raise ArgumentError(f"{_CALL}(observe=...): energy={ep.node_energy.name!r} has no errors to observe.")
    ep.solver.check(ep.node_energy)


def _check_compile(ep: Any) -> None:
    call = f"{_CALL}(compile=True"
    if not ep.solver.compiles:
        raise ArgumentError(f"{call}, solver={ep.solver}): only solvers with `unrolled` are compiled: mep.Sweep.")
    if ep.solver.patience > 1:
        raise ArgumentError(f"{call}, solver=Sweep(patience={ep.solver.patience})): patience must be 1.")
    if not ep.solver.adaptive and ep.solver.settle_steps > MOST_SWEEPS:
        raise ArgumentError(
            f"{call}, solver={ep.solver}): at most {MOST_SWEEPS} sweeps are compiled. Give fewer, or adaptive=True."
        )
    if ep.branches == "exact":
        raise ArgumentError(f"{call}, branches='exact'): only held branches are compiled.")
    if ep.readout is not None:
        raise ArgumentError(f"{call}, readout=...): a readout is not compiled. Leave out one of the two.")
    if ep.diagnostics:
        raise ArgumentError(f"{call}, diagnostics=True): leave out one of the two.")
    if ep.cost not in ("cross_entropy", "mse"):
        raise ArgumentError(f"{call}, cost={ep.cost!r}): only 'cross_entropy' and 'mse' are compiled.")


def _check_checkpoint(ep: Any) -> None:
    for name, asked in (
        (f"solver={ep.solver}", not ep.solver.checkpoints),
        ("branches='exact'", ep.branches == "exact"),
        (f"energy={ep.node_energy.name!r}", not ep.node_energy.is_quadratic),
        ("compile=True", ep.compile),
        ("diagnostics=True", ep.diagnostics),
        ("observe=...", ep.observe is not None),
    ):
        if asked:
            raise ArgumentError(
                f"{_CALL}(checkpoint=True, {name}): it needs the states of all nodes at once. Leave out one of the two."
            )
