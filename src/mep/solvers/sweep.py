"""Sweeps in error form: the fast way to the nudged equilibrium of the prediction energy.

With the scaled errors `delta_n = (mu_n - s_n) / beta`, the equilibrium reads

    s_n = mu_n - beta delta_n                                 walk forward, injecting the errors
    delta_out = dC/ds_out,   delta_n = sum_c J_c^T delta_c    walk backward, collecting new ones

A **sweep** is one backward and one forward walk. For beta -> 0 the first sweep's errors are those of backpropagation:
that is equilibrium propagation's theorem. At any finite beta the two differ, and the residual says whether the states
have followed the errors.

The output error x is the only unknown: given x and the Jacobians, one backward walk makes every other error consistent.
It solves `x = dC(s_free - beta M x)`, where the gain `M = sum_n A_n A_n^T` (`A_n = ds_out / ds_n`) is known only by how
the network answers (`walks.py` for any graph, `response.py` for affine ones, `checkpointed.py` for these in little
memory). Plain iteration contracts like `beta |M|`. So the first x follows from the mean gain that the last step met,
and each later one from all answers so far (`output.py`). Where answers are linear in x those to its multiples are known
with it: an example that has not settled takes the best of them before it needs another sweep, and one that still has
not is asked for M itself (`newton.py`). Elsewhere it is nudged less (`strength.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mep.energy import Energy
from mep.errors import ArgumentError
from mep.graph import Point
from mep.layout import accurate, per_example
from mep.settle import Iterate, Known, Solver
from mep.solvers.checkpointed import Checkpointed, Forgotten
from mep.solvers.memory import Answers, Memory
from mep.solvers.output import (
    first_error,
    mean_gain,
    next_error,
    require_prediction,
    rescaled,
    solved_error,
    wanted_error,
)
from mep.solvers.response import Response
from mep.solvers.strength import SOON, are_separate, higher, is_late, lower
from mep.solvers.walks import Walks, worst_residual
from mep.solvers.weakening import is_out_of_reach, may_weaken, relieved

_STRONGEST, _GAIN = 0.5, 2.0
"""The usual limits of an example's strength: as it is, and in units of beta."""
_PATIENCE = 4
"""After so many sweeps examples tell their whole gain."""


def few(batch: int) -> int:
    """So many examples of a batch are still settling late, when the others have settled: a quarter."""
    return -(-batch // 4)


@dataclass(frozen=True)
class Sweep(Solver):
    """Backward and forward walks in error form; each output error is inferred from how the last ones were answered.

    Args:
        settle_steps: the largest number of sweeps, or with `adaptive=False` the exact one.
        tol: relative residual at which an example has settled.
        patience: consecutive sweeps at or below `tol`.
        adaptive: stop when every example has settled.
        history: how many sweeps the next output error is inferred from; 0 is plain iteration.
        strength: the largest `beta k L` of an example, with its gain k and the smoothness L of the cost (0.5 for
            cross-entropy, 2 / outputs for squared errors); one that answers more strongly is nudged less. It estimates
            the bias of its gradient. None: 0.5, and no more than `2 beta` for an estimator of that beta, so that an
            example is nudged as asked unless its gain exceeds `2 / L`. `math.inf`: as asked wherever there is an
            equilibrium.

    Only for `energy="prediction"`. Where branches are held and all nodes are affine, the examples that are hard to
    settle tell their whole gain in one of the sweeps; if they have no more outputs than `settle_steps`, a nudge toward
    the target of any strength is within reach. Elsewhere an adaptive sweep nudges an example less where that is what it
    takes to settle.

    Example:
        >>> Sweep(tol=1e-3).settle_steps
        30
    """

    settle_steps: int = 30
    tol: float = 1e-2
    patience: int = 1
    adaptive: bool = True
    history: int = 4
    strength: float | None = None

    usual_beta = 0.01  # errors are carried as such, not as differences of states: little bias, and no digits lost
    prediction_only = True
    beta_limited = True
    gives_up = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.history, int) and self.history >= 0):
            raise ArgumentError(f"Sweep(history={self.history!r}): must be an integer >= 0.")
        if self.strength is not None and not (isinstance(self.strength, (int, float)) and self.strength > 0):
            raise ArgumentError(f"Sweep(strength={self.strength!r}): must be a positive number; math.inf for no limit.")

    def for_beta(self, beta: float) -> Sweep:
        return self if self.strength is not None else replace(self, strength=min(_STRONGEST, _GAIN * beta))

    @property
    def largest(self) -> float:
        """The largest strength."""
        return _STRONGEST if self.strength is None else self.strength

    def start(self, energy: Energy, point: Point, known: Known) -> Iterate:
        """The free equilibrium: every error is zero and the nudge unanswered."""
        return self._start(energy, point, replace(known, most=higher(known.most, self.largest)))

    def _start(self, energy: Energy, point: Point, known: Known) -> Iterate:
        """As `start`, with `known.most` as the largest strength."""
        require_prediction(self, energy)
        question, free, nudge = wanted_error(energy, point), energy.output(point), energy.nudge
        assert nudge is not None and known.most is not None
        weakens = self.adaptive and bool(self.history) and not energy.kinks
        weakens = weakens and (isinstance(point, Forgotten) or are_separate(energy, point))
        most = known.most if weakens else None
        first = first_error(energy, free, question, known, most) if self.history else question
        answers: Answers
        if energy.is_affine:
            kind = Checkpointed if isinstance(point, Forgotten) else Response
            answers = kind(energy, point, most)
        else:
            answers = Walks(energy, point, most, math.isfinite(self.largest))
        memory = Memory(answers, nudge.cost, free, question, first)
        return Iterate(point, free.new_ones(energy.batch, dtype=accurate(free)), most=most, memory=memory)

    def advance(self, energy: Energy, iterate: Iterate, active: Tensor | None) -> Iterate:
        """One sweep."""
        memory: Memory = iterate.memory
        if active is not None and memory.narrows:
            memory, active = memory.of(active), None
        if self._needs_gains(memory):
            memory = memory.knowing_gains()
            if (factor := memory.certainly_within_reach) is not None:
                memory = memory.weakened(factor)
        is_first = not memory.trials
        moved = self._swept(replace(iterate, memory=memory), self._error(memory, active), active)
        if is_first and self.adaptive and not may_weaken(moved):
            moved.out_of_reach = is_out_of_reach(moved)
        if energy.is_affine and moved.worst > self.tol:
            moved = self._rescaled(moved)
        if not energy.is_affine and (moved.memory.sweeps > 1 or float(moved.residual.min()) <= self.tol):
            moved = self.certify(energy, moved)
        if moved.most and moved.memory.sweeps == SOON and is_late(moved.worst, self.tol):
            moved.most = lower(moved.most, self.largest)
        if is_first or not (self.adaptive and self.history):
            return moved
        return relieved(moved, iterate.residual, self.tol, self.settle_steps)

    def unrolled(
        self, energy: Energy, point: Point, known: Known, sweeps: int, late: int
    ) -> tuple[Iterate, list[Tensor]]:
        """Where so many sweeps of all and `late` ones of the worst examples lead; the residuals after each.

        Nothing is decided on the way, so that it can be compiled: `known.gain` and `known.most` are tensors, and who
        stalls is not nudged less. In graphs that are not affine examples neither rest nor are left out, and most of the
        residuals on the way are those of the output.
        """
        iterate, course = self._start(energy, point, known), list[Tensor]()
        rests = self.adaptive and energy.is_affine
        for sweep in range(sweeps + late):
            if sweep == sweeps and rests and iterate.memory.narrows:
                worst = iterate.residual.topk(few(energy.batch)).indices
                iterate = replace(iterate, memory=iterate.memory.narrowed(worst, worst))
            active = iterate.memory.mine(iterate.residual > self.tol) if sweep and rests else None
            iterate = self._swept(iterate, self._error(iterate.memory, active), active)
            iterate = self._rescaled(iterate)
            if sweep + 1 == SOON and iterate.most is not None:
                iterate = self.certify(energy, iterate)  # so that it tells who is late
            course.append(iterate.residual)
        return self.certify(energy, iterate), course

    def _swept(self, iterate: Iterate, x: Tensor, active: Tensor | None) -> Iterate:
        """One sweep of the examples in play, from these output errors."""
        memory: Memory = iterate.memory
        x, output, factor = memory.answers.answer(x, memory.rows, active)
        memory = memory if factor is None else memory.retold(factor)
        found = iterate.gain if memory.trials else mean_gain(x, memory.free - output, memory.beta)
        memory = memory.tried((x, output, memory.cost.gradient(output)), self.history)
        residual = memory.put(iterate.residual, memory.residual)
        return replace(iterate, residual=residual, memory=memory, gain=found, exact=False, weakened=factor is not None)

    def _needs_gains(self, memory: Memory) -> bool:
        """Whether the examples in play have been asked so often that they shall tell their whole gain."""
        asks = self.adaptive and self.history and memory.sweeps >= _PATIENCE
        return bool(asks) and memory.gains is None and memory.may_know_gains(self.settle_steps)

    def _rescaled(self, iterate: Iterate) -> Iterate:
        """With the errors that are unsettled replaced by the best of their multiples, whose answers need no sweep.

        Not after the first sweep if the next one is cheap anyway: most often some example still needs it.
        """
        memory: Memory = iterate.memory
        if isinstance(memory.answers, Walks) or not self.history or not (memory.is_dear or memory.sweeps > 1):
            return iterate
        found = rescaled(memory.cost, memory.free, memory.trials[-1], memory.mine(iterate.residual), self.tol)
        if found is None:
            return iterate
        trial, a, left = found
        memory.answers.rescale(a, memory.rows)
        memory = replace(memory, trials=(*memory.trials[:-1], trial))
        return replace(iterate, residual=memory.put(iterate.residual, left), memory=memory)

    def _error(self, memory: Memory, active: Tensor | None) -> Tensor:
        """What the next backward walk starts from; the examples that are not active keep what they have."""
        if not memory.trials:
            return memory.first
        latest, _, gradient = memory.trials[-1]
        if (k := memory.k) is not None:
            return solved_error(memory.cost, memory.free, k, latest, self.tol)
        wanted = next_error(memory.cost, memory.free, memory.trials, not memory.walks) if self.history else gradient
        if active is None or not self.history:
            return wanted
        return torch.where(per_example(active, wanted), wanted, latest)

    def certify(self, energy: Energy, iterate: Iterate) -> Iterate:
        """The point, its errors, and the residual of the worst node.

        Where the Jacobians are constant every node but the output is balanced, and there is nothing more to measure.
        """
        memory: Memory = iterate.memory
        if not memory.trials:
            return iterate
        answers = memory.answers
        residual = iterate.residual
        if isinstance(answers, Walks) and not iterate.exact:
            residual = worst_residual(answers.energy, answers.point, answers.errors)
        return replace(
            iterate,
            point=answers.point,
            errors=answers.errors,
            residual=residual,
            exact=True,
            energy=answers.energy,
        )
