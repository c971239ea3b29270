"""Which program a step may take: by graph, shapes and number of sweeps, compiled when a shape has come often enough."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from mep.cost import BatchCost, Cost
from mep.energy import Energy
from mep.errors import ArgumentError
from mep.estimators.program import CompiledResult, CompiledStep, CompileOptions
from mep.graph import Graph
from mep.graph.inputs import flattened
from mep.settle import Settled, rounded

_EAGER = 4
"""So many steps of one shape are made without a program: they check the model, and tell how often it sweeps."""
_KINDS = 64
"""So many kinds of step, by shapes and plain inputs, are remembered."""
_RECENT = 64
"""So many steps tell how often the next may have to sweep."""
_RARE = 10
"""Compile for the 90th percentile of recent sweep counts; a step that needs more is repeated without a program."""
_SWEEPS = (1, 2, 3, 4, 6)
"""The numbers of sweeps that programs are made for: few, since each takes seconds to compile, or minutes."""
MOST_SWEEPS = _SWEEPS[-1]
_MOST_VISITS = 400
"""Nodes times sweeps of the largest program: it takes two or three minutes to compile."""
_INPUTS = (Tensor, bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
"""What a program takes: the values of tensors may change, and a change of the others is seen."""

Key = tuple[Any, ...]


class CompiledSteps:
    """The programs of one estimator, and how often its steps have swept of late."""

    def __init__(self, setting: CompileOptions, make_cost: Cost):
        self.setting, self.make_cost = setting, make_cost
        self.needed: deque[int] = deque(maxlen=_RECENT)
        """How many sweeps steps have needed."""
        self._at_least = 0
        """Lower bound on the sweeps, set when a compiled step did not converge."""
        self._seen: dict[Key, tuple[int, Tensor]] = {}
        """How many steps were made without a program, and an output of theirs; the latest last."""
        self._programs: dict[tuple[Key, bool, int], CompiledStep] = {}

    def __len__(self) -> int:
        return len(self._programs)

    def keep(self, graphs: Collection[Graph]) -> None:
        """Forget all graphs but these."""
        for key in [key for key in self._seen if key[0] not in graphs]:
            del self._seen[key]
        for which in [which for which in self._programs if which[0][0] not in graphs]:
            del self._programs[which]

    def step(self, graph: Graph, x: Any, target: Tensor, beta: float | None) -> CompiledResult | None:
        """What a program finds, or None if the step has to be made without one."""
        key = _key(graph, x, target)
        if key is None or key not in self._seen:
            return None
        steps, output = self._seen[key]
        if steps < _EAGER or (sweeps := self._sweeps(graph)) is None:
            return None
        cost = self.make_cost(output, target)
        which = key, beta is not None, sweeps
        program = self._programs.get(which) or self._made(which, x, cost, output, beta)
        found = program(x, cost, beta)
        if found is None:
            return None
        if self.setting.solver.adaptive and found.worst > rounded(self.setting.solver.tol, found.residual.dtype):
            self._at_least = sweeps + 1
            return None
        self.needed.append(found.sweeps)
        for buffer, value in found.buffers:
            buffer.copy_(value)
        return found

    def record_eager_step(self, x: Any, target: Tensor, energy: Energy, settled: Settled) -> None:
        """Note a step that was made without a program."""
        if (key := _key(energy.graph, x, target)) is not None:
            steps, _ = self._seen.pop(key, (0, None))
            self._seen[key] = steps + 1, torch.zeros_like(energy.output(settled.point))
            if len(self._seen) > _KINDS:
                del self._seen[next(iter(self._seen))]
        self.needed.append(max(settled.iterations, self._at_least))
        self._at_least = 0

    def _sweeps(self, graph: Graph) -> int | None:
        """How many to make: what steps of late have needed, but for a few. None if programs of so many are not made."""
        solver, most = self.setting.solver, min(MOST_SWEEPS, _MOST_VISITS // len(graph.nodes))
        needed = _usual(self.needed) if solver.adaptive else solver.settle_steps
        if needed > most:
            return None
        return min(_rounded(needed), most) if solver.adaptive else needed

    def _made(
        self, which: tuple[Key, bool, int], x: Any, cost: BatchCost, output: Tensor, beta: float | None
    ) -> CompiledStep:
        graph: Graph = which[0][0]
        try:
            program = CompiledStep(self.setting, graph, x, cost, output, beta, which[2])
        except Exception as error:
            raise ArgumentError(
                f"compile=True: a step of {type(graph.model).__name__} cannot be compiled. "
                f"{type(error).__name__}: {error}. Leave compile out."
            ) from error
        self._programs[which] = program
        return program


def _usual(counts: Collection[int]) -> int:
    """What is enough for all but one in `_RARE`."""
    return sorted(counts)[-1 - len(counts) // _RARE]


def _rounded(sweeps: int) -> int:
    return next((n for n in _SWEEPS if n >= sweeps), sweeps)


def _key(graph: Graph, x: Any, target: Tensor) -> Key | None:
    """All that a program depends on besides the values of tensors; None if some input may change unseen."""
    values = flattened(x)[0]
    if not all(isinstance(value, _INPUTS) for value in values):
        return None
    kind = target.device.type
    casts = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return (
        graph,
        casts,
        *(_kind(value) if isinstance(value, Tensor) else (type(value), value) for value in (*values, target)),
        *((p.requires_grad, _kind(p)) for p in graph.parameters),
        *(id(slot.value) for slot in graph.slots),  # a program holds the tensors that it was made with
    )


def _kind(t: Tensor) -> Key:
    return t.shape, t.stride(), t.dtype, t.device
