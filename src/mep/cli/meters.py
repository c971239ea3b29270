"""What a computation takes beside time: the memory its tensors hold, the arithmetic it does, the bytes it moves.

Both meters stand between torch and its kernels. A function of `torch.compile` runs eagerly under them, and would stay
so: measure it without, or not at all.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import addmm_flop, baddbmm_flop, flop_registry, sdpa_backward_flop, sdpa_flop

aten = torch.ops.aten


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that a `with` block makes, forward or backward, as they come and go.

    Tensors that share a storage count once, with the size it was made with; what an operation allocates and frees
    within itself does not count, nor do tensors that were there before.

    Attributes:
        bytes: alive now.
        peak: the most that were alive at once.

    Example:
        >>> with PeakMemory() as memory:
        ...     for _ in range(9):
        ...         x = torch.zeros(1000) + torch.zeros(1000)
        >>> memory.bytes, memory.peak  # x; and beside it, in the next round, the two terms and their sum
        (4000, 16000)
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def held_by(self, tree: Any) -> int:
        """The bytes that the tensors of a tree hold, of those that the block has made."""
        return sum(storage.nbytes() for key, storage in _storages(tree).items() if key in self._alive)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = _storages((args, kwargs))
        out = func(*args, **(kwargs or {}))
        for key, storage in _storages(out).items():
            if key not in given and key not in self._alive:
                self._alive[key] = weakref.ref(storage, partial(self._freed, key, storage.nbytes()))
                self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        return out

    def _freed(self, key: int, size: int, _: Any) -> None:
        del self._alive[key]
        self.bytes -= size


class Work(TorchDispatchMode):
    """Counts what the operations of a `with` block compute and move, forward or backward.

    Attributes:
        flops: floating-point operations of matrix products, convolutions and attention, a multiplication and an
            addition counting as two; by torch's own formulas, so that of pointwise operations nothing counts.
        bytes: the tensors that every operation reads and those that it writes, each once an operation, as if nothing
            stayed in a cache from one to the next. Views move nothing.

    Example:
        >>> weight, x = torch.ones(3, 4), torch.ones(4, 5)
        >>> with Work() as work:
        ...     y = (weight @ x).t()
        >>> work.flops, work.bytes == 4 * (weight.numel() + x.numel() + y.numel())
        (120, True)
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in FORMULAS:
            self.flops += FORMULAS[packet](*args, **kwargs, out_val=out)
        if not (func.is_view or packet in UNMOVED):
            read = args[1:] if packet in ONLY_WRITTEN else args
            named = [value for name, value in kwargs.items() if name != "out"]
            written = out if func._schema.returns else args[0]  # in place, some return nothing
            self.bytes += sum(map(_bytes, _tensors((read, named, written))))
        return out


def _shapes(formula: Callable[..., int]) -> Callable[..., int]:
    """A formula of shapes, called with tensors, as those of torch's registry are."""

    def count(*args: Any, out_val: Any, **kwargs: Any) -> int:
        return formula(*(arg.shape if isinstance(arg, Tensor) else arg for arg in args))

    return count


FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # Those that the registry lacks: sums into what is there already, and attention on a CPU.
    aten.addmm_: _shapes(addmm_flop),
    aten.baddbmm_: _shapes(baddbmm_flop),
    aten._scaled_dot_product_flash_attention_for_cpu: _shapes(sdpa_flop),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _shapes(sdpa_backward_flop),
}
UNMOVED = {aten.detach, aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
"""Make a tensor, and write nothing into it."""
ONLY_WRITTEN = {aten.copy_, aten.zero_, aten.fill_}
"""Do not read the tensor that they write into."""


def _bytes(tensor: Tensor) -> int:
    """Of a tensor's own numbers; of one that repeats them by stride zero, those that are there."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _tensors(tree: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dicts; `torch.utils._pytree` takes several times as long."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for branch in tree:
            yield from _tensors(branch)
    elif isinstance(tree, dict):
        for branch in tree.values():
            yield from _tensors(branch)


def _storages(tree: Any) -> dict[int, Any]:
    """The storages of all tensors of a tree, each once; a tensor without numbers has none."""
    found = (tensor.untyped_storage() for tensor in _tensors(tree) if tensor.device.type != "meta")
    return {storage._cdata: storage for storage in found}
