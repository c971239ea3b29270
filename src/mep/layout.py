"""The dtype and the layout of tensors in memory.

Images are computed with their channels last from the first convolution on: on the CPU pooling is then ten times as
fast, and convolutions are never slower. An operation on two layouts is slower than either: all of a step have one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def in_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The same tensor wherever it has that dtype."""
    return t if t.dtype is dtype else t.to(dtype)


def numbers_like(t: Tensor, given: Tensor) -> torch.dtype:
    """The precision of t; complex if one of the two is."""
    return t.dtype.to_complex() if given.is_complex() and not t.is_complex() else t.dtype


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


def replace_rows_(whole: Any, some: Any, rows: Tensor, batch: int) -> None:
    """Write the rows of some examples of `batch` into a tensor, or into all tensors of a nest of tuples and lists.

    Example:
        >>> whole = torch.zeros(3), [torch.zeros(6), 5]
        >>> replace_rows_(whole, (torch.ones(1), [torch.ones(2), 5]), torch.tensor([1]), batch=3)
        >>> whole
        (tensor([0., 1., 0.]), [tensor([0., 0., 1., 1., 0., 0.]), 5])
    """
    if isinstance(whole, Tensor):
        whole.index_copy_(0, _all_rows(rows, len(whole) // batch), some)
    elif isinstance(whole, (tuple, list)):
        for one, other in zip(whole, some, strict=True):
            replace_rows_(one, other, rows, batch)


def _all_rows(rows: Tensor, each: int) -> Tensor:
    """The rows of examples that have so many each, one after another."""
    return rows if each == 1 else (rows.unsqueeze(1) * each + torch.arange(each, device=rows.device)).flatten()


def select_examples(t: Tensor, rows: Tensor, batch: int) -> Tensor:
    """The rows of some examples of `batch`, in the layout of `t`; an example may have several rows, one after another.

    Example:
        >>> select_examples(torch.arange(6), torch.tensor([2, 0]), batch=3)
        tensor([4, 5, 0, 1])
    """
    return rows_of(t, _all_rows(rows, len(t) // batch))
