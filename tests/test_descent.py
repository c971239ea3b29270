"""`Descent` with its closed-form forces follows, step by step, the same loop with autograd on the energy."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from cases import COSTS, MODELS, free_energy, mlp, settled
from reference import FREE, descend, nudged_energy, predictions_of_graph, predictions_of_modules
from torch import nn

import mep
from mep.chain import Chain
from mep.cost import make_cost
from mep.energy import Energy, nudge
from mep.settle import Known, settle
from mep.solvers.affine_flow import AffineFlow, is_affine_at_rest
from mep.solvers.flow import AnyFlow

STEPS, LR, MOMENTUM, BETA = 8, 0.15, 0.5, 0.3


def clamped():
    return nn.Hardtanh(0.0, 1.0)


def trajectory(model, x, y, cost, reading, leaves=()):
    """The states after 1, 2, ... steps."""
    for steps in range(1, STEPS + 1):
        solver = mep.Descent(steps, settle_lr=LR, momentum=MOMENTUM)
        energy, found = settled(model, x, y, cost, BETA, solver, reading, leaves)
        assert found.iterations == steps
        yield {node.name: found.point.values[node.name] for node in energy.graph.states}


def assert_same(followed, reference, start):
    for states, expected in zip(followed, reference, strict=True):
        for name, s in expected.items():
            torch.testing.assert_close(states[name], s, rtol=1e-11, atol=1e-13)
    assert all((states[name] - s).norm() > 1e-6 for name, s in start.items()), "every node should have moved"


@pytest.mark.parametrize("cost", COSTS)
def test_prediction_energy_written_by_hand(cost):
    torch.manual_seed(0)
    model, x = mlp(nn.Tanh, 4, 6, 5, 3).double(), torch.randn(5, 4).double()
    y = COSTS[cost].target(model(x).detach())
    predict, states, h = predictions_of_modules(model, x), {}, x
    for name, module in model.named_children():
        h = module(h)
        if isinstance(module, nn.Linear):
            states[name] = h.detach()
    total = nudged_energy(predict, "4", COSTS[cost].value, y, BETA)
    followed = trajectory(model, x, y, COSTS[cost].argument, "held")
    assert_same(followed, descend(total, states, STEPS, LR, MOMENTUM), states)


@pytest.mark.parametrize(
    ("name", "reading"),
    [(name, "held") for name in MODELS] + [("mlp relu", "exact"), ("prelu softplus hardtanh", "exact")],
)
def test_prediction_energy_of_every_model(name, reading):
    case = MODELS[name]
    model, x, y = case.build()
    energy, point = free_energy(model, x, reading, case.leaves)
    free = {node.name: point.values[node.name] for node in energy.graph.states}
    predict = predictions_of_graph(energy.graph, energy.inputs, free if reading == "held" else None)
    total = nudged_energy(predict, energy.graph.output, COSTS["cross_entropy"].value, y, BETA)
    followed = trajectory(model, x, y, "cross_entropy", reading, case.leaves)
    assert_same(followed, descend(total, free, STEPS, LR, MOMENTUM), free)


@pytest.mark.parametrize("activation", [nn.ReLU, clamped])
def test_hopfield_energy_written_by_hand(activation):
    torch.manual_seed(0)
    model, x, y = mlp(activation, 4, 6, 5, 3).double(), torch.randn(5, 4).double(), torch.randint(3, (5,))
    boxes = {"0": (0, 1 if activation is clamped else torch.inf), "4": FREE}
    boxes["2"] = boxes["0"]
    predict = predictions_of_modules(model, x, behind=True)
    states, h = {}, x
    for name, module in model.named_children():
        if isinstance(module, nn.Linear):
            h = states[name] = module(h).clamp(*boxes[name]).detach()
    cost = COSTS["cross_entropy"].value
    for steps in range(1, STEPS + 1):
        solver = mep.Descent(steps, settle_lr=LR, momentum=MOMENTUM)
        energy, found = settled(model, x, y, "cross_entropy", BETA, solver, "hopfield")
        free = nudged_energy(predict, "4", cost, y, 0.0, "hopfield")
        nudged = nudged_energy(predict, "4", cost, y, BETA, "hopfield")
        *_, at_rest = descend(free, states, steps, LR, MOMENTUM, boxes)
        *_, expected = descend(nudged, at_rest, steps, LR, MOMENTUM, boxes)
        for name, s in expected.items():
            torch.testing.assert_close(found.point.values[name], s, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(energy.value(found.point), nudged(expected))
    assert any((s == 0).any() for s in expected.values()), "some unit should rest on its wall"


@pytest.mark.parametrize("reading", ["held", "hopfield"])
def test_descent_with_a_small_step_never_climbs(reading):
    torch.manual_seed(0)
    model, x, y = mlp(clamped, 4, 6, 5, 3).double(), torch.randn(5, 4).double(), torch.randint(3, (5,))
    values = []
    for steps in (1, 2, 5, 20, 100, 400):
        energy, found = settled(model, x, y, "cross_entropy", 1.0, mep.Descent(steps, settle_lr=0.05), reading)
        values.append(energy.value(found.point))
    assert all((b <= a + 1e-12).all() for a, b in pairwise(values))


@torch.no_grad()
@pytest.mark.parametrize(("activation", "forward"), [(nn.Tanh, "predict"), (nn.ReLU, "push")])
def test_a_node_is_computed_only_once_the_signal_is_there(monkeypatch, activation, forward):
    """It moves down one node a step; a prediction follows one step later, when the parent's state has moved."""
    torch.manual_seed(0)
    model, x, y = mlp(activation, 4, *[6] * 7, 3).double(), torch.randn(5, 4).double(), torch.randint(3, (5,))
    names = [name for name, module in model.named_children() if isinstance(module, nn.Linear)]
    energy, point = free_energy(model, x)
    energy = nudge(energy, make_cost("cross_entropy")(energy.output(point), y), BETA)
    calls = {kind: [] for kind in ("predict", "push", "pull")}
    for kind, noted in calls.items():
        original = getattr(Chain, kind)
        monkeypatch.setattr(
            Chain, kind, lambda node, *a, original=original, noted=noted: noted.append(node.name) or original(node, *a)
        )
    solver = mep.Descent(settle_lr=LR)
    iterate = solver.start(energy, point, Known())
    assert not any(calls.values())
    for k in range(1, len(names) + 3):
        for noted in calls.values():
            noted.clear()
        iterate = solver.advance(energy, iterate, None)
        assert calls["pull"][::-1] == names[max(len(names) - k, 1) :]
        assert calls[forward] == names[max(len(names) - k + 1, 1) :]
        assert not any(noted for kind, noted in calls.items() if kind not in ("pull", forward))


def test_the_first_look_follows_where_settling_ends(monkeypatch):
    """Steps of one batch again and again: fewer and fewer residuals are measured, the same equilibrium is reached."""
    looks = []
    measure = Energy.residuals
    monkeypatch.setattr(Energy, "residuals", lambda *given: looks.append(1) or measure(*given))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(6, 5).double(), torch.arange(6) % 3
    ep = mep.EquilibriumPropagation(model, solver=mep.Descent(settle_steps=500, adaptive=True, tol=1e-3))
    counts, steps, gradients = [], [], []
    for _ in range(30):
        looks.clear()
        found, estimate = ep.gradients(x, y)
        assert estimate.converged
        counts.append(len(looks))
        steps.append(estimate.iterations)
        gradients.append(torch.cat([g.flatten() for g in found.values()]))
    assert counts[0] == steps[0] + 1 and counts[-1] < 0.4 * counts[0]
    assert max(steps) <= steps[0] + 2
    torch.testing.assert_close(gradients[-1], gradients[0], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(("activation", "flow"), [(nn.Tanh, AnyFlow), (nn.ReLU, AffineFlow)])
def test_without_adaptive_the_residual_is_measured_once(monkeypatch, activation, flow):
    looks = []
    measure = flow.residual
    monkeypatch.setattr(flow, "residual", lambda *given: looks.append(1) or measure(*given))
    model = nn.Sequential(nn.Linear(5, 8), activation(), nn.Linear(8, 3)).double()
    ep = mep.EquilibriumPropagation(model, solver=mep.Descent(settle_steps=7))
    assert ep.gradients(torch.ones(2, 5).double(), torch.tensor([0, 1]))[1].iterations == 7
    assert len(looks) == 1


def test_the_first_look_rises_slowly_and_falls_at_once():
    known = Known()
    for _ in range(100):
        known = known.after(40, None)
    assert known.look_from == 30
    assert known.after(48, None).look_from == 31 and known.after(8, None).look_from == 6


# Affine graphs, in deviations from the free equilibrium. The other way, which works for any graph, is the oracle.

AFFINE = ["mlp relu", "conv relu maxpool", "conv1d", "junctions"]
WAYS = {
    "8 steps": {"settle_steps": 8},
    "without momentum": {"settle_steps": 8, "momentum": 0.0},
    "much momentum": {"settle_steps": 40, "momentum": 0.9},
    "adaptive": {"settle_steps": 500, "adaptive": True, "tol": 1e-3},
    "patient": {"settle_steps": 500, "adaptive": True, "tol": 1e-2, "patience": 4},
    "out of steps": {"settle_steps": 9, "adaptive": True, "tol": 1e-3},
}


class Affine(nn.Module):
    """A junction that two nodes read, a sum of parents, and an output that is an activation."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = F.relu(self.first(x))
        h = h + self.second(h)
        return F.leaky_relu(self.last(F.hardtanh(h)), 0.3)


def affine(name):
    if name != "junctions":
        return MODELS[name].build()
    torch.manual_seed(0)
    return Affine().double(), torch.randn(5, 4).double(), torch.randint(3, (5,))


@torch.no_grad()
def both_ways(monkeypatch, name, solver, beta=BETA, known=None):
    """Settled by `AffineFlow` and by `AnyFlow`, and the energy."""
    model, x, y = affine(name)
    energy, point = free_energy(model, x)
    energy = nudge(energy, make_cost("cross_entropy")(energy.output(point), y), beta)
    known = Known() if known is None else known(energy)
    assert is_affine_at_rest(energy, point)
    found = settle(energy, point, solver, known)
    with monkeypatch.context() as patch:
        patch.setattr("mep.solvers.descent.is_affine_at_rest", lambda energy, point: False)
        expected = settle(energy, point, solver, known)
    assert found.errors is not None and expected.errors is None
    return energy, found, expected


def assert_same_settled(energy, found, expected, **tolerance):
    assert (found.iterations, found.result) == (expected.iterations, expected.result)
    torch.testing.assert_close(found.residual, expected.residual, **tolerance)
    for part in ("values", "predictions"):
        for name, value in getattr(expected.point, part).items():
            torch.testing.assert_close(getattr(found.point, part)[name], value, **tolerance)
    for name, error in energy.errors(expected.point).items():
        torch.testing.assert_close(found.errors[name], error, **tolerance)
    gradient = energy.parameter_gradient(expected.point, expected.errors, 1)
    for p, g in energy.parameter_gradient(found.point, found.errors, 1).items():
        torch.testing.assert_close(g, gradient[p], **tolerance)
    again = energy.at(energy.state(found.point))
    torch.testing.assert_close(energy.residuals(again), energy.residuals(found.point), **tolerance)


SAME = {"rtol": 1e-8, "atol": 1e-10}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", AFFINE)
def test_affine_graphs_descend_as_any_graph(monkeypatch, name, way):
    energy, found, expected = both_ways(monkeypatch, name, mep.Descent(**WAYS[way]))
    assert_same_settled(energy, found, expected, **SAME)
    assert all((error.abs().sum() > 0) for error in found.errors.values()), "every node should have moved"


@pytest.mark.parametrize("beta", [-0.3, 1e-3, 2.0])
def test_affine_graphs_descend_as_any_graph_at_every_beta(monkeypatch, beta):
    assert_same_settled(*both_ways(monkeypatch, "mlp relu", mep.Descent(12), beta), **SAME)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("name", AFFINE)
def test_affine_graphs_descend_as_any_graph_before_the_signal_is_everywhere(monkeypatch, name, steps):
    assert_same_settled(*both_ways(monkeypatch, name, mep.Descent(steps)), **SAME)


@pytest.mark.parametrize("way", ["8 steps", "adaptive"])
@pytest.mark.parametrize("name", AFFINE)
def test_affine_graphs_begin_where_any_graph_does(monkeypatch, name, way):
    """At errors from earlier, of some of the examples."""

    def known(energy):
        generator = torch.Generator().manual_seed(1)
        seen = torch.arange(energy.batch) % 2
        draw = lambda s: torch.randn(s.shape, generator=generator).double() * seen.view(-1, *[1] * (s.ndim - 1))  # noqa: E731
        return Known(errors={name: draw(s) for name, s in energy.state(energy.rest()).items()})

    assert_same_settled(*both_ways(monkeypatch, name, mep.Descent(**WAYS[way]), known=known), **SAME)


@torch.no_grad()
def test_errors_of_affine_graphs_keep_their_digits_for_every_beta():
    """In float32 a state moves by less than its rounding; its scaled error is exact all the same."""
    model, x, y = affine("mlp relu")
    errors = []
    for dtype in (torch.float64, torch.float32):
        _, found = settled(model.to(dtype), x.to(dtype), y, "cross_entropy", 1e-9, mep.Descent(40))
        errors.append(found.errors)
    for name, expected in errors[0].items():
        torch.testing.assert_close(errors[1][name].double(), expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_descent_leaves_the_free_equilibrium_as_it_was():
    model, x, y = affine("junctions")
    energy, point = free_energy(model, x)
    energy = nudge(energy, make_cost("cross_entropy")(energy.output(point), y), BETA)
    before = {name: value.clone() for name, value in point.values.items()}
    first = settle(energy, point, mep.Descent(9))
    second = settle(energy, point, mep.Descent(9))
    assert all(torch.equal(value, before[name]) for name, value in point.values.items())
    assert all(torch.equal(error, first.errors[name]) for name, error in second.errors.items())


@torch.no_grad()
def test_what_is_not_affine_or_not_at_rest_descends_as_any_graph():
    for name, reading, expected in [
        ("mlp relu", "held", True),
        ("mlp relu", "exact", False),
        ("mlp tanh", "held", False),
    ]:
        model, x, y = MODELS[name].build()
        energy, point = free_energy(model, x, reading)
        assert not is_affine_at_rest(energy, point), "nothing nudges"
        energy = nudge(energy, make_cost("cross_entropy")(energy.output(point), y), BETA)
        assert is_affine_at_rest(energy, point) == expected
        assert not is_affine_at_rest(energy, energy.at({n: s + 1 for n, s in energy.state(point).items()}))


@torch.no_grad()
def test_an_error_on_which_nothing_pulls_is_measured_against_the_rounding_of_its_state():
    torch.manual_seed(0)
    model, x, y = mlp(nn.ReLU, 4, 6, 3).double(), torch.randn(5, 4).double(), torch.randint(3, (5,))
    nn.init.zeros_(model[2].weight)
    energy, point = free_energy(model, x)
    cost = make_cost("cross_entropy")(energy.output(point), y)
    answer = torch.zeros(5, 3).double()
    for _ in range(30):
        answer = cost.gradient(energy.output(point) - 1e-3 * answer)
    flow = AffineFlow(nudge(energy, cost, 1e-3), point, {"0": torch.full((5, 6), 1e-13).double(), "2": answer})
    size = 10 * torch.finfo(torch.float64).eps * point.values["0"].norm(dim=1) / 1e-3
    torch.testing.assert_close(flow.residual(), 1e-13 * 6**0.5 / size, rtol=1e-6, atol=0)
    assert flow.residual().max() < 1


# Links: what stands between a state and its only reader, of every kind.

POOL = nn.MaxPool2d
LINKS = {
    "nothing": lambda: [nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)],
    "slopes": lambda: [nn.Linear(4, 6), nn.LeakyReLU(0.3), nn.Linear(6, 5), nn.Hardtanh(), nn.Linear(5, 3)],
    "two slopes": lambda: [nn.Linear(4, 6), nn.LeakyReLU(0.3), nn.Hardtanh(), nn.Linear(6, 5), nn.Linear(5, 3)],
    "positions": lambda: [
        nn.Unflatten(1, (2, 2)), nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
    ],
    "windows apart": lambda: images(POOL(2), 4),
    "windows apart, two of them": lambda: images(nn.Sequential(POOL(2), nn.LeakyReLU(0.2), POOL((1, 2))), 2),
    "windows that overlap": lambda: images(POOL(2, 1), 9),
    "windows with gaps that overlap": lambda: images(POOL(2, 2, dilation=2), 1),
    "means": lambda: images(nn.AvgPool2d(2), 4),
}  # fmt: skip


def images(pool, pooled):
    """Images of four by four behind the first layer."""
    behind = [nn.LeakyReLU(0.3), pool, nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(3 * pooled, 3)]
    return [nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 3, padding=2), *behind]


@torch.no_grad()
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("name", LINKS)
def test_links_of_every_kind_descend_as_any_graph(monkeypatch, name, adaptive):
    torch.manual_seed(0)
    model, x, y = nn.Sequential(*LINKS[name]()).double(), torch.randn(5, 4).double(), torch.randint(3, (5,))
    monkeypatch.setitem(globals(), "affine", lambda name: (model, x, y))
    solver = mep.Descent(12, adaptive=adaptive, tol=1e-6, momentum=0.7)
    energy, found, expected = both_ways(monkeypatch, name, solver)
    assert_same_settled(energy, found, expected, **SAME)
    flow = AffineFlow(energy, energy.rest(), None)
    assert bool(flow.through) == ("overlap" not in name and name != "means")


@torch.no_grad()
def test_a_state_seen_through_windows_takes_the_room_of_what_is_seen():
    torch.manual_seed(0)
    model, x = nn.Sequential(*images(POOL(2), 4)).double(), torch.randn(5, 4).double()
    energy, point = free_energy(model, x)
    energy = nudge(energy, make_cost("cross_entropy")(energy.output(point), torch.arange(5) % 3), BETA)
    assert AffineFlow(energy, point, None).places["1"].t.shape == (5, 2, 2, 2)
    assert AffineFlow(energy, point, energy.errors(point)).places["1"].t.shape == (5, 2, 4, 4)
