"""A graph as a table of plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from mep.graph.graph import Graph
    from mep.graph.node import Node

_HEADER = ("node", "operations", "shape", "parameters", "parents", "module, source")


def table_of(graph: Graph) -> str:
    """One row a node: its operations, the shape of its value, its parameters and parents, and where it comes from."""
    names = {p: name for name, p in graph.model.named_parameters()}
    first = graph.sizes[0][0] if graph.sizes and graph.sizes[0] else None
    batch = first[0] if isinstance(first, tuple) else ""
    rows = [_row(node, names, batch) for node in graph.nodes]
    widths = [max(len(row[i]) for row in (_HEADER, *rows)) for i in range(len(_HEADER) - 1)]
    lines = [_line(row, widths) for row in (_HEADER, *rows)]
    inside, total = graph.share_kept
    notes = [f"input {', '.join(graph.inputs)}; output {graph.output}; {len(graph.states)} states, * junctions"]
    if inside:
        notes.append(share_in_words(inside, total))
    written = [slot.name for node in graph.nodes for slot, _ in node.writes]
    written += [slot.name for write in graph.writes for slot in write.slots]
    if written:
        notes.append(f"written once a step: {', '.join(written)}")
    return "\n".join([*lines, *notes])


def _row(node: Node, names: Mapping[nn.Parameter, str], batch: str) -> Sequence[str]:
    operations = [op.label for op in node.program if op.label != "sym_size"]
    shown = operations if len(operations) <= 3 else [operations[0], f"{len(operations) - 2} more", operations[-1]]
    parameters = [names.get(p, "of the cost") for p in node.parameters]
    shared = _prefix(parameters)
    last = node.program[-1]
    return (
        node.name + ("" if node.owns_state else " *"),
        ", ".join(shown),
        "x".join("batch" if str(size) == batch else str(size) for size in node.shape),
        shared,
        ", ".join(node.parents),
        ", ".join(part for part in (last.module, last.where) if part),
    )


def share_in_words(inside: int, total: int) -> str:
    """Which share of the parameters is inside modules kept whole."""
    return f"{inside:,} of {total:,} parameters learn by backprop inside leaves"


def _prefix(names: Sequence[str]) -> str:
    """`weight, bias` of one module with its path once."""
    homes = {name.rpartition(".")[0] for name in names}
    if len(homes) == 1 and len(names) > 1:
        home = homes.pop()
        return f"{home}.({', '.join(name.rpartition('.')[2] for name in names)})" if home else ", ".join(names)
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more"


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
