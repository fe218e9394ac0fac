"""The native convex program of many small matrices against the PyTorch one, on every SIMD level, shape and pattern."""

from functools import cache

import pytest
import torch
from cases import SEED, corrupted, skew_corrupted

import fastpref
from fastpref._lowrank import ialm
from fastpref._lowrank.batched_ialm import batched_ialm, is_small

pytestmark = pytest.mark.sanitize

FIELDS = ("U", "S", "Vh", "rank", "iterations", "residual", "gap", "converged", "dense_share", "median")


def low_rank(found):
    return (found.U * found.S.unsqueeze(-2)) @ found.Vh


def solve(data, **options):
    options = {"tol": 1e-7 if data.dtype == torch.float64 else 1e-6, "max_iter": 1000} | options
    return batched_ialm(data, **options)


def by_reference(data, **options):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # the matrices are tiny
        return solve(data, backend="reference", **options)
    finally:
        torch.set_num_threads(threads)


def both(data, **options):
    return solve(data, backend="native", **options), by_reference(data, **options)


def objective(data, low):
    """|L|_* + lambda |D - L|_1 over what is observed, in float64."""
    lam = ialm.default_lambda(~data.isnan(), "entries")
    difference = (data.double() - low.double()).nan_to_num(0.0)
    return torch.linalg.svdvals(low.double()).sum(-1) + lam * difference.abs().sum((-2, -1))


def errors(found, low):
    return (low_rank(found).double() - low).norm(dim=(-2, -1)) / low.norm(dim=(-2, -1)).clamp(min=1e-30)


@cache
def recovered_by_reference(m, n, rank, options, dtype):
    low, data = made(m, n, rank, 4, **dict(options))
    return low, data.to(dtype), by_reference(data.to(dtype))


@cache
def any_matrices(m, n):
    """Most with no low rank to recover, and the reference's answers in float64."""
    rng = torch.Generator().manual_seed(SEED + 31 * m + n)
    data = torch.randn(6, m, n, generator=rng, dtype=torch.float64)
    data[1] = data[1, :, :1] * data[1, :1, :]
    data[2].masked_fill_(torch.rand(m, n, generator=rng) < 0.3, torch.nan)
    data[3] = data[3].sign() * (torch.rand(m, n, generator=rng) < 0.3)
    data[4] += 3
    return data, by_reference(data, max_iter=300)


def made(m, n, rank, count, **options):
    parts = [corrupted(m, n, rank, seed=seed, **options) for seed in range(count)]
    return torch.stack([low for low, _ in parts]), torch.stack([data for _, data in parts])


@pytest.mark.reference
@pytest.mark.numerics
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("m", "n", "rank", "options"),
    [
        (32, 32, 1, {}),
        (40, 64, 2, {"share": 0.1}),
        (61, 47, 2, {"observed": 0.8}),
        (64, 64, 4, {}),
        (64, 64, 8, {}),
        (100, 70, 3, {"share": 0.1, "observed": 0.9}),
        (30, 200, 1, {}),
    ],
)
def test_recovers_as_the_reference_does(simd, m, n, rank, options, dtype):
    low, data, reference = recovered_by_reference(m, n, rank, tuple(options.items()), dtype)
    native = solve(data)
    assert torch.equal(native.converged, reference.converged)
    ours, theirs = errors(native, low), errors(reference, low)
    exact = 1e-5 if dtype == torch.float32 else 1e-6
    assert (theirs < exact).double().mean() >= 0.5
    assert ((ours < exact) == (theirs < exact)).all()
    assert (native.rank[ours < exact] == rank).all()
    settled = native.converged
    torch.testing.assert_close(native.gap[settled], reference.gap[settled], rtol=0, atol=ialm.GAP)
    assert (native.gap[settled] <= ialm.GAP).all()
    assert (native.residual[settled] < 1e-6).all()
    torch.testing.assert_close(native.dense_share, reference.dense_share, rtol=0, atol=0.02)
    if dtype == torch.float64:  # the median is that of rounding where L is exact
        assert (native.median < 1e-5).all()


SHAPES = [(1, 1), (1, 9), (9, 1), (3, 5), (8, 7), (15, 16), (17, 16), (33, 20)]


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_certified_answers_minimise(simd, m, n, dtype):
    data, best = any_matrices(m, n)
    native = solve(data.to(dtype))
    assert low_rank(native).isfinite().all()
    certified = native.converged & best.converged & ~data.isnan().any(-1).any(-1)
    assert certified.any()
    ours, optimum = objective(data, low_rank(native)), objective(data, low_rank(best))
    assert (ours[certified] <= optimum[certified] * (1 + 2 * ialm.GAP) + 1e-5).all()
    assert (ours >= optimum * (1 - 2 * ialm.GAP) - 1e-5)[best.converged].all()


def test_factors_are_singular_vectors(simd):
    _, data = made(50, 40, 3, 3)
    data[2] = torch.randn(50, 40, dtype=torch.float64)
    for dtype, bound in ((torch.float32, 1e-4), (torch.float64, 1e-6)):
        found = solve(data.to(dtype))
        assert found.U.dtype == found.S.dtype == found.Vh.dtype == found.median.dtype == dtype
        assert found.U.shape[-1] == found.S.shape[-1] == found.Vh.shape[-2] == found.rank.max()
        for b in range(3):
            r = found.rank[b]
            u, s, vh = found.U[b], found.S[b], found.Vh[b]
            assert (u[:, r:] == 0).all()
            assert (s[r:] == 0).all()
            assert (vh[r:] == 0).all()
            assert (s[:r].diff() <= 0).all()
            eye = torch.eye(int(r), dtype=dtype)
            torch.testing.assert_close(u[:, :r].mT @ u[:, :r], eye, rtol=0, atol=bound)
            torch.testing.assert_close(vh[:r] @ vh[:r].mT, eye, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whatever_the_threads_and_the_neighbours(simd, dtype):
    data = made(20, 33, 2, 7)[1].to(dtype)
    data[3] = torch.randn(20, 33)
    data[5, 2] = torch.nan
    threads = torch.get_num_threads()
    together = solve(data)
    order = torch.tensor([4, 2, 6, 0, 5, 1, 3])
    moved = solve(data[order])
    try:
        torch.set_num_threads(1)
        alone = [solve(matrix.unsqueeze(0)) for matrix in data]
    finally:
        torch.set_num_threads(threads)
    for field in FIELDS[3:]:
        whole = getattr(together, field)
        torch.testing.assert_close(
            whole, torch.cat([getattr(one, field) for one in alone]), rtol=0, atol=0, equal_nan=True
        )
        torch.testing.assert_close(whole[order], getattr(moved, field), rtol=0, atol=0, equal_nan=True)
    for b, one in enumerate(alone):
        r = int(one.rank)
        assert torch.equal(together.U[b, :, :r], one.U[0])
        assert torch.equal(together.S[b, :r], one.S[0])
        assert torch.equal(together.Vh[b, :r], one.Vh[0])


def test_patterns(simd):
    low, data = corrupted(24, 30, 2)
    everything = torch.full_like(data, torch.nan)
    line = data.clone()
    line[3], line[:, 5] = torch.nan, torch.nan
    one = everything.clone()
    one[2, 2] = 1.5
    constant = torch.full_like(data, -3.25)
    spike = torch.zeros_like(data)
    spike[7, 9] = 100.0
    for dtype in (torch.float32, torch.float64):
        batch = torch.stack([data, everything, line, one, torch.zeros_like(data), constant, spike]).to(dtype)
        for found in both(batch):
            dense = low_rank(found).double()
            assert dense.isfinite().all()
            assert found.converged.tolist() == [True, False, True, True, True, True, True]
            assert found.rank[[1, 4]].tolist() == [0, 0]
            assert found.iterations[[1, 4]].tolist() == [0, 0]
            torch.testing.assert_close(dense[0], low, rtol=0, atol=1e-4)
            inside = torch.ones_like(data, dtype=torch.bool)
            inside[3], inside[:, 5] = False, False
            torch.testing.assert_close(dense[2][inside], low[inside], rtol=0, atol=1e-4)
            torch.testing.assert_close(dense[5], constant, rtol=1e-4, atol=0)
            assert found.rank[5] == 1
            assert dense[6].abs().max() < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_median_is_of_the_observed_entries(simd, dtype):
    data = any_matrices(12, 17)[0][0].to(dtype).repeat(18, 1, 1)
    for b in range(17):
        data[b, :, b] = torch.nan  # in every lane of a vector, the last of the matrix among them
    data[17, -1] = torch.nan
    found = solve(data, max_iter=20)
    residual = (data.double() - low_rank(found).double()).abs().flatten(1)
    middle = residual.nanmedian(dim=1).values
    rounding = 1e-5 * middle if dtype == torch.float32 else 1e-12 * middle
    # the solver's is exact to a percent, and from above
    assert (found.median.double() >= middle - rounding).all()
    assert (found.median.double() <= 1.01 * middle + rounding).all()


def test_hopeless_matrices_say_so(simd):
    low, data = made(32, 32, 2, 3)
    data[1] = corrupted(32, 32, 12, 0.3, observed=0.4)[1]
    found = solve(data.float(), max_iter=60)
    assert found.converged.tolist() == [True, False, True]
    assert found.iterations[1] == 60
    assert (found.iterations[[0, 2]] < 60).all()
    assert errors(found, low)[[0, 2]].max() < 1e-5
    assert low_rank(found).isfinite().all()
    short = solve(data.float(), max_iter=3)
    assert short.iterations.tolist() == [3, 3, 3]
    assert not short.converged.any()


def test_scales(simd):
    low, data = made(30, 20, 2, 2)
    base = solve(data.float())
    for exponent in (-60, -20, 20, 60):
        found = solve(data.float() * 2.0**exponent)
        assert torch.equal(found.iterations, base.iterations)
        assert torch.equal(low_rank(found), low_rank(base) * 2.0**exponent)
    for size in (1e-38, 1e-42, 1e36):  # subnormal, and near the largest
        found = solve((data * size).float())
        assert low_rank(found).isfinite().all()
        if size != 1e-42:
            assert (errors(found, low * size) < 1e-4).all()


def test_transposition_and_permutation(simd):
    _, data = made(30, 41, 2, 3, observed=0.9)
    found = solve(data)
    turned = solve(data.mT.contiguous())
    assert torch.equal(turned.Vh.mT, found.U)
    assert torch.equal(turned.S, found.S)
    assert torch.equal(solve(data.mT.contiguous().mT).U, found.U)  # strides
    base = low_rank(found)
    rows, columns = torch.randperm(30), torch.randperm(41)
    moved = low_rank(solve(data[:, rows][:, :, columns]))
    torch.testing.assert_close(moved, base[:, rows][:, :, columns], rtol=0, atol=1e-4)


def test_lambda():
    _, data = made(40, 40, 2, 2)
    same = 1 / 40**0.5
    for found, other in zip(both(data, lam=same), both(data), strict=True):
        torch.testing.assert_close(low_rank(found), low_rank(other), rtol=0, atol=1e-6)
    for found in both(data, lam=1e-3):  # S is nearly free
        assert (low_rank(found).abs() < 1e-6).all()
    for found in both(data, lam=10.0):  # and here far too dear
        torch.testing.assert_close(low_rank(found), data, rtol=0, atol=1e-3)


def test_rpca_goes_through_it():
    assert is_small(64, 64)
    assert not is_small(2000, 2000)
    _, data = made(28, 35, 2, 4, observed=0.9)
    batch = fastpref.rpca(data.view(2, 2, 28, 35), sparse="dense")
    native = solve(data)
    torch.testing.assert_close(batch.low_rank().view_as(data), low_rank(native), rtol=0, atol=1e-9)
    for field in ("rank", "gap", "iterations", "converged"):
        assert torch.equal(getattr(batch.info, field).flatten(), getattr(native, field))
    for b in range(4):
        single = fastpref.rpca(data[b])
        torch.testing.assert_close(single.low_rank(), low_rank(native)[b], rtol=0, atol=1e-7)
        assert single.info.gap == native.gap[b]
        seen = []
        watched = fastpref.rpca(data[b], callback=lambda progress, seen=seen: seen.append(progress))
        assert len(seen) == watched.info.iterations
        torch.testing.assert_close(watched.low_rank(), single.low_rank(), rtol=0, atol=1e-5)
    infinite = data.clone()
    infinite[2, 3, 4] = torch.inf
    with pytest.raises(ValueError, match=r"finite.*inf.*\[2, 3, 4\]"):
        fastpref.rpca(infinite)
    with pytest.raises(ValueError, match="finite"):
        fastpref.rpca(infinite[2])
    assert fastpref.rpca(data[:0]).U.shape == (0, 28, 0)


def test_noise_is_polished_away_in_batches():
    low, data = made(60, 60, 3, 4, share=0.1, noise=0.05)
    shrunk = solve(data)
    assert (shrunk.dense_share > ialm.NOISY).all()
    found = fastpref.rpca(data)
    assert (found.info.rank == 3).all()
    polished = (found.low_rank() - low).norm(dim=(-2, -1)) / low.norm(dim=(-2, -1))
    assert (polished < 0.03).all()
    assert (polished < errors(shrunk, low) / 2).all()


def test_skew_batches():
    made_skew = [skew_corrupted(33, seed=seed) for seed in range(3)]
    low, data = (torch.stack(part) for part in zip(*made_skew, strict=True))
    dense = fastpref.rpca(data, structure="skew").low_rank()
    assert (dense + dense.mT).abs().max() < 1e-11
    torch.testing.assert_close(dense, low, rtol=0, atol=1e-4)


def test_backends():
    backends = fastpref.build_info()["backends"]["batched_ialm"]
    assert backends["cpu"]["native"] == "available"
    assert "no GPU kernel" in backends["cuda"]["native"]
    with pytest.raises(ValueError, match="backend must be"):
        solve(torch.zeros(1, 2, 2), backend="triton")
