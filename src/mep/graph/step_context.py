"""What stays the same within a step, so that every evaluation of the graph is of one and the same energy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mep.graph.closed_forms.activations import Activation
from mep.graph.closed_forms.maxima import MaxPool
from mep.graph.ops import Slot
from mep.guards import Noise


@dataclass
class StepContext:
    """Filled by the first evaluation of a step (`recording`), and read by all later ones.

    Attributes:
        freeze_branches: whether piecewise-linear operations stay on the branch of the free equilibrium; else kinks stay
            kinks.
        branches: by node and operation, where each of them stood. A branch that is not known yet is that of the first
            evaluation to read it.
        noise: the states of the random number generators before each stochastic node.
        clamped: the predictions of nodes that depend on the input alone.
        new_buffers: what the model writes to its buffers.
        branch_changes: None, or a list to which every frozen operation appends how many of its units are off their
            branch, and of how many.
    """

    freeze_branches: bool = True
    recording: bool = True
    branch_changes: list[tuple[Tensor, int]] | None = None
    branches: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    noise: dict[str, Noise] = field(default_factory=dict)
    clamped: dict[str, tuple[Tensor, Any]] = field(default_factory=dict)
    new_buffers: dict[Slot, Tensor] = field(default_factory=dict)

    def on_branch(self, key: tuple[str, str], piece: Activation | MaxPool, x: Tensor) -> Tensor:
        """The operation on the branch of that key, which is that of `x` if it is not known yet."""
        if key not in self.branches and isinstance(piece, MaxPool):
            y, self.branches[key] = piece.value_and_branch(x)
        else:
            y = piece.linearized(x, self.branches.setdefault(key, x.detach()))
        if self.branch_changes is not None:
            branch = self.branches[key]
            self.branch_changes.append((piece.left_branch(x.detach(), branch).sum(), branch.numel()))
        return y
