"""The largest step of descent: the stiffness against dense Hessians, and what happens on either side of it."""

import pytest
import torch
from cases import COSTS, MODELS, free_energy, mlp
from reference import nudged_energy, predictions_of_graph
from torch import nn

import mep
from mep.cost import make_cost
from mep.energy import nudge
from mep.settle import Result, settle
from mep.solvers.descent import largest_step, stiffness

BETA, MOMENTUM = 0.3, 0.5


def stiff(activation=nn.ReLU, gain=5.0):
    """A model whose weights have grown."""
    torch.manual_seed(0)
    model = mlp(activation, 4, 6, 5, 3).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(gain)
    return model, torch.randn(5, 4).double(), torch.randint(3, (5,))


@torch.no_grad()
def nudged(model, x, y, beta=BETA):
    energy, point = free_energy(model, x)
    return nudge(energy, make_cost("cross_entropy")(energy.output(point), y), beta), point


@torch.no_grad()
def ended(energy, point, **options):
    return settle(energy, point, mep.Descent(**options))


def dense_stiffness(energy, point, y, beta=BETA):
    """The largest eigenvalue of every example's Hessian, by autograd over the whole energy: [batch]."""
    free = energy.state(point)
    names, shapes = list(free), [s.shape for s in free.values()]
    sizes = [s[0].numel() for s in free.values()]
    predict = predictions_of_graph(energy.graph, energy.inputs, free)
    total = nudged_energy(predict, energy.graph.output, COSTS["cross_entropy"].value, y, beta)

    def f(flat):
        parts = flat.split(sizes, 1)
        return total({n: part.reshape(shape) for n, part, shape in zip(names, parts, shapes, strict=True)}).sum()

    at = torch.cat([s.flatten(1) for s in free.values()], 1)
    hessian = torch.autograd.functional.hessian(f, at, vectorize=True)
    return torch.stack([torch.linalg.eigvalsh(hessian[i, :, i])[-1] for i in range(len(at))])


@pytest.mark.parametrize("name", ["mlp relu", "mlp tanh", "conv relu maxpool"])
def test_stiffness_is_the_largest_eigenvalue_of_the_hessian(name):
    model, x, y = MODELS[name].build()
    energy, point = nudged(model, x, y)
    exact, found = dense_stiffness(energy, point, y), stiffness(energy, point)
    assert (found <= 1.02 * exact).all() and (found >= 0.8 * exact).all()


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_descent_converges_below_the_largest_step_and_runs_away_above_it(activation, momentum):
    model, x, y = stiff(activation, 1.5)
    energy, point = nudged(model, x, y, 1e-3)
    largest = 2 * (1 + momentum) / float(dense_stiffness(energy, point, y, 1e-3).max())
    with torch.no_grad():
        assert 0.98 * largest <= largest_step(energy, point, momentum) <= 1.25 * largest
    options = {"settle_steps": 1000, "momentum": momentum, "adaptive": True}
    assert ended(energy, point, settle_lr=0.95 * largest, **options).result is Result.CONVERGED
    assert ended(energy, point, settle_lr=1.05 * largest, **options).result is Result.DIVERGED


@torch.no_grad()
def test_an_unknown_step_is_half_of_the_largest():
    model, x, y = stiff()
    energy, point = nudged(model, x, y)
    assert ended(energy, point, settle_steps=60).result is Result.DIVERGED
    lr = largest_step(energy, point, MOMENTUM) / 2
    found = ended(energy, point, settle_steps=60, settle_lr=None)
    expected = ended(energy, point, settle_steps=60, settle_lr=lr)
    assert found.result is expected.result is Result.FIXED_STEPS
    for name, s in expected.point.values.items():
        torch.testing.assert_close(found.point.values[name], s, rtol=0, atol=0)


@torch.no_grad()
def test_what_diverged_tells_a_step_that_does_not():
    model, x, y = stiff()
    energy, point = nudged(model, x, y)
    largest = largest_step(energy, point, MOMENTUM)
    assert largest < 0.15
    assert f"below {largest:.2g}" in mep.Descent().failure_hint(energy, point)
    for lr in (None, 0.5 * largest):
        hint = mep.Descent(settle_lr=lr).failure_hint(energy, point)
        assert hint == "more settle_steps, a smaller beta, or mep.Sweep."


@torch.no_grad()
def test_stiffness_draws_no_random_numbers():
    model, x, y = stiff()
    energy, point = nudged(model, x, y)
    before = torch.get_rng_state()
    first, second = stiffness(energy, point), stiffness(energy, point)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(first, second)


@pytest.mark.parametrize("settle_lr", [0, -1.0, float("inf"), float("nan"), "auto"])
def test_other_steps_are_refused(settle_lr):
    with pytest.raises(mep.ArgumentError, match="settle_lr"):
        mep.Descent(settle_lr=settle_lr)
