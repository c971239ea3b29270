"""Hopfield states behind any accepted activation: the documented energy, its equilibria, their gradient, any beta."""

import cmath
import copy
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import COSTS, free_energy, mlp
from reference import predictions_of_graph
from test_relaxation import TIGHT, assert_starts_agree, distance, free_states, gradient
from torch import nn

import mep
from mep.cost import make_cost
from mep.energy import Free, nudge
from mep.graph.closed_forms import potentials
from mep.graph.closed_forms.potentials import Quadratic, Sigmoid, Softmax, Softplus, Tanh
from mep.settle import settle
from mep.solvers.relaxation import Displacement

INF = math.inf


def dilogarithm(z):
    """The sum of z^k / k^2, until z^k is below rounding: slow where z is near 1."""
    k = torch.arange(1, int(40 / -float(z.detach().max().log())) + 2, dtype=z.dtype)
    return (z.unsqueeze(-1) ** k / k**2).sum(-1)


def xlogx(s):
    return s * s.log()


def box(low, high):
    return (lambda a: a.clamp(low, high)), (lambda s: s**2 / 2), (low, high)


def softplus(b):
    f = lambda a: torch.logaddexp(b * a, torch.zeros_like(a)) / b  # noqa: E731
    return f, lambda s: ((b * s) ** 2 / 2 + dilogarithm((-b * s).exp()) - math.pi**2 / 6) / b**2, None


SIGMOID = (lambda a: 1 / (1 + (-a).exp())), (lambda s: xlogx(s) + xlogx(1 - s)), None
TANH = (lambda a: a.sinh() / a.cosh()), (lambda s: (xlogx(1 + s) + xlogx(1 - s)) / 2), None
SOFTMAX = (lambda a: a.exp() / a.exp().sum(1, keepdim=True)), xlogx, "simplex"
HARDSIGMOID = (lambda a: (a / 6 + 0.5).clamp(0, 1)), (lambda s: 3 * (s - 0.5) ** 2), (0, 1)
"""f, the energy G that docs/hopfield.md states, and the faces of the states."""

SPELLINGS = {
    "nn.ReLU()": (nn.ReLU(), box(0, INF)),
    "torch.relu": (torch.relu, box(0, INF)),
    "x.relu": (lambda x: x.relu(), box(0, INF)),
    "x.clamp(min=0)": (lambda x: x.clamp(min=0), box(0, INF)),
    "x.clamp_min(0)": (lambda x: x.clamp_min(0), box(0, INF)),
    "nn.ReLU6()": (nn.ReLU6(), box(0, 6)),
    "F.relu6": (F.relu6, box(0, 6)),
    "nn.Hardtanh()": (nn.Hardtanh(), box(-1, 1)),
    "nn.Hardtanh(0, 1)": (nn.Hardtanh(0, 1), box(0, 1)),
    "nn.Hardtanh(-0.2, 0.3)": (nn.Hardtanh(-0.2, 0.3), box(-0.2, 0.3)),
    "F.hardtanh": (lambda x: F.hardtanh(x, 0.0, 0.7), box(0, 0.7)),
    "torch.clamp(x, 0, 1)": (lambda x: torch.clamp(x, 0, 1), box(0, 1)),
    "torch.clip": (lambda x: torch.clip(x, -0.5, 0.5), box(-0.5, 0.5)),
    "x.clamp(max=0.3)": (lambda x: x.clamp(max=0.3), box(-INF, 0.3)),
    "x.clamp_max(0.3)": (lambda x: x.clamp_max(0.3), box(-INF, 0.3)),
    "nn.Hardsigmoid()": (nn.Hardsigmoid(), HARDSIGMOID),
    "F.hardsigmoid": (F.hardsigmoid, HARDSIGMOID),
    "nn.Sigmoid()": (nn.Sigmoid(), SIGMOID),
    "torch.sigmoid": (torch.sigmoid, SIGMOID),
    "x.sigmoid": (lambda x: x.sigmoid(), SIGMOID),
    "x.sigmoid_": (lambda x: x.sigmoid_(), SIGMOID),
    "F.sigmoid": (F.sigmoid, SIGMOID),
    "torch.special.expit": (torch.special.expit, SIGMOID),
    "nn.Tanh()": (nn.Tanh(), TANH),
    "torch.tanh": (torch.tanh, TANH),
    "x.tanh": (lambda x: x.tanh(), TANH),
    "F.tanh": (F.tanh, TANH),
    "nn.Softplus()": (nn.Softplus(), softplus(1)),
    "nn.Softplus(2.0)": (nn.Softplus(2.0), softplus(2)),
    "F.softplus": (F.softplus, softplus(1)),
    "F.softplus(beta=3.0, threshold=50)": (lambda x: F.softplus(x, beta=3.0, threshold=50), softplus(3)),
    "nn.Softmax(dim=-1)": (nn.Softmax(dim=-1), SOFTMAX),
    "nn.Softmax(dim=1)": (nn.Softmax(dim=1), SOFTMAX),
    "F.softmax": (lambda x: F.softmax(x, -1), SOFTMAX),
    "x.softmax": (lambda x: x.softmax(1), SOFTMAX),
    "torch.softmax": (lambda x: torch.softmax(x, dim=-1), SOFTMAX),
    "torch.special.softmax": (lambda x: torch.special.softmax(x, 1), SOFTMAX),
}
POTENTIALS = {
    "sigmoid": (potentials.Sigmoid(), SIGMOID),
    "tanh": (potentials.Tanh(), TANH),
    "softplus": (potentials.Softplus(), softplus(1)),
    "softplus(2.5)": (potentials.Softplus(2.5), softplus(2.5)),
    "softmax": (potentials.Softmax(1), SOFTMAX),
    "hardsigmoid": (potentials.Quadratic(0, 1, 1 / 6, 0.5), HARDSIGMOID),
    "free": (potentials.FREE_STATE, box(-INF, INF)),
}


# Each entry of the table by itself.


def pulls(dtype=torch.float64):
    torch.manual_seed(0)
    return 2 * torch.randn(40, 5, dtype=dtype).clamp(-1.7, 1.7), torch.randn(40, 5, dtype=dtype)


@pytest.mark.parametrize("name", POTENTIALS)
def test_energy_response_inverse_and_slope_belong_together(name):
    potential, (f, energy, faces) = POTENTIALS[name]
    a, v = pulls()
    a = a.clamp(min=-2.5) if "softplus" in name else a
    s = potential.respond(a)
    torch.testing.assert_close(s, f(a))
    inside = torch.ones_like(s) if faces in (None, "simplex") else ((s > faces[0]) & (s < faces[1])).double()
    s.requires_grad_()
    (g,) = torch.autograd.grad(potential.value(s).sum(), s)
    (documented,) = torch.autograd.grad(energy(s).sum(), s)
    s = s.detach()
    torch.testing.assert_close(potential.value(s), energy(s), rtol=1e-9, atol=1e-9)
    along = lambda t: t - t.mean(1, keepdim=True) if faces == "simplex" else t  # noqa: E731
    torch.testing.assert_close(along(g), along(documented), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(along(potential.inverse(s)), along(g))
    torch.testing.assert_close(along(potential.inverse(s)) * inside, along(a) * inside)
    torch.testing.assert_close(potential.force(s, v), along(potential.inverse(s) - v))
    _, slope = torch.autograd.functional.jvp(f, (a,), (v,))
    torch.testing.assert_close(potential.slope(s, potential.hold(s, v)), slope)
    # the steepest slope is the largest eigenvalue of the Jacobian
    jacobian = torch.autograd.functional.jacobian(f, a[:3]).reshape(15, 15)
    assert torch.linalg.eigvalsh(jacobian).max() <= potential.steepest + 1e-12


@pytest.mark.parametrize("beta", [1.0, -0.5, 30.0])
@pytest.mark.parametrize("name", POTENTIALS)
def test_displacement_is_the_difference_of_responses(name, beta):
    potential, (f, _, faces) = POTENTIALS[name]
    a, q = pulls()
    s = potential.respond(a)
    torch.testing.assert_close(
        potential.displacement(s, q, torch.tensor(beta), held=False), (f(a + beta * q) - s) / beta
    ) if faces in (None, "simplex") else None
    each = torch.full((len(a), 1), beta).double()
    torch.testing.assert_close(
        potential.displacement(s, q, each, held=True), potential.displacement(s, q, beta, held=True)
    )


@pytest.mark.parametrize("name", POTENTIALS)
def test_displacement_keeps_the_digits_of_any_beta(name):
    """In single precision, against double precision; and for tiny beta against the slope."""
    potential, _ = POTENTIALS[name]
    a, q = pulls(torch.float32)
    s = potential.respond(a)
    for beta in (10.0, 1.0, 0.1, 1e-2, 1e-4, 1e-6, 1e-8):
        exact = potential.displacement(s.double(), q.double(), beta, held=True)
        found = potential.displacement(s, q, beta, held=True)
        # What a strong nudge leads back to the middle, a saturated state has few digits of.
        assert (found - exact).norm() < (1e-5 if beta < 1 else 1e-4) * exact.norm()
    slope = potential.slope(s, potential.hold(s, q))
    assert (found - slope).norm() < 1e-5 * slope.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", POTENTIALS)
def test_nothing_leaves_the_domain_by_rounding(name, dtype):
    potential, _ = POTENTIALS[name]
    a = torch.tensor([[-300.0, -30, -1, 0, 100], [300, 30, 1, 0, -100]], dtype=dtype)
    s = potential.respond(a)
    assert potential.inverse(s).isfinite().all() and potential.value(s).isfinite().all()
    assert potential.inverse(torch.zeros_like(s)).isfinite().all()
    assert potential.inverse(torch.ones_like(s)).isfinite().all()
    for beta in (1e-6, 1.0, -1.0, 50.0):
        for q in (a, -a, a.flip(0)):
            assert potential.displacement(s, q, beta, held=True).isfinite().all()


def test_the_energy_of_softplus_is_the_integral_of_the_inverse():
    """By Simpson's rule in x = sqrt(t), from a small beginning that is known: t log(t) - t and less than t^2."""
    for end in (0.01, 0.3, math.log(2) - 1e-9, math.log(2) + 1e-9, 1.0, 5.0, 40.0):
        x = torch.linspace(math.sqrt(1e-9), math.sqrt(end), 20001, dtype=torch.float64)
        y = 2 * x * torch.log(torch.expm1(x**2))
        h = x[1] - x[0]
        integral = h / 3 * (y[0] + 4 * y[1:-1:2].sum() + 2 * y[2:-1:2].sum() + y[-1])
        expected = integral + 1e-9 * (math.log(1e-9) - 1)
        found = potentials.softplus_energy(torch.tensor(end, dtype=torch.float64))
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)


# Networks: the documented energy written down, its equilibria by Newton's method, implicit differentiation.


class Act(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


class Skip(nn.Module):
    """A skip before an activation, one behind it, and a state that is read by two layers."""

    def __init__(self, f):
        super().__init__()
        self.one, self.two, self.three, self.last = (nn.Linear(m, n) for m, n in ((6, 5), (5, 5), (5, 5), (5, 3)))
        self.f = f

    def forward(self, x):
        h = self.f(self.one(x))
        g = self.f(self.two(h) + h)
        return self.last(torch.tanh(self.three(g)) + h)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = nn.Linear(6, 5), nn.Linear(2, 5), nn.Linear(5, 3)

    def forward(self, x, z):
        return self.last(torch.sigmoid(self.one(x) + self.two(z)))


def convolution(f, pool):
    return nn.Sequential(
        nn.Unflatten(1, (1, 6, 6)), nn.Conv2d(1, 2, 3, padding=1), f(), pool, nn.Conv2d(2, 3, 2), f(), nn.Flatten(),
        nn.Linear(12, 3),
    )  # fmt: skip


NETWORKS = {
    "sigmoid": (lambda: mlp(nn.Sigmoid, 6, 7, 5, 3), 6),
    "tanh": (lambda: mlp(nn.Tanh, 6, 7, 5, 3), 6),
    "softplus": (lambda: mlp(lambda: nn.Softplus(2.0), 6, 7, 5, 3), 6),
    "softmax": (lambda: mlp(lambda: nn.Softmax(-1), 6, 7, 5, 3), 6),
    "hardsigmoid": (lambda: mlp(nn.Hardsigmoid, 6, 7, 5, 3), 6),
    "softmax at the output": (lambda: nn.Sequential(*mlp(nn.Tanh, 6, 7, 5, 3), nn.Softmax(-1)), 6),
    "sigmoid at the output": (lambda: nn.Sequential(*mlp(nn.ReLU6, 6, 7, 5, 3), nn.Sigmoid()), 6),
    "hardsigmoid at the output": (lambda: nn.Sequential(*mlp(nn.Sigmoid, 6, 7, 5, 3), nn.Hardsigmoid()), 6),
    "skip": (lambda: Skip(torch.sigmoid), 6),
    "skip of softmax": (lambda: Skip(lambda x: x.softmax(-1)), 6),
    "convolution": (lambda: convolution(nn.Tanh, nn.AvgPool2d(2)), 36),
    "convolution, max pooling": (lambda: convolution(nn.Sigmoid, nn.MaxPool2d(2)), 36),
    "softmax over channels": (lambda: convolution(nn.Softmax2d, nn.AvgPool2d(2)), 36),
}


def build(name, cost="mse", batch=4, scale=1.0):
    torch.manual_seed(0)
    make, size = NETWORKS[name]
    model = make().double()
    for p in model.parameters():
        p.data.mul_(scale if p.ndim > 1 else 1.0)
    if "max pooling" in name:  # winners that are pushed down give way to others: there is no equilibrium but on a kink
        model[4].weight.data.abs_().mul_(0.5)
    x = torch.rand(batch, size).double()
    return model, x, COSTS[cost].target(torch.zeros(batch, 3).double())


def documented(potential):
    """f, G and the faces of a node, by the kind of its potential."""
    if isinstance(potential, potentials.Softmax):
        f = lambda a: a.exp() / a.exp().sum(potential.dim, keepdim=True)  # noqa: E731
        return f, xlogx, None
    if isinstance(potential, potentials.Softplus):
        return softplus(potential.sharpness)
    if isinstance(potential, potentials.Quadratic):
        return box(potential.low, potential.high) if potential.rate == 1 else HARDSIGMOID
    return SIGMOID if isinstance(potential, potentials.Sigmoid) else TANH


class Written:
    """The energy of a batch in its pulls, `s = f(v)`: nothing is constrained, but for units on faces, which are held.

    A direction in v that no state depends on (the same for all units of a softmax) has no curvature: least squares.
    """

    def __init__(self, model, x, y, cost):
        self.model, self.batch, self.y, self.cost = model, len(x), y, COSTS[cost].value
        energy, point = free_energy(model, x, "hopfield")
        self.graph, self.inputs = energy.graph, energy.inputs
        found = free_states(energy, point, TIGHT)
        self.kinds = {n.name: (n.potential, *documented(n.potential)) for n in self.graph.states}
        self.predict = predictions_of_graph(self.graph, self.inputs)
        self.start = {n: self.kinds[n][0].inverse(s) for n, s in found.items()}
        self.held = {}
        for n, s in found.items():
            faces = self.kinds[n][3]
            self.held[n] = torch.zeros_like(s, dtype=torch.bool) if faces is None else (s <= faces[0]) | (s >= faces[1])
        self.found = found
        self.free = self.solve(0.0)
        at_rest = self.states(self.free)
        self.predict = predictions_of_graph(self.graph, self.inputs, free=at_rest)  # held winners
        self.free = self.solve(0.0, self.free)

    def states(self, flat):
        sizes = [v.numel() for v in self.start.values()]
        s = {}
        for (n, v), part in zip(self.start.items(), flat.split(sizes), strict=True):
            potential, f, _, faces = self.kinds[n]
            part = part.view_as(v)
            if faces is not None:  # a straight line, and the free state where it is held
                rate, offset = potential.rate, potential.offset
                s[n] = torch.where(self.held[n], self.found[n], part * rate + offset)
            else:
                s[n] = f(part)
        return s

    def energy(self, flat):
        """E of every example."""
        s = self.states(flat)
        total = 0
        for n, mu in self.predict(s).items():
            g = self.kinds[n][2]
            e = (g(s[n]) - s[n] * mu).reshape(self.batch, -1).sum(1)
            total = total + e
        return total

    def of_cost(self, flat):
        return self.cost(self.states(flat)[self.graph.output], self.y)

    def solve(self, beta, flat=None):
        total = lambda f: (self.energy(f) + beta * self.of_cost(f)).sum()  # noqa: E731
        flat = torch.cat([v.flatten() for v in self.start.values()]) if flat is None else flat
        for _ in range(8):
            g = torch.autograd.functional.jacobian(total, flat)
            step = _inverse(torch.autograd.functional.hessian(total, flat, vectorize=True)) @ g
            flat = flat - step
            if step.norm() < 1e-12 * flat.norm():
                break
        return flat

    def contrast(self, *multiples_and_weights):
        """`sum w_k dE/dtheta(s_k)`, the mean over the batch; rows are (beta_k, w_k)."""
        total = [torch.zeros_like(p) for p in self.model.parameters()]
        for beta, weight in multiples_and_weights:
            flat = self.solve(beta, self.free) if beta else self.free
            for t, g in zip(total, self.parameter_gradient(flat), strict=True):
                t += weight * g
        return total

    def parameter_gradient(self, flat):
        """dE/dtheta, the mean over the batch."""
        return torch.autograd.grad(self.energy(flat).mean(), list(self.model.parameters()))

    def one_sided(self, beta):
        return self.contrast((0.0, -1 / beta), (beta, 1 / beta))

    def exact(self):
        """The derivative of the free equilibrium's mean cost, by implicit differentiation."""
        flat = self.free.clone().requires_grad_()
        hessian = torch.autograd.functional.hessian(lambda f: self.energy(f).sum(), self.free, vectorize=True)
        (c,) = torch.autograd.grad(self.of_cost(flat).mean(), flat)
        (force,) = torch.autograd.grad(self.energy(flat).sum(), flat, create_graph=True)
        return torch.autograd.grad(-(force * (_inverse(hessian) @ c)).sum(), list(self.model.parameters()))


def _inverse(symmetric):
    return torch.linalg.pinv(symmetric, rtol=1e-11, hermitian=True)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_has_the_energy_that_is_documented(spelling):
    """The free equilibrium is stationary, by autograd on that energy, and the same as L-BFGS finds on it."""
    act, (f, g, faces) = SPELLINGS[spelling]
    torch.manual_seed(0)
    model = mlp(lambda: Act(act), 6, 7, 5, 3).double()
    x = torch.randn(4, 6).double()
    energy, point = free_energy(model, x, "hopfield")
    found = {n: s.detach() for n, s in free_states(energy, point, TIGHT).items()}
    assert list(found) == ["0", "2", "4"]

    def total(s):
        mu = {"0": model[0](x), "2": model[2](s["0"]), "4": model[4](s["2"])}
        own = g(s["0"]).sum() + g(s["2"]).sum() + (s["4"] ** 2 / 2).sum()
        return own - sum((s[n] * mu[n]).sum() for n in s)

    s = {n: t.clone().requires_grad_() for n, t in found.items()}
    for n, force in zip(s, torch.autograd.grad(total(s), list(s.values())), strict=True):
        if faces == "simplex" and n != "4":
            torch.testing.assert_close(found[n].sum(1), torch.ones(4).double())
            force = force - force.mean(1, keepdim=True)
        elif faces is not None and n != "4":
            low, high = (found[n] <= faces[0]), (found[n] >= faces[1])
            assert (found[n] >= faces[0]).all() and (found[n] <= faces[1]).all()
            assert (force[low] >= -1e-8).all() and (force[high] <= 1e-8).all()
            force = force.masked_fill(low | high, 0)
        assert force.abs().max() < 1e-7
    # L-BFGS: in a box over the units inside, elsewhere over the arguments of f, from zero
    inside = {n: torch.ones_like(t) for n, t in found.items()}
    if isinstance(faces, tuple):
        inside |= {n: ((found[n] > faces[0]) & (found[n] < faces[1])).double() for n in ("0", "2")}
    v = {n: torch.zeros_like(t).requires_grad_() for n, t in found.items()}

    def states():
        if isinstance(faces, tuple):
            return {n: inside[n] * t + (1 - inside[n]) * found[n] for n, t in v.items()}
        return {n: t if n == "4" else f(t) for n, t in v.items()}

    optimizer = torch.optim.LBFGS(v.values(), max_iter=1000, tolerance_grad=1e-11, tolerance_change=1e-15,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure():
        optimizer.zero_grad()
        loss = total(states())
        loss.backward()
        return loss

    optimizer.step(closure)
    for n, t in states().items():
        torch.testing.assert_close(t.detach(), found[n], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cost", ["mse", "cross_entropy"])
@pytest.mark.parametrize("name", NETWORKS)
def test_error_falls_with_beta_as_the_order_promises(name, cost):
    model, x, y = build(name, cost)
    exact = Written(model, x, y, cost).exact()
    for phases, order in (("one-sided", 1), ("centered", 2)):
        errors = []
        for beta in (0.05, 0.025):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*ends in a softmax")
                found, estimate = gradient(model, x, y, cost, beta, TIGHT, phases=phases)
            assert estimate.converged and estimate.beta == beta
            errors.append(distance(found, exact))
        assert abs(math.log2(errors[0] / errors[1]) - order) < 0.15 * order
        assert errors[1] < 0.2


@pytest.mark.parametrize("name", NETWORKS)
def test_in_single_precision_any_beta_keeps_its_digits(name):
    model, x, y = build(name)
    written, single = Written(model, x, y, "mse"), copy.deepcopy(model).float()
    certified = []
    for beta in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        found, estimate = gradient(single, x.float(), y.float(), "mse", beta)
        if estimate.converged:
            certified.append(beta)
            # In float64 a difference of two equilibria keeps enough digits down to 1e-5.
            assert distance(found, written.one_sided(max(beta, 1e-5))) < 5e-2, beta
    assert len(certified) >= 5


@pytest.mark.parametrize("name", ["sigmoid", "softmax", "softmax at the output", "sigmoid at the output", "softplus"])
def test_strong_nudges_are_as_asked(name):
    model, x, y = build(name)
    written = Written(model, x, y, "mse")
    for beta in (0.5, 10.0):
        ep = mep.EquilibriumPropagation(model, "mse", beta, TIGHT, energy="hopfield", on_unsettled="raise")
        states = ep.settle(x, y).nudged.states
        flat = torch.cat([written.kinds[n][0].inverse(s).flatten() for n, s in states.items()]).requires_grad_()
        (force,) = torch.autograd.grad((written.energy(flat) + beta * written.of_cost(flat)).sum(), flat)
        assert force.abs().max() < 1e-9 * (1 + beta)
        found = list(ep.gradients(x, y)[0].values())
        nudged, free = written.parameter_gradient(flat), written.parameter_gradient(written.free)
        assert distance(found, [(n - f) / beta for n, f in zip(nudged, free, strict=True)]) < 1e-8


@pytest.mark.parametrize("name", ["sigmoid", "tanh", "softplus", "softmax", "hardsigmoid", "convolution"])
def test_starts_from_zeros_ones_and_noise_agree(name):
    model, x, _ = build(name)
    assert_starts_agree(model, x)


@pytest.mark.parametrize("settle_lr", [0.2, None])
@pytest.mark.parametrize("name", ["sigmoid", "tanh", "softplus", "softmax", "hardsigmoid", "softmax at the output"])
def test_descent_settles_them_too(name, settle_lr):
    model, x, y = build(name)
    found, estimate = gradient(model, x, y, "mse", 0.1, mep.Descent(3000, 1e-8, adaptive=True, settle_lr=settle_lr))
    relaxed, other = gradient(model, x, y, "mse", 0.1, TIGHT)
    assert estimate.converged and other.converged and distance(found, relaxed) < 1e-6


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_energies_are_reported_node_by_node(name):
    model, x, y = build(name)
    eq = mep.EquilibriumPropagation(model, "mse", 1.0, TIGHT, energy="hopfield").settle(x, y)
    kinds = {n.name: documented(n.potential) for n in free_energy(model, x, "hopfield")[0].graph.states}
    for phase in (eq.free, eq.nudged):
        for n, s in phase.states.items():
            e = (kinds[n][1](s) - s * phase.predictions[n]).reshape(len(x), -1).sum(1)
            torch.testing.assert_close(phase.energies[n], e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["sigmoid", "softmax", "softplus", "hardsigmoid", "softmax at the output"])
@pytest.mark.parametrize("sweeps", [1, 3])
@torch.no_grad()
def test_residual_in_displacements_is_that_of_the_energy(name, sweeps):
    """The same number from displacements as from states, where states have digits enough for it."""
    model, x, y = build(name)
    energy, point = free_energy(model, x, "hopfield")
    free = settle(energy, point, mep.Relaxation(tol=1e-3)).point
    noted = {}
    for name_, force in energy.forces(free).items():
        s = free.values[name_]
        noted[name_] = Free(s, energy.graph.by_name[name_].potential.without_faces(s, force))
    energy.context.freeze_branches = True
    for beta in (0.5, 0.05):
        nudged = nudge(energy, make_cost("mse")(energy.output(free), y), beta, noted)
        moved = Displacement(nudged, free)
        for _ in range(sweeps):
            moved.sweep(1.1)
        of_states = nudged.residuals(energy.at(energy.state(moved.point)))
        moved.left = {
            n: nudged.free_share / beta * energy.graph.by_name[n].potential.slope(f.state, f.leftover).norm(dim=1)
            for n, f in noted.items()
        }
        for n, r in moved.residuals().items():
            torch.testing.assert_close(r, of_states[n], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["sigmoid", "tanh", "softplus", "softmax", "hardsigmoid"])
def test_the_coupling_is_the_largest_eigenvalue(name):
    """Of f' W, where f' is the inverse of the states' own curvature G'', on the simplex where that is the domain."""
    model, x, y = build(name)
    _, estimate = gradient(model, x, y, "mse", 1e-3)
    written = Written(model, x, y, "mse")
    flat = written.free
    hessian = torch.autograd.functional.hessian(lambda f: written.energy(f).sum(), flat, vectorize=True)
    jacobian = torch.autograd.functional.jacobian(
        lambda f: torch.cat([s.flatten() for s in written.states(f).values()]), flat
    )
    # In pulls the Hessian is f' (G'' - W) f' = f' - f' W f', and W is what is left of it.
    inverse = _inverse(jacobian)
    coupling = torch.linalg.eigvals((jacobian - hessian) @ inverse).real.max()
    assert 0.8 * coupling < estimate.coupling <= coupling * (1 + 1e-6)
    assert 0 < estimate.inside <= 1


def test_saturated_units_are_not_inside():
    model, x, y = build("sigmoid")
    assert gradient(model, x, y, "mse", 1e-3)[1].inside == 1
    model[0].bias.data.fill_(30.0)
    assert math.isclose(gradient(model, x, y, "mse", 1e-3)[1].inside, 5 / 12)
    model[2].bias.data.fill_(30.0)
    with pytest.warns(UserWarning, match="inside their boxes"):
        mep.EquilibriumPropagation(model, "mse", energy="hopfield")(x, y)


@pytest.mark.parametrize("name", ["sigmoid", "softmax at the output", "hardsigmoid"])
def test_conjugate_gradients_are_for_boxes_alone(name):
    """They solve a quadratic problem with f' = 1: with a strong coupling, too, these networks are relaxed."""
    model, x, y = build(name)
    solver = mep.Relaxation(tol=1e-10, settle_steps=300)
    gradient(model, x, y, "mse", 0.5, solver)
    solver.memory.strongest = 0.9  # as if it had measured that
    found, estimate = gradient(model, x, y, "mse", 0.5, solver)
    relaxed, other = gradient(model, x, y, "mse", 0.5, TIGHT)
    assert estimate.converged and other.converged and distance(found, relaxed) < 1e-8


@pytest.mark.parametrize("make", [nn.Sigmoid, lambda: nn.Hardtanh(0, 1)])
def test_a_batch_without_a_cost_gradient_leaves_nothing_behind(make):
    """No size of displacements can be noted there; the next free phase settles all the same."""
    torch.manual_seed(0)
    model, x, y = mlp(make, 6, 7, 3), torch.rand(5, 6), torch.full((5, 3), -100.0)
    ep = mep.EquilibriumPropagation(model, lambda out, y: torch.relu(y - out).sum(1), energy="hopfield")
    for target in (y, y, -y, y, -y):
        assert ep.gradients(x, target)[1].converged


# How they are used.


def test_many_ways_to_call():
    """One example, frozen parameters, two inputs, copies, no_grad, and what is refused."""
    torch.manual_seed(0)
    model, y = TwoInputs().double(), torch.randn(5, 3).double()
    x = torch.rand(5, 6).double(), torch.rand(5, 2).double()
    ep = mep.EquilibriumPropagation(model, "mse", 1e-3, TIGHT, "hopfield")
    found, _ = ep.gradients(x, y)
    ones = [ep.gradients(tuple(t[i : i + 1] for t in x), y[i : i + 1])[0] for i in range(5)]
    for p, g in found.items():
        torch.testing.assert_close(torch.stack([one[p] for one in ones]).mean(0), g, rtol=1e-6, atol=1e-9)
    for twin in (copy.deepcopy(ep), pickle.loads(pickle.dumps(ep))):
        for p, g in zip(twin.model.parameters(), twin.gradients(x, y)[0].values(), strict=True):
            torch.testing.assert_close(g, next(h for q, h in found.items() if q.shape == p.shape and torch.equal(q, p)))
    model.one.weight.requires_grad_(False)
    with torch.no_grad():
        assert set(ep.gradients(x, y)[0]) == set(model.parameters()) - {model.one.weight}
    with pytest.raises(mep.ArgumentError):
        mep.EquilibriumPropagation(model, energy="hopfield", checkpoint=True)


@pytest.mark.parametrize("make", [nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Hardsigmoid, lambda: nn.Softmax(-1)])
def test_presets_train_them(make):
    torch.manual_seed(0)
    model, x = mlp(make, 8, 24, 3), torch.rand(64, 8)
    y = x[:, :3].argmax(1)
    optimizer = mep.smep(model.parameters(), model=model, energy="hopfield")
    losses = [float(optimizer.step(x=x, target=y)) for _ in range(40)]
    assert losses[-1] < 0.9 * losses[0] and optimizer.last.converged


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mlp(nn.GELU, 4, 5, 3), r"node `1` \(gelu\).*Use ReLU"),
        (lambda: mlp(nn.LeakyReLU, 4, 5, 3), r"leaky_relu.*Use ReLU"),
        (lambda: mlp(lambda: nn.Softplus(1.0, 5.0), 4, 5, 3), r"softplus.*threshold 20"),
        (lambda: mlp(lambda: nn.Softplus(-1.0), 4, 5, 3), r"softplus.*Use ReLU"),
        (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Sigmoid(), nn.Linear(5, 3)), r"two activations in a row"),
        (lambda: nn.Sequential(nn.Sigmoid(), nn.Linear(4, 3)), "no state before"),
        (lambda: mlp(nn.Tanhshrink, 4, 5, 3), r"both before and behind"),
    ],
)
def test_what_has_no_inverse_is_refused_by_name(make, message):
    with pytest.raises(mep.TraceError, match=message):
        mep.EquilibriumPropagation(make(), "mse", energy="hopfield").gradients(torch.rand(5, 4), torch.rand(5, 3))


def test_an_energy_of_ones_own_has_boxes_only():
    class Bounded(mep.NodeEnergy):
        behind_activations = True

        def energy(self, s, mu):
            return s**2 - s * mu

        def ds(self, s, mu):
            return 2 * s - mu

        def dmu(self, s, mu):
            return -s

    x, y = torch.rand(5, 4), torch.rand(5, 3)
    mep.EquilibriumPropagation(mlp(nn.ReLU6, 4, 5, 3), "mse", energy=Bounded()).gradients(x, y)
    with pytest.raises(mep.ArgumentError, match=r"'bounded'.*Sigmoid behind node `0`"):
        mep.EquilibriumPropagation(mlp(nn.Sigmoid, 4, 5, 3), "mse", energy=Bounded()).gradients(x, y)


class Attending(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.first, self.attend, self.last = (
            nn.Linear(4, 6),
            nn.MultiheadAttention(6, 2, batch_first=True),
            nn.Linear(6, 3),
        )
        self.weights = weights

    def forward(self, x):
        h = torch.sigmoid(self.first(x))
        return self.last((h + self.attend(h, h, h, need_weights=self.weights)[0]).mean(1))


class OneSoftmax(nn.Module):
    """A softmax that is a gate."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(torch.sigmoid(self.one(x)) * F.dropout(self.two(x).softmax(-1), 0.5))


STATELESS = {
    "attention with weights": (lambda: Attending(True), (3, 4), r"`softmax` in node `last` \(test_potentials.py:\d+"),
    "attention": (lambda: Attending(False), (3, 4), r"`scaled_dot_product_attention` in node `last` \(test_poten"),
    "gate": (OneSoftmax, (4,), r"`softmax` in node `last` \(test_potentials.py:\d+"),
    "log_softmax": (
        lambda: nn.Sequential(*mlp(nn.Tanh, 4, 5, 3), nn.LogSoftmax(-1)),
        (4,),
        "`log_softmax` in node `3`",
    ),
    "mish": (lambda: mlp(nn.Mish, 4, 5, 3), (4,), "`mish` in node `2`"),
    "logsigmoid": (lambda: mlp(nn.LogSigmoid, 4, 5, 3), (4,), "`log_sigmoid` in node `2`"),
    "over the examples": (lambda: mlp(lambda: nn.Softmax(0), 4, 5, 3), (4,), "`softmax` in node `2`"),
}


@pytest.mark.parametrize("name", STATELESS)
def test_functions_without_a_state_are_named_once(name):
    make, shape, message = STATELESS[name]
    torch.manual_seed(0)
    model, x, y = make(), torch.rand(5, *shape), torch.rand(5, 3)
    ep = mep.EquilibriumPropagation(model, "mse", energy="hopfield", on_unsettled="ignore")
    with pytest.warns(UserWarning, match=message):
        ep.gradients(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ep.gradients(x, y)
        ep.predict(torch.rand(3, *shape))


def test_attention_is_the_same_with_and_without_its_weights():
    found = []
    for weights in (True, False):
        torch.manual_seed(0)
        model, x, y = Attending(weights).double(), torch.rand(5, 3, 4).double(), torch.rand(5, 3).double()
        with pytest.warns(UserWarning, match="without a state"):
            found.append(gradient(model, x, y, "mse", 0.05, mep.Relaxation(tol=1e-8, settle_steps=500)))
    assert found[0][1].converged and distance(found[0][0], found[1][0]) < 1e-6


@pytest.mark.filterwarnings("ignore:Functions without a state")
@pytest.mark.parametrize("end", [nn.Identity, nn.Sigmoid, lambda: nn.Softmax(-1)], ids=["free", "sigmoid", "softmax"])
def test_states_that_are_relaxed_themselves_settle_where_descent_does(end):
    """Where Jacobians change; what a loose free phase leaves is no part of the contrast."""
    torch.manual_seed(0)
    model = nn.Sequential(Attending(False), end()).double()
    x, y = torch.rand(5, 3, 4).double(), torch.rand(5, 3).double()
    for beta in (0.05, 20.0):
        found, estimate = gradient(model, x, y, "mse", beta, mep.Relaxation(1000, 1e-8))
        slow, other = gradient(model, x, y, "mse", beta, mep.Descent(300, 1e-8, adaptive=True, settle_lr=0.2))
        # What its free phase leaves is small beside the states, and counts beside small displacements.
        assert estimate.converged and other.residual.max() < 1e-6 and distance(found, slow) < 1e-6
    exact, _ = gradient(model, x, y, "mse", 1e-3, mep.Relaxation(1000, 1e-8))
    found, estimate = gradient(model, x, y, "mse", 1e-3, mep.Relaxation(tol=0.3))
    assert estimate.converged and distance(found, exact) < 0.3


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_accepted_activations_are_not_warned_of(name):
    model, x, y = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        gradient(model, x, y, "mse", 1e-3)


def test_a_softmax_before_cross_entropy_is_warned_of():
    model, x, y = build("softmax at the output", "cross_entropy")
    with pytest.warns(UserWarning, match="ends in a softmax"):
        mep.EquilibriumPropagation(model, energy="hopfield").gradients(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        mep.EquilibriumPropagation(model, "one_hot_mse", energy="hopfield").gradients(x, y)


def test_a_cost_may_take_the_logarithm_of_probabilities():
    """The output stays on the simplex, and the cost's own use of it does not make it attention."""
    model, x, _ = build("softmax at the output")
    y = torch.randint(3, (4,))
    cost = lambda out, target: F.nll_loss(out.log(), target, reduction="none") + 0.1 * (out * out.log()).sum(1)  # noqa: E731
    for beta in (1e-3, 2.0, 300.0):
        ep = mep.EquilibriumPropagation(model, cost, beta, energy="hopfield", on_unsettled="ignore")
        eq = ep.settle(x, y)
        for phase in (eq.free, eq.nudged):
            torch.testing.assert_close(phase.states["4"].sum(1), torch.ones(4).double(), rtol=1e-4, atol=1e-4)
            assert all(e.isfinite().all() for e in phase.energies.values())
            assert (phase.states["4"] > 0).all()


@pytest.mark.parametrize("potential", [Quadratic(0.0, 1.0), Quadratic(0.0, 1.0, 1 / 6, 0.5), Sigmoid(), Tanh(),
                                       Softplus(2.0), Softmax()], ids=lambda p: type(p).__name__)  # fmt: skip
def test_displacements_at_complex_betas_continue_those_at_real_ones(potential):
    """Equal on the real axis; and by Cauchy the mean over a circle is the value in its centre, here f' q."""
    torch.manual_seed(0)
    s = potential.respond(torch.randn(4, 5, dtype=torch.float64))
    q = torch.randn(4, 5, dtype=torch.float64)
    real = potential.displacement(s, q, 0.3, True)
    torch.testing.assert_close(potential.displacement(s, q, torch.tensor(0.3 + 0j), True).real, real)
    circle = [0.1 * cmath.exp(2j * math.pi * k / 16) for k in range(16)]
    mean = sum(potential.displacement(s, q, torch.tensor(beta), True).to(torch.complex128) for beta in circle) / 16
    expected = potential.hold(s, potential.slope(s, q))
    torch.testing.assert_close(mean, expected.to(torch.complex128), rtol=1e-9, atol=1e-9, check_dtype=False)
