"""`mep profile`: what it says of gradients is true, its times are those of the phases they are named after."""

import copy
import json
import operator
import sys
import time
from itertools import pairwise

import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import mep
from mep.cli import app
from mep.errors import NotConvergedError
from mep.lab.profile import draw, show, show_rows
from mep.lab.profile_measure import (
    FIELDS,
    PHASES,
    Reference,
    compare,
    first_weight,
    gain_per_step,
    gradient_errors,
    phase_times,
    profile,
    time_steps,
)
from mep.lab.recipes import BASELINE, Recipe, recipes_of
from mep.lab.timing import TimedRecipe

TIGHT = Recipe("tight", "eqprop", {"tol": 1e-6})
PAUSE = 0.02  # seconds, much longer than a step of these networks


def command(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result.output


def network(*widths):
    torch.manual_seed(0)
    pairs = pairwise(widths)
    return nn.Sequential(*(layer for a, b in pairs for layer in (nn.Linear(a, b), nn.Tanh())))[:-1].double()


def batches(count=2, features=5, classes=3):
    torch.manual_seed(1)
    return [(torch.randn(6, features).double(), torch.randint(classes, (6,))) for _ in range(count)]


def strong(model, factor=3):
    """The same with larger weights, whose examples have gains of their own, and so betas."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(factor)
    return model


def empty_columns(markdown):
    """The titles of the columns, of any table, in which no row has an entry."""
    empty, lines = [], markdown.splitlines()
    for rule in (place for place, line in enumerate(lines) if line.startswith("|:-")):
        rows = []
        for line in (lines[rule - 1], *lines[rule + 1 :]):
            if not line.startswith("|"):
                break
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        empty += [title for title, *cells in zip(*rows, strict=True) if set(cells) <= {"—", ""}]
    return empty


def errors_of(recipe, model, data=None, cost="cross_entropy"):
    data = data or batches()
    return gradient_errors(recipe, model, data, Reference.of(model, data, cost), cost)


# What settling buys


def test_compare_by_hand():
    exact, backprop = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([3.0, 4.0, 12.0])
    found = compare(torch.tensor([6.0, 0.0, 0.0]), exact, backprop, first=slice(1))
    assert found == pytest.approx(
        {
            "cosine": 18 / 30,
            "size": 6 / 5,
            "first_cosine": 1.0,
            "first_size": 2.0,
            "gap": 5 / 5,
            "bias": 12 / 13,
            "backprop_cosine": 18 / (6 * 13),
        }
    )


@pytest.mark.parametrize("phases", ["one-sided", "centered"])
def test_the_exact_gradient_is_the_one_that_descent_comes_to(phases):
    """Two solvers that share no line of code agree on the reference, at the contrast and beta of the recipe."""
    options = {"phases": phases, "beta": 0.3, "settle_lr": 0.3, "adaptive": True, "tol": 1e-7, "settle_steps": 2000}
    found = errors_of(Recipe("patient", "eqprop", options), network(5, 7, 6, 3))
    assert found["residual_max"] <= 1e-7 and found["beta"] == 0.3
    assert found["gap"] < 1e-6
    assert found["cosine"] == pytest.approx(1) and found["first_size"] == pytest.approx(1)


def test_bias_is_of_the_order_that_the_contrast_promises():
    model = network(5, 7, 6, 3)
    for phases, factor in (("one-sided", 2), ("centered", 4)):
        one, half = (
            errors_of(Recipe("", "eqprop", {"phases": phases, "beta": beta, "tol": 1e-9}), model)["bias"]
            for beta in (0.02, 0.01)
        )
        assert one / half == pytest.approx(factor, rel=0.05)


@pytest.mark.parametrize("cost", ["cross_entropy", "mse"])
def test_a_tight_sweep_leaves_no_gap(cost):
    data = batches()
    if cost == "mse":
        data = [(x, nn.functional.one_hot(y, 3).double()) for x, y in data]
    found = errors_of(TIGHT, network(5, 7, 6, 3), data, cost)
    assert found.keys() == set(FIELDS)
    assert found["gap"] < 1e-5 and found["cosine"] == pytest.approx(1) and found["first_cosine"] == pytest.approx(1)


def test_a_signal_moves_one_node_a_step():
    """The first layer of six gets nothing in five steps of descent, and a little in the sixth."""
    model = network(5, 6, 6, 6, 6, 6, 3)
    sizes = [
        errors_of(Recipe("", "eqprop", {"settle_steps": steps, "settle_lr": 0.15}), model)["first_size"]
        for steps in (1, 5, 6, 30)
    ]
    assert sizes[:2] == [0, 0]
    assert 0 < sizes[2] < 1e-3 < sizes[3] < 1


@pytest.mark.parametrize("phases", ["one-sided", "centered"])
def test_the_exact_gradient_with_a_beta_for_each_example_is_the_mean_over_the_examples(phases):
    """The oracle has one example in a batch, and one beta."""
    model, data = strong(network(5, 7, 6, 3)), batches(1)
    ((x, target),) = data
    estimator = mep.EquilibriumPropagation(model, phases=phases)
    betas = estimator.gradients(x, target)[1].betas
    assert len(betas.unique()) > 1
    found = Reference.of(model, data, "cross_entropy").equilibrium(estimator, betas, 0)
    expected = torch.zeros_like(found)
    for i, beta in enumerate(betas.tolist()):
        one = mep.EquilibriumPropagation(model, beta=beta, phases=phases, solver=mep.Sweep(500, tol=1e-10))
        gradients, _ = one.gradients(x[i : i + 1], target[i : i + 1])
        expected += torch.cat([gradients[p].flatten() for p in model.parameters()]) / len(betas)
    assert (found - expected).norm() < 1e-7 * expected.norm()


@pytest.mark.parametrize("beta", [None, 0.3])
def test_a_gap_is_within_the_tolerance_and_falls_with_it(beta):
    """Examples that share batch statistics are one group, and settle to one tolerance, too."""
    coupled = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)).double()
    for model in (strong(network(5, 7, 6, 3)), coupled):
        gaps = []
        for tol in (1e-1, 1e-3, 1e-5):
            found = errors_of(Recipe("", "eqprop", {"tol": tol, "beta": beta}), model)
            gaps.append(found["gap"])
            assert found["gap"] < 5 * tol and found["settled"] == 1
        falls = operator.gt if beta else operator.ge  # a chosen beta is so small that one sweep is enough for several
        assert falls(gaps[0], gaps[1]) and falls(gaps[1], gaps[2]) and found["cosine"] > 0.99


def test_a_reference_that_does_not_settle_is_an_error_of_that_row(monkeypatch):
    """Each sweep shrinks the residual in proportion to beta: two are enough at 1e-6, and too few at 10."""
    monkeypatch.setattr("mep.lab.profile_measure.EXACT", mep.Sweep(settle_steps=2, tol=1e-9))
    model, wild, weak = network(5, 7, 6, 3), *(Recipe("", "eqprop", {"beta": beta}) for beta in (10.0, 1e-6))
    with pytest.raises(NotConvergedError, match=r"exact gradient is not known.*did not settle to 1e-09"):
        errors_of(wild, model, batches(1))
    rows = profile(model, batches(1), rounds=2, recipes=[wild, weak])
    assert "exact gradient is not known" in rows[1]["error"]
    assert all(rows[2][field] is not None for field in FIELDS)


def test_what_has_no_exact_gradient_is_refused():
    noisy = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Tanh(), nn.Linear(7, 3)).double()
    with pytest.raises(mep.ArgumentError, match="random numbers"):
        errors_of(Recipe("", "eqprop", {}), noisy)
    errors_of(Recipe("", "eqprop", {}), noisy.eval())
    bounded = nn.Sequential(nn.Linear(5, 7), nn.Hardtanh(0, 1), nn.Linear(7, 3)).double()
    with pytest.raises(mep.ArgumentError, match="only 'prediction'"):
        errors_of(Recipe("", "eqprop", {"energy": "hopfield", "settle_lr": 0.3}), bounded)


@pytest.mark.parametrize("preset", ["sgd", "muon_backprop"])
def test_backprop_settles_nothing(preset):
    assert errors_of(Recipe("", preset, {}), network(5, 3)) == dict.fromkeys(FIELDS) | {"backprop_cosine": 1.0}


def test_fields_are_means_over_the_batches_and_the_worst_residual():
    recipe, model, data = Recipe("", "eqprop", {"settle_steps": 5, "settle_lr": 0.2}), network(5, 7, 3), batches(3)
    single, together = [errors_of(recipe, model, [batch]) for batch in data], errors_of(recipe, model, data)
    for field in FIELDS:
        values = [found[field] for found in single]
        expected = max(values) if field == "residual_max" else sum(values) / 3
        assert together[field] == pytest.approx(expected), field
        assert field in ("iterations", "beta", "settled") or len(set(values)) == 3, field


def test_the_first_layer_is_the_first_weight():
    assert first_weight(network(5, 7, 3)) == slice(0, 35)
    assert first_weight(nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 7))) == slice(10, 45)
    assert first_weight(nn.LayerNorm(5)) == slice(None)


def test_gains_of_a_settle_series():
    gaps = [("a", 0.8), ("a", 0.4), ("a", 0.1), ("a", 0.5), ("a", 0.1), ("b", 0.01), (None, 0.1), (None, 0.1)]
    rows = [{"ladder": ladder, "gap": gap, "bias": 0.2} for ladder, gap in gaps]
    gain_per_step(rows)
    assert [row["bought"] for row in rows] == [None, 2, 4, 0.2, 5, *[None] * 3]
    assert [row["idle"] for row in rows] == [None, False, False, True, True, *[None] * 3]


# Times


def test_every_step_starts_from_the_same_point():
    model, (batch, _) = network(5, 7, 3), batches()
    stepper = TimedRecipe(Recipe("", "sgd", {"lr": 0.5}), model, "cross_entropy")
    before = copy.deepcopy(model.state_dict())
    losses = set()
    for _ in range(3):
        assert stepper.step(*batch) > 0
        losses.add(float(stepper.optimizer.last.loss))
    assert len(losses) == 1
    for found in (model.state_dict(), stepper.model.state_dict()):
        assert all(torch.equal(value, before[name]) for name, value in found.items())


@pytest.mark.parametrize("phase", [*PHASES.values(), "update", "rest"])
def test_time_is_counted_for_the_phase_that_takes_it(phase, monkeypatch):
    def slow(method):
        def run(*args, **kwargs):
            time.sleep(PAUSE)
            return method(*args, **kwargs)

        return run

    owner, name = {
        "free": (mep.EquilibriumPropagation, "_free"),
        "settle": (sys.modules["mep.estimators.equilibrium"], "settle_phases"),
        "contrast": (sys.modules["mep.estimators.equilibrium"], "total_gradient"),
        "update": (sys.modules["torch.optim.sgd"], "sgd"),
        "rest": (mep.EPOptimizer, "_check_owned"),
    }[phase]
    run = TimedRecipe(TIGHT, network(5, 7, 3), "cross_entropy")
    seconds = phase_times(run, *batches()[0])
    assert seconds.keys() == {*PHASES.values(), "update", "rest"}
    assert all(value > 0 for value in seconds.values())
    monkeypatch.setattr(owner, name, slow(getattr(owner, name)))
    steps = [phase_times(run, *batches()[0]) for _ in range(3)]
    slowed = {name: min(step[name] for step in steps) for name in seconds}  # another program may delay one of them
    assert slowed[phase] > PAUSE
    assert max(slowed, key=slowed.get) == phase


def test_constraints_belong_to_the_update():
    run = TimedRecipe(TIGHT, network(5, 7, 3), "cross_entropy")
    run.optimizer.constraints = (lambda optimizer: time.sleep(PAUSE),)
    assert phase_times(run, *batches()[0])["update"] > PAUSE


def slow_down(monkeypatch):
    """Every gradient by EP takes a pause."""
    gradients = mep.EquilibriumPropagation.gradients

    def slow(self, x, target):
        time.sleep(PAUSE)
        return gradients(self, x, target)

    monkeypatch.setattr(mep.EquilibriumPropagation, "gradients", slow)


def test_times_are_relative_to_the_first_recipe(monkeypatch):
    slow_down(monkeypatch)
    first, second = time_steps([BASELINE, TIGHT], network(5, 7, 3), batches(), "cross_entropy", range(2))
    assert first["ratio"] == {"median": 1, "low": 1, "high": 1}
    assert second["seconds"]["low"] > PAUSE and second["ratio"]["low"] > 2
    assert second["running"] < 0.9 and second["running"] < first["running"] <= 1  # a pause is no work
    assert first["shares"].keys() == {"backprop", "update"} and second["shares"]["rest"] > 0.5
    for found in (first, second):
        assert sum(found["shares"].values()) == pytest.approx(1)
        assert found["seconds"]["low"] <= found["seconds"]["median"] <= found["seconds"]["high"]


# All of it


def test_a_recipe_that_fails_says_so_and_the_others_go_on(tmp_path):
    wild = Recipe("Wild", "eqprop", {"settle_steps": 100, "settle_lr": 100.0})
    rows = profile(network(5, 7, 3), batches(), rounds=2, recipes=[wild, TIGHT])
    assert [row["error"] is None for row in rows] == [True, False, True]
    machine = {"threads": 1, "processor": "", "gpu": None}
    settings = {"data": "", "model": "", "batch_size": 6, "train_steps": 0}
    assert {"gap", "ratio", "idle"}.isdisjoint(rows[1])
    record = {"rows": rows, "settings": settings, "machine": machine, "commit": None}
    draw(record, tmp_path / "no ladder.svg")
    rows[2]["ladder"] = "sweep"
    draw(record, tmp_path / "one ladder.svg")
    assert all((tmp_path / f"{name}.svg").stat().st_size > 1000 for name in ("no ladder", "one ladder"))
    console = Console(width=200, force_terminal=False, record=True)
    show(record, console)
    assert "Wild failed: Settling diverged" in console.export_text()


@pytest.mark.parametrize("running", [0.5, 0.99])
def test_a_busy_machine_is_told(running):
    rows = profile(network(5, 7, 3), batches(), rounds=2, recipes=[TIGHT])
    for row in rows:
        row["running"] = running
    console = Console(width=200, force_terminal=False, record=True)
    show_rows(rows, console)
    assert ("busy with something else up to 50%" in console.export_text()) == (running < 0.9)


def test_profile_refuses():
    for bad in ({"rounds": 1}, {"batches": []}):
        with pytest.raises(mep.ArgumentError, match="2 rounds and 1 batch"):
            profile(network(5, 3), **{"batches": batches(), "rounds": 2, **bad})


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """The folder of a small profile, and what was printed."""
    folder = tmp_path_factory.mktemp("profile")
    small = ("--data", "digits", "--model", "mlp", "--batches", 2, "--rounds", 2, "--train-steps", 5)
    return folder, command("profile", *small, "--out", folder, "--name", "small")


def test_the_record_is_whole(profiled):
    record = json.loads((profiled[0] / "small.json").read_text())
    assert record["kind"] == "mep profile" and record["settings"]["batch_size"] == 32
    assert {"created", "command", "commit", "versions", "machine"} < record.keys()
    assert [row["label"] for row in record["rows"]] == [recipe.label for recipe in recipes_of("profile")]
    own = {"label", "preset", "options", "ladder", "error", "seconds", "ratio", "shares", "running", "bought", "idle"}
    for row in record["rows"]:
        assert row.keys() == own | set(FIELDS) and row["error"] is None
        assert sum(row["shares"].values()) == pytest.approx(1)
        if row["preset"] != "sgd":
            assert all(row[field] is not None for field in FIELDS)
        if row["preset"] != "sgd" and "settle_steps" not in row["options"]:
            assert row["settled"] == 1 and row["cosine"] > 0.99 and row["gap"] < 5 * row["options"].get("tol", 0.1)
            assert row["bias"] < 0.06 and 0.9 < row["size"] < 1.1 and 0.9 < row["first_size"] < 1.1
    descent = [row for row in record["rows"] if row["ladder"] == "descent"]
    assert [row["iterations"] for row in descent] == [5, 10, 15, 20, 30]
    assert all(a["gap"] > b["gap"] for a, b in pairwise(descent))


def test_no_column_is_empty(profiled):
    assert empty_columns(profiled[1]) == []
    tables = "| a | b | c |\n|:--|--:|--:|\n| 1 | — |   |\n| 2 | — | 3 |\n\n| d |\n|:--|\n| — |"
    assert empty_columns(tables) == ["b", "d"]


def test_tables_and_pictures_come_from_the_record_alone(profiled, tmp_path):
    folder, output = profiled
    again = command("plot", folder / "small.json", "--out", tmp_path / "again.png")
    report = command("report", folder / "small.json")
    for recipe in recipes_of("profile"):
        assert all(text.count(f"| {recipe.label} ") == 3 for text in (output, again, report))
    assert (folder / "small.png").read_bytes() == (tmp_path / "again.png").read_bytes()
