"""A cost that was recorded with its model: it may read parameters, values inside the model, and its input."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from mep.cost import BatchCost, Cost, gradient_of, is_holomorphic
from mep.errors import InputError
from mep.graph.closed_forms.complex import complex_program
from mep.graph.graph import Graph
from mep.graph.inputs import flattened
from mep.graph.ops import Op, Program


def cost_of(graph: Graph, make: Cost, inputs: Mapping[str, Any], output: Tensor, target: Any) -> BatchCost:
    """The cost of a batch: that which was recorded with the model, else the one that `make` makes."""
    return RecordedCost(graph, inputs, target) if graph.cost else make(output, target)


class RecordedCost(BatchCost):
    """The cost of one batch as a function of the graph's output; one number stands for the mean of all examples'.

    Args:
        graph: with a cost.
        inputs: of the batch, by name.
        target: what the cost function takes.
    """

    def __init__(self, graph: Graph, inputs: Mapping[str, Any], target: Any):
        assert graph.cost is not None
        self.program = graph.cost
        leaves = [v for v in flattened(target)[0] if isinstance(v, Tensor)]
        self.given = [leaves[name[1]] if isinstance(name, tuple) else inputs[name] for name in self.program.inputs]

    def value(self, output: Tensor) -> Tensor:
        parts = self.program.join.split(output) if self.program.join else [output]
        run = self._complex[0] if output.is_complex() else self.program.run
        (value,) = run(None, *parts, *self.given)
        if value.ndim == 0:
            return value.expand(len(output))
        if value.shape != output.shape[:1]:
            raise InputError(
                f"cost: the function must return one number per example, shape {tuple(output.shape[:1])}, or one for "
                f"the batch, got {tuple(value.shape)}."
            )
        return value

    def gradient(self, output: Tensor) -> Tensor:
        """By autograd through the cost alone."""
        return gradient_of(self.value, output)

    def is_holomorphic(self, output: Tensor) -> bool:
        return self._complex[1] is None and is_holomorphic(self.value, output)

    @cached_property
    def _complex(self) -> tuple[Program, Op | None]:
        """The program for complex outputs, and the first operation that has no complex form."""
        run = self.program.run
        return complex_program(run, run.inputs[: len(run.inputs) - len(self.given)])

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        return tuple(p for p in self.program.parameters if p.requires_grad)
