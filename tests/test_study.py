"""`mep study`: every cell of the grid is there, and says what theory says."""

import copy
import json

import pytest
import torch
from rich.console import Console
from test_profile import empty_columns
from torch import nn
from typer.testing import CliRunner

from mep.cli import app
from mep.lab.study import family, nearest, show
from mep.lab.study_measure import FAMILIES, MEASURED, measure, network

SMALL = ["--depth", "2", "--depth", "4", "--beta", "0.01", "--beta", "0.1", "--width", "8", "--train-steps", "3"]


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    done = CliRunner().invoke(app, ["study", *SMALL, "--out", str(folder)])
    assert done.exit_code == 0, done.output
    return folder, json.loads((folder / "study.json").read_text()), done.output


def test_every_network_beta_and_stage_has_a_row(studied):
    _, record, _ = studied
    seen = {(family(r), r["depth"], r["beta"], r["stage"]) for r in record["rows"]}
    # the default everywhere; beta varies at the depth that is nearest to the common one, 4
    assert len(seen) == len(record["rows"]) == len(FAMILIES) * 2 * (2 + 1 + 2)


def test_every_field_is_measured_in_every_row(studied):
    _, record, output = studied
    for row in record["rows"]:
        assert all(row[field] is not None for field in MEASURED)
        assert (row["settled"] == 1) == (row["residual"] <= 1e-2) == (row["why"] == "converged")
        assert 0 < row["settled"] <= 1 and 1 <= row["sweeps"] <= 100
    assert empty_columns(output) == []


def test_every_example_has_the_beta_that_is_named(studied):
    _, record, _ = studied
    for row in record["rows"]:
        assert row["median_beta"] == row["beta"] or (row["beta"] is None and 0 < row["median_beta"] <= 0.01)


def test_the_error_falls_with_beta(studied):
    _, record, _ = studied
    deep = {(family(r), r["stage"], r["beta"]): r["error"] for r in record["rows"] if r["depth"] == 4}
    pairs = [(deep[name, stage, 0.01], error) for (name, stage, beta), error in deep.items() if beta == 0.1]
    assert len(pairs) == 2 * len(FAMILIES) and all(little < more for little, more in pairs)


def test_a_chosen_beta_errs_no_more_than_the_largest_that_may_be_chosen(studied):
    _, record, _ = studied
    errors = {(family(r), r["stage"], r["depth"], r["beta"]): r["error"] for r in record["rows"]}
    chosen = {case: error for case, error in errors.items() if case[-1] is None}
    assert len(chosen) == 4 * len(FAMILIES)
    for case, error in chosen.items():
        assert error <= 1.01 * errors[(*case[:-1], 0.01)] and error < 0.2


def test_an_asterisk_marks_what_did_not_settle(studied):
    _, record, _ = studied
    record = copy.deepcopy(record)
    for row in record["rows"]:
        row.update(settled=1.0, sweeps=1.0)
    assert "*" not in tables(record).replace("*: some example", "") and "Settled, over" not in tables(record)
    first = record["rows"][0]  # the default, of the smaller depth
    first.update(settled=0.98, sweeps=7.0)
    text = tables(record)
    assert "7.0* / 1.0 " in text and "98% / 100% " in text and text.count("Settled, over") == 1


def tables(record):
    console = Console(width=200, force_terminal=False, record=True)
    show(record, console)
    return console.export_text()


def test_tables_and_picture_are_made_of_the_record(studied):
    folder, record, output = studied
    assert (folder / "study.png").stat().st_size > 10_000
    again = CliRunner().invoke(app, ["report", str(folder / "study.json")])
    for row in record["rows"]:
        count = output.count(f"| {family(row)} ")
        assert again.output.count(f"| {family(row)} ") == count >= 7  # as many as there are tables


@pytest.mark.parametrize("family_", FAMILIES)
def test_depth_counts_the_hidden_layers(family_):
    model = network(family_, 7, 5, 64, 10)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(linear) == 8 and model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_a_network_that_is_out_of_the_finite_numbers_is_said_to_be():
    model = network(("plain", "relu", "torch"), 2, 8, 64, 10)
    with torch.no_grad():
        model[-1].weight.fill_(torch.inf)
    (row,) = measure(model, torch.ones(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]), [0.1], 1e-2)
    assert row["error"] is None and row["settled"] is None and row["why"] == "DivergedError"


def test_nearest():
    assert nearest((5, 10, 50), 20) == 10
