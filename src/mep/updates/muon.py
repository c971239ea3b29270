"""Muon: momentum whose matrices are orthogonalised, so that every direction moves at the same speed.

    B <- momentum B + g                              momentum buffer
    D  = g + momentum B   if nesterov   else B       direction
    W <- (1 - lr weight_decay) W - lr scale(W) O     matrices: O = U V^T, where D = U diag(sigma) V^T
    b <- (1 - lr' weight_decay) b - lr' D            the rest: plain SGD with lr' = lr vector_scale

Under the spectral norm O is the direction of steepest descent. Weights of convolutions count as matrices `[out, rest]`;
biases and gains have no spectrum, so they take the SGD step with the same momentum.

References: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; scale `"rms"`: Liu et al. 2025, "Muon is
Scalable for LLM Training", https://arxiv.org/abs/2502.16982. It is not `torch.optim.Muon`, which takes matrices only,
averages its momentum, and orthogonalises by five Newton-Schulz steps in bfloat16 on every device.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mep.errors import one_of, require
from mep.updates.base import Update, scale_
from mep.updates.orthogonal import check_method, largest_singular_value, orthogonalise

SCALES: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "rms": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "none": lambda rows, columns: 1.0,
}


def orthogonal_directions(matrices: Sequence[Tensor], method: str = "auto", steps: int | None = None) -> list[Tensor]:
    """The orthogonalised `matrices`, each `[out, ...]` read as `[out, rest]`; equal shapes share one call."""
    alike = defaultdict(list)
    for index, matrix in enumerate(matrices):
        alike[matrix.shape, matrix.dtype, matrix.device].append(index)
    result = list(matrices)
    for (shape, _, _), indices in alike.items():
        flat = [matrices[index].flatten(1) for index in indices]
        if len(flat) == 1:
            polar_factors = [orthogonalise(flat[0], method, steps)]
        else:
            polar_factors = list(orthogonalise(torch.stack(flat), method, steps).unbind())
        for index, one in zip(indices, polar_factors, strict=True):
            result[index] = one.reshape(shape)
    return result


def muon_step_(matrices: list[Tensor], directions: list[Tensor], group: dict[str, Any]) -> list[float]:
    """Decay the `matrices` and move them along the orthogonalised `directions`, with the keywords of `group`.

    Returns:
        An upper bound on the spectral norm of each move, the decay apart.
    """
    lr = float(group["lr"])
    polar_factors = orthogonal_directions(directions, group["method"], group["steps"])
    scale_(matrices, 1 - lr * group["weight_decay"])
    sizes = [lr * SCALES[group["scale"]](p.shape[0], p.numel() // p.shape[0]) for p in matrices]
    for p, direction, size in zip(matrices, polar_factors, sizes, strict=True):
        p.add_(direction, alpha=-size)
    return [size * largest_singular_value(group["steps"]) for size in sizes]


def vector_step_(vectors: list[Tensor], directions: list[Tensor], group: dict[str, Any]) -> None:
    """Decay the `vectors` and move them along the `directions`, with the keywords of `group`."""
    lr = float(group["lr"]) * group["vector_scale"]
    scale_(vectors, 1 - lr * group["weight_decay"])
    torch._foreach_add_(vectors, directions, alpha=-lr)


def check_muon_step(group: dict[str, Any], call: str) -> None:
    """Raise an ArgumentError that names `call` unless `muon_step_` accepts the scale and the method of `group`."""
    require(call, "scale", group["scale"], *one_of(SCALES))
    check_method(group["method"], group["steps"], call)


class Muon(Update):
    """Momentum with the nearest orthogonal matrix as the step; plain SGD with momentum for biases and gains.

    The state is `momentum_buffer`, and for a matrix `update_norm_sum`, see `spectral_bound`. Every keyword may differ
    between parameter groups.

    Args:
        params: parameters or parameter groups. Those with `ndim >= 2` are matrices `[out, rest]`.
        lr: spectral norm of each matrix update, before the factor of its shape.
        momentum: decay of the momentum buffer in [0, 1); 0 keeps no buffer.
        nesterov: look one step ahead along the momentum.
        weight_decay: decoupled: each step first shrinks the parameters by `1 - lr * weight_decay`.
        method: how to orthogonalise, see `orthogonalise`.
        steps: number of steps of an iterative `method`; None for its default.
        scale: factor of the shape: `"spectral"` is `max(1, rows / columns) ** 0.5` (Jordan et al.), `"rms"` is
            `0.2 * max(rows, columns) ** 0.5` (the learning rate and weight decay of AdamW carry over), `"none"` is 1.
        vector_scale: learning rate of biases and gains in units of `lr`, so that a schedule drives both.

    Raises:
        ArgumentError: a keyword out of its range; in `step`, a sparse or complex gradient.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2, 3))
        >>> weight.grad = torch.tensor([[5.0, 0.0, 0.0], [0.0, 0.0, 0.1]])
        >>> Muon([weight], lr=0.5).step()
        >>> torch.allclose(weight, torch.tensor([[-0.5, 0.0, 0.0], [0.0, 0.0, -0.5]]))
        True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
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
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "method": method,
            "steps": steps,
            "scale": scale,
            "vector_scale": vector_scale,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any], call: str) -> None:
        check_muon_step(group, call)

    def _step_group_(self, group: dict[str, Any], params: list[Tensor]) -> None:
        matrices = [p for p in params if p.ndim >= 2]
        vectors = [p for p in params if p.ndim < 2]
        if matrices:
            self._add_update_norm(matrices, muon_step_(matrices, self._directions(group, matrices), group))
        if vectors:
            vector_step_(vectors, self._directions(group, vectors), group)
