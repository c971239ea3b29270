"""Draw the picture of any record that `mep` wrote, and print its table.

mep plot runs/bench/mnist5k.json
mep plot runs/bench/mnist5k.json --out docs/bench.png
mep plot runs/bench/mnist5k.json > table.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plot(
    record: Annotated[Path, typer.Argument(help="A JSON record that `mep` wrote.")],
    out: Annotated[Path | None, typer.Option(help="The PNG to write. Default: beside the record.")] = None,
) -> None:
    """Draw; see the head of this file."""
    from mep.cli import kinds
    from mep.cli.files import make_parent
    from mep.cli.layout import output

    content = kinds.read(record)
    picture = out or record.with_suffix(".png")
    make_parent(picture)
    kinds.draw(content, picture)
    kinds.show(content, output())
    typer.echo(f"Picture: {picture}", err=True)
