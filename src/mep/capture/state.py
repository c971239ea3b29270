"""What decides what a model computes besides tensors, seen when it changes; and runs of a model that leave no trace.

A captured graph reads parameters and buffers anew in every step. Everything else is fixed in it: modules, modes, hooks,
numbers, lists, dictionaries, configuration objects, arrays, plain tensors, also those of the class, and those that the
cost function or `forward` reads from around it.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mep.errors import TraceError
from mep.noise import generators_kept

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LONGEST = 10_000
"""A list or dictionary with more entries is data, and not looked into."""
_CODE = (type, FunctionType, BuiltinFunctionType, MethodType, ModuleType, nn.Module, torch.Generator)


class Snapshot:
    """Whether a model, and the function that is its cost, are still those that were captured.

    Values of parameters and buffers may change, and so may what a module notes down while it runs.
    """

    def __init__(self, model: nn.Module, cost: Any = None):
        self.places = list(_places(model, cost))
        self.readers = [place.values for place in self.places]
        self.notes: set[tuple[int, Any]] = set()
        self.facts = self._facts()
        self._keep(self._values())

    def matches(self) -> bool:
        """Whether everything is as it was: the same objects with the same content, or equal ones."""
        values = self._values()
        is_same = len(values) == len(self.values) and all(map(operator.is_, values, self.values))
        if is_same and self._contents() == self.contents:
            return True
        if not self.changes() <= self.notes:
            return False
        self._keep(values)  # so that the next comparison is quick
        return True

    def changes(self) -> set[tuple[int, Any]]:
        """What is not as it was, by place and key."""
        old, new = self.facts, self._facts()
        return {key for key in old.keys() | new.keys() if old.get(key, _ABSENT) != new.get(key, _ABSENT)}

    def fact(self, key: tuple[int, Any]) -> Any:
        """What stands there now, in a form that can be compared."""
        return self._facts().get(key, _ABSENT)

    def named(self, key: tuple[int, Any]) -> str:
        """Where something stands, for messages."""
        name, place = self.places[key[0]].name, key[1]
        return f"{name}.{place}" if isinstance(place, str) else f"{name}[{place}]"

    def _values(self) -> list[Any]:
        return list(chain.from_iterable([read() for read in self.readers]))

    def _keep(self, values: list[Any]) -> None:
        self.values = values
        self.mutable = [v for v in values if _has_content(v)]
        self.contents = self._contents()

    def _contents(self) -> list[Any]:
        return [v._version if isinstance(v, Tensor) else v.tobytes() for v in self.mutable]

    def _facts(self) -> dict[tuple[int, Any], Any]:
        return {(i, k): _fact(v) for i, place in enumerate(self.places) for k, v in place.items().items()}


_ABSENT = object()


@dataclass(frozen=True)
class _Place:
    """Something that holds values: its name, how they are listed quickly, and how they are read with their keys."""

    name: str
    values: Callable[[], Iterable[Any]]
    items: Callable[[], dict[Any, Any]]


def _places(model: nn.Module, cost: Any) -> Iterator[_Place]:
    """Everything that holds what decides what a model does."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        name, own = path or "model", vars(module)
        if isinstance(module, torch.jit.ScriptModule):
            yield _Place(name, partial(_mode, module), partial(_mode, module))
            continue
        yield _Place(name, own.values, partial(_attributes, own))
        for part in ("_parameters", "_modules", *_HOOKS):
            if part in own:
                yield _Place(f"{name}.{part}", own[part].values, own[part].copy)
        yield _Place(name, own["_buffers"].values, partial(_kinds, own["_buffers"]))
        for value in list(own.values()):
            yield from _inside(name, value, seen)
        for cls in type(module).__mro__:
            if not cls.__module__.startswith(("torch", "builtins", "typing", "abc")) and id(cls) not in seen:
                seen.add(id(cls))
                yield _Place(cls.__name__, vars(cls).values, vars(cls).copy)
                if isinstance(forward := vars(cls).get("forward"), FunctionType):
                    yield from _around(forward, seen)
    if isinstance(cost, nn.Module):
        yield from _places(cost, None)
    elif isinstance(cost, FunctionType):
        yield from _around(cost, seen)
    elif isinstance(cost, MethodType):
        yield from _inside("cost", cost.__self__, seen)


def _mode(module: nn.Module) -> dict[Any, Any]:
    return {"training": module.training}


def _attributes(own: dict[str, Any]) -> dict[Any, Any]:
    return {k: v for k, v in own.items() if k not in ("_buffers", "_parameters", "_modules", *_HOOKS)}


def _kinds(buffers: dict[str, Any]) -> dict[Any, Any]:
    """Of buffers shape and dtype, since their values are read anew in every step."""
    return {("buffer", k): None if b is None else (b.shape, b.dtype) for k, b in buffers.items()}


def _around(function: FunctionType, seen: set[int]) -> Iterator[_Place]:
    """What a function reads from its closure, its defaults and the globals it names."""

    def read() -> dict[Any, Any]:
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        found = {name: cell.cell_contents for name, cell in cells}
        names = [name for name in function.__code__.co_names if name in function.__globals__]
        found |= {name: function.__globals__[name] for name in names}
        found |= {f"default {i}": value for i, value in enumerate(function.__defaults__ or ())}
        return {name: value for name, value in found.items() if not isinstance(value, _CODE)}

    yield _Place(function.__qualname__, lambda: read().values(), read)
    for name, value in list(read().items()):
        yield from _inside(f"{function.__qualname__}.{name}", value, seen)


def _inside(name: str, value: Any, seen: set[int], depth: int = 4) -> Iterator[_Place]:
    """The places within a list, dictionary or object that is no code, no module and not torch's."""
    if id(value) in seen or isinstance(value, (*_PLAIN, *_CODE, Tensor)) or depth == 0:
        return
    seen.add(id(value))
    if hasattr(value, "__dict__") and not isinstance(value, (list, tuple, set, dict)):
        value = {} if type(value).__module__.startswith("torch.") else vars(value)
    if not isinstance(value, (list, tuple, set, frozenset, dict)) or not 0 < len(value) <= _LONGEST:
        return
    place = (
        _Place(name, value.values, value.copy)
        if isinstance(value, dict)
        else _Place(name, value.__iter__, lambda: dict(enumerate(value)))
    )
    yield place
    for key, inner in list(place.items().items()):
        yield from _inside(f"{name}.{key}", inner, seen, depth - 1)


def _has_content(value: Any) -> bool:
    """Whether it may change in place: a plain tensor, or an array of NumPy's."""
    if isinstance(value, Tensor):
        return not isinstance(value, nn.Parameter) and not value.is_inference()
    return type(value).__module__ == "numpy" and hasattr(value, "tobytes")


def _fact(value: Any) -> Any:
    """A value in a form that can be compared."""
    if isinstance(value, Tensor):
        return (id(value), value._version if _has_content(value) else 0)
    if _has_content(value):
        return value.tobytes()
    if isinstance(value, float) and value != value:
        return "nan"
    if isinstance(value, tuple):
        return tuple(map(_fact, value))
    return value if isinstance(value, _PLAIN) else ("object", id(value))


def check_state(model: nn.Module, hooks: bool = True) -> None:
    """Refuse what no graph can hold: gradients of modules that hooks change, lazy parameters, distributed wrappers."""
    for name, module in model.named_modules():
        kind, where = type(module), f"`{name}`" if name else "the model"
        wrappers = [c.__name__ for c in kind.__mro__ if c.__name__ in _WRAPPERS]
        if wrappers:
            raise TraceError(
                f"{where} is wrapped by {kind.__name__}: its replicas would drift apart, since their gradients are not "
                f"made by backward(). Way out: train the module itself, {_WRAPPERS[wrappers[0]]}, on one device."
            )
        if hooks and (module._backward_hooks or getattr(module, "_backward_pre_hooks", None)):
            raise TraceError(
                f"{where} has a full backward hook, and there is no backward pass through the network in which it "
                "would run. Way out: remove it (the handle's .remove()), or hook the parameter, weight.register_hook."
            )
        if isinstance(module, torch.jit.ScriptModule) and any(True for _ in module.buffers()) and module.training:
            raise TraceError(
                f"{where} is scripted and has buffers, which it may write in every evaluation. Way out: the module "
                "that was scripted, or eval mode."
            )
        tensors = {} if isinstance(module, torch.jit.ScriptModule) else {**module._parameters, **module._buffers}
        lazy = [k for k, p in tensors.items() if p is not None and nn.parameter.is_lazy(p)]
        if lazy:
            raise TraceError(
                f"{where}.{lazy[0]} is not initialised yet ({kind.__name__} is lazy). Way out: run the model once on a "
                "batch before building the optimizer."
            )


_WRAPPERS = {
    "DistributedDataParallel": "ddp.module",
    "DataParallel": "parallel.module",
    "FullyShardedDataParallel": "the module that was wrapped",
    "FSDPModule": "the module before fully_shard",
    "_FabricModule": "fabric_module.module",
}


@contextmanager
def attributes_kept(*modules: nn.Module) -> Iterator[None]:
    """Whatever modules note down on themselves inside, in lists and dictionaries too, is gone afterwards."""
    every = [m for module in modules for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]
    own = [vars(m) for m in every]
    dicts = [d for o in own for d in (o, *(o[part] for part in ("_parameters", "_buffers", "_modules") if part in o))]
    seen: set[int] = set()
    held: list[Any] = []
    for attributes in own:
        hooks = [h for part in _HOOKS for h in attributes.get(part, {}).values() if isinstance(h, FunctionType)]
        around = [v for hook in hooks for place in _around(hook, set()) for v in place.values()]
        for value in (*attributes.values(), *around):
            held += _containers(value, seen)
    before = [(d, dict(d)) for d in dicts] + [(c, c.copy()) for c in held]
    try:
        yield
    finally:
        for container, content in before:
            if isinstance(container, list):
                container[:] = content
            else:
                if isinstance(container, dict) and _is_same(container, content):
                    continue
                container.clear()
                container.update(content)


def _is_same(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    return len(one) == len(other) and all(one.get(k, _ABSENT) is v for k, v in other.items())


def _containers(value: Any, seen: set[int], depth: int = 4) -> list[Any]:
    if isinstance(value, (*_PLAIN, *_CODE, Tensor)) or id(value) in seen or depth == 0:
        return []
    seen.add(id(value))
    if hasattr(value, "__dict__") and not isinstance(value, (list, dict, set)):
        return [] if type(value).__module__.startswith("torch.") else _containers(vars(value), seen, depth - 1)
    if not isinstance(value, (list, dict, set)) or len(value) > _LONGEST:
        return []
    inner = list(value.values()) if isinstance(value, dict) else list(value)
    return [value, *(c for v in inner for c in _containers(v, seen, depth - 1))]


class Buffers:
    """A model's buffers, to be put back after it has run. A module may write them in place or bind them anew."""

    def __init__(self, *modules: nn.Module):
        every = [m for module in modules for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]
        homes = [m._buffers for m in every if m._buffers]
        self.before = [
            (home, {k: (b, None if b is None else b.detach().clone()) for k, b in home.items()}) for home in homes
        ]

    def undo(self) -> None:
        """To what they were."""
        for home, kept in self.before:
            for name, (buffer, value) in kept.items():
                if buffer is not None and value is not None and not same(buffer, value):
                    with torch.no_grad():
                        buffer.copy_(value)
                home[name] = buffer

    def values(self) -> list[Tensor]:
        """Copies of what they are now."""
        return [b.detach().clone() for home, kept in self.before for k in kept if (b := home[k]) is not None]


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaN to NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a.nan_to_num(), b.nan_to_num()))


@contextmanager
def untouched(*modules: nn.Module) -> Iterator[Buffers]:
    """Modules may be run inside: buffers, attributes and random numbers end as they began."""
    buffers = Buffers(*modules)
    with attributes_kept(*modules), generators_kept():
        try:
            yield buffers
        finally:
            buffers.undo()


def trained_parameters(model: nn.Module, cost: Any) -> list[nn.Parameter]:
    """The parameters that require a gradient: of a model, and of its cost where that is a module."""
    own = (*model.parameters(), *(cost.parameters() if isinstance(cost, nn.Module) else ()))
    return [p for p in dict.fromkeys(own) if p.requires_grad]


def copied_together(model: nn.Module, cost: Any) -> tuple[nn.Module, Any]:
    """Copies of a model and of its cost; a function that reads the model, or parts of it, reads the copy then."""
    memo: dict[int, Any] = {}
    twin = copy.deepcopy(model, memo)

    def copied(value: Any) -> Any:
        if isinstance(value, (nn.Module, Tensor)):
            return memo[id(value)] if id(value) in memo else copy.deepcopy(value, memo)
        return value

    if isinstance(cost, nn.Module):
        return twin, copied(cost)
    if not isinstance(cost, FunctionType):
        return twin, cost
    cells = tuple(CellType(copied(cell.cell_contents)) for cell in cost.__closure__ or ())
    own = {name: copied(cost.__globals__[name]) for name in cost.__code__.co_names if name in cost.__globals__}
    defaults = tuple(map(copied, cost.__defaults__ or ()))
    return twin, FunctionType(
        cost.__code__, {**cost.__globals__, **own}, cost.__name__, defaults or None, cells or None
    )
