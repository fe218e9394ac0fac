"""The convex program of one large matrix by native reads, against PyTorch's."""

import warnings

import numpy as np
import pytest
import torch
from cases import corrupted, error

import fastpref
from fastpref import _library
from fastpref._lowrank import ialm
from fastpref._lowrank.large_ialm import large_ialm
from fastpref._lowrank.residual_pass import entries
from fastpref._lowrank.rpca import RPCAResult

pytestmark = pytest.mark.sanitize

PROBLEMS = {
    "complete": {},
    "30 % corrupted": {"share": 0.3},
    "half observed": {"observed": 0.5, "share": 0.02},
    "low and wide": {"m": 40, "n": 260},
}


@pytest.mark.numerics
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_solves_as_torch_does(name, dtype, transposed):
    low, data = corrupted(**({"m": 130, "n": 110, "rank": 3} | PROBLEMS[name]))
    data = data.to(dtype)
    tol = 1e-7 if dtype == torch.float64 else 1e-6
    expected = ialm.ialm(data.unsqueeze(0), tol=tol, max_iter=1000)
    found = large_ialm(data.t().contiguous().t() if transposed else data, tol=tol, max_iter=1000)
    assert [part.shape for part in found] == [part.shape for part in expected]
    assert [part.dtype for part in found] == [part.dtype for part in expected]
    assert found.converged
    assert found.rank == expected.rank
    assert found.residual < tol
    assert found.gap <= ialm.GAP
    torch.testing.assert_close(found.dense_share, expected.dense_share, rtol=0.05, atol=1e-3)
    for one in (found, expected):
        rebuilt = (one.U[0].double() * one.S[0]) @ one.Vh[0].double()
        assert (rebuilt - low).norm() / low.norm() < 20 * tol
    if dtype == torch.float64 and not transposed and name == "complete":  # the same sequence, step by step
        assert found.iterations == expected.iterations
        torch.testing.assert_close(found.residual, expected.residual, rtol=1e-3, atol=0)


@pytest.mark.parametrize("backend", ["native", pytest.param("reference", marks=pytest.mark.reference)])
def test_other_storage_is_read_as_it_lies(backend):
    _, data = corrupted(90, 80, 2, observed=0.9)
    step = float(data.nan_to_num(0.0).abs().max() / 127)
    stored = (data / step).round().nan_to_num(-128).to(torch.int8)
    found = large_ialm(stored, scale=step, tol=1e-5, max_iter=300, backend=backend)
    same = large_ialm(entries(stored, torch.float32) * step, tol=1e-5, max_iter=300, backend=backend)
    assert found.rank == same.rank
    torch.testing.assert_close(found.S, same.S, rtol=1e-3, atol=1e-2)


def test_edges():
    zero = large_ialm(torch.zeros(5, 4), tol=1e-6, max_iter=10)
    assert zero.converged
    assert zero.U.shape == (1, 5, 0)
    empty = large_ialm(torch.full((5, 4), torch.nan), tol=1e-6, max_iter=10)
    assert not empty.converged
    assert empty.rank == 0
    one = large_ialm(torch.ones(1, 1, dtype=torch.float64), lam=2.0, tol=1e-7, max_iter=100)
    torch.testing.assert_close(one.U * one.S @ one.Vh, torch.ones(1, 1, 1, dtype=torch.float64), atol=1e-5, rtol=0)
    short = large_ialm(corrupted(30, 20, 2)[1], tol=1e-7, max_iter=3)
    assert short.iterations == 3
    assert not short.converged
    seen = []
    stopped = large_ialm(
        corrupted(30, 20, 2)[1], tol=1e-7, max_iter=50, report=lambda *step: seen.append(step) or len(seen) == 2
    )
    assert [step[0] for step in seen] == [1, 2]
    assert stopped.iterations == 2
    assert not stopped.converged


@pytest.mark.skipif(_library.native_cpu_reason("cpu") is not None, reason="of the native solver")
def test_one_matrix_beside_the_data(tmp_path):
    low, data = corrupted(1100, 1000, 3)
    np.save(tmp_path / "matrix.npy", data.float().numpy())
    mapped = np.load(tmp_path / "matrix.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of memory that cannot be written
        matrix = torch.from_numpy(mapped)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as seen:
        found = fastpref.rpca(matrix)
    assert isinstance(found, RPCAResult)
    assert found.info.rank == 3
    assert error(found, low) < 4e-6
    held = peak = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak < 6 * 2**20 + 1.1 * matrix.nbytes  # the state, and blocks of rows or thin factors
