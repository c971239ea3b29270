r"""The Fisher matrix of one weight `W [out, in]` in two approximations, averaged over batches, and its damped powers.

    Kronecker   F ~ A (x) G,  A = E[h h^T] [in, in],  G = E[delta delta^T] [out, out]
                (F + damping)^e D ~ (G + g I)^e D (A + a I)^e,   a = pi sqrt(damping),   g = sqrt(damping) / pi
    diagonal    F ~ diag(E[delta^2 h^2]) [out, in]

with `pi^2 = (tr A / in) / (tr G / out)`, which damps both factors alike in proportion to their size. A wide factor is
stored as its largest `rank` eigenvalues and the mean c of all others, `U diag(s - c) U^T + c I`: that keeps the trace,
and its powers cost two thin products instead of a square one.

The diagonal is exact where an example has one row; `diag(G) diag(A)^T` would take errors and inputs for independent.
Several rows of an example (positions, uses of a shared weight) count as independent in both.

References: Martens and Grosse 2015, https://arxiv.org/abs/1503.05671, sections 3 and 6.3; Eschenhagen et al. 2023,
https://arxiv.org/abs/2311.00636, "expand". Low rank: Puiu 2022, "Randomized K-FACs", https://arxiv.org/abs/2206.15397;
there the remainder is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Moments = dict[str, Tensor]
Powers = dict[str, Any]
"""Tensors and numbers only, in dictionaries: what `Optimizer.load_state_dict` can carry."""

_FIRST_ITERATIONS = 4
"""Of subspace iteration, where there is no earlier basis."""


class Layer(Protocol):
    """One weight `[out, ...]` in one batch: its gradient is `errors^T inputs`, summed over the rows."""

    @property
    def weight(self) -> Tensor:
        """The weight; as a matrix it is `weight.flatten(1)`."""

    @property
    def bias(self) -> Tensor | None:
        """The bias that is added beside it, if that is trained."""

    @property
    def examples(self) -> int:
        """How many examples the rows come from."""

    def rows(self) -> tuple[Tensor, Tensor]:
        """Inputs [rows, in] and errors [rows, out] of the cost of each example, not divided by their number."""


def bordered_rows(layer: Layer, with_bias: bool) -> tuple[Tensor, Tensor]:
    """Inputs and errors of a layer; with a column of ones beside the inputs, of which the bias is the weight."""
    inputs, errors = (working(rows.to(layer.weight.dtype)) for rows in layer.rows())
    return (torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1) if with_bias else inputs), errors


def kronecker_moments(inputs: Tensor, errors: Tensor, examples: int, previous: Moments, decay: float) -> Moments:
    """A is the mean over all rows, G the sum over the rows of an example and the mean over examples."""
    return {
        "inputs": _averaged(inputs, inputs, len(inputs), previous.get("inputs"), decay),
        "errors": _averaged(errors, errors, examples, previous.get("errors"), decay),
    }


def kronecker_powers(moments: Moments, damping: float, exponent: float, rank: int | None, previous: Powers) -> Powers:
    """The damped powers of both factors. `previous`: those of earlier moments, to start from."""
    inputs, errors = split_damping(moments["inputs"], moments["errors"], damping)
    return {
        "inputs": power_of(moments["inputs"], inputs, exponent, rank, previous.get("inputs", {})),
        "errors": power_of(moments["errors"], errors, exponent, rank, previous.get("errors", {})),
    }


def kronecker_apply(powers: Powers, matrix: Tensor) -> Tensor:
    """`left @ matrix @ right`: [out, in]."""
    left, right = powers["errors"], powers["inputs"]
    if "matrix" in right:
        matrix = matrix @ right["matrix"]
    else:
        basis = right["basis"]
        matrix = torch.addmm(matrix, (matrix @ basis).mul_(right["weights"]), basis.mT, beta=right["rest"])
    if "matrix" in left:
        return left["matrix"] @ matrix
    basis = left["basis"]
    inner = (basis.mT @ matrix).mul_(left["weights"].unsqueeze(1))
    return torch.addmm(matrix, basis, inner, beta=left["rest"])


def diagonal_moments(inputs: Tensor, errors: Tensor, examples: int, previous: Moments, decay: float) -> Moments:
    """`E[delta^2 h^2]`: one product, as for a gradient."""
    return {"diagonal": _averaged(errors.square(), inputs.square(), examples, previous.get("diagonal"), decay)}


def diagonal_powers(moments: Moments, damping: float, exponent: float, rank: int | None, previous: Powers) -> Powers:
    """Elementwise; there is nothing to truncate."""
    return {"diagonal": (moments["diagonal"] + damping) ** exponent}


def diagonal_apply(powers: Powers, matrix: Tensor) -> Tensor:
    """Elementwise."""
    return powers["diagonal"] * matrix


class Fisher(NamedTuple):
    """An approximation: moments `decay * previous + (1 - decay) * batch`, their powers, and these times a matrix."""

    moments: Callable[[Tensor, Tensor, int, Moments, float], Moments]
    powers: Callable[[Moments, float, float, int | None, Powers], Powers]
    apply: Callable[[Powers, Tensor], Tensor]


KRONECKER = Fisher(kronecker_moments, kronecker_powers, kronecker_apply)
DIAGONAL = Fisher(diagonal_moments, diagonal_powers, diagonal_apply)


def fisher_of(entries: Mapping[str, Any]) -> Fisher:
    """The approximation whose moments or powers these are, by their names."""
    return DIAGONAL if "diagonal" in entries else KRONECKER


def split_damping(inputs: Tensor, errors: Tensor, damping: float) -> tuple[float, float]:
    """`pi sqrt(damping)` for A and `sqrt(damping) / pi` for G; pi = 1 where either vanishes."""
    one, other = float(inputs.diagonal().mean()), float(errors.diagonal().mean())
    pi = math.sqrt(one / other) if min(one, other) > 0 else 1.0
    return pi * math.sqrt(damping), math.sqrt(damping) / pi


def power_of(factor: Tensor, damping: float, exponent: float, rank: int | None, previous: Mapping[str, Any]) -> Powers:
    """`(factor + damping I)^exponent` of a positive semidefinite factor [n, n], truncated if n > 2 rank.

    Either `{"matrix"}` or the parts of `basis diag(weights) basis^T + rest I`.
    """
    if rank is None or len(factor) <= 2 * rank:
        values, vectors = torch.linalg.eigh(factor)
        weights = (values.clamp_min(0) + damping) ** exponent
        return {"matrix": (vectors * weights) @ vectors.mT}
    values, basis = largest(factor, rank, previous.get("basis"))
    mean = max(float(factor.trace() - values.sum()), 0.0) / (len(factor) - rank)
    rest = (mean + damping) ** exponent
    return {"basis": basis, "weights": (values + damping) ** exponent - rest, "rest": rest}


def _averaged(left: Tensor, right: Tensor, count: int, previous: Tensor | None, decay: float) -> Tensor:
    """`decay * previous + (1 - decay) * left^T right / count`, from zero if there is no `previous`."""
    if previous is None:
        previous, weight = left.new_zeros(()), 0.0
    else:
        previous, weight = previous.to(left.dtype), decay
    return torch.addmm(previous, left.mT, right, beta=weight, alpha=(1 - decay) / count)


def largest(factor: Tensor, rank: int, basis: Tensor | None) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues and their vectors, by subspace iteration: one from an earlier `basis`, else a few."""
    iterations = 1
    if basis is None or basis.shape != (len(factor), rank):
        noise = torch.Generator().manual_seed(0)  # the same start every time
        basis = torch.randn(len(factor), rank, generator=noise, dtype=torch.float64)
        iterations = _FIRST_ITERATIONS
    basis = basis.to(factor)
    for _ in range(iterations):
        basis = torch.linalg.qr(factor @ basis).Q
    values, turn = torch.linalg.eigh(basis.mT @ factor @ basis)
    return values.clamp_min(0), basis @ turn


def working(tensor: Tensor) -> Tensor:
    """In float32 at least, the precision that inverses need."""
    return tensor.float() if torch.finfo(tensor.dtype).bits < 32 else tensor


def cast(entries: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Every tensor in a nested dictionary in that dtype."""

    def convert(entry: Any) -> Any:
        if isinstance(entry, dict):
            return cast(entry, dtype)
        return entry.to(dtype) if isinstance(entry, Tensor) else entry

    return {name: convert(entry) for name, entry in entries.items()}
