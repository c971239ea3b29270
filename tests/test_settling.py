"""Where settling ends is an equilibrium, how near it came is measured truly, and how it ended is told truthfully."""

import math
import warnings

import pytest
import torch
from cases import BATCH, COSTS, MODELS, Residual, call, free_energy, log_cosh, mlp, rows, settled
from reference import (
    backprop,
    dense_equilibrium,
    nudged_energy,
    predictions_of_graph,
    predictions_of_modules,
    residual,
    swept_residual,
)
from reference import energy as written_energy
from torch import nn

import mep
from mep.cost import make_cost
from mep.energy import nudge
from mep.settle import Iterate, Result, settle

TIGHT = {
    "sweep": mep.Sweep(tol=1e-12, settle_steps=200),
    "descent": mep.Descent(tol=1e-11, settle_steps=20000, adaptive=True),
}
LOOSE = {
    "sweep": mep.Sweep(),
    "patient sweep": mep.Sweep(patience=2),
    "descent": mep.Descent(adaptive=True, settle_steps=2000),
    "patient descent": mep.Descent(adaptive=True, settle_steps=2000, patience=3),
}
SHORT = {"one sweep": mep.Sweep(1, adaptive=False), "sweeps": mep.Sweep(3, adaptive=False), "steps": mep.Descent(4)}
ANY = SHORT | LOOSE
MEASURED = [(s, "cross_entropy") for s in (*SHORT, "sweep", "descent")] + [("sweep", "mse"), ("sweeps", "custom")]
ALONE = [(s, "cross_entropy") for s in LOOSE] + [("sweep", "mse"), ("sweep", "custom")]


class Straight(nn.Module):
    """A model with every activation replaced by the identity."""

    def __init__(self, model):
        super().__init__()
        for name, module in model.named_children():
            self.add_module(name, module)

    def forward(self, x):
        h = self.first(x)
        return self.last(h + self.second(h))


LINEAR = {
    "chain": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)), (4,)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.AvgPool1d(2), nn.Conv1d(3, 2, 2), nn.Flatten(), nn.Linear(4, 3)),
        (2, 7),
    ),
    "residual": (lambda: Straight(Residual()), (4,)),
}


def states_of(energy, point):
    return {node.name: point.values[node.name] for node in energy.graph.states}


def assert_same_states(found, expected, tolerance):
    for name, s in expected.items():
        torch.testing.assert_close(found[name], s, rtol=tolerance, atol=tolerance)


def held_predictions(model, x, leaves=()):
    """Predictions on the branches of the forward pass, and the forward pass."""
    energy, point = free_energy(model, x, leaves=leaves)
    free = states_of(energy, point)
    return predictions_of_graph(energy.graph, energy.inputs, free), free


def true_residual(energy, solver, predict, cost, target, beta, states):
    """That of the energy written down. Sweeps through graphs that are not affine measure each node from the output."""
    if isinstance(solver, mep.Sweep) and not energy.is_affine:
        return swept_residual(predict, energy.graph.output, COSTS[cost].value, target, beta, states)
    return residual(predict, nudged_energy(predict, energy.graph.output, COSTS[cost].value, target, beta), states)


@pytest.fixture(params=TIGHT)
def tight(request):
    return TIGHT[request.param]


@pytest.fixture(params=LOOSE)
def loose(request):
    return LOOSE[request.param]


@pytest.fixture(params=MODELS)
def case(request):
    return MODELS[request.param]


@pytest.mark.parametrize("name", LINEAR)
def test_linear_networks_settle_to_the_dense_solve(name, tight):
    make, shape = LINEAR[name]
    torch.manual_seed(0)
    model, x, y = make().double(), torch.randn(BATCH, *shape).double(), torch.randn(BATCH, 3).double()
    energy, found = settled(model, x, y, "mse", 0.3, tight)
    total = nudged_energy(
        predictions_of_graph(energy.graph, energy.inputs), energy.graph.output, COSTS["mse"].value, y, 0.3
    )
    assert found.result is Result.CONVERGED
    assert_same_states(states_of(energy, found.point), dense_equilibrium(total, states_of(energy, found.point)), 1e-8)


def test_held_relu_networks_settle_to_the_dense_solve_of_their_linear_piece(tight):
    model, x, y = MODELS["conv relu maxpool"].build("mse")
    energy, found = settled(model, x, y, "mse", 0.2, tight)
    predict, free = held_predictions(model, x)
    total = nudged_energy(predict, energy.graph.output, COSTS["mse"].value, y, 0.2)
    assert_same_states(states_of(energy, found.point), dense_equilibrium(total, free), 1e-8)


@pytest.mark.parametrize(("solver", "cost"), MEASURED)
def test_reported_residual_is_the_true_one(case, solver, cost):
    model, x, y = case.build(cost)
    energy, found = settled(model, x, y, COSTS[cost].argument, 0.1, ANY[solver], leaves=case.leaves)
    predict, _ = held_predictions(model, x, case.leaves)
    true = true_residual(energy, ANY[solver], predict, cost, y, 0.1, states_of(energy, found.point))
    torch.testing.assert_close(found.residual, true, rtol=1e-6, atol=1e-8)
    assert (found.result is Result.CONVERGED) == bool((true <= ANY[solver].tol).all())


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Identity])
def test_reported_residual_is_that_of_the_energy_written_by_hand(activation):
    torch.manual_seed(0)
    model, x, y = mlp(activation, 4, 6, 6, 3).double(), torch.randn(5, 4).double(), torch.randint(3, (5,))
    predict = predictions_of_modules(model, x)
    for solver in ANY.values():
        energy, found = settled(model, x, y, "cross_entropy", 0.5, solver)
        total = nudged_energy(predict, "4", COSTS["cross_entropy"].value, y, 0.5)
        s = states_of(energy, found.point)
        true = true_residual(energy, solver, predict, "cross_entropy", y, 0.5, s)
        torch.testing.assert_close(found.residual, true, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(energy.value(found.point), total(s))


def test_errors_are_the_distances_from_the_predictions(case):
    model, x, y = case.build()
    _, found = settled(model, x, y, "cross_entropy", 0.1, mep.Sweep(), leaves=case.leaves)
    for name, delta in found.errors.items():
        s, mu = found.point.values[name], found.point.predictions[name]
        torch.testing.assert_close(delta, (mu - s) / 0.1, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp tanh", "mlp relu", "residual", "concatenating", "conv gelu avgpool"])
def test_solvers_agree_on_the_state(name):
    model, x, y = MODELS[name].build()
    ends = []
    for solver in TIGHT.values():
        energy, found = settled(model, x, y, "cross_entropy", 0.1, solver)
        assert found.result is Result.CONVERGED
        ends.append(states_of(energy, found.point))
    for other in ends[1:]:
        assert_same_states(other, ends[0], 1e-9)


def hard_and_easy(case, cost):
    """Examples that need different numbers of iterations."""
    model, x, y = case.build(cost, batch=3)
    scale = torch.logspace(-2, 0.3, 3).double()
    expand_beta = lambda t: t * scale.view(-1, *[1] * (t.ndim - 1)) if t.is_floating_point() else t  # noqa: E731
    return model, tuple(map(expand_beta, x)) if isinstance(x, tuple) else expand_beta(x), y


@pytest.mark.parametrize(("solver", "cost"), ALONE)
def test_an_example_settles_alone_as_among_others(case, solver, cost):
    if case.mixes_examples:
        pytest.skip("batch statistics")
    model, x, y = hard_and_easy(case, cost)
    given = COSTS[cost].argument
    energy, together = settled(model, x, y, given, 0.2, LOOSE[solver], leaves=case.leaves)
    for i in range(len(y)):
        one = slice(i, i + 1)
        _, alone = settled(model, rows(x, one), y[one], given, 0.2, LOOSE[solver], leaves=case.leaves)
        assert (alone.residual <= LOOSE[solver].tol) == (together.residual[one] <= LOOSE[solver].tol)
        expected = {n: s[one] for n, s in states_of(energy, together.point).items()}
        assert_same_states(states_of(energy, alone.point), expected, 1e-10)


@pytest.mark.parametrize("solver", ["sweep", "descent"])
def test_examples_that_share_statistics_settle_together(solver):
    model, x, y = MODELS["batch norm"].build(batch=16)
    solver = mep.Sweep() if solver == "sweep" else mep.Descent(3000, settle_lr=0.05, momentum=0.9, adaptive=True)
    _, found = settled(model, x, y, "cross_entropy", 0.02, solver)
    assert found.result is Result.CONVERGED


@pytest.mark.parametrize("solver", ["sweep", "descent"])
def test_a_perfect_example_that_others_disturb_is_no_divergence(solver):
    model, x, y = MODELS["batch norm"].build("mse", batch=16)
    y[0] = model(x)[0].detach() + 1e-6
    solver = mep.Sweep() if solver == "sweep" else mep.Descent(500, settle_lr=0.05, momentum=0.9, adaptive=True)
    _, found = settled(model, x, y, "mse", 0.01, solver)
    assert found.result is not Result.DIVERGED


@pytest.mark.parametrize("make", [mep.Sweep, mep.Descent])
@pytest.mark.parametrize("tol", [1.0, 1.5])
def test_a_tolerance_that_accepts_no_answer_at_all_is_refused(make, tol):
    """Before a signal arrives the residual is 1."""
    with pytest.raises(mep.ArgumentError, match="tol"):
        make(tol=tol)


@pytest.mark.parametrize("make", [mep.Sweep, mep.Descent])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_without_adaptive_exactly_settle_steps_are_taken(make, steps):
    model, x, y = MODELS["mlp tanh"].build()
    _, some = settled(model, x, y, "cross_entropy", 0.1, make(steps, tol=1e-13, adaptive=False))
    _, easy = settled(model, x, y, "cross_entropy", 0.1, make(steps, tol=0.999, adaptive=False))
    assert (some.iterations, some.result) == (steps, Result.FIXED_STEPS)
    assert easy.iterations == steps
    assert (easy.result is Result.CONVERGED) == bool((easy.residual <= 0.999).all())


@pytest.mark.parametrize("make", [mep.Sweep, mep.Descent])
def test_patience_asks_for_consecutive_quiet_iterations(make):
    model, x, y = MODELS["mlp tanh"].build(batch=1)

    def iterations(patience):
        solver = make(1000, tol=1e-3, adaptive=True, patience=patience)
        return settled(model, x, y, "cross_entropy", 0.1, solver)[1].iterations

    assert [iterations(p) - iterations(1) for p in (2, 3, 6)] == [1, 2, 5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_who_is_exactly_at_the_tolerance_has_settled(dtype):
    """In the dtype of residuals 0.01 may be more than 0.01: then nobody would be active, and nobody settled."""
    at = torch.tensor([0.01, 0.01, 0.01], dtype=dtype)
    left = [torch.full((3,), 0.5, dtype=dtype), torch.cat([at[:2], at.new_tensor([0.5])]), at]

    class Rounded(mep.Sweep):
        def init(self, energy, point, start):
            return Iterate(left.pop(0), point)

        def step(self, energy, iterate, active):
            assert active is None or active.any()
            return Iterate(left.pop(0), iterate.point)

        def finalize(self, energy, iterate):
            return iterate

    energy, free = free_energy(nn.Linear(2, 2), torch.ones(3, 2))
    found = settle(energy, free, Rounded(5))
    assert (found.result, found.iterations) == (Result.CONVERGED, 2)


def test_patience_starts_again_after_a_loud_iteration():
    model, x, y = MODELS["mlp tanh"].build("mse", batch=1)
    steps = [
        settled(model, x, y, "mse", 0.3, mep.Descent(k, settle_lr=0.3, momentum=0.9))[1].residual.item()
        for k in range(1, 80)
    ]
    tol = 0.05
    first = next(k for k, r in enumerate(steps, 1) if r <= tol)
    for patience in (2, 4):
        quiet = [max(steps[k - patience + 1 : k + 1]) <= tol for k in range(patience - 1, len(steps))]
        expected = quiet.index(True) + patience
        solver = mep.Descent(200, settle_lr=0.3, momentum=0.9, adaptive=True, tol=tol, patience=patience)
        assert settled(model, x, y, "mse", 0.3, solver)[1].iterations == expected
    assert expected > first + patience - 1, "the residual should have risen in between"


@pytest.mark.parametrize("make", [mep.Sweep, mep.Descent])
def test_step_limit_is_told(make):
    model, x, y = MODELS["mlp tanh"].build()
    _, found = settled(model, x, y, "cross_entropy", 0.1, make(2, tol=1e-9, adaptive=True))
    assert (found.iterations, found.result) == (2, Result.STEP_LIMIT)
    assert found.residual.max() > 1e-9


def test_divergence_raises_and_touches_no_gradient():
    model, x, y = MODELS["mlp tanh"].build()
    ep = mep.EquilibriumPropagation(model, solver=mep.Descent(3000, settle_lr=50.0))
    with pytest.raises(mep.DivergedError, match="settle_lr"):
        ep(x, y)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("steps", [1, 4, 8, 11])
def test_a_signal_that_has_not_arrived_is_not_taken_for_convergence(steps):
    torch.manual_seed(0)
    model, x, y = mlp(nn.Tanh, *[8] * 12, 3).double(), torch.randn(5, 8).double(), torch.randint(3, (5,))
    energy, found = settled(model, x, y, "cross_entropy", 0.1, mep.Descent(steps, adaptive=True))
    assert found.result is Result.STEP_LIMIT
    assert found.residual.min() > 0.999
    still = [torch.equal(found.point.values[n.name], found.point.predictions[n.name]) for n in energy.graph.states]
    assert still == [True] * (12 - steps) + [False] * steps


@pytest.mark.parametrize("make", [mep.Sweep, mep.Descent])
def test_a_signal_below_rounding_is_not_taken_for_convergence(make):
    torch.manual_seed(0)
    model, x, y = mlp(nn.Tanh, *[16] * 30, 3), torch.randn(32, 16), torch.randint(3, (32,))
    ep = mep.EquilibriumPropagation(model, solver=make(300, adaptive=True), on_unsettled="ignore")
    found, estimate = ep.gradients(x, y)
    first = model[0].weight
    exact = backprop(model, nn.functional.cross_entropy(model(x), y))
    assert not estimate.converged or found[first].norm() > 0.5 * exact[first].norm()


def test_the_free_equilibrium_is_the_forward_pass(case):
    model, x, _ = case.build()
    energy, point = free_energy(model, x, leaves=case.leaves)
    torch.testing.assert_close(energy.output(point), call(model, x))
    assert not energy.value(point).any()
    assert all(not g.any() for g in energy.forces(point).values())


def test_an_example_without_cost_stays_where_it_is(loose):
    model, x, y = MODELS["mlp tanh"].build("mse")
    y[0] = model(x)[0].detach()
    _, found = settled(model, x, y, "mse", 0.1, loose)
    torch.testing.assert_close(found.point.values["4"][0], y[0])
    assert found.result is Result.CONVERGED and found.residual[0] < 1e-2


class Steep(nn.Module):
    """The larger an input, the stronger its gradient, and the more the layers bend."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        h = self.first(x)
        return self.last(h * torch.tanh(self.second(h)))


def one_hard_example():
    torch.manual_seed(0)
    model, x, y = Steep().double(), torch.randn(7, 5).double(), torch.randint(3, (7,))
    x[HARD] *= 60
    y[HARD] = model(x)[HARD].argmin()
    return model, x, y


HARD, OTHERS = 2, torch.arange(7) != 2


def test_an_example_that_does_not_settle_is_reported_and_the_others_are_not():
    """All at the beta that was named; the estimate of the others is theirs alone."""
    model, x, y = one_hard_example()
    ep = mep.EquilibriumPropagation(model, beta=0.5, solver=mep.Sweep(20, tol=1e-4), on_unsettled="ignore")
    _, estimate = ep.gradients(x, y)
    assert (estimate.betas == 0.5).all() and not estimate.converged
    assert torch.equal(estimate.settled, OTHERS) and estimate.residual[HARD] > 1e-4
    assert estimate.counts[HARD] == 20 and estimate.counts[OTHERS].max() < 20


@pytest.mark.parametrize("solver", [mep.Sweep(20, tol=1e-4), mep.Descent(3, adaptive=True), mep.Local(2)])
def test_what_does_not_settle_is_used_with_one_warning_or_without_or_refused(solver):
    model, x, y = one_hard_example()
    found, estimates = {}, {}
    for on_unsettled in ("warn", "ignore", "raise"):
        ep = mep.EquilibriumPropagation(model, beta=0.5, solver=solver, on_unsettled=on_unsettled)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if on_unsettled == "raise":
                with pytest.raises(mep.errors.NotConvergedError, match=r"did not settle.*Nothing was changed"):
                    ep(x, y)
                assert all(p.grad is None for p in model.parameters())
            else:
                found[on_unsettled], estimates[on_unsettled] = ep.gradients(x, y)
                ep.gradients(x, y)
        told = [w for w in caught if w.category is mep.errors.NotConvergedWarning]
        assert len(told) == (on_unsettled == "warn")
        assert all("examples did not settle" in str(w.message) and "Way out" in str(w.message) for w in told)
    assert torch.equal(estimates["warn"].residual, estimates["ignore"].residual)
    assert all(torch.equal(g, found["ignore"][p]) for p, g in found["warn"].items())


def test_where_each_example_has_a_beta_states_and_gradient_are_those_of_the_energy_by_autograd():
    model, x, y = one_hard_example()
    beta = torch.tensor([0.5, 0.3, 1e-3, 0.1, 0.2, 0.5, 1e-2], dtype=torch.float64)
    energy, found = settled(model, x, y, "cross_entropy", beta, mep.Sweep(tol=1e-6))
    states = states_of(energy, found.point)
    predict = predictions_of_graph(energy.graph, energy.inputs)
    true = swept_residual(predict, energy.graph.output, COSTS["cross_entropy"].value, y, beta, states)
    assert found.result is Result.CONVERGED and (true <= 1.001e-6).all()
    with torch.no_grad():
        gradients = energy.parameter_gradient(found.point, found.errors, 1)
    exact = torch.autograd.grad((written_energy(predict, states) / beta).sum(), list(gradients))
    for g, e in zip(gradients.values(), exact, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("cost", ["mse", log_cosh], ids=["mse", "custom"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_an_output_of_one_number_without_a_dimension(activation, cost):
    torch.manual_seed(0)
    model, x, y = nn.Sequential(mlp(activation, 4, 8, 1), nn.Flatten(0)).double(), torch.randn(6, 4), torch.randn(6)
    x, y = x.double(), y.double()
    value = lambda s: (s - y).square() if cost == "mse" else (s - y).cosh().log()  # noqa: E731
    exact = backprop(model, value(model(x)).mean())
    each = cost if cost == "mse" else lambda s, t: (s - t).cosh().log()
    ep = mep.EquilibriumPropagation(model, each, beta=1e-5, solver=mep.Sweep(tol=1e-8))
    gradients, estimate = ep.gradients(x, y)
    assert estimate.converged
    for p, g in gradients.items():
        torch.testing.assert_close(g, exact[p], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("solver", ["sweep", "descent"])
@pytest.mark.parametrize("name", ["mlp tanh", "conv gelu avgpool"])
def test_what_sees_only_the_input_is_predicted_once_a_step(name, solver, monkeypatch):
    model, x, y = MODELS[name].build()
    energy, _ = free_energy(model, x)
    calls = []
    for kind in {type(node) for node in energy.graph.nodes}:
        predict = kind.predict
        monkeypatch.setattr(
            kind, "predict", lambda node, *a, predict=predict: calls.append(node.name) or predict(node, *a)
        )
    _, found = settled(model, x, y, "cross_entropy", 0.1, TIGHT[solver])
    assert found.iterations > 3
    assert calls.count("0") == 1 < calls.count(energy.graph.output)


def test_the_nudge_is_just_another_energy():
    model, x, y = MODELS["mlp tanh"].build()
    energy, point = free_energy(model, x)
    cost = make_cost("cross_entropy")(energy.output(point), y)
    with torch.no_grad():
        plus, minus = (settle(nudge(energy, cost, b), point, TIGHT["sweep"]) for b in (1e-4, -1e-4))
    moved = energy.output(plus.point) + energy.output(minus.point) - 2 * energy.output(point)
    assert moved.norm() < 1e-3 * (energy.output(plus.point) - energy.output(point)).norm()
    assert math.isclose(energy.beta, 0.0)


def test_an_estimate_is_one_line_wherever_it_is_shown():
    model = nn.Linear(4, 3)
    estimate = mep.EquilibriumPropagation(model)(torch.rand(300, 4), torch.arange(300) % 3)
    assert repr([estimate]) == f"[<Estimate: {estimate}>]" and len(repr(estimate)) < 100
