"""Models in the styles of public code: their gradient is autograd's where beta vanishes, or they are refused."""

import copy

import pytest
import torch
from public_models import PUBLIC, called
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import mep

SOLVER = mep.Sweep(tol=1e-8, settle_steps=200)
AT_DEFAULT, AT_1E_5, ROUNDING = 0.06, 1e-3, 1e-6


def trained(model, cost):
    own = [*model.parameters(), *(cost.parameters() if isinstance(cost, nn.Module) else ())]
    return [p for p in dict.fromkeys(own) if p.requires_grad]


def step_of_autograd(model, cost, x, target):
    """The gradient of the mean cost, for all parameters; zero where there is none."""
    torch.manual_seed(7)
    parameters = trained(model, cost)
    for p in parameters:
        p.grad = None
    loss_of(cost, called(model, x), target).backward()
    return whole([p.grad for p in parameters], parameters), torch.get_rng_state()


def loss_of(cost, output, target):
    """By torch alone."""
    if isinstance(output, dict) and isinstance(cost, str):
        output = output["logits"]
    named = {"cross_entropy": nn.functional.cross_entropy, "mse": nn.functional.mse_loss}
    return named[cost](output, target) if isinstance(cost, str) else cost(output, target).mean()


def step_of_mep(ep, x, target):
    torch.manual_seed(7)
    found, estimate = ep.gradients(x, target)
    parameters = trained(ep.model, ep.cost)
    assert set(found) <= set(parameters)
    return whole([found.get(p) for p in parameters], parameters), torch.get_rng_state(), estimate


def whole(gradients, parameters):
    pairs = zip(gradients, parameters, strict=True)
    flat = [(torch.zeros_like(p) if g is None else g).detach().flatten() for g, p in pairs]
    return torch.cat([torch.view_as_real(g).flatten() if g.is_complex() else g for g in flat])


def buffers(*modules):
    return {(i, n): b.clone() for i, m in enumerate(modules) if isinstance(m, nn.Module) for n, b in m.named_buffers()}


def same(one, other, slack=0.0):
    return one.keys() == other.keys() and all(torch.allclose(one[k], other[k], rtol=slack, atol=slack) for k in one)


def summation_slack(model):
    """Convolutions of images run channels last, which sums a batch's statistics in another order."""
    return 1e-12 if any(isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) for m in model.modules()) else 0.0


def attributes(model):
    """Everything that modules hold, by identity, and numbers by value."""
    return {(n, k): v if isinstance(v, (int, float, str)) else id(v) for n, m in model.named_modules()
            for k, v in vars(m).items()}  # fmt: skip


def put_back(before, *modules):
    with torch.no_grad():
        for i, m in enumerate(modules):
            for n, b in m.named_buffers() if isinstance(m, nn.Module) else ():
                b.copy_(before[i, n])


@pytest.mark.parametrize("name", [n for n, case in PUBLIC.items() if case.verdict == "right"])
def test_gradient_is_autograd_s_where_beta_vanishes(name):
    """So are buffers and random numbers, after two steps; and the error falls in proportion to beta."""
    case = PUBLIC[name]
    model, x, target, cost = case.build()
    twin, _, _, twin_cost = case.build()
    ep = mep.EquilibriumPropagation(model, cost, solver=SOLVER, leaves=case.leaves)
    before, errors = buffers(model, cost), {}
    for beta in (None, 1e-5, 1e-3, 1e-4):
        ep.beta = beta
        found, drawn, estimate = step_of_mep(ep, x, target)
        wanted, drawn_by_torch = step_of_autograd(twin, twin_cost, x, target)
        assert estimate.converged
        assert same(buffers(model, cost), buffers(twin, twin_cost), summation_slack(model))
        assert same(dict(model.named_parameters()), dict(twin.named_parameters()))
        assert torch.equal(drawn, drawn_by_torch)
        errors[beta] = float((found - wanted).norm() / wanted.norm())
        if beta is not None:
            put_back(before, model, cost)
            put_back(before, twin, twin_cost)
    assert not [n for n, m in model.named_modules() for v in vars(m).values() if isinstance(v, FakeTensor)]
    assert errors[None] < AT_DEFAULT and errors[1e-5] < AT_1E_5, errors
    assert not case.is_smooth or errors[1e-4] < ROUNDING or 7 < errors[1e-3] / errors[1e-4] < 13, errors


@pytest.mark.parametrize("name", [n for n, case in PUBLIC.items() if case.verdict == "refused"])
def test_what_cannot_be_read_is_refused_with_a_way_out(name):
    """And nothing has changed."""
    case = PUBLIC[name]
    model, x, target, cost = case.build()
    before, held = copy.deepcopy(model.state_dict()), attributes(model)
    torch.manual_seed(7)
    noise = torch.get_rng_state()
    with pytest.raises(mep.MepError, match=rf"(?s)(?=.*({case.place})).*Way out"):
        mep.EquilibriumPropagation(model, cost, solver=SOLVER, leaves=case.leaves).gradients(x, target)
    assert same(before, model.state_dict())
    assert attributes(model) == held
    assert torch.equal(noise, torch.get_rng_state())
