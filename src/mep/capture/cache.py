"""The graphs of a model as it is now: captured for each kind of batch, again when the model has changed, and proven."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mep.capture import Leaves, capture
from mep.capture.cost import RecordedCost
from mep.capture.proof import Proof, prove
from mep.capture.surroundings import Snapshot
from mep.cost import BatchCost, Cost, recorded_function
from mep.errors import MepError, TraceError
from mep.graph.graph import Graph
from mep.graph.inputs import dtype_errors, flattened

_KEPT = 8
"""Graphs that are kept: enough for train and eval, several kinds of batch, and a last smaller one."""
_SLICE = 8
"""A proof on a part of a batch takes one example of so many."""
_SHAPES = 4096
"""Kinds of batch that one graph is known to have seen."""


@dataclass(eq=False)
class _Known:
    """A graph, what it fits, and how often it was used since it was proven last."""

    graph: Graph
    snapshot: Snapshot
    fits: Callable[[list[Any]], bool]
    structures: tuple[Any, Any]
    kinds: tuple[Any, ...]
    unread: TraceError | None = None
    """Why the cost could not be recorded with the model."""
    uses: int = 0
    proven: int = 0
    shapes: dict[Any, None] = field(default_factory=dict)


class Graphs:
    """The graphs of one model, the latest used first.

    Args:
        model: what is captured.
        leaves: modules to keep whole.
        energy, branches: how the graph is read, see `capture`.
        cost: as it was given to the estimator.
        proof: "amortised" (before uses 1, 4, 16, 64, ... of a graph, and of new shapes that it is used with), "always"
            or "never".
    """

    def __init__(self, model: nn.Module, leaves: Leaves, energy: str, branches: str, cost: Any, proof: str):
        self.model, self.leaves, self.energy, self.branches = model, leaves, energy, branches
        self.cost, self.proof = cost, proof
        self.function = recorded_function(cost) if energy == "prediction" else None
        self.known: list[_Known] = []

    @property
    def graphs(self) -> list[Graph]:
        """Those that are kept."""
        return [known.graph for known in self.known]

    def of(self, x: Any, target: Any = None, saves_memory: bool = False) -> Graph:
        """That for a batch like this one, captured and proven where that is due.

        Without a target the model alone is captured, and nothing is proven. Where the step saves memory the
        proof does, too.

        Raises:
            TraceError: the model cannot be captured, or the graph is not the model.
        """
        known = self._known(x, target)
        if target is not None and self.proof != "never":
            shapes = self._shapes(x, target)
            known.uses += 1
            is_new = shapes not in known.shapes
            is_odd = is_new and any(1 in shape for shape in shapes[1:])  # export takes sizes for larger than one
            due = _is_due(known.uses) or (is_new and _is_due(len(known.shapes) + 1)) or self.proof == "always" or is_odd
            # Autograd keeps all activations; and what was right on a batch of independent examples is so on a part.
            takes_part = saves_memory or (known.proven and not is_new and known.graph.is_separable)
            rows = max(1, shapes[1][0] // _SLICE) if takes_part else None
            if due and self._prove(known, x, target, rows):
                known.proven = known.uses
                if is_new and len(known.shapes) < _SHAPES:
                    known.shapes[shapes] = None
            elif due:
                known.uses -= 1
        return known.graph

    def cost_of(self, graph: Graph, make: Cost, inputs: Any, output: Tensor, target: Any) -> BatchCost:
        """The cost of a batch."""
        return RecordedCost(graph, inputs, target) if graph.cost else make(output, target)

    def _known(self, x: Any, target: Any) -> _Known:
        leaves, structure = flattened(x)
        joint = self.function is not None and target is not None
        more, more_structure = flattened(target) if joint else ([], None)
        tensors = [*leaves, *more]
        for i, known in enumerate(self.known):
            if (
                known.structures == (structure, more_structure if joint else _MODEL_ALONE)
                and known.fits(tensors)
                and known.kinds == _kinds(known.graph)
                and known.snapshot.matches()
            ):
                if i:
                    self.known.insert(0, self.known.pop(i))
                return known
        function = self.function if joint else None
        snapshot = Snapshot(self.model, *([self.cost] if callable(self.cost) else []))
        graph, unread = self._captured(x, function, target)
        structures = (structure, more_structure if joint else _MODEL_ALONE)
        found = _Known(graph, snapshot, _fitting(tensors, graph.sizes), structures, _kinds(graph), unread)
        self.known = [found, *self.known[: _KEPT - 1]]
        return found

    def _captured(self, x: Any, function: Any, target: Any) -> tuple[Graph, TraceError | None]:
        """The graph; and, where that is of the model alone, why its cost is not recorded: the proof is the judge."""
        unread = None
        if function is not None:
            try:
                return capture(self.model, x, self.leaves, self.energy, self.branches, function, target), None
            except TraceError as error:
                unread = error
        return capture(self.model, x, self.leaves, self.energy, self.branches), unread

    def _shapes(self, x: Any, target: Any) -> Any:
        tensors = [t for t in (*flattened(x)[0], *flattened(target)[0]) if isinstance(t, Tensor)]
        kind = tensors[0].device.type
        casts = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return casts, *(tuple(t.shape) for t in tensors)

    def _prove(self, known: _Known, x: Any, target: Any, rows: int | None) -> bool:
        proof = Proof(self.model, known.graph, self.cost, self.energy, self.branches, self.leaves, known.snapshot)
        try:
            with dtype_errors(self.model):
                return prove(proof, x, target, rows)
        except TraceError as error:
            since = known.uses - known.proven if known.proven else 0
            proven = f"{since} steps ago" if since else "not before"
            self.known.remove(known)
            error = known.unread or error
            raise TraceError(f"{error} It was proven {proven}; nothing was changed.") from error
        except (MepError, RuntimeError):
            known.uses -= 1
            raise


def _kinds(graph: Graph) -> tuple[Any, ...]:
    """What a capture depends on besides the batch and the model's settings."""
    return tuple([(p.dtype, p.requires_grad) for p in graph.parameters])


_MODEL_ALONE = "the model alone"


def _is_due(n: int) -> bool:
    """Whether n is 1, 4, 16, 64, ..."""
    return n > 0 and n & (n - 1) == 0 and n.bit_length() % 2 == 1


def _fitting(example: list[Any], sizes: Sequence[tuple[Any, ...]]) -> Callable[[list[Any]], bool]:
    """Whether leaves of a batch are like those of the example: `sizes` has a number or a symbol for every dimension."""
    dtypes = [v.dtype if isinstance(v, Tensor) else None for v in example]
    devices = [v.device if isinstance(v, Tensor) else None for v in example]
    free = iter(sizes)
    wanted = [next(free, tuple(v.shape)) if isinstance(v, Tensor) else v for v in example]

    def fits(leaves: list[Any]) -> bool:
        if len(leaves) != len(wanted):
            return False
        symbols: dict[str, int] = {}
        for leaf, size, dtype, device in zip(leaves, wanted, dtypes, devices, strict=True):
            if dtype is None:
                if isinstance(leaf, Tensor) or type(leaf) is not type(size) or leaf != size:
                    return False
                continue
            if not isinstance(leaf, Tensor) or leaf.dtype != dtype or leaf.device != device or leaf.ndim != len(size):
                return False
            for length, allowed in zip(leaf.shape, size, strict=True):
                if isinstance(allowed, int):
                    if length != allowed:
                        return False
                else:
                    symbol, low, high = allowed
                    if (
                        not (low <= length or (low == 2 and length == 1))
                        or length > high
                        or symbols.setdefault(symbol, length) != length
                    ):
                        return False
        return True

    return fits
