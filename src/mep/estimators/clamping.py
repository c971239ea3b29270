"""A Hopfield network at rest while some of its units are held: run backward from a label, or from a part of its input.

    E(x, s) = 1/2 |x|^2 + sum_n G_n(s_n) - <s_n, mu_n>,      x and s_n in their boxes, held units at their values

An input x that is free is a state whose prediction is zero. Only the layers c that read it act on it:

    x = box(sum_c J_c^T s_c)

The solver is that of a free phase. Where the energy is convex it ends at the minimum. Weights that read a free input
are couplings, too, so that there may be several points of rest; then it ends at one of them, as the start decides.

Sources: Hopfield 1984, https://doi.org/10.1073/pnas.81.10.3088; Scellier and Bengio 2017, arXiv:1602.05179.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor

from mep.energy import Box, Energy
from mep.errors import ArgumentError, DivergedError, InputError
from mep.graph import Graph
from mep.graph.closed_forms.potentials import Potential, Quadratic, Softmax
from mep.graph.node import Node
from mep.graph.ops import StepContext
from mep.settle import Result, Solver, rounded, settle

Boxes = Box | Mapping[str, Box]


@dataclass(frozen=True)
class FreeEquilibrium:
    """A network at rest. `found["input"]`, `found["output"]` and `found[node]` are states.

    Attributes:
        states: of every input and node that has one, by name; held units have their values.
        residuals: how far the free units would still move, `|box(pull) - s|` over the larger of the two, of every state
            that settles: {name: [batch]}. Measured where settling has ended.
        energy: E, [batch]; an input that is held completely has no term of its own.
        iterations: of the solver.
        tol: the residual at which an example has settled.
    """

    states: Mapping[str, Tensor]
    residuals: Mapping[str, Tensor]
    energy: Tensor
    iterations: int
    tol: float
    graph: Graph = field(repr=False)

    def __getitem__(self, name: str) -> Tensor:
        return self.states[real_name(self.graph, name)]

    @property
    def settled(self) -> Tensor:
        """Which examples have settled, [batch]: all their residuals are at most `tol`."""
        settled = torch.ones_like(self.energy, dtype=torch.bool)
        for residual in self.residuals.values():
            settled &= residual <= rounded(self.tol, residual.dtype)
        return settled

    @property
    def converged(self) -> bool:
        """Whether every example has settled."""
        return bool(self.settled.all())


class FreeInput(Node):
    """An input that is a state: its prediction is zero."""

    def __init__(self, name: str, like: Tensor, box: Box):
        super().__init__(name, (), (), True, (), (), op=name, potential=Quadratic(*box), shape=tuple(like.shape))
        self.zeros = torch.zeros_like(like)

    def predict(self, parents: Sequence[Any], context: StepContext) -> tuple[Tensor, Any]:
        return self.zeros, None

    def vjp(self, saved: Any, force: Tensor) -> Sequence[Tensor | None]:
        return ()


@dataclass(frozen=True, eq=False)
class ClampedEnergy(Energy):
    """The energy of a network some of whose units are held: by state, which of them (None: all), and their values."""

    held: Mapping[str, tuple[Tensor | None, Tensor]] = field(default_factory=dict)

    def respond(self, node: Node, pull: Tensor) -> Tensor:
        return self.put(node, super().respond(node, pull))

    def put(self, node: Node, s: Tensor) -> Tensor:
        """A state, with the units that are held at their values."""
        mask, value = self.held.get(node.name, (None, None))
        if value is None:
            return s
        return value if mask is None else torch.where(mask, value, s)


def relaxed(
    energy: Energy,
    solver: Solver,
    clamp: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
    box: Boxes | None,
) -> FreeEquilibrium:
    """See `EquilibriumPropagation.relax`. The names are real ones; `energy` is that of the batch, its inputs held."""
    graph, context, tol = energy.graph, energy.context, solver.tol
    for name in held:
        if name not in clamp:
            raise ArgumentError(f"relax(held={{{name!r}: ...}}): its values are missing, clamp={{{name!r}: ...}}.")
    for name in start:
        if name in clamp and name not in held:
            raise ArgumentError(f"relax(start={{{name!r}: ...}}): it is held. Leave it out of start or of clamp.")
    partly = {name: mask for name, mask in held.items() if not bool(mask.all())}  # the others are held as a whole
    free = [name for name in graph.inputs if name not in clamp or name in partly]
    for name in free:
        if not energy.inputs[name].is_floating_point():
            raise InputError(f"relax: the input {name!r} is {energy.inputs[name].dtype} and cannot settle. Clamp it.")
    boxes = _boxes(graph, free, [name for name in graph.inputs if name in held], box)
    # Once forward, for shapes and dtypes, and for the random numbers of the step.
    predictions = graph.evaluate(energy.inputs, context).predictions
    context.recording = False
    clamp, start = (
        {n: _fitting(what, n, t, predictions[n] if n in predictions else energy.inputs[n]) for n, t in given.items()}
        for what, given in (("clamp", clamp), ("start", start))
    )
    masks = {name: _mask(name, mask, clamp[name]) for name, mask in held.items()}
    for name in predictions.keys() & clamp.keys():
        _check_domain(name, clamp[name], masks.get(name), energy.potential_of(graph.by_name[name]))
    masks = {name: masks[name] for name in partly}

    freed = with_free_inputs(graph, [FreeInput(name, energy.inputs[name], boxes[name]) for name in free])
    states = {node.name for node in freed.states}
    values = {name: (masks.get(name), value) for name, value in clamp.items() if name in states}
    clamped = ClampedEnergy(
        freed, energy.node_energy, energy.inputs, context, energy.batch, None, energy.groups, values
    )
    context.branches.clear()

    def place(node: Node, mu: Tensor) -> Tensor:
        if node.name not in start:
            return clamped.respond(node, mu)
        potential = clamped.potential_of(node)
        return clamped.put(node, potential.respond(potential.inverse(start[node.name])))  # within its range

    point = freed.evaluate(energy.inputs, context, place)
    solver, iterations = copy.deepcopy(solver).for_free_phase(), 0
    while True:
        found = settle(clamped, point, solver)
        point, iterations = found.point, iterations + found.iterations
        if found.result is Result.DIVERGED:
            raise DivergedError(
                f"relax: settling diverged with {solver}. Way out: a smaller box, smaller weights, or hold more."
            )
        # Residuals grow on the way from a saddle to a minimum. A solver that gives up there begins anew.
        if found.result is Result.CONVERGED or found.iterations in (0, solver.settle_steps):
            break
        solver = replace(solver, settle_steps=solver.settle_steps - found.iterations)

    # The certificate does not rely on what the solver has kept: winners of max pooling are those of the end.
    clamped = replace(clamped, context=replace(context, branches={}))
    point = clamped.at(clamped.state(point))
    residuals = {
        name: r for name, r in clamped.residuals(point).items() if name not in values or values[name][0] is not None
    }
    inputs = {name: energy.inputs[name] for name in graph.inputs if name not in states}
    return FreeEquilibrium({**inputs, **clamped.state(point)}, residuals, clamped.value(point), iterations, tol, graph)


def with_free_inputs(graph: Graph, inputs: Sequence[FreeInput]) -> Graph:
    """The same graph with these inputs as states, to which messages flow."""
    free = {node.name for node in inputs}  # and what was held because nothing but these moves it
    nodes: list[Node] = [*inputs]
    for node in graph.nodes:
        flows = tuple(flow or parent in free for parent, flow in zip(node.parents, node.flows, strict=True))
        if flows != node.flows:
            if node.clamped and not node.owns_state:
                free.add(node.name)
            node = copy.copy(node)
            node.flows, node.clamped = flows, False
        nodes.append(node)
    held = tuple(name for name in graph.inputs if name not in free)
    return replace(graph, nodes=tuple(nodes), inputs=held, writes=())


def by_real_name(graph: Graph, given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The same values by the names of the graph."""
    found: dict[str, Tensor] = {}
    for name, value in (given or {}).items():
        if (real := real_name(graph, name)) in found:
            raise ArgumentError(f"relax: {name!r} and {real!r} are one and the same. Leave one out.")
        found[real] = value
    return found


def real_name(graph: Graph, name: str) -> str:
    """The name of an input or a state: "input" is the only input, "output" the output, where no other has that name."""
    names = [*graph.inputs, *(node.name for node in graph.states)]
    if name in names:
        return name
    if name == "output":
        return graph.output
    if name == "input" and len(graph.inputs) == 1:
        return graph.inputs[0]
    raise ArgumentError(
        f"relax: {name!r} is no input and no node with a state; these are {', '.join(names)}. See "
        "print(mep.trace(model, x, energy='hopfield'))."
    )


def _boxes(graph: Graph, free: Sequence[str], masked: Sequence[str], box: Boxes | None) -> Mapping[str, Box]:
    """That of every input that is free; inputs with a mask may have one, whatever is held."""
    if box is not None and not free and not masked:
        raise ArgumentError(f"relax(box={box!r}): it bounds free inputs, and all are held. Leave it out.")
    given = {real_name(graph, n): b for n, b in box.items()} if isinstance(box, Mapping) else dict.fromkeys(free, box)
    for name in given:
        if name not in free and name not in masked:
            raise ArgumentError(f"relax(box={box!r}): {name!r} is no input that is free. Leave it out.")
    found: dict[str, Box] = {}
    for name in free:
        bounds = given.get(name)
        if not _is_box(bounds):
            raise ArgumentError(
                f"relax(box={box!r}): the input {name!r} is free, so it needs a box: the range of the data, box=(0, 1) "
                "for instance. Or clamp it."
            )
        found[name] = float(bounds[0]), float(bounds[1])
    return found


def _is_box(bounds: Any) -> TypeGuard[Box]:
    """Whether these are two numbers, the lower one first."""
    is_pair = isinstance(bounds, (tuple, list)) and len(bounds) == 2
    return is_pair and all(isinstance(bound, (int, float)) for bound in bounds) and bounds[0] < bounds[1]


def _fitting(what: str, name: str, value: Tensor, like: Tensor) -> Tensor:
    """The value of a state in its dtype, if it has its shape."""
    if value.shape != like.shape:
        hint = " For class labels pass F.one_hot(labels, classes)." if value.ndim == 1 else ""
        raise InputError(
            f"relax({what}={{{name!r}: ...}}): it has shape {tuple(value.shape)}, the state {tuple(like.shape)}.{hint}"
        )
    if not torch.isfinite(value).all():
        raise InputError(f"relax({what}={{{name!r}: ...}}): it contains NaN or Inf.")
    return value.detach().to(like.dtype)


def _check_domain(name: str, value: Tensor, mask: Tensor | None, potential: Potential) -> None:
    """Refuse values that no state behind the activation can have: their energy is infinite."""
    held, (low, high) = value if mask is None else value[mask], potential.domain
    if bool((held < low).any() or (held > high).any()):
        raise InputError(
            f"relax(clamp={{{name!r}: ...}}): states behind this activation lie in [{low:g}, {high:g}], and the values "
            f"in [{float(held.min()):g}, {float(held.max()):g}]."
        )
    if isinstance(potential, Softmax):
        whole = torch.ones_like(value, dtype=torch.bool) if mask is None else mask
        if not torch.equal(whole.all(potential.dim), whole.any(potential.dim)):
            raise InputError(
                f"relax(held={{{name!r}: ...}}): units of one softmax sum to 1. Hold all of them, or none."
            )
        sums = value.sum(potential.dim)[whole.all(potential.dim)]
        if bool(((sums - 1).abs() > 0.01).any()):
            raise InputError(f"relax(clamp={{{name!r}: ...}}): units of one softmax sum to 1. Divide by their sum.")


def _mask(name: str, mask: Tensor, value: Tensor) -> Tensor:
    try:
        if mask.dtype != torch.bool:
            raise RuntimeError
        return mask.expand_as(value)
    except RuntimeError:
        raise InputError(
            f"relax(held={{{name!r}: ...}}): must be a boolean mask that broadcasts to {tuple(value.shape)}, got "
            f"{mask.dtype} of shape {tuple(mask.shape)}."
        ) from None
