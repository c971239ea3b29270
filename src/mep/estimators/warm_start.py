"""Equilibria of earlier steps by the indices of their examples: where settling the same examples again may begin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mep.errors import InputError


class EquilibriumCache:
    """One row a state and example, as long as the largest index.

    Example:
        >>> cache = EquilibriumCache()
        >>> cache.keep(torch.tensor([2, 0]), {"s": torch.ones(2, 3)})
        >>> values, seen = cache.of(torch.tensor([0, 1]), {"s": torch.zeros(2, 3)})
        >>> values["s"].sum(1), seen
        (tensor([3., 0.]), tensor([ True, False]))
    """

    def __init__(self) -> None:
        self.rows: dict[str, Tensor] = {}
        self.seen = torch.zeros(0, dtype=torch.bool)

    def of(self, indices: Tensor, like: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """The values kept for these examples, in the shapes of `like`, 0 where there are none; and where there are."""
        self._make_room(indices, like)
        values = {name: self.rows[name][indices].reshape(value.shape) for name, value in like.items()}
        return values, self.seen[indices]

    def keep(self, indices: Tensor, values: Mapping[str, Tensor]) -> None:
        """Replace the values of these examples."""
        self._make_room(indices, values)
        for name, value in values.items():
            self.rows[name][indices] = value.reshape(len(indices), -1)
        self.seen[indices] = True

    def state_dict(self) -> dict[str, Any]:
        """Everything that is kept."""
        return {"rows": dict(self.rows), "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.rows = {name: rows.clone() for name, rows in state["rows"].items()}
        self.seen = state["seen"].clone()

    def _make_room(self, indices: Tensor, like: Mapping[str, Tensor]) -> None:
        """Rows for all indices, of the width, dtype and device of `like`; what no longer fits is forgotten."""
        need = max(int(indices.max()) + 1, len(self.seen))
        widths = {name: value.numel() // len(indices) for name, value in like.items()}
        fits = all(name in self.rows and self.rows[name].shape[1] == width for name, width in widths.items())
        if not fits or set(self.rows) != set(like):
            self.rows = {name: value.new_zeros(need, widths[name]) for name, value in like.items()}
            self.seen = torch.zeros(need, dtype=torch.bool, device=indices.device)
        elif need > len(self.seen):
            self.rows = {name: _longer(rows, need) for name, rows in self.rows.items()}
            self.seen = _longer(self.seen, need)


def check_indices(indices: Any, batch: int) -> Tensor:
    """Refuse what does not name the examples of a batch."""
    whole = isinstance(indices, Tensor) and not (indices.is_floating_point() or indices.is_complex())
    if not whole or indices.dtype == torch.bool or indices.shape != (batch,) or int(indices.min()) < 0:
        got = f"{indices.dtype} of shape {tuple(indices.shape)}" if isinstance(indices, Tensor) else type(indices)
        raise InputError(
            f"indices must be {batch} integers >= 0, the places of the examples in the data set, got {got}. "
            "Let the data set return its index beside the example."
        )
    return indices.long()


def _longer(rows: Tensor, length: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(length - len(rows), *rows.shape[1:])])
