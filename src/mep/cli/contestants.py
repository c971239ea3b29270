"""The optimizers that `mep bench` compares, in the order of its table: to add one, add a line."""

from __future__ import annotations

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
    Contestant("eqprop", "EqProp", {"lr": 0.2}),
    Contestant("smep", "SMEP", {"lr": 0.01}),
    Contestant("smep_fast", "SMEP-fast", {"lr": 0.01}),
)


def choose(names: Collection[str] | None) -> tuple[Contestant, ...]:
    """The contestants of these names, or all of them."""
    known = [contestant.name for contestant in CONTESTANTS]
    for name in names or ():
        if name not in known:
            raise ArgumentError(f"--only {name}: there is no such contestant. Choose among {', '.join(known)}.")
    return tuple(contestant for contestant in CONTESTANTS if not names or contestant.name in names)
