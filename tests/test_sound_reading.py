"""What reading a model must not get wrong, against autograd through the model and the cost as they are written.

| kind                                                  | table                                           |
|-------------------------------------------------------|-------------------------------------------------|
| code through which no gradient flows                  | `UNTRAINED`                                     |
| costs that read more than the output                  | `PENALTIES`, `LEFT_ON_MODULES`, `CRITERIA`      |
| statistics that forward writes                        | `STATISTICS`                                    |
| expressions of buffers, and buffers that are replaced | `BUFFERS`, `REPLACED`                           |
| what forward and cost read besides tensors            | `MODEL_STATE`, `AROUND_FORWARD`, `AROUND_COST`  |
| what forward moves by itself, or merely notes down    | `MOVED_BY_FORWARD`, `NOTED_DOWN`                |
| writes in place, through views                        | `WRITES`, `UNSEEN_WRITES`                       |
"""

import array
import collections
import configparser
import functools
import itertools
import os
import random
import sys
import threading
import types
import weakref
from contextvars import ContextVar
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import mep

SOLVER = mep.Sweep(tol=1e-8, settle_steps=200)
BATCH = 5


class Net(nn.Module):
    """Layers `a`, `b`, `c` around a forward given as a function of (self, x), and more modules, buffers, parameters."""

    def __init__(self, forward, **more):
        super().__init__()
        for name, value in ({"a": nn.Linear(4, 6), "b": nn.Linear(6, 6), "c": nn.Linear(6, 3)} | more).items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self.written = forward

    def forward(self, x):
        return self.written(self, x)


def first(n, x):
    return torch.tanh(n.a(x))


def rest(n, h):
    return n.c(torch.tanh(n.b(h)))


def plain(n, x):
    return rest(n, first(n, x))


def net(forward, **more):
    """A builder of a `Net`; each of `more` is a builder of its own."""
    return lambda: Net(forward, **{name: build() for name, build in more.items()})


def zeros(*shape):
    return lambda: torch.zeros(*shape)


def ones(*shape):
    return lambda: torch.ones(*shape)


def rand(*shape):
    return lambda: torch.rand(*shape)


def number(value):
    return lambda: torch.tensor(value)


def each(output, y):
    return F.cross_entropy(output, y, reduction="none")


def cross_entropy(_):
    return "cross_entropy"


def batch(seed, shape=(4,), scale=1.0):
    torch.manual_seed(seed)
    return scale * torch.randn(BATCH, *shape).double(), torch.randint(3, (BATCH,))


def made(build, make_cost):
    torch.manual_seed(0)
    model = build().double()
    cost = make_cost(model)
    return model, cost.double() if isinstance(cost, nn.Module) else cost


def modules_of(model, cost):
    return [m for m in (model, cost) if isinstance(m, nn.Module)]


def parameters_of(model, cost):
    return list(dict.fromkeys(p for m in modules_of(model, cost) for p in m.parameters()))


def buffers_of(model, cost):
    return {(i, name): b for i, m in enumerate(modules_of(model, cost)) for name, b in m.named_buffers()}


def by_autograd(model, cost, x, y):
    """One forward and backward pass of the user's own: a gradient, or None, for every parameter."""
    every = parameters_of(model, cost)
    trained = [p for p in every if p.requires_grad]
    output = model(x)
    loss = F.cross_entropy(output, y) if cost == "cross_entropy" else cost(output, y).mean()
    found = dict(zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True))
    return [found.get(p) for p in every]


def joined(parameters, gradients):
    pairs = zip(parameters, gradients, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g.detach()).flatten() for p, g in pairs])


def error_of(found, wanted, parameters):
    """The relative error of the whole gradient; one that nobody has asked for counts, too."""
    assert set(found) <= set(parameters)
    exact = joined(parameters, wanted)
    return float((joined(parameters, [found.get(p) for p in parameters]) - exact).norm() / exact.norm())


def assert_same_buffers(one, other):
    assert one.keys() == other.keys()
    for name, b in one.items():
        assert torch.equal(b, other[name]), (name, b, other[name])


def world(model, cost=None, x=None):
    """Everything that a refusal, or building an optimizer, must leave as it is."""
    every = [(i, name, m) for i, one in enumerate(modules_of(model, cost)) for name, m in one.named_modules()]
    facts = {(i, name, key): (id(v), repr(v)) for i, name, m in every for key, v in vars(m).items()}
    homes = [(i, name, home) for i, name, m in every for home in (m._parameters, m._buffers)]
    tensors = {
        (i, name, key): (id(t), t.tolist()) for i, name, home in homes for key, t in home.items() if t is not None
    }
    numpy = np.random.get_state()
    noise = torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2:]
    return facts, tensors, noise, None if x is None else x.tolist()


def assert_right(build, make_cost=cross_entropy, change=None, shape=(4,), scale=1.0, may_refuse=False):
    """Gradients, buffers and random numbers of two batches are autograd's; the second is not one that was proven.

    Between the two, `change` is made. Where the model may be refused, what is said must name a way out, and nothing may
    have moved; a gradient that is given must be right all the same.
    """
    model, cost = made(build, make_cost)
    twin, twin_cost = made(build, make_cost)
    ep = mep.EquilibriumPropagation(model, cost, solver=SOLVER, on_unsettled="raise")
    for seed, betas in ((1, [None]), (2, [1e-5, 1e-4, 1e-3])):
        if seed == 2 and change is not None:
            change(model, cost)
            change(twin, twin_cost)
        x, y = batch(seed, shape, scale if seed == 2 else 1.0)
        before = {name: b.clone() for name, b in buffers_of(model, cost).items()}
        torch.manual_seed(7)
        wanted, noise = by_autograd(twin, twin_cost, x.clone(), y), torch.get_rng_state()
        errors = []
        for beta in betas:
            with torch.no_grad():
                for name, b in buffers_of(model, cost).items():
                    b.copy_(before[name])
            ep.beta = beta
            torch.manual_seed(7)
            kept = world(model, cost, x)
            try:
                found, _ = ep.gradients(x, y)
            except mep.TraceError as refusal:
                assert may_refuse, str(refusal)
                assert "Way out" in str(refusal)
                assert world(model, cost, x) == kept
                return
            errors.append(error_of(found, wanted, parameters_of(model, cost)))
            if isinstance(cost, nn.Module):
                assert {p for p in cost.parameters() if p.requires_grad} <= found.keys()
            assert errors[-1] < {None: 0.06, 1e-5: 1e-3}.get(beta, 1), (seed, beta, errors)
            assert torch.equal(noise, torch.get_rng_state())
            assert_same_buffers(buffers_of(model, cost), buffers_of(twin, twin_cost))
        if seed == 2:
            assert errors[1] < 1e-7 or 5 < errors[2] / errors[1] < 20, errors


# No gradient flows here -------------------------------------------------------------------------------------------


def a_layer(n, x):
    with torch.no_grad():
        h = first(n, x)
    with torch.set_grad_enabled(n.tuned):
        g = torch.tanh(n.b(h))
    return n.c(g + h)


class DecoratedMethod(Net):
    @torch.no_grad()
    def target(self, x):
        return first(self, x)

    def forward(self, x):
        return self.c(torch.tanh(self.b(first(self, x))) * self.target(x))


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)

    @torch.no_grad()
    def forward(self, x):
        return torch.relu(self.norm(self.layer(x)))


def attention_weights(n, x):
    h = n.a(x)
    with torch.no_grad():
        weights = (n.b(h) @ h.transpose(1, 2)).softmax(-1)
    return n.c((weights @ h).tanh().mean(1))


def target_branch(n, x):
    with torch.no_grad():
        target = rest(n, first(n, x))
    return rest(n, first(n, 2 * x)), target


def nested(n, x):
    with torch.no_grad():
        h = first(n, x)
        with torch.enable_grad():
            g = torch.tanh(n.b(h))
            with torch.no_grad():
                mean = g.mean(1, keepdim=True)
            g = g - mean
        k = 2 * g
    return n.c(g + k)


def batch_statistics(n, x):
    h = n.a(x)
    with torch.no_grad():
        mean, var = h.mean(0), h.var(0)
    return rest(n, (h - mean) / (var + 1e-3).sqrt())


def fixed_point(n, x):
    u = n.a(x)
    with torch.no_grad():
        z = torch.zeros_like(u)
        for _ in range(5):
            z = torch.tanh(n.b(z) + u)
    return n.c(torch.tanh(n.b(z) + u))


def nothing_at_all(n, x):
    h = first(n, x)
    with torch.no_grad():
        same = nn.Identity()(h)
    return rest(n, same)


def a_cast_that_is_none(n, x):
    h = first(n, x)
    with torch.no_grad():
        same = h.contiguous().double()
    return rest(n, same)


def normalised_without_gradient(n, x):
    h = first(n, x)
    with torch.no_grad():
        shift = n.norm(h)
    return rest(n, h + n.norm(h.detach()) - 0.5 * shift)


UNTRAINED = {
    "no_grad around a layer": net(a_layer, tuned=lambda: True),
    "set_grad_enabled": net(a_layer, tuned=lambda: False),
    "a decorated method": lambda: DecoratedMethod(None),
    "a decorated forward": net(lambda n, x: rest(n, n.backbone(x)), backbone=Backbone),
    "detach": net(lambda n, x: rest(n, (h := first(n, x))) + n.c(h.detach() * h)),
    "nested enable_grad": net(nested),
    "batch statistics": net(batch_statistics),
    "batch norm of what is detached": net(normalised_without_gradient, norm=lambda: nn.BatchNorm1d(6)),
    "a fixed point": net(fixed_point),
    "nothing at all": net(nothing_at_all),
    "a cast that is none": net(a_cast_that_is_none),
}


@pytest.mark.parametrize("name", UNTRAINED)
def test_no_gradient_flows_where_autograd_has_none(name):
    assert_right(UNTRAINED[name])


def test_no_gradient_flows_through_weights_of_attention():
    assert_right(net(attention_weights), shape=(3, 4))


def cosine(_):
    return lambda output, y: 2 - 2 * F.cosine_similarity(*output)


def focal(_):
    def cost(output, y):
        with torch.no_grad():
            weight = 1 - output.softmax(1).gather(1, y.unsqueeze(1)).squeeze(1)
        return weight * each(output, y)

    return cost


@pytest.mark.parametrize(("forward", "cost"), [(target_branch, cosine), (plain, focal)], ids=lambda f: f.__name__)
def test_no_gradient_flows_into_a_target(forward, cost):
    assert_right(net(forward), cost)


# Costs that read more than the output -----------------------------------------------------------------------------


def squares(model):
    return sum(p.square().sum() for p in model.parameters())


def orthogonality(model):
    w = model.b.weight
    return (w @ w.t() - torch.eye(6, dtype=w.dtype)).square().sum()


def group_lasso(model):
    return model.b.weight.norm(dim=1).sum() + model.a.weight.norm(dim=0).sum()


PENALTIES = {
    "L2": squares,
    "L1": lambda model: sum(p.abs().sum() for p in model.parameters()),
    "group lasso": group_lasso,
    "orthogonality": orthogonality,
    "spectral": lambda model: torch.linalg.svdvals(model.b.weight)[0],
    "a parameter that forward never reads": lambda model: (model.extra - 1).square().sum(),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_penalty_on_parameters_is_part_of_the_gradient(name):
    """Beside one number per example, or, in every other case, beside one for the batch."""
    data = each if list(PENALTIES).index(name) % 2 else F.cross_entropy
    build = net(plain, extra=lambda: nn.Parameter(torch.randn(3)))
    assert_right(build, lambda model: lambda output, y: data(output, y) + 0.05 * PENALTIES[name](model))


def elastic_consolidation(model):
    old = {name: 0.5 * p.detach().clone() for name, p in model.named_parameters()}
    return lambda output, y: (
        each(output, y) + sum((p - old[name]).square().sum() for name, p in model.named_parameters())
    )


def task_uncertainty(model):
    def cost(output, y):
        s = model.log_var
        return (-s[0]).exp() * each(output, y) + (-s[1]).exp() * output.square().mean(1) + s.sum()

    return cost


@pytest.mark.parametrize("cost", [elastic_consolidation, task_uncertainty], ids=lambda f: f.__name__)
def test_cost_weighs_by_parameters_new_and_old(cost):
    assert_right(net(plain, log_var=lambda: nn.Parameter(torch.zeros(2))), cost)


def activity(reduce):
    def forward(n, x):
        h = first(n, x)
        n.aux = reduce(h.square())
        return rest(n, h)

    return forward


def a_list_made_anew(n, x):
    n.losses = []
    h = first(n, x)
    n.losses.append(h.abs().mean())
    h = torch.tanh(n.b(h))
    n.losses.append(h.square().mean())
    return n.c(h)


def a_dict_made_anew(n, x):
    h = first(n, x)
    n.losses = {"rate": h.abs().mean(1), "size": n.b(h).square().mean(1)}
    return rest(n, h)


class Logging(nn.Module):
    """Keeps a list of losses that its model clears."""

    def __init__(self):
        super().__init__()
        self.layer, self.losses = nn.Linear(6, 6), []

    def forward(self, h):
        self.losses.append(h.square().mean())
        return torch.tanh(self.layer(h))


def cleared_by_the_model(n, x):
    n.b.losses.clear()
    return n.c(n.b(first(n, x)))


class Experts(nn.Module):
    """Their balance is one number of the whole batch."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 2), nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, h):
        p = self.gate(h).softmax(1)
        self.balance = 2 * p.mean(0).square().sum()
        return sum(p[:, i : i + 1] * torch.tanh(expert(h)) for i, expert in enumerate(self.experts))


class Latent(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean, self.log_var = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, h):
        mean, log_var = self.mean(h), self.log_var(h)
        self.kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1)
        return mean + torch.randn_like(mean) * (0.5 * log_var).exp()


class Bayesian(nn.Module):
    """Its divergence is of the parameters alone."""

    def __init__(self):
        super().__init__()
        self.mean, self.rho = nn.Parameter(0.4 * torch.randn(6, 6)), nn.Parameter(torch.full((6, 6), -2.0))

    def forward(self, h):
        std = F.softplus(self.rho)
        self.kl = (0.5 * (self.mean.square() + std.square()) - std.log()).sum()
        return F.linear(h, self.mean + std * torch.randn_like(std))


def through_b(n, x):
    return n.c(n.b(first(n, x)))


def side_output(n, x):
    h = n.hidden = first(n, x)
    n.side = n.d(h)
    return rest(n, h)


def mean_size(h):
    return h.mean()


def size_of_each(h):
    return h.mean(1)


def decorrelation(m):
    h = m.hidden - m.hidden.mean(0)
    return (h.t() @ h / 4).square().sum()


LEFT_ON_MODULES = {
    "per example": (net(activity(size_of_each)), lambda m, o, y: each(o, y) + 0.3 * m.aux),
    "one number": (net(activity(mean_size)), lambda m, o, y: F.cross_entropy(o, y) + 0.3 * m.aux),
    "one number beside one each": (net(activity(mean_size)), lambda m, o, y: each(o, y) + 0.3 * m.aux),
    "a list made anew": (net(a_list_made_anew), lambda m, o, y: F.cross_entropy(o, y) + 0.3 * sum(m.losses)),
    "a dict made anew": (net(a_dict_made_anew), lambda m, o, y: each(o, y) + m.losses["rate"] + m.losses["size"]),
    "a list that is cleared": (
        net(cleared_by_the_model, b=Logging),
        lambda m, o, y: each(o, y) + 0.3 * sum(m.b.losses),
    ),
    "balance of experts": (net(through_b, b=Experts), lambda m, o, y: F.cross_entropy(o, y) + 0.3 * m.b.balance),
    "a variational latent": (net(through_b, b=Latent), lambda m, o, y: each(o, y) + 0.3 * m.b.kl),
    "weights with a prior": (net(through_b, b=Bayesian), lambda m, o, y: F.cross_entropy(o, y) + 0.03 * m.b.kl),
    "two, and a penalty": (
        net(side_output, d=lambda: nn.Linear(6, 3)),
        lambda m, o, y: each(o, y) + 0.4 * each(m.side, y) + 0.1 * m.hidden.abs().sum(1) + 0.01 * squares(m),
    ),
    "a statistic of the batch": (
        net(side_output, d=lambda: nn.Linear(6, 3)),
        lambda m, o, y: F.cross_entropy(o, y) + 0.1 * decorrelation(m),
    ),
}


@pytest.mark.parametrize("name", LEFT_ON_MODULES)
def test_value_left_on_a_module_is_part_of_the_cost(name):
    build, cost = LEFT_ON_MODULES[name]
    assert_right(build, lambda model: lambda output, y: cost(model, output, y))


class Criterion(nn.Module):
    """Parameters and modules `more` around a cost given as a function of (self, output, y)."""

    def __init__(self, function, **more):
        super().__init__()
        for name, value in more.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self.function = function

    def forward(self, output, y):
        return self.function(self, output, y)


def criterion(function, **more):
    return lambda _: Criterion(function, **{name: build() for name, build in more.items()})


def trained(*shape):
    return lambda: nn.Parameter(torch.rand(shape))


CRITERIA = {
    "weights of classes": criterion(lambda c, o, y: each(o, y) * c.w[y], w=trained(3)),
    "a temperature, one number": criterion(lambda c, o, y: F.cross_entropy(o * c.t.exp(), y), t=trained()),
    "a linear head": criterion(lambda c, o, y: each(c.head(torch.tanh(o)), y), head=lambda: nn.Linear(3, 3)),
    "a deep head with a criterion inside": criterion(
        lambda c, o, y: c.ce(c.head(o), y),
        ce=nn.CrossEntropyLoss,
        head=lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)),
    ),
    "centre loss": criterion(lambda c, o, y: each(o, y) + (o - c.centres[y]).square().sum(1), centres=trained(3, 3)),
    "centre loss, one number": criterion(
        lambda c, o, y: F.cross_entropy(o, y) + (o - c.centres.index_select(0, y)).square().mean(),
        centres=trained(3, 3),
    ),
    "weights in a buffer": criterion(
        lambda c, o, y: F.cross_entropy(o * c.t, y, c.w, reduction="none"), w=rand(3), t=trained()
    ),
    "the model inside": lambda model: Criterion(
        lambda c, o, y: each(o * c.t.exp(), y) + 0.1 * c.model.b.weight.square().sum(),
        model=model,
        t=nn.Parameter(torch.rand(())),
    ),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_criterion_with_parameters_has_its_gradient(name):
    assert_right(net(plain), CRITERIA[name])


@pytest.mark.parametrize("name", ["a temperature, one number", "a linear head", "centre loss, one number"])
def test_model_and_criterion_are_trained_together(name):
    model, cost = made(net(plain), CRITERIA[name])
    twin, twin_cost = made(net(plain), CRITERIA[name])
    both, twins = parameters_of(model, cost), parameters_of(twin, twin_cost)
    opt = mep.eqprop(both, model=model, cost=cost, lr=0.1, beta=1e-5, tol=1e-8, settle_steps=200)
    reference = torch.optim.SGD(twins, lr=0.1, momentum=0.9)
    start = [p.detach().clone() for p in both]
    for seed in range(4):
        x, y = batch(seed)
        loss = opt.step(x=x, target=y)
        reference.zero_grad()
        wanted = twin_cost(twin(x), y).mean()
        wanted.backward()
        reference.step()
        torch.testing.assert_close(loss, wanted.detach(), rtol=1e-4, atol=0)
    for p, q, before in zip(both, twins, start, strict=True):
        assert (p - q).norm() < 1e-3 * (q - before).norm()


RESTLESS = {
    "dropout": criterion(lambda c, o, y: each(c.drop(o), y), drop=lambda: nn.Dropout(0.5)),
    "noise": lambda _: lambda o, y: each(o + torch.randn_like(o), y),
    "batch normalisation": criterion(lambda c, o, y: each(c.norm(o), y), norm=lambda: nn.BatchNorm1d(3, eps=0.1)),
    "a moving average": criterion(
        lambda c, o, y: (c.m.lerp_(o.detach().mean(0), 0.1), each(o - c.m, y))[1], m=zeros(3)
    ),
}


@pytest.mark.parametrize("name", RESTLESS)
def test_criterion_that_draws_or_keeps_statistics_is_right_or_refused(name):
    assert_right(net(plain), RESTLESS[name], may_refuse=True)


# Statistics that forward writes -----------------------------------------------------------------------------------


def multiplied_and_added(n, x):
    h = first(n, x)
    if n.training:
        with torch.no_grad():
            n.m.mul_(0.9).add_(h.mean(0), alpha=0.1)
    return rest(n, h - n.m)


def lerped(n, x):
    h = first(n, x)
    n.m.lerp_(h.detach().mean(0), 0.1)
    n.v.lerp_(h.detach().var(0), 0.1)
    return rest(n, (h - n.m) / (n.v + 1e-5).sqrt())


def bound_anew(n, x):
    h = first(n, x)
    n.m = 0.9 * n.m + 0.1 * h.detach().mean(0)
    return rest(n, h - n.m)


def counted_anew(n, x):
    n.n = n.n + 1
    return rest(n, first(n, x) * n.n.to(x.dtype).rsqrt())


def examples_counted(n, x):
    n.n.add_(len(x))
    return rest(n, first(n, x))


def unbiased(n, x):
    h = first(n, x)
    n.n += 1
    n.m.mul_(0.9).add_(0.1 * h.detach().mean(0))
    return rest(n, h - n.m / (1 - 0.9**n.n))


def largest_seen(n, x):
    h = first(n, x)
    n.m.copy_(torch.maximum(n.m, h.detach().abs().amax(0)))
    return rest(n, h / (n.m + 0.1))


def a_queue(n, x):
    h = first(n, x)
    n.q.copy_(n.q.roll(2, 0))
    n.q[:2] = h.detach()[:2]
    return rest(n, h + n.q.mean(0))


def noise_noted(n, x):
    h = F.dropout(first(n, x), 0.3, n.training)
    n.m.normal_().mul_(0.1).add_(h.detach().mean(0))
    return rest(n, h - n.m)


class Codes(nn.Module):
    """A codebook of moving averages."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", 0.5 * torch.randn(4, 6))
        self.register_buffer("size", torch.ones(4))
        self.register_buffer("sums", self.codes.clone())

    def forward(self, h):
        with torch.no_grad():
            nearest = torch.cdist(h, self.codes).argmin(1)
            chosen = F.one_hot(nearest, 4).to(h.dtype)
            if self.training:
                self.size.mul_(0.9).add_(chosen.sum(0), alpha=0.1)
                self.sums.mul_(0.9).add_(chosen.t() @ h, alpha=0.1)
                self.codes.copy_(self.sums / self.size.unsqueeze(1))
        q = F.embedding(nearest, self.codes)
        self.commitment = (h - q).square().mean()
        return h + (q - h).detach()


class CodesBoundAnew(Codes):
    def forward(self, h):
        distance = h.square().sum(1, keepdim=True) - 2 * h @ self.codes.t() + self.codes.square().sum(1)
        chosen = F.one_hot(distance.argmin(1), 4).to(h.dtype)
        q = chosen @ self.codes
        if self.training:
            self.size = 0.9 * self.size + 0.1 * chosen.sum(0)
            self.sums = 0.9 * self.sums + 0.1 * (chosen.t() @ h).detach()
            self.codes = self.sums / self.size.unsqueeze(1)
        self.commitment = (h - q.detach()).square().mean()
        return h + (q - h).detach()


class OwnSpectralNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6))
        self.register_buffer("u", F.normalize(torch.randn(6), dim=0))

    def forward(self, h):
        with torch.no_grad():
            v = F.normalize(self.w.t() @ self.u, dim=0)
            u = F.normalize(self.w @ v, dim=0)
            if self.training:
                self.u.copy_(u)
        return F.linear(h, self.w / (u @ self.w @ v))


def normalised(norm):
    return lambda: nn.Sequential(nn.Linear(4, 6), norm(), nn.Tanh(), nn.Linear(6, 3))


def instances():
    norm = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
    return nn.Sequential(nn.Conv1d(2, 4, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))


def commitment(model):
    return lambda output, y: F.cross_entropy(output, y) + 0.25 * model.q.commitment


def quantised(n, x):
    return rest(n, n.q(n.a(x)))


STATISTICS = {
    "mul_ and add_": net(multiplied_and_added, m=zeros(6)),
    "lerp_": net(lerped, m=zeros(6), v=ones(6)),
    "bound anew": net(bound_anew, m=zeros(6)),
    "a counter bound anew": net(counted_anew, n=number(0)),
    "a counter of examples": net(examples_counted, n=number(0)),
    "an unbiased average": net(unbiased, n=number(0), m=zeros(6)),
    "the largest seen": net(largest_seen, m=zeros(6)),
    "a queue": net(a_queue, q=zeros(8, 6)),
    "noise": net(noise_noted, m=zeros(6)),
    "codes": (net(quantised, q=Codes), commitment),
    "codes bound anew": (net(quantised, q=CodesBoundAnew), commitment),
    "batch norm": normalised(lambda: nn.BatchNorm1d(6)),
    "batch norm, cumulative": normalised(lambda: nn.BatchNorm1d(6, momentum=None)),
    "instance norm": (instances, cross_entropy, (2, 6)),
    "spectral norm": net(through_b, b=lambda: spectral_norm(nn.Linear(6, 6), n_power_iterations=2)),
    "spectral norm of old": net(through_b, b=lambda: nn.utils.spectral_norm(nn.Linear(6, 6))),
    "spectral norm by hand": net(through_b, b=OwnSpectralNorm),
}


def statistics_case(name):
    case = STATISTICS[name] if isinstance(STATISTICS[name], tuple) else (STATISTICS[name],)
    return (*case, cross_entropy, (4,))[: len(case)] + (cross_entropy, (4,))[len(case) - 1 :]


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_are_written_once_a_step_and_bit_for_bit(name):
    """Each step is compared with one forward and backward pass of a copy, from the same weights and buffers."""
    build, make_cost, shape = statistics_case(name)
    model, cost = made(build, make_cost)
    twin, twin_cost = made(build, make_cost)
    opt = mep.eqprop(model.parameters(), model=model, cost=cost, lr=0.1, beta=1e-5, tol=1e-8, settle_steps=200)
    for seed in range(3):
        x, y = batch(seed, shape)
        twin.load_state_dict(model.state_dict())
        torch.manual_seed(7)
        wanted, noise = by_autograd(twin, twin_cost, x, y), torch.get_rng_state()
        torch.manual_seed(7)
        opt.step(x=x, target=y)
        assert torch.equal(noise, torch.get_rng_state())
        assert_same_buffers(buffers_of(model, None), buffers_of(twin, None))
        trained = {p: p.grad for p in model.parameters() if p.grad is not None}
        assert error_of(trained, wanted, list(model.parameters())) < 1e-3


@pytest.mark.parametrize("name", ["bound anew", "noise", "batch norm", "spectral norm of old"])
def test_building_and_reading_change_nothing(name):
    build, make_cost, shape = statistics_case(name)
    model, cost = made(build, make_cost)
    x, _ = batch(1, shape)
    kept = world(model, cost, x)
    mep.EquilibriumPropagation(model, cost)
    mep.smep(model.parameters(), model=model, cost=cost)
    mep.trace(model, x)
    assert world(model, cost, x) == kept


# Expressions of buffers, and buffers that are replaced ------------------------------------------------------------


def causal(n, x):
    h, t = n.a(x), x.size(1)
    scores = (h @ h.transpose(1, 2)).masked_fill(~n.mask[:t, :t], float("-inf"))
    return n.c((scores.softmax(-1) @ torch.tanh(n.b(h))).mean(1))


def positions(n, x):
    return n.c(torch.tanh(n.b(torch.tanh(n.a(x) + n.position[:, : x.size(1)]))).mean(1))


def frozen_norm(n, x):
    scale = n.w * (n.v + 1e-5).rsqrt()
    return rest(n, first(n, x) * scale + (n.shift - n.m * scale))


def pruned(n, x):
    return n.c(torch.tanh(F.linear(first(n, x), n.b.weight * (n.kept > 0.5), n.b.bias)))


BUFFERS = {
    "a temperature": (net(lambda n, x: rest(n, torch.tanh(n.a(x) * (1 / (n.t + 1e-3)))), t=number(0.7)), (4,)),
    "its number": (net(lambda n, x: rest(n, first(n, x) * n.t.item()), t=number(0.7)), (4,)),
    "frozen norm": (net(frozen_norm, w=rand(6), v=rand(6), shift=rand(6), m=rand(6)), (4,)),
    "pruned weights": (net(pruned, kept=rand(6, 6)), (4,)),
    "a causal mask": (net(causal, mask=lambda: torch.ones(8, 8).tril().bool()), (4, 4)),
    "batch norm in eval mode": (lambda: normalised(lambda: nn.BatchNorm1d(6))().eval(), (4,)),
}


def new_values(model):
    """Other values for every buffer."""
    torch.manual_seed(11)
    for name, b in model.named_buffers():
        if b.dtype == torch.bool:
            yield name, torch.ones_like(b).tril(1)
        else:
            yield name, torch.rand_like(b) if b.is_floating_point() else b.flip(0) if b.ndim else b + 1


def home_of(model, name):
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key


def filled(model, _):
    for name, new in new_values(model):
        model.get_buffer(name).copy_(new)


def a_checkpoint(model, _):
    model.load_state_dict(model.state_dict() | dict(new_values(model)))


def a_checkpoint_assigned(model, _):
    model.load_state_dict(dict(new_values(model)), strict=False, assign=True)


def assigned(model, _):
    for name, new in list(new_values(model)):
        setattr(*home_of(model, name), new)


def registered_again(model, _):
    for name, new in list(new_values(model)):
        module, key = home_of(model, name)
        module.register_buffer(key, new)


def new_data(model, _):
    for name, new in new_values(model):
        model.get_buffer(name).data = new


REPLACED = [a_checkpoint, a_checkpoint_assigned, assigned, registered_again, new_data]


@pytest.mark.parametrize("name", BUFFERS)
def test_expressions_of_buffers_see_what_is_written_later(name):
    build, shape = BUFFERS[name]
    assert_right(build, change=filled, shape=shape)


@pytest.mark.parametrize("change", REPLACED, ids=lambda f: f.__name__)
def test_buffers_are_seen_however_they_are_replaced(change):
    assert_right(BUFFERS["frozen norm"][0], change=change)


def longer(model, _):
    model.register_buffer("position", torch.linspace(0, 1, 72).view(1, 12, 6).double())


def test_buffer_of_another_length_is_seen():
    assert_right(net(positions, position=rand(1, 8, 6)), change=longer, shape=(4, 4))


def test_buffer_of_a_criterion_is_seen():
    def change(_, cost):
        cost.w.copy_(torch.tensor([3.0, 0.2, 1.0]))

    assert_right(net(plain), CRITERIA["weights in a buffer"], change=change)


@pytest.mark.parametrize("name", ["batch norm", "spectral norm"])
def test_checkpoint_is_loaded_after_building(name):
    """The optimizer is built first; the checkpoint holds other weights and other statistics."""
    build, make_cost, shape = statistics_case(name)
    model, cost = made(build, make_cost)
    twin, twin_cost = made(build, make_cost)
    ep = mep.EquilibriumPropagation(model, cost, beta=1e-5, solver=SOLVER)
    ep.gradients(*batch(1, shape))
    with torch.no_grad():
        for t in (*twin.parameters(), *(b for b in twin.buffers() if b.is_floating_point())):
            t.mul_(1.5)
    model.load_state_dict(twin.state_dict())
    x, y = batch(2, shape)
    found, _ = ep.gradients(x, y)
    assert error_of(found, by_autograd(twin, twin_cost, x, y), list(model.parameters())) < 1e-3
    assert_same_buffers(buffers_of(model, cost), buffers_of(twin, twin_cost))


# What forward and cost read besides tensors -----------------------------------------------------------------------


@dataclass
class Config:
    gain: float = 1.0
    sizes: list = field(default_factory=lambda: [1.0, 2.0])
    inner: object = None


class Slotted:
    __slots__ = ("gain",)

    def __init__(self):
        self.gain = 1.0


class Settings:
    """A configuration that is a class."""

    gain = 1.0


REFERRED = []
"""What only weak references lead to."""


class OtherSettings:
    gain = 2.0


class Gained(nn.Module):
    """A network whose first layer is scaled by `gain()`, from `state`, which is no tensor that torch knows of."""

    shared = 1.0
    table = {"gain": 1.0}  # noqa: RUF012

    def __init__(self, state=None, gain=lambda m: 1.0, act=None):
        super().__init__()
        self.a, self.c, self.act = nn.Linear(4, 6), nn.Linear(6, 3), act
        self.state, self.read = state, gain

    def gain(self):
        return self.read(self)

    def forward(self, x):
        return self.c(first(self, x) * self.gain())


def gained(state, gain):
    return lambda: Gained(state(), gain)


def set_state(value):
    return lambda model, _: setattr(model, "state", value)


def on_state(change):
    return lambda model, _: change(model.state)


def nest(depth):
    return Config(inner=nest(depth - 1)) if depth else Config()


def deep(config):
    return deep(config.inner) if config.inner else config


def array_of_twos(state):
    state[0] = 2


def settings_file():
    parser = configparser.ConfigParser()
    parser.read_string("[a]\ng = 1.0")
    return parser


def settings_doubled(parser):
    parser["a"]["g"] = "2.0"


def referred():
    REFERRED.append(Config())
    return weakref.ref(REFERRED[-1])


def other_settings(settings):
    settings.__class__ = OtherSettings


MODEL_STATE = {
    "a number": (gained(lambda: 1.0, lambda m: m.state), set_state(2.0)),
    "a flag": (gained(lambda: True, lambda m: 2.0 if m.state else 1.0), set_state(False)),
    "a name": (gained(lambda: "sin", lambda m: getattr(m.a.bias.detach(), m.state)()), set_state("cos")),
    "a list": (gained(lambda: [1.0, 2.0], lambda m: sum(m.state)), on_state(lambda s: s.append(3.0))),
    "a dict": (gained(lambda: {"g": 1.0}, lambda m: m.state["g"]), on_state(lambda s: s.update(g=2.0))),
    "a set": (gained(lambda: {1.0}, lambda m: sum(m.state)), on_state(lambda s: s.add(2.0))),
    "a deque": (gained(lambda: collections.deque([1.0]), lambda m: m.state[0]), on_state(lambda s: s.appendleft(2.0))),
    "a dataclass": (gained(Config, lambda m: m.state.gain), on_state(lambda s: setattr(s, "gain", 2.0))),
    "a deep dataclass": (
        gained(lambda: nest(6), lambda m: deep(m.state).gain),
        on_state(lambda s: setattr(deep(s), "gain", 2.0)),
    ),
    "a namespace": (
        gained(lambda: types.SimpleNamespace(model=types.SimpleNamespace(gain=1.0)), lambda m: m.state.model.gain),
        on_state(lambda s: setattr(s.model, "gain", 2.0)),
    ),
    "an object with slots": (gained(Slotted, lambda m: m.state.gain), on_state(lambda s: setattr(s, "gain", 2.0))),
    "an array": (gained(lambda: np.ones(6), lambda m: torch.from_numpy(m.state)), on_state(lambda s: s.fill(2))),
    "an array in a dict": (
        gained(lambda: {"deep": {"array": np.ones(6)}}, lambda m: torch.tensor(m.state["deep"]["array"])),
        on_state(lambda s: s["deep"]["array"].fill(2)),
    ),
    "a plain tensor": (gained(lambda: torch.ones(6).double(), lambda m: m.state), on_state(lambda s: s.fill_(2))),
    "a plain tensor's data": (
        gained(lambda: torch.ones(6).double(), lambda m: m.state),
        on_state(lambda s: s.data.fill_(2)),
    ),
    "plain tensors in a list": (
        gained(lambda: [torch.ones(6).double()], lambda m: m.state[0]),
        on_state(lambda s: s.insert(0, 2 * s[0])),
    ),
    "functions in a list": (
        gained(lambda: [torch.sin, torch.cos], lambda m: m.state[0](m.a.bias.detach())),
        on_state(lambda s: s.reverse()),
    ),
    "a partial function": (
        gained(lambda: functools.partial(torch.full, (6,), fill_value=1.0), lambda m: m.state()),
        on_state(lambda s: s.keywords.update(fill_value=2.0)),
    ),
    "an array of Python's": (gained(lambda: array.array("d", [1.0]), lambda m: m.state[0]), on_state(array_of_twos)),
    "bytes": (gained(lambda: bytearray([1]), lambda m: m.state[0]), on_state(array_of_twos)),
    "a dict of one's own": (
        gained(lambda: collections.UserDict(g=1.0), lambda m: m.state["g"]),
        on_state(lambda s: s.update(g=2.0)),
    ),
    "several dicts": (
        gained(lambda: collections.ChainMap({}, {"g": 1.0}), lambda m: m.state["g"]),
        on_state(lambda s: s.maps[1].update(g=2.0)),
    ),
    "a file of settings": (gained(settings_file, lambda m: m.state.getfloat("a", "g")), on_state(settings_doubled)),
    "a section of settings": (
        gained(lambda: settings_file()["a"], lambda m: m.state.getfloat("g")),
        on_state(lambda s: settings_doubled(s.parser)),
    ),
    "a distribution": (
        gained(lambda: torch.distributions.Normal(torch.ones(6).double(), 1.0), lambda m: m.state.loc),
        on_state(lambda s: setattr(s, "loc", 2 * s.loc)),
    ),
    "what belongs to a thread": (gained(threading.local, lambda m: getattr(m.state, "g", 1.0)),
                                 on_state(lambda s: setattr(s, "g", 2.0))),
    "a variable of a context": (gained(lambda: ContextVar("g", default=1.0), lambda m: m.state.get()),
                                on_state(lambda s: s.set(2.0))),
    "a weak reference": (gained(referred, lambda m: m.state().gain), on_state(lambda s: setattr(s(), "gain", 2.0))),
    "the class of an object": (gained(Settings, lambda m: m.state.gain), on_state(other_settings)),
    "the class of a module": (
        lambda: Gained(gain=lambda m: m.act(m.a.bias.detach()), act=nn.Tanh()),
        lambda model, _: setattr(model.act, "__class__", nn.Sigmoid),
    ),
}  # fmt: skip
"""What hangs on a module, and how it changes between two steps."""


@pytest.mark.parametrize("name", MODEL_STATE)
def test_state_of_a_model_is_seen_when_it_changes(name):
    build, change = MODEL_STATE[name]
    assert_right(build, change=change)


MODES = {
    "eval mode": lambda model, _: model.eval(),
    "to and fro": lambda model, _: model.eval().train(),
    "the probability of dropout": lambda model, _: setattr(model.drop, "p", 0.2),
    "the momentum of statistics": lambda model, _: setattr(model.norm, "momentum", 0.5),
    "frozen": lambda model, _: model.b.requires_grad_(False),
}


@pytest.mark.parametrize("name", MODES)
def test_mode_of_a_model_is_seen_when_it_changes(name):
    build = net(
        lambda n, x: n.c(n.drop(torch.tanh(n.norm(n.a(x))))),
        norm=lambda: nn.BatchNorm1d(6),
        drop=lambda: nn.Dropout(0.5),
    )
    assert_right(build, change=MODES[name])


GAIN = 1.0
GAINS = {"gain": 1.0}
ARRAY = np.ones(6)
TENSOR = torch.ones(6).double()
OTHER = types.ModuleType("other")
OTHER.GAIN = 1.0
OTHER.inner = types.ModuleType("other.inner")
OTHER.inner.GAIN = 1.0
sys.modules["other_of_these_tests"] = OTHER


def global_gain():
    return GAIN


class ReadsGlobal(Gained):
    def forward(self, x):
        return self.c(first(self, x) * GAIN)


class ReadsContainer(Gained):
    def forward(self, x):
        return self.c(first(self, x) * GAINS["gain"])


class ReadsArray(Gained):
    def forward(self, x):
        return self.c(first(self, x) * torch.as_tensor(ARRAY))


class ReadsTensor(Gained):
    def forward(self, x):
        return self.c(first(self, x) * TENSOR)


class ReadsThroughFunction(Gained):
    def forward(self, x):
        return self.c(first(self, x) * global_gain())


class ReadsInMethod(Gained):
    def gain(self):
        return GAIN


class ReadsInGenerator(Gained):
    def forward(self, x):
        return self.c(sum(first(self, x) * GAIN for _ in range(2)))


class ReadsOtherModule(Gained):
    def forward(self, x):
        return self.c(first(self, x) * OTHER.GAIN)


class ReadsChain(Gained):
    def forward(self, x):
        return self.c(first(self, x) * OTHER.inner.GAIN)


class ReadsLocally(Gained):
    def forward(self, x):
        import other_of_these_tests

        return self.c(first(self, x) * other_of_these_tests.GAIN)


class ReadsEnvironment(Gained):
    def forward(self, x):
        return self.c(first(self, x) * float(os.environ.get("A_GAIN", "1")))


class ReadsTorch(Gained):
    def forward(self, x):
        return self.c(F.silu(first(self, x)))


class ReadsSettings(Gained):
    def forward(self, x):
        return self.c(first(self, x) * Settings.gain)


class ReadsItsClass(Gained):
    def gain(self):
        return self.shared


class ReadsTableOfItsClass(Gained):
    def gain(self):
        return self.table["gain"]


class ReadsDefault(Gained):
    def forward(self, x, gain=1.0):
        return self.c(first(self, x) * gain)


def reads_closure():
    gain, box = 1.0, [1.0]

    class ReadsClosure(Gained):
        def forward(self, x):
            return self.c(first(self, x) * gain * box[0])

        def turn(self):
            nonlocal gain
            gain = 2.0
            box[0] = 3.0

    return ReadsClosure()


def doubled(layer, x):
    return F.linear(x, 2 * layer.weight, layer.bias)


def in_this_module(name, value):
    return lambda patch: patch.setitem(globals(), name, value)


AROUND_FORWARD = {
    "a global": (ReadsGlobal, in_this_module("GAIN", 2.0)),
    "a global container": (ReadsContainer, lambda patch: patch.setitem(GAINS, "gain", 2.0)),
    "a global array": (ReadsArray, lambda patch: ARRAY.fill(2)),
    "a global tensor": (ReadsTensor, lambda patch: TENSOR.fill_(2)),
    "another global tensor": (ReadsTensor, in_this_module("TENSOR", torch.full((6,), 3.0).double())),
    "a global in a function": (ReadsThroughFunction, in_this_module("GAIN", 2.0)),
    "a global in a method": (ReadsInMethod, in_this_module("GAIN", 2.0)),
    "a global in a generator": (ReadsInGenerator, in_this_module("GAIN", 2.0)),
    "a global of another module": (ReadsOtherModule, lambda patch: patch.setattr(OTHER, "GAIN", 2.0)),
    "a global of a module in a module": (ReadsChain, lambda patch: patch.setattr(OTHER.inner, "GAIN", 2.0)),
    "a global of a module imported there": (
        ReadsLocally, lambda patch: patch.setattr(sys.modules["other_of_these_tests"], "GAIN", 2.0)
    ),
    "the environment": (ReadsEnvironment, lambda patch: patch.setenv("A_GAIN", "2")),
    "a function of torch's": (ReadsTorch, lambda patch: patch.setattr(F, "silu", torch.sin)),
    "what torch's layers do": (Gained, lambda patch: patch.setattr(nn.Linear, "forward", doubled)),
    "a class of settings": (ReadsSettings, lambda patch: patch.setattr(Settings, "gain", 2.0)),
    "an attribute of the class": (ReadsItsClass, lambda patch: patch.setattr(ReadsItsClass, "shared", 2.0)),
    "a dict of its parent": (ReadsTableOfItsClass, lambda patch: patch.setitem(Gained.table, "gain", 2.0)),
    "a default": (ReadsDefault, lambda patch: patch.setattr(ReadsDefault.forward, "__defaults__", (2.0,))),
    "a method of the class": (ReadsItsClass, lambda patch: patch.setattr(ReadsItsClass, "gain", lambda self: 2.0)),
}  # fmt: skip
"""What stands around a model's code, and how it changes between two steps."""


@pytest.mark.parametrize("name", AROUND_FORWARD)
def test_what_forward_reads_from_around_it_is_seen_when_it_changes(name, monkeypatch):
    build, change = AROUND_FORWARD[name]
    monkeypatch.setitem(globals(), "ARRAY", np.ones(6))
    monkeypatch.setitem(globals(), "TENSOR", torch.ones(6).double())
    assert_right(build, change=lambda *_: change(monkeypatch))


def test_closure_of_forward_is_seen_when_it_changes():
    assert_right(reads_closure, change=lambda model, _: model.turn())


class Trainer:
    kind = 0.1

    def __init__(self, model):
        self.model, self.weight, self.options = model, 0.1, {"weight": 0.1}

    def penalised(self, output, y):
        return each(output, y) + self.weight * self.options["weight"] * squares(self.model)

    def penalised_by_class(self, output, y):
        return each(output, y) + self.kind * squares(self.model)

    def penalised_by_global(self, output, y):
        return each(output, y) + GAIN * squares(self.model)

    __call__ = penalised


def by_closure(model):
    weight = 0.1

    def cost(output, y):
        return F.cross_entropy(output, y) + weight * squares(model)

    def turn():
        nonlocal weight
        weight = 1.0

    cost.turn = turn
    return cost


def by_default(model):
    def cost(output, y, weight=0.1, *, more=0.1):
        return F.cross_entropy(output, y) + (weight + more) * squares(model)

    return cost


def by_partial(model):
    return functools.partial(lambda output, y, weight: F.cross_entropy(output, y) + weight * squares(model), weight=0.1)


def by_schedule(model):
    epoch = [0]

    def weight():
        return 0.1 + epoch[0]

    def cost(output, y):
        return F.cross_entropy(output, y) + weight() * squares(model)

    cost.epoch = epoch
    return cost


def by_global(model):
    return lambda output, y: F.cross_entropy(output, y) + GAIN * squares(model)


def by_global_in_generator(model):
    return lambda output, y: F.cross_entropy(output, y) + sum(GAIN * p.square().sum() for p in model.parameters())


def by_margin(_):
    return Criterion(
        lambda c, o, y: each(o * c.t - c.margin["m"] * F.one_hot(y, 3), y), t=trained()(), margin={"m": 0.1}
    )


def global_gain_doubled(*_):
    globals()["GAIN"] = 2.0


AROUND_COST = {
    "an attribute of a trainer": (lambda m: Trainer(m).penalised, lambda m, c: setattr(c.__self__, "weight", 1.0)),
    "a dict of a trainer": (lambda m: Trainer(m).penalised, lambda m, c: c.__self__.options.update(weight=1.0)),
    "a class of a trainer": (lambda m: Trainer(m).penalised_by_class, lambda m, c: setattr(Trainer, "kind", 1.0)),
    "a global of a trainer": (lambda m: Trainer(m).penalised_by_global, global_gain_doubled),
    "an object that is called": (Trainer, lambda m, c: setattr(c, "weight", 1.0)),
    "a dict of a criterion": (by_margin, lambda m, c: c.margin.update(m=1.0)),
    "the mode of a criterion": (
        criterion(lambda c, o, y: each(o * c.t, y) * (1 if c.training else o.square().sum(1)), t=trained()),
        lambda m, c: c.eval(),
    ),
    "a closure": (by_closure, lambda m, c: c.turn()),
    "a default": (by_default, lambda m, c: setattr(c, "__defaults__", (1.0,))),
    "a default by name": (by_default, lambda m, c: setattr(c, "__kwdefaults__", {"more": 1.0})),
    "a partial function": (by_partial, lambda m, c: c.keywords.update(weight=1.0)),
    "a schedule": (by_schedule, lambda m, c: c.epoch.__setitem__(0, 1)),
    "a global": (by_global, global_gain_doubled),
    "a global in a generator": (by_global_in_generator, global_gain_doubled),
}
"""What a cost that reads parameters depends on, and how it changes between two steps."""


@pytest.mark.parametrize("name", AROUND_COST)
def test_what_a_cost_reads_is_seen_when_it_changes(name, monkeypatch):
    monkeypatch.setitem(globals(), "GAIN", 0.1)
    monkeypatch.setattr(Trainer, "kind", 0.1)
    make_cost, change = AROUND_COST[name]
    assert_right(Gained, make_cost, change=change)


# What forward moves by itself -------------------------------------------------------------------------------------


class Moving(Gained):
    """`move` is called with the module, before everything else."""

    def __init__(self, state, move):
        super().__init__(state)
        self.move = move

    def forward(self, x):
        scale = self.move(self)
        return self.c(first(self, x) * (1.0 if scale is None else scale))


def moving(state, move):
    return lambda: Moving(state(), move)


def counting(m):
    m.state += 1


def counting_until(m):
    m.state += 1
    return 2.0 if m.state > 100 else 1.0


def counting_in_a_dict(m):
    m.state["calls"] += 1


def counting_in_a_list(m):
    m.state[0] += 1


def counting_in_slots(m):
    m.state.gain += 1


def warming_up(m):
    m.state = min(m.state + 1, 10)
    return m.state / 10


def flipping(m):
    m.state = not m.state
    return 2.0 if m.state else 1.0


def averaging(m):
    m.state = 0.9 * m.state + 0.1 * m.a.weight.detach().mean()
    return m.state


def averaging_in_place(m):
    m.state.mul_(0.9).add_(0.2)
    return m.state


MOVED_BY_FORWARD = {
    "a counter": moving(lambda: 0, counting),
    "a counter that will be used": moving(lambda: 0, counting_until),
    "in a dict": moving(lambda: {"calls": 0}, counting_in_a_dict),
    "in a list": moving(lambda: [0], counting_in_a_list),
    "in slots": moving(Slotted, counting_in_slots),
    "warm-up": moving(lambda: 0, warming_up),
    "a flag": moving(lambda: False, flipping),
    "an iterator": moving(lambda: itertools.cycle([1.0, 2.0, 3.0]), lambda m: next(m.state)),
    "a plain tensor": moving(lambda: torch.ones(()).double(), averaging),
    "a plain tensor in place": moving(lambda: torch.ones(()).double(), averaging_in_place),
    "random depth": moving(lambda: None, lambda m: 2.0 if random.random() < 0.5 else 1.0),
    "NumPy's noise": moving(lambda: None, lambda m: np.random.rand()),
}


@pytest.mark.parametrize("name", MOVED_BY_FORWARD)
def test_state_that_forward_moves_is_refused_and_nothing_moves(name):
    model, _ = made(MOVED_BY_FORWARD[name], cross_entropy)
    x, y = batch(1)
    ep = mep.EquilibriumPropagation(model, solver=SOLVER)
    kept = world(model, None, x)
    with pytest.raises(mep.TraceError, match=r"(?s)Way out: .*(buffer|input|rand|leaves=)") as refusal:
        ep.gradients(x, y)
    assert world(model, None, x) == kept
    assert "Moving" in str(refusal.value)


def counted(function):
    """The next to last of a hundred calls doubles its result."""
    calls = 0

    @functools.wraps(function)
    def call(*args):
        nonlocal calls
        calls += 1
        return function(*args) * (2 if calls == 99 else 1)

    return call


def counted_on_itself(function):
    @functools.wraps(function)
    def call(*args):
        call.calls += 1
        return function(*args) * (2 if call.calls == 99 else 1)

    call.calls = 0
    return call


class Counted:
    """A decorator that is a class, for methods."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __get__(self, module, kind=None):
        return functools.partial(self, module)

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args) * (2 if self.calls == 99 else 1)


def decorating_a_class(decorate):
    kind = type("Decorated", (Net,), {"forward": decorate(Net.forward)})
    return kind(plain)


def decorating_a_layer(decorate):
    model = Net(plain)
    model.b.forward = decorate(model.b.forward)
    return model


def decorating_a_class_of_layers(decorate):
    kind = type("Decorated", (nn.Linear,), {"forward": decorate(nn.Linear.forward)})
    return Net(plain, b=kind(6, 6))


def decorating_a_function(decorate):
    function = decorate(F.softplus)
    return Net(lambda n, x: n.c(function(first(n, x))))


def decorating_without_gradient(decorate):
    function = torch.no_grad()(decorate(F.softplus))
    return Net(lambda n, x: n.c(first(n, x) * function(n.b.bias)))


PLACES = [
    decorating_a_class, decorating_a_layer, decorating_a_class_of_layers, decorating_a_function,
    decorating_without_gradient,
]  # fmt: skip


@pytest.mark.parametrize("decorate", [counted, counted_on_itself, Counted])
@pytest.mark.parametrize("place", PLACES, ids=lambda f: f.__name__)
def test_counts_in_decorators_are_refused_at_the_first_step(place, decorate):
    """What torch's functions are wrapped in is the user's code, and what torch's decorators wrap is, too."""
    model, (x, y) = place(decorate).double(), batch(1)
    kept = world(model, None, x)
    with pytest.raises(mep.TraceError, match=r"(?s)calls of .* changes whenever forward runs.*Way out"):
        mep.EquilibriumPropagation(model, solver=SOLVER).gradients(x, y)
    assert world(model, None, x) == kept


def test_closure_of_a_decorator_is_seen_when_it_changes():
    def made():
        gain = 1.0

        @functools.wraps(F.softplus)
        def act(h):
            return gain * F.softplus(h)

        def turn(*_):
            nonlocal gain
            gain = 2.0

        model = Net(lambda n, x: n.c(act(first(n, x))))
        model.turn = turn
        return model

    assert_right(made, change=lambda model, _: model.turn())


CACHE = {}
LOG = []


@functools.lru_cache
def cached_table(n):
    return torch.linspace(0.1, 1, n).double()


def from_a_global_cache(n, x):
    if 6 not in CACHE:
        CACHE[6] = torch.linspace(0.1, 1, 6).double()
    return n.c(first(n, x) * CACHE[6])


def made_at_the_first_call(n, x):
    if n.table is None:
        n.table = torch.linspace(0.1, 1, 6).double()
    return n.c(first(n, x) * n.table)


def noting(note):
    def forward(n, x):
        h = first(n, x)
        note(n, h)
        return n.c(h)

    return forward


NOTED_DOWN = {
    "the last activations": net(noting(lambda n, h: setattr(n, "last", h))),
    "a list of the last activations": net(noting(lambda n, h: setattr(n, "last", [h.detach()]))),
    "a dict of the last activations": net(noting(lambda n, h: setattr(n, "last", {"h": h}))),
    "a log": net(noting(lambda n, h: n.log.append(h.detach())), log=list),
    "a number": net(noting(lambda n, h: setattr(n, "last", h.mean().item()))),
    "a shape": net(noting(lambda n, h: setattr(n, "last", tuple(h.shape)))),
    "a global log": net(noting(lambda n, h: LOG.append(h.detach()))),
    "a table made at the first call": net(made_at_the_first_call, table=lambda: None),
    "a global cache": net(from_a_global_cache),
    "functools.lru_cache": net(lambda n, x: n.c(first(n, x) * cached_table(6))),
}


@pytest.mark.parametrize("name", NOTED_DOWN)
def test_what_forward_notes_down_does_not_disturb(name, monkeypatch):
    """Nor does a recording leave tensors without numbers in lists and caches that are not the model's."""
    monkeypatch.setitem(globals(), "CACHE", {})
    monkeypatch.setitem(globals(), "LOG", [])
    cached_table.cache_clear()
    model, _ = made(NOTED_DOWN[name], cross_entropy)
    x, y = batch(1)
    found, _ = mep.EquilibriumPropagation(model, beta=1e-5, solver=SOLVER).gradients(x, y)
    assert {type(t) for t in (*CACHE.values(), *LOG)} <= {Tensor}
    assert error_of(found, by_autograd(model, "cross_entropy", x, y), list(model.parameters())) < 1e-3
    assert type(model(x)) is Tensor


# Writes in place, through views -----------------------------------------------------------------------------------


def relu_of_a_slice_and_views_of_rows(n, h):
    h.view(-1, 2, 3).diagonal(0, 1, 2).mul_(3.0)
    h.view(-1, 2, 3)[:, 1].sin_()
    h[:, :3].relu_()
    return h


def columns_assigned(n, h):
    h[..., 5] = 1.5
    h[:, 0], h[:, 1] = h[:, 1].clone(), h[:, 0].clone()
    h[:, 3:] = h[:, 2:-1].clone()
    return h


def columns_added(n, h):
    h[:, 1] += h[:, 0].tanh()
    h[:, ::2] *= 2
    return h


def halves(n, h):
    p, q = h[:, :3], h.narrow(1, 3, 3)
    p.mul_(2)
    q.sin_()
    h.select(1, 5).exp_()
    return h


def clamped(n, h):
    h[:, :4].clamp_(max=3.0)
    F.hardtanh(h[:, 2:], -3, 3, inplace=True)
    return h


def masked(n, h):
    h[h < -0.5] = -0.5
    h[h > 3] *= 0.5
    return h


def filled_with_noise(n, h):
    h[:, :2].normal_()
    return h


def an_output_filled_in(n, h):
    out = torch.zeros(h.shape[0], 6, dtype=h.dtype)
    out[:, :3] = h[:, 3:].tanh()
    out[:, 3:] += h[:, :3]
    return out


def an_output_of_the_batch(n, h):
    out = h.new_zeros(len(h), 6)
    out[:, 0::2].copy_(h[:, 1::2].sin())
    out[:, 1::2] += h[:, 0::2]
    return out


def a_diagonal_filled(n, h):
    similarity = h @ h.t()
    similarity.fill_diagonal_(0)
    return similarity.softmax(1) @ h


def a_copy_without_gradient(n, h):
    with torch.no_grad():
        g = h.clone()
        g[:, :3].relu_()
    return h + g


WRITES = [
    relu_of_a_slice_and_views_of_rows, columns_assigned, columns_added, halves,
    clamped, masked, filled_with_noise, an_output_filled_in,
    an_output_of_the_batch, a_diagonal_filled, a_copy_without_gradient,
]  # fmt: skip


def between(write):
    return lambda n, x: n.c(torch.tanh(write(n, n.a(x))))


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_writes_through_views_are_what_autograd_sees(write):
    """The second batch is eight times as large: it reaches the bounds that the first one does not."""
    assert_right(net(between(write)), scale=8.0)


def hidden(write):
    """A head of zeros: the first gradient tells nothing of what is before it."""

    def build():
        model = Net(between(write))
        nn.init.zeros_(model.c.weight)
        return model

    return build


def head_filled(model, _):
    torch.manual_seed(5)
    nn.init.normal_(model.c.weight)


def test_writes_that_the_first_gradient_does_not_show_are_read():
    assert_right(hidden(clamped), change=head_filled, scale=8.0)


def zeroed_without_gradient(n, h):
    with torch.no_grad():
        h[:, 0] = 0
    return h


def clamped_without_gradient(n, h):
    with torch.no_grad():
        h.clamp_(-3, 3)
    return h


def scaled_without_gradient(n, h):
    with torch.no_grad():
        h[:, :3].mul_(0.5)
    return h


def written_when_detached(n, h):
    h.detach()[:, 0] = 0
    return h


def detached_in_place(n, h):
    return torch.tanh(h).detach_()


def written_as_data(n, h):
    h.data.clamp_(-3, 3)
    return h


UNSEEN_WRITES = [
    zeroed_without_gradient, clamped_without_gradient, scaled_without_gradient, written_when_detached,
    detached_in_place, written_as_data,
]  # fmt: skip
"""Their values count and their gradients do not, or the other way round."""


@pytest.mark.parametrize("write", UNSEEN_WRITES, ids=lambda f: f.__name__)
def test_writes_behind_autograds_back_are_right_or_refused(write):
    assert_right(hidden(write), change=head_filled, scale=8.0, may_refuse=True)


INPUT_WRITES = {
    "a column": lambda n, x: (x[:, 0].zero_(), plain(n, x))[1],
    "a factor": lambda n, x: plain(n, x.mul_(0.5)),
}


@pytest.mark.parametrize("name", INPUT_WRITES)
def test_input_that_forward_overwrites_is_right_or_refused(name):
    assert_right(net(INPUT_WRITES[name]), may_refuse=True)


@pytest.mark.parametrize("wrap", [weight_norm, orthogonal], ids=lambda wrap: wrap.__name__)
def test_a_cache_of_parametrizations_around_the_step_holds_neither_stand_ins_nor_used_up_graphs(wrap):
    torch.manual_seed(0)
    model = nn.Sequential(wrap(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(BATCH, 4).double(), torch.randint(0, 3, (BATCH,))
    ep = mep.EquilibriumPropagation(model, beta=1e-8, solver=SOLVER, proof="always")
    for _ in range(2):
        with parametrize.cached():
            estimate = ep(x, y)
            loss = F.cross_entropy(model(x), y)
        wanted = torch.autograd.grad(loss, list(model.parameters()))
        torch.testing.assert_close([p.grad for p in model.parameters()], list(wanted), rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(estimate.loss, loss.detach())
        model.zero_grad()
