"""The equilibria themselves: their residual from the states alone, where settling stalls, how large beta may be.

The residual of a node of the nudged prediction energy is, with `e_n = s_n - mu_n` and `p_out = -beta dC/ds_out`,

    |e_n - p_n| / max(|e_n|, |p_n|)

The error of a state balances what arrives from its children: by their errors as they are, `p_n = sum_c J_c^T e_c`, when
e_n - p_n is the force dF/ds_n; or as a sweep carries it backward, `p_n = sum_c J_c^T p_c`. Both vanish at equilibrium,
and a solver stops by one of the two. All sides are of the size of the nudge. Nothing that a solver reports is used
here, and none of the residuals of `Energy`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mep.capture.cost import cost_of
from mep.cost import make_cost
from mep.energy import Energy, State, make_node_energy, nudge
from mep.estimators.contrast import CONTRASTS
from mep.graph.closed_forms import Activation, Kink, Largest
from mep.graph.node import Node
from mep.graph.ops import StepContext
from mep.settle import Result, Settled, Solver, settle
from mep.verification.case import Case
from mep.verification.report import ResidualTrace

_SWEEPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30)
_DOUBLINGS, _HALVINGS = 7, 10

Residuals = dict[str, tuple[Tensor, Tensor]]
"""Node -> its residual, and what rounding may contribute, ten times `eps |s|` over the larger side: [batch] each."""


class Residual(NamedTuple):
    """One residual, its node, and what rounding may contribute to it."""

    value: float
    node: str
    rounding: float

    @property
    def excess(self) -> float:
        """What rounding does not explain."""
        return self.value - self.rounding


class Equilibria:
    """The free equilibrium of a case, `free` of `energy`, and its nudged ones.

    Args:
        case: the model and the batch.
        freeze_branches: whether branches are held; None: as the case says.
    """

    @torch.no_grad()
    def __init__(self, case: Case, freeze_branches: bool | None = None):
        self.case = case
        graph = case.graphs.of(case.x, case.target)
        case.restore()
        hold = case.config.branches == "held" if freeze_branches is None else freeze_branches
        context = StepContext(freeze_branches=hold)
        self.energy = Energy(graph, make_node_energy("prediction"), graph.bind(case.x), context, case.batch)
        self.free = self.energy.free_point()
        context.recording = False

    def nudged(self, beta: float) -> Energy:
        """The energy nudged by beta toward the target."""
        make, energy = make_cost(self.case.config.whole_cost), self.energy
        output = energy.output(self.free)
        return nudge(energy, cost_of(energy.graph, make, energy.inputs, output, self.case.target), beta)

    def settle(self, beta: float, solver: Solver) -> tuple[Energy, Settled]:
        """The energy nudged by beta, and where it settles."""
        nudged = self.nudged(beta)
        return nudged, settle(nudged, self.free, solver)

    @torch.no_grad()
    def residual(self, phases: str, beta: float) -> Residual:
        """Of all phases of a contrast, the residual of the worst node."""
        settled = [self.settle(sign * beta, self.case.config.solver) for sign in _signs([phases])]
        found = [worst_of(nearer_residuals(energy, energy.state(s.point))) for energy, s in settled]
        return max(found, key=lambda residual: residual.excess)

    @torch.no_grad()
    def trace(self, beta: float) -> ResidualTrace:
        """Settle anew for every number of sweeps, until all examples have settled."""
        curves: dict[str, list[float]] = {node.name: [] for node in self.energy.graph.states}
        made = []
        for sweeps in _SWEEPS:
            energy, settled = self.settle(beta, replace(self.case.config.solver, adaptive=False, settle_steps=sweeps))
            if settled.result is Result.DIVERGED:
                break
            made.append(sweeps)
            for name, (residual, _) in nearer_residuals(energy, energy.state(settled.point)).items():
                curves[name].append(float(residual.max()))
            if settled.result is Result.CONVERGED:
                break
        return ResidualTrace(beta, tuple(made), {name: tuple(curve) for name, curve in curves.items()})

    @torch.no_grad()
    def all_settle(self, phases: Sequence[str], beta: float, solver: Solver) -> bool:
        """Whether every example settles in every phase."""
        return all(self.settle(sign * beta, solver)[1].result is Result.CONVERGED for sign in _signs(phases))


def largest_beta(settles: Callable[[float], bool], beta: float) -> tuple[float | None, float | None]:
    """The largest beta found at which every example settles, and the smallest found where not.

    They are a factor 2 apart; None where doubling or halving `beta` a few times found none.
    """
    if settles(beta):
        for _ in range(_DOUBLINGS):
            if not settles(2 * beta):
                return beta, 2 * beta
            beta *= 2
        return beta, None
    for _ in range(_HALVINGS):
        beta /= 2
        if settles(beta):
            return beta, 2 * beta
    return None, beta


def nearer_residuals(energy: Energy, state: State) -> Residuals:
    """The residuals of all nodes, of the kind by which the worst node is nearer to equilibrium."""
    return min((residuals(energy, state, swept) for swept in (True, False)), key=lambda found: worst_of(found).excess)


def residuals(energy: Energy, state: State, swept: bool) -> Residuals:
    """The residual of every node from the states alone, as at the head of this file; `swept`: as a sweep carries it."""
    assert energy.nudge is not None
    point = energy.at(state)
    found: Residuals = {}
    behind: dict[str, tuple[Tensor, Kink]] = {}

    def norm(t: Tensor) -> Tensor:
        return t.reshape(energy.batch, -1).double().norm(dim=1)  # rows of one example are neighbours

    def transmit(node: Node, force: Tensor | None) -> Tensor | None:
        kink = energy.kinks.get(node.name)
        if kink is not None and force is not None:
            behind[node.parents[0]] = force, kink  # what passes a kink depends on the state before it
            return None
        if not node.owns_state:
            return force
        name, s = node.name, state[node.name]
        e = s - point.predictions[name]
        p = torch.zeros_like(s) if force is None else force
        if name in behind:
            p = _nearest_force(s, e, p, *behind[name])
        larger = torch.maximum(norm(e), norm(p)).clamp_min(torch.finfo(torch.float64).tiny)
        found[name] = norm(e - p) / larger, 10 * torch.finfo(s.dtype).eps * norm(s) / larger
        return p if swept else e

    energy.graph.vjp(point.saved, -energy.nudge.beta * energy.nudge.cost.gradient(energy.output(point)), transmit)
    return {name: found[name] for name in state}


def worst_of(found: Residuals) -> Residual:
    """Of all nodes and examples the one that exceeds its rounding most."""
    nodes = []
    for name, (residual, rounding) in found.items():
        place = int((residual - rounding).argmax())
        nodes.append(Residual(float(residual[place]), name, float(rounding[place])))
    return max(nodes, key=lambda node: node.excess)


def _nearest_force(s: Tensor, error: Tensor, direct: Tensor, u: Tensor, kink: Kink) -> Tensor:
    """Of all forces on a state before a kink that its subdifferential allows, the one nearest to the error.

    `direct` acts on s itself, `u` on the value behind the kink.
    """
    if isinstance(kink, Largest):
        # On the winners of a tie: direct + w u. Pulled down, w may be any of the simplex; pushed up, one wins.
        winners = s == s.amax(-1, keepdim=True)
        wanted = torch.where(winners, (error - direct) / torch.where(u == 0, 1, u), -math.inf)
        one = torch.zeros_like(s).scatter(-1, wanted.argmax(-1, keepdim=True), 1)
        return direct + torch.where(u < 0, _onto_simplex(wanted), one) * u
    left, right = (direct + _slope(s, u, kink, side) for side in (-math.inf, math.inf))
    # At a minimum the energy rises to both sides: there left >= right. Elsewhere nothing rests: one side must balance.
    return torch.where(left > right, error.clamp(right, left), left)


def _slope(s: Tensor, u: Tensor, kink: Activation, side: float) -> Tensor:
    """`u` times the derivative at the number next to s, on its left or right."""
    beside = torch.nextafter(s, torch.full_like(s, side))
    return kink.backward(u, beside)


def _onto_simplex(v: Tensor) -> Tensor:
    """The point nearest to v with `w >= 0`, `sum w = 1` over the last dimension: `max(v - t, 0)`.

    The level is `t = max_k (v_(1) + ... + v_(k) - 1) / k`, with v sorted from its largest (Held, Wolfe, Crowder 1974).

    Example:
        >>> _onto_simplex(torch.tensor([0.7, 0.5, -1.0]))
        tensor([0.6000, 0.4000, 0.0000])
    """
    sums = v.sort(-1, descending=True).values.cumsum(-1)
    count = torch.arange(1, v.shape[-1] + 1, dtype=v.dtype, device=v.device)
    return (v - ((sums - 1) / count).amax(-1, keepdim=True)).clamp_min(0)


def _signs(phases: Sequence[str]) -> list[float]:
    """The multiples of beta at which these contrasts need an equilibrium that is not the free one."""
    return sorted({multiple.real for name in phases for multiple, _ in CONTRASTS[name] if multiple}, reverse=True)
