"""The equation at the output, `x = dC/ds(s_out)`: its residual, and which error x to try next.

Everything here is per example and knows nothing of the network but how its output answered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from mep.cost import BatchCost
from mep.energy import Energy, example_norm
from mep.errors import ArgumentError
from mep.graph import Point
from mep.layout import accurate
from mep.nodes import Strength, spread, weakest
from mep.settle import Known, Solver
from mep.solvers.anderson import mix
from mep.solvers.newton import solved
from mep.solvers.secant import Trial, first_output, hessian_product, solve_output

_EXPANDS = 4.0
"""Mixing still finds the equilibrium of a map that expands by a few; beyond, a smaller beta is cheaper."""


class Answer(NamedTuple):
    """An output error x and the output that answered it; nudges were weakened on the way by `factor`, if it is one."""

    x: Tensor
    output: Tensor
    factor: Tensor | None = None


def require_prediction(solver: Solver, energy: Energy) -> None:
    """Refuse an energy whose equilibrium is not one of errors."""
    if energy.coupling.name != "prediction":
        raise ArgumentError(
            f"{type(solver).__name__} settles the energy 'prediction' only, not {energy.coupling.name!r}: it works "
            "with the errors mu - s. Use solver=mep.Descent(...)."
        )


def wanted_error(energy: Energy, point: Point) -> Tensor:
    """`dC/ds_out` at the point."""
    gradient = energy.cost_gradient(point)
    assert gradient is not None, "the free equilibrium of the prediction energy is the forward walk"
    return gradient


def output_residual(error: Tensor, wanted: Tensor, output: Tensor) -> Tensor:
    """As `relative_residual`, per row; a cost gradient that cannot be told from rounding counts as zero."""
    rows = torch.stack([error - wanted, error, wanted, output])
    violated, one, two, size = torch.linalg.vector_norm(
        rows if rows.ndim == 3 else rows.reshape(*rows.shape[:2], -1), dim=2, dtype=accurate(rows)
    )
    limits = torch.finfo(output.dtype)
    return violated / torch.maximum(torch.maximum(one, two), size.mul_(10 * limits.eps)).add_(limits.tiny)


def expands(question: Tensor, error: Tensor, wanted: Tensor, residual: Tensor) -> bool:
    """Whether the first answer is much larger than the question, for some example: `beta |K|` is too large.

    An example that asks next to nothing may be disturbed by others that it shares statistics with.
    """
    if float(residual.max()) < 1 - 2 / _EXPANDS:  # then |wanted - error| is not so large
        return False
    asked, missed = example_norm(question, len(question)), example_norm(wanted - error, len(error))
    return bool((missed > _EXPANDS * torch.maximum(asked, asked.mean())).any())


def mean_gain(x: Tensor, shift: Tensor, beta: Strength) -> Tensor:
    """The mean of `<x, M x> / <x, x>` over the examples, with weights `<x, x>`; `shift` is `beta M x`."""
    if isinstance(beta, Tensor):
        shift, beta = shift / spread(beta, shift), 1.0
    x = x.flatten()
    return shift.flatten().dot(x) / (beta * x.dot(x))


def first_error(energy: Energy, free: Tensor, wanted: Tensor, known: Known, most: Strength | None = None) -> Tensor:
    """The error to try first: what follows if `-beta gain` times it is the answer, for a nudge toward the target.

    Where that is stronger than `most`, the nudge of most examples will be weakened to it.
    """
    nudge = energy.nudge
    assert nudge is not None
    if known.gain is None or not (_is_compiled(known.gain) or (0 < known.gain < math.inf and is_toward(nudge.beta))):
        return wanted
    k = spread(nudge.beta, free) * known.gain
    if most is not None and nudge.cost.smoothness is not None:
        k = weakest(k, most / nudge.cost.smoothness)
    found = first_output(nudge.cost, free, wanted, k)
    return wanted if found is None else found


def _is_compiled(gain: Strength) -> bool:
    """Whether this is a program for any gain: who calls it has looked at the gain."""
    return isinstance(gain, Tensor)


def is_toward(beta: Strength) -> bool:
    """Whether a nudge is toward the target."""
    return bool((beta > 0).all()) if isinstance(beta, Tensor) else beta > 0


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Entering an autocast context takes as long as a few small operations, so only where there is one to leave."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def rescaled(
    cost: BatchCost, free: Tensor, trial: Trial, residual: Tensor, tol: float
) -> tuple[Trial, Tensor, Tensor] | None:
    """The multiple `a x` of an error, of those above `tol`, that leaves less residual; the network is linear in errors.

    Its answer is then known: `free - a (free - s)`. One step of Gauss and Newton from a = 1 on the square of
    `dC(free - a (free - s)) - a x`.

    Returns:
        The trial, a (`[batch]`, 1 where nothing is gained), and the residual; None where the Hessian is not known, or
        where the dtype is too short for a to be told apart from 1.
    """
    x, output, gradient = trial
    if torch.finfo(free.dtype).bits < 32 or (curvature := cost.curvature(output, gradient)) is None:
        return None
    with no_autocast(free.device):
        shift = free - output
        slope = hessian_product(curvature, shift).add_(x)  # of x - dC, by a
        square = torch.linalg.vecdot(slope, slope).add_(torch.finfo(x.dtype).tiny)
        a = (torch.linalg.vecdot(slope, gradient - x) / square).add_(1).unsqueeze(1)
        scaled = a * x
        moved = torch.addcmul(free, a, shift, value=-1)
    wanted = cost.gradient(moved)
    left = output_residual(scaled, wanted, moved)
    gains = (left < residual) & (residual > tol)
    kept = gains.unsqueeze(1)
    found = [torch.where(kept, new, old) for new, old in zip((scaled, moved, wanted), trial, strict=True)]
    return (found[0], found[1], found[2]), torch.where(gains, a.squeeze(1), 1), torch.where(gains, left, residual)


def solved_error(cost: BatchCost, free: Tensor, k: Tensor, latest: Tensor, tol: float) -> Tensor:
    """The error that solves the equation where the whole gain `k = beta M` is known; `latest`: the last that was tried.

    It is solved ten times as well as `tol` asks, so that the rounding of the network's answer may have the rest.
    """
    with no_autocast(free.device):
        found = solved(cost, free.to(k.dtype), k, latest.to(k.dtype), tol / 10)
    return found.to(free.dtype)


def next_error(cost: BatchCost, free: Tensor, trials: Sequence[Trial], once: bool = False) -> Tensor:
    """The error to try next, from how the last ones were answered (oldest first); `free`: the free output.

    `once`: with one step of Newton's on the cost, which will do where answers are linear in errors.
    """
    dtype = free.dtype
    if torch.finfo(dtype).bits < 32:  # small systems are solved in float32
        free, trials = free.float(), [(x.float(), s.float(), g.float()) for x, s, g in trials]
    with no_autocast(free.device):
        found = solve_output(cost, free, trials, once)
    if found is None:
        *earlier, (x, _, gradient) = trials
        found = mix([(xi, gi) for xi, _, gi in earlier], x, gradient)
    return found.to(dtype)
