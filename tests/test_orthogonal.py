import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mep.errors import ArgumentError
from mep.updates import orthogonal
from mep.updates.orthogonal import (
    LOWEST,
    METHODS,
    NEWTON_SCHULZ,
    POLAR_EXPRESS,
    SAFETY,
    apply_polynomials,
    gram_matrix,
    halley,
    halley_coefficients,
    largest_singular_value,
    orthogonalise,
    polar_express,
    symmetric_inverse,
)

ITERATIVE = [name for name, method in METHODS.items() if method.steps is not None]
EXACT = ["gram", "svd"]
SHAPES = [(1, 7), (12, 12), (40, 90), (90, 40), (128, 300)]


def isometry(rows, columns, seed=0):
    """Orthonormal columns, rows >= columns, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def with_spectrum(sigma, rows, columns):
    """A matrix with these singular values, and its polar factor."""
    left, right = isometry(rows, len(sigma), 1), isometry(columns, len(sigma), 2)
    return (left * sigma) @ right.mT, left @ right.mT


def spectra(count, floor):
    """Singular values that all are at least `floor` times the Frobenius norm: equal, spread, and one against all."""
    yield torch.ones(count, dtype=torch.float64)
    yield torch.logspace(0, math.log10(1.01 * floor * math.sqrt(count)), count, dtype=torch.float64)
    low = floor / math.sqrt(1 - (count - 1) * floor**2)
    yield torch.tensor([1.0] + [1.01 * low] * (count - 1), dtype=torch.float64)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_end_within_the_known_error(method, dtype, shape):
    known = METHODS[method]
    for sigma in spectra(min(shape), known.floor):
        matrix, polar = with_spectrum(sigma, *shape)
        result = orthogonalise(matrix.to(dtype), method)
        assert result.shape == shape and result.dtype == dtype
        assert (torch.linalg.svdvals(result.double()) - 1).abs().max() <= known.error
        if dtype == torch.float64:
            assert torch.linalg.matrix_norm(result - polar, 2) <= known.error


@pytest.mark.parametrize("method", [*ITERATIVE, "halley"])
def test_the_known_error_is_not_an_empty_promise(method):
    known = METHODS[method]
    lowest = torch.tensor([1.0, known.floor], dtype=torch.float64)
    spread = torch.logspace(-1, 0, 300, dtype=torch.float64)
    errors = [(orthogonalise(torch.diag(sigma), method).diagonal() - 1).abs().max() for sigma in (lowest, spread)]
    assert max(errors) >= 0.75 * known.error


@pytest.mark.parametrize(("steps", "error"), [(6, 7e-3), (7, 2e-5), (8, 1e-13), (12, 1e-13)])
def test_polar_express_is_as_accurate_as_its_paper_says(steps, error):
    sigma = torch.logspace(-3, 0, 5000, dtype=torch.float64)
    result = polar_express(sigma.view(-1, 1, 1), steps)  # 1x1 matrices have norm sigma: all become one
    assert (result - 1).abs().max() <= error
    sigma = torch.logspace(-3, 0, 400, dtype=torch.float64)
    sigma = sigma[sigma >= 1e-3 * sigma.norm()]
    assert (polar_express(torch.diag(sigma), steps).diagonal() - 1).abs().max() <= error


@pytest.mark.parametrize("lowest", [LOWEST, 1e-3, 0.3])
def test_the_coefficients_are_the_best_on_their_interval(lowest):
    a, b, c = halley_coefficients(lowest)
    x = torch.logspace(math.log10(lowest), 0, 20001, dtype=torch.float64)
    errors = x * (a + b / (x.square() + c)) - 1
    # Best, if and only if the error takes its largest size, by turns, at four points (Achieser 1956, section 33).
    worst = errors.abs().max()
    at = [piece.abs().max() for piece in errors.tensor_split(((errors[1:] * errors[:-1] < 0).nonzero() + 1)[:, 0])]
    torch.testing.assert_close(torch.stack(at), worst.expand(4), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(200, 200), (3, 130, 150), (2, 2, 65, 300)])
def test_halley_is_its_formula_at_every_singular_value(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
    x = sigma / sigma.pow(4).sum(-1, keepdim=True) ** 0.25
    a, b, c = halley_coefficients(LOWEST)
    expected = left @ ((x * (a + b / (x.square() + c))).unsqueeze(-1) * right)
    torch.testing.assert_close(halley(matrix), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", [(5, 9), (129, 140), (260, 300), (2, 3, 150, 130)])
def test_halves_make_the_whole(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    square = matrix @ matrix.mT
    torch.testing.assert_close(gram_matrix(matrix), square)
    square = square + torch.eye(shape[-2], dtype=torch.float64)
    before = square.clone()
    torch.testing.assert_close(symmetric_inverse(square), torch.linalg.inv(square), rtol=1e-9, atol=1e-9)
    assert torch.equal(square, before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [None, 1, 2, 3, 4, 9])
def test_no_singular_value_exceeds_the_known_largest(method, steps):
    if steps is not None and METHODS[method].steps is None:
        return
    for low in (0, -1, -2, -6):
        for dtype in (torch.float32, torch.bfloat16):
            matrix, _ = with_spectrum(torch.logspace(0, low, 80, dtype=torch.float64), 80, 90)
            largest = torch.linalg.svdvals(orthogonalise(matrix.to(dtype), method, steps).double())[0]
            assert largest <= largest_singular_value(steps)


@pytest.mark.parametrize("shape", [(6, 6), (6, 30), (3, 6, 30), (2, 3, 6, 7)])
@pytest.mark.parametrize("coefficients", [POLAR_EXPRESS[:5], [NEWTON_SCHULZ] * 5])
def test_steps_that_share_a_product_are_those_of_the_formula(shape, coefficients):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = matrix / (SAFETY * torch.linalg.matrix_norm(matrix @ matrix.mT, keepdim=True).sqrt())
    for count, (a, b, c) in enumerate(coefficients, start=1):
        cube = expected @ expected.mT @ expected
        expected = a * expected + b * cube + c * expected @ expected.mT @ cube
        torch.testing.assert_close(apply_polynomials(matrix, coefficients[:count]), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("shape", "dtype", "units", "method", "working"),
    [
        ((200, 140), torch.float64, True, "gram", torch.float64),
        ((10, 140), torch.float32, True, "gram", torch.float32),
        ((2, 32, 50), torch.bfloat16, True, "gram", torch.float32),
        ((33, 100), torch.float32, True, "halley", torch.float32),
        ((2, 100, 40), torch.float32, False, "halley", torch.float32),
        ((140, 140), torch.float32, True, "halley", torch.bfloat16),
        ((2, 400, 130), torch.float32, True, "halley", torch.bfloat16),
        ((140, 150), torch.bfloat16, True, "halley", torch.bfloat16),
        ((140, 150), torch.float16, True, "halley", torch.bfloat16),
        ((140, 150), torch.float32, False, "halley", torch.float32),
        ((140, 150), torch.bfloat16, False, "halley", torch.float32),
    ],
)
def test_auto_goes_by_precision_size_and_processor(monkeypatch, shape, dtype, units, method, working):
    monkeypatch.setattr(orthogonal, "_has_bfloat16_products", lambda: units)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(orthogonalise(matrix), orthogonalise(matrix.to(working), method).to(dtype))


def test_processors_with_bfloat16_products_say_so(monkeypatch):
    asked = orthogonal._has_bfloat16_products.__wrapped__
    for known in ({}, {"avx512_bf16": False, "avx2": True}, {"avx512_bf16": True}, {"amx_bf16": True}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known, raising=False)
        assert asked() == any(known.get(unit) for unit in ("avx512_bf16", "amx_bf16"))
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # before torch 2.10
    assert not asked()


@pytest.mark.parametrize("shape", [(130, 130), (130, 800), (800, 130)])
@pytest.mark.parametrize(("method", "steps"), [("halley", None), ("polar_express", 6), ("newton_schulz", 5)])
def test_bfloat16_keeps_the_directions(shape, method, steps):
    # From the largest singular value to a thousandth of it; the largest ones must not leak into the others.
    sigma = torch.logspace(0, -3, 130, dtype=torch.float64)
    matrix, _ = with_spectrum(sigma, *shape)
    exact, rounded = (orthogonalise(m, method, steps).double() for m in (matrix, matrix.bfloat16()))
    kept = (sigma > 1e-2 * sigma.norm()).double()
    left = isometry(shape[0], 130, 1)
    assert torch.linalg.matrix_norm((rounded - exact).mT @ (left * kept), 2) <= 0.15
    assert torch.linalg.matrix_norm(rounded - exact) <= 0.15 * torch.linalg.matrix_norm(exact)


def test_gram_is_the_polar_factor():
    matrix, polar = with_spectrum(torch.logspace(0, -3, 30, dtype=torch.float64), 30, 50)
    torch.testing.assert_close(orthogonalise(matrix, "gram"), polar, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["auto", *METHODS])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_batches_and_transposes_agree_with_single_matrices(method, shape):
    torch.manual_seed(0)
    batch = torch.randn(2, 3, *shape, dtype=torch.float64)
    before = batch.clone()
    result = orthogonalise(batch, method)
    assert torch.equal(batch, before)
    torch.testing.assert_close(orthogonalise(batch.mT, method), result.mT)
    torch.testing.assert_close(result[1, 2], orthogonalise(batch[1, 2], method))


@pytest.mark.parametrize("method", ["auto", *METHODS])
@pytest.mark.parametrize("scale", [1e-35, 1e-12, 1e12, 1e35])
@pytest.mark.parametrize("shape", [(5, 8), (50, 8, 40), (130, 300)])
def test_the_scale_of_the_matrix_does_not_matter(method, scale, shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    scaled, atol = orthogonalise(scale * matrix, method), 1e-5 if min(shape) < 128 else 0.02
    torch.testing.assert_close(scaled, orthogonalise(matrix, method), rtol=0, atol=atol)


@pytest.mark.parametrize("method", ["auto", *METHODS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zero_stays_zero_beside_others(method, dtype):
    matrix = torch.zeros(2, 3, 4, dtype=dtype)
    matrix[1, 0, 0] = 5
    result = orthogonalise(matrix, method)
    assert not result[0].any()
    assert abs(result[1, 0, 0].item() - 1) <= METHODS.get(method, METHODS["svd"]).error + 0.01
    assert result[1].count_nonzero() == 1


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("rank", [1, 3, 20])
@pytest.mark.parametrize("shape", [(64, 784), (784, 64), (200, 200)])
def test_a_matrix_of_lower_rank_gives_its_partial_isometry(method, rank, shape):
    matrix, polar = with_spectrum(torch.linspace(1, 0.5, rank, dtype=torch.float64), *shape)
    torch.testing.assert_close(orthogonalise(matrix, method), polar, rtol=0, atol=1e-12)
    single = orthogonalise(matrix.float(), method).double()
    torch.testing.assert_close(single, polar, rtol=0, atol=1e-4)
    assert torch.linalg.svdvals(single)[rank:].max() < 1e-4  # no noise was blown up to length one


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("shape", [(128, 784), (300, 2000)])
def test_rounding_that_adds_up_is_still_noise(method, shape):
    # All products are equal, so every partial sum is rounded alike: the errors of the Gram matrix do not cancel.
    result = orthogonalise(torch.full(shape, 0.1), method)
    torch.testing.assert_close(result, torch.full(shape, 1 / math.sqrt(math.prod(shape))), rtol=1e-3, atol=0)


@pytest.mark.parametrize("method", ["auto", *METHODS])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(3, 4), (50, 60), (130, 140)])
def test_what_is_not_finite_becomes_nan_and_spares_the_rest_of_the_batch(method, bad, shape):
    torch.manual_seed(0)
    matrix = torch.randn(2, *shape)
    expected = orthogonalise(matrix[1], method)
    matrix[0, 1, 2] = bad
    result = orthogonalise(matrix, method)
    assert result[0].isnan().all()
    torch.testing.assert_close(result[1], expected, rtol=0, atol=1e-5 if min(shape) < 128 else 0.02)


@pytest.mark.parametrize("method", ["auto", *METHODS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_as_it_came(method, dtype):
    torch.manual_seed(0)
    matrix = torch.randn(20, 50).to(dtype)
    result = orthogonalise(matrix, method)
    assert result.dtype == dtype
    assert (torch.linalg.svdvals(result.double()) - 1).abs().max() <= METHODS.get(method, METHODS["gram"]).error + 0.03


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_autocast_does_not_reach_inside(method):
    torch.manual_seed(0)
    matrix = torch.randn(5, 8)
    expected = orthogonalise(matrix, method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(orthogonalise(matrix, method), expected)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 1000))
def test_the_result_is_orthogonal_and_turns_the_matrix_positive(rows, columns, seed):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q = orthogonalise(matrix)
    k = min(rows, columns)
    product = q @ q.mT if rows <= columns else q.mT @ q
    torch.testing.assert_close(product, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-5)
    # The polar factor is the one orthogonal matrix for which q^T M is symmetric and positive semidefinite.
    stretch = q.mT @ matrix
    torch.testing.assert_close(stretch, stretch.mT, rtol=0, atol=1e-5)
    assert torch.linalg.eigvalsh(stretch).min() >= -1e-5


def test_empty_matrices_pass_through():
    assert orthogonalise(torch.zeros(0, 4)).shape == (0, 4)
    assert orthogonalise(torch.zeros(0, 3, 4), "newton_schulz").shape == (0, 3, 4)


def test_steps_are_counted():
    matrix = torch.diag(torch.tensor([1.0, 0.01], dtype=torch.float64))
    defaults = {name: METHODS[name].steps for name in ITERATIVE}
    for name, steps in defaults.items():
        assert torch.equal(orthogonalise(matrix, name), orthogonalise(matrix, name, steps))
        assert not torch.allclose(orthogonalise(matrix, name, 1), orthogonalise(matrix, name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "svdd"}, r"method='svdd'.*newton_schulz"),
        ({"method": "newton_schulz", "steps": 0}, r"steps=0"),
        ({"method": "newton_schulz", "steps": 2.5}, r"steps=2\.5"),
        ({"method": "newton_schulz", "steps": True}, r"steps=True"),
        ({"method": "gram", "steps": 5}, r"steps=5.*no effect.*'gram'.*polar_express"),
        ({"steps": 5}, r"steps=5.*no effect.*'auto'"),
        ({"matrix": torch.zeros(3)}, r"\[3\]"),
        ({"matrix": torch.zeros(3, 3, dtype=torch.long)}, r"int64"),
        ({"matrix": torch.zeros(3, 3, dtype=torch.cfloat)}, r"complex64"),
    ],
)
def test_refusals_name_the_call_and_the_value(arguments, message):
    with pytest.raises(ArgumentError, match=rf"^orthogonalise\(.*{message}"):
        orthogonalise(**{"matrix": torch.eye(3), **arguments})
