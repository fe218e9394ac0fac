"""The convex program in PyTorch: what it recovers without a rank, its certificate, and its penalties."""

import pytest
import torch
from cases import corrupted, error

import fastpref
from fastpref._lowrank.ialm import GAP, spectral_norm_above


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
    assert error(found, low) > 1e-2
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
