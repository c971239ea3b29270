"""`mep bench speed` as a whole: models trained for a moment, and for every recipe what a step takes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from mep.cli import models
from mep.cli.bench_speed import BATCH_SIZE, MODELS, Settings
from mep.cli.profile_rows import Recipe
from mep.cli.speed_columns import threads as in_words
from mep.cli.speed_display import Display
from mep.cli.speed_resources import RESOURCES, attainable, resources
from mep.cli.speed_rows import RECIPES, compiles, suited
from mep.cli.speed_time import SETTLED, Contender, Entry, Row, check_yardstick, time_entries, told
from mep.cli.training import briefly_trained, on_device, other_batches
from mep.cli.turns import Batch
from mep.data import DataSet, load
from mep.errors import ArgumentError

LEAST_ROUNDS = 5  # quartiles of fewer say nothing


def measure(settings: Settings, recipes: Sequence[Recipe], device: torch.device, display: Display) -> dict[str, Any]:
    """`attainable`, what the machine can do with every number of threads; `models`, each with its rows.

    `stopped`: None, or the model during which Ctrl-C came; those before it are kept. Before the first is done Ctrl-C
    ends all.
    """
    data = on_device(load(settings.data, folder=settings.folder), device)
    for name in settings.models:
        models.build(name, data)  # a wrong name is refused now, not after minutes
    peaks = []
    for number in settings.threads:
        torch.set_num_threads(number)
        peaks.append({"threads": number, **attainable(device)})
    done: list[dict[str, Any]] = []
    stopped = None
    try:
        for name in settings.models:
            done.append(_measured(name, settings, recipes, data, display))
    except KeyboardInterrupt:
        if not done:
            raise
        stopped = name
    return {"attainable": peaks, "models": done, "stopped": stopped}


def _measured(
    name: str, settings: Settings, recipes: Sequence[Recipe], data: DataSet, display: Display
) -> dict[str, Any]:
    """One model, briefly trained, and its rows."""
    torch.manual_seed(0)
    size = settings.batch_size or MODELS.get(name, BATCH_SIZE)
    common: dict[str, Any] = {"cost": settings.cost, "batch_size": size}
    model = briefly_trained(name, data, optimizer="adam", steps=settings.train_steps, **common)
    rows = compare(
        model,
        other_batches(data, count=settings.batches, **common),
        recipes,
        cost=settings.cost,
        threads=settings.threads,
        rounds=settings.rounds,
        seconds=settings.seconds,
        patience=settings.compile_seconds,
        display=display,
        title=name,
    )
    numbers = " and ".join(str(time["rounds"]) for time in rows[0]["times"])
    failed = sum(row["error"] is not None for row in rows)
    display.end(f"{numbers} rounds" + (f", {failed} recipes failed" if failed else ""))
    parameters = sum(p.numel() for p in model.parameters())
    return {"model": name, "batch_size": size, "parameters": parameters, "rows": rows}


def compare(
    model: nn.Module,
    batches: Sequence[Batch],
    recipes: Sequence[Recipe] = RECIPES,
    *,
    cost: str = "cross_entropy",
    threads: Sequence[int] = (1,),
    rounds: int = 10,
    seconds: float = math.inf,
    patience: float = math.inf,
    display: Display | None = None,
    title: str = "",
) -> list[Row]:
    """What a step of every recipe takes, at the model's parameters as they are; they stay so.

    All is prepared, measured beside time, and compiled once, then timed with one number of threads after the other.

    Args:
        model: any module that `mep.trace` can read.
        batches: pairs `(x, target)`, all of one shape, stepped on in turn.
        recipes: what to compare, where it suits the model (`speed_rows.suited`); the first is the yardstick.
        cost: "cross_entropy" or "mse".
        threads: numbers of CPU threads.
        rounds: turns of each recipe.
        seconds: for the turns with one number of threads: when they are over no other round begins, after the fifth.
        patience: seconds that a recipe may take to compile.
        display: where to show progress.
        title: what to call the model there.

    Returns:
        For each recipe its own fields; `SETTLED` and `times`, see `time_entries`; `unsettled`: how most of the steps
        ended in which some example did not settle; `RESOURCES`, see `resources`; and `error`: None, or why there is
        nothing else.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> batch = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> both = [Recipe("Backprop", "sgd", {}), Recipe("EP", "eqprop", {"tol": 1e-3})]
        >>> rows = compare(net, [batch], both, rounds=2)
        >>> rows[1]["residual_max"] <= 1e-3, rows[1]["times"][0]["ratio"]["median"] > 0
        (True, True)
    """
    if rounds < 2 or not batches or not recipes or not threads:
        raise ArgumentError(
            f"compare(rounds={rounds}, batches={len(batches)}, recipes={len(recipes)}, threads={threads}): give 2 "
            "rounds, 1 batch, 1 recipe and 1 number of threads at least."
        )
    display, recipes = display or Display(), suited(recipes, model)
    display.begin(title, len(recipes) + len(threads))
    before = torch.get_num_threads()
    torch.set_num_threads(min(threads))
    try:
        with _compiled_once(recipes, threads):
            entries = [_prepared(recipe, model, batches, cost, patience, display) for recipe in recipes]
            check_yardstick(entries[0].row)
            for number in threads:
                torch.set_num_threads(number)
                doing = f"timing, {in_words(number)}"
                display.stage(doing)
                time_entries(entries, display.rounds(within(range(rounds), seconds), doing))
    finally:
        torch.set_num_threads(before)
    return [entry.row for entry in entries]


def _prepared(
    recipe: Recipe, model: nn.Module, batches: Sequence[Batch], cost: str, patience: float, display: Display
) -> Entry:
    """The row with all that does not depend on the number of threads, and the contender, ready to be timed."""
    display.stage(f"{recipe.label}, memory and work")
    row = {**recipe._asdict(), "error": None, "unsettled": None, **dict.fromkeys((*SETTLED, *RESOURCES)), "times": []}
    contender = None
    with told(row):
        row.update(resources(recipe, model, batches, cost))
        display.say(f"{recipe.label}, {'compiling' if compiles(recipe) else 'first steps'}")
        contender = Contender(recipe, model, batches, cost, patience)
    return Entry(row, contender)


def _compiled_once(recipes: Sequence[Recipe], threads: Sequence[int]) -> AbstractContextManager[Any]:
    """Where code is compiled for any number of threads, if there are several: else all would be compiled for each."""
    if not any(map(compiles, recipes)):
        return nullcontext()
    import torch._inductor.config as inductor  # seconds, and of use here alone

    torch.compiler.reset()  # of one function torch compiles so many variants, those for other models counting
    patch: AbstractContextManager[Any] = inductor.patch({"cpp.dynamic_threads": len(threads) > 1})
    return patch


def within(rounds: Iterable[int], seconds: float) -> Iterator[int]:
    """The rounds until the time is over, and `LEAST_ROUNDS` at least."""
    start = time.monotonic()
    for number in rounds:
        if number >= LEAST_ROUNDS and time.monotonic() - start > seconds:
            return
        yield number
