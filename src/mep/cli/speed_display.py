"""What the terminal shows while `mep bench speed` runs: a model, what is done with it, how long it took."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Display:
    """A live line for what goes on, if the console is a terminal, and lines that stay.

    models: how many there will be.
    """

    def __init__(self, console: Console | None = None, models: int = 1) -> None:
        self.console, self.models, self.begun = console or Console(quiet=True), models, 0
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("", total=models)
        self._title, self._stages, self._since = "", 1, time.monotonic()

    def __enter__(self) -> Display:
        """Start the line."""
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        """Take it away; the lines stay."""
        self._bar.stop()

    def begin(self, title: str, stages: int) -> None:
        """Go on to the next model, with so many stages."""
        self.begun += 1
        self._title, self._stages, self._since = f"{title} ({self.begun} of {self.models})", stages, time.monotonic()

    def stage(self, doing: str) -> None:
        """Say what is done now; a stage is over."""
        self.say(doing)
        self._bar.advance(self._task, 1 / self._stages)

    def say(self, doing: str) -> None:
        """Say what is done now."""
        self._bar.update(self._task, description=f"{self._title}: {doing}")

    def rounds(self, turns: Iterable[int], doing: str) -> Iterator[int]:
        """The same turns, shown."""
        for number in turns:
            self.say(f"{doing}, round {number + 1}")
            yield number

    def end(self, line: str) -> None:
        """The model is done: a line that stays, with the time it took."""
        self._bar.update(self._task, completed=self.begun)
        text = f"{self._title}: {line}, {time.monotonic() - self._since:.0f} s"
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
