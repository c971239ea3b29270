"""Everything that the lab compares, in one table: to add a recipe, add a line and name the commands that have it.

| command | compares | with the learning rate |
|---|---|---|
| `mep bench` | accuracy after a time budget | `lr`, tuned for that task |
| `mep profile` | where the time of a step goes, how exact its gradient is | the preset's own: it changes neither |
| `mep bench speed` | time and memory of a step | the preset's own |
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from mep.errors import ArgumentError


class Recipe(NamedTuple):
    """A way to make a step.

    label: what tables call it. preset: the name of its optimizer. options: what that is given beside the cost, or
    instead of it. commands: where it is compared. lr: for `mep bench`, the best learning rate of a grid of factors of
    two, by the accuracy after the default budget on the default data and model, and not at the edge of divergence on
    any seed.
    settle_series: recipes of one series differ in nothing but how long they settle, the shortest first. channels_last:
    pictures and filters lie in memory pixel by pixel; compared where the model has convolutions.
    """

    label: str
    preset: str
    options: dict[str, Any]
    commands: str = ""
    lr: float | None = None
    settle_series: str | None = None
    channels_last: bool = False

    @property
    def is_compiled(self) -> bool:
        """Whether its steps are compiled."""
        return bool(self.options.get("compile"))

    @property
    def is_hopfield(self) -> bool:
        """Whether the network is one of Hopfield's, with other weights than a network that is run forward."""
        return is_hopfield(self.options)

    def as_row(self) -> dict[str, Any]:
        """The start of its row in a record."""
        return {"label": self.label, "preset": self.preset, "options": self.options, "ladder": self.settle_series}


def is_hopfield(options: Mapping[str, Any]) -> bool:
    """The same of the options of a recorded recipe."""
    return options.get("energy") == "hopfield"


SETTLE_LR = 0.15  # the usual step size of descent, the same for all numbers of steps
HOPFIELD = {"energy": "hopfield", "cost": "one_hot_mse"}  # cross entropy is never done with enlarging their weights
BENCH, PROFILE, SPEED = "bench", "profile", "speed"
BOTH = f"{PROFILE} {SPEED}"


def _descent(steps: int, commands: str) -> Recipe:
    options = {"settle_steps": steps, "settle_lr": SETTLE_LR}
    return Recipe(f"Descent {steps}", "eqprop", options, commands, settle_series="descent")


BASELINE = Recipe("Backprop + SGD", "sgd", {}, BOTH)  # all times of a step are relative to its
MUON = Recipe("Backprop + Muon", "torch_muon", {}, SPEED)  # those of presets that orthogonalise to this, too
RECIPES = (
    BASELINE,
    Recipe("Backprop + SGD, channels_last", "sgd", {}, SPEED, channels_last=True),
    Recipe("Backprop + SGD, compiled", "sgd", {"compile": True}, SPEED),
    MUON,
    Recipe("SGD", "sgd", {}, BENCH, lr=0.2),
    Recipe("Adam", "adam", {}, BENCH, lr=0.004),
    Recipe("Muon", "muon_backprop", {}, BENCH, lr=0.01),
    Recipe("Muon (torch)", "torch_muon", {}, BENCH, lr=0.005),
    Recipe("EqProp", "eqprop", {}, BENCH, lr=0.2),
    *(Recipe(f"EqProp tol {tol:g}", "eqprop", {"tol": tol}, SPEED) for tol in (1e-1, 1e-2, 1e-3)),
    Recipe("EqProp beta 0.1", "eqprop", {"beta": 0.1}, SPEED),
    Recipe("EqProp, compiled", "eqprop", {"compile": True}, SPEED),
    Recipe("EqProp, Hopfield", "eqprop", HOPFIELD, f"{BENCH} {SPEED}", lr=0.2),
    _descent(5, PROFILE),
    _descent(10, BOTH),
    _descent(15, PROFILE),
    _descent(20, PROFILE),
    _descent(30, BOTH),
    *(Recipe(f"Sweep tol {t:g}", "eqprop", {"tol": t}, PROFILE, settle_series="sweep") for t in (1e-1, 1e-2, 1e-3)),
    Recipe("SMEP", "smep", {}, f"{BENCH} {BOTH}", lr=0.01),
    Recipe("SMEP, compiled", "smep", {"compile": True}, SPEED),
    Recipe("SMEP-fast", "smep_fast", {}, f"{BENCH} {BOTH}", lr=0.01),
    Recipe("SDMEP", "sdmep", {}, f"{BENCH} {SPEED}", lr=0.01),
    Recipe("NaturalEP", "natural_ep", {}, f"{BENCH} {SPEED}", lr=0.03),
    Recipe("LocalEP", "local_ep", {}, f"{BENCH} {SPEED}", lr=0.2),
    Recipe("O1MemoryEPv2", "O1MemoryEPv2", {"settle_steps": 15}, BENCH, lr=0.01),
    Recipe("O1MemoryEPv2 15", "O1MemoryEPv2", {"settle_steps": 15}, PROFILE),
)

# By label, what an earlier system of the same name reported: accuracy in percent, and the cost of a step over that of
# SGD. Its task was a subset of MNIST for 15 s; ours that comes closest has these settings.
EARLIER_TASK = {"data": "mnist5k", "seconds": 15.0}
EARLIER = {
    "SGD": (92.12, 1.0),
    "Adam": (92.00, 0.91),
    "Muon": (88.61, 1.32),
    "EqProp": (68.81, 1.89),
    "SMEP": (75.02, 1.96),
    "SDMEP": (73.76, 1.96),
    "NaturalEP": (85.17, 2.37),
    "LocalEP": (74.37, 2.48),
}


def recipes_of(command: str) -> list[Recipe]:
    """Those that this command compares, for `mep bench` with their learning rates among the options."""
    chosen = [recipe for recipe in RECIPES if command in recipe.commands.split()]
    return [_tuned(recipe) for recipe in chosen] if command == BENCH else chosen


def choose(
    command: str, only: Collection[str] = (), without: Collection[str] = (), added: Collection[str] = ()
) -> list[Recipe]:
    """The recipes of a command whose preset or label is among `only`, or all, but not among `without`; the `added`.

    >>> [recipe.label for recipe in choose("speed", ["sdmep", "Descent 10"], added=["eqprop beta=0.5"])]
    ['Descent 10', 'SDMEP', 'EqProp beta=0.5']
    """
    known = recipes_of(command)
    for flag, names in (("--only", only), ("--without", without)):
        for name in names:
            if not any(_is(recipe, [name]) for recipe in known):
                raise ArgumentError(f"{flag} {name}: there is no such recipe. {_choice(known)}")
    chosen = [recipe for recipe in known if (not only or _is(recipe, only)) and not _is(recipe, without)]
    return [*chosen, *(variant(words) for words in added)]


def variant(words: str) -> Recipe:
    """A recipe of `mep bench` with other options.

    >>> recipe = variant("eqprop tol=0.1 beta=0.01")
    >>> recipe.label, recipe.options
    ('EqProp tol=0.1 beta=0.01', {'lr': 0.2, 'tol': 0.1, 'beta': 0.01})
    """
    name, *pairs = words.split() or [""]
    given = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    if not pairs or len(given) < len(pairs):
        raise ArgumentError(f'--add "{words}": write a preset and its options, as in --add "eqprop tol=0.1".')
    known = recipes_of(BENCH)
    base = next((recipe for recipe in known if recipe.preset == name), None)
    if base is None:
        raise ArgumentError(f'--add "{words}": there is no such recipe. {_choice(known)}')
    options = {key: _value(text) for key, text in given.items()}
    return Recipe(" ".join([base.label, *pairs]), name, base.options | options)


def _tuned(recipe: Recipe) -> Recipe:
    return recipe._replace(options={"lr": recipe.lr, **recipe.options})


def _is(recipe: Recipe, names: Collection[str]) -> bool:
    return recipe.preset in names or recipe.label in names


def _choice(known: Collection[Recipe]) -> str:
    presets = ", ".join(dict.fromkeys(recipe.preset for recipe in known))
    labels = ", ".join(f'"{recipe.label}"' for recipe in known)
    return f"Choose among {presets}, or a label: {labels}."


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
