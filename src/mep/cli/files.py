"""Write a file whole or not at all: whoever reads it, a crash before or not, never meets half of one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from mep.errors import ArgumentError


def make_parent(path: Path) -> None:
    """Create the folder of `path` and try it: a bad path fails before the work whose result goes there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ArgumentError(f"Cannot write to {path}: {error.strerror}. Give a path in a folder of yours.") from error
    if path.is_dir():
        raise ArgumentError(f"Cannot write {path}: it is a folder. Give the path of a file.")


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Let `write` fill a temporary file beside `path`, force it to disk, then rename it over `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
