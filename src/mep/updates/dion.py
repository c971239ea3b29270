"""Dion: Muon's equal speed in every direction at a fraction of its price, a few directions at a time.

For a matrix with its momentum M `[rows, columns]`, rows >= columns, and a factor Q `[columns, rank]` that is kept:

    M <- M + g                                       momentum, what no update has carried out yet included
    P  = orthonormal basis of M Q     R = M^T P      one power iteration: P R^T approximates M at this rank
    M <- M - (1 - momentum) P R^T                    error feedback: what is not applied stays in M
    Q <- R with columns of length one
    W <- (1 - lr weight_decay) W - lr scale(W) P Q^T

A wide matrix takes the same step on its transpose, so that Q has the shorter side. Weights of convolutions count as
matrices `[out, rest]`. With as many columns as M has, and M slower than the iteration, P Q^T becomes the polar factor
of M: Muon's direction. Small matrices, biases and gains take Muon's own step.

Reference: Ahn et al. 2025, "Dion: Distributed Orthonormalized Updates", https://arxiv.org/abs/2504.05295. It is not
distributed. Where M vanishes up to rounding, the published rule would blow R up to length one; here such a direction
stays zero in the update and keeps its column of Q. The authors scale by `(rows / columns) ** 0.5`; here the scale is
one of Muon's, so that one `lr` suits both kinds of matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mep.errors import ArgumentError
from mep.updates.muon import SCALES, accumulate_, orthogonal_directions
from mep.updates.orthogonal import check_method


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
        _add_product_(buffer, momentum - 1, *((right, left) if wide else (left, right)))
        _add_product_(weight, -size, *((direction, left) if wide else (left, direction)))
    factor.copy_(kept)


class Dion(torch.optim.Optimizer):
    """Low-rank orthonormal updates from power iteration on the momentum, with error feedback.

    The state is `momentum_buffer`, and `right_factor` for those parameters that take Dion's step. Every keyword may
    differ between parameter groups.

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

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step along `p.grad`; a parameter without one stays.

        Args:
            closure: computes the gradients anew and returns the loss.

        Returns:
            What `closure` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [[p for p in group["params"] if p.grad is not None and p.numel() > 0] for group in self.param_groups]
        for params in moving:
            _check_grads(params)
        for group, params in zip(self.param_groups, moving, strict=True):
            matrices = [p for p in params if p.ndim >= 2]
            large = [p for p in matrices if p.numel() >= group["dion_threshold"]]
            small = [p for p in matrices if p.numel() < group["dion_threshold"]]
            vectors = [p for p in params if p.ndim < 2]
            if large:
                self._dion_step_(group, large)
            if small:
                self._muon_step_(group, small)
            if vectors:
                self._vector_step_(group, vectors)
        return loss

    def _dion_step_(self, group: dict[str, Any], matrices: list[Tensor]) -> None:
        buffers = [self._momentum_buffer(p) for p in matrices]
        torch._foreach_add_(buffers, [p.grad for p in matrices if p.grad is not None])
        lr = float(group["lr"])
        _decay_(matrices, lr * group["weight_decay"])
        for p, buffer in zip(matrices, buffers, strict=True):
            rows, columns = p.shape[0], p.numel() // p.shape[0]
            factor = self._right_factor(p, min(rows, columns), rank_of(rows, columns, group["rank_fraction"]))
            size = lr * SCALES[group["scale"]](rows, columns)
            dion_(p, buffer, factor, size, group["momentum"], group["power_iterations"])

    def _muon_step_(self, group: dict[str, Any], matrices: list[Tensor]) -> None:
        lr = float(group["lr"])
        turned = orthogonal_directions(self._directions(group, matrices), group["method"], group["steps"])
        _decay_(matrices, lr * group["weight_decay"])
        for p, direction in zip(matrices, turned, strict=True):
            rows = p.shape[0]
            p.add_(direction, alpha=-lr * SCALES[group["scale"]](rows, p.numel() // rows))

    def _vector_step_(self, group: dict[str, Any], vectors: list[Tensor]) -> None:
        lr = float(group["lr"]) * group["vector_scale"]
        _decay_(vectors, lr * group["weight_decay"])
        torch._foreach_add_(vectors, self._directions(group, vectors), alpha=-lr)

    def _directions(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        grads = [p.grad for p in params if p.grad is not None]
        if group["momentum"] == 0:
            return grads
        buffers = [self._momentum_buffer(p) for p in params]
        return accumulate_(buffers, grads, group["momentum"], group["nesterov"])

    def _momentum_buffer(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state["momentum_buffer"]

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


def _decay_(params: list[Tensor], by: float) -> None:
    if by > 0:
        for p in params:  # one by one, as `_foreach_mul_` would round the factor in half precision
            p.mul_(1 - by)


def _check_group(group: dict[str, Any]) -> None:
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ArgumentError(f"Dion(lr=...) must hold one number; got shape {list(group['lr'].shape)}.")
    limits = {"lr": math.inf, "momentum": 1.0, "weight_decay": math.inf, "vector_scale": math.inf}
    for name, limit in limits.items():
        if not 0 <= group[name] < limit:
            raise ArgumentError(f"Dion({name}={group[name]!r}) must be at least 0 and below {limit}.")
    if not 0 < group["rank_fraction"] <= 1:
        raise ArgumentError(f"Dion(rank_fraction={group['rank_fraction']!r}) must be above 0 and at most 1.")
    for name, least in {"dion_threshold": 0, "power_iterations": 1}.items():
        if not isinstance(group[name], int) or isinstance(group[name], bool) or group[name] < least:
            raise ArgumentError(f"Dion({name}={group[name]!r}) must be a whole number of at least {least}.")
    if not isinstance(group["nesterov"], bool):
        raise ArgumentError(f"Dion(nesterov={group['nesterov']!r}) must be True or False.")
    if group["scale"] not in SCALES:
        raise ArgumentError(f"Dion(scale={group['scale']!r}): choose one of {list(SCALES)}.")
    check_method(group["method"], group["steps"], call="Dion")


def _check_grads(params: Sequence[Tensor]) -> None:
    for p in params:
        grad = p.grad
        if grad is not None and (grad.layout != torch.strided or grad.is_complex()):
            kind = "sparse" if grad.layout != torch.strided else "complex"
            raise ArgumentError(
                f"Dion.step: the gradient of a parameter of shape {list(p.shape)} is {kind}, but only real dense "
                f"gradients can be orthogonalised. Give this parameter to another optimizer."
            )
