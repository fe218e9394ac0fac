"""The native solve of many small matrices against the batched PyTorch one, on every SIMD level, shape and rank."""

import pytest
import torch
from cases import corrupted, skew_corrupted

from fastpref._lowrank.batched_rpca import batched_annealed

pytestmark = pytest.mark.sanitize


def low_rank(found):
    return found.left @ found.right.mT


def both(data, rank, **options):
    options = {"skew": False, "tol": 1e-7 if data.dtype == torch.float64 else 1e-6, "max_iter": 300} | options
    return [batched_annealed(data, rank, backend=backend, **options)[0] for backend in ("native", "reference")]


@pytest.mark.reference
@pytest.mark.numerics
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("m", "n", "rank"),
    [
        (30, 30, 1),
        (31, 45, 2),
        (45, 31, 3),
        (40, 64, 4),
        (50, 48, 5),
        (61, 60, 6),
        (70, 65, 7),
        (70, 80, 8),
        (90, 85, 10),
    ],
)
def test_agrees_with_the_reference(simd, m, n, rank, dtype):
    made = [corrupted(m, n, rank, 0.05, observed=1.0 if seed else 0.9, seed=seed) for seed in range(3)]
    low = torch.stack([part[0] for part in made])
    data = torch.stack([part[1] for part in made]).to(dtype)
    native, reference = both(data, rank)
    bound = 1e-3 if dtype == torch.float32 else 1e-5
    for found in (native, reference):
        errors = (low_rank(found).double() - low).norm(dim=(-2, -1)) / low.norm(dim=(-2, -1))
        assert errors.median() < bound
    scale = low.abs().mean().item()
    same = (low_rank(native) - low_rank(reference)).abs().amax((-2, -1)) < bound * 10 * scale
    assert same.double().mean() > 0.6  # a matrix at the edge of recovery may go either way
    assert torch.equal(native.converged, reference.converged)


def test_the_first_steps_are_the_same():
    # before anything is decided, both compute the same numbers
    data = torch.stack([corrupted(25, 35, 3, 0.1, observed=0.8, seed=seed)[1] for seed in range(4)])
    for steps in (1, 2, 6):
        native, reference = both(data, 3, max_iter=steps)
        torch.testing.assert_close(low_rank(native), low_rank(reference), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_skew(simd, dtype):
    made = [skew_corrupted(33, seed=seed) for seed in range(4)]
    data = torch.stack([part[1] for part in made]).to(dtype)
    for found in both(data, 2, skew=True):
        dense = low_rank(found)
        assert (dense + dense.mT).abs().max() < (1e-4 if dtype == torch.float32 else 1e-12)
        torch.testing.assert_close(dense.double(), torch.stack([part[0] for part in made]), rtol=0, atol=1e-3)


def test_whatever_the_threads_and_the_neighbours():
    data = torch.stack([corrupted(20, 33, 2, seed=seed)[1] for seed in range(7)]).float()
    threads = torch.get_num_threads()
    together = both(data, 2)[0]
    try:
        torch.set_num_threads(1)
        alone = [both(matrix.unsqueeze(0), 2)[0] for matrix in data]
    finally:
        torch.set_num_threads(threads)
    for field in ("left", "right", "iterations", "median", "converged"):
        assert torch.equal(getattr(together, field), torch.cat([getattr(one, field) for one in alone]))


def test_missing_patterns():
    low, data = corrupted(24, 30, 2)
    everything = torch.full_like(data, torch.nan)
    line = data.clone()
    line[3], line[:, 5] = torch.nan, torch.nan
    one = everything.clone()
    one[2, 2] = 1.5
    for found in both(torch.stack([data, everything, line, one, torch.zeros_like(data)]), 2):
        assert low_rank(found).isfinite().all()
        assert found.converged.tolist()[:3] == [True, False, True]
        assert (low_rank(found)[1] == 0).all()
        assert abs(low_rank(found)[3, 2, 2] - 1.5) < 1e-3 or not found.converged[3]
        assert low_rank(found)[3].abs().max() < 10
        inside = torch.ones_like(data, dtype=torch.bool)
        inside[3], inside[:, 5] = False, False
        torch.testing.assert_close(low_rank(found)[2][inside], low[inside], rtol=0, atol=1e-4)


def test_warm_starts_and_strides():
    data = torch.stack([corrupted(30, 40, 3, seed=seed)[1] for seed in range(3)])
    cold = both(data, 3)[0]
    wide = torch.zeros(3, 40, 30, dtype=data.dtype).mT
    wide.copy_(data)
    assert torch.equal(both(wide, 3)[0].left, cold.left)
    before = cold.left.clone()
    for found in both(data, 3, warm=(cold.left, cold.right)):
        assert (found.iterations < cold.iterations).all()
    assert torch.equal(cold.left, before)
