"""`Descent` with its closed-form forces follows, step by step, the same loop with autograd on the energy."""

from itertools import pairwise

import pytest
import torch
from cases import COSTS, MODELS, free_energy, leftover, mlp, settled
from reference import FREE, descend, forces, nudged_energy, predictions_of_graph, predictions_of_modules
from torch import nn

import mep
from mep.cost import make_cost
from mep.energy import nudge
from mep.graph.node import Chain
from mep.settle import Result, Start, settle
from mep.solvers import descent

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
        left = {name: leftover(at_rest[name], g, boxes[name]) for name, g in forces(free, at_rest).items()}
        total = lambda s, nudged=nudged, left=left: nudged(s) - sum((left[n] * s[n]).sum(1) for n in s)  # noqa: E731
        *_, expected = descend(total, at_rest, steps, LR, MOMENTUM, boxes)
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
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_a_node_is_computed_only_once_the_signal_is_there(monkeypatch, activation):
    """It moves down one node a step; a prediction follows one step later, when the parent's state has moved."""
    torch.manual_seed(0)
    model, x, y = mlp(activation, 4, *[6] * 7, 3).double(), torch.randn(5, 4).double(), torch.randint(3, (5,))
    names = [name for name, module in model.named_children() if isinstance(module, nn.Linear)]
    energy, point = free_energy(model, x)
    energy = nudge(energy, make_cost("cross_entropy")(energy.output(point), y), BETA)
    calls = {kind: [] for kind in ("predict", "vjp")}
    for kind, noted in calls.items():
        original = getattr(Chain, kind)
        monkeypatch.setattr(
            Chain, kind, lambda node, *a, original=original, noted=noted: noted.append(node.name) or original(node, *a)
        )
    solver = mep.Descent(settle_lr=LR)
    iterate = solver.init(energy, point, Start())
    for k in range(1, len(names) + 3):
        for noted in calls.values():
            noted.clear()
        iterate = solver.step(energy, iterate, None)
        assert calls["vjp"][::-1] == names[max(len(names) - k, 1) :]
        assert calls["predict"] == names[max(len(names) - k + 1, 1) :]


@pytest.mark.parametrize(("adaptive", "measured"), [(False, 1), (True, 8)])
def test_without_adaptive_the_residual_is_measured_once(monkeypatch, adaptive, measured):
    """With it at the start and after every step."""
    calls, measure = [], descent._residual
    monkeypatch.setattr(descent, "_residual", lambda *given: calls.append(1) or measure(*given))
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    solver = mep.Descent(settle_steps=7, adaptive=adaptive, tol=1e-9)
    ep = mep.EquilibriumPropagation(model, solver=solver, on_unsettled="ignore")
    assert ep.gradients(torch.ones(2, 5).double(), torch.tensor([0, 1]))[1].iterations == 7
    assert len(calls) == measured


@torch.no_grad()
@pytest.mark.parametrize("reading", ["held", "exact"])
def test_errors_of_an_earlier_equilibrium_are_where_it_begins(reading):
    model, x, y = MODELS["mlp relu"].build()
    energy, point = free_energy(model, x, reading)
    energy = nudge(energy, make_cost("cross_entropy")(energy.output(point), y), BETA)
    torch.manual_seed(1)
    errors = {name: torch.randn_like(s) for name, s in energy.state(point).items()}
    begun = mep.Descent().init(energy, point, Start(errors=errors))
    for name, error in energy.errors(begun.point).items():
        torch.testing.assert_close(error, errors[name])


@torch.no_grad()
@pytest.mark.parametrize(("beta", "result"), [(1e-2, Result.CONVERGED), (1e-9, Result.STEP_LIMIT)])
def test_a_nudge_that_drowns_in_the_rounding_of_the_states_does_not_converge(beta, result):
    model, x, y = MODELS["mlp relu"].build()
    _, found = settled(model.float(), x.float(), y, "cross_entropy", beta, mep.Descent(300, adaptive=True))
    assert found.result is result


@torch.no_grad()
@pytest.mark.parametrize("reading", ["held", "exact"])
def test_descent_leaves_the_free_equilibrium_as_it_was(reading):
    model, x, y = MODELS["conv relu maxpool" if reading == "held" else "mlp relu"].build()
    energy, point = free_energy(model, x, reading)
    energy = nudge(energy, make_cost("cross_entropy")(energy.output(point), y), BETA)
    before = {name: value.clone() for name, value in point.values.items()}
    first = settle(energy, point, mep.Descent(9))
    second = settle(energy, point, mep.Descent(9))
    assert all(torch.equal(value, before[name]) for name, value in point.values.items())
    assert all(torch.equal(s, first.point.values[name]) for name, s in second.point.values.items())
