import math

import pytest
import torch
from test_updates import gradient, parameter, run

from mep.updates import Muon, orthogonalise
from mep.updates.muon import SCALES, orthogonal_directions


def polar(matrix):
    left, _, right = torch.linalg.svd(matrix.flatten(1), full_matrices=False)
    return (left @ right).view(matrix.shape)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_the_first_two_steps_are_those_of_the_formula(nesterov, momentum):
    lr, decay, vector_scale = 0.3, 0.1, 0.5
    weight, bias = parameter(6, 4), parameter(6)
    w, b = weight.detach().clone(), bias.detach().clone()
    optimizer = Muon(
        [weight, bias], lr, momentum, nesterov, weight_decay=decay, scale="spectral", vector_scale=vector_scale
    )
    run(optimizer, 2)

    g1, g2 = gradient(weight, 0), gradient(weight, 1)
    d1 = (1 + momentum) * g1 if nesterov else g1
    buffer = momentum * g1 + g2
    d2 = g2 + momentum * buffer if nesterov else buffer
    for direction in (d1, d2):
        w = (1 - lr * decay) * w - lr * math.sqrt(6 / 4) * polar(direction)
    torch.testing.assert_close(weight.detach(), w, rtol=0, atol=1e-8)

    g1, g2 = gradient(bias, 0), gradient(bias, 1)
    d1 = (1 + momentum) * g1 if nesterov else g1
    buffer = momentum * g1 + g2
    d2 = g2 + momentum * buffer if nesterov else buffer
    for direction in (d1, d2):
        b = (1 - lr * vector_scale * decay) * b - lr * vector_scale * direction
    torch.testing.assert_close(bias.detach(), b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (5,)])
def test_biases_and_gains_step_as_in_sgd(nesterov, shape):
    ours, theirs = parameter(*shape), parameter(*shape)
    run(Muon([ours], lr=0.1, momentum=0.8, nesterov=nesterov), 5)
    run(torch.optim.SGD([theirs], lr=0.1, momentum=0.8, nesterov=nesterov), 5)
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("scale", "shape", "factor"),
    [
        ("spectral", (8, 2), 2.0),
        ("spectral", (2, 8), 1.0),
        ("spectral", (18, 2, 1, 1), 3.0),
        ("spectral", (2, 2, 2, 2), 1.0),
        ("rms", (4, 9), 0.6),
        ("rms", (3, 1, 2, 2), 0.4),
        ("none", (8, 2), 1.0),
    ],
)
def test_lr_is_the_spectral_norm_of_an_update_before_the_factor_of_its_shape(scale, shape, factor):
    weight = parameter(*shape)
    before = weight.detach().clone()
    run(Muon([weight], lr=0.25, scale=scale), 1)
    sigma = torch.linalg.svdvals((weight.detach() - before).flatten(1))
    torch.testing.assert_close(sigma, torch.full_like(sigma, 0.25 * factor), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5,)])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_a_step_leaves_gradient_and_momentum_as_the_recursion_has_them(dtype, nesterov, shape, momentum):
    weight = parameter(*shape, dtype=dtype)
    optimizer = Muon([weight], lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=0.1)
    buffer = torch.zeros_like(weight)
    for step in range(3):
        weight.grad = gradient(weight, step)
        optimizer.step()
        assert torch.equal(weight.grad, gradient(weight, step))
        buffer = buffer * momentum + weight.grad
        state = optimizer.state.get(weight, {})
        known = {"momentum_buffer"} if momentum > 0 else set()
        assert set(state) == known | ({"update_norm_sum"} if len(shape) == 2 and dtype != torch.bfloat16 else set())
        assert momentum == 0 or torch.equal(state["momentum_buffer"], buffer)


@pytest.mark.parametrize("method", ["auto", "halley", "newton_schulz"])
@pytest.mark.parametrize("scale", SCALES)
def test_the_path_is_no_shorter_than_the_sum_of_the_moves(method, scale):
    weight = parameter(40, 35, dtype=torch.float32)
    optimizer = Muon([weight], lr=0.1, weight_decay=0.5, method=method, scale=scale)
    length = 0.0
    for step in range(4):
        before = weight.detach().double() * (1 - 0.1 * 0.5)
        run(optimizer, 1, step)
        length += torch.linalg.matrix_norm(weight.detach().double() - before, 2).item()
        assert length <= optimizer.state[weight]["update_norm_sum"] <= 2 * length


@pytest.mark.parametrize("method", ["auto", "newton_schulz", "halley"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_shapes_together_step_as_one_by_one(method, dtype):
    shapes = [(4, 6), (6, 4), (4, 6), (4, 2, 3), (4, 6), (3,), (4, 2, 3)]
    together = [parameter(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    alone = [parameter(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    run(Muon(together, lr=0.1, method=method), 3)
    for p in alone:
        run(Muon([p], lr=0.1, method=method), 3)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)


def test_every_matrix_gets_its_own_direction_back():
    torch.manual_seed(0)
    matrices = [torch.randn(shape, dtype=torch.float64) for shape in [(3, 5), (5, 3), (3, 5), (3, 5, 1), (2, 2, 2)]]
    matrices += [torch.randn(3, 5), torch.randn(2, 3, 5, 7)[:, :, 0].to(memory_format=torch.contiguous_format)]
    for matrix, direction in zip(matrices, orthogonal_directions(matrices), strict=True):
        assert direction.dtype == matrix.dtype
        torch.testing.assert_close(direction, orthogonalise(matrix.flatten(1)).view(matrix.shape))


@pytest.mark.parametrize("shapes", [[(4, 6)], [(4, 6), (4, 6)]])
def test_method_and_steps_are_those_asked_for(shapes):
    weights = [parameter(*shape, seed=i) for i, shape in enumerate(shapes)]
    before = [p.detach().clone() for p in weights]
    run(Muon(weights, lr=1.0, method="polar_express", steps=2, scale="none"), 1)
    for p, old in zip(weights, before, strict=True):
        torch.testing.assert_close(old - p.detach(), orthogonalise(gradient(p, 0), "polar_express", 2))


def test_groups_have_their_own_settings():
    matrix, other, frozen = parameter(3, 4), parameter(3, 4), parameter(3, 4)
    before = [p.detach().clone() for p in (matrix, other, frozen)]
    optimizer = Muon([{"params": [matrix]}, {"params": [other], "lr": 0.5, "scale": "rms", "momentum": 0.0}], lr=0.1)
    optimizer.add_param_group({"params": [frozen], "lr": 0.0, "weight_decay": 0.5})
    run(optimizer, 1)
    after = [p.detach() for p in (matrix, other, frozen)]
    moved = [torch.linalg.matrix_norm(new - old, 2).item() for new, old in zip(after, before, strict=True)]
    assert moved == pytest.approx([0.1, 0.5 * 0.2 * 2, 0.0], rel=1e-6)
    assert "momentum_buffer" not in optimizer.state[other]


def test_the_scales_are_those_of_their_papers():
    assert SCALES["spectral"](64, 16) == 2 and SCALES["spectral"](16, 64) == 1
    assert SCALES["rms"](25, 100) == SCALES["rms"](100, 25) == 2
