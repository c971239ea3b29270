"""What must hold for every model: hypothesis draws the models (`dags.py`), shapes, costs, betas and contrasts.

Each property is searched over a fixed number of cases, the same in every run; together there are thousands, of which
`make test` runs the first hundreds.
"""

import copy
import functools
import math
import os

import torch
from cases import COSTS, settled
from dags import NOISY, UNREADABLE, plans
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from reference import backprop, nudged_energy, predictions_of_graph, residual, swept_residual
from reference import energy as written_energy

import mep
from mep import presets

COUNTS = {}
PARTS = (1.0, 1.0) if os.environ.get("MEP_TEST_ALL") else (0.15, 0.08)
"""How much of the cases is run, and of the slow ones: all by `make test-all`, at least three hundred models always."""
TIGHT = mep.Sweep(tol=1e-12, settle_steps=200)
ORDERS = {"one-sided": (1, 2e-3), "centered": (2, 8e-3)}
LADDER = (1, 1 / 8, 1 / 64, 1 / 512)
some_cost = st.sampled_from(sorted(COSTS))
# A busy machine may be slow; nothing is filtered, so the other checks stay. To shrink a failure takes minutes, and
# plans are short: add Phase.shrink by hand.
SEARCH = {"phases": [Phase.generate], "suppress_health_check": [HealthCheck.too_slow]}


def holds(cases, is_slow=False, **drawn):
    """A test that a property holds in so many cases, or a part of them, the first ones."""

    def decorate(check):
        cases_now = math.ceil(PARTS[is_slow] * cases)
        COUNTS[check.__name__] = cases, cases_now

        @functools.wraps(check)
        def search():
            ran = 0

            def one(**values):
                nonlocal ran
                ran += 1
                check(**values)

            settings(max_examples=cases_now, **SEARCH)(given(**drawn)(one))()
            assert ran >= cases_now

        del search.__wrapped__  # else pytest takes what is drawn for fixtures
        return search

    return decorate


def example(plan, cost, dtype=torch.float64):
    """Model, input and target."""
    model, x = plan.build(dtype)
    with torch.no_grad():
        return model, x, COSTS[cost].target(model(x))


def distance(found, exact):
    """|found - exact| / |exact| over all parameters at once."""
    assert found.keys() == {p for p, g in exact.items() if g is not None}
    error = sum(float((g - exact[p]).square().sum()) for p, g in found.items())
    return math.sqrt(error / sum(float(exact[p].square().sum()) for p in found))


def order_shows(ep, x, y, exact, order):
    """Whether halving beta divides the error by 2^order, or the error is at rounding, once beta is small enough.

    Small enough: a layer norm of almost equal features is steep, and kinks that are not held lie anywhere.
    """
    start, errors = ep.beta, []
    for scale in LADDER:
        errors = []
        for ep.beta in (start * scale, start * scale / 2):
            torch.manual_seed(0)
            found, estimate = ep.gradients(x, y)
            if estimate.converged:
                errors.append(distance(found, exact))
        if errors and max(errors) < 1e-9:
            return True
        if len(errors) == 2 and errors[0] < 0.1 and math.log2(errors[0] / errors[1]) > order - 0.3:
            return True
    return False


@holds(700, is_slow=True, plan=plans(), cost=some_cost, phases=st.sampled_from(sorted(ORDERS)))
def test_error_of_the_gradient_falls_with_the_order_of_the_contrast(plan, cost, phases):
    model, x, y = example(plan, cost)
    order, beta = ORDERS[phases]
    exact = backprop(model, COSTS[cost].value(model(x), y).mean())
    ep = mep.EquilibriumPropagation(model, COSTS[cost].argument, beta, TIGHT, phases=phases)
    assert order_shows(ep, x, y, exact, order)


SOLVERS = (
    mep.Sweep(),
    mep.Sweep(2, adaptive=False),
    mep.Sweep(tol=1e-1),
    mep.Sweep(tol=1e-6),
    mep.Descent(5),
)
some_beta = st.sampled_from((-0.3, -0.05, 0.01, 0.1, 0.5, 2.0))


def settled_with_oracle(plan, cost, beta, solver):
    """Where the solver ends on a random model, its states, and the predictions written down independently."""
    model, x, y = example(plan, cost)
    energy, found = settled(model, x, y, COSTS[cost].argument, beta, solver)
    with torch.no_grad():
        free, states = energy.state(energy.graph.evaluate(energy.inputs, energy.context)), energy.state(found.point)
    return energy, found, states, predictions_of_graph(energy.graph, energy.inputs, free), y


@holds(400, plan=plans(), cost=some_cost, beta=some_beta, solver=st.sampled_from(SOLVERS))
def test_reported_residual_is_that_of_the_energy_by_autograd(plan, cost, beta, solver):
    energy, found, states, predict, y = settled_with_oracle(plan, cost, beta, solver)
    given = predict, energy.graph.output, COSTS[cost].value, y, beta
    if isinstance(solver, mep.Sweep) and not energy.is_affine:
        true = swept_residual(*given, states)
    else:
        true = residual(predict, nudged_energy(*given), states)
    assert energy.beta == beta
    assert found.result is not mep.Result.CONVERGED or bool((true <= solver.tol * (1 + 1e-6) + 1e-8).all())
    if bool(found.residual.isfinite().all()):
        torch.testing.assert_close(found.residual, true, rtol=1e-5, atol=1e-8)


@holds(250, plan=plans(), cost=some_cost, beta=some_beta, solver=st.sampled_from(SOLVERS))
def test_parameter_gradient_is_that_of_the_energy_by_autograd(plan, cost, beta, solver):
    """Wherever the states are, and not only to some order in beta."""
    energy, found, states, predict, _ = settled_with_oracle(plan, cost, beta, solver)
    with torch.no_grad():
        gradients = energy.parameter_gradient(found.point, found.errors, 1)
    exact = torch.autograd.grad((written_energy(predict, states) / energy.beta).sum(), list(gradients))
    scale = max(float(g.abs().max()) for g in exact)
    for (p, g), e in zip(gradients.items(), exact, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-8 * (scale + 1), msg=lambda m, p=p: f"{p.shape}: {m}")


@holds(300, plan=plans(), cost=some_cost, beta=st.sampled_from((0.1, 0.5)), solver=st.sampled_from(SOLVERS[:1]))
def test_float32_settles_as_far_as_it_says(plan, cost, beta, solver):
    """Evaluated anew at its states, each node is balanced to the tolerance, and to the rounding of `s - mu`."""
    model, x, y = example(plan, cost, torch.float32)
    energy, found = settled(model, x, y, COSTS[cost].argument, beta, solver)
    if found.result is not mep.Result.CONVERGED:
        return
    states = energy.state(found.point)
    point = energy.at(states)
    rounded = torch.zeros(len(y))
    for s, mu in ((point.values[name].flatten(1), mu.flatten(1)) for name, mu in point.predictions.items()):
        each = 50 * torch.finfo(s.dtype).eps * s.norm(dim=1) / (s - mu).norm(dim=1).clamp_min(1e-30)
        rounded = torch.maximum(rounded, each)
    if energy.is_affine:
        relative = torch.stack(list(energy.residuals(point).values())).amax(0)
    else:
        with torch.no_grad():
            predict = predictions_of_graph(energy.graph, energy.inputs, energy.state(energy.free_point()))
        relative = swept_residual(predict, energy.graph.output, COSTS[cost].value, y, beta, states)
    assert bool((relative <= solver.tol + rounded).all())


@holds(250, plan=plans(), cost=some_cost)
def test_an_example_has_the_same_gradient_alone_as_among_others(plan, cost):
    """The gradient of a batch is the mean over its examples, each by itself; calls in between leave no trace."""
    model, x, y = example(plan, cost)
    ep = mep.EquilibriumPropagation(model, COSTS[cost].argument, 1e-2, mep.Sweep(tol=1e-10, settle_steps=200))
    together, estimate = ep.gradients(x, y)
    alone = [ep.gradients(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    assert all(e.converged for e in (estimate, *(e for _, e in alone)))
    mean = {p: sum(found[p] for found, _ in alone) / len(x) for p in together}
    scale = max(float(g.abs().max()) for g in mean.values())
    for p, g in together.items():
        torch.testing.assert_close(g, mean[p], rtol=1e-6, atol=1e-7 * scale)


def left_as_found(model, x, y):
    """Copies of all that an estimate must not touch."""
    return copy.deepcopy(
        {
            "inputs": (x, y),
            "parameters": dict(model.named_parameters()),
            "gradients": [p.grad for p in model.parameters()],
            "attributes": [sorted(vars(m)) for m in model.modules()],
            "modes": [(m.training, len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()],
        }
    )


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@holds(200, plan=plans(NOISY), cost=some_cost, training=st.booleans(), branches=st.sampled_from(("held", "exact")))
def test_an_estimate_leaves_all_as_one_forward_pass_would(plan, cost, training, branches):
    """Inputs and parameters stay; running statistics and random numbers move as under one call of the model."""
    model, x, y = example(plan, cost)
    twin = copy.deepcopy(model.train(training))
    before = left_as_found(model, x, y)
    state = torch.get_rng_state()
    outputs, buffers = twin(x), dict(twin.named_buffers())
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    try:
        ep = mep.EquilibriumPropagation(model, COSTS[cost].argument, 0.1, branches=branches)
        ep.gradients(x, y)
    except mep.MepError:
        assert same(state, torch.get_rng_state())
        return
    finally:
        assert same(left_as_found(model, x, y), before)
    assert same(torch.get_rng_state(), after)
    assert same(dict(model.named_buffers()), buffers)
    torch.set_rng_state(state)
    model.load_state_dict(twin.state_dict())
    assert same(model.eval()(x), twin.eval()(x))
    assert outputs.shape == (len(x), 3)


def verdict(model, cost, x, y):
    """An estimator, and the sentence that refuses the model, None if it is accepted."""
    ep = mep.EquilibriumPropagation(model, COSTS[cost].argument, solver=TIGHT)
    try:
        ep.gradients(x, y)
    except mep.MepError as error:
        return ep, f"{type(error).__name__}: {error}"
    return ep, None


@holds(250, is_slow=True, plan=plans(UNREADABLE), cost=some_cost)
def test_a_model_is_refused_every_time_with_the_same_sentence_or_gets_the_right_gradient(plan, cost):
    """Nothing in between: control flow, slices, detached weights, numbers read out, examples that see each other."""
    model, x, y = example(plan, cost)
    before = left_as_found(model, x, y)

    ep, sentence = verdict(model, cost, x, y)
    assert verdict(copy.deepcopy(model), cost, x, y)[1] == sentence
    if sentence is not None:
        assert sentence.startswith("TraceError") and "Way out" in sentence
        assert verdict(model, cost, x, y)[1] == sentence
    assert same(left_as_found(model, x, y), before)
    if sentence is None:
        torch.manual_seed(0)
        exact = backprop(model, COSTS[cost].value(model(x), y).mean())
        ep.beta = 1e-3
        assert order_shows(ep, x, y, exact, 1)


PRESETS = [f for name, f in vars(presets).items() if name in mep.__all__ and callable(f)]


@holds(100, plan=plans(), make=st.sampled_from([f for f in PRESETS if f.__module__ == presets.__name__]))
def test_two_runs_with_one_seed_agree_bit_for_bit(plan, make):
    def run():
        model, x, y = example(plan, "cross_entropy", torch.float32)
        opt = make(model.parameters(), model=model)
        losses = [opt.step(x=x, target=y) for _ in range(3)]
        return losses, dict(model.named_parameters()), opt.state_dict()["state"]

    assert same(run(), run())


def test_there_are_thousands_of_cases_and_hundreds_in_every_run():
    every, now = map(sum, zip(*COUNTS.values(), strict=True))
    assert every >= 2000 and now >= 300
