"""What settling leaves behind for natural gradient: every layer's input and error, example by example.

    dC/dW = sum over rows of delta h^T      h: what the layer was applied to,  delta = (mu - s) / beta

At the nudged equilibria both are at hand, and `NaturalGradient.observe` makes its factors of them: no further backward
pass. For beta -> 0, delta is the derivative of each example's cost with respect to the layer's output. Positions of a
sequence are rows of their own, and so are those of a convolution, whose input is unfolded into patches (Grosse and
Martens 2016, "KFC", https://arxiv.org/abs/1602.01407). The uses of a shared weight follow one another.

In a Hopfield network delta is how far the nudge has moved the layer's state, with the other sign: (s_free - s) / beta.
There the gradient has a second part, of how far the layer's input has moved, which is left out of the factors.

A weight has rows if its only uses are linear layers and ungrouped convolutions, each the only ones of their node and
followed there by nothing but pooling, reshaping and other operations with a closed form. Others are left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mep.energy import Energy
from mep.graph.closed_forms.layers import WeightedOp
from mep.settle import Iterate, Settled


@dataclass(eq=False)
class LayerStatistics:
    """One weight at the equilibria of a batch, and the trained bias that is its alone.

    `uses` are its operations with their inputs and errors, `examples` the size of the batch times the phases.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    examples: int = 0
    uses: list[tuple[WeightedOp, Tensor, Tensor]] = field(default_factory=list)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Inputs [rows, in] and errors [rows, out]; nothing is unfolded before this is called."""
        inputs, errors = zip(*(_rows(*use) for use in self.uses), strict=True)
        return (inputs[0], errors[0]) if len(inputs) == 1 else (torch.cat(inputs), torch.cat(errors))


def layer_statistics(phases: Iterable[tuple[Energy, Settled | Iterate]]) -> list[LayerStatistics]:
    """The layers of the nudged phases of one batch; two phases count as two batches.

    Args:
        phases: nudged energies and where settling ended on them.

    Returns:
        One entry for every trained weight that has rows, see above.
    """
    layers: dict[Any, LayerStatistics] = {}
    excluded: set[Any] = set()
    beside: dict[Any, set[Any]] = defaultdict(set)
    examples = 0
    for energy, settled in phases:
        examples += energy.batch
        errors = settled.errors
        if errors is None and energy.is_forward:
            errors = energy.errors(settled.point)
        elif errors is None:
            errors = {name: -moved for name, moved in energy.displacements(settled.point).items()}
        for node in energy.graph.states:
            step: Any = node.weighted
            extra = set(node.parameters) - set(step.parameters if step else ())
            if step is None or extra or not step.has_rows:
                excluded.update(node.parameters)
                continue
            weight, bias = step.weight, step.bias
            beside[weight].add(bias)
            beside[bias].add(weight)
            saved = settled.point.saved[node.name]
            layer = layers.setdefault(weight, LayerStatistics(weight, bias))
            inputs, error = node.weighted_input(saved), node.weighted_error(saved, errors[node.name])
            layer.uses.append((step, inputs.real, error.real))  # of complex phases the real parts count
    for layer in layers.values():
        layer.examples = examples
        bias = layer.bias
        alone = beside[layer.weight] == {bias} and beside[bias] == {layer.weight}
        if bias is None or bias in excluded or not (bias.requires_grad and alone):
            layer.bias = None
    return [layer for weight, layer in layers.items() if weight.requires_grad and weight not in excluded]


def _rows(step: WeightedOp, inputs: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    return step.outer_rows(inputs, errors)
