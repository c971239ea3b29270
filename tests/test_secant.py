"""The two rules for the next output error: exact on what they model, and fewer sweeps than plain iteration."""

import pytest
import torch
from cases import COSTS, MODELS, mlp, settled
from torch import nn

import mep
from mep.cost import make_cost
from mep.settle import Known, settle
from mep.solvers.anderson import mix
from mep.solvers.secant import solve_output

BATCH, FEATURES = 6, 5


def gains(scale):
    """A positive matrix per example."""
    torch.manual_seed(0)
    a = torch.randn(BATCH, FEATURES, FEATURES).double()
    return scale * a @ a.mT / FEATURES


def apply(matrix, vector):
    return (matrix @ vector.unsqueeze(2)).squeeze(2)


def solve(cost, free, errors, shifts, gradient):
    """`solve_output` with the trials side by side, [batch, trials, features]; only the latest gradient counts."""
    outputs = free.unsqueeze(1) - shifts
    return solve_output(cost, free, [(errors[:, i], outputs[:, i], gradient) for i in range(errors.shape[1])])


def sweep(cost, free, gain, beta, steps, rule):
    """Errors tried, as `Sweep` would try them on a linear network with that gain."""
    x = cost.gradient(free)
    tried = []
    for _ in range(steps):
        s = free - beta * apply(gain, x)
        tried.append((x, s, cost.gradient(s)))
        x = rule(tried)
    return tried


def secants(cost, free):
    def rule(tried):
        errors, outputs, gradients = zip(*tried, strict=True)
        shifts = torch.stack([free - s for s in outputs], 1)
        return solve(cost, free, torch.stack(errors, 1), shifts, gradients[-1])

    return rule


def mixing(tried):
    *earlier, (x, _, f) = tried
    return mix([(xi, fi) for xi, _, fi in earlier], x, f)


def plain(tried):
    return tried[-1][2]


def problem(cost):
    torch.manual_seed(1)
    free = torch.randn(BATCH, FEATURES).double()
    target = COSTS[cost].target(free)
    return make_cost(cost)(free, target), free, target


def distance(tried):
    return (tried[-1][0] - tried[-1][2]).norm(dim=1) / tried[-1][0].norm(dim=1)


@pytest.mark.parametrize("beta", [0.3, -0.3])
def test_secants_are_exact_where_one_product_tells_the_gain(beta):
    """A multiple of the identity, and squared error: the very next error is the fixed point."""
    cost, free, target = problem("mse")
    gain = 2.0 * torch.eye(FEATURES).double().expand(BATCH, -1, -1)
    tried = sweep(cost, free, gain, beta, 2, secants(cost, free))
    exact = (free - target) * 2 / FEATURES / (1 + 2 * beta * 2 / FEATURES)
    torch.testing.assert_close(tried[-1][0], exact)


@pytest.mark.parametrize(("name", "rule"), [("mse", "secants"), ("mse", "mixing")])
def test_linear_problems_are_solved_once_every_direction_was_tried(name, rule):
    cost, free, _ = problem(name)
    gain = gains(1.0)
    tried = sweep(cost, free, gain, 0.8, FEATURES + 2, secants(cost, free) if rule == "secants" else mixing)
    exact = torch.linalg.solve(torch.eye(FEATURES) + 0.8 * 2 / FEATURES * gain, cost.gradient(free))
    assert ((tried[-1][0] - exact).norm(dim=1) / exact.norm(dim=1)).max() < 1e-3


@pytest.mark.parametrize("history", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["mse", "cross_entropy"])
def test_model_agrees_with_the_latest_product_it_has_seen(name, history):
    """If the latest error already is the fixed point, it stays, whatever was tried before."""
    cost, free, _ = problem(name)
    gain = gains(1.0)
    fixed = sweep(cost, free, gain, 0.2, 200, plain)[-1][0]
    torch.manual_seed(2)
    others = fixed.unsqueeze(1) + torch.randn(BATCH, history - 1, FEATURES).double()
    errors = torch.cat([others, fixed.unsqueeze(1)], 1)
    shifts = 0.2 * errors @ gain.mT
    found = solve(cost, free, errors, shifts, cost.gradient(free - shifts[:, -1]))
    torch.testing.assert_close(found, fixed, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["mse", "cross_entropy"])
def test_secants_solve_the_cost_by_newton(name):
    """All of the gain known: two steps of Newton leave an error that is quadratically small."""
    cost, free, _ = problem(name)
    for beta, bound in ((0.2, 1e-4), (0.02, 1e-8)):
        gain = gains(1.0)
        fixed = sweep(cost, free, gain, beta, 300, plain)[-1][0]
        errors = torch.eye(FEATURES).double().expand(BATCH, -1, -1)
        shifts = beta * errors @ gain.mT
        found = solve(cost, free, errors, shifts, cost.gradient(free - shifts[:, -1]))
        again = solve(
            cost,
            free,
            torch.cat([errors[:, 1:], found.unsqueeze(1)], 1),
            torch.cat([shifts[:, 1:], (beta * apply(gain, found)).unsqueeze(1)], 1),
            cost.gradient(free - beta * apply(gain, found)),
        )
        assert ((again - fixed).norm(dim=1) / fixed.norm(dim=1)).max() < bound


def test_each_example_is_solved_for_itself():
    cost, free, _ = problem("cross_entropy")
    errors = torch.randn(BATCH, 3, FEATURES).double()
    shifts = 0.2 * errors @ gains(1.0).mT
    gradient = cost.gradient(free - shifts[:, -1])
    together = solve(cost, free, errors, shifts, gradient)
    mixed = mix([(errors[:, 0], shifts[:, 0])], errors[:, 1], shifts[:, 1])
    for i in range(BATCH):
        one = slice(i, i + 1)
        alone = solve(cost.of(torch.tensor([i])), free[one], errors[one], shifts[one], gradient[one])
        torch.testing.assert_close(alone, together[one])
        alone = mix([(errors[one, 0], shifts[one, 0])], errors[one, 1], shifts[one, 1])
        torch.testing.assert_close(alone, mixed[one])


def test_nothing_to_solve_stays_nothing():
    _, free, _ = problem("mse")
    cost = make_cost("mse")(free, free)
    zero = torch.zeros(BATCH, 2, FEATURES).double()
    assert torch.equal(solve(cost, free, zero, zero, zero[:, 0]), zero[:, 0])
    assert torch.equal(mix([(zero[:, 0], zero[:, 0])], zero[:, 0], zero[:, 0]), zero[:, 0])


def test_mixing_minimises_the_combined_residual():
    torch.manual_seed(0)
    x, f = torch.randn(2, 4, BATCH, 7).double()
    alpha = torch.randn(BATCH, 4).double()
    alpha[:, 3] = 1 - alpha[:, :3].sum(1)
    found = mix(list(zip(x[:3], f[:3], strict=True)), x[3], f[3])
    steps = torch.stack([(f - x)[i] - (f - x)[3] for i in range(3)], 2)
    best = torch.linalg.lstsq(steps, -(f - x)[3].unsqueeze(2)).solution
    expected = f[3] + (torch.stack([f[i] - f[3] for i in range(3)], 2) @ best).squeeze(2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cost", COSTS)
def test_both_need_fewer_sweeps_than_plain_iteration(cost):
    torch.manual_seed(0)
    model, x = mlp(nn.Tanh, 8, 16, 16, 5).double(), torch.randn(16, 8).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    y = COSTS[cost].target(model(x).detach())
    used = [
        settled(model, x, y, COSTS[cost].argument, 0.3, mep.Sweep(tol=1e-8, settle_steps=200, history=history))[1]
        for history in (0, 2, 4)
    ]
    assert all(found.result is mep.Result.CONVERGED for found in used)
    assert used[1].iterations < 0.85 * used[0].iterations
    assert used[2].iterations < 0.85 * used[0].iterations


@pytest.mark.parametrize("cost", ["cross_entropy", "mse", "custom"])
def test_both_settle_where_plain_iteration_expands(cost):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).double(), torch.randn(10, 6).double()
    with torch.no_grad():
        model[1].weight.mul_(2.0)
    y = COSTS[cost].target(model(x).detach())
    given, beta = COSTS[cost].argument, {"cross_entropy": 1.2, "mse": 1.0, "custom": 0.5}[cost]
    _, stuck = settled(model, x, y, given, beta, mep.Sweep(tol=1e-6, settle_steps=60, history=0, adaptive=False))
    _, found = settled(model, x, y, given, beta, mep.Sweep(tol=1e-6, settle_steps=60, adaptive=False))
    assert stuck.residual.max() > 0.1 or not stuck.residual.isfinite().all()
    assert found.result is mep.Result.CONVERGED


@pytest.mark.parametrize("name", ["scaled", "mlp tanh", "embedded"])
def test_a_history_longer_than_the_output_does_no_harm(name):
    """Three outputs cannot tell eight independent errors; the superfluous ones must not slow the sweeps."""
    case = MODELS[name]
    model, x, y = case.build()
    short, long = (
        settled(model, x, y, "cross_entropy", 0.3, mep.Sweep(tol=1e-8, settle_steps=100, history=h))[1] for h in (1, 8)
    )
    assert long.result is mep.Result.CONVERGED
    assert long.iterations <= 1.5 * short.iterations


@pytest.mark.parametrize("cost", ["cross_entropy", "mse"])
def test_the_gain_is_learnt_and_spares_sweeps(cost):
    """One layer answers an error by that error: its gain is one, and who knows that begins nearer."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), torch.randn(5, 4).double()
    y = COSTS[cost].target(model(x))
    energy, learning = settled(model, x, y, cost, 0.5, mep.Sweep(tol=1e-10))
    with torch.no_grad():
        knowing = settle(energy, energy.rest(), mep.Sweep(tol=1e-10), Known(1.0))
    assert learning.known.gain == pytest.approx(1) and knowing.known.gain == pytest.approx(1)
    assert knowing.iterations < learning.iterations
    torch.testing.assert_close(energy.output(knowing.point), energy.output(learning.point))
