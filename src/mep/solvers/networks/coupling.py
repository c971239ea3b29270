"""Whether examples are independent: whether none of them changes what another one settles to.

Where they are, the nudged energy is a sum over examples, each with an equilibrium, a beta and a step length of its own.
Where they are not, as with batch normalisation in training, they are one group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mep.cost import BatchCost
from mep.energy import Energy
from mep.graph import Point
from mep.graph.node import Node
from mep.layout import per_example


def are_independent(energy: Energy, free: Point) -> bool:
    """Whether the Jacobians at a point couple no two examples, and the cost does not either.

    Computed from the first batch of a graph that has two examples at least, by some backward walks, and kept there. A
    point that saves nothing (`checkpoint=True`) is one of an affine graph, whose operations couple none.
    """
    graph = energy.graph
    if energy.batch > 1 and graph.is_separable is None:
        output = energy.output(free)
        place = torch.arange(energy.batch, device=output.device)
        digits = [(place >> digit) % 2 == 1 for digit in range((energy.batch - 1).bit_length())]  # no two have the same
        halves = [half for digit in digits for half in (digit, ~digit)]
        assert energy.nudge is not None
        graph.is_separable = not any(
            (bool(free.saved) and _forces_cross(energy, free, half)) or _cost_crosses(energy.nudge.cost, output, half)
            for half in halves
        )
    return energy.batch == 1 or bool(graph.is_separable)


def _forces_cross(energy: Energy, free: Point, some: Tensor) -> bool:
    """Whether forces on the output of other examples reach these."""
    graph, batch, output = energy.graph, energy.batch, energy.output(free)
    uneven = torch.arange(output.numel(), device=output.device).cos().view_as(output).to(output.dtype)
    found: list[Tensor] = []

    def transmit(node: Node, force: Tensor | None) -> Tensor | None:
        if force is not None:
            crossing = force if force.ndim == 0 or len(force) % batch else force * per_example(some, force)
            found.append(crossing.count_nonzero())
        return force

    graph.vjp(free.saved, uneven * per_example(~some, uneven), transmit)
    return bool(torch.stack(found).any())


def _cost_crosses(cost: BatchCost, output: Tensor, some: Tensor) -> bool:
    """Whether the gradient of other examples changes with the outputs of these."""
    if cost.narrows:
        return False
    others = per_example(~some, output)
    moved = torch.where(others, output, 1.1 * output + 0.1)
    return not torch.equal(cost.gradient(output) * others, cost.gradient(moved) * others)
