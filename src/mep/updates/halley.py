"""Singular values to nearly one by one inverse: a step of the dynamically weighted Halley iteration.

    x <- x (a + b x^2) / (1 + c x^2)     that is     X <- (A + B (X X^T + C)^-1) X

Of all rational functions of this type it stays nearest to one on the interval of singular values that a, b and c are
made for (Zolotarev 1877). On [1/75, 1] it errs by 0.29; a polynomial would need degree 100 or so. Quintic steps take
three for that, and nine products; this takes two products with X and an inverse, which costs less than two more. What
lies below the interval is lifted 58 times at most: no sum is so near to a singular matrix that rounding would show.

The square and the inverse are symmetric. They are computed by halves, without what is known from symmetry.

Reference: Nakatsukasa, Bai and Gygi 2010, "Optimizing Halley's iteration for computing the matrix polar decomposition",
https://doi.org/10.1137/090774999.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOWEST = 1 / 75
# Up to so many rows LAPACK inverts, or one product squares, faster than halves do.
_INVERTED_WHOLE = 64
_SQUARED_WHOLE = 128


def weights(lowest: float) -> tuple[float, float, float]:
    """A, B, C that bring all of [lowest, 1] as near to one as can be: (3.5), (3.8) and (3.10) of the reference.

    There the largest value is one; here the errors above and below one are equal.
    """
    square = lowest**2
    d = (4 * (1 - square) / square**2) ** (1 / 3)
    a = math.sqrt(1 + d) + math.sqrt(8 - 4 * d + 8 * (2 - square) / (square * math.sqrt(1 + d))) / 2
    b = (a - 1) ** 2 / 4
    c = a + b - 1
    smallest = lowest * (a + b * square) / (1 + c * square)
    centre = 2 / (1 + smallest)
    return centre * b / c, centre * (a - b / c) / c, 1 / c


_A, _B, _C = weights(LOWEST)


def halley(wide: Tensor) -> Tensor:
    """Singular values within 0.3 of one where they were above 1/75 of the Frobenius norm, none above 1.3.

    Each of the matrices `[..., rows, columns]` is first divided by `|X X^T|_F^(1/2)`: no singular value is larger, and
    the Frobenius norm is no smaller. The fourth powers of its entries must not overflow.
    """
    square = squared(wide if torch.finfo(wide.dtype).bits >= 32 else wide.float())
    norm = torch.linalg.vector_norm(square, dim=(-2, -1), keepdim=True).clamp_min_(
        torch.finfo(square.dtype).tiny ** 0.5
    )
    square.diagonal(dim1=-2, dim2=-1).add_(_C * norm.squeeze(-1))
    factor = inverse(square).mul_(_B * norm.sqrt())
    factor.diagonal(dim1=-2, dim2=-1).add_(_A * norm.rsqrt().squeeze(-1))
    return factor.to(wide.dtype) @ wide


def squared(wide: Tensor) -> Tensor:
    """`X X^T`: three of its quarters, by halves, and the fourth from symmetry."""
    rows = wide.shape[-2]
    if rows <= _SQUARED_WHOLE:
        return wide @ wide.mT
    upper, lower = wide[..., : rows // 2, :], wide[..., rows // 2 :, :]
    return _assembled(squared(upper), lower @ upper.mT, squared(lower))


def inverse(square: Tensor) -> Tensor:
    """The inverse of symmetric positive definite matrices; on a diagonal block the square's upper half is not read.

    For halves P, Q^T over Q, R, and the Schur complement `S = R - Q P^-1 Q^T`, with `Y = Q P^-1`:
    `P^-1 + Y^T S^-1 Y, -Y^T S^-1` over `-S^-1 Y, S^-1`.
    """
    rows = square.shape[-1]
    if rows <= _INVERTED_WHOLE:
        return torch.cholesky_inverse(torch.linalg.cholesky_ex(square).L).mT  # symmetric; so it lies row by row
    half = rows // 2
    beside = square[..., half:, :half]
    first = inverse(square[..., :half, :half])
    ratio = beside @ first
    last = inverse(square[..., half:, half:] - ratio @ beside.mT)
    across = last @ ratio
    return _assembled(first + ratio.mT @ across, across.neg_(), last)


def _assembled(first: Tensor, beside: Tensor, last: Tensor) -> Tensor:
    """The symmetric matrix of two diagonal blocks and the one below the first."""
    half = first.shape[-1]
    rows = half + last.shape[-1]
    whole = first.new_empty(*first.shape[:-2], rows, rows)
    whole[..., :half, :half] = first
    whole[..., half:, :half] = beside
    whole[..., :half, half:] = beside.mT
    whole[..., half:, half:] = last
    return whole
