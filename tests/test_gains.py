"""The whole gain of an example, and the equation at the output that it turns into one without a network."""

import math

import pytest
import torch
from cases import MODELS, convolutional, free_energy, mlp, settled
from reference import energy as written_energy
from reference import nudged_energy, predictions_of_graph, residual
from torch import nn

import mep
from mep.cost import make_cost
from mep.energy import nudge
from mep.solvers import memory
from mep.solvers.checkpointed import Checkpointed, Forgotten
from mep.solvers.newton import solved
from mep.solvers.response import Response

BATCH, UNITS = 6, 4
MANY = 12
"""Sweeps that are enough at any strength: four until all are asked for their gain, one more, and some to spare."""


class Residual(nn.Module):
    """Blocks that add to what they read, `depth` of them."""

    def __init__(self, depth, width=12):
        super().__init__()
        self.first, self.last = nn.Linear(4, width), nn.Linear(width, 3)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x):
        h = self.first(x)
        for block in self.blocks:
            h = h + block(torch.relu(h))
        return self.last(h)


class Outputs(nn.Module):
    """An output that is a sum of layers, one of them of the input alone."""

    def __init__(self):
        super().__init__()
        self.past, self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.past(x) + self.second(torch.relu(self.first(x)))


NETWORKS = {
    "mlp": (MODELS["mlp relu"].model, (4,)),
    "residual": (lambda: Residual(3), (4,)),
    "sum": (Outputs, (4,)),
    "convolutional": (convolutional, (6,)),
}


def equation(cost_name, scale):
    """A cost, the free output, and a gain of that scale: symmetric, positive semidefinite, of half the rank."""
    torch.manual_seed(0)
    free, a = 3 * torch.randn(BATCH, UNITS).double(), torch.randn(BATCH, UNITS, UNITS // 2).double()
    target = torch.randint(UNITS, (BATCH,)) if cost_name == "cross_entropy" else torch.randn_like(free)
    return make_cost(cost_name)(free, target), free, scale * a @ a.mT


# The equation.


def test_of_squared_errors_it_is_linear():
    cost, free, k = equation("mse", 5.0)
    exact = torch.linalg.solve(torch.eye(UNITS) + 2 / UNITS * k, cost.gradient(free))
    torch.testing.assert_close(solved(cost, free, k, torch.zeros_like(free), 1e-12), exact)


@pytest.mark.parametrize("start", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e5])
@pytest.mark.parametrize("cost_name", ["cross_entropy", "mse"])
def test_it_is_solved_from_everywhere_at_every_strength(cost_name, scale, start):
    cost, free, k = equation(cost_name, scale)
    x = solved(cost, free, k, start * torch.randn_like(free), 1e-9)
    wanted = cost.gradient(free - (k @ x.unsqueeze(2)).squeeze(2))
    assert ((x - wanted).norm(dim=1) <= 2e-9 * x.norm(dim=1)).all()


def test_the_output_is_the_proximal_point():
    """It minimises `C(s) + 1/2 |s - free|^2` in the metric of the inverse gain."""
    cost, free, k = equation("cross_entropy", 1.0)
    k = k + torch.eye(UNITS)
    x = solved(cost, free, k, torch.zeros_like(free), 1e-12)
    s = (free - (k @ x.unsqueeze(2)).squeeze(2)).requires_grad_()
    away = (s - free).unsqueeze(2)
    total = cost.value(s).sum() + 0.5 * (away.mT @ torch.linalg.solve(k, away)).sum()
    (gradient,) = torch.autograd.grad(total, s)
    assert gradient.abs().max() < 1e-10
    for _ in range(20):
        other = s.detach() + 0.1 * torch.randn_like(s)
        away = (other - free).unsqueeze(2)
        assert cost.value(other).sum() + 0.5 * (away.mT @ torch.linalg.solve(k, away)).sum() > total


@pytest.mark.parametrize("cost_name", ["cross_entropy", "probabilities", "positions", "mse"])
def test_no_hessian_is_steeper_than_the_cost_says(cost_name):
    torch.manual_seed(0)
    shape = (50, 3, 2) if cost_name == "positions" else (50, 3)
    output = 2 * torch.randn(shape).double()
    output[0] = 0
    output[0, 2] = -50  # two classes of equal probability: the steepest there is
    target = {
        "cross_entropy": torch.randint(3, (50,)),
        "positions": torch.randint(3, (50, 2)),
        "probabilities": 2 * torch.rand(50, 3).double(),
        "mse": torch.randn_like(output),
    }[cost_name]
    cost = make_cost("mse" if cost_name == "mse" else "cross_entropy")(output, target)
    hessians = torch.stack([
        torch.autograd.functional.hessian(
            lambda s, i=i: cost.value(output.index_put((torch.tensor([i]),), s.unsqueeze(0)))[i], output[i]
        ).reshape(math.prod(shape[1:]), -1)
        for i in range(50)
    ])  # fmt: skip
    steepest = torch.linalg.eigvalsh(hessians).max()
    assert steepest <= cost.smoothness * (1 + 1e-9)
    if cost_name != "probabilities":
        assert steepest == pytest.approx(cost.smoothness)


# The gain.


def gain_by_hand(energy, point):
    """`sum_n A_n A_n^T`, from what the output does when one unit of one state is moved at a time."""
    free, found = energy.output(point), 0
    up = nudge(energy, energy.nudge.cost, -1.0)  # s = mu + error
    for node in energy.graph.states:
        for unit in range(point.values[node.name][0].numel()):
            errors = {n.name: torch.zeros_like(point.values[n.name]) for n in energy.graph.states}
            errors[node.name].view(len(free), -1)[:, unit] = 1
            column = (energy.output(up.following(errors)) - free).unsqueeze(2)
            found = found + column @ column.mT
    return found


@torch.no_grad()
@pytest.mark.parametrize("in_little_memory", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_gains_are_what_moving_every_unit_tells(name, in_little_memory):
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    energy, point = free_energy(make().double(), torch.randn(BATCH, *shape).double())
    output = energy.output(point)
    energy = nudge(energy, make_cost("mse")(output, torch.zeros_like(output)), 0.1)
    exact, rows = gain_by_hand(energy, point), torch.tensor([4, 1, 5, 0])
    answers = Checkpointed(energy, Forgotten(energy)) if in_little_memory else Response(energy, point)
    torch.testing.assert_close(answers.gains(rows), exact[rows])
    x = torch.randn_like(output)
    shift = 0.1 * (exact @ x.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(answers.answer(x, None, None).output, output - shift)


@pytest.mark.parametrize("total", [0.3, 1.0, 20.0])
def test_the_hessian_of_targets_that_sum_to_anything(total):
    torch.manual_seed(0)
    output, target = torch.randn(5, 3).double(), total * torch.rand(5, 3).double().softmax(1)
    cost = make_cost("cross_entropy")(output, target)
    d, p = cost.curvature(output, cost.gradient(output))
    for i in range(5):
        hessian = torch.autograd.functional.hessian(lambda s, i=i: -(target[i] * s.log_softmax(0)).sum(), output[i])
        torch.testing.assert_close(d[i].diag() - p[i].outer(p[i]), hessian)


# Settling.


def steep(depth=20, scale=1.1):
    """A network and a batch that some sweeps with multiples of the identity do not settle at beta 1."""
    torch.manual_seed(0)
    model, x, y = mlp(nn.ReLU, *[16] * depth, 3).double(), torch.randn(8, 16).double(), torch.randint(3, (8,))
    for m in model:
        if isinstance(m, nn.Linear):
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
            m.weight.data.mul_(scale)
    return model, x, y


@pytest.mark.parametrize("cost", ["cross_entropy", "mse"])
@pytest.mark.parametrize("beta", [1.0, 30.0, 1000.0])
def test_an_affine_network_settles_at_every_strength(beta, cost):
    model, x, y = steep()
    target = y if cost == "cross_entropy" else nn.functional.one_hot(y, 3).double()
    energy, found = settled(model, x, target, cost, beta, mep.Sweep(tol=1e-6, strength=math.inf))
    assert found.result is mep.Result.CONVERGED and found.iterations <= MANY and energy.beta == beta
    with torch.no_grad():
        free, states = energy.state(energy.graph.evaluate(energy.inputs, energy.held)), energy.state(found.point)
    predict = predictions_of_graph(energy.graph, energy.inputs, free)
    total = nudged_energy(predict, energy.graph.output, lambda s, t: energy.nudge.cost.value(s), target, beta)
    assert (residual(predict, total, states) <= 1.001e-6).all()
    gradients = energy.parameter_gradient(found.point, found.errors, 1)
    exact = torch.autograd.grad(written_energy(predict, states).sum() / beta, list(gradients))
    for g, e in zip(gradients.values(), exact, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-9)


def test_without_gains_it_does_not(monkeypatch):
    monkeypatch.setattr(memory.Memory, "may_know_gains", lambda self, sweeps: False)
    model, x, y = steep()
    energy, _ = settled(model, x, y, "cross_entropy", 30.0, mep.Sweep(tol=1e-6, strength=math.inf))
    assert isinstance(energy.beta, torch.Tensor) and float(energy.beta.min()) < 30.0


@pytest.mark.parametrize("cost", ["cross_entropy", "mse"])
@pytest.mark.parametrize("beta", [1.0, 30.0])
def test_away_from_the_target_no_saddle_is_taken_for_an_equilibrium(beta, cost):
    """The Hessian of the nudged energy, `I + H k` at the output, is positive definite for every example."""
    model, x, y = steep()
    target = y if cost == "cross_entropy" else nn.functional.one_hot(y, 3).double()
    energy, found = settled(model, x, target, cost, -beta, mep.Sweep(tol=1e-6))
    assert found.result is mep.Result.CONVERGED and (energy.beta < 0).all() and (energy.beta > -beta).any()
    with torch.no_grad():
        free, point = free_energy(model, x)
        m, output = gain_by_hand(nudge(free, energy.nudge.cost, beta), point), found.point.values[energy.graph.output]
        d, p = energy.nudge.cost.curvature(output, energy.nudge.cost.gradient(output))
    hessian = d.diag_embed() - (0 if p is None else p.unsqueeze(2) * p.unsqueeze(1))
    product = torch.eye(3) + energy.beta.view(-1, 1, 1) * hessian @ m
    assert torch.linalg.eigvals(product).real.min() > 0


@pytest.mark.parametrize("cost", ["mse", lambda s, t: (s - t).cosh().log()], ids=["mse", "custom"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_an_output_of_one_number_without_a_dimension(activation, cost):
    torch.manual_seed(0)
    model, x, y = (
        nn.Sequential(mlp(activation, 4, 8, 1), nn.Flatten(0)).double(),
        torch.randn(6, 4).double(),
        torch.randn(6),
    )
    exact = torch.autograd.grad(
        (model(x) - y).square().mean() if cost == "mse" else cost(model(x), y).mean(), model.parameters()
    )
    gradients, estimate = mep.EquilibriumPropagation(model, cost, beta=1e-5, solver=mep.Sweep(tol=1e-8)).gradients(
        x, y.double()
    )
    assert estimate.converged
    for g, e in zip(gradients.values(), exact, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("depth", [10, 100])
def test_sweeps_do_not_grow_with_depth(depth):
    torch.manual_seed(0)
    model, x, y = Residual(depth).double(), torch.randn(32, 4).double(), torch.randint(3, (32,))
    for beta in (0.01, 0.1):
        asked = mep.EquilibriumPropagation(model, beta=beta, solver=mep.Sweep(strength=math.inf)).gradients(x, y)[1]
        assert asked.converged and asked.beta == beta and asked.iterations <= 5
        least = mep.EquilibriumPropagation(model, beta=beta).gradients(x, y)[1]
        assert least.converged and least.beta <= beta and least.iterations <= 4


def test_a_fixed_number_of_sweeps_is_of_products_only(monkeypatch):
    monkeypatch.setattr(Response, "gains", lambda self, rows: pytest.fail("asked for more"))
    model, x, y = steep()
    estimate = mep.EquilibriumPropagation(model, beta=1.0, solver=mep.Sweep(8, adaptive=False)).gradients(x, y)[1]
    assert estimate.iterations == 8 and estimate.beta == 1.0


@pytest.mark.parametrize("strength", [0.5, math.inf])
@pytest.mark.parametrize("phases", ["one-sided", "centered"])
def test_little_memory_makes_no_difference(phases, strength):
    (model, x, y), solver = steep(scale=1.0), mep.Sweep(strength=strength)
    found = []
    for checkpoint in (False, True):
        ep = mep.EquilibriumPropagation(model, beta=0.2, phases=phases, solver=solver, checkpoint=checkpoint)
        gradients, estimate = ep.gradients(x, y)
        assert estimate.converged
        found.append((gradients, estimate))
    (one, first), (other, second) = found
    assert first.beta == pytest.approx(second.beta) and first.iterations == second.iterations
    for p, g in one.items():
        torch.testing.assert_close(g, other[p])


def test_the_equilibrium_does_not_depend_on_who_else_is_asked():
    """The few that are left tell their gain in walks of their own."""
    model, x, y = steep()
    solver = mep.Sweep(tol=1e-10, strength=math.inf)
    together = mep.EquilibriumPropagation(model, beta=1.0, solver=solver).gradients(x, y)[0]
    alone = [
        mep.EquilibriumPropagation(model, beta=1.0, solver=solver).gradients(x[i : i + 1], y[i : i + 1])[0]
        for i in range(len(x))
    ]
    for p, g in together.items():
        torch.testing.assert_close(g, sum(a[p] for a in alone) / len(x), rtol=1e-7, atol=1e-10)
