"""`Descent` with its closed-form forces follows, step by step, the same loop with autograd on the energy."""

from itertools import pairwise

import pytest
import torch
from cases import COSTS, MODELS, free_energy, mlp, settled
from reference import FREE, descend, nudged_energy, predictions_of_graph, predictions_of_modules
from torch import nn

import mep

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
