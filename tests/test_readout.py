"""A readout outside of the energy: its pull, its own gradient, and all that torch users do with modules; float64."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from cases import free_energy, inhibiting, mlp
from reference import energy as energy_of
from reference import implicit_gradient, predictions_of_graph
from torch import nn

import mep
from mep.cost import WithReadout, make_cost
from mep.settle import Result, settle

RELAXATION = mep.Relaxation(tol=1e-12, settle_steps=1000)
DESCENT = mep.Descent(20000, settle_lr=0.3, adaptive=True, tol=1e-9)
SWEEP = mep.Sweep(tol=1e-11, settle_steps=500)


def hard_sigmoid():
    return nn.Hardtanh(0.0, 1.0)


def dense(activation=hard_sigmoid):
    return nn.Sequential(nn.Linear(6, 8), activation(), nn.Linear(8, 7), activation())


def convolution(activation=hard_sigmoid):
    return nn.Sequential(
        nn.Unflatten(1, (1, 6, 6)), nn.Conv2d(1, 4, 3), activation(), nn.AvgPool2d(2), nn.Conv2d(4, 3, 2), activation()
    )


MODELS = {
    "dense": (dense, 6, lambda: nn.Linear(7, 3)),
    "dense, without an activation at its end": (lambda a=hard_sigmoid: dense(a)[:-1], 6, lambda: nn.Linear(7, 3)),
    "convolution": (convolution, 36, lambda: nn.Sequential(nn.Flatten(), nn.Linear(3, 3))),
    "deep readout": (dense, 6, lambda: nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))),
}


def build(name="dense", energy="hopfield", batch=5):
    """A network with one equilibrium, its readout, an input and class labels."""
    torch.manual_seed(0)
    make, size, head = MODELS[name]
    model, readout = (make() if energy == "hopfield" else make(nn.Tanh)).double(), head().double()
    for p in model.parameters():
        p.data.mul_(0.7 if p.ndim > 1 else 1.0).add_(0.2 if p.ndim == 1 else 0.0)
    return model, readout, torch.rand(batch, size).double(), torch.arange(batch) % 3


def estimator(model, readout, energy="hopfield", solver=None, beta=None, **settings):
    solver = solver or (RELAXATION if energy == "hopfield" else SWEEP)
    return mep.EquilibriumPropagation(
        model, "cross_entropy", beta, solver, energy, readout=readout, on_unsettled="raise", **settings
    )


def exact(model, readout, x, y, energy):
    """The whole derivative of the mean cost behind the free equilibrium, by model and readout parameters.

    By implicit differentiation with the dense Hessian; for the prediction energy, by backpropagation.
    """
    own = list(readout.parameters())
    if energy == "prediction":
        loss = F.cross_entropy(readout(model(x)), y)
        found = torch.autograd.grad(loss, [*model.parameters(), *own])
        return found[: len(list(model.parameters()))], found[len(list(model.parameters())) :]
    written, point = free_energy(model, x, "hopfield")
    with torch.no_grad():
        free = settle(written, point, RELAXATION)
    assert free.result is Result.CONVERGED
    states = {n: s.contiguous() for n, s in written.state(free.point).items()}
    predict = predictions_of_graph(written.graph, written.inputs)
    output, boxes = written.graph.output, {node.name: node.box for node in written.graph.states}
    cost = lambda s: F.cross_entropy(readout(s[output]), y, reduction="none")  # noqa: E731
    of_model = implicit_gradient(
        lambda s: energy_of(predict, s, "hopfield"), cost, states, list(model.parameters()), boxes
    )
    return of_model, torch.autograd.grad(cost(states).mean(), own)


def distance(found, wanted):
    found, wanted = (torch.cat([g.flatten() for g in gs]) for gs in (found, wanted))
    return float((found - wanted).norm() / wanted.norm())


def of(found, module):
    return [found[p] for p in module.parameters()]


@pytest.mark.parametrize(("phases", "order"), [("one-sided", 1), ("centered", 2)])
@pytest.mark.parametrize(
    ("energy", "solver"), [("hopfield", RELAXATION), ("hopfield", DESCENT), ("prediction", SWEEP)], ids=str
)
@pytest.mark.parametrize("name", MODELS)
def test_gradient_of_the_model_has_its_order_and_that_of_the_readout_is_exact(name, energy, solver, phases, order):
    model, readout, x, y = build(name, energy)
    of_model, of_readout = exact(model, readout, x, y, energy)
    errors = []
    for beta in (0.1, 0.05):
        found, estimate = estimator(model, readout, energy, solver, beta, phases=phases).gradients(x, y)
        assert estimate.converged and estimate.beta == beta
        errors.append(distance(of(found, model), of_model))
        # Descent leaves a hundredth of its tolerance on the free states.
        assert distance(of(found, readout), of_readout) < (1e-7 if solver is DESCENT else 1e-10)
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.15 * order
    assert errors[1] < 0.2


@pytest.mark.parametrize("energy", ["hopfield", "prediction"])
@pytest.mark.parametrize("name", MODELS)
def test_default_beta_is_nearly_unbiased(name, energy):
    model, readout, x, y = build(name, energy)
    for p in readout.parameters():
        p.data.mul_(10)  # a curvature of about a hundred
    solver = mep.Relaxation(tol=1e-8) if energy == "hopfield" else mep.Sweep(tol=1e-8)
    ep = mep.EquilibriumPropagation(
        model, solver=solver, energy=energy, readout=readout, on_unsettled="ignore"
    )  # fmt: skip
    ep.gradients(x, y)  # from the second batch on it is known how well the free phase has to settle
    found, estimate = ep.gradients(x, y)
    assert estimate.converged
    assert distance(of(found, model), exact(model, readout, x, y, energy)[0]) < 0.05


class Criterion(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(7, 3)

    def forward(self, output, y):
        return F.cross_entropy(self.head(output), y, reduction="none")


def test_a_cost_of_an_equilibrium_that_is_no_forward_pass_has_its_own_gradient():
    model, readout, x, y = build("dense, without an activation at its end", "prediction")
    criterion = Criterion().double()
    criterion.head.load_state_dict(readout.state_dict())
    settings = {"solver": DESCENT, "beta": 1e-2, "groups": [inhibiting(model[0].out_features, 0.2)]}
    found, _ = mep.EquilibriumPropagation(model, criterion, **settings).gradients(x, y)
    same, _ = mep.EquilibriumPropagation(model, readout=readout, **settings).gradients(x, y)
    own = (*criterion.parameters(), *model.parameters()), (*readout.parameters(), *model.parameters())
    for p, q in zip(*own, strict=True):
        torch.testing.assert_close(found[p], same[q], rtol=1e-5, atol=1e-8)
    output = mep.EquilibriumPropagation(model, **settings).predict(x)
    wanted = torch.autograd.grad(criterion(output, y).mean(), list(criterion.parameters()))
    assert distance(of(found, criterion), wanted) < 1e-9


def test_curvature_behind_a_linear_readout_is_bounded():
    _, readout, _, y = build()
    readout.requires_grad_(False)
    s = torch.rand(5, 7).double()
    cost = make_cost(WithReadout(readout, "cross_entropy"))(s, y)
    value = lambda s, y: F.cross_entropy(readout(s), y)  # noqa: E731
    largest = max(float(torch.linalg.eigvalsh(torch.func.hessian(value)(s[i], y[i])).max()) for i in range(5))
    assert largest <= float(cost.smoothness) < 10 * largest
    # for the squared error it is exact: 2/3 |W|^2
    cost = make_cost(WithReadout(readout, "mse"))(s, torch.rand(5, 3).double())
    value = lambda s: (readout(s) ** 2).mean()  # noqa: E731
    assert float(torch.linalg.eigvalsh(torch.func.hessian(value)(s[0])).max()) == pytest.approx(float(cost.smoothness))
    assert make_cost(WithReadout(nn.Sequential(readout, nn.Tanh()), "cross_entropy"))(s, y).smoothness is None


@pytest.mark.parametrize("energy", ["hopfield", "prediction"])
def test_predict_and_the_loss_are_behind_the_readout(energy):
    model, readout, x, y = build(energy=energy)
    ep = estimator(model, readout, energy)
    states = mep.EquilibriumPropagation(model, solver=ep.solver, energy=energy).predict(x)
    torch.testing.assert_close(ep.predict(x), readout(states).detach())
    torch.testing.assert_close(ep(x, y).loss, F.cross_entropy(readout(states), y).detach())
    assert ep.settle(x, y).free.states.keys() == ep.settle(x, y).nudged.states.keys()
    assert not ep.predict(x).requires_grad


class Tied(nn.Module):
    """A readout that applies the first layer of the model once more."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, s):
        return self.layer(s[:, :6])[:, :3]


@pytest.mark.parametrize("energy", ["hopfield", "prediction"])
def test_weights_shared_with_the_model_have_the_sum_of_both_gradients(energy):
    model, _, x, y = build(energy=energy)
    readout = Tied(model[0])
    of_model, of_readout = exact(model, readout, x, y, energy)
    by = dict(zip(model.parameters(), of_model, strict=True))
    if energy == "hopfield":  # there the oracle has the two apart
        for p, g in zip(readout.parameters(), of_readout, strict=True):
            by[p] = by[p] + g
    for settings in ({"phases": "centered"}, {"phases": "one-sided"}):
        found, _ = estimator(model, readout, energy, beta=1e-5, **settings).gradients(x, y)
        assert distance(of(found, model), list(by.values())) < 1e-4
    optimizer = mep.eqprop(model.parameters(), model=model, energy=energy, cost="cross_entropy", readout=readout)
    before = model[0].weight.clone()
    optimizer.step(x=x, target=y)
    assert not torch.equal(before, model[0].weight)


@pytest.mark.parametrize("energy", ["hopfield", "prediction"])
def test_a_frozen_readout_pulls_and_does_not_learn(energy):
    model, readout, x, y = build(energy=energy)
    readout.requires_grad_(False)
    found, _ = estimator(model, readout, energy, beta=1e-5).gradients(x, y)
    assert set(found) == set(model.parameters())
    readout.requires_grad_(True)
    assert distance(of(found, model), exact(model, readout, x, y, energy)[0]) < 1e-4
    readout.requires_grad_(False)
    mep.eqprop(model.parameters(), model=model, energy=energy, cost="cross_entropy", readout=readout).step(
        x=x, target=y
    )


@pytest.mark.parametrize("proof", ["always", "never"])
@pytest.mark.parametrize("energy", ["hopfield", "prediction"])
def test_dropout_in_the_readout_is_drawn_once_a_step(energy, proof):
    model, _, x, y = build(energy=energy)
    readout = nn.Sequential(nn.Dropout(0.5), nn.Linear(7, 3)).double()
    torch.manual_seed(3)
    mask = nn.Dropout(0.5)(torch.ones(5, 7).double())
    after = torch.get_rng_state()
    masked = nn.Sequential(Masked(mask), readout[1])
    of_model, of_readout = exact(model, masked, x, y, energy)
    torch.manual_seed(3)
    found, _ = estimator(model, readout, energy, beta=1e-5, proof=proof).gradients(x, y)
    assert torch.equal(torch.get_rng_state(), after)
    assert distance(of(found, model), of_model) < 1e-4
    assert distance(of(found, readout), of_readout) < 1e-9


class Masked(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, s):
        return s * self.mask


@pytest.mark.parametrize("proof", ["always", "never"])
def test_a_readout_that_writes_to_buffers_is_refused_and_nothing_changes(proof):
    model, _, x, y = build()
    readout = nn.Sequential(nn.BatchNorm1d(7), nn.Linear(7, 3)).double()
    before = copy.deepcopy(readout.state_dict())
    ep = estimator(model, readout, proof=proof)
    with pytest.raises(mep.ArgumentError, match=r"readout.eval\(\)"):
        ep(x, y)
    assert all(torch.equal(v, before[k]) for k, v in readout.state_dict().items())
    assert all(p.grad is None for p in (*model.parameters(), *readout.parameters()))
    readout.eval()
    assert ep(x, y).converged


def test_hooks_fire_once_and_gradients_accumulate():
    model, readout, x, y = build()
    fired = []
    readout.weight.register_hook(lambda g: fired.append(g) or 2 * g)
    ep = estimator(model, readout)
    ep(x, y)
    assert len(fired) == 1
    torch.testing.assert_close(readout.weight.grad, 2 * fired[0])
    ep(x, y)
    torch.testing.assert_close(readout.weight.grad, 4 * fired[0])


@pytest.mark.parametrize("energy", ["hopfield", "prediction"])
def test_a_copied_optimizer_has_a_readout_of_its_own(energy):
    model, readout, x, y = build(energy=energy)
    parameters = [*model.parameters(), *readout.parameters()]
    one = mep.eqprop(parameters, model=model, energy=energy, cost="cross_entropy", readout=readout)
    two = copy.deepcopy(one)
    before = readout.weight.detach().clone()
    two.step(x=x, target=y)
    assert torch.equal(readout.weight, before) and not torch.equal(two.estimator.readout.weight, before)
    one.step(x=x, target=y)
    torch.testing.assert_close(readout.weight, two.estimator.readout.weight)
    one.step(x=x, target=y)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    two.estimator.readout.load_state_dict(readout.state_dict())
    two.model.load_state_dict(model.state_dict())
    one.step(x=x, target=y), two.step(x=x, target=y)
    torch.testing.assert_close(readout.weight, two.estimator.readout.weight)


def test_memory_savers_find_the_same():
    model, readout, x, y = build(energy="prediction")
    relu = nn.Sequential(model[0], nn.ReLU(), model[2], nn.ReLU())
    wanted = estimator(relu, readout, "prediction", beta=1e-3).gradients(x, y)[0]
    found = estimator(relu, readout, "prediction", beta=1e-3, checkpoint=True).gradients(x, y)[0]
    pieces = {}
    for piece in estimator(relu, readout, "prediction", beta=1e-3).iter_gradients(x, y)[0]:
        assert not pieces.keys() & piece.keys()
        pieces |= piece
    for p, g in wanted.items():
        torch.testing.assert_close(found[p], g)
        torch.testing.assert_close(pieces[p], g)
    assert wanted.keys() == found.keys() == pieces.keys() == {*relu.parameters(), *readout.parameters()}


PRESETS = {
    "eqprop": {}, "smep": {}, "smep_fast": {}, "sdmep": {},
    "natural_ep": {"energy": None}, "local_ep": {"energy": None},
    "O1MemoryEPv2": {"adaptive": True, "settle_steps": 1000},
}  # fmt: skip


@pytest.mark.parametrize("energy", ["hopfield", "prediction"])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_train_model_and_readout(name, energy):
    settings = {"energy": energy, **PRESETS[name]}
    if settings["energy"] is None:
        if energy == "hopfield":
            pytest.skip("it has the prediction energy alone")
        del settings["energy"]
    model, readout, x, y = build(energy=energy)
    if name == "local_ep":
        model = nn.Sequential(model[0], nn.ReLU(), model[2], nn.ReLU())
    parameters = [*model.parameters(), *readout.parameters()]
    optimizer = getattr(mep, name)(parameters, model=model, readout=readout, cost="cross_entropy", **settings)
    losses, before = [], [p.detach().clone() for p in parameters]
    for _ in range(15):
        losses.append(float(optimizer.step(x=x, target=y)))
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    assert optimizer.predict(x).shape == (5, 3)
    with pytest.raises(mep.ParameterError, match=r"\[\*model.parameters\(\), \*readout.parameters\(\)\]"):
        getattr(mep, name)(model.parameters(), model=model, readout=readout, cost="cross_entropy", **settings)


def test_groups_and_a_batch_of_one_and_single_precision():
    model, readout, x, y = (
        t.float() if not isinstance(t, torch.Tensor) or t.is_floating_point() else t for t in build()
    )
    groups = [{"params": model.parameters()}, {"params": readout.parameters(), "lr": 0.0}]
    optimizer = mep.eqprop(groups, model=model, readout=readout, energy="hopfield", cost="cross_entropy")
    before = readout.weight.clone()
    optimizer.step(x=x[:1], target=y[:1])
    assert optimizer.last.converged and torch.equal(readout.weight, before)


def test_an_example_that_is_pulled_on_faces_alone_has_no_gradient_and_has_settled():
    model, readout, x, y = build()
    states = mep.EquilibriumPropagation(model, energy="hopfield").predict(x[:1])
    on_a_face = ((states == 0) | (states == 1)).double()
    assert 0 < on_a_face.sum() < 7
    ep = mep.EquilibriumPropagation(model, energy="hopfield", readout=nn.Sequential(Masked(on_a_face), readout))
    found, estimate = ep.gradients(x[:1], y[:1])
    assert estimate.converged and all(not g.any() for g in of(found, model)) and found[readout.bias].any()


def test_a_model_may_change_its_dtype_between_steps():
    model, readout, x, y = build()
    ep = mep.EquilibriumPropagation(model, energy="hopfield", readout=readout)
    for dtype in (torch.float32, torch.float64, torch.float32):
        model.to(dtype), readout.to(dtype)
        found, estimate = ep.gradients(x.to(dtype), y)
        assert estimate.converged and found[readout.weight].dtype == dtype


def test_under_autocast_the_readout_learns():
    model, readout, x, y = (
        t.float() if not isinstance(t, torch.Tensor) or t.is_floating_point() else t for t in build()
    )
    ep = mep.EquilibriumPropagation(model, energy="hopfield", readout=readout, on_unsettled="ignore")
    wanted, _ = ep.gradients(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = ep.gradients(x, y)
    assert distance(of(found, readout), of(wanted, readout)) < 0.05


def test_one_hot_targets_and_functions_stand_behind_a_readout():
    model, readout, x, y = build()
    for cost in ("one_hot_mse", lambda z, y: F.cross_entropy(z, y, reduction="none")):
        ep = mep.EquilibriumPropagation(model, cost, energy="hopfield", readout=readout)
        assert ep(x, y).converged


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"readout": torch.relu}, mep.ArgumentError, "torch.nn.Module"),
        ({"readout": nn.LazyLinear(3)}, mep.TraceError, "`readout`.weight is not initialised"),
        ({"compile": True}, mep.ArgumentError, "readout is not compiled"),
    ],
)
def test_what_cannot_be_a_readout_is_refused_at_once(settings, error, message):
    model, readout, _, _ = build(energy="prediction")
    with pytest.raises(error, match=message):
        mep.EquilibriumPropagation(model, **{"readout": readout, **settings})


@pytest.mark.parametrize(
    ("readout", "message"),
    [
        (nn.Linear(9, 3), r"cannot be applied to the output of the model, .* shape \(5, 7\)"),
        (nn.Linear(7, 3).float(), "cannot be applied"),
        (nn.Flatten(0), "5 rows"),
    ],
)
@pytest.mark.parametrize("proof", ["always", "never"])
def test_a_readout_that_does_not_fit_is_refused(readout, message, proof):
    model, _, x, y = build()
    readout = readout if "rows" in message or readout.in_features == 7 else readout.double()
    with pytest.raises(mep.InputError, match=message):
        mep.EquilibriumPropagation(model, energy="hopfield", readout=readout, proof=proof)(x, y)


def test_a_penalty_inside_the_cost_is_refused_not_dropped():
    """Behind a readout the cost is not recorded with the model, so what it reads of that has no gradient."""
    model, readout, x, y = build()
    cost = lambda z, y: F.cross_entropy(z, y, reduction="none") + model[0].weight.square().sum()  # noqa: E731
    with pytest.raises(mep.TraceError, match=r"0\.weight"):
        mep.EquilibriumPropagation(model, cost, energy="hopfield", readout=readout)(x, y)


def test_a_hopfield_network_learns_behind_a_readout():
    torch.manual_seed(1)
    model, readout = mlp(hard_sigmoid, 8, 32, 16, 1)[:-1], nn.Linear(16, 3)
    x = torch.rand(64, 8)
    y = x[:, :3].argmax(1)
    parameters = [*model.parameters(), *readout.parameters()]
    optimizer = mep.eqprop(
        parameters, model=model, energy="hopfield", cost="cross_entropy", readout=readout, lr=0.02, momentum=0.5
    )
    for _ in range(300):
        optimizer.step(x=x, target=y)
    assert optimizer.last.converged and optimizer.predict(x).argmax(1).eq(y).float().mean() > 0.9


def test_a_readout_is_refused_with_complex_phases():
    body = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5), nn.Hardtanh(0, 1))
    with pytest.raises(mep.ArgumentError, match="readout"):
        mep.EquilibriumPropagation(body, "cross_entropy", readout=nn.Linear(5, 3), phases="holomorphic")
