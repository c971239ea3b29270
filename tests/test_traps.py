"""The traps that others fell into (design, section 7), each with its name.

| trap                                                 | test                                                        |
|------------------------------------------------------|-------------------------------------------------------------|
| residual adds ... `TransformerEncoderLayer`, shared  | `test_gradient_is_that_of_the_model_as_written`             |
| something silently dropped                           | `test_model_changed_later_is_seen`                          |
| an energy that changes while it is settled           | `test_every_evaluation_of_a_step_sees_the_same_weights`     |
| BatchNorm statistics once per sweep                  | test_optimizer: `running_statistics_*`                      |
| Dropout off                                          | test_optimizer: `mode_decides_*`, `one_dropout_mask_*`      |
| frozen weights raise                                 | test_optimizer: `frozen_parameters_stay`                    |
| `lr=0` moved by the spectral projection              | test_optimizer: `group_with_lr_zero_*`                      |
| `deepcopy(optimizer)` bound to the old model         | test_optimizer: `copy_is_bound_to_its_own_model_*`          |
| `step` in the wrong mode does nothing                | test_optimizer: `training_goes_on_*`, `step_with_nothing_*` |
| typos accepted; step counts not honoured             | test_presets: `every_keyword_is_explicit`, `exactly_*`      |
| squared error with `[batch, 1]`; NaN becomes weights | test_bad_input: `bad_batch_*`, `training_continues_*`       |
| cross-entropy with a batch of one                    | `test_batch_of_one`                                         |
| label smoothing hard-coded                           | `test_labels_are_smoothed_only_on_request`                  |
| float32 energy under a float64 model                 | `test_float64_model_stays_float64`                          |
| output error left free: gradient vanishes            | `test_gradient_does_not_vanish_with_settling`               |
| a stopping test that looks at the state              | `test_zero_state_is_not_an_equilibrium`                     |
| energy not decreasing taken for convergence          | `test_climbing_is_not_convergence`                          |
| tests that compare `None` gradients                  | `gradients` and `assert_close` refuse to                    |
| small residual, zero first-layer gradient            | `test_residual_waits_for_the_signal`                        |
"""

import copy
import inspect
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mep
from mep import presets

PRESETS = [f for f in vars(presets).values() if inspect.isfunction(f) and f.__module__ == presets.__name__]
PRESETS = [f for f in PRESETS if not f.__name__.startswith("_")]
SOLVERS = {
    "sweep": mep.Sweep(100, tol=1e-9),
    "descent": mep.Descent(5000, tol=1e-7, adaptive=True, settle_lr=0.1, momentum=0.8),
}
BATCH = 5


@pytest.fixture(autouse=True)
def _same_noise():
    torch.manual_seed(0)


def gradients(model, x, y, cost=F.cross_entropy):
    """Backprop's gradients by name; all of them, so that nothing is compared with None."""
    output = model(*x) if isinstance(x, tuple) else model(x)
    found = torch.autograd.grad(cost(output, y), list(model.parameters()))
    return {name: g for (name, _), g in zip(model.named_parameters(), found, strict=True)}


def assert_close(model, expected, tolerance):
    """Every p.grad is there and has the direction and the size of the expected one."""
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        if expected[name].norm() > 1e-12:  # a bias before a normalisation has none
            assert (p.grad - expected[name]).norm() <= tolerance * expected[name].norm(), name


def labels(count=BATCH, classes=3):
    return torch.arange(count) % classes


class Net(nn.Module):
    """Layers `a`, `b`, `c` around a `forward` given as a function of (self, x)."""

    def __init__(self, forward, **modules):
        super().__init__()
        layers = {"a": nn.Linear(8, 6), "b": nn.Linear(6, 6), "c": nn.Linear(6, 3)}
        for name, module in (layers | modules).items():
            self.add_module(name, module)
        self.written = forward

    def forward(self, x):
        return self.written(self, x)


def tied(net, x):
    return net.c(net.b(torch.tanh(net.b(torch.tanh(net.a(x))))))


def transposed(net, x):
    h = torch.tanh(net.a(x))
    return F.linear(torch.tanh(h @ net.b.weight.t() + net.b.bias), net.c.weight, net.c.bias)


def in_place(net, x):
    h = net.a(x)
    F.relu(h, inplace=True)
    return net.c(net.b(h).relu_() + h)


MODELS = {
    "residual add": Net(lambda net, x: net.c((h := torch.tanh(net.a(x))) + torch.tanh(net.b(h)))),
    "two residual adds": Net(lambda net, x: net.c((h := net.a(x) + net.a(2 * x).tanh()) + net.b(h.tanh()) + 0.5 * h)),
    "torch.relu in forward": Net(lambda net, x: net.c(torch.relu(net.b(torch.relu(net.a(x)))))),
    "F.gelu in forward": Net(lambda net, x: net.c(F.gelu(net.b(F.gelu(net.a(x), approximate="tanh"))))),
    "one activation used twice": Net(lambda net, x: net.c(net.act(net.b(net.act(net.a(x))))), act=nn.ReLU()),
    "PReLU": Net(lambda net, x: net.c(net.act(net.b(net.act(net.a(x))))), act=nn.PReLU(6)),
    "Softplus": Net(lambda net, x: net.c(net.act(net.b(net.act(net.a(x))))), act=nn.Softplus(beta=2)),
    "Hardtanh": Net(lambda net, x: net.c(net.act(net.b(net.act(net.a(x))))), act=nn.Hardtanh(-0.4, 0.6)),
    "an activation of one's own": Net(lambda net, x: net.c(net.b(net.a(x)).sin() * torch.sigmoid(net.b(net.a(x))))),
    "shared module": Net(tied),
    "weights in functions": Net(transposed),
    "in-place activations": Net(in_place),
    "concatenation": Net(
        lambda net, x: net.d(torch.cat([net.a(x).tanh(), net.b(net.a(x)).tanh()], 1)), c=None, d=nn.Linear(12, 3)
    ),
    "attention by hand": Net(
        lambda net, x: net.c(
            F.scaled_dot_product_attention(h := net.a(x.view(-1, 2, 4)), net.b(h), torch.tanh(h)).mean(1)
        ),
        a=nn.Linear(4, 6),
    ),
    "TransformerEncoderLayer": Net(
        lambda net, x: net.c(net.layer(net.b(net.a(x.view(-1, 2, 4)))).mean(1)),
        a=nn.Linear(4, 6),
        layer=nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True),
    ),
    "TransformerEncoderLayer, norm first": Net(
        lambda net, x: net.c(net.layer(net.b(net.a(x.view(-1, 2, 4)))).mean(1)),
        a=nn.Linear(4, 6),
        layer=nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True, norm_first=True, activation=F.gelu),
    ),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", MODELS)
def test_gradient_is_that_of_the_model_as_written(name, solver, training):
    model = copy.deepcopy(MODELS[name]).double().train(training)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    x, y = torch.randn(BATCH, 8).double(), labels()
    ep = mep.EquilibriumPropagation(model, beta=1e-2, phases="centered", solver=SOLVERS[solver])
    estimate = ep(x, y)
    assert estimate.converged and estimate.beta == 1e-2
    assert_close(model, gradients(model, x, y), 1e-3)


def hooked(model):
    model[2].register_forward_hook(lambda module, args, output: 3 * output)


def replaced(model):
    model[2] = nn.Linear(6, 6).double()


def reparametrised(model):
    nn.utils.parametrizations.weight_norm(model[2])


def given_new_weights(model):
    model[2].weight = nn.Parameter(torch.randn(6, 6).double())


CHANGES = {
    "a hook": hooked,
    "another module": replaced,
    "a parametrisation": reparametrised,
    "another parameter": given_new_weights,
    "another slope": lambda model: setattr(model[1], "negative_slope", 0.9),
    "another number in forward": lambda model: setattr(model[4], "scale", 5.0),
    "another branch in forward": lambda model: setattr(model[4], "squash", False),
}


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.squash = 1.0, True

    def forward(self, x):
        return self.scale * (torch.tanh(x) if self.squash else x)


@pytest.mark.parametrize("change", CHANGES)
def test_model_changed_later_is_seen(change):
    """Or refused: a graph of what the model was must not train it in silence."""
    model = nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(0.1), nn.Linear(6, 6), nn.Linear(6, 6), Scaled()).double()
    model.append(nn.Linear(6, 3).double())
    x, y = torch.randn(BATCH, 4).double(), labels()
    ep = mep.EquilibriumPropagation(model, beta=1e-3, phases="centered", solver=SOLVERS["sweep"])
    ep(x, y)
    CHANGES[change](model)
    model.zero_grad()
    try:
        loss = ep(x, y).loss
    except mep.MepError:
        return
    torch.testing.assert_close(loss, F.cross_entropy(model(x), y).detach())
    assert_close(model, gradients(model, x, y), 1e-4)


def test_every_evaluation_of_a_step_sees_the_same_weights():
    """A spectral norm in training refines its weight at every call: a step must see one weight, as backprop does."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    nn.utils.parametrizations.spectral_norm(model[2])
    nn.init.normal_(model[2].parametrizations.weight.original)  # for which the kept vectors are no longer right
    twin, x, y = copy.deepcopy(model), torch.randn(BATCH, 4).double(), labels()
    ep = mep.EquilibriumPropagation(model, beta=1e-2, phases="centered", solver=SOLVERS["sweep"])
    assert ep(x, y).converged
    assert_close(model, gradients(twin, x, y), 1e-3)
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))


def small(activation=nn.Tanh, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 6), activation(), nn.Linear(6, 3)).to(dtype)


def weak_nudge(preset):
    wanted = {"beta": 1e-3, "tol": 1e-4, "settle_steps": 500, "adaptive": True}
    return {name: value for name, value in wanted.items() if name in inspect.signature(preset).parameters}


@pytest.mark.parametrize("cost", ["cross_entropy", "mse"])
@pytest.mark.parametrize("preset", PRESETS)
def test_batch_of_one(preset, cost):
    model = small()
    x, y = torch.randn(1, 4).double(), labels(1) if cost == "cross_entropy" else torch.randn(1, 3).double()
    opt = preset(model.parameters(), model=model, cost=cost, **weak_nudge(preset))
    loss = opt.step(x=x, target=y)
    reference = small()
    criterion = F.cross_entropy if cost == "cross_entropy" else F.mse_loss
    torch.testing.assert_close(loss, criterion(reference(x), y).detach())
    assert_close(model, gradients(reference, x, y, criterion), 1e-2)


@pytest.mark.parametrize("preset", PRESETS)
def test_labels_are_smoothed_only_on_request(preset):
    x, y = torch.randn(BATCH, 4).double(), labels()
    for smoothing in (0.0, 0.3):
        cost = nn.CrossEntropyLoss(label_smoothing=smoothing, reduction="none") if smoothing else "cross_entropy"
        model = small()
        opt = preset(model.parameters(), model=model, cost=cost, lr=0.0, **weak_nudge(preset))
        loss = opt.step(x=x, target=y)
        torch.testing.assert_close(loss, F.cross_entropy(model(x), y, label_smoothing=smoothing).detach())
        smooth = lambda s, t, smoothing=smoothing: F.cross_entropy(s, t, label_smoothing=smoothing)  # noqa: E731
        assert_close(model, gradients(model, x, y, smooth), 1e-2)


@pytest.mark.parametrize("energy", ["prediction", "hopfield"])
@pytest.mark.parametrize("cost", ["cross_entropy", "mse"])
def test_float64_model_stays_float64(energy, cost):
    """A residual of 1e-8 cannot be reached through an energy in float32."""
    model = small(nn.ReLU)
    x, y = torch.randn(BATCH, 4).double(), labels() if cost == "cross_entropy" else torch.randn(BATCH, 3).double()
    solver = mep.Descent(5000, tol=1e-8, adaptive=True, settle_lr=0.3)
    estimate = mep.EquilibriumPropagation(model, cost, beta=0.1, energy=energy, solver=solver)(x, y)
    assert estimate.converged and estimate.residual.max() <= 1e-8
    found = [estimate.loss, estimate.residual, *(p.grad for p in model.parameters())]
    assert {t.dtype for t in found} == {torch.float64}


@pytest.mark.parametrize("cost", ["cross_entropy", "mse"])
def test_gradient_does_not_vanish_with_settling(cost):
    """An output error without a price swallows the whole nudge in the end."""
    x, y = torch.randn(BATCH, 4).double(), labels() if cost == "cross_entropy" else torch.randn(BATCH, 3).double()
    criterion = F.cross_entropy if cost == "cross_entropy" else F.mse_loss
    errors = []
    for steps in (10, 1000):
        model = small()
        mep.EquilibriumPropagation(model, cost, beta=1e-3, solver=mep.Descent(steps, settle_lr=0.2))(x, y)
        exact = gradients(model, x, y, criterion)
        errors.append(max((p.grad - exact[n]).norm() / exact[n].norm() for n, p in model.named_parameters()))
    assert errors[1] < min(errors[0], 0.01)


@pytest.mark.parametrize("solver", SOLVERS)
def test_zero_state_is_not_an_equilibrium(solver):
    """All states are zero at first, and so is every hidden error; the nudge is not."""
    model = small()
    for p in model.parameters():
        nn.init.zeros_(p)
    estimate = mep.EquilibriumPropagation(model, beta=1e-3, solver=SOLVERS[solver])(
        torch.zeros(1, 4).double(), labels(1)
    )
    assert estimate.converged and estimate.iterations > 0
    torch.testing.assert_close(model[4].bias.grad, torch.tensor([-2, 1, 1]).double() / 3, rtol=1e-2, atol=0)


@pytest.mark.parametrize("settle_lr", [2.5, 5.0, 1e3])
@pytest.mark.parametrize("patience", [1, 5])
def test_climbing_is_not_convergence(settle_lr, patience):
    model = small()
    solver = mep.Descent(30, adaptive=True, settle_lr=settle_lr, patience=patience)
    try:
        estimate = mep.EquilibriumPropagation(model, solver=solver)(torch.randn(BATCH, 4).double(), labels())
    except mep.DivergedError:
        return
    assert not estimate.converged
    assert estimate.residual.max() > 0.1


@pytest.mark.parametrize("steps", [1, 3, 6, 60])
def test_residual_waits_for_the_signal(steps):
    """In descent the nudge travels one node a step; until it arrives the first layer's gradient is zero."""
    layers = [nn.Linear(4, 4), *(nn.Sequential(nn.Tanh(), nn.Linear(4, 4)) for _ in range(6)), nn.Linear(4, 3)]
    model = nn.Sequential(*layers).double()
    ep = mep.EquilibriumPropagation(model, solver=mep.Descent(steps, settle_lr=0.5))
    estimate = ep(torch.randn(BATCH, 4).double(), labels())
    arrived = steps >= len(layers)
    assert bool(model[0].weight.grad.any()) == arrived
    assert arrived or estimate.residual.min() > 0.999
    assert arrived == estimate.converged


def test_residual_is_small_at_an_equilibrium_where_nothing_pulls():
    """Nothing pulls on the output of a free Hopfield network: its error must not be measured against itself."""
    estimates = []
    for dtype in (torch.float32, torch.float64):
        model = small(nn.ReLU, dtype)
        x = torch.linspace(-1, 1, BATCH * 4).view(BATCH, 4).to(dtype)
        estimates.append(mep.EquilibriumPropagation(model, energy="hopfield")(x, labels()))
    assert all(e.converged for e in estimates)
    assert abs(estimates[0].iterations - estimates[1].iterations) < 10


class Jittered(nn.Module):
    """Draws from Python's and from NumPy's generator."""

    def forward(self, x):
        return x * random.uniform(0.5, 1.5) + torch.from_numpy(np.random.standard_normal(x.shape))


def test_noise_of_python_and_numpy_is_drawn_once_a_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), Jittered(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))
    ep = mep.EquilibriumPropagation(model, beta=1e-5, solver=mep.Sweep(tol=1e-9), leaves=(Jittered,))
    ep.gradients(x, y)
    random.seed(3)
    np.random.seed(3)
    gradients, estimate = ep.gradients(x, y)
    drawn = random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2:]
    random.seed(3)
    np.random.seed(3)
    F.cross_entropy(model(x), y).backward()
    assert drawn == (random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2:])
    assert estimate.converged and estimate.iterations > 1
    for p, g in gradients.items():
        torch.testing.assert_close(g, p.grad, rtol=1e-3, atol=1e-6)
