"""What a step takes beside time, and what the machine has to give."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mep.cli.meters import PeakMemory, Work
from mep.cli.profile_rows import Recipe
from mep.cli.training import clock
from mep.cli.turns import Batch

RESOURCES = ("memory", "flops", "bytes")
SIZE = 1024  # rows and columns of the matrices that are multiplied to see how fast the machine is
LARGE = 2**24  # numbers in a tensor that no cache holds
TRIES = 8
METERED = 2  # batches: under the meters a step takes several times as long


def resources(recipe: Recipe, model: nn.Module, batches: Sequence[Batch], cost: str) -> dict[str, float | None]:
    """Of a step after the first, which traces and allocates for all that follow.

    memory: the most bytes alive at once, beyond the parameters and the optimizer's state: activations, states,
    gradients, buffers that are kept. flops, bytes: means over some of the batches, as `Work` counts. Of a compiled
    recipe only the flops are known, those of the same recipe without `compile`.
    """
    own = copy.deepcopy(model)
    point = copy.deepcopy(model.state_dict())
    work, batches = Work(), batches[:METERED]
    with PeakMemory() as memory:
        optimizer = _eager(recipe).build(own, cost)
        for number, (x, target) in enumerate((batches[0], *batches)):
            if number == 1:
                memory.peak, work = memory.bytes, Work()
            with work:
                optimizer.step(x=x, target=target)
            own.load_state_dict(point)
    found = memory.peak - memory.held_by(optimizer.state_dict()), work.flops / len(batches), work.bytes / len(batches)
    known = dict(zip(RESOURCES, found, strict=True))
    return known | {"memory": None, "bytes": None} if recipe.options.get("compile") else known


def attainable(device: torch.device) -> dict[str, float]:
    """The best that this machine does: flops a second in a large matrix product, bytes a second in a large copy."""
    a, large = torch.ones(SIZE, SIZE, device=device), torch.ones(LARGE, device=device)
    other = large.clone()  # a new one each time would measure how fast the system gives memory
    return {
        "flops": 2 * SIZE**3 / _least_seconds(device, lambda: a @ a),
        "bytes": 2 * LARGE * large.element_size() / _least_seconds(device, lambda: other.copy_(large)),
    }


def _least_seconds(device: torch.device, work: Any) -> float:
    now = clock(device)
    seconds = []
    for _ in range(TRIES):
        start = now()
        work()
        seconds.append(now() - start)
    return min(seconds)


def _eager(recipe: Recipe) -> Recipe:
    return recipe._replace(options={key: value for key, value in recipe.options.items() if key != "compile"})
