"""An energy over groups of nodes: lateral connections with weights that learn, against implicit differentiation."""

import math
from dataclasses import replace

import pytest
import torch
from cases import Lateral, free_energy
from torch import nn

import mep
from mep.cost import make_cost
from mep.energy import nudge


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    lateral = Lateral(0.1 * torch.randn(8, 8).double())
    return net, lateral, torch.randn(6, 4).double(), torch.randint(3, (6,))


def exact_gradient(net, lateral, x, y, parameters):
    """At the free equilibrium the second state is on its prediction, and the first solves `s - mu + W s = 0`."""
    W = (lateral.weight + lateral.weight.T) / 2
    s = torch.linalg.solve(torch.eye(8).double() + W, net[0](x).T).T
    return torch.autograd.grad(nn.functional.cross_entropy(net[2](torch.tanh(s)), y), parameters)


@pytest.mark.parametrize(("phases", "order"), [("one-sided", 1), ("centered", 2)])
def test_gradient_of_all_parameters_errs_by_the_order_of_the_contrast(phases, order):
    net, lateral, x, y = network()
    parameters = [*net.parameters(), *lateral.parameters()]
    exact = exact_gradient(net, lateral, x, y, parameters)
    solver = mep.Descent(2000, 1e-8, adaptive=True, settle_lr=0.2)
    errors = []
    for beta in (0.02, 0.01):
        ep = mep.EquilibriumPropagation(net, "cross_entropy", beta, solver, phases=phases, groups=[lateral])
        found, estimate = ep.gradients(x, y)
        assert estimate.converged and found.keys() == set(parameters)
        errors.append(
            math.sqrt(sum(float((found[p] - g).square().sum()) for p, g in zip(parameters, exact, strict=True)))
        )
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.05)
    assert errors[1] < 0.02


def test_forces_and_value_are_those_of_autograd_on_the_energy():
    net, lateral, x, y = network()
    ep = mep.EquilibriumPropagation(net, beta=0.3, solver=mep.Descent(50, settle_lr=0.2), groups=[lateral])
    eq = ep.settle(x, y)
    s = {name: state.clone().requires_grad_() for name, state in eq.nudged.states.items()}
    mu = {"0": net[0](x), "2": net[2](torch.tanh(s["0"]))}
    cost = nn.functional.cross_entropy(s["2"], y, reduction="sum")
    energy = sum((s[n] - mu[n]).square().sum() / 2 for n in s) + lateral.energy(s["0"]).sum() + 0.3 * cost
    forces = torch.autograd.grad(energy, [s["0"], s["2"]])
    residuals = [f.norm(dim=1) for f in forces]
    moved = {n: (eq.nudged.states[n] - eq.free.states[n]).norm(dim=1) for n in s}
    for name, residual in zip(s, residuals, strict=True):
        torch.testing.assert_close(residual / moved[name], eq.nudged.residuals[name], rtol=0.1, atol=1e-3)

    plain, _ = free_energy(net, x)
    cost_of_batch = make_cost("cross_entropy")(eq.nudged.states["2"], y)
    whole = nudge(replace(plain, groups=(lateral,)), cost_of_batch, 0.3)
    torch.testing.assert_close(whole.value(whole.at(eq.nudged.states)).sum(), energy.detach())


def test_lateral_weights_train_and_what_cannot_be_is_refused():
    net, lateral, x, y = network()
    before = lateral.weight.detach().clone()
    opt = mep.eqprop(
        [*net.parameters(), *lateral.parameters()], model=net, groups=[lateral],
        settle_lr=0.2, settle_steps=300, adaptive=True, beta=0.05,
    )  # fmt: skip
    losses = [float(opt.step(x=x, target=y)) for _ in range(5)]
    assert losses == sorted(losses, reverse=True) and not torch.equal(before, lateral.weight)
    with pytest.raises(mep.ArgumentError, match="Sweep does not settle energies of groups"):
        mep.EquilibriumPropagation(net, solver=mep.Sweep(), groups=[lateral])
    with pytest.raises(mep.ArgumentError, match=r"derived from mep.GroupEnergy"):
        mep.EquilibriumPropagation(net, groups=[3])
    lateral.nodes = ("9",)
    with pytest.raises(mep.ArgumentError, match="names of nodes with a state, which are 0, 2"):
        opt.step(x=x, target=y)
