r"""The energy of a graph's states, its forces, and its nudge toward a cost.

    E(s) = sum_n e(s_n, mu_n)      one number per example, never divided by the batch size
    F(s) = E(s) + beta C(s_out)    the nudged energy

Two couplings, `prediction` and `hopfield`, differ only in `e`; both pull a state with `de/ds = s - mu`:

| coupling   | e(s, mu)              | tension = -de/dmu | states |
|------------|-----------------------|-------------------|--------|
| prediction | 1/2 \|s - mu\|^2      | s - mu            | free   |
| hopfield   | 1/2 \|s\|^2 - <s, mu> | s                 | in a box |

The force on a state is local: `dF/ds_n = (s_n - mu_n) - sum_c J_c^T tension_c`, minus `-beta dC/ds` at the output.
Sources: Scellier and Bengio 2017 (arXiv:1602.05179), eq. 3 to 6; Whittington and Bogacz 2017 for `prediction`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mep.activations import Kink
from mep.cost import BatchCost
from mep.errors import ArgumentError
from mep.graph import Graph, Point
from mep.layout import accurate, by_example
from mep.nodes import Held, Node, Strength, displaced, magnitude, spread

State = dict[str, Tensor]
Box = tuple[float, float]
FREE: Box = (-math.inf, math.inf)


class Prediction:
    """`e = 1/2 |s - mu|^2`: the free equilibrium is the forward pass, with E = 0."""

    name = "prediction"
    vanishes_when_free = True

    def energy(self, s: Tensor, mu: Tensor) -> Tensor:
        """Elementwise."""
        return 0.5 * (s - mu).square()

    def tension(self, s: Tensor, mu: Tensor) -> Tensor:
        """-de/dmu."""
        return s - mu

    def balance(self, s: Tensor, mu: Tensor, pull: Tensor) -> tuple[Tensor, Tensor]:
        """The two sides that are equal at equilibrium: the error, and the pull of the children."""
        return s - mu, pull


class Hopfield:
    """`e = 1/2 |s|^2 - <s, mu>` with s in a box: the deep Hopfield network of Scellier and Bengio 2017."""

    name = "hopfield"
    vanishes_when_free = False

    def energy(self, s: Tensor, mu: Tensor) -> Tensor:
        """Elementwise."""
        return 0.5 * s.square() - s * mu

    def tension(self, s: Tensor, mu: Tensor) -> Tensor:
        """-de/dmu."""
        return s

    def balance(self, s: Tensor, mu: Tensor, pull: Tensor) -> tuple[Tensor, Tensor]:
        """The two sides that are equal at equilibrium: the state, and all its input."""
        return s, mu + pull


Coupling = Prediction | Hopfield
COUPLINGS: dict[str, type[Prediction] | type[Hopfield]] = {"prediction": Prediction, "hopfield": Hopfield}


def make_coupling(name: str) -> Coupling:
    """The coupling of that name."""
    if name not in COUPLINGS:
        raise ArgumentError(f"energy={name!r}: choose one of {sorted(COUPLINGS)}.")
    return COUPLINGS[name]()


@dataclass(frozen=True)
class Nudge:
    """`beta C(s_out)`."""

    cost: BatchCost
    beta: Strength


@dataclass(frozen=True, eq=False)
class Energy:
    """The energy of one batch: a graph with its input clamped, and a nudge or none."""

    graph: Graph
    coupling: Coupling
    inputs: Mapping[str, Any]
    held: Held
    batch: int
    nudge: Nudge | None = None

    @property
    def beta(self) -> Strength:
        """The nudging strength, 0 for the free energy."""
        return self.nudge.beta if self.nudge else 0.0

    @property
    def kinks(self) -> Mapping[str, Kink]:
        """The junctions that are true kinks; none while the branches are held."""
        return {} if self.held.hold_branches else self.graph.kinks

    @property
    def is_affine(self) -> bool:
        """Whether the Jacobians do not depend on the state: every node but the output is then balanced by a sweep."""
        return self.held.hold_branches and self.graph.is_affine_when_held

    def rest(self, lean: bool = False) -> Point:
        """Every state on its prediction, inside its box: the free equilibrium of the prediction energy.

        A `lean` one has only the values that a sweep through an affine graph reads: input, output, loose ends.
        """
        return self.graph.evaluate(self.inputs, self.held, inside_box, lean=lean)

    def at(self, state: Mapping[str, Tensor]) -> Point:
        """The graph evaluated at a state."""
        return self.graph.evaluate(self.inputs, self.held, lambda node, mu: state[node.name])

    def following(self, errors: Mapping[str, Tensor]) -> Point:
        """The graph with every state off its prediction by its scaled error: `s = mu - beta error`."""
        return self.graph.evaluate(self.inputs, self.held, lambda node, mu: displaced(mu, errors[node.name], self.beta))

    def errors(self, point: Point) -> State:
        """The scaled errors `(mu - s) / beta` of every state."""
        return {name: (mu - point.values[name]) / spread(self.beta, mu) for name, mu in point.predictions.items()}

    def state(self, point: Point) -> State:
        """The states of a point."""
        return {n.name: point.values[n.name] for n in self.graph.states}

    def left_branch(self, point: Point) -> float:
        """The fraction of piecewise-linear units off the branch on which they are held; one more forward walk."""
        held = replace(self.held, departures=[])
        self.graph.evaluate(self.inputs, held, lambda node, mu: point.values[node.name])
        assert held.departures is not None
        units = sum(n for _, n in held.departures)
        return sum(float(left) for left, _ in held.departures) / units if units else 0.0

    def value(self, point: Point) -> Tensor:
        """`E(s)`, or `F(s)` when nudged: [batch]."""
        total = torch.zeros(self.batch, dtype=self.output(point).dtype, device=self.output(point).device)
        for name, mu in point.predictions.items():
            total = total + self.coupling.energy(point.values[name], mu).reshape(self.batch, -1).sum(1)
        if self.nudge:
            total = total + self.nudge.beta * self.nudge.cost.value(self.output(point))
        return total

    def output(self, point: Point) -> Tensor:
        """The state of the output node."""
        return point.values[self.graph.output]

    def cost_gradient(self, point: Point) -> Tensor | None:
        """dC/ds_out, without beta; None when there is no nudge."""
        return self.nudge.cost.gradient(self.output(point)) if self.nudge else None

    def pulls(self, point: Point) -> State:
        """What each state is pulled by: `sum_c J_c^T tension_c`, and `-beta dC/ds` at the output."""
        arriving: State = {}

        def transmit(node: Node, force: Tensor | None) -> Tensor | None:
            if not node.owns_state:
                return force
            s, mu = point.values[node.name], point.predictions[node.name]
            arriving[node.name] = torch.zeros_like(s) if force is None else force
            return self.coupling.tension(s, mu)

        gradient = self.cost_gradient(point)
        self.graph.pull(point.saved, None if gradient is None else -gradient * spread(self.beta, gradient), transmit)
        return arriving

    def forces(self, point: Point, pulls: Mapping[str, Tensor] | None = None) -> State:
        """dF/ds_n of every state, in closed form."""
        pulls = self.pulls(point) if pulls is None else pulls
        return {name: point.values[name] - mu - pulls[name] for name, mu in point.predictions.items()}

    def residuals(self, point: Point, pulls: Mapping[str, Tensor] | None = None) -> State:
        """The relative residual of every state: {node: [batch]}, see `relative_residual`.

        An example whose nudge cannot be told from the rounding of the output has nothing to settle.
        """
        pulls = self.pulls(point) if pulls is None else pulls
        found = {}
        for node in self.graph.states:
            s = point.values[node.name]
            sides = self.coupling.balance(s, point.predictions[node.name], pulls[node.name])
            found[node.name] = relative_residual(*sides, s, self.batch, node.box)
        gradient = self.cost_gradient(point)
        if gradient is not None:
            nudge = example_norm(gradient, self.batch) * magnitude(self.beta)
            felt = nudge > 10 * rounding(self.output(point), self.batch)
            found = {name: residual * felt for name, residual in found.items()}
        return found

    def parameter_gradient(
        self, point: Point, errors: Mapping[str, Tensor] | None, weight: float, nodes: Sequence[Node] | None = None
    ) -> dict[Any, Tensor]:
        """`weight * dE/dtheta`, over beta where there is a nudge, summed over the batch and over the nodes (or all).

        `errors` are the scaled ones, (mu - s) / beta, where they are known.
        """
        if errors is not None:
            return self.graph.contract(point, errors, weight, nodes)
        tension, scale = self.coupling.tension, self.beta if self.nudge else 1.0
        assert not isinstance(scale, Tensor), "who reckons with tensors knows the errors"
        names = [node.name for node in (self.graph.states if nodes is None else nodes)]
        tensions = {n: tension(point.values[n], point.predictions[n]) for n in names}
        return self.graph.contract(point, tensions, -weight / scale, nodes)


def nudge(energy: Energy, cost: BatchCost, beta: Strength) -> Energy:
    """The energy plus `beta` times the cost at the output: just another energy."""
    return replace(energy, nudge=Nudge(cost, beta))


def inside_box(node: Node, mu: Tensor) -> Tensor:
    """The point of the node's box that is nearest to mu."""
    return mu if node.box == FREE else mu.clamp(*node.box)


def example_norm(tensor: Tensor, batch: int) -> Tensor:
    """The Euclidean norm over everything but the examples, [batch], in float32 at least.

    Rows of one example must be neighbours.
    """
    return torch.linalg.vector_norm(by_example(tensor, batch), dim=1, dtype=accurate(tensor))


def relative_residual(side: Tensor, other: Tensor, state: Tensor, batch: int, box: Box = FREE) -> Tensor:
    """`|side - other| / max(|side|, |other|)` of one node, per example: 0 at equilibrium, 1 before a signal arrives.

    At equilibrium the two sides are equal: `s - mu` and the pull of the children. What a face of the box holds back
    does not count. Where nothing pulls at all, a side as small as the rounding of the state counts as zero.
    """
    force = side - other
    low, high = box
    if low > -math.inf:
        force = torch.where((state <= low) & (force > 0), 0, force)
    if high < math.inf:
        force = torch.where((state >= high) & (force < 0), 0, force)
    violated, one, two, size = (example_norm(t, batch) for t in (force, side, other, state))
    limits = torch.finfo(state.dtype)
    floor = torch.where(two == 0, 10 * limits.eps * size, limits.tiny)
    return violated / torch.maximum(torch.maximum(one, two), floor).add_(limits.tiny)


def rounding(state: Tensor, batch: int) -> Tensor:
    """How far a state may be off by rounding: ten units in the last place, [batch]."""
    return example_norm(state, batch).mul_(10 * torch.finfo(state.dtype).eps)
