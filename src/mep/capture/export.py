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
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
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

from mep.capture.functional import Unrecordable, Writes, functional, is_library
from mep.capture.state import check_state, untouched
from mep.capture.whole import RECORDED, kept_whole
from mep.errors import MepError, TraceError, require
from mep.graph.inputs import call_model, flattened, unflattened
from mep.graph.ops import Slot

Leaves = Sequence[type[nn.Module] | str]


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
                    return _read(root, plain, cost, *functional(_exported(root, dynamic)), kept)
                except MepError:
                    raise
                except Exception as error:
                    failure = failure or error
    assert failure is not None
    raise _refusal(failure, plain) from failure


def check_leaves(model: nn.Module, leaves: Leaves, call: str = "trace") -> None:
    """Refuse leaves that are no modules of the model; `call` is named in the message."""

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
                sizes = zip(new.shape, buffer.shape, strict=False)
                if new.ndim != buffer.ndim or any(a != b for a, b in sizes):
                    raise Unrecordable(
                        f"it makes its buffer `{key}` anew, {tuple(new.shape)} in place of {tuple(buffer.shape)}. Run "
                        "the model once on its largest batch before the first step, or make it large enough at once."
                    )
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


class _NoAutograd(TorchFunctionMode):
    """Refuses derivatives while a model is recorded."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.autograd.grad or func is Tensor.backward:
            raise Unrecordable("it differentiates, which a recorded graph cannot contain.")
        return func(*args, **(kwargs or {}))


@contextmanager
def _in_forms_that_are_recorded() -> Iterator[None]:
    """Inside, `torch.inference_mode` is `torch.no_grad`, and `.data` is `.detach()`, which are recorded.

    A size as a text is that of a number, which the graph is then for, and not of its symbol.
    """
    mode, tensor, size = torch.inference_mode, torch.Tensor, torch.SymInt
    own = mode.__enter__, mode.__exit__
    texts = {name: vars(size).get(name) for name in ("__repr__", "__str__")}
    of_symbol = size.__repr__

    def text(self: Any) -> str:
        return of_symbol(self) if is_library(sys._getframe(1).f_code.co_filename) else repr(int(self))

    def enter(self: Any) -> None:
        self.instead = torch.set_grad_enabled(not self.mode and torch.is_grad_enabled())

    def leave(self: Any, *_: object) -> None:
        self.instead.__exit__(None, None, None)

    def write(self: Tensor, new: Tensor) -> None:
        with torch.no_grad():
            self.copy_(new)

    mode.__enter__, mode.__exit__ = enter, leave  # type: ignore[method-assign]
    tensor.data = property(lambda t: t.detach(), write)  # type: ignore[assignment]
    for name in texts:
        setattr(size, name, text)
    try:
        yield
    finally:
        for name, method in texts.items():
            setattr(size, name, method) if method else delattr(size, name)
        mode.__enter__, mode.__exit__ = own  # type: ignore[method-assign]
        del tensor.data


def _symbols(t: Tensor) -> dict[int, Any]:
    """The sizes that may differ from batch to batch: of examples, and of positions in sequences."""
    n = 2 if t.ndim == 3 or not t.is_floating_point() else 1
    return {d: Dim.AUTO for d in range(min(n, t.ndim)) if t.shape[d] > 1}


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
    for path in signature.inputs_to_lifted_custom_objs.values():
        kind = type(program.constants[path]).__name__
        raise TraceError(
            f"{type(model).__name__} reads a {kind} of its own in forward, whose state no graph can hold. Way out: "
            "draw from torch's generator, which torch.manual_seed sets, or give forward what was drawn as an input."
        )
    own = {id(t): s for t, s in _tensors_of(model)} | {id(t): s for t, s in _tensors_of(root.criterion, "cost.")}
    tensors = dict(root.named_parameters(remove_duplicate=False)) | dict(root.named_buffers(remove_duplicate=False))
    for n in graph.find_nodes(op="call_function", target=torch.ops.mep.whole.default):
        n.target = RECORDED[n.args[1]]
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
    """What recording failed at, where, and the smallest module around it that can be kept whole."""
    reason = str(error).strip().split("\n")[0]
    if "data-dependent" in reason:
        reason = f"what it does next depends on the values of tensors ({reason.rstrip('.')})."
    elif "fake tensor" in reason.lower():
        reason = "it makes tensors in a way that a recorded graph cannot contain."
    elif not isinstance(error, Unrecordable):
        reason = f"{type(error).__name__}: {reason}"
    every = traceback.extract_tb(error.__traceback__)
    frames = [f for f in every if f.line and not f.filename.startswith("<") and not is_library(f.filename)]
    if frames:
        last = frames[-1]
        reason += f"\n  {Path(last.filename).name}, line {last.lineno} in {last.name}: {last.line}"
    names = {module: name for name, module in model.named_modules()}
    owners = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, Unrecordable) and error.path:
        owners = [model.get_submodule(error.path)]
    inside = [m for m in owners if isinstance(m, nn.Module) and names.get(m)]
    way_out = "move this code into a module of its own and keep that whole, leaves=(ThatModule,)"
    if inside:
        way_out = f"keep `{names[inside[-1]]}` whole, leaves=({type(inside[-1]).__name__},)"
    if any(f.filename == torch.distributions.distribution.__file__ and f.name in _CHECKS for f in every):
        way_out = f"give the distribution validate_args=False, since it checks what it is given; or {way_out}"
    return TraceError(
        f"Cannot read {type(model).__name__}: {reason}\n"
        f"Way out: {way_out}: autograd runs inside it, equilibrium propagation between it and the rest."
    )


_CHECKS = ("__init__", "_validate_sample")
"""Methods of distributions that look at values, with `validate_args=True`, the default."""


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
