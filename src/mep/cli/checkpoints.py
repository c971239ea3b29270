"""Checkpoints of `mep train`: written whole or not at all, read as data and never as code."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from mep.cli.files import write_atomically
from mep.errors import MepError

FORMAT = "mep train checkpoint"
VERSION = 2
CONTENTS = {"settings", "data", "run", "random"}


class CheckpointError(MepError, ValueError):
    """A checkpoint is damaged, foreign, or of another run."""


def save(path: Path, settings: dict[str, Any], data: str, run: dict[str, Any]) -> None:
    """Write the state of a run, with torch's random state as it is now."""
    contents = {
        "format": FORMAT,
        "version": VERSION,
        "settings": settings,
        "data": data,
        "run": run,
        "random": random_state(),
    }
    write_atomically(path, lambda file: torch.save(contents, file))


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote; refuses everything else."""
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint {path}. `mep train --checkpoint {path}` starts one.")
    try:
        _check_sums(path)
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types on a damaged or hostile file
        raise CheckpointError(
            f"{path} is not a whole checkpoint: it is truncated, damaged or of another program."
        ) from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by `mep train`; resume from a file that --checkpoint wrote.")
    if contents.get("version") != VERSION:
        found = contents.get("version")
        raise CheckpointError(
            f"{path} has checkpoint version {found}, this mep reads version {VERSION}: "
            "resume with the mep that wrote it."
        )
    if not contents.keys() >= CONTENTS:
        raise CheckpointError(f"{path} lacks {', '.join(sorted(CONTENTS - contents.keys()))}; it cannot be resumed.")
    return contents


def random_state() -> dict[str, Any]:
    """The state of torch's generators. The order of examples follows from seed and epoch, without any."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the generators; those of GPUs only where the number of GPUs is the same."""
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _check_sums(path: Path) -> None:
    # A checkpoint is a zip archive with a checksum for each part, which torch writes but does not read.
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise ValueError(damaged)
