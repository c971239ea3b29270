"""Links: the nodes of an affine graph as descent uses them, with as few operations as there can be.

Where node n alone reads the state p, `mu_n = W B s_p`: W its weights, B the branches before them. Descent wants of it

    delta_n = t_n - W B t_p                  forward
    force_p = delta_p - B^T W^T delta_n      backward

If W is a matrix and B diagonal, its link writes each to its place by one product and one pointwise operation.
A state with a clamped prediction that begins at rest moves by `t_p = B^T z` alone: what B does not pass never moves it.
Then z is followed in its place, which has the size of what W sees, and only `B B^T` is needed, if that is diagonal:

    delta_n = t_n - W (B B^T z)              force_z = z - W^T delta_n
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mep.activations import MaxPool, Windows
from mep.chain import Chain, Saved
from mep.graph import Graph
from mep.nodes import Held, Node
from mep.steps import Pointwise, Pool, Reshape, Step
from mep.weighted_steps import Convolution, Linear


@dataclass(frozen=True)
class Place:
    """Where descent keeps what belongs to one state. Where nothing has arrived yet there are zeros."""

    t: Tensor
    velocity: Tensor
    force: Tensor
    delta: Tensor


def only_reader(graph: Graph, node: Node) -> Chain | None:
    """The node that alone reads this state, and that alone, ending in its weights; None if there is none."""
    readers = graph.readers[node.name]
    if not node.owns_state or node.name == graph.output or len(readers) != 1:
        return None
    (reader,) = readers
    if not (isinstance(reader, Chain) and reader.owns_state and len(reader.parents) == 1):
        return None
    return reader if isinstance(reader.steps[-1], (Linear, Convolution)) else None


class Branches:
    """B, what stands between a state and the weights of its only reader."""

    def __init__(self, reader: Chain, saved: Saved, state: Tensor):
        self.reader, self.saved, self.state, self.steps = reader, saved, state, reader.steps[:-1]
        *self.kept, self.seen = saved.kept

    @property
    def are_diagonal(self) -> bool:
        """Whether B is: every unit is multiplied by its slope."""
        return all(isinstance(step, Pointwise) for step in self.steps)

    @property
    def are_apart(self) -> bool:
        """Whether the weights see one unit of the state in each of theirs, and none twice: then `B B^T = slopes^2`."""
        return all(isinstance(step, (Pointwise, Reshape)) or _has_windows_apart(step) for step in self.steps)

    @cached_property
    def slopes(self) -> Tensor:
        """`B 1`: what each unit is multiplied by that the weights see, if B is diagonal or they are apart."""
        t = torch.ones_like(self.state)
        for step, kept in zip(self.steps, self.kept, strict=True):
            t = step.push(kept, t)
        return t

    def pull(self, z: Tensor) -> Tensor:
        """`B^T z`."""
        for step, kept in zip(reversed(self.steps), reversed(self.kept), strict=True):
            z = step.pull(kept, z)
        return z


def _has_windows_apart(step: Step) -> bool:
    """Whether it is a max pooling of which no two windows share a unit."""
    if not (isinstance(step, Pool) and type(step.pool) is MaxPool):
        return False
    return Windows(step.pool).overlap() == 1


class Slopes(Step):
    """`y = slopes h`; the pull goes on as `force = delta - slopes g` of the state below, or untouched."""

    def __init__(self, slopes: Tensor, below: Place | None):
        self.slopes, self.below, self.seen = slopes, below, torch.empty_like(slopes)

    def value(self, h: Tensor, held: Held) -> tuple[Tensor, Any]:
        return h * self.slopes, None

    def pull(self, kept: Any, g: Tensor) -> Tensor:
        below = self.below
        return g if below is None else torch.addcmul(below.delta, self.slopes, g, value=-1, out=below.force)

    def push(self, kept: Any, t: Tensor) -> Tensor:
        return torch.mul(t, self.slopes, out=self.seen)


class Product(Linear):
    """A linear layer that writes `delta = t - W u`; what it pulls, or `force = delta - W^T g` of the state below."""

    def __init__(self, layer: Linear, here: Place, below: Place | None):
        super().__init__(layer.module)
        self.weight, self.here, self.below = layer.module.weight.detach(), here, below
        self.transposed = self.weight.t()
        self.pulled = here.t.new_empty(len(here.t), self.weight.shape[1]) if below is None else None

    def pull(self, kept: Any, g: Tensor) -> Tensor:
        below = self.below
        if below is None:
            return torch.mm(g, self.weight, out=self.pulled)
        return torch.addmm(below.delta, g, self.weight, alpha=-1, out=below.force)

    def push(self, kept: Any, t: Tensor) -> Tensor:
        return torch.addmm(self.here.t, t, self.transposed, alpha=-1, out=self.here.delta)


def linked(branches: Branches, here: Place, below: Place, by_z: bool) -> tuple[Chain, Saved]:
    """The link of a state's only reader if it has one, and what it needs as `saved`; `by_z`: z stands for the state.

    What its `push` and `pull` return is delta and the force if it stands in its place; otherwise what every node's do.
    """
    reader, layer, saved = branches.reader, branches.reader.steps[-1], branches.saved
    is_matrix = isinstance(layer, Linear) and here.t.ndim == 2 and layer.module.weight.dtype is here.t.dtype
    if not by_z and not (is_matrix and branches.are_diagonal):
        return reader, saved
    slopes, onto = (branches.slopes.square(), None) if by_z else (branches.slopes, below)
    steps: list[Step] = [Slopes(slopes, onto)] if branches.steps else []
    if isinstance(layer, Linear) and is_matrix:
        layer = Product(layer, here, None if steps and onto else below)
    twin = copy(reader)
    twin.steps = (*steps, layer)
    kept = [*[None] * len(steps), branches.seen]
    return twin, saved._replace(kept=kept, dtypes=saved.dtypes[-len(twin.steps) :])
