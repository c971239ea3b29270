"""Hooks on the gradients of parameters: they fire once a step, with the step's gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor


def hooks_of(p: Tensor) -> list[dict[Any, Any]]:
    """The hooks on a parameter's gradient."""
    return [own for own in (p._backward_hooks, getattr(p, "_post_accumulate_grad_hooks", None)) if own]


@contextmanager
def without_hooks(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Hooks on these parameters do not fire inside: they are for the gradient of a step."""
    hooks = [(own, dict(own)) for p in parameters for own in hooks_of(p)]
    for own, _ in hooks:
        own.clear()
    try:
        yield
    finally:
        for own, kept in hooks:
            own.update(kept)
