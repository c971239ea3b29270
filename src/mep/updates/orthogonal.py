"""The nearest orthogonal matrix: every update that needs one asks here.

The matrix nearest to `M = U diag(sigma) V^T` with all its singular values at one is its polar factor
`U V^T = (M M^T)^(-1/2) M`. A direction in which M vanishes has no nearest unit: it stays zero, and the result is then a
partial isometry. The methods differ only in how they turn every sigma into one:

    newton_schulz   x <- a x + b x^3 + c x^5, the same a, b, c each step: stops near one rather than at it
    polar_express   the same step, with the best a, b, c for what the steps before have left
    halley          (a + b (M M^T + c)^-1) M, near one at the price of one inverse
    gram            (M M^T)^(-1/2) through the eigenvectors of the small square matrix M M^T
    svd             U V^T as it stands: slow, the oracle of the tests

An inverse root of an earlier M does not save this work: momentum turns its many small directions so far from one
step to the next that M comes out with singular values between 0.03 and 50.

Reference: Bernstein and Newhouse 2024, https://arxiv.org/abs/2409.20325; for the polynomials see `quintic`, for the
inverse `halley`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mep.errors import ArgumentError, one_of, require, whole_number
from mep.updates.halley import halley
from mep.updates.quintic import newton_schulz, polar_express

_SAFE = 1e8
"""The fourth powers of matrices with such a norm, or one over it, stay clear of the ends of float32's range."""
_EIGENVECTORS = 32
"""Up to so many rows all eigenvectors cost no more than a few products."""
_HALF = 128
"""From so many rows products in half precision are the faster ones, if the processor has them."""


def gram(wide: Tensor) -> Tensor:
    """`(M M^T)^(-1/2) M`, zero in every direction whose squared singular value drowns in the rounding of `M M^T`."""
    return _inverse_root(wide @ wide.mT, wide.shape[-1]) @ wide


def svd(wide: Tensor) -> Tensor:
    """`U V^T`, zero in every direction whose singular value drowns in the rounding of M."""
    left, sigma, right = torch.linalg.svd(wide, full_matrices=False)
    noise = wide.shape[-1] * torch.finfo(wide.dtype).eps * sigma[..., :1]
    return (left * (sigma > noise).unsqueeze(-2)) @ right


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
        >>> turned = orthogonalise(torch.tensor([[0.0, 3.0], [-0.1, 0.0]]))
        >>> torch.allclose(turned, torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
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
        else:  # LAPACK refuses what is not finite; the rest of the batch must not suffer, nor NaN turn into a number
            result = chosen.factor(torch.where(finite, wide, 0)).where(finite, math.nan)
    return (result.mT if tall else result).to(matrix.dtype)


def largest_singular_value(steps: int | None) -> float:
    """What no singular value of a result of `orthogonalise` exceeds, with this number of steps and any method."""
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
    """Whether the processor multiplies bfloat16 matrices itself; where torch cannot tell, it does not."""
    known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(unit, False) for unit in ("avx512_bf16", "amx_bf16"))


def _scaled(matrix: Tensor, working: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Each matrix brought to where its squares neither overflow nor vanish, and which are finite; None for all."""
    if matrix.device.type == "cpu":  # where looking costs less than scaling
        norms = torch.linalg.vector_norm(matrix, dim=(-2, -1))
        if norms.min().item() > 1 / _SAFE and norms.max().item() < _SAFE:
            return matrix.to(working), None
    largest = matrix.abs().amax((-2, -1), keepdim=True)
    return (matrix / largest.clamp_min(torch.finfo(matrix.dtype).tiny)).to(working), largest.isfinite()


def _inverse_root(square: Tensor, products: int) -> Tensor:
    """`S^(-1/2)` of a Gram matrix whose entries are sums of so many products; zero where S drowns in rounding."""
    squares, directions = torch.linalg.eigh(square)
    # A sum of k rounded products errs by about sqrt(k) roundings; twice that also covers the eigenvalues' own error.
    noise = 2 * math.sqrt(products) * torch.finfo(square.dtype).eps * squares[..., -1:]
    inverse_roots = torch.where(squares > noise, squares.rsqrt(), 0)
    return (directions * inverse_roots.unsqueeze(-2)) @ directions.mT
