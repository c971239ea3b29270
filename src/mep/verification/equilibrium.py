"""The equilibria themselves: their residual from the states alone, where settling stalls, how strong a nudge may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mep.activations import Kink
from mep.energy import Energy, State, example_norm, rounding
from mep.estimators.contrast import CONTRASTS
from mep.graph import Point
from mep.nodes import Node, spread
from mep.settle import Result, Settled, settle
from mep.solvers import Sweep, kinks
from mep.verification.report import Stall
from mep.verification.subject import Subject

_SWEEPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30)
_DOUBLINGS = 7
_HALVINGS = 10


class Residual(NamedTuple):
    """The largest relative residual over examples and phases, its node, and what rounding may contribute to it."""

    value: float
    node: str
    rounding: float


class Equilibria:
    """The nudged equilibria of one batch, settled here and judged by their states."""

    def __init__(self, subject: Subject):
        self.subject = subject
        self.energy, self.free = subject.energy()
        self.is_stochastic = bool(self.energy.held.noise)

    def settle(self, beta: float, solver: Sweep) -> tuple[Energy, Settled]:
        """The equilibrium at one beta."""
        nudged = self.subject.nudged(self.energy, self.free, beta)
        settled = settle(nudged, self.free, solver)
        return settled.energy, settled

    @torch.no_grad()
    def residual(self, phases: str, beta: float) -> Residual:
        """Of all phases of a contrast, the residual of its worst node."""
        found = []
        for sign in _signs([phases]):
            energy, settled = self.settle(sign * beta, self.subject.how.solver)
            state = energy.state(settled.point)
            point = energy.at(state)
            for name, each in residuals(energy, point).items():
                place = int(each.argmax())
                found.append(Residual(float(each[place]), name, float(_rounding(energy, point, name)[place])))
        return max(found, key=lambda residual: residual.value - residual.rounding)

    @torch.no_grad()
    def stall(self, beta: float) -> Stall:
        """Settle anew for every number of sweeps, until all examples have settled."""
        curves: dict[str, list[float]] = {node.name: [] for node in self.energy.graph.states}
        made = []
        for sweeps in _SWEEPS:
            energy, settled = self.settle(beta, replace(self.subject.how.solver, adaptive=False, settle_steps=sweeps))
            if settled.result is Result.DIVERGED:
                break
            made.append(sweeps)
            for name, each in residuals(energy, energy.at(energy.state(settled.point))).items():
                curves[name].append(float(each.max()))
            if settled.result is Result.CONVERGED:
                break
        return Stall(beta, tuple(made), {name: tuple(curve) for name, curve in curves.items()})

    @torch.no_grad()
    def reach(self, phases: Sequence[str], beta: float) -> tuple[float | None, float | None]:
        """The largest beta found to settle with sweeps, of all examples, and the smallest found not to.

        They are a factor 2 apart.
        """
        signs = _signs(phases)

        def settles(beta: float) -> bool:
            found = [self.settle(sign * beta, Sweep(strength=math.inf)) for sign in signs]
            return all(s.result is Result.CONVERGED and not isinstance(e.beta, Tensor) for e, s in found)

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


def residuals(energy: Energy, point: Point) -> State:
    """The relative residual of every node at a point, [batch] each, by the forces of the energy and nothing else."""
    return energy.residuals(point, _pulls(energy, point) if energy.kinks else None)


def _pulls(energy: Energy, point: Point) -> State:
    """As `energy.pulls`; at a kink, of all that its subdifferential allows, what balances the unit best."""
    arriving: State = {}
    behind: dict[str, tuple[Tensor, Kink]] = {}

    def transmit(node: Node, force: Tensor | None) -> Tensor | None:
        kink = energy.kinks.get(node.name)
        if kink is not None and force is not None:
            behind[node.parents[0]] = force, kink
            return None
        if not node.owns_state:
            return force
        s, mu = point.values[node.name], point.predictions[node.name]
        pull = torch.zeros_like(s) if force is None else force
        if node.name in behind:
            u, kink = behind[node.name]
            pull = -kinks.balancing_pull(s, mu - s, -pull, -u, kink, 1.0)
        arriving[node.name] = pull
        return s - mu

    gradient = energy.cost_gradient(point)
    energy.graph.pull(point.saved, None if gradient is None else -gradient * spread(energy.beta, gradient), transmit)
    return arriving


def _rounding(energy: Energy, point: Point, name: str) -> Tensor:
    """What the rounding of a state contributes to its residual: [batch]."""
    s, mu = point.values[name], point.predictions[name]
    return rounding(s, energy.batch) / example_norm(s - mu, energy.batch).clamp_min(torch.finfo(s.dtype).tiny)


def _signs(phases: Sequence[str]) -> list[float]:
    """The multiples of beta at which these contrasts need an equilibrium that is not the free one."""
    return sorted({multiple for name in phases for multiple, _ in CONTRASTS[name] if multiple}, reverse=True)
