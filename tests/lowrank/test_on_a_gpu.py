"""The low-rank half on tensors of a GPU: the answers it gives for the same ones on the CPU."""

import pytest
import torch
from cases import corrupted, quietly, scores_of, skew_corrupted

from fastpref import Edges, bradley_terry, rpca, svt
from fastpref._lowrank.outliers import outlier_counts, outliers

pytestmark = [pytest.mark.cuda, pytest.mark.numerics]

PLACES = ("cpu", "cuda")


def relative(found, expected) -> float:
    return float((found.cpu().double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("side", [8, 32, 64, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_svt_is_the_cpus(side, dtype):
    matrix = torch.randn(6, side, side + 3, dtype=dtype)
    threshold = 0.5 * torch.linalg.matrix_norm(matrix, 2)
    expected, found = (svt(matrix.to(place), threshold.to(place)) for place in PLACES)
    assert found.low_rank.device.type == "cuda"
    assert relative(found.low_rank, expected.low_rank) < 50 * torch.finfo(dtype).eps
    assert (found.rank.cpu() == expected.rank).all()


@pytest.mark.parametrize("batch", [None, 5])
@pytest.mark.parametrize("rank", [3, None])
def test_rpca_recovers(rank, batch):
    made = [corrupted(64, 64, 3, 0.05, seed=seed) for seed in range(batch or 1)]
    low, data = (torch.stack(part) if batch else part[0] for part in zip(*made, strict=True))
    found = quietly(rpca, data.cuda(), rank=rank)
    assert found.U.device.type == "cuda"
    assert relative(found.low_rank(), low) < 1e-5


def test_rpca_of_skew_matrices_recovers():
    low, data = (torch.stack(part) for part in zip(*(skew_corrupted(48, seed=seed) for seed in range(4)), strict=True))
    found = quietly(rpca, data.cuda(), rank=2, structure="skew")
    assert relative(found.low_rank(), low) < 1e-5


def test_bradley_terry_of_logits_is_the_cpus():
    w = scores_of(7, 40)
    logits = w.unsqueeze(-1) - w.unsqueeze(-2)
    wrong = (torch.rand(logits.shape) < 0.1).triu(1)
    logits = torch.where(wrong | wrong.mT, -logits, logits)
    expected, found = (bradley_terry(logits.to(place)) for place in PLACES)
    assert relative(found.scores, expected.scores) < 1e-6


def test_bradley_terry_of_votes_is_the_cpus():
    w = scores_of(1, 30)[0]
    wins = torch.binomial(torch.full((30, 30), 20.0).double(), (w[:, None] - w).sigmoid()).fill_diagonal_(0)
    expected, found = (bradley_terry(wins=wins.to(place)) for place in PLACES)
    assert relative(found.scores, expected.scores) < 1e-6


def test_bradley_terry_of_edges_is_the_cpus():
    w = scores_of(1, 200)[0]
    i = torch.arange(200).repeat(6)
    j = (i + torch.randint(1, 200, i.shape)) % 200
    logits = (w[i] - w[j]) * torch.where(torch.rand(len(i)) < 0.1, -1.0, 1.0)
    results = []
    for place in PLACES:
        edges = Edges(i.to(place), j.to(place), logits=logits.to(place), num_items=200)
        results.append(bradley_terry(edges=edges).scores)
    assert relative(results[1], results[0]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outliers_are_the_cpus(dtype):
    left, right = torch.randn(90, 3), torch.randn(70, 3)
    matrix = (left @ right.t() + 9.0 * (torch.rand(90, 70) < 0.05)).to(dtype)
    matrix.view(-1)[::13] = torch.nan
    expected, found = (outliers(matrix.to(p), left.to(p), right.to(p), 4.0) for p in PLACES)
    assert (found.rows.cpu() == expected.rows).all()
    assert (found.columns.cpu() == expected.columns).all()
    counts = [outlier_counts(matrix.to(p), left.to(p), right.to(p), 4.0) for p in PLACES]
    for on_cpu, on_gpu in zip(*counts, strict=True):
        assert (torch.as_tensor(on_gpu).cpu() == torch.as_tensor(on_cpu)).all()
