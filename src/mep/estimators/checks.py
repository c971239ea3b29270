"""What an estimator refuses: batches that cannot be used, settings out of range, and those that do not go together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mep.capture.state import check_state
from mep.cost import NAMED, BatchCost, PerExample, WithReadout
from mep.energy import Energy, GroupEnergy, Hopfield
from mep.errors import A_FLAG, ArgumentError, InputError, one_of, require, whole_number
from mep.estimators.compiled_step import MOST_SWEEPS
from mep.estimators.contrast import PHASES
from mep.graph import Graph, Point
from mep.graph.holomorphic import check_complex
from mep.graph.inputs import check_mode
from mep.settle import Solver

_CALL = "EquilibriumPropagation"


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


def check_feedback(ep: Any, feedback: Any) -> dict[str, Tensor]:
    """The feedback weights by the names of the weights, if they can be used."""
    call = f"{_CALL}(feedback={{...}}"
    if feedback is None:
        return {}
    if not isinstance(feedback, Mapping) or not feedback:
        raise ArgumentError(f"{_CALL}(feedback={feedback!r}): must be a mapping from names of weights to tensors.")
    if not isinstance(ep.node_energy, Hopfield):
        raise ArgumentError(
            f"{call}, energy={ep.node_energy.name!r}): only layers of a Hopfield network send messages through weights "
            "of their own. Use energy='hopfield'."
        )
    if not ep.solver.settles_fields:
        raise ArgumentError(f"{call}, solver={ep.solver}): there is no energy to descend. Use mep.Relaxation(...).")
    check_feedback_shapes(ep.model, feedback)
    return dict(feedback)


def check_feedback_shapes(model: nn.Module, feedback: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """The parameters of the model by their names, if every feedback weight is like the weight of its name."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    for name, b in feedback.items():
        call = f"{_CALL}(feedback={{{name!r}: ...}})"
        if name not in weights:
            raise ArgumentError(f"{call}: must be one of model.named_parameters(): {', '.join(weights)}.")
        if not isinstance(b, Tensor) or (b.requires_grad and not isinstance(b, nn.Parameter)):
            raise ArgumentError(f"{call}: must be a torch.nn.Parameter, or a tensor without requires_grad.")
        got, wanted = ((tuple(t.shape), t.dtype, t.device) for t in (b, weights[name]))
        if got != wanted:
            raise ArgumentError(f"{call}: must be like the weight, {wanted}, and is {got}.")
    return weights


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
    if ep.feedback:
        raise ArgumentError("relax: with feedback=... there is no energy. Use an estimator without it.")
    if not isinstance(ep.node_energy, Hopfield):
        raise ArgumentError(
            f"relax: only Hopfield networks run backward, and this is energy={ep.node_energy.name!r}. Use "
            "energy='hopfield'."
        )
    for name, given in (("clamp", clamp), ("start", start or {}), ("held", held or {})):
        if not isinstance(given, Mapping) or not all(isinstance(v, Tensor) and v.ndim for v in given.values()):
            raise ArgumentError(f"relax({name}=...): must be a mapping from names to tensors [batch, ...].")
        for own, value in given.items():
            if value.is_complex():
                raise InputError(f"relax({name}={{{own!r}: ...}}): must be real, got {value.dtype}.")
    if not clamp and not start:
        raise ArgumentError("relax(clamp={}): nothing is given. Hold something, or say where the states start.")


def check_settings(ep: Any) -> None:
    """Raise an ArgumentError, with what to write instead, where the settings of an estimator do not fit."""
    _check_values(ep)
    if ep.compile:
        _check_compile(ep)
    if ep.checkpoint:
        _check_checkpoint(ep)
    if ep.feedback:
        leave = "leave out one of the two"
        given = (ep.compile, "compile=True", leave), (ep.observe is not None, "observe=...", leave)
        _refuse("feedback={...}", *given)


def _check_values(ep: Any) -> None:
    if ep.beta is not None:
        require(_CALL, "beta", ep.beta, lambda beta: 0 < beta < math.inf, "a positive number, or None to choose it")
    require(_CALL, "phases", ep.phases, *one_of(PHASES))
    require(_CALL, "branches", ep.branches, *one_of(("held", "exact")))
    require(_CALL, "on_unsettled", ep.on_unsettled, *one_of(("warn", "raise", "ignore")))
    require(_CALL, "proof", ep.proof, *one_of(("amortised", "always", "never")))
    _check_contrast(ep)
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
    if ep.observe is not None and ep.groups:
        raise ArgumentError(f"{_CALL}(observe=..., groups=...): leave out one of the two.")
    ep.solver.check(ep.node_energy)


def _check_contrast(ep: Any) -> None:
    if ep.phases != "holomorphic":
        if ep.points is not None:
            raise ArgumentError(
                f"{_CALL}(phases={ep.phases!r}, points={ep.points!r}): points are those of phases='holomorphic'."
            )
        return
    if ep.points is not None:
        require(_CALL, "points", ep.points, *whole_number(1))
    name, other = type(ep.solver).__name__, "Relaxation" if ep.node_energy.behind_activations else "Sweep"
    real = "it is for real states alone, see `is_holomorphic` of mep.NodeEnergy. Use phases='centered'"
    solver = f"{name} settles no complex states. Use mep.{other}(...)"
    _refuse(
        "phases='holomorphic'",
        (not ep.node_energy.is_holomorphic, f"energy={ep.node_energy.name!r}", real),
        (not ep.solver.settles_complex, f"solver={ep.solver}", solver),
        (ep.branches == "exact", "branches='exact'", "kinks have no complex form. Use branches='held'"),
        (ep.compile, "compile=True", "complex phases are not compiled. Leave out one of the two"),
        (ep.checkpoint, "checkpoint=True", "complex phases are not checkpointed. Leave out one of the two"),
        (ep.diagnostics, "diagnostics=True", "complex states are on no branch. Leave out one of the two"),
        (ep.readout is not None, "readout=...", "a readout is for real states alone. Leave out one of the two"),
    )


def check_complex_dtypes(energy: Energy, free: Point) -> None:
    """Refuse dtypes that have no complex ones."""
    call, output = f"{_CALL}(phases='holomorphic'", energy.output(free)
    dtypes = {output.dtype, *(p.dtype for p in energy.graph.parameters if p.is_floating_point())}
    is_cast = torch.is_autocast_enabled(output.device.type)
    if is_cast or not dtypes <= {torch.float32, torch.float64}:
        what = "torch.autocast" if is_cast else ", ".join(sorted(map(str, dtypes)))
        raise ArgumentError(f"{call}): complex states need float32 or float64, not {what}. Use phases='centered'.")


def check_holomorphic(ep: Any, energy: Energy, free: Point, cost: BatchCost) -> None:
    """Refuse models and costs that cannot be continued to complex states."""
    call, output = f"{_CALL}(phases='holomorphic'", energy.output(free)
    if energy.is_forward:  # else the solver judges: where no Jacobian changes nothing is evaluated at complex states
        check_complex(energy.graph, f"{call})")
    if not cost.is_holomorphic(output):
        raise ArgumentError(
            f"{call}, cost={ep.cost!r}): the cost cannot be evaluated at complex outputs, or is not holomorphic there "
            "(moduli, comparisons, torch functions for real numbers alone). Way out: phases='centered', "
            "cost='cross_entropy' or 'mse', or a cost that is written with exp, log and sums."
        )


def _check_compile(ep: Any) -> None:
    unrolled = "only solvers with `unrolled` are compiled: mep.Sweep and mep.Relaxation"
    most = f"at most {MOST_SWEEPS} sweeps are compiled. Give fewer, or adaptive=True"
    takes_long = not ep.solver.adaptive and ep.solver.settle_steps > MOST_SWEEPS
    named = f"only costs that have names are compiled, {', '.join(map(repr, NAMED))}"
    _refuse(
        "compile=True",
        (not ep.solver.compiles, f"solver={ep.solver}", unrolled),
        (ep.solver.patience > 1, f"solver={ep.solver}", "patience must be 1"),
        (takes_long, f"solver={ep.solver}", most),
        (ep.branches == "exact", "branches='exact'", "only held branches are compiled"),
        (ep.readout is not None, "readout=...", "a readout is not compiled. Leave out one of the two"),
        (ep.diagnostics, "diagnostics=True", "leave out one of the two"),
        (ep.cost not in tuple(NAMED), f"cost={ep.cost!r}", named),
    )


def _check_checkpoint(ep: Any) -> None:
    why = "it needs the states of all nodes at once. Leave out one of the two"
    _refuse(
        "checkpoint=True",
        (not ep.solver.checkpoints, f"solver={ep.solver}", why),
        (ep.branches == "exact", "branches='exact'", why),
        (not ep.node_energy.is_quadratic, f"energy={ep.node_energy.name!r}", why),
        (ep.compile, "compile=True", why),
        (ep.diagnostics, "diagnostics=True", why),
        (ep.observe is not None, "observe=...", why),
    )


def _refuse(setting: str, *others: tuple[bool, str, str]) -> None:
    """Raise for the first of some other settings that is given beside this one: whether it is, which, and a reason."""
    for is_given, other, reason in others:
        if is_given:
            raise ArgumentError(f"{_CALL}({setting}, {other}): {reason}.")
