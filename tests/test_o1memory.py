"""`O1MemoryEPv2` settles as autograd on the whole energy does, in memory that does not grow with the steps."""

import pytest
import torch
import torch.nn.functional as F
from cases import settled
from torch import nn

import mep
from mep.lab.timing import PeakMemory
from mep.optimizers import O1MemoryEPv2

STEPS, SETTLE_LR, MOMENTUM, BETA, BATCH = 15, 0.15, 0.5, 0.1, 12
SAME = {"rtol": 1e-9, "atol": 1e-13}


# Models that also say, layer by layer, what the errors s - mu are. `act(name, h)` is the activation behind a state.


class Mlp(nn.Module):
    shape = (6,)

    def __init__(self, activation):
        super().__init__()
        self.activation = activation
        self.first, self.second, self.last = nn.Linear(6, 9), nn.Linear(9, 7), nn.Linear(7, 3)

    def forward(self, x):
        return self.last(self.activation(self.second(self.activation(self.first(x)))))

    def free(self, x):
        first = self.first(x)
        second = self.second(self.activation(first))
        return {"first": first, "second": second, "last": self.last(self.activation(second))}

    def errors(self, x, s, act):
        yield s["first"] - self.first(x)
        yield s["second"] - self.second(act("first", s["first"]))
        yield s["last"] - self.last(act("second", s["second"]))


class Residual(nn.Module):
    shape = (6,)

    def __init__(self, activation):
        super().__init__()
        self.activation = activation
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        h = self.first(x)
        h = h + self.second(self.activation(h))
        h = h + self.third(self.activation(h))
        return self.last(self.activation(h))

    def free(self, x):
        first = self.first(x)
        second = self.second(self.activation(first))
        third = self.third(self.activation(first + second))
        last = self.last(self.activation(first + second + third))
        return {"first": first, "second": second, "third": third, "last": last}

    def errors(self, x, s, act):
        yield s["first"] - self.first(x)
        yield s["second"] - self.second(act("first", s["first"]))
        yield s["third"] - self.third(act("sum", s["first"] + s["second"]))
        yield s["last"] - self.last(act("sum", s["first"] + s["second"] + s["third"]))


class Cnn(nn.Module):
    shape = (1, 7, 7)

    def __init__(self, activation):
        super().__init__()
        self.activation = activation
        self.first, self.second, self.last = nn.Conv2d(1, 4, 3, stride=2), nn.Conv2d(4, 5, 2), nn.Linear(20, 3)

    def forward(self, x):
        return self.last(self.activation(self.second(self.activation(self.first(x)))).flatten(1))

    def free(self, x):
        first = self.first(x)
        second = self.second(self.activation(first))
        return {"first": first, "second": second, "last": self.last(self.activation(second).flatten(1))}

    def errors(self, x, s, act):
        yield s["first"] - self.first(x)
        yield s["second"] - self.second(act("first", s["first"]))
        yield s["last"] - self.last(act("second", s["second"]).flatten(1))


CASES = {
    "mlp, tanh": (Mlp, torch.tanh, "held"),
    "mlp, relu with its branches held": (Mlp, torch.relu, "held"),
    "mlp, relu": (Mlp, torch.relu, "exact"),
    "residual mlp, gelu": (Residual, F.gelu, "held"),
    "cnn, tanh": (Cnn, torch.tanh, "held"),
    "cnn, relu": (Cnn, torch.relu, "exact"),
}


def build(name):
    make, activation, branches = CASES[name]
    torch.manual_seed(0)
    return make(activation).double(), branches


def batch(model, seed, size=BATCH):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, *model.shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (size,), generator=generator)


# The oracle: autograd through all states at once.


def held_or_plain(model, x, branches):
    """The activation, or with ReLU's branches held the linear piece on which the free state stands."""
    if branches == "exact" or model.activation is not torch.relu:
        return lambda name, h: model.activation(h)
    gates = {name: (s > 0).to(s.dtype) for name, s in model.free(x).items()}
    return lambda name, h: gates[name] * h


def energy(model, x, s, act):
    return sum(0.5 * error.square().sum() for error in model.errors(x, s, act))


def settle_by_autograd(model, x, y, branches, steps=STEPS, unrolled=False):
    """`unrolled`: keep the graph of every step, as for differentiating through the settling."""
    with torch.no_grad():
        act, s = held_or_plain(model, x, branches), model.free(x)
    velocity = {name: torch.zeros_like(value) for name, value in s.items()}
    for _ in range(steps):
        s = {name: value if value.requires_grad else value.requires_grad_() for name, value in s.items()}
        total = energy(model, x, s, act) + BETA * F.cross_entropy(s["last"], y, reduction="sum")
        forces = dict(zip(s, torch.autograd.grad(total, list(s.values()), create_graph=unrolled), strict=True))
        velocity = {name: MOMENTUM * velocity[name] + force for name, force in forces.items()}
        s = {n: (value if unrolled else value.detach()) - SETTLE_LR * velocity[n] for n, value in s.items()}
    return s


def gradients_by_autograd(model, x, y, branches):
    """(dE/dtheta at the settled states - 0 at the free ones) / beta, the mean over the batch."""
    s = settle_by_autograd(model, x, y, branches)
    total = energy(model, x, s, held_or_plain(model, x, branches))
    return torch.autograd.grad(total / (BETA * len(x)), list(model.parameters()))


# What the preset does.


def optimizer(model, branches="held", **given):
    given = {"settle_steps": STEPS, "beta": BETA, **given}
    return O1MemoryEPv2(model.parameters(), model=model, branches=branches, **given)


def settle(opt, x, y):
    """The nudged energy and where the optimizer's own solver ends."""
    solver, branches = opt.estimator.solver, opt.estimator.branches
    return settled(opt.model, x, y, "cross_entropy", opt.estimator.beta, solver, branches)


def test_the_seeds_path_is_the_preset():
    assert O1MemoryEPv2 is mep.O1MemoryEPv2 is mep.presets.O1MemoryEPv2


@pytest.mark.parametrize("name", CASES)
def test_states_are_those_of_autograd(name):
    model, branches = build(name)
    (x, y), opt = batch(model, 1), optimizer(model, branches)
    nudged, found = settle(opt, x, y)
    expected, free = settle_by_autograd(model, x, y, branches), model.free(x)
    assert found.iterations == STEPS
    assert {node.name for node in nudged.graph.states} == expected.keys()
    for name, s in expected.items():
        torch.testing.assert_close(found.point.values[name], s, **SAME)
        assert (s - free[name]).norm() > 1e-4 * s.norm(), f"{name} should have moved"


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_autograd(name):
    model, branches = build(name)
    x, y = batch(model, 1)
    found, _ = optimizer(model, branches).estimator.gradients(x, y)
    for p, expected in zip(model.parameters(), gradients_by_autograd(model, x, y, branches), strict=True):
        torch.testing.assert_close(found[p], expected, **SAME)


@pytest.mark.parametrize("name", CASES)
def test_training_is_that_of_autograd(name):
    model, branches = build(name)
    twin, _ = build(name)
    opt, by_autograd = optimizer(model, branches), optimizer(twin, branches)
    start = [p.detach().clone() for p in model.parameters()]
    for seed in range(5):
        x, y = batch(model, seed)
        opt.step(x=x, target=y)
        for p, g in zip(twin.parameters(), gradients_by_autograd(twin, x, y, branches), strict=True):
            p.grad = g
        by_autograd.step()  # the same update, fed with the other gradients
    for p, q, before in zip(model.parameters(), twin.parameters(), start, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)  # Muon lifts even the smallest singular values to one
        assert (p - before).norm() > 1e-4 * before.norm()


@pytest.mark.parametrize("name", ["mlp, relu", "cnn, tanh"])
def test_the_energy_is_not_divided_by_the_batch(name):
    """An example settles as far among many as alone; divided by the batch, a step would move it by settle_lr / B."""
    model, branches = build(name)
    (x, y), opt = batch(model, 1), optimizer(model, branches)
    once, found = settle(opt, x, y)
    twice, doubled = settle(opt, torch.cat([x, x]), torch.cat([y, y]))
    torch.testing.assert_close(twice.value(doubled.point), once.value(found.point).repeat(2), **SAME)
    for node in once.graph.states:
        s = found.point.values[node.name]
        torch.testing.assert_close(doubled.point.values[node.name], torch.cat([s, s]), **SAME)
    one, both = opt.estimator.gradients(x, y)[0], opt.estimator.gradients(torch.cat([x, x]), torch.cat([y, y]))[0]
    for p, g in one.items():
        torch.testing.assert_close(both[p], g, **SAME)


# Memory, of a batch so large that states dwarf parameters.

LARGE = 400


def peak_of_preset(name, steps):
    model, branches = build(name)
    x, y = batch(model, 1, LARGE)
    opt = optimizer(model, branches, settle_steps=steps)
    opt.step(x=x, target=y)  # the first step also checks the graph, and allocates the update's state
    with PeakMemory() as memory:
        opt.step(x=x, target=y)
    return memory.peak


def peak_of_autograd(name, steps):
    model, branches = build(name)
    x, y = batch(model, 1, LARGE)
    with PeakMemory() as memory:
        settle_by_autograd(model, x, y, branches, steps, unrolled=True)
    return memory.peak


@pytest.mark.parametrize("name", CASES)
def test_memory_does_not_depend_on_the_number_of_steps(name):
    """Once the signal has reached every node. That of autograd through the settling grows by what each step leaves."""
    few, some, many = (peak_of_preset(name, steps) for steps in (8, 15, 60))
    assert max(few, some, many) - min(few, some, many) <= 1024
    five, ten, fifteen = (peak_of_autograd(name, steps) for steps in (5, 10, 15))
    assert fifteen - ten == pytest.approx(ten - five, rel=0.1) and fifteen > 2 * five
    assert many < fifteen


# The meter itself.


def floats(count):
    return torch.zeros(count)


def test_meter_follows_tensors_as_they_come_and_go():
    before = floats(50)
    with PeakMemory() as memory:
        one = floats(100)
        view, kept = one[:10], before.view(5, 10)  # views, and what was there before, take nothing
        before.add_(1)
        assert (memory.bytes, memory.peak) == (400, 400)
        two = one + 1
        assert memory.bytes == 800
        del one
        assert memory.bytes == 800  # the view holds it
        del view, two, kept
        assert (memory.bytes, memory.peak) == (0, 800)
        floats(150)
        assert memory.peak == 800
    after = floats(1000)
    assert (memory.bytes, memory.peak) == (0, 800) and len(after) == 1000


def test_meter_sees_what_autograd_keeps_and_makes():
    weight = floats(100).requires_grad_()
    with PeakMemory() as memory:
        total = weight.exp().sin().sum()
        assert memory.bytes == 404  # exp(w), which both derivatives need, and the sum; sin(exp(w)) is gone
        total.backward()
        assert memory.peak >= 1200  # at least two more at once, made by the backward pass; the forward pass had 804
        del total
        assert memory.bytes == 400  # the gradient
