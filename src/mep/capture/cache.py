"""The graphs of a model as it is now: captured for each kind of batch, again when the model has changed, and proven."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mep.capture import Leaves, capture
from mep.capture.proof import Proof, prove
from mep.capture.surroundings import Snapshot
from mep.cost import recorded_function
from mep.errors import InputError, TraceError
from mep.graph.graph import Graph
from mep.graph.inputs import dtype_errors, flattened, unflattened
from mep.graph.ops import Ref

_KEPT = 8
"""Graphs that are kept: enough for train and eval, several kinds of batch, and a last smaller one."""
_SLICE = 8
"""A proof on a part of a batch takes one example of so many."""
_SHAPES = 4096
"""Kinds of batch that one graph is known to have seen."""
_DUE = {4**i for i in range(32)}
"""Uses of a graph, and numbers of shapes, at which it is proven."""


@dataclass(eq=False)
class _Known:
    """A graph, what it fits, and how often it was used since it was proven last."""

    graph: Graph
    snapshot: Snapshot
    structures: tuple[Any, ...]
    leaves: list[tuple[Any, ...]]
    """Of the batch: dtype, device, sizes (as in `Graph.sizes`) of each tensor; None, None, the value of any other."""
    orders: list[tuple[int, ...] | None]
    """Of the batch: in which order the dimensions lie in memory, see `_order`: noise is drawn in that of the values."""
    kinds: list[tuple[Any, ...]]
    """Of every parameter the dtype, whether it is trained, the shape, and how it lies in memory."""
    unread: TraceError | None = None
    """Why the cost could not be recorded with the model."""
    uses: int = 0
    proven: int = 0
    shapes: set[Any] = field(default_factory=set)
    """Of batches with which it was used."""

    def takes(self, dtypes: Collection[torch.dtype]) -> bool:
        """Whether its floating-point inputs have one of these dtypes."""
        return all(dtype is None or not dtype.is_floating_point or dtype in dtypes for dtype, _, _ in self.leaves)

    def fits(self, leaves: Sequence[Any]) -> bool:
        """Whether a batch is of the kind that was captured, and the parameters are. Called in every step."""
        for p, (dtype, is_trained, shape, stride) in zip(self.graph.parameters, self.kinds, strict=True):
            if p.dtype != dtype or p.requires_grad != is_trained or p.shape != shape or p.stride() != stride:
                return False
        symbols: dict[str, int] = {}
        for leaf, (dtype, device, sizes), order in zip(leaves, self.leaves, self.orders, strict=True):
            if dtype is None:
                if isinstance(leaf, Tensor) or type(leaf) is not type(sizes) or leaf != sizes:
                    return False
                continue
            if not isinstance(leaf, Tensor) or leaf.dtype != dtype or leaf.device != device or leaf.ndim != len(sizes):
                return False
            is_by_row = leaf.layout is torch.strided and leaf.is_contiguous()
            if (order is not None) if is_by_row else _order(leaf) != order:
                return False
            for length, size in zip(leaf.shape, sizes, strict=True):
                if isinstance(size, int):
                    if length != size:
                        return False
                    continue
                # A graph for two and more examples is one for a single one: the proof is the judge.
                symbol, low, high = size
                if not (low <= length <= high or (low == 2 and length == 1)):
                    return False
                if symbols.setdefault(symbol, length) != length:
                    return False
        return not self.graph.conditions or self.graph.allows(symbols)


def _order(t: Tensor) -> tuple[int, ...] | None:
    """The dimensions of a tensor from the slowest to the fastest in memory; None for row after row."""
    if t.layout is not torch.strided or t.is_contiguous():
        return None
    strides = t.stride()
    return tuple(sorted(range(t.ndim), key=lambda d: -strides[d]))


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
        leaves, structure = flattened(x)
        targets, target_structure = flattened(target) if target is not None else ([], None)
        function = self.function if target is not None else None
        # What decides the graph: the batch, with its target where the cost is recorded as well.
        batch = [*leaves, *targets] if function else leaves
        structures = (function is not None, structure, target_structure if function else None)
        for i, known in enumerate(self.known):
            if known.structures == structures and known.fits(batch) and known.snapshot.matches():
                if i:
                    self.known.insert(0, self.known.pop(i))
                break
        else:
            known = self._capture(x, function, target, structures, batch)
        if target is None or self.proof == "never":
            return known.graph

        # Where shapes are new the graph is judged anew; in another dtype of autocast all are.
        kind, sizes = "", []
        for t in (*leaves, *targets):
            if isinstance(t, Tensor):
                kind = kind or t.device.type
                sizes.append(t.shape)
        shapes = (torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None, *sizes)
        uses, is_new = known.uses + 1, shapes not in known.shapes
        is_due = uses in _DUE or self.proof == "always"
        if is_new and not is_due:  # export takes sizes for larger than one
            is_due = len(known.shapes) + 1 in _DUE or any(1 in shape for shape in sizes)
        if is_due:
            # Autograd keeps all activations; and what was right on a batch of independent examples is so on a part.
            takes_part = saves_memory or (known.proven and not is_new and known.graph.is_separable)
            if not self._prove(known, x, target, max(1, sizes[0][0] // _SLICE) if takes_part else None):
                return known.graph  # the loss was not finite: this use does not count
            known.proven = uses
        if len(known.shapes) < _SHAPES:
            known.shapes.add(shapes)
        known.uses = uses
        return known.graph

    def like_last(self, given: Mapping[str, Tensor], batch: int) -> Any:
        """A batch of the kind that was used last: the inputs that are given by name, and zeros for the others.

        Raises:
            InputError: there was none, or its sizes do not say how large the others are.
        """
        if not self.known:
            name = type(self.model).__name__
            raise InputError(f"The inputs of {name} are not known yet. Way out: first call predict with a batch.")
        dtypes = {p.dtype for p in self.model.parameters()}  # of the batches that fit, the one that was used last
        known, values = next((k for k in self.known if k.takes(dtypes)), self.known[0]), []
        rows = next(sizes[0] for dtype, _, sizes in known.leaves if dtype is not None)
        for ref, (dtype, device, sizes) in zip(known.graph.leaves, known.leaves, strict=False):
            if not isinstance(ref, Ref):
                values.append(ref)
            elif ref.name in given:  # zeros and ones may be given as integers
                value = given[ref.name]
                casts = dtype.is_floating_point and not value.is_floating_point()
                values.append(value.to(dtype) if casts else value)
            else:
                shape = [batch if i == 0 and size == rows else size for i, size in enumerate(sizes)]
                if any(isinstance(size, tuple) for size in shape):
                    raise InputError(
                        f"The input {ref.name!r} has no fixed size. Way out: say what it starts from, "
                        f"start={{{ref.name!r}: torch.zeros(...)}}."
                    )
                values.append(torch.zeros(shape, dtype=dtype, device=device))
        return unflattened(values, known.graph.structure)

    def _capture(self, x: Any, function: Any, target: Any, structures: tuple[Any, ...], batch: list[Any]) -> _Known:
        """Capture the model as it is now, with its cost where there is a function for it."""
        snapshot = Snapshot(self.model, *([self.cost] if callable(self.cost) else []))
        given = self.model, x, self.leaves, self.energy, self.branches
        unread: TraceError | None = None
        try:
            graph = capture(*given, function, target)
        except InputError as error:
            raise InputError(f"{error}{self._before()}") from error
        except TraceError as error:
            if function is None:
                raise
            unread = error  # the cost is run as it is then, and the proof is the judge of that
            try:
                graph = capture(*given)
            except TraceError:
                raise error from None
        free = iter(graph.sizes)
        leaves: list[tuple[Any, ...]] = []
        for v in batch:
            is_tensor = isinstance(v, Tensor)
            leaves.append((v.dtype, v.device, next(free, tuple(v.shape))) if is_tensor else (None, None, v))
        kinds = [(p.dtype, p.requires_grad, p.shape, p.stride()) for p in graph.parameters]
        orders = [_order(v) if isinstance(v, Tensor) else None for v in batch]
        found = _Known(graph, snapshot, structures, leaves, orders, kinds, unread)
        self.known = [found, *self.known[: _KEPT - 1]]
        return found

    def _before(self) -> str:
        """The shapes of the batches before, as a sentence."""
        if not self.known:
            return ""
        shapes = []
        for dtype, _, sizes in self.known[0].leaves[: len(self.known[0].graph.leaves)]:
            if dtype is not None:
                of = [str(n) if isinstance(n, int) else "any" if i else "batch" for i, n in enumerate(sizes)]
                shapes.append(f"{dtype} of shape ({', '.join(of)}{',' * (len(of) == 1)})")
        return f" The last one was {', '.join(shapes)}."

    def _prove(self, known: _Known, x: Any, target: Any, rows: int | None) -> bool:
        kind = self.energy, self.branches, self.leaves
        proof = Proof(self.model, known.graph, self.cost, *kind, known.snapshot, is_known=bool(known.proven))
        try:
            with dtype_errors(self.model):
                return prove(proof, x, target, rows)
        except TraceError as error:
            since = f"{known.uses + 1 - known.proven} steps ago" if known.proven else "not before"
            self.known.remove(known)
            error = known.unread or error
            raise TraceError(f"{error} It was proven {since}; nothing was changed.") from error
