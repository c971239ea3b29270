"""Batches: how a model is called with one, what of it are tensors, and which batches and models are refused."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mep.cost import recorded_function
from mep.errors import ArgumentError, DivergedError, InputError, ParameterError, warn
from mep.guards import generators, set_generators


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


def mapped(x: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A batch with other tensors."""
    leaves, structure = flattened(x)
    return unflattened([function(v) if isinstance(v, Tensor) else v for v in leaves], structure)


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
        try:
            signature = inspect.signature(model.forward)
        except ValueError:  # a callable object in the place of forward may have none
            signature = inspect.Signature()
        known = [p for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY]
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


_NO_TARGET = object()


_FIXED = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, range, Enum)
"""Inputs that are no tensors and never change; a graph is for their values."""


def checked_batch(x: Any, target: Any = _NO_TARGET, cost: Any = None, finite: bool = True) -> int:
    """The number of examples of a batch that can be used: not empty, and with tensors that autograd takes.

    A target must be a tensor, unless the cost is a function; its shape and values are for the cost to check. Inputs
    must be `finite` where a model has no way to make something of others, as it has of masks with -inf.
    """
    tensors = []
    for leaf in flattened(x)[0]:
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
        elif not isinstance(leaf, _FIXED) and not callable(leaf) and getattr(leaf, "ndim", None) != 0:
            raise InputError(
                f"x holds an object of {type(leaf).__name__}, whose content may change unseen. Way out: pass its "
                "tensors, in a tuple or dict: torch.as_tensor(...)."
            )
    if not tensors:
        raise InputError(
            f"x must be a tensor, or a tuple or dict of them, and this {type(x).__name__} holds none. Way out: "
            "torch.as_tensor(x)."
        )
    made_in_inference, targets = False, [target]
    if target is not _NO_TARGET and not isinstance(target, Tensor):
        targets = flattened(target)[0]
    for leaf in [*tensors, *targets]:
        made_in_inference |= isinstance(leaf, Tensor) and leaf.is_inference()
    if made_in_inference:
        raise InputError(
            "The batch was made in torch.inference_mode(), and autograd cannot use such tensors. Way out: make it in "
            "torch.no_grad(), or pass x.clone()."
        )
    if tensors[0].ndim == 0 and len(tensors) > 1:
        raise InputError(
            "The first tensor of x is a single number, and its dimension 0 should be the examples. Way out: pass the "
            "inputs by name, one with examples first: x={'name': tensor, ...}."
        )
    if tensors[0].ndim == 0 or len(tensors[0]) == 0:
        raise InputError(f"The batch is empty: {[tuple(t.shape) for t in tensors]}. Pass at least one example.")
    is_given = target is not _NO_TARGET and not isinstance(target, Tensor)
    if is_given and (target is None or recorded_function(cost) is None):
        raise InputError(f"The target must be a tensor, not {type(target).__name__}: torch.as_tensor(target).")
    if finite:
        check_finite(x)
    return len(tensors[0])


def check_finite(x: Any) -> None:
    """Refuse NaN and Inf in floating-point inputs."""
    for t in flattened(x)[0]:
        is_real = isinstance(t, Tensor) and t.is_floating_point()
        # A sum is finite only if all its terms are; only if it is not does the slower exact test decide.
        if is_real and not math.isfinite(float(t.detach().sum())) and not torch.isfinite(t).all():
            raise InputError("The input contains NaN or Inf. Nothing was changed; mend or drop this batch.")


@contextmanager
def undone_on_error(x: Any, solver: Any = None) -> Iterator[Callable[[], None]]:
    """On an error, an interruption included, torch's generators end as they began, and so does what a solver carries.

    What diverged on NaN is refused. What it yields is to be called once all has moved: from then on nothing is undone.
    """
    before = [(generators(), solver.state_dict() if solver else {})]
    try:
        yield before.clear
    except BaseException as error:
        for noise, carried in before:
            set_generators(noise)
            if solver:
                solver.load_state_dict(carried)
        if isinstance(error, DivergedError):
            check_finite(x)
        raise


def warn_of_inputs(name: str, x: Any) -> bool:
    """Warn of inputs that were computed from what is trained, where gradients end; whether there are any."""
    inputs = [t for t in flattened(x)[0] if isinstance(t, Tensor) and t.grad_fn is not None]
    if inputs:
        warn(
            f"{len(inputs)} inputs of {name} require a gradient, of shapes {[tuple(t.shape) for t in inputs[:3]]}, and "
            "get none: there are those of parameters alone, and nothing goes back to what has made the input. Way out: "
            "make that a part of the model; or pass x.detach().",
            UserWarning,
        )
    return bool(inputs)


def check_mode() -> None:
    """Refuse inference mode, in which autograd records nothing of a single module either."""
    if torch.is_inference_mode_enabled():
        raise ArgumentError("Gradients cannot be estimated in torch.inference_mode(). Call outside, or in no_grad().")


def check_model(model: nn.Module, caller: str) -> None:
    """Refuse what is no module, or has nothing to train."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{caller}(model={model!r}): must be a torch.nn.Module.")
    for p in model.parameters():
        if p.requires_grad:
            return
    raise ParameterError(f"{type(model).__name__} has no parameter that requires a gradient: nothing to train.")
