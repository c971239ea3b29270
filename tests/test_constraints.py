import copy
import math
import pickle
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mep.errors import ArgumentError
from mep.updates import Muon, constraints
from mep.updates.constraints import (
    EXACT_ROWS,
    TOLERANCE,
    eigenvalues_below,
    largest_by_squaring,
    largest_eigenpair,
    spectral_bound,
)

LARGE = EXACT_ROWS + 2  # the smallest weights that are not measured exactly


def isometry(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def with_spectrum(sigma, rows, columns, seed=0):
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    return (isometry(rows, len(sigma), seed) * sigma) @ isometry(columns, len(sigma), seed + 1).mT


def sigma_max(weight):
    return torch.linalg.svdvals(weight.detach().double().flatten(1))[0].item()


def exactly(gamma):
    return spectral_bound(gamma, slack=0.0)


def apply(gamma, *weights):
    """The weights after a step that moved nothing but was followed by the bound."""
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    optimizer.register_step_post_hook(exactly(gamma))
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return parameters[0] if len(weights) == 1 else parameters


def apply_as_on_an_accelerator(gamma, weight):
    flat = weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
    wide = flat if flat.shape[0] <= flat.shape[1] else flat.mT
    return weight * constraints._factor_without_waiting(wide, gamma)


def check(weight, gamma, apply=apply):
    before, after = sigma_max(weight), apply(gamma, weight).detach()
    if before <= gamma:
        assert torch.equal(after, weight) or before > gamma * (1 - TOLERANCE)
    assert sigma_max(after) <= gamma * (1 + TOLERANCE)
    assert sigma_max(after) >= min(before, gamma) * (1 - TOLERANCE)  # nor does it shrink more than it must
    one, other = (w.double().flatten() / w.abs().max().double().clamp_min(1e-300) for w in (after, weight))
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 1 - 1e-5


def zero_sum(rows, columns):
    """Orthogonal to a start of all ones on either side."""
    matrix = with_spectrum(torch.linspace(1, 0.1, 20), rows, columns)
    return matrix - matrix.mean(0) - matrix.mean(1, keepdim=True) + matrix.mean()


SPECTRA = {
    "repeated": [2.0, 2.0, 2.0, 1.0, 0.5],
    "nearly equal": [2.0, 1.999, 1.998, 1.99, 1.0],
    "crowded": torch.linspace(2.0, 1.9, LARGE),
    "all equal": torch.full((LARGE,), 2.0),
    "spread": torch.logspace(0, -6, LARGE),
    "rank one": [3.0],
    "linear": torch.linspace(1.5, 0, LARGE),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(LARGE, LARGE), (LARGE, 300), (300, LARGE)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_spectrum_gets_past_the_bound(spectrum, shape, dtype):
    weight = with_spectrum(SPECTRA[spectrum], *shape).to(dtype)
    for gamma in (0.3, 0.95, 1.9999):
        check(weight, gamma)


WEIGHTS = {
    "random": torch.randn(150, 200, generator=torch.Generator().manual_seed(0)),
    "random convolution": torch.randn(160, 20, 3, 3, generator=torch.Generator().manual_seed(0)),
    "small convolution": torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(0)),
    "transposed": torch.randn(200, 150, generator=torch.Generator().manual_seed(0)).mT,
    "column": torch.full((500, 1), 0.3),
    "row": torch.full((1, 500), 0.3),
    "one": torch.full((1, 1), 7.0),
    "positive": torch.rand(140, 140, generator=torch.Generator().manual_seed(0)),
    "identity": 3 * torch.eye(140),
    "one entry": torch.zeros(140, 140).index_put((torch.tensor(77), torch.tensor(3)), torch.tensor(5.0)),
    "zero sums": zero_sum(140, 150).float(),
    "alternating": 0.1 * torch.ones(140, 140) * (-1.0) ** torch.arange(140),
    "half precision": torch.randn(150, 200, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "small half precision": torch.randn(20, 30, generator=torch.Generator().manual_seed(0)).half(),
    "huge": 1e30 * torch.randn(140, 140, generator=torch.Generator().manual_seed(0)),
    "small and huge": 1e30 * torch.randn(4, 14, generator=torch.Generator().manual_seed(0)),
    "beyond squares": 1e200 * torch.randn(9, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    "large": 1e15 * torch.randn(140, 140, generator=torch.Generator().manual_seed(0)),
    "last in memory": torch.randn(160, 20, 3, 3).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("gamma", [0.95, 12.0])
def test_no_weight_gets_past_the_bound(name, gamma):
    check(WEIGHTS[name], gamma)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("gamma", [0.95, 12.0])
def test_no_weight_gets_past_the_bound_of_an_accelerator(name, gamma):
    check(WEIGHTS[name], gamma, apply_as_on_an_accelerator)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, 3e38])
def test_an_accelerator_leaves_weights_without_a_finite_norm_alone(bad):
    weight = torch.full((3, 4), bad)
    assert torch.equal(apply_as_on_an_accelerator(0.5, weight).nan_to_num(nan=-1.0), weight.nan_to_num(nan=-1.0))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000), st.floats(1e-3, 1e3))
def test_any_small_weight_is_bounded(rows, columns, seed, gamma):
    check(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), gamma)


@pytest.mark.parametrize("excess", [1.002, 1.01, 1.1, 3.0])
def test_a_direction_that_the_kept_vector_is_orthogonal_to_cannot_overtake_it(excess):
    left, right = isometry(LARGE, LARGE, 0), isometry(LARGE, LARGE, 1)
    sigma = torch.linspace(1, 0, LARGE, dtype=torch.float64)
    weight = nn.Parameter((left * sigma) @ right.mT)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.register_step_post_hook(exactly(1.0))
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.state[weight]["spectral_vector"] = left[:, 0].clone()
    sigma[LARGE // 2] = excess
    weight.data = (left * sigma) @ right.mT
    for _ in range(2):
        optimizer.step()
        assert sigma_max(weight) <= 1 + TOLERANCE


def test_diagonal_weights_do_not_stay_in_the_direction_they_know():
    # Without rounding noise, the Krylov space of a unit vector is that vector.
    weight = nn.Parameter(torch.eye(LARGE))
    weight.data[0, 0] = 3
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.register_step_post_hook(exactly(2.0))
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.state[weight]["spectral_vector"] = torch.eye(LARGE)[0]
    weight.data[5, 5] = 4
    optimizer.step()
    assert sigma_max(weight) == pytest.approx(2, rel=TOLERANCE)
    weight.data[5, 5] = 5
    optimizer.step()
    kept = optimizer.state[weight]["spectral_vector"]
    assert kept[5].abs() > 0.9 * kept.norm()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=3e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "muon": lambda p: Muon(p, lr=0.1, weight_decay=0.1, vector_scale=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


def train(optimizer, net, steps, first=0, after=lambda: None):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 2, 10, 10, generator=generator).to(next(net.parameters()).dtype)
        optimizer.zero_grad()
        net(x).square().sum(1).sub(1 + step % 3).square().mean().backward()
        optimizer.step()
        after()


def network(dtype=torch.float32):
    torch.manual_seed(0)
    conv, hidden, output = nn.Conv2d(2, LARGE, 8), nn.Linear(9 * LARGE, LARGE), nn.Linear(LARGE, 5)
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), hidden, nn.Tanh(), output).to(dtype)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("gamma", "slack"), [(0.5, 0.1), (1.2, 0.0), (1.2, 0.1)])
def test_the_bound_holds_after_every_step_of_training(name, gamma, slack):
    net = network()
    optimizer = OPTIMIZERS[name](net.parameters())
    optimizer.register_step_post_hook(spectral_bound(gamma, slack))
    weights = [p for p in net.parameters() if p.ndim >= 2]
    touched = []

    def after():
        largest = [sigma_max(p) for p in weights]
        assert max(largest) <= gamma * (1 + TOLERANCE)
        touched.append(max(largest) >= gamma * (1 - slack - TOLERANCE))

    train(optimizer, net, 25, after=after)
    assert sum(touched) > 5  # the bound had work to do


def test_biases_are_free():
    weight, bias = apply(1.0, torch.full((2, 2), 5.0), torch.full((2,), 5.0))
    assert sigma_max(weight) <= 1 + TOLERANCE
    assert torch.equal(bias, torch.full((2,), 5.0))


def test_what_the_step_could_not_move_stays():
    large = 5 * torch.eye(3)
    free, no_lr, no_grad, frozen = (nn.Parameter(large.clone()) for _ in range(4))
    optimizer = torch.optim.SGD([{"params": [free, no_grad, frozen]}, {"params": [no_lr], "lr": 0.0}], lr=0.1)
    optimizer.register_step_post_hook(exactly(1.0))
    for p in (free, no_lr, frozen):
        p.grad = torch.zeros_like(p)
    frozen.requires_grad_(False)
    optimizer.step()
    assert sigma_max(free) == pytest.approx(1, rel=TOLERANCE)
    for p in (no_lr, no_grad, frozen):
        assert torch.equal(p, large)
        assert p not in optimizer.state


@pytest.mark.parametrize("size", [4, LARGE])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_left_alone(size, bad):
    weight = torch.ones(size, size)
    weight[0, 1] = bad
    assert torch.equal(apply(0.5, weight).nan_to_num(nan=-1.0), weight.nan_to_num(nan=-1.0))


@pytest.mark.parametrize("size", [0, 4, LARGE])
def test_zero_weights_are_left_alone(size):
    assert not apply(0.5, torch.zeros(size, LARGE)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), lambda p: Muon(p, lr=0.05)])
def test_state_dict_continues_bit_for_bit(make, dtype):
    straight = network(dtype)
    optimizer = make(straight.parameters())
    optimizer.register_step_post_hook(spectral_bound(0.5))
    train(optimizer, straight, 6)

    net = network(dtype)
    optimizer = make(net.parameters())
    optimizer.register_step_post_hook(spectral_bound(0.5))
    train(optimizer, net, 3)
    assert optimizer.state[net[3].weight]["spectral_vector"].dtype == dtype
    saved = pickle.loads(pickle.dumps((net.state_dict(), optimizer.state_dict())))
    net = network(dtype)
    net.load_state_dict(saved[0])
    optimizer = make(net.parameters())
    optimizer.register_step_post_hook(spectral_bound(0.5))
    optimizer.load_state_dict(saved[1])
    train(optimizer, net, 3, first=3)
    for one, other in zip(straight.parameters(), net.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_kept_vector_becomes_the_top_singular_vector():
    weight = with_spectrum([1.0, 0.5, 0.4], LARGE, 200)
    p = nn.Parameter(weight.clone())
    optimizer = torch.optim.SGD([p], lr=0.1)
    optimizer.register_step_post_hook(exactly(0.9))
    p.grad = torch.zeros_like(p)
    for _ in range(2):
        optimizer.step()
    kept = optimizer.state[p]["spectral_vector"]
    assert (kept @ torch.linalg.svd(weight).U[:, 0]).abs() > (1 - 1e-6) * kept.norm()


def test_each_step_starts_from_the_vector_that_the_last_one_kept(monkeypatch):
    starts = []

    def recorded(square, start):
        starts.append(start.clone())
        return largest_eigenpair(square, start)

    monkeypatch.setattr(constraints, "largest_eigenpair", recorded)
    weight = nn.Parameter(WEIGHTS["random"].clone())
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.register_step_post_hook(exactly(0.9))
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    kept = optimizer.state[weight]["spectral_vector"].clone()
    optimizer.step()
    assert torch.equal(starts[1], kept)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_lanczos_process_never_sees_more_than_there_is(spectrum, dtype):
    weight = with_spectrum(SPECTRA[spectrum], LARGE, LARGE)
    square = (weight @ weight.mT).to(dtype)
    start = torch.randn(LARGE, generator=torch.Generator().manual_seed(3), dtype=dtype)
    theta, vector = largest_eigenpair(square, start)
    largest = torch.linalg.eigvalsh(square)[-1].item()
    assert 0.9 * largest <= theta <= (1 + 1e-5) * largest
    assert vector.norm().item() == pytest.approx(1, abs=1e-4)
    assert (vector @ square @ vector).item() == pytest.approx(theta, rel=1e-4)


def test_the_generator_of_the_user_is_not_touched():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    apply(0.5, WEIGHTS["random"])
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_does_not_reach_inside():
    weight = WEIGHTS["random"]
    expected = apply(0.5, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(apply(0.5, weight), expected)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda bound: pickle.loads(pickle.dumps(bound))])
def test_a_bound_is_called_with_the_optimizer_and_can_be_copied(make):
    weight = nn.Parameter(3 * torch.eye(4))
    weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    assert make(exactly(2.0))(optimizer) is None
    assert sigma_max(weight) == pytest.approx(2, rel=TOLERANCE)


@pytest.mark.parametrize("slack", [-0.1, 1.0, math.nan])
def test_slack_must_be_a_part_of_the_bound(slack):
    with pytest.raises(ArgumentError, match=rf"^spectral_bound\(slack={slack}"):
        spectral_bound(1.0, slack)


@pytest.mark.parametrize("gamma", [0, -1.0, math.nan, math.inf])
def test_gamma_must_be_positive_and_finite(gamma):
    with pytest.raises(ArgumentError, match=rf"^spectral_bound\(gamma={gamma}"):
        spectral_bound(gamma)


def test_complex_weights_are_refused():
    weight = nn.Parameter(torch.ones(2, 3, dtype=torch.cfloat))
    weight.grad = torch.zeros_like(weight)
    with pytest.raises(ArgumentError, match=r"^spectral_bound: .*\[2, 3\] is torch\.complex64"):
        spectral_bound(1.0)(torch.optim.SGD([weight], lr=0.1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1, 2, 40, 200])
def test_a_cholesky_factor_proves_the_bound(dtype, size):
    sigma = torch.linspace(1, 0, size, dtype=torch.float64)
    weight = with_spectrum(sigma, size, size + 3)
    square = (weight @ weight.mT).to(dtype)
    assert eigenvalues_below(square, 1 + TOLERANCE / 10)
    assert not eigenvalues_below(square, 1 - TOLERANCE / 10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1, 2, 40, 200])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_squaring_bounds_the_largest_eigenvalue_from_above(dtype, size, scale):
    for sigma in (torch.ones(size), torch.linspace(1, 0, size), torch.logspace(0, -9, size)):
        weight = scale * with_spectrum(sigma, size, size + 3)
        largest = largest_by_squaring((weight @ weight.mT).to(dtype)).item() / scale**2
        assert 1 - 1e-5 <= largest <= (1 + TOLERANCE) ** 2


@pytest.fixture
def measured(monkeypatch):
    """The norms that were measured so far."""
    norms, measure = [], constraints._norm_on_cpu
    monkeypatch.setattr(constraints, "_norm_on_cpu", lambda *given: norms.append(measure(*given)) or norms[-1])
    return norms


@pytest.mark.parametrize("shape", [(20, 30), (LARGE, 150)])
def test_a_weight_is_measured_only_when_it_may_have_reached_the_bound(measured, shape):
    """Random updates of spectral norm 0.01, from 1 to beyond 1.5: always bounded, seldom measured, scaled at last."""
    weight = nn.Parameter(with_spectrum([1.0, 0.9, 0.2], *shape))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    optimizer.register_step_post_hook(exactly(1.5))
    torch.manual_seed(0)
    top = torch.linalg.svd(weight.detach())
    norms = []
    for _ in range(100):
        weight.grad = -0.01 * torch.outer(top.U[:, 0], top.Vh[0])
        optimizer.step()
        norms.append(sigma_max(weight))
    assert max(norms) <= 1.5 * (1 + TOLERANCE) and norms[-1] == pytest.approx(1.5, rel=TOLERANCE)
    free = sum(norm < 1.48 for norm in norms)
    assert free > 40 and sum(norm > 0 for norm in measured) <= 100 - free + 10


def test_a_weight_that_someone_else_changed_is_measured_anew():
    weight = nn.Parameter(with_spectrum([1.0, 0.9], 20, 30))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    optimizer.register_step_post_hook(exactly(1.2))
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    with torch.no_grad():
        weight.mul_(4)
    optimizer.step()
    assert sigma_max(weight) == pytest.approx(1.2, rel=TOLERANCE)


@pytest.mark.parametrize("norm", [0.8, 0.95, 1.5])
def test_a_weight_that_may_exceed_the_bound_is_put_below_it_by_the_slack(norm):
    weight = nn.Parameter(with_spectrum([norm, 0.9 * norm, 0.5], 20, 30))
    before = weight.detach().clone()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    optimizer.register_step_post_hook(spectral_bound(1.0, slack=0.1))
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before * min(1, 0.9 / norm))


@pytest.mark.parametrize("shape", [(40, 60), (LARGE, 150)])
@pytest.mark.parametrize("slack", [0.1, 0.3])
def test_the_path_of_muon_serves_many_steps_at_the_bound(measured, shape, slack):
    """Every step adds lr to every singular value, and a measurement serves the steps that the slack has room for."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.linalg.qr(torch.randn(shape).mT).Q.mT.contiguous())
    optimizer = Muon([weight], lr=0.01, momentum=0.0)
    optimizer.register_step_post_hook(spectral_bound(1.0, slack))
    for _ in range(60):
        weight.grad = -weight.detach().clone()
        optimizer.step()
        assert 1 - slack - TOLERANCE <= sigma_max(weight) <= 1 + TOLERANCE
    assert 60 * 0.01 * 0.6 / slack <= len(measured) <= 60 * 0.01 * 1.5 / slack + 1


def test_a_weight_that_someone_else_changed_is_measured_anew_though_its_path_is_short():
    weight = nn.Parameter(with_spectrum([1.0, 0.9], 20, 30))
    optimizer = Muon([weight], lr=0.01)
    optimizer.register_step_post_hook(spectral_bound(1.2))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with torch.no_grad():
        weight.mul_(4)
    optimizer.step()
    assert sigma_max(weight) <= 1.2 * (1 + TOLERANCE)


def test_a_weight_that_grows_to_the_bound_is_not_warned_of_but_one_that_begins_beyond_it_is():
    weight = nn.Parameter(torch.eye(4))
    weight.grad = -torch.eye(4)
    optimizer = torch.optim.SGD([weight], lr=0.2)
    optimizer.register_step_post_hook(spectral_bound(2.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            optimizer.step()
    assert sigma_max(weight.detach()) <= 2.0
    other = nn.Parameter(3 * torch.eye(4))
    other.grad = torch.zeros(4, 4)
    optimizer.add_param_group({"params": [other]})
    with pytest.warns(UserWarning, match="the largest singular value"):
        optimizer.step()
