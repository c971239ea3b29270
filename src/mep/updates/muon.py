"""Muon: momentum whose matrices are orthogonalised, so that every direction moves at the same speed.

    B <- momentum B + g                              momentum buffer
    D  = g + momentum B   if nesterov   else B       direction
    W <- (1 - lr weight_decay) W - lr scale(W) O     matrices: O = U V^T, where D = U diag(sigma) V^T
    b <- (1 - lr' weight_decay) b - lr' D            the rest: plain SGD with lr' = lr vector_scale

Under the spectral norm O is the direction of steepest descent. Weights of convolutions count as matrices `[out, rest]`;
biases and gains have no spectrum, so they take the SGD step with the same momentum.

References: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; scale `"rms"`: Liu et al. 2025, "Muon is
Scalable for LLM Training", https://arxiv.org/abs/2502.16982. It is not `torch.optim.Muon`, which takes matrices only,
averages its momentum, and orthogonalises in bfloat16 on every device.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mep.errors import ArgumentError
from mep.updates.orthogonal import check_method, orthogonalise

SCALES: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "rms": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "none": lambda rows, columns: 1.0,
}


def accumulate_(buffers: list[Tensor], grads: list[Tensor], momentum: float, nesterov: bool) -> list[Tensor]:
    """Let the momentum `buffers` decay and add `grads`; return the directions, which may be the buffers themselves."""
    _scale_(buffers, momentum)
    torch._foreach_add_(buffers, grads)
    return list(torch._foreach_add(grads, buffers, alpha=momentum)) if nesterov else buffers


def orthogonal_directions(matrices: Sequence[Tensor], method: str = "auto", steps: int | None = None) -> list[Tensor]:
    """The orthogonalised `matrices`, each `[out, ...]` read as `[out, rest]`; equal shapes share one call."""
    alike = defaultdict(list)
    for index, matrix in enumerate(matrices):
        alike[matrix.shape, matrix.dtype, matrix.device].append(index)
    result = list(matrices)
    for (shape, _, _), indices in alike.items():
        flat = [matrices[index].flatten(1) for index in indices]
        if len(flat) == 1:
            turned = [orthogonalise(flat[0], method, steps)]
        else:
            turned = list(orthogonalise(torch.stack(flat), method, steps).unbind())
        for index, one in zip(indices, turned, strict=True):
            result[index] = one.reshape(shape)
    return result


class Muon(torch.optim.Optimizer):
    """Momentum with the nearest orthogonal matrix as the step; plain SGD with momentum for biases and gains.

    The only state is `momentum_buffer`. Every keyword may differ between parameter groups.

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
            if params:
                self._step_group_(group, params)
        return loss

    def _step_group_(self, group: dict[str, Any], params: list[Tensor]) -> None:
        matrices = [p for p in params if p.ndim >= 2]
        vectors = [p for p in params if p.ndim < 2]
        params = matrices + vectors
        directions = [p.grad for p in params if p.grad is not None]
        if group["momentum"] > 0:
            buffers = [self._momentum_buffer(p) for p in params]
            directions = accumulate_(buffers, directions, group["momentum"], group["nesterov"])

        lr = float(group["lr"])
        if matrices:
            if group["weight_decay"] > 0:
                _scale_(matrices, 1 - lr * group["weight_decay"])
            scale = SCALES[group["scale"]]
            turned = orthogonal_directions(directions[: len(matrices)], group["method"], group["steps"])
            for p, direction in zip(matrices, turned, strict=True):
                rows = p.shape[0]
                p.add_(direction, alpha=-lr * scale(rows, p.numel() // rows))
        if vectors:
            lr *= group["vector_scale"]
            if group["weight_decay"] > 0:
                _scale_(vectors, 1 - lr * group["weight_decay"])
            torch._foreach_add_(vectors, directions[len(matrices) :], alpha=-lr)

    def _momentum_buffer(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state["momentum_buffer"]


def _scale_(tensors: list[Tensor], factor: float) -> None:
    # One by one: on the CPU `_foreach_mul_` rounds the factor to the dtype, so that 0.999 would be 1 in bfloat16.
    for tensor in tensors:
        tensor.mul_(factor)


def _check_group(group: dict[str, Any]) -> None:
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ArgumentError(f"Muon(lr=...) must hold one number; got shape {list(group['lr'].shape)}.")
    limits = {"lr": math.inf, "momentum": 1.0, "weight_decay": math.inf, "vector_scale": math.inf}
    for name, limit in limits.items():
        if not 0 <= group[name] < limit:
            raise ArgumentError(f"Muon({name}={group[name]!r}) must be at least 0 and below {limit}.")
    if group["scale"] not in SCALES:
        raise ArgumentError(f"Muon(scale={group['scale']!r}): choose one of {list(SCALES)}.")
    check_method(group["method"], group["steps"], call="Muon")


def _check_grads(params: Sequence[Tensor]) -> None:
    for p in params:
        grad = p.grad
        if grad is not None and (grad.layout != torch.strided or grad.is_complex()):
            kind = "sparse" if grad.layout != torch.strided else "complex"
            raise ArgumentError(
                f"Muon.step: the gradient of a parameter of shape {list(p.shape)} is {kind}, but only real dense "
                f"gradients can be orthogonalised. Give this parameter to another optimizer."
            )
