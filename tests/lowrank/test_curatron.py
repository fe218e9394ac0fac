"""OptSpace and the paper's robust PCA: recovery, the tables of a fixed protocol, skewness, and what is refused."""

import numpy as np
import pytest
import torch

from fastpref._lowrank.curatron import _trimmed, ncrpca, optspace

NAN = float("nan")


def skew_logits(items, corrupted, kind, seeds, missing=0.0):
    """w, M = w_i - w_j and M with a share of its pairs corrupted (uniform P, or inverted) and missing; float64."""
    scores, clean, dirty = [], [], []
    i, j = np.triu_indices(items, 1)
    for seed in seeds:
        rng = np.random.default_rng(seed)
        w = rng.normal(size=items)
        m = w[:, None] - w
        d = m.copy()
        k = rng.choice(len(i), round(corrupted * len(i)), replace=False)
        p = rng.uniform(0.01, 0.99, len(k))
        d[i[k], j[k]] = np.log(p / (1 - p)) if kind == "uniform" else -m[i[k], j[k]]
        d[j[k], i[k]] = -d[i[k], j[k]]
        gone = rng.random(len(i)) < missing
        d[i[gone], j[gone]] = d[j[gone], i[gone]] = NAN
        scores.append(w), clean.append(m), dirty.append(d)
    return (torch.from_numpy(np.stack(part)) for part in (scores, clean, dirty))


def errors(found, truth):
    return torch.linalg.matrix_norm(found - truth) / torch.linalg.matrix_norm(truth)


# median relative errors over 20 seeds of an independent implementation of the same constants
@pytest.mark.parametrize(
    ("items", "kind", "corrupted", "expected"),
    [
        (8, "uniform", 0.2, 0.60),
        (20, "uniform", 0.1, 0.045),
        (20, "uniform", 0.3, 0.29),
        (50, "uniform", 0.1, 3.6e-3),
        (50, "uniform", 0.3, 0.051),
        (10, "flip", 0.2, 0.85),
        (20, "flip", 0.1, 0.097),
        (50, "flip", 0.1, 8.9e-3),
        (50, "flip", 0.2, 0.068),
        (100, "flip", 0.1, 1.0e-3),
    ],
)
def test_alternating_projections_match_the_published_constants(items, kind, corrupted, expected):
    _, clean, dirty = skew_logits(items, corrupted, kind, range(20))
    found = ncrpca(dirty, 2, skew=True)
    assert 0.6 * expected < errors(found.low_rank, clean).median() < 1.4 * expected
    assert torch.equal(found.low_rank, -found.low_rank.mT)
    assert torch.equal(found.sparse, -found.sparse.mT)
    assert (torch.linalg.matrix_rank(found.low_rank, rtol=1e-9) == 2).all()
    off = torch.linalg.matrix_norm(dirty - found.low_rank - found.sparse) / torch.linalg.matrix_norm(dirty)
    small = 1e-3 * items / torch.linalg.matrix_norm(dirty)  # entries of S below 1e-3 are dropped at the end
    assert ((off - found.residual).abs() <= small).all()
    assert torch.equal(found.converged, found.residual < 1e-3)


def test_alternating_projections_of_a_general_matrix_grow_the_rank():
    low = torch.randn(3, 60, 4, dtype=torch.float64) @ torch.randn(3, 4, 50, dtype=torch.float64)
    sparse = torch.where(torch.rand(3, 60, 50) < 0.03, 20 * torch.rand(3, 60, 50).double() - 10, 0.0)
    found = ncrpca(low + sparse, 4)
    assert found.converged.all()
    assert (errors(found.low_rank, low) < 0.03).all()
    alone = ncrpca((low + sparse)[1], 4)
    torch.testing.assert_close(alone.low_rank, found.low_rank[1])
    assert int(alone.iterations) == int(found.iterations[1])


@pytest.mark.parametrize(("items", "missing", "bound"), [(50, 0.3, 2e-6), (50, 0.5, 2e-6), (20, 0.5, 1e-3)])
def test_optspace_completes_clean_matrices(items, missing, bound):
    _, clean, holed = skew_logits(items, 0.0, "flip", range(10), missing)
    found = optspace(holed, 2)
    assert errors(found.low_rank, clean).median() < bound
    assert (found.low_rank + found.low_rank.mT).abs().max() < 1e-8 * clean.abs().max()
    assert torch.equal(found.converged, found.residual * 2**0.5 < 1e-6)
    assert (found.iterations[found.converged] < 50).all()


# optspace alone, and its completion after robust PCA; median errors over 10 seeds of the independent implementation
@pytest.mark.parametrize(
    ("items", "missing", "alone", "cleaned"), [(50, 0.1, 0.18, 9e-3), (50, 0.5, 0.22, 0.19), (100, 0.5, 0.17, 0.155)]
)
def test_filled_and_cleaned(items, missing, alone, cleaned):
    _, clean, holed = skew_logits(items, 0.1, "uniform", range(10), missing)
    completed = optspace(holed, 2).low_rank
    assert 0.7 * alone < errors(completed, clean).median() < 1.3 * alone
    filled = torch.where(holed.isnan(), (completed - completed.mT) / 2, holed)
    assert 0.6 * cleaned < errors(ncrpca(filled, 2, skew=True).low_rank, clean).median() < 1.4 * cleaned


def test_optspace_of_rectangles_and_batches():
    low = torch.randn(2, 3, 40, 3, dtype=torch.float64) @ torch.randn(2, 3, 3, 30, dtype=torch.float64)
    holed = low.masked_fill(torch.rand(low.shape) < 0.3, NAN)
    found = optspace(holed, 3)
    assert found.low_rank.shape == low.shape
    assert found.iterations.shape == (2, 3)
    assert (errors(found.low_rank, low) < 0.03).all()
    torch.testing.assert_close(optspace(holed[1, 2], 3).low_rank, found.low_rank[1, 2], rtol=1e-6, atol=1e-6)
    narrow = optspace(holed.float(), 3)
    assert narrow.low_rank.dtype == torch.float32
    assert (errors(narrow.low_rank, low) < 0.03).all()


def test_optspace_trims_crowded_lines():
    low = torch.randn(60, 2, dtype=torch.float64) @ torch.randn(2, 50, dtype=torch.float64)
    seen = torch.rand(60, 50) < 0.3
    seen[7] = True
    trimmed = _trimmed(seen.unsqueeze(0), 0)[0]
    assert not (trimmed & ~seen).any()
    rows = seen.sum(1)
    limit = 2 * rows.double().mean()
    assert limit - 4 < trimmed[7].sum() <= limit + 1
    ordinary = rows < limit - 4
    assert torch.equal(trimmed[ordinary], seen[ordinary])
    found = optspace(low.masked_fill(~seen, NAN), 2, max_iter=300)
    assert errors(found.low_rank, low) < 0.05


def test_matrices_without_entries():
    nothing = optspace(torch.full((2, 5, 4), NAN), 2)
    assert torch.equal(nothing.low_rank, torch.zeros(2, 5, 4))
    assert torch.equal(optspace(torch.zeros(5, 4), 2).low_rank, torch.zeros(5, 4))
    assert torch.equal(ncrpca(torch.zeros(5, 5), 2, skew=True).low_rank, torch.zeros(5, 5))
    assert optspace(torch.zeros(0, 5, 4), 2).low_rank.shape == (0, 5, 4)
    assert ncrpca(torch.zeros(0, 5, 4), 2).low_rank.shape == (0, 5, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: optspace(torch.zeros(3), 1), r"matrix must have shape \[..., m, n\], got \[3\]"),
        (lambda: optspace(torch.zeros(3, 4), 4), r"rank must be between 1 and min\(m, n\) = 3, got 4"),
        (lambda: optspace(torch.tensor([[0.0, torch.inf]]), 1), r"matrix must be finite .* got inf at \[0, 1\]"),
        (lambda: optspace(torch.zeros(3, 4), 1, tol=0.0), "tol must be positive"),
        (lambda: ncrpca(torch.tensor([[0.0, NAN]]), 1), r"matrix must be finite and complete, got nan at \[0, 1\]"),
        (lambda: ncrpca(torch.zeros(4, 4), 3, skew=True), "rank must be even, of a square matrix, .* got 3"),
        (lambda: ncrpca(torch.zeros(4, 6), 2, skew=True), "rank must be even, of a square matrix"),
        (
            lambda: ncrpca(torch.ones(4, 4), 2, skew=True),
            r"matrix must be M = -M\^T .* got M \+ M\^T up to 2",
        ),
        (lambda: ncrpca(torch.zeros(4, 6), 5), r"rank must be at most min\(m, n\), got 5"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_types():
    with pytest.raises(TypeError, match=r"matrix must be a torch\.Tensor, got list"):
        optspace([[1.0]], 1)
    with pytest.raises(TypeError, match="matrix must be a floating-point tensor"):
        ncrpca(torch.zeros(3, 3, dtype=torch.int64), 1)
    with pytest.raises(TypeError, match="rank must be a positive int"):
        optspace(torch.zeros(3, 3), 1.5)
