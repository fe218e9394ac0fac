"""select_pairs against plain NumPy on this CPU: `pytest benchmarks/bench_pairs.py --benchmark-json FILE`.

A loop over the prompts, run in full, and the same arithmetic on whole arrays. Both do less: no missing rewards, no
reasons, no statement of how often the target lies outside the pool; where two rewards are equally near the target they
take the first.
"""

import numpy as np
import pytest
from measure import FunctionCompetitor
from problem import measured

from fastpref.curate import select_pairs


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
        FunctionCompetitor("by_prompt", "NumPy, a loop over the prompts", by_prompt, rewards),
        FunctionCompetitor("whole", "NumPy on whole arrays", whole, rewards),
    ]
    rows = measured(benchmark, "select_pairs", f"{prompts} prompts of {n} responses", competitors, judge, seconds=15)
    assert all(row["agreement"] > 0.9999 for row in rows.values())
