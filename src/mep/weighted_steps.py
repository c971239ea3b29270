"""Steps with parameters in closed form: linear layers, convolutions, layer normalisation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mep.layout import in_dtype
from mep.nodes import Held
from mep.steps import Step

aten = torch.ops.aten


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

    def rows(self, kept: Any, index: Tensor) -> Any:
        """J is the weight: nothing of the examples."""
        return None

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
        # On processors without AVX-512 oneDNN (torch 2.13) writes beyond its buffers in the backward of a convolution
        # with a kernel of one pixel, a stride, and fewer channels than it vectorises, if channels are last.
        self.keeps_layout = max(module.kernel_size) > 1 or max(module.stride) == 1 or module.in_channels >= 8

    def value(self, h: Tensor, held: Held) -> tuple[Tensor, Any]:
        h = self._in_layout(h)
        return self._apply(h, self.module.bias), h

    def push(self, kept: Any, t: Tensor) -> Tensor:
        return self._apply(self._in_layout(t), None)

    def _in_layout(self, h: Tensor) -> Tensor:
        return h.to(memory_format=torch.channels_last) if h.ndim == 4 and h.device.type == "cpu" else h

    def _apply(self, h: Tensor, bias: Tensor | None) -> Tensor:
        m = self.module
        return self.convolve(h, m.weight, bias, m.stride, m.padding, m.dilation, m.groups)

    def _backward(self, h: Tensor, g: Tensor, mask: tuple[bool, ...]) -> Sequence[Tensor]:
        h, weight = (in_dtype(t, g.dtype) for t in (h, self.module.weight))
        if not self.keeps_layout:
            h, g = h.contiguous(), g.contiguous()
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
            g, in_dtype(h, g.dtype), m.normalized_shape, mean, scale, m.weight, m.bias, list(mask)
        )
