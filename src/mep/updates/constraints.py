"""A bound on the largest singular value of every weight, kept after each step by a step post-hook.

    spectral_bound(gamma):   W <- W min(1, gamma (1 - slack) / sigma_max(W))     where sigma_max(W) may exceed gamma

so that no layer stretches any input by more than gamma. It scales the whole matrix: it is neither the projection, which
would clip each singular value, nor `torch.nn.utils.parametrizations.spectral_norm`, which changes what the model
computes. It reads parameters and the state of the optimizer only.

Measuring sigma_max takes two parts. An iterative estimate comes from below: there may be a longer direction that it has
not found. So it needs a proof, and a Cholesky factorisation is one: `t^2 I - W W^T` has a factor if and only if
`sigma_max(W) < t`.

Both cost as much as a step of a small network, so they are not done at every step. A weight R that was measured need
not be measured again while `sigma_max(R) + |W - R|_2 <= gamma`; the slack makes room for that. The Frobenius norm of
`W - R`, which is quick to compute, uses the room up in a step or two. Muon's steps have a known spectral norm, ten
times smaller: with it one measurement serves ten steps.

References: Lanczos process and Cholesky factorisation as in Golub and Van Loan 2013, "Matrix Computations", sections
10.1 and 4.2. The bound as a regulariser: Yoshida and Miyato 2017, https://arxiv.org/abs/1705.10941.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mep.errors import ArgumentError, require, warn

TOLERANCE = 1e-3
"""Relative, of a measured singular value."""
EXACT_ROWS = 128
"""Up to this many rows all eigenvalues cost no more than an estimate and its proof."""
MOST_STEPS = 32
"""Of the Lanczos process; beyond these all eigenvalues are cheaper."""

Weights = Sequence[torch.nn.Parameter] | Callable[[], Sequence[torch.nn.Parameter]]


def spectral_bound(gamma: float, slack: float = 0.1, exclude: Weights = ()) -> Callable[..., None]:
    """A step post-hook that keeps the largest singular value of every weight at or below `gamma`.

    `sigma_max(W) <= gamma (1 + 1e-3)` holds after every step for each parameter with `ndim >= 2` (convolutions count
    as `[out, rest]`) that the step could move: one that requires and has a gradient, in a group with `lr != 0`. All
    others stay exactly as they are, and so do weights that hold a NaN or an infinity.

    On the CPU a weight is measured only when it could have reached the bound: at first, and once it has moved by the
    distance that was left. If it then exceeds `gamma (1 - slack)`, it is scaled to that. The distance is the Frobenius
    norm, or the growth of `optimizer.state[p]["update_norm_sum"]`, where `Muon` and `Dion` add up the spectral norms of
    their steps; then other code must not move the weight by less than such steps could. On other devices every weight
    is measured at every step, without waiting for the host, and `slack` is not used.

    State: the measured weight and its norm, `["spectral_reference"]` and `["spectral_norm"]`; with more than 128 rows
    and columns, `["spectral_vector"]`, where the next estimate starts.

    A weight that is beyond the bound when it is first seen, as after training without it, or that other code has moved
    there, is named in a warning, once. One that grows to the bound in training is not.

    Args:
        gamma: the bound, in units of singular values.
        slack: a weight that reached the bound is scaled to this fraction below it, in [0, 1). The more, the fewer
            measurements.
        exclude: weights to leave as they are, such as tables of embeddings; or a function that lists them.

    Returns:
        A function for `optimizer.register_step_post_hook`. After a step, calling it with the optimizer does the same.

    Raises:
        ArgumentError: `gamma` is not positive and finite; when called, a weight is complex or sparse.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.diag(torch.tensor([3.0, 1.0])))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> handle = optimizer.register_step_post_hook(spectral_bound(1.5, slack=0.0))
        >>> weight.grad = torch.zeros(2, 2)
        >>> optimizer.step()
        >>> torch.allclose(weight, torch.diag(torch.tensor([1.5, 0.5])))
        True
    """
    require("spectral_bound", "gamma", gamma, lambda g: 0 < g < math.inf, "positive and finite")
    require("spectral_bound", "slack", slack, lambda s: 0 <= s < 1, "at least 0 and below 1")
    return functools.partial(
        _bound_all_,
        gamma=gamma,
        slack=slack,
        exclude=exclude if callable(exclude) else tuple(exclude),
        warned=[],
        seen=set(),
    )


def largest_eigenpair(square: Tensor, start: Tensor) -> tuple[float, Tensor]:
    """The largest eigenvalue of a symmetric matrix A and its vector, by the Lanczos process from `start`.

    It is the largest eigenvalue theta of `Q A Q^T`, where the orthonormal rows of Q span `{q, A q, A^2 q, ...}`. Power
    iteration uses only the last of these, and needs the square of the number of steps. The process stops where theta is
    within the tolerance of an eigenvalue of A, which need not be the largest, or after `MOST_STEPS`.
    """
    most = min(MOST_STEPS, len(start))
    basis = square.new_empty(most, len(start))
    projected = square.new_zeros(most, most)
    row = start / torch.linalg.vector_norm(start)
    theta = 0.0
    for count in range(1, most + 1):
        basis[count - 1] = row
        known = basis[:count]
        product = square @ row
        overlaps = known @ product
        projected[count - 1, :count] = overlaps
        product = torch.addmv(product, known.mT, overlaps, alpha=-1)
        # Orthogonalise twice: where eigenvalues are close, the remainder is small and would be mostly rounding.
        product = torch.addmv(product, known.mT, known @ product, alpha=-1)
        rest = torch.linalg.vector_norm(product).item()
        # The remainder is the next direction, unless it is no more than rounding.
        theta = max(theta, overlaps[-1].item())
        enough = TOLERANCE / 2 * theta
        if count % 2 == 0 or count == most or rest <= enough:
            values, vectors = torch.linalg.eigh(projected[:count, :count])
            theta = values[-1].item()
            if rest * abs(vectors[-1, -1].item()) <= enough:
                break
        row = product / rest
    return theta, vectors[:, -1] @ known


def eigenvalues_below(square: Tensor, bound: float) -> bool:
    """Whether all eigenvalues of a symmetric matrix are below `bound`: proven by a Cholesky factorisation."""
    shifted = -square
    shifted.diagonal().add_(bound)
    return torch.linalg.cholesky_ex(shifted).info.item() == 0


def largest_by_squaring(square: Tensor) -> Tensor:
    """The largest eigenvalue of a positive semidefinite matrix, or up to twice the tolerance more, by products alone.

    `lambda^(2^k) <= |A^(2^k)|_F <= rows^(1/2) lambda^(2^k)`: the root closes the gap.
    """
    squarings = math.ceil(math.log2(max(1.0, math.log(len(square)) / (4 * TOLERANCE))))
    logarithm = torch.zeros((), dtype=square.dtype, device=square.device)
    for k in range(squarings + 1):
        if k > 0:
            square = square @ square
        norm = torch.linalg.vector_norm(square)
        logarithm = logarithm + norm.log() / 2**k
        square = square / norm
    return logarithm.exp()


@torch.no_grad()
def _bound_all_(
    optimizer: torch.optim.Optimizer,
    args: Any = (),
    kwargs: Any = None,
    *,
    gamma: float,
    slack: float,
    exclude: Weights = (),
    warned: list[bool],
    seen: set[int],
) -> None:
    excluded = set(exclude() if callable(exclude) else exclude)
    for group in optimizer.param_groups:
        if group.get("lr", 1.0) == 0:
            continue
        for p in group["params"]:
            if p.ndim >= 2 and p.requires_grad and p.grad is not None and p.numel() > 0 and p not in excluded:
                with torch.autocast(p.device.type, enabled=False):
                    sigma = _bound_(p, optimizer.state[p], gamma, slack)
                largest = gamma if id(p) in seen else gamma * (1 - slack)  # as far as it may have grown in training
                if sigma > 1.01 * largest and not warned:
                    warned.append(True)
                    _warn(optimizer, p, sigma, gamma, slack)
                seen.add(id(p))


def _warn(optimizer: torch.optim.Optimizer, p: Tensor, sigma: float, gamma: float, slack: float) -> None:
    model = getattr(optimizer, "model", None)
    names = [name for name, own in model.named_parameters() if own is p] if model is not None else []
    below = f": a weight that comes near the bound is put {slack:.0%} below it" if slack else ""
    warn(
        f"spectral_bound(gamma={gamma:g}): the largest singular value of `{(names or [tuple(p.shape)])[0]}` is "
        f"{sigma:.3g}, and the weight was scaled to {gamma * (1 - slack):.3g}{below}. This changes the network, as the "
        "bound is meant to; for one that was trained without it, take a larger gamma. This is said once.",
        UserWarning,
    )


def _bound_(weight: Tensor, state: dict[str, Any], gamma: float, slack: float) -> float:
    """Bound one weight. Returns its largest singular value before, where it was measured on the CPU, else 0."""
    if weight.is_complex() or weight.layout != torch.strided:
        raise ArgumentError(
            f"spectral_bound: a weight of shape {list(weight.shape)} is {weight.dtype}, {weight.layout}, but only real "
            f"dense weights can be bounded. Give this one to an optimizer without the hook."
        )
    wide = weight.flatten(1)
    if wide.shape[0] > wide.shape[1]:
        wide = wide.mT
    if torch.finfo(wide.dtype).bits < 32:
        wide = wide.float()
    if weight.device.type != "cpu":
        weight.mul_(_factor_without_waiting(wide, gamma))
        return 0.0
    if _stayed_below(weight, state, gamma):
        return 0.0
    measured = norm = _norm_on_cpu(wide, weight.dtype, state, gamma)
    target = gamma * (1 - slack)
    if norm > target:
        weight.mul_(target / norm)
        norm = target
    if 0 < norm < gamma:  # a reference for the next steps
        state["spectral_norm"] = norm
        state["spectral_reference"] = weight.detach().clone()
        state["spectral_start"] = state.get("update_norm_sum", 0.0)
    return measured


def _stayed_below(weight: Tensor, state: dict[str, Any], gamma: float) -> bool:
    """Whether the weight has not moved far enough since it was measured to exceed `gamma`.

    `sigma_max(W) <= sigma_max(R) + |W - R|_2`, and that norm exceeds neither the Frobenius norm nor the sum of the
    spectral norms of the steps between.
    """
    reference = state.get("spectral_reference")
    if reference is None or reference.shape != weight.shape:
        return False
    moved = float(torch.linalg.vector_norm(weight - reference, dtype=torch.promote_types(weight.dtype, torch.float32)))
    steps = state.get("update_norm_sum", 0.0) - state.get("spectral_start", math.inf)
    rank = min(len(weight), weight.numel() // len(weight))
    if moved <= math.sqrt(rank) * steps:  # else other code has moved it as well
        moved = min(moved, steps)
    return state["spectral_norm"] + moved <= gamma


def _factor_without_waiting(wide: Tensor, gamma: float) -> Tensor:
    """`min(1, gamma / sigma_max)` as a 0-dim tensor, by products alone; 1 where that is not finite."""
    largest = wide.abs().amax()
    wide = wide / largest  # so that the squares neither overflow nor vanish
    norm = largest * largest_by_squaring(wide @ wide.mT).sqrt()
    return torch.where((norm > gamma) & norm.isfinite(), gamma / norm, 1.0)


def _norm_on_cpu(wide: Tensor, dtype: torch.dtype, state: dict[str, Any], gamma: float) -> float:
    """`sigma_max`, with a proof; 0 where the Frobenius norm shows that it is below gamma, or is not finite."""
    frobenius = torch.linalg.vector_norm(wide).item()
    if frobenius == math.inf and (largest := wide.abs().max().item()) < math.inf:  # only the squares overflow
        return largest * _norm_on_cpu(wide / largest, dtype, state, gamma / largest)
    if not gamma < frobenius < math.inf:
        return 0.0
    square = wide @ wide.mT
    if len(square) > EXACT_ROWS:
        noise = _pseudo_random(len(square)).to(wide.dtype)
        theta, vector = largest_eigenpair(square, state.get("spectral_vector", noise).to(wide.dtype))
        proven = eigenvalues_below(square, max(theta, gamma**2) * (1 + TOLERANCE))
        # Without a proof the vector lacks a direction, so noise is added. It is kept in the dtype of the weight, which
        # `load_state_dict` would convert it to.
        state["spectral_vector"] = (vector if proven else vector + noise).to(dtype)
        if proven:
            return math.sqrt(theta)
    return math.sqrt(torch.linalg.eigvalsh(square)[-1].item())


def _pseudo_random(size: int) -> Tensor:
    """A random unit vector, the same every time, from a generator of its own: the global one is the user's.

    A vector with structure, all ones for one, would be orthogonal to weights with structure.
    """
    noise = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return noise / noise.norm()
