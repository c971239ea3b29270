"""The recipes that `mep bench speed` compares, in the order of its tables: to add one, add a line."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mep.cli import contestants
from mep.cli.optimizers import Optimizer
from mep.cli.profile_rows import SETTLE_LR, SWEEP_TOLERANCES, Recipe
from mep.errors import ArgumentError


class ChannelsLast(Recipe):
    """A recipe on a model whose pictures and filters lie in memory pixel by pixel: the channels are the last index."""

    def build(self, model: nn.Module, cost: str) -> Optimizer:
        """The optimizer; the model's memory format changes, and every input is brought into it."""
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.register_forward_pre_hook(_pictures_last)
        return super().build(model, cost)


def _pictures_last(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    last = torch.channels_last
    return tuple(x.to(memory_format=last) if isinstance(x, Tensor) and x.ndim == 4 else x for x in inputs)


SGD = Recipe("Backprop + SGD", "sgd", {})  # the yardstick of all
MUON = Recipe("Backprop + Muon", "torch_muon", {})  # that of the presets that orthogonalise
RECIPES = (
    SGD,
    ChannelsLast("Backprop + SGD, channels_last", "sgd", {}),
    Recipe("Backprop + SGD, compiled", "sgd", {"compile": True}),
    MUON,
    *(Recipe(f"EqProp tol {tol:g}", "eqprop", {"tol": tol}) for tol in SWEEP_TOLERANCES),
    Recipe("EqProp beta 0.1", "eqprop", {"beta": 0.1}),
    Recipe("EqProp, compiled", "eqprop", {"compile": True}),
    *(
        Recipe(f"Descent {steps}", "eqprop", {"settle_steps": steps, "settle_lr": SETTLE_LR}, "descent")
        for steps in (10, 30)
    ),
    Recipe("SMEP", "smep", {}),
    Recipe("SMEP, compiled", "smep", {"compile": True}),
    Recipe("SMEP-fast", "smep_fast", {}),
    Recipe("SDMEP", "sdmep", {}),
    Recipe("NaturalEP", "natural_ep", {}),
    Recipe("LocalEP", "local_ep", {}),
)


def compiles(recipe: Recipe) -> bool:
    """Whether its steps are compiled."""
    return bool(recipe.options.get("compile"))


def suited(recipes: Sequence[Recipe], model: nn.Module) -> list[Recipe]:
    """Without those that differ from others only in convolutions, where the model has none."""
    convolves = any(isinstance(module, nn.Conv2d) for module in model.modules())
    return [recipe for recipe in recipes if convolves or not isinstance(recipe, ChannelsLast)]


def choose(
    only: Collection[str] = (), without: Collection[str] = (), added: Collection[str] = (), compile: bool = True
) -> tuple[Recipe, ...]:
    """The yardstick; the recipes whose preset or label is among `only`, or all, but not among `without`; the `added`.

    >>> [recipe.label for recipe in choose(["sdmep", "Descent 10"], added=["eqprop beta=0.5"])]
    ['Backprop + SGD', 'Descent 10', 'SDMEP', 'EqProp beta=0.5']
    """
    for flag, names in (("--only", only), ("--without", without)):
        for name in names:
            _check_known(flag, name)
    if SGD.label in without:
        raise ArgumentError(f"--without {SGD.label!r}: all others are timed beside it. Leave it in.")
    variants = [contestants.variant(words) for words in added]
    chosen = [recipe for recipe in RECIPES if (not only or _is(recipe, only)) and not _is(recipe, without)]
    chosen = [SGD, *(recipe for recipe in chosen if recipe is not SGD)]
    chosen += [Recipe(one.label, one.name, one.options) for one in variants]
    return tuple(recipe for recipe in chosen if compile or not compiles(recipe))


def _is(recipe: Recipe, names: Collection[str]) -> bool:
    return recipe.preset in names or recipe.label in names


def _check_known(flag: str, name: str) -> None:
    if not any(_is(recipe, [name]) for recipe in RECIPES):
        presets = ", ".join(dict.fromkeys(recipe.preset for recipe in RECIPES))
        labels = ", ".join(f'"{recipe.label}"' for recipe in RECIPES)
        raise ArgumentError(f"{flag} {name}: there is no such recipe. Choose among {presets}, or a label: {labels}.")
