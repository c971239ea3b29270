"""How large a step of gradient descent on the states may be: what the curvature of the energy allows.

    v <- momentum v + dF/ds,    s <- s - lr v        converges while  lr * stiffness < 2 (1 + momentum)

(heavy ball: Polyak 1964, https://doi.org/10.1016/0041-5553(64)90137-5). The stiffness is the largest eigenvalue of
`d2F/ds2`. It grows with the weights: while a network learns it may become many times what it was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mep.energy import Energy, State, example_norm
from mep.graph import Point
from mep.layout import per_example

_ITERATIONS = 8
"""They come within a fifth or so, from below."""
_REACH = 0.1
"""How far a difference of forces reaches: far above rounding, and short enough to stay where the energy is smooth."""


def largest_step(energy: Energy, point: Point, momentum: float) -> float:
    """The step from which on descent does not converge near this point, for the stiffest example."""
    return 2 * (1 + momentum) / float(stiffness(energy, point).max())


def stiffness(energy: Energy, point: Point) -> Tensor:
    """The largest eigenvalue of every example's `d2F/ds2`, by power iteration on differences of forces: [batch].

    Generators of random numbers are left alone.
    """
    state, rest = energy.state(point), energy.forces(point)
    source = {device: torch.Generator(device).manual_seed(0) for device in {s.device for s in state.values()}}
    image = {name: torch.empty_like(s).normal_(generator=source[s.device]) for name, s in state.items()}
    size = _norm(image, energy.batch)
    for _ in range(_ITERATIONS):
        pace = _REACH / size.clamp(min=torch.finfo(size.dtype).tiny)
        there = energy.at({name: s + image[name] * per_example(pace, s) for name, s in state.items()})
        image = {name: force - rest[name] for name, force in energy.forces(there).items()}
        size = _norm(image, energy.batch)
    return size / _REACH


def _norm(state: State, batch: int) -> Tensor:
    return torch.stack([example_norm(s, batch) for s in state.values()]).norm(dim=0)
