"""What a model was when it was traced, and how to put its buffers back."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Snapshot:
    """Tells whether a model is still the one that was traced: modules, parameters, modes, hooks and settings.

    Values of parameters and buffers may change; what `forward` would do may not.
    """

    def __init__(self, model: nn.Module):
        self.modules = tuple(model.modules())
        self.facts = [_facts(m) for m in self.modules]

    def matches(self) -> bool:
        """Whether every module is as it was."""
        return all(_facts(m) == kept for m, kept in zip(self.modules, self.facts, strict=True))


def _facts(module: nn.Module) -> dict[str, Any]:
    """A module's attributes; dictionaries (of parameters, submodules, hooks) and tensors by identity."""
    return {
        name: (tuple(value), tuple(map(id, value.values())))
        if isinstance(value, dict)
        else value
        if isinstance(value, (bool, int, float, str, tuple, type(None)))
        else id(value)
        for name, value in vars(module).items()
        if name != "_buffers"
    }


class Buffers:
    """A model's buffers during a step: every evaluation reads those of before, and the first one's writes remain.

    Running statistics move once a step, however often the model is evaluated. A module may write its buffers in place
    or bind them anew; autograd graphs of earlier evaluations stay valid, since later ones get copies.
    """

    def __init__(self, model: nn.Module):
        self.homes = [m._buffers for m in model.modules() if m._buffers]
        self.before = self._copies()
        self.after = self.before

    def keep_writes(self) -> None:
        """Call after the first evaluation: what it wrote is what will remain."""
        if self.homes:
            self.after = self._copies()

    def rewind(self) -> None:
        """Lay out copies of what they were before the step, for the next evaluation."""
        for home, kept in zip(self.homes, self.before, strict=True):
            home.update({name: None if value is None else value.clone() for name, (_, value) in kept.items()})

    def finish(self) -> None:
        """To what the first evaluation wrote."""
        self._restore(self.after)

    def undo(self) -> None:
        """To what they were before the step."""
        self._restore(self.before)

    def _copies(self) -> list[dict[str, tuple[Tensor | None, Tensor | None]]]:
        return [{k: (b, None if b is None else b.clone()) for k, b in home.items()} for home in self.homes]

    def _restore(self, kept: list[dict[str, tuple[Tensor | None, Tensor | None]]]) -> None:
        for home, copies in zip(self.homes, kept, strict=True):
            for name, (buffer, value) in copies.items():
                if buffer is not None and value is not None:
                    buffer.copy_(value)
                home[name] = buffer
