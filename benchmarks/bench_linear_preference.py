"""A DPO step from hidden states and LM head: `pytest benchmarks/bench_linear_preference.py --benchmark-json FILE`.

Four pairs of 256 tokens, as in bench_linear_logps.py, which explains U, the competitors' inputs and --full. With
`reference_given` the reference's log-probs come per token, as after a precomputed pass, and the figures are those of
the policy's step alone. With `reference_scored` they come from the reference's own hidden states through the same head
without its gradient, inside the timing: one more pass over the head, and the one way that Liger's DPO loss takes.
"""

import pytest

from bench_linear_logps import DTYPES, LARGE, SMALL, measure
from harness.contest import LinearCase

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' warnings are theirs


def _step(shape, dtype, trained, masked, reference):
    return LinearCase(
        "linear_preference", "step", **shape, dtype=dtype, trained=trained, masked=masked, loss="sigmoid",
        reference=reference,
    )  # fmt: skip


GIVEN = [
    _step(SMALL, dtype, trained, masked, "given")
    for dtype in DTYPES
    for trained in (True, False)
    for masked in (0.5, 0.0)
]
SCORED = [case._replace(reference="scored") for case in GIVEN]
DEFAULT = GIVEN + [case for case in SCORED if case.masked]
FULL = GIVEN + SCORED + [_step(LARGE, dtype, trained, 0.5, "given") for dtype in DTYPES for trained in (True, False)]


def test_linear_preference_step(benchmark, case):
    measure(benchmark, case)
