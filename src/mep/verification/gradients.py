"""Three gradients of one case: by equilibrium propagation, by backprop, and by finite differences of the mean cost.

    EP against backprop     cosine, norm ratio, and the order in beta at which the error vanishes
    finite differences      dC/dtheta_i ~ (C(theta + h e_i) - C(theta - h e_i)) / 2h,   h = eps^(1/3) (1 + |theta_i|)

The differences are taken on sampled coordinates. They use no derivative of the cost and no nudge, so they check both.
Where the free equilibrium is no forward pass, backprop is recurrent backpropagation (`mep.verification.recurrent`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mep.capture.sides import loss_of
from mep.errors import ArgumentError
from mep.estimators import Backprop, Estimate
from mep.verification.case import Case
from mep.verification.report import CLOSE, GradientMatch

FITTED = 3
"""The order is fitted to this many of the smallest betas: it is a limit."""
_STEPS = (1.0, 1 / 16, 1 / 256)
"""Times h: finer steps where the usual one disagrees. The fewer kinks lie within a step, the less they change."""

Gradients = dict[nn.Parameter, Tensor]


class Run(NamedTuple):
    """One EP gradient, and how its equilibria settled."""

    gradients: Gradients
    estimate: Estimate


class Difference(NamedTuple):
    """Relative distance of both gradients from finite differences; None where these are too coarse to judge."""

    backprop: float | None = None
    ep: float | None = None


def run_ep(case: Case, phases: str, beta: float | None) -> Run:
    """The EP gradient, as a training step would have it."""
    ep = case.estimator(phases, beta)
    case.restore()
    return Run(*ep.gradients(case.x, case.target))


def run_backprop(case: Case) -> Gradients:
    """The gradient by autograd through the model itself."""
    case.restore()
    return Backprop(case.model, case.config.whole_cost).gradients(case.fresh_input(), case.target)[0]


@torch.no_grad()
def mean_cost(case: Case) -> float:
    """The mean cost of a forward pass with the parameters as they are now."""
    case.restore()
    return float(loss_of(case.model, case.config.whole_cost, case.fresh_input(), case.target))


def try_out(case: Case) -> None:
    """Run the model once, and raise an ArgumentError where it fails in this precision."""
    try:
        mean_cost(case)
    except RuntimeError as error:
        if case.dtype is None:
            raise
        raise ArgumentError(
            f"verify(dtype={case.dtype}): the model or its cost fails on this batch: {error}. If the precision is "
            "why, dtype=None checks them as they are, as far as their rounding allows."
        ) from error


@dataclass(frozen=True)
class Reference:
    """Backprop's gradients, and for each the size of errors that may be rounding."""

    gradients: Gradients
    rounding: dict[nn.Parameter, float]

    @classmethod
    def of(cls, case: Case, found: Gradients) -> Reference:
        """With `rounding = 100 tol |module's largest gradient| + 1000 eps |whole gradient|`.

        Settling leaves a relative error of about `tol` in the signal of a module, autograd about eps of the whole. So a
        gradient that vanishes, as that of a bias before BatchNorm, is judged by the size of its neighbours.
        """
        norms = {p: float(g.norm()) for p, g in found.items()}
        whole = math.hypot(*norms.values())
        homes = {p: case.names[p].rpartition(".")[0] for p in found}
        modules: dict[str, float] = {}
        for p, norm in norms.items():
            modules[homes[p]] = max(norm, modules.get(homes[p], 0.0))
        rounding = {}
        for p, g in found.items():
            info = torch.finfo(g.dtype)
            rounding[p] = 100 * case.config.solver.tol * modules[homes[p]] + 1000 * info.eps * whole + info.tiny
        return cls(found, rounding)

    def match(self, p: nn.Parameter, run: Run) -> GradientMatch:
        """One parameter's EP gradient beside backprop's."""
        b = self.gradients[p]
        g = run.gradients.get(p, torch.zeros_like(b))
        norm, rounding = float(b.norm()), self.rounding[p]
        error = float((g - b).norm()) / max(norm, rounding)
        if norm <= rounding:
            return GradientMatch(run.estimate.beta, None, None, error)
        return GradientMatch(run.estimate.beta, cosine(g, b), float(g.norm()) / norm, error)

    def floor(self, p: nn.Parameter) -> float:
        """The rounding in the units of `GradientMatch.error`."""
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


def differences(
    case: Case, cost: Callable[[], float], backprop: Gradients, ep: Gradients, samples: int
) -> dict[nn.Parameter, Difference]:
    """For every parameter, on the coordinate with the largest gradient and on random ones, `samples` in all.

    `cost` computes the mean cost with the parameters as they are now.
    """
    generator = torch.Generator().manual_seed(0)
    found = {}
    for p, b in backprop.items():
        drawn = torch.randperm(p.numel(), generator=generator)[: samples - 1].tolist()
        chosen = list(dict.fromkeys([int(b.abs().argmax()), *drawn]))
        g = ep.get(p, torch.zeros_like(b))
        found[p] = _difference(cost, p, chosen, *(t.detach().flatten()[chosen].double().cpu() for t in (b, g)))
    return found


def _difference(cost: Callable[[], float], p: nn.Parameter, chosen: list[int], b: Tensor, g: Tensor) -> Difference:
    """With the step at which the differences are nearest to backprop, of those that rounding allows."""
    tried: list[Difference] = []
    distances: list[float] = []
    for step in _STEPS:
        slopes, noise = _slopes(cost, p, chosen, step)
        size = max(float(b.norm()), float(slopes.norm()))
        if size * CLOSE <= noise:
            break
        distances.append(float((slopes - b).norm()) / size)
        tried.append(Difference(distances[-1], float((slopes - g).norm()) / size))
        if distances[-1] <= CLOSE / 10:
            break
    return tried[distances.index(min(distances))] if tried else Difference()


@torch.no_grad()
def _slopes(cost: Callable[[], float], p: nn.Parameter, chosen: list[int], step: float) -> tuple[Tensor, float]:
    """Central differences at the chosen coordinates, and what rounding may contribute to their norm."""
    eps, largest, noise = torch.finfo(p.dtype).eps, 1.0, 0.0
    slopes = []
    for place in chosen:
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), p.shape))
        value = float(p[index])
        h = step * eps ** (1 / 3) * (1 + abs(value))
        costs, places = [], []
        for shifted in (value + h, value - h):
            p[index] = shifted
            places.append(float(p[index]))  # as rounded
            costs.append(cost())
        p[index] = value
        largest = max(largest, *map(abs, costs))
        slopes.append((costs[0] - costs[1]) / (places[0] - places[1]))
        noise = max(noise, 10 * eps * largest / h)
    return torch.tensor(slopes, dtype=torch.float64), noise * math.sqrt(len(chosen))
