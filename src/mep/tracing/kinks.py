"""The reading for exact branches: every kink behind a state that it alone, of all kinks, reads."""

from __future__ import annotations

from torch import fx

from mep.activations import Activation, Kink, Largest
from mep.errors import TraceError
from mep.graph import Graph
from mep.ops import Op
from mep.recording import place
from mep.tracing.reading import Reading
from mep.tracing.rewriting import insert_state, unroll_pool

_NO_RULE = {
    "amax", "amin", "cummax", "cummin", "fractionalmaxpool2d", "fractionalmaxpool3d", "hardshrink", "kthvalue", "max",
    "maxpool1d", "maxpool2d", "maxpool3d", "adaptivemaxpool1d", "adaptivemaxpool2d", "adaptivemaxpool3d", "median",
    "min", "msort", "nanmedian", "nanquantile", "quantile", "rrelu", "sort", "topk",
}  # fmt: skip
"""What has kinks or jumps, and did not take one of the forms with a rule."""


def read_kinks(reading: Reading) -> Graph:
    """The graph of a reading in which all kinks are junctions directly behind states."""
    for n in _moving(reading):
        pool = reading.ops[n].pool
        if pool is not None and not isinstance(pool, Largest):
            unroll_pool(reading.fx, n, pool)
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
            _check_has_rule(n, reading.ops[n])
            continue
        read = n.all_input_nodes[0]
        home = reading.alias.get(read, read)
        if home not in reading.roots or home in taken:
            insert_state(reading.fx, read, [n])
        taken.add(home)
        if n in reading.roots:
            insert_state(reading.fx, n, list(n.users))


def _moving(reading: Reading) -> list[fx.Node]:
    """The operations that some state feeds; the value of the others never changes while settling."""
    found: dict[fx.Node, None] = {}
    for n in reading.data_ops():
        if any(reading.alias.get(a, a) in reading.roots or a in found for a in n.all_input_nodes):
            found[n] = None
    return list(found)


def _kink(op: Op) -> Kink | None:
    if isinstance(op.pool, Largest):
        return op.pool
    return op.activation if isinstance(op.activation, Activation) and op.activation.kinks else None


def _check_has_rule(n: fx.Node, op: Op) -> None:
    name = type(op.target).__name__ if op.kind == "module" else getattr(op.target, "__name__", str(op.target))
    if (
        op.pool is None
        and op.activation is None
        and name.lower().replace("_with_indices", "").replace("_", "") in _NO_RULE
    ):
        raise TraceError(
            f"branches='exact' has no rule for {place(n)}: units that change places, over the examples or in a sorted "
            "order, have no equilibrium of their own at a tie. Way out: branches='held' (the default), amax or amin "
            "over dimensions of an example, or a smooth operation."
        )
