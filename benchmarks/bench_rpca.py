"""Robust PCA against its peers here: `pytest benchmarks/bench_rpca.py --benchmark-json FILE`.

A batch of small matrices, and one larger matrix, against inexact augmented Lagrangians (Lin, Chen, Ma 2010) in PyTorch
with a full SVD, with a Gram matrix, and with scikit-learn's randomised SVD, and against tensorly. Every round runs each
competitor once, in the same process; the slowest have one or two runs. Errors and shares recovered (relative error
below 1e-3) are against the L that was put in. `growth` fits how time grows with n, and measures memory. --full adds
n = 2000 against the peers (a quarter of an hour) and growth to n = 20000 (5 GiB).
"""

import math
import time
import warnings
from typing import NamedTuple

import pytest
import torch

import fastpref
from harness.measure import CPU, FunctionCompetitor, PeakMemory
from harness.problem import corrupted, corrupted_scores, gross_errors, judge_by, measured
from peers import low_rank
from peers.token import import_reason


class Batch(NamedTuple):
    items: int
    rank: int
    share: float
    size: int = 100

    def __str__(self):
        return f"{self.size} of {self.items}x{self.items}, rank {self.rank}, {100 * self.share:.0f} % corrupted"


class Single(NamedTuple):
    n: int
    rank: int = 10
    share: float = 0.05

    def __str__(self):
        return f"{self.n}x{self.n}, rank {self.rank}, {100 * self.share:.0f} % corrupted"


BATCHES = [Batch(32, 3, 0.05), Batch(64, 2, 0.1, 400), Batch(64, 4, 0.1, 400), Batch(128, 4, 0.1, 32)]
SINGLES = [Single(500), Single(1000)]
GROWTH = [1000, 2000, 4000, 8000]


def pytest_generate_tests(metafunc):
    full = metafunc.config.getoption("full")
    if "batch" in metafunc.fixturenames:
        metafunc.parametrize("batch", BATCHES, ids=str)
    elif "single" in metafunc.fixturenames:
        metafunc.parametrize("single", SINGLES + ([Single(2000)] if full else []), ids=str)
    elif "sizes" in metafunc.fixturenames:
        metafunc.parametrize("sizes", [[*GROWTH, 20000] if full else GROWTH], ids=["sizes"])


def ours(rank, method="auto", structure="general"):
    def run(data):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a rank that looks wrong
            return fastpref.rpca(data, rank=rank, method=method, structure=structure).low_rank()

    return run


def one_thread(function):
    def run(*arguments):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*arguments)
        finally:
            torch.set_num_threads(threads)

    return run


def competing(data, entries):
    return [FunctionCompetitor(name, title, function, data) for name, (title, function) in entries.items()]


def test_batch(benchmark, batch):
    if batch.rank == 2:  # Bradley-Terry
        made = [corrupted_scores(batch.items, batch.share, seed)[1:] for seed in range(batch.size)]
    else:
        made = [corrupted(batch.items, batch.items, batch.rank, batch.share, s) for s in range(batch.size)]
    low, data = (torch.stack(part) for part in zip(*made, strict=True))
    rho, tol = 1.2, 1e-6  # of which every member converges
    entries = {"fastpref": (f"fastpref.rpca(rank={batch.rank})", ours(batch.rank))}
    if batch.rank == 2:
        entries["fastpref_skew"] = ("fastpref.rpca(rank=2, structure='skew')", ours(2, structure="skew"))
    entries["fastpref_rank_free"] = ("fastpref.rpca()", ours(None))
    entries["ialm_svd"] = ("IALM, torch.linalg.svd", lambda d: low_rank.ialm(d, rho, tol))
    entries["ialm_svd_one_thread"] = (
        "IALM, torch.linalg.svd, one thread",
        one_thread(lambda d: low_rank.ialm(d, rho, tol)),
    )
    entries["ialm_gram"] = ("IALM, Gram and eigh", lambda d: low_rank.ialm_gram(d, rho, tol))
    notes = ["Times are of the whole batch."]
    measured(benchmark, "rpca", str(batch), competing(data, entries), judge_by(low, (-2, -1)), notes=notes)


def test_single(benchmark, single):
    low, data = corrupted(single.n, single.n, single.rank, single.share)
    rho, tol = 1.5, 1e-7
    entries = {
        "fastpref": (f"fastpref.rpca(rank={single.rank})", ours(single.rank)),
        "fastpref_altproj": (f"fastpref.rpca(rank={single.rank}, method='altproj')", ours(single.rank, "altproj")),
        "fastpref_annealed": (f"fastpref.rpca(rank={single.rank}, method='annealed')", ours(single.rank, "annealed")),
        "fastpref_rank_free": ("fastpref.rpca()", ours(None)),
        "ialm_svd": ("IALM, torch.linalg.svd", lambda d: low_rank.ialm(d[None], rho, tol)),
        "ialm_svd_one_thread": (
            "IALM, torch.linalg.svd, one thread",
            one_thread(lambda d: low_rank.ialm(d[None], rho, tol)),
        ),
        "ialm_gram": ("IALM, Gram and eigh", lambda d: low_rank.ialm_gram(d[None], rho, tol)),
    }
    entries["ialm_randomized"] = ("IALM, sklearn randomized_svd", lambda d: low_rank.ialm_randomized(d, rho, tol))
    entries["tensorly"] = ("tensorly robust_pca, reg_E=2/sqrt(n)", low_rank.by_tensorly)
    absent = {"ialm_randomized": import_reason("sklearn"), "tensorly": import_reason("tensorly")}
    if single.n > 500:
        absent["tensorly"] = "run at n = 500 alone, to save time"
    absent = {name: reason for name, reason in absent.items() if reason}
    entries = {name: entry for name, entry in entries.items() if name not in absent}
    measured(benchmark, "rpca", str(single), competing(data, entries), judge_by(low, (-2, -1)), absent=absent)


@pytest.mark.parametrize("method", ["annealed", "altproj"])
def test_growth(benchmark, sizes, method):
    """Seconds, memory beside the matrix, and the exponent of n."""
    rows, run = {}, ours(10, method)
    for n in sizes:
        a, b = (torch.randn(n, 10, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
        data = a @ b.t()
        rng = torch.Generator().manual_seed(3)
        for block in data.split(1000):
            block += gross_errors(block, 0.05, rng)
        sample = slice(0, n, max(1, n // 500))
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            found = fastpref.rpca(data, rank=10, method=method)
            seconds.append(time.perf_counter() - start)
        with PeakMemory(CPU) as memory:
            fastpref.rpca(data, rank=10, method=method)
        low = a[sample].double() @ b.double().t()
        error = (found.U[sample] * found.S).double() @ found.Vh.double() - low
        ms = [1e3 * s for s in seconds]
        rows[f"n{n}"] = {
            "title": f"n = {n}",
            "rounds": len(ms),
            "median_ms": sorted(ms)[1],
            "min_ms": min(ms),
            "max_ms": max(ms),
            "times_subject": sorted(ms)[1] / rows["n1000"]["median_ms"] if rows else 1.0,
            "error": float(error.norm() / low.norm()),
            "iterations": int(found.info.iterations),
            "beside_data": memory.bytes / data.nbytes if memory.bytes is not None else None,
        }
        del data, found
    largest, start = rows[f"n{sizes[-1]}"], rows["n2000"]
    factor = (sizes[-1] / 2000) ** 2
    by_pass = [row["median_ms"] / row["iterations"] for row in (start, largest)]
    exponent = math.log(largest["median_ms"] / start["median_ms"]) / math.log(sizes[-1] / 2000)
    note = (
        f"time grows as n^{exponent:.2f} from 2000 to {sizes[-1]}: {largest['median_ms'] / start['median_ms']:.1f} "
        f"times, {factor:.0f} as n^2; per iteration {by_pass[1] / by_pass[0]:.1f} times"
    )
    print(note)
    benchmark.extra_info.update(
        op="rpca", name=f"growth, rank 10, {method}", problem=True, rounds=3, competitors=rows, notes=[note], absent={},
        threads=torch.get_num_threads(), exponent=exponent,
    )  # fmt: skip
    benchmark.pedantic(run, args=(torch.randn(100, 100),), rounds=1)
