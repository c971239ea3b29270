"""What Python holds that decides what a model computes, or that its code writes: attributes, closures, globals.

A captured graph reads parameters and buffers anew in every step. Everything else is fixed in it: modules, modes, hooks,
numbers, lists, dictionaries, configuration objects, arrays, plain tensors; on the modules, on their classes, and around
the functions that `forward`, its hooks and the cost run. `Snapshot` sees when it changes, `surroundings_kept` puts it
back.
"""

from __future__ import annotations

import argparse
import functools
import operator
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_CACHED: Any = type(functools.lru_cache(int))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PARTS = ("_buffers", "_parameters", "_modules", *_HOOKS)
_OWN = vars(nn.Module()).keys()
"""What torch keeps on every module."""
_LONGEST = 10_000
"""A list or dictionary with more entries is data, and not looked into."""
_FOREIGN = {*sys.stdlib_module_names, "torch", "numpy", "mep"} - {"__main__"}
"""Packages whose code keeps nothing that a model is made of."""
_ABSENT = object()


@dataclass(frozen=True)
class Place:
    """Something that holds values: its name, how they are listed quickly, read with their keys, and put back."""

    name: str
    values: Callable[[], Iterable[Any]]
    items: Callable[[], dict[Any, Any]]
    put_back: Callable[[dict[Any, Any]], None]


class Snapshot:
    """Whether a model, and the function that is its cost, are still those that were captured.

    Values of parameters and buffers may change, and so may what a module notes down while it runs.
    """

    def __init__(self, *roots: Any):
        self.places = [place for place in places(*roots) if place.name]
        self.readers = [place.values for place in self.places]
        self.notes: set[tuple[int, Any]] = set()
        self.facts = self._facts()
        self._keep(self._values())

    def matches(self) -> bool:
        """Whether everything is as it was: the same objects with the same content, or equal ones."""
        values = self._values()
        if self._are_kept(values):
            return True
        if not all(key in self.notes or (key[0], _LONGER) in self.notes for key in self._differences()):
            return False
        self._keep(values)  # so that the next comparison is quick
        return True

    def changes(self) -> dict[tuple[int, Any], Any]:
        """What is not as it was, by place and key, and how it stands now."""
        return {} if self._are_kept(self._values()) else self._differences()

    def _differences(self) -> dict[tuple[int, Any], Any]:
        old, new = self.facts, self._facts()
        different = [key for key in old.keys() | new.keys() if old.get(key, _ABSENT) != new.get(key, _ABSENT)]
        return {key: new.get(key, _ABSENT) for key in different}

    def moved(self, first: dict[tuple[int, Any], Any], second: dict[tuple[int, Any], Any]) -> str | None:
        """The name of what two runs of the model changed in turn, which `changes` has after each; the rest are notes.

        A new object, or one more in a list, is a note; another number, or a tensor that was written, is not.
        """
        longer = {place for place, key in second if key == _LENGTH and second[place, key] != first.get((place, key))}
        for (place, key), fact in second.items():
            before = first.get((place, key), _ABSENT)
            is_number = isinstance(fact, (bool, int, float, str)) and not isinstance(key, tuple)
            is_written = isinstance(fact, _TensorFact) and isinstance(before, _TensorFact) and fact.id == before.id
            if fact != before and (is_number or is_written) and place not in longer:
                return self._named((place, key))
        self.notes |= second.keys() | {(place, _LONGER) for place in longer}
        return None

    def _named(self, key: tuple[int, Any]) -> str:
        name, place = self.places[key[0]].name, key[1]
        return f"{name}.{place}" if isinstance(place, str) else f"{name}[{place}]"

    def _values(self) -> list[Any]:
        return list(chain.from_iterable([read() for read in self.readers]))

    def _are_kept(self, values: list[Any]) -> bool:
        is_same = len(values) == len(self.values) and all(map(operator.is_, values, self.values))
        return is_same and self._contents() == self.contents

    def _keep(self, values: list[Any]) -> None:
        self.values = values
        self.mutable = [v for v in values if _has_content(v)]
        self.contents = self._contents()

    def _contents(self) -> list[Any]:
        return [v._version if isinstance(v, Tensor) else v.tobytes() for v in self.mutable]

    def _facts(self) -> dict[tuple[int, Any], Any]:
        facts = {}
        for i, place in enumerate(self.places):
            items = place.items()
            facts[i, _LENGTH] = len(items)
            facts |= {(i, key): _fact(value) for key, value in items.items()}
        return facts


_LENGTH, _LONGER = ("how many",), ("more with every run",)
"""Keys of a place as a whole."""


@contextmanager
def surroundings_kept(*roots: Any) -> Iterator[None]:
    """Whatever code notes down inside, on modules and elsewhere, is gone afterwards; caches of functions are empty."""
    kept = [(place, place.items()) for place in places(*roots)]
    found: Any = (v for place, items in kept if place.name for v in items.values() if _has_content(v))
    mutable = {id(v): v for v in found}
    contents: list[tuple[Any, Any]] = [
        (v, v.detach().clone() if isinstance(v, Tensor) else v.copy()) for v in mutable.values()
    ]
    versions = [v._version if isinstance(v, Tensor) else 0 for v, _ in contents]
    try:
        yield
    finally:
        for place, items in kept:
            place.put_back(items)
        for (v, content), version in zip(contents, versions, strict=True):
            if isinstance(v, Tensor):
                if v._version != version:
                    v.detach().copy_(content)
            elif v.tobytes() != content.tobytes():
                v[...] = content


def places(*roots: Any) -> Iterator[Place]:
    """Everything that holds what modules and functions read or write, breadth first.

    What cannot change what is computed, but may be written, has no name.
    """
    for key, hooks in vars(torch.nn.modules.module).items():
        if key.startswith("_global") and isinstance(hooks, dict):
            yield _of_dict("every module", hooks)
    seen: dict[int, Any] = {}
    queue: deque[tuple[str, Any]] = deque(("cost" if i else "model", root) for i, root in enumerate(roots))
    while queue:
        name, value = queue.popleft()
        if id(value) in seen or isinstance(value, (*_PLAIN, Tensor, torch.Generator, BuiltinFunctionType)):
            continue
        seen[id(value)] = value
        if isinstance(value, nn.Module):
            for path, module in value.named_modules():
                seen[id(module)] = module
                where = path or name
                for place in _of_module(where, module):
                    yield place
                    items = place.items().items()
                    queue.extend((f"{where}.{key}", inner) for key, inner in items if key not in _OWN)
                queue.append((type(module).__name__, type(module)))
            continue
        for place in _of_object(name, value):
            yield place
            queue.extend((f"{name}.{key}", inner) for key, inner in place.items().items())
        if _is_object(value):
            queue.append((type(value).__name__, type(value)))


def _of_module(name: str, module: nn.Module) -> Iterator[Place]:
    own = vars(module)
    if isinstance(module, torch.jit.ScriptModule):
        yield Place(name, lambda: (module.training,), lambda: {"training": module.training}, lambda _: None)
        return
    attributes = _of_dict(name, own)
    yield Place(
        name, own.values, lambda: {k: v for k, v in own.items() if k not in _PARTS},
        lambda before: attributes.put_back(before | {k: own[k] for k in _PARTS if k in own}),
    )  # fmt: skip
    for part in _PARTS[1:]:
        if part in own:
            yield _of_dict(f"{name}.{part}", own[part])
    # Values of buffers are read anew in every step: what is fixed is their shape and dtype.
    buffers = own["_buffers"]
    yield Place(name, buffers.values, lambda: {("buffer", k): _kind(b) for k, b in buffers.items()}, lambda _: None)
    yield Place("", tuple, lambda: dict(buffers), _of_dict("", buffers).put_back)


def _kind(buffer: Tensor | None) -> Any:
    return None if buffer is None else (buffer.shape, buffer.dtype)


def _of_object(name: str, value: Any) -> Iterator[Place]:
    """The places of anything but a module."""
    if isinstance(value, _CACHED):
        clear, value = value.cache_clear, value.__wrapped__
        yield Place("", tuple, dict, lambda _: clear())
    value = getattr(value, "__func__", value) if isinstance(value, (staticmethod, classmethod)) else value
    if isinstance(value, property):
        yield _fixed(name, {"fget": value.fget})
    elif isinstance(value, MethodType):
        yield _fixed(name, {"self": value.__self__, "function": value.__func__})
    elif isinstance(value, functools.partial):
        yield _fixed(name, {"function": value.func, "args": value.args, "keywords": value.keywords})
    elif isinstance(value, FunctionType):
        yield from _of_function(name, value)
    elif isinstance(value, type):
        if not _is_foreign(value):
            for cls in value.__mro__:
                if not _is_foreign(cls):
                    yield _of_class(cls)
    elif isinstance(value, (dict, list, deque, set, tuple, frozenset)):
        if len(value) <= _LONGEST:
            yield _of_dict(name, value) if isinstance(value, dict) else _of_items(name, value)
    elif _is_object(value):
        if hasattr(value, "__dict__"):
            yield _of_dict(name, vars(value))
        slots = [s for cls in type(value).__mro__ for s in _listed(vars(cls).get("__slots__", ())) if s[:2] != "__"]
        if slots:
            yield _of_attributes(name, value, slots)


def _is_object(value: Any) -> bool:
    """Whether this is an object of the user's, not code."""
    if isinstance(value, (SimpleNamespace, argparse.Namespace)):
        return True
    return not isinstance(value, (type, ModuleType, FunctionType)) and not _is_foreign(type(value))


def _listed(names: str | Iterable[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _is_foreign(code: Any) -> bool:
    """Whether a class, function or module is Python's, torch's or ours."""
    name = getattr(code, "__module__", None) or getattr(code, "__name__", "")
    return str(name).partition(".")[0] in _FOREIGN


def _is_library(function: FunctionType) -> bool:
    """Whether a function was installed: what it calls is taken to be fixed."""
    return any(part in function.__code__.co_filename for part in ("site-packages", "dist-packages"))


def _fixed(name: str, items: dict[Any, Any]) -> Place:
    return Place(name, items.values, items.copy, lambda _: None)


def _of_dict(name: str, own: dict[Any, Any]) -> Place:
    """A dictionary, by the methods of `dict` itself: a subclass may make its values when they are read."""

    def items() -> dict[Any, Any]:
        return dict(dict.items(own))

    def put_back(before: dict[Any, Any]) -> None:
        now = items()
        if len(now) == len(before) and all(now.get(k, _ABSENT) is v for k, v in before.items()):
            return
        if type(own) in (dict, OrderedDict):  # in the same order
            own.clear()
            own.update(before)
            return
        for k in now.keys() - before.keys():
            del own[k]
        for k, v in before.items():
            if now.get(k, _ABSENT) is not v:
                own[k] = v

    values = own.values if type(own) in (dict, OrderedDict) else lambda: dict.values(own)
    return Place(name, values, items, put_back)


def _of_items(name: str, own: Any) -> Place:
    """A list, deque, set or tuple."""

    def put_back(before: dict[Any, Any]) -> None:
        if isinstance(own, (tuple, frozenset)) or (
            len(own) == len(before) and all(map(operator.is_, own, before.values()))
        ):
            return
        own.clear()
        add = own.update if isinstance(own, set) else own.extend
        add(before.values())

    return Place(name, own.__iter__, lambda: dict(enumerate(own)), put_back)


def _of_attributes(name: str, owner: Any, names: list[str]) -> Place:
    def items() -> dict[Any, Any]:
        return {n: v for n in names if (v := getattr(owner, n, _ABSENT)) is not _ABSENT}

    def put_back(before: dict[Any, Any]) -> None:
        for n, now in items().items():
            if n not in before:
                delattr(owner, n)
            elif now is not before[n]:
                setattr(owner, n, before[n])

    return Place(name, lambda: items().values(), items, put_back)


def _of_class(cls: type) -> Place:
    own = vars(cls)

    def put_back(before: dict[Any, Any]) -> None:
        for k in [k for k, v in own.items() if before.get(k, _ABSENT) is not v]:
            setattr(cls, k, before[k]) if k in before else delattr(cls, k)

    return Place(cls.__name__, own.values, lambda: dict(own), put_back)


def _of_function(name: str, function: FunctionType) -> Iterator[Place]:
    """What a function reads from its closure, its defaults, and by name from its module and from others."""
    if _is_foreign(function):
        return
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    if cells:
        yield _of_cells(name, cells)
    if function.__defaults__ or function.__kwdefaults__:
        yield Place(
            name, lambda: (function.__defaults__, *(function.__kwdefaults__ or {}).values()),
            lambda: {"defaults": function.__defaults__} | (function.__kwdefaults__ or {}), lambda _: None,
        )  # fmt: skip
    if vars(function):
        yield _of_dict(name, vars(function))
    names = _names_in(function.__code__)
    around = function.__globals__
    wanted = [n for n in names if n in around and _is_read(around[n], _is_library(function))]
    if wanted:
        yield _of_globals(name, around, wanted)
    for module in [around[n] for n in names if isinstance(around.get(n), ModuleType)]:
        wanted = [n for n in names if n in vars(module) and _is_read(vars(module)[n], _is_library(function))]
        if wanted and not _is_foreign(module):
            yield _of_globals(module.__name__, vars(module), wanted)


def _is_read(value: Any, by_library: bool) -> bool:
    """Whether a global is looked at: data, and code of the user's."""
    if isinstance(value, ModuleType) or (_is_foreign(value) and isinstance(value, (type, FunctionType))):
        return False
    is_code = isinstance(value, (type, FunctionType, BuiltinFunctionType, MethodType, nn.Module))
    return not (is_code and by_library)


def _names_in(code: CodeType) -> list[str]:
    """All names in a function, and in those within it."""
    inner = [n for const in code.co_consts if isinstance(const, CodeType) for n in _names_in(const)]
    return list(dict.fromkeys((*code.co_names, *inner)))


def _of_globals(name: str, around: dict[str, Any], names: list[str]) -> Place:
    def items() -> dict[Any, Any]:
        return {n: around[n] for n in names if n in around}

    def put_back(before: dict[Any, Any]) -> None:
        around.update(before)

    return Place(name, lambda: [around.get(n) for n in names], items, put_back)


def _of_cells(name: str, cells: dict[str, Any]) -> Place:
    def items() -> dict[Any, Any]:
        found = {}
        for n, cell in cells.items():
            try:
                found[n] = cell.cell_contents
            except ValueError:  # not bound yet
                continue
        return found

    def put_back(before: dict[Any, Any]) -> None:
        for n, cell in cells.items():
            if n in before:
                cell.cell_contents = before[n]
            elif n in items():
                del cell.cell_contents

    return Place(name, lambda: items().values(), items, put_back)


class _TensorFact(NamedTuple):
    """A tensor that is not read anew in every step, as far as is seen without looking at its numbers."""

    id: int
    version: int


def _has_content(value: Any) -> bool:
    """Whether it may change in place: a plain tensor, or an array of NumPy's."""
    if isinstance(value, Tensor):
        return not isinstance(value, nn.Parameter) and not value.is_inference()
    return type(value).__module__ == "numpy" and hasattr(value, "tobytes")


def _fact(value: Any) -> Any:
    """A value in a form that can be compared."""
    if isinstance(value, Tensor):
        return _TensorFact(id(value), value._version if _has_content(value) else 0)
    if _has_content(value):
        return value.tobytes()
    if isinstance(value, float) and value != value:
        return "nan"
    if isinstance(value, tuple):
        return tuple(map(_fact, value))
    return value if isinstance(value, _PLAIN) else ("object", id(value))
