"""Every piecewise-linear operation: held on its branch, or settled at its kink; and how far the two are apart."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from cases import COSTS, call, free_energy, of_module, settled
from compare_branches import compare_branches
from reference import backprop, nudged_energy, predictions_of_graph, residual
from torch import nn

import mep
from mep.capture import capture
from mep.graph.closed_forms import Largest, MaxPool, Windows
from mep.graph.closed_forms.maxima import largest
from mep.solvers.networks.nonsmooth import at_rest, nearest_force, unit_minimum
from mep.verification.equilibrium import residuals

SETTLED = mep.Sweep(tol=1e-9, settle_steps=300)


class Net(nn.Module):
    """Two layers of eight on the input, a third between, an output layer, and a forward that is given."""

    def __init__(self, forward, width=8, **parts):
        super().__init__()
        self.a, self.b, self.h, self.c = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(width, 3)
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.c(self.run(self, x))


def convolutional(*pools):
    """A convolution, ReLU and pooling, then a convolution, pooling and ReLU."""
    first, second = pools
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), first, nn.Conv2d(3, 3, 3, padding=1), second, nn.ReLU(),
        nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip


@dataclass(frozen=True)
class Kinked:
    model: Callable[[], nn.Module]
    shape: tuple[int, ...] = (4,)
    ties: bool = False


NETS = {
    "PReLU": Kinked(
        lambda: nn.Sequential(
            nn.Linear(4, 8), nn.PReLU(), nn.Linear(8, 8), nn.PReLU(8, init=-0.3), nn.Linear(8, 3), nn.PReLU(init=0.5)
        )
    ),
    "F.prelu of a sum": Kinked(
        lambda: Net(lambda n, x: F.prelu(n.h(n.a(x)) + n.b(x), n.slope), slope=nn.Parameter(torch.tensor([0.2])))
    ),
    "maximum": Kinked(lambda: Net(lambda n, x: torch.maximum(n.h(n.a(x)), n.b(x))), ties=True),
    "minimum with the input": Kinked(
        lambda: Net(lambda n, x: n.h(n.a(x)).view(-1, 2, 4).minimum(x[:, None]).flatten(1))
    ),
    "maximum with a parameter": Kinked(
        lambda: Net(lambda n, x: torch.max(n.h(n.a(x)), n.floor), floor=nn.Parameter(torch.zeros(8)))
    ),
    "amax": Kinked(lambda: Net(lambda n, x: n.h(n.a(x)).view(-1, 2, 2, 2).amax((1, -1)), 2), ties=True),
    "max and min": Kinked(
        lambda: Net(lambda n, x: n.h(n.a(x)).view(-1, 4, 2).max(2)[0] + n.b(x).view(-1, 2, 4).min(dim=1).values, 4),
        ties=True,
    ),
    "max pooling": Kinked(lambda: convolutional(nn.MaxPool2d(2), nn.MaxPool2d(2)), (1, 8, 8), ties=True),
    "windows overlap": Kinked(
        lambda: convolutional(nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, 1)), (1, 8, 8), ties=True
    ),
    "ReLU of a sum": Kinked(lambda: Net(lambda n, x: torch.relu(n.h(n.a(x).relu()) + n.b(x)))),
    "one state, three kinks": Kinked(
        lambda: Net(lambda n, x: (lambda h: h.abs() + n.h(h.relu()) + h.clamp(min=-0.2))(n.h(n.a(x))))
    ),
    "kinks off the origin": Kinked(
        lambda: Net(lambda n, x: F.hardtanh(n.h(F.softshrink(n.a(x), 0.2)), 0.1, 0.4) + F.threshold(n.b(x), 0.1, 0.1))
    ),
    "ReLU as output": Kinked(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU6(), nn.Linear(8, 3), nn.ReLU())),
}


def problem(name, batch=10):
    torch.manual_seed(0)
    case = NETS[name]
    model, x = case.model().double(), torch.randn(batch, *case.shape).double()
    return model, x, torch.randint(3, (batch,))


# One unit, one window.


@pytest.mark.parametrize("beta", [0.7, -0.7])
def test_window_rests_at_a_minimum_of_its_own_energy(beta):
    torch.manual_seed(0)
    mu, f, x0 = torch.randn(3, 500, 4).double()
    u = 2 * torch.randn(500, 1).double()
    delta, rest = unit_minimum(mu, f, u, beta, Largest(), x0)
    s = mu - beta * delta

    def value(s):
        return (0.5 * (s - mu) ** 2 + beta * f * s).sum(1) + beta * u[:, 0] * s.amax(1)

    for _ in range(200):
        step = torch.randn(500, 4).double() * 1e-5 * (torch.rand(500, 4) > 0.4)
        assert (value(s + step) >= value(s) - 1e-12).all()
    tied = rest.isfinite()
    assert tied.any(1).sum() > 50 and not tied[(beta * u < 0).flatten()].any()
    torch.testing.assert_close(s[tied], rest[tied])
    balanced = nearest_force(torch.where(tied, rest, s), delta, f, u, Largest(), beta)
    torch.testing.assert_close(balanced, delta, rtol=0, atol=1e-12)
    wrong = nearest_force(torch.where(tied, rest, s), delta + 0.1, f, u, Largest(), beta)
    assert ((wrong - delta - 0.1).abs().amax(1) > 0.02).all()
    torch.testing.assert_close(wrong[tied], delta[tied])  # what winners have in common projects to nothing


@pytest.mark.parametrize("beta", [0.7, -0.7])
def test_winner_of_the_free_equilibrium_stays_as_long_as_that_is_a_minimum(beta):
    torch.manual_seed(0)
    mu, x0 = torch.randn(2, 500, 4).double()
    u = -2 * torch.rand(500, 1).double() / beta
    delta, _ = unit_minimum(mu, torch.zeros_like(mu), u, beta, Largest(), x0)
    home = x0.argmax(1)
    raised = mu.clone()
    raised[range(500), home] -= beta * u[:, 0]
    stays = raised.argmax(1) == home
    winner = (mu - beta * delta).argmax(1)
    assert (winner == home)[stays].all() and (winner == mu.argmax(1))[~stays].all() and 50 < stays.sum() < 450


def test_units_at_a_tie_keep_to_it_when_their_predictions_move():
    """Where the window would have its minimum now, with the same units tied, and the same pull to share."""
    mu, nothing = torch.tensor([[1.0, 0.8, -1.0]]).double(), torch.zeros(1, 3).double()
    u = torch.tensor([[5.0]]).double()
    delta, rest = unit_minimum(mu, nothing, u, 0.1, Largest(), mu)
    moved = mu + torch.tensor([[0.02, -0.01, 0.3]]).double()
    again, _ = unit_minimum(moved, nothing, u, 0.1, Largest(), mu)
    s = at_rest(moved - 0.1 * delta, rest, Largest())
    torch.testing.assert_close(s, moved - 0.1 * again)
    assert s[0, 0] == s[0, 1]


POOLS = [
    (F.max_pool1d, MaxPool(1, options={"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}), (2, 3, 8)),
    (F.max_pool2d, MaxPool(2, options={"kernel_size": (2, 3)}), (2, 3, 7, 8)),
    (F.max_pool2d, MaxPool(2, options={"kernel_size": 3, "stride": (2, 1), "dilation": (2, 1)}), (2, 3, 9, 8)),
    (F.max_pool2d, MaxPool(2, options={"kernel_size": 3, "dilation": 2, "padding": 1}), (2, 3, 9, 8)),
    (F.max_pool3d, MaxPool(3, options={"kernel_size": 2, "stride": None, "padding": (1, 0, 1)}), (2, 5, 4, 6)),
    (F.adaptive_max_pool1d, MaxPool(1, True, {"output_size": 3}), (2, 3, 8)),
    (F.adaptive_max_pool2d, MaxPool(2, True, {"output_size": (3, None)}), (2, 3, 7, 4)),
]


@pytest.mark.parametrize(("function", "pool", "shape"), POOLS)
def test_maximum_over_windows_is_max_pooling(function, pool, shape):
    torch.manual_seed(0)
    x = torch.randn(shape).double().requires_grad_()
    pooled, windowed = function(x, **pool.options), largest(Windows(pool)(x)).squeeze(-1)
    assert torch.equal(pooled, windowed)
    weights = torch.randn_like(pooled)
    one, two = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (pooled, windowed))
    torch.testing.assert_close(one, two)


# The readings are the model.


@pytest.mark.parametrize("branches", ["held", "exact"])
@pytest.mark.parametrize("name", NETS)
def test_free_equilibrium_is_the_model(name, branches):
    model, x, _ = problem(name)
    energy, point = free_energy(model, x, branches)
    torch.testing.assert_close(energy.output(point), model(x).detach(), rtol=0, atol=1e-14)
    assert set(energy.graph.parameters) == {p for p, g in backprop(model, model(x).sum()).items() if g is not None}


@pytest.mark.parametrize(
    "forward",
    [
        lambda h: torch.max(h, 1, True)[0],
        lambda h: torch.max(h, dim=1, keepdim=True).values,
        lambda h: h.min(-1, keepdim=True)[0],
        lambda h: torch.amin(h, dim=(1,), keepdim=True),
        lambda h: torch.amax(h, (1, 2)).unsqueeze(1),
        lambda h: torch.min(h, other=h.tanh()),
        lambda h: h.amax() + h,
    ],
)
def test_maxima_in_every_spelling(forward):
    torch.manual_seed(0)
    model = Net(lambda n, x: forward(n.a(x).view(-1, 8, 1).expand(-1, 8, 8) * torch.arange(8)).flatten(1)[:, :1], 1)
    model, x = model.double(), torch.randn(5, 4).double()
    energy, point = free_energy(model, x)
    torch.testing.assert_close(energy.output(point), model(x).detach(), rtol=0, atol=0)


# Held.


@pytest.mark.parametrize("name", NETS)
def test_held_branches_settle_in_few_sweeps_on_the_linear_piece(name):
    model, x, y = problem(name)
    cost = COSTS["cross_entropy"]
    _, free = free_energy(model, x)
    energy, found = settled(model, x, y, cost.argument, 0.2, mep.Sweep(tol=1e-9))
    assert found.result is mep.Result.CONVERGED and found.iterations < 15
    free, states = ({n.name: point.values[n.name] for n in energy.graph.states} for point in (free, found.point))
    predict = predictions_of_graph(energy.graph, energy.inputs, free)
    total = nudged_energy(predict, energy.graph.output, cost.value, y, 0.2)
    assert residual(predict, total, states).max() < 1e-7


# Exact.


@pytest.mark.parametrize("beta", [0.05, -0.05])
@pytest.mark.parametrize("name", NETS)
def test_exact_equilibrium_is_a_minimum_for_every_node(name, beta):
    """Of the nonsmooth energy: no small step of one node's state lowers it, in whatever direction."""
    model, x, y = problem(name)
    cost = COSTS["cross_entropy"]
    energy, found = settled(model, x, y, cost.argument, beta, SETTLED, "exact")
    assert found.result is mep.Result.CONVERGED
    states = energy.state(found.point)
    predict = predictions_of_graph(energy.graph, energy.inputs)
    total = nudged_energy(predict, energy.graph.output, cost.value, y, beta)
    if beta > 0:
        here = total(states)
        for n, _ in itertools.product(states, range(10)):
            step = 1e-5 * torch.randn_like(states[n])
            assert (total({**states, n: states[n] + step}) >= here - 1e-12).all(), n
    again = residuals(energy, states, swept=False)
    assert max(float(each.detach().max()) for each, _ in again.values()) < 1e-7


@pytest.mark.parametrize("name", [n for n, case in NETS.items() if case.ties])
def test_some_windows_rest_at_a_tie(name):
    model, x, y = problem(name)
    energy, found = settled(model, x, y, "cross_entropy", 0.05, SETTLED, "exact")
    _, free = free_energy(model, x, "exact")
    windows = zip(of_largest(energy.graph, found.point), of_largest(energy.graph, free), strict=True)
    assert sum(int((is_tie(s) & ~is_tie(s0)).sum()) for s, s0 in windows) > 0


def is_tie(s):
    return (s == s.amax(-1, True)).sum(-1) > 1


def of_largest(graph, point):
    nodes = {n.name: n for n in graph.nodes}
    return [point.values[nodes[n].parents[0]] for n, kink in graph.kinks.items() if isinstance(kink, Largest)]


@pytest.mark.parametrize("seed", range(4))
def test_exact_max_pooling_is_among_the_equilibria_found_by_brute_force(seed):
    """Every window on either winner or at a tie: a quadratic energy each, solved densely."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (1, 4)), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(2, 2))
    model = model.double()
    with torch.no_grad():
        model[4].weight.mul_(2)
    x, y, beta = torch.randn(4, 2).double(), 2 * torch.randn(4, 2).double(), 0.3
    energy, found = settled(model, x, y, "mse", beta, SETTLED, "exact")
    assert found.result is mep.Result.CONVERGED
    state = energy.state(found.point)
    resting = 0
    for i in range(4):
        equilibria = dict(window_equilibria(model, x[i], y[i], beta))
        mine = torch.cat([state[n][i].flatten() for n in state])
        same = [where for where, z in equilibria.items() if (z - mine).norm() < 1e-7]
        assert same, f"{len(equilibria)} equilibria, none of them found"
        resting += same[0].count("tie")
    assert resting or seed


def window_equilibria(model, x, y, beta):
    """(where each window stands, the states): those choices whose own minimum is a minimum of the whole."""
    first, last = model[0], model[4]
    inner = first(x).detach()

    def total(z, winners):
        s, w, out = z[:4], z[4:8].view(2, 2), z[8:]
        top = torch.stack([v.mean() if k == "tie" else v[k] for v, k in zip(w, winners, strict=True)])
        energy = 0.5 * ((s - inner) ** 2).sum() + 0.5 * ((w.flatten() - s) ** 2).sum()
        return energy + 0.5 * ((out - last(top)) ** 2).sum() + beta * ((out - y) ** 2).mean()

    for winners in itertools.product((0, 1, "tie"), repeat=2):
        basis = torch.eye(10).double()
        for window, k in enumerate(winners):
            if k == "tie":  # one number for both units
                basis[:, 4 + 2 * window] += basis[:, 5 + 2 * window]
        kept = [j for j in range(10) if not (j in (5, 7) and winners[(j - 5) // 2] == "tie")]
        basis = basis[:, kept]
        start = torch.zeros(len(kept)).double()
        gradient, hessian = (
            d(lambda v, w=winners, b=basis: total(b @ v, w), start)
            for d in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian)
        )
        z = basis @ torch.linalg.solve(hessian, -gradient)
        s, w, out = z[:4].view(2, 2), z[4:8].view(2, 2), z[8:]
        top = w.amax(1)
        pull = (last.weight.T @ (last(top) - out)).detach()
        for v, at, k, u in zip(w, s, winners, pull, strict=True):
            shares = (at - v) / u  # what each unit takes of the pull
            fits = (shares >= 0).all() if k == "tie" else v[k] >= v[1 - k]
            if not fits:
                break
        else:
            yield winners, z.detach()


@pytest.mark.parametrize("branches", ["held", "exact"])
@pytest.mark.parametrize("name", NETS)
def test_gradient_tends_to_backprops_in_proportion_to_beta(name, branches):
    """Slopes of PReLU and parameters inside a maximum included."""
    model, x, y = problem(name, batch=4)
    exact = backprop(model, COSTS["cross_entropy"].value(call(model, x), y).mean())
    errors = []
    for beta in (2e-4, 1e-4):
        ep = mep.EquilibriumPropagation(model, beta=beta, branches=branches, solver=mep.Sweep(tol=1e-10))
        found, estimate = ep.gradients(x, y)
        assert estimate.converged and estimate.beta == beta
        errors.append(
            {p: float((found[p] - g).norm() / g.norm()) for p, g in exact.items() if g is not None and g.norm() > 0}
        )
    for p in errors[0]:
        assert errors[0][p] < 2e-2
        assert errors[0][p] < 1e-6 or 1.7 < errors[0][p] / errors[1][p] < 2.3


REFUSED = {
    "topk": lambda n, x: n.a(x).topk(3)[0],
    "sort": lambda n, x: torch.sort(n.a(x), 1).values[:, :3],
    "max": lambda n, x: n.a(x)[:, :3] / n.a(x).max(),
    "amax": lambda n, x: n.a(x)[:, :3] / n.a(x).amax(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_kinks_without_a_rule_are_refused_when_exact(name):
    model = Net(REFUSED[name], 3)
    with pytest.raises(mep.TraceError, match=rf"no rule for node `{name}(_1)?` .*Way out: branches='held'"):
        capture(model, torch.randn(5, 4), branches="exact")
    capture(model, torch.randn(5, 4))


def test_a_jump_is_no_kink():
    assert of_module(nn.Threshold(0.1, 0.1)).kinks == (0.1,) and of_module(nn.Threshold(0.1, 0.2)) is None


# How far apart.


@pytest.mark.parametrize("name", ["max pooling", "ReLU of a sum", "PReLU"])
def test_held_and_exact_part_with_beta_and_agree_in_the_limit(name):
    model, x, y = problem(name)
    before = {n: p.clone() for n, p in model.named_parameters()}
    strong, weak = compare_branches(model, x, y, betas=(0.05, 1e-5), tol=1e-9)
    assert strong.settled == weak.settled == (True, True)
    assert strong.beyond[0] > 0 < strong.resting and strong.distance > 1e-3 and strong.difference > 1e-3
    assert weak.difference < 1e-3 and weak.cosine > 1 - 1e-6 and max(weak.error) < 1e-3
    found = [
        mep.EquilibriumPropagation(model, beta=0.05, branches="exact", solver=mep.Sweep(200, tol=1e-9)).gradients(x, y),
        (backprop(model, COSTS["cross_entropy"].value(model(x), y).mean()), None),
    ]
    (g, estimate), (b, _) = found
    g, b = (torch.cat([v[p].flatten() for p in model.parameters()]) for v in (g, b))
    assert estimate.beta == 0.05 and abs(strong.error[1] - float((g - b).norm() / b.norm())) < 1e-6
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def pooled_by_norms(dimensions, p, act):
    conv, pool = getattr(nn, f"Conv{dimensions}d"), getattr(nn, f"LPPool{dimensions}d")
    return nn.Sequential(conv(1, 3, 2), act, pool(p, 2, ceil_mode=True), nn.Flatten(), nn.LazyLinear(3))


P_NORMS = {
    "1d": (1, 2, nn.ReLU()),
    "2d": (2, 2, nn.ReLU()),
    "2d, of signed values": (2, 2, nn.Tanh()),
    "2d, the third norm": (2, 3, nn.Sigmoid()),
    "2d, the largest": (2, math.inf, nn.Tanh()),
    "3d": (3, 2, nn.ReLU()),
}


@pytest.mark.parametrize("branches", ["held", "exact"])
@pytest.mark.parametrize("name", P_NORMS)
def test_pooling_by_norms_is_right(name, branches):
    """Windows without a unit that is on have no gradient, and are no kinks."""
    torch.manual_seed(0)
    dimensions, p, act = P_NORMS[name]
    model = pooled_by_norms(dimensions, p, act).double()
    x, y = torch.randn(3, 1, *[4] * dimensions).double(), torch.arange(3)
    model(x)
    if isinstance(act, nn.ReLU):
        model[0].bias.data.sub_(0.5)
        assert (model[:3](x) == 0).any()
    report = mep.verify(model, x, y, branches=branches)
    assert report.ok, str(report)


@pytest.mark.filterwarnings("ignore:Functions without a state")
@pytest.mark.parametrize("p", [2, 3])
def test_pooling_by_norms_is_right_in_a_hopfield_network(p):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sigmoid(), nn.LPPool2d(p, 2), nn.Flatten(), nn.Linear(8, 3)).double()
    report = mep.verify(model, torch.randn(3, 1, 6, 6).double(), torch.arange(3), cost="one_hot_mse", energy="hopfield")
    assert report.ok, str(report)


def test_linear_networks_have_no_branches_to_differ_in():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    (row,) = compare_branches(model, torch.randn(6, 4), torch.arange(6) % 3, betas=(0.1,))
    assert row.beyond == (0.0, 0.0) and row.resting == 0.0 and row.distance < 1e-4


@pytest.mark.parametrize(
    "kernel, stride, dilation", [(2, 2, 1), (3, 2, 1), (2, 2, 2), (3, 2, 3), (2, 3, 2), (4, 2, 2), (3, 1, 2)]
)
def test_a_unit_lies_in_so_many_windows(kernel, stride, dilation):
    windows = Windows(MaxPool(1, options={"kernel_size": kernel, "stride": stride, "dilation": dilation}))
    units = windows(torch.arange(40.0).view(1, 1, 40)).flatten()
    assert int(torch.bincount(units.long()).max()) == windows.overlap()
