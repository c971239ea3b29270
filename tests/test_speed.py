"""`mep bench speed`: what it counts is there, what it times is the step, and its record says all."""

import copy
import json
import re
from itertools import pairwise

import pytest
import torch
from cases import without_compiler
from rich.console import Console
from test_profile import PAUSE, empty_columns, slow_down, strong
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import mep
from mep.cli import app
from mep.lab import speed_measure
from mep.lab.recipes import BASELINE, MUON, Recipe, recipes_of
from mep.lab.speed import MODELS, draw, recipes_to_time, show
from mep.lab.speed_measure import (
    SETTLED,
    UNTIL_COMPILED,
    Progress,
    SpeedRun,
    applicable,
    compare,
    machine_peak,
    resources,
    within,
)
from mep.lab.timing import PeakMemory, Work, batches_of, build, in_turns, relative
from mep.runs import models, training
from mep.runs.optimizers import sgd

WIDTHS, BATCH = (6, 7, 5, 3), 4
TIGHT = Recipe("tight", "eqprop", {"tol": 1e-6})
FEW = ("Backprop + SGD", "Backprop + SGD, compiled", "Backprop + Muon", "EqProp tol 0.01", "Descent 10")


def command(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result.output


def network(*widths, bias=True):
    torch.manual_seed(0)
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b, bias), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def batches(count=2):
    torch.manual_seed(1)
    return [(torch.randn(BATCH, WIDTHS[0]).double(), torch.randint(WIDTHS[-1], (BATCH,))) for _ in range(count)]


def taken(recipe, model=None, data=None):
    return resources(recipe, model or network(*WIDTHS), data or batches(), "cross_entropy")


def timed_run(recipe, model=None):
    run = SpeedRun(recipe, model or network(*WIDTHS), batches(), "cross_entropy")
    run.warm_up()
    return run


def picture_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 3)).double()


def pictures():
    torch.manual_seed(1)
    return [(torch.randn(BATCH, 3, 6, 6).double(), torch.randint(3, (BATCH,)))]


# What is counted


def test_work_of_backprop_is_that_of_its_matrix_products():
    """Each layer multiplies [batch, a] by [a, b] forward, once more for its weight, and for its input but the first."""
    products = [a * b for a, b in pairwise(WIDTHS)]
    expected = 2 * BATCH * (3 * sum(products) - products[0])
    assert taken(BASELINE)["flops"] == expected


@pytest.mark.parametrize("change", ["addmm", "addmm_", "out", "baddbmm_"])
def test_every_way_to_multiply_counts(change):
    total, a, b = torch.zeros(3, 5), torch.ones(3, 4), torch.ones(4, 5)
    stacked = total[None].clone(), a[None], b[None]
    with Work() as work:
        {
            "addmm": lambda: torch.addmm(total, a, b),
            "addmm_": lambda: total.addmm_(a, b),
            "out": lambda: torch.mm(a, b, out=total),
            "baddbmm_": lambda: stacked[0].baddbmm_(*stacked[1:]),
        }[change]()
    assert work.flops == 2 * 3 * 4 * 5
    moved = 3 * 4 + 4 * 5 + 3 * 5 * (1 if change == "out" else 2)  # the sum is read, too, unless there is none
    assert work.bytes == 4 * moved


def test_attention_counts():
    """Two products of [tokens, tokens, width] a head forward, and five backward: one of them is made again."""
    query, key, value = (torch.ones(2, 3, 8, 4, requires_grad=True) for _ in range(3))
    product = 2 * 2 * 3 * 8 * 8 * 4
    with Work() as work:
        out = F.scaled_dot_product_attention(query, key, value)
        assert work.flops == 2 * product
        out.sum().backward()
    assert work.flops == 7 * product


def test_bytes_are_those_read_and_written():
    x, y = torch.ones(10), torch.ones(10)
    for run, moved in (
        (lambda: x + y, 120),
        (lambda: x.add_(y), 120),
        (lambda: x.copy_(y), 80),
        (lambda: x.zero_(), 40),
        (lambda: x.view(2, 5).t(), 0),
        (lambda: torch.empty(10), 0),
        (lambda: torch._foreach_add_([x, y], 1.0), 160),
        (lambda: x + torch.ones(()).expand(10), 84 + 4),  # one number is made, and read ten times from one place
    ):
        with Work() as work:
            run()
        assert work.bytes == moved, moved


def test_memory_is_what_lives_beyond_parameters_and_state():
    """The gradients at the end of the backward pass: by then there is little else."""
    model = network(100, 100, 100, bias=False)
    data = [(torch.randn(1, 100).double(), torch.zeros(1, dtype=torch.long))]
    gradients = 8 * sum(p.numel() for p in model.parameters())
    found = taken(BASELINE, model, data)["memory"]
    assert gradients <= found <= gradients + 8 * 100 * 10
    more = Recipe("", "sgd", {"momentum": 0.0})  # without a state there is as much beside it
    assert taken(more, model, data)["memory"] == pytest.approx(found, rel=0.01)


def patch_gradients(monkeypatch, first):
    """Let every estimator do something before its first step."""
    gradients = mep.EquilibriumPropagation.gradients

    def prepare(self, x, target):
        if not hasattr(self, "prepared"):
            self.prepared = first()
        return gradients(self, x, target)

    monkeypatch.setattr(mep.EquilibriumPropagation, "gradients", prepare)


def test_buffers_that_a_recipe_keeps_count(monkeypatch):
    before = taken(TIGHT)["memory"]
    patch_gradients(monkeypatch, lambda: torch.zeros(10**6))
    assert taken(TIGHT)["memory"] == before + 4 * 10**6


def test_what_the_first_step_alone_takes_does_not_count(monkeypatch):
    before = taken(TIGHT)
    patch_gradients(monkeypatch, lambda: float(torch.zeros(10**6).sum()))
    assert taken(TIGHT) == before


def test_a_compiled_recipe_has_the_work_of_the_same_recipe():
    plain, compiled = (taken(recipe) for recipe in (BASELINE, Recipe("", "sgd", {"compile": True})))
    assert compiled == {"flops": plain["flops"], "memory": None, "bytes": None}


def test_meters_can_stand_within_each_other():
    with PeakMemory() as memory, Work() as work:
        torch.zeros(10) + 1
    assert (memory.peak, work.bytes) == (80, 40 + 80)


def test_a_machine_does_something():
    assert all(value > 1e8 for value in machine_peak(torch.device("cpu")).values())


# What is timed


def test_compiled_backprop_is_backprop():
    def compiler(function):
        calls.append(function)
        return function

    calls, found = [], []
    for compile_ in (False, True):
        model = network(*WIDTHS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "compile", compiler)
            optimizer = sgd(model.parameters(), model=model, lr=0.5, compile=compile_)
        assert len(calls) == compile_
        for x, target in batches():
            optimizer.step(x=x, target=target)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*found)


def test_turns_are_taken_from_another_start_each_round():
    order = []
    turns = [lambda number, place=place: order.append((number, place)) for place in range(3)]
    in_turns(turns, range(3))
    assert [place for _, place in order] == [0, 1, 2, 1, 2, 0, 2, 0, 1]
    assert batches_of("abc", 0, 2) + batches_of("abc", 1, 2) == ["a", "b", "c", "a"]


def test_ratios_are_those_of_neighbours():
    """The machine is ten times as slow in the second round: the ratio does not notice."""
    found = relative([[2.0, 2.0, 9.0], [20.0, 20.0, 20.0]], [[1.0, 1.0, 1.0], [10.0, 10.0, 10.0]])
    assert found["ratio"] == {"low": 2, "median": 2, "high": 2}
    assert found["seconds"]["median"] == (9 + 20) / 2


def test_settling_is_that_of_the_steps_that_are_timed():
    run = timed_run(Recipe("", "eqprop", {"tol": 1e-3, "beta": 0.05}))
    assert run.settled()["sweeps"] is None  # the steps before the first turn do not count
    run.turn(0)
    found, estimate = run.settled(), run.optimizer.last
    assert found.keys() == set(SETTLED)
    assert 0 < found["residual"] <= found["residual_max"] <= 1e-3
    assert found["settled"] == 1 and found["beta"] == estimate.beta == 0.05 and 1 <= found["sweeps"] <= 5
    assert run.unsettled is None
    backprop = timed_run(BASELINE)
    backprop.turn(0)
    assert backprop.settled() == dict.fromkeys(SETTLED) and backprop.unsettled is None


def test_where_beta_is_chosen_it_is_the_median_over_the_examples():
    run = timed_run(Recipe("", "eqprop", {}), strong(network(*WIDTHS)))
    run.batches = run.batches[:1]
    run.turn(0)
    estimate = run.optimizer.last
    assert estimate.betas.min() < estimate.betas.max()
    assert run.settled()["beta"] == float(estimate.betas.median())


@pytest.mark.filterwarnings("error::mep.errors.NotConvergedWarning")
def test_steps_that_do_not_settle_are_counted_and_not_warned_of():
    options = {"tol": 1e-9, "settle_steps": 2, "settle_lr": 0.1, "adaptive": True}
    limited = timed_run(Recipe("", "eqprop", options))
    limited.turn(0)
    assert (limited.settled()["settled"], limited.unsettled) == (0, "step limit")


def test_steps_before_the_first_turn_do_not_make_the_machine_look_busy(monkeypatch):
    """Compiling waits for another program, while this one is not running."""
    run = timed_run(BASELINE)
    run.seconds, run.running = 100.0, 0.0
    run.warm_up()
    run.turn(0)
    assert run.seconds < 100


def test_a_turn_in_which_something_is_compiled_is_taken_again(uncompiled):
    run = timed_run(Recipe("", "eqprop", {"compile": True}))
    programs = run.optimizer.estimator.compiled_steps
    step, seen = run.step, []

    def compile_once(x, target):
        if not seen:
            programs._programs["one more"] = None
            run.seconds += 100
        seen.append(x)
        return step(x, target)

    run.step = compile_once
    uncounted, counted = run.steps_per_turn
    assert len(run.turn(0)) == counted
    assert len(seen) == 2 * (uncounted + counted)
    assert run.seconds < 100


def test_a_compiled_recipe_that_is_never_compiled_says_so(uncompiled, monkeypatch):
    monkeypatch.setattr("mep.estimators.compiled_step.MOST_SWEEPS", 0)
    rows = compare(network(*WIDTHS), batches(), [BASELINE, Recipe("EP", "eqprop", {"compile": True})], rounds=2)
    assert f"no program in {UNTIL_COMPILED} steps" in rows[1]["error"]


def test_a_recipe_that_compiles_too_long_says_so(uncompiled):
    recipes = [BASELINE, Recipe("EP", "eqprop", {"compile": True}), TIGHT]
    rows = compare(network(*WIDTHS), batches(), recipes, rounds=2, compile_seconds=0.0)
    assert [row["error"] is None for row in rows] == [True, False, True]
    assert re.search(r"first 1 steps, which compile, took \d+ s", rows[1]["error"])


def test_all_is_prepared_once_for_all_numbers_of_threads(uncompiled, monkeypatch):
    made, dynamic = [], []
    init = SpeedRun.__init__

    def note(self, recipe, *args):
        made.append(recipe.label)
        dynamic.append(torch._inductor.config.cpp.dynamic_threads)
        init(self, recipe, *args)

    monkeypatch.setattr(SpeedRun, "__init__", note)
    compiled = Recipe("compiled", "sgd", {"compile": True})
    for threads in ((1, 2), (1,)):
        before = torch.get_num_threads()
        rows = compare(network(*WIDTHS), batches(), [BASELINE, compiled], rounds=2, threads=threads)
        assert [time["threads"] for time in rows[1]["times"]] == list(threads)
        assert torch.get_num_threads() == before
    assert made == 2 * ["Backprop + SGD", "compiled"]
    assert dynamic == [True, True, False, False]
    assert not torch._inductor.config.cpp.dynamic_threads


def test_channels_last_is_the_same_step_with_another_layout():
    layouts, found = [], []
    for channels_last in (False, True):
        model, ((x, target),) = picture_network(), pictures()
        optimizer = build(Recipe("", "sgd", {}, channels_last=channels_last), model, "cross_entropy")
        model[0].register_forward_pre_hook(lambda _, inputs: layouts.append(inputs[0].stride(1)))
        optimizer.step(x=x, target=target)
        found.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
        assert model[0].weight.stride(1) == (1 if channels_last else 9)
    assert layouts == [36, 1]
    assert torch.allclose(*found, atol=1e-12)


def test_channels_last_is_compared_where_there_are_convolutions():
    label = "Backprop + SGD, channels_last"
    both = [BASELINE, next(recipe for recipe in recipes_of("speed") if recipe.label == label)]
    assert applicable(both, network(*WIDTHS)) == [BASELINE]
    rows = compare(picture_network(), pictures(), both, rounds=2)
    assert [(row["label"], row["error"]) for row in rows] == [(BASELINE.label, None), (label, None)]


def test_times_are_relative_to_backprop_and_to_muon(monkeypatch):
    """Steps that take what they are told to, each round longer than the one before."""
    told = {"SGD": 1.0, "Muon": 4.0}

    def turn(self, number):
        kinds = [type(update).__name__ for update in getattr(self.optimizer, "updates", [])]
        return 3 * [(told[kinds[0]] if kinds else 2.0) * (number + 1)]

    monkeypatch.setattr(SpeedRun, "turn", turn)
    rows = compare(network(*WIDTHS), batches(), [BASELINE, MUON, TIGHT], rounds=3, threads=(1, 2))
    for place, number in enumerate((1, 2)):
        times = [row["times"][place] for row in rows]
        assert [time["threads"] for time in times] == 3 * [number]
        assert [time["ratio"] for time in times] == [dict.fromkeys(("low", "median", "high"), r) for r in (1, 4, 2)]
        assert [time["to_muon"] for time in times] == [0.25, 1, 0.5]
        assert [time["seconds"]["median"] for time in times] == [2, 8, 4] == [time["mean"] for time in times]


def test_the_time_is_that_of_the_step_and_the_model_stays(monkeypatch):
    slow_down(monkeypatch)
    model = network(*WIDTHS)
    before = copy.deepcopy(model.state_dict())
    times = compare(model, batches(), [BASELINE, TIGHT], rounds=2)[1]["times"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert times[0]["seconds"]["low"] > PAUSE


def test_recipes_are_chosen_by_preset_or_label():
    def labels(**choice):
        return [recipe.label for recipe in recipes_to_time(**choice)]

    every = [recipe.label for recipe in recipes_of("speed")]
    assert labels() == every
    smep = ["SMEP", "SMEP, compiled"]
    assert labels(only=["smep"]) == ["Backprop + SGD", *smep]
    assert labels(without=["Descent 30", "smep"]) == [name for name in every if name not in ("Descent 30", *smep)]
    assert labels(compile=False) == [name for name in every if "compiled" not in name]
    assert labels(only=["sgd"], compile=False) == ["Backprop + SGD", "Backprop + SGD, channels_last"]
    for choice in ({"only": ["smap"]}, {"without": ["smap"]}):
        with pytest.raises(mep.ArgumentError, match=r"smap: there is no such recipe.*local_ep.*Descent 10"):
            recipes_to_time(**choice)
    with pytest.raises(mep.ArgumentError, match="Leave it in"):
        recipes_to_time(without=["Backprop + SGD"])
    assert labels(only=["sgd"], without=["sgd"]) == ["Backprop + SGD"]


def test_a_recipe_that_fails_says_so_and_the_others_go_on(monkeypatch):
    wild = Recipe("Wild", "eqprop", {"settle_steps": 100, "settle_lr": 100.0})
    unknown = Recipe("Unknown", "eqprop", {"no_such_option": 1})
    rows = compare(network(*WIDTHS), batches(), [BASELINE, wild, unknown, TIGHT], rounds=2)
    assert [row["error"] is None for row in rows] == [True, False, False, True]
    assert "Descent(" in rows[1]["error"] and "no_such_option" in rows[2]["error"].replace("-", "_")
    assert rows[3]["times"][0]["to_muon"] is None  # there is no Muon to compare with


def test_a_recipe_that_fails_on_the_way_does_not_take_the_others_with_it(monkeypatch):
    turn = SpeedRun.turn

    def fail_late(self, number):
        if number == 1 and isinstance(self.optimizer, mep.EPOptimizer):
            raise mep.DivergedError("too far.\nAnd more.")
        return turn(self, number)

    monkeypatch.setattr(SpeedRun, "turn", fail_late)
    rows = compare(network(*WIDTHS), batches(), [BASELINE, TIGHT, MUON], rounds=3)
    assert [row["error"] for row in rows] == [None, "too far.", None]
    assert len(rows[2]["times"]) == 1


def test_slow_models_get_fewer_rounds():
    assert list(within(range(7), 0)) == [0, 1, 2, 3, 4] and list(within(range(7), 60)) == list(range(7))
    rows = compare(network(*WIDTHS), batches(), [BASELINE], rounds=9, seconds=0)
    assert rows[0]["times"][0]["rounds"] == 5


def test_compare_refuses():
    for bad in ({"rounds": 1}, {"batches": []}, {"recipes": []}, {"threads": ()}):
        with pytest.raises(mep.ArgumentError, match="2 rounds, 1 batch, 1 recipe and 1 number of threads"):
            compare(network(*WIDTHS), **{"batches": batches(), "recipes": [BASELINE], "rounds": 2, **bad})
    with pytest.raises(mep.ArgumentError, match="baseline"):
        compare(network(*WIDTHS), batches(), [Recipe("Wild", "eqprop", {"settle_lr": 1e9}), BASELINE], rounds=2)


# Models


@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_the_bench_maps_digits_to_classes(name):
    torch.manual_seed(0)
    model = models.NAMED[name]((1, 28, 28), 10)
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_models_have_the_sizes_that_they_are_named_for():
    def weights(name):
        return [p.shape for p in models.NAMED[name]((1, 28, 28), 10).parameters() if p.ndim > 1]

    assert weights("mlp512") == [(512, 784), (256, 512), (10, 256)]
    assert weights("mlp1024") == [(1024, 784), (1024, 1024), (1024, 1024), (10, 1024)]
    assert weights("mlp20") == [(128, 784), *[(128, 128)] * 19, (10, 128)]
    assert len(weights("residual")) == 2 * 24 + 2
    transformer = models.NAMED["transformer"]((1, 28, 28), 10)
    assert transformer[0](torch.zeros(2, 1, 28, 28)).shape == (2, 64, 64)
    assert sum(isinstance(m, models.Attention) for m in transformer.modules()) == 4


def test_a_block_adds_to_what_it_is_given():
    x = torch.tensor([[1.0, 3.0]])
    assert torch.allclose(models.PreNorm(2, nn.Identity())(x), torch.tensor([[0.0, 4.0]]), atol=1e-4)


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    own, reference = models.Attention(8, 2), nn.MultiheadAttention(8, 2, batch_first=True)
    parts = (own.query, own.key, own.value)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        reference.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        reference.out_proj.load_state_dict(own.out.state_dict())
    x = torch.randn(3, 5, 8)
    assert torch.allclose(own(x), reference(x, x, x)[0], atol=1e-6)


# All of it


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """The folder of a small run, and what was printed."""
    folder = tmp_path_factory.mktemp("speed")
    few = [word for label in FEW for word in ("--only", label)]
    small = ("--data", "digits", "--model", "mlp", "--rounds", 2, "--train-steps", 5, "--batches", 1, "--threads", 1)
    with pytest.MonkeyPatch.context() as patch:
        without_compiler(patch)
        return folder, command("bench", "speed", *small, *few, "--add", "smep beta=0.01", "--out", folder)


def test_the_record_is_whole(timed):
    record = json.loads((timed[0] / "speed.json").read_text())
    assert record["kind"] == "mep bench speed" and record["settings"]["threads"] == [1]
    assert {"created", "command", "commit", "versions", "machine", "attainable"} < record.keys()
    (model,) = record["models"]
    assert (model["model"], model["batch_size"]) == ("mlp", 256)
    assert model["parameters"] == 64 * 128 + 128 + 128 * 64 + 64 + 64 * 10 + 10
    assert [row["label"] for row in model["rows"]] == [*FEW, "SMEP beta=0.01"]
    for row in model["rows"]:
        assert row["error"] is None and len(row["times"]) == 1 and row["flops"] > 0
        assert all((row[field] is None) == (row["preset"] in ("sgd", "torch_muon")) for field in SETTLED)
        assert row["beta"] == row["options"].get("beta", row["beta"])


def test_no_column_is_empty(timed):
    assert empty_columns(timed[1]) == []


def test_tables_and_pictures_come_from_the_record_alone(timed, tmp_path):
    folder, output = timed
    again = command("plot", folder / "speed.json", "--out", tmp_path / "again.png")
    report = command("report", folder / "speed.json")
    for row in json.loads((folder / "speed.json").read_text())["models"][0]["rows"]:
        assert all(text.count(f"| {row['label']} ") == 3 for text in (output, again, report)), row["label"]
    assert (folder / "speed.png").read_bytes() == (tmp_path / "again.png").read_bytes()


def test_every_number_of_threads_has_its_overview(timed):
    record = json.loads((timed[0] / "speed.json").read_text())
    record["settings"]["threads"] = [1, 2]
    for row in record["models"][0]["rows"]:
        row["times"].append(copy.deepcopy(row["times"][0]) | {"threads": 2})
        row["times"][1]["ratio"]["median"] = 8192.25
    text = shown(record)
    assert "SGD, 1 thread:" in text and "SGD, 2 threads:" in text
    assert (
        text.count(" 8192.25") == 2 * len(record["models"][0]["rows"]) - 1
    )  # in the overview, whose first row is a time
    assert text.count("<details>") == text.count("</details>") == 1


def test_what_did_not_settle_or_suit_is_marked(timed):
    record = json.loads((timed[0] / "speed.json").read_text())
    (first,) = record["models"]
    second = copy.deepcopy(first)
    first["rows"][-1] |= {"settled": 0.5, "unsettled": "step limit"}
    second["rows"].pop()
    record["models"] = [first, second]
    text = shown(record)
    (line,) = (line for line in text.splitlines() if line.startswith("| SMEP beta=0.01") and "*" in line)
    assert line.endswith("— |") and "50%, step limit" in text


def test_ctrl_c_keeps_the_models_that_are_done(tmp_path, monkeypatch):
    compare_, begun = speed_measure.compare, []

    def interrupted(*args, title, **kwargs):
        begun.append(title)
        if title == stop:
            raise KeyboardInterrupt
        return compare_(*args, title=title, **kwargs)

    monkeypatch.setattr(speed_measure, "compare", interrupted)
    small = ("--data", "digits", "--rounds", 2, "--train-steps", 1, "--batches", 1, "--threads", 1, "--only", "sgd")
    three = ("--model", "mlp", "--model", "mlp256", "--model", "cnn", "--no-compile", "--out", tmp_path)
    stop = "mlp256"
    output = command("bench", "speed", *small, *three, "--name", "part", code=130)
    record = json.loads((tmp_path / "part.json").read_text())
    assert begun == ["mlp", "mlp256"] and [model["model"] for model in record["models"]] == ["mlp"]
    assert record["stopped"] == "mlp256" and "Stopped by Ctrl-C during mlp256" in output
    stop = "mlp"
    command("bench", "speed", *small, *three, "--name", "none", code=130)
    assert not (tmp_path / "none.json").exists()


def test_progress_names_what_is_done():
    console = Console(force_terminal=True, width=150, record=True)
    with Progress(console, models=2) as progress:
        progress.begin("cnn", stages=2)
        progress.stage("EqProp, compiled, compiling")
        console.print(progress._bar)
        assert list(progress.rounds(range(3), "timing")) == [0, 1, 2]
        progress.end("5 rounds")
    text = console.export_text()
    assert "cnn (1 of 2): EqProp, compiled, compiling" in text and "cnn (1 of 2): 5 rounds, 0 s" in text


def test_what_failed_is_shown(timed, tmp_path):
    record = json.loads((timed[0] / "speed.json").read_text())
    first, second = record["models"][0], copy.deepcopy(record["models"][0])
    second["rows"][-1]["error"] = "no way."
    record["models"] = [first, second]
    text = shown(record)
    assert text.count("failed |") == 1 and "SMEP beta=0.01 failed: no way." in text
    draw(record, tmp_path / "failed.svg")
    assert "failed" in (tmp_path / "failed.svg").read_text()


def shown(record):
    console = Console(width=250, force_terminal=False, record=True)
    show(record, console)
    return console.export_text()


def test_speed_refuses_and_mep_bench_keeps_its_options(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "briefly_trained", None)  # all is refused before the first model is trained
    small = ("--data", "digits", "--rounds", 2, "--out", tmp_path)
    assert "Named models: mlp," in command("bench", "speed", *small, "--model", "mlp", "--model", "mpl", code=2)
    assert "no such recipe" in command("bench", "speed", "--without", "smap", code=2)
    assert "no such recipe" in command("bench", "speed", "--only", "smap", code=2)
    assert "--data ... speed" in command("bench", "--data", "digits", "speed", "--rounds", 2, code=2)
    assert "--only" in command("bench", "--only", "smap", "--out", tmp_path, code=2)


def test_hopfield_networks_are_timed_with_weights_of_their_own():
    """Those of a network that is run forward may leave no equilibrium."""
    torch.manual_seed(0)
    fresh = nn.Sequential(nn.Linear(WIDTHS[0], 7), nn.ReLU(), nn.Linear(7, WIDTHS[-1])).double()
    forward = copy.deepcopy(fresh)
    with torch.no_grad():
        for p in forward.parameters():
            p.mul_(30)
    hopfield = Recipe("Hopfield", "eqprop", {"energy": "hopfield", "cost": "one_hot_mse"})
    assert hopfield.is_hopfield and not BASELINE.is_hopfield
    without = compare(forward, batches(), [BASELINE, hopfield], rounds=2)
    rows = compare(forward, batches(), [BASELINE, hopfield], rounds=2, hopfield=fresh)
    assert rows[1]["error"] is None and rows[1]["settled"] == 1
    assert without[1]["error"] or without[1]["settled"] < 1
