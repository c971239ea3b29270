"""The output error from a model of the network: Newton on the cost, secants for what lies beneath it.

At the nudged equilibrium the output error x solves `x = dC(s_free - beta M x)`, where the gain `M = sum_n A_n A_n^T`
(`A_n = ds_out / ds_n`) is known only through products: every sweep tells one, `M x_i = (s_free - s_i) / beta`. The
cost, in contrast, is known wholly. So let `M^ = kappa I + U W` agree with the products seen so far (kappa is the
Rayleigh quotient of the latest), and solve the equation with M^ in place of M by Newton's method. Where the Hessian of
the cost is `diag(d) - p p^T`, a step costs one system of `history + 1` unknowns per example (Woodbury).

It needs two or three sweeps where mixing needs ten: the nonlinearity is the cost's, and that one need not guess.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mep.cost import Cost

Pair = tuple[Tensor, Tensor]
_NEWTON_STEPS = 2


def solve_output(cost: Cost, target: Tensor, free: Tensor, beta: float, pairs: Sequence[Pair]) -> Tensor:
    """The output error that the model predicts, [batch, features].

    Args:
        cost: one with a `curvature`.
        target: as prepared by the cost.
        free: the output of the free equilibrium.
        beta: nudging strength (its sign counts).
        pairs: `(x_i, M x_i)`, oldest first.
    """
    x = pairs[-1][0]
    inputs, products = (torch.stack([pair[i] for pair in pairs], 2) for i in (0, 1))
    tiny = torch.finfo(x.dtype).tiny
    kappa = (x * products[..., -1]).sum(1, keepdim=True) / x.square().sum(1, keepdim=True).clamp_min(tiny)
    gram = inputs.mT @ inputs
    ridge = 10 * torch.finfo(x.dtype).eps * gram.diagonal(dim1=1, dim2=2).sum(1) + tiny
    gram.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(1))
    w = torch.linalg.solve_ex(gram, inputs.mT)[0]
    u = products - kappa.unsqueeze(2) * inputs
    for _ in range(_NEWTON_STEPS):
        output = free - beta * (kappa * x + _apply(u, _apply(w, x)))
        x = x + _newton_step(cost, target, output, cost.gradient(output, target) - x, beta, kappa, u, w)
    return torch.where(x.isfinite(), x, cost.gradient(free - beta * products[..., -1], target))


def _newton_step(
    cost: Cost, target: Tensor, output: Tensor, r: Tensor, beta: float, kappa: Tensor, u: Tensor, w: Tensor
) -> Tensor:
    """Solve `(I + beta H M^) step = r` with `H = diag(d) - p p^T`: a diagonal plus `left @ right` of low rank."""
    curvature = cost.curvature(output, target)
    assert curvature is not None
    d, p = curvature
    left, right = d.unsqueeze(2) * u, w
    if p is not None:
        left = torch.cat([left - p.unsqueeze(2) * _apply(u.mT, p).unsqueeze(1), (-kappa * p).unsqueeze(2)], 2)
        right = torch.cat([w, p.unsqueeze(1)], 1)
    diagonal = 1 + beta * kappa * d
    left = beta * left / diagonal.unsqueeze(2)
    step = r / diagonal
    small = torch.eye(right.shape[1], dtype=r.dtype, device=r.device) + right @ left
    return step - _apply(left, torch.linalg.solve_ex(small, _apply(right, step))[0])


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(2)).squeeze(2)
