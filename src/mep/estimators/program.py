"""A step of equilibrium propagation as one compiled program: forward walk, a number of sweeps, and the contrast.

A program looks at no number before it is done. It sweeps as often as steps of late have needed, and reports at the end
how far it came; if that is not far enough, or anything is out of the ordinary, its result is discarded and the step is
repeated without it. So a program does not change what a step means, only what it costs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mep.compiled import compiled
from mep.cost import BatchCost
from mep.energy import Energy, Prediction, nudge
from mep.estimators.beta import chosen_beta
from mep.estimators.contrast import CONTRASTS, Phase, contrast
from mep.estimators.estimate import Gradients
from mep.estimators.layer_factors import LayerStatistics, layer_statistics
from mep.estimators.phases import betas_of
from mep.graph import Graph
from mep.graph.node import Beta
from mep.graph.ops import Slot
from mep.graph.step_context import StepContext
from mep.settle import Start, rounded
from mep.solvers import Sweep
from mep.solvers.networks import linear_response


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

    solver: Sweep
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
        self.buffers: list[Slot] = []
        self.run = compiled(self._step, self._tensors(x, cost, beta))

    def __call__(self, x: Any, cost: BatchCost, beta: float | None) -> CompiledResult | None:
        """The step, or None if something in it is not finite."""
        numbers, loss, residual, betas, counts, *found = self.run(*self._tensors(x, cost, beta))
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

    def _tensors(self, x: Any, cost: BatchCost, beta: float | None) -> list[Tensor]:
        """The inputs, the target, and beta."""
        inputs = self.graph.bind(x)
        named = [] if beta is None else [torch.tensor(beta, dtype=torch.float64, device=self.output.device)]
        return [*(inputs[name] for name in self.names), *cost.parts().values(), *named]

    def _step(self, *tensors: Tensor) -> list[Tensor]:
        """What is compiled."""
        inputs, parts = tensors[: len(self.names)], tensors[len(self.names) : len(tensors) - self.is_named]
        cost = self.cost.with_parts(dict(zip(self.cost.parts(), parts, strict=True)))
        context = StepContext()
        bound = {**self.fixed, **dict(zip(self.names, inputs, strict=True))}
        energy = nudge(Energy(self.graph, Prediction(), bound, context, self.batch), cost, 1.0)
        free = energy.rest()
        context.recording = False
        self.buffers = list(context.new_buffers)
        solver = self.setting.solver
        response = linear_response(energy, free)
        beta: Beta = tensors[-1] if self.is_named else chosen_beta(energy, free, response, solver)
        idle = energy.has_nothing_to_settle(free, response.size)
        phases: list[Phase] = []
        courses = []
        for multiple, weight in CONTRASTS[self.setting.phases]:
            if multiple:
                nudged = nudge(energy, cost, multiple * beta)
                settled, course = solver.unrolled(nudged, free, Start(response.copy()), self.sweeps)
                phases.append((weight * multiple, nudged, settled))
                courses.append(course.masked_fill(idle, 0))
        gradients = contrast(phases, self.batch)
        self.parameters = list(gradients)
        self.layers = layer_statistics((e, s) for _, e, s in phases) if self.setting.observes else []
        course = torch.stack(courses).amax(0)
        unsettled = course > rounded(solver.tol, course.dtype)
        counts = (
            (unsettled.sum(0) + 1).clamp(max=self.sweeps) if solver.adaptive else unsettled.sum(0) * 0 + self.sweeps
        )
        loss = cost.value(energy.output(free)).mean()
        checked = [loss, *gradients.values(), *(t for t in inputs if t.is_floating_point())]
        finite = torch.stack([t.sum().float() for t in checked]).sum()
        numbers = torch.stack([finite, course[-1].max().float(), counts.max().float()])
        used = [t for layer in self.layers for _, inputs, errors in layer.uses for t in (inputs, errors)]
        betas = betas_of(beta, self.batch, loss.device)
        return [numbers, loss, course[-1], betas, counts, *gradients.values(), *context.new_buffers.values(), *used]
