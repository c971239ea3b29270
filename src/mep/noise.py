"""The states of the random number generators: torch's on the CPU and on the present GPU, Python's and NumPy's."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Noise(NamedTuple):
    """The states of the generators; None where there is none, or where it was not asked for."""

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
