"""What settling leaves behind for natural gradient: every layer's input and error, example by example.

    dC/dW = sum over rows of delta h^T      h: what the layer was applied to,  delta = (mu - s) / beta

At the nudged equilibria both are at hand, and `NaturalGradient.observe` makes its factors of them: no further backward
pass. For beta -> 0, delta is the derivative of each example's cost with respect to the layer's output. Positions of a
sequence are rows of their own, and so are those of a convolution, whose input is unfolded into patches (Grosse and
Martens 2016, "KFC", https://arxiv.org/abs/1602.01407). The uses of a shared weight follow one another.

A weight has rows if its only uses are plain `nn.Linear`s and ungrouped `nn.Conv1d`, `2d`, `3d`, without hooks and
outside modules kept whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mep.energy import Energy
from mep.nodes import Node
from mep.settle import Iterate, Settled


@dataclass(eq=False)
class SettledLayer:
    """One weight at the equilibria of a batch, and the trained bias that is its alone.

    `uses` are its modules with their inputs and errors, `examples` the size of the batch times the phases.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    examples: int = 0
    uses: list[tuple[nn.Module, Tensor, Tensor]] = field(default_factory=list)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Inputs [rows, in] and errors [rows, out]; nothing is unfolded before this is called."""
        inputs, errors = zip(*(_rows(*use) for use in self.uses), strict=True)
        return (inputs[0], errors[0]) if len(inputs) == 1 else (torch.cat(inputs), torch.cat(errors))


def settled_layers(phases: Iterable[tuple[Energy, Settled | Iterate]]) -> list[SettledLayer]:
    """The layers of the nudged phases of one batch; two phases count as two batches.

    Args:
        phases: nudged energies and where settling ended on them.

    Returns:
        One entry for every trained weight that has rows, see above.
    """
    layers: dict[Any, SettledLayer] = {}
    excluded: set[Any] = set()
    beside: dict[Any, set[Any]] = defaultdict(set)
    examples = 0
    for energy, settled in phases:
        examples += energy.batch
        errors = energy.errors(settled.point) if settled.errors is None else settled.errors
        for node in energy.graph.states:
            module: Any = node.weighted
            if module is None or not _is_plain(node, module):
                excluded.update(node.parameters)
                continue
            weight, bias = module.weight, module.bias
            beside[weight].add(bias)
            beside[bias].add(weight)
            inputs = node.weighted_input(settled.point.saved[node.name])
            layer = layers.setdefault(weight, SettledLayer(weight, bias))
            layer.uses.append((module, inputs, errors[node.name]))
    for layer in layers.values():
        layer.examples = examples
        bias = layer.bias
        alone = beside[layer.weight] == {bias} and beside[bias] == {layer.weight}
        if bias is None or bias in excluded or not (bias.requires_grad and alone):
            layer.bias = None
    return [layer for weight, layer in layers.items() if weight.requires_grad and weight not in excluded]


def _is_plain(node: Node, module: Any) -> bool:
    owns = any(p is module.weight for p in node.parameters)  # a parametrised weight is computed
    return owns and getattr(module, "groups", 1) == 1


def _rows(module: nn.Module, inputs: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(module, nn.Linear):
        return inputs.flatten(0, -2), errors.flatten(0, -2)
    return patches(module, inputs), errors.movedim(1, -1).flatten(0, -2)


def patches(conv: Any, inputs: Tensor) -> Tensor:
    """What each position of a convolution sees: [batch * positions, channels * kernel].

    Example:
        >>> conv = nn.Conv1d(1, 5, kernel_size=2)
        >>> patches(conv, torch.tensor([[[1.0, 2.0, 3.0]]]))
        tensor([[1., 2.],
                [2., 3.]])
    """
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    seen = F.pad(inputs, conv._reversed_padding_repeated_twice, mode=mode)
    for dim, (size, stride, step) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True), 2):
        seen = seen.unfold(dim, (size - 1) * step + 1, stride)[..., ::step]
    return seen.movedim(1, 1 + len(conv.kernel_size)).flatten(1 + len(conv.kernel_size)).flatten(0, -2)
