"""The optimizers that `mep bench` compares, in the order of its table: to add one, add a line."""

from __future__ import annotations

import ast
from collections.abc import Collection
from typing import Any, NamedTuple

from mep.errors import ArgumentError


class Contestant(NamedTuple):
    """An optimizer, its label, and its options: the best learning rate of a grid of factors of two, for all alike.

    Judged by the accuracy after the default budget, on the default data and model, and not at the edge of
    divergence on any seed.
    """

    name: str
    label: str
    options: dict[str, Any]


SGD, MUON = "sgd", "muon_backprop"  # the two that all others are compared with

CONTESTANTS = (
    Contestant(SGD, "SGD", {"lr": 0.2}),
    Contestant("adam", "Adam", {"lr": 0.004}),
    Contestant(MUON, "Muon", {"lr": 0.01}),
    Contestant("torch_muon", "Muon (torch)", {"lr": 0.005}),
    Contestant("eqprop", "EqProp", {"lr": 0.2}),
    Contestant("smep", "SMEP", {"lr": 0.01}),
    Contestant("smep_fast", "SMEP-fast", {"lr": 0.01}),
    Contestant("sdmep", "SDMEP", {"lr": 0.01}),
    Contestant("natural_ep", "NaturalEP", {"lr": 0.03}),
    Contestant("local_ep", "LocalEP", {"lr": 0.2}),
    Contestant("O1MemoryEPv2", "O1MemoryEPv2", {"lr": 0.01, "settle_steps": 15}),
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


def choose(
    only: Collection[str] = (), without: Collection[str] = (), added: Collection[str] = ()
) -> tuple[Contestant, ...]:
    """The contestants called `only`, or all but those called `without`; then the variants that are `added`."""
    for flag, names in (("--only", only), ("--without", without)):
        for name in names:
            _known(name, f"{flag} {name}")
    chosen = [c for c in CONTESTANTS if (not only or c.name in only) and c.name not in without]
    chosen += [variant(words) for words in added]
    if not chosen:
        raise ArgumentError("--only and --without leave nobody to compare. Name a contestant in --only alone.")
    return tuple(chosen)


def variant(words: str) -> Contestant:
    """A contestant with other options.

    >>> variant("eqprop tol=0.1 beta=0.01")
    Contestant(name='eqprop', label='EqProp tol=0.1 beta=0.01', options={'lr': 0.2, 'tol': 0.1, 'beta': 0.01})
    """
    name, *pairs = words.split() or [""]
    options = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    if not pairs or len(options) < len(pairs):
        raise ArgumentError(f'--add "{words}": write a contestant and its options, as in --add "eqprop tol=0.1".')
    base = _known(name, f'--add "{words}"')
    read = {key: _value(text) for key, text in options.items()}
    return Contestant(name, " ".join([base.label, *pairs]), base.options | read)


def _known(name: str, asked: str) -> Contestant:
    for contestant in CONTESTANTS:
        if contestant.name == name:
            return contestant
    known = ", ".join(contestant.name for contestant in CONTESTANTS)
    raise ArgumentError(f"{asked}: there is no such contestant. Choose among {known}.")


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
