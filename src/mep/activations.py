"""Pointwise activations in closed form: value, derivative, and the branches of the piecewise-linear ones.

A piecewise-linear activation can be *held* on the branch it has at a reference point `x0` (its preactivation at
the free equilibrium): `held(x) = f(x0) + f'(x0) (x - x0)`. On its branch this is the activation itself; beyond
the kink it is the same straight line, which is what makes the nudged energy smooth.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

    def held(self, x: Tensor, x0: Tensor) -> Tensor:
        """The linear piece of f at `x0`, evaluated at `x` (piecewise-linear f only)."""
        if self.homogeneous:
            return self.backward(x, x0, x0)
        y0 = self.value(x0)
        return y0 + self.backward(x - x0, x0, y0)

    def left_branch(self, x: Tensor, x0: Tensor) -> Tensor:
        """True where `x` is not on the branch of `x0`: there the held line and f differ beyond rounding."""
        noise = 8 * torch.finfo(x.dtype).eps * (x.abs() + x0.abs())
        return (self.value(x) - self.held(x, x0)).abs() > noise


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


def _identity(x: Tensor) -> Tensor:
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
    torch.abs: _make_abs, "abs": _make_abs, abs: _make_abs, operator.abs: _make_abs,
    F.tanh: _make_tanh, torch.tanh: _make_tanh, "tanh": _make_tanh,
    F.sigmoid: _make_sigmoid, torch.sigmoid: _make_sigmoid, "sigmoid": _make_sigmoid,
    F.gelu: _make_gelu, F.silu: _make_silu, F.elu: _make_elu, F.softplus: _make_softplus,
}  # fmt: skip
"""Functions, and methods by name: their arguments after the input go to the builder."""

MODULES: Mapping[type[nn.Module], tuple[Builder, tuple[str, ...]]] = {
    nn.ReLU: (_make_relu, ()),
    nn.LeakyReLU: (_make_leaky_relu, ("negative_slope",)),
    nn.Hardtanh: (_make_hardtanh, ("min_val", "max_val")),
    nn.ReLU6: (_make_relu6, ()),
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


@dataclass(frozen=True)
class MaxPool:
    """Max pooling whose winners can be held: `branch` is the flat index of each window's winner.

    `options` are what `F.max_pool{n}d` takes after its input; `n` counts the pooled dimensions.
    """

    n: int
    adaptive: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def value_and_branch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The pooled values and the winners."""
        name = f"{'adaptive_' if self.adaptive else ''}max_pool{self.n}d"
        return getattr(F, name)(x, **self.options, return_indices=True)

    def held(self, x: Tensor, winners: Tensor) -> Tensor:
        """The values of `x` at the given winners."""
        flat = x.flatten(-self.n).gather(-1, winners.flatten(-self.n))
        return flat.view(winners.shape)

    def left_branch(self, x: Tensor, winners: Tensor) -> Tensor:
        """True where another unit of the window is larger than the held winner."""
        return self.value_and_branch(x)[0] > self.held(x, winners)


_POOL_OPTIONS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
_POOL_MODULES = {getattr(nn, f"MaxPool{n}d"): n for n in (1, 2, 3)}
_ADAPTIVE_MODULES = {getattr(nn, f"AdaptiveMaxPool{n}d"): n for n in (1, 2, 3)}
_POOL_FUNCTIONS = {getattr(home, f"max_pool{n}d"): n for n in (1, 2, 3) for home in (F, torch)}
_ADAPTIVE_FUNCTIONS = {getattr(F, f"adaptive_max_pool{n}d"): n for n in (1, 2, 3)}


def pool_of_module(module: nn.Module) -> MaxPool | None:
    """The max pooling that a module does, or None."""
    kind = type(module)
    if kind in _POOL_MODULES and not module.return_indices:
        return MaxPool(_POOL_MODULES[kind], options={o: getattr(module, o) for o in _POOL_OPTIONS})
    if kind in _ADAPTIVE_MODULES and not module.return_indices:
        return MaxPool(_ADAPTIVE_MODULES[kind], True, {"output_size": module.output_size})
    return None


def pool_of_call(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> MaxPool | None:
    """The max pooling that a function call on `args[0]` does, or None."""
    adaptive = target in _ADAPTIVE_FUNCTIONS
    n = _ADAPTIVE_FUNCTIONS.get(target) or _POOL_FUNCTIONS.get(target)
    if n is None or len(args) < 1:
        return None
    names = ("output_size", "return_indices") if adaptive else (*_POOL_OPTIONS, "return_indices")
    options = dict(zip(names, args[1:], strict=False)) | dict(kwargs)
    return None if options.pop("return_indices", False) else MaxPool(n, adaptive, options)


def kink_of_call(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Activation | MaxPool | None:
    """The operation with kinks that a call on `args[0]` is, or None."""
    activation = of_call(target, args, kwargs)
    if activation is not None:
        return activation if activation.kinks else None
    return pool_of_call(target, args, kwargs)
