"""Natural gradient against dense algebra, per-example gradients and curvlinops: float64."""

import copy
import io
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from cases import inhibiting
from curvlinops import KFACLinearOperator
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import mep
from mep.estimators import equilibrium
from mep.updates import NaturalGradient
from mep.updates.curvature import power_of, split_damping

BATCH, CLASSES = 6, 3
EVERY = {"factors_every": 1, "inverse_every": 1}
PLAIN = {"momentum": 0.0, "kl_clip": None, "rank": None}


class Mean(nn.Module):
    """Over positions."""

    def forward(self, x):
        return x.mean(1)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.last(self.shared(self.shared(self.first(x).tanh()).tanh()).tanh())


def mlp():
    return nn.Sequential(
        nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6, bias=False), nn.Tanh(), nn.Linear(6, CLASSES)
    )  # fmt: skip


def convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 2, dilation=2), nn.Tanh(),
        nn.Flatten(), nn.Linear(12, CLASSES),
    )  # fmt: skip


def sequence():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), Mean(), nn.Linear(5, CLASSES))


MODELS = {"mlp": (mlp, (5,)), "conv": (convolutions, (2, 7, 7)), "sequence": (sequence, (3, 4))}
MORE_MODELS = {
    "shared": (Shared, (4,)),
    "circular, same": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3, padding="same", padding_mode="circular"), nn.Tanh(), nn.Flatten(), nn.Linear(20, CLASSES)
        ),
        (2, 5),
    ),
    "volume": (
        lambda: nn.Sequential(
            nn.Conv3d(1, 2, (2, 1, 3), stride=(1, 2, 1), padding=(1, 0, 1)), nn.Tanh(), nn.Flatten(),
            nn.Linear(72, CLASSES),
        ),
        (1, 2, 5, 4),
    ),
}  # fmt: skip


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def build(name, batch=BATCH):
    make, shape = {**MODELS, **MORE_MODELS}[name]
    torch.manual_seed(0)
    return make().double(), torch.randn(batch, *shape).double(), torch.randint(CLASSES, (batch,))


def estimator(net, observe, beta=1e-3, **given):
    return mep.EquilibriumPropagation(
        net, beta=beta, solver=mep.Sweep(tol=1e-11, settle_steps=200), observe=observe, **given
    )


def optimizer(net, beta=1e-3, cost="cross_entropy", params=None, **given):
    update = NaturalGradient(net.parameters() if params is None else params, **given)
    return mep.EPOptimizer(estimator(net, update.observe, beta, cost=cost), update)


def averaged(opt, weight):
    state = opt.state[weight]
    return {name: moment / state["mass"] for name, moment in state["moments"].items()}


def layers_of(net):
    return [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))]


def joined(layer, of):
    """[out, in] or [out, in + 1] of what belongs to weight and bias."""
    matrix = of(layer.weight).flatten(1)
    return matrix if layer.bias is None else torch.cat([matrix, of(layer.bias).unsqueeze(1)], 1)


# The factors.


@pytest.mark.parametrize("phases,order", [("one-sided", 1), ("centered", 2)])
@pytest.mark.parametrize("name", MODELS)
def test_factors_tend_to_those_of_kfac_as_beta_vanishes(name, phases, order):
    net, x, y = build(name)
    kfac = KFACLinearOperator(
        net, nn.CrossEntropyLoss(), list(net.parameters()), [(x, y)], fisher_type="empirical", kfac_approx="expand",
        separate_weight_and_bias=False, check_deterministic=False,
    )  # fmt: skip
    directions = {p: torch.randn_like(p) for p in net.parameters()}
    expected = dict(zip(net.parameters(), kfac @ list(directions.values()), strict=True))

    def distance(beta):
        update = NaturalGradient(net.parameters())
        estimator(net, update.observe, beta, phases=phases)(x, y)
        found = []
        for layer in layers_of(net):
            factors = averaged(update, layer.weight)
            product = factors["errors"] @ joined(layer, directions.get) @ factors["inputs"]
            oracle = joined(layer, expected.get)
            found.append(float((product - oracle).norm() / oracle.norm()))
        return torch.tensor(found)

    coarse, fine = distance(1e-2), distance(1e-3)
    assert fine.max() < (1e-2 if order == 1 else 1e-5)
    torch.testing.assert_close((coarse / fine).log10(), torch.full_like(fine, order), rtol=0, atol=0.1)


@pytest.mark.parametrize("phases", ["one-sided", "centered"])
@pytest.mark.parametrize("name", {**MODELS, **MORE_MODELS})
def test_rows_are_those_of_the_gradient(name, phases):
    """The mean over examples of delta h^T is the contrast itself, at any beta."""
    net, x, y = build(name)
    seen = []
    estimator(net, seen.extend, beta=0.3, phases=phases)(x, y)
    assert {id(layer.weight) for layer in seen} == {id(m.weight) for m in layers_of(net)}
    for layer in seen:
        inputs, errors = layer.rows()
        assert layer.examples == BATCH * (2 if phases == "centered" else 1)
        gradient = (errors.T @ inputs / layer.examples).view_as(layer.weight)
        torch.testing.assert_close(gradient, layer.weight.grad, rtol=1e-9, atol=1e-12)
        if layer.bias is not None:
            torch.testing.assert_close(errors.sum(0) / layer.examples, layer.bias.grad, rtol=1e-9, atol=1e-12)


def test_uses_of_a_shared_weight_are_summed():
    net, x, y = build("shared")
    opt = optimizer(net, beta=1e-6)
    opt.step(x=x, target=y)
    net, x, y = build("shared")
    first = net.shared(net.first(x).tanh())
    second = net.shared(first.tanh())
    cost = F.cross_entropy(net.last(second.tanh()), y, reduction="sum")
    errors = torch.autograd.grad(cost, [first, second])
    found = averaged(opt, opt.model.shared.weight)
    inputs = [net.first(x).tanh(), first.tanh()]
    inputs = [torch.cat([h, torch.ones(BATCH, 1)], 1).detach() for h in inputs]
    torch.testing.assert_close(found["errors"], sum(e.T @ e for e in errors) / BATCH, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(found["inputs"], sum(h.T @ h for h in inputs) / (2 * BATCH), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_diagonal_is_the_second_moment_of_the_gradients_of_examples(name):
    net, x, y = build(name)
    opt = optimizer(net, beta=1e-7, use_diagonal_fisher=True)
    estimator(net, opt.update.observe, beta=1e-7)(x, y)
    for layer in layers_of(net):
        if isinstance(layer, nn.Linear):
            squares = 0
            for one, label in zip(x, y, strict=True):
                cost = F.cross_entropy(net(one[None]), label[None])
                found = dict(zip(net.parameters(), torch.autograd.grad(cost, list(net.parameters())), strict=True))
                squares = squares + joined(layer, found.get) ** 2
            torch.testing.assert_close(averaged(opt, layer.weight)["diagonal"], squares / BATCH, rtol=1e-4, atol=1e-8)


class Tied(nn.Module):
    """The decoder is the encoder transposed."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(4, 6), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.last(F.linear(self.inner(x).tanh(), self.inner.weight.t()))


class SharedBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.second.bias = self.first.bias

    def forward(self, x):
        return self.last(self.second(self.first(x).tanh()).tanh())


def frozen():
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    net[0].weight.requires_grad_(False)
    net[2].bias.requires_grad_(False)
    return net


# Model, input, names of the weights that have factors, and of the biases beside them.
COVERED = {
    "tied": (Tied, (4,), "last.weight", "last.bias"),
    "shared bias": (SharedBias, (4,), "first.weight second.weight last.weight", "last.bias"),
    "frozen": (frozen, (4,), "2.weight 4.weight", "4.bias"),
    "gain": (lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, CLASSES)), (4,),
             "0.weight 3.weight", "0.bias 3.bias"),
    "grouped": (lambda: nn.Sequential(nn.Conv1d(2, 4, 1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, CLASSES)),
                (2, 3), "3.weight", "3.bias"),
    "weight norm": (lambda: nn.Sequential(weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, CLASSES)), (4,),
                    "2.weight", "2.bias"),
}  # fmt: skip


@pytest.mark.parametrize("name", COVERED)
def test_only_weights_of_plain_layers_have_rows_and_the_rest_takes_sgd(name):
    make, shape, weights, biases = COVERED[name]
    torch.manual_seed(0)
    net = make().double()
    names = {p: n for n, p in net.named_parameters()}
    seen = []
    observe, twin = seen.extend, copy.deepcopy(net)
    x, y = torch.randn(BATCH, *shape).double(), torch.randint(CLASSES, (BATCH,))
    estimator(net, observe)(x, y)
    assert {names[layer.weight] for layer in seen} == set(weights.split())
    assert {names[layer.bias] for layer in seen if layer.bias is not None} == set(biases.split())

    opt = optimizer(twin, lr=0.1, momentum=0.5, vector_scale=0.3)
    sgd = torch.optim.SGD(net.parameters(), lr=0.03, momentum=0.5)
    for _ in range(2):
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            p.data.copy_(q)
        net.zero_grad()
        estimator(net, None)(x, y)
        sgd.step()
        opt.step(x=x, target=y)
    taken = {*weights.split(), *biases.split()}
    for (n, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-9) == (n not in taken or not p.requires_grad), n


# The step.


@dataclass
class Rows:
    """A layer made by hand."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    inputs: torch.Tensor
    errors: torch.Tensor

    @property
    def examples(self):
        return len(self.inputs)

    def rows(self):
        return self.inputs, self.errors


def by_hand(out=3, columns=4, rows=20, bias=True, **given):
    """An update on one layer that was observed once, and its layer."""
    torch.manual_seed(1)
    weight = nn.Parameter(torch.randn(out, columns).double())
    beside = nn.Parameter(torch.randn(out).double()) if bias else None
    layer = Rows(weight, beside, torch.randn(rows, columns).double() + 1, torch.randn(rows, out).double() / 5)
    update = NaturalGradient([p for p in (weight, beside) if p is not None], **{**PLAIN, **given})
    update.observe([layer])
    for group in update.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)
    return update, layer


def dense_factors(layer, damping):
    """G + g I and A + a I."""
    h, delta = layer.inputs, layer.errors
    if layer.bias is not None:
        h = torch.cat([h, torch.ones(len(h), 1).double()], 1)
    a, g = h.T @ h / len(h), delta.T @ delta / len(h)
    pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
    return g + damping**0.5 / pi * eye(len(g)), a + damping**0.5 * pi * eye(len(a))


def power(matrix, exponent):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**exponent) @ vectors.T


def moved(update, layer):
    """What a step adds to weight and bias together, and the gradient it starts from."""
    gradient = joined(layer, lambda p: p.grad)
    before = joined(layer, lambda p: p.detach().clone())
    update.step()
    return joined(layer, torch.Tensor.detach) - before, gradient


@pytest.mark.parametrize("bias", [True, False])
def test_step_solves_the_damped_kronecker_system(bias):
    update, layer = by_hand(bias=bias, damping=0.3, lr=0.7)
    step, gradient = moved(update, layer)
    fisher = torch.kron(*dense_factors(layer, 0.3))
    expected = torch.linalg.solve(fisher, gradient.flatten()).view_as(gradient)
    torch.testing.assert_close(step, -0.7 * expected)


def test_step_of_a_network_solves_the_damped_kronecker_system():
    net, x, y = build("conv")
    before = {p: p.detach().clone() for p in net.parameters()}
    opt = optimizer(net, lr=0.2, damping=0.05, **PLAIN)
    opt.step(x=x, target=y)
    for layer in layers_of(net):
        a, g = averaged(opt, layer.weight)["inputs"], averaged(opt, layer.weight)["errors"]
        pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
        root = 0.05**0.5
        fisher = torch.kron(g + root / pi * eye(len(g)), a + root * pi * eye(len(a)))
        gradient = joined(layer, lambda p: p.grad)
        expected = torch.linalg.solve(fisher, gradient.flatten()).view_as(gradient)
        step = joined(layer, lambda p: p.detach() - before[p])
        torch.testing.assert_close(step, -0.2 * expected)


def test_preset_is_its_recipe():
    net, x, y = build("mlp")
    before = {p: p.detach().clone() for p in net.parameters()}
    opt = mep.natural_ep(net.parameters(), model=net, weight_decay=0.2)
    opt.step(x=x, target=y)
    assert opt.estimator.solver == mep.Sweep() and opt.estimator.beta is None
    gradients, natural = {}, {}
    for layer in layers_of(net):
        moments = averaged(opt, layer.weight)
        a, g = split_damping(moments["inputs"], moments["errors"], 0.03)
        gradients[layer] = joined(layer, lambda p: p.grad)
        left = moments["errors"] + g * eye(len(moments["errors"]))
        right = moments["inputs"] + a * eye(len(moments["inputs"]))
        natural[layer] = torch.linalg.inv(left) @ gradients[layer] @ torch.linalg.inv(right)
    squared = sum((gradients[layer] * natural[layer]).sum() for layer in natural)
    size = min(0.05, (0.02 / squared).sqrt())
    for layer, d in natural.items():
        expected = (1 - 0.05 * 0.2) * joined(layer, before.get) - size * d
        torch.testing.assert_close(joined(layer, torch.Tensor.detach), expected)


def test_diagonal_step_divides_by_the_damped_diagonal():
    update, layer = by_hand(use_diagonal_fisher=True, damping=0.3, lr=0.7)
    step, gradient = moved(update, layer)
    h = torch.cat([layer.inputs, torch.ones(20, 1).double()], 1)
    squares = torch.einsum("no,ni->noi", layer.errors, h).square().mean(0)
    torch.testing.assert_close(step, -0.7 * gradient / (squares + 0.3))


def test_orthogonalised_step_has_unit_singular_values_once_whitened():
    update, layer = by_hand(orthogonalise=True, damping=0.3, lr=0.7)
    step, gradient = moved(update, layer)
    left, right = (power(f, -0.5) for f in dense_factors(layer, 0.3))
    u, _, vt = torch.linalg.svd(left @ gradient @ right, full_matrices=False)
    torch.testing.assert_close(step, -0.7 * left @ u @ vt @ right, rtol=1e-6, atol=1e-8)


def test_first_momentum_then_the_metric():
    update, layer = by_hand(lr=0.1, momentum=0.6, nesterov=True, damping=0.3, weight_decay=0.5)
    left, right = (power(f, -1) for f in dense_factors(layer, 0.3))
    buffer, expected = 0, joined(layer, torch.Tensor.detach)
    for _ in range(3):
        g = torch.randn_like(expected)
        layer.weight.grad, layer.bias.grad = g[:, :-1].clone(), g[:, -1].clone()
        update.step()
        buffer = 0.6 * buffer + g
        expected = (1 - 0.1 * 0.5) * expected - 0.1 * left @ (g + 0.6 * buffer) @ right
    torch.testing.assert_close(joined(layer, torch.Tensor.detach), expected)


@pytest.mark.parametrize("exponent", [-1.0, -0.5])
def test_low_rank_power_is_exact_for_a_factor_of_that_rank_plus_noise(exponent):
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(20, 20).double())
    values = torch.full((20,), 1e-3).double()
    values[:4] = torch.tensor([5.0, 3.0, 2.0, 1.0])
    factor = basis @ torch.diag(values) @ basis.T
    found = power_of(factor, 0.01, exponent, 4, {})
    assert found["basis"].shape == (20, 4)
    dense = found["basis"] @ torch.diag(found["weights"]) @ found["basis"].T + found["rest"] * eye(20)
    torch.testing.assert_close(dense, power(factor + 0.01 * eye(20), exponent), rtol=1e-8, atol=1e-9)


def test_low_rank_power_keeps_the_trace_and_converges_over_refreshes():
    torch.manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(30, 30).double())
    factor, known = turn @ torch.diag(0.6 ** torch.arange(30).double()) @ turn.T, {}
    values, vectors = torch.linalg.eigh(factor)
    rest = values[:-8].mean()
    exact = vectors[:, -8:] @ torch.diag(values[-8:] - rest) @ vectors[:, -8:].T + rest * eye(30)
    errors = []
    for _ in range(30):
        known = power_of(factor, 0.1, -1.0, 8, known)
        dense = known["basis"] @ torch.diag(known["weights"]) @ known["basis"].T + known["rest"] * eye(30)
        damped = torch.linalg.inv(dense)
        torch.testing.assert_close(damped.trace(), factor.trace() + 0.1 * 30)
        errors.append((damped - exact - 0.1 * eye(30)).norm() / exact.norm())
    assert errors[-1] < 1e-6 and errors[-1] < errors[0] / 100


@pytest.mark.parametrize("out,columns", [(3, 20), (20, 3), (20, 20)])
def test_low_rank_step_is_that_of_its_dense_factors(out, columns):
    update, layer = by_hand(out, columns, rows=40, rank=4, lr=0.7, damping=0.1)
    powers = update.state[layer.weight]["powers"]

    def dense(power):
        if "matrix" in power:
            return power["matrix"]
        basis = power["basis"]
        return basis @ torch.diag(power["weights"]) @ basis.T + power["rest"] * eye(len(basis))

    assert [("basis" in powers[side]) for side in ("errors", "inputs")] == [out > 8, columns + 1 > 8]
    step, gradient = moved(update, layer)
    torch.testing.assert_close(step, -0.7 * dense(powers["errors"]) @ gradient @ dense(powers["inputs"]))


def test_damping_is_split_by_the_mean_eigenvalues():
    a, g = split_damping(4 * eye(5), eye(2) / 4, 0.01)
    assert a == pytest.approx(0.4) and g == pytest.approx(0.025)
    assert split_damping(0 * eye(2), eye(2), 0.01) == pytest.approx((0.1, 0.1))


def squared_length(step, moments, damping):
    """<step, (F + damping) step>."""
    if "diagonal" in moments:
        return (step**2 * (moments["diagonal"] + damping)).sum()
    a, g = split_damping(moments["inputs"], moments["errors"], damping)
    fisher = torch.kron(moments["errors"] + g * eye(len(step)), moments["inputs"] + a * eye(step.shape[1]))
    return step.flatten() @ fisher @ step.flatten()


@pytest.mark.parametrize("orthogonalise", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("kl_clip", [1e-4, 1e6])
def test_predicted_divergence_stays_within_the_bound(kl_clip, diagonal, orthogonalise):
    given = {"use_diagonal_fisher": diagonal, "orthogonalise": orthogonalise}
    net, x, y = build("mlp")
    opt = optimizer(net, lr=0.2, momentum=0.8, kl_clip=kl_clip, damping=0.1, rank=None, **EVERY, **given)
    free = optimizer(copy.deepcopy(net), lr=0.2, momentum=0.8, kl_clip=None, damping=0.1, rank=None, **EVERY, **given)
    for _ in range(3):
        before = [p.detach().clone() for p in net.parameters()]
        opt.step(x=x, target=y)
        free.step(x=x, target=y)
        step = {p: p.detach() - q for p, q in zip(net.parameters(), before, strict=True)}
        divergence = sum(
            squared_length(joined(layer, step.get), averaged(opt, layer.weight), 0.1) for layer in layers_of(net)
        )
        if kl_clip < 1:
            assert divergence == pytest.approx(kl_clip, rel=1e-8)
        else:
            assert divergence < kl_clip
            for p, q in zip(net.parameters(), free.model.parameters(), strict=True):
                assert torch.equal(p, q)


def test_step_does_not_depend_on_the_basis_of_a_layers_input():
    """x -> S x + t with W -> W S^-1, b -> b - W S^-1 t is the same function, and stays so for small damping."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(40, 3).double(), torch.randn(40, 2).double()
    basis, shift = torch.randn(3, 3).double() + 2 * eye(3), torch.randn(3).double()
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin[0].weight.copy_(net[0].weight @ torch.linalg.inv(basis))
        twin[0].bias.sub_(twin[0].weight @ shift)
    other = x @ basis.T + shift

    def gap(damping):
        models = copy.deepcopy(net), copy.deepcopy(twin)
        for model, inputs in zip(models, (x, other), strict=True):
            opt = optimizer(model, cost="mse", lr=0.1, damping=damping, **EVERY, **PLAIN)
            for _ in range(2):
                opt.step(x=inputs, target=y)
        assert not torch.allclose(models[0](x), net(x), rtol=1e-2)
        with torch.no_grad():
            return (models[0](x) - models[1](other)).norm() / (models[0](x) - net(x)).norm()

    assert gap(1e-14) < 1e-5 < 1e-3 < gap(1e-2)


# Averages, schedules, the torch interface.


def test_average_is_bias_corrected_and_takes_every_kth_batch():
    update, layer = by_hand(decay=0.7, factors_every=3, inverse_every=2, bias=False)
    batches, powers = [layer.inputs], [update.state[layer.weight]["powers"]["inputs"]["matrix"]]
    for _ in range(6):
        layer.inputs = torch.randn(20, 4).double()
        update.observe([layer])
        batches.append(layer.inputs)
        powers.append(update.state[layer.weight]["powers"]["inputs"]["matrix"])
    weights = torch.tensor([0.7**2, 0.7, 1]).double()
    taken = torch.stack([batches[i].T @ batches[i] / 20 for i in (0, 3, 6)])
    expected = torch.einsum("b,bij->ij", weights / weights.sum(), taken)
    torch.testing.assert_close(averaged(update, layer.weight)["inputs"], expected)
    # New at 0, 2, 4, 6; at 2 nothing had entered since 0, at 4 and 6 something had.
    assert [torch.equal(a, b) for a, b in pairwise(powers)] == [True, True, True, False, True, False]


def test_weight_and_bias_in_different_groups_are_separate():
    _, layer = by_hand()
    apart = NaturalGradient([{"params": [layer.weight]}, {"params": [layer.bias], "lr": 0.2}], lr=0.5, **PLAIN)
    apart.observe([layer])
    assert averaged(apart, layer.weight)["inputs"].shape == (4, 4)
    before = layer.bias.detach().clone()
    apart.step()
    torch.testing.assert_close(layer.bias.detach(), before - 0.2 * layer.bias.grad)


def test_bias_that_starts_to_train_starts_the_average_anew():
    update, layer = by_hand()
    bias, layer.bias = layer.bias, None
    update.observe([layer])
    assert averaged(update, layer.weight)["inputs"].shape == (4, 4)
    layer.bias = bias
    update.observe([layer])
    assert averaged(update, layer.weight)["inputs"].shape == (5, 5)
    assert update.state[layer.weight]["mass"] == pytest.approx(1 - update.param_groups[0]["decay"])


def test_options_may_change_on_the_way():
    for option in ("use_diagonal_fisher", "orthogonalise"):
        update, layer = by_hand(inverse_every=100)
        update.param_groups[0][option] = True
        update.observe([layer])
        step, _ = moved(update, layer)
        fresh, twin = by_hand(inverse_every=100, **{option: True})
        torch.testing.assert_close(step, moved(fresh, twin)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("diagonal", [False, True])
def test_checkpoint_continues_bit_for_bit(dtype, diagonal):
    def fresh():
        net, x, y = build("mlp")
        net, x = net.to(dtype), x.to(dtype)
        given = {"factors_every": 2, "inverse_every": 3, "rank": 2, "use_diagonal_fisher": diagonal}
        return net, x, y, mep.natural_ep(net.parameters(), model=net, **given)

    net, x, y, opt = fresh()
    for _ in range(5):
        opt.step(x=x, target=y)
    file = io.BytesIO()
    torch.save([net.state_dict(), opt.state_dict()], file)
    file.seek(0)
    twin, _, _, other = fresh()
    weights, state = torch.load(file, weights_only=True)
    twin.load_state_dict(weights)
    other.load_state_dict(state)
    clone = copy.deepcopy(opt)
    frozen = [p.detach().clone() for p in clone.model.parameters()]
    for _ in range(5):
        opt.step(x=x, target=y)
        other.step(x=x, target=y)
    assert all(torch.equal(p, q) for p, q in zip(clone.model.parameters(), frozen, strict=True))
    for _ in range(5):
        clone.step(x=x, target=y)
    for p, q, r in zip(net.parameters(), twin.parameters(), clone.model.parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(p, r) and not torch.equal(p, frozen[0])
        assert p.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_learn(dtype):
    net, x, y = build("mlp")
    net, x = net.to(dtype), x.to(dtype)
    opt = mep.natural_ep(net.parameters(), model=net)
    losses = [float(opt.step(x=x, target=y)) for _ in range(20)]
    assert losses[-1] < losses[0] / 2


def test_schedules_and_new_groups():
    net, x, y = build("mlp")
    opt = mep.natural_ep(net[0].parameters(), model=net, lr=0.1)
    opt.step(x=x, target=y)
    assert net[4].weight not in opt.state
    opt.add_param_group({"params": list(net[4].parameters()), "lr": 0.0})
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.0)
    before = [p.detach().clone() for p in net.parameters()]
    opt.step(x=x, target=y)
    schedule.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert "powers" in opt.state[net[4].weight]


def test_closure_may_observe():
    net, x, y = build("mlp")
    update = NaturalGradient(net.parameters(), lr=0.1)
    fill = estimator(net, update.observe)

    def closure():
        update.zero_grad()
        return fill(x, y).loss

    losses = [float(update.step(closure)) for _ in range(10)]
    assert losses[-1] < losses[0]


# Refusals.


def snapshot(opt):
    """The state of the update, and the parameters."""
    state = opt.state_dict()
    parameters = [p.detach() for group in opt.param_groups for p in group["params"]]
    return copy.deepcopy((state["state"], state["param_groups"], parameters))


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def test_refused_batch_leaves_the_factors_alone():
    net, x, y = build("mlp")
    opt = mep.natural_ep(net.parameters(), model=net, factors_every=1, inverse_every=1)
    opt.step(x=x, target=y)
    before = snapshot(opt)
    for bad, target in ((x * float("nan"), y), (x, y + CLASSES), (x * 1e200, y)):
        with pytest.raises(mep.MepError):
            opt.step(x=bad, target=target)
        assert_same(snapshot(opt), before)


def test_factor_that_overflows_leaves_every_layer_alone():
    update, layer = by_hand(**EVERY)
    other = nn.Parameter(torch.randn(3, 4).double())
    update.add_param_group({"params": [other]})
    before = snapshot(update)
    bad = Rows(other, None, layer.inputs, layer.errors * 1e200)
    with pytest.raises(mep.DivergedError, match="not finite"):
        update.observe([layer, bad])
    assert_same(snapshot(update), before)


def test_without_observation_there_is_no_step():
    net, x, y = build("mlp")
    opt = mep.EPOptimizer(mep.Backprop(net), NaturalGradient(net.parameters()))
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(mep.ArgumentError, match=r"was ever observed.*natural_ep.*update\.observe"):
        opt.step(x=x, target=y)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert not opt.state


def test_nothing_is_collected_for_nobody(monkeypatch):
    net, x, y = build("mlp")
    monkeypatch.setattr(equilibrium, "layer_statistics", None)
    estimator(net, None)(x, y)
    with pytest.raises(TypeError):
        estimator(net, print)(x, y)


@pytest.mark.parametrize("given", [{"observe": 3}, {"observe": print, "groups": [inhibiting(2, 0.1)]}])
def test_observer_that_cannot_be_is_refused(given):
    with pytest.raises(mep.ArgumentError, match="observe"):
        mep.EquilibriumPropagation(nn.Linear(2, 2), solver=mep.Descent(), **given)
