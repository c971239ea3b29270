"""Sweeps in error form: the fast way to the nudged equilibrium of the prediction energy.

With the scaled errors `delta_n = (mu_n - s_n) / beta`, the equilibrium reads

    s_n = mu_n - beta delta_n                                 walk forward, injecting the errors
    delta_out = dC/ds_out,   delta_n = sum_c J_c^T delta_c    walk backward, collecting new ones

A **sweep** is one backward and one forward walk. For beta -> 0 the first sweep's errors are those of backpropagation:
that is equilibrium propagation's theorem. At any finite beta the two differ, and the residual says whether the states
have followed the errors. The map contracts like `beta |sum_n A_n A_n^T|` with `A_n = ds_out / ds_n`; where that is not
small, the output error is mixed over the sweeps (`anderson.py`). It is the only unknown: given `delta_out` and the
Jacobians, one backward walk makes every other error consistent.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mep.activations import Activation
from mep.energy import Energy, State, example_norm, per_example, relative_residual
from mep.errors import ArgumentError
from mep.graph import Point
from mep.nodes import Node
from mep.settle import Iterate, Solver
from mep.solvers import kinks
from mep.solvers.anderson import mix
from mep.solvers.secant import solve_output

Behind = dict[str, tuple[Tensor, Activation]]
"""State -> what pulls on it through a kink, and the activation that has it."""

_EXPANDS = 4.0
"""Mixing still finds the equilibrium of a map that expands by a few; beyond, a smaller beta is cheaper."""


@dataclass(frozen=True)
class Sweep(Solver):
    """Backward and forward walks in error form, with Anderson mixing on the output error.

    Args:
        settle_steps: the largest number of sweeps, or with `adaptive=False` the exact one.
        tol: relative residual at which an example has settled.
        patience: consecutive sweeps at or below `tol`.
        adaptive: stop when every example has settled.
        history: how many sweeps the next output error is inferred from; 0 is plain iteration.

    Only for `energy="prediction"`. When the equilibrium is out of reach the estimator tries a smaller beta.

    Example:
        >>> Sweep(tol=1e-3).settle_steps
        30
    """

    settle_steps: int = 30
    tol: float = 1e-2
    patience: int = 1
    adaptive: bool = True
    history: int = 4

    beta_limited = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.history, int) and self.history >= 0):
            raise ArgumentError(f"Sweep(history={self.history!r}): must be an integer >= 0.")

    def start(self, energy: Energy, point: Point) -> Iterate:
        """The free equilibrium: every error is zero and the nudge unanswered."""
        if energy.coupling.name != "prediction":
            raise ArgumentError(
                f"Sweep settles the energy 'prediction' only, not {energy.coupling.name!r}: it works with the errors "
                "mu - s. Use solver=mep.Descent(...)."
            )
        unanswered = energy.output(point).new_ones(energy.batch)
        return Iterate(point, unanswered, memory=_Memory(_wanted(energy, point), {}, free=point))

    def advance(self, energy: Energy, iterate: Iterate, active: Tensor | None) -> Iterate:
        """One sweep."""
        memory: _Memory = iterate.memory
        target = self._next_output_error(energy, iterate, active)
        sent, resting = _walk_back(energy, iterate.point, target, memory, active)
        point, errors = _walk_forward(energy, sent, resting)
        wanted = _wanted(energy, point)
        residual = _output_residual(energy, point, errors, wanted)
        trial = torch.stack([sent[energy.graph.output], energy.output(point), wanted]).unsqueeze(1)
        history = trial if memory.history is None else torch.cat([memory.history, trial], 1)[:, -self.history or None :]
        now = _Memory(wanted, sent, memory.free, resting, history, memory.sweeps + 1)
        moved = Iterate(point, residual, errors, memory=now)
        if memory.sweeps == 0 and self.adaptive:
            moved.out_of_reach = _expands(target, wanted, energy.batch)
        return self.certify(energy, moved) if not energy.is_affine and float(residual.min()) <= self.tol else moved

    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def _next_output_error(self, energy: Energy, iterate: Iterate, active: Tensor | None) -> Tensor:
        """What the next backward walk starts from; the examples that are not active are left out of the reckoning."""
        memory: _Memory = iterate.memory
        if memory.history is None or not self.history:
            return memory.wanted
        free, nudge = energy.output(memory.free), energy.nudge
        assert nudge is not None
        target = nudge.target
        trials = memory.history
        if active is not None:
            rows = active.nonzero().squeeze(1)
            trials, free, target = trials[:, :, rows], free[rows], target[rows]
        if torch.finfo(trials.dtype).bits < 32:  # small systems are solved in float32
            trials, free, target = trials.float(), free.float(), _widened(target)
        errors, outputs, gradients = trials
        if nudge.cost.curvature(free, target, gradients[-1]) is None:
            found = mix(list(zip(errors[:-1], gradients[:-1], strict=True)), errors[-1], gradients[-1])
        else:
            tried, shifts = errors.transpose(0, 1), (free - outputs).transpose(0, 1)
            found = solve_output(nudge.cost, target, free, tried, shifts, gradients[-1])
        found = found.to(memory.wanted.dtype)
        return found if active is None else memory.sent[energy.graph.output].index_copy(0, rows, found)

    def certify(self, energy: Energy, iterate: Iterate) -> Iterate:
        """Measure every node: one more backward walk, with the errors that the states really have.

        While the branches of a piecewise-linear network are held its Jacobians do not change: every node but the
        output stays balanced, and there is nothing more to measure.
        """
        if iterate.memory.sweeps == 0 or energy.is_affine:
            return iterate
        assert iterate.errors is not None
        found = _residuals(energy, iterate.point, iterate.errors, iterate.memory.wanted)
        return replace(iterate, residual=torch.stack(list(found.values())).amax(0))


@dataclass(frozen=True)
class _Memory:
    """`wanted`: dC/ds_out at the point; `sent`: the errors that the last backward walk handed down.

    `history`: output error, output and dC/ds_out of the last sweeps, [3, sweeps, batch, ...], oldest first.
    `resting` holds, for every state before a kink, the kink at which a unit rests, NaN where it rests at none.
    """

    wanted: Tensor
    sent: State
    free: Point
    resting: State = field(default_factory=dict)
    history: Tensor | None = None
    sweeps: int = 0


def _widened(target: Tensor) -> Tensor:
    return target.float() if target.is_floating_point() else target


def _wanted(energy: Energy, point: Point) -> Tensor:
    gradient = energy.cost_gradient(point)
    assert gradient is not None, "the free equilibrium of the prediction energy is the forward walk"
    return gradient


def _expands(delta: Tensor, wanted: Tensor, batch: int) -> bool:
    """Whether the first sweep's answer is much larger than its question, for some example: beta |K| is too large.

    An example that asks next to nothing may be disturbed by others that it shares statistics with.
    """
    question = example_norm(delta, batch)
    return bool((example_norm(wanted - delta, batch) > _EXPANDS * torch.maximum(question, question.mean())).any())


def _walk_back(
    energy: Energy, point: Point, target: Tensor, memory: _Memory, active: Tensor | None
) -> tuple[State, State]:
    """New errors for every node, from the output's; and where units come to rest at a kink.

    Examples that are not active keep theirs. If the Jacobians are constant that follows from their output error.
    """
    sent: State = {}
    resting: State = {}
    behind_kink: Behind = {}
    output = energy.graph.output
    consistent = active is None or energy.is_affine

    def transmit(node: Node, force: Tensor | None) -> Tensor | None:
        if _is_stopped_at_kink(energy, node, force, behind_kink):
            return None
        if not node.owns_state:
            return force
        name, mu = node.name, point.predictions[node.name]
        delta = target if name == output else torch.zeros_like(mu) if force is None else force
        if name in behind_kink:
            u, activation = behind_kink[name]
            delta, rest = kinks.relax(mu, delta, u, energy.beta, activation, memory.free.values[name])
            delta = kinks.damp(node, delta, memory.sent.get(name), rest)
            resting[name] = rest if consistent else _keep(rest, memory.resting[name], active)
        follows = consistent and (active is None or name != output)
        sent[name] = delta if follows else _keep(delta, memory.sent[name], active)
        return sent[name]

    energy.graph.pull(point, None, transmit)
    return sent, resting


def _walk_forward(energy: Energy, sent: State, resting: State) -> tuple[Point, State]:
    """The states that follow the errors, and the errors that they then really have."""
    errors = dict(sent)
    beta = energy.beta

    def place(node: Node, mu: Tensor) -> Tensor:
        s = torch.add(mu, sent[node.name], alpha=-beta)
        if node.name in resting:
            rest = resting[node.name]
            s = torch.where(rest.isnan(), s, rest)
            errors[node.name] = torch.where(rest.isnan(), sent[node.name], (mu - rest) / beta)
        return s

    return energy.graph.evaluate(energy.inputs, energy.held, place), errors


def _output_residual(energy: Energy, point: Point, errors: State, wanted: Tensor) -> Tensor:
    """As `relative_residual`; a cost gradient that cannot be told from the rounding of the output counts as zero."""
    delta, output = errors[energy.graph.output], energy.output(point)
    rows = torch.stack([delta - wanted, delta, wanted, output]).reshape(4, energy.batch, -1)
    violated, one, two, size = torch.linalg.vector_norm(rows, dim=2)
    limits = torch.finfo(output.dtype)
    return violated / torch.maximum(torch.maximum(one, two), size.mul_(10 * limits.eps)).add_(limits.tiny)


def _residuals(energy: Energy, point: Point, errors: State, wanted: Tensor) -> State:
    """The relative residual of every node; at a kink, how far zero is from the subdifferential."""
    found: State = {}
    behind_kink: Behind = {}

    def transmit(node: Node, force: Tensor | None) -> Tensor | None:
        if _is_stopped_at_kink(energy, node, force, behind_kink):
            return None
        if not node.owns_state:
            return force
        name, s, delta = node.name, point.values[node.name], errors[node.name]
        if name == energy.graph.output:
            found[name] = _output_residual(energy, point, errors, wanted)
            return delta
        pull = torch.zeros_like(s) if force is None else force
        if name in behind_kink:
            pull = kinks.balancing_pull(s, delta, pull, *behind_kink[name], energy.beta)
        found[name] = relative_residual(delta, pull, s, energy.batch)
        return delta

    energy.graph.pull(point, None, transmit)
    return found


def _is_stopped_at_kink(energy: Energy, node: Node, force: Tensor | None, behind_kink: Behind) -> bool:
    """Whether a node is a kink: what passes it, the state before it must decide; its force is laid by for that."""
    activation = energy.kinks.get(node.name)
    if activation is not None and force is not None:
        behind_kink[node.parents[0]] = force, activation
    return activation is not None


def _keep(new: Tensor, old: Tensor, active: Tensor | None) -> Tensor:
    return new if active is None else torch.where(per_example(active, new), new, old)
