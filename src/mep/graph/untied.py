"""A graph whose messages to parents have weights of their own: B in the place of W^T, in the shape of W.

    predict, jvp     mu = W h + b                           as before
    vjp              B^T force                              instead of W^T force
    param_vjp        (force h^T, none for B)
    param_vjp_along  (none for W, force t^T for B)

States that are drawn by such messages come to rest where a vector field vanishes that is no gradient of an energy.

Source: Scellier, Goyal, Binas, Mesnard and Bengio 2018, arXiv:1808.04873.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from torch import Tensor, nn

from mep.errors import ArgumentError
from mep.graph.closed_forms.layers import WeightedOp
from mep.graph.graph import Graph
from mep.graph.node import Chain, Node


class UntiedChain(Chain):
    """A chain whose messages to its parents go through `feedback`, which is read anew in every call.

    Its parameters are those of the chain, and then the feedback weight, if that is a parameter.
    """

    def __init__(self, node: Chain, feedback: Tensor):
        super().__init__(node.layers, **{f.name: getattr(node, f.name) for f in fields(Node)})
        assert node.weighted is not None
        weighted = copy.copy(node.weighted)
        weighted.replace_weight(feedback)
        self.back = copy.copy(node)
        self.back.layers = tuple(weighted if layer is node.weighted else layer for layer in node.layers)
        self.back.parameters = tuple(p for p in weighted.parameters if isinstance(p, nn.Parameter))
        self.parameters = (*node.parameters, *self.back.parameters)

    def vjp(self, saved: Any, force: Tensor) -> Sequence[Tensor | None]:
        return self.back.vjp(saved, force)

    def param_vjp(self, saved: Any, force: Tensor, weight: float) -> Sequence[Tensor | None]:
        return [*super().param_vjp(saved, force, weight), *[None] * len(self.back.parameters)]

    def param_vjp_along(self, saved: Any, tangent: Any, force: Tensor, weight: float) -> Sequence[Tensor | None]:
        none = [None] * (len(self.parameters) - len(self.back.parameters))
        return [*none, *self.back.param_vjp_along(saved, tangent, force, weight)]


def untied_graph(graph: Graph, weights: Mapping[str, Tensor], feedback: Mapping[str, Tensor]) -> Graph:
    """The same graph, with `feedback[name]` for what is sent back through `weights[name]`.

    Raises:
        ArgumentError: a weight is not that of a linear layer or convolution in closed form, or nothing is sent back
            through it.
    """
    of_weight = {id(weights[name]): name for name in feedback}
    nodes, found = list[Node](), set[str]()
    for node in graph.nodes:
        name = next((of_weight[id(p)] for p in node.parameters if id(p) in of_weight), None)
        if name is not None and not node.clamped:
            if not isinstance(node, Chain) or not isinstance(node.weighted, WeightedOp):
                raise _refused(name, f"{node.where} is no linear layer or convolution with a closed form")
            if node.weighted.parameters[0] is not weights[name]:
                raise _refused(name, f"it is not the weight of {node.where}")
            found.add(name)
            node = UntiedChain(node, feedback[name])
        nodes.append(node)
    for name in feedback:
        if name not in found:
            raise _refused(name, "nothing is sent back through it: its layer reads inputs alone, or is not used")
    return replace(graph, nodes=tuple(nodes), is_untied=True)


def _refused(name: str, why: str) -> ArgumentError:
    return ArgumentError(f"EquilibriumPropagation(feedback={{{name!r}: ...}}): {why}. Leave it out.")
