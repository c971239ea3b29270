"""`mep.verify`: it says yes to models that are right, no to those made wrong, and touches nothing."""

import copy
import json
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from cases import COSTS, MODELS, Lateral, Quartic, free_energy, mlp, settled
from reference import energy, implicit_gradient, nudged_energy, predictions_of_graph, residual
from torch import nn
from typer.testing import CliRunner

import mep
from mep.cli import app
from mep.cost import make_cost
from mep.energy import Energy, Hopfield, nudge
from mep.graph.closed_forms import Largest
from mep.graph.node import AutogradNode, Chain
from mep.verification import report as reports
from mep.verification.case import Case, Config
from mep.verification.equilibrium import _nearest_force, residuals
from mep.verification.gradients import fitted_order
from mep.verification.recurrent import FixedPoint
from mep.verification.report import ORDERS

GOOD = ["mlp relu", "conv relu maxpool", "batch norm", "transposed", "attention", "embedded", "leaves", "partial"]


def verified(name, cost="cross_entropy", **options):
    model, x, y = MODELS[name].build(cost)
    return mep.verify(model, x, y, cost=COSTS[cost].argument, leaves=MODELS[name].leaves, **options)


# Good models


@pytest.mark.parametrize("name", GOOD)
def test_a_good_model_passes(name):
    report = verified(name, betas=(0.1, 0.02))
    assert report.ok, report
    for contrast, order in (("one-sided", 1), ("centered", 2)):
        assert report.orders[contrast] == pytest.approx(order, abs=0.2)
    for p in report.parameters:
        for matches in p.matches.values():
            assert matches[-1].error <= p.rounding or matches[-1].cosine > 0.99
    assert all(e.recomputed <= report.tol + e.rounding for e in report.estimations)
    assert any(p.backprop_difference is not None for p in report.parameters)
    assert all(p.backprop_difference < 1e-3 for p in report.parameters if p.backprop_difference is not None)


@pytest.mark.parametrize("cost", ["mse", "custom"])
def test_costs(cost):
    assert verified("residual", cost).ok


@pytest.mark.parametrize("name", ["mlp relu", "prelu softplus hardtanh"])
def test_exact_branches(name):
    report = verified(name, branches="exact")
    assert report.ok, report


def test_the_numbers_are_those_of_the_estimator_and_of_autograd():
    model, x, y = MODELS["mlp tanh"].build()
    report = mep.verify(model, x, y, tol=1e-10, phases=["centered"])
    solver = mep.Sweep(tol=1e-10)
    found, estimate = mep.EquilibriumPropagation(model, beta=0.03, solver=solver, phases="centered").gradients(x, y)
    nn.functional.cross_entropy(model(x), y).backward()
    assert [p.name for p in report.parameters] == [name for name, _ in model.named_parameters()]
    for row, p in zip(report.parameters, model.parameters(), strict=True):
        match = row.matches["centered"][1]
        assert match.beta == estimate.beta == 0.03 and row.norm == pytest.approx(float(p.grad.norm()))
        cosine = nn.functional.cosine_similarity(found[p].flatten(), p.grad.flatten(), dim=0)
        assert match.cosine == pytest.approx(float(cosine))
        assert match.ratio == pytest.approx(float(found[p].norm() / p.grad.norm()))
        assert match.error == pytest.approx(float((found[p] - p.grad).norm() / p.grad.norm()), rel=1e-4)
    assert report.estimations[1].sweeps == estimate.iterations


def test_a_large_beta_is_followed_to_smaller_ones():
    torch.manual_seed(0)
    model, x, y = mlp(nn.Tanh, 4, 6, 3).double(), torch.randn(5, 4).double(), torch.randint(3, (5,))
    with torch.no_grad():
        model[0].weight.mul_(4)
    report = mep.verify(model, x, y, betas=(6.0, 3.0), phases=["one-sided"])
    assert report.ok and len(report.estimations) > 2
    betas = [e.beta for e in report.estimations]
    assert betas == sorted(betas, reverse=True) and betas[0] >= 3 * betas[-1]


def test_a_right_network_with_a_large_gain_passes_at_betas_as_small_as_the_chosen_ones():
    torch.manual_seed(0)
    model, x = mlp(nn.Tanh, 4, 6, 3).double(), torch.randn(5, 4).double()
    with torch.no_grad():
        model[2].weight.mul_(1000)
        y = model(x) + torch.randn(5, 3).double()
    chosen = mep.EquilibriumPropagation(model, "mse").gradients(x, y)[1].beta
    report = mep.verify(model, x, y, cost="mse")
    assert report.ok, report
    assert 0.01 / 4**5 > min(e.beta for e in report.estimations) >= chosen / 4**5


def test_rounding_of_large_terms_that_cancel_in_a_prediction_is_no_residual():
    torch.manual_seed(0)
    model, x, y = mlp(nn.Tanh, 4, 1000, 3).double(), torch.randn(5, 4).double(), torch.randint(3, (5,))
    with torch.no_grad():
        model[2].weight.mul_(30)
        model[2].bias.sub_(model(x).mean(0))
    report = mep.verify(model, x, y, betas=(1e-8, 1e-9), samples=0)
    assert report.ok, report


def test_dropout_draws_one_noise_for_all():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8),
        nn.Dropout(0.4),
        nn.Tanh(),
        nn.Linear(8, 8),
        nn.BatchNorm1d(8),
        nn.Dropout(0.4),
        nn.Linear(8, 3),
    )
    x, y = torch.randn(9, 4), torch.randint(3, (9,))
    report = mep.verify(model, x, y)
    assert report.ok and any("stochastic" in note for note in report.notes)
    assert any("no larger than what rounding and tol may leave: 3.bias" in note for note in report.notes)
    still = mep.verify(model.eval(), x, y)
    assert still.ok and any("evaluation mode" in note for note in still.notes)
    assert still.parameters[0].norm != pytest.approx(report.parameters[0].norm, rel=1e-3)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = nn.Linear(4, 5), nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, left, right):
        return self.last(torch.tanh(self.one(left) + self.two(right)))


def test_float32_and_inputs_by_name():
    torch.manual_seed(0)
    model, y = Named(), torch.randint(2, (6,))
    x = {"right": torch.randn(6, 3), "left": torch.randn(6, 4)}
    for dtype in (torch.float64, None):
        report = mep.verify(model, x, y, dtype=dtype)
        assert report.ok, report
        assert report.tol == pytest.approx(torch.finfo(dtype or torch.float32).eps ** 0.5)


class Drifting(nn.Module):
    """Each call leaves a mark that the next one would show."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * (1 + 0.2 * self.calls) if x.isfinite().all() else x


def test_every_evaluation_finds_the_buffers_of_before():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), Drifting(), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    report = mep.verify(model, x, y, leaves=[Drifting])
    assert report.ok and report.orders["centered"] == pytest.approx(2, abs=0.1), report
    assert all(e.recomputed <= e.residual + 1e-9 for e in report.estimations)
    assert model[3].calls == 0


def test_a_gradient_that_vanishes_has_no_direction():
    """That of a bias before BatchNorm."""
    report = verified("batch norm")
    found = {p.name: p for p in report.parameters}
    assert found["0.bias"].norm < 1e-12 and found["0.bias"].rounding == 1 and found["0.weight"].rounding < 1e-5
    for matches in found["0.bias"].matches.values():
        assert all(m.cosine is None and m.ratio is None and m.error <= 1 for m in matches)


def steep(gain=8.0):
    """A linear network with the gain `M = 1 + gain^2` along the output's error, for the cost |s - y|^2 / 2.

    Its nudged energy has a minimum where `1 + beta M > 0`: none beyond `beta = -1 / M`.
    """
    model = mlp(nn.Identity, 1, 1, 2).double()
    with torch.no_grad():
        for p, value in zip(model.parameters(), ([[1.0]], [0.0], [[gain], [0.0]], [0.0, 0.0]), strict=True):
            p.copy_(torch.tensor(value))
    x = torch.ones(3, 1).double()
    return model, x, model(x).detach() + torch.tensor([[1.0, 0.0]])


def test_a_beta_without_an_equilibrium_is_noted_and_smaller_ones_follow():
    model, x, y = steep()
    report = mep.verify(model, x, y, cost="mse", betas=(0.1, 0.05))
    assert report.ok, report
    diverged = [note for note in report.notes if "diverges" in note]
    assert diverged == [f"settling diverges at beta {beta} (centered)" for beta in (0.1, 0.05)]
    betas = {name: [e.beta for e in report.estimations if e.phases == name] for name in report.orders}
    assert betas["one-sided"][:2] == [0.1, 0.05] and betas["centered"][0] == 0.05 / 4
    assert report.reach < 1 / 65 < report.beyond


def test_a_network_that_settles_at_no_beta_given_is_verified_at_those_that_are_chosen():
    model, x, y = steep(gain=1e4)
    report = mep.verify(model, x, y, cost="mse", phases=["centered"])
    assert report.ok, report
    assert all(e.beta < 1e-8 and not e.unsettled for e in report.estimations)
    assert sum("diverges" in note for note in report.notes) > 3


def test_a_network_that_settles_at_no_beta_at_all_is_refused(monkeypatch):
    def diverges(*_):
        raise mep.DivergedError("as always")

    monkeypatch.setattr("mep.verification.run_ep", diverges)
    with pytest.raises(mep.DivergedError, match="as always"):
        mep.verify(*steep(), cost="mse", phases=["centered"])


def test_what_does_not_settle_at_a_large_beta_is_noted(monkeypatch):
    """In the sweeps given, at the largest beta only; the order is that of the others."""
    monkeypatch.setattr("mep.verification._LONGER", 0.06)
    model, x, y = MODELS["mlp tanh"].build()
    report = mep.verify(model, x, y, betas=(2.0, 0.02, 0.01), phases=["one-sided"])
    assert [e.unsettled > 0 for e in report.estimations] == [True, False, False]
    assert report.ok and report.orders["one-sided"] == pytest.approx(1, abs=0.02), report
    some = f"{report.estimations[0].unsettled} of {len(y)} examples"
    assert f"{some} did not settle at beta 2 (one-sided): reached the step limit" in report.notes


@pytest.mark.parametrize("tol", [1e-2, 1e-4])
def test_a_loose_tolerance_is_allowed_for(tol):
    """Settling leaves an error of its own, in which an order cannot be seen."""
    report = verified("residual", tol=tol)
    assert report.ok, report


def test_frozen_and_unused_parameters_are_named():
    report = verified("partial")
    assert any("second.weight, unused.weight, unused.bias" in note for note in report.notes)
    assert "second.weight" not in [p.name for p in report.parameters]


def test_finite_differences_of_a_cost_known_in_closed_form():
    """C = mean over examples and outputs of (w x + b - y)^2."""
    model, x, y = nn.Linear(1, 1).double(), torch.tensor([[1.0], [2.0]]).double(), torch.tensor([[3.0], [1.0]]).double()
    report = mep.verify(model, x, y, cost="mse")
    error = (model(x) - y).detach()
    assert report.parameters[0].norm == pytest.approx(abs(float((2 * error * x).mean())))
    assert report.parameters[1].norm == pytest.approx(abs(float((2 * error).mean())))
    assert all(p.backprop_difference < 1e-8 for p in report.parameters)


def test_finite_differences_judge_the_best_ep_gradient():
    """That of the centered contrast at the smallest beta."""
    report = verified("mlp tanh")
    for p in report.parameters:
        centered, one_sided = (p.matches[phases][-1].error for phases in ("centered", "one-sided"))
        assert p.ep_difference < 10 * centered < one_sided


def test_fitted_order_looks_at_the_smallest_betas_above_rounding():
    betas = [1.0, 0.1, 0.03, 0.01]
    assert fitted_order(betas, [1e3, 1e-1, 3e-2, 1e-2], 0) == pytest.approx(1)
    assert fitted_order(betas, [1.0, 1e-2, 1e-9, 1e-9], 1e-8) == pytest.approx(2)
    assert fitted_order(betas, [1.0, 1e-9, 1e-9, 1e-9], 1e-8) is None


def random_state(name, beta):
    """A nudged energy, and states near its free equilibrium."""
    model, x, y = MODELS[name].build()
    energy, free = free_energy(model, x)
    nudged = nudge(energy, make_cost("cross_entropy")(energy.output(free), y), beta)
    state = {n: s + beta * torch.randn_like(s) for n, s in energy.state(free).items()}
    return nudged, state, predictions_of_graph(energy.graph, energy.inputs, energy.state(free)), y


@pytest.mark.parametrize("beta", [0.1, -1e-3])
@pytest.mark.parametrize("name", ["mlp relu", "mlp tanh", "residual", "attention"])
def test_residuals_are_those_of_the_forces(name, beta):
    """dF/ds by autograd over the whole network, over the larger of the error and the pull of the children."""
    energy, state, predict, y = random_state(name, beta)
    total = nudged_energy(predict, energy.graph.output, COSTS["cross_entropy"].value, y, beta)
    with torch.no_grad():
        found = torch.stack([residual for residual, _ in residuals(energy, state, swept=False).values()])
    torch.testing.assert_close(found.amax(0), residual(predict, total, state))


@pytest.mark.parametrize("beta", [0.1, -1e-3])
@pytest.mark.parametrize("name", ["mlp relu", "mlp tanh", "residual", "attention"])
def test_residuals_of_a_sweep_are_the_gradient_of_phi(name, beta):
    """`-dPhi/ddelta / beta = S - delta`, with `Phi = C(s_out) + beta/2 sum |delta|^2` by autograd over the network."""
    energy, state, predict, y = random_state(name, beta)
    delta = {n: ((mu - state[n]) / beta).detach().requires_grad_() for n, mu in predict(state).items()}
    s = {}
    for n in delta:  # in topological order: the prediction of a state reads earlier ones alone
        s[n] = predict({**state, **s})[n] - beta * delta[n]
    phi = COSTS["cross_entropy"].value(s[energy.graph.output], y)
    phi = phi + beta / 2 * sum(d.square().flatten(1).sum(1) for d in delta.values())
    with torch.no_grad():
        found = residuals(energy, state, swept=True)
    for (n, d), g in zip(delta.items(), torch.autograd.grad(phi.sum(), delta.values()), strict=True):
        r, d = (t.detach().reshape(len(y), -1) for t in (-g / beta, d))
        larger = torch.maximum((r + d).norm(dim=1), d.norm(dim=1))
        torch.testing.assert_close(found[n][0], r.norm(dim=1) / larger)


@torch.no_grad()
@pytest.mark.parametrize("swept", [True, False])
@pytest.mark.parametrize("reading", ["held", "exact"])
@pytest.mark.parametrize("name", ["mlp relu", "conv relu maxpool", "mlp tanh"])
def test_residuals_vanish_at_an_equilibrium_alone(name, reading, swept):
    """With kinks at which units rest, too; a state moved by hand shows in its own residual."""
    model, x, y = MODELS[name].build()
    solver = mep.Sweep(tol=1e-11, settle_steps=500)
    energy, found = settled(model, x, y, "cross_entropy", 0.5, solver, reading)
    state = energy.state(found.point)
    assert found.result is mep.Result.CONVERGED
    assert all(float(r.max()) < 1e-8 for r, _ in residuals(energy, state, swept).values())
    for n, s in state.items():
        moved = residuals(energy, {**state, n: s + 0.1}, swept)
        assert float(moved[n][0].min()) > 1e-3


@pytest.mark.parametrize(
    ("u", "error", "nearest"),
    [(-2.0, [-0.5, -1.5], [-0.5, -1.5]), (-2.0, [-3.0, 0.0], [-2.0, 0.0]), (2.0, [0.5, 1.5], [0.0, 2.0])],
)
def test_pull_on_a_tie(u, error, nearest):
    """`max(s)` of two units that tie is pulled by u: down, when each may bear a part, or up, when one bears all."""
    s, direct, error, nearest = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 1.0], [0.0, 0.0], error, nearest))
    found = _nearest_force(s, error, direct, torch.tensor([u], dtype=torch.float64), Largest())
    torch.testing.assert_close(found, nearest)


def test_stall_shows_the_signal_arrive():
    report = verified("mlp tanh")
    assert report.stall.sweeps[:3] == (1, 2, 3) and report.stall.beta == 0.1
    assert list(report.stall.residuals) == ["0", "2", "4"]
    for curve in report.stall.residuals.values():
        assert len(curve) == len(report.stall.sweeps) and curve[-1] <= report.tol
    assert max(curve[0] for curve in report.stall.residuals.values()) > 100 * report.tol


def test_reach_is_where_the_default_solver_ends():
    model, x, y = MODELS["batch norm"].build()
    report = mep.verify(model, x, y)
    assert report.beyond == 2 * report.reach

    def settles(beta, phases):
        ep = mep.EquilibriumPropagation(model, beta=beta, phases=phases, on_unsettled="ignore")
        try:
            return ep.gradients(x, y)[1].converged
        except mep.DivergedError:
            return False

    for beta, reached in ((report.reach, True), (report.beyond, False)):
        assert all(settles(beta, phases) for phases in ("one-sided", "centered")) == reached


# Energies whose free equilibrium is no forward pass


def layers(*modules, classes=3):
    torch.manual_seed(0)
    model = nn.Sequential(*(make() for make in modules))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.8)
    return model, torch.randn(5, 4), torch.arange(5) % classes


BOXES = (lambda: nn.Linear(4, 6), lambda: nn.Hardtanh(0, 1), lambda: nn.Linear(6, 5), nn.ReLU, lambda: nn.Linear(5, 3))
CURVED = (lambda: nn.Linear(4, 6), nn.Sigmoid, lambda: nn.Linear(6, 5), nn.Tanh, lambda: nn.Linear(5, 3))


LATERAL = Lateral(0.05 * torch.ones(6, 6))
OTHERS = {
    "boxes": (BOXES, {"energy": "hopfield"}),
    "boxes, exact": (BOXES, {"energy": "hopfield", "branches": "exact"}),
    "curved": (CURVED, {"energy": "hopfield"}),
    "dropout": ((*BOXES[:2], lambda: nn.Dropout(0.2), *BOXES[2:]), {"energy": "hopfield"}),
    "readout": (CURVED[:4], {"energy": "hopfield", "cost": "cross_entropy", "readout": 3}),
    "group": (CURVED, {"groups": [LATERAL]}),
    "group of a Hopfield network": (BOXES, {"energy": "hopfield", "groups": [LATERAL]}),
    "energy of one's own": (CURVED, {"energy": Quartic()}),
}


def verified_energy(name, **more):
    modules, options = OTHERS[name]
    model, x, y = layers(*modules)
    less = {"tol": 1e-6, "samples": 1, "phases": ["centered"], "betas": (0.1, 0.05)}  # descent takes many steps
    options = {"cost": "one_hot_mse", **(less if "groups" in options else {}), **options, **more}
    if "readout" in options:
        options["readout"] = nn.Linear(5, 3)
    return mep.verify(model, x, y, **options)


@pytest.mark.parametrize("name", OTHERS)
def test_a_network_that_settles_without_a_target_passes(name):
    report = verified_energy(name)
    assert report.ok, report
    for phases, order in report.orders.items():
        assert order == pytest.approx(ORDERS[phases], abs=0.2)
    assert all(p.backprop_difference < 1e-5 for p in report.parameters)
    assert any("recurrent" in note for note in report.notes) == (name != "energy of one's own")
    steps = report.stall.sweeps
    assert steps[0] == 1 and list(steps) == sorted(set(steps))
    assert all(len(curve) == len(steps) for curve in report.stall.residuals.values())


def test_a_hopfield_network_with_pooling_passes():
    torch.manual_seed(0)
    front = nn.Conv2d(1, 3, 3, padding=1), nn.MaxPool2d(2), nn.Hardtanh(0, 1), nn.Conv2d(3, 4, 3), nn.AvgPool2d(2)
    model = nn.Sequential(*front, nn.ReLU(), nn.Flatten(), nn.Linear(4, 3))
    report = mep.verify(model, torch.randn(4, 1, 8, 8), torch.arange(4) % 3, cost="one_hot_mse", energy="hopfield")
    assert report.ok, report


def test_recurrent_backpropagation_is_implicit_differentiation():
    """With dense matrices, on the energy written down again."""
    model, x, y = layers(*BOXES)
    model, x, y = model.double(), x.double(), torch.eye(3).double()[y]
    graph = mep.trace(model, x, energy="hopfield")
    config = Config("mse", mep.Relaxation(tol=1e-10), "held", (), Hopfield())
    with Case(model, x, y, config, None) as case:
        rest = FixedPoint(case)
        found = list(rest.gradients().values())
    boxes = {node.name: node.box for node in graph.states}
    predict = predictions_of_graph(graph, graph.bind(x))
    wanted = implicit_gradient(
        lambda s: energy(predict, s, "hopfield"),
        lambda s: (s["4"] - y).square().mean(1),
        rest.states,
        list(model.parameters()),
        boxes,
    )
    for g, w in zip(found, wanted, strict=True):
        assert torch.allclose(g, w, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["ds", "dmu"])
def test_wrong_derivatives_of_an_energy_are_found(method, monkeypatch):
    """Sweeps do not use them where there is `state`; descent does."""
    right = getattr(Quartic, method)
    model, x, y = layers(*CURVED)
    wrong = type("Wrong", (Quartic,), {method: lambda self, s, mu: right(self, s, mu) + 0.01 * (s - mu)})
    report = mep.verify(model, x, y, energy=wrong(), samples=0, phases=["one-sided"], betas=(0.1, 0.05))
    assert report.failures[0].startswith(f"Wrong.{method} is"), report


def test_strong_couplings_are_refused():
    model, x, y = layers(*BOXES)
    with torch.no_grad():
        model[4].weight.mul_(20)
    with pytest.raises(mep.DivergedError, match="smaller weights"):
        mep.verify(model, x, y, cost="one_hot_mse", energy="hopfield")


def test_winners_that_push_each_other_down_are_named():
    """Either of two like units is pushed below the other as soon as max pooling picks it."""
    model = nn.Sequential(nn.Linear(1, 2), nn.Hardtanh(0.0, 1.0), nn.MaxPool1d(2), nn.Linear(1, 1)).double()
    with torch.no_grad():
        for p, value in zip(model.parameters(), (0.0, 0.5, -0.5, 1.0), strict=True):
            p.fill_(value)
    x = torch.ones(2, 1, dtype=torch.float64)
    with pytest.raises(mep.DivergedError, match="smaller weights, or average pooling"):
        mep.verify(model, x, x, cost="mse", energy="hopfield")


@pytest.mark.parametrize("name", ["boxes", "curved", "dropout", "group"])
def test_a_wrong_gradient_of_another_energy_is_found(name, monkeypatch):
    right = Energy.parameter_gradient
    monkeypatch.setattr(Energy, "parameter_gradient", lambda *a: {p: 1.3 * g for p, g in right(*a).items()})
    report = verified_energy(name, samples=0)
    assert not report.ok and any("1.3" in text or "order" in text for text in report.failures)


@pytest.mark.parametrize("phase", ["free", "nudged"])
def test_a_relaxation_with_a_false_residual_is_found(phase, monkeypatch):
    """It measures zero after the first sweep of a phase, and stops there."""
    step = mep.Relaxation.step

    def flattered(solver, energy, iterate, active):
        iterate = step(solver, energy, iterate, active)
        if (energy.nudge is None) == (phase == "free"):
            iterate.residual, iterate.exact = torch.zeros_like(iterate.residual), True
        return iterate

    monkeypatch.setattr(mep.Relaxation, "step", flattered)
    report = verified_energy("boxes", samples=0, betas=(0.03, 0.01), phases=["one-sided"])
    assert not report.ok
    if phase == "nudged":  # what a free phase leaves counts in the residual of the nudged one
        assert any("the solver reported" in text for text in report.failures), report


# Wrong models


def flipped(method):
    return lambda self, saved, force: [None if g is None else -g for g in method(self, saved, force)]


def scaled(method, factor):
    return lambda self, saved, force, weight: method(self, saved, force, weight * factor)


@pytest.mark.parametrize(
    ("name", "owner", "method", "change", "says", "first"),
    [
        ("mlp tanh", Chain, "vjp", flipped, "cosine", "2.bias"),
        ("attention", AutogradNode, "vjp", flipped, "cosine", None),
        ("mlp tanh", Chain, "param_vjp", lambda m: scaled(m, 10.0), "10 times the size", "4.bias"),
        ("mlp tanh", Chain, "param_vjp", lambda m: scaled(m, 1.05), "order in beta", "4.bias"),
    ],
)
def test_a_wrong_core_is_found(name, owner, method, change, says, first, monkeypatch):
    monkeypatch.setattr(owner, method, change(getattr(owner, method)))
    with pytest.raises(mep.TraceError, match=r"The graph of .* is not"):
        verified(name)
    monkeypatch.setattr("mep.capture.cache.prove", lambda *_: True)
    report = verified(name)
    assert not report.ok
    texts = [text for text in report.failures if says in text]
    assert {"one-sided", "centered"} == {c for c in ("one-sided", "centered") for t in texts if f"({c})" in t}
    if first:
        assert all(text.startswith(f"`{first}`") for text in texts)
    assert str(report).startswith("NOT OK") and f"Failure: {texts[0]}" in str(report)


def test_a_dropped_beta_is_found(monkeypatch):
    right = Energy.parameter_gradient
    monkeypatch.setattr(
        Energy,
        "parameter_gradient",
        lambda self, point, errors, w: right(self, point, errors, w * float(torch.as_tensor(self.beta).abs().max())),
    )
    report = verified("mlp tanh")
    assert len(report.failures) >= 2 and all(text.startswith("`4.bias`") for text in report.failures)


def stays(errors):
    """All errors are zero: where it began."""
    return {n: torch.zeros_like(error) for n, error in errors.items()}


def stops_short(errors):
    """All errors are a tenth too small."""
    return {n: 0.9 * error for n, error in errors.items()}


def forgets_the_first(errors):
    """Those of the first layer are zero."""
    return {n: error if i else torch.zeros_like(error) for i, (n, error) in enumerate(errors.items())}


@pytest.mark.parametrize("wrong", [stays, stops_short, forgets_the_first])
@pytest.mark.parametrize("name", ["mlp tanh", "mlp relu"])
def test_a_solver_that_certifies_what_is_no_equilibrium_is_found(name, wrong, monkeypatch):
    """It ends there with a residual of zero; the states have another one."""
    finalize = mep.Sweep.finalize

    def end(solver, energy, iterate):
        found = finalize(solver, energy, iterate).errors
        errors = wrong({node.name: found[node.name] for node in energy.graph.states})
        zero = torch.zeros_like(iterate.residual)
        return replace(iterate, point=energy.at_errors(errors), errors=errors, residual=zero, exact=True)

    monkeypatch.setattr(mep.Sweep, "finalize", end)
    report = verified(name, betas=(0.1, 0.03), phases=["one-sided"], samples=0)
    assert not report.ok
    assert any("the solver reported 0.0e+00" in text and "Node `" in text for text in report.failures), report


@pytest.mark.parametrize("branches", ["held", "exact"])
def test_a_solver_with_a_false_residual_is_found(branches, monkeypatch):
    """It measures zero after the first sweep, and stops there."""
    step = mep.Sweep.step

    def flattered(solver, energy, iterate, active):
        iterate = step(solver, energy, iterate, active)
        return replace(iterate, residual=torch.zeros_like(iterate.residual))

    monkeypatch.setattr(mep.Sweep, "step", flattered)
    report = verified("prelu softplus hardtanh", branches=branches, betas=(0.1, 0.05))
    false = [text for text in report.failures if "the solver reported 0.0e+00" in text]
    assert not report.ok and len(false) == len({e.worst for e in report.estimations}), report  # one for each node
    assert all(e.result == "converged" and e.recomputed > 1000 * report.tol for e in report.estimations)


def test_what_does_not_settle_is_reported(monkeypatch):
    monkeypatch.setattr("mep.verification._LONGER", 0.01)
    report = verified("mlp tanh", tol=1e-13)
    found = [text for text in report.failures if "not settled" in text]
    assert len(found) == 2 and all("reached the step limit" in text for text in found), report
    assert all(e.unsettled > 0 for e in report.estimations)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 0.3 * x

    @staticmethod
    def backward(ctx, force):
        return force


class Custom(nn.Module):
    def forward(self, x):
        return Straight.apply(x)


def test_a_backward_that_is_no_derivative_is_found():
    """EP and backprop agree on it, finite differences do not."""
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(4, 5), Custom(), nn.Linear(5, 3)), torch.randn(6, 4), torch.randint(3, (6,))
    report = mep.verify(model, x, y, leaves=[Custom])
    assert len(report.failures) == 1 and report.failures[0].startswith("`0.bias`: backprop is"), report
    assert mep.verify(model, x, y, leaves=[Custom], samples=0).ok


def test_the_share_inside_leaves_is_noted():
    model, x, y = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4), torch.arange(6) % 3
    assert "Note: 25 of 43 parameters learn by backprop inside nodes" in str(mep.verify(model, x, y, leaves=("0",)))


def test_every_bound_is_asserted():
    """A row just inside each bound passes, one just outside does not."""

    def judge(branches="held", **changes):
        match = reports.GradientMatch(0.01, *(changes.get(k, v) for k, v in (("c", 1.0), ("r", 1.0), ("e", 0.1))))
        order = {"centered": changes.get("o", 2.0)}
        far, ep = changes.get("d", 0.0), changes.get("f", 0.0)
        parameter = reports.Parameter("w", (1,), 1.0, 1e-6, {"centered": (match,)}, order, far, ep)
        estimation = reports.Estimation(
            phases="centered",
            beta=0.1,
            error=0.1,
            sweeps=3,
            result=changes.get("s", "converged"),
            unsettled=0,
            residual=0.0,
            recomputed=changes.get("n", 0.0),
            rounding=1e-9,
            worst="node",
            left_branch=0.0,
        )
        return not reports.failures([parameter], [estimation], 1e-6, branches)

    assert judge()
    for good, bad in (
        ({"c": 0.991}, {"c": 0.989}),
        ({"r": 1.09}, {"r": 1.11}),
        ({"r": 0.91}, {"r": 0.89}),
        ({"o": 1.81}, {"o": 1.79}),
        ({"o": 0.81, "branches": "exact"}, {"o": 0.79, "branches": "exact"}),
        ({"o": None, "e": 1e-7}, {"o": None}),
        ({"d": 0.9e-3}, {"d": 1.1e-3}),
        ({"f": 0.19}, {"f": 0.21}),
        ({"n": 1.0005e-6}, {"n": 1.002e-6}),
        ({}, {"s": "reached the step limit"}),
        ({"e": 0.1}, {"c": float("nan")}),
    ):
        assert judge(**good) and not judge(**bad), (good, bad)
    assert reports.CLOSE == 1e-3


# Manners


def test_nothing_of_the_users_is_touched():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(6, 3)
    ).train()
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    model(x).sum().backward()
    model[0].bias.grad = None
    state, grads = (
        copy.deepcopy(model.state_dict()),
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
    )
    inputs, noise, attributes = (x.clone(), y.clone()), torch.get_rng_state(), [set(vars(m)) for m in model.modules()]
    assert mep.verify(model, x, y).ok
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for p, before in zip(model.parameters(), grads, strict=True):
        assert p.grad is None if before is None else torch.equal(p.grad, before)
    assert torch.equal(x, inputs[0]) and torch.equal(y, inputs[1])
    assert torch.equal(torch.get_rng_state(), noise)
    assert model.training and [set(vars(m)) for m in model.modules()] == attributes
    assert next(model.parameters()).dtype == torch.float32


def test_an_input_that_forward_overwrites_is_not_the_users():
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3)), torch.randn(5, 4), torch.randint(3, (5,))
    before = x.clone()
    assert mep.verify(model, x, y, dtype=None).ok
    assert torch.equal(x, before)


def test_two_reports_are_the_same():
    one, two = (verified("mlp relu", betas=(0.1, 0.03)).as_dict() for _ in range(2))
    assert one == two


def test_refusals():
    model, x, y = MODELS["mlp tanh"].build()
    for options in (
        {"betas": (0.1,)},
        {"betas": (0.1, -1.0)},
        {"phases": "centered"},
        {"phases": ["both"]},
        {"samples": -1},
        {"tol": 2.0},
        {"branches": "loose"},
        {"cost": "hinge"},
    ):
        with pytest.raises(mep.ArgumentError, match=next(iter(options))):
            mep.verify(model, x, y, **options)
    with pytest.raises(mep.InputError):
        mep.verify(model, x * float("nan"), y)
    with pytest.raises(mep.InputError, match="must be a tensor"):
        mep.verify(model, x, [0])
    with pytest.raises(mep.TraceError, match="leaves"):
        mep.verify(MODELS["leaves"].build()[0], x, y)
    plain, noise = nn.Linear(4, 3), torch.get_rng_state()
    with pytest.raises(mep.ArgumentError, match=r"dtype=torch.float64.*dtype=None"):
        mep.verify(plain, x, y, cost=lambda s, t: (s @ torch.ones(3, 1)).squeeze(1))
    assert torch.equal(torch.get_rng_state(), noise)
    broken = nn.Linear(4, 3)
    broken.kept = broken(torch.randn(1, 4))
    with pytest.raises(mep.ArgumentError, match="deepcopy"):
        mep.verify(broken, x, y)


# The command


FACTORY = """
import torch
from torch import nn
class Bad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.tanh()
    @staticmethod
    def backward(ctx, g): return g
class Wrong(nn.Module):
    def forward(self, x): return Bad.apply(x)
class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)
    def forward(self, x): return self.inner(x) if x.sum() > -1e9 else x
class Sorted(nn.Module):
    def forward(self, x): return x.sort(1)[0]
def good(classes): return nn.Sequential(nn.Flatten(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, classes))
def bad(classes): return nn.Sequential(nn.Flatten(), nn.Linear(6, 6), Wrong(), nn.Linear(6, classes))
def branching(classes): return nn.Sequential(nn.Flatten(), Branching(), nn.Linear(6, classes))
def sorting(classes): return nn.Sequential(nn.Flatten(), nn.Linear(6, 6), Sorted(), nn.Linear(6, classes))
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    (tmp_path / "factories.py").write_text(textwrap.dedent(FACTORY))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "factories", raising=False)

    def run(*words, code=0):
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
        return result.output

    return run


def test_command(command, tmp_path):
    words = ("--shape", "2,3", "--classes", 4, "--batch-size", 5, "--out", tmp_path)
    output = command("verify", "--model", "factories:good", *words, "--beta", 0.05, "--beta", 0.02)
    assert "OK: equilibrium propagation" in output and "| 3.weight" in output
    record = json.loads((tmp_path / "factories.good.json").read_text())
    assert record["kind"] == "mep verify" and record["settings"]["betas"] == [0.05, 0.02]
    assert {"created", "command", "commit", "versions", "machine", "settings", "report"} < record.keys()
    report = record["report"]
    assert report["ok"] is True and report["failures"] == []
    assert {"notes", "tol", "estimations", "orders", "parameters", "stall", "reach", "beyond"} < report.keys()
    assert [p["name"] for p in report["parameters"]] == ["1.weight", "1.bias", "3.weight", "3.bias"]
    first = report["parameters"][0]["matches"]["centered"][0]
    assert first.keys() == {"beta", "cosine", "ratio", "error"} and first["beta"] == 0.05
    again = command("plot", tmp_path / "factories.good.json", "--out", tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "factories.good.png").read_bytes()
    assert "| 3.weight" in again and "| 3.weight" in command("report", tmp_path / "factories.good.json")


def test_exit_codes(command, tmp_path):
    words = ("--shape", "6", "--classes", 3, "--batch-size", 5, "--out", tmp_path, "--beta", 0.05, "--beta", 0.02)
    output = command("verify", "--model", "factories:bad", *words, code=1)
    assert "NOT OK, 1 failure" in output and "finite differences" in output
    assert json.loads((tmp_path / "factories.bad.json").read_text())["report"]["ok"] is False
    command("verify", "--model", "factories:bad", *words, "--samples", 0, "--leaf", "2")
    assert "Way out" in command("verify", "--model", "factories:branching", *words, code=2)
    assert "training mode" in command("verify", "--model", "factories:branching", *words, "--leaf", "1")
    assert "evaluation mode" in command("verify", "--model", "factories:good", *words, "--eval")
    output = command("verify", "--model", "factories:sorting", *words, "--branches", "exact", code=2)
    assert "branches='exact'" in output
    command("verify", "--model", "factories:good", "--shape", "6,x", "--out", tmp_path, code=2)


def test_command_on_a_hopfield_network(command, tmp_path):
    words = ("--shape", "6", "--classes", 3, "--batch-size", 5, "--out", tmp_path, "--energy", "hopfield")
    output = command("verify", *words, "--samples", 1)
    assert "OK: equilibrium propagation" in output and "recurrent backpropagation" in output


def test_command_on_data_with_squared_error(command, tmp_path):
    output = command("verify", "--cost", "mse", "--batch-size", 4, "--out", tmp_path, "--name", "mine")
    assert output.count("| centered ") == 3 and (tmp_path / "mine.png").stat().st_size > 1000
