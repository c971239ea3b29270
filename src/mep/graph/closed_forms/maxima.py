"""The largest of several values: max pooling, and the one form to which every other maximum is brought.

    maximum(a, b) = largest(pair(a, b))        amax(x, dims) = largest(gathered(x, dims))        minimum = -max(-.)
    max_pool(x)   = largest(Windows(pool)(x))

Its kink is a tie. A maximum is *held* on its branch by keeping the winner: `held(x) = x[winner]`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mep.layout import as_laid_out, layout


@dataclass(frozen=True)
class MaxPool:
    """Max pooling whose winners can be held: `branch` is the flat index of each window's winner.

    `options` are what `F.max_pool{n}d` takes after its input; `n` counts the pooled dimensions.
    """

    n: int
    adaptive: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def value_and_branch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The pooled values and the winners."""
        name = f"{'adaptive_' if self.adaptive else ''}max_pool{self.n}d"
        return getattr(F, name)(x, **self.options, return_indices=True)

    def value(self, x: Tensor) -> Tensor:
        """The pooled values."""
        return self.value_and_branch(x)[0]

    def linearized(self, x: Tensor, winners: Tensor) -> Tensor:
        """The values of `x` at the given winners, in their layout."""
        flat = x.flatten(-self.n).gather(-1, winners.flatten(-self.n))
        return as_laid_out(flat.view(winners.shape), winners)

    def spread(self, g: Tensor, winners: Tensor, shape: torch.Size) -> Tensor:
        """The transpose of `held`: `g` at the winners, in their layout, and 0 elsewhere; `shape` is that of x."""
        lead, inner = g.shape[: -self.n], shape[-self.n :]
        y = torch.empty((*lead, *inner), dtype=g.dtype, device=g.device, memory_format=layout(winners)).zero_()
        y.view(*lead, -1).scatter_add_(-1, winners.flatten(-self.n), as_laid_out(g, winners).flatten(-self.n))
        return y

    def left_branch(self, x: Tensor, winners: Tensor) -> Tensor:
        """True where another unit of the window is larger than the held winner."""
        return self.value_and_branch(x)[0] > self.linearized(x, winners)


@dataclass(frozen=True)
class Largest(MaxPool):
    """The largest of the last dimension, which is kept with length 1: `[..., K] -> [..., 1]`."""

    n: int = 1

    def value_and_branch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        winners = x.argmax(-1, keepdim=True)
        return x.gather(-1, winners), winners


def largest(x: Tensor) -> Tensor:
    """The largest of the last dimension, `[..., K] -> [..., 1]`."""
    return x.amax(-1, keepdim=True)


def pair(a: Tensor, b: Tensor) -> Tensor:
    """Two tensors, broadcast and side by side: `[..., 2]`."""
    return torch.stack(torch.broadcast_tensors(a, b), -1)


def gathered(x: Tensor, dims: Sequence[int]) -> Tensor:
    """`x` with these dimensions as its last one."""
    return x.movedim(tuple(dims), tuple(range(-len(dims), 0))).flatten(-len(dims))


def reduced(y: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
    """`largest(gathered(x, dims))` in the shape of `x.amax(dims, keepdim)`.

    Example:
        >>> x = torch.arange(24.0).view(2, 3, 4)
        >>> y = largest(gathered(x, (0, -1)))
        >>> torch.equal(reduced(y, (0, -1), True), x.amax((0, -1), True))
        True
    """
    rank = y.ndim - 1 + len(dims)
    y = y.squeeze(-1)
    for d in sorted(d % rank for d in dims) if keepdim else ():
        y = y.unsqueeze(d)
    return y


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of a max pooling side by side: `[..., *sizes] -> [..., *pooled sizes, units of a window]`.

    A window that overlaps the border has its first units twice, in place of the padding.

    Example:
        >>> x = torch.randn(2, 3, 7, 6)
        >>> pool = MaxPool(2, options={"kernel_size": 3, "stride": 2, "padding": 1})
        >>> torch.equal(largest(Windows(pool)(x)).squeeze(-1), F.max_pool2d(x, 3, 2, 1))
        True
    """

    pool: MaxPool

    def __call__(self, x: Tensor) -> Tensor:
        n, lead = self.pool.n, x.ndim - self.pool.n
        pooled = self.pool.value_and_branch(torch.zeros(1, 1, *x.shape[lead:]))[0].shape[2:]
        for i in reversed(range(n)):
            places = self._places(i, x.shape[lead + i], pooled[i]).to(x.device)
            x = x.index_select(lead + i, places.flatten()).unflatten(lead + i, places.shape)
        order = (*range(lead), *range(lead, x.ndim, 2), *range(lead + 1, x.ndim, 2))
        return x.permute(order).flatten(-n)

    def _places(self, i: int, size: int, pooled: int) -> Tensor:
        """Where the windows lie along pooled dimension i: [windows, units of a window]."""
        window = torch.arange(pooled).unsqueeze(1)
        if self.pool.adaptive:
            start, end = window * size // pooled, -(-(window + 1) * size // pooled)
            places = start + torch.arange(int((end - start).max()))
            return torch.where(places < end, places, start)
        kernel = self._option("kernel_size", i)
        stride = self._option("stride", i) or kernel
        places = window * stride - self._option("padding", i) + self._option("dilation", i, 1) * torch.arange(kernel)
        inside = (places >= 0) & (places < size)
        first = places.gather(1, inside.to(torch.uint8).argmax(1, keepdim=True))
        return torch.where(inside, places, first)

    def _option(self, name: str, i: int, default: int = 0) -> int:
        value = self.pool.options.get(name, default)
        if isinstance(value, (tuple, list)):
            value = value[i if len(value) > 1 else 0] if value else default
        return default if value is None else value

    def overlap(self) -> int:
        """In how many windows a unit may lie, or how often it stands in one: at most so many."""
        if self.pool.adaptive:
            return 2**self.pool.n
        counts = []
        for i in range(self.pool.n):
            kernel = self._option("kernel_size", i)
            stride = self._option("stride", i) or kernel
            counts.append(-(-kernel // (stride // math.gcd(stride, self._option("dilation", i, 1)))))
        return math.prod(counts)


_OPTIONS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
_POOLS = {f"max_pool{n}d": (n, False, _OPTIONS) for n in (1, 2, 3)} | {
    f"adaptive_max_pool{n}d": (n, True, ("output_size",)) for n in (1, 2, 3)
}


def pool_of(name: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> MaxPool | None:
    """The max pooling that an operation does, given its arguments after the input, or None.

    `stride=[]` and `stride=None` stand for the size of the kernel.
    """
    if name == "largest":
        return Largest()
    n, adaptive, names = _POOLS.get(name, (0, False, ()))
    options = dict(zip(names, args, strict=False)) | dict(kwargs or {})
    if not n or not options or len(args) > len(names) or not options.keys() <= set(names):
        return None
    if not options.get("stride", True):
        del options["stride"]
    return MaxPool(n, adaptive, options)
