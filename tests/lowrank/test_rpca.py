"""rpca: recovery tables, both solvers and the convex program, batches, structure, shards, and its doors."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import SEED, corrupted, error, skew_corrupted

import fastpref
from fastpref._lowrank.result import RPCAResult

QUIET = pytest.mark.filterwarnings("ignore:rank=:RuntimeWarning")


# ---- recovery (fixed seeds) ----

CASES = {
    "5 %": ({}, 1e-6),
    "30 %": ({"share": 0.3}, 1e-5),
    "40 %": ({"share": 0.4}, 1e-5),
    "20 % small": ({"share": 0.2, "size": 1.0}, 1e-6),
    "half observed": ({"observed": 0.5}, 1e-5),
    "30 % observed": ({"observed": 0.3}, 1e-5),
    "20 % observed": ({"observed": 0.2}, 1e-5),
    "30 % observed, 20 %": ({"observed": 0.3, "share": 0.2}, 1e-5),
    "noise": ({"share": 0.1, "noise": 0.1}, 0.025),
    "condition 20": ({"share": 0.1, "condition": 20.0}, 1e-5),
    "condition 20, 30 %": ({"share": 0.3, "condition": 20.0}, 1e-5),
}


@pytest.mark.numerics
@QUIET
@pytest.mark.parametrize("method", ["auto", "annealed"])
@pytest.mark.parametrize("case", CASES)
def test_recovers_with_a_rank(case, method):
    options, bound = CASES[case]
    errors = []
    for seed in range(3):
        low, data = corrupted(300, 300, 5, seed=seed, **options)
        found = fastpref.rpca(data, rank=5, method=method)
        errors.append(error(found, low))
        assert found.info.converged
    assert np.median(errors) < bound
    if "noise" in options:
        scale = options["noise"] * low.abs().mean()
        assert 0.8 < found.info.scale / scale < 1.4
    else:
        assert abs(found.info.outlier_rate - options.get("share", 0.05)) < 0.02


@pytest.mark.parametrize("method", ["altproj", "annealed"])
def test_float32_to_its_own_precision(method):
    low, data = corrupted(400, 300, 8)
    found = fastpref.rpca(data.float(), rank=8, method=method)
    assert found.U.dtype == torch.float32
    assert error(found, low) < 4e-6


def test_the_exact_outliers_come_back():
    low, data = corrupted(120, 90, 3, 0.08)
    for method, rank in (("auto", 3), ("annealed", 3), ("ialm", None)):
        for sparse in ("coo", "dense"):
            found = fastpref.rpca(data, rank=rank, method=method, sparse=sparse)
            if sparse == "coo":
                s = torch.zeros_like(data)
                s[tuple(found.sparse.indices.t())] = found.sparse.values
            else:
                s = found.sparse
            torch.testing.assert_close(found.low_rank() + s, data, rtol=0, atol=1e-3 * low.abs().mean().item())
            wrong = (data - low).abs() > 1e-3 * low.abs().mean()
            assert torch.equal(s != 0, wrong)
            torch.testing.assert_close(found.info.row_outlier_rate, wrong.double().mean(1))
            torch.testing.assert_close(found.info.column_outlier_rate, wrong.double().mean(0))
            torch.testing.assert_close(found.info.outlier_rate, wrong.double().mean())


# ---- batches ----


@pytest.mark.numerics
@pytest.mark.parametrize(
    ("items", "rank", "share", "at_least"),
    [(32, 2, 0.1, 0.95), (64, 2, 0.1, 0.98), (32, 3, 0.05, 0.95), (64, 4, 0.1, 0.97)],
)
def test_recovers_batches(items, rank, share, at_least):
    if rank == 2:
        made = [skew_corrupted(items, share, seed) for seed in range(40)]
    else:
        made = [corrupted(items, items, rank, share, seed=seed) for seed in range(40)]
    low, data = (torch.stack(part) for part in zip(*made, strict=True))
    found = fastpref.rpca(data.float(), rank=rank)
    errors = (found.low_rank().double() - low).norm(dim=(-2, -1)) / low.norm(dim=(-2, -1))
    assert (errors < 1e-3).double().mean() >= at_least
    assert found.info.converged.all()


@QUIET
@pytest.mark.parametrize("rank", [2, None])
def test_a_batch_is_its_matrices(rank):
    made = [corrupted(30, 40, 2, seed=seed, observed=0.8)[1] for seed in range(5)]
    batch = torch.stack(made)
    together = fastpref.rpca(batch.view(5, 1, 30, 40), rank=rank, sparse="coo")
    for b, data in enumerate(made):
        alone = fastpref.rpca(data.unsqueeze(0), rank=rank)
        torch.testing.assert_close(together.low_rank()[b, 0], alone.low_rank()[0], rtol=0, atol=1e-5)
        single = fastpref.rpca(data, rank=rank)
        torch.testing.assert_close(together.low_rank()[b, 0], single.low_rank(), rtol=0, atol=1e-4)
    assert together.info.rank.shape == (5, 1)
    assert together.sparse.indices.shape[1] == 4


def test_hopeless_matrices_do_not_stall_the_batch():
    low, data = corrupted(20, 25, 2)
    hopeless = torch.randn(20, 25, dtype=torch.float64)
    nothing = torch.full((20, 25), torch.nan, dtype=torch.float64)
    half = data.clone()
    half[4], half[:, 7] = torch.nan, torch.nan
    for rank in (2, None):
        found = fastpref.rpca(torch.stack([data, hopeless, nothing, half, torch.zeros_like(data)]), rank=rank)
        assert found.info.iterations[0] == fastpref.rpca(data.unsqueeze(0), rank=rank).info.iterations[0]
        dense = found.low_rank()
        assert (dense[0] - low).norm() < 1e-5 * low.norm()
        assert not found.info.converged[2]
        assert found.info.converged[0]
        assert found.info.converged[4]
        assert dense[[0, 4]].isfinite().all()
        assert dense[2].isnan().all()
        inside = torch.ones(20, 25, dtype=torch.bool)
        inside[4], inside[:, 7] = False, False
        torch.testing.assert_close(dense[3][inside], low[inside], rtol=0, atol=1e-4)
        assert dense[3][~inside].isnan().all()  # nothing of that row and that column was observed


# ---- structure ----


@QUIET
@pytest.mark.parametrize("rank", [2, None])
@pytest.mark.parametrize("batched", [True, False])
def test_skew_stays_skew(rank, batched):
    low, data = skew_corrupted(48)
    if batched:
        low, data = low.expand(2, -1, -1), data.expand(2, -1, -1)
    found = fastpref.rpca(data, rank=rank, structure="skew")
    dense = found.low_rank()
    assert error(found, low) < 1e-5
    assert (dense + dense.mT).abs().max() < 1e-11


@pytest.mark.parametrize("rank", [3, None])
@pytest.mark.parametrize("corruption", ["columns", "rows"])
def test_whole_rows_and_columns(corruption, rank):
    low, data = corrupted(200, 150, 3, 0.0)
    data[:, [3, 50, 77]] = 5 * torch.randn(200, 3, dtype=torch.float64)
    clean = torch.ones(150, dtype=torch.bool)
    clean[[3, 50, 77]] = False
    if corruption == "rows":
        low, data = low.t().contiguous(), data.t().contiguous()
    found = fastpref.rpca(data, rank=rank, corruption=corruption, sparse="dense")
    rates = found.info.column_outlier_rate if corruption == "columns" else found.info.row_outlier_rate
    assert torch.equal(rates > 0.5, ~clean)
    dense = found.low_rank() if corruption == "columns" else found.low_rank().t()
    truth = low if corruption == "columns" else low.t()
    torch.testing.assert_close(dense[:, clean], truth[:, clean], rtol=0, atol=1e-4)
    assert found.info.rank == 3


@QUIET
def test_equivariances():
    low, data = corrupted(60, 45, 3, observed=0.8)
    base = fastpref.rpca(data, rank=3).low_rank()
    rows, columns = torch.randperm(60), torch.randperm(45)
    moved = fastpref.rpca(data[rows][:, columns].contiguous(), rank=3).low_rank()
    torch.testing.assert_close(moved, base[rows][:, columns], rtol=0, atol=1e-5)
    torch.testing.assert_close(fastpref.rpca(data.t(), rank=3).low_rank(), base.t(), rtol=0, atol=1e-5)
    torch.testing.assert_close(fastpref.rpca(1024 * data, rank=3).low_rank(), 1024 * base, rtol=0, atol=1e-2)
    torch.testing.assert_close(base, low, rtol=0, atol=1e-4)


def test_a_wrong_rank_is_warned_of():
    _, data = corrupted(150, 150, 5)
    with pytest.warns(RuntimeWarning, match="over-stated"):
        fastpref.rpca(data, rank=8)
    with pytest.warns(RuntimeWarning, match="under-stated"):
        fastpref.rpca(data, rank=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastpref.rpca(data, rank=5)
        fastpref.rpca(corrupted(150, 150, 5, 0.1, noise=0.1)[1], rank=5)


# ---- inputs ----


@QUIET
def test_storage():
    low, data = corrupted(80, 70, 2, observed=0.9)
    levels = (data / data.nan_to_num(0.0).abs().max() * 127).round()
    step = (data.nan_to_num(0.0).abs().max() / 127).item()
    stored = levels.masked_fill(levels.isnan(), -128).to(torch.int8)
    found = fastpref.rpca(stored, rank=2, scale=step)
    same = fastpref.rpca((levels * step).float(), rank=2)
    torch.testing.assert_close(found.low_rank(), same.low_rank(), rtol=0, atol=1e-3)
    for dtype in (torch.bfloat16, torch.float16):
        half = fastpref.rpca(data.to(dtype), rank=2)
        assert half.U.dtype == torch.float32
        assert error(half, low) < 0.02


@QUIET
def test_a_memory_mapped_file_is_never_copied(tmp_path):
    rows, columns = 3000, 2000
    _, data = corrupted(rows, columns, 2)
    np.save(tmp_path / "matrix.npy", data.float().numpy())
    mapped = np.load(tmp_path / "matrix.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of memory that cannot be written
        matrix = torch.from_numpy(mapped)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as seen:
        fastpref.rpca(matrix, rank=2)
    held = peak = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak < 12 * 2**20 + 0.25 * matrix.nbytes  # blocks of rows at the end, thin factors before


@QUIET
def test_warm_starts_save_iterations():
    _, data = corrupted(200, 200, 4, seed=1)
    first = fastpref.rpca(data, rank=4, method="annealed")
    changed = data + 1e-3 * torch.randn(200, 1, dtype=torch.float64)
    cold = fastpref.rpca(changed, rank=4, method="annealed")
    warm = fastpref.rpca(changed, rank=4, method="annealed", warm=first)
    assert warm.info.iterations < cold.info.iterations
    batch = torch.stack([data, changed])
    found = fastpref.rpca(batch, rank=4)
    again = fastpref.rpca(batch, rank=4, warm=found)
    assert (again.info.iterations < found.info.iterations).all()


@QUIET
@pytest.mark.parametrize("rank", [3, None])
def test_callbacks_see_and_stop(rank):
    _, data = corrupted(100, 100, 3)
    seen = []
    found = fastpref.rpca(data, rank=rank, callback=lambda progress: seen.append(progress) or len(seen) == 4)
    assert len(seen) == 4
    assert [progress.iteration for progress in seen] == [1, 2, 3, 4]
    assert all(progress.residual > 0 for progress in seen)
    assert not found.info.converged
    short = fastpref.rpca(data, rank=rank, max_iter=3)
    assert short.info.iterations == 3
    assert not short.info.converged


@QUIET
def test_edges_of_shape():
    assert fastpref.rpca(torch.zeros(0, 4, 5), rank=2).U.shape == (0, 4, 2)
    assert fastpref.rpca(torch.ones(1, 1), rank=1).low_rank().item() == pytest.approx(1)
    zero = fastpref.rpca(torch.zeros(5, 4), rank=2)
    assert zero.info.converged
    assert (zero.low_rank() == 0).all()
    empty = fastpref.rpca(torch.full((6, 4), torch.nan), rank=2)
    assert not empty.info.converged
    assert empty.low_rank().isnan().all()
    full = torch.randn(12, 7, dtype=torch.float64)
    everything = fastpref.rpca(full, rank=7, method="annealed")
    torch.testing.assert_close(everything.low_rank(), full, rtol=0, atol=1e-4)
    assert isinstance(fastpref.rpca(full, rank=0), RPCAResult)
    nothing = fastpref.rpca(full.unsqueeze(0), rank=0)
    assert (nothing.low_rank() == 0).all() and nothing.U.shape == (1, 12, 0)


@QUIET
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float64, size) for size in (1e307, 1e200, 1e-200, 5e-324)]
    + [(torch.float32, size) for size in (1e37, 1e25, 1e-25, 1e-38)],
)
@pytest.mark.parametrize("lead", [(), (3,)])
def test_sizes_whose_squares_leave_the_dtype(dtype, size, lead):
    data = torch.full((*lead, 6, 5), size, dtype=dtype)
    data[..., 2, 3] = -data[..., 2, 3]
    if lead:
        data[1] = 1.0
    for rank in (1, None):
        found = fastpref.rpca(data, rank=rank, sparse="dense")
        dense = found.low_rank() + found.sparse
        there = found.info.converged[..., None, None] & torch.ones_like(data, dtype=torch.bool)
        if size > 1e-300:  # below, numbers have few digits
            torch.testing.assert_close(dense[there], data[there], rtol=1e-2, atol=0)
        assert not (found.low_rank().abs() > 1.01 * data.abs().amax((-2, -1), keepdim=True)).any()
        assert rank is None or found.info.converged.all()
        with pytest.raises(ValueError, match="matrix is too large: with entries of about"):
            fastpref.rpca(torch.full((*lead, 6, 5), torch.finfo(dtype).max / 2, dtype=dtype), rank=rank)


def test_bad_input():
    good = torch.randn(6, 5)

    def message(kind, *words, matrix=good, **arguments):
        with pytest.raises(kind) as raised:
            fastpref.rpca(matrix, **arguments)
        for word in words:
            assert word in str(raised.value)

    message(TypeError, "matrix", "list", matrix=[1.0])
    message(ValueError, "matrix", "[..., m, n]", "[5]", matrix=torch.zeros(5))
    message(TypeError, "matrix", "int64", matrix=torch.zeros(5, 5).long(), rank=1)
    for name in ("structure", "corruption", "method", "sparse"):
        message(ValueError, name, "'odd'", rank=1, **{name: "odd"})
    message(TypeError, "rank", "float", rank=2.0)
    message(ValueError, "rank", "5", "6", rank=6)
    message(ValueError, "rank", "even", matrix=torch.zeros(5, 5), rank=3, structure="skew")
    message(ValueError, "square", "[6, 5]", rank=2, structure="skew")
    message(ValueError, "lam", rank=2, lam=0.1)
    message(ValueError, "'annealed'", "rank", method="annealed")
    message(ValueError, "max_iter", "0", rank=2, max_iter=0)
    message(ValueError, "tol", "-1", rank=2, tol=-1.0)
    message(TypeError, "warm", "int", rank=2, warm=3)
    message(ValueError, "warm", "[6, 2]", rank=2, warm=fastpref.rpca(torch.randn(7, 5), rank=2))
    message(ValueError, "corruption", "batch", matrix=torch.zeros(2, 4, 4), rank=1, corruption="rows")
    message(ValueError, "altproj", matrix=torch.zeros(2, 4, 4), rank=1, method="altproj")
    message(
        ValueError, "altproj", matrix=torch.eye(4), rank=2, structure="general", corruption="rows", method="altproj"
    )
    message(TypeError, "group", "str", rank=2, group="all")
    infinite = good.clone()
    infinite[2, 3] = torch.inf
    message(ValueError, "finite", "inf", "2", "3", matrix=infinite, rank=2)
    message(ValueError, "finite", "inf", "2", "3", matrix=infinite)
    message(ValueError, "finite", "inf", "2", "3", matrix=infinite.unsqueeze(0), rank=2)
    message(ValueError, "contiguous", matrix=torch.randn(6, 10)[:, ::2], rank=2)


# ---- shards ----


def test_row_shards_give_the_whole_matrix_answer(two_ranks):
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        import os
        os.environ["FASTPREF_TEST_SEED"] = "{SEED}"
        import warnings
        from cases import corrupted
        warnings.simplefilter("ignore")
        import fastpref
        group = dist.group.WORLD
        cases = ("annealed", dict(observed=0.6), 50), ("altproj", {{}}, 130), ("auto", dict(noise=0.1), 0)
        for method, options, split in cases:
            low, data = corrupted(160, 120, 4, **options)
            whole = fastpref.rpca(data, rank=4, method=method)
            part = slice(0, split) if rank == 0 else slice(split, 160)
            mine = fastpref.rpca(data[part].contiguous(), rank=4, method=method, group=group)
            torch.testing.assert_close(mine.low_rank(), whole.low_rank()[part], rtol=0, atol=1e-4)
            for name in ("outlier_rate", "scale", "residual"):
                torch.testing.assert_close(getattr(mine.info, name), getattr(whole.info, name), rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(mine.info.row_outlier_rate, whole.info.row_outlier_rate[part])
            torch.testing.assert_close(mine.info.column_outlier_rate, whole.info.column_outlier_rate)
        apart = torch.full((30, 24), torch.nan, dtype=torch.float64)
        apart[:10, :8], apart[10:, 8:], apart[3] = 1.0, 2.0, torch.nan
        part = slice(0, 13) if rank == 0 else slice(13, 30)
        for data in (apart, torch.where(apart.isnan(), torch.nan, apart)[:, :8].contiguous()):
            whole = fastpref.rpca(data, rank=1).info
            mine = fastpref.rpca(data[part].contiguous(), rank=1, group=group).info
            assert torch.equal(mine.row_part, whole.row_part[part])
            assert torch.equal(mine.column_part, whole.column_part)
        result = True
    """
    two_ranks(code)


# ---- shapes and sizes that are easy to get wrong ----


@QUIET
@pytest.mark.parametrize("noise", [0.0, 1e-3])
@pytest.mark.parametrize("m,n,rank", [(300, 12, 3), (12, 300, 3), (48, 48, 2)])
def test_heavy_rows_are_not_given_up(m, n, rank, noise):
    """Rows much larger than the others look like corruption at first; nothing is corrupted here."""
    made = [corrupted(m, n, rank, share=0.0, noise=noise, seed=seed) for seed in range(10)]
    low, data = (torch.stack(part) for part in zip(*made, strict=True))
    batch = fastpref.rpca(data, rank=rank)
    alone = torch.stack([fastpref.rpca(matrix, rank=rank).low_rank() for matrix in data])
    for found in (batch.low_rank(), alone):
        errors = (found - low).norm(dim=(-2, -1)) / low.norm(dim=(-2, -1))
        assert (errors < 1e-5 + 3 * noise).double().mean() >= 0.9
    assert batch.info.outlier_rate.median() < 0.005


@QUIET
@pytest.mark.parametrize("rank", [2, None])
@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e18, 1e25])
def test_any_size(size, rank):
    low, data = corrupted(40, 30, 2)
    for matrix in ((data * size).float(), (data * size).float().unsqueeze(0)):
        found = fastpref.rpca(matrix, rank=rank)
        assert error(found, low * size) < 1e-4
        assert found.info.converged
        assert 0.02 < found.info.outlier_rate < 0.08


def test_too_little_observed_is_never_nan():
    data = torch.stack([corrupted(16, 17, 4, share=0.0, seed=seed)[1] for seed in range(100)]).float()
    data[torch.rand(data.shape, generator=torch.Generator().manual_seed(0)) < 0.85] = torch.nan
    found = fastpref.rpca(data, rank=4)
    for part in (found.U, found.S, found.Vh, found.info.scale, found.info.residual):
        assert part.isfinite().all()
    assert not found.info.converged.any()


@pytest.mark.parametrize("rank", [0, None])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (2, 0, 4), (0, 4, 5), (0, 0)])
def test_nothing(shape, rank):
    for sparse in ("none", "coo", "dense"):
        found = fastpref.rpca(torch.zeros(shape), rank=rank, sparse=sparse)
        assert found.low_rank().shape == shape
        assert not found.info.converged.any()


def test_skew_is_checked_and_backends_are_named():
    matrix = torch.randn(20, 20)
    for wrong in (matrix, matrix.expand(3, -1, -1)):
        with pytest.raises(ValueError, match=r"structure='skew' needs matrix = -matrix\^T, got .* at \["):
            fastpref.rpca(wrong, rank=2, structure="skew")
        with pytest.raises(ValueError, match=r"backend must be None or one of .* got 'cublas'"):
            fastpref.rpca(wrong, rank=2, backend="cublas")
    data = torch.stack([corrupted(20, 30, 2, seed=seed)[1] for seed in range(3)])
    for rank in (2, None):
        found = [fastpref.rpca(data, rank=rank, backend=name).low_rank() for name in ("native", "reference")]
        torch.testing.assert_close(*found, rtol=0, atol=1e-4)


@QUIET
def test_warm_starts_leave_zero():
    low, data = corrupted(40, 30, 3)
    nothing = fastpref.rpca(torch.zeros(40, 30, dtype=torch.float64), rank=3)
    assert error(fastpref.rpca(data, rank=3, warm=nothing), low) < 1e-5
    batch = fastpref.rpca(torch.zeros(1, 40, 30, dtype=torch.float64), rank=3)
    assert error(fastpref.rpca(data.unsqueeze(0), rank=3, warm=batch), low) < 1e-5
