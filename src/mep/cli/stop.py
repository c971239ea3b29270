"""Stop between two steps: a signal asks, the loop obeys when its state is whole."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class StopRequest:
    """Notes the first Ctrl-C or termination signal; a second one acts as if this were not here."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> StopRequest:
        """Take over the signals."""
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        """Hand them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        self.__exit__()
