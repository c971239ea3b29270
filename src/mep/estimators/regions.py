"""The named parts of a step: free phase, settling, contrast. A profiler shows them, `watch_regions` measures them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.profiler import record_function

Region = AbstractContextManager[Any]
_watching: list[Callable[[str], Region]] = []


def region(name: str) -> Region:
    """What `torch.profiler` shows as "mep: name"; without anything that looks on it costs nothing."""
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
