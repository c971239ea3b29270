"""Make Markdown of records: their tables, their pictures, and what made them.

mep report runs/bench/mnist5k.json
mep report runs/bench/*.json > runs/bench/page.md
mep report docs/benchmarks/*.json >> docs/benchmarks/PERFORMANCE_BASELINES.md

A picture is shown if it lies beside its record, and by its name alone: the page belongs into the same folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    paths: Annotated[list[Path], typer.Argument(metavar="RECORD...", help="JSON records that `mep` wrote.")],
) -> None:
    """Print; see the head of this file."""
    from mep.cli import kinds
    from mep.cli.layout import output
    from mep.cli.records import origin

    console = output(markdown=True)
    for path, record in [(path, kinds.read(path)) for path in paths]:
        typer.echo(f"\n## {path.stem}: `{record['kind']}`\n")
        kinds.show(record, console)
        typer.echo(f"\n{origin(record)} The numbers: [{path.name}]({path.name}).")
        picture = path.with_suffix(".png")
        if picture.exists():
            typer.echo(f"\n![{path.stem}]({picture.name})")
