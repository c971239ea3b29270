"""Steps with parameters in closed form: linear layers, convolutions, layer normalisation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mep.graph.closed_forms.steps import LayerOp
from mep.graph.ops import Slot
from mep.layout import in_dtype

if TYPE_CHECKING:
    from mep.graph.node import StepContext

aten = torch.ops.aten


class WeightedOp(LayerOp):
    """A step whose parameter gradient is a sum of outer products of its input `h` and the error of its output.

    `weight` and `bias` are read anew in every call; `reads` is the name of the input.
    """

    def __init__(self, reads: str, weight: Slot, bias: Slot | None):
        self.reads, self._weight, self._bias = reads, weight, bias
        self.parameters = tuple(p if isinstance(p, nn.Parameter) else None for p in (self.weight, self.bias))

    @property
    def weight(self) -> Tensor:
        """As it is now."""
        weight: Tensor = self._weight.home[self._weight.key]
        return weight

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
        weight = self.weight.t() if self.transposed else self.weight
        return F.linear(h, weight, self.bias), h

    def vjp(self, kept: Any, g: Tensor) -> Tensor:
        return g @ (self.weight.t() if self.transposed else self.weight)

    def jvp(self, kept: Any, t: Tensor) -> Tensor:
        return F.linear(t, self.weight.t() if self.transposed else self.weight)

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
