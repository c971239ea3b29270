"""What the updates share: momentum buffers, checked groups, and a step that moves all parameters or refuses before any.

B <- momentum B + g                              momentum buffer
D  = g + momentum B   if nesterov   else B       direction, which `Update._step_group_` turns into a step
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mep.errors import A_FLAG, ArgumentError, require


def scale_(tensors: list[Tensor], factor: float) -> None:
    """Multiply each of the `tensors` by `factor`."""
    # One by one: on the CPU `_foreach_mul_` rounds the factor to the dtype, so that 0.999 would be 1 in bfloat16.
    if factor != 1:
        for tensor in tensors:
            tensor.mul_(factor)


def accumulate_(buffers: list[Tensor], grads: list[Tensor], momentum: float, nesterov: bool) -> list[Tensor]:
    """Update the momentum `buffers`, and return the directions: the buffers themselves, or new tensors."""
    if any(g.dtype is torch.float16 for g in grads):
        return _accumulate_in_half_(buffers, grads, momentum, nesterov)
    scale_(buffers, momentum)
    torch._foreach_add_(buffers, grads)
    return list(torch._foreach_add(grads, buffers, alpha=momentum)) if nesterov else buffers


def _accumulate_in_half_(buffers: list[Tensor], grads: list[Tensor], momentum: float, nesterov: bool) -> list[Tensor]:
    """The same in float32, clamped to the largest number of float16, which sums may exceed."""
    directions = []
    for buffer, g in zip(buffers, grads, strict=True):
        largest = torch.finfo(buffer.dtype).max
        total = (momentum * buffer.float() + g.float()).clamp_(-largest, largest)
        buffer.copy_(total)
        direction = (g.float() + momentum * total).clamp_(-largest, largest) if nesterov else total
        directions.append(direction.to(g.dtype))
    return directions


class Update(torch.optim.Optimizer, ABC):
    """An optimizer with the keywords `lr`, `momentum`, `nesterov`, `weight_decay` and `vector_scale` in every group."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        call = type(self).__name__
        group = {**self.defaults, **param_group}
        if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
            raise ArgumentError(f"{call}(lr=...) must hold one number; got shape {list(group['lr'].shape)}.")
        limits = {"lr": math.inf, "momentum": 1.0, "weight_decay": math.inf, "vector_scale": math.inf}
        for name, limit in limits.items():
            in_range = lambda value, limit=limit: 0 <= value < limit  # noqa: E731
            require(call, name, group[name], in_range, f"at least 0 and below {limit}")
        require(call, "nesterov", group["nesterov"], *A_FLAG)
        self._check_group(group, call)
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
            _check_grads(params, type(self).__name__)
        for group, params in zip(self.param_groups, moving, strict=True):
            if params:
                self._step_group_(group, params)
        return loss

    @abstractmethod
    def _check_group(self, group: dict[str, Any], call: str) -> None:
        """Raise an ArgumentError that names `call` unless the keywords that `Update` does not check are in range."""

    @abstractmethod
    def _step_group_(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Move those `params` of `group` that have a gradient; there are some."""

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

    def _add_update_norm(self, matrices: list[Tensor], norms: list[float]) -> None:
        """Add the spectral `norms` of the last moves, decay apart, to `update_norm_sum`; see `spectral_bound`."""
        for p, norm in zip(matrices, norms, strict=True):
            if torch.finfo(p.dtype).bits >= 32:  # in half precision rounding may move a weight further
                state = self.state[p]
                state["update_norm_sum"] = state.get("update_norm_sum", 0.0) + norm


def _check_grads(params: list[Tensor], call: str) -> None:
    for p in params:
        grad = p.grad
        if grad is not None and (grad.layout != torch.strided or grad.is_complex()):
            kind = "sparse" if grad.layout != torch.strided else "complex"
            raise ArgumentError(
                f"{call}.step: the gradient of a parameter of shape {list(p.shape)} is {kind}, but only real dense "
                f"gradients can be orthogonalised. Give this parameter to another optimizer."
            )
