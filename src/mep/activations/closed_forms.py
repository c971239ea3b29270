"""The closed forms of torch's pointwise activations, by module and by function."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mep.activations.pointwise import Activation

aten = torch.ops.aten


def _relu_backward(grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return aten.threshold_backward(grad, x, 0)


def _leaky_backward(grad: Tensor, x: Tensor, y: Tensor, slope: float) -> Tensor:
    return aten.leaky_relu_backward(grad, x, slope, False)


def _hardtanh_backward(grad: Tensor, x: Tensor, y: Tensor, low: float, high: float) -> Tensor:
    return aten.hardtanh_backward(grad, x, low, high)


def _abs_backward(grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return grad * x.sgn()


def _tanh_backward(grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return aten.tanh_backward(grad, y)


def _sigmoid_backward(grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return aten.sigmoid_backward(grad, y)


def _gelu_backward(grad: Tensor, x: Tensor, y: Tensor, approximate: str) -> Tensor:
    return aten.gelu_backward(grad, x, approximate=approximate)


def _silu_backward(grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return aten.silu_backward(grad, x)


def _elu_backward(grad: Tensor, x: Tensor, y: Tensor, alpha: float) -> Tensor:
    return aten.elu_backward(grad, alpha, 1.0, 1.0, False, x)


def _softplus_backward(grad: Tensor, x: Tensor, y: Tensor, beta: float, threshold: float) -> Tensor:
    return aten.softplus_backward(grad, x, beta, threshold)


def _threshold_backward(grad: Tensor, x: Tensor, y: Tensor, threshold: float) -> Tensor:
    return aten.threshold_backward(grad, x, threshold)


def _hardsigmoid_backward(grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x.abs() < 3, grad / 6, 0)


def _softshrink_backward(grad: Tensor, x: Tensor, y: Tensor, lambd: float) -> Tensor:
    return torch.where(x.abs() > lambd, grad, 0)


def _identity(x: Tensor) -> Tensor:
    return x


def own_state(x: Tensor) -> Tensor:
    """Nothing: stands in a graph where a value is to have a state of its own."""
    return x


def _identity_backward(grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return grad


# Builders take what the torch function of the same name takes after its input, so that a recorded call fits.


def _make_relu(inplace: bool = False) -> Activation:
    return Activation("relu", torch.relu, _relu_backward, (0.0,), (0.0, 1.0), (0.0, math.inf))


def _make_leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> Activation:
    value = partial(F.leaky_relu, negative_slope=negative_slope)
    backward = partial(_leaky_backward, slope=negative_slope)
    return Activation("leaky_relu", value, backward, (0.0,), (negative_slope, 1.0))


def _make_hardtanh(min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Activation:
    value = partial(F.hardtanh, min_val=min_val, max_val=max_val)
    backward = partial(_hardtanh_backward, low=min_val, high=max_val)
    kinks = tuple(k for k in (min_val, max_val) if math.isfinite(k))
    slopes = (0.0,) * math.isfinite(min_val) + (1.0,) + (0.0,) * math.isfinite(max_val)
    return Activation("hardtanh", value, backward, kinks, slopes, (min_val, max_val))


def _make_relu6(inplace: bool = False) -> Activation:
    return _make_hardtanh(0.0, 6.0)


def _make_clamp(min: float | None = None, max: float | None = None) -> Activation | None:
    bounds = (-math.inf if min is None else min, math.inf if max is None else max)
    return None if any(isinstance(b, Tensor) for b in bounds) else _make_hardtanh(*bounds)


def _make_clamp_min(min: float) -> Activation | None:
    return _make_clamp(min)


def _make_clamp_max(max: float) -> Activation | None:
    return _make_clamp(None, max)


def _make_threshold(threshold: float, value: float, inplace: bool = False) -> Activation | None:
    """None where it jumps: that is no kink."""
    backward = partial(_threshold_backward, threshold=threshold)
    apply = partial(torch.threshold, threshold=threshold, value=value)
    return Activation("threshold", apply, backward, (threshold,), (0.0, 1.0)) if value == threshold else None


def _make_hardsigmoid(inplace: bool = False) -> Activation:
    return Activation("hardsigmoid", F.hardsigmoid, _hardsigmoid_backward, (-3.0, 3.0), (0.0, 1 / 6, 0.0))


def _make_softshrink(lambd: float = 0.5) -> Activation:
    value, backward = partial(F.softshrink, lambd=lambd), partial(_softshrink_backward, lambd=lambd)
    return Activation("softshrink", value, backward, (-lambd, lambd), (1.0, 0.0, 1.0))


def _make_abs() -> Activation:
    return Activation("abs", torch.abs, _abs_backward, (0.0,), (-1.0, 1.0))


def _make_tanh() -> Activation:
    return Activation("tanh", torch.tanh, _tanh_backward)


def _make_sigmoid() -> Activation:
    return Activation("sigmoid", torch.sigmoid, _sigmoid_backward)


def _make_gelu(approximate: str = "none") -> Activation:
    value = partial(F.gelu, approximate=approximate)
    return Activation("gelu", value, partial(_gelu_backward, approximate=approximate))


def _make_silu(inplace: bool = False) -> Activation:
    return Activation("silu", F.silu, _silu_backward)


def _make_elu(alpha: float = 1.0, inplace: bool = False) -> Activation:
    return Activation("elu", partial(F.elu, alpha=alpha), partial(_elu_backward, alpha=alpha))


def _make_softplus(beta: float = 1.0, threshold: float = 20.0) -> Activation:
    value = partial(F.softplus, beta=beta, threshold=threshold)
    return Activation("softplus", value, partial(_softplus_backward, beta=beta, threshold=threshold))


def _make_identity() -> Activation:
    return Activation("identity", _identity, _identity_backward, (), (1.0,), (-math.inf, math.inf))


Builder = Callable[..., Activation | None]

FUNCTIONS: dict[Any, Builder] = {
    F.relu: _make_relu, torch.relu: _make_relu, "relu": _make_relu,
    F.leaky_relu: _make_leaky_relu,
    F.hardtanh: _make_hardtanh, F.relu6: _make_relu6,
    torch.clamp: _make_clamp, torch.clip: _make_clamp, "clamp": _make_clamp, "clip": _make_clamp,
    torch.clamp_min: _make_clamp_min, "clamp_min": _make_clamp_min,
    torch.clamp_max: _make_clamp_max, "clamp_max": _make_clamp_max,
    F.threshold: _make_threshold, torch.threshold: _make_threshold,
    F.hardsigmoid: _make_hardsigmoid, F.softshrink: _make_softshrink,
    torch.abs: _make_abs, "abs": _make_abs, abs: _make_abs, operator.abs: _make_abs,
    F.tanh: _make_tanh, torch.tanh: _make_tanh, "tanh": _make_tanh,
    F.sigmoid: _make_sigmoid, torch.sigmoid: _make_sigmoid, "sigmoid": _make_sigmoid,
    F.gelu: _make_gelu, F.silu: _make_silu, F.elu: _make_elu, F.softplus: _make_softplus,
    own_state: _make_identity,
}  # fmt: skip
"""Functions, and methods by name: their arguments after the input go to the builder."""

MODULES: Mapping[type[nn.Module], tuple[Builder, tuple[str, ...]]] = {
    nn.ReLU: (_make_relu, ()),
    nn.LeakyReLU: (_make_leaky_relu, ("negative_slope",)),
    nn.Hardtanh: (_make_hardtanh, ("min_val", "max_val")),
    nn.ReLU6: (_make_relu6, ()),
    nn.Threshold: (_make_threshold, ("threshold", "value")),
    nn.Hardsigmoid: (_make_hardsigmoid, ()),
    nn.Softshrink: (_make_softshrink, ("lambd",)),
    nn.Tanh: (_make_tanh, ()),
    nn.Sigmoid: (_make_sigmoid, ()),
    nn.GELU: (_make_gelu, ("approximate",)),
    nn.SiLU: (_make_silu, ()),
    nn.ELU: (_make_elu, ("alpha",)),
    nn.Softplus: (_make_softplus, ("beta", "threshold")),
    nn.Identity: (_make_identity, ()),
}
"""Module types with the attributes that their builder takes."""


def of_module(module: nn.Module) -> Activation | None:
    """The closed form of an activation module, or None if there is none."""
    builder, attributes = MODULES.get(type(module), (None, ()))
    return builder(*(getattr(module, a) for a in attributes)) if builder else None


def of_call(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Activation | None:
    """The closed form of a function or method call on `args[0]`, or None if there is none."""
    try:
        builder = FUNCTIONS.get(target)
        return builder(*args[1:], **kwargs) if builder else None
    except TypeError:  # unhashable target, or arguments that this closed form does not know
        return None
