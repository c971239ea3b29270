"""What a step must find as it was, or leave as it was: the traced model, its buffers, the random numbers."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Snapshot:
    """Tells whether a model is still the one that was traced: modules, parameters, modes, hooks and settings.

    Values of parameters and buffers may change, and so may what a module notes down while it runs.
    """

    def __init__(self, model: nn.Module):
        self.modules = tuple(model.modules())
        self.facts = [_facts(m) for m in self.modules]
        self.notes: list[set[str]] = [set() for _ in self.modules]
        self.dicts = [own for m in self.modules for own in _dicts(m)]
        self.objects = _values(self.dicts)  # kept alive, so that no identity is given out again
        self.identities = _identities(self.dicts, self.objects)

    def matches(self) -> bool:
        """Whether every module is as it was."""
        if _identities(self.dicts, _values(self.dicts)) == self.identities:
            return True
        now = [_facts(m) for m in self.modules]
        return now == self.facts or all(
            _changed(old, new) <= notes for old, new, notes in zip(self.facts, now, self.notes, strict=True)
        )

    def buffers(self) -> list[Any]:
        """The buffers as they are now, None where one is not set."""
        return _values([m._buffers for m in self.modules])

    def allow_notes(self) -> None:
        """Call when the model has just run, and nothing else happened: what changed is what it notes down itself."""
        for module, old, notes in zip(self.modules, self.facts, self.notes, strict=True):
            notes |= _changed(old, _facts(module))


def _dicts(module: nn.Module) -> list[dict[str, Any]]:
    """What holds every object that decides what a module does: while these are the same, so is the module."""
    own = vars(module)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [own, *(own[name] for name in ("_parameters", "_modules", *hooks))]


def _values(dicts: list[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, dicts)))


def _identities(dicts: list[dict[str, Any]], values: list[Any]) -> list[int]:
    """Which values stand in which of the dictionaries."""
    return [*map(id, values), *map(len, dicts)]


def _changed(old: dict[str, Any], new: dict[str, Any]) -> set[str]:
    return {name for name in old.keys() | new.keys() if name not in old or name not in new or old[name] != new[name]}


def _facts(module: nn.Module) -> dict[str, Any]:
    """A module's attributes; dictionaries (of parameters, submodules, hooks) by their items' identity."""
    return {
        name: (tuple(value), tuple(map(id, value.values())))
        if isinstance(value, dict)
        else value
        if isinstance(value, (bool, int, float, str, type(None)))
        else id(value)
        for name, value in vars(module).items()
        if name != "_buffers"
    }


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Whatever modules note down on themselves inside is gone afterwards."""
    before = [(m, dict(vars(m))) for m in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


class Buffers:
    """A model's buffers during a step: every evaluation reads those of before, and the first one's writes remain.

    Running statistics move once a step, however often the model is evaluated. A module may write its buffers in place
    or bind them anew; autograd graphs of earlier evaluations stay valid, since later ones get copies.
    """

    def __init__(self, model: nn.Module):
        self.homes = [m._buffers for m in model.modules() if m._buffers]
        self.before = self._copies()
        self.after = self.before

    def keep_writes(self) -> None:
        """Call after the first evaluation: what it wrote is what will remain."""
        if self.homes:
            self.after = self._copies()

    def rewind(self) -> None:
        """Lay out copies of what they were before the step, for the next evaluation."""
        for home, kept in zip(self.homes, self.before, strict=True):
            home.update({name: None if value is None else value.clone() for name, (_, value) in kept.items()})

    def written(self) -> list[Tensor]:
        """The values that the first evaluation left."""
        return [value for home in self.after for _, value in home.values() if value is not None]

    def targets(self) -> list[Tensor]:
        """The buffers themselves, in the order of `written`."""
        return [b for home in self.before for b, _ in home.values() if b is not None]

    def finish(self) -> None:
        """To what the first evaluation wrote."""
        self._restore(self.after)

    def undo(self) -> None:
        """To what they were before the step."""
        self._restore(self.before)

    def _copies(self) -> list[dict[str, tuple[Tensor | None, Tensor | None]]]:
        return [{k: (b, None if b is None else b.clone()) for k, b in home.items()} for home in self.homes]

    def _restore(self, kept: list[dict[str, tuple[Tensor | None, Tensor | None]]]) -> None:
        for home, copies in zip(self.homes, kept, strict=True):
            for name, (buffer, value) in copies.items():
                if buffer is not None and value is not None:
                    buffer.copy_(value)
                home[name] = buffer


class Noise(NamedTuple):
    """The states of random number generators: torch's on the CPU and on the present GPU, Python's and NumPy's.

    None where there is none, or where it was not asked for.
    """

    cpu: Tensor
    cuda: Tensor | None
    python: Any = None
    numpy: Any = None

    def differs(self, other: Noise) -> bool:
        """Whether a generator has moved from one to the other."""
        torchs = ((self.cpu, other.cpu), (self.cuda, other.cuda))
        moved = any(a is not None and b is not None and not torch.equal(a, b) for a, b in torchs)
        return moved or self.python != other.python or _words(self.numpy) != _words(other.numpy)


def generators(everyones: bool = False) -> Noise:
    """The states of torch's generators, or of everyone's: code that is not torch's may draw from any."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    if not everyones:
        return Noise(torch.get_rng_state(), cuda)
    numpy = sys.modules.get("numpy")
    return Noise(torch.get_rng_state(), cuda, random.getstate(), numpy and numpy.random.get_state())


def set_generators(noise: Noise) -> None:
    """Set what `generators` returned."""
    torch.set_rng_state(noise.cpu)
    if noise.cuda is not None:
        torch.cuda.set_rng_state(noise.cuda)
    if noise.python is not None:
        random.setstate(noise.python)
    if noise.numpy is not None:
        sys.modules["numpy"].random.set_state(noise.numpy)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Everyone's generators end as they began."""
    before = generators(everyones=True)
    try:
        yield
    finally:
        set_generators(before)


def _words(state: Any) -> Any:
    """A state of NumPy's generator in a form that can be compared."""
    return state and (state[0], state[1].tobytes(), *state[2:])
