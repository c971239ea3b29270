"""The commands as a user meets them: what they print, write, resume and refuse."""

import copy
import json
import math
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_profile import empty_columns
from torch import nn
from typer.testing import CliRunner

from mep import Estimate, Result
from mep.cli import app
from mep.lab import recipes
from mep.lab.bench import summarise, time_to
from mep.lab.bench_measure import deadlines
from mep.lab.recipes import EARLIER_TASK, Recipe, recipes_of
from mep.runs import models
from mep.runs.optimizers import names, torch_muon
from mep.runs.records import write_atomically
from mep.runs.report import print_cells
from mep.runs.training import Batches, Run, Tally, epoch_order

SMALL = ("train", "--data", "digits", "--threads", "1")


def mep(*words, code=0):
    """What `mep words...` prints; it must exit with `code`."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, f"exit code {result.exit_code}\n{result.output}\n{result.exception!r}"
    return result.output


def learned(checkpoint):
    """All of a checkpoint but the times that training took."""
    run = torch.load(checkpoint, weights_only=True)["run"]
    run.pop("seconds")
    for line in run["history"]:
        line.pop("seconds")
    return run


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    else:
        assert a == b


@pytest.fixture
def trained(tmp_path):
    """A checkpoint after one epoch."""
    path = tmp_path / "trained.pt"
    mep(*SMALL, "--preset", "sgd", "--epochs", 1, "--checkpoint", path)
    return path


@pytest.fixture
def stopped_at_step(monkeypatch):
    """Lets something happen once, at the start of a given step."""

    def arrange(number, happen):
        step, pending = Run.step, [happen]

        def step_or_stop(run):
            if run.steps == number and pending:
                pending.pop()()
            step(run)

        monkeypatch.setattr(Run, "step", step_or_stop)

    return arrange


# The command


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["train", "--help"],
        ["bench", "--help"],
        ["bench", "speed", "--help"],
        ["profile", "--help"],
        ["verify", "--help"],
        ["study", "--help"],
        ["plot", "--help"],
        ["report", "--help"],
    ],
)
def test_help_is_instant(words):
    run = f"import sys; from mep.cli import app; app({words}, standalone_mode=False)"
    check = "sys.exit(bool({'torch', 'matplotlib', 'numpy'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", f"{run}; {check}"], check=True, capture_output=True)


def test_python_m_mep():
    done = subprocess.run([sys.executable, "-m", "mep", "--version"], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("mep ")


def test_help_shows_the_commands_at_the_head_of_the_file():
    assert "mep train --data digits --epochs 5\n" in mep("train", "--help").replace(" \n", "\n").replace(" " * 8, "")


def test_a_table_that_is_too_wide_is_split_and_every_cell_is_whole():
    titles = ["name", *(f"column {number}" for number in range(9))]
    rows = [[name, *(f"{name}-{number}" for number in range(9))] for name in ("one", "another")]
    console = Console(width=40, force_terminal=True, record=True)
    print_cells(console, titles, rows)
    lines = console.export_text().splitlines()
    text = "\n".join(f" {line} " for line in lines)
    assert all(len(line) <= 40 for line in lines) and "…" not in text
    assert all(text.count(f" {cell} ") == 1 for row in (titles, *rows) for cell in row[1:])
    assert text.count(" another ") == text.count(" name ") > 1


# Training


def test_train_learns_and_says_so(tmp_path):
    record = tmp_path / "new folder" / "run.json"
    output = mep(*SMALL, "--preset", "eqprop", "--epochs", 12, "--json", record)
    content = json.loads(record.read_text())
    result, history = content["result"], content["history"]
    assert output.splitlines()[-1].startswith(f"test accuracy {result['test_accuracy']:.2f}% after 12 epochs")
    assert result["test_accuracy"] > 80
    assert [line["epoch"] for line in history] == list(range(1, 13))
    keys = {
        "loss",
        "train_accuracy",
        "test_accuracy",
        "residual",
        "residual_max",
        "sweeps",
        "settled",
        "seconds",
    }
    assert all(keys < line.keys() and None not in line.values() for line in history)
    assert history[-1]["loss"] < history[0]["loss"]
    assert content["settings"]["preset"] == "eqprop" and content["machine"]["threads"] == 1
    assert {"commit", "command", "created", "versions", "data"} < content.keys()


def test_training_time_can_be_the_goal(tmp_path):
    record = tmp_path / "run.json"
    mep(*SMALL, "--preset", "sgd", "--seconds", 0.05, "--json", record)
    assert 0.05 <= json.loads(record.read_text())["result"]["seconds"] < 0.5


@pytest.mark.parametrize("model", models.NAMED)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_named_models_fit_the_data(model, shape):
    assert models.NAMED[model](shape, 7)(torch.zeros(2, *shape)).shape == (2, 7)


def test_a_model_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_models.py").write_text(
        "from torch import nn\n"
        "def plain(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
        "def fitted(classes, input_shape):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[1] ** 2, classes))\n"
        "def wrong(): return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    for factory in ("plain", "fitted"):
        assert "test accuracy" in mep(*SMALL, "--preset", "sgd", "--epochs", 1, "--model", f"own_models:{factory}")
    assert "torch.nn.Module" in mep(*SMALL, "--model", "own_models:wrong", code=2)
    assert "own_models" in mep(*SMALL, "--model", "own_models:absent", code=2)
    assert "input_shape=" in mep(*SMALL, "--model", "torch.nn:Linear", code=2)


HOPELESS = ("--preset", "eqprop", "--beta", 20, "--settle-steps", 1, "--epochs", 1)


@pytest.mark.parametrize("choice, warned, code", [((), True, 0), (("raise",), False, 2), (("ignore",), False, 0)])
def test_examples_that_do_not_settle_are_warned_of_once_as_the_option_says(choice, warned, code):
    output = mep(*SMALL, *HOPELESS, *(("--on-unsettled", *choice) if choice else ()), code=code)
    assert output.count("Warning: 256 of 256 examples did not settle") == warned
    assert ("Error: 256 of 256 examples did not settle" in output) == (code == 2)
    assert ("settled 0%" in output) == (code == 0)


def test_a_tally_has_means_over_the_examples():
    tally = Tally()
    assert set(tally.means().values()) == {None}
    for residual, counts in (([0.5, 0.001], [3, 1]), ([0.002], [2])):
        estimate = Estimate(
            loss=torch.tensor(float(len(counts))),
            residual=torch.tensor(residual),
            iterations=max(counts),
            result=Result.STEP_LIMIT,
            betas=torch.ones(len(counts)),
            counts=torch.tensor(counts),
            tol=0.01,
        )
        tally.add(estimate, len(counts))
    expected = {"loss": 5 / 3, "residual": 0.503 / 3, "residual_max": 0.5, "sweeps": 2.0, "settled": 2 / 3}
    assert tally.means() == pytest.approx(expected)
    again = Tally()
    again.load_state_dict(tally.state_dict())
    assert again.means() == tally.means()


@pytest.mark.parametrize("seed", [0, 1])
def test_order_of_examples_follows_from_seed_and_epoch(seed):
    orders = [epoch_order(100, seed, epoch) for epoch in range(3)]
    assert all(sorted(order.tolist()) == list(range(100)) for order in orders)
    assert not torch.equal(orders[0], orders[1])
    assert torch.equal(orders[2], epoch_order(100, seed, 2))
    assert not torch.equal(orders[0], epoch_order(100, 1 - seed, 0))


def test_batches_can_be_joined_anywhere():
    x = torch.arange(10)
    whole = Batches(x, x, 4, seed=0)
    drawn = [whole.next()[0] for _ in range(7)]
    assert [len(batch) for batch in drawn] == [4, 4, 2, 4, 4, 2, 4]
    late = Batches(x, x, 4, seed=0)
    late.epoch, late.position = 1, 4
    assert torch.equal(late.next()[0], drawn[4])


# Resuming


@pytest.mark.parametrize("preset", names())
def test_resumed_training_is_the_same_bit_for_bit(preset, tmp_path):
    straight, halves = tmp_path / "straight.pt", tmp_path / "halves.pt"
    mep(*SMALL, "--preset", preset, "--epochs", 4, "--checkpoint", straight)
    mep(*SMALL, "--preset", preset, "--epochs", 2, "--checkpoint", halves)
    mep("train", "--resume", halves, "--epochs", 4)
    assert_same(learned(halves), learned(straight))


@pytest.mark.parametrize("preset", ["eqprop", "adam"])
def test_a_run_killed_within_an_epoch_goes_on_from_its_checkpoint(preset, tmp_path, stopped_at_step):
    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    straight, killed = tmp_path / "straight.pt", tmp_path / "killed.pt"
    mep(*SMALL, "--preset", preset, "--epochs", 3, "--checkpoint", straight)
    stopped_at_step(11, kill)
    with pytest.raises(Killed):
        mep(*SMALL, "--preset", preset, "--epochs", 3, "--checkpoint", killed, "--checkpoint-every", 4)
    at = learned(killed)
    assert at["steps"] == 8 and at["position"] == 2 * 256
    mep("train", "--resume", killed)
    assert_same(learned(killed), learned(straight))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits(number, tmp_path, stopped_at_step):
    straight, stopped = tmp_path / "straight.pt", tmp_path / "stopped.pt"
    mep(*SMALL, "--preset", "sgd", "--epochs", 2, "--checkpoint", straight)
    stopped_at_step(3, lambda: signal.raise_signal(number))
    output = mep(*SMALL, "--preset", "sgd", "--epochs", 2, "--checkpoint", stopped, code=128 + number)
    assert f"mep train --resume {stopped}" in output
    assert learned(stopped)["steps"] == 4
    mep("train", "--resume", stopped)
    assert_same(learned(stopped), learned(straight))


def test_ctrl_c_without_a_checkpoint(stopped_at_step, tmp_path):
    stopped_at_step(2, lambda: signal.raise_signal(signal.SIGINT))
    assert "Stopped" in mep(*SMALL, "--preset", "sgd", code=130)


def test_a_finished_run_resumes_to_nothing(trained):
    before = learned(trained)
    assert "test accuracy" in mep("train", "--resume", trained)
    assert_same(learned(trained), before)


@pytest.mark.parametrize(
    "change",
    [
        ("--preset", "adam"),
        ("--model", "cnn"),
        ("--data", "mnist5k"),
        ("--seed", "1"),
        ("--batch-size", "8"),
        ("--lr", "0.5"),
    ],
)
def test_another_run_is_not_resumed(change, trained):
    flag, value = change
    output = mep("train", "--resume", trained, *change, code=2)
    assert flag in output and value in output


def test_a_checkpoint_of_other_data_is_refused(trained):
    content = torch.load(trained, weights_only=True)
    torch.save({**content, "data": "digits, other labels"}, trained)
    assert "other data" in mep("train", "--resume", trained, code=2)


def test_a_checkpoint_of_a_model_that_has_changed_since_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(models.NAMED, "mine", lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    path = tmp_path / "mine.pt"
    mep(*SMALL, "--preset", "sgd", "--model", "mine", "--epochs", 1, "--checkpoint", path)
    monkeypatch.setitem(models.NAMED, "mine", lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False)))
    assert "does not fit" in mep("train", "--resume", path, "--epochs", 2, code=2)


def test_damaged_and_foreign_checkpoints_are_refused(trained, tmp_path):
    content = trained.read_bytes()
    for name, damaged in {
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "text": b"not a checkpoint",
        "flipped": content[: len(content) // 2]
        + bytes([content[len(content) // 2] ^ 1])
        + content[len(content) // 2 + 1 :],
    }.items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(damaged)
        assert str(path) in mep("train", "--resume", path, code=2).replace("\n", ""), name
    path = tmp_path / "foreign.pt"
    torch.save(nn.Linear(1, 1).state_dict(), path)
    assert "not written by" in mep("train", "--resume", path, code=2)
    torch.save(nn.Linear(1, 1), path)  # a pickled object could run anything on loading
    assert "not a whole checkpoint" in mep("train", "--resume", path, code=2)
    torch.save({**torch.load(trained, weights_only=True), "version": 99}, path)
    assert "version 99" in mep("train", "--resume", path, code=2)
    assert "no checkpoint" in mep("train", "--resume", tmp_path / "absent.pt", code=2)


def test_a_checkpoint_is_not_overwritten_by_a_new_run(trained):
    assert f"--resume {trained}" in mep(*SMALL, "--checkpoint", trained, code=2)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def fail(file):
        file.write(b"half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_atomically(path, fail)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


# Refusals


@pytest.mark.parametrize(
    "words, told",
    [
        (("--epochs", 1, "--seconds", 1), "--epochs and --seconds"),
        (("--epochs", 0), "--epochs"),
        (("--seconds", -1), "--seconds"),
        (("--seconds", "nan"), "--seconds"),
        (("--batch-size", 0), "--batch-size"),
        (("--preset", "adam", "--beta", 0.1), "`adam` has no --beta"),
        (("--preset", "muon_backprop", "--settle-steps", 3), "`muon_backprop` has no --settle-steps"),
        (("--preset", "smap"), "smap"),
        (("--strength", 1), "--strength"),
        (("--preset", "eqprop", "--on-unsettled", "shout"), "shout"),
        (("--preset", "sgd", "--cost", "hinge"), "hinge"),
        (("--data", "emnist"), "emnist"),
        (("--model", "mpl"), "mpl"),
        (("--model", "no.such.module:net"), "no.such.module"),
        (("--device", "abacus"), "abacus"),
        (("--checkpoint-every", 5), "--checkpoint"),
        (("--json", "/proc/run.json"), "/proc/run.json"),
    ],
)
def test_bad_options_are_refused_in_one_block(words, told):
    output = mep("train", "--data", "digits", *words, code=2)
    assert told in output
    assert "Traceback" not in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_absent_gpu_is_refused():
    assert "no GPU" in mep(*SMALL, "--device", "cuda", code=2)


# The benchmark

SUMMARY = {
    *("accuracy", "accuracy_spread", "vs_sgd", "vs_muon", "target_seconds"),
    *("epoch_seconds", "step_seconds", "step_ratio", "running", "residual", "residual_max", "sweeps", "settled"),
}
BACKPROP = ("sgd", "adam", "muon_backprop", "torch_muon")
RESULT = {
    *("seed", "accuracy", "seconds", "epochs", "steps", "step_seconds", "epoch_seconds", "running"),
    *("loss", "residual", "residual_max", "sweeps", "settled", "error", "curve"),
}


@pytest.fixture(scope="module")
def benched(tmp_path_factory):
    """The folder of a small benchmark, and what was printed."""
    folder = tmp_path_factory.mktemp("bench")
    return folder, mep("bench", "--quick", "--data", "digits", "--seconds", 0.1, "--seeds", 2, "--out", folder)


def test_bench_writes_a_whole_record(benched):
    record = json.loads((benched[0] / "digits.json").read_text())
    assert {
        "kind",
        "created",
        "command",
        "commit",
        "versions",
        "machine",
        "settings",
        "rows",
    } == record.keys()
    assert [row["name"] for row in record["rows"]] == [recipe.preset for recipe in recipes_of("bench")]
    for row in record["rows"]:
        assert row["summary"].keys() == SUMMARY
        assert [seed["seed"] for seed in row["seeds"]] == [0, 1]
        for seed in row["seeds"]:
            assert seed.keys() == RESULT and seed["error"] is None
            assert len({len(values) for values in seed["curve"].values()}) == 1
            assert 0.1 <= seed["seconds"] < 10.0  # the last step may take long on a busy machine
            assert 0.0 < seed["running"] <= 1.0
            assert seed["curve"]["accuracy"][-1] == seed["accuracy"]
            assert all(start < end for start, end in pairwise(seed["curve"]["seconds"]))
        settled = row["name"] not in BACKPROP
        assert (row["summary"]["residual"] is not None) == settled
        assert (row["summary"]["sweeps"] is not None) == settled
    sgd = record["rows"][0]["summary"]
    assert sgd["step_ratio"] == 1.0 and sgd["vs_sgd"] == 0.0


def test_bench_prints_its_table_and_draws_its_picture(benched):
    folder, output = benched
    assert all(f"| {recipe.label} " in output for recipe in recipes_of("bench"))
    assert set(empty_columns(output)) <= {"to 92.12%"}  # a tenth of a second is too short
    assert (folder / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_plot_needs_the_record_alone(benched, tmp_path):
    picture = tmp_path / "again.png"
    output = mep("plot", benched[0] / "digits.json", "--out", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "| SGD " in output


def by_title(markdown):
    """The cells of the only table, by the first of their row and their title."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_report_says_what_was_measured_and_what_measured_it(benched, tmp_path):
    path = benched[0] / "digits.json"
    page, record = mep("report", path), json.loads(path.read_text())
    cells = by_title(page)
    assert list(cells) == [row["label"] for row in record["rows"]]
    for row in record["rows"]:
        own, shown = row["summary"], cells[row["label"]]
        assert shown["Accuracy"] == f"{own['accuracy']:.2f}% ± {own['accuracy_spread']:.2f}"
        assert shown["/ SGD"] == f"{own['step_ratio']:.2f}"
        assert (shown["vs SGD"], shown["vs Muon"]) == (f"{own['vs_sgd']:+.2f}", f"{own['vs_muon']:+.2f}")
        assert (shown["Residual"] == "—") == (row["name"] in BACKPROP)
        assert (shown["to 92.12%"] == "—") == (own["target_seconds"] is None)
    assert "![digits](digits.png)" in page
    for made in (record["command"], record["commit"], record["machine"]["processor"], record["versions"]["torch"]):
        assert made is None or made in page
    assert "![" not in mep("report", Path(shutil.copy(path, tmp_path)))


@pytest.mark.parametrize("running, gpu, warned", [(0.5, None, True), (0.99, None, False), (0.5, "a GPU", False)])
def test_report_doubts_times_of_a_busy_machine(running, gpu, warned, benched, tmp_path):
    record = json.loads((benched[0] / "digits.json").read_text())
    for row in record["rows"]:
        row["summary"]["running"] = 1.0
    record["rows"][3]["summary"]["running"], record["machine"]["gpu"] = running, gpu
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(record))
    assert ("busy with something else up to 50%" in mep("report", path)) == warned


def test_report_shows_unsettled_steps_and_the_earlier_system_where_there_is_something_to_say(benched, tmp_path):
    path = tmp_path / "changed.json"
    record = json.loads((benched[0] / "digits.json").read_text())
    for row in record["rows"]:
        row["summary"]["settled"] = None if row["name"] in BACKPROP else 1.0
    path.write_text(json.dumps(record))
    assert not {"Settled", "Earlier system"} & by_title(mep("report", path))["SMEP"].keys()
    record["settings"] |= EARLIER_TASK
    smep = next(row for row in record["rows"] if row["name"] == "smep")
    for share, told in ((0.0, "0%"), (0.25, "25%"), (0.99999, "99.9%")):
        smep["summary"]["settled"] = share
        path.write_text(json.dumps(record))
        cells = by_title(mep("report", path))
        assert cells["SMEP"]["Settled"] == told and cells["SGD"]["Settled"] == "—"
        assert cells["SMEP"]["Earlier system"] == "75.02%, 1.96" and cells["SMEP-fast"]["Earlier system"] == ""


@pytest.mark.parametrize("target, expected", [(5, 0.0), (10, 0.0), (30, 0.5), (50, 1.0), (55, 5.0), (60, 6.0)])
def test_time_to_a_target_is_that_of_the_first_crossing(target, expected):
    curve = {"seconds": [0.0, 1.0, 2.0, 4.0, 6.0], "accuracy": [10.0, 50.0, 30.0, 50.0, 60.0]}
    assert time_to(target, curve) == expected
    assert time_to(60.1, curve) == math.inf


@pytest.mark.parametrize("slow, expected", [(1, 2.0), (2, None)])
def test_a_seed_that_never_arrives_counts_as_the_slowest(slow, expected):
    def seed(at):
        curve = {"seconds": [0.0, at], "accuracy": [0.0, 90.0 if at else 50.0]}
        return dict.fromkeys(RESULT) | {"accuracy": curve["accuracy"][-1], "curve": curve}

    rows = [{"name": "adam", "seeds": [seed(at) for at in (1.0, 2.0, 3.0)[: 3 - slow] + (0.0,) * slow]}]
    summarise(rows, target=90.0)
    assert rows[0]["summary"]["target_seconds"] == expected


def test_all_are_compared_with_the_first_sgd_and_the_first_muon():
    def row(name, accuracy, step_seconds):
        curve = {"seconds": [0.0], "accuracy": [accuracy]}
        figures = {"accuracy": accuracy, "step_seconds": step_seconds, "curve": curve}
        return {"name": name, "seeds": [dict.fromkeys(RESULT) | figures]}

    rows = [
        row("sgd", 90.0, 1.0),
        row("muon_backprop", 80.0, 2.0),
        row("sgd", 50.0, 5.0),
        row("muon_backprop", 0.0, 1.0),
    ]
    summarise(rows, target=92.0)
    assert [row["summary"]["vs_sgd"] for row in rows] == [0.0, -10.0, -40.0, -90.0]
    assert [row["summary"]["vs_muon"] for row in rows] == [10.0, 0.0, -30.0, -80.0]
    assert [row["summary"]["step_ratio"] for row in rows] == [1.0, 2.0, 5.0, 1.0]


@pytest.mark.parametrize("seconds, longest", [(15.0, 0.25), (0.2, 0.25), (1.0, 0.005)])
def test_turns_are_short_while_accuracy_jumps(seconds, longest):
    ends = deadlines(seconds, longest)
    assert ends[0] == 0.0 and ends[-1] == seconds
    for start, end in pairwise(ends):
        assert 0 < end - start <= min(longest, max(0.01, 0.05 * start)) + 1e-12
    assert len(ends) < 5 + seconds / min(longest, 0.01)


def test_torch_muon_is_torchs_on_matrices_and_sgd_beside_it():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10)).double()
    twin = copy.deepcopy(net)
    ours = torch_muon(net.parameters(), model=net, lr=0.1, momentum=0.9)
    matrix = [twin[3].weight]
    others = [twin[0].weight, twin[0].bias, twin[3].bias]
    muon = torch.optim.Muon(matrix, lr=0.1, momentum=0.9, weight_decay=0.0)
    rest = torch.optim.SGD(others, lr=0.1, momentum=0.9, nesterov=True)
    x, y = torch.randn(5, 1, 8, 8, dtype=torch.double), torch.arange(5)
    for _ in range(3):
        loss = nn.functional.cross_entropy(twin(x), y)
        for p, g in zip(twin.parameters(), torch.autograd.grad(loss, list(twin.parameters())), strict=True):
            p.grad = g
        muon.step()
        rest.step()
        assert torch.equal(ours.step(x=x, target=y), loss)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_torch_muon_is_refused_where_torch_has_none(monkeypatch, tmp_path):
    monkeypatch.delattr(torch.optim, "Muon")
    assert "--without torch_muon" in mep("bench", "--data", "digits", "--seconds", 0.1, "--out", tmp_path, code=2)


def test_bench_compares_variants(tmp_path):
    words = ("--data", "digits", "--seconds", 0.05, "--seeds", 1, "--out", tmp_path, "--name", "tolerance")
    output = mep("bench", *words, "--only", "EqProp", "--add", "eqprop tol=0.5 phases=centered", "--target", 1)
    rows = json.loads((tmp_path / "tolerance.json").read_text())["rows"]
    assert [row["label"] for row in rows] == ["EqProp", "EqProp tol=0.5 phases=centered"]
    assert rows[1]["options"] == rows[0]["options"] | {"tol": 0.5, "phases": "centered"}
    assert (tmp_path / "tolerance.png").exists()
    assert "to 1%" in by_title(output)["EqProp"] and all(row["summary"]["target_seconds"] is not None for row in rows)


def test_recipes_are_chosen():
    def presets(**choice):
        return [recipe.preset for recipe in recipes.choose("bench", **choice)]

    names = [recipe.preset for recipe in recipes_of("bench")]
    assert presets() == names and len(set(names)) == 11 and len(names) == 12  # EqProp with two energies
    assert presets(without=["adam"]) == [name for name in names if name != "adam"]
    assert presets(only=["smep", "SGD"]) == ["sgd", "smep"]


def test_the_bench_has_learning_rates_of_its_own():
    assert all(recipe.options["lr"] > 0 for recipe in recipes_of("bench"))
    assert all("lr" not in recipe.options for command in ("profile", "speed") for recipe in recipes_of(command))


def test_bench_compares_a_chosen_few_and_survives_a_failure(tmp_path, monkeypatch):
    diverging = Recipe("Huge steps", "sgd", {}, "bench", lr=1e20)
    others = [recipe for recipe in recipes.RECIPES if recipe.preset != "sgd"]
    monkeypatch.setattr(recipes, "RECIPES", (diverging, *others))
    output = mep(
        "bench",
        "--data",
        "digits",
        "--quick",
        "--seconds",
        0.1,
        "--only",
        "sgd",
        "--only",
        "adam",
        "--out",
        tmp_path,
    )
    assert "Huge steps stopped early on seed 0" in output
    rows = json.loads((tmp_path / "digits.json").read_text())["rows"]
    assert [row["seeds"][0]["error"] is None for row in rows] == [False, True]
    assert (tmp_path / "digits.png").exists()


def test_bench_and_plot_refuse(benched, tmp_path):
    for words in (("--only", "nobody"), ("--without", "nobody"), ("--add", "nobody tol=1")):
        assert "nobody" in mep("bench", *words, "--out", tmp_path, code=2)
    for words in ("eqprop", "eqprop tol", "", "=1"):
        assert "eqprop tol=0.1" in mep("bench", "--add", words, "--out", tmp_path, code=2)
    assert "`eqprop` has no --strength" in mep(
        "bench", "--add", "eqprop strength=1", "--data", "digits", "--out", tmp_path, code=2
    )
    assert "`eqprop` has no --speed" in mep(
        "bench", "--add", "eqprop speed=1", "--data", "digits", "--out", tmp_path, code=2
    )
    assert "nothing to compare" in mep("bench", "--only", "sgd", "--without", "sgd", "--out", tmp_path, code=2)
    foreign = Path(tmp_path / "foreign.json")
    foreign.write_text('{"kind": "recipe"}')
    assert "recipe" in mep("plot", foreign, code=2)
    assert "recipe" in mep("report", foreign, code=2)
    foreign.write_text("{")
    assert "not a JSON record" in mep("plot", foreign, code=2)
    assert "Cannot read" in mep("plot", tmp_path / "absent.json", code=2)
    assert ".png" in mep("plot", benched[0] / "digits.json", "--out", tmp_path / "picture.doc", code=2)
