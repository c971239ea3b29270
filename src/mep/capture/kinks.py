"""The reading for exact branches: every kink behind a state that it alone, of all kinks, reads."""

from __future__ import annotations

from torch import fx

from mep.capture.reading import Reading
from mep.capture.rewriting import insert_state, label, unroll_pool
from mep.errors import TraceError
from mep.graph.closed_forms import Activation, Kink, Largest
from mep.graph.graph import Graph
from mep.graph.ops import Op

_NO_RULE = {
    "amax", "amin", "cummax", "cummin", "fractional_max_pool2d", "fractional_max_pool3d", "hardshrink", "kthvalue",
    "max", "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "median", "min",
    "adaptive_max_pool3d", "msort", "nanmedian", "nanquantile", "quantile", "rrelu", "sort", "topk", "maximum",
    "minimum", "rrelu_with_noise", "rrelu_with_noise_functional",
}  # fmt: skip
"""What has kinks or jumps, and did not take one of the forms with a rule."""


def read_kinks(reading: Reading) -> Graph:
    """The graph of a reading in which all kinks are junctions directly behind states.

    Where there is no state that this kink alone reads, one is put: the value of a sum before a ReLU, the windows of a
    max pooling. It adds its term to the energy; the free equilibrium stays the forward pass.

    Raises:
        TraceError: an operation has kinks for which there is no rule (sorting, a maximum over the examples).
    """
    for n in _moving(reading):
        pool = reading.ops[n].pool
        if pool is not None and not isinstance(pool, Largest):
            unroll_pool(n, pool)
    reading.read()
    _give_states(reading)
    reading.read()
    kinks = {n: kink for n in _moving(reading) if (kink := _kink(reading.ops[n])) is not None}
    reading.junctions |= kinks.keys()
    graph = reading.graph()
    graph.kinks = {reading.names[n]: kink for n, kink in kinks.items()}
    return graph


def _give_states(reading: Reading) -> None:
    """Put a state before every kink that stands behind none, or behind one that another kink reads; and an output."""
    taken: set[fx.Node] = set()
    for n in _moving(reading):
        if _kink(reading.ops[n]) is None:
            _check_has_rule(reading, n)
            continue
        home = n.all_input_nodes[0]
        if home not in reading.roots or home in taken:
            insert_state(home, [n])
        taken.add(home)
        if n in reading.roots:
            insert_state(n, list(n.users))


def _moving(reading: Reading) -> list[fx.Node]:
    """The operations that some state feeds; the value of the others never changes while settling."""
    found: dict[fx.Node, None] = {}
    for n in reading.data_ops():
        if any(a in reading.roots or a in found for a in n.all_input_nodes):
            found[n] = None
    return list(found)


def _kink(op: Op) -> Kink | None:
    if isinstance(op.pool, Largest):
        return op.pool
    return op.activation if isinstance(op.activation, Activation) and op.activation.kinks else None


def _check_has_rule(reading: Reading, n: fx.Node) -> None:
    op = reading.ops[n]
    if op.pool is None and op.activation is None and label(n).removesuffix("_with_indices") in _NO_RULE:
        raise TraceError(
            f"branches='exact' has no rule for {reading.place(n)}: units that change places, over the examples or in a "
            "sorted order, have no equilibrium of their own at a tie. Way out: branches='held' (the default), amax or "
            "amin over dimensions of an example, or a smooth operation."
        )
