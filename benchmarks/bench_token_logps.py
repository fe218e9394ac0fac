"""token_logps against its peers on this CPU: `pytest benchmarks/bench_token_logps.py --benchmark-json FILE`.

One test per case; its body is fastpref's call, and pytest-benchmark's own table shows that. Every round begins with one
run of each competitor, so that all samples are taken in turn in the same process; `extra_info` holds all of them, and
benchmarks/harness/report.py makes tables of it. --full takes T up to 8192 and every vocabulary.

"fastpref" takes huge pages for its gradient, as it does by default; "no huge-page advice" is the same with
fastpref._native.HUGE_OUTPUT_BYTES out of reach. test_huge_page_allocator measures in a child process in which torch
itself allocates on huge pages (THP_MEM_ALLOC_ENABLE=1): the peers without most of their page faults.
"""

import json
import os
import subprocess
import sys
import tempfile

import pytest

from harness.contest import Case, Contest, measured, too_large
from harness.measure import CPU, copy_gbps, read_gbps

SECONDS = 12  # of rounds, per case
pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' warnings are theirs

_GOAL = {"op": "token_logps", "tokens": 1024, "vocab": 128256}
DEFAULT = [
    Case(**_GOAL, mode="forward", dtype="float32"),
    Case(**_GOAL, mode="forward", dtype="bfloat16"),
    Case(**_GOAL, mode="step", dtype="float32"),
    Case(**_GOAL, mode="step", dtype="bfloat16"),
    Case(**_GOAL, mode="step", dtype="bfloat16", masked=0.5),
    Case("token_logps", "step", 1024, 32000, "float32"),
]
FULL = [
    Case("token_logps", mode, tokens, vocab, dtype, masked)
    for vocab in (32000, 128256, 152064, 262144)
    for tokens in (1024, 8192)
    for dtype in ("float32", "bfloat16")
    for masked in (0.0, 0.5)
    for mode in ("forward", "step")
]
DEFAULT_IS_NATIVE = dict.fromkeys(
    ("fastpref_native", "fastpref_native_inplace", "fastpref_step_native"), "what fastpref chooses on a CPU"
)
MEASURED_ABOVE = dict.fromkeys(
    ("eager_fp32", "compiled", "one_pass", "trl_selective"), "measured with torch's default allocator alone"
)


@pytest.fixture(scope="module")
def bandwidth():
    return {"read_gbps": read_gbps(), "copy_gbps": copy_gbps(CPU)}


def test_token_logps(benchmark, case, bandwidth):
    if reason := too_large(case, CPU):
        pytest.skip(reason)
    contest = Contest(case, CPU, leave_out=DEFAULT_IS_NATIVE)
    play(benchmark, contest, contest.affordable_rounds(SECONDS))
    benchmark.extra_info.update(contest.record(bandwidth), bandwidth=bandwidth)


def play(benchmark, contest, count):
    """All rounds; pytest-benchmark times the subject's part of each."""
    rounds = contest.rounds
    benchmark.pedantic(rounds.play_subject, setup=rounds.play_others, teardown=rounds.end_round, rounds=count)


@pytest.mark.parametrize("goal", DEFAULT[:4], ids=str)
def test_huge_page_allocator(benchmark, goal, bandwidth):
    if "THP_MEM_ALLOC_ENABLE" in os.environ:
        pytest.skip("THP_MEM_ALLOC_ENABLE is set: all figures of this run are with it")
    command = [sys.executable, __file__, json.dumps([goal, bandwidth])]
    done = benchmark.pedantic(
        subprocess.run,
        (command,),
        {
            "env": os.environ | {"THP_MEM_ALLOC_ENABLE": "1"},
            "cwd": tempfile.gettempdir(),
            "capture_output": True,
            "text": True,
        },
        rounds=1,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(done.stdout.splitlines()[-1])
    benchmark.extra_info.update(record, bandwidth=bandwidth, huge_page_allocator=True)


if __name__ == "__main__":  # test_huge_page_allocator's child, behind its parent's gate
    import warnings

    warnings.simplefilter("ignore")
    fields, bandwidth = json.loads(sys.argv[1])
    leave_out = DEFAULT_IS_NATIVE | MEASURED_ABOVE
    print(json.dumps(measured(Case(*fields), CPU, bandwidth, SECONDS / 2, leave_out=leave_out)))
