r"""The energy of a graph's states, its forces, and its nudge toward a cost.

    E(s) = sum_n e(s_n, mu_n)      one number per example, never divided by the batch size
    F(s) = E(s) + beta C(s_out)    the nudged energy

The coupling `e` of a state to its prediction is an object, `NodeEnergy`. Two have names:

| energy       | e(s, mu)         | de/ds        | -de/dmu | states                               |
|--------------|------------------|--------------|---------|--------------------------------------|
| `prediction` | 1/2 \|s - mu\|^2 | s - mu       | s - mu  | free                                 |
| `hopfield`   | G(s) - <s, mu>   | f^-1(s) - mu | s       | behind the activations f, G' = f^-1  |

For activations that project on a box, G is 1/2 |s|^2 in that box (`mep.graph.closed_forms.potentials` has all).

The force on a state is local: `dF/ds_n = de/ds_n - sum_c J_c^T (-de/dmu)_c`, plus `beta dC/ds` at the output.

The residual of a state says how far it is from equilibrium *in units of the nudge*: the two sides that balance there,
both over beta, differ by no more than that fraction of the larger one (`Energy.residual`). A residual relative to the
states themselves would call any weak nudge settled before anything has moved.

Sources: Scellier and Bengio 2017 (arXiv:1602.05179), eq. 3 to 6; Whittington and Bogacz 2017 for `prediction`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mep.cost import BatchCost
from mep.errors import one_of, require
from mep.graph import Graph, Point
from mep.graph.closed_forms import FREE_STATE, Kink, Potential, Quadratic
from mep.graph.node import Beta, Node, expand_beta, select_beta, state_from_error
from mep.graph.ops import StepContext
from mep.guards import without_hooks
from mep.layout import accurate, as_laid_out, by_example, in_dtype, numbers_like, select_examples

State = dict[str, Tensor]
Box = tuple[float, float]
FREE: Box = FREE_STATE.bounds


class NodeEnergy(ABC):
    """The energy `e(s, mu)` of a state and its prediction, and its two derivatives.

    An object of a class derived from this one may be passed as `energy=` wherever "prediction" and "hopfield" may.
    `mep.Descent` settles all of them; `mep.Sweep` those that have `state` (it works with the errors `-de/dmu`).

    Example: a quartic coupling, which sweeps settle as well.
        >>> class Quartic(NodeEnergy):
        ...     is_forward = True
        ...     def energy(self, s, mu):
        ...         return (s - mu) ** 2 / 2 + (s - mu) ** 4 / 4
        ...     def ds(self, s, mu):
        ...         return (s - mu) + (s - mu) ** 3
        ...     def dmu(self, s, mu):
        ...         return -self.ds(s, mu)
        ...     def state(self, mu, force):  # d + d^3 = f has the root 2 / sqrt(3) sinh(asinh(3 sqrt(3) / 2 f) / 3)
        ...         return mu + 2 / 3**0.5 * torch.sinh(torch.asinh(1.5 * 3**0.5 * force) / 3)
        >>> mu, force = torch.zeros(1), torch.tensor([2.0])
        >>> Quartic().ds(Quartic().state(mu, force), mu)
        tensor([2.0000])
    """

    is_forward: ClassVar[bool] = False
    """Whether e is least at s = mu, with `de/dmu = 0` there: the free equilibrium is then the forward pass."""
    is_quadratic: ClassVar[bool] = False
    """Whether `e = 1/2 |s - mu|^2`: nodes with constant Jacobians then make an affine network."""
    behind_activations: ClassVar[bool] = False
    """Whether states stand behind the activations, in their boxes; else on the predictions of parametrised nodes."""
    box: ClassVar[Box] = FREE
    """Bounds of every state, where they stand on predictions."""
    is_holomorphic: ClassVar[bool] = False
    """Whether its functions take complex numbers, without moduli or conjugates, and boxes are held."""

    @property
    def name(self) -> str:
        """That of the class, in lower case."""
        return type(self).__name__.lower()

    def at(self, node: Node) -> NodeEnergy:
        """The energy of one node, where it depends on the activation."""
        return self

    @property
    def has_state(self) -> bool:
        """Whether `state` is there."""
        return type(self).state is not NodeEnergy.state

    @abstractmethod
    def energy(self, s: Tensor, mu: Tensor) -> Tensor:
        """e: elementwise, or any numbers whose sum over everything but the examples is meant."""

    @abstractmethod
    def ds(self, s: Tensor, mu: Tensor) -> Tensor:
        """de/ds, in the shape of s."""

    @abstractmethod
    def dmu(self, s: Tensor, mu: Tensor) -> Tensor:
        """de/dmu, in the shape of mu."""

    def state(self, mu: Tensor, force: Tensor) -> Tensor:
        """The s at which `de/ds = -de/dmu = force`, for couplings that depend on s - mu alone; optional."""
        raise NotImplementedError

    def forces(self, s: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
        """de/ds and -de/dmu."""
        return self.ds(s, mu), self.dmu(s, mu).neg()

    def drive(self, s: Tensor, mu: Tensor) -> Tensor:
        """`s - de/ds`: where a step of length one would lead if nothing else acted on the state."""
        return s - self.ds(s, mu)


class Prediction(NodeEnergy):
    """`e = 1/2 |s - mu|^2`: the free equilibrium is the forward pass, with E = 0."""

    is_forward = True
    is_quadratic = True
    is_holomorphic = True

    def energy(self, s: Tensor, mu: Tensor) -> Tensor:
        return 0.5 * (s - mu).square()

    def ds(self, s: Tensor, mu: Tensor) -> Tensor:
        return s - mu

    def dmu(self, s: Tensor, mu: Tensor) -> Tensor:
        return mu - s

    def state(self, mu: Tensor, force: Tensor) -> Tensor:
        return mu + force

    def forces(self, s: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
        error = s - mu
        return error, error


class Hopfield(NodeEnergy):
    """`e = G(s) - <s, mu>` with G' the inverse of the activation; in a box `1/2 |s|^2 - <s, mu>`.

    With boxes it is the deep Hopfield network of Scellier and Bengio 2017, with sigmoids that of Hopfield 1984.
    """

    behind_activations = True
    is_holomorphic = True
    potential: Potential = FREE_STATE
    """That of the node whose energy this is."""

    def at(self, node: Node) -> NodeEnergy:
        own = copy(self)
        own.potential = node.potential
        return own

    def energy(self, s: Tensor, mu: Tensor) -> Tensor:
        return self.potential.value(s) - s * mu

    def ds(self, s: Tensor, mu: Tensor) -> Tensor:
        return self.potential.force(s, mu)

    def dmu(self, s: Tensor, mu: Tensor) -> Tensor:
        return -s

    def drive(self, s: Tensor, mu: Tensor) -> Tensor:
        """As a pull, an argument of the activation."""
        return mu


class GroupEnergy(ABC):
    """An energy of the states of several nodes, or of one, beside those that tie each state to its prediction.

    For lateral connections, memories, softmax groups. The free equilibrium is then no forward pass: `mep.Descent`
    settles it. Where the object is a `torch.nn.Module`, its parameters are trained with those of the model.

    Attributes:
        nodes: the names of the nodes (see `print(mep.trace(model, x))`) whose states it takes, in order.

    Example: units of one layer that inhibit each other, with symmetric weights that learn.
        >>> import torch
        >>> from torch import nn
        >>> class Lateral(nn.Module, GroupEnergy):
        ...     nodes = ("0",)
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(0.1 * torch.ones(width, width))
        ...     def energy(self, s):
        ...         return 0.25 * ((s @ (self.weight + self.weight.T)) * s).sum(1)
        >>> Lateral(2).energy(torch.tensor([[1.0, 2.0]])).detach()
        tensor([0.4500])
    """

    nodes: tuple[str, ...] = ()

    @abstractmethod
    def energy(self, *states: Tensor) -> Tensor:
        """One number per example, [batch], differentiable by autograd."""


NODE_ENERGIES: dict[str, type[NodeEnergy]] = {"prediction": Prediction, "hopfield": Hopfield}


def make_node_energy(energy: str | NodeEnergy) -> NodeEnergy:
    """The energy of that name, or the object itself."""
    if isinstance(energy, NodeEnergy):
        return energy
    among, wanted = one_of(sorted(NODE_ENERGIES))
    require("EquilibriumPropagation", "energy", energy, among, f"{wanted}, or an object derived from mep.NodeEnergy")
    return NODE_ENERGIES[energy]()


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
    node_energy: NodeEnergy
    inputs: Mapping[str, Any]
    context: StepContext
    batch: int
    nudge: Nudge | None = None
    groups: tuple[GroupEnergy, ...] = ()

    @property
    def is_forward(self) -> bool:
        """Whether the free equilibrium is the forward pass."""
        return self.node_energy.is_forward and not self.groups

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
        return self.context.freeze_branches and self.graph.is_affine_when_held and self.node_energy.is_quadratic

    def free_point(self, lean: bool = False) -> Point:
        """Every state on its prediction, inside its box: the free equilibrium where that is the forward pass.

        A `lean` one has only the values that a sweep through an affine graph reads: input, output, loose ends.
        """
        is_free = not self.node_energy.behind_activations and self.node_energy.box is FREE
        return self.graph.evaluate(self.inputs, self.context, None if is_free else self.respond, lean=lean)

    def at(self, state: Mapping[str, Tensor]) -> Point:
        """The graph evaluated at a state."""
        return self.graph.evaluate(self.inputs, self.context, lambda node, mu: state[node.name])

    def at_errors(self, errors: Mapping[str, Tensor]) -> Point:
        """The graph with every state off its prediction by its scaled error: `s = mu - beta error`, if quadratic."""

        def place(node: Node, mu: Tensor) -> Tensor:
            if self.node_energy.is_quadratic:
                return state_from_error(mu, errors[node.name], self.beta)
            return self.node_energy.state(mu, -errors[node.name] * expand_beta(self.beta, mu))

        return self.graph.evaluate(self.inputs, self.context, place)

    def respond(self, node: Node, pull: Tensor) -> Tensor:
        """Where a pull puts the state of a node; with held branches a nudged unit on a face of its box stays there.

        The others then leave the box if they are drawn so far: the energy is smooth, with the same limit beta -> 0.
        """
        free = self.free_of(node.name)
        held_at = None if free is None or not self.context.freeze_branches else free.state
        return self.potential_of(node).respond(pull, held_at)

    def potential_of(self, node: Node) -> Potential:
        """What a node's state is limited by, and with the Hopfield energy the state's own energy."""
        return node.potential if self.node_energy.behind_activations else self._common_box

    @cached_property
    def _common_box(self) -> Potential:
        return Quadratic(*self.node_energy.box)

    def errors(self, point: Point) -> State:
        """The scaled errors `de/dmu / beta` of every state; for the prediction energy `(mu - s) / beta`."""
        return {name: self._dmu(name, point) / expand_beta(self.beta, mu) for name, mu in point.predictions.items()}

    def displacements(self, point: Point) -> State:
        """How far the nudge has moved every state from where the free phase ended, over beta: `(s - s_free) / beta`."""
        if point.displacement is not None:
            moved, states = point.displacement.delta, self.state(point)
            return {name: moved[name] if name in moved else torch.zeros_like(s) for name, s in states.items()}
        assert self.nudge is not None and self.nudge.free is not None
        free = self.nudge.free
        return {name: (s - free[name].state) / expand_beta(self.beta, s) for name, s in self.state(point).items()}

    def _dmu(self, name: str, point: Point) -> Tensor:
        return self.node_energy.at(self.graph.by_name[name]).dmu(point.values[name], point.predictions[name])

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
        assert not self.graph.is_untied, "with untied feedback weights there is no energy"
        total = torch.zeros(self.batch, dtype=self.output(point).dtype, device=self.output(point).device)
        for name, mu in point.predictions.items():
            total = total + self.of_node(name, point.values[name], mu)
        for group in self.groups:
            total = total + group.energy(*(point.values[name] for name in group.nodes))
        if self.nudge:
            total = total + self.nudge.beta * self.nudge.cost.value(self.output(point))
        return total

    def of_node(self, name: str, s: Tensor, mu: Tensor) -> Tensor:
        """`e(s, mu)` summed over one node: [batch]."""
        return self.node_energy.at(self.graph.by_name[name]).energy(s, mu).reshape(self.batch, -1).sum(1)

    def output(self, point: Point) -> Tensor:
        """The state of the output node."""
        return point.values[self.graph.output]

    def cost_gradient(self, point: Point) -> Tensor | None:
        """dC/ds_out, without beta; None when there is no nudge."""
        return self.nudge.cost.gradient(self.output(point)) if self.nudge else None

    def wanted_error(self, point: Point) -> Tensor:
        """`dC/ds_out` at the point: the output's error at equilibrium."""
        assert self.nudge is not None, "the free equilibrium of the prediction energy is the forward walk"
        return self.nudge.cost.gradient(point.values[self.graph.output])

    def errors_back(self, saved: Mapping[str, Any], x: Tensor, like: Mapping[str, Any]) -> State:
        """Errors carried back from the output's, x: `delta_n = sum_c J_c^T delta_c` of every state.

        `saved` is a point's, or some rows of it; `like` has the shapes of the states that nothing arrives at.
        """
        arriving: dict[str, Tensor | None] = {}
        self.graph.vjp_through(self.graph.nodes, saved, {self.graph.output: x}, arriving=arriving)
        errors: State = {}
        for name, force in arriving.items():
            if force is None:
                shape = like[name].shape
                force = x.new_zeros(shape[0] * len(x) // self.batch, *shape[1:])
            errors[name] = force
        return errors

    def backpropagated(self, point: Point, gradient: Tensor) -> State:
        """A gradient at the output, carried back to every state that it reaches, through the slopes of activations.

        The slope is 1 inside a box, and 0 on its faces. For beta -> 0 these are the displacements of the states, with
        the other sign, if nothing acts back on them.
        """
        found: State = {}

        def transmit(node: Node, force: Tensor | None) -> Tensor | None:
            if node.owns_state and force is not None:
                s = point.values[node.name]
                force = found[node.name] = node.potential.slope(s, node.potential.hold(s, force))
            return force

        self.graph.vjp(point.saved, gradient, transmit)
        return found

    def incoming_forces(self, point: Point) -> State:
        """The forces on each state from elsewhere: `sum_c J_c^T (-de/dmu)_c`, and `-beta dC/ds` at the output."""
        arriving, of_groups = State(), self.group_forces(point)

        def transmit(node: Node, force: Tensor | None) -> Tensor | None:
            if not node.owns_state:
                return force
            s, mu = point.values[node.name], point.predictions[node.name]
            force = torch.zeros_like(s) if force is None else force
            arriving[node.name] = force + of_groups[node.name] if node.name in of_groups else force
            return self.node_energy.at(node).dmu(s, mu).neg()

        gradient = self.cost_gradient(point)
        nudge = None if gradient is None else -gradient * expand_beta(self.beta, gradient)
        self.graph.vjp(point.saved, nudge, transmit)
        return arriving

    def group_forces(self, point: Point) -> State:
        """`-de/ds` of the group energies, for the states that they take."""
        found: State = {}
        for group in self.groups:
            with torch.enable_grad():
                states = [point.values[name].detach().requires_grad_() for name in group.nodes]
                pulled = torch.autograd.grad(group.energy(*states).sum(), states)
            for name, g in zip(group.nodes, pulled, strict=True):
                found[name] = found[name] - g if name in found else -g
        return found

    def forces(self, point: Point, incoming: Mapping[str, Tensor] | None = None) -> State:
        """dF/ds_n of every state, in closed form."""
        incoming = self.incoming_forces(point) if incoming is None else incoming
        return {
            name: self.force(name, point.values[name], mu, incoming[name]) for name, mu in point.predictions.items()
        }

    def force(self, name: str, s: Tensor, mu: Tensor, incoming: Tensor) -> Tensor:
        """dF/ds of one state."""
        free = self.free_of(name)
        force = self.node_energy.at(self.graph.by_name[name]).ds(s, mu) - incoming
        return force if free is None else force - free.leftover

    def free_of(self, name: str) -> Free | None:
        """The free equilibrium of one state, where the nudge has noted it."""
        return self.nudge.free[name] if self.nudge and self.nudge.free else None

    def residuals(self, point: Point, incoming: Mapping[str, Tensor] | None = None) -> State:
        """The residual of every state, in units of the nudge: {node: [batch]}, see `relative_residual`."""
        if point.displacement is not None:
            found: State = point.displacement.residuals()
            return found
        incoming = self.incoming_forces(point) if incoming is None else incoming
        return {
            name: self.residual(name, point.values[name], mu, incoming[name]) for name, mu in point.predictions.items()
        }

    def residual(self, name: str, s: Tensor, mu: Tensor, incoming: Tensor) -> Tensor:
        """That of one state, with what is uncertain in it: the rounding of the state, and what the free phase left.

        The leftover shifts both equilibria: alike for a weak nudge, so that it counts by how much it changes dC/ds,
        and enters here times beta and the cost's smoothness; but the free one alone where a strong nudge fixes the
        other.
        """
        free, batch = self.free_of(name), self.batch
        if self.is_forward:
            side, other = self.node_energy.ds(s, mu), incoming
        else:
            # The state, and where all that acts on it would put it. With a nudge both as they differ from the
            # free state: else the response to a weak one would drown.
            side, other = s, self.node_energy.drive(s, mu) + incoming
            other = other if free is None else other + free.leftover
            other = self.respond(self.graph.by_name[name], other)
            side, other = (side, other) if free is None else (side - free.state, other - free.state)
        if self.nudge is None:
            return relative_residual(side, other, batch)
        rounded = rounding(s, batch)
        unknown = rounded
        if free is not None:
            shift = self.potential_of(self.graph.by_name[name]).slope(free.state, free.leftover)
            unknown = unknown + self.free_share * example_norm(shift, batch)
        return relative_residual(side, other, batch, unknown, 10 * rounded)

    @property
    def free_share(self) -> Tensor:
        """The share of the force that the free phase has left in what is unknown of the nudged one, see `residual`."""
        assert self.nudge is not None
        smoothness = self.nudge.cost.smoothness
        weak = torch.as_tensor(self.beta).abs()
        return (weak if smoothness is None else weak * smoothness).clamp(max=1)

    def relative(self, side: Tensor, other: Tensor) -> Tensor:
        """`relative_residual` of two sides of a balance: [batch]."""
        return relative_residual(side, other, self.batch)

    def has_nothing_to_settle(self, free: Point, size: Tensor | None = None) -> Tensor:
        """Which examples have a cost gradient at the free output that is no more than its rounding: [batch].

        `size` is its norm, if that is known.
        """
        size = example_norm(self.wanted_error(free), self.batch) if size is None else size
        return size <= 10 * rounding(free.values[self.graph.output], self.batch)

    def parameter_gradient(
        self, point: Point, errors: Mapping[str, Tensor] | None, weight: float, nodes: Sequence[Node] | None = None
    ) -> dict[Any, Tensor]:
        """`weight * dE/dtheta`, over beta where there is a nudge, summed over the batch and these nodes.

        By default over all nodes and groups.
        `errors` are the scaled ones, `de/dmu / beta`, where they are known. From displacements follows the difference
        from the free equilibrium, over beta.
        """
        states = self.graph.states if nodes is None else nodes
        if point.displacement is not None:
            gradients: dict[Any, Tensor] = point.displacement.contrast(weight, states)
        else:
            if errors is None:
                errors = {node.name: self._dmu(node.name, point) for node in states}
                if self.nudge:
                    errors = {n: e / expand_beta(self.beta, e) for n, e in errors.items()}
            gradients = self.graph.param_vjp(point, errors, weight, nodes)
        if nodes is None and self.groups:
            add_gradients(gradients, self.groups_gradient(point, weight))
        return gradients

    def groups_gradient(self, point: Point, weight: float) -> dict[Any, Tensor]:
        """The part of `parameter_gradient` that is that of the groups' own parameters: of no node alone."""
        total: dict[Any, Tensor] = {}
        for group in self.groups:
            add_gradients(total, self._group_gradient(group, point, weight))
        return total

    def _group_gradient(self, group: GroupEnergy, point: Point, weight: float) -> dict[Any, Tensor]:
        """`weight * de/dtheta` of a group's own parameters, over beta where there is a nudge."""
        trained = [p for p in group.parameters() if p.requires_grad] if isinstance(group, nn.Module) else []
        if not trained:
            return {}
        with without_hooks(trained), torch.enable_grad():
            each = group.energy(*(point.values[name].detach() for name in group.nodes))
            total = (each / self.nudge.beta if self.nudge else each).sum()
            found = torch.autograd.grad(total, trained, allow_unused=True)
        return {p: g * weight for p, g in zip(trained, found, strict=True) if g is not None}

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
    """Add one set of gradients to another, whose tensors are changed."""
    for p, g in found.items():
        total[p] = total[p].add_(g) if p in total else g


def example_norm(tensor: Tensor, batch: int) -> Tensor:
    """The Euclidean norm over everything but the examples, [batch], in float32 at least.

    Rows of one example must be neighbours.
    """
    rows = by_example(tensor, batch) if tensor.ndim == 4 else tensor.reshape(batch, -1)
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(tensor.dtype, torch.float32))


def example_dot(a: Tensor, b: Tensor, batch: int) -> Tensor:
    """The inner product over everything but the examples, [batch], in float32 at least; conj(a) of complex numbers."""
    b = as_laid_out(b, a) if a.ndim == 4 else b  # numbers in the same order
    a, b = by_example(a, batch), by_example(b, batch)
    if a.is_complex() is not b.is_complex():
        a, b = in_dtype(a, numbers_like(a, b)), in_dtype(b, numbers_like(b, a))
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
