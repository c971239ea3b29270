"""`Descent` with its closed-form forces follows, step by step, the same loop with autograd on the energy."""

from itertools import pairwise

import pytest
import torch
from cases import COSTS, MODELS, free_energy, mlp, settled
from reference import FREE, descend, nudged_energy, predictions_of_graph, predictions_of_modules
from torch import nn

import mep
from mep.chain import Chain
from mep.cost import make_cost
from mep.energy import Energy, nudge
from mep.settle import Known

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
def test_a_node_is_computed_only_once_the_signal_is_there(monkeypatch):
    """It moves down one node a step; a prediction follows one step later, when the parent's state has moved."""
    torch.manual_seed(0)
    model, x, y = mlp(nn.Tanh, 4, *[6] * 7, 3).double(), torch.randn(5, 4).double(), torch.randint(3, (5,))
    names = [name for name, module in model.named_children() if isinstance(module, nn.Linear)]
    energy, point = free_energy(model, x)
    energy = nudge(energy, make_cost("cross_entropy")(energy.output(point), y), BETA)
    calls = {"predict": [], "pull": []}
    for kind, noted in calls.items():
        original = getattr(Chain, kind)
        monkeypatch.setattr(
            Chain, kind, lambda node, *a, original=original, noted=noted: noted.append(node.name) or original(node, *a)
        )
    solver = mep.Descent(settle_lr=LR)
    iterate = solver.start(energy, point, Known())
    assert calls == {"predict": [], "pull": []}
    for k in range(1, len(names) + 3):
        for noted in calls.values():
            noted.clear()
        iterate = solver.advance(energy, iterate, None)
        assert calls["pull"][::-1] == names[max(len(names) - k, 1) :]
        assert calls["predict"] == names[max(len(names) - k + 1, 1) :]


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


def test_without_adaptive_the_residual_is_measured_once(monkeypatch):
    looks = []
    measure = Energy.residuals
    monkeypatch.setattr(Energy, "residuals", lambda *given: looks.append(1) or measure(*given))
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    ep = mep.EquilibriumPropagation(model, solver=mep.Descent(settle_steps=7))
    assert ep.gradients(torch.ones(2, 5).double(), torch.tensor([0, 1]))[1].iterations == 7
    assert len(looks) == 2  # at the start and at the end


def test_the_first_look_rises_slowly_and_falls_at_once():
    known = Known()
    for _ in range(100):
        known = known.after(40, None)
    assert known.look_from == 30
    assert known.after(48, None).look_from == 31 and known.after(8, None).look_from == 6
