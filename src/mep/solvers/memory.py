"""What sweeps remember of the output: which examples are still settling, and how they have answered so far."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mep.cost import BatchCost
from mep.nodes import Strength, of_rows, spread
from mep.solvers.checkpointed import Checkpointed
from mep.solvers.output import is_toward, output_residual
from mep.solvers.response import Response
from mep.solvers.secant import Trial
from mep.solvers.strength import weaker, within_reach
from mep.solvers.walks import Walks

Answers = Response | Checkpointed | Walks

_CHEAP = 1 << 23
"""So many multiplications take about as long as the few dozen small operations of one rescaling."""


@dataclass(frozen=True)
class Memory:
    """The examples that are still settling (`rows`, None for all) and all that is known about their outputs.

    `question`: dC/ds at the free output; `first`: the error to begin with; `trials`: those of the last of so many
    `sweeps`, oldest first; `gains`: the matrices M, once they were asked for.
    """

    answers: Answers
    cost: BatchCost
    free: Tensor
    question: Tensor
    first: Tensor
    trials: tuple[Trial, ...] = ()
    sweeps: int = 0
    rows: Tensor | None = None
    gains: Tensor | None = None

    @property
    def walks(self) -> bool:
        """Whether answers are linear in errors only as long as the states hardly move."""
        return isinstance(self.answers, Walks)

    @property
    def is_dear(self) -> bool:
        """Whether a sweep takes longer than some dozen small operations on the outputs."""
        return not isinstance(self.answers, Walks) and self.answers.work >= _CHEAP

    @property
    def narrows(self) -> bool:
        """Whether examples that have settled can be left out."""
        return self.answers.narrows and self.cost.narrows and bool(self.trials)

    @property
    def beta(self) -> Strength:
        """How strongly the examples in play are nudged."""
        beta = self.answers.energy.beta
        return beta if self.rows is None else of_rows(beta, self.rows)

    @property
    def k(self) -> Tensor | None:
        """`beta M`, where M is known."""
        return None if self.gains is None else self.gains * spread(self.beta, self.gains)

    @property
    def residual(self) -> Tensor:
        """Of the last trial."""
        x, output, wanted = self.trials[-1]
        return output_residual(x, wanted, output)

    @property
    def certainly_within_reach(self) -> Tensor | None:
        """By which factors to weaken nudges away from the target so that there are equilibria; None if there are.

        Beyond, errors may balance too, but at a saddle.
        """
        if is_toward(self.beta) or (k := self.k) is None:
            return None
        return within_reach(self.cost, torch.linalg.eigvalsh(k)[:, 0], 1.0)

    def mine(self, values: Tensor) -> Tensor:
        """Of `[batch]` values those of the examples in play."""
        return values if self.rows is None else values.index_select(0, self.rows)

    def put(self, values: Tensor, mine: Tensor) -> Tensor:
        """`[batch]` values with those of the examples in play."""
        return mine if self.rows is None else values.index_copy(0, self.rows, mine)

    def of(self, active: Tensor) -> Memory:
        """The memory of those examples that are active, of those in play."""
        rows = active.nonzero().squeeze(1)
        picked = rows if self.rows is None else active[self.rows].nonzero().squeeze(1)
        return self if len(picked) == len(self.free) else self.narrowed(rows, picked)

    def narrowed(self, rows: Tensor, picked: Tensor) -> Memory:
        """The memory of these rows, `picked` from those in play."""
        trials = tuple((x[picked], s[picked], g[picked]) for x, s, g in self.trials)
        gains = None if self.gains is None else self.gains[picked]
        return replace(self, cost=self.cost.of(picked), free=self.free[picked], trials=trials, rows=rows, gains=gains)

    def tried(self, trial: Trial, history: int) -> Memory:
        """With one more trial, and without those that are too old."""
        return replace(self, trials=(*self.trials, trial)[-max(history, 1) :], sweeps=self.sweeps + 1)

    def may_know_gains(self, sweeps: int) -> bool:
        """Whether M could be asked for, of all examples within so many sweeps; and what for: the Hessian is known."""
        tells = self.free.ndim == 2 and type(self.cost).curvature is not BatchCost.curvature
        return tells and self.narrows and not self.walks and 1 < self.free.shape[1] <= sweeps

    def knowing_gains(self) -> Memory:
        """With the gains of the examples in play."""
        assert not isinstance(self.answers, Walks)
        rows = torch.arange(len(self.free), device=self.free.device) if self.rows is None else self.rows
        return replace(self, gains=self.answers.gains(rows))

    def weakened(self, factor: Tensor) -> Memory:
        """As if the examples in play had been nudged `factor` ([examples]) times as strongly from the beginning.

        They are taken to answer as a linear network does: then the errors they were given have been tried already.
        """
        answers, rows = self.answers, self.rows
        ones = factor.new_ones(answers.energy.batch)
        answers.energy = weaker(answers.energy, factor if rows is None else ones.index_copy(0, rows, factor))
        return self.retold(factor)

    def retold(self, factor: Tensor) -> Memory:
        """With trials as if nudges had been `factor` times as strong."""
        trials = []
        for x, output, _ in self.trials:
            moved = self.free - spread(factor, output) * (self.free - output)
            trials.append((x, moved, self.cost.gradient(moved)))
        return replace(self, trials=tuple(trials))
