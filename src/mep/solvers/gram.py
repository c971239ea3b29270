"""The gain of an example as a matrix, `M = sum_n A_n A_n^T`, from the errors that follow every unit of the output."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mep.layout import accurate, by_example
from mep.solvers.output import no_autocast


class Gram:
    """`sum_n A_n A_n^T` of some examples, of the errors `A_n^T` that follow `every` unit of the output."""

    def __init__(self, output: Tensor, examples: int):
        self.units = units = output.shape[1]
        self.every = torch.eye(units, dtype=output.dtype, device=output.device).repeat(examples, 1)
        """An output error for every example and unit, [examples * units, units]."""
        self.sum = output.new_zeros(examples, units, units, dtype=accurate(output))

    def add(self, error: Tensor) -> None:
        """Those of one node, [examples * units, ...]."""
        a = by_example(error, len(self.every)).view(*self.sum.shape[:2], -1).to(self.sum.dtype)
        with no_autocast(a.device):
            self.sum.baddbmm_(a, a.mT)


def in_parts(gains: Callable[[Tensor], Tensor], rows: Tensor, output: Tensor) -> Tensor:
    """The gains of these rows, of so few at a time that a walk from each unit has no more rows than the batch."""
    return torch.cat([gains(some) for some in rows.split(max(1, len(output) // output.shape[1]))])
