"""The convex program in PyTorch: what it recovers without a rank, its certificate, and its penalties."""

import pytest
import torch
from cases import corrupted, error

import fastpref
from fastpref._lowrank.ialm import GAP, default_lambda, entries_lambda, ialm, rank_by_gap, spectral_norm_above


@pytest.mark.numerics
@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({}, 1e-6),
        ({"share": 0.4}, 1e-5),  # with rho = 1.5 alone it stops at a residual of 1e-7 and an error of 1e-3
        ({"observed": 0.5}, 1e-5),
        ({"observed": 0.3}, 1e-5),  # and here of 0.13
        ({"share": 0.1, "condition": 20.0}, 1e-5),
    ],
)
def test_the_convex_program_needs_no_rank(options, bound):
    low, data = corrupted(300, 300, 5, **options)
    found = fastpref.rpca(data)
    assert error(found, low) < bound
    assert found.info.rank == 5
    assert found.info.converged
    assert found.info.gap <= GAP


def test_a_wrong_answer_is_not_certified():
    low, data = corrupted(300, 300, 5, observed=0.2)
    found = fastpref.rpca(data, max_iter=60)
    product = (found.U * found.S) @ found.Vh  # low_rank() has no value beyond the data
    assert (product - low).norm() / low.norm() > 1e-2
    assert not found.info.converged


def test_noise_is_polished_away():
    low, data = corrupted(200, 200, 4, 0.1, noise=0.1)
    found = fastpref.rpca(data)
    assert found.info.rank == 4
    assert error(found, low) < 0.03


def test_spectral_norm_is_bounded_from_above():
    for shape in ((40, 30), (700, 600)):
        y = torch.randn(1, *shape, dtype=torch.float64)
        exact = torch.linalg.matrix_norm(y, 2)
        bound = spectral_norm_above(y)
        assert exact * (1 - 1e-12) <= bound <= exact * 1.001


@pytest.mark.parametrize("noise", [1e-4, 1e-2])
def test_a_little_noise_keeps_the_rank(noise):
    for seed in range(4):
        low, data = corrupted(100, 100, 5, noise=noise, seed=seed)
        found = fastpref.rpca(data)
        assert found.info.rank == 5
        assert error(found, low) < 3 * noise
    half = corrupted(40, 30, 3)[1].half()  # its rounding is noise
    assert fastpref.rpca(half).info.rank == 3


def test_without_a_rank_only_a_closed_gap_is_converged():
    data = corrupted(100, 100, 5, noise=0.01)[1]
    for matrix in (data, data.unsqueeze(0)):
        for most in (5, 20, 60):
            found = fastpref.rpca(matrix, max_iter=most)
            assert found.info.iterations <= most
            assert not found.info.converged or found.info.gap <= GAP
        assert fastpref.rpca(matrix).info.converged


# ---- the parts of the program ----


@pytest.mark.numerics
@pytest.mark.parametrize("corruption", ["entries", "rows", "columns"])
def test_it_minimises_what_it_says(corruption):
    """No random step from L lowers |L|_* and what S pays."""
    _, data = corrupted(40, 30, 2, share=0.05 if corruption == "entries" else 0.0)
    if corruption != "entries":
        data[3] += 5 * torch.randn(30, dtype=torch.float64)
        data = data.t().contiguous() if corruption == "columns" else data
    found = ialm(data.unsqueeze(0), tol=1e-7, max_iter=1000, corruption=corruption)
    assert found.converged
    lam = default_lambda(~data.isnan().unsqueeze(0), corruption)
    dim = {"entries": None, "rows": -1, "columns": -2}[corruption]

    def objective(matrix):
        rest = data - matrix
        sizes = rest.abs() if dim is None else torch.linalg.vector_norm(rest, dim=dim)
        return (torch.linalg.svdvals(matrix).sum() + lam * sizes.sum()).item()

    best = (found.U[0] * found.S[0]) @ found.Vh[0]
    for size in (1e-3, 1e-1):
        step = size * best.norm() / best.numel() ** 0.5
        for _ in range(3):
            assert objective(best) <= objective(best + step * torch.randn_like(best)) * (1 + GAP)


def test_lambda_of_single_entries_counts_what_is_observed():
    observed = torch.rand(3, 20, 50) < 0.5
    found = default_lambda(observed, "entries")
    torch.testing.assert_close(found, (observed.sum((1, 2)).double() / 1000 * 50) ** -0.5)
    torch.testing.assert_close(entries_lambda(torch.tensor([1000]), 20, 50), torch.tensor([50.0]).double() ** -0.5)
    for corruption, lines in (("rows", 20), ("columns", 50)):
        expected = torch.full((3,), 3 / 7 / (0.02 * lines) ** 0.5, dtype=torch.float64)
        torch.testing.assert_close(default_lambda(observed, corruption), expected)


def test_the_rank_is_where_singular_values_fall_off():
    assert rank_by_gap(torch.tensor([9.0, 8.0, 7.0, 1.0, 0.9])) == 3
    assert rank_by_gap(torch.tensor([9.0, 8.0, 7.0, 6.0])) == 4
    assert rank_by_gap(torch.tensor([9.0, 1e-4, 1e-9, 0.0])) == 1
    assert rank_by_gap(torch.tensor([9.0])) == 1
    assert rank_by_gap(torch.zeros(3)) == 0


def test_the_reporter_stops_it():
    _, data = corrupted(30, 20, 2)
    seen = []
    found = ialm(data[None], tol=1e-7, max_iter=50, report=lambda *step: seen.append(step) or len(seen) == 3)
    assert [step[0] for step in seen] == [1, 2, 3]
    assert found.iterations == 3
    assert not found.converged
