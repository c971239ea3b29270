"""A preset is its recipe: what the parts do by hand, no more and no less, and every keyword does something."""

import copy
import inspect
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mep
from mep import presets
from mep.updates.dion import first_factor

PRESETS = [f for f in vars(presets).values() if inspect.isfunction(f) and f.__module__ == presets.__name__]
PRESETS = [f for f in PRESETS if not f.__name__.startswith("_")]
BATCH, MOMENTUM_OF_DESCENT = 7, 0.5


def keywords(preset):
    return [p for p in inspect.signature(preset).parameters.values() if p.name not in ("params", "model")]


def has(preset, keyword):
    return keyword in inspect.signature(preset).parameters


def default(preset, keyword):
    return inspect.signature(preset).parameters[keyword].default


def sweeps(preset):
    """Whether it sweeps unless told otherwise."""
    return has(preset, "settle_lr") and default(preset, "settle_lr") is None


def small_net():
    """Its weights exceed every preset's spectral bound, so that the first update meets it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight *= 4 / torch.linalg.svdvals(layer.weight)[0]
    return net


def batch():
    torch.manual_seed(1)
    return torch.randn(BATCH, 6, dtype=torch.float64), torch.randint(3, (BATCH,))


# The recipes, by hand. A new preset needs a line in RECIPES.


def nudged_energy(net, x, y, h, s, beta):
    """`1/2 |h - mu_h|^2 + 1/2 |s - mu_s|^2 + beta C(s)`, summed over the batch."""
    first, second = h - net[0](x), s - net[2](torch.tanh(h))
    return (first.square().sum() + second.square().sum()) / 2 + beta * F.cross_entropy(s, y, reduction="sum")


def minimise(energy, states):
    optimizer = torch.optim.LBFGS(
        states, max_iter=1000, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = energy()
        value.backward()
        return value

    optimizer.step(closure)


def descend(energy, states, steps, lr):
    velocity = [torch.zeros_like(s) for s in states]
    for _ in range(steps):
        for s, v, g in zip(states, velocity, torch.autograd.grad(energy(), states), strict=True):
            v.mul_(MOMENTUM_OF_DESCENT).add_(g)
            s.data -= lr * v


def by_equilibrium(net, x, y, beta, settle):
    """(dE/dtheta at the nudged equilibrium - dE/dtheta at the free one) / beta; the second vanishes."""
    h = net[0](x).detach().requires_grad_()
    s = net(x).detach().requires_grad_()
    settle(lambda: nudged_energy(net, x, y, h, s, beta), [h, s])
    energy = nudged_energy(net, x, y, h, s, beta)
    return torch.autograd.grad(energy / (beta * BATCH), list(net.parameters()))


def by_backprop(net, x, y):
    return torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))


def sgd(p, g, lr, momentum, nesterov):
    return p - lr * (g + momentum * g if nesterov else g)


def muon(p, g, lr, momentum, nesterov):
    if p.ndim < 2:
        return sgd(p, g, lr, momentum, nesterov)
    u, sigma, vt = torch.linalg.svd(g, full_matrices=False)
    u = u * (sigma > 1e-6 * sigma[0])  # the errors of a softmax sum to zero: the last layer's gradient lacks a rank
    return p - lr * max(1, p.shape[0] / p.shape[1]) ** 0.5 * u @ vt


def sdmep_update(p, g, lr, momentum, nesterov):
    """Dion's first step on the first layer's weight, Muon's on the smaller one."""
    if p.ndim < 2 or p.numel() < DION_THRESHOLD:
        return muon(p, g, lr, momentum, nesterov)
    q = first_factor(p.shape[1], math.ceil(default(mep.sdmep, "rank_fraction") * p.shape[1])).to(g)
    left, _ = torch.linalg.qr(g @ q)
    right = g.T @ left
    return p - lr * (p.shape[0] / p.shape[1]) ** 0.5 * left @ (right / right.norm(dim=0)).T


def bounded(p, gamma):
    return p if p.ndim < 2 or p.norm() <= gamma else p * min(1, 0.9 * gamma / torch.linalg.svdvals(p)[0])


DION_THRESHOLD = 9 * 6
RECIPES = {
    mep.O1MemoryEPv2: (by_equilibrium, muon),
    mep.sdmep: (by_equilibrium, sdmep_update),
    mep.eqprop: (by_equilibrium, sgd),
    mep.local_ep: (by_equilibrium, sgd),
    mep.smep: (by_equilibrium, muon),
    mep.smep_fast: (by_equilibrium, muon),
    mep.muon_backprop: (by_backprop, muon),
}
OPTIONS = {mep.sdmep: {"dion_threshold": DION_THRESHOLD}}
SETTLE_STEPS, SETTLE_LR = 12, 0.2
SETTLINGS = {
    "to the equilibrium": (
        {"tol": 1e-10, "settle_steps": 5000, "adaptive": True},
        minimise,
    ),
    "by descent": (
        {"settle_steps": SETTLE_STEPS, "settle_lr": SETTLE_LR},
        lambda energy, states: descend(energy, states, SETTLE_STEPS, SETTLE_LR),
    ),
}


@pytest.mark.parametrize("settling", SETTLINGS)
@pytest.mark.parametrize("preset", [p for p in PRESETS if p is not mep.natural_ep])  # that one: test_natural.py
def test_first_update_is_its_hand_written_composition(preset, settling):
    gradient, update = RECIPES[preset]
    given, settle = SETTLINGS[settling]
    if has(preset, "beta"):
        if "settle_lr" in given and not has(preset, "settle_lr"):
            pytest.skip("does not descend")
        given = {keyword: value for keyword, value in given.items() if has(preset, keyword)}
    net, by_hand, (x, y) = small_net(), small_net(), batch()
    lr = default(preset, "lr")
    before = [p.detach().clone() for p in net.parameters()]

    given = {"beta": 0.05, **given} if has(preset, "beta") else {}
    opt = preset(net.parameters(), model=net, **given, **OPTIONS.get(preset, {}))
    loss = opt.step(x=x, target=y)

    torch.testing.assert_close(loss, F.cross_entropy(by_hand(x), y).detach())
    found = gradient(by_hand, x, y, *((opt.estimator.beta, settle) if has(preset, "beta") else ()))
    for p, q, g in zip(net.parameters(), by_hand.parameters(), found, strict=True):
        q = update(q.detach(), g, lr, default(preset, "momentum"), default(preset, "nesterov"))
        q = bounded(q, default(preset, "gamma")) if has(preset, "gamma") else q
        torch.testing.assert_close(p.detach(), q, rtol=1e-6, atol=1e-8)

    torch.optim.SGD(by_hand.parameters(), lr=lr).step(lambda: F.cross_entropy(by_hand(x), y).backward())
    for p, q, start in zip(net.parameters(), by_hand.parameters(), before, strict=True):
        assert not torch.allclose(p - start, q - start, rtol=1e-3, atol=0)


def test_sgd_is_recognised_as_itself():
    """The comparison above would notice if a preset were SGD."""
    net, twin, (x, y) = small_net(), small_net(), batch()
    update = torch.optim.SGD(net.parameters(), lr=0.1)
    mep.EPOptimizer(mep.Backprop(net), update).step(x=x, target=y)
    torch.optim.SGD(twin.parameters(), lr=0.1).step(lambda: F.cross_entropy(twin(x), y).backward())
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("gamma", [0.3, 2.0])
@pytest.mark.parametrize("preset", [p for p in PRESETS if has(p, "gamma")])
def test_every_singular_value_stays_below_gamma(preset, gamma):
    torch.manual_seed(0)
    convolution = nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten()
    net = nn.Sequential(*convolution, nn.Linear(64, 160), nn.Tanh(), nn.Linear(160, 150), nn.Linear(150, 3))
    with torch.no_grad():
        net[5].weight.mul_(10)
    short_step = {} if sweeps(preset) else {"settle_lr": 0.01}  # before the first update the weights are too large
    opt = preset(net.parameters(), model=net, gamma=gamma, lr=0.1, **short_step)
    for _ in range(4):
        opt.step(x=torch.randn(5, 2, 6, 6), target=torch.randint(3, (5,)))
        for p in net.parameters():
            if p.ndim >= 2:
                assert torch.linalg.svdvals(p.detach().double().flatten(1))[0] <= gamma * (1 + 1e-3)


class Inhibition(mep.GroupEnergy):
    """Of the units of the first layer among each other."""

    nodes = ("0",)

    def energy(self, s):
        return 0.01 * s.sum(1).square()


# Keyword -> two values that must lead to different training, and what else to ask for so that they can.
KEYWORDS = {
    "lr": ((0.01, 0.02), {}),
    "momentum": ((0.3, 0.9), {}),
    "weight_decay": ((0.0, 0.5), {}),
    "nesterov": ((False, True), {}),
    "gamma": ((0.3, 0.5), {}),
    "cost": (("cross_entropy", "mse"), {}),
    "beta": ((0.05, 0.1), {}),
    "energy": (("prediction", "hopfield"), {"settle_lr": 0.2, "lr": 1e-3}),
    "phases": (("one-sided", "centered"), {}),
    "points": ((1, 4), {"phases": "holomorphic", "beta": 0.1}),
    "branches": (("held", "exact"), {"beta": 1.0}),
    "leaves": (((), ("2",)), {}),
    "groups": (((), (Inhibition(),)), {"settle_lr": 0.2, "lr": 1e-3}),
    "readout": ((None, nn.Linear(3, 3).requires_grad_(False)), {}),
    "settle_steps": ((1, 2), {"tol": 1e-6}),
    "settle_lr": ((None, 0.2), {}),
    "adaptive": ((False, True), {"settle_steps": 10}),
    "tol": ((1e-1, 1e-4), {}),
    "patience": ((1, 3), {}),
    "rank_fraction": ((0.1, 0.5), {"dion_threshold": 0}),
    "dion_threshold": ((0, 1000), {}),
    "schedule": (("together", "forward"), {"tol": 0.1}),
    "damping": ((0.01, 0.1), {}),
    "kl_clip": ((1e-4, None), {}),
    "decay": ((0.1, 0.9), {"factors_every": 1, "inverse_every": 1}),
    "factors_every": ((1, 2), {"inverse_every": 1}),
    "inverse_every": ((1, 2), {"factors_every": 1}),
    "rank": ((2, None), {}),
    "use_diagonal_fisher": ((False, True), {}),
    "orthogonalise": ((False, True), {}),
}
MORE_VALUES = {
    "settle_lr": ((0.1, 0.2), {}),
    "adaptive": ((False, True), {"settle_steps": 200, "settle_lr": 0.3}),
    "tol": ((1e-1, 1e-3), {"settle_steps": 200, "settle_lr": 0.3, "adaptive": True}),
    "patience": ((1, 3), {"settle_steps": 200, "settle_lr": 0.3, "adaptive": True}),
}


def trained(preset, **given):
    """Everything two steps change: parameters, and what the optimizer reports."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24))
    net = nn.Sequential(nn.Linear(5, 24), nn.ReLU(), block, nn.ReLU(), nn.Linear(24, 3))
    opt = preset(net.parameters(), model=net, **given)
    x, probabilities = 3 * torch.randn(8, 5), torch.rand(8, 3).softmax(1)
    for _ in range(2):
        opt.step(x=x, target=probabilities)
    return [*(p.detach() for p in net.parameters()), torch.tensor([opt.last.iterations, opt.last.beta])]


SAME_RESULT = {
    "compile": "test_compile.py",
    "low_memory": "test_memory.py",
    "checkpoint": "test_memory.py",
    "on_unsettled": "test_settling.py",
    "proof": "test_proof.py",
}
"""What changes only the price of a step, or what is said of it, and where that is tested."""


@pytest.mark.parametrize("table", [KEYWORDS, MORE_VALUES], ids=["sweep", "descent"])
@pytest.mark.parametrize("preset,keyword", [(f, p.name) for f in PRESETS for p in keywords(f)])
def test_every_keyword_does_something(preset, keyword, table):
    if keyword in SAME_RESULT:
        return
    assert keyword in KEYWORDS, f"{preset.__name__} has gained {keyword}: add two values of it to the table KEYWORDS"
    if keyword not in table or (table is KEYWORDS and keyword in MORE_VALUES and not sweeps(preset)):
        return
    values, others = table[keyword]
    if table is MORE_VALUES and not all(has(preset, other) for other in others):
        return
    one, other = (trained(preset, **others, **{keyword: value}) for value in values)
    assert any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_keyword_is_explicit(preset):
    net = small_net()
    assert list(inspect.signature(preset).parameters)[:2] == ["params", "model"]
    assert {p.kind for p in keywords(preset)} == {inspect.Parameter.KEYWORD_ONLY}
    for typo in ("learning_rate", "settle_step", "Beta"):
        with pytest.raises(TypeError, match=typo):
            preset(net.parameters(), model=net, **{typo: 1})


LACKING = [
    (mep.local_ep, "energy", "hopfield"), (mep.local_ep, "energy", mep.NodeEnergy), (mep.local_ep, "groups", []),
    (mep.local_ep, "settle_lr", 0.1), (mep.natural_ep, "groups", []), (mep.natural_ep, "checkpoint", True),
    (mep.O1MemoryEPv2, "compile", True), (mep.O1MemoryEPv2, "points", 4),
]  # fmt: skip


@pytest.mark.parametrize(("preset", "keyword", "value"), LACKING)
def test_a_keyword_of_other_presets_is_refused_with_one_that_has_it(preset, keyword, value):
    net = small_net()
    why = "prediction energy" if preset is mep.local_ep else "gradient descent|of all layers"
    with pytest.raises(mep.ArgumentError, match=rf"{preset.__name__}\({keyword}=.*({why}).*mep\.eqprop") as raised:
        preset(net.parameters(), model=net, **{keyword: value})
    assert isinstance(raised.value, TypeError)  # as every keyword that a function does not have
    assert keyword in inspect.signature(mep.eqprop).parameters


# How to settle: the rules.


def settlings(keyword, settle_lr):
    """The presets that have the keyword, each with the ways it settles: by sweeps, by descent with this step."""
    return [(p, lr) for p in PRESETS if has(p, keyword) for lr in (None, settle_lr) if lr is not None or sweeps(p)]


@pytest.mark.parametrize("preset", [p for p in PRESETS if sweeps(p)])
def test_settle_lr_selects_descent(preset):
    def solver(**given):
        net = small_net()
        return preset(net.parameters(), model=net, **given).estimator.solver

    assert isinstance(solver(), mep.Sweep)
    assert isinstance(solver(settle_lr=0.2), mep.Descent)
    assert solver().adaptive
    assert not solver(settle_lr=0.2).adaptive


class Counting(nn.Module):
    """A layer, kept whole, with the number of its evaluations, where no change of it is seen."""

    def __init__(self):
        super().__init__()
        self.linear, self.count = nn.Linear(9, 9), itertools.count()

    def forward(self, x):
        next(self.count)
        return self.linear(x).tanh()

    @property
    def calls(self):
        return copy.copy(self.count).__reduce__()[1][0]


@pytest.mark.parametrize("preset,settle_lr", settlings("settle_steps", 0.2))
def test_without_adaptive_exactly_settle_steps_are_made(preset, settle_lr):
    def evaluations(steps):
        net = nn.Sequential(nn.Linear(6, 9), Counting(), nn.Linear(9, 3)).double()
        chosen = {"settle_steps": steps, "settle_lr": settle_lr, "adaptive": False, "leaves": (Counting,)}
        opt = preset(net.parameters(), model=net, **chosen)
        (x, y), calls = batch(), []
        for _ in range(2):  # the first step also checks the graph
            before = net[1].calls
            opt.step(x=x, target=y)
            assert opt.last.iterations == steps
            calls.append(net[1].calls - before)
        return calls[-1]

    # Descent does not evaluate a layer before the signal has arrived; from then on, once a step.
    first, *more = (evaluations(steps) for steps in (2, 5, 11))
    assert [count - first for count in more] == [3, 9]


@pytest.mark.parametrize("preset,settle_lr", settlings("patience", 0.3))
def test_adaptive_stops_at_tol_sustained_for_patience(preset, settle_lr):
    def last(**given):
        net, (x, y) = small_net(), batch()
        opt = preset(
            net.parameters(), model=net, settle_steps=500, settle_lr=settle_lr, adaptive=True, beta=0.01, **given
        )
        opt.step(x=x, target=y)
        return opt.last

    loose, tight, patient = last(tol=1e-1), last(tol=1e-4), last(tol=1e-4, patience=4)
    assert all(e.converged for e in (loose, tight, patient))
    assert loose.residual.max() <= 1e-1 and max(tight.residual.max(), patient.residual.max()) <= 1e-4
    assert loose.iterations < tight.iterations <= patient.iterations - 3


@pytest.mark.parametrize("settle_lr,adaptive", [(0.2, None), (0.2, False), (None, False)])
@pytest.mark.parametrize("preset", [p for p in PRESETS if has(p, "patience")])
def test_patience_that_would_do_nothing_is_refused(preset, settle_lr, adaptive):
    net = small_net()
    with pytest.raises(mep.ArgumentError, match=r"patience=5.*adaptive=True"):
        preset(net.parameters(), model=net, settle_lr=settle_lr, adaptive=adaptive, patience=5)


@pytest.mark.parametrize("preset", [p for p in PRESETS if sweeps(p)])
def test_a_removed_argument_is_refused_with_the_new_way(preset):
    net = small_net()
    with pytest.raises(mep.ArgumentError, match=r"strength=\.\.\.\) is gone.*beta") as raised:
        preset(net.parameters(), model=net, strength=0.1)
    assert isinstance(raised.value, TypeError)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_updates_by_sgd_are_those_of_torch_bit_for_bit(dtype, weight_decay):
    """All parameters go in one call where torch loops over them; in half precision that would round the momentum."""
    torch.manual_seed(0)
    model = small_net().to(dtype)
    twin = copy.deepcopy(model)
    opt = mep.eqprop(model.parameters(), model=model, lr=0.1, momentum=0.999, weight_decay=weight_decay)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.999, weight_decay=weight_decay)
    assert [group["foreach"] for group in opt.param_groups] == [True if dtype is torch.float32 else None]
    for _ in range(5):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        opt.step()
        plain.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_model_in_the_place_of_its_parameters_is_refused(preset):
    model = small_net()
    with pytest.raises(mep.ArgumentError, match=r"params is a Sequential.*model\.parameters\(\)"):
        preset(model, model=model)
