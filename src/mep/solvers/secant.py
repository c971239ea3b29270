"""The output error from a model of the network: Newton on the cost, secants for what lies beneath it.

At the nudged equilibrium the output error x solves `x = dC(s_free - beta M x)`, where the gain `M = sum_n A_n A_n^T`
(`A_n = ds_out / ds_n`) is known only through products: every sweep tells one, `M x_i = (s_free - s_i) / beta`. The
cost, in contrast, is known wholly. So let a model M^ stand for M, and take a step of Newton's method from the latest
trial, where the output is known; M^ need only be right for the step:

    (I + H beta M^) step = dC(s) - x,      H = diag(d) - p p^T, the Hessian of the cost

    before any trial    beta M^ = k I with the mean gain that earlier steps have met
    after one or two    beta M^ = k I with the Rayleigh quotient k of the latest
    after more          beta M^ = k I + sum_i u_i w_i^T, which agrees with all products seen (Woodbury)

It needs two or three sweeps where mixing needs ten: the nonlinearity is the cost's, and that one need not guess.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mep.cost import BatchCost, Curvature
from mep.nodes import Strength

_SCALAR_TRIALS = 2
"""So many are answered by a multiple of the identity: cheaper, and as good while the trials are nearly parallel."""

_RIDGE = 1e-5
"""Relative to the trials: they grow alike, and what distinguishes them must not drown in the rounding of a solve."""


Trial = tuple[Tensor, Tensor, Tensor]
"""An output error x, the output `free - beta M x` that answered it, and dC there; each `[batch, features]`."""


def first_output(cost: BatchCost, free: Tensor, gradient: Tensor, k: Strength) -> Tensor | None:
    """The output error that `beta M^ = k I` predicts before any trial; `gradient` is dC at the free output."""
    curvature = cost.curvature(free, gradient)
    return None if curvature is None else _scalar_step(curvature, gradient, k)


def solve_output(cost: BatchCost, free: Tensor, trials: Sequence[Trial], once: bool = False) -> Tensor | None:
    """The output error that the model predicts after some trials, oldest first; None if the Hessian is not known.

    While there are few trials it takes two steps of Newton's, or one.
    """
    latest, output, gradient = trials[-1]
    curvature = cost.curvature(output, gradient)
    if curvature is None:
        return None
    size = torch.linalg.vecdot(latest, latest).add_(torch.finfo(latest.dtype).tiny)
    k = (torch.linalg.vecdot(latest, free - output) / size).unsqueeze(1)
    if len(trials) > _SCALAR_TRIALS:
        tried, shifts = torch.stack([x for x, _, _ in trials], 1), torch.stack([free - s for _, s, _ in trials], 1)
        step = _secant_step(curvature, gradient - latest, k, shifts - k.unsqueeze(2) * tried, _dual(tried))
    else:
        step = _scalar_step(curvature, gradient - latest, k)
        if not once:  # again as the model expects the output to be then: the cost is more curved than the network
            expected = torch.addcmul(output, k, step, value=-1)
            known = cost.gradient(expected)
            curvature = cost.curvature(expected, known)
            assert curvature is not None
            step = step + _scalar_step(curvature, known - latest - step, k)
    x = latest + step
    return torch.where(x.isfinite(), x, gradient)


def hessian_product(curvature: Curvature, v: Tensor) -> Tensor:
    """`H v` with `H = diag(d) - p p^T`."""
    d, p = curvature
    return d * v if p is None else torch.addcmul(d * v, p, torch.linalg.vecdot(p, v).unsqueeze(1), value=-1)


def _scalar_step(curvature: Curvature, r: Tensor, k: Strength) -> Tensor:
    """Solve `(I + k H) step = r` (Sherman and Morrison)."""
    d, p = curvature
    scale = (k * d).add_(1).reciprocal_()
    step = r * scale
    if p is None:
        return step
    across = scale.mul_(p)
    share = torch.linalg.vecdot(p, step).unsqueeze(1) / (1 / k - torch.linalg.vecdot(p, across).unsqueeze(1))
    return torch.addcmul(step, across, share)


def _secant_step(curvature: Curvature, r: Tensor, k: Tensor, u: Tensor, w: Tensor) -> Tensor:
    """Solve `(I + H (k I + u^T w)) step = r`: a diagonal plus a few outer products."""
    d, p = curvature
    diagonal = 1 + k * d
    left, right = d.unsqueeze(1) * u, w
    if p is not None:
        left = torch.cat([left - products(u, p).unsqueeze(2) * p.unsqueeze(1), (-k * p).unsqueeze(1)], 1)
        right = torch.cat([w, p.unsqueeze(1)], 1)
    columns = torch.cat([left, r.unsqueeze(1)], 1) / diagonal.unsqueeze(1)
    system = right @ columns.mT
    system.diagonal(dim1=1, dim2=2).add_(1)
    unknowns = torch.linalg.solve_ex(system[..., :-1], system[..., -1:])[0]
    return columns[:, -1] - _combine(columns[:, :-1], unknowns.squeeze(2))


def _dual(rows: Tensor) -> Tensor:
    """W with `W_i x_j = delta_ij` for the rows x_j, regularised relative to their size: [batch, trials, features]."""
    gram = rows @ rows.mT
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal.add_(diagonal.sum(1, keepdim=True), alpha=_RIDGE).add_(torch.finfo(rows.dtype).tiny)
    return torch.linalg.solve_ex(gram, rows)[0]


def products(rows: Tensor, vector: Tensor) -> Tensor:
    """<rows_i, vector> for every i."""
    return (rows @ vector.unsqueeze(2)).squeeze(2)


def _combine(rows: Tensor, coefficients: Tensor) -> Tensor:
    """sum_i coefficients_i rows_i."""
    return (coefficients.unsqueeze(1) @ rows).squeeze(1)
