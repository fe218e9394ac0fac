"""No number without a green test: the ops' numerics run first, on the same installed package."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
TESTS = HERE.parents[1] / "tests"


class Gate(NamedTuple):
    """What must pass, in one run of pytest."""

    paths: list[Path]
    markers: str  # -m; "" for every test


# Only on the backends that a CPU benchmark measures; what Triton's interpreter takes minutes for is tested by itself.
_ON_CPU = "numerics and not triton and not cuda"
# benchmark -> [(op, -m expression)]; all files of the op's tests are collected, see tests_of
GATES = {
    "bench_token_logps": [("logps/token_logps", _ON_CPU)],
    "bench_preference": [("logps/token_logps", _ON_CPU), ("logps/preference", _ON_CPU)],
    "bench_linear_logps": [("logps/linear_logps", _ON_CPU)],
    "bench_linear_preference": [("logps/linear_logps", _ON_CPU), ("logps/linear_preference", _ON_CPU)],
    "bench_bradley_terry": [("lowrank/bradley_terry", "numerics")],
    "bench_rpca": [("lowrank/rpca", "numerics"), ("lowrank/ialm", "numerics"), ("lowrank/batched_rpca", "numerics")],
    "bench_svt": [("lowrank/svt", _ON_CPU)],
    "bench_residual_pass": [("lowrank/residual_pass", _ON_CPU)],
    "bench_pairs": [("curate/pairs", "numerics")],
    "bench_influence": [("curate/influence", "numerics")],
    "bench_margins": [("curate/margins", "numerics")],
}
ENVIRONMENT = {"FASTPREF_TEST_SEED": "0"}  # unless the caller sets it: two runs of a gate should agree
EXTRA = "FASTPREF_BENCH_EXTRA_TESTS"  # more test files that must pass, separated by os.pathsep; it cannot remove any


def tests_of(op: str) -> list[Path]:
    """The test files of "folder/op": tests/folder/**/test_op.py and those that name a concern of it, test_op_*.py."""
    folder, _, word = op.rpartition("/")
    names = (f"test_{word}.py", f"test_{word}_*.py")
    found = sorted(path for name in names for path in (TESTS / folder).rglob(name))
    if not found:
        raise FileNotFoundError(f"there is no tests/{folder}/test_{word}.py")
    return found


def required(benchmarks) -> list[Gate]:
    """What must pass before these benchmark modules may report."""
    extra = [Gate([Path(path)], "") for path in os.environ.get(EXTRA, "").split(os.pathsep) if path]
    chosen = dict.fromkeys(gate for name in benchmarks for gate in GATES[name])  # a dict keeps the order
    return extra + [Gate(tests_of(op), markers) for op, markers in chosen]


def red(gates) -> str | None:
    """The end of the first failing run's output, or None when everything passed."""
    for paths, markers in gates:
        command = [sys.executable, "-m", "pytest", *paths, "-q", "-x", "-m", markers, "-p", "no:cacheprovider"]
        # from here, not from the root, whose fastpref is the bare source tree
        done = subprocess.run(command, cwd=HERE, env=ENVIRONMENT | os.environ, capture_output=True, text=True)
        if done.returncode != 0:  # 5, nothing collected, is no proof either
            names = ", ".join(path.name for path in paths)
            return f"{names}, exit code {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}"
    return None
