"""Singular values to one by products alone: odd polynomials of a matrix, one after the other.

    x <- a x + b x x^T x + c x x^T x x^T x          sigma <- a sigma + b sigma^3 + c sigma^5

A wide x is the product of a small square matrix and what it was: two or more steps can share one product with x,

    R = x x^T,   P = a + b R + c R^2,   Q <- P Q,   R <- P R P,   ...,   x <- Q x

which rounding limits: R stands for x x^T only to the rounding of its largest entries, and the steps lift what is small.

References: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; Amsel, Persson, Musco and Gower 2025, "The
Polar Express", https://arxiv.org/abs/2505.16932.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

Coefficients = tuple[float, float, float]

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)

# Rounding can lift a singular value above what a step expects, where its polynomial falls off: each step first
# shrinks by SAFETY. The last polynomial, which all further steps repeat, converges from either side of one.
SAFETY = 1.01
_LAST = (1.875, -1.25, 0.375)


def _shrunk(coefficients: Iterable[Coefficients]) -> tuple[Coefficients, ...]:
    return (*((a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in coefficients), _LAST)


# The authors' list, each step best for what the steps before make of singular values in [1e-3, 1]: Implementation 1 of
# the paper.
POLAR_EXPRESS = _shrunk(
    (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    )
)


def newton_schulz(wide: Tensor, steps: int) -> Tensor:
    """Singular values near one: in [0.68, 1.14] after 5 steps, where they were above 1e-2 of the Frobenius norm."""
    return compose(wide, itertools.repeat(NEWTON_SCHULZ, steps))


def polar_express(wide: Tensor, steps: int) -> Tensor:
    """Singular values at one: within 7e-3 after 6 steps, 2e-5 after 7, rounding after 8, where they were above 1e-3."""
    return compose(wide, itertools.islice(itertools.chain(POLAR_EXPRESS, itertools.repeat(_LAST)), steps))


def compose(wide: Tensor, coefficients: Iterable[Coefficients]) -> Tensor:
    """Apply one polynomial after the other to matrices `[..., rows, columns]`, at least one.

    Each matrix is first divided by `|x x^T|_F^(1/2)`: no singular value is larger, and the Frobenius norm is no
    smaller. The fourth powers of its entries must not overflow.
    """
    steps = list(coefficients)
    single = wide.numel() == wide.shape[-2:].numel()
    x = wide.reshape(wide.shape[-2:]) if single else wide.reshape(-1, *wide.shape[-2:])
    together = _steps_together(x)
    for first in range(0, len(steps), together):
        square = x @ x.mT
        if first == 0:
            norm = torch.linalg.vector_norm(square, dim=(-2, -1), keepdim=True)
            shrink = (SAFETY**2 * norm).clamp_min_(torch.finfo(x.dtype).tiny).rsqrt_()
            square.mul_(shrink).mul_(shrink)
        factor = _factor(square, steps[first : first + together])
        x = (factor.mul_(shrink) if first == 0 else factor) @ x
    return x.view(wide.shape)


def _factor(square: Tensor, steps: list[Coefficients]) -> Tensor:
    """Q of these steps, at least one, from R."""
    factor = power = _polynomial(square, steps[0])
    for step in steps[1:]:
        square = power @ square @ power
        power = _polynomial(square, step)
        factor = power @ factor
    return factor


def _polynomial(square: Tensor, coefficients: Coefficients) -> Tensor:
    a, b, c = coefficients
    product = torch.addmm if square.ndim == 2 else torch.baddbmm
    result = product(square, square, square, beta=b, alpha=c)
    result.diagonal(dim1=-2, dim2=-1).add_(a)
    return result


def _steps_together(x: Tensor) -> int:
    # A step costs one more square product when it shares, and one product with x less on either side. In half
    # precision a third step would lift the rounding of R above the singular values that are to come out at one.
    if x.shape[-1] < 1.5 * x.shape[-2]:
        return 1
    return 2 if torch.finfo(x.dtype).bits < 32 else 4
