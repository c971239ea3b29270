"""Nodes in closed form: a sum of the parents or the only one of them, then one simple operation after the other.

    h_0 = sum of the parents,   h_i = f_i(h_{i-1}),   mu = the last h

Each `LayerOp` multiplies with its Jacobian J_i from the left (`vjp`). Where all of them are constant while branches are
held (linear layers, convolutions, pooling, reshapes, piecewise-linear activations) the node is affine, and multiplies
from the right as well (`jvp`), without evaluating anything anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mep.graph.closed_forms.steps import LayerOp, Pointwise, Pool
from mep.graph.closed_forms.table import layer_op_of, weighted_op
from mep.graph.node import AutogradNode, Beta, Node, StepContext, state_from_error
from mep.graph.ops import Op, Ref, leaves_of
from mep.layout import in_dtype


class Saved(NamedTuple):
    """What each step kept and the dtype of its result (autocast mixes them); shape and dtype of every parent."""

    kept: list[Any]
    dtypes: list[torch.dtype]
    terms: list[tuple[Sequence[int], torch.dtype]]


class Chain(Node):
    """`predict`, `vjp`, `jvp` and `param_vjp` step by step. As in autograd, a force has the dtype of its value."""

    def __init__(self, steps: Sequence[LayerOp], **fields: Any):
        super().__init__(**fields)
        self.steps = tuple(steps)

    can_replace_rows = True

    @property
    def is_affine_when_held(self) -> bool:
        return all(step.is_affine for step in self.steps)

    def predict(self, parents: Sequence[Any], context: StepContext) -> tuple[Tensor, Any]:
        h = _sum(parents)
        assert h is not None
        kept, dtypes = [], []
        for step in self.steps:
            h, own = step.value(h, context)
            kept.append(own)
            dtypes.append(h.dtype)
        return h, Saved(kept, dtypes, [(p.shape, p.dtype) for p in parents])

    def weighted_input(self, saved: Any) -> Tensor:
        return saved.kept[-1]

    def vjp(self, saved: Any, force: Tensor) -> Sequence[Tensor | None]:
        for step, own, dtype in zip(reversed(self.steps), reversed(saved.kept), reversed(saved.dtypes), strict=True):
            force = step.vjp(own, in_dtype(force, dtype))
        if len(saved.terms) == 1:
            return (in_dtype(force, saved.terms[0][1]),)
        return [_fitting(force, *t) if flows else None for flows, t in zip(self.flows, saved.terms, strict=True)]

    def param_vjp(self, saved: Any, force: Tensor, weight: float) -> Sequence[Tensor | None]:
        if not self.parameters:
            return ()
        last = self.steps[-1]
        found = last.param_vjp(saved.kept[-1], in_dtype(force, saved.dtypes[-1]), weight)
        return [g for p, g in zip(last.parameters, found, strict=True) if p is not None]

    def jvp(self, saved: Any, tangents: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
        t = _sum([t for t in tangents if t is not None])
        arriving = None
        if t is not None:
            for step, kept in zip(self.steps, saved.kept, strict=True):
                arriving, t = t, step.jvp(kept, t)
        return t, arriving if self.parameters else None

    def moved(self, saved: Any, arriving: Tensor, beta: Beta) -> Any:
        return saved._replace(kept=[*saved.kept[:-1], state_from_error(saved.kept[-1], arriving, beta)])

    def rows(self, saved: Any, index: Tensor) -> Any:
        kept = [step.rows(own, index) for step, own in zip(self.steps, saved.kept, strict=True)]
        terms = [((len(index), *shape[1:]), dtype) for shape, dtype in saved.terms]
        return saved._replace(kept=kept, terms=terms)


def make_node(program: Sequence[Op], parents: Sequence[str], op: str, **fields: Any) -> Node:
    """The closed form where there is one, the local autograd graph elsewhere."""
    last = next(o for o in program if o.name == op)
    weighted = weighted_op(last)
    fields |= {"program": tuple(program), "parents": tuple(parents), "op": op}
    steps = _steps(program, parents, fields["name"]) if last is program[-1] and not fields["writes"] else None
    if steps is None:
        return AutogradNode(weighted=weighted if last is program[-1] else None, **fields)
    fields["parameters"] = tuple(p for p in steps[-1].parameters if isinstance(p, nn.Parameter)) if steps else ()
    return Chain(steps, weighted=weighted if steps and steps[-1].parameters else None, **fields)


def _steps(program: Sequence[Op], parents: Sequence[str], name: str) -> list[LayerOp] | None:
    """The steps of a program of which each operation reads only the one before it; None if some has no closed form."""
    operations = list(program)
    if len(parents) > 1:
        if not _is_sum(operations[0], parents):
            return None
        previous = operations.pop(0).name
    elif not parents:
        return None
    else:
        previous = parents[0]
    steps = []
    for op in operations:
        step = layer_op_of(op, (name, op.name))
        if step is None or _read(op) != [previous]:
            return None
        steps.append(step)
        previous = op.name
    return None if any(step.parameters for step in steps[:-1]) else _pooled_early(steps)


def _read(op: Op) -> list[str]:
    """The values that an operation reads, once each time."""
    return [ref.name for ref in leaves_of((op.args, op.kwargs), Ref)]


def _pooled_early(steps: Sequence[LayerOp]) -> list[LayerOp]:
    """The same steps with max pooling before a pointwise step that never falls: equal winners, less work.

    Where it is flat it may find other winners, of equal values and with J = 0.
    """
    ordered = list(steps)
    for i in range(1, len(ordered)):
        before, step = ordered[i - 1 : i + 1]
        if isinstance(step, Pool) and isinstance(before, Pointwise) and before.never_falls:
            ordered[i - 1 : i + 1] = step, before
    return ordered


def _is_sum(op: Op, parents: Sequence[str]) -> bool:
    """Whether an operation adds up the parents, each once, and does nothing else."""
    return op.label == "add" and not op.kwargs and sorted(_read(op)) == sorted(parents) and len(op.args) == len(parents)


def _sum(tensors: Sequence[Tensor]) -> Tensor | None:
    total = None
    for t in tensors:
        total = t if total is None else total + t
    return total


def _fitting(force: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What a force on a sum is for a term, which may have been broadcast or promoted."""
    return in_dtype(force if force.shape == shape else force.sum_to_size(shape), dtype)
