"""Batches at the door: how a model is called with one, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mep.cost import recorded_function
from mep.errors import ArgumentError, InputError, ParameterError
from mep.graph.inputs import flattened
from mep.noise import generators, set_generators


def batch_size(x: Any) -> int:
    """The number of examples, after checking that there are some and that every number of the input is finite."""
    examples = count_examples(x)
    check_finite(x)
    return examples


def count_examples(x: Any) -> int:
    """The number of examples, after checking that there are some."""
    tensors = input_tensors(x)
    if not tensors:
        raise InputError(f"x must be a tensor, or a tuple or dict of them, not {type(x).__name__}: torch.as_tensor(x).")
    check_not_of_inference_mode(tensors)
    if tensors[0].ndim == 0 or len(tensors[0]) == 0:
        raise InputError(f"The batch is empty: {[tuple(t.shape) for t in tensors]}. Pass at least one example.")
    return len(tensors[0])


def input_tensors(x: Any) -> list[Tensor]:
    """The tensors of an input, in order."""
    return [v for v in flattened(x)[0] if isinstance(v, Tensor)]


def check_finite(x: Any) -> None:
    """Refuse an input with a number that is not finite.

    A sum is finite only if all its terms are; only if it is not does the slower exact test decide.
    """
    for t in (t.detach() for t in input_tensors(x)):
        if t.is_floating_point() and not math.isfinite(float(t.sum())) and not torch.isfinite(t).all():
            raise InputError("The input contains NaN or Inf. Nothing was changed; mend or drop this batch.")


def check_target(target: Any, cost: Any = None) -> None:
    """Refuse a target that is no tensor, unless the cost is a function; shape and values are the cost's business."""
    check_not_of_inference_mode(flattened(target)[0])
    if not isinstance(target, Tensor) and (target is None or recorded_function(cost) is None):
        raise InputError(f"The target must be a tensor, not {type(target).__name__}: torch.as_tensor(target).")


def check_not_of_inference_mode(tensors: Sequence[Any]) -> None:
    """Refuse tensors that autograd cannot use, not even those of a single module."""
    if any(isinstance(t, Tensor) and t.is_inference() for t in tensors):
        raise InputError(
            "The batch was made in torch.inference_mode(), and autograd cannot use such tensors. Way out: make it in "
            "torch.no_grad(), or pass x.clone()."
        )


def check_mode() -> None:
    """Refuse inference mode, in which autograd tells nothing of a single module either."""
    if torch.is_inference_mode_enabled():
        raise ArgumentError("Gradients cannot be estimated in torch.inference_mode(). Call outside, or in no_grad().")


def check_model(model: nn.Module, caller: str) -> None:
    """Refuse what is no module, or has nothing to train."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{caller}(model={model!r}): must be a torch.nn.Module.")
    if not any(p.requires_grad for p in model.parameters()):
        raise ParameterError(f"{type(model).__name__} has no parameter that requires a gradient: nothing to train.")


@contextmanager
def noise_undone_on_error() -> Iterator[None]:
    """On an error, an interruption included, torch's random number generators end as they began."""
    noise = generators()
    try:
        yield
    except BaseException:
        set_generators(noise)
        raise
