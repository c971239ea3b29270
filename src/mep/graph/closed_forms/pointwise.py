"""Pointwise activations in closed form: value, derivative, and the branches of the piecewise-linear ones.

A piecewise-linear activation can be *held* on the branch it has at a reference point `x0` (its preactivation at
the free equilibrium): `held(x) = f(x0) + f'(x0) (x - x0)`. On its branch this is the activation itself; beyond
the kink it is the same straight line, which is what makes the nudged energy smooth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


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


def leaking(x: Tensor, positive: Tensor, slope: Tensor) -> Tensor:
    """PReLU, given `positive = relu(x)`: `positive + slope (x - positive)`, one slope or one for every channel."""
    slope = slope.view(-1, *[1] * (x.ndim - 2)) if slope.numel() > 1 else slope
    return positive + slope * (x - positive)
