"""How strongly each example is nudged: less than asked where its equilibrium is far away, or out of reach.

The strength of a nudge is `beta k L`, with k the gain of the example, `|M x| / |x|` for the output error x, and L the
smoothness of the cost (no eigenvalue of its Hessian is larger). The answer takes back no more than that fraction of the
cost's gradient, `|dC(s - beta M x) - dC(s)| <= L beta |M x|`: it is the bias of the estimate, and makes settling slow.
A network that is not affine shows `<x, M x> / <x, x>`, which is less, before any state has moved.

Where examples do not see each other the nudged energy is a sum over them, each with a beta of its own, and their scaled
errors, on which the contrast is built, are those of their own equilibria. So one hard example need not weaken the rest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mep.cost import BatchCost
from mep.energy import Energy, State, example_norm, nudge
from mep.graph import Point
from mep.layout import per_example
from mep.nodes import Node, Strength, weakest

_LEAST = 1 / 128
"""This fraction of the largest strength nudges may always have."""
_AWAY = 0.5
"""The largest strength of a nudge away from the target: there is an equilibrium only below 1."""
_MARGIN = 0.8
"""Who is weakened gets this fraction of what may be: then another error, or the other phase, finds it within reach."""
_STALLED, _FALL, _LESS = 1e-2, 0.5, 0.125
"""An example stalls that is above this residual, and of which a sweep has left more than this fraction."""
_UNLIKE = 0.3
"""Errors that change by more come from where the network bends, and settling there would be slow."""
SOON = 3
"""After so many sweeps all examples should be below `_STALLED`."""
_GROWTH, _SHRINK = 1.02, 0.8


def higher(most: Strength | None, largest: float) -> float:
    """The strength to begin a step with, after one that began with `most` (None: before the first) and settled soon."""
    return largest if most is None else min(largest, float(most) * _GROWTH)


def lower(most: Strength, largest: float) -> float:
    """What is learnt of a step that began with `most`, where some examples were late."""
    return max(_LEAST * largest, _SHRINK * float(most))


def is_late(worst: float, tol: float) -> bool:
    """Whether the example with the worst residual has not settled soon."""
    return worst > max(_STALLED, tol)


def weaker(energy: Energy, factor: Tensor | None) -> Energy:
    """The energy with `factor` ([batch], None for 1) times as strong a nudge."""
    assert energy.nudge is not None
    return energy if factor is None else nudge(energy, energy.nudge.cost, energy.nudge.beta * factor)


def within_reach(cost: BatchCost, strength: Tensor, most: Strength) -> Tensor | None:
    """By which factors to weaken nudges of these `beta k`, [batch], to a little less than that strength.

    k is the gain met with one error, which is not the largest there is. None if none is too strong, as far as one may
    look: where `most` is a tensor, in a program, there are always factors.
    """
    smoothness = cost.smoothness
    if smoothness is None:
        return None
    size, away, may_look = strength.abs(), weakest(most, _AWAY), not isinstance(most, Tensor)
    if may_look and float(size.max()) * smoothness <= away:
        return None
    limit = away if away is most else torch.where(strength < 0, away, most)
    excess = size * (smoothness / limit)
    is_too_strong = (excess > 1) & (excess < math.inf)  # what is no number says nothing
    if may_look and not is_too_strong.any():
        return None
    return torch.where(is_too_strong, _MARGIN / excess, 1)


def limited(energy: Energy, x: Tensor, moved: Tensor, most: Strength) -> tuple[Energy, Tensor | None]:
    """With less of a nudge for the examples that answer x too strongly, by `-beta moved`; and by which factors."""
    assert energy.nudge is not None
    gain = example_norm(moved, len(x)) / example_norm(x, len(x))
    factor = within_reach(energy.nudge.cost, energy.nudge.beta * gain, most)
    return weaker(energy, factor), factor


def alike(first: State, second: State, output: str, batch: int, most: Strength) -> Tensor | None:
    """By which factors to weaken nudges so that errors come back a second time as they did first.

    They do not where states have gone so far that the Jacobians have changed: then those of some node change by more
    than a share of their size, beyond what the error of the output does. None if nowhere, see `within_reach`.
    """
    found = []
    for name, error in second.items():
        size = example_norm(first[name], batch).add_(torch.finfo(error.dtype).tiny)
        found.append(example_norm(error - first[name], batch) / size)
    bends = torch.stack(found).amax(0) > _UNLIKE + found[list(second).index(output)]
    factor = torch.where(bends, _LESS, 1.0).to(size.dtype)
    return factor if isinstance(most, Tensor) or bool(bends.any()) else None


def stalled(residual: Tensor, before: Tensor, tol: float) -> Tensor | None:
    """By which factors to weaken nudges after a sweep that has brought these residuals ([batch]) down too little."""
    stalls = (residual > max(_STALLED, tol)) & (residual > _FALL * before)
    return torch.where(stalls, _LESS, 1.0).to(residual.dtype) if bool(stalls.any()) else None


def are_separate(energy: Energy, point: Point) -> bool:
    """Whether examples do not see each other, as the Jacobians at a point tell for any two of them.

    Some backward walks for the first batch of a graph, of two examples at least.
    """
    graph = energy.graph
    if energy.batch > 1 and graph.is_separable is None:
        place = torch.arange(energy.batch, device=energy.output(point).device)
        digits = [(place >> digit) % 2 == 1 for digit in range((energy.batch - 1).bit_length())]  # no two have the same
        graph.is_separable = not any(_cross(energy, point, some) for half in digits for some in (half, ~half))
    return energy.batch == 1 or bool(graph.is_separable)


def _cross(energy: Energy, point: Point, some: Tensor) -> bool:
    """Whether forces on other examples reach these."""
    graph, batch, output = energy.graph, energy.batch, energy.output(point)
    uneven = torch.arange(output.numel(), device=output.device).cos().view_as(output).to(output.dtype)
    found: list[Tensor] = []

    def transmit(node: Node, force: Tensor | None) -> Tensor | None:
        if force is not None:
            crossing = force if force.ndim == 0 or len(force) % batch else force * per_example(some, force)
            found.append(crossing.count_nonzero())
        return force

    graph.pull(point.saved, uneven * per_example(~some, uneven), transmit)
    return bool(torch.stack(found).any())
