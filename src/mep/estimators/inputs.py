"""Batches at the door: how a model is called with one, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mep.errors import InputError


def batch_size(x: Any) -> int:
    """The number of examples, after checking that there are some and that every number is finite.

    A sum is finite only if all its terms are; only if it is not does the slower exact test decide.
    """
    values = x.values() if isinstance(x, Mapping) else x if isinstance(x, (tuple, list)) else (x,)
    tensors = [v for v in values if isinstance(v, Tensor)]
    if not tensors or tensors[0].ndim == 0 or len(tensors[0]) == 0:
        raise InputError(f"The batch is empty: {[tuple(t.shape) for t in tensors]}. Pass at least one example.")
    for t in tensors:
        if t.is_floating_point() and not math.isfinite(float(t.sum())) and not torch.isfinite(t).all():
            raise InputError("The input contains NaN or Inf. Nothing was changed; mend or drop this batch.")
    return len(tensors[0])


def call_model(model: nn.Module, x: Any) -> Any:
    """`model(x)`, `model(*x)` for a tuple, `model(**x)` for a dict."""
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, (tuple, list)) else model(x)
