"""Around a step: hooks that are not to fire, random number generators put back, Ctrl-C delayed, parts with names."""

from __future__ import annotations

import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function


def hooks_of(p: Tensor) -> list[dict[Any, Any]]:
    """The hooks on a parameter's gradient."""
    return [own for own in (p._backward_hooks, getattr(p, "_post_accumulate_grad_hooks", None)) if own]


@contextmanager
def without_hooks(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Hooks on these parameters do not fire inside: they are for the gradient of a step."""
    hooks = [(own, dict(own)) for p in parameters for own in hooks_of(p)]
    for own, _ in hooks:
        own.clear()
    try:
        yield
    finally:
        for own, kept in hooks:
            own.update(kept)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """What runs inside is finished before an interrupt by the keyboard (SIGINT) takes effect; a second goes through.

    Python hands signals to the main thread alone: other threads are never interrupted, and nothing is done there.

    Example:
        >>> with uninterrupted():
        ...     pass
    """
    usual = signal.getsignal(signal.SIGINT)
    if not callable(usual) or threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []

    def postpone(number: int, frame: FrameType | None) -> None:
        came.append((number, frame))
        if len(came) > 1:
            usual(number, frame)

    signal.signal(signal.SIGINT, postpone)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if len(came) == 1:
            usual(*came[0])


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, NaN to NaN.

    Example:
        >>> same(torch.tensor([torch.nan]), torch.zeros(1))
        False
    """
    is_like = a.shape == b.shape and a.dtype == b.dtype
    if is_like and a.layout is not torch.strided:
        a, b = a.to_dense(), b.to_dense()
    return is_like and (torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all()))


class Noise(NamedTuple):
    """The states of the generators; None where there is none, or where it is left out."""

    cpu: Tensor
    cuda: Tensor | None
    python: Any = None
    numpy: Any = None

    def differs(self, other: Noise) -> bool:
        """Whether a generator has moved from one to the other."""
        return self.torch_differs(other) or self.foreign_differs(other)

    def torch_differs(self, other: Noise) -> bool:
        """Whether one of torch's has moved."""
        torchs = ((self.cpu, other.cpu), (self.cuda, other.cuda))
        return any(a is not None and b is not None and not torch.equal(a, b) for a, b in torchs)

    def foreign_differs(self, other: Noise) -> bool:
        """Whether Python's or NumPy's has moved."""
        return self.python != other.python or _words(self.numpy) != _words(other.numpy)


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


Region = AbstractContextManager[Any]
_watching: list[Callable[[str], Region]] = []


def region(name: str) -> Region:
    """What `torch.profiler` shows as "mep: name"; nothing where neither a profiler nor `watch_regions` is active."""
    if _watching:
        return _watching[-1](name)
    is_profiled: bool = torch._C._autograd._profiler_enabled()
    return record_function(f"mep: {name}") if is_profiled else nullcontext()


@contextmanager
def watch_regions(watch: Callable[[str], Region]) -> Iterator[None]:
    """Within this block every region of a step is entered as `watch(name)`, which may read a clock."""
    _watching.append(watch)
    try:
        yield
    finally:
        _watching.pop()
