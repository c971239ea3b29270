"""What we want small at the output: one number **per example**, its gradient, and what a target must look like.

The loss of a batch is the mean over its examples, so gradients agree with `F.cross_entropy` and `F.mse_loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mep.errors import ArgumentError, InputError

PerExample = Callable[[Tensor, Tensor], Tensor]
Curvature = tuple[Tensor, Tensor | None]


class Cost:
    """`value(output, target)` is `[batch]`; `gradient` is its derivative in `output`, in the shape of `output`."""

    def prepare(self, output: Tensor, target: Tensor) -> Tensor:
        """Check the target against the output and return it as `value` and `gradient` want it."""
        raise NotImplementedError

    def value(self, output: Tensor, target: Tensor) -> Tensor:
        """The cost of every example."""
        raise NotImplementedError

    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        """d value.sum() / d output."""
        raise NotImplementedError

    def curvature(self, output: Tensor, target: Tensor, gradient: Tensor) -> Curvature | None:
        """`(d, p)` if the Hessian of every example is `diag(d) - p p^T` (p may be None); None if it is not known.

        `gradient` is that at the same output: often it tells the Hessian too.
        """
        return None


class SquaredError(Cost):
    """`mean_j (s_j - y_j)^2` over the features j of an example: its mean over the batch is `F.mse_loss`."""

    def prepare(self, output: Tensor, target: Tensor) -> Tensor:
        """The target, in the output's dtype; shapes must be equal, nothing broadcasts."""
        if target.shape != output.shape:
            raise InputError(
                f"mse: the target has shape {tuple(target.shape)} and the output {tuple(output.shape)}; they must be "
                "equal. For class labels pass F.one_hot(labels, classes).float(), or use cost='cross_entropy'."
            )
        return target.to(output.dtype)

    def value(self, output: Tensor, target: Tensor) -> Tensor:
        """[batch]."""
        return (output - target).square().reshape(len(output), -1).mean(1)

    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        """2 (s - y) / features."""
        return (output - target).mul_(2 * len(output) / output.numel())

    def curvature(self, output: Tensor, target: Tensor, gradient: Tensor) -> Curvature | None:
        """2 / features."""
        return (torch.full_like(output, 2 * len(output) / output.numel()), None) if output.ndim == 2 else None


class CrossEntropy(Cost):
    """`-sum_c q_c log softmax(s)_c`, the mean over the positions of an example; classes along dimension 1.

    The target is class indices `[batch, ...]` or probabilities in the shape of the output.
    """

    def prepare(self, output: Tensor, target: Tensor) -> Tensor:
        """The target as probabilities."""
        if output.ndim < 2:
            raise InputError(f"cross_entropy: the output must be [batch, classes, ...], got {tuple(output.shape)}.")
        if target.is_floating_point():
            if target.shape != output.shape:
                raise InputError(
                    f"cross_entropy: probabilities must have the output's shape {tuple(output.shape)}, got "
                    f"{tuple(target.shape)}. For class labels pass integers (torch.long)."
                )
            return target.to(output.dtype)
        wanted, classes = (output.shape[0], *output.shape[2:]), output.shape[1]
        if target.shape != wanted or target.dtype in (torch.bool, torch.complex64, torch.complex128):
            raise InputError(
                f"cross_entropy: class labels must be integers of shape {wanted}, got {target.dtype} of shape "
                f"{tuple(target.shape)}."
            )
        low, high = int(target.min()), int(target.max())
        if low < 0 or high >= classes:
            raise InputError(f"cross_entropy: labels lie in [{low}, {high}], the output has {classes} classes.")
        onehot = torch.zeros_like(output)
        return onehot.scatter_(1, target.long().unsqueeze(1), 1.0)

    def value(self, output: Tensor, target: Tensor) -> Tensor:
        """[batch]."""
        chosen = (output * target).where(target != 0, 0).sum(1)
        return (output.logsumexp(1) * target.sum(1) - chosen).reshape(len(output), -1).mean(1)

    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        """(softmax(s) sum_c q_c - q) / positions; q sums to one for labels and for probabilities proper."""
        positions = output.numel() // (output.shape[0] * output.shape[1])
        p = (output - output.amax(1, keepdim=True)).exp_()  # torch.softmax is slow along short rows
        p.mul_(target.sum(1, keepdim=True).div_(p.sum(1, keepdim=True))).sub_(target)
        return p.div_(positions) if positions > 1 else p

    def curvature(self, output: Tensor, target: Tensor, gradient: Tensor) -> Curvature | None:
        """`diag(p) - p p^T` with p = softmax(s), for a target that sums to one."""
        if output.ndim != 2:
            return None
        p = gradient + target
        return p, p


@dataclass(frozen=True)
class Custom(Cost):
    """Any differentiable function of `(output, target)` that returns one number per example."""

    function: PerExample

    def prepare(self, output: Tensor, target: Tensor) -> Tensor:
        """The target as it is; the function is tried once, so that what is wrong with it is told before settling."""
        self.gradient(output, target)
        return target

    def value(self, output: Tensor, target: Tensor) -> Tensor:
        """[batch]."""
        value = self.function(output, target)
        if not isinstance(value, Tensor) or value.shape != output.shape[:1]:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"cost: the function must return one number per example, shape {tuple(output.shape[:1])}, got {got}. "
                "Use reduction='none' and sum or average over every dimension but the first."
            )
        return value

    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        """By autograd through the function alone."""
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            value = self.value(leaf, target)
            if not value.requires_grad:
                raise InputError("cost: the function must be differentiable in the output; it returned a constant.")
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        return gradient


NAMED: dict[str, type[Cost]] = {"cross_entropy": CrossEntropy, "mse": SquaredError}


def make_cost(cost: str | PerExample | Cost) -> Cost:
    """A cost from its name, a per-example function, or a `Cost`.

    Example:
        >>> make_cost("mse").value(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 3.0]]))
        tensor([0.5000])
    """
    if isinstance(cost, Cost):
        return cost
    if isinstance(cost, str) and cost in NAMED:
        return NAMED[cost]()
    if callable(cost):
        return Custom(cost)
    raise ArgumentError(f"cost={cost!r}: choose one of {sorted(NAMED)}, or pass a per-example function.")
