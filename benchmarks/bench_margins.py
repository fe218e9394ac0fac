"""Selection by margins against plain numpy: `pytest benchmarks/bench_margins.py --benchmark-json FILE`.

Two sources of margins, an external one and an implicit one, that agree a little. Plain numpy is the released recipe
with its bounds searched step by step, P as a ratio and a full sort; it reports no correlations and breaks no ties. The
goal is at most two seconds for bees on 10,000,000 pairs on two cores; one is used. --full adds sizes.
"""

import numpy as np

from fastpref.curate import bees, select_top
from harness.measure import FunctionCompetitor
from harness.problem import measured

DEFAULT = [1_000_000, 10_000_000]
FULL = [1_000, 30_000, 100_000, *DEFAULT]
GOAL_MS = 2000


def pytest_generate_tests(metafunc):
    metafunc.parametrize("pairs", FULL if metafunc.config.getoption("full") else DEFAULT)


def margins_of(pairs) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=pairs)
    return {
        "external": 2 + 3 * truth + rng.normal(0, 3, pairs),
        "implicit": 3 + 6 * truth + rng.normal(0, 12, pairs),
    }


def plain(margins) -> np.ndarray:
    """What a user writes."""
    p = []
    for name, divisor in (("external", 1.5), ("implicit", 2.0)):
        m = margins[name]
        largest = m.max()
        upper = int(largest / divisor)
        while True:
            above = np.sum((m > upper) & (m <= largest))
            if above < largest - upper or above < 30 or upper > largest:
                break
            upper += 1
        q = np.clip(m, -2, upper) + 2
        p.append(q / q.max())
    return p[0] * p[1] / (p[0] * p[1] + (1 - p[0]) * (1 - p[1]))


def test_bees(benchmark, pairs):
    margins = margins_of(pairs)
    truth = plain(margins)
    competitors = [
        FunctionCompetitor("fastpref", "curate.bees", lambda m: bees(m).p, margins),
        FunctionCompetitor("plain", "numpy, as it is written down", plain, margins),
    ]
    either = ~np.isnan(truth)  # 0 / 0, which bees takes for one half

    def judge(p):
        return {"error": float(np.abs(p - truth)[either].max())}

    rows = measured(benchmark, "bees", f"{pairs:,} pairs, two sources", competitors, judge, seconds=10)
    assert rows["fastpref"]["error"] <= 1e-9
    assert rows["fastpref"]["min_ms"] <= GOAL_MS


def test_select_top(benchmark, pairs):
    scores = bees(margins_of(pairs))
    k = pairs // 10
    threshold = np.sort(scores.score)[-k]
    competitors = [
        FunctionCompetitor("fastpref", "curate.select_top", lambda s: select_top(s, k=k).indices, scores),
        FunctionCompetitor("plain", "numpy.argsort", lambda s: np.argsort(s.score)[::-1][:k], scores),
    ]

    def judge(indices):
        return {"recovered": float((scores.score[indices] >= threshold).mean())}

    measured(benchmark, "select_top", f"a tenth of {pairs:,} pairs", competitors, judge, seconds=10)
