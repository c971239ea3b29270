"""The Hopfield energy settles in its box, its contrast is the gradient of the free equilibrium's cost, it trains."""

import math
from dataclasses import replace

import pytest
import torch
from cases import COSTS, mlp, settled
from reference import FREE, energy, forces, implicit_gradient, nudged_energy, predictions_of_modules, residual_in_boxes
from torch import nn

import mep

TIGHT = mep.Descent(400, settle_lr=0.9, adaptive=True, tol=1e-12)
CLOSE = mep.Descent(2000, settle_lr=0.9, adaptive=True, tol=1e-8)
"""So that a nudge of 1e-3, too, stands out from the rounding of the states."""
BOXES = {"relu": (nn.ReLU, (0, math.inf)), "clamp": (lambda: nn.Hardtanh(0.0, 0.6), (0, 0.6))}


@pytest.fixture(params=BOXES)
def network(request):
    """A chain whose couplings are weak enough for one equilibrium, and the box of every state."""
    activation, box = BOXES[request.param]
    torch.manual_seed(0)
    model, x = mlp(activation, 4, 6, 5, 3).double(), torch.randn(5, 4).double()
    return model, x, {"0": box, "2": box, "4": FREE}


def with_target(network, cost):
    model, x, boxes = network
    torch.manual_seed(1)
    return model, x, COSTS[cost].target(torch.zeros(5, 3).double()), boxes


def states_of(found):
    return {name: found.point.values[name] for name in ("0", "2", "4")}


@pytest.mark.parametrize("beta", [0.0, 0.5, -0.3])
def test_settles_where_no_force_leads_into_the_box(network, beta):
    model, x, y, boxes = with_target(network, "mse")
    _, found = settled(model, x, y, "mse", beta, TIGHT, "hopfield")
    predict = predictions_of_modules(model, x, behind=True)
    total = nudged_energy(predict, "4", COSTS["mse"].value, y, beta, "hopfield")
    states = states_of(found)
    for name, g in forces(total, states).items():
        s, (low, high) = states[name], boxes[name]
        assert g.masked_fill(((s == low) & (g > 0)) | ((s == high) & (g < 0)), 0).abs().max() < 1e-11
    assert all(((s >= boxes[n][0]) & (s <= boxes[n][1])).all() for n, s in states.items())
    assert any((s == boxes[n][0]).any() for n, s in states.items()) and (states["4"] < 0).any()


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_reported_residual_is_that_of_the_projected_force(network, steps):
    model, x, y, boxes = with_target(network, "cross_entropy")
    solver = mep.Descent(steps, settle_lr=0.3)
    _, found = settled(model, x, y, "cross_entropy", 0.5, solver, "hopfield")
    predict = predictions_of_modules(model, x, behind=True)
    total = nudged_energy(predict, "4", COSTS["cross_entropy"].value, y, 0.5, "hopfield")
    free = settled(model, x, y, "cross_entropy", 0.0, solver, "hopfield")[0].nudge.free
    leftovers, free = {n: f.leftover for n, f in free.items()}, {n: f.state for n, f in free.items()}
    with_leftovers = lambda s: total(s) - sum((leftovers[n] * s[n]).sum(1) for n in s)  # noqa: E731
    # half of it for beta, and a half of that since no eigenvalue of the cost is larger
    true = residual_in_boxes(with_leftovers, states_of(found), free, leftovers, 0.25, boxes)
    torch.testing.assert_close(found.residual, true)


def free_gradient(model, x, y, cost, boxes):
    """The derivative of the free equilibrium's mean cost, by implicit differentiation."""
    predict = predictions_of_modules(model, x, behind=True)
    _, found = settled(model, x, y, COSTS[cost].argument, 0.0, TIGHT, "hopfield")
    return implicit_gradient(
        lambda s: energy(predict, s, "hopfield"),
        lambda s: COSTS[cost].value(s["4"], y),
        states_of(found),
        list(model.parameters()),
        boxes,
    )


def test_implicit_gradient_is_that_of_finite_differences(network):
    model, x, y, boxes = with_target(network, "mse")
    exact = free_gradient(model, x, y, "mse", boxes)
    ep = mep.EquilibriumPropagation(model, "mse", energy="hopfield", solver=replace(CLOSE, tol=1e-10))
    for p, g in zip(model.parameters(), exact, strict=True):
        costs = []
        for step in (1e-4, -2e-4):
            p.data.view(-1)[-1] += step
            costs.append(COSTS["mse"].value(ep.predict(x), y).mean())
        p.data.view(-1)[-1] += 1e-4
        assert math.isclose((costs[0] - costs[1]) / 2e-4, g.view(-1)[-1], rel_tol=1e-4, abs_tol=1e-9)


@pytest.mark.parametrize("cost", ["cross_entropy", "custom"])
@pytest.mark.parametrize(("phases", "order", "beta"), [("one-sided", 1, 1e-3), ("centered", 2, 2e-3)])
def test_contrast_tends_to_the_gradient_of_the_free_equilibrium(network, cost, phases, order, beta):
    model, x, y, boxes = with_target(network, cost)
    exact = torch.cat([g.flatten() for g in free_gradient(model, x, y, cost, boxes)])
    ep = mep.EquilibriumPropagation(model, COSTS[cost].argument, None, CLOSE, energy="hopfield", phases=phases)
    errors = []
    for ep.beta in (beta, beta / 2):
        found, estimate = ep.gradients(x, y)
        assert estimate.converged and estimate.beta == ep.beta
        errors.append((torch.cat([found[p].flatten() for p in model.parameters()]) - exact).norm() / exact.norm())
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.2
    assert errors[1] < 1e-2


@pytest.mark.parametrize("sizes", [(4, 8, 3), (4, 8, 8, 3), (64, 128, 64, 10)])
@pytest.mark.parametrize("name", BOXES)
def test_settles_by_default_where_torch_initialises(name, sizes):
    torch.manual_seed(0)
    model, x, y = mlp(BOXES[name][0], *sizes), torch.rand(32, sizes[0]), torch.randint(sizes[-1], (32,))
    ep = mep.EquilibriumPropagation(model, energy="hopfield", on_unsettled="ignore")
    # The response of a layer with hardly a unit inside its box may drown in what the free phase leaves there.
    assert ep.gradients(x, y)[1].settled.float().mean() >= 0.9


CONVOLUTION = (
    lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.AvgPool2d(2),
        nn.Hardtanh(0.0, 1.0),
        nn.Conv2d(3, 4, 2),
        nn.ReLU6(),
        nn.Flatten(),
        nn.Linear(4, 3),
    ),
    (1, 6, 6),
)
POOLED = (
    lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.MaxPool2d(2), nn.ReLU6(), nn.Flatten(), nn.Linear(12, 3)), (1, 6, 6)
)  # fmt: skip
DENSE = (lambda: mlp(lambda: nn.Hardtanh(0.0, 1.0), 8, 16, 16, 3), (8,))


@pytest.mark.parametrize(("make", "shape"), [DENSE, CONVOLUTION, POOLED], ids=["dense", "convolution", "max pooling"])
def test_training_lowers_the_loss(make, shape):
    torch.manual_seed(0)
    model, x = make(), torch.rand(24, *shape)
    y = x.flatten(1)[:, :3].argmax(1)
    ep = mep.EquilibriumPropagation(model, energy="hopfield", beta=0.2)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(ep(x, y).loss.item())
        optimizer.step()
    assert losses[-1] < 0.85 * losses[0]


def test_prediction_is_the_output_of_the_free_equilibrium(network):
    model, x, y, _ = with_target(network, "mse")
    ep = mep.EquilibriumPropagation(model, "mse", energy="hopfield", solver=replace(CLOSE, tol=1e-10))
    _, found = settled(model, x, y, "mse", 0.0, TIGHT, "hopfield")
    torch.testing.assert_close(ep.predict(x), found.point.values["4"], rtol=1e-8, atol=1e-10)
    assert (ep.predict(x) - model(x)).norm() > 1e-2


class BothSides(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x):
        h = self.first(x)
        return self.last(torch.relu(h) + h)


class Forked(nn.Module):
    """One layer, without an activation of its own, feeds two others."""

    def __init__(self):
        super().__init__()
        self.first, self.left, self.right, self.last = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        h = self.first(x)
        return self.last(torch.relu(self.left(h)) + torch.relu(self.right(h)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mlp(nn.GELU, 4, 5, 3), r"gelu.*Use ReLU"),
        (lambda: mlp(nn.LeakyReLU, 4, 5, 3), r"leaky_relu.*Use ReLU"),
        (BothSides, r"both before and behind"),
        (lambda: nn.Sequential(nn.ReLU(), nn.Linear(4, 3)), "no state before"),
    ],
)
def test_what_has_no_box_is_refused(make, message):
    with pytest.raises(mep.TraceError, match=message):
        mep.capture.capture(make(), torch.randn(5, 4), energy="hopfield")


def test_no_parameter_is_dropped_silently():
    """Either it is refused, or every parameter has a gradient."""
    torch.manual_seed(0)
    model, x, y = Forked(), torch.randn(5, 4), torch.randint(4, (5,))
    for p in model.parameters():
        p.data.mul_(0.5)
    try:
        ep = mep.EquilibriumPropagation(model, energy="hopfield")
        found, _ = ep.gradients(x, y)
    except mep.TraceError:
        return
    assert set(found) == set(model.parameters())


def test_dropout_is_the_same_in_both_phases():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.Hardtanh(0, 1), nn.Dropout(0.5), nn.Linear(8, 6), nn.Hardtanh(0, 1), nn.Linear(6, 3)
    )
    model, x, y = model.double(), torch.randn(5, 4).double(), torch.randint(3, (5,))
    ep = mep.EquilibriumPropagation(model, beta=1e-3, energy="hopfield", solver=CLOSE)
    torch.manual_seed(1)
    small = ep.gradients(x, y)[0]
    ep = mep.EquilibriumPropagation(model, beta=1e-4, energy="hopfield", solver=CLOSE)
    torch.manual_seed(1)
    smaller = ep.gradients(x, y)[0]
    for p, g in smaller.items():
        torch.testing.assert_close(small[p], g, rtol=0.05, atol=1e-4)


def test_sweeps_are_refused():
    with pytest.raises(mep.ArgumentError, match="Descent"):
        mep.EquilibriumPropagation(mlp(nn.ReLU, 4, 5, 3), energy="hopfield", solver=mep.Sweep())


def test_the_table_of_a_hopfield_network_names_the_activations_of_its_states():
    modules = (
        nn.Linear(4, 8),
        nn.Hardtanh(0, 1),
        nn.Linear(8, 2),
        nn.Sigmoid(),
        nn.Linear(2, 3),
        nn.ReLU(),
        nn.Linear(3, 2),
    )
    rows = str(mep.trace(nn.Sequential(*modules), torch.rand(3, 4), energy="hopfield")).splitlines()[1:5]
    found = [row.split("  ")[1:] for row in rows]
    assert ["".join(cells).strip().split("batch")[0].strip() for cells in found] == [
        "linear, box [0, 1]",
        "linear, sigmoid",
        "linear, box [0, inf]",
        "linear",
    ]
