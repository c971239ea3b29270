"""The figures of the table of `mep bench`, from its results per seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from mep.cli.contestants import MUON, SGD

Result = dict[str, Any]


def summarise(rows: Sequence[dict[str, Any]], target: float) -> None:
    """Add to each row of a record its `summary` over the seeds, beside those of SGD and Muon."""
    by_name = {row["name"]: row["seeds"] for row in reversed(rows)}  # of variants, the first counts
    for row in rows:
        row["summary"] = _summary(row["seeds"], by_name.get(SGD), by_name.get(MUON), target)


def time_to(target: float, curve: dict[str, list[float]]) -> float:
    """The training time at which accuracy first reached the target, linear between two measurements; or infinity.

    >>> time_to(90.0, {"seconds": [0.0, 1.0, 3.0], "accuracy": [10.0, 80.0, 100.0]})
    2.0
    """
    points = list(zip(curve["seconds"], curve["accuracy"], strict=True))
    if points[0][1] >= target:
        return points[0][0]
    for (start, before), (end, after) in pairwise(points):
        if after >= target:
            return start + (end - start) * (target - before) / (after - before)
    return math.inf


def _summary(
    own: list[Result], sgd: list[Result] | None, muon: list[Result] | None, target: float
) -> dict[str, float | None]:
    accuracies = [result["accuracy"] for result in own]
    accuracy = statistics.mean(accuracies)
    return {
        "accuracy": accuracy,
        "accuracy_spread": statistics.stdev(accuracies) if len(own) > 1 else None,
        "vs_sgd": _difference(accuracy, sgd),
        "vs_muon": _difference(accuracy, muon),
        "target_seconds": _finite(statistics.median(time_to(target, result["curve"]) for result in own)),
        "epoch_seconds": _mean(own, "epoch_seconds"),
        "step_seconds": _mean(own, "step_seconds"),
        "step_ratio": _ratio(own, sgd),
        "running": _mean(own, "running"),
        "residual": _mean(own, "residual"),
        "residual_max": max((r["residual_max"] for r in own if r["residual_max"] is not None), default=None),
        "sweeps": _mean(own, "sweeps"),
        "settled": _mean(own, "settled"),
    }


def _mean(results: list[Result], key: str) -> float | None:
    values = [result[key] for result in results if result[key] is not None]
    return statistics.mean(values) if values else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _difference(accuracy: float, reference: list[Result] | None) -> float | None:
    return None if reference is None else accuracy - statistics.mean(result["accuracy"] for result in reference)


def _ratio(own: list[Result], sgd: list[Result] | None) -> float | None:
    """The mean over seeds of the step cost over that of SGD, measured in the same minutes."""
    pairs = [(a["step_seconds"], b["step_seconds"]) for a, b in zip(own, sgd or [], strict=False)]
    ratios = [a / b for a, b in pairs if a and b]
    return statistics.mean(ratios) if ratios else None
