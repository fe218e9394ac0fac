"""Robust PCA against its peers here: `pytest benchmarks/bench_rpca.py --benchmark-json FILE`.

A batch of small matrices, and one larger matrix, against inexact augmented Lagrangians in PyTorch with a full SVD and
with a Gram matrix, on one and on two threads. Every round runs each competitor once, in the same process; extra_info
has times, the ratio of the fastest peer's time to each, and what was recovered. --full adds n = 2000.
"""

import time
from typing import NamedTuple

import low_rank_peers
import pytest
import torch
from measure import FunctionCompetitor, Rounds

import fastpref

CPU = torch.device("cpu")
SECONDS = 30  # of rounds, per case


class Batch(NamedTuple):
    items: int
    rank: int
    share: float
    size: int = 100

    def __str__(self):
        return f"batch-{self.size}x{self.items}-r{self.rank}"


class Single(NamedTuple):
    n: int
    rank: int = 10
    share: float = 0.05

    def __str__(self):
        return f"one-{self.n}-r{self.rank}"


DEFAULT = [Batch(32, 3, 0.05), Batch(64, 2, 0.1), Batch(64, 4, 0.1), Single(500), Single(1000)]
FULL = [*DEFAULT, Batch(16, 2, 0.1), Batch(128, 4, 0.1), Single(2000)]


def pytest_generate_tests(metafunc):
    metafunc.parametrize("case", FULL if metafunc.config.getoption("full") else DEFAULT, ids=str)


def on_one_thread(function):
    def run(*arguments):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*arguments)
        finally:
            torch.set_num_threads(threads)

    return run


def problem(case):
    if isinstance(case, Single):
        low, data = low_rank_peers.corrupted(case.n, case.n, case.rank, case.share)
        return low.unsqueeze(0), data.unsqueeze(0)
    seeds = range(case.size)
    if case.rank == 2:  # Bradley-Terry
        made = [low_rank_peers.corrupted_scores(case.items, case.share, seed)[1:] for seed in seeds]
    else:
        made = [low_rank_peers.corrupted(case.items, case.items, case.rank, case.share, seed) for seed in seeds]
    return tuple(torch.stack(part) for part in zip(*made, strict=True))


def ours(rank, method="auto"):
    def run(data):
        matrix = data[0] if len(data) == 1 else data
        return fastpref.rpca(matrix, rank=rank, method=method).low_rank().reshape(data.shape)

    return run


def peers(case):
    # one matrix of noise-free data converges at 1.5, a batch's worst member needs 1.2
    rho, tol = (1.5, 1e-7) if isinstance(case, Single) else (1.2, 1e-6)
    svd, gram = (lambda d: low_rank_peers.ialm(d, rho, tol)), (lambda d: low_rank_peers.ialm_gram(d, rho, tol))
    found = {
        "ialm_svd": ("IALM, torch.linalg.svd", svd),
        "ialm_svd_one_thread": ("IALM, torch.linalg.svd, one thread", on_one_thread(svd)),
    }
    if isinstance(case, Batch):
        found["ialm_gram"] = ("IALM, Gram + eigh", gram)
    return found


def entries(case):
    found = {"fastpref": (f"rpca(rank={case.rank})", ours(case.rank))}
    if isinstance(case, Single):
        found["fastpref_annealed"] = ("rpca, annealed", ours(case.rank, "annealed"))
        found["fastpref_altproj"] = ("rpca, altproj", ours(case.rank, "altproj"))
    found["fastpref_rank_free"] = ("rpca()", ours(None))
    return found | peers(case)


@pytest.mark.filterwarnings("ignore:rank=:RuntimeWarning")
def test_rpca(benchmark, case):
    low, data = problem(case)
    competitors = [FunctionCompetitor(name, title, function, data) for name, (title, function) in entries(case).items()]
    recovered, errors = {}, {}
    start = time.perf_counter()
    for competitor in competitors:
        found = competitor.run()
        recovered[competitor.name] = low_rank_peers.share_recovered(found, low)
        errors[competitor.name] = float(((found - low).norm(dim=(-2, -1)) / low.norm(dim=(-2, -1))).median())
    count = max(3, min(50, round(SECONDS / (time.perf_counter() - start))))
    rounds = Rounds(competitors, CPU, "fastpref")
    benchmark.pedantic(rounds.play_subject, setup=rounds.play_others, teardown=rounds.end_round, rounds=count)
    summary = rounds.summary()
    fastest = min(summary[name]["median_ms"] for name in ("ialm_svd", "ialm_svd_one_thread"))
    benchmark.extra_info.update(
        case=str(case),
        threads=torch.get_num_threads(),
        times=summary,
        ratio_to_ialm_svd={name: fastest / row["median_ms"] for name, row in summary.items()},
        recovered=recovered,
        median_error=errors,
    )
