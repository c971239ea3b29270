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

from mep.graph.closed_forms.potentials import FREE_STATE, Potential, Quadratic, Sigmoid, Softplus, Tanh

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """`y = value(x)` and `backward(grad, x) = grad * f'(x)`, elementwise; from y in place of x if `from_result`.

    A piecewise-linear f has `slopes`, and `kinks` between them, both from left to right; others have neither.
    `potential` is the energy of the Hopfield state that f returns, if there is one.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    kinks: tuple[float, ...] = ()
    slopes: tuple[float, ...] = ()
    potential: Potential | None = None
    from_result: bool = False

    @property
    def piecewise(self) -> bool:
        """Whether f is piecewise linear."""
        return bool(self.slopes)

    @property
    def homogeneous(self) -> bool:
        """Whether every piece points at the origin, so that it needs no offset."""
        return set(self.kinks) <= {0.0}

    def linearized(self, x: Tensor, x0: Tensor) -> Tensor:
        """The linear piece of f at `x0`, evaluated at `x`, which may be complex (piecewise-linear f only)."""
        if x.is_complex():
            return torch.complex(self.linearized(x.real, x0), self.backward(x.imag, x0))
        if self.homogeneous:
            return self.backward(x, x0)
        return self.value(x0) + self.backward(x - x0, x0)

    def left_branch(self, x: Tensor, x0: Tensor) -> Tensor:
        """True where `x` is not on the branch of `x0`: there the held line and f differ beyond rounding."""
        noise = 8 * torch.finfo(x.dtype).eps * (x.abs() + x0.abs())
        return (self.value(x) - self.linearized(x, x0)).abs() > noise


def own_state(x: Tensor) -> Tensor:
    """Nothing: stands in a graph where a value is to have a state of its own."""
    return x


# Builders take what the operation of the same name takes after its input, so that a recorded call fits.


def _make_relu() -> Activation:
    backward = partial(aten.threshold_backward.default, threshold=0)
    return Activation("relu", torch.relu, backward, (0.0,), (0.0, 1.0), Quadratic(0.0, math.inf))


def _make_leaky_relu(negative_slope: float = 0.01) -> Activation:
    value = partial(F.leaky_relu, negative_slope=negative_slope)
    backward = partial(aten.leaky_relu_backward.default, negative_slope=negative_slope, self_is_result=False)
    return Activation("leaky_relu", value, backward, (0.0,), (negative_slope, 1.0))


def _make_hardtanh(min_val: float = -1.0, max_val: float = 1.0) -> Activation:
    bounds: dict[str, Any] = {"min_val": min_val, "max_val": max_val}
    value, backward = partial(F.hardtanh, **bounds), partial(aten.hardtanh_backward.default, **bounds)
    kinks = tuple(k for k in (min_val, max_val) if math.isfinite(k))
    slopes = (0.0,) * math.isfinite(min_val) + (1.0,) + (0.0,) * math.isfinite(max_val)
    return Activation("hardtanh", value, backward, kinks, slopes, Quadratic(min_val, max_val))


def _make_relu6() -> Activation:
    return _make_hardtanh(0.0, 6.0)


def _make_clamp(min: float | None = None, max: float | None = None) -> Activation | None:
    bounds = (-math.inf if min is None else min, math.inf if max is None else max)
    return _make_hardtanh(*bounds) if all(isinstance(b, (int, float)) for b in bounds) else None


def _make_clamp_max(max: float) -> Activation | None:
    return _make_clamp(None, max)


def _make_threshold(threshold: float, value: float) -> Activation | None:
    """None where it jumps: that is no kink."""
    backward = partial(aten.threshold_backward.default, threshold=threshold)
    apply = partial(torch.threshold, threshold=threshold, value=value)
    return Activation("threshold", apply, backward, (threshold,), (0.0, 1.0)) if value == threshold else None


def _make_hardsigmoid() -> Activation:
    def backward(grad: Tensor, x: Tensor) -> Tensor:
        return torch.where(x.abs() < 3, grad / 6, 0)

    return Activation(
        "hardsigmoid", F.hardsigmoid, backward, (-3.0, 3.0), (0.0, 1 / 6, 0.0), Quadratic(0.0, 1.0, 1 / 6, 0.5)
    )


def _make_softshrink(lambd: float = 0.5) -> Activation:
    def backward(grad: Tensor, x: Tensor) -> Tensor:
        return torch.where(x.abs() > lambd, grad, 0)

    return Activation("softshrink", partial(F.softshrink, lambd=lambd), backward, (-lambd, lambd), (1.0, 0.0, 1.0))


def _make_abs() -> Activation:
    return Activation("abs", torch.abs, lambda grad, x: grad * x.sgn(), (0.0,), (-1.0, 1.0))


def _make_tanh() -> Activation:
    return Activation("tanh", torch.tanh, aten.tanh_backward.default, potential=Tanh(), from_result=True)


def _make_sigmoid() -> Activation:
    return Activation("sigmoid", torch.sigmoid, aten.sigmoid_backward.default, potential=Sigmoid(), from_result=True)


def _make_gelu(approximate: str = "none") -> Activation:
    value = partial(F.gelu, approximate=approximate)
    return Activation("gelu", value, partial(aten.gelu_backward.default, approximate=approximate))


def _make_silu() -> Activation:
    return Activation("silu", F.silu, aten.silu_backward.default)


def _make_elu(alpha: float = 1.0) -> Activation:
    def backward(grad: Tensor, x: Tensor) -> Tensor:
        return aten.elu_backward(grad, alpha, 1.0, 1.0, False, x)

    return Activation("elu", partial(F.elu, alpha=alpha), backward)


def _make_softplus(beta: float = 1.0, threshold: float = 20.0) -> Activation:
    options: dict[str, Any] = {"beta": beta, "threshold": threshold}
    value, backward = partial(F.softplus, **options), partial(aten.softplus_backward.default, **options)
    # Below a threshold of 20 it jumps by more than 2e-9 to its straight line, and has no inverse.
    potential = Softplus(beta) if beta > 0 and threshold >= 20 else None
    return Activation("softplus", value, backward, potential=potential)


def _make_identity() -> Activation:
    return Activation("identity", own_state, lambda grad, _: grad, (), (1.0,), FREE_STATE)


Builder = Callable[..., Activation | None]

TABLE: dict[str, Builder] = {
    "relu": _make_relu,
    "leaky_relu": _make_leaky_relu,
    "hardtanh": _make_hardtanh,
    "relu6": _make_relu6,
    "clamp": _make_clamp,
    "clip": _make_clamp,
    "clamp_min": _make_clamp,
    "clamp_max": _make_clamp_max,
    "threshold": _make_threshold,
    "hardsigmoid": _make_hardsigmoid,
    "softshrink": _make_softshrink,
    "abs": _make_abs,
    "absolute": _make_abs,
    "tanh": _make_tanh,
    "sigmoid": _make_sigmoid,
    "special_expit": _make_sigmoid,
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


def signed(x: Tensor) -> Tensor:
    """x as `sign(x) |x|`, whose derivative is taken to be 0 at 0: as torch's pooling by p-norms, without kinks."""
    return torch.sign(x) * F.relu(x.abs())


def leaking(x: Tensor, positive: Tensor, slope: Tensor) -> Tensor:
    """PReLU, given `positive = relu(x)`: `positive + slope (x - positive)`, one slope or one for every channel."""
    slope = slope.view(-1, *[1] * (x.ndim - 2)) if slope.numel() > 1 else slope
    return positive + slope * (x - positive)
