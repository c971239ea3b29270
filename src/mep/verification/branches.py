"""Held branches beside exact ones: where the two equilibria of one energy differ, and by how much.

Both are sought for the states of `trace_kinks`, from the same free equilibrium. With the branches held the energy is
smooth; where no unit is pushed over its kink the two are one and the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mep.capture import Leaves
from mep.energy import Energy
from mep.errors import ArgumentError
from mep.estimators.checks import check_model, checked_batch
from mep.estimators.contrast import contrast
from mep.estimators.estimate import finished
from mep.graph import Graph, Point
from mep.graph.closed_forms import Kink, Largest
from mep.guards import generators_kept
from mep.settle import Result, Settled, settle
from mep.solvers import Sweep
from mep.verification.gradients import cosine
from mep.verification.subject import Case, Config, CostArgument


@dataclass(frozen=True)
class Branching:
    """Both equilibria at one beta.

    Attributes:
        beta: the nudging strength.
        settled: whether (held, exact) reached the tolerance; if not, what follows compares where they stopped.
        sweeps: of (held, exact).
        beyond: the fraction of units at kinks that are on another branch than in the free equilibrium, (held, exact).
        resting: the fraction that rests exactly on a kink or tie, at the exact equilibrium.
        distance: `|s_held - s_exact| / |s_exact - s_free|` over all states.
        cosine: between the two estimates of the gradient (one-sided contrast).
        difference: `|g_held - g_exact| / |g_exact|`.
        error: `|g - b| / |b|` against backprop's gradient b, of (held, exact).
    """

    beta: float
    settled: tuple[bool, bool]
    sweeps: tuple[int, int]
    beyond: tuple[float, float]
    resting: float
    distance: float
    cosine: float
    difference: float
    error: tuple[float, float]


def compare_branches(
    model: nn.Module,
    x: Any,
    y: Tensor,
    *,
    cost: CostArgument = "cross_entropy",
    betas: Sequence[float] = (0.5, 0.1, 0.01, 0.001),
    leaves: Leaves = (),
    tol: float = 1e-6,
    settle_steps: int = 200,
    dtype: torch.dtype | None = torch.float64,
) -> tuple[Branching, ...]:
    """Settle with branches held and exact, at every beta as it is given, and compare states and gradients.

    Args:
        model: in the mode, train or eval, in which it is to be studied. Nothing of it is changed.
        x: the input, [batch, ...]; a tuple or dict for several.
        y: what the cost expects.
        cost: as for `mep.EquilibriumPropagation`, as are `leaves`.
        betas: nudging strengths.
        leaves: modules to keep whole.
        tol: the residual to settle to.
        settle_steps: the largest number of sweeps.
        dtype: of the copy of the model and the batch; None takes them as they are.

    Raises:
        TraceError: the model has kinks without a rule, or cannot be traced.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> strong, weak = compare_branches(net, torch.randn(9, 4), torch.arange(9) % 3, betas=(1.0, 1e-4))
        >>> strong.distance > weak.distance, weak.cosine > 0.999
        (True, True)
    """
    if not betas or not all(isinstance(b, (int, float)) and 0 < b < math.inf for b in betas):
        raise ArgumentError(f"compare_branches(betas={betas!r}): must be positive numbers, one at least.")
    check_model(model, "compare_branches")
    checked_batch(x, y)
    with generators_kept():
        solver = Sweep(settle_steps=settle_steps, tol=tol)
        subject = Case(model, x, y, Config(cost, solver, "exact", leaves), dtype)
        subject.try_out()
        study = _Study(subject)
        return tuple(study.at(float(beta)) for beta in betas)


class _Study:
    """One batch, with its free equilibrium and backprop's gradient."""

    def __init__(self, subject: Case):
        self.subject = subject
        self.parameters, backprop = zip(*subject.backprop().items(), strict=True)
        self.backprop = _flat(backprop)
        self.energies = [subject.energy(freeze_branches=hold) for hold in (True, False)]

    @torch.no_grad()
    def at(self, beta: float) -> Branching:
        """Both equilibria at this beta."""
        (context, g_held), (exact, g_exact) = (self._settled(energy, free, beta) for energy, free in self.energies)
        graph, free = self.energies[1][0].graph, self.energies[1][1]
        home, *there = (
            _flat([point.values[n.name] for n in graph.states]) for point in (free, context.point, exact.point)
        )
        return Branching(
            beta=beta,
            settled=(context.result is Result.CONVERGED, exact.result is Result.CONVERGED),
            sweeps=(context.iterations, exact.iterations),
            beyond=(_beyond(graph, free, context.point), _beyond(graph, free, exact.point)),
            resting=_fraction(_rests(kink, _before(graph, name, exact.point)) for name, kink in graph.kinks.items()),
            distance=_ratio(there[0] - there[1], there[1] - home),
            cosine=cosine(g_held, g_exact),
            difference=_ratio(g_held - g_exact, g_exact),
            error=(_ratio(g_held - self.backprop, self.backprop), _ratio(g_exact - self.backprop, self.backprop)),
        )

    def _settled(self, energy: Energy, free: Point, beta: float) -> tuple[Settled, Tensor]:
        """The nudged equilibrium, and the gradient that it estimates."""
        nudged = self.subject.nudged(energy, free, beta)
        settled = settle(nudged, free, self.subject.how.solver)
        found = finished(contrast([(1.0, nudged, settled)], energy.batch))
        return settled, _flat([found.get(p, torch.zeros_like(p)) for p in self.parameters])


def _before(graph: Graph, kink: str, point: Point) -> Tensor:
    """The state that a kink reads."""
    (node,) = (node for node in graph.nodes if node.name == kink)
    value: Tensor = point.values[node.parents[0]]
    return value


def _beyond(graph: Graph, free: Point, point: Point) -> float:
    """The fraction of units that are on another branch than in the free equilibrium."""
    return _fraction(
        _left_branch(kink, _before(graph, name, point), _before(graph, name, free))
        for name, kink in graph.kinks.items()
    )


def _left_branch(kink: Kink, s: Tensor, s0: Tensor) -> Tensor:
    return kink.left_branch(s, s0.argmax(-1, keepdim=True) if isinstance(kink, Largest) else s0)


def _rests(kink: Kink, s: Tensor) -> Tensor:
    """Where units rest on a kink, or a maximum is a tie."""
    if isinstance(kink, Largest):
        return (s == s.amax(-1, keepdim=True)).sum(-1) > 1
    return torch.isin(s, torch.tensor(kink.kinks, dtype=s.dtype, device=s.device))


def _fraction(masks: Iterable[Tensor]) -> float:
    """Of all units the fraction that is marked; 0 where there are none."""
    counts = [(int(mask.sum()), mask.numel()) for mask in masks]
    return sum(marked for marked, _ in counts) / max(1, sum(units for _, units in counts))


def _ratio(a: Tensor, b: Tensor) -> float:
    return float(a.norm()) / max(float(b.norm()), torch.finfo(b.dtype).tiny)


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])
