"""The nearest orthogonal matrix: every update that needs one asks here.

The matrix nearest to `M = U diag(sigma) V^T` with all its singular values at one is its polar factor
`U V^T = (M M^T)^(-1/2) M`. A direction in which M vanishes has no nearest unit: it stays zero, and the result is then a
partial isometry. The methods differ only in how they turn every sigma into one:

    newton_schulz   x <- a x + b x^3 + c x^5, the same a, b, c each step: fast, stops near one rather than at it
    polar_express   the same step, with the best a, b, c for what the steps before have left
    gram            (M M^T)^(-1/2) through the eigenvectors of the small square matrix M M^T
    svd             U V^T as it stands: slow, the oracle of the tests

References: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; Amsel, Persson, Musco and Gower 2025, "The
Polar Express", https://arxiv.org/abs/2505.16932; Bernstein and Newhouse 2024, https://arxiv.org/abs/2409.20325.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from mep.errors import ArgumentError

_SAFE = 1e-20
"""So far from the ends of float32's range, its inverse too, what underflows is far below rounding."""
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)

# The authors' list, each step best for what the steps before make of singular values in [1e-3, 1]: Implementation 1 of
# the paper.
_UNSAFE = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
# Rounding can lift a singular value above what a step expects, where its polynomial falls off: each step first
# shrinks by SAFETY. The last polynomial, which all further steps repeat, converges from either side of one.
SAFETY = 1.01
POLAR_EXPRESS = (*((a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in _UNSAFE), (1.875, -1.25, 0.375))


def newton_schulz(wide: Tensor, steps: int) -> Tensor:
    """Singular values near one: in [0.68, 1.14] after 5 steps, where they were above 1e-2 of the Frobenius norm."""
    return _quintic(_unit(wide), itertools.repeat(NEWTON_SCHULZ, steps))


def polar_express(wide: Tensor, steps: int) -> Tensor:
    """Singular values at one: within 7e-3 after 6 steps, 2e-5 after 7, rounding after 8, where they were above 1e-3."""
    last = itertools.repeat(POLAR_EXPRESS[-1])
    return _quintic(_unit(wide) / SAFETY, itertools.islice(itertools.chain(POLAR_EXPRESS, last), steps))


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
    `steps` is the default number of steps; None for methods that compute the result directly.
    """

    factor: Callable[..., Tensor]
    steps: int | None
    floor: float
    error: float


METHODS = {
    "newton_schulz": Method(newton_schulz, steps=5, floor=1e-2, error=0.32),
    "polar_express": Method(polar_express, steps=6, floor=1e-3, error=7e-3),
    "gram": Method(gram, steps=None, floor=1e-2, error=5e-3),
    "svd": Method(svd, steps=None, floor=1e-4, error=1e-4),
}


def orthogonalise(matrix: Tensor, method: str = "auto", steps: int | None = None) -> Tensor:
    """The orthogonal matrix nearest to each matrix in `matrix`.

    `U V^T` for `M = U diag(sigma) V^T`: orthonormal rows if M is wide, orthonormal columns if it is tall. It does not
    depend on the scale of M. A zero matrix gives zero, one of lower rank a partial isometry of that rank, and one that
    holds a NaN or an infinity gives NaN.

    Args:
        matrix: `[..., rows, columns]`, real floating point. Half precision is computed in float32 where the method is
            direct, in its own precision where it iterates.
        method: a name in `METHODS`, or `"auto"`: the exact `"gram"`, except for single and half precision on an
            accelerator, which prefers the products of `"polar_express"` in bfloat16 to eigenvectors.
        steps: how many steps `"newton_schulz"` or `"polar_express"` makes; None takes the number in `METHODS`.

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
        exact = matrix.device.type == "cpu" or matrix.dtype == torch.float64
        method = "gram" if exact else "polar_express"
        working = matrix.dtype if exact else torch.bfloat16
    chosen = METHODS[method]
    if chosen.steps is None and torch.finfo(working).bits < 32:
        working = torch.float32

    if method == "gram" and matrix.ndim == 2 and matrix.device.type == "cpu" and working == matrix.dtype:
        found = _gram_as_it_is(matrix)
        if found is not None:
            return found

    # Only the shape of M matters, so bring it to where squares neither overflow nor vanish.
    largest = matrix.abs().amax((-2, -1), keepdim=True)
    wide = (matrix / largest.clamp_min(torch.finfo(matrix.dtype).tiny)).to(working)
    tall = matrix.shape[-2] > matrix.shape[-1]
    if tall:
        wide = wide.mT
    with torch.autocast(matrix.device.type, enabled=False):
        if chosen.steps is None:
            result = _finite_only(chosen.factor, wide, largest.isfinite())
        else:
            result = chosen.factor(wide, chosen.steps if steps is None else steps)
    return (result.mT if tall else result).to(matrix.dtype)


def check_method(method: str, steps: int | None, call: str) -> None:
    """Raise an ArgumentError that names `call` unless `orthogonalise` accepts `method` with `steps`."""
    if method != "auto" and method not in METHODS:
        raise ArgumentError(f"{call}(method={method!r}): choose one of {['auto', *METHODS]}.")
    if steps is None:
        return
    if method == "auto" or METHODS[method].steps is None:
        iterative = [name for name, known in METHODS.items() if known.steps is not None]
        raise ArgumentError(
            f"{call}(steps={steps!r}) has no effect with method={method!r}; leave it out, or choose one of {iterative}."
        )
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ArgumentError(f"{call}(steps={steps!r}) must be a whole number of at least 1.")


def _inverse_root(square: Tensor, products: int) -> Tensor:
    """`S^(-1/2)` of a Gram matrix whose entries are sums of so many products; zero where S drowns in rounding."""
    squares, directions = torch.linalg.eigh(square)
    # A sum of k rounded products errs by about sqrt(k) roundings; twice that also covers the eigenvalues' own error.
    noise = 2 * math.sqrt(products) * torch.finfo(square.dtype).eps * squares[..., -1:]
    inverse_roots = torch.where(squares > noise, squares.rsqrt(), 0)
    return (directions * inverse_roots.unsqueeze(-2)) @ directions.mT


def _gram_as_it_is(matrix: Tensor) -> Tensor | None:
    """`gram` without scaling, where the Gram matrix shows that squares neither overflow nor vanish; else None."""
    tall = matrix.shape[0] > matrix.shape[1]
    with torch.autocast("cpu", enabled=False):
        square = matrix.mT @ matrix if tall else matrix @ matrix.mT
        if not _SAFE < float(square.diagonal().sum()) < 1 / _SAFE:
            return None
        root = _inverse_root(square, max(matrix.shape))
        return matrix @ root if tall else root @ matrix


def _unit(wide: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True)
    return wide / norm.clamp_min(torch.finfo(wide.dtype).tiny)


def _quintic(wide: Tensor, coefficients: Iterable[tuple[float, float, float]]) -> Tensor:
    shape = wide.shape
    x = wide.reshape(-1, *shape[-2:])
    for a, b, c in coefficients:
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.view(shape)


def _finite_only(factor: Callable[..., Tensor], wide: Tensor, finite: Tensor) -> Tensor:
    # LAPACK refuses what is not finite; the rest of the batch must not suffer, and NaN must not turn into a number.
    if finite.all():
        return factor(wide)
    return factor(torch.where(finite, wide, 0)).where(finite, math.nan)
