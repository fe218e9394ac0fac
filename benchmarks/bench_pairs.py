"""select_pairs against plain NumPy on this CPU: `pytest benchmarks/bench_pairs.py --benchmark-json FILE`.

Loops over the prompts, run in full: one of the bare rule, and one that gives what select_pairs gives for a prompt (the
order of the responses immaterial, missing rewards, ties, a reason, ranks). And the bare rule on whole arrays. Where two
rewards are equally near the target, the bare rules take the first.
"""

import numpy as np
import pytest

from fastpref.curate import DropReason, select_pairs
from harness.measure import FunctionCompetitor
from harness.problem import measured


def fused(rewards):
    pairs = select_pairs(rewards, on_degenerate="ignore")
    return pairs.chosen, pairs.rejected


def by_prompt(rewards):
    chosen, rejected = np.full(len(rewards), -1), np.full(len(rewards), -1)
    for prompt, pool in enumerate(rewards):
        mean, std = pool.mean(), pool.std()
        if std > 0:
            chosen[prompt] = pool.argmax()
            rejected[prompt] = np.abs(pool - (mean - 2 * std)).argmin()
    return chosen, rejected


def in_full(rewards):
    """Per prompt: columns, reason, both scores and z, rank, count, mean, std, target, minimum."""
    result = np.full((len(rewards), 13), np.nan)
    for prompt, pool in enumerate(rewards):
        usable = np.isfinite(pool)
        known = np.sort(pool[usable])
        if len(known) < 2:
            result[prompt, :3] = -1, -1, DropReason.TOO_FEW
            continue
        mean, std = known.mean(), known.std()
        target = mean - 2 * std
        result[prompt, 8:] = len(known), mean, std, target, known[0]
        if known[0] == known[-1]:
            result[prompt, :3] = -1, -1, DropReason.NO_SPREAD
            continue
        distance = np.abs(known - min(max(target, known[0]), known[-1]))
        rank = (distance <= distance.min() + 1e-15 * max(-known[0], known[-1])).argmax()
        high, low = known[-1], known[rank]
        chosen, rejected = (pool == high).argmax(), (pool == low).argmax()
        if chosen == rejected:
            result[prompt, :3] = -1, -1, DropReason.SAME_RESPONSE
            continue
        z = (high - mean) / std, (low - mean) / std
        result[prompt, :8] = chosen, rejected, DropReason.KEPT, high, low, *z, rank
    return result[:, 0].astype(np.int64), result[:, 1].astype(np.int64)


def whole(rewards):
    target = rewards.mean(axis=1) - 2 * rewards.std(axis=1)
    return rewards.argmax(axis=1), np.abs(rewards - target[:, None]).argmin(axis=1)


@pytest.mark.parametrize(("prompts", "n"), [(1_000_000, 16), (100_000, 200)])
def test_select_pairs(benchmark, prompts, n):
    rewards = np.random.default_rng(0).normal(size=(prompts, n))
    chosen, rejected = fused(rewards)

    def judge(found):
        return {"agreement": float(((found[0] == chosen) & (found[1] == rejected)).mean())}

    competitors = [
        FunctionCompetitor("fastpref", "fastpref.curate.select_pairs", fused, rewards),
        FunctionCompetitor("in_full", "NumPy, a loop over the prompts, the same results", in_full, rewards),
        FunctionCompetitor("by_prompt", "NumPy, a loop over the prompts, the bare rule", by_prompt, rewards),
        FunctionCompetitor("whole", "NumPy on whole arrays, the bare rule", whole, rewards),
    ]
    rows = measured(benchmark, "select_pairs", f"{prompts} prompts of {n} responses", competitors, judge, seconds=15)
    assert all(row["agreement"] > 0.9999 for row in rows.values())
