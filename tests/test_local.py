"""`Local`: updates that read neighbours only end at the equilibrium that sweeps over the network find."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from cases import COSTS, MODELS, call, free_energy, mlp, rows, settled
from reference import backprop, nudged_energy, predictions_of_graph, residual
from torch import nn

import mep
from mep.cost import make_cost
from mep.energy import nudge
from mep.settle import Result, Start
from mep.solvers.local import SCHEDULES

SEPARABLE = [name for name, case in MODELS.items() if not case.mixes_examples]
WITH_JUNCTIONS = ["residual", "functional", "concatenating", "attention", "embedded"]


def states_of(energy, point):
    return {node.name: point.values[node.name] for node in energy.graph.states}


@torch.no_grad()
def begun(model, x, y, beta, solver, rounds, leaves=()):
    """The nudged energy, and the iterate after some rounds."""
    energy, point = free_energy(model, x, leaves=leaves)
    cost = make_cost("cross_entropy")
    nudged = nudge(energy, cost(energy.output(point), y), beta)
    iterate = solver.init(nudged, point, Start())
    for _ in range(rounds):
        iterate = solver.step(nudged, iterate, None)
    return nudged, iterate


# What a node reads.


@pytest.mark.parametrize("name", [n for n in SEPARABLE if n not in ("twice", "transposed")])  # those share weights
@pytest.mark.parametrize("rounds", [1, 3])
@torch.no_grad()
def test_an_update_depends_on_nothing_beyond_the_neighbourhood(name, rounds):
    """Everything is NaN but the node, its parents' states, and its children's errors and weights."""
    case = MODELS[name]
    model, x, y = case.build()
    solver = mep.Local(tol=1e-12, schedule="together")
    energy, iterate = begun(model, x, y, 0.1, solver, rounds + 2, case.leaves)
    graph, network = energy.graph, iterate.state
    active = [node for node in graph.nodes if network.is_active(energy, node)]
    assert len(active) > 1 or len(graph.nodes) == 1

    weights = {p: p.clone() for p in model.parameters()}
    for node in active:
        expected = network.copy().update(energy, node, solver.tol)
        blind, children = network.copy(), graph.readers[node.name]
        for other in set(graph.nodes) - {node}:
            blind.nodes[other.name] = poisoned(
                blind.nodes[other.name], is_parent=other.name in node.parents, is_child=other in children
            )
        blind.messages = {child.name: m for child in children if (m := network.messages.get(child.name)) is not None}
        near = {p for n in (node, *children) for p in n.parameters}
        for p in weights.keys() - near:
            p.data.fill_(torch.nan)  # autograd graphs of the nodes stay valid
        found = blind.update(energy, node, solver.tol)
        for p, w in weights.items():
            p.data.copy_(w)
        for attribute in ("value", "error", "residual"):
            a, b = getattr(found, attribute), getattr(expected, attribute)
            assert (a is None and b is None) or (torch.isfinite(a).all() and torch.equal(a, b))


def poisoned(held, is_parent, is_child):
    nan = torch.full_like(held.value, torch.nan)
    return type(held)(
        value=held.value if is_parent else nan,
        prediction=nan,
        saved=held.saved if is_child else None,
        residual=torch.full_like(held.residual, torch.nan),
        error=held.error if is_child else nan,
    )


@torch.no_grad()
def test_the_poison_would_be_noticed():
    """A node whose parent's state, or whose child's error, is poisoned does show it."""
    model, x, y = MODELS["mlp tanh"].build()
    solver = mep.Local(tol=1e-12, schedule="together")
    energy, iterate = begun(model, x, y, 0.1, solver, 4)
    first, middle, last = energy.graph.nodes
    for neighbour, attribute in ((first, "value"), (last, "error")):
        blind = iterate.state.copy()
        blind.needs_prediction.add(middle.name)
        blind.needs_balance.add(middle.name)
        blind.messages.clear()
        held = blind.nodes[neighbour.name]
        blind.nodes[neighbour.name] = replace(held, **{attribute: torch.full_like(held.value, torch.nan)})
        assert blind.update(energy, middle, solver.tol).value.isnan().any()


# Where they end.


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("name", SEPARABLE)
def test_the_schedule_does_not_matter_at_equilibrium(name, cost):
    case = MODELS[name]
    model, x, y = case.build(cost)
    energy, swept = settled(
        model, x, y, COSTS[cost].argument, 0.1, mep.Sweep(tol=1e-11, settle_steps=200), leaves=case.leaves
    )
    for schedule in SCHEDULES:
        solver = mep.Local(tol=1e-10, schedule=schedule)
        _, found = settled(model, x, y, COSTS[cost].argument, 0.1, solver, leaves=case.leaves)
        assert found.result is Result.CONVERGED
        for name, s in states_of(energy, swept.point).items():
            torch.testing.assert_close(found.point.values[name], s, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["mlp relu", "residual", "functional", "attention"])
def test_gradients_agree_across_schedules(name):
    case = MODELS[name]
    model, x, y = case.build()
    ends = []
    for solver in [mep.Sweep(tol=1e-11), *(mep.Local(tol=1e-10, schedule=s) for s in SCHEDULES)]:
        ends.append(mep.EquilibriumPropagation(model, solver=solver, leaves=case.leaves).gradients(x, y)[0])
    for other in ends[1:]:
        for p, g in ends[0].items():
            torch.testing.assert_close(other[p], g, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["mlp tanh", "mlp relu", *WITH_JUNCTIONS, "batch norm"])
def test_reported_residual_is_the_true_one(name, schedule):
    """Cut short after any number of rounds, or once no node is active; some examples settle before others."""
    case = MODELS[name]
    model, x, y = case.build()
    x = x * torch.logspace(-2, 0.5, len(y)).double().view(-1, *[1] * (x.ndim - 1)) if x.is_floating_point() else x
    for solver in (
        *(mep.Local(schedule=schedule, tol=tol, settle_steps=40) for tol in (1e-1, 3e-2, 1e-2, 1e-3)),
        *(mep.Local(k, adaptive=False, tol=1e-3, schedule=schedule) for k in (1, 2, 3, 4, 6)),
    ):
        energy, found = settled(model, x, y, "cross_entropy", 0.05, solver, leaves=case.leaves)
        predict = predictions_of_graph(energy.graph, energy.inputs, states_of(energy, energy.free_point()))
        if name != "batch norm":
            total = nudged_energy(predict, energy.graph.output, COSTS["cross_entropy"].value, y, 0.05)
            true = residual(predict, total, states_of(energy, found.point))
            torch.testing.assert_close(found.residual, true, rtol=1e-6, atol=1e-8)
        assert (found.result is Result.CONVERGED) == bool((found.residual <= solver.tol).all())
        for name_, delta in found.errors.items():
            s, mu = found.point.values[name_], found.point.predictions[name_]
            torch.testing.assert_close(delta, (mu - s) / 0.05, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("patience", [1, 3])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["mlp tanh", "conv relu maxpool", *WITH_JUNCTIONS])
def test_an_example_settles_alone_as_among_others(name, schedule, patience):
    case = MODELS[name]
    model, x, y = case.build(batch=4)
    scale = torch.logspace(-2, 0.3, 4).double()
    x = x * scale.view(-1, *[1] * (x.ndim - 1)) if x.is_floating_point() else x
    solver = mep.Local(schedule=schedule, patience=patience)
    energy, together = settled(model, x, y, "cross_entropy", 0.2, solver, leaves=case.leaves)
    for i in range(4):
        one = slice(i, i + 1)
        _, alone = settled(model, rows(x, one), y[one], "cross_entropy", 0.2, solver, leaves=case.leaves)
        for name_, s in states_of(energy, together.point).items():
            torch.testing.assert_close(alone.point.values[name_], s[one], rtol=1e-10, atol=1e-10)


# What they do, and what they leave.


def counted(monkeypatch, energy):
    """How often each node predicts from now on."""
    calls = Counter()
    for kind in {type(node) for node in energy.graph.nodes}:
        predict = kind.predict

        def counting(node, *given, predict=predict):
            calls[node.name] += 1
            return predict(node, *given)

        monkeypatch.setattr(kind, "predict", counting)
    return calls


@torch.no_grad()
def test_inactive_nodes_are_not_computed(monkeypatch):
    """All at once, a signal moves one node a round, down by messages and up by states; the rest has nothing to do."""
    torch.manual_seed(0)
    model, x = mlp(nn.Tanh, 4, *[6] * 7, 3).double(), torch.randn(5, 4).double()
    names = [name for name, module in model.named_children() if isinstance(module, nn.Linear)]
    solver = mep.Local(tol=1e-12, schedule="together")
    energy, iterate = begun(model, x, torch.randint(3, (5,)), 0.1, solver, 0)
    calls = counted(monkeypatch, energy)
    for k in range(1, len(names) + 1):
        calls.clear()
        iterate = solver.step(energy, iterate, None)
        reached = names[len(names) - k :]  # k nodes have an error; those whose parent moved in an earlier round predict
        assert {name for name, held in iterate.state.nodes.items() if held.error is not None} == set(reached)
        assert set(calls) == set(reached[2:])
        assert iterate.residual.min() == 1


@torch.no_grad()
def test_once_no_node_is_active_nothing_is_computed(monkeypatch):
    model, x, y = MODELS["mlp tanh"].build()
    solver = mep.Local(tol=1e-3)
    energy, iterate = begun(model, x, y, 0.1, solver, 10)
    assert iterate.residual.max() <= 1e-3
    calls, counts = counted(monkeypatch, energy), Counter(iterate.state.update_counts)
    again = solver.step(energy, iterate, None)
    assert not calls and again.state.update_counts == counts
    assert torch.equal(again.residual, iterate.residual)


@torch.no_grad()
def test_a_change_below_the_tolerance_goes_no_further(monkeypatch):
    """The output moves again, too little for the nodes below to become active."""
    model, x, y = MODELS["mlp tanh"].build()
    counts = {}
    for tol in (1e-2, 1e-8):
        energy, iterate = begun(model, x, y, 0.1, mep.Local(tol=tol), 12)
        assert iterate.residual.max() <= tol
        counts[tol] = iterate.state.update_counts
    assert all(counts[1e-2][node.name] < counts[1e-8][node.name] for node in energy.graph.nodes)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_has_converged_before_the_first_layer_has_an_error(schedule):
    torch.manual_seed(0)
    depth = 12
    model, x, y = mlp(nn.Tanh, *[6] * depth, 3).double(), torch.randn(5, 6).double(), torch.randint(3, (5,))
    for rounds in range(1, 3 * depth):
        _, found = settled(model, x, y, "cross_entropy", 0.1, mep.Local(rounds, tol=0.3, schedule=schedule))
        reached = bool(found.errors["0"].flatten(1).norm(dim=1).gt(0).all())
        assert reached or found.result is Result.STEP_LIMIT
    assert reached and found.result is Result.CONVERGED


@pytest.mark.parametrize("schedule", ["there and back", "together"])
def test_a_nudge_too_strong_to_settle_is_reported_and_the_default_beta_settles(schedule):
    torch.manual_seed(0)
    model = mlp(nn.ReLU, 16, *[32] * 8, 3).double()
    for p in model.parameters():
        if p.ndim == 2:
            nn.init.kaiming_normal_(p, nonlinearity="relu")
    x, y = 3 * torch.randn(8, 16).double(), torch.randint(3, (8,))
    target = nn.functional.one_hot(y, 3).double()
    given = {"solver": mep.Local(schedule=schedule), "on_unsettled": "raise"}
    with pytest.raises((mep.errors.NotConvergedError, mep.DivergedError), match="Nothing was changed"):
        mep.EquilibriumPropagation(model, "mse", beta=5.0, **given).gradients(x, target)
    found, estimate = mep.EquilibriumPropagation(model, "mse", **given).gradients(x, target)
    assert estimate.converged and 0 < estimate.beta < 5.0
    exact = backprop(model, COSTS["mse"].value(call(model, x), target).mean())
    first = model[0].weight
    assert nn.functional.cosine_similarity(found[first].flatten(), exact[first].flatten(), dim=0) > 0.9


def test_what_it_cannot_settle_is_refused():
    model, x, y = MODELS["mlp relu"].build()
    with pytest.raises(mep.ArgumentError, match=r"schedule='sideways'.*together"):
        mep.Local(schedule="sideways")
    with pytest.raises(mep.ArgumentError, match=r"branches='exact'.*branches='held'"):
        mep.EquilibriumPropagation(model, solver=mep.Local(), branches="exact").gradients(x, y)
    with pytest.raises(mep.ArgumentError, match=r"hopfield.*Descent"):
        mep.EquilibriumPropagation(model, solver=mep.Local(), energy="hopfield").gradients(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_dtypes_settle(dtype):
    torch.manual_seed(0)
    model, x, y = mlp(nn.ReLU, 8, 16, 16, 3).to(dtype), torch.randn(6, 8).to(dtype), torch.randint(3, (6,))
    estimate = mep.EquilibriumPropagation(model, solver=mep.Local(tol=0.1)).gradients(x, y)[1]
    assert estimate.converged


@torch.no_grad()
def test_every_node_holds_its_own_residual():
    """Also that of an example which its last update left alone."""
    torch.manual_seed(0)
    model, x, y = mlp(nn.ReLU, 6, 4, 4, 3).double(), 3 * torch.randn(256, 6).double(), torch.randint(3, (256,))
    energy, iterate = begun(model, x, y, 2.0, mep.Local(tol=3e-2), 20)
    network = iterate.state
    assert not network.any_active
    for name, true in energy.residuals(network.gathered(energy)[0]).items():
        torch.testing.assert_close(network.nodes[name].residual, true, rtol=1e-6, atol=1e-10)
        assert ((true > 1e-6) & (true <= 3e-2)).any()
