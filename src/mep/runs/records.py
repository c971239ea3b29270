"""JSON records of runs, with the command, versions and machine that made them; files that are whole or absent."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

import mep
from mep.errors import ArgumentError, DataError

Record = dict[str, Any]


def new_record(kind: str, device: Any, settings: Any) -> Record:
    """A record without results: what made it (kind, command, commit, versions, machine), and its settings."""
    return {
        "kind": kind,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["mep", *sys.argv[1:]]),
        "commit": commit(),
        "versions": versions(),
        "machine": machine(device),
        "settings": asdict(settings),
    }


def versions() -> dict[str, str]:
    """The versions that decide the numbers."""
    import torch

    return {"mep": mep.__version__, "torch": torch.__version__, "python": platform.python_version()}


def machine(device: Any) -> Record:
    """The hardware that decides the times, as far as it can be found out."""
    import torch

    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def commit() -> str | None:
    """The git commit of the current directory, with `+changes` if tracked files differ from it."""
    head = _git("rev-parse", "HEAD")
    if head is None:
        return None
    return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")


def write(path: Path, record: Record) -> None:
    """Write a record atomically. JSON has no NaN: a number that is not finite becomes null."""
    text = json.dumps(_finite(record), indent=1, allow_nan=False)
    text = re.sub(r"\[\n[^\[\]{}\"]*\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text)  # a list a line
    write_atomically(path, lambda file: file.write(f"{text}\n".encode()))


def read(path: Path, kinds: Collection[str]) -> Record:
    """Read a record of one of these kinds; anything else is refused."""
    commands = " or ".join(f"`{kind}`" for kind in kinds)
    try:
        record = json.loads(path.read_text())
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}. {commands} writes such records.") from error
    except ValueError as error:
        raise DataError(f"{path} is not a JSON record: {error}.") from error
    found = record.get("kind") if isinstance(record, dict) else None
    if found not in kinds:
        raise DataError(f"{path} is a record of kind {found!r}; this command reads those of {commands}.")
    return record


def origin(record: Record) -> str:
    """What made a record, in a sentence of Markdown."""
    machine, versions = record["machine"], record["versions"]
    where = machine["gpu"] or f"{machine['processor']}, {machine['threads']} of {machine['cores']} threads"
    commit = f"commit `{record['commit']}`" if record["commit"] else "no commit"
    made = f"Made by `{record['command']}` on {record['created'][:10]}, {commit}"
    return f"{made}, mep {versions['mep']}, torch {versions['torch']}, Python {versions['python']}; {where}."


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


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, force it to disk, then rename it over `path`.

    So no reader meets half a file, even after a crash.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _git(*arguments: str) -> str | None:
    """The output of a git command that writes nothing, or None outside a repository."""
    command = ["git", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
