"""Where a state rests when the function behind it has kinks: the exact, nonsmooth equilibrium of one unit.

With everything else fixed, a unit minimises `1/2 (s - mu)^2 + beta (f s + u a(s))` over s, where `a` is piecewise
linear, `f` is what pulls on s itself and `u` what pulls on a(s). On a piece with slope k the minimum is at
`s = mu - beta (f + k u)`, if that lies on the piece. A kink is a minimum where the two sides push toward it: the unit
rests **at** it, its error is clipped, not switched off. Of several minima it takes the one to which descent leads from
the free equilibrium: it stays on the branch it came from as long as there is one.

The units of a maximum (`ties.py`) rest together, at a tie.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mep.graph import Graph, Point
from mep.graph.closed_forms import Activation, Kink, Largest, Windows
from mep.graph.node import Beta, Node
from mep.solvers.networks import ties


def relax(
    mu: Tensor,
    f: Tensor,
    u: Tensor,
    beta: Beta,
    kink: Kink,
    x0: Tensor,
    before: Tensor | None = None,
    gain: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The scaled error `(mu - s) / beta` at the unit's equilibrium, and where it rests at a kink (NaN: at none).

    A unit feels its own error through the layers below (`gains`): had it the error delta, mu would be
    `mu + gain beta (before - delta)`, with `before` the error at which mu was computed (0 if None). Where it may rest
    it does so where that balances, else it would jump to and fro over its kink for ever; where nothing rests, at a
    kink that pushes units away, it is judged by the mu that it has.

    `x0` is the unit's state at the free equilibrium, where descent to a minimum starts. beta is a number, or spread
    over the shape of mu.

    Example: mu = 0.1, pulled down by 3 through a ReLU; the unit stops at zero.
        >>> from mep.graph.closed_forms import activation_of
        >>> one = torch.ones(1)
        >>> relax(0.1 * one, 0 * one, 3 * one, 0.1, activation_of("relu"), one)
        (tensor([1.]), tensor([0.]))
    """
    gain = gain * (beta * u * _bend(mu, kink) > 0).to(mu.dtype)
    stiffness = beta * (1 + gain)
    mu = mu if before is None else mu + beta * gain * before
    if isinstance(kink, Largest):
        return ties.relax(mu, f, u, stiffness, x0)
    kinks, slopes = kink.kinks, kink.slopes
    home = _slope(x0, kink, right=False)
    direction = -torch.sign(x0 - mu + stiffness * (f + home * u))
    delta, rest = torch.zeros_like(mu), torch.full_like(mu, math.nan)
    nearest = torch.full_like(mu, math.inf)

    def consider(s: Tensor, error: Tensor, place: float, is_minimum: Tensor) -> None:
        nonlocal delta, rest, nearest
        way = torch.where(direction == 0, (s - x0).abs(), (s - x0) * direction)
        noise = 4 * torch.finfo(s.dtype).eps * (s.abs() + x0.abs())
        better = is_minimum & (way >= -noise) & (way < nearest)
        delta, nearest = torch.where(better, error, delta), torch.where(better, way, nearest)
        rest = torch.where(better, place, rest)

    for slope, low, high in zip(slopes, (-math.inf, *kinks), (*kinks, math.inf), strict=True):
        error = f + slope * u
        s = mu - stiffness * error
        consider(s, error, math.nan, (s >= low) & (s <= high))
    for i, place in enumerate(kinks):
        error = (mu - place) / stiffness
        least, most = _ordered(f + slopes[i] * u, f + slopes[i + 1] * u, beta)
        consider(torch.full_like(mu, place), error, place, (least <= error) & (error <= most))
    return delta, rest


def _bend(mu: Tensor, kink: Kink) -> Tensor | float:
    """By how much the slope grows at the kink that is nearest to mu; a maximum is bent upward everywhere."""
    if isinstance(kink, Largest):
        return 1.0
    bends = torch.tensor(kink.slopes, dtype=mu.dtype, device=mu.device).diff()
    edges = torch.tensor(kink.kinks, dtype=mu.dtype, device=mu.device)
    return bends[(mu.unsqueeze(-1) - edges).abs().argmin(-1)]


def _slope(s: Tensor, activation: Activation, right: bool) -> Tensor:
    """The slope of the activation at s; at a kink that of its left or right piece."""
    edges = torch.tensor(activation.kinks, dtype=s.dtype, device=s.device)
    return torch.tensor(activation.slopes, dtype=s.dtype, device=s.device)[
        torch.bucketize(s.contiguous(), edges, right=right)
    ]


def _ordered(left: Tensor, right: Tensor, beta: Beta) -> tuple[Tensor, Tensor]:
    """The scaled errors between which a kink is a minimum: what pulls on either side of it."""
    if isinstance(beta, Tensor):
        return torch.where(beta > 0, left, right), torch.where(beta > 0, right, left)
    return (left, right) if beta > 0 else (right, left)


def balancing_force(s: Tensor, delta: Tensor, f: Tensor, u: Tensor, kink: Kink, beta: Beta) -> Tensor:
    """What balances the error `delta`: on a piece `f + k u`; at a kink whatever of the subdifferential is nearest."""
    if isinstance(kink, Largest):
        return ties.balancing_force(s, delta, f, u, beta)
    left, right = (f + _slope(s, kink, right=side) * u for side in (False, True))
    low, high = _ordered(left, right, beta)
    return torch.where(low < high, delta.clamp(low, high), left)


def placed(s: Tensor, rest: Tensor, kink: Kink) -> Tensor:
    """The states `s`, with those at rest put on their kink: units at a tie to where they now meet."""
    return torch.where(rest.isnan(), s, ties.mean_at_tie(s, rest) if isinstance(kink, Largest) else rest)


def gains(graph: Graph, free: Point) -> dict[str, Tensor | float]:
    """How far the error of each value comes back through the layers below, per unit or on the average.

    Unit i of a linear layer or convolution: `|W_i|^2` times what each value it reads moves with its own error: a state
    by 1 and what comes back to it, the value behind a kink by the mean squared slope of that. Everything else is taken
    to hand on what it reads.
    """
    found: dict[str, Tensor | float] = {}
    moves: dict[str, float] = {}
    for node in graph.nodes:
        below = sum(moves.get(p, 0.0) for p in node.parents)
        found[node.name] = 0.0 if node.clamped else _gain(node, below)
        moves[node.name] = float(torch.as_tensor(found[node.name]).mean()) + node.owns_state
        kink = graph.kinks.get(node.name)
        if isinstance(kink, Activation):
            moves[node.name] *= float(_slope(free.values[node.parents[0]], kink, right=False).square().mean())
    return found


def _gain(node: Node, below: float) -> Tensor | float:
    if node.weighted is not None and node.weighted.has_rows:
        weight = node.weighted.weight.detach()
        return (below * weight.flatten(1).square().sum(1)).view(-1, *[1] * (weight.ndim - 2))
    return below * math.prod(op.target.overlap() for op in node.program if isinstance(op.target, Windows))
