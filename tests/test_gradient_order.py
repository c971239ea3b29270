"""EP's theorem: as beta -> 0 its gradient is that of backprop, with an error of order 1 (one-sided) or 2 (centered)."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import COSTS, MODELS, call
from reference import backprop

import mep

ORDERS = {"one-sided": (1, 0.15, 2e-3), "centered": (2, 0.2, 8e-3)}
SWEEP = mep.Sweep(tol=1e-12, settle_steps=200)
DESCENT = mep.Descent(adaptive=True, tol=1e-10, settle_steps=5000)
LOCAL = mep.Local(tol=1e-11)
SLOW = ["mlp tanh", "conv relu maxpool", "functional", "transposed", "concatenating"]
RUNS = [(m, SWEEP) for m in MODELS] + [(m, solver) for m in SLOW for solver in (DESCENT, LOCAL)]


def error(found, exact):
    pairs = [(found[p], g) for p, g in exact.items() if g is not None]
    return float(sum((a - b).square().sum() for a, b in pairs).sqrt() / sum(b.square().sum() for _, b in pairs).sqrt())


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("phases", ORDERS)
@pytest.mark.parametrize(("name", "solver"), RUNS, ids=lambda v: v if isinstance(v, str) else type(v).__name__)
def test_error_falls_with_the_order_of_the_contrast(name, solver, phases, cost):
    order, slack, beta = ORDERS[phases]
    case = MODELS[name]
    model, x, target = case.build(cost)
    exact = backprop(model, COSTS[cost].value(call(model, x), target).mean())
    ep = mep.EquilibriumPropagation(model, COSTS[cost].argument, None, solver, phases=phases, leaves=case.leaves)
    found = []
    for ep.beta in (beta, beta / 2):
        gradients, estimate = ep.gradients(x, target)
        assert estimate.converged and estimate.beta == ep.beta
        found.append(gradients)
    coarse, fine = found

    assert abs(math.log2(error(coarse, exact) / error(fine, exact)) - order) < slack
    assert set(fine) == {p for p, g in exact.items() if g is not None}
    scale = max(float(g.norm()) for g in exact.values() if g is not None)
    for p, g in exact.items():
        if g is not None and g.norm() > 1e-6 * scale:
            assert F.cosine_similarity(fine[p].flatten(), g.flatten(), dim=0) > 0.99


def test_the_costs_written_down_for_these_tests_are_torch_s_own():
    torch.manual_seed(0)
    output = torch.randn(5, 3, 2).double()
    for name, function in (("cross_entropy", F.cross_entropy), ("mse", F.mse_loss)):
        target = COSTS[name].target(output)
        torch.testing.assert_close(COSTS[name].value(output, target).mean(), function(output, target))
