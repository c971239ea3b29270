"""The kinds of records, and the modules that show them: to add one, add a line.

A table module has `show(record, console)`, a figure module `draw(record, path)`, and both need the record alone.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import typer
from rich.console import Console

from mep.cli import records
from mep.cli.layout import output
from mep.cli.records import Record


class Kind(NamedTuple):
    """Where the table and the picture of a kind of record are made."""

    table: str
    figure: str


KINDS = {
    "mep bench": Kind("mep.cli.table", "mep.cli.figure"),
    "mep bench speed": Kind("mep.cli.speed_table", "mep.cli.speed_figure"),
    "mep profile": Kind("mep.cli.profile_table", "mep.cli.profile_figure"),
    "mep study": Kind("mep.cli.study_table", "mep.cli.study_figure"),
    "mep verify": Kind("mep.cli.verify_table", "mep.cli.verify_figure"),
}


def read(path: Path) -> Record:
    """The record in a file, of any kind above."""
    return records.read(path, KINDS)


def show(record: Record, console: Console) -> None:
    """Print the record's table: ruled on a terminal, as Markdown anywhere else."""
    function: Callable[[Record, Console], None] = import_module(KINDS[record["kind"]].table).show
    function(record, console)


def draw(record: Record, path: Path) -> None:
    """Draw the record's picture into `path`, a PNG, SVG or PDF."""
    function: Callable[[Record, Path], None] = import_module(KINDS[record["kind"]].figure).draw
    function(record, path)


def publish(record: Record, path: Path) -> None:
    """Write a new record, draw its picture beside it, print its table, and say where both are."""
    picture = path.with_suffix(".png")
    records.write(path, record)
    draw(record, picture)
    show(record, output())
    typer.echo(f"\nRecord: {path}\nPicture: {picture}")
