"""Dion: Muon's equal speed in every direction at a fraction of its price, a few directions at a time.

For a matrix with its momentum M `[rows, columns]`, rows >= columns, and a factor Q `[columns, rank]` that is kept:

    M <- M + g                                       momentum, with what no update has applied yet
    P  = orthonormal basis of M Q     R = M^T P      one power iteration: P R^T approximates M at this rank
    M <- M - (1 - momentum) P R^T                    error feedback: what is not applied stays in M
    Q <- R with columns of length one
    W <- (1 - lr weight_decay) W - lr scale(W) P Q^T

A wide matrix takes the same step on its transpose, so that Q has the shorter side. Weights of convolutions count as
matrices `[out, rest]`. With rank = columns, and M changing slowly, P Q^T tends to the polar factor of M, Muon's
direction. Small matrices, biases and gains take Muon's own step.

Reference: Ahn et al. 2025, "Dion: Distributed Orthonormalized Updates", https://arxiv.org/abs/2504.05295. Three things
differ. It is not distributed. Where M vanishes up to rounding, the published rule scales R up to length one; here such
a direction is zero in the update and keeps its column of Q. The authors scale by `(rows / columns) ** 0.5`; here the
scale is one of Muon's, so that one `lr` suits both kinds of matrix.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mep.errors import require, whole_number
from mep.updates.base import Update, accumulate_, scale_
from mep.updates.muon import SCALES, check_muon_step, muon_step_, vector_step_


def rank_of(rows: int, columns: int, fraction: float) -> int:
    """`fraction` of the shorter side, rounded up; rounding of the product itself adds no column."""
    return math.ceil(fraction * min(rows, columns) * (1 - 1e-12))


def first_factor(short: int, rank: int) -> Tensor:
    """Where Q starts, `[short, rank]` in float64: Gaussian columns, the same ones every time."""
    rows = torch.randn(rank, short, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return rows.mT  # each column in one piece, as `power_iteration` returns R


def power_iteration(tall: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """`P, R` with orthonormal P `[long, rank]` and `P R^T = P P^T M`, for M `[long, short]` and Q `[short, rank]`."""
    # The transposed products leave P and R in the memory order that LAPACK and the next product want.
    left, _ = torch.linalg.qr((factor.mT @ tall.mT).mT)
    return left, (left.mT @ tall).mT


def unit_columns(right: Tensor, factor: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """R with columns of length one, twice: for the update, and as the next Q.

    A column shorter than `rounding` times all of R holds no direction: it is zero for the update, and Q keeps its own.
    """
    lengths = torch.linalg.vector_norm(right, dim=0, dtype=torch.float64)  # squares neither overflow nor vanish
    least = (rounding * torch.linalg.vector_norm(lengths)).clamp_min(torch.finfo(right.dtype).tiny)
    empty = lengths <= least
    direction = right * torch.where(empty, 0, lengths.reciprocal()).to(right.dtype)
    return direction, torch.addcmul(direction, factor, empty.to(factor.dtype))


def dion_(weight: Tensor, buffer: Tensor, factor: Tensor, size: float, momentum: float, iterations: int = 1) -> None:
    """Make one step of length `size` on `weight` `[out, ...]`, and update the M in `buffer` and the Q in `factor`."""
    matrix = buffer.flatten(1)
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.mT if wide else matrix
    if torch.finfo(tall.dtype).bits < 32:
        tall = tall.float()  # no QR in half precision
    kept = factor.to(tall.dtype)
    rounding = tall.shape[0] * torch.finfo(tall.dtype).eps
    with torch.autocast(buffer.device.type, enabled=False):
        for _ in range(iterations):
            left, right = power_iteration(tall, kept)
            direction, kept = unit_columns(right, kept, rounding)
        before = torch.linalg.vector_norm(tall) if momentum == 0 else None
        _add_product_(buffer, momentum - 1, *((right, left) if wide else (left, right)))
        if before is not None:  # where all of M was applied only rounding is left, which has no direction
            buffer.mul_(torch.linalg.vector_norm(buffer) > rounding * before)
        _add_product_(weight, -size, *((direction, left) if wide else (left, direction)))
    factor.copy_(kept)


class Dion(Update):
    """Low-rank orthonormal updates from power iteration on the momentum, with error feedback.

    The state is `momentum_buffer`, `right_factor` for those parameters that take Dion's step, and `update_norm_sum`
    for matrices that take Muon's. Every keyword may differ between parameter groups.

    Args:
        params: parameters or parameter groups. Those with `ndim >= 2` are matrices `[out, rest]`.
        lr: length of every direction of a matrix update, before the factor of its shape.
        momentum: how much of M stays after its update is applied, in [0, 1).
        rank_fraction: directions in each update, as a part of the matrix's shorter side, in (0, 1].
        dion_threshold: a matrix with fewer entries takes Muon's step, which is exact, and cheap where it is small.
        power_iterations: iterations at each step; one as published, more follow a faster momentum.
        nesterov: look one step ahead along the momentum, in Muon's step and for biases and gains; Dion's has none.
        weight_decay: decoupled: each step first shrinks the parameters by `1 - lr * weight_decay`.
        method, steps: how Muon's step orthogonalises, see `orthogonalise`.
        scale: factor of the shape, as in `Muon`.
        vector_scale: learning rate of biases and gains in units of `lr`, so that a schedule drives both.

    Raises:
        ArgumentError: a keyword out of its range; in `step`, a sparse or complex gradient.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2, 3))
        >>> weight.grad = torch.tensor([[5.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> Dion([weight], lr=0.5, momentum=0.9, dion_threshold=0).step()
        >>> torch.allclose(weight, torch.tensor([[-0.5, 0.0, 0.0], [0.0, 0.0, 0.0]]))
        True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
        rank_fraction: float = 0.2,
        dion_threshold: int = 8192,
        power_iterations: int = 1,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        method: str = "auto",
        steps: int | None = None,
        scale: str = "spectral",
        vector_scale: float = 1.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "rank_fraction": rank_fraction,
            "dion_threshold": dion_threshold,
            "power_iterations": power_iterations,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "method": method,
            "steps": steps,
            "scale": scale,
            "vector_scale": vector_scale,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any], call: str) -> None:
        require(call, "rank_fraction", group["rank_fraction"], lambda f: 0 < f <= 1, "above 0 and at most 1")
        for name, least in {"dion_threshold": 0, "power_iterations": 1}.items():
            require(call, name, group[name], *whole_number(least))
        check_muon_step(group, call)

    def _step_group_(self, group: dict[str, Any], params: list[Tensor]) -> None:
        matrices = [p for p in params if p.ndim >= 2]
        large = [p for p in matrices if p.numel() >= group["dion_threshold"]]
        small = [p for p in matrices if p.numel() < group["dion_threshold"]]
        vectors = [p for p in params if p.ndim < 2]
        if large:
            self._dion_step_(group, large)
        if small:
            self._add_update_norm(small, muon_step_(small, self._directions(group, small), group))
        if vectors:
            vector_step_(vectors, self._directions(group, vectors), group)

    def _dion_step_(self, group: dict[str, Any], matrices: list[Tensor]) -> None:
        buffers = [self._momentum_buffer(p) for p in matrices]
        accumulate_(buffers, [p.grad for p in matrices if p.grad is not None], 1.0, nesterov=False)
        lr = float(group["lr"])
        scale_(matrices, 1 - lr * group["weight_decay"])
        for p, buffer in zip(matrices, buffers, strict=True):
            rows, columns = p.shape[0], p.numel() // p.shape[0]
            factor = self._right_factor(p, min(rows, columns), rank_of(rows, columns, group["rank_fraction"]))
            size = lr * SCALES[group["scale"]](rows, columns)
            dion_(p, buffer, factor, size, group["momentum"], group["power_iterations"])

    def _right_factor(self, p: Tensor, short: int, rank: int) -> Tensor:
        state = self.state[p]
        if "right_factor" not in state or state["right_factor"].shape != (short, rank):  # a new rank_fraction
            state["right_factor"] = first_factor(short, rank).to(p)
        return state["right_factor"]


def _add_product_(target: Tensor, alpha: float, left: Tensor, right: Tensor) -> None:
    if target.dtype == left.dtype and target.is_contiguous():
        target.view(target.shape[0], -1).addmm_(left, right.mT, alpha=alpha)
    else:
        target.add_((left @ right.mT).view(target.shape), alpha=alpha)
    if target.dtype == torch.float16:  # whose sums may exceed its largest number
        target.clamp_(-torch.finfo(target.dtype).max, torch.finfo(target.dtype).max)
