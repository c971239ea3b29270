"""What users may put in the place of our parts, by public names alone; and the equilibria as they may look at them."""

import copy
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from cases import Quartic, mlp
from equilibria import distance, equilibrium
from reference import backprop
from torch import nn

import mep


def example(activation=nn.Tanh, dtype=torch.float64, batch=3):
    torch.manual_seed(0)
    model = mlp(activation, 4, 5, 3).to(dtype)
    return model, torch.randn(batch, 4, dtype=dtype), torch.arange(batch) % 3


# An energy.


class Cosh(mep.NodeEnergy):
    is_forward = True

    def energy(self, s, mu):
        return torch.cosh(s - mu) - 1

    def ds(self, s, mu):
        return torch.sinh(s - mu)

    def dmu(self, s, mu):
        return -self.ds(s, mu)

    def state(self, mu, force):
        return mu + torch.asinh(force)


class Stateless(Quartic):
    """The same without `state`, which only sweeps need."""

    state = mep.NodeEnergy.state


def written(model, x, coupling):
    """E of every example of `example()`, as a function of its states."""

    def energy(s):
        mu = {"0": model[0](x), "2": model[2](model[1](s["0"]))}
        return sum(coupling.energy(s[n], mu[n]).sum(1) for n in mu)

    return energy


def newton_contrast(model, x, y, coupling, phases, beta):
    """The contrast of equilibria of the whole nudged energy, by Newton's method."""
    energy = written(model, x, coupling)
    h = model[0](x).detach()
    free = {"0": h, "2": model[2](model[1](h)).detach()}
    found = {p: torch.zeros_like(p) for p in model.parameters()}
    for sign, weight in {"one-sided": [(1, 1.0)], "centered": [(-1, -0.5), (1, 0.5)]}[phases]:
        nudged = lambda s, sign=sign: energy(s) + sign * beta * F.cross_entropy(s["2"], y, reduction="none")  # noqa: E731
        s = equilibrium(nudged, free)
        for p, g in zip(found, torch.autograd.grad(energy(s).mean(), list(found)), strict=True):
            found[p] += weight / beta * g
    return found


SOLVERS = [mep.Sweep(tol=1e-10), mep.Descent(3000, 1e-8, adaptive=True, settle_lr=0.3)]
ORDERS = {"one-sided": 1, "centered": 2}
own_energy = pytest.mark.parametrize("coupling", [Quartic(), Cosh()], ids=lambda e: e.name)


@own_energy
@pytest.mark.parametrize("phases", ORDERS)
def test_an_energy_settles_where_newton_s_method_does_and_has_the_order_of_the_contrast(coupling, phases):
    model, x, y = example()
    exact = backprop(model, F.cross_entropy(model(x), y))
    for solver in SOLVERS:
        ep, errors = mep.EquilibriumPropagation(model, solver=solver, energy=coupling, phases=phases), []
        for ep.beta in (0.1, 0.05):
            found, estimate = ep.gradients(x, y)
            assert estimate.converged and estimate.beta == ep.beta
            assert distance(model, found, newton_contrast(model, x, y, coupling, phases, ep.beta)) < 1e-7
            errors.append(distance(model, found, exact))
        assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[phases], abs=0.15)


@own_energy
def test_a_strong_nudge_shows_that_the_energy_is_not_quadratic(coupling):
    model, x, y = example()
    given = {"beta": 3.0, "solver": mep.Sweep(tol=1e-10, settle_steps=500)}
    found, estimate = mep.EquilibriumPropagation(model, energy=coupling, **given).gradients(x, y)
    assert estimate.converged
    assert distance(model, found, newton_contrast(model, x, y, coupling, "one-sided", 3.0)) < 1e-7
    assert distance(model, found, mep.EquilibriumPropagation(model, **given).gradients(x, y)[0]) > 1e-2


@pytest.mark.parametrize("settings", [{}, {"settle_lr": 0.2, "settle_steps": 500, "adaptive": True}], ids=str)
def test_an_energy_trains(settings):
    model, x, y = example(dtype=torch.float32, batch=8)
    opt = mep.eqprop(model.parameters(), model=model, energy=Quartic(), lr=0.2, **settings)
    losses = [float(opt.step(x=x, target=y)) for _ in range(10)]
    assert opt.last.converged and losses[-1] < 0.8 * losses[0]


def test_what_an_energy_cannot_do_is_refused_in_a_sentence():
    model, x, y = example()
    make = mep.EquilibriumPropagation
    assert isinstance(make(model, energy=Stateless()).solver, mep.Descent)
    with pytest.raises(mep.ArgumentError, match=r"Sweep does not settle energy='stateless'.*solver=mep\.Descent"):
        make(model, energy=Stateless(), solver=mep.Sweep())
    with pytest.raises(mep.ArgumentError, match="settles by descent: give settle_lr"):
        mep.eqprop(model.parameters(), model=model, energy=Stateless())
    for settings in ({"solver": mep.Local()}, {"compile": True}, {"checkpoint": True}):
        try:
            found, estimate = make(model, energy=Quartic(), beta=0.01, **settings).gradients(x, y)
        except mep.ArgumentError as error:
            assert "quartic" in str(error) or "linear layers, convolutions, pooling" in str(error), error
        else:
            assert estimate.converged
            assert distance(model, found, newton_contrast(model, x, y, Quartic(), "one-sided", 0.01)) < 0.05


# Equilibria to look at.


def looked_at(model, x, y, **settings):
    return mep.EquilibriumPropagation(model, **settings).settle(x, y, record=True)


SETTINGS = {
    "affine": (nn.ReLU, {}),
    "affine, checkpointed": (nn.ReLU, {"checkpoint": True}),
    "smooth": (nn.Tanh, {}),
    "smooth, centered": (nn.Tanh, {"phases": "centered", "beta": 0.1}),
    "kinks": (nn.ReLU, {"branches": "exact", "beta": 0.1}),
    "descent": (nn.Tanh, {"solver": mep.Descent(200, 1e-4, adaptive=True, settle_lr=0.3), "beta": 0.1}),
    "hopfield": (lambda: nn.Hardtanh(0, 1), {"energy": "hopfield", "beta": 0.1}),
    "hopfield, centered": (lambda: nn.Hardtanh(0, 1), {"energy": "hopfield", "beta": 0.1, "phases": "centered"}),
    "quartic": (nn.Tanh, {"energy": Quartic(), "beta": 0.1}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_seen_of_an_equilibrium_is_what_the_formulas_say(name):
    activation, settings = SETTINGS[name]
    model, x, y = example(activation)
    eq = looked_at(model, x, y, **settings)
    is_hopfield, coupling = "hopfield" in name, settings.get("energy")
    is_centered, gate = settings.get("phases") == "centered", model[0](x) > 0
    assert [phase.beta for phase in eq.phases] == ([-1, 1] if is_centered else [1]) and eq.nudged is eq.phases[-1]
    assert eq.estimate.converged
    betas = eq.estimate.betas[:, None]
    for phase in (eq.free, *eq.phases):
        s, mu = phase.states, phase.predictions
        assert s.keys() == mu.keys() == phase.errors.keys() == phase.energies.keys() == phase.residuals.keys()
        first, last = s  # by name
        if is_hopfield:  # states stand behind the activations
            activated = s[first]
            assert s[first].min() >= 0 and s[first].max() <= 1
        elif activation is nn.ReLU and "kinks" not in name:
            activated = s[first] * gate  # held as in the forward pass
        else:
            activated = model[1](s[first])
        torch.testing.assert_close(mu[first], model[0](x).detach())
        torch.testing.assert_close(mu[last], model[2](activated).detach())
        for n in s:
            e = 0.5 * s[n] ** 2 - s[n] * mu[n] if is_hopfield else 0.5 * (s[n] - mu[n]) ** 2
            e = coupling.energy(s[n], mu[n]) if isinstance(coupling, Quartic) else e
            torch.testing.assert_close(phase.energies[n], e.sum(1))
            beta = phase.beta * betas
            if phase.beta == 0:
                assert not phase.errors[n].any()
            elif is_hopfield:
                torch.testing.assert_close(phase.errors[n], (s[n] - eq.free.states[n]) / beta)
            elif isinstance(coupling, Quartic):
                torch.testing.assert_close(phase.errors[n], coupling.dmu(s[n], mu[n]) / beta)
            else:
                torch.testing.assert_close(phase.errors[n], (mu[n] - s[n]) / beta, rtol=1e-6, atol=1e-9)
        if phase.beta:
            assert 1 < len(phase.course) <= 1 + eq.estimate.iterations  # which counts the longest phase
            for n, residual in phase.residuals.items():
                assert torch.equal(phase.course[-1][n], residual)
    if not is_hopfield:
        torch.testing.assert_close(eq.free.states[last], model(x).detach())


@pytest.mark.parametrize("name", SETTINGS)
def test_the_residuals_that_are_seen_are_those_that_decide(name):
    activation, settings = SETTINGS[name]
    eq = looked_at(*example(activation), **settings)
    worst = torch.stack([r for phase in eq.phases for r in phase.residuals.values()]).amax(0)
    torch.testing.assert_close(worst, eq.estimate.residual, rtol=1e-4, atol=1e-8)
    assert eq.estimate.converged and worst.max() <= eq.estimate.tol


def test_the_energies_of_all_nodes_sum_to_that_of_the_network():
    model, x, y = example()
    eq = looked_at(model, x, y, energy=Quartic(), beta=0.5)
    whole = written(model, x, Quartic())
    torch.testing.assert_close(sum(eq.nudged.energies.values()), whole(eq.nudged.states).detach())
    assert (sum(eq.nudged.energies.values()) > 0).all() and not sum(eq.free.energies.values()).any()


def test_residuals_are_below_the_tolerance_if_and_only_if_the_estimate_says_so():
    model, x, y = example()
    for steps in (1, 2, 50):
        solver = mep.Sweep(steps, tol=1e-6)
        eq = looked_at(model, x, y, beta=2.0, solver=solver, on_unsettled="ignore")
        worst = torch.stack(list(eq.nudged.residuals.values())).amax(0)
        assert torch.equal(worst <= 1e-6, eq.estimate.settled)
        assert eq.estimate.converged == bool((worst <= 1e-6).all()) == (steps == 50)


def test_a_checkpointed_step_is_seen_as_any_other():
    model, x, y = example(nn.ReLU)
    one, other = (looked_at(model, x, y, beta=0.1, checkpoint=checkpoint) for checkpoint in (False, True))
    for phases in ((one.free, other.free), (one.nudged, other.nudged)):
        for mappings in zip(*(list(vars(phase).values())[1:6] for phase in phases), strict=True):
            torch.testing.assert_close(dict(mappings[0]), dict(mappings[1]))


@pytest.mark.parametrize("name", SETTINGS)
def test_an_equilibrium_prints_within_80_columns(name):
    activation, settings = SETTINGS[name]
    eq = looked_at(*example(activation, torch.float32), **settings)
    lines = str(eq).splitlines()
    assert len(lines) == 1 + 2 + 1 and lines[0].split() == ["node", "shape", "|state|", "|error|", "energy", "residual"]
    assert max(map(len, lines)) <= 80, max(lines, key=len)


def test_an_equilibrium_plots_where_its_course_was_recorded():
    from matplotlib.figure import Figure

    model, x, y = example()
    ep = mep.EquilibriumPropagation(model, phases="centered", beta=0.1)
    eq = ep.settle(x, y, record=True)
    for phase in (-1, 0):
        figure = eq.plot(phase)
        assert isinstance(figure, Figure)
        drawn = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
        assert drawn.keys() == {"0", "2", "tolerance"}
        assert len(drawn["0"]) == len(eq.phases[phase].course)
    with pytest.raises(mep.ArgumentError, match=r"nothing was recorded.*record=True"):
        ep.settle(x, y).plot()


def test_a_look_changes_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(4, 4), torch.arange(4) % 3
    before, noise = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    ep = mep.EquilibriumPropagation(model)
    one, other = (ep.settle(x, y, record=True) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), noise)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters()) and model.training
    for n, s in one.nudged.states.items():
        assert torch.equal(s, other.nudged.states[n])
    assert torch.equal(one.estimate.loss, ep.gradients(x, y)[1].loss)


# A solver.


@dataclass(frozen=True)
class Plain(mep.Solver):
    """Gradient descent on all states at once."""

    settle_steps: int = 2000
    tol: float = 1e-7
    patience: int = 1
    adaptive: bool = True
    lr: float = 0.25

    def measured(self, energy, point):
        return mep.Iterate(torch.stack(list(energy.residuals(point).values())).amax(0), point)

    def init(self, energy, point, start):
        return self.measured(energy, point)

    def step(self, energy, iterate, active):
        point, forces = iterate.point, energy.forces(iterate.point)
        boxes = {node.name: energy.potential_of(node).bounds for node in energy.graph.states}
        moved = {n: (s - self.lr * forces[n]).clamp(*boxes[n]) for n, s in energy.state(point).items()}
        return self.measured(energy, energy.at(moved))


@pytest.mark.parametrize("name", ["smooth", "smooth, centered", "affine", "hopfield", "quartic"])
def test_a_solver_settles_as_ours_do(name):
    activation, settings = SETTINGS[name]
    model, x, y = example(activation)
    settings = {"beta": 0.05, **settings}
    ours = mep.Descent(3000, 1e-8, adaptive=True, settle_lr=0.2)
    (found, estimate), (expected, _) = (
        mep.EquilibriumPropagation(model, solver=solver, **settings).gradients(x, y) for solver in (Plain(), ours)
    )
    assert estimate.converged and 10 < estimate.iterations < 2000
    assert distance(model, found, expected) < 1e-5
    eq = looked_at(model, x, y, solver=Plain(), **settings)
    assert len(eq.nudged.course) > 10 and max(float(r.max()) for r in eq.nudged.residuals.values()) <= 1e-7


def test_a_solver_trains_and_may_fall_short():
    model, x, y = example(dtype=torch.float32, batch=8)
    ep = mep.EquilibriumPropagation(model, solver=Plain(tol=1e-2))
    opt = mep.EPOptimizer(ep, torch.optim.SGD(model.parameters(), lr=0.5))
    losses = [float(opt.step(x=x, target=y)) for _ in range(6)]
    assert opt.last.converged and losses[-1] < losses[0] - 0.05
    with pytest.raises(mep.NotConvergedError, match=r"did not settle to 0\.01 in 3 iterations"):
        mep.EquilibriumPropagation(model, solver=Plain(3, tol=1e-2), on_unsettled="raise")(x, y)
    with pytest.raises(mep.DivergedError, match="Nothing was changed"):
        mep.EquilibriumPropagation(model, solver=Plain(lr=1e3), beta=0.1)(x, y)
    with pytest.raises(mep.ArgumentError, match="compile=True"):
        mep.EquilibriumPropagation(model, solver=Plain(), compile=True)
    with pytest.raises(mep.ArgumentError, match="checkpoint=True"):
        mep.EquilibriumPropagation(model, solver=Plain(), checkpoint=True)
    with pytest.raises(mep.ArgumentError, match=r"Plain.*tol"):
        Plain(tol=0)


# An estimator, an update, a constraint, a cost.


class FiniteDifferences:
    """The gradient by central differences, parameter by parameter."""

    def __init__(self, model, cost=F.cross_entropy):
        self.model, self.cost = model, cost

    @torch.no_grad()
    def gradients(self, x, target, step=1e-5):
        found = {p: torch.zeros_like(p) for p in self.model.parameters()}
        for p, g in found.items():
            for i in range(p.numel()):
                kept = p.view(-1)[i].clone()
                for sign in (1, -1):
                    p.view(-1)[i] = kept + sign * step
                    g.view(-1)[i] += sign * self.cost(self.model(x), target) / (2 * step)
                p.view(-1)[i] = kept
        return found, mep.Estimate.exact(self.cost(self.model(x), target), len(x))

    def predict(self, x):
        return self.model(x)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class SignSGD(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.sign(), alpha=group["lr"])


@torch.no_grad()
def short_rows(optimizer, most=0.8):
    """A constraint: no row of a matrix is longer."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.ndim == 2:
                p.copy_(p.renorm(2, 0, most))


def test_an_estimator_an_update_and_a_constraint_make_an_optimizer():
    model, x, y = example(batch=6)
    exact = backprop(model, F.cross_entropy(model(x), y))
    opt = mep.EPOptimizer(FiniteDifferences(model), SignSGD(model.parameters(), lr=0.01), [short_rows])
    before = copy.deepcopy(dict(model.named_parameters()))
    losses = [float(opt.step(x=x, target=y))]
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, exact[p], rtol=1e-6, atol=1e-8)
        moved = before[name] - 0.01 * exact[p].sign()
        torch.testing.assert_close(p.detach(), moved.renorm(2, 0, 0.8) if p.ndim == 2 else moved)
    losses += [float(opt.step(x=x, target=y)) for _ in range(5)]
    assert losses[-1] < losses[0] and opt.last.converged and opt.last.beta == 0
    assert max(float(p.detach().norm(dim=1).max()) for p in model.parameters() if p.ndim == 2) <= 0.8 + 1e-6
    assert torch.equal(opt.predict(x), model(x))
    opt.load_state_dict(opt.state_dict())
    twin = copy.deepcopy(opt)
    assert twin.model is not model and twin.step(x=x, target=y) == opt.step(x=x, target=y)


@pytest.mark.parametrize("low_memory", [False, True])
def test_an_update_and_a_constraint_serve_our_estimator(low_memory):
    model, x, y = example(batch=6)
    update, ep = SignSGD(model.parameters(), lr=0.01), mep.EquilibriumPropagation(model)
    opt = mep.EPOptimizer(ep, update, [short_rows], low_memory=low_memory)
    expected = copy.deepcopy(dict(model.named_parameters()))
    found, _ = ep.gradients(x, y)
    opt.step(x=x, target=y)
    for name, p in model.named_parameters():
        moved = (expected[name] - 0.01 * found[p].sign()).detach()
        torch.testing.assert_close(p.detach(), moved.renorm(2, 0, 0.8) if p.ndim == 2 else moved)


class Huber(mep.BatchCost):
    """`F.huber_loss`, the mean over the features of an example."""

    def __init__(self, output, target):
        self.target = target

    @property
    def smoothness(self):
        return 1 / self.target[0].numel()

    def value(self, output):
        d = (output - self.target).abs()
        return torch.where(d < 1, d**2 / 2, d - 0.5).flatten(1).mean(1)

    def gradient(self, output):
        return (output - self.target).clamp(-1, 1) / self.target[0].numel()


class NarrowHuber(Huber):
    """The same, which may be evaluated for some of the examples."""

    def of(self, rows):
        return NarrowHuber(None, self.target[rows])


def huber(output, target):
    return F.huber_loss(output, target, reduction="none").flatten(1).mean(1)


@pytest.mark.parametrize("cost", [Huber, NarrowHuber])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_a_cost_with_its_own_gradient_is_the_function(cost, activation):
    model, x, _ = example(activation, batch=5)
    target = 2 * torch.randn(5, 3, dtype=torch.float64)
    exact = backprop(model, F.huber_loss(model(x), target))
    for settings in ({"beta": 0.1, "solver": mep.Sweep(tol=1e-8)}, {}):
        (found, one), (expected, other) = (
            mep.EquilibriumPropagation(model, c, **settings).gradients(x, target) for c in (cost, huber)
        )
        assert one.converged and other.converged
        torch.testing.assert_close(one.loss, F.huber_loss(model(x), target).detach())
        if settings:
            assert distance(model, found, expected) < 1e-6
        else:
            assert distance(model, found, exact) < 0.02 and one.beta > 0
    opt = mep.eqprop(model.parameters(), model=model, cost=cost, lr=0.1)
    losses = [float(opt.step(x=x, target=target)) for _ in range(6)]
    assert losses[-1] < losses[0]
