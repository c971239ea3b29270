"""`mep profile` as a whole: a model trained for a moment, and for every recipe what a step costs and what it buys."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from mep.cli.profile import Settings
from mep.cli.profile_gradient import Reference, judge
from mep.cli.profile_rows import RECIPES, YARDSTICK, Recipe
from mep.cli.profile_time import time_steps
from mep.cli.training import briefly_trained, on_device, other_batches
from mep.cli.turns import Batch
from mep.data import load
from mep.errors import ArgumentError, MepError

Row = dict[str, Any]


def profile_settings(settings: Settings, device: torch.device, console: Console) -> list[Row]:
    """Train the model that the settings name for a moment, and profile it on other batches of the same data."""
    torch.manual_seed(0)
    data = on_device(load(settings.data, folder=settings.folder), device)
    common: dict[str, Any] = {"cost": settings.cost, "batch_size": settings.batch_size}
    model = briefly_trained(settings.model, data, optimizer="sgd", steps=settings.train_steps, **common)
    batches = other_batches(data, count=settings.batches, **common)
    return profile(model, batches, cost=settings.cost, rounds=settings.rounds, console=console)


def profile(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    cost: str = "cross_entropy",
    rounds: int = 20,
    recipes: Sequence[Recipe] = RECIPES,
    console: Console | None = None,
) -> list[Row]:
    """What a step of every recipe costs and buys, at the model's parameters as they are; they stay so.

    Args:
        model: any module that `mep.trace` can read.
        batches: pairs `(x, target)`. The gradients are judged on all of them, and the steps take them in turn.
        cost: "cross_entropy" or "mse".
        rounds: turns of each recipe, of 5 timed steps.
        recipes: what to compare; backprop and SGD, the yardstick, goes before them. Settling is judged by the tables
            alone: examples that do not settle are not warned of.
        console: where to show progress, if it is a terminal.

    Returns:
        For each recipe its own fields, those of `judge`, `time_steps` and `climb`, and `error`: None, or why there are
        none of them. Where the exact gradient cannot be had, that is an error, too.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> batch = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> rows = profile(net, [batch], rounds=2, recipes=[Recipe("EP", "eqprop", {"tol": 1e-3})])
        >>> [row["label"] for row in rows], rows[1]["cosine"] > 0.999, rows[1]["ratio"]["median"] > 0
        (['Backprop + SGD', 'EP'], True, True)
    """
    if rounds < 2 or not batches:
        raise ArgumentError(f"profile(rounds={rounds}, batches={len(batches)}): give 2 rounds and 1 batch at least.")
    compared = (YARDSTICK, *recipes)
    reference = Reference.of(model, batches, cost)
    rows: list[Row] = [{**recipe._asdict(), "error": None} for recipe in compared]
    for row, recipe in zip(rows, compared, strict=True):
        try:
            row.update(judge(recipe, model, batches, reference, cost))
        except MepError as error:
            row["error"] = str(error)
    able = [place for place, row in enumerate(rows) if row["error"] is None]
    hidden = console is None or not console.is_terminal
    turns = track(range(rounds), "", console=console, transient=True, disable=hidden)
    for place, times in zip(
        able, time_steps([compared[place] for place in able], model, batches, cost, turns), strict=True
    ):
        rows[place].update(times)
    climb([rows[place] for place in able])
    return rows


def climb(rows: Sequence[Row]) -> None:
    """Add to every row of a ladder what its steps bought beyond those of the row before.

    bought: the factor by which the gap fell. idle: the gap was smaller than the bias of beta before, so that the
    gradient of the loss is known no better now. Of the first row of a ladder, and of rows of none, None.
    """
    for row in rows:
        row.update(bought=None, idle=None)
    for before, row in pairwise(rows):
        if row["ladder"] and row["ladder"] == before["ladder"]:
            row.update(bought=before["gap"] / row["gap"], idle=bool(before["idle"]) or before["gap"] <= before["bias"])
