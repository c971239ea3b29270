"""Pointwise activations in closed form: value, derivative, and the branches of the piecewise-linear ones.

A piecewise-linear activation can be *held* on the branch it has at a reference point `x0`, its preactivation at the
free equilibrium: `linearized(x, x0) = f(x0) + f'(x0) (x - x0)`. On its branch this is the activation itself; beyond
the kink it is the same straight line, which makes the nudged energy smooth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """`y = value(x)` and `backward(grad, x, y) = grad * f'(x)`, elementwise.

    A piecewise-linear f has `slopes`, and `kinks` between them, both from left to right; others have neither. `box` is
    the interval onto which f projects, if f is a projection: a Hopfield state then lives there.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]
    kinks: tuple[float, ...] = ()
    slopes: tuple[float, ...] = ()
    box: tuple[float, float] | None = None

    @property
    def piecewise(self) -> bool:
        """Whether f is piecewise linear."""
        return bool(self.slopes)

    @property
    def homogeneous(self) -> bool:
        """Whether every piece points at the origin, so that it needs no offset."""
        return set(self.kinks) <= {0.0}

    def linearized(self, x: Tensor, x0: Tensor) -> Tensor:
        """The linear piece of f at `x0`, evaluated at `x` (piecewise-linear f only)."""
        if self.homogeneous:
            return self.backward(x, x0, x0)
        y0 = self.value(x0)
        return y0 + self.backward(x - x0, x0, y0)

    def left_branch(self, x: Tensor, x0: Tensor) -> Tensor:
        """True where `x` is not on the branch of `x0`: there the held line and f differ beyond rounding."""
        noise = 8 * torch.finfo(x.dtype).eps * (x.abs() + x0.abs())
        return (self.value(x) - self.linearized(x, x0)).abs() > noise


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


# Builders take what the operation of the same name takes after its input, so that a recorded call fits.


def _make_relu() -> Activation:
    return Activation("relu", torch.relu, _relu_backward, (0.0,), (0.0, 1.0), (0.0, math.inf))


def _make_leaky_relu(negative_slope: float = 0.01) -> Activation:
    value = partial(F.leaky_relu, negative_slope=negative_slope)
    backward = partial(_leaky_backward, slope=negative_slope)
    return Activation("leaky_relu", value, backward, (0.0,), (negative_slope, 1.0))


def _make_hardtanh(min_val: float = -1.0, max_val: float = 1.0) -> Activation:
    value = partial(F.hardtanh, min_val=min_val, max_val=max_val)
    backward = partial(_hardtanh_backward, low=min_val, high=max_val)
    kinks = tuple(k for k in (min_val, max_val) if math.isfinite(k))
    slopes = (0.0,) * math.isfinite(min_val) + (1.0,) + (0.0,) * math.isfinite(max_val)
    return Activation("hardtanh", value, backward, kinks, slopes, (min_val, max_val))


def _make_relu6() -> Activation:
    return _make_hardtanh(0.0, 6.0)


def _make_clamp(min: float | None = None, max: float | None = None) -> Activation | None:
    bounds = (-math.inf if min is None else min, math.inf if max is None else max)
    return _make_hardtanh(*bounds) if all(isinstance(b, (int, float)) for b in bounds) else None


def _make_clamp_min(min: float) -> Activation | None:
    return _make_clamp(min)


def _make_clamp_max(max: float) -> Activation | None:
    return _make_clamp(None, max)


def _make_threshold(threshold: float, value: float) -> Activation | None:
    """None where it jumps: that is no kink."""
    backward = partial(_threshold_backward, threshold=threshold)
    apply = partial(torch.threshold, threshold=threshold, value=value)
    return Activation("threshold", apply, backward, (threshold,), (0.0, 1.0)) if value == threshold else None


def _make_hardsigmoid() -> Activation:
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


def _make_silu() -> Activation:
    return Activation("silu", F.silu, _silu_backward)


def _make_elu(alpha: float = 1.0) -> Activation:
    return Activation("elu", partial(F.elu, alpha=alpha), partial(_elu_backward, alpha=alpha))


def _make_softplus(beta: float = 1.0, threshold: float = 20.0) -> Activation:
    value = partial(F.softplus, beta=beta, threshold=threshold)
    return Activation("softplus", value, partial(_softplus_backward, beta=beta, threshold=threshold))


def _make_identity() -> Activation:
    return Activation("identity", _identity, _identity_backward, (), (1.0,), (-math.inf, math.inf))


Builder = Callable[..., Activation | None]

TABLE: dict[str, Builder] = {
    "relu": _make_relu,
    "leaky_relu": _make_leaky_relu,
    "hardtanh": _make_hardtanh,
    "relu6": _make_relu6,
    "clamp": _make_clamp,
    "clip": _make_clamp,
    "clamp_min": _make_clamp_min,
    "clamp_max": _make_clamp_max,
    "threshold": _make_threshold,
    "hardsigmoid": _make_hardsigmoid,
    "softshrink": _make_softshrink,
    "abs": _make_abs,
    "absolute": _make_abs,
    "tanh": _make_tanh,
    "sigmoid": _make_sigmoid,
    "gelu": _make_gelu,
    "silu": _make_silu,
    "elu": _make_elu,
    "softplus": _make_softplus,
    "own_state": _make_identity,
}
"""By the name of the operation; its arguments after the input go to the builder."""


def activation_of(name: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Activation | None:
    """The closed form of an operation with these arguments after its input, or None if there is none.

    Example:
        >>> activation_of("leaky_relu", (0.2,)).slopes
        (0.2, 1.0)
    """
    builder = TABLE.get(name)
    try:
        return builder(*args, **(kwargs or {})) if builder else None
    except TypeError:  # arguments that this closed form does not have
        return None


def leaking(x: Tensor, positive: Tensor, slope: Tensor) -> Tensor:
    """PReLU, given `positive = relu(x)`: `positive + slope (x - positive)`, one slope or one for every channel."""
    slope = slope.view(-1, *[1] * (x.ndim - 2)) if slope.numel() > 1 else slope
    return positive + slope * (x - positive)
