"""Bringing operations with kinks to few forms: pointwise activations, and `largest` of a last dimension.

    maximum(a, b)     reduced(largest(pair(a, b)))                 minimum, amin, min: the negatives of their negatives
    amax(x, dims)     reduced(largest(gathered(x, dims)))          max(x, dim), if only its values are read
    prelu(x)          leaking(x, relu(x), slope)

`trace_kinks` also turns max pooling into `largest` of its windows, and gives states of their own to the kinks' inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from mep import activations as act
from mep.ops import has_hooks

_EXTREMES = ("maximum", "minimum", "amax", "amin", "max", "min")
_PAIRS = ("maximum", "minimum")


def in_few_forms(graph: fx.Graph, root: nn.Module) -> None:
    """Rewrite maxima, minima and PReLU."""
    for n in list(graph.nodes):
        name = _torch_name(n)
        if name in _EXTREMES:
            _rewrite_extreme(graph, n, name)
        elif name == "prelu" and len(n.args) == 2:
            _rewrite_prelu(graph, n, n.args[0], n.args[1])
        elif n.op == "call_module" and len(n.args) == 1:
            module = root.get_submodule(str(n.target))
            if type(module) is nn.PReLU and not has_hooks(module):
                with graph.inserting_before(n):
                    slope = graph.create_node("get_attr", f"{n.target}.weight")
                _rewrite_prelu(graph, n, n.args[0], slope)


def unroll_pool(graph: fx.Graph, n: fx.Node, pool: act.MaxPool) -> None:
    """Max pooling as the largest of its windows."""
    put = _Putting(graph, n)
    _replace([n], put(torch.squeeze, put(act.largest, put(act.Windows(pool), n.args[0])), -1))


def insert_state(graph: fx.Graph, value: fx.Node, readers: Iterable[fx.Node]) -> fx.Node:
    """A state of its own on a value; it is what these readers read from now on."""
    with graph.inserting_after(value):
        state = graph.create_node("call_function", act.own_state, (value,), name=f"{value.name}_state")
    state.stack_trace = value.stack_trace
    for reader in readers:
        reader.replace_input_with(value, state)
    return state


class _Putting:
    """Calls that stand in place of a node."""

    def __init__(self, graph: fx.Graph, n: fx.Node):
        self.graph, self.n = graph, n

    def __call__(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        with self.graph.inserting_before(self.n):
            name = getattr(function, "__name__", type(function).__name__.lower())
            made = self.graph.create_node("call_function", function, args, name=name)
        made.stack_trace = self.n.stack_trace
        return made


def _rewrite_extreme(graph: fx.Graph, n: fx.Node, name: str) -> None:
    """A maximum or minimum of two tensors, or over dimensions."""
    x, other, keepdim = _arguments(n)
    dims = (other,) if isinstance(other, int) else tuple(other) if isinstance(other, (tuple, list)) else ()
    ends = [n]
    if dims and name in ("max", "min"):
        ends = list(n.users)
        if not all(_reads_values(user) for user in ends):
            return
    if not isinstance(x, fx.Node) or not (dims or isinstance(other, fx.Node)) or (name in _PAIRS and dims):
        return
    put = _Putting(graph, n)
    together = put(act.gathered, x, dims) if dims else put(act.pair, x, other)
    is_minimum = "min" in name
    found = put(act.largest, put(torch.neg, together) if is_minimum else together)
    found = put(torch.neg, found) if is_minimum else found
    _replace(ends, put(act.reduced, found, dims, keepdim) if dims else put(torch.squeeze, found, -1))
    if ends != [n]:
        graph.erase_node(n)


def _rewrite_prelu(graph: fx.Graph, n: fx.Node, x: Any, slope: Any) -> None:
    put = _Putting(graph, n)
    _replace([n], put(act.leaking, x, put(F.relu, x), slope))


def _replace(old: Iterable[fx.Node], new: fx.Node) -> None:
    for n in old:
        n.replace_all_uses_with(new)
        n.graph.erase_node(n)


def _torch_name(n: fx.Node) -> str:
    """The name of the tensor method or function of torch's that is called, or nothing."""
    if n.op == "call_method":
        return str(n.target)
    name = getattr(n.target, "__name__", "") if n.op == "call_function" else ""
    return name if getattr(torch, name or "-", None) is n.target else ""


def _arguments(n: fx.Node) -> tuple[Any, Any, bool]:
    """What is compared, what with (or over which dimensions), and `keepdim`."""
    given = dict(zip(("input", "other", "keepdim"), n.args, strict=False)) | dict(n.kwargs)
    return given.get("input"), given.get("other", given.get("dim")), bool(given.get("keepdim", False))


def _reads_values(user: fx.Node) -> bool:
    """Whether it picks the values of `(values, indices)`."""
    return user.args[1:] in ((0,), ("values",)) and user.target in (operator.getitem, getattr)
