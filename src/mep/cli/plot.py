"""Draw the picture of a record of `mep bench`, and print its table.

mep plot runs/bench/mnist5k.json
mep plot runs/bench/mnist5k.json --out docs/bench.png
mep plot runs/bench/mnist5k.json > table.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mep.cli.bench import KIND


def plot(
    record: Annotated[Path, typer.Argument(help="A JSON record that `mep bench` wrote.")],
    out: Annotated[Path | None, typer.Option(help="The PNG to write. Default: beside the record.")] = None,
) -> None:
    """Draw; see the head of this file."""
    from rich.console import Console

    from mep.cli import records
    from mep.cli.figure import draw
    from mep.cli.files import make_parent
    from mep.cli.table import show

    content = records.read(record, KIND)
    picture = out or record.with_suffix(".png")
    make_parent(picture)
    draw(content, picture)
    show(content, Console())
    typer.echo(f"Picture: {picture}", err=True)
