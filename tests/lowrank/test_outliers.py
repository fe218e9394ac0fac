"""outliers and outlier_counts against float64, on every backend."""

import pytest
import torch
from cases import DTYPES, LAYOUTS, make, zeta_in_a_gap
from tolerance import unit_roundoff

from fastpref._lowrank.outliers import outlier_counts, outliers
from fastpref._lowrank.storage import entries

pytestmark = pytest.mark.sanitize

SHAPES = [(61, 77), (1, 1), (3, 5), (17, 32), (5, 1033), (70, 33)]


def truth(matrix, left, right, threshold, scale):
    """R, where it is far from zero, and what rounding the terms it is the sum of may cost, however they cancel."""
    stored = scale * entries(matrix, torch.float64)
    residual = stored - left.double() @ right.double().t()
    terms = stored.abs() + left.double().abs() @ right.double().abs().t()
    return residual, residual.abs() > threshold, (left.shape[1] + 2) * unit_roundoff(left.dtype) * terms


@pytest.mark.numerics
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [0, 4])
def test_matches_float64(cpu_backend, shape, dtype, layout, rank):
    matrix, left, right = make(*shape, rank, dtype)
    scale = 0.125 if dtype == torch.int8 else 0.75
    threshold = zeta_in_a_gap(matrix, left, right, scale)
    laid = LAYOUTS[layout](matrix)
    before = matrix.clone()
    residual, far, rounding = truth(matrix, left, right, threshold, scale)
    found = outliers(laid, left, right, threshold, scale=scale, backend=cpu_backend)
    assert torch.equal(torch.stack(found[:2], 1), far.nonzero())
    assert found.values.dtype == left.dtype
    assert ((found.values.double() - residual[far]).abs() <= rounding[far]).all()
    counts = outlier_counts(laid, left, right, threshold, scale=scale, backend=cpu_backend)
    there = ~residual.isnan()
    assert torch.equal(counts.rows, far.sum(1))
    assert torch.equal(counts.columns, far.sum(0))
    assert torch.equal(counts.row_observed, there.sum(1))
    assert torch.equal(counts.column_observed, there.sum(0))
    near = there & ~far
    rest = residual[near].square().sum()
    cancelled = (2 * residual[near].abs() * rounding[near] + rounding[near].square()).sum()
    assert (counts.rest_squares - rest).abs() <= cancelled + 1e-6 * rest
    torch.testing.assert_close(matrix, before, rtol=0, atol=0, equal_nan=True)


def test_everything_and_nothing(cpu_backend):
    matrix, left, right = make(40, 50, 3)
    there = ~matrix.isnan()
    assert len(outliers(matrix, left, right, 0.0, backend=cpu_backend).rows) == there.sum()
    assert len(outliers(matrix, left, right, torch.inf, backend=cpu_backend).rows) == 0
    assert outlier_counts(matrix, left, right, torch.inf, backend=cpu_backend).rows.sum() == 0
    for shape in ((0, 50), (40, 0)):
        part = matrix[: shape[0], : shape[1]].contiguous()
        found = outliers(part, left[: shape[0]], right[: shape[1]], 1.0, backend=cpu_backend)
        assert [t.shape for t in found] == [(0,)] * 3
        counts = outlier_counts(part, left[: shape[0]], right[: shape[1]], 1.0, backend=cpu_backend)
        assert [t.shape for t in counts[:4]] == [(shape[0],), (shape[1],)] * 2
        assert counts.rest_squares == 0


def test_threads_do_not_matter(cpu_backend):
    matrix, left, right = make(200, 300, 3)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found = outliers(matrix, left, right, 1.0, backend=cpu_backend)
            results.append((*found, *outlier_counts(matrix, left, right, 1.0, backend=cpu_backend)))
    finally:
        torch.set_num_threads(threads)
    if cpu_backend == "native":  # torch's own sums and products may change with them
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_refused():
    for function in (outliers, outlier_counts):
        with pytest.raises(ValueError, match=r"threshold must not be negative, got -1\.0"):
            function(*make(4, 6, 2), -1.0)
        with pytest.raises(TypeError, match="threshold must be a float that is not negative, got str"):
            function(*make(4, 6, 2), "1")
        with pytest.raises(ValueError, match=r"backend must be None or one of .* got 'cublas'"):
            function(*make(4, 6, 2), 1.0, backend="cublas")
        with pytest.raises(ValueError, match=r"right must have shape \[6, r\]"):
            function(make(4, 6, 2)[0], torch.ones(4, 2), torch.ones(5, 2), 1.0)


def test_factors_that_are_not_finite_are_refused():
    matrix, left, right = make(4, 6, 2)
    left[1, 0] = torch.nan
    for function in (outliers, outlier_counts):
        with pytest.raises(ValueError, match="left must be finite, got nan"):
            function(matrix, left, right, 1.0)
