"""Compiled steps: forward walk, a number of sweeps, and the contrast as one program that inductor fuses.

A compiled step branches on no number. It sweeps as often as recent steps have needed, and returns the
residuals; if these are too large, or anything is out of the ordinary, its result is discarded and the step is repeated
eagerly. So compiling does not change what a step means, only what it costs.

`CompiledSteps` decides: by graph, shapes and number of sweeps, compiled when a shape has come often enough.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from mep.cost import BatchCost, Cost
from mep.energy import Energy, NodeEnergy, nudge
from mep.errors import ArgumentError
from mep.estimators.contrast import Contrast, Phase, beta_and_response, betas_of, contrast, noted_free
from mep.estimators.estimate import Gradients
from mep.estimators.layer_factors import LayerStatistics, layer_statistics
from mep.graph import Graph
from mep.graph.inputs import flattened
from mep.graph.node import Beta
from mep.graph.ops import Slot, StepContext
from mep.settle import Solver, Start, rounded

aten = torch.ops.aten
_EAGER = 4
"""The first steps of a shape are eager: they prove the graph, and give the number of sweeps to compile for."""
_KINDS = 64
"""Kinds of step, by shapes and plain inputs, that are remembered."""
_RECENT = 64
"""Recent steps from whose sweep counts that of the next is predicted."""
_RARE = 10
"""Compile for the 90th percentile of recent sweep counts; a step that needs more is repeated without a program."""
_SWEEPS = (1, 2, 3, 4, 6, 8, 10, 12)
"""The numbers of sweeps that programs are made for: few, since each takes seconds to compile, or minutes."""
MOST_SWEEPS = _SWEEPS[-1]
_MOST_VISITS = 400
"""Nodes times sweeps of the largest program: it takes two or three minutes to compile."""
_INPUTS = (Tensor, bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
"""What a program takes: the values of tensors may change, and a change of the others is seen."""
Key = tuple[Any, ...]


@dataclass(frozen=True)
class CompiledResult:
    """What a program found: the gradients, the mean cost, and how the settling of all phases went.

    `sweeps` were needed until all examples had settled, if they have, and `counts` by each. `buffers` are the values
    that the model's buffers are to have.
    """

    gradients: Gradients
    loss: Tensor
    residual: Tensor
    sweeps: int
    worst: float
    betas: Tensor
    counts: Tensor
    layers: list[LayerStatistics]
    buffers: list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class CompileOptions:
    """What all programs of an estimator have in common."""

    solver: Solver
    node_energy: NodeEnergy
    phases: str
    observes: bool


class CompiledStep:
    """A step with a fixed number of sweeps, for inputs like `x` and a target like that of `cost`."""

    def __init__(
        self,
        setting: CompileOptions,
        graph: Graph,
        x: Any,
        cost: BatchCost,
        output: Tensor,
        beta: float | None,
        table: Contrast,
        sweeps: int,
    ):
        self.setting, self.graph, self.sweeps = setting, graph, sweeps
        self.cost, self.output = cost, output
        self.parameters: list[nn.Parameter] = []
        self.layers: list[LayerStatistics] = []
        self.batch = len(output)
        inputs = graph.bind(x)
        self.names = [name for name, value in inputs.items() if isinstance(value, Tensor)]
        self.fixed = {name: value for name, value in inputs.items() if not isinstance(value, Tensor)}
        self.is_named = beta is not None
        """Whether beta is an argument; else the program chooses it."""
        self.multiples = [multiple.real for multiple, _ in table if multiple]
        self.weights = [weight for multiple, weight in table if multiple]
        self.is_signed = setting.phases == "random-sign"
        """Whether the one multiple of beta is an argument; else they are fixed."""
        self.buffers: list[Slot] = []
        self.run = compiled(self._step, self._tensors(x, cost, beta, table))

    def __call__(self, x: Any, cost: BatchCost, beta: float | None, table: Contrast) -> CompiledResult | None:
        """The step, or None if something in it is not finite."""
        numbers, loss, residual, betas, counts, *found = self.run(*self._tensors(x, cost, beta, table))
        finite, worst, sweeps = numbers.tolist()
        if not (math.isfinite(finite) and math.isfinite(worst)):
            return None
        rest = iter(found)
        gradients = {p: next(rest) for p in self.parameters}
        buffers = [(slot.value, next(rest)) for slot in self.buffers]
        layers = [
            LayerStatistics(y.weight, y.bias, y.examples, [(step, next(rest), next(rest)) for step, _, _ in y.uses])
            for y in self.layers
        ]
        return CompiledResult(gradients, loss, residual, int(sweeps), worst, betas, counts, layers, buffers)

    def _tensors(self, x: Any, cost: BatchCost, beta: float | None, table: Contrast) -> list[Tensor]:
        """The inputs, the target, beta if it is named, and its sign if that is random."""
        inputs = self.graph.bind(x)
        numbers = [] if beta is None else [beta]
        numbers += [table[-1][0].real] if self.is_signed else []
        made = [torch.tensor(number, dtype=torch.float64, device=self.output.device) for number in numbers]
        return [*(inputs[name] for name in self.names), *cost.parts().values(), *made]

    def _step(self, *tensors: Tensor) -> list[Tensor]:
        """What is compiled."""
        end = len(tensors) - self.is_named - self.is_signed
        inputs, parts, own = tensors[: len(self.names)], tensors[len(self.names) : end], tensors[end:]
        cost = self.cost.with_parts(dict(zip(self.cost.parts(), parts, strict=True)))
        context = StepContext()
        bound = {**self.fixed, **dict(zip(self.names, inputs, strict=True))}
        energy = Energy(self.graph, self.setting.node_energy, bound, context, self.batch)
        solver, free, noted = self.setting.solver, energy.free_point(), None
        context.recording = False
        self.buffers = list(context.new_buffers)
        if not energy.is_forward:
            free = solver.unrolled(energy, free, Start(cost=cost), self.sweeps)[0].point
            noted = noted_free(energy, free)
        unit = nudge(energy, cost, 1.0, noted)
        beta, response = beta_and_response(unit, free, solver, own[0] if self.is_named else None)
        idle = unit.has_nothing_to_settle(free, response.size if response else None)
        phases: list[Phase] = []
        courses = []
        multiples: Sequence[Beta] = own[-1:] if self.is_signed else self.multiples
        for multiple, weight in zip(multiples, self.weights, strict=True):
            nudged = nudge(energy, cost, multiple * beta, noted)
            start = Start(response.copy() if response else None)
            settled, course = solver.unrolled(nudged, free, start, self.sweeps)
            phases.append((weight, nudged, settled))
            courses.append(course.masked_fill(idle, 0))
        gradients = contrast(phases, self.batch)
        self.parameters = list(gradients)
        self.layers = layer_statistics((e, s) for _, e, s in phases) if self.setting.observes else []
        course = torch.stack(courses).amax(0)
        unsettled = course > rounded(solver.tolerance, course.dtype)
        counts = (
            (unsettled.sum(0) + 1).clamp(max=self.sweeps) if solver.adaptive else unsettled.sum(0) * 0 + self.sweeps
        )
        loss = cost.value(energy.output(free)).mean()
        finite = torch.stack([t.sum().float() for t in (loss, *gradients.values())]).sum()
        numbers = torch.stack([finite, course[-1].max().float(), counts.max().float()])
        used = [t for layer in self.layers for _, inputs, errors in layer.uses for t in (inputs, errors)]
        betas = betas_of(phases[-1][1].beta, self.batch, loss.device)
        return [numbers, loss, course[-1], betas, counts, *gradients.values(), *context.new_buffers.values(), *used]


class CompiledSteps:
    """The programs of one estimator, and how often its steps have swept of late."""

    def __init__(self, setting: CompileOptions, make_cost: Cost):
        self.setting, self.make_cost = setting, make_cost
        self.recent_sweeps: deque[int] = deque(maxlen=_RECENT)
        """The number of sweeps of the latest steps."""
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

    def step(self, graph: Graph, x: Any, target: Tensor, beta: float | None, table: Contrast) -> CompiledResult | None:
        """What a program finds, or None if the step has to be made without one."""
        key = _key(graph, x, target)
        if key is None or key not in self._seen:
            return None
        steps, output = self._seen[key]
        if steps < _EAGER or (sweeps := self._sweeps(graph)) is None or self.setting.solver.needs_eager_step():
            return None
        cost = self.make_cost(output, target)
        which = key, beta is not None, sweeps
        program = self._programs.get(which) or self._made(which, x, cost, output, beta, table)
        found = program(x, cost, beta, table)
        if found is None:
            return None
        if self.setting.solver.adaptive and found.worst > rounded(self.setting.solver.tolerance, found.residual.dtype):
            self._at_least = sweeps + 1
            return None
        self.recent_sweeps.append(found.sweeps)
        self.setting.solver.count_compiled_step()
        for buffer, value in found.buffers:
            buffer.copy_(value)
        return found

    def record_eager_step(self, graph: Graph, x: Any, target: Tensor, output: Tensor, iterations: int) -> None:
        """Note a step that was made without a program, and how many iterations its longest phase took."""
        if (key := _key(graph, x, target)) is not None:
            steps, _ = self._seen.pop(key, (0, None))
            self._seen[key] = steps + 1, torch.zeros_like(output)
            if len(self._seen) > _KINDS:
                del self._seen[next(iter(self._seen))]
        self.recent_sweeps.append(max(iterations, self._at_least))
        self._at_least = 0

    def _sweeps(self, graph: Graph) -> int | None:
        """How many to make: what steps of late have needed, but for a few. None if programs of so many are not made."""
        solver, most = self.setting.solver, min(MOST_SWEEPS, _MOST_VISITS // len(graph.nodes))
        needed = _usual(self.recent_sweeps) if solver.adaptive else solver.settle_steps
        if needed > most:
            return None
        return min(_rounded(needed), most) if solver.adaptive else needed

    def _made(
        self, which: tuple[Key, bool, int], x: Any, cost: BatchCost, output: Tensor, beta: float | None, table: Contrast
    ) -> CompiledStep:
        graph: Graph = which[0][0]
        try:
            program = CompiledStep(self.setting, graph, x, cost, output, beta, table, which[2])
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


def compiled(function: Callable[..., list[Tensor]], examples: Sequence[Tensor]) -> Callable[..., list[Tensor]]:
    """The same function for tensors of the shapes, dtypes and devices of `examples`.

    Parameters and buffers that it reads besides are read anew in every call; whatever else it depends on is fixed as it
    is now. It is called once, on the examples themselves.

    Raises:
        RuntimeError and others: the function looks at numbers, or there is no compiler.

    Example:
        >>> import torch
        >>> twice = compiled(lambda x: [x + x], [torch.ones(2)])
        >>> twice(torch.tensor([1.0, 2.0]))
        [tensor([2., 4.])]
    """
    from torch import _inductor  # it takes a second to import

    module = make_fx(function)(*examples)
    for node in module.graph.find_nodes(op="placeholder"):
        node.meta.clear()  # what stands there of shapes is of one tracing each, and inductor makes its own of all
    for node in module.graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default  # with inductor, numbers may lie in memory otherwise than when traced
    module.recompile()
    return _inductor.compile(module, list(examples), options=_options())


def _options() -> dict[str, Any]:
    """Options of inductor.

    - No loop writes over what it reads: allowed to, torch 2.13 finds wrong numbers in steps of convolutional networks.
    - What is made of more than three numbers, as the winners of 2 x 2 pooling, is kept for all its readers.
    - What calls the loops is compiled apart from them, quickly: with all in one, deep models take minutes.
    """
    from torch._inductor import config

    options: dict[str, Any] = {"cpp_wrapper": True, "realize_reads_threshold": 3, "inplace_buffers": False}
    if hasattr(config, "cpp_wrapper_build_separate"):
        options["cpp_wrapper_build_separate"] = True
    return options
