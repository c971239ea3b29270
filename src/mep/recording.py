"""Running a model's `forward` once, symbolically: the operations it calls, as a pure `torch.fx` graph.

What makes the record wrong without a sound is refused here, with the line and a way out, or recorded as it stands:
in-place writes, random numbers drawn while recording, the backward of an `autograd.Function`.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import operator
import random
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from mep.errors import TraceError
from mep.snapshot import attributes_kept

Leaves = Sequence[type[nn.Module] | str]
MADE = "_tensor_constant"
"""What fx calls a tensor that `forward` made itself."""
_TORCH = str(Path(torch.__file__).parent)


def record(
    module: nn.Module, leaves: Leaves, inputs: Sequence[str] | None
) -> tuple[fx.Graph, nn.Module, SimpleNamespace]:
    """The functional fx graph of a module, the root that its names refer to, and tensors that `forward` made."""
    tracer = _Tracer(leaves)
    modules = dict(module.named_modules())
    for leaf in leaves:
        if leaf not in modules and not (isinstance(leaf, type) and any(isinstance(m, leaf) for m in modules.values())):
            raise TraceError(f"trace(leaves=...): {leaf!r} is no module of {type(module).__name__}.")
    compiled = [name or "the model" for name, m in modules.items() if hasattr(m, "_orig_mod")]
    if compiled:
        raise TraceError(f"{compiled[0]} is compiled. Way out: pass what torch.compile was given, `._orig_mod`.")
    root = nn.Sequential(module) if tracer.is_leaf_module(module, "") else module
    left_out = _left_out(root, inputs)
    dice = random.getstate(), torch.get_rng_state()
    try:
        with attributes_kept(module), tracer.functions_kept_whole(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fx says that it does not assert the constants
            graph = tracer.trace(root, left_out)
            made = {n.target: getattr(root, n.target) for n in graph.nodes if str(n.target).startswith(MADE)}
    except Exception as error:
        raise TraceError(
            f"Cannot trace {type(module).__name__}: {error}{_user_line(error)}\n"
            f"Way out: {_leaf_for(error, module)}: autograd runs inside it, equilibrium propagation between it and the "
            "rest."
        ) from error
    if dice[0] != random.getstate() or not torch.equal(dice[1], torch.get_rng_state()):
        raise TraceError(
            f"Cannot trace {type(module).__name__}: its forward draws random numbers that do not depend on the input, "
            "and they would stay what they were now. Way out: torch.rand_like(x) or nn.Dropout, or keep the module "
            "that draws them whole with leaves=(ThatModule,)."
        )
    _make_pure(graph, root)
    for n in reversed(list(graph.nodes)):
        is_constant = n.op == "placeholder" and str(n.target).rpartition("_")[0] in left_out
        is_open = str(n.target).startswith("*")  # *args, **kwargs
        if not n.users and n.op != "output" and (n.op != "placeholder" or is_constant or is_open):
            graph.erase_node(n)
    return graph, root, SimpleNamespace(**made)


class _Tracer(fx.Tracer):
    record_stack_traces = True

    def __init__(self, leaves: Leaves):
        super().__init__()
        self.types = tuple(leaf for leaf in leaves if isinstance(leaf, type))
        self.names = {leaf for leaf in leaves if isinstance(leaf, str)}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kept = isinstance(m, self.types) or module_qualified_name in self.names
        return kept or super().is_leaf_module(m, module_qualified_name)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """The pieces of `chunk`: their number stands in the call. fx knows that of others only if they are unpacked."""
        n = obj.node
        if n.target in (torch.chunk, "chunk"):
            chunks = n.kwargs.get("chunks", n.args[1] if len(n.args) > 1 else None)
            if isinstance(chunks, int):
                return (operator.getitem(obj, i) for i in range(chunks))
        return super().iter(obj)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """What lets the code pass where it merely guards itself (`assert`, `if ...: raise`); elsewhere fx refuses."""
        frame = inspect.currentframe()
        while frame and (frame.f_code.co_filename == __file__ or frame.f_code.co_filename.startswith(_TORCH)):
            frame = frame.f_back
        passing = frame and _passing(frame.f_code.co_filename, frame.f_lineno)
        return super().to_bool(obj) if passing is None else passing

    @contextmanager
    def functions_kept_whole(self) -> Iterator[None]:
        """Calls of a `torch.autograd.Function` are recorded as they stand: looking inside would lose its backward."""
        apply = vars(torch.autograd.Function)["apply"]

        def recorded(cls: Any, *args: Any, **kwargs: Any) -> Any:
            call = apply.__get__(None, cls)
            if not any(isinstance(a, fx.Proxy) for a in args):
                return call(*args, **kwargs)
            return self.create_proxy("call_function", call, args, kwargs)

        torch.autograd.Function.apply = classmethod(recorded)  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            torch.autograd.Function.apply = apply  # type: ignore[method-assign]


def _left_out(root: nn.Module, inputs: Sequence[str] | None) -> dict[str, Any]:
    """The arguments that will not be given, with their defaults."""
    known = inspect.signature(root.forward).parameters
    if inputs is not None and not set(inputs) & set(known):
        return {}  # a wrapped leaf: its one argument has another name
    return {name: p.default for name, p in known.items() if p.default is not p.empty and name not in (inputs or ())}


def _user_line(error: Exception) -> str:
    """The innermost line that is neither torch's nor ours."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    frames = [f for f in frames if not f.filename.startswith((_TORCH, "<eval"))]
    if not frames:
        return ""
    last = frames[-1]
    return f"\n  {Path(last.filename).name}, line {last.lineno} in {last.name}: {last.line}"


def _leaf_for(error: Exception, model: nn.Module) -> str:
    """What to keep whole: the innermost module of the model that was running."""
    names = {module: name for name, module in model.named_modules()}
    owners = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    inside = [m for m in owners if isinstance(m, nn.Module) and names.get(m)]
    if not inside:
        return "move this code into a module of its own and keep that whole, leaves=(ThatModule,)"
    return f"keep `{names[inside[-1]]}` whole, leaves=({type(inside[-1]).__name__},)"


def _passing(file: str, line: int) -> bool | None:
    """What the condition on a line must be for `assert condition` or `if condition: raise ...` to let pass."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:  # not Python as it stands: a notebook's magic
        return None
    for n in ast.walk(tree):
        guards = isinstance(n, ast.Assert) or (isinstance(n, ast.If) and not n.orelse and _only_raises(n.body))
        if isinstance(n, (ast.Assert, ast.If)) and guards and n.test.lineno <= line <= (n.test.end_lineno or 0):
            negates = any(isinstance(part, ast.Not) for part in ast.walk(n.test))
            return None if negates else isinstance(n, ast.Assert)
    return None


def _only_raises(body: Sequence[ast.stmt]) -> bool:
    return all(isinstance(statement, ast.Raise) for statement in body)


def place(n: fx.Node) -> str:
    """The name of a node and the innermost line of the user's that made it."""
    found = re.findall(r'File "(.*)", line (\d+), in .*\n\s+(.*)', n.stack_trace or "")
    lines = [f"line {number}: `{text}`" for file, number, text in found if not file.startswith(_TORCH)]
    name = n.target if n.op == "call_module" else n.name
    return f"node `{name}`" + (f" ({lines[-1]})" if lines else "")


def _make_pure(graph: fx.Graph, root: nn.Module) -> None:
    """Replace in-place calls by pure ones; what read the overwritten value later, reads the result."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    for n in list(graph.nodes):
        if n.target is operator.setitem:
            raise TraceError(f"Cannot trace: {place(n)} assigns to a slice. Way out: torch.where or torch.cat.")
        name = n.target if n.op == "call_method" else getattr(n.target, "__name__", "")
        if n.op in ("call_method", "call_function") and re.fullmatch(r"[a-z]\w*[a-z0-9]_", str(name)):
            homes: list[Any] = [Tensor] if n.op == "call_method" else [torch, nn.functional]
            pure: list[Callable[..., Any]] = [getattr(h, name[:-1]) for h in homes if hasattr(h, name[:-1])]
            if not pure:
                raise TraceError(f"Cannot trace: {place(n)} works in place and has no pure form. Rewrite it.")
            n.target = name[:-1] if n.op == "call_method" else pure[0]
        elif n.kwargs.get("inplace") is True:
            n.kwargs = {**n.kwargs, "inplace": False}
        elif n.op != "call_module" or not getattr(root.get_submodule(str(n.target)), "inplace", False):
            continue
        for user in list(n.args[0].users):
            if order[user] > order[n]:
                user.replace_input_with(n.args[0], n)
