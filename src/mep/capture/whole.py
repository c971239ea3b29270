"""Modules and autograd functions that are kept whole: one operation of the graph, with autograd inside.

While a model is exported they stand in its graph as calls of one operator of ours, which takes all tensors that they
read, parameters and buffers included, and returns new buffer values beside the results. So the graph stays functional.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import _C, Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from mep.capture.state import Buffers
from mep.graph.closed_forms import kink_of_call
from mep.graph.ops import StepContext
from mep.guards import generators_kept

RECORDED: dict[int, Whole] = {}
"""The calls that the operators of a graph stand for, by their second argument, while a model is exported."""
_KEYS = itertools.count()


class Whole:
    """One call of a module or autograd function, as a function of the tensors that it reads."""

    def __init__(self, call: Callable[..., Any], args: Any, module: nn.Module | None = None):
        self.call, self.module = call, module
        leaves, self.structure = pytree.tree_flatten(args)
        self.fixed = [None if isinstance(v, Tensor) else v for v in leaves]
        self.places = [i for i, v in enumerate(leaves) if isinstance(v, Tensor)]
        self.given = [leaves[i] for i in self.places]
        self.is_scripted = isinstance(module, torch.jit.ScriptModule)
        self.buffers = [name for name, _ in module.named_buffers()] if module and not self.is_scripted else []
        self.result: Any = None
        self.others: list[Any] = []
        self.template: Any = None
        self.tensors: list[int] = []
        self.__name__ = type(module).__name__ if module is not None else call.__self__.__name__  # type: ignore[attr-defined]

    def run(self, tensors: Sequence[Tensor], parameters: dict[str, Tensor] | None = None) -> list[Tensor]:
        """The tensors of the result, then the new buffers. `parameters` stand in place of the module's own."""
        leaves = list(self.fixed)
        for i, t in zip(self.places, tensors, strict=False):
            leaves[i] = t.clone()  # it may write to its input
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        if self.module is None or self.is_scripted:
            scripted: Any = self.module
            run = scripted._c._get_method("forward") if self.is_scripted else self.call
            found, new = run(*args, **kwargs), []
        else:
            old = tensors[len(tensors) - len(self.buffers) :] if self.buffers else []
            homes = [
                (m._buffers, key) for m in self.module.modules() for key in m._buffers if m._buffers[key] is not None
            ]
            before = [home[key] for home, key in homes]
            try:
                for (home, key), b in zip(homes, old, strict=True):
                    home[key] = b.clone()
                found = torch.func.functional_call(self.module, parameters or {}, args, kwargs)
                new = [home[key] for home, key in homes]  # written in place, or bound anew
            finally:
                for (home, key), own in zip(homes, before, strict=True):
                    home[key] = own
        if isinstance(found, dict) and pytree.tree_structure(found).is_leaf():  # a subclass that is not registered
            self.template, found = found, dict(dict.items(found))
        results, self.result = pytree.tree_flatten(found)
        self.others = [None if isinstance(v, Tensor) else v for v in results]
        self.tensors = [i for i, v in enumerate(results) if isinstance(v, Tensor)]
        return [results[i] for i in self.tensors] + new

    def __call__(
        self, context: StepContext | None, key: tuple[str, str], tensors: Sequence[Tensor], _: int
    ) -> list[Tensor]:
        """As recorded in a graph; kinks inside a module are held where the step holds them."""
        holds = self.module is not None and context is not None and context.freeze_branches
        with _HeldInside(key, context) if holds and context else nullcontext():
            return self.run(tensors)

    def record(self, parameters: Sequence[Tensor] = (), buffers: Sequence[Tensor] = ()) -> Any:
        """The call while a model is exported."""
        key = next(_KEYS)
        RECORDED[key] = self
        found = torch.ops.mep.whole([*self.given, *parameters, *buffers], key)
        self.given = []
        results = list(self.others)
        for i, t in zip(self.tensors, found, strict=False):
            results[i] = t
        for buffer, new in zip(buffers, found[len(self.tensors) :], strict=True):
            buffer.copy_(new)
        result = pytree.tree_unflatten(results, self.result)
        if self.template is None:
            return result
        record = copy.copy(self.template)
        for key, v in result.items():
            record[key] = v
        return record


@torch.library.custom_op("mep::whole", mutates_args=())
def _whole(tensors: list[Tensor], key: int) -> list[Tensor]:
    return [t.clone() for t in RECORDED[key].run(tensors)]


@_whole.register_fake
def _fake(tensors: list[Tensor], key: int) -> list[Tensor]:
    """Shapes and dtypes of the result: by the call itself if it runs on shapes alone, else on ones."""
    whole = RECORDED[key]
    given = tensors[: len(whole.places)]
    mode: Any = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    env = getattr(mode, "shape_env", None)
    try:
        if whole.is_scripted:
            raise RuntimeError("scripted code takes no fake tensors")
        names = [name for name, _ in whole.module.named_parameters()] if whole.module else []
        with env.ignore_fresh_unbacked_symbols() if env else nullcontext():
            found = whole.run(tensors, dict(zip(names, tensors[len(given) :], strict=False)))
        return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in found]
    except Exception as error:
        symbols = {str(size): size for t in given for size in t.shape if isinstance(size, torch.SymInt)}
        if len(symbols) > 1:
            raise  # which of them a result follows is not known: without symbols it is tried again
        # For a batch as it is and for a longer one: what grows with it is its symbol.
        symbol = next(iter(symbols.values()), None)
        one = _on_ones(whole, given, 0, error)
        other = _on_ones(whole, given, 1, error) if symbols else one
        found = []
        for a, b in zip(one, other, strict=True):
            shape = [symbol if i != j else i for i, j in zip(a.shape, b.shape, strict=True)]
            found.append(torch.empty(shape, dtype=a.dtype, device=given[0].device))  # type: ignore[arg-type]
        return found


def _on_ones(whole: Whole, given: Sequence[Tensor], more: int, error: Exception) -> list[Tensor]:
    """What a call makes of ones in the shapes that are given, with symbols for their sizes so many larger."""
    sizes = [[size if isinstance(size, int) else size.node.hint + more for size in t.shape] for t in given]
    kinds = [(size, t.dtype, t.device) for size, t in zip(sizes, given, strict=True)]
    modules = [] if whole.module is None or whole.is_scripted else [whole.module]

    def run() -> list[Tensor]:
        own = [named for module in modules for named in module.named_parameters()]
        parameters = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in own}
        buffers = Buffers(*modules)
        ones = [torch.ones(size, dtype=dtype, device=device) for size, dtype, device in kinds]
        try:
            return whole.run([*ones, *buffers.values()], parameters)
        finally:
            buffers.undo()

    # Recording holds for this thread alone: in another one operations are run, with autograd.
    with generators_kept(), ThreadPoolExecutor(1) as other:
        try:
            return other.submit(run).result()
        except Exception as real:
            raise real from error


class KeptModule(nn.Module):
    """Stands in the place of a module that is kept whole while its model is exported."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.training = module.training
        object.__setattr__(self, "module", module)
        for i, p in enumerate(module.parameters()):
            self._parameters[f"p{i}"] = p
        for i, b in enumerate(module.buffers() if not isinstance(module, torch.jit.ScriptModule) else ()):
            self._buffers[f"b{i}"] = b

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = object.__getattribute__(self, "module")
        whole = Whole(module, (args, kwargs), module)
        return whole.record(list(self._parameters.values()), list(self._buffers.values()))  # type: ignore[arg-type]


@contextmanager
def kept_whole(root: nn.Module, is_leaf: Callable[[str, nn.Module], bool]) -> Iterator[list[nn.Module]]:
    """Inside, `KeptModule`s stand in the places of the leaves of `root`, and autograd functions are recorded as such.

    Yields the modules that were kept.
    """
    kept: dict[int, KeptModule] = {}
    homes: list[tuple[dict[str, Any], str, nn.Module]] = []

    def visit(module: nn.Module, path: str) -> None:
        for name, child in list(module._modules.items()):
            if child is None:
                continue
            where = f"{path}.{name}" if path else name
            if is_leaf(where, child) or isinstance(child, torch.jit.ScriptModule) or _hides_its_statistics(child):
                homes.append((module._modules, name, child))
                module._modules[name] = kept.setdefault(id(child), KeptModule(child))
            elif not isinstance(child, KeptModule):
                visit(child, where)

    def recorded(cls: Any, *args: Any) -> Any:
        call = vars(_C._FunctionBase)["apply"].__get__(None, cls)
        if cls.__module__.startswith("torch.") or not any(isinstance(t, Tensor) for t in pytree.tree_leaves(args)):
            return call(*args)
        return Whole(call, (args, {})).record()

    visit(root, "")
    # What `Function.apply` itself calls, so that one bound earlier, `sign = Sign.apply`, is seen too.
    base: Any = torch.autograd.function._SingleLevelFunction
    base.apply = classmethod(recorded)
    try:
        yield [child for _, _, child in homes]
    finally:
        del base.apply
        for home, name, child in homes:
            home[name] = child
        RECORDED.clear()


def _hides_its_statistics(module: nn.Module) -> bool:
    """Whether a module of torch's writes its buffers in a way that is not recorded."""
    if not module.training or not getattr(module, "track_running_stats", False):
        return False
    is_cumulative = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is None
    return is_cumulative or isinstance(module, nn.modules.instancenorm._InstanceNorm)


class _HeldInside(TorchFunctionMode):
    """Holds the kinks inside a module that is kept whole: its calls of ReLU, max pooling... in their order."""

    def __init__(self, key: tuple[str, str], context: StepContext):
        super().__init__()
        self.key, self.context, self.calls = key, context, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        plain = {k: v for k, v in kwargs.items() if k not in ("inplace", "return_indices") or v}
        is_tensor = bool(args) and isinstance(args[0], Tensor) and args[0].is_floating_point()
        piece = kink_of_call(name, args[1:], plain) if is_tensor else None
        if piece is None:
            return func(*args, **kwargs)
        self.calls += 1
        return self.context.on_branch((self.key[0], f"{self.key[1]}/{self.calls}"), piece, args[0])
