"""The beta of an estimator that is given none: as strong as the bias allows, chosen before any state has moved.

At beta the cost's gradient at the output changes by `|dC(s_beta) - dC(s_free)| <= L |s_beta - s_free|`, with L the
cost's smoothness, and the output has moved by `beta |M x|` to first order, x = dC(s_free). So the relative bias of the
output's error is about `beta k L`, with `k = |M x| / |x|`, and

    beta = largest / max(1, k L)

keeps it at `largest` for each example: 0.1 for gradient descent, whose states have to stand out from their rounding;
0.01 for solvers that carry errors, for which no beta is too small. Where Jacobians are constant the response M x of the
free equilibrium is known before any state has moved; then the bound is exact, and a tolerance of 0.01 takes one sweep.
Elsewhere k is the gain `<x, M x> / <x, x> = sum_n |A_n^T x|^2 / |x|^2`, which the first backward walk gives exactly and
which is no larger, and the Jacobians move as well: the gradient as a whole may be biased tens of times as much as the
output's error (68 times in a small Llama with its own loss). There `largest` is 0.0002.
Examples that are coupled have one beta, from the gain of all together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mep.cost import BatchCost
from mep.energy import Energy, example_norm
from mep.graph import Point
from mep.settle import Response, Solver
from mep.solvers.networks import are_independent
from mep.solvers.networks.network import spread_length


def chosen_beta(energy: Energy, free: Point, response: Response, solver: Solver) -> Tensor:
    """One beta an example ([batch]), or one for all where examples are coupled (0-dim)."""
    assert energy.nudge is not None
    largest = (0.01 if energy.is_affine else 0.0002) if solver.carries_errors else 0.1
    independent = are_independent(energy, free)
    k = response.amplification if independent else response.group_gain
    smoothness = energy.nudge.cost.smoothness
    if smoothness is None:
        smoothness = measured_smoothness(energy.nudge.cost, energy.output(free), response, k, largest)
        smoothness = smoothness if independent else smoothness.max()
    return largest / (k * smoothness).nan_to_num(0.0).clamp(min=1.0)


def measured_smoothness(cost: BatchCost, output: Tensor, response: Response, k: Tensor, largest: float) -> Tensor:
    """`|dC(s) - dC(s - t x)| / |t x|` of every example, `t = largest k`: as far as the largest beta would take it."""
    x, batch = response.error, response.batch
    way = x * spread_length(k, x) * largest
    change = example_norm(cost.gradient(output - way) - x, batch)
    return change / example_norm(way, batch).add_(torch.finfo(change.dtype).tiny)
