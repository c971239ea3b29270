"""Every variant of equilibrium propagation is a table: which equilibria, with which weights.

    dC/dtheta ~ sum_k w_k dE/dtheta(s*(beta_k))

Each row is `(beta_k / beta, w_k beta)`. One-sided (Scellier and Bengio 2017, eq. 10) errs by O(beta), centered
(Laborieux et al. 2021, arXiv:2006.03824, eq. 6) by O(beta^2).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from mep.energy import Energy
from mep.estimators.estimate import Gradients, finished
from mep.settle import Iterate, Settled

Contrast = tuple[tuple[float, float], ...]

Phase = tuple[float, Energy, Settled | Iterate]
"""The weight of an equilibrium, its energy, and the equilibrium."""

CONTRASTS: dict[str, Contrast] = {
    "one-sided": ((0.0, -1.0), (1.0, 1.0)),
    "centered": ((-1.0, -0.5), (1.0, 0.5)),
}


def contrast(phases: Iterable[Phase], batch: int) -> Gradients:
    """`sum_k w_k dE/dtheta`, the mean over the batch; a weight is over the beta of its energy, the free phase's too."""
    total: Gradients = {}
    for weight, energy, settled in phases:
        _add(total, energy.parameter_gradient(settled.point, settled.errors, weight / batch))
    return total


def iter_gradients(phases: Sequence[Phase], batch: int) -> Iterator[Gradients]:
    """The same, finished, node by node: every gradient once, as soon as the last node that uses the parameter is done.

    Only gradients that are not complete are held. A weight may be changed once its gradient was there: no later one
    depends on it.
    """
    nodes = phases[0][1].graph.states
    last = {p: node for node in nodes for p in node.parameters}
    unfinished: Gradients = {}
    with torch.no_grad():
        for weight, energy, settled in phases:
            if energy.nudge and energy.nudge.cost.parameters:
                of_cost = energy.nudge.cost.parameter_gradient(energy.output(settled.point), weight / batch)
                _add(unfinished, of_cost)
    alone = finished({p: unfinished.pop(p) for p in list(unfinished) if p not in last})
    if alone:
        yield alone
    for node in nodes:
        with torch.no_grad():
            for weight, energy, settled in phases:
                _add(unfinished, energy.parameter_gradient(settled.point, settled.errors, weight / batch, [node]))
            found = finished({p: unfinished.pop(p) for p in list(unfinished) if last[p] is node})
        if found:
            yield found
        del found  # before the next is made


def _add(total: Gradients, found: Gradients) -> None:
    for p, g in found.items():
        total[p] = total[p].add_(g) if p in total else g
