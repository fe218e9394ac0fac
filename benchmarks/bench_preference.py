"""A whole DPO or RDPO step, from logits to their gradient.

`pytest benchmarks/bench_preference.py --benchmark-json FILE`

The reference's log-probs are given per token, as after a precomputed reference pass. Rounds, records and the gate are
those of bench_token_logps.py. The tiny shape shows what a call costs beside the work.
"""

import pytest

from bench_token_logps import DEFAULT_IS_NATIVE, SECONDS, bandwidth, play  # noqa: F401  (bandwidth is a fixture)
from harness.contest import Case, Contest, too_large
from harness.measure import CPU

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' warnings are theirs

DEFAULT = [
    Case("preference", "step", 1024, 128256, "float32", 0.5, loss="sigmoid"),
    Case("preference", "step", 1024, 128256, "bfloat16", 0.5, loss="rdpo"),
]
FULL = [
    Case("preference", "step", tokens, vocab, dtype, masked, loss="rdpo")
    for vocab in (32000, 128256, 152064, 262144)
    for tokens in (1024, 8192)
    for dtype in ("float32", "bfloat16")
    for masked in (0.0, 0.5)
]
TINY = Case("preference", "step", 32, 64, "float32", 0.5, loss="rdpo")


def test_preference_step(benchmark, case, bandwidth):  # noqa: F811
    if reason := too_large(case, CPU):
        pytest.skip(reason)
    contest = Contest(case, CPU, leave_out=DEFAULT_IS_NATIVE)
    play(benchmark, contest, contest.affordable_rounds(SECONDS))
    benchmark.extra_info.update(contest.record(bandwidth), bandwidth=bandwidth)


def test_overhead(benchmark, bandwidth):  # noqa: F811
    contest = Contest(TINY, CPU, leave_out=DEFAULT_IS_NATIVE)
    play(benchmark, contest, 300)
    benchmark.extra_info.update(contest.record(bandwidth), bandwidth=bandwidth)
