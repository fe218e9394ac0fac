"""Batched singular-value thresholding against plain PyTorch: `pytest benchmarks/bench_svt.py --benchmark-json FILE`.

Half of each largest singular value is the threshold. Every round begins with one run of each competitor, so that all
samples are taken in turn in the same process; an error is the largest of the batch, relative to the matrix, against a
float64 SVD. The routes of svt itself are competitors too: JACOBI_SIZE and GRAM_SIZE of fastpref/_lowrank/svt.py are
where they cross. OMP_NUM_THREADS=1 gives the figures of one core. --full adds sizes.
"""

from typing import NamedTuple

import torch

import fastpref
from fastpref._lowrank.svt import _by_gram, _by_jacobi, _by_svd, svt_ref
from harness.measure import FunctionCompetitor
from harness.problem import measured
from peers.low_rank import svt_by_gram, svt_by_svd


class Case(NamedTuple):
    batch: int
    rows: int
    columns: int
    dtype: torch.dtype = torch.float32

    def __str__(self):
        return f"{self.batch}x{self.rows}x{self.columns}-{str(self.dtype).removeprefix('torch.')}"


DEFAULT = [Case(4096, 8, 8), Case(2048, 16, 16), Case(512, 32, 32), Case(128, 64, 64), Case(32, 128, 128)]
FULL = [
    *DEFAULT,
    *(case._replace(dtype=torch.float64) for case in DEFAULT),
    *(Case(4096, 32, 8), Case(512, 128, 32), Case(512, 32, 128), Case(256, 48, 48), Case(64, 96, 96)),
    *(Case(16, 192, 192), Case(16, 256, 256), Case(1, 8, 8), Case(1, 32, 32), Case(1, 128, 128)),
]


def truncated(matrix, threshold):
    """A randomised SVD of a quarter of the rank: exact only where no more is above the threshold."""
    u, s, v = torch.svd_lowrank(matrix, q=max(1, min(matrix.shape[1:]) // 4), niter=2)
    return (u * (s - threshold[:, None]).clamp(min=0).unsqueeze(-2)) @ v.mT


def test_svt(benchmark, case):
    matrix = torch.randn(case.batch, case.rows, case.columns, dtype=case.dtype)
    threshold = 0.5 * torch.linalg.matrix_norm(matrix, 2)
    competitors = [
        FunctionCompetitor("fastpref", "fastpref.svt", lambda m, t: fastpref.svt(m, t).low_rank, matrix, threshold),
        FunctionCompetitor("svd", "torch.linalg.svd", svt_by_svd, matrix, threshold),
        FunctionCompetitor("gram", "Gram and eigh", svt_by_gram, matrix, threshold),
        FunctionCompetitor("svd_lowrank", "torch.svd_lowrank", truncated, matrix, threshold),
        FunctionCompetitor("route_jacobi", "route: Jacobi", lambda m, t: _by_jacobi(m, t)[0], matrix, threshold),
        FunctionCompetitor("route_gram", "route: float64 Gram", lambda m, t: _by_gram(m, t)[0], matrix, threshold),
        FunctionCompetitor("route_svd", "route: SVD", lambda m, t: _by_svd(m, t)[0], matrix, threshold),
    ]
    truth, _ = svt_ref(matrix, threshold)
    size = torch.linalg.matrix_norm(matrix.double())

    def judge(found):
        return {"error": float((torch.linalg.matrix_norm(found - truth) / size).max())}

    rows = measured(benchmark, "svt", str(case), competitors, judge, seconds=3)
    assert rows["fastpref"]["error"] <= 1.5 * rows["svd"]["error"] + 16 * torch.finfo(case.dtype).eps
