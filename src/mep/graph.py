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
        self, inputs: Mapping[str, Any], held: Held, place: Callable[[Node, Tensor], Tensor] | None = None
    ) -> Point:
        """Walk the nodes in order; `place(node, mu)` says where a state stands (by default on its prediction)."""
        if held.buffers and not held.recording:
            held.buffers.rewind()
        values, predictions, saved = dict(inputs), {}, {}
        for node in self.nodes:
            mu, saved[node.name] = node.evaluate([values[p] for p in node.parents], held)
            if node.owns_state:
                predictions[node.name] = mu
                values[node.name] = place(node, mu) if place else mu
            else:
                values[node.name] = mu
        return Point(values, predictions, saved)

    def pull(self, point: Point, output_force: Tensor | None, transmit: Transmit) -> None:
        """Walk the nodes from last to first, handing each the sum of its children's pulls.

        `transmit(node, force)` receives that sum (plus `output_force` at the output; None if nothing arrived) and
        returns the force that the node in turn exerts on its own parents. A junction should return what it gets.
        """
        forces: dict[str, Tensor | None] = {self.output: output_force}
        for node in reversed(self.nodes):
            force = transmit(node, forces.pop(node.name, None))
            if force is None or node.clamped:
                continue
            for parent, g in zip(node.parents, node.pull(point.saved[node.name], force), strict=True):
                if g is not None:
                    known = forces.get(parent)
                    forces[parent] = g if known is None else known + g

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
