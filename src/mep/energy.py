r"""The energy of a graph's states, its forces, and its nudge toward a cost.

    E(s) = sum_n e(s_n, mu_n)      one number per example, never divided by the batch size
    F(s) = E(s) + beta C(s_out)    the nudged energy

Two couplings, `prediction` and `hopfield`, differ only in `e`; both pull a state with `de/ds = s - mu`:

| coupling   | e(s, mu)              | tension = -de/dmu | states |
|------------|-----------------------|-------------------|--------|
| prediction | 1/2 \|s - mu\|^2      | s - mu            | free   |
| hopfield   | 1/2 \|s\|^2 - <s, mu> | s                 | in a box |

The force on a state is local: `dF/ds_n = (s_n - mu_n) - sum_c J_c^T tension_c`, minus `-beta dC/ds` at the output.

The residual of a state says how far it is from equilibrium *in units of the nudge*: the two sides that balance there,
both over beta, differ by no more than that fraction of the larger one (`Energy.residuals`). A residual relative to the
states themselves would call any weak nudge settled before anything has moved.

Sources: Scellier and Bengio 2017 (arXiv:1602.05179), eq. 3 to 6; Whittington and Bogacz 2017 for `prediction`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mep.cost import BatchCost
from mep.errors import one_of, require
from mep.graph import Graph, Point
from mep.graph.closed_forms import Kink
from mep.graph.node import Beta, Node, expand_beta, select_beta, state_from_error
from mep.graph.step_context import StepContext
from mep.layout import accurate, by_example, select_examples

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

    def prediction_force(self, s: Tensor, mu: Tensor) -> Tensor:
        """-de/dmu."""
        return s - mu

    def force_terms(
        self, s: Tensor, mu: Tensor, incoming: Tensor, free: Free | None, box: Box
    ) -> tuple[Tensor, Tensor]:
        """The two sides that are equal at equilibrium: the error, and the pull of the children."""
        return s - mu, incoming


class Hopfield:
    """`e = 1/2 |s|^2 - <s, mu>` with s in a box: the deep Hopfield network of Scellier and Bengio 2017."""

    name = "hopfield"
    vanishes_when_free = False

    def energy(self, s: Tensor, mu: Tensor) -> Tensor:
        """Elementwise."""
        return 0.5 * s.square() - s * mu

    def prediction_force(self, s: Tensor, mu: Tensor) -> Tensor:
        """-de/dmu."""
        return s

    def force_terms(
        self, s: Tensor, mu: Tensor, incoming: Tensor, free: Free | None, box: Box
    ) -> tuple[Tensor, Tensor]:
        """The two sides that are equal at equilibrium: the state, and all its input moved into the box.

        With a nudge, both as they differ from the free state: else the response to a weak one would drown.
        """
        if free is None:
            return s, (mu + incoming).clamp(*box)
        return s - free.state, (mu + incoming + free.leftover).clamp(*box) - free.state


NodeEnergy = Prediction | Hopfield
NODE_ENERGIES: dict[str, type[Prediction] | type[Hopfield]] = {"prediction": Prediction, "hopfield": Hopfield}


def make_node_energy(name: str) -> NodeEnergy:
    """The coupling of that name."""
    require("EquilibriumPropagation", "energy", name, *one_of(sorted(NODE_ENERGIES)))
    return NODE_ENERGIES[name]()


@dataclass(frozen=True)
class Free:
    """One state of the free equilibrium from which a nudged phase starts, and the force that was left on it there."""

    state: Tensor
    leftover: Tensor


@dataclass(frozen=True)
class Nudge:
    """`beta C(s_out)`, and the free equilibrium by node where that is not the forward pass.

    The free phase of such an energy ends with some force left. It is taken as a constant part of the nudged energy,
    `-<leftover, s>`, whose free equilibrium is then exactly where the free phase ended. Else the contrast would divide
    it by beta.
    """

    cost: BatchCost
    beta: Beta
    free: Mapping[str, Free] | None = None


@dataclass(frozen=True, eq=False)
class Energy:
    """The energy of one batch: a graph with its input clamped, and a nudge or none."""

    graph: Graph
    coupling: NodeEnergy
    inputs: Mapping[str, Any]
    context: StepContext
    batch: int
    nudge: Nudge | None = None

    @property
    def beta(self) -> Beta:
        """The nudging strength, 0 for the free energy."""
        return self.nudge.beta if self.nudge else 0.0

    @property
    def kinks(self) -> Mapping[str, Kink]:
        """The junctions that are true kinks; none while the branches are held."""
        return {} if self.context.freeze_branches else self.graph.kinks

    @property
    def is_affine(self) -> bool:
        """Whether the Jacobians do not depend on the state: every node but the output is then balanced by a sweep."""
        return self.context.freeze_branches and self.graph.is_affine_when_held

    def rest(self, lean: bool = False) -> Point:
        """Every state on its prediction, inside its box: the free equilibrium of the prediction energy.

        A `lean` one has only the values that a sweep through an affine graph reads: input, output, loose ends.
        """
        return self.graph.evaluate(self.inputs, self.context, inside_box, lean=lean)

    def at(self, state: Mapping[str, Tensor]) -> Point:
        """The graph evaluated at a state."""
        return self.graph.evaluate(self.inputs, self.context, lambda node, mu: state[node.name])

    def following(self, errors: Mapping[str, Tensor]) -> Point:
        """The graph with every state off its prediction by its scaled error: `s = mu - beta error`."""
        return self.graph.evaluate(
            self.inputs, self.context, lambda node, mu: state_from_error(mu, errors[node.name], self.beta)
        )

    def errors(self, point: Point) -> State:
        """The scaled errors `(mu - s) / beta` of every state."""
        return {name: (mu - point.values[name]) / expand_beta(self.beta, mu) for name, mu in point.predictions.items()}

    def state(self, point: Point) -> State:
        """The states of a point."""
        return {n.name: point.values[n.name] for n in self.graph.states}

    def left_branch(self, point: Point) -> float:
        """The fraction of piecewise-linear units off the branch on which they are held; one more forward walk."""
        context = replace(self.context, branch_changes=[])
        self.graph.evaluate(self.inputs, context, lambda node, mu: point.values[node.name])
        assert context.branch_changes is not None
        units = sum(n for _, n in context.branch_changes)
        return sum(float(left) for left, _ in context.branch_changes) / units if units else 0.0

    def value(self, point: Point) -> Tensor:
        """`E(s)`, or `F(s)` when nudged, without the leftover of the free phase: [batch]."""
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

    def wanted_error(self, point: Point) -> Tensor:
        """`dC/ds_out` at the point: the output's error at equilibrium."""
        assert self.nudge is not None, "the free equilibrium of the prediction energy is the forward walk"
        return self.nudge.cost.gradient(self.output(point))

    def errors_back(self, saved: Mapping[str, Any], x: Tensor, like: Mapping[str, Any]) -> State:
        """Errors carried back from the output's, x: `delta_n = sum_c J_c^T delta_c` of every state.

        `saved` is a point's, or some rows of it; `like` has the shapes of the states that nothing arrives at.
        """
        errors: State = {}

        def transmit(node: Node, force: Tensor | None) -> Tensor | None:
            if node.name == self.graph.output:
                force = x
            if node.owns_state:
                if force is None:
                    shape = like[node.name].shape
                    force = x.new_zeros(shape[0] * len(x) // self.batch, *shape[1:])
                errors[node.name] = force
            return force

        self.graph.vjp(saved, None, transmit)
        return errors

    def incoming_forces(self, point: Point) -> State:
        """What each state is pulled by: `sum_c J_c^T tension_c`, and `-beta dC/ds` at the output."""
        arriving: State = {}

        def transmit(node: Node, force: Tensor | None) -> Tensor | None:
            if not node.owns_state:
                return force
            s, mu = point.values[node.name], point.predictions[node.name]
            arriving[node.name] = torch.zeros_like(s) if force is None else force
            return self.coupling.prediction_force(s, mu)

        gradient = self.cost_gradient(point)
        self.graph.vjp(
            point.saved, None if gradient is None else -gradient * expand_beta(self.beta, gradient), transmit
        )
        return arriving

    def forces(self, point: Point, incoming_forces: Mapping[str, Tensor] | None = None) -> State:
        """dF/ds_n of every state, in closed form."""
        incoming_forces = self.incoming_forces(point) if incoming_forces is None else incoming_forces
        return {
            name: self.force(name, point.values[name], mu, incoming_forces[name])
            for name, mu in point.predictions.items()
        }

    def force(self, name: str, s: Tensor, mu: Tensor, incoming: Tensor) -> Tensor:
        """dF/ds of one state."""
        free = self.free_of(name)
        return s - mu - incoming if free is None else s - mu - incoming - free.leftover

    def free_of(self, name: str) -> Free | None:
        """The free equilibrium of one state, where the nudge has noted it."""
        return self.nudge.free[name] if self.nudge and self.nudge.free else None

    def residuals(self, point: Point, incoming_forces: Mapping[str, Tensor] | None = None) -> State:
        """The residual of every state, in units of the nudge: {node: [batch]}, see `relative_residual`."""
        incoming_forces = self.incoming_forces(point) if incoming_forces is None else incoming_forces
        return {
            name: self.residual(name, point.values[name], mu, incoming_forces[name])
            for name, mu in point.predictions.items()
        }

    def residual(self, name: str, s: Tensor, mu: Tensor, incoming: Tensor) -> Tensor:
        """That of one state, with what is uncertain in it: the rounding of the state, and what the free phase left.

        The leftover shifts both equilibria: alike for a weak nudge, so that it counts beside the response to the whole
        of dC/ds, and enters here times beta; but the free one alone where a strong nudge fixes the other.
        """
        free, batch = self.free_of(name), self.batch
        side, other = self.coupling.force_terms(s, mu, incoming, free, self.graph.by_name[name].box)
        if self.nudge is None:
            return relative_residual(side, other, batch)
        rounded = rounding(s, batch)
        unknown = rounded
        if free is not None:
            share = torch.as_tensor(self.beta).abs().clamp(max=1)
            unknown = unknown + share * example_norm(free.leftover, batch)
        return relative_residual(side, other, batch, unknown, 10 * rounded)

    def has_nothing_to_settle(self, free: Point, size: Tensor | None = None) -> Tensor:
        """Which examples have a cost gradient at the free output that is no more than its rounding: [batch].

        `size` is its norm, if that is known.
        """
        size = example_norm(self.wanted_error(free), self.batch) if size is None else size
        return size <= 10 * rounding(self.output(free), self.batch)

    def parameter_gradient(
        self, point: Point, errors: Mapping[str, Tensor] | None, weight: float, nodes: Sequence[Node] | None = None
    ) -> dict[Any, Tensor]:
        """`weight * dE/dtheta`, over beta where there is a nudge, summed over the batch and over the nodes (or all).

        `errors` are the scaled ones, (mu - s) / beta, where they are known. Without `nodes`, the gradient of the cost's
        own parameters is added.
        """
        if errors is None:
            names = [node.name for node in (self.graph.states if nodes is None else nodes)]
            errors = {n: -self.coupling.prediction_force(point.values[n], point.predictions[n]) for n in names}
            if self.nudge:
                errors = {n: e / expand_beta(self.beta, e) for n, e in errors.items()}
        gradients = self.graph.param_vjp(point, errors, weight, nodes)
        if self.nudge and self.nudge.cost.parameters and nodes is None:
            add_gradients(gradients, self.nudge.cost.parameter_gradient(self.output(point), weight))
        return gradients

    def select(self, rows: Tensor) -> Energy:
        """The nudged energy of some of the examples, [rows]; their branches are those of the whole batch.

        Only where examples are independent, no noise is drawn, and the cost has its `of`.
        """
        assert self.nudge is not None
        context, nudge = self.context, self.nudge
        inputs = {n: v.index_select(0, rows) if _has_rows(v, self.batch) else v for n, v in self.inputs.items()}
        some = StepContext(
            freeze_branches=context.freeze_branches,
            recording=False,
            branches={key: select_examples(t, rows, self.batch) for key, t in context.branches.items()},
            # What is clamped needs no vjp within a sweep.
            clamped={n: (select_examples(mu, rows, self.batch), None) for n, (mu, _) in context.clamped.items()},
        )
        nudge = replace(nudge, cost=nudge.cost.of(rows), beta=select_beta(nudge.beta, rows))
        return replace(self, inputs=inputs, context=some, batch=len(rows), nudge=nudge)


def _has_rows(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch


def nudge(energy: Energy, cost: BatchCost, beta: Beta, free: Mapping[str, Free] | None = None) -> Energy:
    """The energy plus `beta` times the cost at the output: just another energy."""
    return replace(energy, nudge=Nudge(cost, beta, free))


def add_gradients(total: dict[Any, Tensor], found: Mapping[Any, Tensor]) -> None:
    """Add one set of gradients to another, which is changed."""
    for p, g in found.items():
        total[p] = total[p] + g if p in total else g


def inside_box(node: Node, mu: Tensor) -> Tensor:
    """The point of the node's box that is nearest to mu."""
    return mu if node.box == FREE else mu.clamp(*node.box)


def example_norm(tensor: Tensor, batch: int) -> Tensor:
    """The Euclidean norm over everything but the examples, [batch], in float32 at least.

    Rows of one example must be neighbours.
    """
    return torch.linalg.vector_norm(by_example(tensor, batch), dim=1, dtype=accurate(tensor))


def example_dot(a: Tensor, b: Tensor, batch: int) -> Tensor:
    """The inner product over everything but the examples, [batch], in float32 at least."""
    a, b = by_example(a, batch), by_example(b, batch)
    return torch.linalg.vecdot(a, b) if accurate(a) is a.dtype else torch.linalg.vecdot(a.float(), b.float())


def relative_residual(
    side: Tensor, other: Tensor, batch: int, unknown: Tensor | None = None, floor: Tensor | None = None
) -> Tensor:
    """`|side - other| / max(|side|, |other|)` of one node, [batch].

    It is 0 at equilibrium, and 1 where a signal has just arrived. `unknown` ([batch]) is added to the difference: what
    it may be off by rounding; where the sides drown in that the residual tends to 1. Where nothing arrives at all,
    both sides are zero and the node does not count yet; `floor` is what then passes for zero.
    """
    violated, one, two = (example_norm(t, batch) for t in (side - other, side, other))
    larger = torch.maximum(one, two)
    if unknown is not None:
        violated, larger = violated + unknown, larger + unknown
    residual = violated / larger.add_(torch.finfo(violated.dtype).tiny)
    idle = two == 0
    idle = idle & (one == 0 if floor is None else one <= floor)
    return residual.masked_fill(idle, 0)


def rounding(state: Tensor, batch: int) -> Tensor:
    """How far a state may be off by rounding: a unit in the last place of each number, [batch]."""
    return example_norm(state, batch).mul_(torch.finfo(state.dtype).eps)
