"""An equilibrium to look at: what stands in every node of the free and the nudged phases, and how it got there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mep.energy import Energy
from mep.errors import ArgumentError
from mep.estimators.contrast import Contrast, SettledPhase
from mep.estimators.estimate import Estimate
from mep.graph import Point
from mep.graph.node import Node
from mep.settle import Iterate, Settled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Residuals = dict[str, Tensor]


@dataclass(frozen=True)
class PhaseView:
    """One equilibrium, node by node; every mapping is from the name of a node that has a state.

    Attributes:
        beta: the multiple of the nudging strength: 0 for the free phase; complex in phases of a holomorphic contrast,
            whose states, predictions, errors and energies are complex, too.
        states, predictions: s and mu.
        errors: the scaled errors `de/dmu / beta`, for the prediction energy `(mu - s) / beta`; 0 in the free phase.
            Where the free equilibrium is not the forward pass: how far each state has moved from it, over beta.
        energies: `e(s, mu)` summed over the node, [batch]; NaN with `feedback=...`, where there is no energy.
        residuals: in units of the nudge, [batch].
        course: the residuals after every iteration, where they were recorded.
    """

    beta: complex
    states: Mapping[str, Tensor]
    predictions: Mapping[str, Tensor]
    errors: Mapping[str, Tensor]
    energies: Mapping[str, Tensor]
    residuals: Mapping[str, Tensor]
    course: Sequence[Residuals] = ()


@dataclass(frozen=True)
class Equilibrium:
    """The equilibria of one batch. `print` shows a table; `plot` a picture of settling.

    Attributes:
        estimate: loss, betas, iterations and residuals, as a step reports them.
        free: the free equilibrium.
        phases: the nudged ones, in the order of the contrast.
    """

    estimate: Estimate
    free: PhaseView
    phases: tuple[PhaseView, ...]

    @property
    def nudged(self) -> PhaseView:
        """The one that is nudged toward the target, or most nearly so; if the sign is random, perhaps away from it."""
        return self.phases[-1]

    def __str__(self) -> str:
        """A row a node: its shape, the mean size of state and error over the examples, energy, largest residual."""
        header = ("node", "shape", "|state|", "|error|", "energy", "residual")
        rows: list[tuple[str, ...]] = [header]
        for name, s in self.nudged.states.items():
            batch = len(self.nudged.residuals[name])
            sizes = [float(t.reshape(batch, -1).norm(dim=1).mean()) for t in (s, self.nudged.errors[name])]
            energy, residual = self.nudged.energies[name].real.mean(), self.nudged.residuals[name].max()
            numbers = [f"{v:.3g}" for v in (*sizes, float(energy), float(residual))]
            rows.append((name, "x".join(map(str, s.shape)), *numbers))
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, str(self.estimate)])

    def plot(self, phase: int = -1) -> Figure:
        """The residual of every node by iteration, of the worst example, and the tolerance as a line.

        Raises:
            ArgumentError: the course was not recorded, or matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
            from matplotlib.ticker import MaxNLocator
        except ImportError as error:
            raise ArgumentError("Equilibrium.plot(): needs matplotlib, pip install 'mep-torch[cli]'.") from error
        course = self.phases[phase].course
        if not course:
            raise ArgumentError("Equilibrium.plot(): nothing was recorded. Way out: ep.settle(x, y, record=True).")
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for name in course[0]:
            axes.semilogy([float(residuals[name].max()) or None for residuals in course], ".-", label=name)
        axes.axhline(self.estimate.tol, color="0.5", linestyle="--", label="tolerance")
        axes.set(xlabel="iteration", ylabel="residual, largest of any example", title="settling, node by node")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize="small", ncols=2)
        return figure


@dataclass
class Recorder:
    """The residuals of all nodes after every iteration, by the multiple of beta of the phase."""

    courses: dict[complex, list[Residuals]] = field(default_factory=dict)

    def __call__(self, multiple: complex, energy: Energy, iteration: int, iterate: Iterate) -> None:
        """Called by `settle` with every iterate."""
        point = _complete(energy, iterate.point, iterate.errors)
        residuals = _residuals(energy, point, iterate.errors, iterate.turns is not None)
        self.courses.setdefault(multiple, []).append(residuals)


def view(
    estimate: Estimate,
    energy: Energy,
    free: Settled,
    phases: Sequence[SettledPhase],
    contrast: Contrast,
    recorder: Recorder | None,
) -> Equilibrium:
    """The phases of a step as an `Equilibrium`."""
    nudged = [(e, settled) for _, e, settled in phases if settled is not free]
    multiples = [multiple for multiple, _ in contrast if multiple]
    courses = recorder.courses if recorder else {}
    views = [_phase(e, s, m, courses.get(m, [])) for (e, s), m in zip(nudged, multiples, strict=True)]
    return Equilibrium(estimate, _phase(energy, free, 0.0, []), tuple(views))


def _phase(energy: Energy, settled: Settled, multiple: complex, course: Sequence[Residuals]) -> PhaseView:
    point = _complete(energy, settled.point, settled.errors)
    states = energy.state(point)
    if energy.nudge is None:
        errors: Mapping[str, Tensor] = {name: mu.new_zeros(mu.shape) for name, mu in point.predictions.items()}
    elif energy.nudge.free:
        errors = energy.displacements(point)
    else:
        errors = energy.errors(point) if settled.errors is None else settled.errors
    energies = {
        name: mu.new_full((energy.batch,), torch.nan)
        if energy.graph.is_untied
        else energy.of_node(name, states[name], mu)
        for name, mu in point.predictions.items()
    }
    residuals = _residuals(energy, point, settled.errors, settled.turns is not None)
    errors = {name: errors[name] for name in states}
    return PhaseView(multiple, states, dict(point.predictions), dict(errors), energies, residuals, tuple(course))


def _complete(energy: Energy, point: Point, errors: Mapping[str, Tensor] | None) -> Point:
    """The point with the values and predictions of all nodes, where settling has done without some of them."""
    names = [node.name for node in energy.graph.states]
    if set(names) <= point.values.keys() and set(names) <= point.predictions.keys() and point.saved:
        return point
    return energy.free_point() if errors is None else energy.at_errors(dict(errors))


def _residuals(energy: Energy, point: Point, errors: Mapping[str, Tensor] | None, is_local: bool) -> Residuals:
    """By node, [batch]: from the scaled errors where these are known, since differences of states have fewer digits.

    As the solver measures them: in general networks a sweep carries new errors back from the output, `S_n`; elsewhere
    each node is compared with the errors that its children have now.
    """
    if errors is None:
        return energy.residuals(point)
    arriving: dict[str, Tensor | None] = {}

    def transmit(node: Node, force: Tensor | None) -> Tensor | None:
        return errors[node.name] if node.owns_state else force

    is_local = is_local or energy.is_affine or bool(energy.kinks)
    output = {energy.graph.output: energy.wanted_error(point)}
    energy.graph.vjp_through(energy.graph.nodes, point.saved, dict(output), transmit if is_local else None, arriving)
    sides = {name: errors[name].new_zeros(errors[name].shape) if f is None else f for name, f in arriving.items()}
    return {node.name: energy.relative(errors[node.name], sides[node.name]) for node in energy.graph.states}
