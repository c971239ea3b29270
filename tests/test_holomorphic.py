"""`phases="holomorphic"`: equilibria at complex betas, whose contrast has the order of the number of points."""

import copy
import math
import pickle
from functools import partial

import cases
import mpmath
import pytest
import torch
import torch.nn.functional as F
from cases import COSTS, MODELS, call, mlp
from equilibria import distance
from reference import backprop, energy, implicit_gradient, predictions_of_modules
from torch import nn

import mep
from mep.estimators.contrast import make_contrast
from mep.graph.closed_forms.complex import FARTHEST, TABLE, ComplexOp, erf

EXACT = mep.Sweep(tol=1e-13, settle_steps=400)
BETAS = {1: 0.01, 2: 0.05, 3: 0.1, 4: 0.2, 6: 0.4, 8: 0.5}


class Net(nn.Module):
    """Layers, and a `forward` in one line."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *x):
        return self.function(self, *x)


def example(activation=nn.Tanh, dtype=torch.float64, batch=8, cost="cross_entropy"):
    torch.manual_seed(0)
    model = mlp(activation, 6, 12, 12, 4).to(dtype)
    x = torch.randn(batch, 6, dtype=dtype)
    return model, x, torch.arange(batch) % 4 if cost == "cross_entropy" else torch.randn(batch, 4, dtype=dtype)


def estimator(model, points, cost="cross_entropy", beta=0.1, **more):
    given = {"solver": EXACT, "phases": "holomorphic", "points": points, **more}
    return mep.EquilibriumPropagation(model, cost, beta, **given)


def exact_gradient(model, x, y, cost="cross_entropy"):
    return backprop(model, COSTS[cost].value(call(model, x), y).mean())


# The contrast.


@pytest.mark.parametrize("points", [1, 2, 3, 4, 5, 6, 7, 8, 13])
def test_the_phases_and_their_conjugates_are_evenly_on_a_circle(points):
    table = [(m, w) for m, w in make_contrast("holomorphic", points) if m]
    assert len(table) == (points + 1) // 2
    circle = [m for m, _ in table] + [m.conjugate() for m, _ in table if m.imag]
    assert len(circle) == points
    assert all(w == pytest.approx((2 if m.imag else 1) / points) for m, w in table)
    assert all(m.imag >= 0 for m, _ in table) and table[-1][0].real == max(m.real for m, _ in table)
    angles = sorted(math.atan2(m.imag, m.real) % (2 * math.pi) for m in circle)
    steps = [b - a for a, b in zip(angles, [*angles[1:], angles[0] + 2 * math.pi], strict=True)]
    assert all(step == pytest.approx(2 * math.pi / points) for step in steps) and all(
        abs(m) == pytest.approx(1) for m in circle
    )


@pytest.mark.parametrize("points", BETAS)
@pytest.mark.parametrize("cost", ["mse", "cross_entropy"])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.ReLU])
def test_the_error_has_the_order_of_the_number_of_points(activation, cost, points):
    model, x, y = example(activation, cost=cost)
    exact, errors = exact_gradient(model, x, y, cost), []
    ep = estimator(model, points, cost)
    for ep.beta in (BETAS[points], BETAS[points] / 2):
        found, estimate = ep.gradients(x, y)
        assert estimate.converged and estimate.betas.tolist() == 8 * [ep.beta]
        errors.append(distance(model, found, exact))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(points, abs=0.15)


MORE_MODELS = {
    "layer norm": lambda: (
        nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4)),
        torch.randn(5, 6),
    ),
    "group norm": lambda: (
        nn.Sequential(nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(16, 4)),
        torch.randn(5, 2, 6),
    ),
    "batch norm in eval": lambda: (
        nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Sigmoid(), nn.Linear(8, 4)).eval(),
        torch.randn(5, 6),
    ),
    "relu, pooling, gelu": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.GELU(), nn.Conv2d(3, 2, 1), nn.Flatten(),
            nn.Tanh(), nn.Linear(18, 4),
        ),
        torch.randn(5, 1, 6, 6),
    ),
    "two inputs": lambda: (
        Net(lambda n, a, b: n.c(n.a(a).tanh() * n.b(b).sigmoid()), a=nn.Linear(3, 8), b=nn.Linear(2, 8),
            c=nn.Linear(8, 4)),
        (torch.randn(5, 3), torch.randn(5, 2)),
    ),
    "a skip": lambda: (
        Net(lambda n, x: n.c((h := n.a(x).tanh()) + F.gelu(n.b(h), approximate="tanh")), a=nn.Linear(6, 8),
            b=nn.Linear(8, 8), c=nn.Linear(8, 4)),
        torch.randn(5, 6),
    ),
    "softmax inside": lambda: (
        Net(lambda n, x: n.c(n.b(n.a(x).softmax(1)).log_softmax(1)), a=nn.Linear(6, 8), b=nn.Linear(8, 8),
            c=nn.Linear(8, 4)),
        torch.randn(5, 6),
    ),
    "a norm": lambda: (
        Net(lambda n, x: n.c(F.normalize(n.a(x), dim=1)), a=nn.Linear(6, 8), c=nn.Linear(8, 4)),
        torch.randn(5, 6),
    ),
    "one example": lambda: (nn.Sequential(nn.Linear(6, 8), nn.Softplus(), nn.Linear(8, 4)), torch.randn(1, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", MORE_MODELS)
def test_the_order_of_other_models(name):
    torch.manual_seed(0)
    model, x = MORE_MODELS[name]()
    model, x = model.double(), tuple(t.double() for t in x) if isinstance(x, tuple) else x.double()
    y = torch.arange(len(x[0]) if isinstance(x, tuple) else len(x)) % 4
    exact, errors = exact_gradient(model, x, y), []
    ep = estimator(model, 4, solver=mep.Sweep(tol=1e-11, settle_steps=400))
    for ep.beta in (0.03, 0.015):
        found, estimate = ep.gradients(x, y)
        assert estimate.converged
        errors.append(distance(model, found, exact))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.2)


@pytest.mark.parametrize("name", ["conv relu maxpool", "attention", "twice", "concatenating", "weight norm"])
def test_the_order_of_the_usual_cases(name):
    case = MODELS[name]
    model, x, y = case.build("cross_entropy")
    exact = {p: g for p, g in exact_gradient(model, x, y).items() if g is not None}
    ep, errors = estimator(model, 2, leaves=case.leaves), []
    for ep.beta in (0.02, 0.01):
        found = ep.gradients(x, y)[0]
        errors.append(sum((found[p] - g).norm() for p, g in exact.items()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.05)


# The equilibria.


def by_hand(model, x, y, beta, cost, sweeps=500):
    """The equations of the equilibrium of two layers with tanh, iterated as they stand: states, errors, gradients."""
    w1, b1, w2, b2 = (p.detach().to(torch.complex128) for p in model.parameters())
    x = x.to(torch.complex128)
    d1, d2 = torch.zeros(len(x), 5, dtype=torch.complex128), torch.zeros(len(x), 3, dtype=torch.complex128)
    for _ in range(sweeps):
        s1 = x @ w1.T + b1 - beta * d1
        s2 = s1.tanh() @ w2.T + b2 - beta * d2
        e = s2.exp()
        d2 = e / e.sum(1, keepdim=True) - F.one_hot(y, 3) if cost == "cross_entropy" else 2 / 3 * (s2 - y)
        d1 = (d2 @ w2) * (1 - s1.tanh() ** 2)
    gradients = [d1.T @ x, d1.sum(0), d2.T @ s1.tanh(), d2.sum(0)]
    return {"0": s1, "2": s2}, {"0": d1, "2": d2}, [g / len(x) for g in gradients]


def small(cost):
    torch.manual_seed(1)
    model = mlp(nn.Tanh, 4, 5, 3).double()
    x = torch.randn(6, 4).double()
    return model, x, torch.arange(6) % 3 if cost == "cross_entropy" else torch.randn(6, 3).double()


@pytest.mark.parametrize("points", [2, 3, 4, 5])
@pytest.mark.parametrize("cost", ["mse", "cross_entropy"])
def test_states_errors_and_gradient_are_those_of_the_whole_circle(cost, points):
    model, x, y = small(cost)
    ep = estimator(model, points, cost, beta=0.3)
    equilibrium = ep.settle(x, y)
    for phase in equilibrium.phases:
        states, errors, _ = by_hand(model, x, y, 0.3 * phase.beta, cost)
        for name, s in states.items():
            torch.testing.assert_close(phase.states[name].to(s.dtype), s, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(phase.errors[name].to(s.dtype), errors[name], rtol=1e-9, atol=1e-10)
    shift = 0.5 if points % 2 == 0 else 0
    circle = [
        0.3 * complex(*(f(2 * math.pi * (k + shift) / points) for f in (math.cos, math.sin))) for k in range(points)
    ]
    terms = [by_hand(model, x, y, beta, cost)[2] for beta in circle]
    found, _ = ep.gradients(x, y)
    for p, *each in zip(model.parameters(), *terms, strict=True):
        mean = sum(each) / points
        assert mean.imag.abs().max() < 1e-12
        torch.testing.assert_close(found[p], mean.real, rtol=1e-9, atol=1e-11)


def test_residuals_are_those_of_the_states_and_a_loose_tolerance_is_kept():
    model, x, y = small("mse")
    ep = estimator(model, 4, "mse", beta=0.8, solver=mep.Sweep(tol=1e-2))
    equilibrium = ep.settle(x, y, record=True)
    assert equilibrium.estimate.converged and len(equilibrium.phases) == 2
    for phase in equilibrium.phases:
        w2, s1 = model[2].weight.detach().to(torch.complex128), phase.states["0"]
        swept = {"2": 2 / 3 * (phase.states["2"] - y)}
        swept["0"] = (swept["2"] @ w2) * (1 - s1.tanh() ** 2)
        beta = 0.8 * phase.beta
        for name, S in swept.items():
            error = (phase.predictions[name] - phase.states[name]) / beta
            residual = (S - error).norm(dim=1) / torch.maximum(S.norm(dim=1), error.norm(dim=1))
            torch.testing.assert_close(phase.residuals[name], residual, rtol=1e-6, atol=1e-8)
            assert residual.max() <= 1e-2
        assert phase.residuals["0"].dtype == torch.float64 and len(phase.course) >= 2
    assert "residual" in str(equilibrium)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.ReLU])
@pytest.mark.parametrize("points", [2, 4, 8])
def test_strong_nudges_settle(activation, points):
    torch.manual_seed(0)
    model = mlp(activation, 20, 40, 40, 40, 5)
    x, y = torch.randn(64, 20), torch.randint(5, (64,))
    ep = estimator(model, points, beta=0.5, solver=mep.Sweep(), on_unsettled="raise")
    _, estimate = ep.gradients(x, y)
    assert estimate.converged and estimate.iterations <= 20


def test_examples_settle_by_themselves():
    model, x, y = example(batch=40)
    x = x * torch.logspace(-1, 0.5, 40).double().unsqueeze(1)
    ep = estimator(model, 4, beta=1.0, solver=mep.Sweep(tol=1e-6))
    found, estimate = ep.gradients(x, y)
    assert estimate.counts.min() < estimate.counts.max() and estimate.converged
    alone = [ep.gradients(x[i : i + 1], y[i : i + 1])[0] for i in range(40)]
    mean = {p: sum(g[p] for g in alone) / 40 for p in found}
    assert distance(model, found, mean) < 1e-5


@pytest.mark.parametrize("points", [2, 3, 4])
def test_every_way_to_make_a_step_is_the_same(points):
    model, x, y = example(nn.GELU)
    ep = estimator(model, points)
    gradients, estimate = ep.gradients(x, y)
    pieces, again = ep.iter_gradients(x, y)
    assert again.beta == estimate.beta == 0.1
    found = {p: g for piece in pieces for p, g in piece.items()}
    assert distance(model, found, gradients) < 1e-12
    for other in (copy.deepcopy(ep), pickle.loads(pickle.dumps(ep))):
        theirs = other.gradients(x, y)[0]
        assert all(torch.equal(a, b) for a, b in zip(theirs.values(), gradients.values(), strict=True))
    torch.testing.assert_close(ep.predict(x), model(x))
    with torch.no_grad():
        ep(x, y)
    assert all(torch.equal(p.grad, g) for p, g in gradients.items())


@pytest.mark.parametrize("name", ["tanh", "relu"])
@pytest.mark.parametrize("beta", [None, 0.1])
def test_float32_parameters_have_complex64_states_and_float32_gradients(name, beta):
    model, x, y = example({"tanh": nn.Tanh, "relu": nn.ReLU}[name], torch.float32)
    ep = estimator(model, None, beta=beta, solver=mep.Sweep(tol=1e-4))
    found, estimate = ep.gradients(x, y)
    assert estimate.converged
    assert all(g.dtype == torch.float32 for g in found.values())
    assert all(t.dtype == torch.complex64 for phase in ep.settle(x, y).phases for t in phase.states.values())
    assert distance(model, found, exact_gradient(model, x, y)) < 1e-3


def test_frozen_parameters_stay_out():
    model, x, y = example()
    whole, _ = estimator(model, 4).gradients(x, y)
    model[0].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    some, _ = estimator(model, 4).gradients(x, y)
    assert set(whole) - set(some) == {model[0].weight, model[4].bias}
    assert all(torch.equal(g, whole[p]) for p, g in some.items())


def test_noise_is_drawn_once_and_statistics_are_those_of_the_free_phase():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 4)).double()
    x, y = torch.randn(12, 6).double(), torch.arange(12) % 4
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    exact = torch.autograd.grad(F.cross_entropy(twin(x), y), list(twin.parameters()))
    torch.manual_seed(3)
    found, _ = estimator(model, 4, beta=1e-3, solver=mep.Sweep(tol=1e-9)).gradients(x, y)
    assert distance(model, found, dict(zip(model.parameters(), exact, strict=True))) < 1e-6
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)
        assert not a.is_complex()


@pytest.mark.parametrize("preset", [mep.eqprop, mep.smep, mep.sdmep, mep.natural_ep])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_presets_train_with_it(preset, activation):
    model, x, y = example(activation, torch.float32, batch=32)
    opt = preset(model.parameters(), model=model, lr=0.1, phases="holomorphic", points=2, beta=0.1)
    losses = [float(opt.step(x=x, target=y)) for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0] and opt.last.converged
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_memory_is_saved_by_parts_of_the_gradient():
    models = [example(nn.Tanh)[0] for _ in range(2)]
    _, x, y = example()
    for model, low_memory in zip(models, (False, True), strict=True):
        opt = mep.eqprop(model.parameters(), model=model, phases="holomorphic", beta=0.1, low_memory=low_memory)
        for _ in range(3):
            opt.step(x=x, target=y)
    assert all(torch.allclose(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


# Hopfield networks.


def hopfield(dtype=torch.float64, batch=8, activation=lambda: nn.Hardtanh(0, 1)):
    torch.manual_seed(0)
    model = mlp(activation, 6, 12, 10, 4).to(dtype)
    return model, torch.rand(batch, 6, dtype=dtype), torch.arange(batch) % 4


def relaxed(model, points, cost, beta=0.1, **more):
    solver = mep.Relaxation(tol=1e-12, settle_steps=400)
    return estimator(model, points, cost, beta, **{"energy": "hopfield", "solver": solver, **more})


def hopfield_energy(model, x):
    """E as a function of the states, which stand behind the activations."""
    predict = predictions_of_modules(model, x, behind=True)
    return lambda states: energy(predict, states, "hopfield")


@pytest.mark.parametrize("points", BETAS)
@pytest.mark.parametrize("cost", ["one_hot_mse", "cross_entropy"])
def test_hopfield_networks_have_the_order_of_the_number_of_points(cost, points):
    model, x, y = hopfield()
    free = {n: s.detach() for n, s in relaxed(model, 2, cost).settle(x, y).free.states.items()}
    costs = {
        "one_hot_mse": lambda s: (s[OUT] - F.one_hot(y, 4)).square().mean(1),
        "cross_entropy": lambda s: F.cross_entropy(s[OUT], y, reduction="none"),
    }
    boxes = {n: (0.0, 1.0) for n in free} | {OUT: (-math.inf, math.inf)}
    exact = implicit_gradient(hopfield_energy(model, x), costs[cost], free, list(model.parameters()), boxes)
    exact, errors = dict(zip(model.parameters(), exact, strict=True)), []
    ep = relaxed(model, points, cost)
    for ep.beta in (BETAS[points], BETAS[points] / 2):
        found, estimate = ep.gradients(x, y)
        assert estimate.converged and estimate.beta == ep.beta
        errors.append(distance(model, found, exact))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(points, abs=0.35)


ENTROPIES = {
    nn.Sigmoid: lambda s: s * s.log() + (1 - s) * (1 - s).log(),
    nn.Tanh: lambda s: ((1 + s) * (1 + s).log() + (1 - s) * (1 - s).log()) / 2,
}


@pytest.mark.parametrize("points", BETAS)
@pytest.mark.parametrize("activation", ENTROPIES)
def test_smooth_hopfield_networks_have_the_order_too(activation, points):
    model, x, y = hopfield(activation=activation)
    free = {n: s.detach() for n, s in relaxed(model, 2, "one_hot_mse").settle(x, y).free.states.items()}
    predict = predictions_of_modules(model, x, behind=True)

    def total(states):
        own = {n: ENTROPIES[activation](s) if n != OUT else s.square() / 2 for n, s in states.items()}
        return sum((own[n] - states[n] * mu).sum(1) for n, mu in predict(states).items())

    cost = lambda s: (s[OUT] - F.one_hot(y, 4)).square().mean(1)  # noqa: E731
    boxes = {n: (-math.inf, math.inf) for n in free}
    exact = implicit_gradient(total, cost, free, list(model.parameters()), boxes)
    exact, errors = dict(zip(model.parameters(), exact, strict=True)), []
    ep = relaxed(model, points, "one_hot_mse")
    for ep.beta in (BETAS[points], BETAS[points] / 2):
        found, estimate = ep.gradients(x, y)
        assert estimate.converged
        errors.append(distance(model, found, exact))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(points, abs=0.35), errors


OUT = "4"


def test_hopfield_displacements_solve_the_linear_equations_of_the_inside_units():
    model, x, y = hopfield(batch=1)
    equilibrium = relaxed(model, 6, "one_hot_mse", beta=0.4).settle(x, y)
    free, total = equilibrium.free.states, hopfield_energy(model, x)
    names, sizes = list(free), [s.numel() for s in free.values()]

    def flat_energy(flat):
        return total({n: v.view_as(free[n]) for n, v in zip(names, flat.split(sizes), strict=True)}).sum()

    flat = torch.cat([s.flatten() for s in free.values()])
    hessian = torch.autograd.functional.hessian(flat_energy, flat, vectorize=True).to(torch.complex128)
    pull, curvature = torch.zeros_like(flat), torch.zeros_like(flat)
    pull[-4:], curvature[-4:] = 0.5 * (free[OUT] - F.one_hot(y, 4)).flatten(), 0.5
    inside = (flat > 0) & (flat < 1)
    inside[-4:] = True
    assert 0 < inside.sum() < len(inside)
    for phase in equilibrium.phases:
        matrix = (hessian + 0.4 * phase.beta * torch.diag(curvature))[inside][:, inside]
        delta = torch.zeros_like(hessian[0])
        delta[inside] = torch.linalg.solve(matrix, -pull[inside].to(matrix.dtype))
        for n, part in zip(names, delta.split(sizes), strict=True):
            torch.testing.assert_close(phase.errors[n].flatten(), part, rtol=1e-9, atol=1e-10)
            moved = phase.states[n] - free[n]
            torch.testing.assert_close(moved.flatten(), 0.4 * phase.beta * part, rtol=1e-9, atol=1e-10)


HOPFIELD_MODELS = {
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2), nn.Hardtanh(0, 1), nn.MaxPool2d((1, 2)), nn.Flatten(),
        nn.Linear(4, 4),
    ),
    "a skip": lambda: Net(
        lambda n, x: n.c((h := F.hardtanh(n.a(x), 0, 1)) + 0.2 * F.hardtanh(n.b(h), 0, 1)),
        a=nn.Linear(6, 5), b=nn.Linear(5, 5), c=nn.Linear(5, 4),
    ),
    "relu": lambda: mlp(nn.ReLU, 6, 5, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", HOPFIELD_MODELS)
def test_other_hopfield_networks(name):
    torch.manual_seed(0)
    model = HOPFIELD_MODELS[name]().double()
    for p in model.parameters():
        p.data.mul_(0.8)
    x, y = torch.rand(8, 6).double(), torch.arange(8) % 4
    best, _ = relaxed(model, 8, "one_hot_mse", beta=0.02).gradients(x, y)
    ep, errors = relaxed(model, 2, "one_hot_mse"), []
    for ep.beta in (0.1, 0.05):
        pieces, estimate = ep.iter_gradients(x, y)
        assert estimate.converged
        errors.append(distance(model, {p: g for piece in pieces for p, g in piece.items()}, best))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("beta", [None, 0.3])
def test_hopfield_networks_train_with_it(beta):
    model, x, y = hopfield(torch.float32, batch=32)
    opt = mep.eqprop(model.parameters(), model=model, energy="hopfield", phases="holomorphic", points=2, beta=beta)
    losses = [float(opt.step(x=x, target=y)) for _ in range(40)]
    assert losses[-1] < losses[0] and opt.last.settled.float().mean() > 0.9 and opt.last.coupling > 0
    assert all(t.dtype == torch.complex64 for t in opt.estimator.settle(x, y).nudged.states.values())


def test_hopfield_networks_whose_jacobians_change_are_refused():
    torch.manual_seed(0)
    gate = Net(
        lambda n, x: n.c(F.hardtanh(n.a(x), 0, 1) * F.hardtanh(n.b(x), 0, 1)),
        a=nn.Linear(6, 5), b=nn.Linear(6, 5), c=nn.Linear(5, 4),
    ).double()  # fmt: skip
    _, x, y = hopfield()
    said = refused(gate, x, y, energy="hopfield", cost="one_hot_mse")
    assert "change with the states" in said and "centered" in said
    with pytest.raises(mep.ArgumentError, match=r"Descent settles no complex states. Use mep\.Relaxation"):
        mep.EquilibriumPropagation(gate, energy="hopfield", phases="holomorphic", solver=mep.Descent())


# Energies and costs of one's own.


class Quartic(cases.Quartic):
    is_holomorphic = True


def smooth_cost(output, target):
    return (output - target).square().sum(1) + torch.log(torch.exp(output).sum(1))


def penalised(model):
    def cost(output, target):
        return (output - target).square().sum(1) + (output * model[0].weight.sum()).sin().sum(1)

    return cost


@pytest.mark.parametrize("points", [2, 4])
@pytest.mark.parametrize("what", ["energy", "cost", "cost with parameters"])
def test_energies_and_costs_of_ones_own_have_the_order_too(what, points):
    model, x, y = example(cost="mse")
    cost = {"energy": "mse", "cost": smooth_cost, "cost with parameters": penalised(model)}[what]
    value = (lambda out, y: (out - y).square().mean(1)) if cost == "mse" else cost
    exact, errors = backprop(model, value(model(x), y).mean()), []
    ep = estimator(model, points, cost, energy=Quartic() if what == "energy" else "prediction")
    for ep.beta in (0.04, 0.02):
        found, estimate = ep.gradients(x, y)
        assert estimate.converged
        errors.append(distance(model, found, exact))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(points, abs=0.25)


# What is refused.


class Real(Quartic):
    is_holomorphic = False

    def __repr__(self):
        return "Real()"


class Huber(mep.BatchCost):
    def __init__(self, output, target):
        self.target = target.to(output.dtype)

    def value(self, output):
        return F.huber_loss(output, self.target, reduction="none").sum(1)

    def gradient(self, output):
        return (output - self.target).clamp(-1, 1)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"phases": "centered", "points": 2}, r"points=2\): points are those of phases='holomorphic'"),
        ({"points": 0}, "points=0"),
        ({"points": 2.0}, "points=2.0"),
        ({"points": True}, "points=True"),
        ({"solver": mep.Descent()}, "Descent settles no complex states. Use mep.Sweep"),
        ({"solver": mep.Local()}, "Local settles no complex states"),
        ({"energy": Real()}, "energy='real'.*is_holomorphic"),
        ({"branches": "exact"}, "branches='held'"),
        ({"compile": True}, "compile=True"),
        ({"checkpoint": True}, "checkpoint=True"),
        ({"diagnostics": True}, "diagnostics=True"),
    ],
    ids=str,
)
def test_what_does_not_go_with_it_is_refused_at_once(given, says):
    model, _, _ = example()
    with pytest.raises(mep.ArgumentError, match=says):
        mep.EquilibriumPropagation(model, **{"phases": "holomorphic", **given})


def refused(model, x, y, **given):
    before = torch.get_rng_state()
    with pytest.raises(mep.ArgumentError) as error:
        mep.EquilibriumPropagation(model, phases="holomorphic", **given)(x, y)
    assert torch.equal(torch.get_rng_state(), before) and all(p.grad is None for p in model.parameters())
    return str(error.value)


@pytest.mark.parametrize(
    ("layer", "name"), [(nn.ELU(), "elu"), (nn.SELU(), "elu"), (nn.CELU(), "elu"), (nn.Hardswish(), "hardswish")]
)
def test_operations_without_a_complex_form_are_refused_by_name(layer, name):
    model, x, y = example(lambda: layer)
    said = refused(model, x, y)
    assert name in said and "node `2`" in said and "centered" in said


def test_comparisons_and_moduli_inside_a_model_are_refused_with_their_line():
    _, x, y = example()
    for forward in (lambda n, x: n.c(n.a(x) * (n.a(x) > 0)), lambda n, x: n.c(torch.atan2(n.a(x), n.a(x) + 3))):
        said = refused(Net(forward, a=nn.Linear(6, 8), c=nn.Linear(8, 4)).double(), x, y)
        assert "no complex form" in said and "test_holomorphic.py" in said


@pytest.mark.parametrize(
    "cost",
    [
        lambda out, y: F.cross_entropy(out, y, reduction="none"),
        lambda out, y: out.abs().square().sum(1),
        lambda out, y: (out * out.conj()).sum(1),
        lambda out, y: torch.relu(out).sum(1),
        Huber,
    ],
)
def test_costs_that_are_not_holomorphic_are_refused(cost):
    model, x, y = example(cost="mse" if cost is Huber else "cross_entropy")
    assert "not holomorphic" in refused(model, x, y, cost=cost)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype):
    model, x, y = example(dtype=dtype)
    assert "float32 or float64" in refused(model, x, y)
    model, x, y = example(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in refused(model, x, y)


# Complex forms.


def test_the_error_function_of_complex_numbers():
    points = [complex(x, y) for x in (-7, -3, -1.2, -0.1, 0, 1e-8, 0.4, 2, 5, 9) for y in (-2, -0.7, 0, 1e-6, 0.3, 1.4)]
    z = torch.tensor(points, dtype=torch.complex128, requires_grad=True)
    exact = torch.tensor([complex(mpmath.erf(p)) for p in points], dtype=torch.complex128)
    value = erf(z)
    assert ((value - exact).abs() / exact.abs().clamp(min=1e-300)).nan_to_num(0).max() < 1e-12
    (slope,) = torch.autograd.grad(value, z, torch.ones_like(value))
    exact = [complex(2 / mpmath.sqrt(mpmath.pi) * mpmath.exp(-(mpmath.mpc(p) ** 2))) for p in points]
    exact = torch.tensor(exact, dtype=torch.complex128)
    torch.testing.assert_close(slope.conj().resolve_conj(), exact, rtol=1e-12, atol=1e-300)
    beyond = erf(torch.tensor([1 + 1.01j * FARTHEST, 0.5j]))
    assert beyond[0].isnan() and not beyond[1].isnan()
    assert erf(torch.zeros(0, dtype=torch.complex64)).shape == (0,)
    torch.testing.assert_close(erf(torch.tensor([0.3 + 0.2j])), torch.tensor([complex(mpmath.erf(0.3 + 0.2j))]))


aten = torch.ops.aten
W, B, BILINEAR = torch.randn(3, 4).double(), torch.randn(3).double(), torch.randn(3, 4, 4).double()
FORMS = {
    "erf": (aten.erf, (2, 4), ()),
    "erfc": (aten.erfc, (2, 4), ()),
    "gelu": (aten.gelu, (2, 4), ()),
    "gelu, tanh": (lambda x: aten.gelu(x, approximate="tanh"), (2, 4), ()),
    "sigmoid": (aten.sigmoid, (2, 4), ()),
    "silu": (aten.silu, (2, 4), ()),
    "softplus": (aten.softplus, (2, 4), (2.0, 20.0)),
    "log_sigmoid": (F.logsigmoid, (2, 4), ()),
    "mish": (aten.mish, (2, 4), ()),
    "softmax": (aten.softmax, (2, 4), (1,)),
    "log_softmax": (aten.log_softmax, (2, 4), (1,)),
    "logsumexp": (aten.logsumexp, (2, 4), ([1],)),
    "linear": (F.linear, (2, 4), (W, B)),
    "matmul": (torch.matmul, (2, 4), (W.T,)),
    "addmm": (lambda x, w: aten.addmm(B, x, w), (2, 4), (W.T,)),
    "conv1d": (aten.conv1d, (2, 4, 6), (torch.randn(2, 4, 3).double(), B[:2], [2])),
    "conv_transpose1d": (aten.conv_transpose1d, (2, 3, 4), (torch.randn(3, 2, 2).double(),)),
    "avg_pool2d": (aten.avg_pool2d, (2, 1, 4, 4), ([2, 2],)),
    "adaptive_avg_pool2d": (aten.adaptive_avg_pool2d, (2, 1, 5, 5), ([2, 2],)),
    "scaled_dot_product_attention": (
        lambda x: aten.scaled_dot_product_attention(x, x + 1, x * 2, None, 0.0, True), (1, 2, 3, 4), (),
    ),
    "einsum": (lambda x, w: torch.einsum("bi,ij->bj", x, w), (2, 4), (W.T,)),
    "bilinear": (lambda x: F.bilinear(x, x + 1, BILINEAR, B), (2, 4), ()),
    "var": (lambda x: aten.var(x, [1], correction=1), (2, 4), ()),
    "var, of all": (lambda x: aten.var(x, None, correction=1), (2, 4), ()),
    "std": (lambda x: aten.std(x, [0, 2], correction=0, keepdim=True), (2, 4, 3), ()),
    "layer_norm": (aten.layer_norm, (2, 4), ([4], W[0], W[1])),
    "rms_norm": (aten.rms_norm, (2, 4), ([4], W[0])),
    "group_norm": (aten.group_norm, (2, 4, 3), (2, W[0], W[1])),
    "batch_norm": (aten.batch_norm, (5, 4), (W[0], W[1], None, None, True, 0.1, 1e-5, False)),
    "batch_norm, eval": (aten.batch_norm, (5, 4), (W[0], W[1], W[2], W[0].square() + 1, False, 0.1, 1e-5, False)),
    "instance_norm": (aten.instance_norm, (2, 3, 5), (B, B, None, None, True, 0.1, 1e-5, False)),
    "linalg_vector_norm": (aten.linalg_vector_norm, (2, 4), (2, [1])),
    **{name: (getattr(torch, name), (2, 4), ()) for name in (
        "exp", "expm1", "sin", "cos", "tan", "sinh", "cosh", "tanh", "asinh", "atan", "sinc", "square", "reciprocal",
    )},
    **{name: (lambda x, name=name: getattr(torch, name)(x.square() + 1), (2, 4), ()) for name in (
        "sqrt", "rsqrt", "log", "log1p",
    )},
    "pow": (lambda x: (x.square() + 1).pow(1.5), (2, 4), ()),
    "cumsum": (aten.cumsum, (2, 4), (1,)),
    "prod": (lambda x: x.prod(1), (2, 4), ()),
}  # fmt: skip
WRITTEN = {
    "einsum": lambda form, x, w: form("bi,ij->bj", (x, w)),
    "bilinear": lambda form, x: form(x, x + 1, BILINEAR, B),
    "var": lambda form, x: form(x, [1], correction=1),
    "var, of all": lambda form, x: form(x, None, correction=1),
    "std": lambda form, x: form(x, [0, 2], correction=0, keepdim=True),
    "addmm": lambda form, x, w: form(B, x, w),
    "scaled_dot_product_attention": lambda form, x: form(x, x + 1, x * 2, None, 0.0, True),
    "gelu, tanh": lambda form, x: form(x, approximate="tanh"),
}
"""How forms are called that take other arguments than the functions of `FORMS`."""


@pytest.mark.parametrize("name", FORMS)
def test_a_complex_form_is_torch_s_own_on_real_numbers_and_holomorphic(name):
    torch.manual_seed(2)
    function, shape, args = FORMS[name]
    label = name.partition(",")[0]
    form = ComplexOp(function, TABLE[label])
    if name in WRITTEN:
        form = partial(WRITTEN[name], ComplexOp(None, TABLE[label]))
    x = 2 * torch.randn(shape).double()
    torch.testing.assert_close(form(x.to(torch.complex128), *args).real, function(x, *args), rtol=1e-11, atol=1e-12)
    assert form(x.to(torch.complex128), *args).imag.abs().max() < 1e-12

    # d/dz along the real and the imaginary axis, by differences of order 4; and by autograd, which has its conjugate.
    z = torch.complex(x, 0.3 * torch.randn(shape).double()).requires_grad_()
    way = torch.randn(shape).to(torch.complex128)
    slopes = []
    for h in (1e-3, 1e-3j):
        at = [form(z.detach() + k * h * way, *args) for k in (-2, -1, 1, 2)]
        slopes.append((at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * h))
    torch.testing.assert_close(*slopes, rtol=1e-7, atol=1e-8)
    value = form(z, *args)
    force = torch.randn(value.shape, dtype=value.dtype)
    (found,) = torch.autograd.grad(value, z, force.conj())
    torch.testing.assert_close((found.conj() * way).sum(), (force * slopes[0]).sum(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [30.0, 800.0])
def test_complex_forms_do_not_overflow(size):
    z = torch.tensor([size + 0.3j, -size + 0.3j], dtype=torch.complex128)
    for name in ("sigmoid", "silu", "softplus", "log_sigmoid", "mish", "tanh"):
        found = ComplexOp(torch.tanh, TABLE[name])(z)
        assert torch.isfinite(torch.view_as_real(found)).all(), name
    rows = torch.stack([z, z.flip(0)])
    for name in ("softmax", "log_softmax"):
        found = ComplexOp(None, TABLE[name])(rows, 1)
        assert torch.isfinite(torch.view_as_real(found)).all(), name
