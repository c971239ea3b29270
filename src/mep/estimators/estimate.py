"""What an estimator returns, and how a gradient reaches `p.grad`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from mep.graph.graph import share_in_words
from mep.settle import Result, rounded

Gradients = dict[nn.Parameter, Tensor]


@dataclass(frozen=True)
class Estimate:
    """One estimate of the gradient, and how far to trust it.

    Attributes:
        loss: mean cost of the batch at the free equilibrium, 0-dim.
        residual: of every example, [batch], the worst over nodes and phases; 0 for backprop. Converged: at most `tol`.
        iterations: sweeps or descent steps, the most of any phase and example; 0 for backprop.
        result: converged, or why not.
        betas: the nudging strength of every example, [batch], with its sign (`phases="random-sign"`); 0 for backprop.
        counts: the iterations of every example, [batch]; 0 for backprop.
        tol: the residual to which examples were to settle.
        left_branch: fraction of piecewise-linear units off the branch on which they were held; None if not asked.
        turns: how often each node was computed, by name; None unless the solver is `mep.Local`.
        in_leaves: how many numbers of the trained parameters learn by backprop inside modules kept whole (or layers
            between which no state can stand, of which you are warned), and how many there are.
        inside: the fraction of states inside their boxes, of a Hopfield network that `mep.Relaxation` settles; measured
            in one of 16 batches. Units on a face of the box do not respond to the nudge. Behind smooth activations: of
            those whose slope is at least a hundredth of the largest.
        coupling: a lower bound, close by, of the largest eigenvalue of the coupling between states, measured likewise.
            Settling slows down toward 1; beyond it there are several equilibria. None with `feedback=...`, where the
            coupling is not symmetric.
    """

    loss: Tensor
    residual: Tensor
    iterations: int
    result: Result
    betas: Tensor
    counts: Tensor
    tol: float = 0.0
    left_branch: float | None = None
    turns: Mapping[str, int] | None = None
    in_leaves: tuple[int, int] = (0, 0)
    inside: float | None = None
    coupling: float | None = None

    @classmethod
    def exact(cls, loss: Tensor, batch: int) -> Estimate:
        """That of a gradient without any equilibrium, as backpropagation's."""
        zeros = loss.new_zeros(batch)
        return cls(loss, zeros, 0, Result.BACKPROP, zeros, zeros.long())

    def __str__(self) -> str:
        """One line.

        >>> import torch
        >>> residual, betas, counts = torch.tensor([1e-3, 4e-3]), torch.tensor([0.1, 0.1]), torch.tensor([2, 1])
        >>> print(Estimate(torch.tensor(0.5), residual, 2, Result.CONVERGED, betas, counts, tol=1e-2))
        loss 0.5, residual 0.004 at most, 2 iterations, beta 0.1: converged
        """
        is_exact = self.result is Result.BACKPROP
        settled = "" if is_exact else f", residual {float(self.residual.max()):.1g} at most"
        left = "" if self.left_branch is None else f", {self.left_branch:.1%} off their branch"
        counted = f"{self.iterations} iteration{'' if self.iterations == 1 else 's'}, beta {self.beta:.3g}"
        inside, total = self.in_leaves
        kept = f" ({share_in_words(inside, total)})" if inside else ""
        return f"loss {float(self.loss):.4g}{settled}, {counted}{left}: {self.result}{kept}"

    def __repr__(self) -> str:
        """Without the numbers of every example."""
        return f"<{type(self).__name__}: {self}>"

    @property
    def beta(self) -> float:
        """The weakest nudge of any example: that which was named, if one was, with its sign; 0 for backprop."""
        return float(self.betas[self.betas.abs().argmin()])

    @property
    def median_beta(self) -> float:
        """The nudging strength of the middle example."""
        return float(self.betas.median())

    @property
    def settled(self) -> Tensor:
        """Which examples have settled, [batch]."""
        return self.residual <= rounded(self.tol, self.residual.dtype)

    @property
    def converged(self) -> bool:
        """Whether every example has settled in every phase (backprop always does)."""
        return self.result in (Result.CONVERGED, Result.BACKPROP)
