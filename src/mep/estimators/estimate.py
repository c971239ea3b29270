"""What an estimator returns, and how a gradient reaches `p.grad`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from mep.settle import Result

Gradients = dict[nn.Parameter, Tensor]


@dataclass(frozen=True)
class Estimate:
    """One estimate of the gradient, and how far to trust it.

    Attributes:
        loss: mean cost of the batch at the free equilibrium, 0-dim.
        residual: relative residual of every example, [batch], the worst over nodes and phases; None for backprop.
        iterations: sweeps or descent steps, the most of any phase; 0 for backprop.
        beta: the nudging strength that was used, at most the one asked for.
        result: converged, or why not.
        left_branch: fraction of piecewise-linear units off the branch on which they were held; None if not asked.
    """

    loss: Tensor
    residual: Tensor | None
    iterations: int
    beta: float
    result: Result
    left_branch: float | None = None

    @property
    def converged(self) -> bool:
        """Whether every phase came within the tolerance (backprop always does)."""
        return self.result in (Result.CONVERGED, Result.BACKPROP)


def accumulate(gradients: Mapping[nn.Parameter, Tensor]) -> None:
    """Add to `p.grad` what `loss.backward()` would add."""
    for p, g in gradients.items():
        if p.grad is None:
            p.grad = g.to(p.dtype)
        else:
            p.grad.add_(g)
