"""Equilibrium propagation: the estimator that stands where `loss.backward()` stood."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mep.cost import BatchCost, PerExample, make_cost
from mep.energy import Energy, make_coupling
from mep.errors import ArgumentError, DivergedError, InputError
from mep.estimators.contrast import Phase, contrast, pieces
from mep.estimators.estimate import Estimate, Gradients, accumulate, finished
from mep.estimators.graphs import Graphs
from mep.estimators.inputs import (
    batch_size,
    check_finite,
    check_mode,
    check_model,
    check_target,
    count_examples,
    undone_on_error,
)
from mep.estimators.kronecker import SettledLayer, settled_layers
from mep.estimators.phases import SettledPhase, estimate_of, next_beta, settle_phases
from mep.estimators.program import Setting
from mep.estimators.programs import Programs
from mep.estimators.recall import Recall, check_indices
from mep.estimators.settings import check_settings, check_solver
from mep.layout import per_example
from mep.nodes import Held
from mep.settle import Known, Result, Settled, Solver, settle
from mep.snapshot import Buffers
from mep.solvers import Descent, Sweep
from mep.solvers.checkpointed import Forgotten
from mep.tracing import Leaves

Found = TypeVar("Found")


class EquilibriumPropagation:
    """Fills `p.grad` from two equilibria of an energy, as `loss.backward()` would from a graph.

    One is free, one is nudged toward the target with strength `beta`; the contrast of their energies is the gradient,
    to first order in beta (`phases="one-sided"`) or to second (`"centered"`).

    Args:
        model: any module that `mep.trace` can read. It is not changed.
        cost: "cross_entropy", "mse", or a function of `(output, target)` that returns one number per example.
        beta: the largest nudging strength; None is 0.01 for sweeps and `mep.Local`, 0.1 for descent. Where the
            equilibrium of an example is out of reach, or its answer strong, it is nudged less; where examples see each
            other (batch normalisation in training) all are, kept over the steps and raised again slowly. The estimate
            says which.
        solver: `mep.Sweep(...)` (the default for "prediction") or `mep.Descent(...)` (for "hopfield").
        energy: "prediction" or "hopfield".
        phases: "one-sided" or "centered".
        branches: "held" keeps ReLU-like gates and max-pool winners as in the free equilibrium while the nudged one is
            sought; "exact" seeks the equilibrium of the nonsmooth energy itself.
        leaves: modules to keep whole, see `mep.trace`.
        diagnostics: also report the fraction of units that left their branch; one more forward walk a phase.
        observe: called with the layers of every batch whose estimate is good, for `NaturalGradient.observe`; only for
            "prediction".
        compile: after a few steps of one shape, make the next ones by a program that inductor has compiled as a whole.
            It needs a C++ compiler and takes seconds, for deep models minutes, for every shape and number of sweeps; a
            step that it does not settle is made without it, and so are all where steps of late have needed more than
            six sweeps, or the sweeps times the nodes are more than four hundred.
            What the model reads besides tensors and attributes of its modules is then fixed. Only for `mep.Sweep`, held
            branches, the costs that have names, and models without noise.
        checkpoint: keep neither states nor errors of all nodes, and compute them again where they are needed: memory
            of the order of the cube root of the depth, for two to three times the time. The gradient is the same to
            rounding. Only for `mep.Sweep`, held branches, and affine graphs (linear layers, convolutions, pooling,
            piecewise-linear activations).

    Raises:
        TraceError, ParameterError, ArgumentError: at once, from the constructor.
        InputError, DivergedError: from a call; then no gradient was touched.

    Example:
        >>> import torch, mep
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> ep = mep.EquilibriumPropagation(net, beta=0.01)
        >>> estimate = ep(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> estimate.converged, net[0].weight.grad.shape
        (True, torch.Size([8, 4]))

    Source: Scellier and Bengio 2017, arXiv:1602.05179, theorem 1.
    """

    def __init__(
        self,
        model: nn.Module,
        cost: str | PerExample | type[BatchCost] = "cross_entropy",
        beta: float | None = None,
        solver: Solver | None = None,
        energy: str = "prediction",
        phases: str = "one-sided",
        branches: str = "held",
        leaves: Leaves = (),
        diagnostics: bool = False,
        observe: Callable[[list[SettledLayer]], None] | None = None,
        compile: bool = False,
        checkpoint: bool = False,
    ):
        check_model(model, "EquilibriumPropagation")
        self.model = model
        self.cost = cost
        self._cost = make_cost(cost)
        self.coupling = make_coupling(energy)
        self.phases = phases
        self.branches = branches
        self.leaves = tuple(leaves)
        self.diagnostics = diagnostics
        self.observe = observe
        self.solver = solver or (Sweep() if energy == "prediction" else _HOPFIELD_SOLVER)
        check_solver(self.solver)
        self.beta = self.solver.usual_beta if beta is None else beta
        self.compile, self.checkpoint = compile, checkpoint
        check_settings(self)
        self.solver = self.solver.for_beta(self.beta)
        self._reach = float(self.beta)
        self._known = Known()
        self._recall = Recall()
        self._trace()

    def __call__(self, x: Any, target: Tensor, indices: Tensor | None = None) -> Estimate:
        """Accumulate the estimate into `p.grad`.

        Args:
            x: the input, [batch, ...]; a tuple or dict for several.
            target: what the cost expects.
            indices: for descent: the places of the examples in the data set, [batch]. Settling then begins where it
                last ended for the same examples, and their equilibria are kept. It saves steps where these change
                little in between (small learning rates, few batches), and costs some where they change much.
        """
        gradients, estimate = self.gradients(x, target, indices)
        accumulate(gradients)
        return estimate

    @torch.no_grad()
    def gradients(self, x: Any, target: Tensor, indices: Tensor | None = None) -> tuple[Gradients, Estimate]:
        """The estimated gradient of the mean cost for every trained parameter, without touching `p.grad`."""
        check_mode()
        if self.programs is not None and indices is None:
            count_examples(x)
            check_target(target)
            if (compiled := self._compiled(x, target)) is not None:
                return compiled
        return self._contracted(x, target, indices, self._contrast)

    @torch.no_grad()
    def pieces(self, x: Any, target: Tensor, indices: Tensor | None = None) -> tuple[Iterator[Gradients], Estimate]:
        """As `gradients`, one after the other: each is made when it is asked for, and may be used up at once.

        Every trained parameter occurs once, after the last node that uses it; from then on it may be changed. All have
        been made and found finite before, and dropped again. Never by a compiled program.
        """
        check_mode()
        return self._contracted(x, target, indices, _checked_pieces)

    @torch.no_grad()
    def predict(self, x: Any) -> Tensor:
        """The output of the free equilibrium; for the prediction energy that is `model(x)`."""
        with undone_on_error(self.model) as buffers:
            energy, free = self._free(x, batch_size(x), buffers)
        return energy.output(free.point)

    def state_dict(self) -> dict[str, Any]:
        """What the estimator remembers: the beta within reach, the gain of the network, equilibria by index."""
        known = {"gain": self._known.gain, "look_from": self._known.look_from, "most": self._known.most}
        return {"reach": self._reach, **known, "recall": self._recall.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._reach = float(state["reach"])
        self._known = Known(state["gain"], None, state["look_from"], state.get("most"))
        self._recall.load_state_dict(state["recall"])

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to this very model: a copy is bound to the copied one, and traces it anew."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_graphs", "programs")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._trace()

    def _trace(self) -> None:
        """What belongs to this very model."""
        self._graphs = Graphs(self.model, self.leaves, self.coupling.name, self.branches)
        self.programs: Programs | None = None
        if self.compile:
            assert isinstance(self.solver, Sweep)
            self.programs = Programs(Setting(self.solver, self.phases, self.observe is not None), self._cost)

    def _contracted(
        self, x: Any, target: Tensor, indices: Tensor | None, contract: Callable[[Sequence[Phase], int], Found]
    ) -> tuple[Found, Estimate]:
        """What `contract` makes of the phases, once they have settled; and how they did."""
        batch = count_examples(x)
        check_target(target)
        indices = None if indices is None else self._checked_indices(indices, batch)
        check_finite(x)
        check_model(self.model, "EquilibriumPropagation")
        with undone_on_error(self.model) as buffers:
            energy, free = self._free(x, batch, buffers, indices)
            output = energy.output(free.point)
            if len(output) != batch:
                raise InputError(f"The output has {len(output)} rows for {batch} examples; dimension 0 is the batch.")
            cost = self._cost(output, target)
            loss = cost.value(output).mean()
            if not math.isfinite(float(loss)):
                raise DivergedError(
                    f"The loss is {float(loss)} before settling: the target or the weights are not finite, or the "
                    "output overflows. Nothing was changed."
                )
            beta, phases = self._nudged(energy, free, cost, self._where_to_begin(energy, free, indices))
            found = contract(phases, batch)
            estimate = estimate_of(loss, beta, phases, self.diagnostics)
            if self.observe is not None:
                self.observe(settled_layers((e, settled) for _, e, settled in phases if e.nudge is not None))
        if self.programs is not None:
            self.programs.keep(self._graphs.known)  # a graph that is new takes its first steps here
            self.programs.learn(x, target, *phases[-1][1:])
        self._reach, self._known = beta, phases[-1][2].known  # last, so that an interruption leaves all as it was
        if indices is not None:
            self._recall.keep(indices, self._worth_keeping(*phases[-1][1:], free))
        return found, estimate

    def _free(self, x: Any, batch: int, buffers: Buffers, indices: Tensor | None = None) -> tuple[Energy, Settled]:
        """The free equilibrium, and the energy as the nudged phases are to see it."""
        graph = self._graphs.of(x)
        hold = self.branches == "held"
        is_forward = self.coupling.vanishes_when_free
        held = Held(hold_branches=hold and is_forward, buffers=buffers)
        energy = Energy(graph, self.coupling, graph.bind(x), held, batch)
        sweeps_affine = isinstance(self.solver, Sweep) and energy.is_affine
        point = Forgotten(energy) if self.checkpoint else energy.rest(lean=sweeps_affine and not self.diagnostics)
        held.recording = False
        buffers.keep_writes()
        if held.noise and self.compile:
            raise ArgumentError(
                f"compile=True: {', '.join(held.noise)} draws random numbers in every step, which a compiled step "
                "cannot. Leave compile out, or put the module in eval mode."
            )
        if is_forward:
            rests = torch.zeros(batch, device=energy.output(point).device)
            return energy, Settled(energy, point, rests, 0, Result.CONVERGED)
        if indices is not None:
            states, seen = self._recall.of(indices, energy.state(point))
            point = energy.at({n: torch.where(per_example(seen, s), s, point.values[n]) for n, s in states.items()})
        free = settle(energy, point, self.solver)
        if hold:
            energy = replace(energy, held=replace(held, hold_branches=True))
            free = replace(free, point=energy.at(energy.state(free.point)))
        return energy, free

    def _where_to_begin(self, energy: Energy, free: Settled, indices: Tensor | None) -> Known:
        """What the solver may know of these examples."""
        if indices is None or not self.coupling.vanishes_when_free:
            return self._known
        errors, _ = self._recall.of(indices, energy.state(free.point))
        return replace(self._known, errors=errors)

    def _worth_keeping(self, energy: Energy, settled: Settled, free: Settled) -> Mapping[str, Tensor]:
        """Scaled errors of the nudged equilibrium; where the free one is not the forward pass, its states."""
        if not self.coupling.vanishes_when_free:
            return energy.state(free.point)
        return energy.errors(settled.point) if settled.errors is None else settled.errors

    def _checked_indices(self, indices: Any, batch: int) -> Tensor:
        if not self.solver.recalls:
            raise ArgumentError(
                f"{type(self.solver).__name__} does not begin at earlier equilibria: what it infers from the last step "
                "is nearer. Leave indices out, or use solver=mep.Descent(...)."
            )
        return check_indices(indices, batch)

    def _nudged(self, energy: Energy, free: Settled, cost: BatchCost, known: Known) -> tuple[float, list[SettledPhase]]:
        beta = next_beta(self.beta, self._reach)
        return settle_phases(energy, free, cost, self.solver, self.phases, beta, known)

    def _contrast(self, phases: Sequence[Phase], batch: int) -> Gradients:
        return finished(contrast(phases, batch))

    def _compiled(self, x: Any, target: Tensor) -> tuple[Gradients, Estimate] | None:
        """The step by a compiled program, or None if it has to be made without one."""
        assert self.programs is not None
        beta, graph = next_beta(self.beta, self._reach), self._graphs.of(x)
        found = self.programs.step(graph, x, target, beta, self._known)
        if found is None:
            return None
        settled = found.worst <= self.solver.tol
        result = Result.CONVERGED if settled else Result.FIXED_STEPS
        if self.observe is not None:
            self.observe(found.layers)
        self._reach, self._known = beta, found.known
        least = beta if found.betas is None else float(found.betas.min())
        estimate = Estimate(found.loss, found.residual, found.sweeps, least, result, betas=found.betas)
        return found.gradients, estimate


def _checked_pieces(phases: Sequence[Phase], batch: int) -> Iterator[Gradients]:
    """All pieces are made twice: first to see that they are finite, since the first that is used changes a weight."""
    deque(pieces(phases, batch), maxlen=0)  # drops each before the next is made
    return pieces(phases, batch)


_HOPFIELD_SOLVER = Descent(settle_steps=500, settle_lr=0.3, adaptive=True, tol=1e-4)
