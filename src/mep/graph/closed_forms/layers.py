"""The operations of a chain, `y = f(h)` each, in closed form: value, `vjp`, `jvp` and `param_vjp`.

Without parameters: activations, reshapes, pooling, means. With parameters: linear layers, convolutions, layer
normalisation, whose parameter gradients are sums over the rows of the batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mep.graph.closed_forms.activations import Activation
from mep.graph.closed_forms.maxima import MaxPool
from mep.graph.ops import Slot, StepContext
from mep.layout import as_laid_out, in_dtype, rows_of

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
        """`J t` (affine operations only)."""
        raise NotImplementedError

    def rows(self, kept: Any, index: Tensor) -> Any:
        """`kept` of some examples (affine operations only)."""
        return rows_of(kept, index)

    def param_vjp(self, kept: Any, force: Tensor, weight: float) -> Sequence[Tensor | None]:
        """`weight * (dy/dtheta)^T force` for every parameter, None where it is not trained."""
        return ()


class Pointwise(LayerOp):
    """An activation, on its branch if branches are held. J is diagonal."""

    def __init__(self, activation: Activation, key: Key):
        self.activation, self.key, self.is_affine = activation, key, activation.piecewise
        self.is_homogeneous = activation.homogeneous
        self.keeps_result = activation.potential is not None and activation.piecewise and activation.homogeneous
        """Whether y has the branch of h, as that of ReLU: y > 0 where h > 0. The next operation keeps y anyway."""
        self.never_falls = activation.piecewise and min(activation.slopes) >= 0

    def value(self, h: Tensor, context: StepContext) -> tuple[Tensor, Any]:
        activation = self.activation
        if not (self.is_affine and context.freeze_branches):
            y = activation.value(h)
            return y, (y if activation.from_result else h)
        x0 = context.branches.get(self.key)
        if context.branch_changes is not None:
            y = context.on_branch(self.key, activation, h)
            x0 = context.branches[self.key]
        elif x0 is None:
            y = activation.value(h)
            x0 = context.branches[self.key] = y if self.keeps_result else h.detach()
        else:
            y = activation.backward(h, x0) if self.is_homogeneous else activation.linearized(h, x0)
        return y, x0

    def vjp(self, kept: Any, g: Tensor) -> Tensor:
        return self.activation.backward(as_laid_out(g, kept) if g.ndim == 4 else g, kept)

    def jvp(self, kept: Any, t: Tensor) -> Tensor:
        return self.activation.backward(as_laid_out(t, kept) if t.ndim == 4 else t, kept)


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


class WeightedOp(LayerOp):
    """An operation whose parameter gradient is a sum of outer products of its input `h` and the error of its output.

    `weight` and `bias` are read anew in every call; `reads` is the name of the input.
    """

    def __init__(self, reads: str, weight: Slot, bias: Slot | None):
        self.reads, self._weight, self._bias = reads, weight, bias
        self._home, self._key = weight.home, weight.key
        self.parameters = tuple(p if isinstance(p, nn.Parameter) else None for p in (self.weight, self.bias))

    @property
    def weight(self) -> Tensor:
        """As it is now."""
        weight: Tensor = self._home[self._key]
        return weight

    def replace_weight(self, weight: Tensor) -> None:
        """Take another weight, of the same shape, and no bias: for a copy that is only used for products with J."""
        self._home, self._key, self._bias = {"weight": weight}, "weight", None
        self.parameters = (weight if isinstance(weight, nn.Parameter) else None, None)

    @property
    def bias(self) -> Tensor | None:
        """As it is now."""
        return self._bias.home[self._bias.key] if self._bias else None

    @property
    @abstractmethod
    def has_rows(self) -> bool:
        """Whether `outer_rows` is there."""

    @abstractmethod
    def outer_rows(self, h: Tensor, force: Tensor) -> tuple[Tensor, Tensor]:
        """`h` and `force` as rows, `dW = force^T h` with W as a matrix."""


class Linear(WeightedOp):
    """`y = h W^T + b`, or `h W + b` if `transposed`; dW = force^T h, db = sum force, over all but the last."""

    def __init__(self, reads: str, weight: Slot, bias: Slot | None, transposed: bool = False):
        super().__init__(reads, weight, bias)
        self.transposed = transposed

    def value(self, h: Tensor, context: StepContext) -> tuple[Tensor, Any]:
        weight = self._home[self._key]
        bias = self._bias.home[self._bias.key] if self._bias else None
        return F.linear(h, weight.t() if self.transposed else weight, bias), h

    def vjp(self, kept: Any, g: Tensor) -> Tensor:
        weight: Tensor = self._home[self._key]
        return g @ (weight.t() if self.transposed else weight)

    def jvp(self, kept: Any, t: Tensor) -> Tensor:
        weight = self._home[self._key]
        return F.linear(t, weight.t() if self.transposed else weight)

    def rows(self, kept: Any, index: Tensor) -> Any:
        """J is the weight: nothing of the examples."""
        return None

    def param_vjp(self, kept: Any, force: Tensor, weight: float) -> Sequence[Tensor | None]:
        rows, h, (w, b) = force.flatten(0, -2), kept.flatten(0, -2), self.parameters
        one, two = (h, rows) if self.transposed else (rows, h)
        dw = torch.addmm(w, one.t(), two, beta=0, alpha=weight) if w is not None and w.requires_grad else None
        return dw, rows.sum(0).mul_(weight) if b is not None and b.requires_grad else None

    @property
    def has_rows(self) -> bool:
        return not self.transposed

    def outer_rows(self, h: Tensor, force: Tensor) -> tuple[Tensor, Tensor]:
        return h.flatten(0, -2), force.flatten(0, -2)


def _backward_of(
    backward: Callable[[tuple[bool, ...]], Sequence[Tensor]], parameters: Sequence[Tensor | None], weight: float
) -> Sequence[Tensor | None]:
    """The parameters' gradients of a `backward` that takes a mask: the input, the weight, the bias."""
    trained = [p is not None and p.requires_grad for p in parameters]
    found = backward((False, *trained))[1:]
    return [g.mul_(weight) if wanted else None for g, wanted in zip(found, trained, strict=True)]


class Convolution(WeightedOp):
    """`conv1d`, 2d and 3d."""

    def __init__(
        self,
        reads: str,
        weight: Slot,
        bias: Slot | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ):
        super().__init__(reads, weight, bias)
        self.kernel, self.groups, n = tuple(self.weight.shape[2:]), groups, self.weight.ndim - 2
        self.stride, self.padding, self.dilation = ([*g] * (n // len(g)) for g in (stride, padding, dilation))
        self.convolve = getattr(F, f"conv{n}d")
        self.geometry = (self.stride, self.padding, self.dilation, False, [0] * n, groups)
        # On processors without AVX-512 oneDNN (torch 2.13) writes beyond its buffers in the backward of a convolution
        # with a kernel of one pixel, a stride, and fewer channels than it vectorises, if channels are last.
        self.keeps_layout = max(self.kernel) > 1 or max(self.stride) == 1 or self.weight.shape[1] * groups >= 8

    def value(self, h: Tensor, context: StepContext) -> tuple[Tensor, Any]:
        h = self._in_layout(h)
        return self._apply(h, self.bias), h

    def vjp(self, kept: Any, g: Tensor) -> Tensor:
        return self._backward(kept, g, (True, False, False))[0]

    def jvp(self, kept: Any, t: Tensor) -> Tensor:
        return self._apply(self._in_layout(t), None)

    def param_vjp(self, kept: Any, force: Tensor, weight: float) -> Sequence[Tensor | None]:
        return _backward_of(lambda mask: self._backward(kept, force, mask), self.parameters, weight)

    @property
    def has_rows(self) -> bool:
        return self.groups == 1

    def outer_rows(self, h: Tensor, force: Tensor) -> tuple[Tensor, Tensor]:
        return patches(h, self.kernel, self.stride, self.padding, self.dilation), force.movedim(1, -1).flatten(0, -2)

    def _in_layout(self, h: Tensor) -> Tensor:
        return h.to(memory_format=torch.channels_last) if h.ndim == 4 and h.device.type == "cpu" else h

    def _apply(self, h: Tensor, bias: Tensor | None) -> Tensor:
        return self.convolve(h, self.weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def _backward(self, h: Tensor, g: Tensor, mask: tuple[bool, ...]) -> Sequence[Tensor]:
        h, weight = (in_dtype(t, g.dtype) for t in (h, self.weight))
        if not self.keeps_layout:
            h, g = h.contiguous(), g.contiguous()
        return aten.convolution_backward(g, h, weight, [weight.shape[0]], *self.geometry, list(mask))


class LayerNorm(LayerOp):
    """`layer_norm`. Curved: J depends on h."""

    is_affine = False

    def __init__(self, shape: Sequence[int], weight: Slot | None, bias: Slot | None, eps: float):
        self.shape, self.eps, self.slots = list(shape), eps, (weight, bias)
        self.parameters = tuple(p if isinstance(p, nn.Parameter) else None for p in self._affine())

    def value(self, h: Tensor, context: StepContext) -> tuple[Tensor, Any]:
        y, mean, scale = aten.native_layer_norm(h, self.shape, *self._affine(), self.eps)
        return y, (h, mean, scale)

    def vjp(self, kept: Any, g: Tensor) -> Tensor:
        return self._backward(kept, g, (True, False, False))[0]

    def param_vjp(self, kept: Any, force: Tensor, weight: float) -> Sequence[Tensor | None]:
        return _backward_of(lambda mask: self._backward(kept, force, mask), self.parameters, weight)

    def _affine(self) -> list[Tensor | None]:
        return [slot.value if slot else None for slot in self.slots]

    def _backward(self, kept: Any, g: Tensor, mask: tuple[bool, ...]) -> Sequence[Tensor]:
        h, mean, scale = kept
        return aten.native_layer_norm_backward(
            g, in_dtype(h, g.dtype), self.shape, mean, scale, *self._affine(), list(mask)
        )


def patches(
    inputs: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """What each position of a convolution sees: [batch * positions, channels * kernel].

    Example:
        >>> patches(torch.tensor([[[1.0, 2.0, 3.0]]]), [2], [1], [0], [1])
        tensor([[1., 2.],
                [2., 3.]])
    """
    seen, n = F.pad(inputs, [p for p in reversed(padding) for _ in range(2)]), len(kernel)
    for dim, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        seen = seen.unfold(dim, (size - 1) * gap + 1, step)[..., ::gap]
    return seen.movedim(1, 1 + n).flatten(1 + n).flatten(0, -2)
