"""Equilibrium propagation: the estimator that stands where `loss.backward()` stood."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from mep.capture import Leaves, check_leaves
from mep.capture.cache import Graphs
from mep.capture.state import check_state
from mep.cost import BatchCost, PerExample, make_cost
from mep.energy import Energy, State, make_node_energy
from mep.errors import (
    ArgumentError,
    DivergedError,
    InputError,
    NotConvergedError,
    NotConvergedWarning,
    warn,
)
from mep.estimators.contrast import Phase, contrast, iter_gradients
from mep.estimators.estimate import Estimate, Gradients, accumulate, finished
from mep.estimators.inputs import (
    batch_size,
    check_finite,
    check_mode,
    check_model,
    check_target,
    count_examples,
    noise_undone_on_error,
)
from mep.estimators.layer_factors import LayerStatistics, layer_statistics
from mep.estimators.phases import estimate_of, settle_phases
from mep.estimators.program import CompileOptions
from mep.estimators.programs import CompiledSteps
from mep.estimators.regions import region
from mep.estimators.settings import check_settings, check_solver
from mep.estimators.warm_start import EquilibriumCache, check_indices
from mep.graph import Graph
from mep.graph.node import StepContext
from mep.graph.ops import Slot
from mep.interrupts import uninterrupted
from mep.layout import per_example
from mep.settle import Result, Settled, Solver, rounded, settle
from mep.solvers import Descent, Sweep
from mep.solvers.networks import CheckpointedPoint

Found = TypeVar("Found")


class EquilibriumPropagation:
    """Fills `p.grad` from two equilibria of an energy, as `loss.backward()` would from a graph.

    One is free, one is nudged toward the target with strength `beta`; the contrast of their energies is the gradient,
    to first order in beta (`phases="one-sided"`) or to second (`"centered"`).

    Args:
        model: any module that `torch.export` can record. It is captured with the first batch, and not changed.
        cost: "cross_entropy", "mse", or a function of what the model returns and the target, with one number per
            example. It may read parameters, have some of its own (a module), and read what `forward` leaves on modules;
            where it does, one number for the whole batch will do, too.
        beta: the nudging strength of every example in every phase. None: each example has one of its own, chosen before
            anything moves: 0.01 over its gain where that exceeds one (0.1 for descent), so that the output's error is
            biased by 1% at most; see `mep.estimators.beta`. The estimate has them as `betas`.
        solver: `mep.Sweep(...)` (the default for "prediction") or `mep.Descent(...)` (for "hopfield").
        energy: "prediction" or "hopfield".
        phases: "one-sided" or "centered".
        branches: "held" keeps ReLU-like gates and max-pool winners as in the free equilibrium while the nudged one is
            sought; "exact" seeks the equilibrium of the nonsmooth energy itself.
        leaves: modules to keep whole, see `mep.trace`.
        diagnostics: also report the fraction of units that left their branch; one more forward walk a phase.
        observe: called with the layers of every batch whose estimate is good, for `NaturalGradient.observe`; only for
            "prediction".
        on_unsettled: what to do where some example has not settled in the steps given: "warn" (once, with the way out),
            "raise" a NotConvergedError before anything is written, or "ignore". The estimate is the same, and says
            which examples. A solver that runs a fixed number of steps, `adaptive=False`, is not warned of.
        compile: after a few steps of one shape, make the next ones by a program that inductor has compiled as a whole.
            It needs a C++ compiler and takes seconds, for deep models minutes, for every shape and number of sweeps; a
            step that it does not settle is made without it, and so are all where steps of late have needed more than
            six sweeps, or the sweeps times the nodes are more than four hundred.
            What the model reads besides tensors and attributes of its modules is then fixed. Only for `mep.Sweep`, held
            branches, the costs that have names, and models without noise.
        proof: when the graph is compared with the model, on the batch of a step: "amortised" before steps 1, 4, 16, 64,
            ... of every graph, "always", or "never". The same loss, new buffers and gradient, or a TraceError.
        checkpoint: keep neither states nor errors of all nodes, and compute them again where they are needed: memory
            of the order of the cube root of the depth, for two to three times the time. The gradient is the same to
            rounding. Only for `mep.Sweep`, held branches, and affine graphs (linear layers, convolutions, pooling,
            piecewise-linear activations).

    Raises:
        TraceError, ParameterError, ArgumentError: at once, from the constructor.
        InputError, DivergedError, NotConvergedError: from a call; then no gradient was touched.

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
        observe: Callable[[list[LayerStatistics]], None] | None = None,
        compile: bool = False,
        checkpoint: bool = False,
        on_unsettled: str = "warn",
        proof: str = "amortised",
    ):
        check_model(model, "EquilibriumPropagation")
        check_state(model)
        self.model = model
        self.cost = cost
        self._cost = make_cost(cost)
        self.coupling = make_node_energy(energy)
        self.phases = phases
        self.branches = branches
        check_leaves(model, leaves, "EquilibriumPropagation")
        self.leaves = tuple(leaves)
        self.diagnostics = diagnostics
        self.observe = observe
        self.solver = solver or (Sweep() if energy == "prediction" else _HOPFIELD_SOLVER)
        check_solver(self.solver)
        self.beta = beta
        self.compile, self.checkpoint = compile, checkpoint
        self.on_unsettled, self._has_warned, self._has_warned_of_softmax = on_unsettled, False, False
        self.proof = proof
        check_settings(self)
        self._cache = EquilibriumCache()
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
            check_target(target, self.cost)
            graph = self._graphs.of(x, target)
            if (compiled := self._compiled(graph, x, target)) is not None:
                return compiled
            return self._contracted(x, target, indices, self._contrast, graph)
        return self._contracted(x, target, indices, self._contrast)

    @torch.no_grad()
    def iter_gradients(
        self, x: Any, target: Tensor, indices: Tensor | None = None
    ) -> tuple[Iterator[Gradients], Estimate]:
        """As `gradients`, one after the other: each is made when it is asked for, and may be used up at once.

        Every trained parameter occurs once, after the last node that uses it; from then on it may be changed. All have
        been made and found finite before, and dropped again. Never by a compiled program.
        """
        check_mode()
        return self._contracted(x, target, indices, _checked_gradients)

    @torch.no_grad()
    def predict(self, x: Any) -> Tensor:
        """The output of the free equilibrium; for the prediction energy that is `model(x)`."""
        with noise_undone_on_error():
            energy, free = self._free(self._graphs.of(x), x, batch_size(x))
        _write(energy.context.new_buffers)
        return energy.output(free.point)

    def share_graphs(self, graphs: Graphs) -> None:
        """Use the graphs of another estimator of the same model, cost, energy, branches and leaves, as they are."""
        self._graphs = graphs

    def state_dict(self) -> dict[str, Any]:
        """What the estimator keeps from step to step: equilibria by index."""
        return {"recall": self._cache.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._cache.load_state_dict(state["recall"])

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to this very model: a copy is bound to the copied one, and traces it anew."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_graphs", "programs")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._trace()

    def _trace(self) -> None:
        """What belongs to this very model."""
        self._graphs = Graphs(self.model, self.leaves, self.coupling.name, self.branches, self.cost, self.proof)
        self.programs: CompiledSteps | None = None
        if self.compile:
            assert isinstance(self.solver, Sweep)
            self.programs = CompiledSteps(
                CompileOptions(self.solver, self.phases, self.observe is not None), self._cost
            )

    def _contracted(
        self,
        x: Any,
        target: Tensor,
        indices: Tensor | None,
        contract: Callable[[Sequence[Phase], int], Found],
        graph: Graph | None = None,
    ) -> tuple[Found, Estimate]:
        """What `param_vjp` makes of the phases, once they have settled; and how they did."""
        batch = count_examples(x)
        check_target(target, self.cost)
        indices = None if indices is None else self._checked_indices(indices, batch)
        check_finite(x)
        check_model(self.model, "EquilibriumPropagation")
        with noise_undone_on_error():
            in_parts = self.checkpoint or contract is _checked_gradients
            graph = graph or self._graphs.of(x, target, saves_memory=in_parts)
            self._check_graph(graph)
            with region("free phase"):
                energy, free = self._free(graph, x, batch, indices)
            output = energy.output(free.point)
            if len(output) != batch:
                raise InputError(f"The output has {len(output)} rows for {batch} examples; dimension 0 is the batch.")
            cost = self._graphs.cost_of(graph, self._cost, energy.inputs, output, target)
            loss = cost.value(output).mean()
            if not math.isfinite(float(loss)):
                raise DivergedError(
                    f"The loss is {float(loss)} before settling: the target or the weights are not finite, or the "
                    "output overflows. Nothing was changed."
                )
            with region("settling"):
                errors = self._cached_errors(energy, free, indices)
                phases = settle_phases(energy, free, cost, self.solver, self.phases, self.beta, errors)
            estimate = estimate_of(loss, free, phases, self.solver.tol, self.diagnostics, graph.share_kept)
            self._report(estimate, phases[-1][1], free)
            with region("contrast"):
                found = contract(phases, batch)
            with uninterrupted():  # the estimate is there: all that it moves is moved
                if self.observe is not None:
                    self.observe(layer_statistics((e, settled) for _, e, settled in phases if e.nudge is not None))
                if contract is _checked_gradients:  # autograd has kept the buffers for the pieces still to be made
                    found = cast(Found, _then_written(found, energy.context.new_buffers))
                else:
                    _write(energy.context.new_buffers)
        if self.programs is not None:
            self.programs.keep(self._graphs.graphs)  # a graph that is new takes its first steps here
            self.programs.record_eager_step(x, target, *phases[-1][1:])
        if indices is not None:
            self._cache.keep(indices, self._worth_keeping(*phases[-1][1:], free))
        return found, estimate

    def _free(self, graph: Graph, x: Any, batch: int, indices: Tensor | None = None) -> tuple[Energy, Settled]:
        """The free equilibrium, and the energy as the nudged phases are to see it."""
        hold = self.branches == "held"
        is_forward = self.coupling.vanishes_when_free
        context = StepContext(freeze_branches=hold and is_forward)
        energy = Energy(graph, self.coupling, graph.bind(x), context, batch)
        sweeps_affine = isinstance(self.solver, Sweep) and energy.is_affine
        point = (
            CheckpointedPoint(energy) if self.checkpoint else energy.rest(lean=sweeps_affine and not self.diagnostics)
        )
        context.recording = False
        if context.noise and self.compile:
            raise ArgumentError(
                f"compile=True: {', '.join(context.noise)} draws random numbers in every step, which a compiled step "
                "cannot. Leave compile out, or put the module in eval mode."
            )
        if is_forward:
            zeros = torch.zeros(batch, device=energy.output(point).device)
            return energy, Settled(point, zeros, 0, Result.CONVERGED, zeros.long())
        if indices is not None:
            states, seen = self._cache.of(indices, energy.state(point))
            point = energy.at({n: torch.where(per_example(seen, s), s, point.values[n]) for n, s in states.items()})
        free = settle(energy, point, replace(self.solver, tol=self.solver.tol / _FREE))
        if hold:
            energy = replace(energy, context=replace(context, freeze_branches=True))
            free = replace(free, point=energy.at(energy.state(free.point)))
        return energy, free

    def _check_graph(self, graph: Graph) -> None:
        """Refuse what cannot be checkpointed, and warn of a softmax before the cost that has one."""
        if self.checkpoint and graph.writes:
            raise ArgumentError(
                f"checkpoint=True: {type(self.model).__name__} writes to `{graph.writes[0].slots[0].name}` from values "
                "that are not kept. Leave checkpoint out."
            )
        last = graph.by_name[graph.output].program[-1].label
        if self.cost == "cross_entropy" and last in ("softmax", "_softmax") and not self._has_warned_of_softmax:
            self._has_warned_of_softmax = True
            warn(
                f"{type(self.model).__name__} ends in a softmax, and cost='cross_entropy' has one of its own: two of "
                "them train slowly, and never to certainty. Let the model return what it gives to its softmax.",
                UserWarning,
            )

    def _cached_errors(self, energy: Energy, free: Settled, indices: Tensor | None) -> State | None:
        """The errors of the same examples at their last equilibrium."""
        if indices is None or not self.coupling.vanishes_when_free:
            return None
        return self._cache.of(indices, energy.state(free.point))[0]

    def _report(self, estimate: Estimate, energy: Energy, free: Settled) -> None:
        """Warn of examples that have not settled, or raise, as `on_unsettled` says."""
        if estimate.converged or self.on_unsettled == "ignore":
            return
        is_fixed = estimate.result is Result.FIXED_STEPS
        if self.on_unsettled == "warn" and (is_fixed or self._has_warned):
            return
        assert estimate.settled is not None and estimate.residual is not None
        hint = self.solver.failure_hint(energy, free.point)
        message = (
            f"{int((~estimate.settled).sum())} of {energy.batch} examples did not settle to {self.solver.tol:g} in "
            f"{estimate.iterations} iterations; the worst residual is {float(estimate.residual.max()):.2g}, at beta "
            f"{estimate.beta:.3g}. `Estimate.settled` says which. Way out: {hint}"
        )
        if self.on_unsettled == "raise":
            raise NotConvergedError(message + " Nothing was changed.")
        self._has_warned = True
        warn(
            message
            + " Their estimate is used as it is; this is said once (on_unsettled='ignore' never, 'raise' stops).",
            NotConvergedWarning,
        )

    def _worth_keeping(self, energy: Energy, settled: Settled, free: Settled) -> Mapping[str, Tensor]:
        """Scaled errors of the nudged equilibrium; where the free one is not the forward pass, its states."""
        if not self.coupling.vanishes_when_free:
            return energy.state(free.point)
        return energy.errors(settled.point) if settled.errors is None else settled.errors

    def _checked_indices(self, indices: Any, batch: int) -> Tensor:
        if not self.solver.uses_warm_start:
            raise ArgumentError(
                f"{type(self.solver).__name__} does not begin at earlier equilibria. Leave indices out, or use "
                "solver=mep.Descent(...)."
            )
        return check_indices(indices, batch)

    def _contrast(self, phases: Sequence[Phase], batch: int) -> Gradients:
        return finished(contrast(phases, batch))

    def _compiled(self, graph: Graph, x: Any, target: Tensor) -> tuple[Gradients, Estimate] | None:
        """The step by a compiled program, or None if it has to be made without one."""
        assert self.programs is not None
        found = self.programs.step(graph, x, target, self.beta)
        if found is None:
            return None
        if self.observe is not None:
            self.observe(found.layers)
        settled = found.worst <= rounded(self.solver.tol, found.residual.dtype)
        result = Result.CONVERGED if settled else Result.FIXED_STEPS
        estimate = Estimate(
            found.loss,
            found.residual,
            found.sweeps,
            result,
            found.betas,
            found.counts,
            self.solver.tol,
            in_leaves=graph.share_kept,
        )
        return found.gradients, estimate


def _checked_gradients(phases: Sequence[Phase], batch: int) -> Iterator[Gradients]:
    """All pieces are made twice: first to see that they are finite, since the first that is used changes a weight."""
    deque(iter_gradients(phases, batch), maxlen=0)  # drops each before the next is made
    return iter_gradients(phases, batch)


def _then_written(found: Any, new_buffers: Mapping[Slot, Tensor]) -> Iterator[Gradients]:
    yield from found
    with torch.no_grad():
        _write(new_buffers)


def _write(new_buffers: Mapping[Slot, Tensor]) -> None:
    """What the model writes to its buffers, once a step that is known to be good."""
    written = [(slot.value, value) for slot, value in new_buffers.items()]
    with uninterrupted():
        for buffer, value in written:
            buffer.copy_(value)


_FREE = 100
"""The free phase is settled so many times better than the nudged ones, whose residuals count what it leaves."""
_HOPFIELD_SOLVER = Descent(settle_steps=500, settle_lr=0.3, adaptive=True, tol=1e-4)
