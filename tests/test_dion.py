import math

import pytest
import torch
from test_updates import gradient, parameter, run
from torch import nn

from mep.updates import Dion, Muon
from mep.updates.dion import first_factor, power_iteration, unit_columns

SHAPES = [(9, 5), (5, 9), (6, 6), (7, 2, 2, 3), (12, 2, 3), (1, 6), (6, 1)]


def step_along(optimizer, p, grad):
    """The update that one step with `grad` makes, as a matrix."""
    before = p.detach().clone()
    p.grad = grad.clone()
    optimizer.step()
    return (before - p.detach()).flatten(1)


def rank_of(update):
    return torch.linalg.matrix_rank(update, rtol=1e-6).item()


def with_spectrum(sigma, rows, columns, seed=0):
    """A matrix with these singular values, and both its orthonormal factors."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, len(sigma), generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, len(sigma), generator=generator, dtype=torch.float64)).Q
    return (left * torch.tensor(sigma, dtype=torch.float64)) @ right.mT, left, right


def gram_schmidt(columns):
    basis = []
    for column in columns.mT:
        for other in basis * 2:  # twice is enough
            column = column - (other @ column) * other
        basis.append(column / column.norm())
    return torch.stack(basis, 1)


@pytest.mark.parametrize("fraction", [0.4, 1.0])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_two_steps_are_those_of_the_formula(shape, momentum, fraction):
    lr, decay = 0.3, 0.1
    weight = parameter(*shape)
    optimizer = Dion([weight], lr, momentum, fraction, dion_threshold=0, weight_decay=decay)
    w = weight.detach().flatten(1).clone()
    rows, columns = w.shape
    rank = math.ceil(fraction * min(rows, columns))
    m, q = torch.zeros_like(w), first_factor(min(rows, columns), rank)
    for step in range(2):
        run(optimizer, 1, first=step)
        m = m + gradient(weight, step).flatten(1)
        tall = m if rows >= columns else m.T
        p = gram_schmidt(tall @ q)
        r = tall.T @ p
        q = r / r.norm(dim=0)
        applied, direction = (p @ r.T, p @ q.T) if rows >= columns else (r @ p.T, q @ p.T)
        m = m - (1 - momentum) * applied
        w = (1 - lr * decay) * w - lr * math.sqrt(max(1, rows / columns)) * direction
        torch.testing.assert_close(weight.detach().flatten(1), w, rtol=0, atol=1e-10)
        torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"].flatten(1), m, rtol=0, atol=1e-10)
        kept = optimizer.state[weight]["right_factor"]
        torch.testing.assert_close(kept.abs(), q.abs(), rtol=0, atol=1e-10)  # QR chooses the signs


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (4, 4)])
@pytest.mark.parametrize(("fraction", "rank"), [(1.0, 4), (0.5, 2), (0.25, 1)])
def test_enough_power_iterations_give_the_leading_directions_and_at_full_rank_the_polar_factor(shape, fraction, rank):
    matrix, left, right = with_spectrum([4.0, 3.0, 2.0, 1.0], *shape)
    weight = parameter(*shape)
    optimizer = Dion([weight], 0.5, 0.9, fraction, dion_threshold=0, power_iterations=100, scale="none")
    update = step_along(optimizer, weight, matrix)
    torch.testing.assert_close(update, 0.5 * left[:, :rank] @ right[:, :rank].T, rtol=0, atol=1e-12)


def test_one_iteration_a_step_gets_there_when_the_momentum_rests():
    matrix, left, right = with_spectrum([4.0, 3.0, 2.0, 1.0], 6, 4)
    weight = parameter(6, 4)
    optimizer = Dion([weight], 0.5, momentum=0.9, rank_fraction=1.0, dion_threshold=0, scale="none")
    errors = []
    for step in range(60):
        grad = matrix if step == 0 else torch.zeros_like(matrix)
        update = step_along(optimizer, weight, grad)
        errors.append(torch.linalg.matrix_norm(update - 0.5 * left @ right.T, 2))
    assert errors[0] > 0.05 and errors[-1] < 1e-12


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (6, 2, 3)])
def test_what_is_not_applied_stays_in_the_momentum(shape, momentum):
    weight = parameter(*shape)
    optimizer = Dion([weight], momentum=momentum, rank_fraction=1 / 3, dion_threshold=0)
    run(optimizer, 2)
    before = optimizer.state[weight]["momentum_buffer"].flatten(1) + gradient(weight, 2).flatten(1)
    update = step_along(optimizer, weight, gradient(weight, 2))
    tall = update.shape[0] >= update.shape[1]
    p = torch.linalg.svd(update if tall else update.T, full_matrices=False)[0][:, :2]  # the update's range is P's
    applied = p @ p.T @ before if tall else before @ p @ p.T
    after = optimizer.state[weight]["momentum_buffer"].flatten(1)
    torch.testing.assert_close(after, before - (1 - momentum) * applied, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_at_full_rank_the_momentum_is_that_of_sgd(shape):
    weight, other = parameter(*shape), parameter(*shape)
    optimizer = Dion([weight], momentum=0.9, rank_fraction=1.0, dion_threshold=0)
    sgd = torch.optim.SGD([other], lr=0.1, momentum=0.9)
    for step in range(4):
        run(optimizer, 1, first=step)
        run(sgd, 1, first=step)
        torch.testing.assert_close(
            optimizer.state[weight]["momentum_buffer"], 0.9 * sgd.state[other]["momentum_buffer"], rtol=0, atol=1e-12
        )


@pytest.mark.parametrize(
    ("shape", "fraction", "rank"),
    [
        ((20, 30), 0.2, 4),
        ((30, 20), 0.2, 4),
        ((20, 30), 0.21, 5),
        ((20, 30), 1, 20),
        ((20, 30), 1e-9, 1),
        ((100, 100), 0.07, 7),  # 0.07 * 100 is above 7 in floating point
        ((10, 4, 2, 2), 0.5, 5),
    ],
)
def test_rank_fraction_is_the_rank_of_the_update(shape, fraction, rank):
    weight = parameter(*shape)
    optimizer = Dion([weight], rank_fraction=fraction, dion_threshold=0)
    update = step_along(optimizer, weight, gradient(weight, 0))
    assert rank_of(update) == rank
    assert optimizer.state[weight]["right_factor"].shape == (min(update.shape), rank)


def test_a_new_rank_fraction_counts_from_the_next_step():
    weight = parameter(10, 10)
    optimizer = Dion([weight], rank_fraction=0.2, dion_threshold=0)
    for fraction, rank in [(0.2, 2), (0.5, 5), (0.1, 1)]:
        optimizer.param_groups[0]["rank_fraction"] = fraction
        assert rank_of(step_along(optimizer, weight, gradient(weight, rank))) == rank


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
def test_a_matrix_steps_as_its_transpose(shape):
    weight, transposed = parameter(*shape), nn.Parameter(parameter(*shape).detach().T.contiguous())
    ours = Dion([weight], dion_threshold=0, rank_fraction=0.5, scale="none")
    theirs = Dion([transposed], dion_threshold=0, rank_fraction=0.5, scale="none")
    for step in range(3):
        one = step_along(ours, weight, gradient(weight, step))
        other = step_along(theirs, transposed, gradient(weight, step).T)
        torch.testing.assert_close(one, other.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("scale", "shape", "factor"),
    [
        ("spectral", (8, 2), 2.0),
        ("spectral", (2, 8), 1.0),
        ("spectral", (18, 2, 1, 1), 3.0),
        ("rms", (4, 9), 0.6),
        ("rms", (3, 1, 2, 2), 0.4),
        ("none", (8, 2), 1.0),
    ],
)
def test_lr_is_the_length_of_each_direction_before_the_factor_of_its_shape(scale, shape, factor):
    weight = parameter(*shape)
    optimizer = Dion([weight], lr=0.25, rank_fraction=1.0, dion_threshold=0, scale=scale)
    update = step_along(optimizer, weight, gradient(weight, 0))
    # P has orthonormal columns and Q columns of length one, as many as the shorter side.
    assert torch.linalg.matrix_norm(update).item() == pytest.approx(0.25 * factor * math.sqrt(min(update.shape)))


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_small_matrices_and_vectors_step_exactly_as_in_muon(dtype, momentum, nesterov):
    shapes = [(4, 6), (6, 4), (4, 6), (4, 2, 3), (3,), (), (23,)]
    keywords = {"lr": 0.1, "momentum": momentum, "nesterov": nesterov, "weight_decay": 0.1, "scale": "rms"}
    keywords |= {"method": "polar_express", "steps": 3, "vector_scale": 0.5}
    ours = [parameter(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    theirs = [parameter(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    large = parameter(5, 5, dtype=dtype)
    dion = Dion([*ours, large], dion_threshold=25, **keywords)
    muon = Muon(theirs, **keywords)
    run(dion, 3)
    run(muon, 3)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
        assert dion.state.get(one, {}).keys() == muon.state.get(other, {}).keys()
    assert set(dion.state[large]) == {"momentum_buffer", "right_factor"}


def test_the_defaults_that_dion_shares_with_muon_are_the_same():
    dion, muon = Dion([parameter(2)]).defaults, Muon([parameter(2)]).defaults
    assert {name: dion[name] for name in muon} == muon


@pytest.mark.parametrize(("entries", "kept"), [(24, True), (25, False), (0, True)])
def test_the_threshold_is_a_number_of_entries(entries, kept):
    weight = parameter(4, 3, 2)
    optimizer = Dion([weight], dion_threshold=entries)
    run(optimizer, 1)
    assert ("right_factor" in optimizer.state[weight]) == kept


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (12, 2, 2, 2)])
def test_every_precision_takes_the_same_steps_within_its_rounding(dtype, shape):
    exact, rounded = parameter(*shape), parameter(*shape, dtype=dtype)
    exact.data = rounded.detach().double()
    ours = Dion([rounded], rank_fraction=0.5, dion_threshold=0, weight_decay=0.1)
    theirs = Dion([exact], rank_fraction=0.5, dion_threshold=0, weight_decay=0.1)
    for step in range(3):
        rounded.grad = gradient(rounded, step)
        exact.grad = rounded.grad.double()
        ours.step()
        theirs.step()
        assert torch.equal(rounded.grad, gradient(rounded, step))
    assert all(state.dtype == dtype for state in ours.state[rounded].values())
    torch.testing.assert_close(rounded.double(), exact, rtol=0, atol=20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
def test_without_a_gradient_only_weight_decay_moves_and_the_factor_waits(shape):
    weight = parameter(*shape)
    before = weight.detach().clone()
    optimizer = Dion([weight], lr=0.5, dion_threshold=0, weight_decay=0.5, rank_fraction=1.0)
    for _ in range(3):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), before * 0.75**3)
    torch.testing.assert_close(optimizer.state[weight]["right_factor"], first_factor(min(shape), min(shape)))
    update = step_along(optimizer, weight, gradient(weight, 0))
    assert rank_of(update) == min(shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (20, 20), (12, 2, 5, 2)])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_directions_in_which_the_momentum_vanishes_stay_zero(shape, rank, dtype):
    columns = math.prod(shape[1:])
    matrix, left, right = with_spectrum([1.0] * rank, shape[0], columns)
    weight = parameter(*shape, dtype=dtype)
    optimizer = Dion([weight], lr=1.0, rank_fraction=1.0, dion_threshold=0, power_iterations=2, scale="none")
    before = weight.detach().clone()
    weight.grad = matrix.view(shape).to(dtype)
    optimizer.step()
    update = (before - weight.detach()).flatten(1).double()
    # Everything moves within the rows and columns of the gradient, with `rank` directions of length one.
    atol = 200 * torch.finfo(dtype).eps
    torch.testing.assert_close(left @ left.T @ update @ right @ right.T, update, rtol=0, atol=atol)
    assert torch.linalg.matrix_norm(update).item() == pytest.approx(math.sqrt(rank), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_without_momentum_nothing_is_left_of_what_was_applied(shape, dtype):
    """At full rank all of M is applied, and what rounding leaves of it is no direction of the next update."""
    weight = parameter(*shape, dtype=dtype)
    optimizer = Dion([weight], 0.3, 0.0, 1.0, dion_threshold=0)
    run(optimizer, 1)
    assert not step_along(optimizer, weight, torch.zeros_like(weight)).any()
    assert step_along(optimizer, weight, torch.ones_like(weight)).any()


def test_a_factor_that_found_nothing_finds_what_comes_later():
    # The first gradients live in the first rows and columns, the later ones elsewhere: no column of Q may be lost.
    weight = parameter(8, 6)
    optimizer = Dion([weight], lr=1.0, momentum=0.5, rank_fraction=0.5, dion_threshold=0)
    first = torch.zeros(8, 6, dtype=torch.float64)
    first[0, 0] = 1
    for _ in range(3):
        assert rank_of(step_along(optimizer, weight, first)) == 1
    later = torch.zeros(8, 6, dtype=torch.float64)
    later[5:, 3:] = with_spectrum([3.0, 2.0, 1.0], 3, 3)[0]
    assert rank_of(step_along(optimizer, weight, later)) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (3, 5, 2)])
def test_updates_do_not_depend_on_the_size_of_the_gradient(shape, size, dtype):
    one, other = parameter(*shape, dtype=torch.float32), parameter(*shape, dtype=dtype)
    one.data = torch.zeros_like(one)
    other.data = torch.zeros_like(other)
    ours = step_along(Dion([one], 1.0, rank_fraction=0.5, dion_threshold=0), one, gradient(one, 0))
    theirs = step_along(Dion([other], 1.0, rank_fraction=0.5, dion_threshold=0), other, gradient(other, 0) * size)
    rounding = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(theirs.float(), ours, rtol=0, atol=100 * rounding)


def cancelling(shape):
    g = torch.ones(shape)
    g[0] = 1e-25
    return g


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (6, 1), (1, 6), (1, 1), (4, 2, 3, 3)])
@pytest.mark.parametrize(
    "make",
    [
        torch.zeros,
        torch.ones,
        cancelling,
        lambda shape: torch.full(shape, 1e-45),  # the smallest that float32 has
        lambda shape: torch.full(shape, 1e-40),
        lambda shape: torch.full(shape, 1e36),
        lambda shape: torch.logspace(-40, 30, math.prod(shape)).view(shape),
        lambda shape: torch.eye(shape[0], math.prod(shape[1:])).view(shape) * 1e-12,
    ],
)
def test_degenerate_gradients_make_no_nan(make, shape, dtype):
    weight = parameter(*shape, dtype=dtype)
    optimizer = Dion([weight], lr=1.0, momentum=0.9, rank_fraction=1.0, dion_threshold=0)
    for step in range(4):
        weight.grad = make(shape).to(dtype) if step != 2 else torch.zeros(shape, dtype=dtype)
        before = weight.detach().clone()
        optimizer.step()
        states = list(optimizer.state[weight].values())
        assert all(t.isfinite().all() for t in (weight, *states))
        update = (before - weight.detach()).flatten(1).double()
        rank, (rows, columns) = min(update.shape), update.shape
        bound = math.sqrt(rank * max(1, rows / columns))
        assert torch.linalg.matrix_norm(update) <= bound * (1 + 1e-5) + 100 * torch.finfo(dtype).eps
    run(optimizer, 1)
    assert weight.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_does_not_pass_for_one(bad):
    weight = parameter(6, 4)
    weight.grad = torch.ones_like(weight)
    weight.grad[2, 3] = bad
    Dion([weight], dion_threshold=0).step()
    assert weight.isnan().any()


def test_power_iteration_spans_the_image_of_the_factor():
    m, q = parameter(9, 5).detach(), first_factor(5, 3)
    p, r = power_iteration(m, q)
    torch.testing.assert_close(p.T @ p, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(p @ p.T @ m @ q, m @ q)
    torch.testing.assert_close(r, m.T @ p)


def test_unit_columns_keep_the_old_factor_where_there_is_nothing():
    r = torch.tensor([[3.0, 0.0, 0.0], [4.0, 0.0, 1e-9]], dtype=torch.float64)
    q = first_factor(2, 3)
    direction, kept = unit_columns(r, q, rounding=1e-6)
    torch.testing.assert_close(direction, torch.tensor([[0.6, 0, 0], [0.8, 0, 0]], dtype=torch.float64))
    assert torch.equal(kept[:, 1:], q[:, 1:]) and torch.equal(kept[:, 0], direction[:, 0])


def test_the_first_factor_is_always_the_same_and_costs_no_random_number():
    torch.manual_seed(1)
    one = parameter(9, 5)
    before = torch.get_rng_state()
    run(Dion([one], dion_threshold=0), 2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    other = parameter(9, 5)
    run(Dion([parameter(7, 7), other], dion_threshold=0), 2)
    assert torch.equal(one, other)
    assert torch.linalg.matrix_rank(first_factor(40, 40)) == 40


@pytest.mark.parametrize("shape", [(8, 6), (6, 8)])
@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.1])
def test_it_solves_least_squares_even_one_direction_at_a_time(shape, fraction):
    target = with_spectrum([1.0, 0.8, 0.6, 0.4, 0.2, 0.1], *shape)[0]
    inputs = with_spectrum([1.2, 1.1, 1.0, 0.9, 0.8, 0.7], shape[1], max(shape), seed=1)[0]
    weight = nn.Parameter(torch.zeros_like(target))
    optimizer = Dion([weight], lr=0.1, momentum=0.5, rank_fraction=fraction, dion_threshold=0, scale="none")
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=200)

    def closure():
        optimizer.zero_grad()
        loss = ((weight - target) @ inputs).square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    for _ in range(200):
        optimizer.step(closure)
        scheduler.step()
    assert closure() < 1e-4 * first


def test_groups_have_their_own_settings():
    matrix, other, frozen = parameter(4, 4), parameter(4, 4), parameter(4, 4)
    before = [p.detach().clone() for p in (matrix, other, frozen)]
    optimizer = Dion(
        [{"params": [matrix]}, {"params": [other], "lr": 0.5, "scale": "rms", "rank_fraction": 0.25}],
        lr=0.1,
        rank_fraction=0.5,
        dion_threshold=0,
    )
    optimizer.add_param_group({"params": [frozen], "lr": 0.0, "weight_decay": 0.5})
    run(optimizer, 1)
    after = [p.detach() for p in (matrix, other, frozen)]
    moved = [torch.linalg.matrix_norm(new - old).item() for new, old in zip(after, before, strict=True)]
    assert moved == pytest.approx([0.1 * math.sqrt(2), 0.5 * 0.2 * 2, 0.0])
