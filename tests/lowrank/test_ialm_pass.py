"""The convex program of one large matrix: its native reads against float64."""

import pytest
import torch
from cases import DTYPES

from fastpref._lowrank.ialm_pass import State, dual_product, dual_sums, ialm_product, ialm_update, new_state, set_dual
from fastpref._lowrank.storage import entries, factor_dtype

pytestmark = pytest.mark.sanitize

SHAPES = [(1, 1), (3, 5), (8, 32), (61, 77), (17, 33), (5, 1033), (131, 64)]
LAM = 0.3


def storage(m, n, dtype, missing):
    """A matrix with rows further apart than they are long, and the scale of what it stores."""
    values = torch.randn(m, n + 3)
    values[torch.rand(m, n + 3) < missing] = torch.nan
    if dtype == torch.int8:
        return (values * 20).round().nan_to_num(-128).to(dtype)[:, :n], 0.0517
    return values.to(dtype)[:, :n], 0.75


def states(m, n, dtype, missing=0.2):
    """A state to be tested, and the same in float64."""
    matrix, scale = storage(m, n, dtype, missing)
    state = new_state(matrix, scale, LAM, complete=missing == 0)
    set_dual(state, 0.05)
    wide = State(entries(matrix, torch.float64), scale, state.t[:m, :n].double().clone(), LAM)
    torch.testing.assert_close(wide.t, (0.05 * scale * wide.matrix).nan_to_num(0.0), rtol=1e-6, atol=1e-7)
    return state, wide


def agree(found, expected, dtype):
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    expected = torch.as_tensor(expected, dtype=torch.float64)
    size = max(1.0, float(expected.abs().amax()) if expected.numel() else 0.0)  # inputs are of order 1
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64), expected, rtol=tolerance, atol=tolerance * size
    )


@pytest.mark.numerics
@pytest.mark.parametrize("missing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(cpu_backend, shape, dtype, missing):
    m, n = shape
    state, wide = states(m, n, dtype, missing)
    before = state.matrix.clone()
    wanted = factor_dtype(state.matrix)
    for q, k, mu, mu_before, mu_next in ((2, 5, 2.0, 2.0, 3.0), (1, 1, 3.0, 2.0, 3.0), (4, 15, 1.5, 3.0, 2.25)):
        left, right = torch.randn(m, q, dtype=wanted), torch.randn(n, k, dtype=wanted)
        penalties = {"mu": mu, "mu_before": mu_before, "mu_next": mu_next}
        found = ialm_update(state, left, right, **penalties, backend=cpu_backend)
        expected = ialm_update(wide, left.double(), right.double(), **penalties, backend="reference")
        assert found.products.dtype == wanted
        agree(found.products, expected.products, wanted)
        agree(torch.stack(found[1:]), torch.stack(expected[1:]), wanted)
        agree(state.t[:m, :n], wide.t, wanted)
        wide.t.copy_(state.t[:m, :n])  # rounding does not add up
        penalties = {"mu": mu, "mu_next": mu_next}
        for transposed in (False, True):
            factor = torch.randn(m if transposed else n, k, dtype=wanted)
            product = ialm_product(state, factor, **penalties, transposed=transposed, backend=cpu_backend)
            wide_factor = factor.double()
            exact = ialm_product(wide, wide_factor, **penalties, transposed=transposed, backend="reference")
            agree(product, exact, wanted)
            product = dual_product(state, factor, transposed=transposed, backend=cpu_backend)
            agree(product, dual_product(wide, wide_factor, transposed=transposed, backend="reference"), wanted)
        sums, exact = dual_sums(state, mu=mu, backend=cpu_backend), dual_sums(wide, mu=mu, backend="reference")
        assert sums.nonzero == pytest.approx(exact.nonzero, abs=2, rel=1e-3)  # int8 has ties with the threshold
        agree(sums.sparse, exact.sparse, wanted)
        agree(sums.inner, exact.inner, wanted)
        agree(sums.largest, exact.largest, wanted)
    torch.testing.assert_close(state.matrix, before, rtol=0, atol=0, equal_nan=True)
    assert state.t.isfinite().all()


@pytest.mark.reference
def test_the_reference_is_the_iteration():
    """Against its formulas, one tensor for each."""
    state, wide = states(40, 30, torch.float64)
    data, there = 0.75 * wide.matrix, ~wide.matrix.isnan()
    left, right, q = (torch.randn(side, 3, dtype=torch.float64) for side in (40, 30, 30))
    low, mu = left @ right.t(), 2.0
    dual, sparse, low_before = torch.where(there, 0.05 * data, 0), torch.zeros(40, 30), torch.zeros(40, 30)
    for mu_before, mu, mu_next in ((1.5, 1.5, 2.0), (1.5, 2.0, 2.5)):
        found = ialm_update(state, left, right, mu=mu, mu_before=mu_before, mu_next=mu_next, backend="reference")
        w = torch.where(there, data - low + dual / mu, 0)
        sparse_new = w.sign() * (w.abs() - LAM / mu).clamp(min=0)
        dual_new = mu * (w - sparse_new)
        agree(found.residual, torch.where(there, data - low - sparse_new, 0).norm(), torch.float64)
        moved = torch.where(there, sparse_new - sparse, low - low_before)
        agree(found.change, mu * moved.norm(), torch.float64)
        agree(found.dual, dual_new.norm(), torch.float64)
        dual, sparse, low_before = dual_new, sparse_new, low
        target = torch.where(there, data - sparse + dual / mu_next, low)
        agree(found.products, target @ right, torch.float64)
        for transposed, factor in ((False, q), (True, left)):
            options = {"transposed": transposed, "backend": "reference"}
            by = (lambda x: x.t()) if transposed else (lambda x: x)
            agree(
                ialm_product(state, factor, mu=mu, mu_next=mu_next, **options), by(target) @ factor, torch.float64
            )  # fmt: skip
            agree(dual_product(state, factor, **options), by(dual) @ factor, torch.float64)
        sums = dual_sums(state, mu=mu, backend="reference")
        agree(sums.sparse, sparse.abs().sum(), torch.float64)
        agree(sums.inner, torch.where(there, dual * data, 0).sum(), torch.float64)
        agree(sums.largest, dual.abs().amax(), torch.float64)
        assert sums.nonzero == (sparse.abs() > 1e-12).sum()
        left, low = left * 0.5, low * 0.5


@pytest.mark.parametrize("shape", [(0, 7), (7, 0)], ids=str)
def test_nothing(cpu_backend, shape):
    state, _ = states(*shape, torch.float32)
    found = ialm_update(
        state, *(torch.zeros(side, 2) for side in shape), mu=1.0, mu_before=1.0, mu_next=1.0, backend=cpu_backend
    )
    assert (found.products == 0).all()
    assert found.residual == 0
    assert (dual_product(state, torch.zeros(shape[0], 2), transposed=True, backend=cpu_backend) == 0).all()


def test_threads_do_not_matter(cpu_backend):
    if cpu_backend == "reference":
        pytest.skip("torch's own products may change with them")
    before = torch.get_num_threads()
    results = []
    state, _ = states(400, 300, torch.float32)
    left, right = torch.randn(400, 3), torch.randn(300, 7)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            own = state._replace(t=state.t.clone())
            update = ialm_update(own, left, right, mu=2.0, mu_before=1.0, mu_next=3.0, backend=cpu_backend)
            transposed = ialm_product(own, left, mu=2.0, mu_next=3.0, transposed=True, backend=cpu_backend)
            results.append((*update, own.t, transposed, torch.tensor(dual_sums(own, mu=2.0, backend=cpu_backend))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
