"""The output error from a model of the network: Newton on the cost, secants for what lies beneath it.

At the nudged equilibrium the output error x solves `x = dC(s_free - beta M x)`, where the gain `M = sum_n A_n A_n^T`
(`A_n = ds_out / ds_n`) is known only through products: every sweep tells one, `M x_i = (s_free - s_i) / beta`. The
cost, in contrast, is known wholly. So let `M^ = kappa I + U W` agree with the products seen so far (kappa is the
Rayleigh quotient of the latest), and solve the equation with M^ in place of M by Newton's method. Where the Hessian of
the cost is `diag(d) - p p^T`, a step costs one system of `history + 1` unknowns per example (Woodbury).

It needs two or three sweeps where mixing needs ten: the nonlinearity is the cost's, and that one need not guess.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mep.cost import Cost, Curvature

_NEWTON_STEPS = 2
"""More gain nothing: after two, the error is that of the model."""


_RIDGE = 1e-5
"""Relative to the trials: they grow alike, and what distinguishes them must not drown in the rounding of a solve."""


def solve_output(cost: Cost, target: Tensor, free: Tensor, errors: Tensor, shifts: Tensor, gradient: Tensor) -> Tensor:
    """The output error that the model predicts, [batch, features].

    Args:
        cost: one with a `curvature`.
        target: as prepared by the cost.
        free: the output of the free equilibrium.
        errors: output errors x_i tried so far, [batch, trials, features], oldest first.
        shifts: how far each moved the output, `free - s_i = beta M x_i`.
        gradient: dC at the latest output.
    """
    latest, shift = errors[:, -1], shifts[:, -1]
    tiny = torch.finfo(latest.dtype).tiny
    k = (torch.linalg.vecdot(latest, shift) / torch.linalg.vecdot(latest, latest).add_(tiny)).unsqueeze(1)
    w = _dual(errors)
    u = shifts - k.unsqueeze(2) * errors
    x, output, known = latest, free - shift, gradient
    for newton_step in range(_NEWTON_STEPS):
        if newton_step:  # around the latest trial, where the output is known: M^ need only be right for the step
            step = x - latest
            output = free - shift - k * step - _combine(u, _products(w, step))
            known = cost.gradient(output, target)
        x = x + _newton_step(cost.curvature(output, target, known), known - x, k, u, w)
    return torch.where(x.isfinite(), x, gradient)


def _newton_step(curvature: Curvature | None, r: Tensor, k: Tensor, u: Tensor, w: Tensor) -> Tensor:
    """Solve `(I + H (k I + u^T w)) step = r` with `H = diag(d) - p p^T`: a diagonal plus a few outer products."""
    assert curvature is not None
    d, p = curvature
    diagonal = 1 + k * d
    left, right = d.unsqueeze(1) * u, w
    if p is not None:
        left = torch.cat([left - _products(u, p).unsqueeze(2) * p.unsqueeze(1), (-k * p).unsqueeze(1)], 1)
        right = torch.cat([w, p.unsqueeze(1)], 1)
    columns = torch.cat([left, r.unsqueeze(1)], 1) / diagonal.unsqueeze(1)
    system = right @ columns.mT
    system.diagonal(dim1=1, dim2=2).add_(1)
    unknowns = torch.linalg.solve_ex(system[..., :-1], system[..., -1:])[0]
    return columns[:, -1] - _combine(columns[:, :-1], unknowns.squeeze(2))


def _dual(rows: Tensor) -> Tensor:
    """W with `W_i x_j = delta_ij` for the rows x_j, regularised relative to their size: [batch, trials, features]."""
    limits = torch.finfo(rows.dtype)
    gram = rows @ rows.mT
    if rows.shape[1] == 1:
        return rows / gram.add_(limits.tiny)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal.add_(diagonal.sum(1, keepdim=True), alpha=_RIDGE).add_(limits.tiny)
    return torch.linalg.solve_ex(gram, rows)[0]


def _products(rows: Tensor, vector: Tensor) -> Tensor:
    """<rows_i, vector> for every i."""
    return (rows @ vector.unsqueeze(2)).squeeze(2)


def _combine(rows: Tensor, coefficients: Tensor) -> Tensor:
    """sum_i coefficients_i rows_i."""
    return (coefficients.unsqueeze(1) @ rows).squeeze(1)
