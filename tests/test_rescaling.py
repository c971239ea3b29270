"""The best multiple of an error that a linear network has answered, without asking it again."""

import pytest
import torch
from cases import MODELS, convolutional, free_energy
from torch import nn

import mep
from mep.cost import make_cost
from mep.energy import nudge
from mep.solvers import memory
from mep.solvers.output import output_residual, rescaled
from mep.solvers.response import Response

BATCH, FEATURES, BETA, TOL = 7, 5, 0.3, 1e-2


class Blocks(nn.Module):
    """Two paths that meet again, so that states share their errors."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.first(x)
        return self.last(h + self.inner(torch.relu(h)))


NETWORKS = {"mlp": MODELS["mlp relu"].model, "residual": Blocks, "convolutional": convolutional}


def trial_of(cost_name, k=1.5):
    """A cost, the free output, an error that is off, and how a network of per-example gains near k answers it."""
    torch.manual_seed(0)
    free = torch.randn(BATCH, FEATURES).double()
    target = torch.randint(0, FEATURES, (BATCH,)) if cost_name == "cross_entropy" else torch.randn_like(free)
    cost = make_cost(cost_name)(free, target)
    a = torch.randn(BATCH, FEATURES, FEATURES).double()
    gain = k * torch.eye(FEATURES).double() + 0.1 * a @ a.mT
    x = 1.2 * cost.gradient(free)
    output = free - BETA * (gain @ x.unsqueeze(2)).squeeze(2)
    wanted = cost.gradient(output)
    return cost, free, (x, output, wanted), output_residual(x, wanted, output)


def test_of_squared_errors_it_is_the_least_squares_fit():
    cost, free, (x, output, wanted), residual = trial_of("mse")
    (_, a, _) = rescaled(cost, free, (x, output, wanted), residual, tol=1e-9)
    shift, slope = free - output, 2 / FEATURES
    # dC(free - a shift) - a x = slope (free - y) - a (slope shift + x)
    asked, column = cost.gradient(free), slope * shift + x
    fit = torch.linalg.lstsq(column.unsqueeze(2), asked.unsqueeze(2)).solution.flatten()
    torch.testing.assert_close(a, fit)


@pytest.mark.parametrize("cost_name", ["cross_entropy", "mse"])
def test_it_is_a_trial_that_leaves_less(cost_name):
    cost, free, (x, output, wanted), before = trial_of(cost_name)
    (scaled, moved, asked), a, after = rescaled(cost, free, (x, output, wanted), before, TOL)
    torch.testing.assert_close(scaled, a[:, None] * x)
    torch.testing.assert_close(moved, free - a[:, None] * (free - output))
    torch.testing.assert_close(asked, cost.gradient(moved))
    torch.testing.assert_close(after, output_residual(scaled, asked, moved))
    assert (before > TOL).all() and (after < before / 2).all()


def test_what_has_settled_rests():
    cost, free, (x, output, wanted), before = trial_of("cross_entropy")
    tol = float(before.median())
    (scaled, moved, asked), a, after = rescaled(cost, free, (x, output, wanted), before, tol)
    rests = before <= tol
    assert rests.any() and not rests.all()
    for new, old in ((scaled, x), (moved, output), (asked, wanted), (after, before)):
        assert torch.equal(new[rests], old[rests]) and not (new == old)[~rests].all()
    assert (a[rests] == 1).all()


def test_a_cost_whose_hessian_is_not_known_is_left_alone():
    _, free, trial, residual = trial_of("mse")
    cost = make_cost(lambda output, target: (output - target).pow(4).sum(1))(free, torch.zeros_like(free))
    assert rescaled(cost, free, trial, residual, TOL) is None


def responses(make, count):
    """So many responses of one network, and its energy."""
    torch.manual_seed(0)
    net = make().double()
    x = torch.randn(BATCH, *(6 if make is convolutional else 4,)).double()
    energy, point = free_energy(net, x)
    output = energy.output(point)
    nudged = nudge(energy, make_cost("mse")(output, torch.zeros_like(output)), BETA)
    return nudged, [Response(nudged, point) for _ in range(count)], torch.randn_like(output)


def assert_same(energy, one, other):
    for name in energy.state(one.point):
        torch.testing.assert_close(one.errors[name], other.errors[name])
        torch.testing.assert_close(one.point.values[name], other.point.values[name])
    gradients = [energy.parameter_gradient(r.point, r.errors, 1.0) for r in (one, other)]
    for p, g in gradients[0].items():
        torch.testing.assert_close(g, gradients[1][p])


@torch.no_grad()
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_a_rescaled_response_is_that_to_the_multiple(make):
    energy, (one, other), x = responses(make, 2)
    a = torch.rand(BATCH).double() + 0.5
    one.answer(x, None, None)
    one.rescale(a, None)
    other.answer(a[:, None] * x, None, None)
    assert_same(energy, one, other)


@torch.no_grad()
@pytest.mark.parametrize("scaled_before", [False, True])
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_rows_have_multiples_of_their_own(make, scaled_before):
    energy, (one, other), x = responses(make, 2)
    rows, a, b = torch.tensor([4, 1, 6]), torch.rand(BATCH).double() + 0.5, torch.tensor([0.7, 1.1, 2.0]).double()
    again = torch.randn(3, x.shape[1]).double()
    expected = a[:, None] * x if scaled_before else x.clone()
    one.answer(x, None, None)
    if scaled_before:
        one.rescale(a, None)
    one.answer(again, rows, None)
    other.answer(expected.index_copy(0, rows, again), None, None)
    assert_same(energy, one, other)
    one.rescale(b, rows)
    other.answer(expected.index_copy(0, rows, b[:, None] * again), None, None)
    assert_same(energy, one, other)


@pytest.mark.parametrize("cheap", [0, 1 << 40])
def test_the_equilibrium_is_the_same(monkeypatch, cheap):
    """Whether multiples are tried after the first sweep decides how one gets there, not where."""
    monkeypatch.setattr(memory, "_CHEAP", cheap)
    torch.manual_seed(0)
    net, x, y = convolutional().double(), torch.randn(20, 6).double(), torch.randint(0, 3, (20,))
    found = []
    for options in ({}, {"history": 0}):
        solver = mep.Sweep(tol=1e-9, settle_steps=100, **options)
        gradients, estimate = mep.EquilibriumPropagation(net, beta=0.05, solver=solver).gradients(x, y)
        assert estimate.converged
        found.append(gradients)
    for p, g in found[0].items():
        torch.testing.assert_close(g, found[1][p], rtol=1e-6, atol=1e-10)
