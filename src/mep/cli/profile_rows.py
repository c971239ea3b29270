"""The recipes that `mep profile` compares, in the order of its table: to add one, add a line."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

import mep
from mep.cli import optimizers


class Recipe(NamedTuple):
    """A way to make a step: its label, the name of its optimizer, and what that is given beside the cost.

    Recipes of one `ladder` differ in nothing but how long they settle, the shortest first.
    """

    label: str
    preset: str
    options: dict[str, Any]
    ladder: str | None = None

    def build(self, model: nn.Module, cost: str) -> optimizers.Optimizer:
        """The optimizer of all parameters of this model."""
        return optimizers.build_to_compare(self.preset, model, {"cost": cost, **self.options})


DESCENT_STEPS = (5, 10, 15, 20, 30)
SWEEP_TOLERANCES = (1e-1, 1e-2, 1e-3)
SETTLE_LR = 0.15  # the usual step size of descent, the same for all numbers of steps

YARDSTICK = Recipe("Backprop + SGD", "sgd", {})
RECIPES = (
    *(
        Recipe(f"Descent {steps}", "eqprop", {"settle_steps": steps, "settle_lr": SETTLE_LR}, "descent")
        for steps in DESCENT_STEPS
    ),
    *(Recipe(f"Sweep tol {tol:g}", "eqprop", {"tol": tol}, "sweep") for tol in SWEEP_TOLERANCES),
    Recipe("SMEP", "smep", {}),
    Recipe("SMEP-fast", "smep_fast", {}),
    Recipe("O1MemoryEPv2 15", "O1MemoryEPv2", {"settle_steps": 15}),
)


def estimator_of(optimizer: optimizers.Optimizer) -> mep.EquilibriumPropagation | None:
    """What settles in an optimizer; None if it is fed by backprop."""
    estimator = optimizer.estimator if isinstance(optimizer, mep.EPOptimizer) else None
    return estimator if isinstance(estimator, mep.EquilibriumPropagation) else None
