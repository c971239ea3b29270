"""Anderson mixing, per example: the next input of a fixed-point iteration `x <- f(x)` from the last few.

    minimise |sum_i alpha_i (f_i - x_i)|  over  sum_i alpha_i = 1,      x_next = sum_i alpha_i f_i

Walker and Ni 2011 (doi:10.1137/10078356X), type II, solved through the normal equations of the differences and
regularised relative to their trace. It finds fixed points of maps that expand, where plain iteration diverges.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
_RIDGE = 1e-6
"""Relative to the steps: what distinguishes nearly equal ones must not drown in the rounding of a solve."""


def mix(history: Sequence[Pair], x: Tensor, f: Tensor) -> Tensor:
    """The next x from earlier pairs `(x_i, f(x_i))` and the latest; first dimension = example.

    Example:
        >>> x0, x1 = torch.zeros(1, 1), torch.ones(1, 1)      # f(x) = 1 - 2 x expands; its fixed point is 1/3
        >>> mix([(x0, 1 - 2 * x0)], x1, 1 - 2 * x1)
        tensor([[0.3333]])
    """
    if not history:
        return f
    latest = (f - x).flatten(1)
    residual_steps = torch.stack([latest - (fi - xi).flatten(1) for xi, fi in history], 1)
    value_steps = torch.stack([(f - fi).flatten(1) for _, fi in history], 1)
    gram = residual_steps @ residual_steps.mT
    right = residual_steps @ latest.unsqueeze(2)
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)
    limits = torch.finfo(x.dtype)
    if len(history) == 1:
        gamma = right / (gram + limits.tiny)
    else:
        ridge = (_RIDGE * trace + limits.tiny).view(-1, 1, 1)
        gram = gram + ridge * torch.eye(len(history), dtype=x.dtype, device=x.device)
        gamma = torch.linalg.solve_ex(gram, right)[0]
    return f - (gamma.mT @ value_steps).view_as(f)
