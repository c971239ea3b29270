"""Nodes in closed form: a sum of the parents or the only one of them, then one simple operation after the other.

    h_0 = sum of the parents,   h_i = f_i(h_{i-1}),   mu = the last h

Each `Step` knows its own Jacobian J_i from both sides. Where all of them are constant while branches are held (linear
layers, convolutions, pooling, reshapes, piecewise-linear activations), the node is affine: it can also `push` a change
of its parents forward, without evaluating anything anew.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mep.activations import Activation, MaxPool
from mep.nodes import Held, Local, Node, Strength, displaced
from mep.ops import Op, Ref, has_hooks

aten = torch.ops.aten
Key = tuple[str, str]


class Step(ABC):
    """One operation `y = f(h)` of a chain. `kept` is what its Jacobian J and its parameters' gradient need."""

    is_affine = True
    """Whether J is constant while branches are held."""
    parameters: tuple[Tensor | None, ...] = ()

    @abstractmethod
    def value(self, h: Tensor, held: Held) -> tuple[Tensor, Any]:
        """y and `kept`."""

    @abstractmethod
    def pull(self, kept: Any, g: Tensor) -> Tensor:
        """`J^T g`; g has the dtype of y."""

    def push(self, kept: Any, t: Tensor) -> Tensor:
        """`J t` (affine steps only)."""
        raise NotImplementedError

    def rows(self, kept: Any, index: Tensor) -> Any:
        """`kept` of some examples (affine steps only)."""
        return kept.index_select(0, index)

    def contract(self, kept: Any, force: Tensor, weight: float) -> Sequence[Tensor | None]:
        """`weight * (dy/dtheta)^T force` for every parameter, None where it is not trained."""
        return ()


class Pointwise(Step):
    """An activation, on its branch if branches are held. J is diagonal."""

    def __init__(self, activation: Activation, key: Key):
        self.activation, self.key, self.is_affine = activation, key, activation.piecewise

    def value(self, h: Tensor, held: Held) -> tuple[Tensor, Any]:
        activation = self.activation
        if not (activation.piecewise and held.hold_branches):
            y = activation.value(h)
            return y, (h, y)
        is_first = self.key not in held.branches
        y = held.on_branch(self.key, activation, h)
        if is_first and activation.box and activation.homogeneous:
            held.branches[self.key] = y  # as ReLU's y > 0 where h > 0; the next step keeps y, so h need not be kept
        x0 = held.branches[self.key]
        return y, (x0, x0)

    def pull(self, kept: Any, g: Tensor) -> Tensor:
        return self.activation.backward(g, *kept)

    def push(self, kept: Any, t: Tensor) -> Tensor:
        return self.pull(kept, t)

    def rows(self, kept: Any, index: Tensor) -> Any:
        x0 = kept[0].index_select(0, index)
        return x0, x0


class Reshape(Step):
    """`flatten`."""

    def __init__(self, op: Op):
        self.op = op

    def value(self, h: Tensor, held: Held) -> tuple[Tensor, Any]:
        return self.op.run({self.op.args[0].name: h}), h.shape

    def pull(self, kept: Any, g: Tensor) -> Tensor:
        return g.reshape(-1, *kept[1:])

    def push(self, kept: Any, t: Tensor) -> Tensor:
        return self.op.run({self.op.args[0].name: t})

    def rows(self, kept: Any, index: Tensor) -> Any:
        return kept


class Pool(Step):
    """Max pooling; J picks the winners."""

    def __init__(self, pool: MaxPool, key: Key):
        self.pool, self.key = pool, key

    def value(self, h: Tensor, held: Held) -> tuple[Tensor, Any]:
        if held.hold_branches:
            y = held.on_branch(self.key, self.pool, h)
            return y, (held.branches[self.key], h.shape)
        y, winners = self.pool.value_and_branch(h)
        return y, (winners, h.shape)

    def pull(self, kept: Any, g: Tensor) -> Tensor:
        winners, shape = kept
        n = self.pool.n
        flat = g.new_zeros(*g.shape[:-n], shape[-n:].numel())
        return flat.scatter_add_(-1, winners.flatten(-n), g.flatten(-n)).view(*g.shape[:-n], *shape[-n:])

    def push(self, kept: Any, t: Tensor) -> Tensor:
        return self.pool.held(t, kept[0])

    def rows(self, kept: Any, index: Tensor) -> Any:
        return kept[0].index_select(0, index), kept[1]


class AveragePool(Step):
    """`nn.AvgPool2d` and `nn.AdaptiveAvgPool2d`."""

    def __init__(self, module: nn.AvgPool2d | nn.AdaptiveAvgPool2d):
        self.module = module

    def value(self, h: Tensor, held: Held) -> tuple[Tensor, Any]:
        return self.module(h), h

    def pull(self, kept: Any, g: Tensor) -> Tensor:
        m = self.module
        if isinstance(m, nn.AdaptiveAvgPool2d):
            return aten._adaptive_avg_pool2d_backward(g, kept)
        size, stride, padding = _pair(m.kernel_size), _pair(m.stride), _pair(m.padding)
        options = (m.ceil_mode, m.count_include_pad, m.divisor_override)
        return aten.avg_pool2d_backward(g, kept, size, stride, padding, *options)

    def push(self, kept: Any, t: Tensor) -> Tensor:
        return self.module(t)


class Linear(Step):
    """`y = h W^T + b`; dW = force^T h, db = sum force, over every dimension but the last."""

    def __init__(self, module: nn.Linear):
        self.module = module
        self.parameters = (module.weight, module.bias)

    def value(self, h: Tensor, held: Held) -> tuple[Tensor, Any]:
        return F.linear(h, self.module.weight, self.module.bias), h

    def pull(self, kept: Any, g: Tensor) -> Tensor:
        return g @ self.module.weight

    def push(self, kept: Any, t: Tensor) -> Tensor:
        return F.linear(t, self.module.weight)

    def contract(self, kept: Any, force: Tensor, weight: float) -> Sequence[Tensor | None]:
        rows, h, (w, b) = force.flatten(0, -2), kept.flatten(0, -2), self.parameters
        assert w is not None
        dw = torch.addmm(w, rows.t(), h, beta=0, alpha=weight) if w.requires_grad else None
        return dw, rows.sum(0).mul_(weight) if b is not None and b.requires_grad else None


class Native(Step):
    """A step of which torch has the whole backward as one operation, that computes only what a mask asks for."""

    @abstractmethod
    def _backward(self, kept: Any, g: Tensor, mask: tuple[bool, ...]) -> Sequence[Tensor]:
        """The gradients of h and of every parameter, as far as `mask` wants them."""

    def pull(self, kept: Any, g: Tensor) -> Tensor:
        return self._backward(kept, g, (True, False, False))[0]

    def contract(self, kept: Any, force: Tensor, weight: float) -> Sequence[Tensor | None]:
        trained = [p is not None and p.requires_grad for p in self.parameters]
        found = self._backward(kept, force, (False, *trained))[1:]
        return [g.mul_(weight) if wanted else None for g, wanted in zip(found, trained, strict=True)]


class Convolution(Native):
    """`nn.Conv1d`, 2d and 3d."""

    def __init__(self, module: nn.Conv1d | nn.Conv2d | nn.Conv3d):
        self.module = module
        self.parameters = (module.weight, module.bias)
        n = len(module.stride)
        self.convolve = getattr(F, f"conv{n}d")
        self.geometry = (module.stride, module.padding, module.dilation, False, [0] * n, module.groups)

    def value(self, h: Tensor, held: Held) -> tuple[Tensor, Any]:
        return self._apply(h, self.module.bias), h

    def push(self, kept: Any, t: Tensor) -> Tensor:
        return self._apply(t, None)

    def _apply(self, h: Tensor, bias: Tensor | None) -> Tensor:
        m = self.module
        return self.convolve(h, m.weight, bias, m.stride, m.padding, m.dilation, m.groups)

    def _backward(self, h: Tensor, g: Tensor, mask: tuple[bool, ...]) -> Sequence[Tensor]:
        h, weight = (_in_dtype(t, g.dtype) for t in (h, self.module.weight))
        return aten.convolution_backward(g, h, weight, [self.module.out_channels], *self.geometry, list(mask))


class LayerNorm(Native):
    """`nn.LayerNorm`. Curved: J depends on h."""

    is_affine = False

    def __init__(self, module: nn.LayerNorm):
        self.module = module
        self.parameters = (module.weight, module.bias)

    def value(self, h: Tensor, held: Held) -> tuple[Tensor, Any]:
        m = self.module
        y, mean, scale = aten.native_layer_norm(h, m.normalized_shape, m.weight, m.bias, m.eps)
        return y, (h, mean, scale)

    def _backward(self, kept: Any, g: Tensor, mask: tuple[bool, ...]) -> Sequence[Tensor]:
        h, mean, scale = kept
        m = self.module
        return aten.native_layer_norm_backward(
            g, _in_dtype(h, g.dtype), m.normalized_shape, mean, scale, m.weight, m.bias, list(mask)
        )


class Saved(NamedTuple):
    """What each step kept and the dtype of its result (autocast mixes them); shape and dtype of every parent."""

    kept: list[Any]
    dtypes: list[torch.dtype]
    terms: list[tuple[Sequence[int], torch.dtype]]


class Chain(Node):
    """`predict`, `pull`, `push` and `contract` step by step. As in autograd, a force has the dtype of its value."""

    def __init__(self, steps: Sequence[Step], **fields: Any):
        super().__init__(**fields)
        self.steps = tuple(steps)

    @property
    def is_affine_when_held(self) -> bool:
        return all(step.is_affine for step in self.steps)

    def predict(self, parents: Sequence[Any], held: Held) -> tuple[Tensor, Any]:
        h = _sum(parents)
        assert h is not None
        kept, dtypes = [], []
        for step in self.steps:
            h, own = step.value(h, held)
            kept.append(own)
            dtypes.append(h.dtype)
        return h, Saved(kept, dtypes, [(p.shape, p.dtype) for p in parents])

    def weighted_input(self, saved: Any) -> Tensor:
        return saved.kept[-1]

    def pull(self, saved: Any, force: Tensor) -> Sequence[Tensor | None]:
        for step, own, dtype in zip(reversed(self.steps), reversed(saved.kept), reversed(saved.dtypes), strict=True):
            force = step.pull(own, _in_dtype(force, dtype))
        if len(saved.terms) == 1:
            return (_in_dtype(force, saved.terms[0][1]),)
        return [_fitting(force, *t) if flows else None for flows, t in zip(self.flows, saved.terms, strict=True)]

    def contract(self, saved: Any, force: Tensor, weight: float) -> Sequence[Tensor | None]:
        if not self.parameters:
            return ()
        last = self.steps[-1]
        found = last.contract(saved.kept[-1], _in_dtype(force, saved.dtypes[-1]), weight)
        return [g for p, g in zip(last.parameters, found, strict=True) if p is not None]

    def push(self, saved: Any, tangents: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
        t = _sum([t for t in tangents if t is not None])
        arriving = None
        if t is not None:
            for step, kept in zip(self.steps, saved.kept, strict=True):
                arriving, t = t, step.push(kept, t)
        return t, arriving if self.parameters else None

    def moved(self, saved: Any, arriving: Tensor, beta: Strength) -> Any:
        return saved._replace(kept=[*saved.kept[:-1], displaced(saved.kept[-1], arriving, beta)])

    def rows(self, saved: Any, index: Tensor) -> Any:
        kept = [step.rows(own, index) for step, own in zip(self.steps, saved.kept, strict=True)]
        terms = [((len(index), *shape[1:]), dtype) for shape, dtype in saved.terms]
        return saved._replace(kept=kept, terms=terms)


def make_node(program: Sequence[Op], parents: Sequence[str], **fields: Any) -> Node:
    """The closed form where there is one, the local autograd graph elsewhere."""
    steps = _steps(program, parents, fields["name"])
    fields |= {"program": tuple(program), "parents": tuple(parents)}
    return Local(**fields) if steps is None else Chain(steps, **fields)


def _steps(program: Sequence[Op], parents: Sequence[str], name: str) -> list[Step] | None:
    """The steps of a program of which each operation reads only the one before it; None if some has no closed form."""
    operations = list(program)
    if len(parents) > 1:
        if not _is_sum(operations[0], parents):
            return None
        previous = operations.pop(0).name
    else:
        previous = parents[0]
    steps = []
    for op in operations:
        step = _step(op, (name, op.name)) if op.args[:1] == (Ref(previous),) else None
        if step is None or (op.kwargs and not (op.activation or op.pool)):
            return None
        steps.append(step)
        previous = op.name
    return None if any(step.parameters for step in steps[:-1]) else steps


def _step(op: Op, key: Key) -> Step | None:
    if op.activation:  # of complex numbers, abs is not piecewise linear: `Local` sees what it gets
        return None if op.activation.name == "abs" else Pointwise(op.activation, key)
    if op.pool:
        return Pool(op.pool, key)
    if _is_flatten(op):
        return Reshape(op)
    if op.kind != "module" or has_hooks(op.target):
        return None
    make = _MODULES.get(type(op.target))
    return make(op.target) if make else None


def _convolution(module: Any) -> Step | None:
    plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return Convolution(module) if plain else None


_MODULES: dict[type[nn.Module], Callable[[Any], Step | None]] = {
    nn.Linear: Linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.LayerNorm: LayerNorm,
    nn.AvgPool2d: AveragePool,
    nn.AdaptiveAvgPool2d: AveragePool,
}


def _is_sum(op: Op, parents: Sequence[str]) -> bool:
    """Whether an operation adds up the parents, each once, and does nothing else."""
    adds = op.target in (operator.add, torch.add) or (op.kind == "method" and op.target == "add")
    return adds and not op.kwargs and op.args == tuple(map(Ref, parents))


def _is_flatten(op: Op) -> bool:
    if op.kind == "module":
        return type(op.target) is nn.Flatten and not has_hooks(op.target)
    plain = all(isinstance(a, int) for a in op.args[1:])
    return plain and (op.target is torch.flatten or (op.kind == "method" and op.target == "flatten"))


def _sum(tensors: Sequence[Tensor]) -> Tensor | None:
    total = None
    for t in tensors:
        total = t if total is None else total + t
    return total


def _fitting(force: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What a force on a sum is for a term, which may have been broadcast or promoted."""
    return _in_dtype(force if force.shape == shape else force.sum_to_size(shape), dtype)


def _in_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype is dtype else t.to(dtype)


def _pair(size: int | Sequence[int]) -> Sequence[int]:
    return (size, size) if isinstance(size, int) else size
