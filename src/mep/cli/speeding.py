"""`mep bench speed` as a whole: models trained for a moment, and for every recipe what a step takes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from mep.cli.bench_speed import BATCH_SIZE, MODELS, Settings
from mep.cli.profile_rows import Recipe
from mep.cli.speed_resources import RESOURCES, attainable, resources, seasoned
from mep.cli.speed_rows import RECIPES
from mep.cli.speed_time import SETTLED, Entry, Row, time_entries, told
from mep.cli.training import briefly_trained, on_device, other_batches
from mep.cli.turns import Batch
from mep.data import load
from mep.errors import ArgumentError


def measure(settings: Settings, recipes: Sequence[Recipe], device: torch.device, console: Console) -> dict[str, Any]:
    """`attainable`, what the machine can do with every number of threads; `models`, each with its rows."""
    data = on_device(load(settings.data, folder=settings.folder), device)
    models = []
    for name in settings.models:
        torch.manual_seed(0)
        size = settings.batch_size or MODELS.get(name, BATCH_SIZE)
        common: dict[str, Any] = {"cost": settings.cost, "batch_size": size}
        model = briefly_trained(name, data, optimizer="adam", steps=settings.train_steps, **common)
        batches = other_batches(data, count=settings.batches, **common)
        rows = compare(
            model,
            batches,
            recipes,
            cost=settings.cost,
            threads=settings.threads,
            rounds=settings.rounds,
            seconds=settings.seconds,
            console=console,
            title=name,
        )
        parameters = sum(p.numel() for p in model.parameters())
        models.append({"model": name, "batch_size": size, "parameters": parameters, "rows": rows})
    peaks = []
    for number in settings.threads:
        torch.set_num_threads(number)
        peaks.append({"threads": number, **attainable(device)})
    return {"attainable": peaks, "models": models}


def compare(
    model: nn.Module,
    batches: Sequence[Batch],
    recipes: Sequence[Recipe] = RECIPES,
    *,
    cost: str = "cross_entropy",
    threads: Sequence[int] = (1,),
    rounds: int = 10,
    seconds: float = math.inf,
    console: Console | None = None,
    title: str = "",
) -> list[Row]:
    """What a step of every recipe takes, at the model's parameters as they are; they stay so.

    Args:
        model: any module that `mep.trace` can read.
        batches: pairs `(x, target)`, all of one shape, stepped on in turn.
        recipes: what to compare; the first is the yardstick.
        cost: "cross_entropy" or "mse".
        threads: numbers of CPU threads, timed one after the other.
        rounds: turns of each recipe.
        seconds: for the turns with one number of threads: when they are over no other round begins, after the second.
        console: where to show progress, if it is a terminal.
        title: what to call the model there.

    Returns:
        For each recipe its own fields; `SETTLED` and `times`, see `time_entries`; `RESOURCES`, see `resources`; and
        `error`: None, or why there is nothing else.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> batch = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> both = [Recipe("Backprop", "sgd", {}), Recipe("EP", "eqprop", {"tol": 1e-3})]
        >>> rows = compare(net, [batch], both, rounds=2)
        >>> rows[1]["residual_max"] <= 1e-3, rows[1]["times"][0]["ratio"]["median"] > 0
        (True, True)
    """
    if rounds < 2 or not batches or not recipes:
        raise ArgumentError(
            f"compare(rounds={rounds}, batches={len(batches)}, recipes={len(recipes)}): give 2 rounds, 1 batch and "
            "1 recipe at least."
        )
    entries: list[Entry] = []
    for recipe in recipes:
        row = {**recipe._asdict(), "error": None, **dict.fromkeys((*SETTLED, *RESOURCES)), "times": []}
        entries.append(Entry(row, recipe, {}))
        with told(row):
            state = seasoned(recipe, model, batches[0], cost)
            row.update(resources(recipe, state, model, batches, cost))
            entries[-1] = Entry(row, recipe, state)
    before, hidden = torch.get_num_threads(), console is None or not console.is_terminal
    for number in threads:
        torch.set_num_threads(number)
        torch.compiler.reset()  # compiled code is made for one number of threads, and only some of it is kept
        turns = track(range(rounds), f"{title}, threads: {number}", console=console, transient=True, disable=hidden)
        time_entries(entries, model, batches, cost, within(turns, seconds))
    torch.set_num_threads(before)
    return [entry.row for entry in entries]


def within(rounds: Iterable[int], seconds: float) -> Iterator[int]:
    """The rounds until the time is over, and two at least."""
    start = time.monotonic()
    for number in rounds:
        if number >= 2 and time.monotonic() - start > seconds:
            return
        yield number
