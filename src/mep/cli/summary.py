"""The figures of the table of `mep bench`, from its results per seed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from mep.cli.contestants import MUON, SGD

Result = dict[str, Any]


def summarise(rows: Sequence[dict[str, Any]]) -> None:
    """Add to each row of a record its `summary` over the seeds, beside those of SGD and Muon."""
    by_name = {row["name"]: row["seeds"] for row in rows}
    for row in rows:
        row["summary"] = _summary(row["seeds"], by_name.get(SGD), by_name.get(MUON))


def _summary(own: list[Result], sgd: list[Result] | None, muon: list[Result] | None) -> dict[str, float | None]:
    accuracies = [result["accuracy"] for result in own]
    accuracy = statistics.mean(accuracies)
    return {
        "accuracy": accuracy,
        "accuracy_spread": statistics.stdev(accuracies) if len(own) > 1 else None,
        "vs_sgd": _difference(accuracy, sgd),
        "vs_muon": _difference(accuracy, muon),
        "epoch_seconds": _mean(own, "epoch_seconds"),
        "step_seconds": _mean(own, "step_seconds"),
        "step_ratio": _ratio(own, sgd),
        "residual": _mean(own, "residual"),
        "residual_max": max((r["residual_max"] for r in own if r["residual_max"] is not None), default=None),
        "sweeps": _mean(own, "sweeps"),
        "converged": _mean(own, "converged"),
    }


def _mean(results: list[Result], key: str) -> float | None:
    values = [result[key] for result in results if result[key] is not None]
    return statistics.mean(values) if values else None


def _difference(accuracy: float, reference: list[Result] | None) -> float | None:
    return None if reference is None else accuracy - statistics.mean(result["accuracy"] for result in reference)


def _ratio(own: list[Result], sgd: list[Result] | None) -> float | None:
    """The mean over seeds of the step cost over that of SGD, measured in the same minutes."""
    pairs = [(a["step_seconds"], b["step_seconds"]) for a, b in zip(own, sgd or [], strict=False)]
    ratios = [a / b for a, b in pairs if a and b]
    return statistics.mean(ratios) if ratios else None
