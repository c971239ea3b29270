"""What a step takes: time, the memory its tensors hold, the arithmetic it does, the bytes it moves.

Recipes are timed in turns, so that the ratio of two times is that of neighbours. All recipes step in one process, on
the same batches; after every step the model is put back, so that all steps of a recipe start from one point. A busy
moment of the machine then falls on all alike. A turn is several steps, and the first of them are not counted: another
recipe has emptied the caches, which would hide much of what separates a fast step from a slow one.

Memory and work are measured apart from time, by `PeakMemory` and `Work`, which stand between torch and its kernels. A
function of `torch.compile` runs eagerly under them, and would stay so: measure it without, or not at all.
"""

from __future__ import annotations

import copy
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import addmm_flop, baddbmm_flop, flop_registry, sdpa_backward_flop, sdpa_flop

import mep
from mep.lab.recipes import Recipe
from mep.runs.optimizers import Optimizer, build_to_compare
from mep.runs.training import clock

Batch = tuple[Tensor, Tensor]
T = TypeVar("T")
aten = torch.ops.aten


def build(recipe: Recipe, model: nn.Module, cost: str) -> Optimizer:
    """The recipe's optimizer of all parameters of this model, whose memory format may change."""
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.register_forward_pre_hook(_pictures_last)
    return build_to_compare(recipe.preset, model, {"cost": cost, **recipe.options})


def _pictures_last(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    last = torch.channels_last
    return tuple(x.to(memory_format=last) if isinstance(x, Tensor) and x.ndim == 4 else x for x in inputs)


def estimator_of(optimizer: Optimizer) -> mep.EquilibriumPropagation | None:
    """What settles in an optimizer; None if it is fed by backprop."""
    estimator = optimizer.estimator if isinstance(optimizer, mep.EPOptimizer) else None
    return estimator if isinstance(estimator, mep.EquilibriumPropagation) else None


# Time


class TimedRecipe:
    """A recipe's optimizer on a copy of the model, which is put back after every step.

    `seconds` sums the time of all steps, and `running` that in which this thread was given the processor.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, cost: str):
        self.model = copy.deepcopy(model)
        self.optimizer = build(recipe, self.model, cost)
        self.now = clock(next(model.parameters()).device)
        self.seconds = self.running = 0.0
        self._keep_point()

    def step(self, x: Tensor, target: Tensor) -> float:
        """The seconds of one step."""
        seconds = self._step(x, target)
        self.put_back()
        return seconds

    def start_within_bounds(self, x: Tensor, target: Tensor) -> None:
        """Start from where a first step leads, so that a bound that the model broke is not met anew in every step."""
        self._step(x, target)
        self._keep_point()

    def put_back(self) -> None:
        """Give the model the parameters and buffers that every step starts from."""
        self.model.load_state_dict(self._point)

    @property
    def running_share(self) -> float:
        """The share of the time in which the machine was not busy with something else."""
        return min(1.0, self.running / self.seconds)

    def _step(self, x: Tensor, target: Tensor) -> float:
        running, start = time.thread_time(), self.now()
        self.optimizer.step(x=x, target=target)
        seconds = self.now() - start
        self.seconds, self.running = self.seconds + seconds, self.running + time.thread_time() - running
        return seconds

    def _keep_point(self) -> None:
        self._point = {name: value.clone() for name, value in self.model.state_dict().items()}


def in_turns(turns: Sequence[Callable[[int], T]], rounds: Iterable[int]) -> list[list[T]]:
    """Call every turn in every round, with the number of the round; each round begins with another turn.

    >>> in_turns([lambda number: f"a{number}", lambda number: f"b{number}"], range(3))
    [['a0', 'a1', 'a2'], ['b0', 'b1', 'b2']]
    """
    found: list[list[T]] = [[] for _ in turns]
    for number in rounds:
        for place in range(len(turns)):
            chosen = (place + number) % len(turns)
            found[chosen].append(turns[chosen](number))
    return found


def batches_of(batches: Sequence[Batch], number: int, steps: int) -> list[Batch]:
    """The batches of a turn: those after the ones of the turn before, over and over."""
    return [batches[(number * steps + step) % len(batches)] for step in range(steps)]


def relative(seconds: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]]) -> dict[str, dict[str, float]]:
    """Quartiles of the seconds of all steps, and over the rounds of their ratio to the baseline's in the same round.

    Both arguments have a row for every round, the seconds of its steps.

    >>> relative([[2.0, 2.0], [6.0, 6.0]], [[1.0, 1.0], [2.0, 2.0]])["ratio"]
    {'median': 2.5, 'low': 2.25, 'high': 2.75}
    """
    ratios = [statistics.median(a) / statistics.median(b) for a, b in zip(seconds, baseline, strict=True)]
    return {"seconds": quartiles([step for turn in seconds for step in turn]), "ratio": quartiles(ratios)}


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Of two values or more."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


# Memory, arithmetic, bytes


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
