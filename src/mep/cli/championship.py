"""`mep bench` as a whole: a race for every seed, and the rows of the record that come of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mep.cli.bench import Settings
from mep.cli.contestants import Contestant
from mep.cli.race import Racer, race
from mep.cli.summary import summarise
from mep.cli.training import on_device
from mep.data import load


def hold(
    settings: Settings, contestants: Sequence[Contestant], device: torch.device, console: Console
) -> list[dict[str, Any]]:
    """Race the contestants on every seed; returns a row for each contestant."""
    data = on_device(load(settings.data, folder=settings.folder), device)

    def entered(seed: int) -> list[Racer]:
        return [
            Racer(c, data, model=settings.model, cost=settings.cost, batch_size=settings.batch_size, seed=seed)
            for c in contestants
        ]

    for racer in entered(seed=0):  # what torch and we set up once for all must not fall on whoever is first
        racer.advance(until=1e-9)
    rows = [{**contestant._asdict(), "seeds": []} for contestant in contestants]
    with _progress(console) as bar:
        task = bar.add_task("", total=settings.seconds * settings.seeds * len(contestants))
        for seed in range(settings.seeds):
            bar.update(task, description=f"seed {seed + 1} of {settings.seeds}")
            racers = entered(seed)
            race(racers, settings.seconds, settings.turn, lambda seconds: bar.advance(task, seconds))
            for row, racer in zip(rows, racers, strict=True):
                row["seeds"].append(racer.result())
            scores = ", ".join(f"{row['label']} {row['seeds'][-1]['accuracy']:.1f}%" for row in rows)
            console.print(f"seed {seed + 1} of {settings.seeds}: {scores}", highlight=False, soft_wrap=True)
    summarise(rows, settings.target)
    return rows


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TimeRemainingColumn(compact=True))
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
