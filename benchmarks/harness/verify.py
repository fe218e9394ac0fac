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
    keyword: str  # -k


# of token_logps: values, gradients and overwritten memory, on the backends a CPU benchmark measures
NUMERICS = "matches_float64 or accuracy_goal or confident_tokens or ignored_rows or inplace_backward_is"
# of linear_logps, beside those of the same name: every plan, the products of 16-bit inputs
LINEAR_NUMERICS = f"{NUMERICS} or every_plan or bf16_log_probs or rounded_logits or products_agree or ignored_tokens"
_ON_CPU = "not triton and not interpreter and not cuda"
_LINEAR_LOGPS = ("logps/linear_logps", f"({LINEAR_NUMERICS}) and {_ON_CPU}")
# benchmark -> [(op, -k expression)]; all files of the op's tests are collected, see tests_of
GATES = {
    "bench_token_logps": [("logps/token_logps", f"({NUMERICS}) and not triton and not cuda")],
    "bench_preference": [
        ("logps/token_logps", f"({NUMERICS}) and not triton and not cuda and not softcap"),
        ("logps/preference", "(everyone_writes or native_epilogue_is or ln_2 or inplace_backward) and not triton"),
    ],
    "bench_linear_logps": [_LINEAR_LOGPS],
    "bench_linear_preference": [
        _LINEAR_LOGPS,
        (
            "logps/linear_preference",
            "(test_every_plan or every_form or test_precision or rounded_logits) and not cuda",
        ),
    ],
    "bench_bradley_terry": [("lowrank/bradley_terry", "recovers or maximum_likelihood")],
    "bench_rpca": [("lowrank/rpca", "recovers"), ("lowrank/ialm", "convex"), ("lowrank/batched_rpca", "agrees")],
    "bench_svt": [("lowrank/svt", "not cuda")],
    "bench_residual_pass": [
        ("lowrank/residual_pass", "(matches_float64 or ranks or threads) and not triton and not cuda"),
    ],
    "bench_pairs": [("curate/pairs", "")],
    "bench_influence": [("curate/influence", "torch_func or adapters or sgd or confirm")],
    "bench_margins": [("curate/margins", "worked or published or search or top_k")],
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
    return extra + [Gate(tests_of(op), keyword) for op, keyword in chosen]


def red(gates) -> str | None:
    """The end of the first failing run's output, or None when everything passed."""
    for paths, keyword in gates:
        command = [sys.executable, "-m", "pytest", *paths, "-q", "-x", "-k", keyword, "-p", "no:cacheprovider"]
        # from here, not from the root, whose fastpref is the bare source tree
        done = subprocess.run(command, cwd=HERE, env=ENVIRONMENT | os.environ, capture_output=True, text=True)
        if done.returncode != 0:  # 5, nothing collected, is no proof either
            names = ", ".join(path.name for path in paths)
            return f"{names}, exit code {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}"
    return None
