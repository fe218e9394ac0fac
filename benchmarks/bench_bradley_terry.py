"""bradley_terry against its peers on this CPU: `pytest benchmarks/bench_bradley_terry.py --benchmark-json FILE`.

Logits: against the generic alternative, batched principal component pursuit (an inexact augmented Lagrangian with
torch.linalg.svd), on the same matrices. Votes: against choix and evalica, which fit maximum likelihood. Edges: time by
the number of items. Every round runs each competitor once, in the same process; errors are of the scores, relative.
"""

import pytest
import torch

from fastpref import Edges, bradley_terry
from harness.measure import FunctionCompetitor
from harness.problem import corrupted_scores, judge_by, measured
from peers import low_rank
from peers.token import import_reason


@pytest.mark.parametrize(("items", "corrupted"), [(16, 0.2), (32, 0.2), (64, 0.1), (64, 0.2), (128, 0.2)])
def test_logits(benchmark, items, corrupted):
    size = 16384 // items
    made = [corrupted_scores(items, corrupted, seed) for seed in range(size)]
    w, _, data = (torch.stack(part) for part in zip(*made, strict=True))

    def by_ialm(m):
        return low_rank.ialm(m, 1.2, 1e-6).mean(-1)

    competitors = [
        FunctionCompetitor("fastpref", "fastpref.bradley_terry", lambda m: bradley_terry(m).scores, data),
        FunctionCompetitor("ialm_svd", "IALM, torch.linalg.svd, row means", by_ialm, data),
    ]
    name = f"{size} logit matrices of {items} items, {100 * corrupted:.0f} % corrupted"
    measured(benchmark, "bradley_terry", name, competitors, judge_by(w, -1), notes=["Times are of the whole batch."])


@pytest.mark.parametrize(("items", "votes", "inverted"), [(64, 50, 0.0), (64, 50, 0.2), (256, 20, 0.2), (256, 5, 0.2)])
def test_votes(benchmark, items, votes, inverted):
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(items, generator=rng, dtype=torch.float64)
    w -= w.mean()
    difference = w[:, None] - w
    difference = torch.where(torch.rand(difference.shape, generator=rng) < inverted, -difference, difference)
    won = torch.binomial(torch.full_like(difference, votes), difference.sigmoid(), generator=rng).triu(1)
    wins = won + (votes - won).triu(1).mT
    entries = {
        "fastpref": ("fastpref.bradley_terry(wins=...)", lambda x: bradley_terry(wins=x).scores),
        "fastpref_mle": ("fastpref.bradley_terry(robust=False)", lambda x: bradley_terry(wins=x, robust=False).scores),
    }
    absent = {name: reason for name in ("choix", "evalica") if (reason := import_reason(name))}
    if "choix" not in absent:
        entries["choix"] = ("choix ilsr_pairwise_dense", low_rank.by_choix)
    if "evalica" not in absent:
        entries["evalica"] = ("evalica bradley_terry", low_rank.by_evalica(wins))
    competitors = [FunctionCompetitor(name, title, run, wins) for name, (title, run) in entries.items()]
    name = f"{items} items, {votes} votes a pair, {100 * inverted:.0f} % inverted"
    near = judge_by(w, -1)

    def judge(found):
        return near(found - found.mean())

    measured(benchmark, "bradley_terry", name, competitors, judge, seconds=5, absent=absent)


@pytest.mark.parametrize("items", [10_000, 100_000, 1_000_000])
def test_edges(benchmark, items):
    """Ten comparisons per item, a tenth inverted, tolerance 1e-6."""
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(items, dtype=torch.float64, generator=rng)
    i = torch.arange(items).repeat(5)
    j = (i + torch.randint(1, items, i.shape, generator=rng)) % items
    logits = (w[i] - w[j]) * torch.where(torch.rand(len(i), generator=rng) < 0.1, -1.0, 1.0)
    edges = Edges(i, j, logits=logits, num_items=items)

    def judge(result):
        near = (result.scores - w + w.mean()).abs() < 1e-2
        return {"recovered": near.double().mean().item(), "iterations": int(result.info.iterations)}

    competitors = [
        FunctionCompetitor("fastpref", "fastpref.bradley_terry", lambda: bradley_terry(edges=edges, tol=1e-6))
    ]
    notes = [f"{len(i)} comparisons; recovered: items within 0.01."]
    measured(benchmark, "bradley_terry", f"{items} items, edges", competitors, judge, notes=notes)
