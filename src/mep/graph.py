"""A model as a graph of nodes with free states, and the two walks over it: forward to predict, backward to pull."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mep.activations import Activation
from mep.errors import InputError
from mep.nodes import Held, Node
from mep.snapshot import Snapshot

Transmit = Callable[[Node, Tensor | None], Tensor | None]


@dataclass
class Point:
    """The graph evaluated at a state: every value, the predictions, and what `pull` and `contract` need."""

    values: dict[str, Any]
    predictions: dict[str, Tensor]
    saved: dict[str, Any]


@dataclass(eq=False)
class Graph:
    """Nodes in topological order. `inputs` are the clamped arguments of `forward`, `output` the node of its result."""

    model: nn.Module
    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    output: str
    kinks: Mapping[str, Activation] = field(default_factory=dict)
    """Junction -> the piecewise-linear activation that it is, alone behind one state (`trace_kinks` only)."""

    def __post_init__(self) -> None:
        self.states = tuple(n for n in self.nodes if n.owns_state)
        self.readers: dict[str, list[Node]] = {node.name: [] for node in self.nodes}
        """Node -> the nodes that read its value."""
        for node in self.nodes:
            for parent in node.parents:
                if parent in self.readers:
                    self.readers[parent].append(node)
        self.is_affine_when_held = all(n.clamped or n.is_affine_when_held for n in self.nodes)
        """Whether no Jacobian changes while the branches are held: pointwise pieces and linear layers only."""
        self.snapshot = Snapshot(self.model)

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter that some node uses, each once."""
        return list(dict.fromkeys(p for n in self.nodes for p in n.parameters))

    def bind(self, x: Any) -> dict[str, Any]:
        """The inputs by name, detached: `x` is a tensor, a tuple (by position) or a dict (by name)."""
        if isinstance(x, Mapping):
            values = dict(x)
        else:
            values = dict(zip(self.inputs, x if isinstance(x, (tuple, list)) else (x,), strict=False))
        if set(values) != set(self.inputs) or (isinstance(x, (tuple, list)) and len(x) != len(values)):
            raise InputError(f"The model takes the inputs {', '.join(self.inputs)}; got {describe(x)}.")
        return {k: v.detach() if isinstance(v, Tensor) else v for k, v in values.items()}

    def evaluate(
        self,
        inputs: Mapping[str, Any],
        held: Held,
        place: Callable[[Node, Tensor], Tensor] | None = None,
        before: Point | None = None,
    ) -> Point:
        """Walk the nodes in order; `place(node, mu)` says where a state stands (by default on its prediction).

        What was known `before` is kept where no parent has moved since, that is, where its value is the same object.
        """
        if held.buffers and not held.recording:
            held.buffers.rewind()
        values, predictions, saved = dict(inputs), {}, {}
        for node in self.nodes:
            if before is None or any(values[p] is not before.values[p] for p in node.parents):
                mu, saved[node.name] = node.evaluate([values[p] for p in node.parents], held)
            else:
                mu = (before.predictions if node.owns_state else before.values)[node.name]
                saved[node.name] = before.saved[node.name]
            if node.owns_state:
                predictions[node.name] = mu
                values[node.name] = place(node, mu) if place else mu
            else:
                values[node.name] = mu
        return Point(values, predictions, saved)

    def reevaluate(self, node: Node, values: Mapping[str, Any], held: Held) -> tuple[Any, Any]:
        """One node alone, within a step: its prediction from these values, and what its `pull` needs."""
        if held.buffers:
            held.buffers.rewind()
        return node.evaluate([values[p] for p in node.parents], held)

    def pull(self, saved: Mapping[str, Any], output_force: Tensor | None, transmit: Transmit) -> None:
        """Walk the nodes from last to first, handing each the sum of its children's pulls; `saved` is a point's.

        `transmit(node, force)` receives that sum (plus `output_force` at the output; None if nothing arrived) and
        returns the force that the node in turn exerts on its own parents. A junction should return what it gets.
        """
        forces: dict[str, Tensor | None] = {self.output: output_force}
        for node in reversed(self.nodes):
            force = transmit(node, forces.pop(node.name, None))
            if force is None or node.clamped:
                continue
            for parent, g in zip(node.parents, node.pull(saved[node.name], force), strict=True):
                if g is not None:
                    known = forces.get(parent)
                    forces[parent] = g if known is None else known + g

    def push(
        self, saved: Mapping[str, Any], errors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The tangents `t_n = errors[n] + sum over the parents of J t`, and those of the weighted inputs.

        They tell how far values move when every state adds its error. Only for graphs that are affine.
        """
        tangents: dict[str, Tensor] = {}
        arriving: dict[str, Tensor] = {}
        for node in self.nodes:
            t, h = None, None
            if not node.clamped:
                t, h = node.push(saved[node.name], [tangents.get(p) for p in node.parents])
            if h is not None:
                arriving[node.name] = h
            if node.owns_state:
                t = errors[node.name] if t is None else t + errors[node.name]
            if t is not None:
                tangents[node.name] = t
        return tangents, arriving

    def rows(self, saved: Mapping[str, Any], index: Tensor) -> dict[str, Any]:
        """What `pull` and `push` need of some examples; only for graphs that are affine."""
        return {node.name: node.rows(saved[node.name], index) for node in self.nodes if not node.clamped}

    def contract(self, point: Point, forces: Mapping[str, Tensor], weight: float) -> dict[nn.Parameter, Tensor]:
        """weight * sum over the nodes of (dmu_n/dtheta)^T forces[n]; an untrained parameter has no entry."""
        total: dict[nn.Parameter, Tensor] = {}
        for node in self.states:
            if not node.parameters:
                continue
            found = node.contract(point.saved[node.name], forces[node.name], weight)
            for p, g in zip(node.parameters, found, strict=True):
                if g is not None:
                    total[p] = total[p] + g if p in total else g
        return total


def describe(x: Any) -> str:
    """What kind of input this is, for messages."""
    if isinstance(x, Mapping):
        return "a dict of " + ", ".join(map(str, x))
    return f"a tuple of {len(x)}" if isinstance(x, (tuple, list)) else type(x).__name__
