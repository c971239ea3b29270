"""A recorded graph without writes: every value stays what it is, and new values of buffers are results.

`torch.export` records writes as they are, and what runs under `no_grad` as regions of their own. torch's own way to
make such a graph functional, `run_decompositions`, takes several times as long as recording, and drops the regions'
marks. So regions are put among the rest first, with what they read detached; and where all that is written are whole
tensors, every write becomes the operation that returns what it writes: `x.relu_()` is `x.relu()`, and whatever reads x
later reads that.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from mep.capture.rewriting import without_cast

aten = torch.ops.aten
_TORCH, _OURS = str(Path(torch.__file__).parent), str(Path(__file__).parent)
Writes = list[tuple[fx.Node, str]]
"""New values of buffers, and the full names of these."""


class Unrecordable(Exception):
    """An operation that recording would lose, or fail on later without naming it, in the module at `path`."""

    def __init__(self, text: str, path: str = ""):
        super().__init__(text)
        self.path = path


def functional(program: ExportedProgram) -> tuple[ExportedProgram, Writes]:
    """The same program without writes.

    Raises:
        Unrecordable: a write without a gradient to a value that has one.
    """
    _inline_regions(program.graph_module)
    _check_writes(program.graph)
    if (writes := _without_writes(program)) is not None:
        return program, writes
    program = program.run_decompositions({})
    returned: Any = program.graph.output_node().args[0]
    paths = program.graph_signature.buffers_to_mutate
    program.graph.output_node().args = (tuple(returned[len(paths) :]),)
    return program, list(zip(returned, paths.values(), strict=False))


def _inline_regions(module: fx.GraphModule) -> None:
    """Put what runs under `no_grad` among the rest, with what it reads detached."""
    graph = module.graph
    for n in graph.find_nodes(op="call_function", target=torch.ops.higher_order.wrap_with_set_grad_enabled):
        enabled, region, *given = n.args
        inner: Any = getattr(module, region.target)
        _inline_regions(inner)
        for m in list(inner.graph.nodes):
            m.meta.pop("learns", None)  # what it reads may be detached
            without_cast(m)  # one that changes nothing is what it casts, gradient and all
        given_to = dict(zip(inner.graph.find_nodes(op="placeholder"), given, strict=True))
        reads: dict[fx.Node, Any] = dict(given_to)
        with graph.inserting_before(n):
            for place, read in given_to.items():
                if not enabled and isinstance(read, fx.Node) and _has_gradient(read):
                    reads[place] = graph.call_function(aten.detach.default, (read,))
                    reads[place].meta = {**read.meta, "learns": False}
            results: Any = graph.graph_copy(inner.graph, dict(reads))
        # What a region returns as it was given keeps its gradient.
        returned: Any = inner.graph.output_node().args[0]
        results = [given_to.get(own, result) for own, result in zip(returned, results, strict=True)]
        for picked in list(n.users):
            picked.replace_all_uses_with(results[picked.args[1]])
            graph.erase_node(picked)
        graph.erase_node(n)
        if not region.users:
            graph.erase_node(region)


def _has_gradient(n: fx.Node) -> bool:
    """Whether a value depends on parameters by operations with a derivative."""
    for m in n.graph.nodes:
        if "learns" not in m.meta:
            t = m.meta.get("val")
            is_whole = isinstance(t, Tensor) and not t.is_floating_point() and not t.is_complex()
            own = m.op == "placeholder" and isinstance(t, Tensor) and t.requires_grad
            reads = m.target is not aten.detach.default and any(a.meta["learns"] for a in m.all_input_nodes)
            m.meta["learns"] = not is_whole and (own or reads)
        if m is n:
            break
    return bool(n.meta["learns"])


def _check_writes(graph: fx.Graph) -> None:
    """Refuse a write to a value that has a gradient, in a form of it that has none: the value would lose it."""
    aliases: set[fx.Node] = set()
    for n in graph.nodes:
        first: Any = n.args[0] if n.args else None
        if n.target is aten.detach.default and first.op != "placeholder" and _has_gradient(first):
            aliases.add(n)
        elif first in aliases:
            if _returns_a_view(n):
                aliases.add(n)
            if _writes(n) and not _is_norm(n):  # that writes its statistics, not its input
                stack = list((n.meta.get("nn_module_stack") or {}).values())
                raise Unrecordable(
                    f"it writes, without a gradient, into a value that has one ({source_line(n) or n.name}). Write "
                    "what this leaves instead: h = h + (new - h).detach().",
                    str(stack[-1][0]).removeprefix("model").removeprefix(".") if stack else "",
                )


def _without_writes(program: ExportedProgram) -> Writes | None:
    """Make every write to a whole tensor a value; None, with nothing changed, where something else is written."""
    graph, buffers = program.graph, program.graph_signature.inputs_to_buffers
    order = {n: i for i, n in enumerate(graph.nodes)}
    pure = {n: _pure_form(n, buffers) for n in order if _writes(n)}
    is_nested = any(n.op == "get_attr" or "_functorch" in getattr(n.target, "__module__", "") for n in order)
    if None in pure.values() or is_nested:
        return None
    now: dict[fx.Node, fx.Node] = {}
    """Tensor that was written -> its value from then on."""
    for n, form in pure.items():
        with graph.inserting_before(n):
            made = graph.call_function(form, n.args[:8] if _is_norm(n) else n.args, n.kwargs)
            parts = [graph.call_function(operator.getitem, (made, i)) for i in (0, 3, 4)] if _is_norm(n) else [made]
        made.meta = dict(n.meta)
        written: tuple[Any, ...] = n.args[3:5] if _is_norm(n) else n.args[:1]
        if _is_norm(n):  # the result, the new mean and the new variance
            made.meta["val"] = tuple(v.meta["val"] for v in (n, *written))
            for part, val in zip(parts, made.meta["val"], strict=True):
                part.meta = {**n.meta, "val": val}
        for old, new in zip(written, parts[-len(written) :], strict=True):
            now[old], order[new] = new, order[n]
            for user in [u for u in old.users if order.get(u, -1) > order[n]]:
                user.replace_input_with(old, new)
        n.replace_all_uses_with(parts[0])
        graph.erase_node(n)

    def last(value: fx.Node) -> fx.Node:
        while value in now:
            value = now[value]
        return value

    return [(last(old), buffers[old.name]) for old in now if old.name in buffers]


def _is_norm(n: fx.Node) -> bool:
    """Whether this is a normalisation that writes its running statistics: while it trains, which is argument 5."""
    return n.target is aten.batch_norm.default and bool(n.args[5]) and isinstance(n.args[3], fx.Node)


def _writes(n: fx.Node) -> bool:
    """Whether a node writes a tensor, or may."""
    if n.op != "call_function" or isinstance(n.target, torch._ops.HigherOrderOperator):
        return n.op == "call_function"
    target: Any = n.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    hides = target._opname in ("instance_norm", "cudnn_batch_norm") and bool(n.args[5])
    return target._schema.is_mutable or hides or _is_norm(n)


def _pure_form(n: fx.Node, buffers: Mapping[str, str]) -> Any:
    """The operation that returns what this one writes to whole tensors; None if there is none."""
    target: Any = n.target
    name = getattr(target, "_opname", "")
    for w in n.args[3:5] if _is_norm(n) else n.args[:1]:
        if not isinstance(w, fx.Node) or any(map(_returns_a_view, (w, *w.users))):
            return None
        if w.op == "placeholder" and w.name not in buffers:
            return None
    if _is_norm(n):
        return aten._native_batch_norm_legit_functional.default
    packet = getattr(aten, name[:-1], None) if name.endswith("_") and not name.endswith("__") else None
    return getattr(packet, target._overloadname, None) if packet else None


def _returns_a_view(n: fx.Node) -> bool:
    schema = getattr(n.target, "_schema", None)
    returns = schema.returns if schema is not None else ()
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns) or n.target is operator.getitem


def source_line(n: fx.Node) -> str:
    """The innermost line of the user's that made a node."""
    # The line itself is missing where code was typed in.
    found = re.findall(r'File "(.*)", line (\d+), in .*(?:\n    +(?!File ")(.*))?', n.meta.get("stack_trace") or "")
    lines = [(file, line, text) for file, line, text in found if not is_library(file)]
    if not lines:
        return ""
    file, line, text = lines[-1]
    return f"{Path(file).name}:{line}" + (f": `{text}`" if text else "")


def is_library(file: str) -> bool:
    """Whether a file is torch's or ours."""
    return file.startswith((_TORCH, _OURS, "torch/")) or "/mep/graph/" in file
