"""The lab's commands, and those that show again what they measured.

mep bench --quick
mep plot runs/bench/mnist5k.json
mep report runs/bench/*.json > runs/bench/page.md
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from mep.lab import bench, profile, speed, study, verify
from mep.runs import records, report

# The modules that write records, each with the kind of its own: `show` prints their tables, `draw` their picture.
KINDS: dict[str, Any] = {module.KIND: module for module in (bench, speed, profile, study, verify)}


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(help=help_of(profile))(profile.profile)
    app.command(help=help_of(verify))(verify.verify)
    app.command(help=help_of(study))(study.study)
    app.command(help=help_of(plot))(plot)
    app.command("report", help=help_of(report_records))(report_records)
    benches = typer.Typer(rich_markup_mode="rich")
    benches.callback(invoke_without_command=True, help=help_of(bench))(bench.bench)
    benches.command("speed", help=help_of(speed))(speed.speed)
    app.add_typer(benches, name="bench")


def help_of(described: Any) -> str:
    """The head of a file or function; a backspace keeps the lines of the paragraph that follows it."""
    return inspect.cleandoc(described.__doc__).replace("\n\n    mep", "\n\n\b\n    mep")


def plot(
    record: Annotated[Path, typer.Argument(help="A JSON record that `mep` wrote.")],
    out: Annotated[Path | None, typer.Option(help="The PNG to write. Default: beside the record.")] = None,
) -> None:
    """Draw the picture of any record that `mep` wrote, and print its table.

    mep plot runs/bench/mnist5k.json
    mep plot runs/bench/mnist5k.json --out docs/bench.png
    mep plot runs/bench/mnist5k.json > table.md
    """
    content = records.read(record, KINDS)
    picture = out or record.with_suffix(".png")
    records.make_parent(picture)
    KINDS[content["kind"]].draw(content, picture)
    KINDS[content["kind"]].show(content, report.output())
    typer.echo(f"Picture: {picture}", err=True)


def report_records(
    paths: Annotated[list[Path], typer.Argument(metavar="RECORD...", help="JSON records that `mep` wrote.")],
) -> None:
    """Make Markdown of records: their tables, their pictures, and what made them.

        mep report runs/bench/mnist5k.json
        mep report runs/bench/*.json > runs/bench/page.md
        mep report docs/benchmarks/*.json >> docs/benchmarks/PERFORMANCE_BASELINES.md

    A picture is shown if it lies beside its record, and by its name alone: the page belongs into the same folder.
    """
    console = report.output(markdown=True)
    for path, record in [(path, records.read(path, KINDS)) for path in paths]:
        typer.echo(f"\n## {path.stem}: `{record['kind']}`\n")
        KINDS[record["kind"]].show(record, console)
        typer.echo(f"\n{records.origin(record)} The numbers: [{path.name}]({path.name}).")
        picture = path.with_suffix(".png")
        if picture.exists():
            typer.echo(f"\n![{path.stem}]({picture.name})")
