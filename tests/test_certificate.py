"""Where an estimate says "converged", its gradient is that of the equilibrium at the beta it names.

Checked against equilibria that no solver of the package has found: Newton's method on the energy written down.
"""

import itertools
import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from cases import COSTS, READINGS, free_energy, mlp, settled
from dags import plans
from equilibria import Written, distance
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from reference import backprop, nudged_energy, predictions_of_graph, residual, swept_residual
from torch import nn

import mep
from mep.capture.cache import Graphs
from mep.cost import make_cost
from mep.energy import nudge
from mep.settle import Result, settle

TOL = 1e-2
CURVATURE = 0.5  # of the squared error of four outputs
ACTIVATIONS = {"smooth": nn.Tanh, "held": nn.ReLU, "hopfield": lambda: nn.Hardtanh(0.0, 1.0)}
BETAS = (1e-3, 0.1, 1.0, 50.0)
LENGTHS, MOMENTA, STEPS = (0.05, 0.15, 0.4), (0.0, 0.5), 200


def squared(output, target):
    return (output - target).square().mean(1)


@cache
def network(kind):
    """The network of that energy, and the same written down."""
    torch.manual_seed(8)
    model = mlp(ACTIVATIONS[kind], 5, 6, 6, 4).double()
    x, target = torch.rand(3, 5).double(), F.one_hot(torch.arange(3), 4).double()
    return model, x, target, Written(kind, model, x, squared, target)


@cache
def graphs(kind):
    return Graphs(network(kind)[0], (), *READINGS["hopfield" if kind == "hopfield" else "held"], "mse", "never")


@cache
def exact_gradient(kind, beta):
    return network(kind)[3].one_sided(beta)


@cache
def curvatures(kind, beta):
    return network(kind)[3].curvatures(beta)


def estimated(kind, solver, beta, **settings):
    """Gradients and estimate, or none of them where settling diverged."""
    model, x, target, _ = network(kind)
    energy = "hopfield" if kind == "hopfield" else "prediction"
    if kind == "hopfield":  # written down with its boxes
        settings["branches"] = "exact"
    ep = mep.EquilibriumPropagation(model, "mse", beta, solver, energy, on_unsettled="ignore", **settings)
    ep.share_graphs(graphs(kind))
    try:
        return ep.gradients(x, target)
    except mep.DivergedError:
        return None, None


def descents():
    """Solvers and betas; the last beta is the one whose first step lands on the target, `settle_lr beta C'' = 1`."""
    for length, momentum in itertools.product(LENGTHS, MOMENTA):
        for beta in (*BETAS, 1 / (length * CURVATURE)):
            yield mep.Descent(STEPS, TOL, 1, True, length, momentum), beta


def sweeps():
    for solver in (mep.Sweep(tol=TOL), mep.Local(tol=TOL)):
        for beta in BETAS:
            yield solver, beta


GRID = {
    "smooth": (*descents(), *sweeps()),
    "held": (*descents(), *sweeps()),
    "hopfield": (*descents(), *((mep.Relaxation(tol=TOL), beta) for beta in BETAS)),
}


def can_settle(kind, solver, beta):
    """Sweeps can. Descent can if it contracts by `tol / 10` within the steps, near the equilibrium.

    The error along an eigenvector of the Hessian follows `e'' = (1 + m - lr c) e' - m e`, c the eigenvalue.
    """
    if not isinstance(solver, mep.Descent):
        return True
    m = solver.momentum
    trace = 1 + m - solver.settle_lr * curvatures(kind, beta)
    roots = trace.square() - 4 * m
    factor = torch.where(roots < 0, math.sqrt(m), (trace.abs() + roots.clamp(min=0).sqrt()) / 2).max()
    return bool(factor < 1) and math.log(TOL / 10) / math.log(factor) <= STEPS


@cache
def outcomes(kind):
    """(solver, beta, whether it could settle, distance from the exact gradient where it says that it did)."""
    found = []
    for solver, beta in GRID[kind]:
        gradients, estimate = estimated(kind, solver, beta)
        is_settled = estimate is not None and estimate.converged
        error = distance(network(kind)[0], gradients, exact_gradient(kind, beta)) if is_settled else None
        found.append((solver, beta, can_settle(kind, solver, beta), error))
    return found


@pytest.mark.parametrize("kind", GRID)
def test_converged_means_the_gradient_of_the_equilibrium_at_the_named_beta(kind):
    certified = [(solver, beta, error) for solver, beta, _, error in outcomes(kind) if error is not None]
    assert not [each for each in certified if each[-1] > 5 * TOL]


@pytest.mark.parametrize("kind", GRID)
def test_what_can_settle_does_in_four_of_five_settings(kind):
    can = [(solver, beta, error is not None) for solver, beta, could, error in outcomes(kind) if could]
    assert len(can) > len(GRID[kind]) / 2
    still = [(solver, beta) for solver, beta, did in can if not did]
    assert len(still) <= 0.2 * len(can), still


@pytest.mark.parametrize("kind", ["smooth", "held"])
@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-3])
def test_descent_in_single_precision_is_not_called_converged_beyond_its_rounding(kind, tol):
    """States are kept, and the response of a weak nudge drowns in their rounding, from some beta on."""
    torch.manual_seed(0)
    model, x, target = mlp(ACTIVATIONS[kind], 5, 6, 6, 4), torch.randn(3, 5), torch.randn(3, 4)
    converged = []
    for beta in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
        solver = mep.Descent(300, tol, 1, True, 0.3, 0.5)
        ep = mep.EquilibriumPropagation(model.float(), "mse", beta, solver, on_unsettled="ignore")
        gradients, estimate = ep.gradients(x, target)
        found = {name: gradients[p].double() for name, p in model.named_parameters()}
        written = Written(kind, model.double(), x.double(), squared, target.double())
        error = distance(model, {p: found[name] for name, p in model.named_parameters()}, written.one_sided(beta))
        assert not estimate.converged or error <= 5 * tol, beta
        converged.append(estimate.converged)
    assert converged[0]
    assert not converged[-1]


# What a certificate must not overlook.

SOLVERS = {
    "sweep": mep.Sweep(tol=TOL),
    "local": mep.Local(tol=TOL),
    "descent": mep.Descent(2000, TOL, 1, True, 0.3, 0.5),
}


@pytest.fixture(params=SOLVERS)
def solver(request):
    return SOLVERS[request.param]


@pytest.mark.parametrize("beta", [1e-6, 1e-3, 1.0, 1 / (0.3 * CURVATURE)])
@pytest.mark.parametrize("steps", [1, 2])
def test_descent_is_not_converged_before_its_signal_has_reached_the_first_layer(beta, steps):
    """Not where the nudge is weak beside the states, nor where the first step lands on the target."""
    _, estimate = estimated("smooth", mep.Descent(steps, 0.4, 1, True, 0.3, 0.0), beta)
    assert not estimate.converged
    assert (estimate.residual > 0.4).all()


@pytest.mark.parametrize("factor", [1e-3, 1e-6])
@pytest.mark.parametrize("beta", [1e-3, 1.0])
def test_a_weak_layer_is_settled_to_the_same_fraction(solver, factor, beta):
    """Behind it errors are so many times smaller; the gradient of every single parameter must be right."""
    torch.manual_seed(0)
    model, x, target = mlp(nn.Tanh, 5, 6, 6, 6, 4).double(), torch.randn(3, 5).double(), torch.randn(3, 4).double()
    with torch.no_grad():
        model[4].weight *= factor
    exact = Written("smooth", model, x, squared, target).one_sided(beta)
    ep = mep.EquilibriumPropagation(model, "mse", beta, solver, on_unsettled="ignore")
    gradients, estimate = ep.gradients(x, target)
    assert estimate.converged
    for p, g in gradients.items():
        assert (g - exact[p]).norm() <= 5 * TOL * exact[p].norm()


class WithDeadPart(nn.Module):
    """A branch whose ReLUs are all off, and a layer that is multiplied by zero."""

    def __init__(self):
        super().__init__()
        self.first, self.dead, self.cut, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        with torch.no_grad():
            self.dead.bias.fill_(-100)

    def forward(self, x):
        h = self.first(x).tanh()
        return self.last(h + F.relu(self.dead(h)) + 0.0 * self.cut(h).tanh())


class WithoutDeadPart(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.first, self.last = model.first, model.last

    def forward(self, x):
        return self.last(self.first(x).tanh())


@pytest.mark.parametrize("beta", [1e-3, 1.0])
def test_a_part_that_no_signal_reaches_does_not_count(solver, beta):
    torch.manual_seed(0)
    model, x, target = WithDeadPart().double(), torch.randn(3, 5).double(), torch.randn(3, 4).double()
    gradients, estimate = mep.EquilibriumPropagation(model, "mse", beta, solver).gradients(x, target)
    assert estimate.converged
    assert float(estimate.residual.max()) <= TOL
    alive = WithoutDeadPart(model)
    expected, _ = mep.EquilibriumPropagation(alive, "mse", beta, solver).gradients(x, target)
    for p, g in expected.items():
        assert (gradients[p] - g).norm() <= 5 * TOL * g.norm()
    size = torch.stack([g.norm() for g in expected.values()]).norm()
    assert all(gradients[p].norm() <= 1e-9 * size for p in gradients if p not in expected)


def but_for_rounding(output):
    """The same numbers, each up by a unit in its last place."""
    return output.nextafter(torch.full_like(output, math.inf))


@pytest.mark.parametrize("beta", [1e-6, 0.1, 10.0])
def test_an_example_whose_target_is_its_output_has_nothing_to_settle(solver, beta):
    """Whatever beta is, it is settled, and moves nothing; the others are settled as if it were not there."""
    torch.manual_seed(0)
    model, x = mlp(nn.Tanh, 5, 6, 4).double(), torch.randn(3, 5).double()
    with torch.no_grad():
        target = but_for_rounding(model(x))
        target[1:] += torch.randn(2, 4)
    ep = mep.EquilibriumPropagation(model, "mse", beta, solver, on_unsettled="ignore")
    gradients, estimate = ep.gradients(x, target)
    others, without = ep.gradients(x[1:], target[1:])
    assert float(estimate.residual[0]) == 0
    assert bool(estimate.settled[0])
    torch.testing.assert_close(estimate.residual[1:], without.residual, rtol=1e-6, atol=1e-9)
    for p, g in gradients.items():
        torch.testing.assert_close(3 * g, 2 * others[p], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("beta", [1e-6, 0.1, 10.0])
def test_a_batch_with_nothing_to_settle_is_converged_with_a_gradient_of_zero(solver, beta):
    model, x, _, _ = network("smooth")
    with torch.no_grad():
        target = but_for_rounding(model(x))
    gradients, estimate = mep.EquilibriumPropagation(model, "mse", beta, solver).gradients(x, target)
    assert estimate.converged
    assert not estimate.residual.any()
    assert all(float(g.abs().max()) < 1e-12 for g in gradients.values())


@torch.no_grad()
def test_whether_there_is_something_to_settle_is_judged_at_the_free_point():
    """The first step of descent lands on the target, where the cost's gradient is zero; its residual is one there."""
    model, x, target, _ = network("smooth")
    energy, free = free_energy(model, x)
    length = 0.4
    nudged = nudge(energy, make_cost("mse")(energy.output(free), target), 1 / (length * CURVATURE))
    after = settle(nudged, free, mep.Descent(1, TOL, 1, False, length, 0.0))
    assert nudged.has_nothing_to_settle(after.point).all()
    assert not nudged.has_nothing_to_settle(free).any()
    assert after.result is Result.FIXED_STEPS
    torch.testing.assert_close(after.residual, torch.ones(3).double())


@pytest.mark.parametrize("kind", ["smooth", "held"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 200])
@pytest.mark.parametrize("beta", [1e-3, 1.0])
def test_the_residual_of_descent_is_that_of_its_worst_node(kind, steps, beta):
    """Of those that a signal has reached; the energy is written down, and its forces are had by autograd."""
    model, x, target, written = network(kind)
    with torch.no_grad():
        energy, found = settled(model, x, target, "mse", beta, mep.Descent(steps, TOL, 1, True, 0.3, 0.5))
    true = residual(written.predict, written.total(beta), energy.state(found.point))
    torch.testing.assert_close(found.residual, true, rtol=1e-6, atol=1e-9)
    assert (found.result is Result.CONVERGED) == bool((true <= TOL).all())


# Away from the target.

AWAY = {
    "sweep": mep.Sweep(),
    "ten sweeps": mep.Sweep(10, adaptive=False),
    "local": mep.Local(),
    "descent": mep.Descent(200, 1e-2, 1, True, 0.3, 0.5),
    "ten steps": mep.Descent(10),
}
FAR = {
    "affine": lambda: mlp(nn.ReLU, 5, 6, 6, 4),
    "smooth": lambda: mlp(nn.GELU, 5, 6, 6, 4),
    "bounded": lambda: mlp(nn.Tanh, 5, 6, 6, 4),
    "linear": lambda: nn.Linear(5, 4),
}


@pytest.mark.parametrize("name", AWAY)
@pytest.mark.parametrize("kind", FAR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nudge_away_from_the_target_without_an_equilibrium_is_reported(name, kind, dtype):
    """At `beta C'' > 1` the energy falls without bound away from the target: no number of steps settles it."""
    torch.manual_seed(0)
    model, x, target = FAR[kind]().to(dtype), torch.randn(4, 5, dtype=dtype), torch.randn(4, 4, dtype=dtype)
    exact = backprop(model, squared(model(x), target).mean())
    # Errors may grow a hundredfold before settling is given up, and the states that they multiply with them.
    largest = 1e4 * float(torch.stack([g.norm() for g in exact.values()]).norm())
    for factor in (1.1, 2.0, 10.0, 100.0):
        ep = mep.EquilibriumPropagation(
            model, "mse", factor / CURVATURE, AWAY[name], phases="centered", on_unsettled="ignore"
        )
        try:
            gradients, estimate = ep.gradients(x, target)
        except mep.DivergedError:
            continue
        assert not estimate.converged
        assert not estimate.settled.any()
        assert float(torch.stack([g.norm() for g in gradients.values()]).norm()) <= largest


# Recomputed.

some_solver = st.sampled_from((mep.Sweep(), mep.Sweep(tol=1e-6), mep.Local(), mep.Local(tol=1e-6, schedule="random")))


@settings(max_examples=80, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow])
@given(
    plan=plans(),
    cost=st.sampled_from(sorted(COSTS)),
    beta=st.sampled_from((-0.05, 1e-3, 0.1, 1.0, 20.0)),
    solver=some_solver,
)
def test_the_residual_of_any_graph_is_that_of_the_energy_written_down(plan, cost, beta, solver):
    model, x = plan.build()
    with torch.no_grad():
        target = COSTS[cost].target(model(x))
        energy, found = settled(model, x, target, COSTS[cost].argument, beta, solver)
        free = energy.state(energy.graph.evaluate(energy.inputs, energy.context))
    predict = predictions_of_graph(energy.graph, energy.inputs, free)
    value, states = COSTS[cost].value, energy.state(found.point)
    if isinstance(solver, mep.Local) or energy.is_affine:
        # Every node against its children as they are.
        total = nudged_energy(predict, energy.graph.output, value, target, beta)
        true = residual(predict, total, states)
    else:  # every node against what a sweep would make of it
        true = swept_residual(predict, energy.graph.output, value, target, beta, states)
    torch.testing.assert_close(found.residual, true, rtol=1e-5, atol=1e-8)
    assert (found.result is Result.CONVERGED) == bool((true <= solver.tol).all())
