"""Every table of every command fits 80 columns, with all of its numbers whole; `mep bench` fills its own as it runs."""

import io
import json
from itertools import pairwise

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mep.cli import app
from mep.lab import bench, profile, speed, study, verify
from mep.lab.recipes import EARLIER, EARLIER_TASK, recipes_of
from mep.runs import report

MADE = {
    "created": "2026-01-01T00:00:00+00:00",
    "command": "mep",
    "commit": None,
    "versions": {"mep": "0", "torch": "0", "python": "0"},
    "machine": {"processor": "one", "threads": 1, "cores": 2, "gpu": None},
}
LONG = "EqProp tol=0.001 beta=0.01 phases=centered on_unsettled=ignore"


def bench_record():
    rows = []
    for label in (*(recipe.label for recipe in recipes_of("bench")), LONG):
        curve = {"seconds": [0.0, 15.0], "epochs": [0.0, 9.0], "accuracy": [9.8, 95.4]}
        seed = {"seed": 0, "accuracy": 95.4, "step_seconds": 0.0123, "epoch_seconds": 12.3, "running": 0.5}
        seed |= {"sweeps": 15.0, "residual": 7.4e-05, "residual_max": 0.00923, "settled": 0.999, "curve": curve}
        rows.append({"name": label, "label": label, "options": {}, "seeds": [{**seed, "error": "too far"}] * 2})
    rows[0]["name"], rows[1]["name"] = "sgd", "muon_backprop"
    bench.summarise(rows, 92.12)
    settings = {"model": "mlp", "batch_size": 256, "seeds": 2, "target": 92.12, **EARLIER_TASK}
    return {**MADE, "kind": bench.KIND, "settings": settings, "rows": rows}


def speed_record():
    ratio = {"median": 13.4, "low": 12.15, "high": 113.71}
    models = []
    for name in speed.MODELS:
        rows = []
        for recipe in recipes_of("speed"):
            times = [
                {"threads": n, "seconds": {"median": 0.0123}, "mean": 0.0123, "ratio": ratio, "to_muon": 10.25}
                | {"running": 0.5, "rounds": 19}
                for n in (1, 16)
            ]
            found = {"sweeps": 30.0, "residual": 5e-1, "residual_max": 7.3e-1, "settled": 0.007, "beta": 0.0073}
            taken = {"memory": 2**28, "flops": 123456.7e6, "bytes": 12345.6e6, "unsettled": "fixed steps"}
            rows.append({**recipe.as_row(), **found, **taken, "error": None, "times": times})
        rows[-1]["error"] = "no way."
        models.append({"model": name, "batch_size": 64, "parameters": 2_900_000, "rows": rows})
    settings = {"data": "mnist5k", "train_steps": 150, "threads": [1, 16]}
    peaks = [{"threads": n, "flops": 46e9, "bytes": 9e9} for n in (1, 16)]
    found = {"settings": settings, "attainable": peaks, "models": models, "stopped": "cnn"}
    return {**MADE, "kind": speed.KIND, **found}


def profile_record():
    shares = {"free": 0.2, "settle": 0.5, "contrast": 0.1, "update": 0.1, "rest": 0.1}
    numbers = {"iterations": 30.0, "beta": 0.0035, "settled": 0.999, "residual": 7.8e-01, "residual_max": 1.0}
    numbers |= dict.fromkeys(("cosine", "size", "first_cosine", "first_size", "gap", "bias", "backprop_cosine"), 0.5958)
    numbers |= {"seconds": {"median": 0.0123, "low": 0.01, "high": 0.02}, "ratio": {"median": 13.35}}
    numbers |= {"shares": shares, "running": 0.5, "bought": 1.2, "idle": False}
    rows = [{**recipe.as_row(), **numbers, "error": None} for recipe in recipes_of("profile")]
    rows.append({**rows[-1], "label": LONG})
    rows.append({**rows[-1], "error": "no way."})
    settings = {"data": "mnist5k", "model": "mlp256", "batch_size": 32, "train_steps": 150}
    return {**MADE, "kind": profile.KIND, "settings": settings, "rows": rows}


def study_record():
    settings = {"width": 32, "batch_size": 64, "tol": 0.01, "train_steps": 100}
    settings |= {"depths": [5, 10, 20, 50, 100, 200], "betas": [0.001, 0.01, 0.03, 0.1, 0.3, 1.0]}
    rows = [
        {"kind": shortcuts, "activation": "relu", "start": start, "depth": depth, "stage": stage, "beta": beta}
        | {"error": 0.00086, "median_beta": 0.00098, "sweeps": 100.0, "settled": 0.998}
        for shortcuts, start in (("plain", "xavier"), ("residual", "torch"))
        for depth in settings["depths"]
        for beta in (None, *settings["betas"])
        for stage in ("initial", "trained")
    ]
    return {**MADE, "kind": study.KIND, "settings": settings, "rows": rows}


def verify_record():
    orders = {"one-sided": 1.0, "centered": 2.0}
    match = {"beta": 0.01, "cosine": 1.0, "ratio": 0.9988, "error": 1e-3}
    parameters = [
        {"name": name, "norm": 0.24, "matches": {phases: [match] for phases in orders}, "order": orders}
        | {"backprop_difference": 7e-10, "ep_difference": 4e-6}
        for name in ("1.weight", "encoder.layers.11.attention.self.query_key_value_projection.weight")
    ]
    estimations = [
        {"phases": phases, "beta": 0.03, "error": 3.6e-2, "sweeps": 100, "unsettled": 16, "residual": 4e-9}
        | {"recomputed": 4e-9, "left_branch": 0.123}
        for phases in orders
    ]
    found = {"ok": False, "failures": ["a long reason " * 9], "notes": ["a note " * 20], "tol": 1e-8, "reach": 12.8}
    found |= {"beyond": None, "orders": orders, "parameters": parameters, "estimations": estimations}
    return {**MADE, "kind": verify.KIND, "settings": {}, "report": found}


RECORDS = {
    bench: bench_record,
    speed: speed_record,
    profile: profile_record,
    study: study_record,
    verify: verify_record,
}


def shown(module, record, width, **console):
    text = io.StringIO()
    module.show(record, Console(file=text, width=width, color_system=None, **console))
    return text.getvalue()


@pytest.mark.parametrize("module", RECORDS, ids=lambda module: module.KIND)
def test_every_table_fits_80_columns(module):
    record = RECORDS[module]()
    text = shown(module, record, 80, force_terminal=True)
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    # No number is lost: what Markdown has, where nothing is cut, is there as often; the earlier system is left out.
    lines = [line for line in shown(module, record, 80, force_terminal=False).splitlines() if line.startswith("|")]
    rows = [line for line, below in pairwise([*lines, ""]) if not (line.startswith("|:") or below.startswith("|:"))]
    cells = [cell.strip() for row in rows for cell in row.strip("|").split("|")[1:]]
    numbers = {cell for cell in cells if any(character.isdigit() for character in cell)}
    numbers -= {f"{accuracy:.2f}%, {ratio:.2f}" for accuracy, ratio in EARLIER.values()}
    assert numbers and all(text.count(number) >= cells.count(number) for number in numbers)


@pytest.mark.parametrize("module", RECORDS, ids=lambda module: module.KIND)
def test_mep_report_cuts_nothing(module, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "record.json"
    path.write_text(json.dumps(RECORDS[module]()))
    done = CliRunner().invoke(app, ["report", str(path)])
    assert done.exit_code == 0 and "…" not in done.output and done.output.count("\n| ") > 3


def test_a_long_title_takes_two_lines_and_a_long_label_several():
    titles = ["Recipe", "1 thread: step", "/ backprop", "much longer than wide"]
    (table,) = report.tables(titles, [[LONG, "1.23 ms", "1.00", "2"]], 80)
    heads = [column.header for column in table.columns]
    assert heads == ["Recipe", "1 thread:\nstep", "/ backprop", "much longer\nthan wide"]
    assert next(iter(table.columns[0].cells)).count("\n") == 1


class FakeRun:
    def __init__(self, label, seconds, error=None):
        self.label, self.seconds, self.error = label, seconds, error
        self.curve = {"seconds": [0.0, seconds], "epochs": [0.0, 1.0], "accuracy": [10.0, 95.4]}

    def result(self):
        found = {"accuracy": 95.4, "step_seconds": 0.0123, "epoch_seconds": 12.3, "running": 1.0, "settled": 1.0}
        found |= {"sweeps": 1.0, "residual": 7.4e-05, "residual_max": 0.0092, "curve": self.curve}
        return {**found, "error": self.error}


def progress_of(runs, *, is_terminal, times=1):
    console = Console(force_terminal=is_terminal, width=80, color_system=None, file=io.StringIO())
    rows = [{"name": run.label, "label": run.label, "options": {}, "seeds": []} for run in runs]
    with bench.Progress(bench.Settings(), console) as progress:
        for _ in range(times):
            progress.after_turn(rows, runs)
    return console.file.getvalue()


def test_the_bench_says_when_a_row_is_finished_where_its_output_is_piped():
    runs = [FakeRun("SGD", 15.1), FakeRun("SMEP", 3.0), FakeRun("Adam", 2.0, error="too far")]
    lines = progress_of(runs, is_terminal=False, times=3).splitlines()
    assert lines == [
        "seed 1 of 3, SGD: accuracy 95.40%, 12.3 ms a step, 1.0 sweeps, residual 7.4e-05",
        "seed 1 of 3, Adam: accuracy 95.40%, 12.3 ms a step, 1.0 sweeps, residual 7.4e-05, stopped early: too far",
    ]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_the_bench_shows_the_runs_that_go_on(is_terminal, monkeypatch):
    monkeypatch.setattr(bench.Progress, "REFRESH", -1.0)
    monkeypatch.setattr(bench.Progress, "REPEAT", -1.0)
    text = progress_of([FakeRun("SGD", 3.0), FakeRun("SMEP", 4.0)], is_terminal=is_terminal)
    if is_terminal:
        assert "…" not in text and "SMEP" in text and "95.40%" in text and "seed 1 of 3, 3.0 of 15 s" in text
    else:
        assert text == "seed 1 of 3, 3.0 of 15 s: SGD 95.4%, SMEP 95.4%\n"
