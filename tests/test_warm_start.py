"""Warm starts: settling begins at the equilibrium of the same examples, and ends where it would end anyway."""

import copy

import pytest
import torch
from torch import nn

import mep
from mep.errors import ArgumentError, InputError
from mep.estimators.warm_start import EquilibriumCache

SOLVERS = {
    "descent": (mep.Descent(tol=1e-6, settle_steps=2000, adaptive=True), {}),
    "hopfield": (mep.Descent(tol=1e-6, settle_steps=4000, settle_lr=0.3, adaptive=True), {"energy": "hopfield"}),
}


def problem(name):
    torch.manual_seed(0)
    act = nn.Hardtanh if name == "hopfield" else nn.Tanh
    net = nn.Sequential(nn.Linear(6, 8), act(), nn.Linear(8, 7), act(), nn.Linear(7, 3)).double()
    solver, given = SOLVERS[name]
    ep = mep.EquilibriumPropagation(net, solver=solver, beta=0.3, **given)
    return ep, torch.randn(10, 6).double(), torch.arange(10) % 3


def gradient(ep, x, y, indices=None):
    found, estimate = ep.gradients(x, y, indices)
    assert estimate.converged
    return torch.cat([g.flatten() for g in found.values()]), estimate.iterations


@pytest.mark.parametrize("name", SOLVERS)
def test_the_same_examples_begin_where_they_ended(name):
    ep, x, y = problem(name)
    cold, first = gradient(copy.deepcopy(ep), x, y)
    indices = torch.randperm(30)[:10]
    unseen, steps = gradient(ep, x, y, indices)
    again, warm = gradient(ep, x, y, indices)
    assert warm < steps == first
    torch.testing.assert_close(unseen, cold, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(again, cold, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
def test_examples_are_known_by_their_index(name):
    """In another order, and among others that are new: the equilibria are the same."""
    ep, x, y = problem(name)
    gradient(ep, x[:6], y[:6], torch.arange(6))
    order = torch.tensor([7, 3, 0, 9, 5, 1, 8, 2, 4, 6])
    mixed, _ = gradient(ep, x[order], y[order], order)
    cold, _ = gradient(problem(name)[0], x, y)
    torch.testing.assert_close(mixed, cold, rtol=1e-4, atol=1e-6)


def test_a_misleading_index_costs_steps_but_not_the_result():
    ep, x, y = problem("descent")
    gradient(ep, x, y, torch.arange(10))
    wrong, _ = gradient(ep, x, y, torch.arange(10).flip(0))
    torch.testing.assert_close(wrong, gradient(problem("descent")[0], x, y)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
def test_memory_survives_a_checkpoint(name):
    ep, x, y = problem(name)
    indices = torch.arange(10)
    gradient(ep, x, y, indices)
    resumed = problem(name)[0]
    resumed.load_state_dict(ep.state_dict())
    here, there = gradient(ep, x, y, indices), gradient(resumed, x, y, indices)
    assert torch.equal(here[0], there[0]) and here[1] == there[1]


def test_a_refused_batch_is_not_remembered():
    ep, x, y = problem("descent")
    before = ep.state_dict()
    with pytest.raises(InputError):
        ep.gradients(x, y + 7, torch.arange(10))
    assert ep.state_dict()["recall"]["rows"].keys() == before["recall"]["rows"].keys()
    assert not ep.state_dict()["recall"]["seen"].any()


def test_step_takes_indices():
    ep, x, y = problem("descent")
    opt = mep.EPOptimizer(ep, torch.optim.SGD(ep.model.parameters(), lr=0.0))
    steps = []
    for _ in range(2):
        opt.step(x=x, target=y, indices=torch.arange(10))
        steps.append(opt.last.iterations)
    assert steps[1] < steps[0]


@pytest.mark.parametrize("indices", [[0, 1], torch.arange(9), torch.arange(10).float(), torch.arange(10) - 1, "all"])
def test_what_does_not_name_the_examples_is_refused(indices):
    ep, x, y = problem("descent")
    with pytest.raises(InputError, match="indices must be 10 integers"):
        ep.gradients(x, y, indices)


@pytest.mark.parametrize("solver", [mep.Sweep(), mep.Local()])
def test_solvers_that_begin_elsewhere_refuse_indices(solver):
    ep = mep.EquilibriumPropagation(nn.Linear(3, 2), solver=solver)
    with pytest.raises(ArgumentError, match="does not begin at earlier equilibria"):
        ep(torch.ones(2, 3), torch.tensor([0, 1]), torch.arange(2))


def test_backprop_keeps_no_equilibria():
    net = nn.Linear(3, 2)
    opt = mep.muon_backprop(net.parameters(), model=net)
    with pytest.raises(ArgumentError, match="indices"):
        opt.step(x=torch.ones(2, 3), target=torch.tensor([0, 1]), indices=torch.arange(2))


def test_rows_grow_and_are_forgotten_when_the_states_change_shape():
    recall = EquilibriumCache()
    recall.keep(torch.tensor([1]), {"s": torch.ones(1, 2)})
    recall.keep(torch.tensor([5]), {"s": 2 * torch.ones(1, 2)})
    values, seen = recall.of(torch.tensor([1, 5, 9]), {"s": torch.zeros(3, 2)})
    assert torch.equal(values["s"].sum(1), torch.tensor([2.0, 4.0, 0.0])) and seen.tolist() == [True, True, False]
    _, seen = recall.of(torch.tensor([1, 5]), {"s": torch.zeros(2, 3)})
    assert not seen.any()


def in_dtype(dtype, beta, tol=1e-4):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 16), nn.Hardtanh(0, 1), nn.Linear(16, 3)).to(dtype)
    solver = mep.Descent(tol=tol, settle_steps=200, settle_lr=0.3, adaptive=True)
    ep = mep.EquilibriumPropagation(net, cost="one_hot_mse", energy="hopfield", beta=beta, solver=solver)
    x, y = torch.rand(8, 20, dtype=dtype), torch.arange(8) % 3
    return lambda indices: ep.gradients(x, y, indices)[1]


@pytest.mark.parametrize("indices", [None, torch.arange(8)])
def test_a_tolerance_below_the_rounding_of_the_states_is_out_of_reach_from_any_start_and_the_advice_helps(indices):
    """A weak nudge moves states by little more than their last digits, wherever settling begins."""
    with pytest.warns(mep.errors.NotConvergedWarning, match="a larger tol, a larger beta, or float64"):
        settle = in_dtype(torch.float32, beta=1e-3)
        settle(indices)
    assert not settle(indices).converged
    others = {"dtype": torch.float64}, {"beta": 0.1}, {"tol": 1e-2}
    for better in others:
        settle = in_dtype(**{"dtype": torch.float32, "beta": 1e-3, **better})
        assert settle(indices).converged and settle(indices).converged
