"""bradley_terry against its peers on this CPU: `pytest benchmarks/bench_bradley_terry.py --benchmark-json FILE`.

Logits: against the generic alternative, batched principal component pursuit (inexact augmented Lagrangian with
torch.linalg.svd), on the same matrices. Votes: against choix and evalica, which fit maximum likelihood. Edges: time by
the number of items. Competitors run in turn in the same process; extra_info holds the minima and the errors.
"""

import time

import pytest
import torch

from fastpref import Edges, bradley_terry


def logit_matrices(batch, items, corrupted, seed=0):
    """Scores and float32 logits; a share of the pairs replaced by logits of probabilities uniform in [0.01, 0.99]."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(batch, items, generator=g)
    w -= w.mean(-1, keepdim=True)
    m = w[:, :, None] - w[:, None]
    wrong = (0.01 + 0.98 * torch.rand(m.shape, generator=g)).logit()
    m = torch.where(torch.rand(m.shape, generator=g) < corrupted, wrong, m).triu(1)
    return w, m - m.mT


def ialm(m, rho=1.2, tol=1e-6, max_iter=200):
    """Low-rank part by Lin, Chen and Ma 2010, until the worst matrix has converged."""
    lam = m.shape[-1] ** -0.5
    spectral = torch.linalg.matrix_norm(m, 2)[:, None, None]
    y = m / torch.maximum(spectral, m.abs().amax((1, 2), keepdim=True) / lam)
    mu, s = 1.25 / spectral, torch.zeros_like(m)
    for _ in range(max_iter):
        u, sv, vh = torch.linalg.svd(m - s + y / mu, full_matrices=False)
        low = (u * (sv - 1 / mu[:, 0]).clamp(min=0)[:, None]) @ vh
        rest = m - low + y / mu
        s = rest - rest.clamp(-lam / mu, lam / mu)
        gap = m - low - s
        y = y + mu * gap
        mu = rho * mu
        if (gap.norm(dim=(1, 2)) <= tol * m.norm(dim=(1, 2))).all():
            break
    return low


def fastest(functions, rounds):
    """Least seconds of each, run in turn."""
    least = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            least[name] = min(least[name], time.perf_counter() - start)
    return least


def relative(scores, w):
    return (scores - w).norm(dim=-1) / w.norm(dim=-1)


@pytest.mark.parametrize(("items", "corrupted"), [(16, 0.2), (32, 0.2), (64, 0.1), (64, 0.2), (128, 0.2)])
def test_logits(benchmark, items, corrupted):
    w, m = logit_matrices(65536 // items, items, corrupted)
    few = m[: max(8, 512 // items)]
    seconds = fastest({"fastpref": lambda: bradley_terry(m), "ialm": lambda: ialm(few)}, 3)
    per_matrix = {"fastpref": seconds["fastpref"] / len(m), "ialm": seconds["ialm"] / len(few)}
    error = relative(bradley_terry(m).scores, w)
    peer_error = relative(ialm(few).mean(-1), w[: len(few)])
    benchmark.extra_info.update(
        microseconds_per_matrix={name: 1e6 * value for name, value in per_matrix.items()},
        times_faster=per_matrix["ialm"] / per_matrix["fastpref"],
        recovered={"fastpref": (error < 1e-3).float().mean().item(), "ialm": (peer_error < 1e-3).float().mean().item()},
        threads=torch.get_num_threads(),
    )
    print(benchmark.extra_info)
    benchmark(bradley_terry, m)


@pytest.mark.parametrize(("items", "votes", "inverted"), [(64, 50, 0.0), (64, 50, 0.2), (256, 20, 0.2), (256, 5, 0.2)])
def test_votes(benchmark, items, votes, inverted):
    choix, evalica = pytest.importorskip("choix"), pytest.importorskip("evalica")
    g = torch.Generator().manual_seed(0)
    w = torch.randn(items, generator=g, dtype=torch.float64)
    w -= w.mean()
    d = w[:, None] - w
    d = torch.where(torch.rand(d.shape, generator=g) < inverted, -d, d)
    won = torch.binomial(torch.full_like(d, votes), d.sigmoid(), generator=g).triu(1)
    wins = won + (votes - won).triu(1).mT
    i, j = wins.nonzero(as_tuple=True)
    names, counts = [str(k) for k in range(items)], wins[i, j].tolist()
    left, right = [names[k] for k in i], [names[k] for k in j]
    winners = [evalica.Winner.X] * len(left)

    def by_evalica():
        scores = evalica.bradley_terry(left, right, winners, weights=counts).scores
        return torch.tensor([scores[name] for name in names], dtype=torch.float64).log()

    functions = {
        "fastpref robust": lambda: bradley_terry(wins=wins).scores,
        "fastpref maximum likelihood": lambda: bradley_terry(wins=wins, robust=False).scores,
        "choix ilsr_pairwise_dense": lambda: torch.tensor(choix.ilsr_pairwise_dense(wins.numpy(), alpha=1e-9)),
        "evalica bradley_terry": by_evalica,
    }
    errors = {}
    for name, function in functions.items():
        scores = function()
        errors[name] = relative(scores - scores.mean(), w).item()
    benchmark.extra_info.update(seconds=fastest(functions, 3), errors=errors, threads=torch.get_num_threads())
    print(benchmark.extra_info)
    benchmark(functions["fastpref robust"])


@pytest.mark.parametrize("items", [10_000, 100_000, 1_000_000])
def test_edges(benchmark, items):
    """Ten comparisons per item, a tenth inverted, tolerance 1e-6."""
    w = torch.randn(items, dtype=torch.float64)
    i = torch.arange(items).repeat(5)
    j = (i + torch.randint(1, items, i.shape)) % items
    logits = (w[i] - w[j]) * torch.where(torch.rand(len(i)) < 0.1, -1.0, 1.0)
    edges = Edges(i, j, logits=logits, num_items=items)
    result = benchmark.pedantic(lambda: bradley_terry(edges=edges, tol=1e-6), rounds=2)
    benchmark.extra_info.update(
        comparisons=len(i),
        iterations=int(result.info.iterations),
        converged=bool(result.info.converged),
        recovered=((result.scores - w + w.mean()).abs() < 1e-2).double().mean().item(),
        threads=torch.get_num_threads(),
    )
    print(benchmark.extra_info)
