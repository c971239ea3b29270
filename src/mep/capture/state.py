"""What a model must not be to be read, and runs of a model that leave no trace."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mep.capture.surroundings import surroundings_kept
from mep.errors import TraceError
from mep.guards import generators_kept, same, uninterrupted


def check_state(model: nn.Module, hooks: bool = True) -> None:
    """Refuse what no graph can hold: gradients of modules that hooks change, lazy parameters, distributed wrappers."""
    every: Any = torch.nn.modules.module
    if hooks and (every._global_backward_hooks or every._global_backward_pre_hooks):
        raise TraceError(
            "A backward hook is registered for every module (torch.nn.modules.module), and there is no backward pass "
            "through the network in which it would run. Way out: remove it, the handle's .remove()."
        )
    for name, module in model.named_modules():
        kind, where = type(module), f"`{name}`" if name else "the model"
        wrappers = [c.__name__ for c in kind.__mro__ if c.__name__ in _WRAPPERS]
        if wrappers:
            raise TraceError(
                f"{where} is wrapped by {kind.__name__}: its replicas would drift apart, since their gradients are not "
                f"made by backward(). Way out: train the module itself, {_WRAPPERS[wrappers[0]]}, on one device."
            )
        if not name and isinstance(module, torch.jit.ScriptModule):
            raise TraceError(
                f"{kind.__name__}: a scripted model cannot be read. Way out: pass the module that was scripted; "
                "scripted modules inside a model are kept whole."
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


class Buffers:
    """A model's buffers, to be put back after it has run. A module may write them in place or bind them anew."""

    def __init__(self, *modules: nn.Module):
        every = [m for module in modules for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]
        self.before = [
            (m._buffers, {k: (b, None if b is None else b.detach().clone()) for k, b in m._buffers.items()})
            for m in every
        ]

    def undo(self) -> None:
        """To what they were."""
        with torch.no_grad(), uninterrupted():
            for home, kept in self.before:
                for name in home.keys() - kept.keys():
                    del home[name]
                for name, (buffer, value) in kept.items():
                    if buffer is not None and value is not None and not same(buffer, value):
                        buffer.copy_(value)
                    home[name] = buffer

    def values(self) -> list[Tensor]:
        """Copies of what they are now."""
        return [b.detach().clone() for home, kept in self.before for k in kept if (b := home[k]) is not None]


@contextmanager
def untouched(*roots: Any) -> Iterator[Buffers]:
    """Modules and functions may be run inside: buffers, attributes and random numbers end as they began."""
    buffers = Buffers(*(root for root in roots if isinstance(root, nn.Module)))
    others = ExitStack()
    others.enter_context(surroundings_kept(*roots))
    others.enter_context(generators_kept())
    others.enter_context(_without_cached_parametrizations())
    try:
        yield buffers
    finally:
        with uninterrupted():
            buffers.undo()
            others.close()


@contextmanager
def _without_cached_parametrizations() -> Iterator[None]:
    """Inside, a `parametrize.cached()` around has no effect: each run computes its own values, with its own graph."""
    state: Any = parametrize
    before = state._cache_enabled, state._cache
    state._cache_enabled, state._cache = 0, {}
    try:
        yield
    finally:
        state._cache_enabled, state._cache = before


def trained_parameters(model: nn.Module, cost: Any) -> list[nn.Parameter]:
    """The parameters that require a gradient: of a model, and of its cost where that is a module."""
    own = (*model.parameters(), *(cost.parameters() if isinstance(cost, nn.Module) else ()))
    return [p for p in dict.fromkeys(own) if p.requires_grad]


def copied_together(model: nn.Module, cost: Any, *others: Any) -> tuple[Any, ...]:
    """Copies of a model, of its cost, and of others, which may share modules and tensors.

    A function that reads the model, or parts of it, reads the copy then.
    """
    memo: dict[int, Any] = {}
    twin = copy.deepcopy(model, memo)

    def copied(value: Any) -> Any:
        if isinstance(value, (nn.Module, Tensor)):
            return memo[id(value)] if id(value) in memo else copy.deepcopy(value, memo)
        return value

    if isinstance(cost, nn.Module):
        cost = copied(cost)
    elif isinstance(cost, FunctionType):
        cells = tuple(CellType(copied(cell.cell_contents)) for cell in cost.__closure__ or ())
        own = {name: copied(cost.__globals__[name]) for name in cost.__code__.co_names if name in cost.__globals__}
        defaults = tuple(map(copied, cost.__defaults__ or ()))
        cost = FunctionType(cost.__code__, {**cost.__globals__, **own}, cost.__name__, defaults or None, cells or None)
    return twin, cost, *(copy.deepcopy(other, memo) for other in others)
