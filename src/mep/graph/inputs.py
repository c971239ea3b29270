"""How a batch is given to a model: a tensor, a tuple by position, a dict by name; and what of it are tensors."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mep.errors import InputError


def call_model(model: nn.Module, x: Any) -> Any:
    """`model(x)`, `model(*x)` for a tuple, `model(**x)` for a dict."""
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, (tuple, list)) else model(x)


@contextmanager
def dtype_errors(model: nn.Module) -> Iterator[None]:
    """Inside, what a batch of another dtype than the parameters raises is an InputError."""
    try:
        yield
    except RuntimeError as error:
        if "dtype" not in str(error) and "scalar type" not in str(error):
            raise
        raise InputError(
            f"{type(model).__name__} cannot be applied to this batch: {error}. Nothing was changed. Way out: give the "
            "input the dtype of the parameters, x.to(next(model.parameters()).dtype)."
        ) from error


def flattened(x: Any) -> tuple[list[Any], Any]:
    """All leaves of an input, tensors and others, and its structure; None for a tensor alone."""
    return ([x], None) if isinstance(x, Tensor) else pytree.tree_flatten(dict(x) if isinstance(x, Mapping) else x)


def unflattened(leaves: list[Any], structure: Any) -> Any:
    """The input of these leaves."""
    return leaves[0] if structure is None else pytree.tree_unflatten(leaves, structure)


def input_names(model: nn.Module, x: Any) -> list[str]:
    """A name for every leaf of an input: that of the argument of `forward`, numbered where it has several leaves.

    Example:
        >>> import torch
        >>> input_names(nn.Linear(2, 1), torch.ones(1, 2))
        ['input']
    """
    if isinstance(x, Mapping):
        given = list(x.items())
    else:
        values = x if isinstance(x, (tuple, list)) else [x]
        known = [p for p in inspect.signature(model.forward).parameters.values() if p.kind is not p.KEYWORD_ONLY]
        names = [p.name for p in known if p.kind is not p.VAR_POSITIONAL]
        given = [(names[i] if i < len(names) else f"input_{i}", v) for i, v in enumerate(values)]
    found = []
    for name, value in given:
        count = len(pytree.tree_leaves(value))
        found += [str(name)] if count == 1 else [f"{name}_{i}" for i in range(count)]
    return found


def describe(x: Any) -> str:
    """What kind of input this is, for messages."""
    if isinstance(x, Mapping):
        return "a dict of " + ", ".join(map(str, x))
    return f"a tuple of {len(x)}" if isinstance(x, (tuple, list)) else type(x).__name__
