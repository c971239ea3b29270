"""A beta that is named is used, for every example and in every phase; one that is left open follows one formula.

    beta = largest / max(1, k L),   k = sum_n |A_n^T x|^2 / |x|^2,   A_n = ds_out/ds_n,   x = dC/ds_out

and in affine networks `|M x| / |x|` in place of k, M = sum_n A_n A_n^T. Both are computed here by autograd through the
whole model. What happens to examples that do not settle is said by `on_unsettled`.
"""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import COSTS, mlp, settled
from equilibria import distance
from reference import backprop
from torch import nn

import mep
import mep.cost
from mep.errors import ArgumentError, NotConvergedError, NotConvergedWarning, RemovedArgumentError

PRESETS = {
    "eqprop": mep.eqprop,
    "smep": mep.smep,
    "smep_fast": mep.smep_fast,
    "sdmep": mep.sdmep,
    "O1MemoryEPv2": mep.O1MemoryEPv2,
    "natural_ep": mep.natural_ep,
    "local_ep": mep.local_ep,
}
SOLVERS = {"sweep": mep.Sweep(), "descent": mep.Descent(200, adaptive=True, settle_lr=None)}
NEVER = 1e-18
"""A tolerance that nothing settles to."""


class Residual(nn.Module):
    """Blocks with a layer norm: its weights are a node of its own."""

    def __init__(self, activation, width=8, blocks=3):
        super().__init__()
        self.first, self.last, self.activation = nn.Linear(5, width), nn.Linear(width, 4), activation
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))

    def forward(self, x):
        h = self.first(x)
        for norm, layer in zip(self.norms, self.inner, strict=True):
            h = h + layer(self.activation(norm(h)))
        return self.last(h)


def scaled(model, factor):
    """With its matrices so many times as large: errors grow on their way back."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p *= factor
    return model


AFFINE = {
    "linear": lambda: nn.Linear(5, 4),
    "relu": lambda: scaled(mlp(nn.ReLU, 5, 8, 8, 4), 3),
    "deep relu": lambda: scaled(mlp(nn.LeakyReLU, 5, *10 * [8], 4), 2),
}
GENERAL = {
    "tanh": lambda: scaled(mlp(nn.Tanh, 5, 8, 8, 4), 3),
    "deep gelu": lambda: scaled(mlp(nn.GELU, 5, *10 * [8], 4), 2.5),
    "residual": lambda: scaled(Residual(F.relu), 2),
}


def deep():
    """20 layers, by Kaiming He's initialisation."""
    model = mlp(nn.GELU, 5, *19 * [64], 4)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return model


ORDINARY = {
    "relu": lambda: mlp(nn.ReLU, 5, 24, 24, 4),
    "tanh": lambda: mlp(nn.Tanh, 5, 24, 24, 4),
    "deep": deep,
    "residual": lambda: Residual(F.relu, 24, 8),
    "strong relu": AFFINE["relu"],
    "strong deep relu": AFFINE["deep relu"],
    "strong tanh": GENERAL["tanh"],
    "strong residual": GENERAL["residual"],
}


def instance(make, cost="mse", batch=8, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    model, x = make().to(dtype), torch.randn(batch, 5, dtype=dtype)
    with torch.no_grad():
        return model, x, COSTS[cost].target(model(x))


def responses(model, x, value):
    """The output, x = dC/ds_out, and zeros that are added to what each module with parameters returns."""
    shifts, handles = [], []

    def add(module, args, output):
        shifts.append(torch.zeros_like(output).requires_grad_())
        return output + shifts[-1]

    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            handles.append(module.register_forward_hook(add))
    output = model(x)
    for handle in handles:
        handle.remove()
    (error,) = torch.autograd.grad(value(output).sum(), output, retain_graph=True)
    return output, error, shifts


def squares(t):
    return t.flatten(1).square().sum(1)


def gains(model, x, value):
    """`sum_n |A_n^T x|^2` and `|x|^2` of every example."""
    output, error, shifts = responses(model, x, value)
    pulled = torch.autograd.grad(output, shifts, error)
    return torch.stack([squares(t) for t in pulled]).sum(0), squares(error)


def amplifications(model, x, value_of_row):
    """`|M x| / |x|` of every example, with M of dense Jacobians."""
    found = []
    for i in range(len(x)):
        output, error, shifts = responses(model, x[i : i + 1], value_of_row(i))
        rows = [torch.autograd.grad(s, shifts, retain_graph=True) for s in output[0]]
        jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        found.append((jacobian @ jacobian.T @ error[0]).norm() / error.norm())
    return torch.stack(found)


def chosen(k, smoothness, largest=0.01):
    return largest / (k * smoothness).clamp(min=1)


SMOOTHNESS = {"cross_entropy": 0.5, "mse": 2 / 4}


# As it is named.


class Watched(mep.Sweep):
    """Sweeps that note the beta of each energy that they are given."""

    seen: list = []  # noqa: RUF012

    def init(self, energy, point, start):
        self.seen.append(energy.beta)
        return super().init(energy, point, start)


@pytest.mark.parametrize("beta", [1e-3, 0.3, 2.0])
@pytest.mark.parametrize(("phases", "multiples"), [("one-sided", [1]), ("centered", [-1, 1])])
def test_every_phase_is_settled_at_its_multiple_of_the_named_beta(phases, multiples, beta):
    model, x, target = instance(lambda: scaled(mlp(nn.Tanh, 5, 8, 8, 4), 3))
    Watched.seen.clear()
    ep = mep.EquilibriumPropagation(model, "mse", beta, Watched(), phases=phases, on_unsettled="ignore")
    try:
        estimate = ep(x, target)
    except mep.DivergedError:  # away from the target
        assert phases == "centered"
        assert beta > 1
        assert Watched.seen == [-beta]
        return
    assert Watched.seen == [multiple * beta for multiple in multiples]
    assert estimate.betas.tolist() == 8 * [beta]
    assert estimate.beta == estimate.median_beta == beta
    assert ep.beta == beta


@pytest.mark.parametrize("beta", [1e-3, 0.03, 0.7])
@pytest.mark.parametrize("phases", ["one-sided", "centered"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_uses_the_named_beta_for_every_example(name, phases, beta):
    """Step after step, whether all examples settle or not."""
    model, x, target = instance(lambda: scaled(mlp(nn.ReLU, 5, 8, 8, 4), 3), "cross_entropy", dtype=torch.float32)
    opt = PRESETS[name](model.parameters(), model, beta=beta, phases=phases, on_unsettled="ignore")
    for _ in range(3):
        opt.step(x=x, target=target)
        assert opt.last.betas.tolist() == 8 * [beta]
        assert opt.last.beta == beta


@pytest.mark.parametrize("energy", ["prediction", "hopfield"])
def test_descent_uses_the_named_beta(energy):
    model, x, target = instance(lambda: mlp(lambda: nn.Hardtanh(0.0, 1.0), 5, 8, 4))
    for solver in (mep.Descent(5), mep.Descent(500, adaptive=True)):
        ep = mep.EquilibriumPropagation(model, "mse", 0.3, solver, energy, on_unsettled="ignore")
        assert ep(x, target).betas.tolist() == 8 * [0.3]


# As it is chosen.


@pytest.mark.parametrize("cost", SMOOTHNESS)
@pytest.mark.parametrize("name", AFFINE)
def test_in_an_affine_network_the_response_limits_the_chosen_beta(name, cost):
    model, x, target = instance(AFFINE[name], cost)
    value = COSTS[cost].value
    expected = chosen(
        amplifications(model, x, lambda i: lambda output: value(output, target[i : i + 1])), SMOOTHNESS[cost]
    )
    for solver, phases in ((mep.Sweep(), "one-sided"), (mep.Sweep(tol=0.3), "centered")):
        ep = mep.EquilibriumPropagation(model, COSTS[cost].argument, None, solver, phases=phases)
        estimate = ep(x, target)
        torch.testing.assert_close(estimate.betas, expected, rtol=1e-9, atol=0)
        assert ep.beta is None
        assert estimate.beta == float(estimate.betas.min())
    assert name == "linear" or bool((expected < 0.01).any())


@pytest.mark.parametrize("cost", SMOOTHNESS)
@pytest.mark.parametrize("name", GENERAL)
def test_elsewhere_the_gain_limits_the_chosen_beta(name, cost):
    model, x, target = instance(GENERAL[name], cost)
    pulled, size = gains(model, x, lambda output: COSTS[cost].value(output, target))
    expected = chosen(pulled / size, SMOOTHNESS[cost], 0.0002)
    for solver in (mep.Sweep(), mep.Local()):
        ep = mep.EquilibriumPropagation(model, COSTS[cost].argument, None, solver, on_unsettled="ignore")
        torch.testing.assert_close(ep(x, target).betas, expected, rtol=1e-9, atol=0)
    assert bool((expected < 0.0002).any())


def steep(width=8):
    """Layer normalisation of small numbers: its Jacobian is large, and changes as soon as a state moves."""
    first = nn.Linear(5, width)
    with torch.no_grad():
        first.weight.mul_(0.02), first.bias.zero_()
    return nn.Sequential(first, nn.LayerNorm(width), nn.GELU(), nn.Linear(width, 4))


def test_the_gradient_at_a_chosen_beta_is_backpropagation_s_to_a_few_hundredths():
    """Where Jacobians move much: the input of a norm is small."""
    model, x, target = instance(steep)
    loss = nn.functional.mse_loss(model(x), target)
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    found, _ = mep.EquilibriumPropagation(model, "mse").gradients(x, target)
    off = torch.cat([found[p].flatten() for p in model.parameters()]) - exact
    assert off.norm() < 0.025 * exact.norm()


def test_the_gain_is_at_most_the_response():
    """`<x, M x> / <x, x> <= |M x| / |x|`: the affine rule is never the weaker one."""
    for make in AFFINE.values():
        model, x, target = instance(make)
        pulled, size = gains(model, x, lambda output, target=target: COSTS["mse"].value(output, target))
        value = lambda i, target=target: lambda output: COSTS["mse"].value(output, target[i : i + 1])  # noqa: E731
        assert (pulled / size <= amplifications(model, x, value) * (1 + 1e-12)).all()


@pytest.mark.parametrize("name", ["tanh", "residual"])
def test_descent_chooses_at_most_a_tenth(name):
    model, x, target = instance(GENERAL[name])
    pulled, size = gains(model, x, lambda output: COSTS["mse"].value(output, target))
    solver = mep.Descent(5)
    estimate = mep.EquilibriumPropagation(model, "mse", None, solver)(x, target)
    torch.testing.assert_close(estimate.betas, chosen(pulled / size, 0.5, 0.1), rtol=1e-9, atol=0)


def test_hopfield_networks_choose_at_most_a_tenth():
    model, x, target = instance(lambda: mlp(lambda: nn.Hardtanh(0.0, 1.0), 5, 8, 4))
    estimate = mep.EquilibriumPropagation(model, "mse", energy="hopfield")(x, target)
    assert estimate.betas.shape == (8,)
    assert ((estimate.betas > 0) & (estimate.betas <= 0.1)).all()


def test_examples_that_batch_norm_couples_have_one_beta():
    """From the gain of all together, `sum |A^T x|^2 / sum |x|^2`."""
    model, x, target = instance(
        lambda: scaled(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4)), 3)
    )
    pulled, size = gains(model, x, lambda output: COSTS["mse"].value(output, target))
    expected = chosen(pulled.sum() / size.sum(), 0.5, 0.0002)
    estimate = mep.EquilibriumPropagation(model, "mse")(x, target)
    assert float(expected) < 0.0002
    torch.testing.assert_close(estimate.betas, expected.expand(8), rtol=1e-9, atol=0)


@pytest.mark.parametrize("curvature", [0.3, 3.0, 50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_the_smoothness_of_a_cost_without_a_name_is_measured(name, dtype, curvature):
    """Within a tenth, for a quadratic."""
    model, x, target = instance((AFFINE | GENERAL)[name], dtype=dtype)

    def value(output, target=target):
        return 0.5 * curvature * (output - target).square().sum(1)

    estimate = mep.EquilibriumPropagation(model, value)(x, target)
    if name == "relu":
        k = amplifications(model, x, lambda i: lambda output: value(output, target[i : i + 1]))
    else:
        pulled, size = gains(model, x, value)
        k = pulled / size
    largest = 0.01 if name == "relu" else 0.0002
    assert (chosen(k, curvature) < 0.01).any()
    torch.testing.assert_close(estimate.betas.to(dtype), chosen(k, curvature, largest), rtol=0.1, atol=0)


def test_the_smoothness_of_a_cost_that_is_curved_differently_is_that_along_the_first_error():
    """`|H x| / |x|` for a quadratic with the Hessian H."""
    model, x, target = instance(GENERAL["tanh"])
    curvatures = torch.tensor([0.5, 1.0, 4.0, 20.0]).double()

    def value(output, target):
        return 0.5 * (curvatures * (output - target).square()).sum(1)

    pulled, size = gains(model, x, lambda output: value(output, target))
    error = curvatures * (model(x).detach() - target)
    along = (curvatures * error).norm(dim=1) / error.norm(dim=1)
    estimate = mep.EquilibriumPropagation(model, value)(x, target)
    torch.testing.assert_close(estimate.betas, chosen(pulled / size, along, 0.0002), rtol=0.1, atol=0)


def test_an_example_at_its_target_does_not_keep_the_others_from_theirs():
    """Its error is zero, and so are its gain and what is measured along it."""
    for cost in ("mse", lambda output, target: (output - target).square().sum(1)):
        model, x, target = instance(GENERAL["tanh"])
        with torch.no_grad():
            target[0] = model(x)[0]
        ep = mep.EquilibriumPropagation(model, cost)
        estimate, others = ep(x, target), ep(x[1:], target[1:])
        assert estimate.converged
        assert 0 < float(estimate.betas[0]) <= 0.01
        torch.testing.assert_close(estimate.betas[1:], others.betas, rtol=1e-9, atol=0)


@pytest.mark.parametrize("phases", ["one-sided", "centered"])
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("name", ORDINARY)
def test_the_chosen_beta_keeps_the_gradient_near_that_of_backprop(name, cost, phases):
    for seed in range(3):
        model, x, target = instance(ORDINARY[name], cost, seed=seed)
        exact = backprop(model, COSTS[cost].value(model(x), target).mean())
        ep = mep.EquilibriumPropagation(model, COSTS[cost].argument, phases=phases)
        gradients, estimate = ep.gradients(x, target)
        assert estimate.converged
        assert distance(model, gradients, exact) < 0.06


# What is reported.


@pytest.mark.parametrize("phases", ["one-sided", "centered"])
def test_an_estimate_reports_of_every_example_whether_it_settled_and_when(phases):
    """The same as of that example alone; the worse of the two phases."""
    model, x, target = instance(lambda: scaled(mlp(nn.Tanh, 5, 8, 8, 4), 3))
    solver, beta = mep.Sweep(3), 0.1
    ep = mep.EquilibriumPropagation(model, "mse", beta, solver, phases=phases, on_unsettled="ignore")
    estimate = ep(x, target)
    assert estimate.tol == solver.tol
    assert 0 < int(estimate.settled.sum()) < 8
    assert estimate.settled.tolist() == (estimate.residual <= solver.tol).tolist()
    assert estimate.iterations == int(estimate.counts.max())
    assert not estimate.converged
    for i in range(8):
        alone = ep(x[i : i + 1], target[i : i + 1])
        assert alone.counts.tolist() == [int(estimate.counts[i])]
        assert alone.settled.tolist() == [bool(estimate.settled[i])]
        assert alone.converged is bool(estimate.settled[i])
        torch.testing.assert_close(alone.residual[0], estimate.residual[i], rtol=1e-6, atol=1e-10)


def test_of_two_phases_the_worse_is_reported_for_each_example():
    model, x, target = instance(lambda: scaled(mlp(nn.Tanh, 5, 8, 8, 4), 3))
    solver, beta = mep.Sweep(30), 0.1
    ep = mep.EquilibriumPropagation(model, "mse", beta, solver, phases="centered", on_unsettled="ignore")
    estimate = ep(x, target)
    away, toward = (settled(model, x, target, "mse", sign * beta, solver)[1] for sign in (-1, 1))
    assert (away.counts > toward.counts).any()
    assert (away.counts < toward.counts).any()
    assert torch.equal(estimate.counts, torch.maximum(away.counts, toward.counts))
    assert torch.equal(estimate.residual, torch.maximum(away.residual, toward.residual))


@pytest.mark.parametrize("name", SOLVERS)
def test_counts_stop_where_an_example_has_settled(name):
    """One more iteration than it takes to be above the tolerance, each example by itself."""
    model, x, target = instance(lambda: mlp(nn.Tanh, 5, 8, 4))
    x = x * torch.logspace(-1, 1, 8).double()[:, None]
    solver = SOLVERS[name]
    estimate = mep.EquilibriumPropagation(model, "mse", 1.0, solver)(x, target)
    assert estimate.converged
    assert estimate.counts.shape == (8,)
    most = int(estimate.counts.max())
    cut = copy.copy(solver)
    object.__setattr__(cut, "settle_steps", most - 1)
    before = mep.EquilibriumPropagation(model, "mse", 1.0, cut, on_unsettled="ignore")(x, target)
    assert before.settled.tolist() == (estimate.counts < most).tolist()


# What does not settle.


def unsettled(on_unsettled, **settings):
    model, x, target = instance(lambda: mlp(nn.Tanh, 5, 8, 4))
    solver = settings.pop("solver", mep.Sweep(1, tol=NEVER))
    return mep.EquilibriumPropagation(model, "mse", 1.0, solver, on_unsettled=on_unsettled, **settings), x, target


def test_a_warning_is_given_once_where_the_step_was_made():
    ep, x, target = unsettled("warn")
    with pytest.warns(NotConvergedWarning, match="beta=None") as caught:
        estimate = ep(x, target)
    assert [w.filename for w in caught] == [__file__]
    assert not estimate.converged
    assert all(p.grad is not None for p in ep.model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ep(x, target)


def test_it_is_given_by_the_step_of_an_optimizer_too():
    model, x, target = instance(lambda: mlp(nn.Tanh, 5, 8, 4))
    opt = mep.eqprop(model.parameters(), model, cost="mse", beta=1.0, settle_steps=1, tol=NEVER)
    with pytest.warns(NotConvergedWarning) as caught:
        opt.step(x=x, target=target)
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(x=x, target=target)


def test_nothing_is_said_where_all_have_settled_or_the_steps_are_fixed():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for solver in (mep.Sweep(), mep.Sweep(1, tol=NEVER, adaptive=False), mep.Descent(3)):
            ep, x, target = unsettled("warn", solver=solver)
            ep(x, target)


def test_ignored_is_the_same_estimate_without_a_word():
    loud, x, target = unsettled("warn")
    quiet, _, _ = unsettled("ignore")
    with pytest.warns(NotConvergedWarning):
        expected, reported = loud.gradients(x, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, estimate = quiet.gradients(x, target)
    for a, b in zip(found.values(), expected.values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(estimate.residual, reported.residual)


class Noisy(nn.Module):
    """With running statistics, and random numbers."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(F.dropout(self.norm(self.first(x)).tanh(), 0.3, self.training))


@pytest.mark.parametrize("name", PRESETS)
def test_raising_leaves_everything_as_it_was(name):
    model, x, target = instance(Noisy, "cross_entropy")
    settings = {"settle_lr": 0.1, "adaptive": True} if name == "O1MemoryEPv2" else {}
    opt = PRESETS[name](model.parameters(), model, beta=1.0, tol=NEVER, on_unsettled="raise", **settings)
    before, noise = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(NotConvergedError, match="beta"):
        opt.step(x=x, target=target)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert torch.equal(torch.get_rng_state(), noise)
    assert all(p.grad is None for p in model.parameters())
    assert not opt.state


def test_raising_says_how_many_and_what_to_do():
    ep, x, target = unsettled("raise")
    with pytest.raises(NotConvergedError, match=r"8 of 8 examples.*Nothing was changed") as error:
        ep(x, target)
    assert isinstance(error.value, mep.MepError)
    assert all(p.grad is None for p in ep.model.parameters())


def test_what_to_do_is_one_of_three():
    with pytest.raises(ArgumentError, match="on_unsettled='stop'"):
        unsettled("stop")


# What is gone.


@pytest.mark.parametrize("argument", ["history", "strength"])
def test_arguments_of_sweeps_that_are_gone_raise_with_the_new_way(argument):
    with pytest.raises(RemovedArgumentError, match=rf"Sweep\({argument}=\.\.\.\) is gone\. \w+") as error:
        mep.Sweep(**{argument: 0})
    assert isinstance(error.value, ArgumentError)
    assert isinstance(error.value, TypeError)


@pytest.mark.parametrize("name", ["eqprop", "smep", "smep_fast", "sdmep", "natural_ep"])
def test_strength_is_gone_from_the_presets(name):
    model = nn.Linear(5, 4)
    with pytest.raises(RemovedArgumentError, match=rf"{name}\(strength=\.\.\.\) is gone.*beta=None"):
        PRESETS[name](model.parameters(), model, strength=0.5)


@pytest.mark.parametrize("kind", ["labels", "probabilities", "any sum", "positions", "mse"])
def test_no_hessian_of_a_cost_is_steeper_than_its_smoothness(kind):
    torch.manual_seed(0)
    for expand_beta in (0.1, 1.0, 5.0):
        output = expand_beta * torch.randn(6, 4, *([3] if kind == "positions" else [])).double()
        target = {
            "labels": torch.randint(4, (6,)),
            "probabilities": torch.rand(6, 4).double().softmax(1),
            "any sum": 3 * torch.rand(6, 4).double(),
            "positions": torch.randint(4, (6, 3)),
            "mse": torch.randn(6, 4).double(),
        }[kind]
        make = mep.cost.make_cost("mse" if kind == "mse" else "cross_entropy")
        cost = make(output, target)
        hessian = torch.autograd.functional.hessian(lambda s, cost=cost: cost.value(s).sum(), output)
        steepest = torch.linalg.eigvalsh(hessian.reshape(output.numel(), -1)).max()
        assert float(steepest) <= float(cost.smoothness) * (1 + 1e-9)


class Plain(mep.cost.BatchCost):
    """A cost of one's own, with what a cost must have and no more."""

    def __init__(self, output, target):
        self.target = target

    def value(self, output):
        return 0.5 * (output - self.target).square().sum(1)

    def gradient(self, output):
        return output - self.target


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_a_cost_that_cannot_be_narrowed_settles_all_the_same(activation):
    torch.manual_seed(0)
    model, x, y = mlp(activation, 5, 8, 4).double(), 3 * torch.randn(12, 5).double(), torch.randn(12, 4).double()
    found, estimate = mep.EquilibriumPropagation(model, Plain, 1.0, mep.Sweep(tol=1e-9)).gradients(x, y)
    exact, _ = mep.EquilibriumPropagation(
        model, lambda s, t: 0.5 * (s - t).square().sum(1), 1.0, mep.Sweep(tol=1e-9)
    ).gradients(x, y)
    assert estimate.converged and estimate.counts.min() < estimate.counts.max()
    assert distance(model, found, exact) < 1e-7


@pytest.mark.parametrize("phases", ["one-sided", "centered"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
@pytest.mark.parametrize("coupled", [False, True])
def test_a_cost_more_curved_here_than_far_away_gets_a_beta_for_its_curvature_here(phases, activation, coupled):
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(8) if coupled else nn.Identity()
    model = nn.Sequential(nn.Linear(6, 8), norm, activation(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        model[3].weight.mul_(4)
    x, y = torch.randn(7, 6).double(), torch.randn(7, 3).double()

    def cost(output, target):
        return (3 * (output - target)).exp().sum(1)

    gradients, estimate = mep.EquilibriumPropagation(model, cost, phases=phases).gradients(x, y)
    wanted = torch.autograd.grad(cost(model(x), y).mean(), list(model.parameters()))
    found = torch.cat([gradients[p].flatten() for p in model.parameters()])
    exact = torch.cat([g.flatten() for g in wanted])
    assert estimate.converged and (found - exact).norm() < 0.06 * exact.norm()


def test_a_cost_whose_gradient_jumps_at_the_output_gets_a_beta_above_zero():
    model = nn.Linear(4, 2)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    quantile = lambda output, target: torch.maximum(0.9 * (target - output), 0.1 * (output - target)).sum(1)  # noqa: E731
    ep = mep.EquilibriumPropagation(model, quantile, on_unsettled="ignore")
    gradients, estimate = ep.gradients(torch.ones(3, 4), torch.zeros(3, 2))
    assert (estimate.betas > 0).all() and all(g.isfinite().all() for g in gradients.values())
