"""The commands as a user meets them: what they print, write, resume and refuse."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from mep.cli import app, contestants, models
from mep.cli.contestants import CONTESTANTS, Contestant
from mep.cli.files import write_atomically
from mep.cli.optimizers import names
from mep.cli.run import Run
from mep.cli.training import Batches, epoch_order

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
    "words", [["--help"], ["train", "--help"], ["bench", "--help"], ["plot", "--help"], ["--version"]]
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
        "converged",
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


@pytest.mark.parametrize("model", ["mlp", "cnn"])
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
    *("accuracy", "accuracy_spread", "vs_sgd", "vs_muon", "epoch_seconds", "step_seconds", "step_ratio"),
    *("residual", "residual_max", "sweeps", "converged"),
}
RESULT = {
    *("seed", "accuracy", "seconds", "epochs", "steps", "step_seconds", "epoch_seconds"),
    *("loss", "residual", "residual_max", "sweeps", "converged", "error", "curve"),
}


@pytest.fixture(scope="module")
def benched(tmp_path_factory):
    """The folder of a small benchmark, and what was printed."""
    folder = tmp_path_factory.mktemp("bench")
    return folder, mep("bench", "--quick", "--data", "digits", "--seconds", 0.2, "--seeds", 2, "--out", folder)


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
    assert [row["name"] for row in record["rows"]] == [contestant.name for contestant in CONTESTANTS]
    for row in record["rows"]:
        assert row["summary"].keys() == SUMMARY
        assert [seed["seed"] for seed in row["seeds"]] == [0, 1]
        for seed in row["seeds"]:
            assert seed.keys() == RESULT and seed["error"] is None
            assert len({len(values) for values in seed["curve"].values()}) == 1
            assert 0.2 <= seed["seconds"] < 1.0
            assert seed["curve"]["accuracy"][-1] == seed["accuracy"]
        settled = row["name"] not in ("sgd", "adam", "muon_backprop")
        assert (row["summary"]["residual"] is not None) == settled
        assert (row["summary"]["sweeps"] is not None) == settled
    sgd = record["rows"][0]["summary"]
    assert sgd["step_ratio"] == 1.0 and sgd["vs_sgd"] == 0.0


def test_bench_prints_its_table_and_draws_its_picture(benched):
    folder, output = benched
    assert all(f"| {contestant.label} " in output for contestant in CONTESTANTS)
    assert (folder / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_plot_needs_the_record_alone(benched, tmp_path):
    picture = tmp_path / "again.png"
    output = mep("plot", benched[0] / "digits.json", "--out", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "| SGD " in output


def test_bench_compares_a_chosen_few_and_survives_a_failure(tmp_path, monkeypatch):
    diverging = Contestant("sgd", "Huge steps", {"lr": 1e20})
    monkeypatch.setattr(contestants, "CONTESTANTS", (diverging, *CONTESTANTS[1:]))
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
    assert "nobody" in mep("bench", "--only", "nobody", "--out", tmp_path, code=2)
    foreign = Path(tmp_path / "foreign.json")
    foreign.write_text('{"kind": "recipe"}')
    assert "recipe" in mep("plot", foreign, code=2)
    foreign.write_text("{")
    assert "not a JSON record" in mep("plot", foreign, code=2)
    assert "Cannot read" in mep("plot", tmp_path / "absent.json", code=2)
    assert ".png" in mep("plot", benched[0] / "digits.json", "--out", tmp_path / "picture.doc", code=2)
