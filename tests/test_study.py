"""`mep study`: every cell of the grid is there, and says what theory says."""

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from mep.cli import app
from mep.cli.study import Settings
from mep.cli.study_table import family
from mep.cli.studying import FAMILIES, look, nearest, network

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
    # beta varies at the depth that is nearest to the common one, 4
    assert len(seen) == len(record["rows"]) == len(FAMILIES) * 2 * (1 + 2)
    assert all(r["converged"] and r["residual"] <= 1e-2 and r["used"] <= r["beta"] for r in record["rows"])


def test_the_error_falls_with_beta(studied):
    _, record, _ = studied
    used = [r for r in record["rows"] if r["depth"] == 4 and r["least"] == r["beta"]]
    deep = {(family(r), r["stage"], r["beta"]): r["error"] for r in used}
    pairs = [(deep[name, stage, 0.01], error) for (name, stage, beta), error in deep.items() if beta == 0.1]
    assert len(pairs) >= 4 and all(little < more for little, more in pairs)


def test_tables_and_picture_are_made_of_the_record(studied):
    folder, record, output = studied
    assert (folder / "study.png").stat().st_size > 10_000
    again = CliRunner().invoke(app, ["report", str(folder / "study.json")])
    for row in record["rows"]:
        assert again.output.count(f"| {family(row)} ") == output.count(f"| {family(row)} ") == 6


@pytest.mark.parametrize("family_", FAMILIES)
def test_depth_counts_the_hidden_layers(family_):
    model = network(family_, 7, 5, 64, 10)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(linear) == 8 and model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_a_network_that_is_out_of_the_finite_numbers_is_said_to_be():
    model = network(("plain", "relu", "torch"), 2, 8, 64, 10)
    with torch.no_grad():
        model[-1].weight.fill_(torch.inf)
    row = look(model, torch.ones(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]), 0.1, Settings())
    assert row["error"] is None and not row["converged"] and row["why"] == "DivergedError"


def test_nearest():
    assert nearest((5, 10, 50), 20) == 10
