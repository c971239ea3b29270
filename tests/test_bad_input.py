"""What cannot be is refused: with a typed error that names the value and the way out, and nothing has changed."""

import copy
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mep
from mep import presets

PRESETS = [f for f in vars(presets).values() if inspect.isfunction(f) and f.__module__ == presets.__name__]
PRESETS = [f for f in PRESETS if not f.__name__.startswith("_")]


def takes(*keywords):
    return [f for f in PRESETS if inspect.signature(f).parameters.keys() >= set(keywords)]


@pytest.fixture(params=PRESETS, ids=lambda f: f.__name__)
def preset(request):
    return request.param


def net():
    """Everything that a half-done step could leave changed: statistics, noise, momentum, a reduced beta."""
    torch.manual_seed(0)
    hidden = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh()
    return nn.Sequential(*hidden, nn.Linear(8, 3))


def batch(seed=1, cost="cross_entropy"):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(6, 4, generator=generator), torch.randint(3, (6,), generator=generator)
    return x, y if cost == "cross_entropy" else F.one_hot(y, 3).float()


def copied(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(v) for key, v in value.items()}
    return [copied(v) for v in value] if isinstance(value, (list, tuple)) else value


def snapshot(opt):
    """All that a step may change; for the noise see `test_training_continues_as_if_a_bad_batch_had_never_come`."""
    return copied(
        {
            "parameters and buffers": opt.model.state_dict(),
            "gradients": [p.grad for p in opt.model.parameters()],
            "state": opt.state_dict(),
            "last": None if opt.last is None else vars(opt.last),
            "modes": [m.training for m in opt.model.modules()],
        }
    )


def assert_same(one, other, place="everything"):
    assert type(one) is type(other), place
    if isinstance(one, torch.Tensor):
        same = torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
        assert same, f"{place} changed"
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_same(one[key], other[key], f"{place}, {key}")
    elif isinstance(one, list):
        assert len(one) == len(other), place
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{place}, {i}")
    else:
        assert one == other, f"{place} changed"


def trained(preset, model=None, **given):
    """An optimizer in the middle of training."""
    model = net() if model is None else model
    opt = preset(model.parameters(), model=model, **given)
    cost = given.get("cost", "cross_entropy")
    opt.step(**dict(zip(("x", "target"), batch(1, cost if isinstance(cost, str) else "cross_entropy"), strict=True)))
    return opt


SHORT = {mep.O1MemoryEPv2: {"settle_lr": 0.03}}
"""Of a batch normalisation with random features descent with the usual step runs away after a few updates."""


def assert_refused(opt, x, y, error, *words):
    """Neither `step` nor a call of the estimator changes anything, and the message holds all the words."""
    before = snapshot(opt)
    for attempt in (lambda: opt.step(x=x, target=y), lambda: opt.estimator(x, y)):
        with pytest.raises(error) as raised:
            attempt()
        assert_same(snapshot(opt), before)
        for word in words:
            assert word in str(raised.value)


# Batches: cost, what becomes of (x, y), the error, and what its message must name.

X, Y = batch()
NAN, INF = torch.tensor(math.nan), torch.tensor(math.inf)


def spoilt(x, value):
    x = x.clone()
    x[2, 1] = value
    return x


class Holder:
    """What a batch of some library is."""


BAD_BATCHES = {
    "empty": ("mse", lambda x, y: (x[:0], y[:0]), mep.InputError, "(0, 4)", "at least one example"),
    "NaN input": ("mse", lambda x, y: (spoilt(x, NAN), y), mep.InputError, "NaN", "drop"),
    "infinite input": ("mse", lambda x, y: (spoilt(x, -INF), y), mep.InputError, "Inf", "drop"),
    "one number": ("mse", lambda x, y: (x[0, 0], y), mep.InputError, "()"),
    "input of numpy": ("mse", lambda x, y: (x.numpy(), y), mep.InputError, "ndarray", "torch.as_tensor"),
    "one of two inputs of numpy": (
        "mse",
        lambda x, y: ((x, x.numpy()), y),
        mep.InputError,
        "ndarray",
        "torch.as_tensor",
    ),
    "an object": ("mse", lambda x, y: ((x, Holder()), y), mep.InputError, "Holder", "tensors"),
    "no tensor": ("mse", lambda x, y: ((1, "a"), y), mep.InputError, "tuple", "none"),
    "a number before the examples": ("mse", lambda x, y: ((x[0, 0], x), y), mep.InputError, "single number", "by name"),
    "target of numpy": ("mse", lambda x, y: (x, y.numpy()), mep.InputError, "ndarray", "torch.as_tensor"),
    "target in a list": ("cross_entropy", lambda x, y: (x, y.tolist()), mep.InputError, "list", "torch.as_tensor"),
    "NaN target": ("mse", lambda x, y: (x, spoilt(y, NAN)), mep.MepError, "nan", "target"),
    "infinite target": ("mse", lambda x, y: (x, spoilt(y, INF)), mep.MepError, "inf", "target"),
    "too few features": ("mse", lambda x, y: (x, y[:, :2]), mep.InputError, "(6, 2)", "(6, 3)"),
    "too few targets": ("mse", lambda x, y: (x, y[:5]), mep.InputError, "(5, 3)", "(6, 3)"),
    "labels for mse": ("mse", lambda x, y: (x, y.argmax(1)), mep.InputError, "(6,)", "one_hot"),
    "a column for mse": ("mse", lambda x, y: (x, y.argmax(1, keepdim=True)), mep.InputError, "(6, 1)", "one_hot"),
    "one target for mse": ("mse", lambda x, y: (x, y[0, 0]), mep.InputError, "()", "(6, 3)"),
    "a row for mse": ("mse", lambda x, y: (x, y[:1]), mep.InputError, "(1, 3)", "(6, 3)"),
    "a column": ("cross_entropy", lambda x, y: (x, y[:, None]), mep.InputError, "(6, 1)", "(6,)"),
    "too few labels": ("cross_entropy", lambda x, y: (x, y[:4]), mep.InputError, "(4,)", "(6,)"),
    "one label": ("cross_entropy", lambda x, y: (x, y[0]), mep.InputError, "()", "(6,)"),
    "label too high": ("cross_entropy", lambda x, y: (x, y + 1), mep.InputError, "[1, 3]", "3 classes"),
    "label too low": ("cross_entropy", lambda x, y: (x, y - 1), mep.InputError, "[-1, 1]", "3 classes"),
    "labels as floats": ("cross_entropy", lambda x, y: (x, y.float()), mep.InputError, "(6,)", "torch.long"),
    "labels as bools": ("cross_entropy", lambda x, y: (x, y > 0), mep.InputError, "torch.bool", "integers"),
    "NaN probabilities": (
        "cross_entropy",
        lambda x, y: (x, spoilt(F.one_hot(y, 3).float(), NAN)),
        mep.MepError,
        "nan",
        "target",
    ),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_bad_batch_is_refused_and_changes_nothing(preset, name):
    cost, spoil, *expected = BAD_BATCHES[name]
    x, y = spoil(*batch(2, cost))
    assert_refused(trained(preset, cost=cost), x, y, *expected)


TORCH_REFUSES = {
    "double input": (X.double(), Y),
    "integers": (X.long(), Y),
    "too few features": (X[:, :3], Y),
    "two inputs": ((X, X), Y),
    "an unknown name": ({"image": X}, Y),
}


@pytest.mark.parametrize("name", TORCH_REFUSES)
def test_what_torch_itself_refuses_changes_nothing_either(preset, name):
    assert_refused(trained(preset), *TORCH_REFUSES[name], Exception)


@pytest.mark.parametrize("first", [True, False], ids=["first batch", "later"])
def test_bad_batch_may_come_first(preset, first):
    """The first batch is also the one on which the graph is checked."""
    model = net()
    opt = preset(model.parameters(), model=model) if first else trained(preset, **SHORT.get(preset, {}))
    assert_refused(opt, X, Y + 1, mep.InputError)
    assert_refused(opt, spoilt(X, NAN), Y, mep.InputError)
    assert torch.isfinite(opt.step(x=X, target=Y))


@pytest.mark.parametrize("bad", ["NaN input", "NaN probabilities", "label too high"])
def test_training_continues_as_if_a_bad_batch_had_never_come(preset, bad):
    def trained_on(*names):
        torch.manual_seed(0)
        model = net()
        opt = preset(model.parameters(), model=model, **SHORT.get(preset, {}))
        for seed, name in enumerate(names):
            if name is None:
                x, y = batch(len([n for n in names[:seed] if n is None]))
                opt.step(x=x, target=y)
            else:
                x, y = BAD_BATCHES[name][1](*batch(9))
                with pytest.raises(mep.MepError):
                    opt.step(x=x, target=y)
        return snapshot(opt)

    assert_same(trained_on(bad, None, None, bad, bad, None, bad), trained_on(None, None, None))


# Weights, costs and solvers that go wrong


def test_nan_weights_are_refused(preset):
    model = net()
    opt = trained(preset, model)
    with torch.no_grad():
        model[4].weight[1, 2] = math.nan
    assert_refused(opt, X, Y, mep.DivergedError, "nan", "weights")


def test_gradient_that_overflows_is_refused(preset):
    """The loss is finite and every equilibrium too; only the sum over the batch is not."""

    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.huge, self.norm, self.usual = nn.Linear(4, 3), nn.BatchNorm1d(4), nn.Linear(4, 3)
            nn.init.zeros_(self.huge.weight)

        def forward(self, a, b):
            return self.huge(a) + self.usual(self.norm(b))

    torch.manual_seed(0)
    model = TwoInputs()
    opt = preset(model.parameters(), model=model, cost="mse")
    y = torch.full((6, 3), 1e4)
    assert_refused(opt, (torch.full((6, 4), 3e38), X), y, mep.DivergedError, "not finite", "(3, 4)")


@pytest.mark.parametrize("settle_lr", [1e6, 1e9])
@pytest.mark.parametrize("preset", takes("settle_lr"))
def test_descent_that_leaves_the_finite_numbers_is_refused(preset, settle_lr):
    model = net()
    opt = preset(model.parameters(), model=model, settle_lr=settle_lr)
    assert_refused(opt, X, Y, mep.DivergedError, f"settle_lr={settle_lr}", "smaller settle_lr")


@pytest.mark.parametrize("settle_lr", [3.0, 30.0])
@pytest.mark.parametrize("preset", takes("settle_lr"))
def test_descent_that_climbs_is_refused_though_still_finite(preset, settle_lr):
    """Ten steps too long raise the states by orders of magnitude: their contrast is no gradient."""
    model = net()
    opt = preset(model.parameters(), model=model, settle_steps=10, settle_lr=settle_lr)
    assert_refused(opt, X, Y, mep.DivergedError, f"settle_lr={settle_lr}", "smaller settle_lr")


COSTS = {
    "a column": (lambda s, y: s.sum(1, keepdim=True), mep.InputError, "(6, 1)", "(6,)"),
    "a number": (lambda s, y: 0.0, mep.InputError, "float", "(6,)"),
    "nothing": (lambda s, y: None, mep.InputError, "NoneType", "(6,)"),
    "not differentiable": (lambda s, y: s.detach().sum(1), mep.InputError, "differentiable"),
    "not a number": (lambda s, y: s.sum(1) * math.nan, mep.DivergedError, "nan"),
}


@pytest.mark.parametrize("name", COSTS)
def test_custom_cost_must_be_differentiable_numbers(preset, name):
    cost, *expected = COSTS[name]
    model = net()
    assert_refused(preset(model.parameters(), model=model, cost=cost), X, Y, *expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("evaluation", [1, 2])
def test_interruption_in_the_middle_changes_nothing(preset, evaluation, error):
    """Wherever it strikes: in the free phase, while settling, in the user's own layer or cost."""

    class Count:
        __slots__ = ("left",)  # no attribute that could be seen to change

    class Fuse(nn.Module):
        def __init__(self):
            super().__init__()
            self.count = Count()
            self.count.left = math.inf

        def forward(self, x):
            self.count.left -= 1
            if self.count.left == 0:
                raise error("interrupted")
            return x.tanh()

    torch.manual_seed(0)
    fuse = Fuse()
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 8), nn.Dropout(0.5), fuse, nn.Linear(8, 3))
    fixed = {name: value for name, value in {"leaves": (Fuse,), "adaptive": False}.items() if preset in takes(name)}
    opt = trained(preset, model, **fixed)
    if preset not in takes("leaves") and evaluation > 1:
        return  # it evaluates but once
    before = snapshot(opt)
    fuse.count.left = evaluation
    with pytest.raises((error, mep.TraceError), match="interrupted"):  # the latter while the graph is checked
        opt.step(x=X, target=Y)
    assert_same(snapshot(opt), before)


# Settings: refused by the constructor, naming keyword and value.

BAD_SETTINGS = {
    "lr": (-1, math.nan),
    "momentum": (-0.1, math.nan),
    "weight_decay": (-1, math.nan),
    "gamma": (0, -1.0, math.nan, math.inf),
    "cost": ("crossentropy", 3, None),
    "beta": (0, -0.1, math.nan, math.inf, "0.1"),
    "energy": ("predictive", None),
    "phases": ("both", "centred", None),
    "branches": ("loose", None),
    "settle_steps": (0, -3, 2.5, "10"),
    "settle_lr": (0, -0.1, math.nan, math.inf, "0.2"),
    "tol": (0, -1e-2, math.nan, math.inf, "0.01"),
    "patience": (0, -1, 1.5),
}


@pytest.mark.parametrize("value", [pytest.param((k, v), id=f"{k}={v}") for k in BAD_SETTINGS for v in BAD_SETTINGS[k]])
def test_setting_out_of_range_is_refused_by_name_and_value(preset, value):
    keyword, value = value
    if preset not in takes(keyword):
        return
    model = net()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(mep.ArgumentError) as raised:
        preset(model.parameters(), model=model, **{keyword: value})
    assert keyword in str(raised.value) and repr(value) in str(raised.value)
    assert_same(copied(model.state_dict()), before)


@pytest.mark.parametrize(
    "make",
    [
        lambda: mep.Sweep(settle_steps=0),
        lambda: mep.Sweep(patience=1.5),
        lambda: mep.Sweep(tol=-1),
        lambda: mep.Descent(momentum=1.0),
        lambda: mep.Descent(momentum=-0.1),
        lambda: mep.Descent(momentum=math.nan),
        lambda: mep.Descent(settle_lr=math.inf),
        lambda: mep.Descent(settle_steps=0),
        lambda: mep.EquilibriumPropagation(net(), solver="sweep"),
        lambda: mep.EquilibriumPropagation(net(), solver=mep.Sweep),
        lambda: mep.EquilibriumPropagation(net(), energy="hopfield", solver=mep.Sweep()),
        lambda: mep.EquilibriumPropagation(net(), leaves=(nn.LSTM,)),
        lambda: mep.EquilibriumPropagation(net(), leaves=("7",)),
    ],
)
def test_part_that_cannot_be_is_refused(make):
    with pytest.raises(mep.MepError):
        make()


# Models and their parameters

BAD_MODELS = {
    "no module": (lambda: ([nn.Parameter(torch.ones(2))], "model"), mep.ArgumentError, "'model'", "torch.nn.Module"),
    "a class": (lambda: (net().parameters(), nn.Sequential), mep.ArgumentError, "Sequential", "torch.nn.Module"),
    "no parameters": (lambda: ([], nn.ReLU()), mep.ParameterError, "ReLU", "no parameter"),
    "a used-up generator": (lambda: (iter(()), net()), mep.ParameterError, "empty", "model.parameters()"),
    "another model's": (lambda: (net().parameters(), net()), mep.ParameterError, "(8, 4)", "model.parameters()"),
    "some of another model's": (
        lambda: ([{"params": (model := net())[0].parameters()}, {"params": nn.Linear(5, 7).parameters()}], model),
        mep.ParameterError,
        "(7, 5)",
        "model.parameters()",
    ),
    "a tensor": (lambda: ([torch.ones(2, 2, requires_grad=True)], net()), mep.ParameterError, "(2, 2)"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_model_and_parameters_must_fit(preset, name):
    make, error, *words = BAD_MODELS[name]
    params, model = make()
    with pytest.raises(error) as raised:
        preset(params, model=model)
    for word in words:
        assert word in str(raised.value)


def test_frozen_model_is_refused(preset):
    model = net().requires_grad_(False)
    with pytest.raises(mep.ParameterError, match="requires a gradient"):
        preset(model.parameters(), model=model)


def test_model_that_is_frozen_later_is_refused(preset):
    opt = trained(preset)
    opt.model.requires_grad_(False)
    assert_refused(opt, X, Y, mep.ParameterError, "requires a gradient")


def test_every_error_is_a_mep_error():
    public = (getattr(mep, name) for name in mep.__all__)
    errors = [e for e in public if isinstance(e, type) and issubclass(e, Exception) and not issubclass(e, Warning)]
    assert len(errors) > 5 and all(issubclass(e, mep.MepError) for e in errors)


def test_inference_mode_is_refused(preset):
    """Nodes that torch differentiates would tell nothing there."""
    opt = trained(preset)
    x, y = batch()
    with torch.inference_mode():
        assert_refused(opt, x, y, mep.ArgumentError, "inference_mode")
        assert opt.predict(x).shape == (6, 3)


SETTLED = {
    "model": nn.Linear(4, 3), "cost": "mse", "readout": nn.Linear(3, 3), "branches": "exact", "leaves": ("4",),
    "compile": True, "proof": "never",
}  # fmt: skip


@pytest.mark.parametrize("name", SETTLED)
def test_what_a_graph_was_captured_for_cannot_be_changed(name):
    """It would be ignored."""
    ep = mep.EquilibriumPropagation(net())
    before = getattr(ep, name)
    with pytest.raises(mep.ArgumentError, match=f"(?s){name}.*another estimator"):
        setattr(ep, name, SETTLED[name])
    assert getattr(ep, name) is before


def test_other_settings_may_be_changed_and_are_checked_before_the_next_step():
    ep = mep.EquilibriumPropagation(net().eval())
    ep.beta, ep.phases, ep.solver = 0.02, "centered", mep.Sweep(tol=1e-3)
    wanted = mep.EquilibriumPropagation(ep.model, beta=0.02, phases="centered", solver=mep.Sweep(tol=1e-3))
    for g, h in zip(ep.gradients(X, Y)[0].values(), wanted.gradients(X, Y)[0].values(), strict=True):
        torch.testing.assert_close(g, h)
    for name, value in {"beta": -1.0, "phases": "both", "solver": None}.items():
        twin = copy.deepcopy(ep)
        setattr(twin, name, value)
        with pytest.raises(mep.ArgumentError, match=name):
            twin(X, Y)
    with pytest.raises(mep.ArgumentError, match=r"betta.*no such setting. Did you mean beta"):
        ep.betta = 0.1
    with pytest.raises(mep.ArgumentError, match=r"setting of the solver. Way out: ep.solver = Sweep\("):
        ep.tol = 0.1
    ep.note = "mine"
