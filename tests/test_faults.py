"""Whatever goes wrong in the middle of a step, all is as before it or as after it; and what a fault left is refused."""

import inspect
import math
import signal
import sys
from pathlib import Path

import pytest
import torch
from test_bad_input import PRESETS, assert_same, copied, snapshot
from torch import nn

import mep
from mep.runs import training

HOME = str(Path(mep.__file__).parent)


class Interrupted(KeyboardInterrupt):
    pass


class Net(nn.Module):
    """All that a half-done step could leave changed: statistics, noise, an output with every kind of node behind it."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.3)
        self.second, self.last = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.drop(self.norm(self.first(x)).relu())
        return self.last((h + self.second(h)).tanh())


def batch(seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 4, generator=generator).to(dtype), torch.randint(3, (6,), generator=generator)


def trained(preset, steps=1, model=None, **given):
    torch.manual_seed(0)
    model = Net() if model is None else model
    opt = preset(model.parameters(), model=model, **given)
    for seed in range(steps):
        x, y = batch(seed)
        opt.step(x=x, target=y)
    return opt


class Strike:
    """Raises at the `at`-th call that a function of mep makes or receives, and notes who was calling whom.

    A generator that goes on is not struck: there a profiler cannot raise as a signal does.
    """

    def __init__(self, at):
        self.at, self.calls, self.stack = at, 0, []

    def __enter__(self):
        self.handler = signal.getsignal(signal.SIGINT)
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def _profile(self, frame, event, _):
        code = frame.f_code
        goes_on = event == "call" and code.co_flags & inspect.CO_GENERATOR
        if event not in ("call", "c_call") or goes_on or not code.co_filename.startswith(HOME):
            return
        if signal.getsignal(signal.SIGINT) is not self.handler:  # a signal would wait here, see mep.guards
            return
        self.calls += 1
        if self.calls == self.at:
            self.stack = [name.f_code.co_name for name in frames(frame)]
            raise Interrupted


def frames(frame):
    while frame is not None:
        yield frame
        frame = frame.f_back


def differing(one, other):
    """The names of the parts that are not the same."""
    return {name for name in one if not is_same(one[name], other[name])}


def is_same(one, other):
    try:
        assert_same(one, other)
    except AssertionError:
        return False
    return True


def parts(opt):
    """All that a step may change, by who changes it."""
    buffers = {name for name, _ in opt.model.named_buffers()}
    now, values = snapshot(opt), copied(opt.model.state_dict())
    return {
        "statistics": {name: values[name] for name in buffers},
        "noise": torch.get_rng_state(),
        "memory": now["state"].get("estimator"),
        "parameters": {name: v for name, v in values.items() if name not in buffers},
        "gradients": now["gradients"],
        "update": now["state"]["state"],
        "last": now["last"],
        "modes": now["modes"],
    }


ESTIMATED = {"statistics", "noise", "memory"}
UPDATED = {"parameters", "gradients", "update", "last"}


STRUCK = [*((preset, 1) for preset in PRESETS), (mep.eqprop, 0)]


@pytest.mark.parametrize(("preset", "steps"), STRUCK, ids=lambda v: getattr(v, "__name__", f"after {v} steps"))
def test_interruption_at_any_call_leaves_all_as_before_or_the_estimate_whole(preset, steps):
    """While estimating, nothing has changed. Once the estimate is there, what it moves (statistics, noise, memory) has
    moved wholly; the update may then stand between two weights. Either way the next step is the one it would have been.
    """
    x, y = batch(9)
    opt = trained(preset, steps)
    before, whole = parts(opt), trained(preset, steps)
    torch.set_rng_state(before["noise"])
    with Strike(at=0) as counted:
        whole.step(x=x, target=y)
    after = parts(whole)
    assert differing(before, after) >= ESTIMATED - {"memory"} | UPDATED

    caught = 0
    for struck in range(1, counted.calls + 1, max(1, counted.calls // 40)):
        opt = trained(preset, steps) if steps == 0 else opt  # the first step is the first only once
        torch.set_rng_state(before["noise"])
        try:
            with Strike(struck) as strike:
                opt.step(x=x, target=y)
        except Interrupted:
            caught += 1
        else:  # a step after one that was cut short has less to look at
            opt = trained(preset, steps)
            continue
        now = parts(opt)
        if "gradients" in strike.stack and "observe" not in strike.stack and "finish" not in strike.stack:
            assert not differing(now, before), strike.stack
        changed = differing(now, before)
        if changed:
            assert not differing(now, after) & ESTIMATED or not changed & ESTIMATED, strike.stack
            assert changed <= ESTIMATED | UPDATED
            opt = trained(preset, steps)

    assert caught > 25
    torch.set_rng_state(before["noise"])
    opt.step(x=x, target=y)
    assert not differing(parts(opt), after)


# What a fault left in weights, statistics, inputs and targets.

FAULTS = {
    "NaN weight": lambda model, x: _set(model.second.weight, math.nan),
    "infinite weight": lambda model, x: _set(model.second.weight, math.inf),
    "negative infinite weight before a ReLU": lambda model, x: _set(model.norm.weight, -math.inf),
    "NaN bias": lambda model, x: _set(model.first.bias, math.nan),
    "NaN statistics": lambda model, x: (model.eval(), _set(model.norm.running_mean, math.nan)),
    "negative variance": lambda model, x: (model.eval(), _set(model.norm.running_var, -1.0)),
    "NaN input": lambda model, x: _set(x, math.nan),
    "infinite input": lambda model, x: _set(x, -math.inf),
    "exploded weights": lambda model, x: [p.data.mul_(1e20) for p in model.parameters()],
    "exploded output": lambda model, x: model.last.weight.data.mul_(3e38),
    "exploded input": lambda model, x: x.mul_(3e38),
}


def _set(tensor, value):
    tensor.data.view(-1)[1] = value


@pytest.mark.parametrize("preset", PRESETS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_refused_or_spreads_to_no_other_number(fault, preset):
    """Refused: nothing has changed. Accepted: finite weights still are; the statistics are the model's own affair."""
    model, (x, y) = Net(), batch(3)
    opt = trained(preset, model=model)
    FAULTS[fault](model, x)
    before, noise = snapshot(opt), torch.get_rng_state()
    try:
        opt.step(x=x, target=y)
    except mep.MepError:
        assert_same(snapshot(opt), before)
        assert torch.equal(torch.get_rng_state(), noise)
    else:
        for name, value in model.named_parameters():
            assert bool((value.isfinite() | ~before["parameters and buffers"][name].isfinite()).all()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4, 6e4])
def test_half_precision_overflow_is_refused_or_harmless(scale, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    model[2].weight.data.mul_(scale)
    x, y = batch(4, dtype)
    ep = mep.EquilibriumPropagation(model)
    try:
        found, estimate = ep.gradients(x, y)
    except mep.DivergedError as refusal:
        assert "Nothing was changed" in str(refusal)
        assert scale > 1
    else:
        assert math.isfinite(float(estimate.loss))
        assert all(bool(g.isfinite().all()) and g.dtype == dtype for g in found.values())


@pytest.mark.parametrize("preset", PRESETS, ids=lambda f: f.__name__)
def test_two_runs_with_one_seed_agree_bit_for_bit_with_noise_and_statistics(preset):
    short = {"settle_lr": 0.03} if preset is mep.O1MemoryEPv2 else {}  # the usual step runs away after some updates
    assert_same(snapshot(trained(preset, steps=5, **short)), snapshot(trained(preset, steps=5, **short)))


# Checkpoints.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "whole.pt"
    run = {"weights": torch.arange(300.0), "steps": 7}
    training.save_checkpoint(path, {"preset": "eqprop"}, "digits", run)
    return path


def is_refused_or_whole(path, content):
    path.write_bytes(content)
    try:
        found = training.load_checkpoint(path)
    except training.CheckpointError as refusal:
        return str(path) in str(refusal)
    return is_same(found["run"], {"weights": torch.arange(300.0), "steps": 7}) and found["settings"] == {
        "preset": "eqprop"
    }


def test_no_flipped_bit_of_a_checkpoint_goes_unnoticed(checkpoint, tmp_path):
    content = checkpoint.read_bytes()
    for place in range(0, len(content), max(1, len(content) // 400)):
        flipped = bytes([content[place] ^ (1 << place % 8)])
        assert is_refused_or_whole(tmp_path / "flipped.pt", content[:place] + flipped + content[place + 1 :]), place


def test_no_truncated_checkpoint_is_read(checkpoint, tmp_path):
    content = checkpoint.read_bytes()
    path = tmp_path / "truncated.pt"
    for length in (*range(0, len(content) - 1, max(1, len(content) // 100)), len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(training.CheckpointError, match="not a whole checkpoint"):
            training.load_checkpoint(path)


class Payload:
    """Runs what it likes when it is unpickled as code."""

    def __reduce__(self):
        return (Path.touch, (Path(MARK),))


MARK = "executed-by-unpickling"


def test_a_checkpoint_is_never_executed(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.pt"
    torch.save({**torch.load(checkpoint, weights_only=True), "run": Payload()}, path)
    with pytest.raises(training.CheckpointError):
        training.load_checkpoint(path)
    assert not Path(MARK).exists()
    torch.load(path, weights_only=False)
    assert Path(MARK).exists()
