"""The recipes that `mep bench speed` compares, in the order of its tables: to add one, add a line."""

from __future__ import annotations

from collections.abc import Collection

from mep.cli import contestants
from mep.cli.profile_rows import SETTLE_LR, SWEEP_TOLERANCES, Recipe
from mep.errors import ArgumentError

SGD = Recipe("Backprop + SGD", "sgd", {})  # the yardstick of all
MUON = Recipe("Backprop + Muon", "torch_muon", {})  # that of the presets that orthogonalise
RECIPES = (
    SGD,
    Recipe("Backprop + SGD, compiled", "sgd", {"compile": True}),
    MUON,
    *(Recipe(f"EqProp tol {tol:g}", "eqprop", {"tol": tol}) for tol in SWEEP_TOLERANCES),
    Recipe("EqProp, compiled", "eqprop", {"compile": True}),
    *(
        Recipe(f"Descent {steps}", "eqprop", {"settle_steps": steps, "settle_lr": SETTLE_LR}, "descent")
        for steps in (10, 30)
    ),
    Recipe("SMEP", "smep", {}),
    Recipe("SMEP-fast", "smep_fast", {}),
    Recipe("SDMEP", "sdmep", {}),
    Recipe("NaturalEP", "natural_ep", {}),
    Recipe("LocalEP", "local_ep", {}),
)


def choose(only: Collection[str] = (), added: Collection[str] = ()) -> tuple[Recipe, ...]:
    """The yardstick, the recipes whose preset or label is among `only`, or all; then the variants that are `added`.

    >>> [recipe.label for recipe in choose(["smep", "Descent 10"], ["eqprop beta=0.01"])]
    ['Backprop + SGD', 'Descent 10', 'SMEP', 'EqProp beta=0.01']
    """
    known = {name for recipe in RECIPES for name in (recipe.preset, recipe.label)}
    for name in only:
        if name not in known:
            presets = ", ".join(dict.fromkeys(recipe.preset for recipe in RECIPES))
            raise ArgumentError(f"--only {name}: there is no such recipe. Choose among {presets}, or give a label.")
    wanted = set(only or known)
    chosen = [recipe for recipe in RECIPES if recipe is SGD or wanted & {recipe.preset, recipe.label}]
    variants = map(contestants.variant, added)
    return (*chosen, *(Recipe(one.label, one.name, one.options) for one in variants))
