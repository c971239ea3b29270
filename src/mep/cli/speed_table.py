"""The tables of `mep bench speed`, from its record: all models at a glance, then each by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from mep.cli.layout import print_table, print_text, warn_if_busy
from mep.cli.speed_columns import CAPTIONS, COST, NONE, Row, labels, milliseconds, threads, times

Record = dict[str, Any]
FAILED = "failed"
UNSETTLED = "*"
SETTLED_SHARE = 0.99  # of the examples: a rare one that falls short changes no median


def show(record: Record, console: Console) -> None:
    """Print the tables: ruled on a terminal, as Markdown anywhere else, where those of a model can be unfolded."""
    settings, models = record["settings"], record["models"]
    print_text(console, "{data}, after {train_steps} steps of Adam and backprop.".format(**settings))
    if record["stopped"]:
        print_text(console, f"Stopped by Ctrl-C during {record['stopped']}: what it and later models take is missing.")
    for place, number in enumerate(settings["threads"]):
        print_text(console, f"Time of a step over that of backprop + SGD, {threads(number)}:")
        show_overview(models, place, console)
    print_text(console, OVERVIEW_CAPTION)
    print_text(console, describe(record["attainable"]))
    if not record["machine"]["gpu"]:
        warn_if_busy(console, (time["running"] for model in models for row in model["rows"] for time in row["times"]))
    for model in models:
        with _folded(_title(model), console):
            show_rows(model["rows"], console)
    for caption in CAPTIONS:
        print_text(console, f"- {caption}")


def show_overview(models: Sequence[Record], place: int, console: Console) -> None:
    """Print the ratios of all rows on all models with the number of threads at this place, and the yardstick's time."""
    console.print()
    found = [{row["label"]: row for row in model["rows"]} for model in models]
    yardstick, *others = labels(models)
    first = [yardstick, *(milliseconds(rows[yardstick]["times"][place]["seconds"]["median"]) for rows in found)]
    ratios = ([label, *(_overview(rows.get(label), place) for rows in found)] for label in others)
    print_table(console, ["Recipe", *(model["model"] for model in models)], [first, *ratios])


def show_rows(rows: Sequence[Row], console: Console) -> None:
    """Print the tables of one model, and why some of its rows are not in them."""
    able = [row for row in rows if row["error"] is None]
    for columns in (times(able), COST):
        console.print()
        print_table(console, list(columns), ([cell(row) for cell in columns.values()] for row in able))
    for row in rows:
        if row["error"] is not None:
            print_text(console, f"{row['label']} failed: {row['error']}")


def describe(attainable: Sequence[dict[str, float]]) -> str:
    """What the machine can do, in a sentence."""
    parts = (
        f"{threads(int(one['threads']))}: {one['flops'] / 1e9:.0f} GFLOP/s in a matrix product of size 1024, "
        f"{one['bytes'] / 1e9:.0f} GB/s in a copy beyond the caches"
        for one in attainable
    )
    return f"The most that the machine does, {'; '.join(parts)}."


OVERVIEW_CAPTION = (
    f"Medians over the rounds; in the first row the time itself. {UNSETTLED}: more than 1% of the examples "
    f"did not settle. {FAILED}: the reason stands below. {NONE}: only for models with convolutions."
)


@contextmanager
def _folded(title: str, console: Console) -> Iterator[None]:
    """What is printed within follows its title; in Markdown it is shown on a click."""
    if console.is_terminal:
        console.print()
        print_text(console, title)
        yield
        return
    _print(console, f"\n<details><summary>{title}</summary>")
    yield
    _print(console, "\n</details>")


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _title(model: Record) -> str:
    numbers = sorted({time["rounds"] for row in model["rows"] for time in row["times"]})
    return "{model}, batch {batch_size}, {parameters:,} parameters, ".format(**model) + (
        f"{' or '.join(map(str, numbers))} rounds"
    )


def _overview(row: Row | None, place: int) -> str:
    if row is None:
        return NONE
    if row["error"] is not None:
        return FAILED
    settled = row["settled"] is None or row["settled"] >= SETTLED_SHARE
    return f"{row['times'][place]['ratio']['median']:.2f}" + ("" if settled else UNSETTLED)
