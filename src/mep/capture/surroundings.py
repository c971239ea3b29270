"""What Python holds that decides what a model computes, or that its code writes: attributes, closures, globals.

A captured graph reads parameters and buffers anew in every step. Everything else is fixed in it: modules, modes, hooks,
numbers, lists, dictionaries, configuration objects, arrays, plain tensors; on the modules, on their classes, and around
the functions that `forward`, its hooks and the cost run. `places` finds all that holds such values, by key. `Snapshot`
sees when a value changes, `surroundings_kept` puts it back.

A **fact** is a value in a form that can be compared. A **note** is a value that running the model changes, once and for
all or to a new object each time, and that the graph need not follow.
"""

from __future__ import annotations

import argparse
import array
import configparser
import copy
import functools
import operator
import os
import sys
import threading
import weakref
from collections import ChainMap, OrderedDict, UserDict, UserList, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain, repeat
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_CACHED: Any = type(functools.lru_cache(int))
_PARTS: dict[Any, tuple[str, ...]] = {
    _CACHED: ("__wrapped__",),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
    property: ("fget",),
    MethodType: ("__self__", "__func__"),
    functools.partial: ("func", "args", "keywords"),
}
"""What decides about callables that are no functions."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OWN = vars(nn.Module()).keys()
"""What torch keeps on every module."""
_LONGEST = 10_000
"""A list or dictionary with more entries is data, and not looked into."""
_FOREIGN = {*sys.stdlib_module_names, "torch", "numpy", "mep", "_pytest"} - {"__main__"}
"""Packages whose code keeps nothing that a model is made of; pytest's is what it makes of assertions in `forward`."""
_RECORDS: tuple[Any, ...] = (
    SimpleNamespace, argparse.Namespace, configparser.RawConfigParser, configparser.SectionProxy, UserDict, UserList,
    ChainMap, threading.local, type(os.environ), torch.distributions.Distribution, torch.distributions.Transform,
)  # fmt: skip
"""Classes of such packages whose objects hold values of the user's in their attributes."""
_WAYS_OF_CONTEXT: tuple[Any, ...] = (
    lambda variable, _, default: variable.get(default), lambda variable, _, new: variable.set(new), lambda *_: None
)  # fmt: skip
_FORWARD = operator.attrgetter("forward")
_ABSENT = object()


class Place:
    """A dictionary of Python's: its values as they are at any time (`view`), with their keys (`items`), a way back."""

    def __init__(self, name: str, owner: Any):
        self.name, self.owner = name, owner
        self.view: Iterable[Any] = owner.values() if isinstance(owner, dict) else owner

    def items(self) -> dict[Any, Any]:
        return dict(self.owner)

    def put_back(self, before: dict[Any, Any]) -> None:
        """Hold what `items` returned before."""
        now = self.items()
        if len(now) != len(before) or any(now.get(k, _ABSENT) is not v for k, v in before.items()):
            self.refill(now, before)

    def refill(self, now: dict[Any, Any], before: dict[Any, Any]) -> None:
        """Hold `before` instead of `now`, in the same order."""
        self.owner.clear()
        self.owner.update(before)


class _Collection(Place):
    """A list, deque, set or tuple: the keys are positions."""

    def items(self) -> dict[Any, Any]:
        return dict(enumerate(self.owner))

    def refill(self, now: dict[Any, Any], before: dict[Any, Any]) -> None:
        if not isinstance(self.owner, (tuple, frozenset)):
            self.owner.clear()
            (self.owner.update if isinstance(self.owner, set) else self.owner.extend)(before.values())


class _Named(Place):
    """Names of an owner, one by one: its attributes, or what is found by other `ways` to get, assign and delete."""

    def __init__(self, name: str, owner: Any, names: Iterable[Any], *ways: Any):
        self.name, self.owner, self.names, self.view = name, owner, names, self
        self.get, self.assign, self.delete = ways or (getattr, setattr, delattr)

    def __iter__(self) -> Iterator[Any]:
        return map(self.get, repeat(self.owner), self.names, repeat(_ABSENT))

    def items(self) -> dict[Any, Any]:
        return {n: v for n, v in zip(self.names, self, strict=True) if v is not _ABSENT}

    def refill(self, now: dict[Any, Any], before: dict[Any, Any]) -> None:
        for name in now.keys() - before.keys():
            self.delete(self.owner, name)
        for name, value in before.items():
            if now.get(name, _ABSENT) is not value:
                self.assign(self.owner, name, value)


class _Buffers(Place):
    """The buffers of a module. Their numbers are read anew in every step: what is fixed is their shape and dtype."""

    def items(self) -> dict[Any, Any]:
        return {k: None if b is None else (b.shape, b.dtype) for k, b in self.owner.items()}

    def put_back(self, before: dict[Any, Any]) -> None:
        """As `mep.capture.state.Buffers` does."""


class _Classes(Place):
    """The classes of objects, which may be assigned anew, and then what `forward` is in classes of torch's modules.

    The keys are positions.
    """

    def __init__(self, objects: list[Any], classes: list[Any]):
        self.name, self.objects, self.owner, self.view = "the class", objects, classes, self

    def __iter__(self) -> Iterator[Any]:
        return chain(map(type, self.objects), map(_FORWARD, self.owner))

    def items(self) -> dict[Any, Any]:
        return dict(enumerate(self))

    def refill(self, now: dict[Any, Any], before: dict[Any, Any]) -> None:
        homes = [(own, "__class__") for own in self.objects] + [(cls, "forward") for cls in self.owner]
        for (home, name), old, new in zip(homes, before.values(), now.values(), strict=True):
            if new is not old:
                setattr(home, name, old)


Facts = list[dict[Any, Any]]
"""For each place, key -> fact."""


class Snapshot:
    """Whether a model, and the function that is its cost, are still those that were captured.

    Values of parameters and buffers may change, and so may notes.
    """

    def __init__(self, *roots: Any):
        self.places = list(places(*roots))
        self.views = [place.view for place in self.places]
        self.notes: set[tuple[int, Any]] = set()
        self.lengths: set[int] = set()
        """Places whose number of values is a note."""
        self._keep(self._facts())

    def matches(self) -> bool:
        """Whether everything is as it was: the same objects with the same content, or equal ones."""
        if self._is_the_same():
            return True
        facts = self._facts()
        if not all(change in self.notes or change[0] in self.lengths for change in _changes(self.facts, facts)):
            return False
        self._keep(facts)  # so that the next comparison is quick
        return True

    def now(self) -> Facts:
        """All values as they are now."""
        return self.facts if self._is_the_same() else self._facts()

    def moved(self, first: Facts, second: Facts) -> str | None:
        """The name of what two runs of the model changed in turn, as it was after each; other changes are notes.

        A new object, or one more in a list, is a note; another number, or a tensor that was written, is not.
        """
        changes = _changes(self.facts, second)
        lengths = {i for i, _ in changes if len(second[i]) not in (len(self.facts[i]), len(first[i]))}
        for i, key in changes:
            fact, before = second[i].get(key, _ABSENT), first[i].get(key, _ABSENT)
            is_number = isinstance(fact, (bool, int, float, str))
            is_written = isinstance(fact, _TensorFact) and isinstance(before, _TensorFact) and fact.id == before.id
            if fact != before and (is_number or is_written) and i not in lengths:
                name = self.places[i].name + (f".{key}" if isinstance(key, str) else f"[{key}]")
                return name.removesuffix(".cell_contents")
        self.notes |= changes
        self.lengths |= lengths
        return None

    def _is_the_same(self) -> bool:
        """Whether all values are the same objects with the same content; called in every step."""
        values = list(chain.from_iterable(self.views))
        if len(values) != len(self.values) or not all(map(operator.is_, values, self.values)):
            return False
        return self._contents() == self.contents

    def _keep(self, facts: Facts) -> None:
        self.facts, self.values = facts, list(chain.from_iterable(self.views))
        self.buffers = [b for p in self.places if isinstance(p, _Buffers) for b in p.view if b is not None]
        others = (v for p in self.places if not isinstance(p, _Buffers) for v in p.view)
        self.mutable = [v for v in others if _has_content(v)]
        self.contents = self._contents()

    def _contents(self) -> list[Any]:
        found: list[Any] = []
        for b in self.buffers:
            found += b.shape, b.dtype
        for v in self.mutable:
            found.append(v._version if isinstance(v, Tensor) else _bytes(v))
        return found

    def _facts(self) -> Facts:
        return [{key: _fact(value) for key, value in place.items().items()} for place in self.places]


def _changes(old: Facts, new: Facts) -> set[tuple[int, Any]]:
    """Places, by number, and keys, where two differ."""
    pairs = [(i, a, b) for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    return {(i, k) for i, a, b in pairs for k in a.keys() | b.keys() if a.get(k, _ABSENT) != b.get(k, _ABSENT)}


class _TensorFact(NamedTuple):
    """A tensor that is not read anew in every step, as far as is seen without looking at its numbers."""

    id: int
    version: int


def _has_content(value: Any) -> bool:
    """Whether it may change in place: a plain tensor, or an array of NumPy's or Python's."""
    if isinstance(value, Tensor):
        return not isinstance(value, nn.Parameter) and not value.is_inference()
    is_numpys = type(value).__module__ == "numpy" and hasattr(value, "tobytes")
    return is_numpys or isinstance(value, (bytearray, array.array))


def _bytes(value: Any) -> bytes:
    return bytes(value) if isinstance(value, bytearray) else value.tobytes()


def _fact(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _TensorFact(id(value), value._version if _has_content(value) else 0)
    if _has_content(value):
        return _bytes(value)
    if isinstance(value, float) and value != value:
        return "nan"
    if isinstance(value, tuple):
        return tuple(map(_fact, value))
    return value if isinstance(value, _PLAIN) else ("object", id(value))


@contextmanager
def surroundings_kept(*roots: Any) -> Iterator[None]:
    """Whatever code notes down inside, on modules and elsewhere, is gone afterwards; caches of functions are empty."""
    kept = [(place, place.items()) for place in places(*roots)]
    mutable = {id(v): v for _, items in kept for v in items.values() if _has_content(v)}.values()
    contents: list[Any] = [v.detach().clone() if isinstance(v, Tensor) else copy.copy(v) for v in mutable]
    versions = [v._version if isinstance(v, Tensor) else 0 for v in mutable]
    try:
        yield
    finally:
        for place, items in kept:
            place.put_back(items)
            if isinstance(place.owner, _CACHED):
                place.owner.cache_clear()
        for v, content, version in zip(mutable, contents, versions, strict=True):
            if isinstance(v, Tensor):
                if v._version != version:
                    v.detach().copy_(content)
            elif _bytes(v) != _bytes(content):
                v[slice(None) if isinstance(v, (bytearray, array.array)) else ...] = content


def places(*roots: Any) -> Iterator[Place]:
    """Everything that holds what modules and functions read or write, breadth first."""
    for key, hooks in vars(torch.nn.modules.module).items():
        if key.startswith("_global") and isinstance(hooks, dict):
            yield Place("every module", hooks)
    seen: dict[int, Any] = {}
    objects: list[Any] = []
    classes: list[Any] = []
    patched: dict[str, set[str]] = {}
    queue: deque[tuple[str, Any]] = deque(("cost" if i else "model", root) for i, root in enumerate(roots))
    while queue:
        name, value = queue.popleft()
        if isinstance(value, weakref.ref):
            value = value()
        if id(value) in seen or isinstance(value, (*_PLAIN, Tensor, torch.Generator, BuiltinFunctionType)):
            continue
        seen[id(value)] = value
        is_torchs = isinstance(value, type) and issubclass(value, nn.Module) and _is_foreign(value)
        if is_torchs and hasattr(value, "forward"):  # classes of scripted modules have none
            classes.append(value)
            queue.append((value.__name__, value.forward))
        if isinstance(value, nn.Module):
            for path, module in value.named_modules():
                seen[id(module)] = module
                objects.append(module)
                for place in _of_module(path or name, module):
                    yield place
                    inside = place.items() if not isinstance(place, _Buffers) else {}
                    queue.extend((f"{path or name}.{key}", v) for key, v in inside.items() if key not in _OWN)
                queue.append((type(module).__name__, type(module)))
            continue
        for place in _of_object(name, value, patched):
            yield place
            queue.extend((f"{name}.{key}", inner) for key, inner in place.items().items())
        if _is_object(value):
            objects.append(value)
            queue.append((type(value).__name__, type(value)))
    yield _Classes(objects, classes)


def _of_module(name: str, module: nn.Module) -> Iterator[Place]:
    if isinstance(module, torch.jit.ScriptModule):
        yield _Named(name, module, ("training",))
        return
    own = vars(module)
    yield Place(name, own)
    for part in ("_parameters", "_modules", *_HOOKS):
        if part in own:
            yield Place(f"{name}.{part}", own[part])
    yield _Buffers(name, own["_buffers"])


def _of_object(name: str, value: Any, known: dict[str, set[str]]) -> Iterator[Place]:
    """The places of anything but a module; `known` has the names of Python's and torch's that were found before."""
    read = [names for kind, names in _PARTS.items() if isinstance(value, kind)]
    if read:
        yield _Named(name, value, read[0])
    elif isinstance(value, FunctionType):
        yield from _of_function(name, value, known)
    elif isinstance(value, ContextVar):
        yield _Named(name, value, ("value",), *_WAYS_OF_CONTEXT)
    elif isinstance(value, type):
        for cls in value.__mro__ if not _is_foreign(value) else ():
            if not _is_foreign(cls):
                ways = (lambda cls, key, default: vars(cls).get(key, default)), setattr, delattr
                place = _Named(cls.__name__, cls, vars(cls), *ways)
                place.view = vars(cls).values()
                yield place
    elif isinstance(value, (dict, list, deque, set, tuple, frozenset)):
        if len(value) > _LONGEST:
            return
        if type(value) in (dict, OrderedDict):
            yield Place(name, value)
        elif isinstance(value, dict):  # its own methods may make values when they are read
            yield _Named(name, value, dict.keys(value), dict.get, operator.setitem, operator.delitem)
        else:
            yield _Collection(name, value)
    elif _is_object(value):
        if hasattr(value, "__dict__"):
            yield Place(name, vars(value))
        listed = [vars(cls).get("__slots__", ()) for cls in type(value).__mro__]
        names = [s for own in listed for s in ([own] if isinstance(own, str) else own)]
        # A subclass may have a property in the place of a slot, which cannot be put back.
        slots = [s for s in names if isinstance(getattr(type(value), s, None), MemberDescriptorType)]
        if slots:
            yield _Named(name, value, slots)


def _is_object(value: Any) -> bool:
    """Whether this is an object of the user's, not code."""
    if isinstance(value, _RECORDS):
        return True
    return not isinstance(value, (type, ModuleType, FunctionType)) and not _is_foreign(type(value))


def _is_foreign(code: Any) -> bool:
    """Whether a class, function or module is Python's, torch's or ours.

    A wrapper has the module of what it wraps (`functools.wraps`), and is foreign only if both are.
    """
    names = [getattr(code, "__module__", None) or getattr(code, "__name__", "")]
    if isinstance(code, FunctionType):
        names.append(code.__globals__.get("__name__", ""))
    return all(str(name).partition(".")[0] in _FOREIGN for name in names)


def _of_function(name: str, function: FunctionType, known: dict[str, set[str]]) -> Iterator[Place]:
    """What a function reads from its closure, its defaults, and by name from its module and from others.

    Of modules of Python's and torch's that is whatever it names: a function there may be replaced.
    """
    if _is_foreign(function):
        if "__wrapped__" in vars(function):  # as of torch.no_grad()
            yield _Named(name, function, ("__wrapped__",))
        return
    for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if variable != "__class__" and cell != CellType():  # not that of super(), and bound
            yield _Named(f"{name}.{variable}", cell, ("cell_contents",))
    if function.__defaults__ or function.__kwdefaults__:
        yield _Named(name, function, ("__defaults__", "__kwdefaults__"))
    if vars(function):
        yield Place(name, vars(function))
    # Code that was installed is taken to be fixed.
    is_library = any(part in function.__code__.co_filename for part in ("site-packages", "dist-packages"))
    names, around = _names_in(function.__code__), function.__globals__
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    found = [*cells, *(around.get(n, sys.modules.get(n)) for n in names)]
    modules = list(dict.fromkeys(m for m in found if isinstance(m, ModuleType)))
    for m in modules:  # and those inside, which the list grows by
        modules += [v for n in names if isinstance(v := vars(m).get(n), ModuleType) and v not in modules]
    for where, home, is_foreign in [(name, around, False), *((m.__name__, vars(m), _is_foreign(m)) for m in modules)]:
        wanted = [n for n in names if n in home and (is_foreign or _is_read(home[n], is_library))]
        if is_foreign:
            before = known.setdefault(where, set())
            wanted = [n for n in wanted if not (is_library or n in before or isinstance(home[n], ModuleType))]
            before.update(wanted)
        if wanted:
            yield _Named(where, home, wanted, dict.get, dict.__setitem__, dict.__delitem__)


def _names_in(code: CodeType) -> list[str]:
    """All names in a function, and in those within it."""
    inner = [n for const in code.co_consts if isinstance(const, CodeType) for n in _names_in(const)]
    return list(dict.fromkeys((*code.co_names, *inner)))


def _is_read(value: Any, by_library: bool) -> bool:
    """Whether a global is looked at: data, and code of the user's."""
    if isinstance(value, ModuleType) or (_is_foreign(value) and isinstance(value, (type, FunctionType))):
        return False
    is_code = isinstance(value, (type, FunctionType, BuiltinFunctionType, MethodType, nn.Module))
    return not (is_code and by_library)
