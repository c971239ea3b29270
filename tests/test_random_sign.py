"""`phases="random-sign"`: one-sided at beta or -beta, with a sign that is drawn in every step."""

import copy
import pickle

import pytest
import torch
from cases import mlp
from equilibria import distance
from torch import nn

import mep

BETA = 0.05
SOLVERS = {
    "sweep, general": (nn.Tanh, {"solver": mep.Sweep(tol=1e-11)}),
    "sweep, affine": (nn.ReLU, {"solver": mep.Sweep(tol=1e-11)}),
    "descent": (nn.Tanh, {"solver": mep.Descent(3000, 1e-9, adaptive=True, settle_lr=0.3)}),
    "relaxation": (lambda: nn.Hardtanh(0, 1), {"energy": "hopfield", "solver": mep.Relaxation(tol=1e-10)}),
    "hopfield by descent": (
        lambda: nn.Hardtanh(0, 1),
        {"energy": "hopfield", "solver": mep.Descent(20000, 1e-7, adaptive=True, settle_lr=0.3)},
    ),
}


def example(activation=nn.Tanh, dtype=torch.float64, batch=4):
    torch.manual_seed(0)
    model = mlp(activation, 4, 5, 3).to(dtype)
    return model, torch.rand(batch, 4, dtype=dtype), torch.arange(batch) % 3


def both_signs(ep, x, y):
    """The first gradient of either sign, and the signs of all steps that were made."""
    found, signs = {}, []
    for _ in range(100):
        gradients, estimate = ep.gradients(x, y)
        assert estimate.converged and len(set(estimate.betas.tolist())) == 1
        signs.append(1 if estimate.beta > 0 else -1)
        found.setdefault(signs[-1], gradients)
        if len(found) == 2:
            return found, signs
    raise AssertionError("one sign only")


@pytest.mark.parametrize("name", SOLVERS)
def test_its_two_gradients_are_those_of_beta_and_minus_beta_whose_mean_is_centered(name):
    activation, settings = SOLVERS[name]
    model, x, y = example(activation)
    given = {"cost": "cross_entropy", "beta": BETA, **settings}
    found, _ = both_signs(mep.EquilibriumPropagation(model, phases="random-sign", **given), x, y)
    one_sided, _ = mep.EquilibriumPropagation(model, **given).gradients(x, y)
    centered, _ = mep.EquilibriumPropagation(model, phases="centered", **given).gradients(x, y)
    mean = {p: (g + found[-1][p]) / 2 for p, g in found[1].items()}
    assert distance(model, found[1], one_sided) < 1e-7
    assert distance(model, mean, centered) < 1e-7
    assert distance(model, found[-1], found[1]) > 1e-4


def test_signs_are_even_and_follow_torch_s_seed():
    model, x, y = example(batch=1)
    ep = mep.EquilibriumPropagation(model, beta=1e-3, phases="random-sign")
    courses = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        courses.append([ep.gradients(x, y)[1].beta for _ in range(200)])
    assert courses[0] == courses[1] != courses[2]
    assert set(courses[0]) == {1e-3, -1e-3}
    assert 70 < sum(beta > 0 for beta in courses[0]) < 130  # of 200: 4 standard deviations and more


def test_every_way_to_make_a_step_takes_the_same_sign():
    model, x, y = example()
    ep = mep.EquilibriumPropagation(model, beta=BETA, phases="random-sign")
    for seed in range(6):
        torch.manual_seed(seed)
        equilibrium = ep.settle(x, y, record=True)
        gradients, estimate = ep.gradients(x, y)
        torch.manual_seed(seed)
        pieces, again = ep.iter_gradients(x, y)
        assert equilibrium.estimate.beta == estimate.beta == again.beta
        assert equilibrium.nudged.beta == equilibrium.phases[0].beta == (1 if estimate.beta > 0 else -1)
        assert equilibrium.nudged.course
        assert distance(model, {p: g for piece in pieces for p, g in piece.items()}, gradients) < 1e-12


def test_a_step_that_fails_leaves_the_generator_as_it_was():
    model, x, y = example(lambda: nn.Dropout(0.5))
    ep = mep.EquilibriumPropagation(
        model, beta=1.0, phases="random-sign", on_unsettled="raise", solver=mep.Sweep(1, 1e-9)
    )
    for call in (ep.gradients, ep.iter_gradients):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        with pytest.raises(mep.NotConvergedError):
            call(x, y)
        assert torch.equal(torch.get_rng_state(), before)
    model.eval()
    before = torch.get_rng_state()
    ep.on_unsettled = "ignore"
    ep.predict(x)
    ep.settle(x, y)
    assert torch.equal(torch.get_rng_state(), before)
    ep.gradients(x, y)
    assert not torch.equal(torch.get_rng_state(), before)


def test_dropout_has_one_mask_in_a_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Dropout(0.5), nn.Linear(30, 3)).double()
    x, y = torch.randn(4, 4).double(), torch.arange(4) % 3
    ep = mep.EquilibriumPropagation(model, beta=1e-5, phases="random-sign", solver=mep.Sweep(tol=1e-8))
    for seed in range(4):
        torch.manual_seed(seed)
        int(torch.randint(2, ()))  # the sign
        exact = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
        torch.manual_seed(seed)
        found, _ = ep.gradients(x, y)
        assert distance(model, found, dict(zip(model.parameters(), exact, strict=True))) < 1e-4


@pytest.mark.parametrize("beta", [None, 0.03])
def test_a_chosen_beta_has_a_sign_too_and_compiled_steps_are_the_same(uncompiled, beta):
    model, x, y = example(nn.ReLU)
    twin = copy.deepcopy(model)
    given = {"beta": beta, "phases": "random-sign", "lr": 0.1}
    plain = mep.eqprop(model.parameters(), model=model, **given)
    quick = mep.eqprop(twin.parameters(), model=twin, compile=True, **given)
    betas = []
    for opt in (plain, quick):
        torch.manual_seed(1)
        for _ in range(12):
            opt.step(x=x, target=y)
            betas.append(opt.last.betas)
    assert len(quick.estimator.compiled_steps) == 1
    assert {bool(b[0] > 0) for b in betas[5:12]} == {True, False}
    torch.testing.assert_close(torch.stack(betas[:12]).double(), torch.stack(betas[12:]).double())
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("preset", [mep.eqprop, mep.smep, mep.natural_ep, mep.local_ep, mep.O1MemoryEPv2])
def test_presets_train_with_it_and_copies_go_on_with_it(preset):
    model, x, y = example(nn.ReLU, torch.float32, batch=8)
    opt = preset(model.parameters(), model=model, phases="random-sign")
    losses = [float(opt.step(x=x, target=y)) for _ in range(30)]
    assert losses[-1] < losses[0]
    assert isinstance(str(opt.last), str)
    twin = copy.deepcopy(opt.estimator)
    again = pickle.loads(pickle.dumps(mep.EquilibriumPropagation(model, beta=0.1, phases="random-sign")))
    assert twin.phases == again.phases == "random-sign"
    assert abs(again.gradients(x, y)[1].beta) == pytest.approx(0.1)


def test_phases_without_a_meaning_are_refused():
    model, _, _ = example()
    with pytest.raises(mep.ArgumentError, match=r"phases='random'.*'one-sided', 'centered', 'random-sign'"):
        mep.EquilibriumPropagation(model, phases="random")
