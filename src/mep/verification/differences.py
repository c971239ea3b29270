"""Finite differences of the mean cost on sampled coordinates: an oracle without autograd and without equilibrium.

dC/dtheta_i ~ (C(theta + h e_i) - C(theta - h e_i)) / 2h        h = eps^(1/3) (1 + |theta_i|)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mep.estimators.estimate import Gradients
from mep.verification.subject import Case

CLOSE = 1e-3
"""Relative distance at which differences and a gradient agree: far above what the step h costs on smooth functions."""
_SCALES = (1.0, 1 / 16, 1 / 256)


@dataclass(frozen=True)
class Difference:
    """The distance of both gradients from finite differences, relative; None where these are too coarse to tell."""

    backprop: float | None
    ep: float | None


def differences(subject: Case, backprop: Gradients, ep: Gradients, samples: int) -> dict[nn.Parameter, Difference]:
    """For every parameter, on the coordinate with the largest gradient and on random ones, `samples` in all."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for p, b in backprop.items():
        drawn = torch.randperm(p.numel(), generator=generator)[: samples - 1].tolist()
        chosen = list(dict.fromkeys([int(b.abs().argmax()), *drawn]))
        g = ep.get(p, torch.zeros_like(b))
        found[p] = _compare(subject, p, chosen, *(_pick(gradient, chosen) for gradient in (b, g)))
    return found


def _compare(subject: Case, p: nn.Parameter, chosen: list[int], b: Tensor, g: Tensor) -> Difference:
    """With finer steps where the usual one disagrees: the fewer kinks lie within reach, the smaller what they spoil."""
    tried: list[tuple[float, Difference]] = []
    for scale in _SCALES:
        slopes, noise = _slopes(subject, p, chosen, scale)
        size = max(float(b.norm()), float(slopes.norm()))
        if size * CLOSE <= noise:
            break
        far = float((slopes - b).norm()) / size
        tried.append((far, Difference(far, float((slopes - g).norm()) / size)))
        if far <= CLOSE / 10:
            break
    return min(tried, key=lambda pair: pair[0])[1] if tried else Difference(None, None)


def _slopes(subject: Case, p: nn.Parameter, chosen: list[int], scale: float) -> tuple[Tensor, float]:
    """Central differences, and what rounding may contribute to them."""
    eps, largest, noise = torch.finfo(p.dtype).eps, 1.0, 0.0
    slopes = []
    for place in chosen:
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), p.shape))
        value = float(p.detach()[index])
        h = scale * eps ** (1 / 3) * (1 + abs(value))
        costs, places = [], []
        for shifted in (value + h, value - h):
            _put(p, index, shifted)
            places.append(float(p.detach()[index]))
            costs.append(subject.mean_cost())
        _put(p, index, value)
        largest = max(largest, *map(abs, costs))
        slopes.append((costs[0] - costs[1]) / (places[0] - places[1]))
        noise = max(noise, 10 * eps * largest / h)
    return torch.tensor(slopes, dtype=torch.float64), noise * math.sqrt(len(chosen))


@torch.no_grad()
def _put(p: nn.Parameter, index: tuple[int, ...], value: float) -> None:
    p[index] = value


def _pick(gradient: Tensor, chosen: list[int]) -> Tensor:
    return gradient.detach().flatten()[chosen].double().cpu()
