"""What the terminal shows during `mep train`: a live bar, and a line that stays for every epoch."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mep.cli.layout import share
from mep.cli.run import Run

REFRESH = 0.2  # seconds between readings of the loss: the only times that a step waits for the device


class Display:
    """Shows a run's way to its goal, a number of epochs or of training seconds."""

    def __init__(self, epochs: int | None, seconds: float | None) -> None:
        self.console = Console(stderr=True)
        self.epochs, self.seconds = epochs, seconds
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=seconds or epochs, figures="")
        self._next = 0.0

    def __enter__(self) -> Display:
        """Start the bar."""
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        """Take the bar away; the lines stay."""
        self.bar.stop()

    def update(self, run: Run) -> None:
        """After a step: move the bar, now and then."""
        if self.bar.disable or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + REFRESH
        known = {"test_accuracy": run.history[-1]["test_accuracy"]} if run.history else {}
        done = run.seconds if self.seconds else run.batches.epochs
        figures = describe(run.tally.means() | known)
        self.bar.update(self.task, completed=done, description=f"epoch {run.batches.epoch + 1}", figures=figures)

    def epoch(self, line: dict[str, Any]) -> None:
        """After an epoch: a line that stays."""
        self.console.print(
            f"epoch {line['epoch']:3d}  {describe(line)}  {line['seconds']:.1f} s",
            highlight=False,
            soft_wrap=True,
        )


def describe(line: dict[str, Any]) -> str:
    """The figures of a line of history that exist, in words; the share that settled only where some did not.

    >>> describe({"loss": 0.5, "sweeps": 1.25, "settled": 0.75})
    'loss 0.5000  sweeps 1.2  settled 75%'
    """
    formats = {
        "loss": "loss {:.4f}",
        "train_accuracy": "train {:.1f}%",
        "test_accuracy": "test {:.1f}%",
        "residual": "residual {:.1e}",
        "sweeps": "sweeps {:.1f}",
    }
    figures = [form.format(line[key]) for key, form in formats.items() if line.get(key) is not None]
    if line.get("settled") not in (None, 1):
        figures.append(f"settled {share(line['settled'])}")
    return "  ".join(figures)
