"""The dtype and the layout of tensors in memory.

Images are computed with their channels last from the first convolution on: on the CPU pooling is then ten times as
fast, and convolutions are never slower. An operation on two layouts is slower than either: all of a step have one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def in_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The same tensor wherever it has that dtype."""
    return t if t.dtype is dtype else t.to(dtype)


def layout(t: Tensor) -> torch.memory_format:
    """Channels last, or as it comes."""
    is_last = t.ndim == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else torch.contiguous_format


def as_laid_out(t: Tensor, like: Tensor) -> Tensor:
    """The same tensor in the layout of another one."""
    return t.contiguous(memory_format=layout(like)) if t.ndim == 4 else t


def by_example(t: Tensor, batch: int) -> Tensor:
    """Every example in a row, its numbers in the order of memory: [batch, numbers]."""
    return (t.permute(0, 2, 3, 1) if layout(t) is torch.channels_last else t).reshape(batch, -1)


def accurate(t: Tensor) -> torch.dtype:
    """The dtype in which sums over t shall be made and told: half precision is not enough to compare them."""
    return torch.promote_types(t.dtype, torch.float32)


def per_example(values: Tensor, like: Tensor) -> Tensor:
    """One value an example ([batch]) spread over the rows of a state, ready to broadcast."""
    rows = values if len(like) == len(values) else values.repeat_interleave(len(like) // len(values))
    return rows.view(-1, *[1] * (like.ndim - 1))


def rows_of(t: Tensor, index: Tensor) -> Tensor:
    """Some rows of a tensor, in its layout."""
    return as_laid_out(t.index_select(0, index), t)
