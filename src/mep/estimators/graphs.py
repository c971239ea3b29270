"""The graph of a model as it is now: traced once, again when the model has changed, and checked on its first batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mep.check import check_graph
from mep.graph import Graph
from mep.tracing import Leaves, argument_names, trace, trace_activations, trace_kinks

_KEPT = 3
"""Older graphs that are kept: enough for a model that goes to and fro between train and eval."""


class Graphs:
    """The graphs of one model, the latest first; `known` are those that it may still be given by."""

    def __init__(self, model: nn.Module, leaves: Leaves, energy: str, branches: str):
        self.model, self.leaves, self.energy, self.branches = model, leaves, energy, branches
        self._checked: set[int] = set()
        self.known: list[Graph] = [self._trace()]

    def of(self, x: Any) -> Graph:
        """That for an input like x."""
        graph = next((g for g in self.known if _fits(x, g) and g.snapshot.matches()), None)
        if graph is None:
            graph = self._trace(argument_names(self.model, x))
            self.known = [graph, *self.known[:_KEPT]]
            self._checked &= {id(g) for g in self.known}
        if id(graph) not in self._checked:
            check_graph(graph, x, against_model=self.energy == "prediction")
            self._checked.add(id(graph))
        return graph

    def _trace(self, inputs: Sequence[str] | None = None) -> Graph:
        if self.energy == "hopfield":
            return trace_activations(self.model, self.leaves, inputs)
        return (trace if self.branches == "held" else trace_kinks)(self.model, self.leaves, inputs)


def _fits(x: Any, graph: Graph) -> bool:
    """Whether an input gives just what the graph takes."""
    if isinstance(x, Mapping):
        return set(x) == set(graph.inputs)
    if isinstance(x, (tuple, list)) and len(x) > 1:
        return argument_names(graph.model, x) in (None, graph.inputs)
    return len(graph.inputs) == 1
