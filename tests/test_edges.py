"""Edges of Hopfield networks and estimators: recording, groups in pieces, wrong batches, clamped values, few digits."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from test_groups import network as network_with_group
from torch import nn

import mep


def sigmoidal(*sizes, scale=1.0, activation=lambda: nn.Hardtanh(0, 1), dtype=torch.float64):
    torch.manual_seed(0)
    layers = [module for m, n in itertools.pairwise(sizes) for module in (nn.Linear(m, n), activation())][:-1]
    model = nn.Sequential(*layers).to(dtype)
    for p in model.parameters():
        p.data.mul_(scale)
    return model


# Groups of nodes, node by node.


def test_low_memory_trains_the_parameters_of_groups_and_those_that_they_share_with_nodes():
    moved = []
    for low_memory in (False, True):
        net, lateral, x, y = network_with_group()
        lateral.weight.data.normal_(0, 0.1)
        solver = mep.Descent(2000, 1e-8, adaptive=True, settle_lr=0.2)
        ep = mep.EquilibriumPropagation(net, "cross_entropy", 0.05, solver, groups=[lateral])
        parameters = [*net.parameters(), *lateral.parameters()]
        before = [p.detach().clone() for p in parameters]
        opt = mep.EPOptimizer(ep, torch.optim.SGD(parameters, lr=0.1), low_memory=low_memory)
        opt.step(x=x, target=y)
        moved.append([p.detach() - q for p, q in zip(parameters, before, strict=True)])
    for whole, in_pieces in zip(*moved, strict=True):
        assert whole.norm() > 1e-6
        torch.testing.assert_close(in_pieces, whole)


def test_gradients_in_pieces_are_all_gradients():
    net, lateral, x, y = network_with_group()
    ep = mep.EquilibriumPropagation(net, solver=mep.Descent(200, settle_lr=0.2), beta=0.1, groups=[lateral])
    pieces, _ = ep.iter_gradients(x, y)
    found = {p: g for piece in pieces for p, g in piece.items()}
    expected, _ = ep.gradients(x, y)
    assert found.keys() == expected.keys() and lateral.weight in found
    for p, g in expected.items():
        torch.testing.assert_close(found[p], g)


# Recording.


@pytest.mark.parametrize("phases", ["one-sided", "centered", "holomorphic"])
@pytest.mark.parametrize("scale", [1.0, 1.8, 2.2, 3.0])
def test_recording_changes_nothing_however_strong_the_coupling(scale, phases):
    model = sigmoidal(8, 16, 16, 4, scale=scale, activation=lambda: nn.Hardtanh(-1, 1))
    x, y = torch.rand(8, 8).double(), torch.randint(4, (8,))
    seen = []
    for record in (False, True):
        ep = mep.EquilibriumPropagation(
            model, "one_hot_mse", 0.1, energy="hopfield", phases=phases, on_unsettled="ignore"
        )
        seen.append((ep, ep.settle(x, y, record=record)))
    (one, plain), (other, recorded) = seen
    a, b = plain.estimate, recorded.estimate
    assert (a.result, a.iterations, a.coupling, a.inside) == (b.result, b.iterations, b.coupling, b.inside)
    assert torch.equal(a.residual, b.residual) and torch.equal(a.counts, b.counts)
    for name, s in plain.nudged.states.items():
        assert torch.equal(s, recorded.nudged.states[name])
    memories = [{k: v for k, v in vars(ep.solver.memory).items() if k != "_model"} for ep in (one, other)]
    assert memories[0] == memories[1] and memories[0]["batches"] == 0
    assert len(recorded.nudged.course) > 1


# Batches that do not fit.


class Viewed(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.two(self.one(x.view(-1, 12)).clamp(0, 1))


def convolution():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Hardtanh(0, 1), nn.Flatten(), nn.Linear(96, 3))


WRONG = {
    "a feature too many": (lambda: sigmoidal(6, 8, 3, dtype=torch.float32), (5, 6), lambda x: torch.rand(5, 7)),
    "a feature too few": (lambda: sigmoidal(6, 8, 3, dtype=torch.float32), (5, 6), lambda x: x[:, 1:]),
    "transposed": (lambda: sigmoidal(6, 8, 3, dtype=torch.float32), (5, 6), lambda x: x.T),
    "no batch": (lambda: sigmoidal(6, 8, 3, dtype=torch.float32), (5, 6), lambda x: x[0]),
    "double": (lambda: sigmoidal(6, 8, 3, dtype=torch.float32), (5, 6), lambda x: x.double()),
    "integers": (lambda: sigmoidal(6, 8, 3, dtype=torch.float32), (5, 6), lambda x: x.long()),
    "complex": (lambda: sigmoidal(6, 8, 3, dtype=torch.float32), (5, 6), lambda x: x.to(torch.complex64)),
    "two inputs": (lambda: sigmoidal(6, 8, 3, dtype=torch.float32), (5, 6), lambda x: (x, x)),
    "another name": (lambda: sigmoidal(6, 8, 3, dtype=torch.float32), (5, 6), lambda x: {"pixels": x}),
    "numpy": (lambda: sigmoidal(6, 8, 3, dtype=torch.float32), (5, 6), lambda x: x.numpy()),
    "image, no batch": (convolution, (5, 1, 6, 8), lambda x: x[0]),
    "image, no channel": (convolution, (5, 1, 6, 8), lambda x: x[:, 0]),
    "image, channels last": (convolution, (5, 1, 6, 8), lambda x: x.permute(0, 2, 3, 1)),
    "image, larger": (convolution, (5, 1, 6, 8), lambda x: torch.rand(5, 1, 7, 8)),
    "image, bytes": (convolution, (5, 1, 6, 8), lambda x: x.byte()),
    "view, no batch": (Viewed, (5, 3, 4), lambda x: x[0]),
    "view, larger": (Viewed, (5, 3, 4), lambda x: torch.rand(5, 3, 5)),
}


@pytest.mark.parametrize("energy", ["hopfield", "prediction"])
@pytest.mark.parametrize("name", WRONG)
def test_a_batch_that_does_not_fit_is_an_input_error_that_changes_nothing(name, energy):
    make, shape, spoil = WRONG[name]
    torch.manual_seed(0)
    model, x, y = make(), torch.rand(shape), torch.tensor([0, 1, 2, 0, 1])
    opt = mep.eqprop(model.parameters(), model=model, energy=energy, cost="one_hot_mse")
    wrong = spoil(x)
    for is_known in (False, True):
        before, noise = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        for attempt in (
            lambda: opt.step(x=wrong, target=y),
            lambda: opt.estimator(wrong, y),
            lambda: opt.estimator.settle(wrong, y),
            lambda: opt.predict(wrong),
        ):
            with pytest.raises(mep.errors.InputError) as caught:
                attempt()
            message = str(caught.value)
            assert "whole" not in message
            if (
                isinstance(wrong, torch.Tensor)
                and "cannot be applied" in message
                and "mat1 and mat2 must" not in message
            ):
                assert str(tuple(wrong.shape)) in message and str(wrong.dtype) in message
                assert (f"(batch, {', '.join(map(str, shape[1:]))}" in message) == is_known
        assert torch.equal(noise, torch.get_rng_state())
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        opt.step(x=x, target=y)


def test_a_model_that_cannot_be_read_is_still_a_trace_error():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(4, 3)

        def forward(self, x):
            h = self.one(x)
            return h if h.sum() > 0 else -h

    with pytest.raises(mep.TraceError):
        mep.trace(Branching(), torch.randn(5, 4))


@pytest.mark.parametrize("cost", ["one_hot_mse", "mse", "cross_entropy"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda y: y[:4], lambda y: y + 1, lambda y: y - 1, lambda y: y[:, None], lambda y: F.one_hot(y, 4).float(),
        lambda y: F.one_hot(y, 3).float().T, lambda y: torch.tensor(1), lambda y: y.float(), lambda y: y.numpy(),
        lambda y: F.one_hot(y, 3).to(torch.complex64),
    ],
)  # fmt: skip
def test_a_target_that_does_not_fit_is_refused_in_the_name_of_its_cost(cost, spoil):
    model, y = sigmoidal(6, 8, 3, dtype=torch.float32), torch.tensor([0, 1, 2, 0, 1])
    ep, target = mep.EquilibriumPropagation(model, cost, energy="hopfield"), spoil(y)
    with pytest.raises(mep.errors.InputError, match="target must be a tensor" if not torch.is_tensor(target) else cost):
        ep(torch.rand(5, 6), target)


# What may be clamped.


ACTIVATIONS = {
    "softplus": (nn.Softplus, (0.0, 3.0), (-0.1,)),
    "sigmoid": (nn.Sigmoid, (0.0, 1.0), (-0.1, 1.1)),
    "tanh": (nn.Tanh, (-1.0, 1.0), (-1.1, 2.0)),
    "relu": (nn.ReLU, (0.0, 3.0), (-0.1,)),
    "hardtanh": (lambda: nn.Hardtanh(0, 2), (0.0, 2.0), (-0.1, 2.1)),
    "hardsigmoid": (nn.Hardsigmoid, (0.0, 1.0), (-0.1, 1.1)),
    "softmax": (lambda: nn.Softmax(1), (0.0,), (-0.1, 1.1)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_clamped_states_have_an_energy_or_are_refused(name):
    activation, allowed, refused = ACTIVATIONS[name]
    ep = mep.EquilibriumPropagation(sigmoidal(6, 8, 3, scale=0.5, activation=activation), energy="hopfield")
    x = torch.rand(5, 6).double()
    for value in allowed:
        states = torch.full((5, 8), value).double()
        if name == "softmax":
            states[:, 2] = 1
        found = ep.relax({"input": x, "0": states})
        assert torch.isfinite(found.energy).all() and found.converged
    for value in refused:
        states = torch.full((5, 8), value).double()
        with pytest.raises(mep.errors.InputError, match=r"'0'.*lie in"):
            ep.relax({"input": x, "0": states})
        inside = torch.full((8,), False)  # nothing is held: any value will do
        assert ep.relax({"input": x, "0": states}, held={"0": inside}).converged
    if name == "softmax":
        half = torch.arange(8) < 4
        with pytest.raises(mep.errors.InputError, match="all of them, or none"):
            ep.relax({"input": x, "0": torch.full((5, 8), 1 / 8).double()}, held={"0": half})
        with pytest.raises(mep.errors.InputError, match="sum to 1"):
            ep.relax({"input": x, "0": torch.full((5, 8), 0.5).double()})


def test_a_mask_that_holds_all_is_as_none():
    ep = mep.EquilibriumPropagation(sigmoidal(6, 8, 3, scale=0.5), energy="hopfield")
    x, label, every = torch.rand(3, 6).double(), torch.eye(3).double(), torch.ones(6, dtype=torch.bool)
    expected = ep.relax({"input": x, "output": label})
    for settings in ({}, {"box": (0, 1)}, {"box": {"input": (0, 1)}}):
        found = ep.relax({"input": x, "output": label}, held={"input": every}, **settings)
        for name in ("input", "0", "output"):
            assert torch.equal(found[name], expected[name])
        assert torch.equal(found.energy, expected.energy)
    with pytest.raises(mep.ArgumentError, match="all are held"):
        ep.relax({"input": x, "output": label}, box=(0, 1))
    with pytest.raises(mep.ArgumentError, match="needs a box"):
        ep.relax({"input": x, "output": label}, held={"input": every & (torch.arange(6) < 5)})


def test_what_relax_is_given_has_a_shape_and_a_dtype():
    ep = mep.EquilibriumPropagation(sigmoidal(6, 8, 3, dtype=torch.float32), "mse", energy="hopfield")
    ep.predict(torch.rand(2, 6))
    for clamp, words in (
        ({"input": torch.rand(5, 7)}, r"\(5, 7\).*\(batch, 6\)"),
        ({"input": torch.rand(6)}, r"\(6,\).*x\[None\]"),
        ({"input": torch.rand(5, 6).double()}, "dtype"),
        ({"input": torch.rand(5, 6).to(torch.complex64)}, "real"),
        ({"input": torch.rand(5, 6), "output": torch.rand(5, 3).to(torch.complex64)}, "real"),
        ({"output": torch.rand(5, 4)}, r"\(5, 4\), the state \(5, 3\)"),
    ):
        with pytest.raises(mep.errors.InputError, match=words):
            ep.relax(clamp, box=None if "input" in clamp else (0, 1))


# Holomorphic phases.


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Softplus, lambda: nn.Softmax(1)])
@pytest.mark.parametrize("radius", [1e4, 1e6])
def test_an_example_beyond_the_poles_is_given_up_and_the_others_are_not(activation, radius):
    model = sigmoidal(6, 10, 4, activation=activation)
    x, y = torch.randn(6, 6).double(), torch.randn(6, 4).double()
    y[2] *= radius
    ep = mep.EquilibriumPropagation(
        model, "mse", 1.0, mep.Relaxation(60), energy="hopfield", phases="holomorphic", on_unsettled="ignore"
    )
    found, estimate = ep.gradients(x, y)
    others = torch.arange(6) != 2
    assert estimate.settled[others].all()
    assert all(torch.isfinite(g).all() for g in found.values())
    with pytest.raises(mep.NotConvergedError, match="1 of 6"):
        ep = copy.copy(ep)
        ep.on_unsettled = "raise"
        ep.gradients(x, y)


def test_divergence_says_where():
    model = sigmoidal(6, 10, 4, activation=nn.GELU, scale=3.0)
    x, y = torch.randn(6, 6).double(), F.one_hot(torch.arange(6) % 4, 4).double()
    y[2] *= 1e4
    ep = mep.EquilibriumPropagation(model, beta=0.1, phases="holomorphic")
    with pytest.raises(mep.DivergedError, match=r"in 1 of 6 examples, 2, at beta=0\.1.*Nothing was changed"):
        ep(x, y)
    assert all(p.grad is None for p in model.parameters())


def test_a_cost_is_tried_at_complex_outputs_once_a_graph():
    calls = []

    def cost(output, target):
        calls.append(output.is_complex())
        return (output - target).square().sum(1)

    model = sigmoidal(6, 10, 4)
    x, y = torch.rand(6, 6).double(), torch.rand(6, 4).double()
    ep = mep.EquilibriumPropagation(model, cost, 0.1, energy="hopfield", phases="holomorphic", proof="never")
    numbers = []
    for _ in range(3):
        calls.clear()
        ep(x, y)
        numbers.append(sum(calls))
    assert numbers[0] == numbers[1] + 2 and numbers[1] == numbers[2]
    other = lambda output, target: (output.abs() - target).square().sum(1)  # noqa: E731
    with pytest.raises(mep.ArgumentError, match="not holomorphic"):
        mep.EquilibriumPropagation(model, other, 0.1, energy="hopfield", phases="holomorphic")(x, y)


# Few digits.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cost", ["one_hot_mse", "cross_entropy"])
@pytest.mark.parametrize("tol", [1e-2, 5e-2, 2e-1])
def test_gradients_that_their_dtype_rounds_are_not_called_converged(dtype, cost, tol):
    for sizes in ((20, 32, 16, 4), (100, 128, 64, 4)):
        model = sigmoidal(*sizes, dtype=torch.float32).to(dtype)
        x, y = torch.rand(16, sizes[0]).to(dtype), torch.arange(16) % 4
        ep = mep.EquilibriumPropagation(
            model, cost, solver=mep.Relaxation(tol=tol), energy="hopfield", on_unsettled="ignore", proof="never"
        )
        found, estimate = ep.gradients(x, y)
        twin = copy.deepcopy(model).double()
        exact = mep.EquilibriumPropagation(twin, cost, 1e-6, mep.Relaxation(tol=1e-9, settle_steps=500), "hopfield")
        wanted, reference = exact.gradients(x.double(), y)
        pairs = [(found[p].double(), wanted[q]) for p, q in zip(model.parameters(), twin.parameters(), strict=True)]
        error = math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs))
        error /= math.sqrt(sum(float(b.square().sum()) for _, b in pairs))
        assert reference.converged and (error < 5 * tol or not estimate.converged)
        if dtype is torch.bfloat16:
            assert estimate.converged == (tol > 0.01), (error, estimate)
            if tol < 0.02:
                ep = mep.EquilibriumPropagation(model, cost, energy="hopfield", on_unsettled="raise", proof="never")
                with pytest.raises(mep.NotConvergedError, match=r"float32, or a larger tol.*bfloat16"):
                    ep(x, y)


# Layouts in memory.


def test_inner_products_do_not_depend_on_the_order_in_memory():
    a, b = torch.randn(3, 4, 5, 6).double(), torch.randn(3, 4, 5, 6).double()
    expected = (a * b).flatten(1).sum(1)
    for one in (torch.contiguous_format, torch.channels_last):
        for other in (torch.contiguous_format, torch.channels_last):
            pair = a.contiguous(memory_format=one), b.contiguous(memory_format=other)
            torch.testing.assert_close(mep.energy.example_dot(*pair, 3), expected)


@pytest.mark.parametrize("pool", [lambda: nn.AdaptiveAvgPool2d(4), lambda: nn.AvgPool2d(2)])
def test_the_coupling_behind_pooled_convolutions_is_that_of_the_dense_matrix(pool):
    torch.manual_seed(0)
    size = 16 if isinstance(pool(), nn.AdaptiveAvgPool2d) else 9
    layers = nn.Conv2d(2, 4, 3), pool(), nn.Sigmoid(), nn.Flatten(), nn.Linear(4 * size, 3)
    model, x, y = nn.Sequential(*layers).double(), torch.rand(4, 2, 8, 8).double(), torch.rand(4, 3).double()
    ep = mep.EquilibriumPropagation(model, "mse", energy="hopfield")
    eq = ep.settle(x, y)
    slopes = eq.free.states["1"].flatten(1).double()
    scaled = model[4].weight.detach() * (slopes * (1 - slopes)).sqrt()[:, None]  # W f'^(1/2), one an example
    largest = float(torch.linalg.matrix_norm(scaled, 2).max())
    assert 0.9 * largest < eq.estimate.coupling < 1.001 * largest


@pytest.mark.parametrize("last", [nn.Sigmoid, nn.Tanh, nn.Softplus, lambda: nn.Softmax(1), nn.Hardsigmoid])
def test_holomorphic_phases_of_models_that_end_in_an_activation(last):
    """The order is that of the points, against the limit beta -> 0."""
    model = nn.Sequential(*sigmoidal(6, 8, 4, scale=0.7, activation=nn.Tanh), last())
    x, y = torch.rand(5, 6).double(), torch.rand(5, 4).double()
    solver = mep.Relaxation(tol=1e-11, settle_steps=500)
    limit, _ = mep.EquilibriumPropagation(model, "mse", 1e-9, solver, "hopfield").gradients(x, y)
    errors = []
    for beta in (0.8, 0.4):
        ep = mep.EquilibriumPropagation(model, "mse", beta, solver, "hopfield", phases="holomorphic")
        found, estimate = ep.gradients(x, y)
        assert estimate.converged
        errors.append(math.sqrt(sum(float((g - limit[p]).square().sum()) for p, g in found.items())))
    assert math.log2(errors[0] / errors[1]) > 3.5 and errors[1] < 1e-2
