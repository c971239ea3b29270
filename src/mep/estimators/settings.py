"""What an estimator refuses at once: settings out of range, and those that do not go together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mep.errors import A_FLAG, ArgumentError, one_of, require
from mep.estimators.contrast import CONTRASTS
from mep.estimators.programs import MOST_SWEEPS
from mep.settle import Solver
from mep.solvers import Sweep

if TYPE_CHECKING:
    from mep.estimators.equilibrium import EquilibriumPropagation

_CALL = "EquilibriumPropagation"


def check_solver(solver: Any) -> None:
    """Refuse what is no solver."""
    if not isinstance(solver, Solver):
        raise ArgumentError(f"{_CALL}(solver={solver!r}): must be a mep.Sweep, mep.Descent, ...")


def check_settings(ep: EquilibriumPropagation) -> None:
    """Raise an ArgumentError that says what to write instead."""
    _check_values(ep)
    if ep.compile:
        _check_compile(ep)
    if ep.checkpoint:
        _check_checkpoint(ep)


def _check_values(ep: EquilibriumPropagation) -> None:
    energy = ep.coupling.name
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
    if ep.observe is not None and energy != "prediction":
        raise ArgumentError(f"{_CALL}(observe=...): energy={energy!r} has no errors to observe.")
    if ep.solver.prediction_only and energy != "prediction":
        raise ArgumentError(
            f"{type(ep.solver).__name__} does not settle energy={energy!r}. Use solver=mep.Descent(...)."
        )


def _check_compile(ep: EquilibriumPropagation) -> None:
    call = f"{_CALL}(compile=True"
    if not isinstance(ep.solver, Sweep):
        raise ArgumentError(f"{call}, solver={ep.solver}): only mep.Sweep is compiled.")
    if ep.solver.patience > 1:
        raise ArgumentError(f"{call}, solver=Sweep(patience={ep.solver.patience})): patience must be 1.")
    if not ep.solver.adaptive and ep.solver.settle_steps > MOST_SWEEPS:
        raise ArgumentError(
            f"{call}, solver={ep.solver}): at most {MOST_SWEEPS} sweeps are compiled. Give fewer, or adaptive=True."
        )
    if ep.branches == "exact":
        raise ArgumentError(f"{call}, branches='exact'): only held branches are compiled.")
    if ep.diagnostics:
        raise ArgumentError(f"{call}, diagnostics=True): leave out one of the two.")
    if ep.cost not in ("cross_entropy", "mse"):
        raise ArgumentError(f"{call}, cost={ep.cost!r}): only 'cross_entropy' and 'mse' are compiled.")


def _check_checkpoint(ep: EquilibriumPropagation) -> None:
    for name, asked in (
        (f"solver={ep.solver}", not isinstance(ep.solver, Sweep)),
        ("branches='exact'", ep.branches == "exact"),
        ("compile=True", ep.compile),
        ("diagnostics=True", ep.diagnostics),
        ("observe=...", ep.observe is not None),
    ):
        if asked:
            raise ArgumentError(
                f"{_CALL}(checkpoint=True, {name}): it needs the states of all nodes at once. Leave out one of the two."
            )
