"""What fits of many small matrices leave of them: the native kernel against PyTorch and against plain formulas."""

import pytest
import torch
from cases import corrupted, zeta_in_a_gap

import fastpref
from fastpref._lowrank.batched_verdict import batched_verdict
from fastpref._lowrank.noise import MAD, OUTLIER

pytestmark = pytest.mark.sanitize

SHAPES = [(1, 1, 1), (3, 5, 2), (8, 32, 1), (31, 17, 3), (40, 64, 8), (90, 33, 10)]
EXACT = ("rate", "worst", "row_rates", "column_rates")  # counts, divided in the same way


def fits(m, n, rank, dtype, missing=0.2, batch=4):
    """Matrices, factors some way from them, and a median |D - L| that no |D - L| decides by its rounding."""
    made = [corrupted(m, n, rank, 0.1, observed=1 - missing, noise=0.1, seed=seed) for seed in range(batch)]
    low, data = (torch.stack(part) for part in zip(*made, strict=True))
    u, s, vh = torch.linalg.svd(low + 0.01 * torch.randn_like(low), full_matrices=False)
    left, right = u[..., :rank] * s[:, None, :rank], vh[:, :rank].mT.contiguous()
    data, left, right = (tensor.to(dtype) for tensor in (data, left, right))
    zetas = [zeta_in_a_gap(*parts) for parts in zip(data, left, right, strict=True)]
    return data, left, right, torch.tensor(zetas, dtype=torch.float64) / (OUTLIER * MAD)


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("missing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(simd, shape, dtype, missing):
    data, left, right, median = fits(*shape, dtype, missing)
    found = batched_verdict(data, left, right, median, backend="native")
    exact = batched_verdict(data.double(), left.double(), right.double(), median, backend="reference")
    unit = torch.finfo(dtype).eps
    terms = shape[1] * unit  # a row is summed in the dtype of the matrix
    for name in EXACT:
        torch.testing.assert_close(getattr(found, name), getattr(exact, name), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.mean, exact.mean, rtol=terms, atol=0)
    torch.testing.assert_close(found.residual, exact.residual, rtol=0, atol=8 * shape[2] * unit + terms)
    low = left.double() @ right.double().mT
    size = torch.linalg.vector_norm(low, dim=(-2, -1)).amax()
    rebuilt = (found.U.double() * found.S.double().unsqueeze(-2)) @ found.Vh.double()
    assert (rebuilt - low).abs().max() <= 8 * shape[2] * unit * size
    torch.testing.assert_close(found.S.double(), exact.S, rtol=0, atol=(8 * shape[2] * unit * size).item())
    assert (found.S.diff(dim=-1) <= 0).all()
    for basis in (found.U.mT, found.Vh):
        gram = basis.double() @ basis.double().mT
        eye = torch.eye(gram.shape[-1], dtype=torch.float64).expand_as(gram)
        there = min(shape[:2]) >= shape[2]
        assert not there or (gram - eye).abs().max() <= 8 * max(shape[:2]) ** 0.5 * unit


def test_by_formula():
    data, left, right, median = fits(20, 30, 3, torch.float64)
    found = batched_verdict(data, left, right, median, backend="native")
    residual = data - left @ right.mT
    far = residual.abs() > OUTLIER * MAD * median[:, None, None]
    there = ~data.isnan()
    torch.testing.assert_close(found.rate, far.sum((-2, -1)) / there.sum((-2, -1)).double())
    torch.testing.assert_close(found.row_rates, far.sum(-1) / there.sum(-1).double())
    torch.testing.assert_close(found.column_rates, far.sum(-2) / there.sum(-2).double())
    torch.testing.assert_close(found.worst, torch.cat([found.row_rates, found.column_rates], -1).amax(-1))
    torch.testing.assert_close(found.mean, data.abs().nanmean((-2, -1)))
    rest = torch.where(far | ~there, 0, residual).norm(dim=(-2, -1))
    torch.testing.assert_close(found.residual, rest / data.nan_to_num(0).norm(dim=(-2, -1)))


def test_whatever_the_threads_and_the_neighbours(simd):
    data, left, right, median = fits(24, 33, 2, torch.float32, batch=7)
    alone = batched_verdict(data, left, right, median, backend="native")
    for threads in (2, 5):
        torch.set_num_threads(threads)
        found = batched_verdict(data, left, right, median, backend="native")
        assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))
    one = [batched_verdict(data[b : b + 1], left[b : b + 1], right[b : b + 1], median[b : b + 1]) for b in range(7)]
    assert all(torch.equal(whole, torch.cat(parts)) for whole, parts in zip(alone, zip(*one, strict=True), strict=True))


@pytest.mark.parametrize("backend", ["native", pytest.param("reference", marks=pytest.mark.reference)])
def test_nothing(backend):
    for shape, rank in (((0, 4, 5), 2), ((3, 4, 5), 0)):
        batch, m, n = shape
        found = batched_verdict(
            torch.randn(shape), torch.zeros(batch, m, rank), torch.zeros(batch, n, rank), torch.ones(batch), backend
        )
        assert [tuple(part.shape) for part in found] == [
            (batch, m, rank), (batch, rank), (batch, rank, n), *[(batch,)] * 4, (batch, m), (batch, n),
        ]  # fmt: skip


def test_backends():
    assert fastpref.build_info()["backends"]["batched_verdict"]["cpu"]["native"] == "available"
    with pytest.raises(ValueError, match="backend must be"):
        batched_verdict(*fits(3, 4, 1, torch.float32), backend="triton")
