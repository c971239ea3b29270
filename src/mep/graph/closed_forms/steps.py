"""Single operations `y = f(h)` in closed form: value, Jacobian from both sides, parameter gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mep.graph.closed_forms import Activation, MaxPool
from mep.layout import as_laid_out, rows_of

if TYPE_CHECKING:
    from mep.graph.node import StepContext

aten = torch.ops.aten
Key = tuple[str, str]


class LayerOp(ABC):
    """One operation `y = f(h)` of a chain. `kept` is what its Jacobian J and its parameters' gradient need."""

    is_affine = True
    """Whether J is constant while branches are held."""
    parameters: tuple[Tensor | None, ...] = ()

    @abstractmethod
    def value(self, h: Tensor, context: StepContext) -> tuple[Tensor, Any]:
        """y and `kept`."""

    @abstractmethod
    def vjp(self, kept: Any, g: Tensor) -> Tensor:
        """`J^T g`; g has the dtype of y."""

    def jvp(self, kept: Any, t: Tensor) -> Tensor:
        """`J t` (affine steps only)."""
        raise NotImplementedError

    def rows(self, kept: Any, index: Tensor) -> Any:
        """`kept` of some examples (affine steps only)."""
        return rows_of(kept, index)

    def param_vjp(self, kept: Any, force: Tensor, weight: float) -> Sequence[Tensor | None]:
        """`weight * (dy/dtheta)^T force` for every parameter, None where it is not trained."""
        return ()


class Pointwise(LayerOp):
    """An activation, on its branch if branches are held. J is diagonal."""

    def __init__(self, activation: Activation, key: Key):
        self.activation, self.key, self.is_affine = activation, key, activation.piecewise
        self.never_falls = activation.piecewise and min(activation.slopes) >= 0

    def value(self, h: Tensor, context: StepContext) -> tuple[Tensor, Any]:
        activation = self.activation
        if not (activation.piecewise and context.freeze_branches):
            y = activation.value(h)
            return y, (h, y)
        if context.branch_changes is None and (x0 := context.branches.get(self.key)) is not None:
            return activation.linearized(h, x0), (x0, x0)
        is_first = self.key not in context.branches
        y = context.on_branch(self.key, activation, h)
        if is_first and activation.box and activation.homogeneous:
            context.branches[self.key] = y  # as ReLU's y > 0 where h > 0; the next step keeps y, so h need not be kept
        x0 = context.branches[self.key]
        return y, (x0, x0)

    def vjp(self, kept: Any, g: Tensor) -> Tensor:
        return self.activation.backward(as_laid_out(g, kept[0]), *kept)

    def jvp(self, kept: Any, t: Tensor) -> Tensor:
        return self.vjp(kept, t)

    def rows(self, kept: Any, index: Tensor) -> Any:
        x0 = rows_of(kept[0], index)
        return x0, x0


class Reshape(LayerOp):
    """`reshape` to numbers, with -1 for the examples: they stay first."""

    def __init__(self, sizes: Sequence[int]):
        self.sizes = tuple(sizes)

    def value(self, h: Tensor, context: StepContext) -> tuple[Tensor, Any]:
        return h.reshape(self.sizes), h.shape

    def vjp(self, kept: Any, g: Tensor) -> Tensor:
        return g.reshape(-1, *kept[1:])

    def jvp(self, kept: Any, t: Tensor) -> Tensor:
        return t.reshape(self.sizes)

    def rows(self, kept: Any, index: Tensor) -> Any:
        return kept


class Pool(LayerOp):
    """Max pooling; J picks the winners."""

    def __init__(self, pool: MaxPool, key: Key):
        self.pool, self.key = pool, key

    def value(self, h: Tensor, context: StepContext) -> tuple[Tensor, Any]:
        if context.freeze_branches:
            y = context.on_branch(self.key, self.pool, h)
            return y, (context.branches[self.key], h.shape)
        y, winners = self.pool.value_and_branch(h)
        return y, (winners, h.shape)

    def vjp(self, kept: Any, g: Tensor) -> Tensor:
        winners, shape = kept
        return self.pool.spread(g, winners, shape)

    def jvp(self, kept: Any, t: Tensor) -> Tensor:
        return self.pool.linearized(t, kept[0])

    def rows(self, kept: Any, index: Tensor) -> Any:
        return rows_of(kept[0], index), kept[1]


class Mean(LayerOp):
    """The mean over some dimensions of an example, counted from the last, so that the rank does not matter."""

    def __init__(self, dims: Sequence[int], keepdim: bool):
        self.dims, self.keepdim = tuple(dims), keepdim

    def value(self, h: Tensor, context: StepContext) -> tuple[Tensor, Any]:
        return h.mean(self.dims, self.keepdim), h.shape

    def vjp(self, kept: Any, g: Tensor) -> Tensor:
        size = 1
        for d in sorted(self.dims):
            size *= kept[d]
            if not self.keepdim:
                g = g.unsqueeze(len(kept) + d)
        return (g / size).expand(-1, *kept[1:])

    def jvp(self, kept: Any, t: Tensor) -> Tensor:
        return t.mean(self.dims, self.keepdim)

    def rows(self, kept: Any, index: Tensor) -> Any:
        return kept


class AveragePool(LayerOp):
    """`avg_pool2d` with the arguments after its input."""

    def __init__(self, size: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,), *options: Any):
        options = (*options, *(False, True, None)[len(options) :])
        self.arguments = (list(size), list(stride) or list(size), list(padding), *options)

    def value(self, h: Tensor, context: StepContext) -> tuple[Tensor, Any]:
        return self.jvp(None, h), h

    def vjp(self, kept: Any, g: Tensor) -> Tensor:
        return aten.avg_pool2d_backward(g, kept, *self.arguments)

    def jvp(self, kept: Any, t: Tensor) -> Tensor:
        return aten.avg_pool2d(t, *self.arguments)


class AdaptiveAveragePool(LayerOp):
    """`adaptive_avg_pool2d` to a size."""

    def __init__(self, size: Sequence[int]):
        self.size = list(size)

    def value(self, h: Tensor, context: StepContext) -> tuple[Tensor, Any]:
        return aten.adaptive_avg_pool2d(h, self.size), h

    def vjp(self, kept: Any, g: Tensor) -> Tensor:
        return aten._adaptive_avg_pool2d_backward(g, kept)

    def jvp(self, kept: Any, t: Tensor) -> Tensor:
        return aten.adaptive_avg_pool2d(t, self.size)
