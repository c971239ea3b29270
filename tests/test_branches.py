"""Kinks: held branches make the energy smooth; exact ones lead to the equilibrium of the nonsmooth energy itself."""

import math
from functools import partial

import pytest
import torch
from cases import COSTS, free_energy, mlp, of_module, settled
from reference import (
    backprop,
    distance_to_rest,
    forces,
    kinked_equilibria,
    line,
    nudged_energy,
    predictions_of_graph,
    predictions_of_modules,
)
from torch import nn

import mep
from mep.solvers.networks.nonsmooth import unit_minimum

EXACT = mep.Sweep(tol=1e-9, settle_steps=200)
TIGHT = mep.Sweep(tol=1e-6)
KINKED = {"relu": nn.ReLU, "leaky": lambda: nn.LeakyReLU(0.2), "hardtanh": lambda: nn.Hardtanh(-0.4, 0.3)}

OFF_THE_ORIGIN = (
    nn.ReLU6,
    partial(nn.Hardtanh, 0.0, 1.0),
    nn.Hardsigmoid,
    nn.Softshrink,
    partial(nn.Threshold, 0.3, 0.3),
)


class Skipping(nn.Module):
    """A state that is read through its kink and directly, by several nodes."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.gain, self.shift = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        h = self.first(x)
        doubled = 2 * h
        return self.last(h + self.inner(torch.relu(h)) + self.gain(doubled) * self.shift(doubled))


NETWORKS = {
    **{f"mlp {name}": partial(mlp, make, 4, 8, 8, 3) for name, make in KINKED.items()},
    "conv relu": lambda: nn.Sequential(
        nn.Conv1d(1, 3, 2), nn.ReLU(), nn.Conv1d(3, 3, 2), nn.ReLU(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(3, 3)
    ),
    "skipping": Skipping,
    "relu output": lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), nn.ReLU()),
}


def problem(make, cost="cross_entropy", batch=12):
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(batch, 4).double()
    x = x.unsqueeze(1) if isinstance(next(model.children()), nn.Conv1d) else x
    return model, x, COSTS[cost].target(model(x).detach())


@pytest.mark.parametrize("beta", [0.7, -0.7])
@pytest.mark.parametrize("name", KINKED)
def test_unit_rests_at_a_minimum_of_its_own_energy(name, beta):
    activation = KINKED[name]()
    torch.manual_seed(0)
    mu, f, u, x0 = torch.randn(4, 2000).double()
    delta, rest = unit_minimum(mu, f, 2 * u, beta, of_module(activation), x0)
    s = torch.where(rest.isnan(), mu - beta * delta, rest)
    torch.testing.assert_close(s, mu - beta * delta)

    def value(s):
        return 0.5 * (s - mu) ** 2 + beta * (f * s + 2 * u * activation(s))

    for step in (-1e-6, 1e-6):
        assert (value(s + step) >= value(s) - 1e-13).all()
    assert rest.isfinite().any() and rest.isnan().any()


@pytest.mark.parametrize("beta", [0.7, -0.7])
@pytest.mark.parametrize("name", KINKED)
def test_unit_rests_where_descent_from_its_free_state_leads(name, beta):
    activation = of_module(KINKED[name]())
    torch.manual_seed(0)
    mu, f, u, x0 = torch.randn(4, 2000).double()
    delta, _ = unit_minimum(mu, f, 2 * u, beta, activation, x0)
    s = x0
    for _ in range(2000):
        s = s - 0.01 * (s - mu + beta * (f + activation.backward(2 * u, s)))
    assert (mu - beta * delta - s).abs().max() < 0.05


@pytest.mark.parametrize("beta", [0.3, -0.3])
@pytest.mark.parametrize("cost", ["cross_entropy", "custom"])
@pytest.mark.parametrize("name", NETWORKS)
def test_exact_equilibrium_is_one_of_the_nonsmooth_energy(name, cost, beta):
    model, x, y = problem(NETWORKS[name], cost)
    energy, found = settled(model, x, y, COSTS[cost].argument, beta, EXACT, "exact")
    assert found.result is mep.Result.CONVERGED
    states = {node.name: found.point.values[node.name] for node in energy.graph.states}
    left, right = (
        forces(nudged_energy(predict, energy.graph.output, COSTS[cost].value, y, beta), states)
        for predict in (predictions_of_graph(energy.graph, energy.inputs, side=side) for side in (-1, 1))
    )
    for n in states:
        assert distance_to_rest(left[n], right[n]).max() < 1e-8, n


@pytest.mark.parametrize("beta", [0.5, -0.5])
@pytest.mark.parametrize("name", KINKED)
def test_a_beta_for_each_example_leads_to_where_one_for_all_does(name, beta):
    model, x, y = problem(NETWORKS[f"mlp {name}"])
    (energy, one), (_, each) = (
        settled(model, x, y, "cross_entropy", b, EXACT, "exact") for b in (beta, torch.full((len(x),), beta))
    )
    for node in energy.graph.states:
        assert torch.allclose(one.point.values[node.name], each.point.values[node.name], atol=1e-8)


def at_kinks(name, beta):
    """How many units rest exactly at a kink."""
    model, x, y = problem(NETWORKS[name])
    energy, found = settled(model, x, y, "cross_entropy", beta, EXACT, "exact")
    return sum(int((found.point.values[n] == k).sum()) for n, a in energy.graph.kinks.items() for k in a.kinks)


@pytest.mark.parametrize("name", ["mlp relu", "mlp leaky", "mlp hardtanh", "conv relu"])
def test_some_units_rest_exactly_at_a_kink(name):
    assert at_kinks(name, 0.5) > 0


def test_unit_pushed_below_zero_rests_at_zero():
    model = mlp(nn.ReLU, 1, 1, 1).double()
    for p, value in zip(model.parameters(), (1.0, 0.0, 1.0, 0.0), strict=True):
        nn.init.constant_(p, value)
    x, y = torch.tensor([[[0.1]], [[-5.0]]], dtype=torch.float64)
    _, found = settled(model, x, y, "mse", 0.1, EXACT, "exact")
    s, out = torch.meshgrid(torch.linspace(-1, 1, 2001), torch.linspace(-3, 1, 2001), indexing="ij")
    value = 0.5 * (s - 0.1) ** 2 + 0.5 * (out - s.relu()) ** 2 + 0.1 * (out + 5) ** 2
    best = value.argmin()
    assert found.point.values["0"].item() == 0.0 == round(s.flatten()[best].item(), 3)
    assert math.isclose(found.point.values["2"].item(), out.flatten()[best].item(), abs_tol=2e-3)
    assert math.isclose(found.errors["0"].item(), 0.1 / 0.1)


@pytest.mark.parametrize("seed", range(5))
def test_exact_equilibrium_is_among_those_found_by_brute_force(seed):
    torch.manual_seed(seed)
    model, x, y = mlp(nn.ReLU, 2, 4, 2).double(), torch.randn(4, 2).double(), 2 * torch.randn(4, 2).double()
    with torch.no_grad():
        model[2].weight.mul_(2)
    beta = 0.4
    _, found = settled(model, x, y, "mse", beta, EXACT, "exact")
    _, free = free_energy(model, x)
    assert found.result is mep.Result.CONVERGED
    for i in range(4):
        one = slice(i, i + 1)

        def total(states, slopes, one=one):
            predict = predictions_of_modules(model, x[one], activate=lambda _, h: slopes * h)
            return nudged_energy(predict, "2", COSTS["mse"].value, y[one], beta)(states)

        s = {n: found.point.values[n][one] for n in ("0", "2")}
        equilibria = list(kinked_equilibria(total, s, "0"))
        same = [where for where, e in equilibria if all((e[n] - s[n]).norm() < 1e-8 for n in s)]
        assert same, f"{len(equilibria)} equilibria, none of them found"
        assert not ((same[0] > 0) & (free.values["0"][one] < 0)).any(), "an inactive unit woke up"


@pytest.mark.parametrize("name", ["mlp relu", "conv relu"])
def test_units_inactive_in_the_free_phase_stay_inactive(name):
    model, x, y = problem(NETWORKS[name])
    energy, free = free_energy(model, x)
    _, found = settled(model, x, y, "cross_entropy", 0.5, EXACT, "exact")
    for n in energy.graph.nodes[:-1]:
        s, mu = found.point.values[n.name], found.point.predictions[n.name]
        asleep = (free.values[n.name] < 0) & (mu <= 0)
        assert asleep.any()
        torch.testing.assert_close(s[asleep], mu[asleep], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp relu", "mlp hardtanh", "conv relu"])
def test_residual_of_an_exact_equilibrium_is_true_on_the_way(name):
    """|distance of zero from the subdifferential| / max(|error|, |what balances it|)."""
    model, x, y = problem(NETWORKS[name])
    for sweeps in (1, 2, 4, 30):
        solver = mep.Sweep(sweeps, adaptive=False)
        energy, found = settled(model, x, y, "cross_entropy", 0.5, solver, "exact")
        states = {node.name: found.point.values[node.name] for node in energy.graph.states}
        left, right = (
            forces(nudged_energy(predict, energy.graph.output, COSTS["cross_entropy"].value, y, 0.5), states)
            for predict in (predictions_of_graph(energy.graph, energy.inputs, side=side) for side in (-1, 1))
        )
        worst = []
        for n, s in states.items():
            distance = distance_to_rest(left[n], right[n])
            error = s - found.point.predictions[n]
            balance = (distance.copysign(torch.where(left[n] > 0, left[n], right[n])) - error).flatten(1).norm(dim=1)
            scale = torch.maximum(error.flatten(1).norm(dim=1), balance).clamp_min(1e-12)
            worst.append(distance.flatten(1).norm(dim=1) / scale)
        torch.testing.assert_close(found.residual, torch.stack(worst).amax(0), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("branches", ["held", "exact"])
@pytest.mark.parametrize(("phases", "order", "beta"), [("one-sided", 1, 1e-3), ("centered", 2, 1e-2)])
@pytest.mark.parametrize("name", NETWORKS)
def test_both_have_the_order_of_the_contrast(name, phases, order, beta, branches):
    model, x, y = problem(NETWORKS[name], batch=4)
    exact = backprop(model, COSTS["cross_entropy"].value(model(x), y).mean())
    errors = []
    for b in (beta, beta / 2):
        ep = mep.EquilibriumPropagation(model, beta=b, phases=phases, branches=branches, solver=mep.Sweep(tol=1e-11))
        found, estimate = ep.gradients(x, y)
        assert estimate.converged and estimate.beta == b
        errors.append(sum((found[p] - g).square().sum() for p, g in exact.items()).sqrt())
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.2


def test_held_branches_follow_the_tangent_beyond_the_kink():
    for make in (*KINKED.values(), *OFF_THE_ORIGIN):
        module = make()
        activation = of_module(module)
        torch.manual_seed(0)
        x0, x = 3 * torch.randn(2, 500).double()
        torch.testing.assert_close(activation.linearized(x, x0), line(module, x0, x))
        torch.testing.assert_close(activation.linearized(x0, x0), module(x0))


@pytest.mark.parametrize("solver", [TIGHT, mep.Descent(adaptive=True, settle_steps=2000)])
def test_left_branch_is_the_fraction_of_units_beyond_their_kink(solver):
    model, x, y = problem(NETWORKS["mlp relu"])
    ep = mep.EquilibriumPropagation(model, beta=1.0, solver=solver, diagnostics=True)
    _, estimate = ep.gradients(x, y)
    assert estimate.beta == 1.0
    _, free = free_energy(model, x)
    _, found = settled(model, x, y, "cross_entropy", 1.0, solver)
    left = sum(int((free.values[n] > 0).ne(found.point.values[n] > 0).sum()) for n in ("0", "2"))
    assert 0 < left < 192
    assert math.isclose(estimate.left_branch, left / (2 * 12 * 8))


def test_left_branch_counts_winners_of_max_pooling():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 3, 2), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(3, 3)).double()
    x, y = torch.randn(40, 1, 3).double(), torch.randint(3, (40,))
    _, estimate = mep.EquilibriumPropagation(model, beta=2.0, solver=TIGHT, diagnostics=True).gradients(x, y)
    _, free = free_energy(model, x)
    _, found = settled(model, x, y, "cross_entropy", estimate.beta, TIGHT)
    left = free.values["0"].argmax(2).ne(found.point.values["0"].argmax(2)).sum().item()
    assert left > 0 and math.isclose(estimate.left_branch, left / (40 * 3))


def test_kinks_inside_a_module_kept_whole_are_held_too():
    """Else a ReLU in the encoder flips at every sweep, and the residual stalls at a few percent."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, activation="relu", batch_first=True)
    model = nn.Sequential(nn.Linear(8, 32), encoder, nn.Flatten(), nn.Linear(256, 10)).double()
    x, y = torch.randn(64, 8, 8).double(), torch.randint(10, (64,))
    estimate = mep.EquilibriumPropagation(model, beta=0.01, solver=mep.Sweep(tol=1e-3))(x, y)
    assert estimate.converged and estimate.iterations < 10
