"""Who is nudged less after a sweep: those that stall. Those that answer too strongly were so by the first answer."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mep.settle import Iterate
from mep.solvers.memory import Memory
from mep.solvers.output import expands, is_toward
from mep.solvers.strength import stalled


def may_weaken(iterate: Iterate) -> bool:
    """Whether some examples may be nudged less than others."""
    return iterate.most is not None and iterate.memory.answers.weakens


def is_out_of_reach(iterate: Iterate) -> bool:
    """Where nobody can be nudged less than others: whether a first answer was so strong that all must be."""
    memory: Memory = iterate.memory
    x, _, wanted = memory.trials[0]
    return expands(memory.question, x, wanted, iterate.residual)


def relieved(iterate: Iterate, before: Tensor, tol: float, sweeps: int) -> Iterate:
    """After a later sweep: with less of a nudge for the examples whose residual has hardly fallen.

    Not while they may be asked for their whole gain, within so many sweeps: it leads to any equilibrium.
    """
    memory: Memory = iterate.memory
    if not memory.answers.weakens:
        return iterate
    if memory.gains is None and is_toward(memory.answers.energy.beta) and memory.may_know_gains(sweeps):
        return iterate
    if memory.sweeps == 2:
        before = torch.ones_like(before)  # what the first sweep leaves is measured only if some example may rest
    return _weakened(iterate, stalled(memory.mine(iterate.residual), memory.mine(before), tol))


def _weakened(iterate: Iterate, factor: Tensor | None) -> Iterate:
    """With nudges weakened by these factors; how far they are from the new equilibria walks cannot tell."""
    if factor is None:
        return iterate
    memory: Memory = iterate.memory.weakened(factor)
    residual = memory.mine(iterate.residual)
    left = torch.where(factor < 1, residual.clamp_min(1), residual) if memory.walks else memory.residual
    return replace(iterate, residual=memory.put(iterate.residual, left), memory=memory, exact=False, weakened=True)
