r"""Block relaxation: the equilibria of a Hopfield network, layer by layer.

    E(s) = sum_n G_n(s_n) - <s_n, mu_n(parents)>,      G' = f^-1, f the activation

With its neighbours fixed, the best state of a layer is known: the activation of its prediction and of what its children
c send back. Over-relaxation is by the pull at which the state is the response, `v = f^-1(s)`:

    pull_n = mu_n + sum_c J_c^T s_c,        v_n <- (1 - omega) v_n + omega pull_n,        s_n = f(v_n)

For activations that project on a box (ReLU, Hardtanh), v is s itself and f puts it into the box.

**Free phase.** A forward pass, then one backward walk for the messages J_c^T s_c and one forward walk that places the
layers in turn: projected successive over-relaxation. On a chain of layers the best omega follows from the largest
eigenvalue mu of the coupling (Young), which is measured in one of 16 batches:

    omega = 2 / (1 + sqrt(1 - mu^2)),        then errors fall to a fraction omega - 1 in a sweep

**Nudged phase.** For the displacement `delta = (s_beta - s_free) / beta`, not for the states: no beta is too small for
its digits. Where no Jacobian J changes, the force that the free phase has left cancels, and

    delta_n = hold(sum_p J_n delta_p + sum_c J_c^T delta_c - [n is the output] dC/ds(s_free + beta delta_n))

`hold` keeps units on a face of their box there, delta = 0, and leaves the others free (`branches="held"`); or it clamps
to the box, [(low - s) / beta, (high - s) / beta], the outward pull of a unit on a face added (`"exact"`). For other
activations it is `(f(v + beta q) - f(v)) / beta` of what is in its brackets, q, in closed form. A sweep goes
backward first: the first is backpropagation's signal. Then the same relaxation. It converges to a minimum or not at all
(Ostrowski and Reich): where the curvature is indefinite, displacements grow, and are given up. With a complex beta
(`phases="holomorphic"`) the equations are the same, and delta is complex; only the cost's gradient is no longer real.

**Gradient.** Without a difference of nearly equal numbers: with the weighted input h and its displacement dh,

    (dE/dW(s_beta) - dE/dW(s_free)) / beta = -(delta h^T + s_beta dh^T)

Graphs whose Jacobians change (a product of states, max pooling whose winners are free) relax their states themselves.

Sources: Scellier and Bengio 2017, arXiv:1602.05179; Young 1954, https://doi.org/10.2307/1990745.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from mep.cost import BatchCost, SquaredError
from mep.energy import FREE, Energy, Hopfield, NodeEnergy, State, example_dot, example_norm, rounding
from mep.errors import ArgumentError, require
from mep.graph import Graph, Point
from mep.graph.node import Beta, Node, expand_beta
from mep.layout import accurate, per_example
from mep.settle import Iterate, Solver, Start

_FREE_SHARE = 0.5
"""Of the tolerance: what the free phase may leave; the nudged phase has the rest."""
_BY_STATE = 50
"""Where the size of displacements is not known yet, what is left is measured against the state over this."""
_ROUNDING = 4
"""What is left is rounding up to this many units in the last place of the state."""
_RUNAWAY = 3e1
"""Displacements this many times those of the first sweep: the coupling is indefinite, or within 3% of it."""
_GROWTH = 1e2
"""States this many times those of the forward pass: the energy has no minimum."""
_UNSETTLED = 1e1
"""What has not settled in the end may be this many times as large; else it is what the first sweep found."""
_PATIENT = 8
"""After so many sweeps it is looked for runaways, and for residuals that do not fall any more."""
_WINNERS_MOVE = 6
"""Sweeps of a free phase after which held winners of max pooling stay: two that push each other down alternate."""
_MEASURED_EVERY = 16
"""So many batches have one measurement of their boxes and coupling, which costs as much as a few sweeps."""
_EAGER_EVERY = 4 * _MEASURED_EVERY
"""Of compiled steps one in so many is made without a program, with its measurement."""
_POWER_ITERATIONS = 6
"""From displacements, in which strong couplings show: a lower bound of the largest eigenvalue, within some percent."""
_STRONGEST = 0.99
"""Beyond this coupling the tolerance falls no further: it is measured within some percent."""
_HIGHEST = 1.6
"""The largest omega that is chosen: beyond it a sweep of a projected problem may lose what it gains."""


class Memory:
    """What is carried from batch to batch: it decides how soon settling ends, not where. A copy starts without it.

    Attributes:
        batches: how many nudged phases have ended.
        gains: by state, how large displacements are beside dC/ds at the output (0-dim): a tenth of them is smaller.
        free_from, nudged_from: before these sweeps no residual needs to be measured.
        inside, coupling: see `Estimate`; measured in the first of every 16 batches.
        strongest: the largest coupling of late.
    """

    def __init__(self) -> None:
        self.forget()
        self._model: ref[nn.Module] | None = None

    def of(self, graph: Graph) -> Memory:
        """What is known of the model of a graph: nothing if another one was settled last."""
        if self._model is not None and self._model() is not graph.model:
            self.forget()
        self._model = ref(graph.model)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Everything but the model."""
        return {**{name: value for name, value in vars(self).items() if name != "_model"}, "gains": dict(self.gains)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.forget()
        vars(self).update({**state, "gains": dict(state["gains"])} if state else {})

    def note_gain(self, name: str, moved: Tensor, gradient: Tensor) -> None:
        """That of one state, from the sizes of displacements and of dC/ds; where none has a dC/ds there is none."""
        gain = (moved / gradient).nan_to_num(math.inf, math.inf).kthvalue(1 + len(gradient) // 10).values
        if math.isfinite(float(gain)):
            known = self.gains.get(name)
            # Down at once, up slowly: a free phase that ends too early cannot be made good later.
            self.gains[name] = gain if known is None else torch.lerp(known.to(gain), gain, 0.3).minimum(gain)

    def forget(self) -> None:
        """As before the first batch."""
        self.batches = 0
        self.strongest = 0.0
        self.inside: float | None = None
        self.coupling: float | None = None
        self.gains: dict[str, Tensor] = {}
        self.free_from = self.nudged_from = 0

    def __reduce__(self) -> tuple[type[Memory], tuple[()]]:
        return Memory, ()


@dataclass(frozen=True)
class Relaxation(Solver):
    """Sweeps that minimise one layer after the other, for `energy="hopfield"`; nothing has to be tuned.

    Args:
        settle_steps: the largest number of sweeps of a phase, or with `adaptive=False` the exact one.
        tol: residual at which an example has settled, in units of the nudge.
        patience: consecutive sweeps at or below `tol`.
        adaptive: stop when every example has settled.
        omega: how far a layer moves toward its minimum, in (0, 2); None measures the best one from batch to batch.

    Example:
        >>> import torch, mep
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Hardtanh(0, 1), torch.nn.Linear(8, 3))
        >>> ep = mep.EquilibriumPropagation(net, energy="hopfield", solver=mep.Relaxation(tol=1e-3))
        >>> ep(torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])).converged
        True
    """

    settle_steps: int = 100
    tol: float = 1e-2
    patience: int = 1
    adaptive: bool = True
    omega: float | None = None
    memory: Memory = field(default_factory=Memory, compare=False, repr=False)

    carries_errors = True
    holds_branches = True
    compiles = True
    settles_complex = True
    settles_fields = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.omega is not None:
            require("Relaxation", "omega", self.omega, lambda w: 0 < w < 2, "between 0 and 2, or None to measure it")

    def check(self, node_energy: NodeEnergy) -> None:
        if not isinstance(node_energy, Hopfield):
            raise ArgumentError(
                f"{type(self).__name__} does not settle energy={node_energy.name!r}: it minimises the Hopfield energy "
                "layer by layer. Use solver=mep.Sweep(...), or mep.Descent(...)."
            )

    @property
    def factor(self) -> float:
        """The omega of the next sweep: Young's, for the coupling that was measured last."""
        if self.omega is not None:
            return self.omega
        coupling = min(self.memory.strongest or 0.5, 1.0)
        return min(2 / (1 + math.sqrt(1 - coupling**2)), _HIGHEST)

    @property
    def tolerance(self) -> float:
        """Errors are up to residuals over 1 - mu, mu the largest eigenvalue of the coupling: at most 5 tol."""
        return self.tol * min(1.0, (1 - min(self.memory.strongest, _STRONGEST)) / 0.2)

    def init(self, energy: Energy, point: Point, start: Start) -> Iterate:
        """The forward pass, or the free equilibrium without any displacement."""
        self.memory.of(energy.graph)
        if energy.nudge is not None and has_constant_jacobians(energy, point):
            nudged = Displacement(energy, point)
            nudged.due = self.memory.nudged_from
            return Iterate(nudged.ones, point, exact=False, state=nudged)
        if is_complex(energy.beta):
            raise ArgumentError(
                f"phases='holomorphic', energy='hopfield': Jacobians of {type(energy.graph.model).__name__} change "
                "with the states (a product of states, softmax, ...), and such states are not relaxed at complex "
                "betas. Way out: phases='centered'."
            )
        states = Relaxed(energy, point, start.cost, self.memory)
        states.due = self.memory.free_from if states.is_free else 0
        measured = energy.nudge is not None or self.memory.free_from == 0 or not self.adaptive
        return Iterate(states.residual() if measured else states.ones, states.point, exact=measured, state=states)

    def step(self, energy: Energy, iterate: Iterate, active: Tensor | None) -> Iterate:
        """One sweep over all layers."""
        current: Displacement | Relaxed = iterate.state
        omega = self.factor
        current.sweep(omega)
        due = current.sweeps >= current.due or not self.adaptive or self.patience > 1
        residual = current.residual() if due else current.ones
        stuck = False
        if due:
            worst = float(residual.max())
            if worst <= self.tolerance and isinstance(current, Displacement):
                self._measure(current)  # which may make the tolerance less
            current.due = current.sweeps + self._until_settled(worst, omega)
            is_late = current.sweeps > _PATIENT and self.adaptive
            stuck = is_late and _is_stuck(current.totals, residual, self.tolerance)
            stuck |= not current.has_minimum
        return Iterate(residual, current.point, diverging=current.diverging, exact=due, stuck=stuck, state=current)

    def _until_settled(self, worst: float, omega: float) -> int:
        """Over how many sweeps no residual needs to be measured: most of those in which it may fall to tol."""
        if not self.tolerance < worst < 1:
            return 1
        return max(1, int(0.7 * math.log(worst / self.tolerance) / -math.log(max(omega - 1, 0.1))))

    def finalize(self, energy: Energy, iterate: Iterate) -> Iterate:
        """With the exact residual; what the next batch begins with is noted."""
        current: Displacement | Relaxed = iterate.state
        residual = iterate.residual if iterate.exact else current.residual()
        if isinstance(current, Displacement):
            residual = current.bounded(residual, self.tolerance)
        if self.adaptive:
            current.note(self.memory)
        if energy.nudge is not None and current.sweeps:
            if isinstance(current, Displacement):
                self._measure(current)
            self.memory.batches += 1
        return replace(iterate, residual=residual, exact=True, point=current.point)

    def snapshot(self, energy: Energy, iterate: Iterate) -> Iterate:
        """As it is: nothing is noted, and no example given up."""
        return iterate

    def _measure(self, current: Displacement) -> None:
        """Boxes and coupling, in one of 16 batches, and once there."""
        if self.memory.batches % _MEASURED_EVERY == 0 and not current.is_measured:
            current.is_measured = True
            self.memory.inside, self.memory.coupling = current.inside(), current.coupling()
            if not current.energy.graph.is_untied:  # a vector field has no such eigenvalue
                self.memory.strongest = max(self.memory.coupling, self.memory.strongest - 0.01)

    def unrolled(self, energy: Energy, point: Point, start: Start, steps: int) -> tuple[Iterate, Tensor]:
        if energy.nudge is None:
            free = Relaxed(energy, point, None, self.memory)  # the cost says when to stop
            for _ in range(steps):
                free.sweep(self.factor)
            for name in free.sizes:
                free.measure(name)
            return Iterate(free.ones, free.point, state=free), free.ones.unsqueeze(0)
        if not has_constant_jacobians(energy, point):
            raise ArgumentError("the Jacobians of this Hopfield network change with its states")
        nudged, course = Displacement(energy, point, decides=False), list[Tensor]()
        # Where the output has no minimum no example has settled, as `has_minimum` has it without a program.
        has_none = torch.as_tensor(nudged.curvature <= -1).any()
        for _ in range(steps):
            nudged.sweep(self.factor)
            course.append((nudged.worst() if self.adaptive else nudged.residual()).masked_fill(has_none, 1))
        if not self.adaptive:  # else what has not settled is not used
            course[-1] = nudged.bounded(course[-1], self.tolerance)
        return Iterate(course[-1], nudged.point, state=nudged), torch.stack(course)

    def needs_eager_step(self) -> bool:
        return self.memory.batches % _EAGER_EVERY == 0

    def count_compiled_step(self) -> None:
        self.memory.batches += 1

    def diagnosis(self) -> tuple[float | None, float | None]:
        return self.memory.inside, self.memory.coupling

    def state_dict(self) -> dict[str, Any]:
        return self.memory.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.memory.load_state_dict(state)

    def for_field(self) -> Solver:
        """With omega = 1 where none is named: which is best is known of symmetric couplings alone."""
        return replace(self, omega=1.0, memory=Memory()) if self.omega is None else self

    def for_free_phase(self) -> Solver:
        """The same: its free phase is measured in units of the nudge, too."""
        return self

    def failure_hint(self, energy: Energy, point: Point) -> str:
        dtype = energy.output(point).dtype
        if accurate(energy.output(point)) is not dtype:
            return f"float32, or a larger tol: the states are {dtype}, whose rounding counts in the residuals."
        return (
            "smaller weights (a smaller learning rate, weight decay, mep.smep with a smaller gamma): strong couplings "
            "have several equilibria; or more settle_steps."
        )


class FreePoint(Point):
    """Where a free phase has ended: `arriving`, the messages of the children; `left`, the norms of what is left."""

    arriving: dict[str, Tensor]
    left: dict[str, Tensor]
    graph: Graph

    def forces(self) -> State:
        """dE/ds of every state."""
        found = {}
        for name, mu in self.predictions.items():
            pull = mu + self.arriving[name] if name in self.arriving else mu
            found[name] = self.graph.by_name[name].potential.force(self.values[name], pull)
        return found


class Relaxed:
    """States that are relaxed themselves: the free phase, and nudged ones of graphs whose Jacobians change."""

    def __init__(self, energy: Energy, point: Point, cost: BatchCost | None, memory: Memory):
        self.energy, self.cost, self.memory = energy, cost, memory
        self.sweeps, self.due, self.diverging = 0, 0, False
        self.totals: list[float] = []
        self.is_free, self.has_minimum = energy.nudge is None, True
        output = energy.output(point)
        dtype = torch.promote_types(output.dtype, torch.float32)
        self.ones = torch.ones(energy.batch, dtype=dtype, device=output.device)
        self.drawn: State = {}
        """The pulls at which states were placed, where these are not the states themselves."""
        self._arrive(point)
        self.sizes: State = {}
        """Of the states that a sweep may move, as they were first."""
        for node in energy.graph.states:
            if node.name in self.arriving or not node.clamped:
                self.sizes[node.name] = example_norm(point.values[node.name], energy.batch)
        if self.is_free and cost is not None and not memory.gains:
            # Displacements may be much smaller than states: the first time a quarter of those by backpropagation.
            size = example_norm(cost.gradient(output), energy.batch)
            for name, moved in energy.backpropagated(point, cost.gradient(output)).items():
                memory.note_gain(name, example_norm(moved, energy.batch) / 4, size)

    @property
    def point(self) -> Point:
        """Where the states are."""
        found = FreePoint(self._point.values, self._point.predictions, self._point.saved)
        found.arriving, found.left, found.graph = self.arriving, self.left, self.energy.graph
        return found

    def sweep(self, omega: float) -> None:
        """Place the layers in turn, from the messages that arrived before."""
        energy, arriving, before = self.energy, self.arriving, self._point.values
        if self.is_free and self.sweeps < _WINNERS_MOVE:
            energy.context.branches.clear()  # those of the last evaluation are kept

        def place(node: Node, mu: Tensor) -> Tensor:
            name = node.name
            s, message, free = before[name], arriving.get(name), energy.free_of(name)
            pull = mu if message is None else mu + message
            if free is not None:
                pull = pull + free.leftover
            is_nudged = name == energy.graph.output and not self.is_free
            if is_nudged or (omega != 1 and name in self.sizes):
                old = self.drawn[name] if name in self.drawn else node.potential.inverse(s)
                pull = self._nudged(node, pull, s, old) if is_nudged else pull
                pull = torch.lerp(old, pull, omega) if omega != 1 and name in self.sizes else pull
            if not node.potential.is_identity:
                self.drawn[name] = pull
            return energy.respond(node, pull)

        self._arrive(energy.graph.evaluate(energy.inputs, energy.context, place))
        self.sweeps += 1

    def residual(self) -> Tensor:
        """Of the worst layer of every example; in a free phase in units of the nudge that follows: [batch]."""
        energy = self.energy
        if not self.is_free:
            found = torch.stack(list(energy.residuals(self._point).values())).amax(0)
            self.diverging = bool((found.isnan()).any())
            return found
        worst, size = None, None
        if self.cost is not None:  # what displacements are like, over the share of what is left that counts
            size = example_norm(self.cost.gradient(energy.output(self._point)), energy.batch)
            smoothness = self.cost.smoothness
            size = size if smoothness is None else size / smoothness
        for name in self.sizes:
            gain = self.memory.gains.get(name)
            if self.sweeps < 3 or gain is None:
                self.sizes[name] = example_norm(self._point.values[name], energy.batch)
            left = self.measure(name)
            unit = self.sizes[name] / _BY_STATE if size is None or gain is None else size * gain.to(size)
            ratio = left / unit.mul_(_FREE_SHARE).add_(torch.finfo(unit.dtype).tiny)
            ratio = ratio.clamp_(max=1 / torch.finfo(ratio.dtype).eps)
            worst = ratio if worst is None else torch.maximum(worst, ratio)
        worst = self.ones - 1 if worst is None else worst
        if self.sweeps > _PATIENT:
            for name, size in self.sizes.items():
                if name == energy.graph.output or energy.graph.by_name[name].potential.is_bounded:
                    continue  # states in a box cannot run away, and neither can an output that reads such states
                grown = example_norm(self._point.values[name], energy.batch) > _GROWTH * (size + size.mean())
                self.diverging |= bool(grown.any())
        return worst

    def measure(self, name: str) -> Tensor:
        """How far one state of the free phase is from where it is drawn, beyond rounding: [batch], kept in `left`."""
        s, mu, message = self._point.values[name], self._point.predictions[name], self.arriving.get(name)
        gap = self.energy.respond(self.energy.graph.by_name[name], mu if message is None else mu + message) - s
        left = example_norm(gap, self.energy.batch).sub_(self.sizes[name], alpha=self._rounding(name)).clamp_(min=0)
        self.left[name] = left
        return left

    def _rounding(self, name: str) -> float:
        return _ROUNDING * torch.finfo(self._point.values[name].dtype).eps

    def note(self, memory: Memory) -> None:
        """How many sweeps were needed; a prediction, which has no cost, changes nothing for the steps of training."""
        if self.is_free and self.cost is not None:
            memory.free_from = _look_from(self.sweeps)

    def _arrive(self, point: Point) -> None:
        """The messages of all children at a point."""
        self._point, self.arriving = point, _to_parents(self.energy, point, point.values)
        self.left: State = {}

    def _nudged(self, node: Node, pull: Tensor, s: Tensor, old: Tensor) -> Tensor:
        """The output's minimum, `v + beta dC/ds(f(v)) = pull`, by a step with the cost's curvature from v = old."""
        energy = self.energy
        assert energy.nudge is not None
        gradient = energy.nudge.cost.gradient(s)
        curvature = cost_curvature(energy, s, gradient) * node.potential.steepest
        return (pull + curvature * old - gradient * expand_beta(energy.beta, s)) / (1 + curvature)


class Displacement:
    """The displacements `delta` of a nudged phase, where no Jacobian changes: relaxed from none at all.

    `tangents` are how far values move by them, over beta, `dmu` predictions, and `inputs` what weights are applied to.
    `arriving` are the messages of the children, `J_c^T delta_c`. One that is compiled `decides` nothing by a number.
    """

    def __init__(self, energy: Energy, free: Point, decides: bool = True):
        assert energy.nudge is not None and energy.nudge.free is not None
        self.energy, self.free, self.cost = energy, free, energy.nudge.cost
        output = energy.output(free)
        self.dtype = torch.promote_types(output.dtype, torch.float32)
        self.ones = torch.ones(energy.batch, dtype=self.dtype, device=output.device)
        self.gradient = self.cost.gradient(output)  # dC/ds where the output is now
        self.free_gradient = self.gradient
        steepest = energy.graph.by_name[energy.graph.output].potential.steepest
        self.curvature = cost_curvature(energy, output, self.gradient) * steepest
        self.decides, self.has_minimum = decides, True
        """Over the output alone: not where the nudge leads away from the target by more than the energy holds back."""
        if is_complex(energy.beta):
            self.gradient = self.gradient.to(self.gradient.dtype.to_complex())
        elif decides and isinstance(self.cost, SquaredError):
            self.has_minimum = bool(torch.as_tensor(self.curvature > -1).all())
        self.delta: State = {}
        self.drawn: State = {}
        """What states were drawn to, over beta, where that is not the displacement itself."""
        self.dmu: State = {}
        self.tangents: State = {}
        self.inputs: dict[str, Any] = {}
        self.arriving: State = {}
        self.first: State = {}
        self.sizes: State = {}
        self.sweeps, self.due, self.diverging, self.is_measured = 0, 0, False, False
        self.totals: list[float] = []
        share = energy.free_share / torch.as_tensor(energy.beta).abs()
        left: Mapping[str, Tensor] = free.left if isinstance(free, FreePoint) else {}
        self.left = {name: norm * share for name, norm in left.items()}
        self.rounded = None if output.dtype is self.dtype else rounding_share(energy, output, self.gradient)

    @property
    def point(self) -> Displaced:
        """Where the states are."""
        return Displaced(self)

    def sweep(self, omega: float) -> None:
        """Every layer is minimised given its neighbours, the output first; then what the displacements lead to."""
        delta, dmu, arriving = self.delta, self.dmu, self.arriving
        before, output = dict(delta), self.energy.graph.output
        if self.sweeps == 1:
            self.first = before
        arriving.clear()

        def transmit(node: Node, force: Tensor | None) -> Tensor | None:
            name = node.name
            if not node.owns_state:
                return force
            if force is not None:
                arriving[name] = force
            pull = _sum(dmu.get(name), force)
            old = before.get(name) if node.potential.is_identity else self.drawn.get(name)
            if name == output:
                pull = self._nudged(pull, old)
            if pull is None:
                return None
            pull = self._with_excess(name, pull)
            if old is not None and omega != 1:
                pull = torch.lerp(old, pull, omega)
            if not node.potential.is_identity:
                self.drawn[name] = pull
            delta[name] = self._hold(node, pull)
            return delta[name]

        self.energy.graph.vjp(self.free.saved, None, transmit)
        self._move()
        self.gradient = self.cost.gradient(self._output(delta[output]))
        self.sweeps += 1

    def residuals(self, sizes: State | None = None) -> State:
        """Of every layer: `Energy.residuals` of the point, from the displacements; their `sizes` are filled in."""
        sizes = {} if sizes is None else sizes
        found, output = {}, self.energy.graph.output
        for node in self.energy.graph.states:
            name = node.name
            if (side := self.delta.get(name)) is None:
                found[name] = self.ones if name == output else torch.zeros_like(self.ones)
                continue
            pull = _sum(self.dmu.get(name), self.arriving.get(name))
            if name == output:
                pull = -self.gradient if pull is None else pull - self.gradient
            assert pull is not None
            other = self._hold(node, self._with_excess(name, pull))
            violated, one, two = (example_norm(t, self.energy.batch) for t in (side - other, side, other))
            sizes[name] = one
            larger = torch.maximum(one, two)
            left = self.left.get(name)
            if left is not None:
                violated, larger = violated + left, larger + left
            violated = violated.div_(larger.add_(torch.finfo(larger.dtype).tiny))
            if self.rounded is not None:
                violated = violated + self.rounded
            found[name] = violated.masked_fill_((one == 0) & (two == 0), 0)  # nothing acts on units that may move
        return found

    def worst(self) -> Tensor:
        """The residual of the worst layer of every example, [batch]."""
        found = list(self.residuals(self.sizes).values())
        return found[0] if len(found) == 1 else torch.stack(found).amax(0)

    def residual(self) -> Tensor:
        """The same, after examples whose displacements run away were given up."""
        worst = self.worst()
        if not self.has_minimum:
            return self.ones
        # At complex betas some functions have poles, and others grow as exp: that may be at once.
        early = self.sweeps <= _PATIENT and not (is_complex(self.energy.beta) and not worst.isfinite().all())
        return worst if early else self.without_runaways(worst, _RUNAWAY)

    def bounded(self, residual: Tensor, tol: float) -> Tensor:
        """The residuals, after examples that have not settled were given up if they have grown much."""
        unsettled = ~(residual <= tol)
        if not self.first or (self.decides and not unsettled.any()):
            return residual
        return self.without_runaways(residual, _UNSETTLED, unsettled)

    def note(self, memory: Memory) -> None:
        """How many sweeps were needed, and how large displacements were."""
        if not self.sweeps:
            return
        memory.nudged_from = max(1, _look_from(self.sweeps))
        size = example_norm(self.free_gradient, self.energy.batch)
        for name in self.left:
            memory.note_gain(name, self.sizes[name], size)

    def contrast(self, weight: float, nodes: Sequence[Node]) -> dict[Any, Tensor]:
        """`weight (dE/dtheta(s_beta) - dE/dtheta(s_free)) / beta` of these nodes, without a small difference."""
        total: dict[Any, Tensor] = {}
        values = self.point.values
        for node in nodes:
            if not node.parameters:
                continue
            saved, name = self.free.saved[node.name], node.name
            delta = self.delta.get(name)
            delta = torch.zeros_like(self.free.values[name]) if delta is None else delta
            pairs = [node.param_vjp(saved, delta, -weight)]
            if self.inputs.get(name) is not None:
                pairs.append(node.param_vjp_along(saved, self.inputs[name], values[name], -weight))
            for found in pairs:
                for p, g in zip(node.parameters, found, strict=True):
                    if g is not None:
                        total[p] = total[p].add_(g) if p in total else g
        return total

    def inside(self) -> float:
        """The fraction of states behind activations that are inside their boxes; 1 if there are none."""
        count, every = 0, 0
        for node in self.energy.graph.states:
            inside = node.potential.inside(self.free.values[node.name])
            if inside is not None:
                count, every = count + int(inside.sum()), every + inside.numel()
        return count / every if every else 1.0

    def coupling(self) -> float:
        """The largest eigenvalue of the coupling f' W, faces held, of any example, by `v <- f' W v` from delta.

        f' W is symmetric in the inner product of 1/f', in which `|v|^2 = <q, v>` for `v = f' q`.
        """
        v, batch, largest = {n: t.real for n, t in self.delta.items()}, self.energy.batch, self.ones
        size = _size(v, batch)
        for _ in range(_POWER_ITERATIONS):
            unit = {n: t / per_example(size, t).to(t.dtype) for n, t in v.items()}
            arriving, (_, dmu, _) = _to_parents(self.energy, self.free, unit), self._follow(unit)
            v, squares = {}, []
            for node in self.energy.graph.states:
                if (pull := _sum(dmu.get(node.name), arriving.get(node.name))) is not None:
                    s = self.free.values[node.name]
                    v[node.name] = node.potential.slope(s, node.potential.hold(s, pull))
                    squares.append(example_dot(pull, v[node.name], batch))
            if not v:
                return 0.0
            largest = torch.stack(squares).sum(0).sqrt()
            size = largest.clamp(min=torch.finfo(largest.dtype).tiny)
        return float(largest.nan_to_num(0.0).max())

    def _move(self) -> None:
        """How far all that follows moves with the displacements."""
        self.tangents, self.dmu, self.inputs = self._follow(self.delta)

    def _follow(self, delta: State) -> tuple[State, State, dict[str, Any]]:
        """How far all values, predictions, and what weights are applied to move, when states move by `delta`."""
        tangents: State = {}
        dmu: State = {}
        inputs: dict[str, Any] = {}
        for node in self.energy.graph.nodes:
            name, t = node.name, None
            if not node.clamped:
                t, inputs[name] = node.jvp(self.free.saved[name], [tangents.get(p) for p in node.parents])
            if node.owns_state:
                if t is not None:
                    dmu[name] = t
                t = delta.get(name)
            if t is not None:
                tangents[name] = t
        return tangents, dmu, inputs

    def _hold(self, node: Node, pull: Tensor) -> Tensor:
        """How far a pull displaces a state: not at all on a face of its box, as far elsewhere; or in the box itself."""
        s = self.free.values[node.name]
        beta = expand_beta(self.energy.beta, s)
        return node.potential.displacement(s, pull, beta, self.energy.context.freeze_branches)

    def _with_excess(self, name: str, pull: Tensor) -> Tensor:
        excess = self._excess.get(name)
        return pull if excess is None else pull + excess

    @cached_property
    def _excess(self) -> State:
        """Where faces are not held: the outward pull, over beta, on units on a face of the free equilibrium."""
        if self.energy.context.freeze_branches:
            return {}
        assert isinstance(self.free, FreePoint) and self.energy.nudge is not None and self.energy.nudge.free is not None
        forces, noted = self.free.forces(), self.energy.nudge.free
        names = [node.name for node in self.energy.graph.states if node.box != FREE]
        return {n: (noted[n].leftover - forces[n]) / expand_beta(self.energy.beta, forces[n]) for n in names}

    def _nudged(self, pull: Tensor | None, old: Tensor | None) -> Tensor:
        """The minimum over the output, `delta + dC/ds(s + beta delta) = pull`: a step with the cost's curvature."""
        right = -self.gradient if pull is None else pull - self.gradient
        if old is not None:
            right = right + self.curvature * old
        return right / (1 + self.curvature) if self.has_minimum else right

    def _output(self, delta: Tensor | None) -> Tensor:
        """The output, displaced."""
        s = self.energy.output(self.free)
        if delta is None:
            return s
        potential = self.energy.graph.by_name[self.energy.graph.output].potential
        moved = s + delta * expand_beta(self.energy.beta, delta)
        return moved if moved.is_complex() else potential.within(moved)

    def without_runaways(self, residual: Tensor, limit: float, among: Tensor | None = None) -> Tensor:
        """Examples whose displacements have grown beyond a limit are given up: back to those of the first sweep.

        At complex betas these may be infinite; then back to none.
        """
        self.first = self.first or dict(self.delta)
        now = torch.stack([self.sizes[name] for name in self.first]).norm(dim=0)
        grown = ~(now <= limit * _size(self.first, self.energy.batch))
        grown = grown if among is None else grown & among
        if self.decides and not grown.any():
            return residual
        for name, first in self.first.items():
            first = first if not is_complex(self.energy.beta) else torch.where(first.isfinite(), first, 0)
            self.delta[name] = torch.where(per_example(grown, first), first, self.delta[name])
        self.drawn.clear()
        self._move()
        self.gradient = self.cost.gradient(self._output(self.delta[self.energy.graph.output]))
        return residual.masked_fill(grown, 1.0)


class Displaced(Point):
    """A nudged point: the free one and the displacements from it. Its values are computed when they are first read."""

    def __init__(self, displacement: Displacement):
        self.saved, self.displacement = displacement.free.saved, displacement

    def __getattr__(self, name: str) -> Any:
        by: Displacement = self.__dict__["displacement"]
        if name not in ("values", "predictions"):
            raise AttributeError(name)
        before, moves = (by.free.values, by.tangents) if name == "values" else (by.free.predictions, by.dmu)
        found = {n: _moved(value, moves.get(n), by.energy.beta) for n, value in before.items()}
        if name == "values" and not is_complex(by.energy.beta):
            found |= {n.name: n.potential.within(found[n.name]) for n in by.energy.graph.states}
        setattr(self, name, found)
        return found


def _moved(value: Any, tangent: Tensor | None, beta: Beta) -> Any:
    return value if tangent is None else value + tangent * expand_beta(beta, tangent)


def _size(state: State, batch: int) -> Tensor:
    """The norm of all states of an example together, [batch], never zero."""
    size = torch.stack([example_norm(t, batch) for t in state.values()]).norm(dim=0)
    return size.clamp_(min=torch.finfo(size.dtype).tiny)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def cost_curvature(energy: Energy, output: Tensor, gradient: Tensor) -> Beta:
    """beta times the largest curvature of the cost at the output, exact for the squared error; 0 to go without it."""
    assert energy.nudge is not None
    beta, cost = energy.beta, energy.nudge.cost
    smoothness = cost.smoothness
    if smoothness is None:  # measured along the gradient
        size = example_norm(gradient, energy.batch)
        step = 0.01 / size.clamp(min=torch.finfo(size.dtype).eps)
        near = cost.gradient(output - gradient * per_example(step, gradient).to(gradient.dtype))
        smoothness = (example_norm(near - gradient, energy.batch) / (step * size)).nan_to_num(0.0).max()
    curvature = beta * smoothness
    if not isinstance(cost, SquaredError):  # a step with the least curvature that there may be would be too long
        if isinstance(curvature, Tensor):
            curvature = torch.where(curvature.real < 0, 0, curvature)
        else:
            curvature = max(curvature, 0.0)
    return expand_beta(curvature, output)


def rounding_share(energy: Energy, output: Tensor, gradient: Tensor) -> Tensor:
    """How far displacements may be off by rounding, relatively, in dtypes with few digits: [batch].

    By their own rounding, and by that of the output, which changes dC/ds by up to the cost's smoothness times as much:
    as many units in the last place as the free phase leaves.
    """
    assert energy.nudge is not None
    smoothness = energy.nudge.cost.smoothness
    size = example_norm(gradient, energy.batch).clamp(min=torch.finfo(torch.float32).tiny)
    share = rounding(output, energy.batch) / size
    share = share if smoothness is None else share * smoothness
    return _ROUNDING * (torch.finfo(output.dtype).eps + share)


def is_complex(beta: Beta) -> bool:
    """Whether a nudge is that of a phase of a holomorphic contrast."""
    return isinstance(beta, Tensor) and beta.is_complex()


def _is_stuck(totals: list[float], residual: Tensor, tol: float) -> bool:
    """Whether the residuals that exceed tol have hardly fallen since four measurements ago."""
    totals.append(float(residual.clamp(min=tol).log().sum()))
    return len(totals) > 4 and not totals[-1] < totals[-5] - 0.05


def _look_from(sweeps: int) -> int:
    """From which sweep on residuals are measured, where so many were needed last."""
    return max(0, sweeps - 1) if sweeps < 5 else 2 * sweeps // 3


_CONSTANT: WeakKeyDictionary[Graph, bool] = WeakKeyDictionary()


def has_constant_jacobians(energy: Energy, point: Point) -> bool:
    """Whether predictions are affine in the states while branches are held; nodes without a closed form are tried."""
    graph = energy.graph
    kinked = any(op.piece is not None for node in graph.nodes if not node.clamped for op in node.program)
    if kinked and not energy.context.freeze_branches:
        return False
    if graph not in _CONSTANT:
        _CONSTANT[graph] = all(n.clamped or n.is_affine_when_held or _is_affine(n, energy, point) for n in graph.nodes)
    return _CONSTANT[graph]


def _is_affine(node: Node, energy: Energy, point: Point) -> bool:
    """Whether equal steps of the parents lead to equal steps of the prediction."""
    if node.writes:
        return False
    parents = [point.values[p] for p in node.parents]
    ways = [_pattern(p) if flows else None for p, flows in zip(parents, node.flows, strict=True)]

    def at(t: float) -> Tensor:
        moved = [p if way is None else p + t * way for p, way in zip(parents, ways, strict=True)]
        return node.predict(moved, energy.context)[0]

    zero, one, two = at(0.0), at(1.0), at(2.0)
    bend = (two - 2 * one + zero).abs().max()
    return bool(bend <= 100 * torch.finfo(zero.dtype).eps * torch.stack([zero, one, two]).abs().max())


def _pattern(like: Tensor) -> Tensor:
    """Numbers of the size of a tensor's, in no particular order, and without a random number generator."""
    waves = torch.arange(like.numel(), device=like.device).mul(1.7).cos().to(like.dtype)
    return waves.view(like.shape) * (1 + like.abs())


def _to_parents(energy: Energy, point: Point, sent: Mapping[str, Any]) -> State:
    """`sum_c J_c^T sent[c]` over the children c, for each state at which something arrives."""
    arriving: State = {}

    def transmit(node: Node, force: Tensor | None) -> Tensor | None:
        if not node.owns_state:
            return force
        if force is not None:
            arriving[node.name] = force
        return sent.get(node.name)

    energy.graph.vjp(point.saved, None, transmit)
    return arriving
