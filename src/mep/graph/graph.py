"""A model as a graph of nodes with free states, and the walks over it: forward to predict, backward for forces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mep.errors import InputError
from mep.graph.closed_forms import FREE_STATE, Kink, Softmax
from mep.graph.closed_forms.potentials import SOFTMAXES
from mep.graph.inputs import describe, flattened
from mep.graph.node import Node
from mep.graph.ops import Program, Ref, Slot, StepContext, leaves_of

Transmit = Callable[[Node, Tensor | None], Tensor | None]


@dataclass
class Point:
    """The graph evaluated at a state: every value, the predictions, and what `vjp` and `param_vjp` need.

    `displacement` is what a nudged point was computed from where that is not its states: how far they are from the free
    ones, over beta (`mep.solvers.relaxation.Displacement`).
    """

    values: dict[str, Any]
    predictions: dict[str, Tensor]
    saved: Mapping[str, Any]
    displacement: Any = None


@dataclass(frozen=True, eq=False)
class Write:
    """What a model writes to its buffers beside its nodes: a program from some values of a point."""

    program: Program
    reads: tuple[str, ...]
    slots: tuple[Slot, ...]


@dataclass(frozen=True, eq=False)
class CostProgram:
    """A cost that reads more than output and target: penalties on parameters, values left on modules, own modules.

    `run` computes it, one number or one per example, from the graph's output (`join.split` makes states of it), the
    inputs by name and the leaves of the target.
    """

    run: Program
    join: Any
    inputs: tuple[Any, ...]
    parameters: tuple[nn.Parameter, ...]


@dataclass(eq=False, repr=False)
class Graph:
    """Nodes in topological order. `inputs` are the clamped arguments of `forward`, `output` the node of its result.

    `structure` is that of the batch that was captured, and `leaves` its leaves: the name of a tensor, or the value of
    anything else, which is fixed. `kept` are the parameters of modules kept whole, and of layers without a state.
    `sizes` has a number for every dimension of every tensor that was recorded, or a symbol that stands for any size
    between two. `stateless` are the places of such layers, or, where states stand behind the activations, of nonlinear
    operations without a state of their own.
    """

    model: nn.Module
    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    output: str
    structure: Any = None
    leaves: tuple[Any, ...] = ()
    writes: tuple[Write, ...] = ()
    cost: CostProgram | None = None
    kept: tuple[nn.Parameter, ...] = ()
    sizes: Sequence[tuple[Any, ...]] = ()
    stateless: tuple[str, ...] = ()
    kinks: Mapping[str, Kink] = field(default_factory=dict)
    """Junction -> the operation with kinks that it is, directly behind a state (`branches="exact"` only)."""
    is_untied: bool = False
    """Whether messages to parents have weights of their own (`mep.graph.untied`), so that there is no energy."""
    conditions: Sequence[Any] = ()
    """Relations between symbols in `sizes` on which something was decided while recording, such as `s % 2 == 0`."""

    def __post_init__(self) -> None:
        self.states = tuple(n for n in self.nodes if n.owns_state)
        self.parameters = tuple(dict.fromkeys(p for n in self.nodes for p in n.parameters))
        """Every parameter that some node uses, each once."""
        self._kept = set(self.kept)
        self.by_name = {node.name: node for node in self.nodes}
        self.readers: dict[str, list[Node]] = {node.name: [] for node in self.nodes}
        """Node -> the nodes that read its value."""
        for node in self.nodes:
            for parent in node.parents:
                if parent in self.readers:
                    self.readers[parent].append(node)
        self.last_read = self._last_read()
        """Node -> the nodes whose values are not read after it; only of those that forces from the output reach."""
        self.slots = tuple(
            s for node in self.nodes for op in node.program for s in leaves_of((op.args, op.kwargs), Slot)
        )
        """Where parameters, buffers and constants are read."""
        self.is_affine_when_held = all(n.clamped or n.is_affine_when_held for n in self.nodes)
        """Whether no Jacobian changes while the branches are held: pointwise pieces and linear layers only."""
        last = self.by_name[self.output].program[-1].label if self.output in self.by_name else ""
        output = self.by_name.get(self.output)
        self.ends_in_softmax = last in SOFTMAXES or (output is not None and isinstance(output.potential, Softmax))
        self.is_separable: bool | None = None
        """Whether no Jacobian couples two examples; None until checked."""
        self._allowed: dict[tuple[tuple[str, int], ...], bool] = {}
        """Lengths -> whether the conditions hold."""
        self.selects: dict[int, bool] = {}
        """Size of batch -> whether some of its examples can be evaluated without the others, where that was tried."""

    def __str__(self) -> str:
        """A table: node, operations, shape, parameters, parents, module and source line."""
        return _table(self)

    def __repr__(self) -> str:
        return f"<Graph of {type(self.model).__name__}: {len(self.nodes)} nodes, {len(self.states)} states>"

    @cached_property
    def share_kept(self) -> tuple[int, int]:
        """How many numbers of the trained parameters learn by backprop inside a node, and how many there are."""
        inside, total = 0, 0
        for p in self.parameters:
            if p.requires_grad:
                total += p.numel()
                inside += p.numel() if p in self._kept else 0
        return inside, total

    def allows(self, lengths: Mapping[str, int]) -> bool:
        """Whether the conditions hold where symbols are these numbers; see `lengths_of`."""
        key = tuple(lengths.items())
        if key not in self._allowed:
            self._allowed[key] = conditions_hold(self.conditions, lengths)
        return self._allowed[key]

    def _last_read(self) -> dict[str, list[str]]:
        reached = {self.output}
        for node in reversed(self.nodes):
            if node.name in reached:
                reached.update(p for p, flows in zip(node.parents, node.flows, strict=True) if flows)
        last_read: dict[str, list[str]] = {node.name: [] for node in self.nodes}
        written = {name for write in self.writes for name in write.reads}
        for node in self.nodes:
            if self.readers[node.name] and node.name in reached and node.name not in written:
                last_read[self.readers[node.name][-1].name].append(node.name)
        return last_read

    def bind(self, x: Any) -> dict[str, Any]:
        """The inputs by name, detached: `x` is a tensor, a tuple (by position) or a dict (by name)."""
        values, structure = flattened(x)
        if structure != self.structure or len(values) != len(self.leaves):
            raise InputError(f"The model takes the inputs {', '.join(self.inputs)}; got {describe(x)}.")
        inputs = {}
        for name, value in zip(self.leaves, values, strict=True):
            if isinstance(name, Ref):
                inputs[name.name] = value.detach()
        return inputs

    def evaluate(
        self,
        inputs: Mapping[str, Any],
        context: StepContext,
        place: Callable[[Node, Tensor], Tensor] | None = None,
        before: Point | None = None,
        lean: bool = False,
    ) -> Point:
        """Walk the nodes in order; `place(node, mu)` says where a state stands (by default on its prediction).

        What was known `before` is kept where no parent has moved since, that is, where its value is the same object.
        A `lean` point forgets the values and predictions that have been read, see `last_read`.
        """
        values, predictions, saved = dict(inputs), dict[str, Tensor](), dict[str, Any]()
        for node in self.nodes:
            name = node.name
            if before is not None and all(values[p] is before.values[p] for p in node.parents):
                mu = (before.predictions if node.owns_state else before.values)[name]
                saved[name] = before.saved[name]
            elif node.clamped:
                mu, saved[name] = self.predict(node, values, context)
            else:
                mu, saved[name] = node.predict(list(map(values.__getitem__, node.parents)), context)
            if node.owns_state:
                predictions[name] = mu
                values[name] = place(node, mu) if place else mu
            else:
                values[name] = mu
            if lean:
                for read in self.last_read[name]:
                    del values[read]
                    predictions.pop(read, None)
        if context.recording and self.writes:
            with torch.no_grad():
                for write in self.writes:
                    new = write.program(context, *(values[name] for name in write.reads))
                    context.new_buffers.update(zip(write.slots, new, strict=True))
        return Point(values, predictions, saved)

    def predict(self, node: Node, values: Mapping[str, Any], context: StepContext) -> tuple[Any, Any]:
        """The prediction of one node from these values, and what its `vjp` needs; once a step where it is clamped."""
        known = context.clamped.get(node.name) if node.clamped else None
        if known is None:
            known = node.predict(list(map(values.__getitem__, node.parents)), context)
            if node.clamped:
                context.clamped[node.name] = known
        return known

    def vjp(
        self,
        saved: Mapping[str, Any],
        output_force: Tensor | None,
        transmit: Transmit,
    ) -> None:
        """Walk the nodes from last to first, with the sum of its children's forces for each; see `vjp_through`.

        `output_force` is added to what arrives at the output.
        """
        self.vjp_through(self.nodes, saved, {self.output: output_force}, transmit)

    def vjp_through(
        self,
        nodes: Sequence[Node],
        saved: Mapping[str, Any],
        forces: dict[str, Tensor | None],
        transmit: Transmit | None = None,
        arriving: dict[str, Tensor | None] | None = None,
    ) -> None:
        """The sums `sum_c J_c^T force_c` over the children c of each of some successive nodes, from last to first.

        Args:
            nodes: all, or a part of the graph.
            saved: of a point, or some rows of it.
            forces: those that arrive from behind, by node; afterwards those on what is before these nodes.
            transmit: from a node and the force that arrives (None if none does) to the force that it exerts on its own
                parents in turn, through its Jacobian. By default the same: then this is backpropagation.
            arriving: filled with what arrives at each state.
        """
        for node in reversed(nodes):
            force = forces.pop(node.name, None)
            if arriving is not None and node.owns_state:
                arriving[node.name] = force
            if transmit is not None:
                force = transmit(node, force)
            if force is None or node.clamped:
                continue
            for parent, g in zip(node.parents, node.vjp(saved[node.name], force), strict=True):
                if g is not None:
                    known = forces.get(parent)
                    forces[parent] = g if known is None else known + g

    def jvp(
        self,
        saved: Mapping[str, Any],
        errors: Mapping[str, Tensor],
        forget: bool = False,
        nodes: Sequence[Node] | None = None,
        tangents: dict[str, Tensor] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The tangents `t_n = errors[n] + sum over the parents of J t`, and those of the weighted inputs.

        That is how far values move when every state adds its error. Only for graphs that are affine.

        Args:
            saved: of a point, or some rows of it.
            errors: by state.
            forget: drop tangents that have been read, see `last_read`; that of the output is left.
            nodes: successive ones, all by default; `tangents` are then those of the nodes before, to be continued.
        """
        tangents = {} if tangents is None else tangents
        input_tangents: dict[str, Tensor] = {}
        for node in self.nodes if nodes is None else nodes:
            name, t = node.name, None
            if not node.clamped:
                t, h = node.jvp(saved[name], list(map(tangents.get, node.parents)))
                if h is not None:
                    input_tangents[name] = h
            if node.owns_state:
                t = errors[name] if t is None else t + errors[name]
            if t is not None:
                tangents[name] = t
            if forget:
                for read in self.last_read[name]:
                    tangents.pop(read, None)
        return tangents, input_tangents

    def rows(self, saved: Mapping[str, Any], index: Tensor) -> dict[str, Any]:
        """What `vjp` and `jvp` need of some examples; only for graphs that are affine."""
        return {node.name: node.rows(saved[node.name], index) for node in self.nodes if not node.clamped}

    def param_vjp(
        self, point: Point, forces: Mapping[str, Tensor], weight: float, nodes: Sequence[Node] | None = None
    ) -> dict[nn.Parameter, Tensor]:
        """weight * sum over the nodes (all by default) of (dmu_n/dtheta)^T forces[n].

        An untrained parameter has no entry.
        """
        total: dict[nn.Parameter, Tensor] = {}
        for node in self.states if nodes is None else nodes:
            if not node.parameters:
                continue
            found = node.param_vjp(point.saved[node.name], forces[node.name], weight)
            for p, g in zip(node.parameters, found, strict=True):
                if g is not None:
                    total[p] = total[p] + g if p in total else g
        return total


def lengths_of(sizes: Sequence[tuple[Any, ...]], x: Any, target: Any = None) -> dict[str, int]:
    """What the symbols in `Graph.sizes` are for the tensors of a batch.

    Example:
        >>> lengths_of([(("s0", 2, 99), 4)], torch.ones(7, 4))
        {'s0': 7}
    """
    tensors = [v for v in (*flattened(x)[0], *flattened(target)[0]) if isinstance(v, Tensor)]
    pairs = ((size, n) for own, t in zip(sizes, tensors, strict=False) for size, n in zip(own, t.shape, strict=False))
    return {size[0]: n for size, n in pairs if isinstance(size, tuple)}


def conditions_hold(conditions: Sequence[Any], lengths: Mapping[str, int]) -> bool:
    """Whether no relation of sympy's is false where symbols of these names are these numbers."""
    for relation in conditions:
        known = {symbol: lengths[str(symbol)] for symbol in relation.free_symbols if str(symbol) in lengths}
        if relation.subs(known) == False:  # noqa: E712 (sympy's own False)
            return False
    return True


_HEADER = ("node", "operations", "shape", "parameters", "parents", "module, source")


def _table(graph: Graph) -> str:
    """One row a node: its operations, the shape of its value, its parameters and parents, and where it comes from."""
    names = {p: name for name, p in graph.model.named_parameters()}
    first = graph.sizes[0][0] if graph.sizes and graph.sizes[0] else None
    batch = first[0] if isinstance(first, tuple) else ""
    rows = [_row(node, names, batch) for node in graph.nodes]
    widths = [max(len(row[i]) for row in (_HEADER, *rows)) for i in range(len(_HEADER) - 1)]
    lines = [_line(row, widths) for row in (_HEADER, *rows)]
    inside, total = graph.share_kept
    starred = "" if all(node.owns_state for node in graph.nodes) else "; * marks a junction, which has no state"
    notes = [f"input {', '.join(graph.inputs)}; output {graph.output}; {len(graph.states)} states{starred}"]
    if inside:
        notes.append(share_in_words(inside, total))
    written = [slot.name for node in graph.nodes for slot, _ in node.writes]
    written += [slot.name for write in graph.writes for slot in write.slots]
    if written:
        notes.append(f"written once a step: {', '.join(written)}")
    return "\n".join([*lines, *notes])


def _row(node: Node, names: Mapping[nn.Parameter, str], batch: str) -> Sequence[str]:
    operations = [op.label for op in node.program if op.label != "sym_size"]
    shown = operations if len(operations) <= 3 else [operations[0], f"{len(operations) - 2} more", operations[-1]]
    if node.potential != FREE_STATE:  # in a Hopfield network, where an activation is part of the state
        shown = [*shown, str(node.potential)]
    last = node.program[-1]
    own = node.name.partition("#")[0]  # the path of its module; with a number behind it from the second call on
    parameters = [names.get(p, "of the cost").removeprefix(f"{own}.") for p in node.parameters]
    return (
        node.name + ("" if node.owns_state else " *"),
        ", ".join(shown),
        "x".join("batch" if str(size) == batch else str(size) for size in node.shape),
        _prefix(parameters),
        ", ".join(node.parents),
        ", ".join(part for part in (last.module, last.where) if part and part != own),
    )


def share_in_words(inside: int, total: int) -> str:
    """Which share of the parameters learns inside modules kept whole, and layers between which no state can stand."""
    return f"{inside:,} of {total:,} parameters learn by backprop inside nodes"


def _prefix(names: Sequence[str]) -> str:
    """`weight, bias` of one module with its path once."""
    homes = {name.rpartition(".")[0] for name in names}
    if len(homes) == 1 and len(names) > 1:
        home = homes.pop()
        return f"{home}.({', '.join(name.rpartition('.')[2] for name in names)})" if home else ", ".join(names)
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more"


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
