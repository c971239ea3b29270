"""Equilibrium propagation: the estimator that stands where `loss.backward()` stood."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from mep.capture import Leaves, check_leaves
from mep.capture.cache import Graphs
from mep.capture.cost import cost_of
from mep.capture.sides import wrong_rows
from mep.capture.state import check_state
from mep.cost import BatchCost, PerExample, WithReadout, make_cost
from mep.energy import Energy, GroupEnergy, Hopfield, NodeEnergy, make_node_energy
from mep.errors import ArgumentError, DivergedError, NotConvergedError, NotConvergedWarning, warn
from mep.estimators.checks import (
    check_complex_dtypes,
    check_feedback,
    check_feedback_shapes,
    check_groups,
    check_holomorphic,
    check_relax,
    check_settings,
    check_solver,
    with_readout,
)
from mep.estimators.clamping import Boxes, FreeEquilibrium, by_real_name, relaxed
from mep.estimators.compiled_step import CompiledSteps, CompileOptions
from mep.estimators.contrast import (
    Contrast,
    SettledPhase,
    Watch,
    accumulate,
    betas_of,
    finished,
    iter_gradients,
    make_contrast,
    settle_phases,
    total_gradient,
)
from mep.estimators.estimate import Estimate, Gradients
from mep.estimators.layer_factors import LayerStatistics, layer_statistics
from mep.estimators.view import Equilibrium, Recorder, view
from mep.estimators.warm_start import EquilibriumCache, check_indices
from mep.graph import Graph
from mep.graph.inputs import (
    check_finite,
    check_mode,
    check_model,
    checked_batch,
    dtype_errors,
    input_names,
    undone_on_error,
)
from mep.graph.ops import Slot, StepContext
from mep.graph.untied import untied_graph
from mep.guards import generators, generators_kept, region, set_generators, uninterrupted
from mep.layout import per_example
from mep.settle import Result, Settled, Solver, Start, rounded, settle
from mep.solvers import Descent, Relaxation, Sweep
from mep.solvers.networks.checkpointed import CheckpointedPoint
from mep.solvers.relaxation import has_constant_jacobians


class EquilibriumPropagation:
    """Fills `p.grad` from two equilibria of an energy, as `loss.backward()` would from a graph.

    One is free, one is nudged toward the target with strength `beta`; the contrast of their energies is the gradient,
    to first order in beta (`phases="one-sided"`), in expectation to second (`"random-sign"`), or to second
    (`"centered"`), or to any order (`"holomorphic"`).

    Args:
        model: any module that `torch.export` can record. It is captured with the first batch, and not changed.
        cost: "cross_entropy", "mse", "one_hot_mse" (class labels stand for one-hot vectors), a class derived from
            `mep.BatchCost`, or a function of what the model returns and the target, with one number per example. A
            function may read parameters, have some of its own (a module), and read what `forward` leaves on modules;
            where it does, one number for the whole batch will do, too.
        beta: the nudging strength of every example in every phase. None: each example has one of its own, chosen before
            anything moves, so small that the error at the output is biased by 1% at most, up to higher orders (10% for
            `mep.Descent`); see `mep.estimators.contrast`. The estimate has them as `betas`.
        solver: `mep.Sweep(...)` (the default for "prediction"), `mep.Relaxation(...)` (for "hopfield"),
            `mep.Descent(...)`, or `mep.Local(...)`.
        energy: "prediction", "hopfield", or an object derived from `mep.NodeEnergy`.
        phases: "one-sided"; "centered", with a second nudged phase at -beta; or "random-sign", one-sided at beta or
            -beta at random, drawn for each step from torch's generator on the CPU: `Estimate.betas` has the sign;
            or "holomorphic", N complex betas on a circle, with a bias of order N in beta; see below.
        branches: "held" keeps ReLU-like gates and max-pool winners as in the free equilibrium while the nudged one is
            sought; "exact" seeks the equilibrium of the nonsmooth energy itself.
        leaves: modules to keep whole, see `mep.trace`.
        diagnostics: also report the fraction of units that left their branch; one more forward walk a phase.
        observe: called with the layers of every batch whose estimate is good, for `NaturalGradient.observe`.
        on_unsettled: what to do where some example has not settled in the steps given: "warn" (once, with the way out),
            "raise" a NotConvergedError before anything is written, or "ignore". The estimate is the same, and says
            which examples. A solver that runs a fixed number of steps, `adaptive=False`, is not warned of.
        compile: after a few steps of one shape, make the next ones by a program that inductor has compiled as a whole.
            It needs a C++ compiler and takes seconds, for deep models minutes, for every shape and number of sweeps; a
            step that it does not settle is made without it, and so are all where steps of late have needed more than
            twelve sweeps, or the sweeps times the nodes are more than four hundred.
            What the model reads besides tensors and attributes of its modules is then fixed. Only for `mep.Sweep` and
            `mep.Relaxation`, held branches, the costs that have names, and models without noise.
        proof: when the graph is compared with the model, on the batch of a step: "amortised" before steps 1, 4, 16, 64,
            ... of every graph, "always", or "never". The same loss, new buffers and gradient, or a TraceError.
        checkpoint: keep neither states nor errors of all nodes, and compute them again where they are needed: memory
            of the order of the cube root of the depth, for two to three times the time. The gradient is the same to
            rounding. Only for `mep.Sweep`, held branches, and affine graphs (linear layers, convolutions, pooling,
            piecewise-linear activations).
        groups: energies of groups of nodes beside those of single nodes, see `mep.GroupEnergy`; only for `mep.Descent`.
        points: the number N of betas on the circle of `phases="holomorphic"`; 4 by default.
        readout: a module outside of the energy, which turns the output of the equilibrium into what the cost takes: the
            cost is `C(readout(s_out), y)`, and `predict` returns `readout(s_out)`. It pulls on the states by
            `J^T dC/dz`, z = readout(s_out), and its own gradient is backpropagation's through the readout alone, at the
            free equilibrium. Give the optimizer its parameters, too: `[*model.parameters(), *readout.parameters()]`.
            With dropout it draws once a step. A layer that writes to buffers (batch normalisation in training mode) is
            refused, and so is `compile=True`.
        feedback: weights of their own for what a layer of a Hopfield network sends back to its parents: the name of the
            layer's weight in `model.named_parameters()`, and a tensor of its shape; see below. A parameter is trained:
            give it to the optimizer, too. Only for `mep.Relaxation`, with omega = 1 unless it has one.

    With `feedback` the message of a layer to its parents is `B^T s` instead of `W^T s`. The states come to rest where a
    vector field F vanishes that is not the gradient of an energy, `pull_n = mu_n + sum_c B_c^T s_c`. The rule is that
    of Scellier et al. 2018 (arXiv:1808.04873), `(dF/dtheta)^T ds/dbeta`. With the input h of the layer, its
    displacement dh, and the displacement ds of its states, over beta:

        dC/dW ~ -ds h^T  (from F of the layer itself),        dC/dB ~ -s dh^T  (from F of its parents)

    It is biased, at any beta, unless B = W: then the sum of both is the gradient of a Hopfield network.

    With `phases="holomorphic"` the model is continued to complex states (complex64 for float32): N/2 nudged phases for
    an even N, since equilibria at conjugate betas are conjugate. `Estimate.betas` has the radius. Operations that have
    no complex form are refused by name, and so are float16 and bfloat16. `observe` is given real parts.

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

    Sources: Scellier and Bengio 2017, arXiv:1602.05179, theorem 1; for the readout Laborieux et al. 2021,
    arXiv:2006.03824.
    """

    def __init__(
        self,
        model: nn.Module,
        cost: str | PerExample | type[BatchCost] = "cross_entropy",
        beta: float | None = None,
        solver: Solver | None = None,
        energy: str | NodeEnergy = "prediction",
        phases: str = "one-sided",
        branches: str = "held",
        leaves: Leaves = (),
        diagnostics: bool = False,
        observe: Callable[[list[LayerStatistics]], None] | None = None,
        compile: bool = False,
        checkpoint: bool = False,
        on_unsettled: str = "warn",
        proof: str = "amortised",
        groups: Sequence[GroupEnergy] = (),
        points: int | None = None,
        readout: nn.Module | None = None,
        feedback: Mapping[str, Tensor] | None = None,
    ):
        check_model(model, "EquilibriumPropagation")
        check_state(model)
        self.model = model
        self.cost, self.readout = cost, readout
        self._whole_cost = cost if readout is None else with_readout(cost, readout)
        self._cost = make_cost(self._whole_cost)
        self.node_energy = make_node_energy(energy)
        self.phases, self.points = phases, points
        self.branches = branches
        check_leaves(model, leaves, "EquilibriumPropagation")
        self.leaves = tuple(leaves)
        self.diagnostics = diagnostics
        self.observe = observe
        self.groups = tuple(groups)
        self.solver = solver or default_solver(self.node_energy, self.groups)
        check_solver(self.solver)
        self.feedback = check_feedback(self, feedback)
        if self.feedback:
            self.solver = self.solver.for_field()
        self.beta = beta
        self.compile, self.checkpoint = compile, checkpoint
        self.on_unsettled, self._warned_of = on_unsettled, set[str]()
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
        batch = self._check(x, target)
        graph = None
        with undone_on_error(x, self.solver) as all_has_moved:
            table = make_contrast(self.phases, self.points)
            if self.compiled_steps is not None and indices is None:
                graph = self._graphs.of(x, target)
                if (found := self._compiled(graph, x, target, table)) is not None:
                    return found
            step = self._settled(x, target, batch, indices, table, graph)
            with region("contrast"):
                gradients = finished(total_gradient(step.phases, step.output, batch))
            with uninterrupted():
                self._finish(step, x, target, indices)
                all_has_moved()
        return gradients, step.estimate

    @torch.no_grad()
    def iter_gradients(
        self, x: Any, target: Tensor, indices: Tensor | None = None
    ) -> tuple[Iterator[Gradients], Estimate]:
        """As `gradients`, one after the other: each is made when it is asked for, and may be used up at once.

        Every trained parameter occurs once, after the last node that uses it; from then on it may be changed. All have
        been made and found finite before, and dropped again. Never by a compiled program.
        """
        batch = self._check(x, target)
        with undone_on_error(x, self.solver) as all_has_moved:
            table = make_contrast(self.phases, self.points)
            step = self._settled(x, target, batch, indices, table, saves_memory=True)
            # Made twice: first to see that all are finite, since the first that is used changes a weight.
            deque(iter_gradients(step.phases, step.output, batch), maxlen=0)
            buffers = dict(step.energy.context.new_buffers)
            step.energy.context.new_buffers.clear()  # autograd has kept the old ones for the gradients still to be made
            with uninterrupted():
                self._finish(step, x, target, indices)
                all_has_moved()

        def gradients() -> Iterator[Gradients]:
            yield from iter_gradients(step.phases, step.output, batch)
            with torch.no_grad():
                _write(buffers)

        return gradients(), step.estimate

    @torch.no_grad()
    def settle(self, x: Any, target: Tensor, indices: Tensor | None = None, record: bool = False) -> Equilibrium:
        """The equilibria of a batch, to look at: nothing is changed, neither buffers nor random numbers.

        Args:
            x, target, indices: as in a call.
            record: also keep the residuals of every node after every iteration, for `Equilibrium.plot`.

        Returns:
            States, predictions, scaled errors, energies and residuals by node, of the free and the nudged phases.

        Example:
            >>> import torch, mep
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
            >>> eq = mep.EquilibriumPropagation(net).settle(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
            >>> eq.nudged.states["2"].shape, bool((eq.nudged.residuals["0"] <= 1e-2).all())
            (torch.Size([5, 3]), True)
        """
        batch = self._check(x, target)
        recorder, carried = Recorder() if record else None, self.solver.state_dict()
        try:
            with undone_on_error(x), generators_kept():
                table = make_contrast(self.phases, self.points)
                step = self._settled(x, target, batch, indices, table, watch=recorder)
                return view(step.estimate, step.energy, step.free, step.phases, step.table, recorder)
        finally:
            self.solver.load_state_dict(carried)

    @torch.no_grad()
    def predict(self, x: Any) -> Tensor:
        """The output of the free equilibrium, or what the readout makes of it; for the prediction energy `model(x)`."""
        batch = checked_batch(x, finite=not self.node_energy.is_forward)
        with undone_on_error(x, self.solver), dtype_errors(self.model):
            graph = self._graphs.of(x)
            energy, free = self._free(self._untied(graph) if self.feedback else graph, x, batch)
            output = energy.output(free.point)
            if isinstance(self._whole_cost, WithReadout):
                output = self._whole_cost.read(output)
            if not bool(output.isfinite().all()):
                check_finite(x)
        _write(energy.context.new_buffers)
        return output

    @torch.no_grad()
    def relax(
        self,
        clamp: Mapping[str, Tensor],
        start: Mapping[str, Tensor] | None = None,
        held: Mapping[str, Tensor] | None = None,
        box: Boxes | None = None,
    ) -> FreeEquilibrium:
        """A Hopfield network at rest while what is in `clamp` is held, and nothing else; nothing is changed.

        With the output held at a label and the input free, the network runs backward, to an input. A free input x is a
        state with the energy `1/2 |x|^2` and no prediction, see `mep.estimators.clamping`.

        Args:
            clamp: what is held, by name: "input" (else the name of an argument of `forward`), "output" (what the model
                returns, before a readout), or a node with a state (see `mep.trace`). Whole states, [batch, ...], of
                values that the activation can have, the ends of its range included.
            start: where states that are free begin. By default inputs begin at zero and nodes on their predictions.
            held: masks for names in `clamp` of which only a part is held: True where a unit is.
            box: the bounds (low, high) of free inputs, such as the range of the data; or a mapping by name.

        Returns:
            The states, and a residual of each that is free. Nothing is raised where some example has not settled:
            `converged` says it.

        Example: two inputs, of which the label draws one up, and the other down to the face of its box.
            >>> import torch, mep
            >>> net = torch.nn.Linear(2, 2, bias=False)
            >>> _ = torch.nn.init.eye_(net.weight)
            >>> ep = mep.EquilibriumPropagation(net, "mse", energy="hopfield")
            >>> _ = ep.predict(torch.zeros(1, 2))  # the shape of the input
            >>> found = ep.relax(clamp={"output": torch.tensor([[0.5, -0.5]])}, box=(0, 1))
            >>> found["input"], found.converged
            (tensor([[0.5000, 0.0000]]), True)
        """
        check_relax(self, clamp, start, held)
        given = {**(start or {}), **clamp}
        batch = len(next(iter(given.values())))
        if self._graphs.known:
            x = self._graphs.like_last(by_real_name(self._graphs.known[0].graph, given), batch)
        else:
            x = given.get("input", given.get(input_names(self.model, torch.empty(1))[0]))
            x = self._graphs.like_last({}, batch) if x is None else x
        with generators_kept(), dtype_errors(self.model):
            checked_batch(x)
            graph = self._graphs.of(x)
            check_groups(self.groups, graph)
            context = StepContext(freeze_branches=self.branches == "held" and self.solver.holds_branches)
            energy = Energy(graph, self.node_energy, graph.bind(x), context, batch, groups=self.groups)
            clamp, start, held = (by_real_name(graph, values) for values in (clamp, start, held))
            return relaxed(energy, self.solver, clamp, start, held, box)

    def share_graphs(self, graphs: Graphs) -> None:
        """Use the graphs of another estimator of the same model, cost, energy, branches and leaves, as they are."""
        self._graphs = graphs

    def state_dict(self) -> dict[str, Any]:
        """What the estimator keeps from step to step: equilibria by index, and what the solver carries."""
        return {"recall": self._cache.state_dict(), "solver": self.solver.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._cache.load_state_dict(state["recall"])
        self.solver.load_state_dict(state.get("solver", {}))

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to this very model: a copy is bound to the copied one, and traces it anew."""
        kept = {name: value for name, value in self.__dict__.items() if name not in _BOUND}
        return {**kept, "_carried": self.solver.state_dict()}  # a copy of the solver by itself starts without

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({name: value for name, value in state.items() if name != "_carried"})
        self.solver.load_state_dict(state.get("_carried", {}))
        self._trace()

    def _trace(self) -> None:
        """What belongs to this very model."""
        states = "hopfield" if self.node_energy.behind_activations else "prediction"
        self._untied_graphs: WeakKeyDictionary[Graph, Graph] = WeakKeyDictionary()
        self._holomorphic: WeakSet[Graph] = WeakSet()
        self._graphs = Graphs(self.model, self.leaves, states, self.branches, self._whole_cost, self.proof)
        self.compiled_steps: CompiledSteps | None = None
        self._start_compiling()
        self._is_unchecked, self._is_built = False, True

    def _start_compiling(self) -> None:
        """Anew where settings are not those of the programs that there are."""
        if self.compile:
            options = CompileOptions(self.solver, self.node_energy, self.phases, self.observe is not None)
            if self.compiled_steps is None or self.compiled_steps.setting != options:
                self.compiled_steps = CompiledSteps(options, self._cost)

    def __setattr__(self, name: str, value: Any) -> None:
        """Settings on which no graph depends may be changed; they are checked before the next step."""
        if "_is_built" in self.__dict__ and not name.startswith("_"):
            call = f"{type(self).__name__}.{name} = {value!r}"
            if name in _SETTLED:
                raise ArgumentError(f"{call}: graphs are captured for what it was. Way out: build another estimator.")
            if not hasattr(self, name):
                if hasattr(self.solver, name):
                    made = type(self.solver).__name__
                    raise ArgumentError(f"{call}: that is a setting of the solver. Way out: ep.solver = {made}(...).")
                if near := get_close_matches(name, self.__dict__, n=1):
                    raise ArgumentError(f"{call}: there is no such setting. Did you mean {near[0]}?")
            self._is_unchecked = True
        super().__setattr__(name, value)

    def _untied(self, graph: Graph) -> Graph:
        """The graph with the feedback weights, the same one each time; what is proven is the graph without them."""
        if graph not in self._untied_graphs:
            weights = check_feedback_shapes(self.model, self.feedback)
            self._untied_graphs[graph] = untied_graph(graph, weights, self.feedback)
        return self._untied_graphs[graph]

    def _check(self, x: Any, target: Any) -> int:
        """The number of examples, once everything that can be refused without the model is found right."""
        if self._is_unchecked:
            check_solver(self.solver)
            check_settings(self)
            self._start_compiling()
            self._is_unchecked = False
        check_mode()
        batch = checked_batch(x, target, self.cost, finite=not self.node_energy.is_forward)
        check_model(self.model, "EquilibriumPropagation")
        return batch

    def _settled(
        self,
        x: Any,
        target: Tensor,
        batch: int,
        indices: Tensor | None,
        table: Contrast,
        graph: Graph | None = None,
        saves_memory: bool = False,
        watch: Watch | None = None,
    ) -> _Step:
        """The step up to its equilibria: the graph, the free phase, the loss, the nudged phases. Nothing is written."""
        indices = None if indices is None else self._checked_indices(indices, batch)
        graph = graph or self._graphs.of(x, target, saves_memory=saves_memory or self.checkpoint)
        if self.feedback:
            graph = self._untied(graph)
        self._check_graph(graph)
        with region("free phase"):
            energy, free = self._free(graph, x, batch, indices, target)
        output = energy.output(free.point)
        if output.shape[0] != batch:
            raise wrong_rows(output.shape[0], batch)
        cost = cost_of(graph, self._cost, energy.inputs, output, target) if graph.cost else self._cost(output, target)
        loss = cost.value(output).mean()
        if not math.isfinite(float(loss)):
            raise DivergedError(
                f"The loss is {float(loss)} before settling: the target or the weights are not finite, or the "
                "output overflows. Nothing was changed."
            )
        if self.feedback and not has_constant_jacobians(energy, free.point):
            raise ArgumentError(
                f"EquilibriumPropagation(feedback=...): Jacobians of {type(self.model).__name__} change with the "
                "states (a product of states, a function without a state, max pooling with branches='exact'). Leave it "
                "out."
            )
        if self.phases == "holomorphic":
            check_complex_dtypes(energy, free.point)
            if graph not in self._holomorphic:  # as long as the graph is the same, so are its operations
                check_holomorphic(self, energy, free.point, cost)
                self._holomorphic.add(graph)
        errors = None  # those of the same examples at their last equilibrium
        if indices is not None and energy.is_forward:
            errors = self._cache.of(indices, energy.state(free.point))[0]
        with region("settling"):
            phases = settle_phases(energy, free, cost, self.solver, table, self.beta, errors, watch)
        estimate = self._estimate(loss, free, phases, graph)
        if estimate.coupling is not None:
            self._check_coupling(estimate)
        if estimate.result is not Result.CONVERGED and self.on_unsettled != "ignore":
            self._report(estimate, phases[-1][1], free)
        return _Step(energy, free, output, phases, table, estimate)

    def _free(
        self, graph: Graph, x: Any, batch: int, indices: Tensor | None = None, target: Any = None
    ) -> tuple[Energy, Settled]:
        """The free equilibrium, and the energy as the nudged phases are to have it."""
        if self.node_energy.behind_activations:
            self._check_activations(graph)
        freeze, is_forward = self.branches == "held", self.node_energy.is_forward and not self.groups
        context = StepContext(freeze_branches=freeze and (is_forward or self.solver.holds_branches))
        energy = Energy(graph, self.node_energy, graph.bind(x), context, batch, groups=self.groups)
        if self.groups:
            check_groups(self.groups, graph)
        if self.checkpoint:
            point: Any = CheckpointedPoint(energy)
        else:  # affine networks need neither states nor predictions to settle, only to look at
            point = energy.free_point(lean=self.solver.checkpoints and energy.is_affine and not self.diagnostics)
        context.recording = False
        if context.noise and self.compile:
            raise ArgumentError(
                f"compile=True: {', '.join(context.noise)} draws random numbers in every step, which a compiled step "
                "cannot. Leave compile out, or put the module in eval mode."
            )
        if is_forward:
            zeros = torch.zeros(batch, device=energy.output(point).device)
            return energy, Settled(point, zeros, 0, Result.CONVERGED, zeros.long(), self.solver.tol)
        if indices is not None:
            states, seen = self._cache.of(indices, energy.state(point))
            point = energy.at({n: torch.where(per_example(seen, s), s, point.values[n]) for n, s in states.items()})
        cost = None
        if target is not None:  # how well the free phase has to settle depends on the nudge
            noise = generators()
            cost = cost_of(graph, self._cost, energy.inputs, energy.output(point), target)
            set_generators(noise)  # that of the nudge itself draws the same
        free = settle(energy, point, self.solver.for_free_phase(), Start(cost=cost))
        if free.result is Result.DIVERGED:
            hint = self.solver.failure_hint(energy, point)
            raise DivergedError(f"The free phase diverged with {self.solver}. Nothing was changed. Way out: {hint}")
        if freeze and not context.freeze_branches:
            energy = replace(energy, context=replace(context, freeze_branches=True))
            free = replace(free, point=energy.at(energy.state(free.point)))
        return energy, free

    def _estimate(self, loss: Tensor, free: Settled, phases: list[SettledPhase], graph: Graph) -> Estimate:
        """What is reported of these phases. What the free one has left is part of the residuals of the nudged ones."""
        residual, counts, iterations, result = None, free.counts, free.iterations, Result.CONVERGED
        for _, _, settled in phases:
            if settled is not free:
                residual = settled.residual if residual is None else torch.maximum(residual, settled.residual)
                counts = torch.maximum(counts, settled.counts)
                iterations = max(iterations, settled.iterations)
                result = settled.result if result is Result.CONVERGED else result
        _, energy, last = phases[-1]
        assert residual is not None
        inside, coupling = self.solver.diagnosis()
        return Estimate(
            loss,
            residual,
            iterations,
            result,
            betas_of(energy.beta, energy.batch, residual.device),
            counts,
            last.tol,
            max(e.left_branch(settled.point) for _, e, settled in phases) if self.diagnostics else None,
            last.turns,
            graph.share_kept,
            inside,
            None if self.feedback else coupling,
        )

    def _finish(self, step: _Step, x: Any, target: Tensor, indices: Tensor | None) -> None:
        """Everything that a step moves besides gradients, once these are there: factors, buffers, warm starts."""
        _, energy, last = step.phases[-1]
        if self.observe is not None:
            self.observe(layer_statistics((e, settled) for _, e, settled in step.phases if e.nudge))
        if energy.context.new_buffers:
            _write(energy.context.new_buffers)
        if self.compiled_steps is not None:
            self.compiled_steps.keep(self._graphs.graphs)  # a graph that is new takes its first steps here
            self.compiled_steps.record_eager_step(energy.graph, x, target, step.output, step.estimate.iterations)
        if indices is not None:
            # Scaled errors of the nudged equilibrium; where the free one is not the forward pass, its states.
            kept: Mapping[str, Tensor] = energy.state(step.free.point)
            if energy.is_forward:
                kept = energy.errors(last.point) if last.errors is None else last.errors
            self._cache.keep(indices.long(), kept)

    def _check_graph(self, graph: Graph) -> None:
        """Refuse what cannot be checkpointed; warn of two softmaxes in a row, and of layers without a state."""
        if self.checkpoint and graph.writes:
            raise ArgumentError(
                f"checkpoint=True: {type(self.model).__name__} writes to `{graph.writes[0].slots[0].name}` from values "
                "that are not kept. Leave checkpoint out."
            )
        if self.cost == "cross_entropy" and graph.ends_in_softmax:
            self._warn_once(
                "softmax",
                f"{type(self.model).__name__} ends in a softmax, and cost='cross_entropy' has one of its own: two of "
                "them train slowly, and never to certainty. Let the model return what it gives to its softmax.",
            )
        if graph.stateless and not self.node_energy.behind_activations:
            self._warn_once(
                "layers without a state",
                f"Layers without a state of their own: {', '.join(graph.stateless)}. What they compute is not real, "
                "has no dimension with the examples one after another, or is all steps of a recurrent layer at once. "
                "So the node learns as a whole: autograd runs inside it, equilibrium propagation between it and the "
                "rest. Rows of several views of an example get states by torch.stack([a, b], 1).flatten(0, 1), and not "
                "by torch.cat([a, b]); a recurrence by a loop over nn.LSTMCell or nn.GRUCell. To keep a layer whole "
                "without this warning: leaves=(nn.LSTM,).",
            )

    def _check_activations(self, graph: Graph) -> None:
        """Refuse activations without a box for an energy of one's own, and warn, once, of functions without a state."""
        curved = [n for n in graph.states if not n.potential.is_identity]
        if curved and not isinstance(self.node_energy, Hopfield):
            raise ArgumentError(
                f"energy={self.node_energy.name!r}: states behind activations are put into a box, and "
                f"{type(curved[0].potential).__name__} behind {curved[0].where} has none. Use ReLU, Hardtanh or clamp, "
                "or energy='hopfield'."
            )
        if graph.stateless:
            self._warn_once(
                "functions without a state",
                f"Functions without a state of their own in a Hopfield network: {', '.join(graph.stateless)}. They are "
                "part of what the node predicts, mu in <s, mu>, as its layer is, and do not come to rest on their own. "
                "A state stands behind ReLU, ReLU6, Hardtanh, Hardsigmoid, clamp, Sigmoid, Tanh, Softplus, and behind "
                "a Softmax over an example whose result is not multiplied with another value, as in attention. Instead "
                "of log_softmax return what it is given, with cost='cross_entropy'.",
            )

    def _check_coupling(self, estimate: Estimate) -> None:
        """Warn, once, of a Hopfield network whose equilibrium is about to be one of several, or cannot respond."""
        assert estimate.coupling is not None and estimate.inside is not None
        if not (estimate.coupling > 0.98 or estimate.inside < 0.02):
            return
        self._warn_once(
            "coupling",
            f"The Hopfield network is close to having several equilibria: the largest eigenvalue of its coupling is "
            f"about {estimate.coupling:.2f} (one equilibrium below 1), and {estimate.inside:.0%} of its states are "
            "inside their boxes (others do not respond to the nudge). Smaller weights help: a smaller learning rate, "
            "weight_decay, mep.smep with a smaller gamma; or cost='mse', whose targets are bounded.",
        )

    def _report(self, estimate: Estimate, energy: Energy, free: Settled) -> None:
        """Warn of examples that have not settled, or raise, as `on_unsettled` is set."""
        is_fixed = estimate.result is Result.FIXED_STEPS
        if self.on_unsettled == "warn" and (is_fixed or "unsettled" in self._warned_of):
            return
        hint = self.solver.failure_hint(energy, free.point)
        message = (
            f"{int((~estimate.settled).sum())} of {energy.batch} examples did not settle to {estimate.tol:g} in "
            f"{estimate.iterations} iterations; the worst residual is {float(estimate.residual.max()):.2g}, at beta "
            f"{estimate.beta:.3g}. `Estimate.settled` says which. Way out: {hint}"
        )
        if self.on_unsettled == "raise":
            raise NotConvergedError(message + " Nothing was changed.")
        self._warn_once(
            "unsettled",
            message
            + " Their estimate is used as it is; this is said once (on_unsettled='ignore' never, 'raise' stops).",
            NotConvergedWarning,
        )

    def _warn_once(self, subject: str, message: str, category: type[Warning] = UserWarning) -> None:
        """Warn, unless this estimator has warned of that subject before."""
        if subject not in self._warned_of:
            self._warned_of.add(subject)
            warn(message, category)

    def _checked_indices(self, indices: Any, batch: int) -> Tensor:
        if not self.solver.uses_warm_start:
            raise ArgumentError(
                f"{type(self.solver).__name__} does not begin at earlier equilibria. Leave indices out, or use "
                "solver=mep.Descent(...)."
            )
        return check_indices(indices, batch)

    def _compiled(self, graph: Graph, x: Any, target: Tensor, table: Contrast) -> tuple[Gradients, Estimate] | None:
        """The step by a compiled program, or None if it has to be made without one."""
        assert self.compiled_steps is not None
        found = self.compiled_steps.step(graph, x, target, self.beta, table)
        if found is None:
            return None
        if self.observe is not None:
            self.observe(found.layers)
        settled = found.worst <= rounded(self.solver.tolerance, found.residual.dtype)
        result = Result.CONVERGED if settled else Result.FIXED_STEPS
        estimate = Estimate(
            found.loss,
            found.residual,
            found.sweeps,
            result,
            found.betas,
            found.counts,
            self.solver.tolerance,
            None,
            None,
            graph.share_kept,
            *self.solver.diagnosis(),
        )
        return found.gradients, estimate


def default_solver(energy: NodeEnergy, groups: Sequence[GroupEnergy] = ()) -> Solver:
    """The solver of an energy, where none is named."""
    if groups:
        return _DESCENT
    if energy.has_state:
        return Sweep()
    return Relaxation() if isinstance(energy, Hopfield) else _DESCENT


@dataclass(frozen=True)
class _Step:
    """A step whose equilibria have been found: the energy without its nudge, where it is least, and the phases.

    `output` is that of the free equilibrium.
    """

    energy: Energy
    free: Settled
    output: Tensor
    phases: list[SettledPhase]
    table: Contrast
    estimate: Estimate


def _write(new_buffers: Mapping[Slot, Tensor]) -> None:
    """What the model writes to its buffers, once a step that is known to be good."""
    written = [(slot.value, value) for slot, value in new_buffers.items()]
    with uninterrupted():
        for buffer, value in written:
            buffer.copy_(value)


_BOUND = ("_graphs", "_untied_graphs", "_holomorphic", "compiled_steps", "_is_built")
"""What belongs to the very model of an estimator, and is not copied."""
_SETTLED = (
    "model", "cost", "readout", "node_energy", "branches", "leaves", "compile", "proof", "groups", "feedback"
)  # fmt: skip
"""Settings of an estimator that cannot change."""
_DESCENT = Descent(settle_steps=500, settle_lr=0.3, adaptive=True, tol=1e-4)
