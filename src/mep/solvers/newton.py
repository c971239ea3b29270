"""The equation at the output, `x = dC(free - k x)`, where the whole gain `k = beta M` of every example is known.

M is symmetric and positive semidefinite. So for a convex cost and a nudge toward the target there is one and only one
solution, however strong the nudge: the equation says where `f(x) = C(free - k x) + 1/2 <x, k x>`, which is convex, does
not change. (In other words: the output is a proximal point, that which minimises C plus half the square of its distance
from the free one in the metric of `1/k`.) Newton's equation

    (I + H k) step = r,      r = dC(free - k x) - x,      H the Hessian of the cost

is never singular, since no product of two such matrices has a negative eigenvalue, and its steps lead downhill,
`f' step = -<r, k step> <= 0`. Where they are too long they are halved (Boyd and Vandenberghe 2004, section 9.5). With a
nudge away from the target f is not convex; then the steps shall lower |r|. The network is not asked for any of this.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mep.cost import BatchCost, Curvature
from mep.solvers.secant import products

_STEPS = 100
_SHORTEST = 1e-6
_ARMIJO = 0.1
"""A step shall achieve this fraction of what it promises."""


def solved(cost: BatchCost, free: Tensor, k: Tensor, x: Tensor, tol: float) -> Tensor:
    """The solution, from x or zero on, as near as `|r| <= tol |x|` or as steps lead.

    Shapes: `free` and x `[batch, units]`, k `[batch, units, units]`.
    """
    toward = k.diagonal(dim1=1, dim2=2).sum(1) >= 0
    at, rest, a = _Look.of(cost, free, k, x), _Look.of(cost, free, k, torch.zeros_like(x)), torch.ones_like(x[:, 0])
    at = at.where_not(toward & (rest.f < at.f), rest)
    for _ in range(_STEPS):
        if bool(((at.size <= tol * torch.linalg.vector_norm(at.x, dim=1)) | (a < _SHORTEST)).all()):
            break
        tried = _Look.of(cost, free, k, torch.addcmul(at.x, a.unsqueeze(1), at.step))
        good = torch.where(toward, at.falls_to(tried, a), tried.size <= (1 - _ARMIJO * a) * at.size)
        at, a = at.where_not(good, tried), torch.where(good, 1, a / 2)
    return at.x


@dataclass(frozen=True)
class _Look:
    """What there is to see at x: f, the residual r and its norm, and Newton's step, with its slope of f."""

    x: Tensor
    f: Tensor
    r: Tensor
    size: Tensor
    step: Tensor
    slope: Tensor

    @classmethod
    def of(cls, cost: BatchCost, free: Tensor, k: Tensor, x: Tensor) -> _Look:
        shift = products(k, x)
        output = free - shift
        gradient = cost.gradient(output)
        curvature = cost.curvature(output, gradient)
        assert curvature is not None, "only costs that tell their Hessian"
        r = gradient - x
        step = torch.linalg.solve_ex(_system(curvature, k), r.unsqueeze(2))[0].squeeze(2)
        f = cost.value(output) + torch.linalg.vecdot(x, shift) / 2
        return cls(x, f, r, torch.linalg.vector_norm(r, dim=1), step, -torch.linalg.vecdot(r, products(k, step)))

    def falls_to(self, tried: _Look, a: Tensor) -> Tensor:
        """Whether f falls by enough with `a` times the step, as far as rounding lets one see."""
        rounding = 10 * torch.finfo(self.f.dtype).eps * (1 + self.f.abs())
        return tried.f <= self.f + _ARMIJO * a * self.slope + rounding

    def where_not(self, good: Tensor, tried: _Look) -> _Look:
        """This one, with what was tried where that is good."""
        if bool(good.all()):
            return tried
        column = good.unsqueeze(1)
        pairs = ((getattr(tried, name), getattr(self, name)) for name in self.__dataclass_fields__)
        return _Look(*(torch.where(good if new.ndim == 1 else column, new, old) for new, old in pairs))


def _system(curvature: Curvature, k: Tensor) -> Tensor:
    """`I + H k` with `H = diag(d) - p p^T`."""
    d, p = curvature
    product = d.unsqueeze(2) * k
    if p is not None:
        product.sub_(p.unsqueeze(2) * (p.unsqueeze(1) @ k))
    product.diagonal(dim1=1, dim2=2).add_(1)
    return product
