"""linear_token_logps against its peers on this CPU: `pytest benchmarks/bench_linear_logps.py --benchmark-json FILE`.

The shape is four pairs of 256 tokens. Every competitor gets the same hidden states, head and labels; the hidden states
always get a gradient, the head where it is trained. Beside the milliseconds stands the time in units of U, the bare
product of the rows that count with the head in the same dtype, into memory that is there: it runs before each single
run of each competitor, and the ratio is taken pair by pair. Rounds, gate and records are those of bench_token_logps.py.
--full adds a head of an 8B model's vocabulary.
"""

import pytest

from bench_token_logps import play
from harness.contest import LinearCase, LinearContest, too_large
from harness.measure import CPU

SECONDS = 12  # of rounds, per case
pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' warnings are theirs

SMALL = {"tokens": 2048, "hidden_size": 512, "vocab": 32000}
LARGE = {"tokens": 1024, "hidden_size": 2048, "vocab": 128256}
DTYPES = ("float32", "bfloat16")
DEFAULT = [
    LinearCase("linear_logps", "step", **SMALL, dtype=dtype, trained=trained, masked=masked)
    for dtype in DTYPES
    for trained in (True, False)
    for masked in (0.5, 0.0)
] + [LinearCase("linear_logps", "forward", **SMALL, dtype=dtype, masked=0.5) for dtype in DTYPES]
FULL = DEFAULT + [
    LinearCase("linear_logps", "step", **LARGE, dtype=dtype, trained=trained, masked=0.5)
    for dtype in DTYPES
    for trained in (True, False)
]
DEFAULT_IS_NATIVE = {
    f"{op}{rounded}_native": "what fastpref chooses on a CPU"
    for op in ("fastpref_linear", "fastpref_linear_step")
    for rounded in ("", "_rounded")
}


def test_linear_logps(benchmark, case):
    measure(benchmark, case)


def measure(benchmark, case: LinearCase):
    if reason := too_large(case, CPU):
        pytest.skip(reason)
    contest = LinearContest(case, CPU, leave_out=DEFAULT_IS_NATIVE)
    play(benchmark, contest, contest.affordable_rounds(SECONDS))
    benchmark.extra_info.update(contest.record())
