"""A model, and the cost with it, as one functional graph of ATen operations: `torch.export`, without its surprises.

`torch.export` records what runs, with parameters and buffers as inputs; made functional, writes through views are
ordinary values and new buffer values are outputs. What it loses is mended or refused here:

- a `no_grad` region loses its mark when the graph is made functional: what it returns is detached before;
- an `autograd.Function` is inlined without its backward: it is kept whole (`whole.py`);
- what `forward` leaves on modules, and hooks elsewhere, would be fake tensors: it is put back;
- a write to a parameter would be dropped: it is refused.
"""

from __future__ import annotations

import io
import logging
import operator
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from mep.capture.rewriting import without_casts
from mep.capture.state import check_state, untouched
from mep.capture.whole import kept_whole, target_of
from mep.errors import MepError, TraceError, require
from mep.graph.inputs import call_model, flattened, unflattened
from mep.graph.ops import Slot

aten = torch.ops.aten
Leaves = Sequence[type[nn.Module] | str]
_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parent)


@dataclass(frozen=True, eq=False)
class Exported:
    """What was recorded.

    Attributes:
        graph: functional, of ATen operations.
        slots: placeholder -> the parameter, buffer or constant it stands for.
        inputs, targets: placeholders of the tensors of the batch, in their order.
        structure: of the model's result, and which of its leaves are tensors.
        sizes: of inputs and targets, a number for every dimension, or (symbol, smallest, largest).
        kept: modules kept whole.
        written: the buffers that are written, in the order of the results.
        has_cost: whether the last result is the cost.
    """

    graph: fx.Graph
    slots: dict[fx.Node, Slot]
    inputs: list[fx.Node]
    targets: list[fx.Node]
    structure: Any
    sizes: list[tuple[Any, ...]]
    kept: list[nn.Module]
    written: list[Slot]
    has_cost: bool

    @property
    def results(self) -> list[Any]:
        """What the graph returns as it stands now: new buffers, the tensors of the model's result, the cost."""
        returned: Any = self.graph.output_node().args[0]
        return list(returned)

    @property
    def writes(self) -> list[tuple[fx.Node, Slot]]:
        """New values of buffers."""
        return list(zip(self.results, self.written, strict=False))

    @property
    def outputs(self) -> list[fx.Node]:
        """The tensors of the model's result."""
        own = self.results[len(self.written) :]
        return own[:-1] if self.has_cost else own

    @property
    def cost(self) -> fx.Node | None:
        """What the cost function returned, if one was given."""
        return self.results[-1] if self.has_cost else None


def export(
    model: nn.Module, x: Any, leaves: Leaves, cost: Callable[..., Any] | None, target: Any, symbols: bool = True
) -> Exported:
    """Record a model on an example input, with symbols for the sizes of the batch where that is possible.

    Raises:
        TraceError: naming the line, and the smallest module to keep whole.
    """
    check_state(model)
    check_leaves(model, leaves)
    plain = getattr(model, "_orig_mod", model)
    types = tuple(leaf for leaf in leaves if isinstance(leaf, type))
    names = {leaf for leaf in leaves if isinstance(leaf, str)}

    def is_leaf(path: str, module: nn.Module) -> bool:
        return isinstance(module, types) or path.removeprefix("model").removeprefix(".") in names

    failure: Exception | None = None
    extra = [cost] if cost is not None else []
    with untouched(plain, *extra), _said_when_slow(f"reading {type(plain).__name__}"), _quiet():
        for dynamic in (True, False) if symbols else (False,):
            root = _Called(plain, cost, x, target)
            with kept_whole(root, is_leaf) as kept:
                try:
                    return _read(root, plain, cost, *_functional(_exported(root, dynamic)), kept)
                except MepError:
                    raise
                except Exception as error:
                    failure = failure or error
    assert failure is not None
    raise _refusal(failure, plain) from failure


def check_leaves(model: nn.Module, leaves: Leaves, call: str = "trace") -> None:
    """Refuse leaves that are no modules of the model; `call` is what was asked for it."""

    def are_named(given: Any) -> bool:
        return isinstance(given, (tuple, list, set)) and all(isinstance(leaf, (type, str)) for leaf in given)

    require(call, "leaves", leaves, are_named, "a tuple of module types, or of qualified names")
    modules = dict(model.named_modules())
    for leaf in leaves:
        known = leaf in modules or f"_orig_mod.{leaf}" in modules
        if not known and not (isinstance(leaf, type) and any(isinstance(m, leaf) for m in modules.values())):
            raise TraceError(f"leaves=...: {leaf!r} is no module of {type(model).__name__}.")


class _Called(nn.Module):
    """The model and its cost as one function of all tensors of a batch."""

    def __init__(self, model: nn.Module, cost: Callable[..., Any] | None, x: Any, target: Any):
        super().__init__()
        self.model = model
        self.criterion = cost if isinstance(cost, nn.Module) else None
        self.function = cost
        self.x, self.x_structure = flattened(x)
        self.y: list[Any] = []
        self.y_structure: Any = None
        if cost is not None:
            self.y, self.y_structure = flattened(target)
        self.result = SimpleNamespace(structure=None, are_tensors=[])
        self.training = model.training

    @property
    def tensors(self) -> list[Tensor]:
        return [v for v in (*self.x, *self.y) if isinstance(v, Tensor)]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        homes = [m._buffers for m in self.modules() if m._buffers]
        before = [(home, key, b) for home in homes for key, b in home.items() if b is not None]
        given = iter([t.clone() for t in tensors])  # forward may write to them
        x = [next(given) if isinstance(v, Tensor) else v for v in self.x]
        output = call_model(self.model, unflattened(x, self.x_structure))
        leaves, self.result.structure = pytree.tree_flatten(output)
        self.result.are_tensors = [isinstance(v, Tensor) for v in leaves]
        found = [v for v in leaves if isinstance(v, Tensor)]
        if self.function is not None:
            y = [next(given) if isinstance(v, Tensor) else v for v in self.y]
            cost = (self.criterion or self.function)(output, unflattened(y, self.y_structure))
            if not isinstance(cost, Tensor):
                raise TypeError(f"the cost returned {type(cost).__name__}, not a tensor")
            found.append(cost)
        for home, key, buffer in before:  # one that was bound anew is written, as every other
            new = home.get(key)
            if isinstance(new, Tensor) and new is not buffer:
                with torch.no_grad():
                    buffer.copy_(new)
                home[key] = buffer
        return tuple(found)


def _exported(root: _Called, dynamic: bool) -> ExportedProgram:
    tensors = tuple(t.detach() for t in root.tensors)
    shapes = (tuple(_symbols(t) for t in tensors),) if dynamic else None
    # A graph is run under the autocast of its step; and with autograd off, no_grad regions would leave no mark.
    no_autocast = torch.autocast(tensors[0].device.type, enabled=False)
    # Remembering what operations make of shapes halves the time of large models, and doubles that of small ones.
    recurs = torch._dynamo.config.patch(fake_tensor_cache_enabled=sum(1 for _ in root.modules()) > 24)
    # Dispatch modes of the caller, which count operations for instance, do not apply to stand-ins.
    with (
        no_autocast,
        recurs,
        torch.enable_grad(),
        _disable_current_modes(),
        _in_forms_that_are_recorded(),
        _NoAutograd(),
    ):
        return torch.export.export(root, tensors, dynamic_shapes=shapes, strict=False)


class _Unrecordable(Exception):
    """An operation that recording would lose, or fail on later without naming it, in the module at `path`."""

    def __init__(self, text: str, path: str = ""):
        super().__init__(text)
        self.path = path


class _NoAutograd(TorchFunctionMode):
    """Refuses derivatives while a model is recorded."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.autograd.grad or func is Tensor.backward:
            raise _Unrecordable("it differentiates, which a recorded graph cannot contain.")
        return func(*args, **(kwargs or {}))


@contextmanager
def _in_forms_that_are_recorded() -> Iterator[None]:
    """Inside, `torch.inference_mode` is `torch.no_grad`, and `.data` is `.detach()`, which are recorded."""
    mode, tensor = torch.inference_mode, torch.Tensor
    own = mode.__enter__, mode.__exit__

    def enter(self: Any) -> None:
        self.instead = torch.set_grad_enabled(not self.mode and torch.is_grad_enabled())

    def leave(self: Any, *_: object) -> None:
        self.instead.__exit__(None, None, None)

    def write(self: Tensor, new: Tensor) -> None:
        with torch.no_grad():
            self.copy_(new)

    mode.__enter__, mode.__exit__ = enter, leave  # type: ignore[method-assign]
    tensor.data = property(lambda t: t.detach(), write)  # type: ignore[assignment]
    try:
        yield
    finally:
        mode.__enter__, mode.__exit__ = own  # type: ignore[method-assign]
        del tensor.data


def _symbols(t: Tensor) -> dict[int, Any]:
    """The sizes that may differ from batch to batch: of examples, and of positions in sequences."""
    n = 2 if t.ndim == 3 or not t.is_floating_point() else 1
    return {d: Dim.AUTO for d in range(min(n, t.ndim)) if t.shape[d] > 1}


Writes = list[tuple[fx.Node, str]]
"""New values of buffers, and the full names of these."""


def _functional(program: ExportedProgram) -> tuple[ExportedProgram, Writes]:
    """The functional graph.

    torch's own way takes several times as long as recording. Where all that is written are whole tensors,
    `_without_writes` does the same.
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
        without_casts(inner.graph)  # a cast that changes nothing is what it casts, gradient and all
        places = dict(zip(inner.graph.find_nodes(op="placeholder"), given, strict=True))
        with graph.inserting_before(n):
            reads = places if enabled else {place: _detached(graph, g) for place, g in places.items()}
            results: Any = graph.graph_copy(inner.graph, dict(reads))
        returned: Any = inner.graph.output_node().args[0]
        results = [places.get(own, result) for own, result in zip(returned, results, strict=True)]
        for picked in list(n.users):
            picked.replace_all_uses_with(results[picked.args[1]])
            graph.erase_node(picked)
        graph.erase_node(n)
        if not region.users:
            graph.erase_node(region)


def _check_writes(graph: fx.Graph) -> None:
    """Refuse a write to a value that has a gradient, in a form of it that has none: the value would lose it."""
    aliases: set[fx.Node] = set()
    for n in graph.nodes:
        first: Any = n.args[0] if n.args else None
        if n.target is aten.detach.default and _has_gradient(first) and first.op != "placeholder":
            aliases.add(n)
        elif first in aliases:
            if _returns_a_view(n):
                aliases.add(n)
            if _writes(n) and not _is_norm(n):  # that writes its statistics, not its input
                raise _Unrecordable(
                    f"it writes, without a gradient, into a value that has one ({source_line(n) or n.name}). Write "
                    "what this leaves instead: h = h + (new - h).detach().",
                    _path_of(n),
                )


def _path_of(n: fx.Node) -> str:
    """The module that made a call."""
    stack = list((n.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]).removeprefix("model").removeprefix(".") if stack else ""


def _has_gradient(n: Any) -> bool:
    """Whether a value depends on parameters by operations with a derivative."""
    if not isinstance(n, fx.Node) or n.target is aten.detach.default:
        return False
    t = n.meta.get("val")
    if isinstance(t, Tensor) and not t.is_floating_point() and not t.is_complex():
        return False
    if "learns" not in n.meta:
        own = n.op == "placeholder" and isinstance(t, Tensor) and t.requires_grad
        n.meta["learns"] = own or any(map(_has_gradient, n.all_input_nodes))
    return bool(n.meta["learns"])


def _detached(graph: fx.Graph, n: fx.Node) -> fx.Node:
    """A value through which no gradient flows; where none does anyway, the value itself."""
    if not _has_gradient(n):
        return n
    detached = graph.call_function(aten.detach.default, (n,))
    detached.meta = dict(n.meta)
    return detached


def _without_writes(program: ExportedProgram) -> Writes | None:
    """Make every write to a whole tensor a value; None, with nothing changed, where something else is written."""
    graph, buffers = program.graph, program.graph_signature.inputs_to_buffers
    nodes = list(graph.nodes)
    pure = {n: _pure_form(n, buffers) for n in nodes if _writes(n)}
    is_nested = any(n.op == "get_attr" or "_functorch" in getattr(n.target, "__module__", "") for n in nodes)
    if None in pure.values() or is_nested:
        return None
    order = {n: i for i, n in enumerate(nodes)}
    now: dict[fx.Node, fx.Node] = {}
    """Tensor that was written -> its value by now."""

    def becomes(old: fx.Node, new: fx.Node, at: fx.Node) -> None:
        now[old] = new
        order[new] = order[at]
        for user in [u for u in old.users if order.get(u, -1) > order[at]]:
            user.replace_input_with(old, new)

    def last(value: fx.Node) -> fx.Node:
        while value in now:
            value = now[value]
        return value

    for n, form in pure.items():
        with graph.inserting_before(n):
            made = graph.call_function(form, n.args[: 8 if _is_norm(n) else None], n.kwargs)
            made.meta = dict(n.meta)
            if not _is_norm(n):
                becomes(n.args[0], made, n)
                n.replace_all_uses_with(made)
                graph.erase_node(n)
                continue
            parts = [graph.call_function(operator.getitem, (made, i)) for i in (0, 3, 4)]
        kinds = [n.meta["val"], *(statistic.meta["val"] for statistic in n.args[3:5])]
        made.meta["val"] = tuple(kinds)
        for part, kind in zip(parts, kinds, strict=True):
            part.meta = {**n.meta, "val": kind}
        for statistic, part in zip(n.args[3:5], parts[1:], strict=True):
            becomes(statistic, part, n)
        n.replace_all_uses_with(parts[0])
        graph.erase_node(n)
    return [(last(old), buffers[old.name]) for old in now if old.name in buffers]


def _is_norm(n: fx.Node) -> bool:
    """Whether this is a normalisation that writes its running statistics: while it trains, which is argument 5."""
    return n.target is aten.batch_norm.default and bool(n.args[5]) and isinstance(n.args[3], fx.Node)


def _writes(n: fx.Node) -> bool:
    """Whether a node writes a tensor, or may."""
    if n.op != "call_function" or _is_norm(n) or isinstance(n.target, torch._ops.HigherOrderOperator):
        return n.op == "call_function"
    target: Any = n.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return target._schema.is_mutable or (target._opname in ("instance_norm", "cudnn_batch_norm") and bool(n.args[5]))


def _pure_form(n: fx.Node, buffers: Mapping[str, str]) -> Any:
    """The operation that returns what this one writes to its first argument, a whole tensor; None if there is none."""
    if _is_norm(n):
        written = n.args[3:5]
        pure: Any = aten._native_batch_norm_legit_functional.default
    else:
        target: Any = n.target
        name = getattr(target, "_opname", "")
        packet = getattr(aten, name[:-1], None) if name.endswith("_") and not name.endswith("__") else None
        pure = getattr(packet, target._overloadname, None) if packet is not None else None
        written = n.args[:1]
    whole = all(
        isinstance(w, fx.Node) and _is_whole(w) and (w.op != "placeholder" or w.name in buffers) for w in written
    )
    return pure if whole else None


def _is_whole(n: fx.Node) -> bool:
    """Whether a tensor is no view, and has none."""
    return not any(_returns_a_view(m) for m in (n, *n.users))


def _returns_a_view(n: fx.Node) -> bool:
    schema = getattr(n.target, "_schema", None)
    returns = schema.returns if schema is not None else ()
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns) or n.target is operator.getitem


def _read(
    root: _Called, model: nn.Module, cost: Any, program: ExportedProgram, writes: Writes, kept: list[nn.Module]
) -> Exported:
    signature, graph = program.graph_signature, program.graph
    if signature.parameters_to_mutate:
        name = next(iter(signature.parameters_to_mutate.values())).removeprefix("model.")
        raise TraceError(
            f"{type(model).__name__} writes to its parameter `{name}` in forward, and a step would drop that. Way out: "
            "write after the step, or make it a buffer (register_buffer)."
        )
    own = {id(t): s for t, s in _tensors_of(model)} | {id(t): s for t, s in _tensors_of(root.criterion, "cost.")}
    tensors = dict(root.named_parameters(remove_duplicate=False)) | dict(root.named_buffers(remove_duplicate=False))
    for n in graph.find_nodes(op="call_function", target=torch.ops.mep.whole.default):
        n.target = target_of(n.args[1])
    slots: dict[fx.Node, Slot] = {}
    places = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    for held in (signature.inputs_to_parameters, signature.inputs_to_buffers):
        for name, path in held.items():
            t = tensors[path] if path in tensors else program.constants[path]
            slots[places[name]] = own.get(id(t)) or Slot({path: t}, path, path.removeprefix("model."))
    for name, path in signature.inputs_to_lifted_tensor_constants.items():
        slots[places[name]] = Slot({path: program.constants[path]}, path, path.removeprefix("model."))
    given = [places[name] for name in signature.user_inputs if name in places]
    n_inputs = sum(isinstance(v, Tensor) for v in root.x)
    returned: Any = graph.output_node().args[0]
    graph.output_node().args = (tuple([*(value for value, _ in writes), *returned]),)
    written = [own[id(tensors[path])] for _, path in writes]
    return Exported(
        graph,
        slots,
        given[:n_inputs],
        given[n_inputs:],
        (root.result.structure, root.result.are_tensors),
        [_sizes(n, program) for n in given],
        kept,
        written,
        cost is not None,
    )


def _sizes(n: fx.Node, program: ExportedProgram) -> tuple[Any, ...]:
    found: list[Any] = []
    for size in n.meta["val"].shape:
        symbol = None if isinstance(size, int) else size.node.expr
        if symbol is not None and symbol.is_Symbol and symbol in program.range_constraints:
            bounds = program.range_constraints[symbol]
            found.append(
                (str(symbol), int(bounds.lower), sys.maxsize if "oo" in str(bounds.upper) else int(bounds.upper))
            )
        else:
            found.append(int(size))
    return tuple(found)


def _tensors_of(module: nn.Module | None, prefix: str = "") -> Iterator[tuple[Tensor, Slot]]:
    """Every parameter and buffer of a module, with the place where it is found again."""
    for path, m in module.named_modules() if module is not None else ():
        homes: list[Any] = [m._parameters, m._buffers]
        for home in homes:
            for key, t in home.items():
                if t is not None:
                    name = f"{prefix}{path}.{key}" if path else f"{prefix}{key}"
                    is_dict = isinstance(home, dict)  # a scripted module's is not
                    yield t, Slot(home if is_dict else {key: t}, key, name)


def _refusal(error: Exception, model: nn.Module) -> TraceError:
    names = {module: name for name, module in model.named_modules()}
    owners = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, _Unrecordable) and error.path:
        owners = [model.get_submodule(error.path)]
    inside = [m for m in owners if isinstance(m, nn.Module) and names.get(m)]
    if inside:
        kind = type(inside[-1]).__name__
        way_out = f"keep `{names[inside[-1]]}` whole, leaves=({kind},)"
    else:
        way_out = "move this code into a module of its own and keep that whole, leaves=(ThatModule,)"
    return TraceError(
        f"Cannot read {type(model).__name__}: {_first_sentence(error)}{_user_line(error)}\n"
        f"Way out: {way_out}: autograd runs inside it, equilibrium propagation between it and the rest."
    )


def _first_sentence(error: Exception) -> str:
    text = str(error).strip().split("\n\n")[0].split("\n")[0]
    if "data-dependent" in text:
        return f"what it does next depends on the values of tensors ({text.rstrip('.')})."
    if "fake tensor" in text.lower():
        return "it makes tensors in a way that a recorded graph cannot contain."
    if isinstance(error, _Unrecordable):
        return text
    return f"{type(error).__name__}: {text}"


def _user_line(error: Exception) -> str:
    """The innermost line that is neither torch's nor ours."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((_TORCH, _OURS, "<"))]
    frames = [f for f in frames if f.line and Path(f.filename).parent.name != "graph"]
    if not frames:
        return ""
    last = frames[-1]
    return f"\n  {Path(last.filename).name}, line {last.lineno} in {last.name}: {last.line}"


def source_line(n: fx.Node) -> str:
    """The innermost line of the user's that made a node."""
    # The line itself is missing where code was typed in.
    found = re.findall(r'File "(.*)", line (\d+), in .*(?:\n    +(?!File ")(.*))?', n.meta.get("stack_trace") or "")
    lines = [
        f"{Path(file).name}:{number}" + (f": `{text}`" if text else "")
        for file, number, text in found
        if not _is_library(file)
    ]
    return lines[-1] if lines else ""


def _is_library(file: str) -> bool:
    return file.startswith((_TORCH, _OURS)) or file.startswith("torch/") or "/mep/graph/" in file


@contextmanager
def _quiet() -> Iterator[None]:
    """Export's own notes are about symbols that the user has not named."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _said_when_slow(what: str) -> Iterator[None]:
    """A line on stderr once it takes longer than a second."""
    stderr = sys.stderr
    timer = threading.Timer(1.0, lambda: print(f"mep: {what} ...", file=stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
