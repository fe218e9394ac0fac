"""The residual pass against plain PyTorch here: `pytest benchmarks/bench_residual_pass.py --benchmark-json FILE`.

Every round begins with one run of each competitor, so that all samples are taken in turn in the same process. A pass
cannot be faster than one read of the matrix, nor than its 6 m n r operations at the rate of a matrix product:
`extra_info` holds both, measured here, and what share of the slower one's time the fastest sample reached. --full adds
n = 20000 and r = 64.
"""

import time
from typing import NamedTuple

import pytest
import torch

from fastpref._lowrank.residual_pass import residual_pass
from harness.measure import FunctionCompetitor, read_gbps
from harness.problem import measured
from peers.low_rank import residual_composed

ZETA = 3.0


class Case(NamedTuple):
    n: int
    rank: int

    def __str__(self):
        return f"n{self.n}-r{self.rank}"


DEFAULT = [Case(2000, 10), Case(8000, 10), Case(8000, 1)]
FULL = [*DEFAULT, Case(20000, 10), Case(2000, 64), Case(8000, 64)]


composed = residual_composed(ZETA)


def in_blocks(matrix, left, right, rows=128):
    """The same in blocks of rows that stay in the cache."""
    parts = [composed(d, a, right) for d, a in zip(matrix.split(rows), left.split(rows), strict=True)]
    left_grads, *sums = zip(*parts, strict=True)
    return torch.cat(left_grads), *(sum(s) for s in sums)


def fused(matrix, left, right):
    return residual_pass(matrix, left, right, psi="cauchy", zeta=ZETA)


def gemm_gflops(n=2048, repeats=5) -> float:
    a = torch.randn(n, n)
    out = torch.empty_like(a)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds) / 1e9


@pytest.fixture(scope="module")
def limits():
    return {"read_gbps": read_gbps(), "gemm_gflops": gemm_gflops()}


def test_residual_pass(benchmark, case, limits):
    n, rank = case
    left, right = torch.randn(n, rank), torch.randn(n, rank)
    matrix = torch.randn(n, n).addmm_(left, right.t())
    matrix.view(-1)[:: 97 * 97] = torch.nan
    competitors = [
        FunctionCompetitor("fastpref", "fastpref", fused, matrix, left, right),
        FunctionCompetitor("composed", "plain PyTorch", composed, matrix, left, right),
        FunctionCompetitor("in_blocks", "plain PyTorch, 128 rows at a time", in_blocks, matrix, left, right),
    ]
    truth = fused(matrix, left, right).right_grad

    def judge(found):
        error = float((found[1] - truth).abs().max() / truth.abs().max())
        assert error < 1e-4
        return {"error": error}

    gflops, gbytes = 6 * n * n * rank / 1e9, matrix.nbytes / 1e9
    reading, computing = gbytes / limits["read_gbps"], gflops / limits["gemm_gflops"]
    rows = measured(benchmark, "residual_pass", str(case), competitors, judge, seconds=8, **limits)
    seconds = rows["fastpref"]["min_ms"] / 1e3
    benchmark.extra_info.update(gflops=gflops / seconds, share_of_limit=max(reading, computing) / seconds)
    benchmark.extra_info["notes"] = [
        f"{gflops / seconds:.0f} GFLOP/s and {gbytes / seconds:.1f} GB/s at fastpref's fastest; a matrix product here "
        f"{limits['gemm_gflops']:.0f} GFLOP/s, reading {limits['read_gbps']:.1f} GB/s: "
        f"{100 * max(reading, computing) / seconds:.0f} % of what "
        f"{'memory' if reading > computing else 'arithmetic'} allows. Errors are against fastpref's."
    ]
