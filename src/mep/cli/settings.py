"""The settings of a training run: defaults, what the user gave, and what a checkpoint says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from mep.errors import ArgumentError


@dataclass(frozen=True)
class Settings:
    """What `mep train` was asked for."""

    data: str = "mnist5k"  # real digits that come with a package: nothing to download
    folder: str | None = None  # only the sets that a user brings live in one
    model: str = "mlp"  # 784-128-64-10, the model of the benchmarks
    preset: str = "smep"  # equilibrium propagation with the update that suits it
    batch_size: int = 256  # that of the benchmarks
    seed: int = 0  # any, but fixed: two runs are alike unless asked otherwise
    device: str = "auto"  # the GPU where there is one
    threads: int | None = None  # torch chooses
    epochs: int | None = None  # EPOCHS, unless seconds are given
    seconds: float | None = None  # as long as the epochs take
    options: dict[str, Any] = field(default_factory=dict)  # what was given to the preset, which has its own defaults


EPOCHS = 10  # a good model of mnist5k within seconds
GOAL = ("epochs", "seconds")
CHANGEABLE = {*GOAL, "folder", "device", "threads"}  # on resuming; the others decide what is computed


def decide(given: Mapping[str, Any], saved: Mapping[str, Any] | None = None) -> Settings:
    """The settings of a new run, or of one resumed from `saved`, which wins wherever nothing is given."""
    names = {item.name for item in fields(Settings)} - {"options"}
    own = {key: value for key, value in given.items() if key in names}
    options = {key: value for key, value in given.items() if key not in names}
    _check(own)
    if saved is None:
        if not any(key in own for key in GOAL):
            own["epochs"] = EPOCHS
        return Settings(**own, options=options)
    for key, value in (own | options).items():
        before = saved[key] if key in names else saved["options"].get(key)
        if key not in CHANGEABLE and value != before:
            flag = "--" + key.replace("_", "-")
            made = f"with {flag} {before}" if before is not None else f"without {flag}"
            raise ArgumentError(
                f"The checkpoint was made {made}, and you ask for {flag} {value}. "
                f"Leave {flag} out to go on, or start a new run without --resume."
            )
    if any(key in own for key in GOAL):
        saved = {**saved, **dict.fromkeys(GOAL)}
    return Settings(**{**saved, **own})


def _check(given: Mapping[str, Any]) -> None:
    if all(key in given for key in GOAL):
        raise ArgumentError("--epochs and --seconds are two ways to say how long to train. Give one of them.")
    for key in ("epochs", "seconds", "batch_size", "threads"):
        if key in given and not given[key] > 0:
            raise ArgumentError(f"--{key.replace('_', '-')} must be above 0, not {given[key]}.")
