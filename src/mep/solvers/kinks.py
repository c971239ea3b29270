"""Where a state rests when the function behind it has kinks: the exact, nonsmooth equilibrium of one unit.

With everything else fixed, a unit minimises `1/2 (s - mu)^2 + beta (f s + u a(s))` over s, where `a` is piecewise
linear, `f` is what pulls on s itself and `u` what pulls on a(s). On a piece with slope k the minimum is at
`s = mu - beta (f + k u)`, if that lies on the piece. If no piece holds its own minimum, the unit rests **at** a kink:
its error is clipped, not switched off. If several do, minima coexist and the unit stays where it came from.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mep.activations import Activation
from mep.nodes import Node


def relax(mu: Tensor, f: Tensor, u: Tensor, beta: float, activation: Activation, x0: Tensor) -> tuple[Tensor, Tensor]:
    """The scaled error `(mu - s) / beta` at the unit's equilibrium, and the kink where it rests (NaN: at none).

    `x0` is the unit's state at the free equilibrium; of several minima the one nearest to its piece is taken.

    Example: mu = 0.1, pulled down by 3 through a ReLU; the unit stops at zero.
        >>> from mep.activations import of_module
        >>> one = torch.ones(1)
        >>> relax(0.1 * one, 0 * one, 3 * one, 0.1, of_module(nn.ReLU()), one)
        (tensor([1.]), tensor([0.]))
    """
    kinks, slopes = activation.kinks, activation.slopes
    home = torch.bucketize(x0, torch.tensor(kinks, dtype=x0.dtype, device=x0.device))
    delta, nearest = torch.zeros_like(mu), torch.full_like(mu, math.inf)
    for piece, (low, high) in enumerate(zip((-math.inf, *kinks), (*kinks, math.inf), strict=True)):
        candidate = f + slopes[piece] * u
        s, distance = mu - beta * candidate, (home - piece).abs()
        better = (s >= low) & (s <= high) & (distance < nearest)
        delta, nearest = torch.where(better, candidate, delta), torch.where(better, distance, nearest)
    rest = torch.full_like(mu, math.nan)
    for i, kink in enumerate(kinks):
        error = (mu - kink) / beta
        stops = (f + slopes[i] * u <= error) & (error <= f + slopes[i + 1] * u) & nearest.isinf()
        delta, rest = torch.where(stops, error, delta), torch.where(stops, kink, rest)
    return delta, rest


def balancing_pull(s: Tensor, delta: Tensor, f: Tensor, u: Tensor, activation: Activation) -> Tensor:
    """What balances the error `delta`: on a piece `f + k u`; at a kink whatever of the subdifferential is nearest."""
    kinks, slopes = activation.kinks, activation.slopes
    edges = torch.tensor(kinks, dtype=s.dtype, device=s.device)
    table = torch.tensor(slopes, dtype=s.dtype, device=s.device)
    left = f + table[torch.bucketize(s, edges)] * u
    right = f + table[torch.bucketize(s, edges, right=True)] * u
    return torch.where(left < right, delta.clamp(left, right), left)


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
