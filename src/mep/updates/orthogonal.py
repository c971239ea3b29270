"""The nearest orthogonal matrix, the one place where every update gets it.

The matrix nearest to `M = U diag(sigma) V^T` with all its singular values at one is its polar factor
`U V^T = (M M^T)^(-1/2) M`. In a direction in which M vanishes nothing is nearest: it stays zero, and the result is then
a partial isometry. The methods differ only in how they bring every sigma to one:

| method        | one step                                  | source |
|---------------|-------------------------------------------|--------|
| newton_schulz | x <- a x + b x^3 + c x^5, always the same a, b, c: ends near one rather than at it | [1] |
| polar_express | the same step, with the best a, b, c for what the steps before have left | [2] |
| halley        | x <- x (a + b / (x^2 + c)), once: near one at the cost of one inverse | [3] |
| gram          | (M M^T)^(-1/2) M from the eigenvectors of the small square matrix M M^T | |
| svd           | U V^T from the singular value decomposition: slow, the oracle of the tests | |

Starting from the inverse root of an earlier M would save nothing: momentum turns the many small directions of M so far
from one step to the next that the product has singular values between 0.03 and 50.

Why the nearest orthogonal matrix: Bernstein and Newhouse 2024, https://arxiv.org/abs/2409.20325.
[1] Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. [2] Amsel, Persson, Musco and Gower 2025, "The Polar
Express", https://arxiv.org/abs/2505.16932. [3] Nakatsukasa, Bai and Gygi 2010, "Optimizing Halley's iteration for
computing the matrix polar decomposition", https://doi.org/10.1137/090774999.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from mep.errors import ArgumentError, one_of, require, whole_number

_SAFE = 1e8
"""The fourth powers of matrices with such a norm, or one over it, stay clear of the ends of float32's range."""
_EIGENVECTORS = 32
"""Up to so many rows all eigenvectors cost no more than a few products."""
_HALF = 128
"""From so many rows products in half precision are the faster ones, if the processor has them."""


def orthogonalise(matrix: Tensor, method: str = "auto", steps: int | None = None) -> Tensor:
    """The orthogonal matrix nearest to each matrix in `matrix`.

    `U V^T` for `M = U diag(sigma) V^T`: orthonormal rows if M is wide, orthonormal columns if it is tall. It does not
    depend on the scale of M. A zero matrix gives zero, one of lower rank a partial isometry of that rank, and one that
    holds a NaN or an infinity gives NaN. How near the singular values come to one stands in `METHODS`; bfloat16 adds
    its rounding, a few hundredths.

    Args:
        matrix: `[..., rows, columns]`, real floating point. Half precision is computed in float32, except that
            methods made of products keep to bfloat16.
        method: a name in `METHODS`, or `"auto"`: the exact `"gram"` in double precision, and on the CPU for up to 32
            rows or columns; else `"halley"` on the CPU, from 128 on with the last product in bfloat16 if the processor
            has such products, and `"polar_express"` in bfloat16 on an accelerator.
        steps: how many steps a method that iterates makes; None takes the number in `METHODS`.

    Returns:
        A new tensor of the shape and dtype of `matrix`.

    Raises:
        ArgumentError: no such method, fewer than one step, steps for a method that makes none, or not a real matrix.

    Example:
        >>> import torch
        >>> q = orthogonalise(torch.tensor([[0.0, 3.0], [-0.1, 0.0]]))
        >>> torch.allclose(q, torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
        True
    """
    check_method(method, steps, call="orthogonalise")
    if matrix.ndim < 2 or not matrix.is_floating_point():
        raise ArgumentError(
            f"orthogonalise(matrix=...) needs a real floating-point tensor [..., rows, columns]; "
            f"got {matrix.dtype} of shape {list(matrix.shape)}."
        )
    if matrix.numel() == 0:
        return matrix.clone()

    working = matrix.dtype
    if method == "auto":
        method, working = _automatic(matrix)
    chosen = METHODS[method]
    if torch.finfo(working).bits < 32 and (not chosen.half or working == torch.float16):
        working = torch.float32

    tall = matrix.shape[-2] > matrix.shape[-1]
    with torch.autocast(matrix.device.type, enabled=False):
        wide, finite = _scaled(matrix.mT if tall else matrix, working)
        if chosen.steps is not None:
            result = chosen.factor(wide, chosen.steps if steps is None else steps)
        elif finite is None or finite.all():
            result = chosen.factor(wide)
        else:  # LAPACK refuses matrices that are not finite: zero in their place, and NaN in the result
            result = chosen.factor(torch.where(finite, wide, 0)).where(finite, math.nan)
    return (result.mT if tall else result).to(matrix.dtype)


def largest_singular_value(steps: int | None) -> float:
    """A bound on the singular values of what `orthogonalise` returns with this number of steps, for every method."""
    return 1.4 if steps is None else 2.1  # the first step of the Polar Express alone ends anywhere below two


def check_method(method: str, steps: int | None, call: str) -> None:
    """Raise an ArgumentError that names `call` unless `orthogonalise` accepts `method` with `steps`."""
    require(call, "method", method, *one_of(["auto", *METHODS]))
    if steps is None:
        return
    if method == "auto" or METHODS[method].steps is None:
        iterative = [name for name, known in METHODS.items() if known.steps is not None]
        raise ArgumentError(
            f"{call}(steps={steps!r}) has no effect with method={method!r}; leave it out, or choose one of {iterative}."
        )
    require(call, "steps", steps, *whole_number(1))


def _automatic(matrix: Tensor) -> tuple[str, torch.dtype]:
    rows = min(matrix.shape[-2:])
    if matrix.dtype == torch.float64:
        return "gram", torch.float64
    if matrix.device.type != "cpu":
        return "polar_express", torch.bfloat16
    if rows <= _EIGENVECTORS:
        return "gram", torch.float32
    return "halley", torch.bfloat16 if rows >= _HALF and _has_bfloat16_products() else torch.float32


@functools.cache
def _has_bfloat16_products() -> bool:
    """Whether the processor multiplies bfloat16 matrices itself; False where torch does not report it."""
    known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(unit, False) for unit in ("avx512_bf16", "amx_bf16"))


def _scaled(matrix: Tensor, working: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Each matrix, scaled so that its squares neither overflow nor vanish; and which are finite, None for all."""
    if matrix.device.type == "cpu":  # where two norms cost less than scaling
        norms = torch.linalg.vector_norm(matrix, dim=(-2, -1))
        if norms.min().item() > 1 / _SAFE and norms.max().item() < _SAFE:
            return matrix.to(working), None
    largest = matrix.abs().amax((-2, -1), keepdim=True)
    return (matrix / largest.clamp_min(torch.finfo(matrix.dtype).tiny)).to(working), largest.isfinite()


# Products alone: odd polynomials of a matrix, one after the other.
#
#     x <- a x + b x x^T x + c x x^T x x^T x          sigma <- a sigma + b sigma^3 + c sigma^5
#
# A wide x is the product of a small square matrix Q and its start: two or more steps can share one product with x,
#
#     R = x x^T,   P = a + b R + c R^2,   Q <- P Q,   R <- P R P,   ...,   x <- Q x
#
# which rounding limits: R equals x x^T only to the rounding of its largest entries, and the steps lift what is small.

Coefficients = tuple[float, float, float]

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)

SAFETY = 1.01
"""Each step first shrinks by this: rounding can lift a singular value above the interval that its polynomial is for."""
_LAST = (1.875, -1.25, 0.375)
"""All further steps repeat this polynomial, which converges from either side of one."""

# Each step is best for what the steps before make of singular values in [1e-3, 1]: Implementation 1 of the paper.
POLAR_EXPRESS = (
    *(
        (a / SAFETY, b / SAFETY**3, c / SAFETY**5)
        for a, b, c in (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
            (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
            (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        )
    ),
    _LAST,
)


def newton_schulz(wide: Tensor, steps: int) -> Tensor:
    """Singular values near one: in [0.68, 1.14] after 5 steps, where they were above 1e-2 of the Frobenius norm."""
    return apply_polynomials(wide, itertools.repeat(NEWTON_SCHULZ, steps))


def polar_express(wide: Tensor, steps: int) -> Tensor:
    """Singular values at one: within 7e-3 after 6 steps, 2e-5 after 7, rounding after 8, where they were above 1e-3."""
    return apply_polynomials(wide, itertools.islice(itertools.chain(POLAR_EXPRESS, itertools.repeat(_LAST)), steps))


def apply_polynomials(wide: Tensor, coefficients: Iterable[Coefficients]) -> Tensor:
    """Apply one polynomial after the other to matrices `[..., rows, columns]`, at least one.

    Each matrix is first divided by `|x x^T|_F^(1/2)`: no singular value is larger, and the Frobenius norm is no
    smaller. The fourth powers of its entries must not overflow.
    """
    steps = list(coefficients)
    single = wide.numel() == wide.shape[-2:].numel()
    x = wide.reshape(wide.shape[-2:]) if single else wide.reshape(-1, *wide.shape[-2:])
    shared = _steps_per_product(x)
    for first in range(0, len(steps), shared):
        R = x @ x.mT
        if first == 0:  # R of x / (SAFETY |R|^(1/2)), which x itself becomes below
            norm = torch.linalg.vector_norm(R, dim=(-2, -1), keepdim=True)
            shrink = (SAFETY**2 * norm).clamp_min_(torch.finfo(x.dtype).tiny).rsqrt_()
            R.mul_(shrink).mul_(shrink)
        Q = P = _polynomial(R, steps[first])
        for step in steps[first + 1 : first + shared]:
            R = P @ R @ P
            P = _polynomial(R, step)
            Q = P @ Q
        x = (Q.mul_(shrink) if first == 0 else Q) @ x
    return x.view(wide.shape)


def _polynomial(R: Tensor, coefficients: Coefficients) -> Tensor:
    """`a + b R + c R^2`."""
    a, b, c = coefficients
    product = torch.addmm if R.ndim == 2 else torch.baddbmm
    result = product(R, R, R, beta=b, alpha=c)
    result.diagonal(dim1=-2, dim2=-1).add_(a)
    return result


def _steps_per_product(x: Tensor) -> int:
    """How many steps share one product with x: each then costs one more square product, and two with x less.

    In half precision a third step would lift the rounding of R above the singular values that are to end at one.
    """
    if x.shape[-1] < 1.5 * x.shape[-2]:
        return 1
    return 2 if torch.finfo(x.dtype).bits < 32 else 4


# One inverse: a step of the dynamically weighted Halley iteration.
#
#     x <- x (a + b x^2) / (1 + c x^2)     that is     X <- (A + B (X X^T + C)^-1) X
#
# Of all rational functions of this type it stays nearest to one on the interval of singular values that a, b and c are
# made for (Zolotarev 1877). On [1/75, 1] it errs by 0.29; a polynomial would need degree 100 or so. Quintic steps take
# three for that, and nine products; this takes two products with X and an inverse, which costs less than two more. What
# lies below the interval is lifted 58 times at most: no sum is so near to a singular matrix that rounding would show.
#
# The square and the inverse are symmetric, and are computed by halves: a block above the diagonal is a copy.

LOWEST = 1 / 75
"""The lower end of the interval."""
_INVERTED_WHOLE, _SQUARED_WHOLE = 64, 128
"""Up to so many rows LAPACK inverts, or one product squares, faster than halves do."""


def halley_coefficients(lowest: float) -> tuple[float, float, float]:
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


_A, _B, _C = halley_coefficients(LOWEST)


def halley(wide: Tensor) -> Tensor:
    """Singular values within 0.3 of one where they were above 1/75 of the Frobenius norm, none above 1.3.

    Each of the matrices `[..., rows, columns]` is first divided by `|X X^T|_F^(1/2)`: no singular value is larger, and
    the Frobenius norm is no smaller. The fourth powers of its entries must not overflow.
    """
    # With X = n^(1/2) x, n = |X X^T|_F:  (A + B (x x^T + C)^-1) x = (A n^(-1/2) + B n^(1/2) (X X^T + C n)^-1) X
    square = gram_matrix(wide if torch.finfo(wide.dtype).bits >= 32 else wide.float())
    norm = torch.linalg.vector_norm(square, dim=(-2, -1), keepdim=True).clamp_min_(
        torch.finfo(square.dtype).tiny ** 0.5
    )
    square.diagonal(dim1=-2, dim2=-1).add_(_C * norm.squeeze(-1))
    factor = symmetric_inverse(square).mul_(_B * norm.sqrt())
    factor.diagonal(dim1=-2, dim2=-1).add_(_A * norm.rsqrt().squeeze(-1))
    return factor.to(wide.dtype) @ wide


def gram_matrix(wide: Tensor) -> Tensor:
    """`X X^T`: three of its quarters, by halves, and the fourth from symmetry."""
    rows = wide.shape[-2]
    if rows <= _SQUARED_WHOLE:
        return wide @ wide.mT
    upper, lower = wide[..., : rows // 2, :], wide[..., rows // 2 :, :]
    return _assembled(gram_matrix(upper), lower @ upper.mT, gram_matrix(lower))


def symmetric_inverse(square: Tensor) -> Tensor:
    """The inverse of symmetric positive definite matrices `[P, Q^T; Q, R]`; the block Q^T is not read.

    With the Schur complement `S = R - Q P^-1 Q^T` and `Y = Q P^-1`: `[P^-1 + Y^T S^-1 Y, -Y^T S^-1; -S^-1 Y, S^-1]`.
    """
    rows = square.shape[-1]
    if rows <= _INVERTED_WHOLE:
        return torch.cholesky_inverse(torch.linalg.cholesky_ex(square).L).mT  # symmetric; so it lies row by row
    half = rows // 2
    beside = square[..., half:, :half]
    first = symmetric_inverse(square[..., :half, :half])
    ratio = beside @ first
    last = symmetric_inverse(square[..., half:, half:] - ratio @ beside.mT)
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


# Eigenvectors, and singular vectors.


def gram(wide: Tensor) -> Tensor:
    """`(M M^T)^(-1/2) M`, zero in every direction whose squared singular value drowns in the rounding of `M M^T`."""
    square = wide @ wide.mT
    squares, directions = torch.linalg.eigh(square)
    # A sum of k rounded products errs by about sqrt(k) roundings; twice that also covers the eigenvalues' own error.
    noise = 2 * math.sqrt(wide.shape[-1]) * torch.finfo(square.dtype).eps * squares[..., -1:]
    inverse_roots = torch.where(squares > noise, squares.rsqrt(), 0)
    return (directions * inverse_roots.unsqueeze(-2)) @ directions.mT @ wide


def svd(wide: Tensor) -> Tensor:
    """`U V^T`, zero in every direction whose singular value drowns in the rounding of M."""
    left, sigma, right = torch.linalg.svd(wide, full_matrices=False)
    noise = wide.shape[-1] * torch.finfo(wide.dtype).eps * sigma[..., :1]
    return (left * (sigma > noise).unsqueeze(-2)) @ right


# All of them.


class Method(NamedTuple):
    """A way to orthogonalise wide matrices, and what is known about it.

    Singular values of at least `floor` times the Frobenius norm end within `error` of one, in float32 and float64.
    `steps` is the default number of steps; None for methods that compute the result directly. `half`: whether bfloat16
    is enough for products with the matrix.
    """

    factor: Callable[..., Tensor]
    steps: int | None
    floor: float
    error: float
    half: bool = False


METHODS = {
    "newton_schulz": Method(newton_schulz, steps=5, floor=1e-2, error=0.32, half=True),
    "polar_express": Method(polar_express, steps=6, floor=1e-3, error=7e-3, half=True),
    "halley": Method(halley, steps=None, floor=1 / 75, error=0.3, half=True),
    "gram": Method(gram, steps=None, floor=1e-2, error=5e-3),
    "svd": Method(svd, steps=None, floor=1e-4, error=1e-4),
}
