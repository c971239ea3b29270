"""Where a state rests when the function behind it has kinks: the exact, nonsmooth equilibrium of one unit.

With everything else fixed, a unit minimises `1/2 (s - mu)^2 + beta (f s + u a(s))` over s, where `a` is piecewise
linear, `f` is what pulls on s itself and `u` what pulls on a(s). On a piece with slope k the minimum is at
`s = mu - beta (f + k u)`, if that lies on the piece. A kink is a minimum where the two sides push toward it: the unit
rests **at** it, its error is clipped, not switched off. Of several minima it takes the one to which descent leads from
the free equilibrium: it stays on the branch it came from as long as there is one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mep.activations import Activation
from mep.nodes import Node


def relax(mu: Tensor, f: Tensor, u: Tensor, beta: float, activation: Activation, x0: Tensor) -> tuple[Tensor, Tensor]:
    """The scaled error `(mu - s) / beta` at the unit's equilibrium, and the kink where it rests (NaN: at none).

    `x0` is the unit's state at the free equilibrium, where descent to a minimum starts.

    Example: mu = 0.1, pulled down by 3 through a ReLU; the unit stops at zero.
        >>> from mep.activations import of_module
        >>> one = torch.ones(1)
        >>> relax(0.1 * one, 0 * one, 3 * one, 0.1, of_module(nn.ReLU()), one)
        (tensor([1.]), tensor([0.]))
    """
    kinks, slopes = activation.kinks, activation.slopes
    home = _slope(x0, activation, right=False)
    direction = -torch.sign(x0 - mu + beta * (f + home * u))
    delta, rest = torch.zeros_like(mu), torch.full_like(mu, math.nan)
    nearest = torch.full_like(mu, math.inf)

    def consider(s: Tensor, error: Tensor, kink: float, is_minimum: Tensor) -> None:
        nonlocal delta, rest, nearest
        way = torch.where(direction == 0, (s - x0).abs(), (s - x0) * direction)
        noise = 4 * torch.finfo(s.dtype).eps * (s.abs() + x0.abs())
        better = is_minimum & (way >= -noise) & (way < nearest)
        delta, nearest = torch.where(better, error, delta), torch.where(better, way, nearest)
        rest = torch.where(better, kink, rest)

    for slope, low, high in zip(slopes, (-math.inf, *kinks), (*kinks, math.inf), strict=True):
        error = f + slope * u
        s = mu - beta * error
        consider(s, error, math.nan, (s >= low) & (s <= high))
    for i, kink in enumerate(kinks):
        error = (mu - kink) / beta
        least, most = _ordered(f + slopes[i] * u, f + slopes[i + 1] * u, beta)
        consider(torch.full_like(mu, kink), error, kink, (least <= error) & (error <= most))
    return delta, rest


def _slope(s: Tensor, activation: Activation, right: bool) -> Tensor:
    """The slope of the activation at s; at a kink that of its left or right piece."""
    edges = torch.tensor(activation.kinks, dtype=s.dtype, device=s.device)
    return torch.tensor(activation.slopes, dtype=s.dtype, device=s.device)[torch.bucketize(s, edges, right=right)]


def _ordered(left: Tensor, right: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The scaled errors between which a kink is a minimum: what pulls on either side of it."""
    return (left, right) if beta > 0 else (right, left)


def balancing_pull(s: Tensor, delta: Tensor, f: Tensor, u: Tensor, activation: Activation, beta: float) -> Tensor:
    """What balances the error `delta`: on a piece `f + k u`; at a kink whatever of the subdifferential is nearest."""
    left, right = (f + _slope(s, activation, right=side) * u for side in (False, True))
    low, high = _ordered(left, right, beta)
    return torch.where(low < high, delta.clamp(low, high), left)


def damp(node: Node, delta: Tensor, before: Tensor | None, rest: Tensor) -> Tensor:
    """Step units that rest at a kink by `1 / (1 + |W_row|^2)`: they feel their own error through the layers below.

    There mu moves by about `-|W_row|^2 beta` times the error, so a full step would overshoot.
    """
    last = node.program[-1].target
    if node.clamped:
        return delta
    if isinstance(last, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        gain = last.weight.detach().flatten(1).square().sum(1)
        gain = gain if isinstance(last, nn.Linear) else gain.view(-1, *[1] * (delta.ndim - 2))
    else:
        gain = torch.ones((), dtype=delta.dtype, device=delta.device)
    start = torch.zeros_like(delta) if before is None else before
    return torch.where(rest.isnan(), delta, start + (delta - start) / (1 + gain))
