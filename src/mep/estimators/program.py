"""A step of equilibrium propagation as one compiled program: forward walk, a number of sweeps, and the contrast.

A program looks at nothing before it is done. It sweeps as often as steps of late have needed, and says at the end how
far it came; if that is not far enough, or anything is out of the ordinary, its result is dropped and the step is made
by the code that decides as it goes. So a program does not change what a step means, only what it costs; but an example
that stalls on the way, and settles all the same, keeps its nudge.
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
from mep.estimators.contrast import CONTRASTS, Phase, contrast
from mep.estimators.estimate import Gradients
from mep.estimators.kronecker import SettledLayer, settled_layers
from mep.graph import Graph
from mep.nodes import Held, Strength, magnitude
from mep.settle import Known
from mep.snapshot import Buffers
from mep.solvers import Sweep
from mep.solvers.strength import SOON, higher, is_late, lower
from mep.solvers.sweep import few


@dataclass(frozen=True)
class Found:
    """What a program found: the gradients, the mean cost, and how the settling of all phases went.

    `sweeps` were made until all examples rested, and `whole` of them until only a few did not. `betas` are [batch], or
    None where no example was nudged less than asked; `known` is for the next step. `buffers` are the values that the
    model's buffers shall have.
    """

    gradients: Gradients
    loss: Tensor
    residual: Tensor
    sweeps: int
    whole: int
    worst: float
    betas: Tensor | None
    known: Known
    layers: list[SettledLayer]
    buffers: list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Setting:
    """What all programs of an estimator have in common."""

    solver: Sweep
    phases: str
    observes: bool


class Program:
    """A step with a fixed number of sweeps, for inputs like `x` and a target like that of `cost`.

    `late` of them are of the worst examples only.
    """

    def __init__(self, setting: Setting, graph: Graph, x: Any, cost: BatchCost, output: Tensor, sweeps: int, late: int):
        self.setting, self.graph, self.sweeps, self.late = setting, graph, sweeps, late
        self.cost, self.output = cost, output
        self.parameters: list[nn.Parameter] = []
        self.layers: list[SettledLayer] = []
        self.limits = False
        """Whether strengths are limited, so that a step tells of them."""
        self.batch = len(output)
        inputs = graph.bind(x)
        self.names = [name for name, value in inputs.items() if isinstance(value, Tensor)]
        self.fixed = {name: value for name, value in inputs.items() if not isinstance(value, Tensor)}
        buffers = Buffers(graph.model)
        self.buffers = buffers.targets()
        try:
            self.run = compiled(self._step, self._tensors(x, cost, 0.1, 1.0, 1.0))
        finally:
            buffers.undo()

    def __call__(self, x: Any, cost: BatchCost, beta: float, known: Known) -> Found | None:
        """The step, or None if something in it is not finite, or an example is nudged less in only one phase."""
        largest = self.setting.solver.largest
        most = higher(known.most, largest)
        numbers, loss, residual, betas, *found = self.run(*self._tensors(x, cost, beta, float(known.gain or 0), most))
        finite, gain, worst, soon, weakest, apart, *unsettled = numbers.tolist()
        if not (math.isfinite(finite) and math.isfinite(worst)) or apart:
            return None
        rest = iter(found)
        gradients = {p: next(rest) for p in self.parameters}
        buffers = [(buffer, next(rest)) for buffer in self.buffers]
        layers = [
            SettledLayer(y.weight, y.bias, y.examples, [(module, next(rest), next(rest)) for module, _, _ in y.uses])
            for y in self.layers
        ]
        sweeps, whole = self._until(unsettled, 0), self._until(unsettled, few(self.batch))
        learnt = lower(most, largest) if is_late(soon, self.setting.solver.tol) else most
        known = Known(gain, known.errors, known.look_from, learnt if self.limits else known.most)
        weaker = betas if weakest < 1 else None
        return Found(gradients, loss, residual, sweeps, whole, worst, weaker, known, layers, buffers)

    def _until(self, unsettled: list[float], most: int) -> int:
        """The sweep after which at most so many examples were unsettled; where none rests, the last."""
        every = len(unsettled)
        if not (self.setting.solver.adaptive and self.graph.is_affine_when_held):
            return every
        return next((i for i, number in enumerate(unsettled, 1) if number <= most), every)

    def _tensors(self, x: Any, cost: BatchCost, *numbers: float) -> list[Tensor]:
        """The inputs, the target, and beta, the gain and the largest strength that a step begins with."""
        inputs = self.graph.bind(x)
        strengths = torch.tensor(numbers, dtype=self.output.dtype, device=self.output.device)
        return [*(inputs[name] for name in self.names), *cost.parts().values(), strengths]

    def _step(self, *tensors: Tensor) -> list[Tensor]:
        """What is compiled."""
        given = len(self.names)
        cost = self.cost.with_parts(dict(zip(self.cost.parts(), tensors[given:-1], strict=True)))
        beta, gain, most = tensors[-1].unbind()
        buffers = Buffers(self.graph.model)
        buffers.rewind()
        held = Held(buffers=buffers)
        inputs = {**self.fixed, **dict(zip(self.names, tensors[:given], strict=True))}
        energy = Energy(self.graph, Prediction(), inputs, held, self.batch)
        free = energy.rest()
        held.recording = False
        buffers.keep_writes()
        phases: list[Phase] = []
        courses, residuals = [], []
        strengths: list[Strength] = [beta]
        for multiple, weight in CONTRASTS[self.setting.phases]:
            if multiple:
                nudged = nudge(energy, cost, multiple * strengths[-1])
                known = Known(gain if multiple > 0 else None, most=most)
                settled, course = self.setting.solver.unrolled(nudged, free, known, self.sweeps, self.late)
                phases.append((weight * multiple, nudged, settled))
                courses.append(torch.stack(course))
                residuals.append(settled.residual)
                assert settled.energy is not None
                strengths.append(magnitude(settled.energy.beta))
        gradients = contrast(phases, self.batch)
        self.parameters = list(gradients)
        self.layers = settled_layers((e, s) for _, e, s in phases) if self.setting.observes else []
        residual = torch.stack(residuals).amax(0)
        loss = cost.value(energy.output(free)).mean()
        checked = [loss, *gradients.values(), *(t for t in tensors[:given] if t.is_floating_point())]
        finite = torch.stack([t.sum().float() for t in checked]).sum()
        unsettled = (torch.stack(courses).amax(0) > self.setting.solver.tol).sum(1)
        soon = courses[-1][min(SOON, len(unsettled)) - 1].max()
        self.limits = settled.most is not None
        betas = strengths[-1] * torch.ones_like(residual)
        apart = (betas - strengths[1]).abs().max()
        assert settled.gain is not None
        told = [finite, settled.gain, residual.max(), soon, betas.min() / beta, apart]
        numbers = torch.cat([torch.stack([number.float() for number in told]), unsettled.float()])
        used = [t for layer in self.layers for _, inputs, errors in layer.uses for t in (inputs, errors)]
        return [numbers, loss, residual, betas, *gradients.values(), *buffers.written(), *used]
