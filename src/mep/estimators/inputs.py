"""Batches at the door: how a model is called with one, and what is refused."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mep.errors import ArgumentError, InputError, NotConvergedWarning, ParameterError
from mep.snapshot import Buffers, generators, set_generators


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
    if tensors[0].ndim == 0 or len(tensors[0]) == 0:
        raise InputError(f"The batch is empty: {[tuple(t.shape) for t in tensors]}. Pass at least one example.")
    return len(tensors[0])


def input_values(x: Any) -> Sequence[Any]:
    """All that an input gives to the model, in order."""
    return list(x.values()) if isinstance(x, Mapping) else x if isinstance(x, (tuple, list)) else [x]


def input_tensors(x: Any) -> list[Tensor]:
    """The tensors of an input, in order."""
    return [v for v in input_values(x) if isinstance(v, Tensor)]


def check_finite(x: Any) -> None:
    """Refuse an input with a number that is not finite.

    A sum is finite only if all its terms are; only if it is not does the slower exact test decide.
    """
    for t in (t.detach() for t in input_tensors(x)):
        if t.is_floating_point() and not math.isfinite(float(t.sum())) and not torch.isfinite(t).all():
            raise InputError("The input contains NaN or Inf. Nothing was changed; mend or drop this batch.")


def check_target(target: Any) -> None:
    """Refuse a target that is no tensor; its shape and values are the cost's business."""
    if not isinstance(target, Tensor):
        raise InputError(f"The target must be a tensor, not {type(target).__name__}: torch.as_tensor(target).")


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
def undone_on_error(model: nn.Module) -> Iterator[Buffers]:
    """However often the model is evaluated inside, its buffers end as the first evaluation left them.

    On an error, an interruption included, they and the random number generators end as they began.
    """
    buffers, noise = Buffers(model), generators()
    try:
        yield buffers
        buffers.finish()
    except BaseException:
        buffers.undo()
        set_generators(noise)
        raise


def call_model(model: nn.Module, x: Any) -> Any:
    """`model(x)`, `model(*x)` for a tuple, `model(**x)` for a dict."""
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, (tuple, list)) else model(x)


def warn(message: str) -> None:
    """A NotConvergedWarning at the line of the caller's own code that led here."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("mep", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, NotConvergedWarning, stacklevel=level)
