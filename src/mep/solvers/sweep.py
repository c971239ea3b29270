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
with it: an example that has not settled takes the best of them before it needs another sweep.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mep.cost import BatchCost
from mep.energy import Energy, per_example
from mep.errors import ArgumentError
from mep.graph import Point
from mep.settle import Iterate, Known, Solver
from mep.solvers.checkpointed import Checkpointed, Forgotten
from mep.solvers.output import (
    expands,
    first_error,
    gain,
    next_error,
    output_residual,
    require_prediction,
    rescaled,
    wanted_error,
)
from mep.solvers.response import Response
from mep.solvers.secant import Trial
from mep.solvers.walks import Walks, worst_residual

_CHEAP = 1 << 23
"""So many multiplications take about as long as the few dozen small operations of one rescaling."""


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

    prediction_only = True
    beta_limited = True
    gives_up = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.history, int) and self.history >= 0):
            raise ArgumentError(f"Sweep(history={self.history!r}): must be an integer >= 0.")

    def start(self, energy: Energy, point: Point, known: Known) -> Iterate:
        """The free equilibrium: every error is zero and the nudge unanswered."""
        require_prediction(self, energy)
        question, free, nudge = wanted_error(energy, point), energy.output(point), energy.nudge
        assert nudge is not None
        first = first_error(energy, free, question, known if self.history else Known())
        kind = Checkpointed if isinstance(point, Forgotten) else Response if energy.is_affine else Walks
        answers = kind(energy, point)
        memory = _Memory(answers, nudge.cost, free, question, first)
        return Iterate(point, free.new_ones(energy.batch), memory=memory)

    def advance(self, energy: Energy, iterate: Iterate, active: Tensor | None) -> Iterate:
        """One sweep."""
        is_first = not iterate.memory.trials
        if active is not None and iterate.memory.narrows:
            iterate, active = replace(iterate, memory=iterate.memory.of(active)), None
        moved = self._swept(energy, iterate, active)
        if is_first:
            memory: _Memory = moved.memory
            x, _, wanted = memory.trials[0]
            moved.out_of_reach = self.adaptive and expands(memory.question, x, wanted, moved.residual)
        if energy.is_affine and float(moved.residual.max()) > self.tol:
            moved = self._rescaled(moved)
        may_have_settled = not energy.is_affine and float(moved.residual.min()) <= self.tol
        return self.certify(energy, moved) if may_have_settled else moved

    def unrolled(
        self, energy: Energy, point: Point, known: Known, sweeps: int, late: int
    ) -> tuple[Iterate, list[Tensor]]:
        """Where so many sweeps of all and `late` ones of the worst examples lead; after each, how many are unsettled.

        Nothing is decided on the way, so that it can be compiled. In graphs that are not affine examples neither rest
        nor are left out, and what is counted on the way are the residuals of the output alone.
        """
        iterate, course = self.start(energy, point, known), list[Tensor]()
        rests = self.adaptive and energy.is_affine
        for sweep in range(sweeps + late):
            if sweep == sweeps and rests and iterate.memory.narrows:
                worst = iterate.residual.topk(few(energy.batch)).indices
                iterate = replace(iterate, memory=iterate.memory.narrowed(worst, worst))
            active = iterate.residual > self.tol if sweep and rests else None
            if active is not None and iterate.memory.rows is not None:
                active = active.index_select(0, iterate.memory.rows)
            iterate = self._rescaled(self._swept(energy, iterate, active))
            course.append((iterate.residual > self.tol).sum())
        return self.certify(energy, iterate), course

    def _swept(self, energy: Energy, iterate: Iterate, active: Tensor | None) -> Iterate:
        """One sweep of the examples in play."""
        memory: _Memory = iterate.memory
        x = self._error(memory, active)
        output = memory.answers.answer(x, memory.rows, active)
        wanted = memory.cost.gradient(output)
        residual = output_residual(x, wanted, output)
        if memory.rows is not None:
            residual = iterate.residual.index_copy(0, memory.rows, residual)
        found = gain(x, memory.free - output, energy.beta) if not memory.trials else iterate.gain
        tried = memory.tried((x, output, wanted), self.history)
        return replace(iterate, residual=residual, memory=tried, gain=found, exact=False)

    def _rescaled(self, iterate: Iterate) -> Iterate:
        """With the errors that are unsettled replaced by the best of their multiples, whose answers need no sweep.

        Not after the first sweep if the next one is cheap anyway: most often some example still needs it.
        """
        memory: _Memory = iterate.memory
        answers, is_first = memory.answers, len(memory.trials) == 1
        if isinstance(answers, Walks) or not self.history or (is_first and answers.work < _CHEAP):
            return iterate
        rows, residual = memory.rows, iterate.residual
        mine = residual if rows is None else residual.index_select(0, rows)
        found = rescaled(memory.cost, memory.free, memory.trials[-1], mine, self.tol)
        if found is None:
            return iterate
        trial, a, left = found
        answers.rescale(a, rows)
        residual = left if rows is None else residual.index_copy(0, rows, left)
        return replace(iterate, residual=residual, memory=replace(memory, trials=(*memory.trials[:-1], trial)))

    def _error(self, memory: _Memory, active: Tensor | None) -> Tensor:
        """What the next backward walk starts from; the examples that are not active keep what they have."""
        if not memory.trials:
            return memory.first
        latest, _, gradient = memory.trials[-1]
        once = not isinstance(memory.answers, Walks)
        wanted = next_error(memory.cost, memory.free, memory.trials, once) if self.history else gradient
        return (
            wanted if active is None or not self.history else torch.where(per_example(active, wanted), wanted, latest)
        )

    def certify(self, energy: Energy, iterate: Iterate) -> Iterate:
        """The point, its errors, and the residual of the worst node.

        Where the Jacobians are constant every node but the output is balanced, and there is nothing more to measure.
        """
        memory: _Memory = iterate.memory
        if not memory.trials:
            return iterate
        answers = memory.answers
        residual = iterate.residual
        if isinstance(answers, Walks) and not iterate.exact:
            residual = worst_residual(energy, answers.point, answers.errors)
        return replace(iterate, point=answers.point, errors=answers.errors, residual=residual, exact=True)


@dataclass(frozen=True)
class _Memory:
    """The examples that are still settling (`rows`, None for all) and all that is known about their outputs.

    `question`: dC/ds at the free output; `first`: the error to begin with; `trials`: those of the last sweeps, oldest
    first.
    """

    answers: Response | Checkpointed | Walks
    cost: BatchCost
    free: Tensor
    question: Tensor
    first: Tensor
    trials: tuple[Trial, ...] = ()
    rows: Tensor | None = None

    @property
    def narrows(self) -> bool:
        """Whether examples that have settled can be left out."""
        return self.answers.narrows and self.cost.narrows and bool(self.trials)

    def of(self, active: Tensor) -> _Memory:
        """The memory of those examples that are active, of those in play."""
        rows = active.nonzero().squeeze(1)
        picked = rows if self.rows is None else active[self.rows].nonzero().squeeze(1)
        return self if len(picked) == len(self.free) else self.narrowed(rows, picked)

    def narrowed(self, rows: Tensor, picked: Tensor) -> _Memory:
        """The memory of these rows, `picked` from those in play."""
        trials = tuple((x[picked], s[picked], g[picked]) for x, s, g in self.trials)
        return replace(self, cost=self.cost.of(picked), free=self.free[picked], trials=trials, rows=rows)

    def tried(self, trial: Trial, history: int) -> _Memory:
        """With one more trial, and without those that are too old."""
        return replace(self, trials=(*self.trials, trial)[-max(history, 1) :])
