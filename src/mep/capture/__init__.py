"""Reading a model: from a module to a graph of nodes, and the proof that the two compute the same.

export.py        `torch.export` records the model, and a cost with it, as ATen operations; `whole.py` keeps what
                 cannot be recorded as one operation
functional.py    the record without writes
rewriting.py     the record in few forms
reading.py       the record as nodes and junctions: a graph; `kinks.py` for exact branches
proof.py         loss, buffers and gradient of the graph against those of the model: `sides.py` has both
cache.py         the graphs of a model as it is now; `surroundings.py` sees when it has changed
state.py         runs of a model that leave no trace
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from mep.capture.export import Leaves as Leaves
from mep.capture.export import check_leaves as check_leaves
from mep.capture.export import export
from mep.capture.kinks import read_kinks
from mep.capture.reading import Reading
from mep.capture.state import untouched
from mep.errors import ArgumentError, InputError, MepError, TraceError, one_of, require
from mep.graph.graph import Graph, conditions_hold, lengths_of
from mep.graph.inputs import call_model, flattened, mapped


def trace(model: nn.Module, x: Any, leaves: Leaves = (), energy: str = "prediction") -> Graph:
    """The graph of a model: nodes, junctions and what connects them. `print` shows it as a table.

    Args:
        model: any module that `torch.export` can record. It is not changed.
        x: an example input, [batch, ...]; a tuple or dict for several.
        leaves: module types, or qualified names, that are kept whole: autograd inside, equilibrium between.
        energy: "prediction", whose states are the predictions of layers, or "hopfield", where they are behind the
            activations: sums before an activation have a node there.

    Raises:
        TraceError: the model cannot be represented; the message names the place and the way out.
        ArgumentError: there is no such energy.

    Example:
        >>> import mep, torch
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> [(node.name, node.parents) for node in mep.trace(net, torch.ones(2, 4)).nodes]
        [('0', ('input',)), ('2', ('0',))]
    """
    require("trace", "energy", energy, *one_of(("prediction", "hopfield")))
    return capture(model, x, leaves, energy)


def _read(model: nn.Module, x: Any, leaves: Leaves, cost: Callable[..., Any] | None, target: Any) -> Reading:
    """A batch of one example is recorded as two, so that it has the graph of all others."""
    if len(next(leaf for leaf in flattened(x)[0] if hasattr(leaf, "shape"))) == 1:
        with suppress(TraceError):
            exported = export(model, _twice(x), leaves, cost, _twice(target))
            reading = Reading(exported, model, x)
            lengths = lengths_of(exported.sizes, x, target)
            if not isinstance(reading.batch, int) and conditions_hold(reading.conditions(), lengths):
                return reading
    with suppress(TraceError):
        return Reading(export(model, x, leaves, cost, target), model, x)
    # Sizes that were symbols may have become numbers on the way.
    return Reading(export(model, x, leaves, cost, target, symbols=False), model, x)


def _check_applies(model: nn.Module, x: Any) -> None:
    """Refuse a batch that the model itself cannot be applied to, or that is a single example without its dimension.

    A copy of the model is run, since what cannot be captured may write anywhere; without one nothing is refused.
    """
    try:
        model = copy.deepcopy(model)
    except Exception:
        return
    if any(is_lazy(t) for t in (*model.parameters(), *model.buffers())):
        return
    name, tensors = type(model).__name__, [v for v in flattened(x)[0] if isinstance(v, torch.Tensor)]
    given = f"this batch, {', '.join(f'{t.dtype} of shape {tuple(t.shape)}' for t in tensors)}"
    with untouched(model), torch.enable_grad():  # some models differentiate
        try:
            output = call_model(model, mapped(x, torch.Tensor.clone))
        except (MepError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            dtypes = {p.dtype for p in model.parameters()}
            is_other = len(dtypes) == 1 and not dtypes & {t.dtype for t in tensors}
            way_out = f" The parameters are {next(iter(dtypes))}." if is_other else ""
            raise InputError(
                f"{name} cannot be applied to {given}: {type(error).__name__}: {error}.{way_out} Nothing was changed."
            ) from error
        alone = None
        if isinstance(output, torch.Tensor) and output.ndim and len(output) != len(tensors[0]):
            with suppress(Exception):
                alone = call_model(model, mapped(x, lambda t: t.clone()[None]))
    if isinstance(alone, torch.Tensor) and alone.ndim and len(alone) == 1:
        raise InputError(
            f"{name} returns a tensor of shape {tuple(output.shape)} for {given}: dimension 0 of both counts the "
            "examples. Way out, for a single one: x[None]. Nothing was changed."
        )


def _twice(x: Any) -> Any:
    return mapped(x, lambda v: torch.cat([v, v]) if v.ndim and len(v) == 1 else v)


def capture(
    model: nn.Module,
    x: Any,
    leaves: Leaves = (),
    energy: str = "prediction",
    branches: str = "held",
    cost: Callable[..., Any] | None = None,
    target: Any = None,
) -> Graph:
    """As `trace`, for an energy and a treatment of branches, and with a cost function that is recorded beside.

    - "prediction", "held": states behind the operations that read parameters.
    - "prediction", "exact": every kink is a junction of its own as well, directly behind a state.
    - "hopfield": states behind the activations, each with the energy whose derivative is the activation's inverse.
    """
    if not isinstance(model, nn.Module):
        way_out = " Way out: model.module()." if isinstance(model, torch.export.ExportedProgram) else ""
        raise ArgumentError(f"trace(model={type(model).__name__}): must be a torch.nn.Module.{way_out}")
    if not any(hasattr(leaf, "shape") for leaf in flattened(x)[0]):
        raise InputError(f"x must be a tensor, or a tuple or dict of them, not {type(x).__name__}: torch.as_tensor(x).")
    try:
        reading = _read(model, x, leaves, cost, target)
    except TraceError:
        _check_applies(model, x)
        raise
    if energy == "hopfield":
        reading.move_states_behind_activations()
        return reading.graph()
    return reading.graph() if branches == "held" else read_kinks(reading)
