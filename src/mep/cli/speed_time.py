"""Recipes timed in turns with one number of threads, and how their steps settled."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mep.cli.profile_rows import Recipe
from mep.cli.speed_rows import MUON
from mep.cli.training import Tally
from mep.cli.turns import Batch, Stepper, batches_of, in_turns, relative
from mep.errors import ArgumentError, MepError

Row = dict[str, Any]

SETTLED = ("sweeps", "residual", "residual_max", "converged", "beta")
TURN_SECONDS = 0.02  # of counted steps, about: several fast ones, one slow one
MOST_COUNTED, MOST_UNCOUNTED = 5, 3
UNTIL_COMPILED = 24  # steps: the number of sweeps that is compiled follows from those of the last steps
SLOW = 0.1  # seconds of a step that filling the caches does not lengthen noticeably


class Contender(Stepper):
    """A recipe whose steps also tell how they settled, and that goes on from a state of its optimizer."""

    def __init__(self, recipe: Recipe, state: dict[str, Any], model: nn.Module, batches: Sequence[Batch], cost: str):
        super().__init__(recipe, model, cost)
        self.optimizer.load_state_dict(copy.deepcopy(state))
        self.batches = batches
        self._watch()
        for number in range(UNTIL_COMPILED if recipe.options.get("compile") else 1):  # the first step traces
            self.step(*batches[number % len(batches)])
        self.pace = pace(statistics.median([self.step(*batch) for batch in batches]))
        self._watch()

    def step(self, x: Tensor, target: Tensor) -> float:
        seconds = super().step(x, target)
        self._tally.add(self.optimizer.last, len(target))
        self._betas.append(self.optimizer.last.beta)
        return seconds

    def turn(self, number: int) -> list[float]:
        """The seconds of the counted steps of a turn."""
        uncounted, counted = self.pace
        return [self.step(*batch) for batch in batches_of(self.batches, number, uncounted + counted)][uncounted:]

    def settled(self) -> dict[str, float | None]:
        """The fields `SETTLED` of all steps so far: means, the largest residual, the median beta; None for backprop."""
        means = self._tally.means()
        beta = None if means["residual"] is None else statistics.median(self._betas)
        return {**{field: means[field] for field in SETTLED if field != "beta"}, "beta": beta}

    def _watch(self) -> None:
        self._tally, self._betas = Tally(), list[float]()


def pace(seconds: float) -> tuple[int, int]:
    """Uncounted and counted steps in a turn, for steps that take so long.

    >>> pace(0.001), pace(0.008), pace(0.05), pace(0.5)
    ((3, 5), (1, 2), (1, 1), (0, 1))
    """
    fitting = max(1, int(TURN_SECONDS / seconds))
    uncounted = 0 if seconds > SLOW else max(1, fitting // 2)
    return min(uncounted, MOST_UNCOUNTED), min(fitting, MOST_COUNTED)


class Entry(NamedTuple):
    """A row, the recipe that it is of, and the state of its optimizer to begin from."""

    row: Row
    recipe: Recipe
    state: dict[str, Any]


def time_entries(
    entries: Sequence[Entry], model: nn.Module, batches: Sequence[Batch], cost: str, rounds: Iterable[int]
) -> None:
    """Add to the rows how they settled, and to their `times` one more number of threads, the present one.

    Rows that have failed stay as they are.

    seconds: quartiles over the counted steps; mean: of these, which is more where some steps do more than others;
    ratio: quartiles over the rounds of the ratio to the first recipe; to_muon: the median of that to backprop with
    torch's Muon, None if that is not compared; running: see `Stepper`; rounds: how many there were.
    """
    able: list[tuple[Row, Contender]] = []
    for row, recipe, state in entries:
        if row["error"] is None:
            with told(row):
                able.append((row, Contender(recipe, state, model, batches, cost)))
    _check_yardstick(entries[0].row)
    seconds = in_turns([partial(_turn, row, contender) for row, contender in able], rounds)
    _check_yardstick(entries[0].row)
    timed = [(row, one, own) for (row, one), own in zip(able, seconds, strict=True) if row["error"] is None]
    muon = next((own for row, _, own in timed if row["label"] == MUON.label), None)
    for row, contender, own in timed:
        row.update(contender.settled())
        row["times"].append(
            {
                "threads": torch.get_num_threads(),
                **relative(own, seconds[0]),
                "mean": statistics.fmean(step for turn in own for step in turn),
                "to_muon": relative(own, muon)["ratio"]["median"] if muon else None,
                "running": contender.running,
                "rounds": len(own),
            }
        )


@contextmanager
def told(row: Row) -> Iterator[None]:
    """A recipe that cannot go on leaves its reason in its row; what torch's compiler says runs over many lines."""
    try:
        yield
    except (MepError, RuntimeError) as error:
        row["error"] = str(error).strip().partition("\n")[0]


def _turn(row: Row, contender: Contender, number: int) -> list[float]:
    """Its seconds; none once it has failed."""
    with told(row):
        return [] if row["error"] else contender.turn(number)
    return []


def _check_yardstick(row: Row) -> None:
    if row["error"] is not None:
        raise ArgumentError(f"{row['label']}, the yardstick of the others, failed: {row['error']}")
