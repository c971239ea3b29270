"""The EP gradient beside backprop's: direction, size, and the order in beta at which the error vanishes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mep.estimators import Estimate
from mep.estimators.estimate import Gradients
from mep.verification.report import GradientMatch
from mep.verification.subject import Case

ORDERS = {"one-sided": 1, "centered": 2}
"""Of accuracy in beta; see `mep.estimators.contrast`."""
FITTED = 3
"""The smallest betas, to which the order is fitted: it is a limit."""


class Run(NamedTuple):
    """One EP gradient, and how its equilibria settled."""

    gradients: Gradients
    estimate: Estimate


@dataclass(frozen=True)
class Reference:
    """Backprop's gradients, and for each the error below which another cannot be told from it."""

    gradients: Gradients
    rounding: dict[nn.Parameter, float]

    @classmethod
    def of(cls, subject: Case) -> Reference:
        """By backprop. A gradient that vanishes, as that of a bias before BatchNorm, is known by its neighbours' size.

        Settling leaves a relative error of some `tol` in the signal of a module, autograd one of some eps of the whole.
        """
        found = subject.backprop()
        norms = {p: float(g.norm()) for p, g in found.items()}
        whole = math.hypot(*norms.values())
        modules: dict[str, float] = {}
        for p, norm in norms.items():
            home = subject.names[p].rpartition(".")[0]
            modules[home] = max(norm, modules.get(home, 0.0))
        rounding = {}
        for p, g in found.items():
            settling = 100 * subject.how.solver.tol * modules[subject.names[p].rpartition(".")[0]]
            rounding[p] = settling + 1000 * torch.finfo(g.dtype).eps * whole + torch.finfo(g.dtype).tiny
        return cls(found, rounding)

    def match(self, p: nn.Parameter, run: Run) -> GradientMatch:
        """One parameter's gradient beside this one."""
        b = self.gradients[p]
        g = run.gradients.get(p, torch.zeros_like(b))
        norm, floor = float(b.norm()), self.rounding[p]
        error = float((g - b).norm()) / max(norm, floor)
        if norm <= floor:
            return GradientMatch(run.estimate.beta, None, None, error)
        return GradientMatch(run.estimate.beta, cosine(g, b), float(g.norm()) / norm, error)

    def floor(self, p: nn.Parameter) -> float:
        """The rounding in the units of `Match.error`."""
        return self.rounding[p] / max(float(self.gradients[p].norm()), self.rounding[p])

    def error(self, run: Run) -> float:
        """`|g - b| / |b|` over all parameters."""
        pairs = [(run.gradients.get(p, torch.zeros_like(b)), b) for p, b in self.gradients.items()]
        wrong = math.hypot(*(float((g - b).norm()) for g, b in pairs))
        return wrong / max(math.hypot(*(float(b.norm()) for _, b in pairs)), torch.finfo(pairs[0][1].dtype).tiny)


def cosine(a: Tensor, b: Tensor) -> float:
    """`<a, b> / |a| |b|`; 0 where one of the two vanishes."""
    scale = float(a.norm()) * float(b.norm())
    return float((a * b).sum()) / scale if scale else 0.0


def fitted_order(betas: Sequence[float], errors: Sequence[float], floor: float) -> float | None:
    """The slope of log error over log beta, by least squares over the smallest betas whose error exceeds `floor`.

    Example:
        >>> betas = [0.1, 0.03, 0.01]
        >>> round(fitted_order(betas, [7 * beta**2 for beta in betas], floor=1e-9), 6)
        2.0
    """
    pairs = sorted(
        (math.log(beta), math.log(error)) for beta, error in zip(betas, errors, strict=True) if error > floor
    )
    pairs = pairs[:FITTED]
    if len({x for x, _ in pairs}) < 2:
        return None
    x_mean, y_mean = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    return sum((x - x_mean) * (y - y_mean) for x, y in pairs) / sum((x - x_mean) ** 2 for x, _ in pairs)
