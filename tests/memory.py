"""How much memory the tensors take that a computation makes: a meter for tests and benchmarks."""

import weakref
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the CPU tensors that a `with` block makes, forward or backward, as they come and go.

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

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self._alive = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = _storages((args, kwargs))
        out = func(*args, **(kwargs or {}))
        for key, storage in _storages(out).items():
            if key not in given and key not in self._alive:
                self._alive[key] = weakref.ref(storage, partial(self._freed, key, storage.nbytes()))
                self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        return out

    def _freed(self, key, size, _):
        del self._alive[key]
        self.bytes -= size


def _storages(tree):
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu")
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage for storage in storages}
