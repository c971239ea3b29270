import copy
import math
import pickle

import pytest
import torch
from torch import nn

from mep.errors import ArgumentError
from mep.updates import METHODS, Muon, orthogonalise
from mep.updates.muon import SCALES, orthogonal_directions


def parameter(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))


def gradient(p, step):
    generator = torch.Generator().manual_seed(100 + step + p.numel())
    return torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def run(optimizer, steps, first=0):
    for step in range(first, first + steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = gradient(p, step)
        optimizer.step()


def polar(matrix):
    left, _, right = torch.linalg.svd(matrix.flatten(1), full_matrices=False)
    return (left @ right).view(matrix.shape)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 5)).double()


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
        assert set(state) == known | ({"spectral_path"} if len(shape) == 2 and dtype != torch.bfloat16 else set())
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
        assert length <= optimizer.state[weight]["spectral_path"] <= 2 * length


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


def test_memory_format_does_not_matter():
    plain, last = parameter(4, 3, 2, 2), parameter(4, 3, 2, 2)
    last.data = last.data.to(memory_format=torch.channels_last)
    run(Muon([plain]), 2)
    run(Muon([last]), 2)
    torch.testing.assert_close(plain.detach(), last.detach().contiguous())


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_it_goes_down(method):
    torch.manual_seed(0)
    net, x, y = network(), torch.randn(16, 2, 4, 4).double(), torch.randn(16, 5).double()
    optimizer = Muon(net.parameters(), lr=0.02, method=method)

    def closure():
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert first.requires_grad  # computed with gradients enabled
    for _ in range(100):
        last = optimizer.step(closure)
    assert last < 0.3 * first


def test_parameters_without_gradient_stay():
    net = network()
    before = copy.deepcopy(net.state_dict())
    optimizer = Muon(net.parameters(), weight_decay=0.1)
    assert optimizer.step() is None
    net[2].weight.grad = torch.ones_like(net[2].weight)
    optimizer.step()
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]) == (name != "2.weight")
    assert set(optimizer.state) == {net[2].weight}


def test_parameters_without_elements_are_no_trouble():
    empty = nn.Parameter(torch.zeros(0, 3))
    empty.grad = torch.zeros(0, 3)
    Muon([empty]).step()


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


def test_a_schedule_drives_matrices_and_vectors():
    matrix, vector = parameter(3, 4), parameter(3)
    optimizer = Muon([matrix, vector], lr=1.0, momentum=0.0, vector_scale=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    for step, lr in enumerate((1.0, 0.1, 0.01)):
        old = matrix.detach().clone(), vector.detach().clone()
        run(optimizer, 1, first=step)
        scheduler.step()
        assert torch.linalg.matrix_norm(matrix.detach() - old[0], 2).item() == pytest.approx(lr, rel=1e-6)
        torch.testing.assert_close(old[1] - vector.detach(), 0.5 * lr * gradient(vector, step))


def test_lr_may_be_a_tensor():
    one, other = parameter(3, 4), parameter(3, 4)
    run(Muon([one], lr=torch.tensor(0.125)), 2)
    run(Muon([other], lr=0.125), 2)
    assert torch.equal(one, other)


def continued(make_copy):
    """Six steps, and three steps, a copy, three more."""
    straight = network()
    run(Muon(straight.parameters(), lr=0.05), 6)
    net = network()
    optimizer = Muon(net.parameters(), lr=0.05)
    run(optimizer, 3)
    net, optimizer = make_copy(net, optimizer)
    run(optimizer, 3, first=3)
    for one, other in zip(straight.parameters(), net.parameters(), strict=True):
        assert torch.equal(one, other)


def test_state_dict_continues_bit_for_bit():
    def load(net, optimizer):
        saved = pickle.loads(pickle.dumps((net.state_dict(), optimizer.state_dict())))
        fresh = network()
        fresh.load_state_dict(saved[0])
        loaded = Muon(fresh.parameters(), lr=9.0, momentum=0.1)
        loaded.load_state_dict(saved[1])
        return fresh, loaded

    continued(load)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_continues_bit_for_bit_and_apart(make):
    def duplicate(net, optimizer):
        twin = make((net, optimizer))
        run(optimizer, 1)  # the original goes elsewhere and takes nothing along
        return twin

    continued(duplicate)


def test_state_of_an_older_version_gets_the_defaults():
    weight = parameter(3, 4)
    optimizer = Muon([weight], vector_scale=0.25)
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["vector_scale"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["vector_scale"] == 0.25


def test_autocast_does_not_reach_inside():
    one, other = parameter(3, 4, dtype=torch.float32), parameter(3, 4, dtype=torch.float32)
    run(Muon([one]), 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(Muon([other]), 2)
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"lr": -1.0}, r"lr=-1\.0"),
        ({"lr": math.nan}, r"lr=nan"),
        ({"lr": math.inf}, r"lr=inf"),
        ({"lr": torch.zeros(2)}, r"lr=\.\.\..*\[2\]"),
        ({"momentum": 1.0}, r"momentum=1\.0"),
        ({"momentum": -0.1}, r"momentum=-0\.1"),
        ({"weight_decay": -0.1}, r"weight_decay=-0\.1"),
        ({"vector_scale": -1}, r"vector_scale=-1"),
        ({"scale": "frobenius"}, r"scale='frobenius'.*spectral.*rms.*none"),
        ({"method": "cubic"}, r"method='cubic'.*newton_schulz"),
        ({"method": "newton_schulz", "steps": 0}, r"steps=0"),
        ({"steps": 3}, r"steps=3.*no effect.*'auto'"),
    ],
)
def test_refusals_name_the_call_and_the_value(keywords, message):
    weight = parameter(3, 4)
    with pytest.raises(ArgumentError, match=rf"^Muon\({message}"):
        Muon([weight], **keywords)
    with pytest.raises(ArgumentError, match=rf"^Muon\({message}"):
        Muon([{"params": [weight], **keywords}])
    optimizer = Muon([weight])
    with pytest.raises(ArgumentError, match=rf"^Muon\({message}"):
        optimizer.add_param_group({"params": [parameter(2, 2)], **keywords})
    assert len(optimizer.param_groups) == 1


def test_unknown_keywords_are_type_errors():
    with pytest.raises(TypeError, match="ns_steps"):
        Muon([parameter(3, 4)], ns_steps=3)


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_sparse_and_complex_gradients_are_refused_before_anything_moves(kind):
    weight, bad = parameter(3, 4), parameter(3, 4)
    if kind == "sparse":
        bad.grad = torch.eye(3, 4, dtype=torch.float64).to_sparse()
    else:
        bad = nn.Parameter(torch.zeros(3, 4, dtype=torch.cfloat))
        bad.grad = torch.ones_like(bad)
    weight.grad = torch.ones_like(weight)
    before = weight.detach().clone()
    optimizer = Muon([{"params": [weight]}, {"params": [bad]}])
    with pytest.raises(ArgumentError, match=rf"^Muon\.step: .*\[3, 4\] is {kind}"):
        optimizer.step()
    assert torch.equal(weight, before) and not optimizer.state


def test_the_scales_are_those_of_their_papers():
    assert SCALES["spectral"](64, 16) == 2 and SCALES["spectral"](16, 64) == 1
    assert SCALES["rms"](25, 100) == SCALES["rms"](100, 25) == 2
