"""Single operations `y = f(h)` in closed form: value, Jacobian from both sides, parameter gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mep.activations import Activation, MaxPool
from mep.layout import as_laid_out, rows_of
from mep.nodes import Held
from mep.ops import Op

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
        return rows_of(kept, index)

    def contract(self, kept: Any, force: Tensor, weight: float) -> Sequence[Tensor | None]:
        """`weight * (dy/dtheta)^T force` for every parameter, None where it is not trained."""
        return ()


class Pointwise(Step):
    """An activation, on its branch if branches are held. J is diagonal."""

    def __init__(self, activation: Activation, key: Key):
        self.activation, self.key, self.is_affine = activation, key, activation.piecewise
        self.never_falls = activation.piecewise and min(activation.slopes) >= 0

    def value(self, h: Tensor, held: Held) -> tuple[Tensor, Any]:
        activation = self.activation
        if not (activation.piecewise and held.hold_branches):
            y = activation.value(h)
            return y, (h, y)
        if held.departures is None and (x0 := held.branches.get(self.key)) is not None:
            return activation.held(h, x0), (x0, x0)
        is_first = self.key not in held.branches
        y = held.on_branch(self.key, activation, h)
        if is_first and activation.box and activation.homogeneous:
            held.branches[self.key] = y  # as ReLU's y > 0 where h > 0; the next step keeps y, so h need not be kept
        x0 = held.branches[self.key]
        return y, (x0, x0)

    def pull(self, kept: Any, g: Tensor) -> Tensor:
        return self.activation.backward(as_laid_out(g, kept[0]), *kept)

    def push(self, kept: Any, t: Tensor) -> Tensor:
        return self.pull(kept, t)

    def rows(self, kept: Any, index: Tensor) -> Any:
        x0 = rows_of(kept[0], index)
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
        return self.pool.spread(g, winners, shape)

    def push(self, kept: Any, t: Tensor) -> Tensor:
        return self.pool.held(t, kept[0])

    def rows(self, kept: Any, index: Tensor) -> Any:
        return rows_of(kept[0], index), kept[1]


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


def _pair(size: int | Sequence[int]) -> Sequence[int]:
    return (size, size) if isinstance(size, int) else size
