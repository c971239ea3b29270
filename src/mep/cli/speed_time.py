"""Recipes timed in turns with one number of threads, and how their steps settled."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mep.cli.profile_rows import Recipe, estimator_of
from mep.cli.speed_rows import MUON, compiles
from mep.cli.training import Tally
from mep.cli.turns import Batch, Stepper, batches_of, in_turns, relative
from mep.errors import ArgumentError, MepError

Row = dict[str, Any]

SETTLED = ("sweeps", "residual", "residual_max", "settled", "beta")
TURN_SECONDS = 0.02  # of counted steps, about: several fast ones, one slow one
MOST_COUNTED, MOST_UNCOUNTED = 5, 3
UNTIL_COMPILED = 40  # steps: the number of sweeps that is compiled follows from those of the last steps
SLOW = 0.1  # seconds of a step that filling the caches does not lengthen noticeably


class Contender(Stepper):
    """A recipe, and how its steps settled.

    It is compiled when it is made, if at all, and refused if that takes more than `patience` seconds or is not done:
    `warm` it for every number of threads, then take turns.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        batches: Sequence[Batch],
        cost: str,
        patience: float = math.inf,
    ):
        super().__init__(recipe, model, cost)
        self.batches = batches
        self.start_within_bounds(*batches[0])
        for number in range(UNTIL_COMPILED if compiles(recipe) else 1):  # the first step traces
            self.step(*batches[number % len(batches)])
            if compiles(recipe) and self.took > patience:
                raise ArgumentError(
                    f"its first {number + 1} steps, which compile, took {self.took:.0f} s. Allow it more."
                )
        if self._is_eager_in_spite(recipe):
            raise ArgumentError(
                f"no program in {UNTIL_COMPILED} steps: these need more sweeps than are ever compiled, and are made as "
                "without compile."
            )
        self._tally, self._betas, self._unsettled = Tally(), list[float](), Counter[str]()

    def warm(self) -> None:
        """Uncounted steps: threads start, what is compiled for their number is found, and the length of a turn."""
        self.step(*self.batches[0])
        self.took = self.ran = 0.0  # whoever waits for a compiler is not running, and the machine not busy for that
        seconds = self.step(*self.batches[0])
        if seconds < SLOW:
            seconds = statistics.median([self.step(*batch) for batch in self.batches])
        self.pace = pace(seconds)

    def turn(self, number: int) -> list[float]:
        """The seconds of the counted steps of a turn, which is taken again if a program was compiled in it."""
        uncounted, counted = self.pace
        while True:
            before, took, ran = self._programs, self.took, self.ran
            batches = batches_of(self.batches, number, uncounted + counted)
            seconds = [self._noted(*batch) for batch in batches][uncounted:]
            if self._programs == before:
                return seconds
            self.took, self.ran = took, ran

    def settled(self) -> dict[str, float | None]:
        """The fields `SETTLED` of all turns so far, None for backprop.

        Means over all examples, the largest residual, and the median beta: over the steps, of that over the examples.
        """
        means = self._tally.means()
        beta = None if means["residual"] is None else statistics.median(self._betas)
        return {**{field: means[field] for field in SETTLED if field != "beta"}, "beta": beta}

    @property
    def unsettled(self) -> str | None:
        """How most of the steps ended that did not settle; None if all did."""
        return self._unsettled.most_common(1)[0][0] if self._unsettled else None

    def _noted(self, x: Tensor, target: Tensor) -> float:
        """A step, and how it settled."""
        seconds = self.step(x, target)
        last = self.optimizer.last
        self._tally.add(last, len(target))
        self._betas.append(last.median_beta)
        if not last.converged:
            self._unsettled[last.result.name.lower().replace("_", " ")] += 1
        return seconds

    @property
    def _programs(self) -> int:
        """How many programs of whole steps have been compiled."""
        estimator = estimator_of(self.optimizer)
        return 0 if estimator is None or estimator.compiled_steps is None else len(estimator.compiled_steps)

    def _is_eager_in_spite(self, recipe: Recipe) -> bool:
        return compiles(recipe) and estimator_of(self.optimizer) is not None and not self._programs


def pace(seconds: float) -> tuple[int, int]:
    """Uncounted and counted steps in a turn, for steps that take so long.

    >>> pace(0.001), pace(0.008), pace(0.05), pace(0.5)
    ((3, 5), (1, 2), (1, 1), (0, 1))
    """
    fitting = max(1, int(TURN_SECONDS / seconds))
    uncounted = 0 if seconds > SLOW else max(1, fitting // 2)
    return min(uncounted, MOST_UNCOUNTED), min(fitting, MOST_COUNTED)


class Entry(NamedTuple):
    """A row, and the contender that it is of; None if there could be none."""

    row: Row
    contender: Contender | None


def time_entries(entries: Sequence[Entry], rounds: Iterable[int]) -> None:
    """Add to the rows how they settled, and to their `times` one more number of threads, the present one.

    Rows that have failed stay as they are; the first row must not fail.

    seconds: quartiles over the counted steps; mean: of these, which is more where some steps do more than others;
    ratio: quartiles over the rounds of the ratio to the first recipe; to_muon: the median of that to backprop with
    torch's Muon, None if that is not compared; running: see `Stepper`; rounds: how many there were.
    """
    able = [(row, one) for row, one in entries if row["error"] is None and one is not None]
    for row, contender in able:
        with told(row):
            contender.warm()
    check_yardstick(entries[0].row)
    seconds = in_turns([partial(_turn, row, contender) for row, contender in able], rounds)
    check_yardstick(entries[0].row)
    timed = [(row, one, own) for (row, one), own in zip(able, seconds, strict=True) if row["error"] is None]
    muon = next((own for row, _, own in timed if row["label"] == MUON.label), None)
    for row, contender, own in timed:
        row.update(contender.settled(), unsettled=contender.unsettled)
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
    """A recipe that cannot go on, for whatever reason, leaves that in its row and does not stop the others."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]  # what torch's compiler says runs over many lines
        row["error"] = reason if isinstance(error, MepError) and reason else f"{type(error).__name__}: {reason}"


def check_yardstick(row: Row) -> None:
    """Refuse to go on without it."""
    if row["error"] is not None:
        raise ArgumentError(f"{row['label']}, the yardstick of the others, failed: {row['error']}")


def _turn(row: Row, contender: Contender, number: int) -> list[float]:
    """Its seconds; none once it has failed."""
    with told(row):
        return [] if row["error"] else contender.turn(number)
    return []
