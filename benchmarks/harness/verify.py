"""No number without a green test: the ops' numerics run first, on the same installed package."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests"

# of test_token_logps.py: values, gradients and overwritten memory, on the backends a CPU benchmark measures
NUMERICS = "matches_float64 or accuracy_goal or confident_tokens or ignored_rows or inplace_backward_is"
# of test_linear_logps.py, beside those of the same name: every plan, the products of 16-bit inputs
LINEAR_NUMERICS = f"{NUMERICS} or every_plan or bf16_log_probs or rounded_logits or products_agree or ignored_tokens"
_ON_CPU = "not triton and not interpreter and not cuda"
_LINEAR_LOGPS = ("test_linear_logps.py", f"({LINEAR_NUMERICS}) and {_ON_CPU}")
_OPS = {
    "bench_token_logps": [("test_token_logps.py", f"({NUMERICS}) and not triton and not cuda")],
    "bench_preference": [
        ("test_token_logps.py", f"({NUMERICS}) and not triton and not cuda and not softcap"),
        ("test_preference.py", "(everyone_writes or native_epilogue_is or ln_2 or inplace_backward) and not triton"),
    ],
    "bench_linear_logps": [_LINEAR_LOGPS],
    "bench_linear_preference": [
        _LINEAR_LOGPS,
        (
            "test_linear_preference.py",
            "(test_every_plan or every_form or test_precision or rounded_logits) and not cuda",
        ),
    ],
    "bench_bradley_terry": [("test_bradley_terry.py", "recovers or maximum_likelihood")],
    "bench_pairs": [("test_pairs.py", "")],
    "bench_rpca": [("test_rpca.py", "recovers or convex"), ("test_batched_rpca.py", "agrees")],
    "bench_svt": [("test_svt.py", "not cuda")],
    "bench_influence": [("test_influence.py", "torch_func or adapters or sgd or confirm")],
    "bench_margins": [("test_margins.py", "worked or published or search or top_k")],
    "bench_residual_pass": [
        ("test_residual_pass.py", "(matches_float64 or ranks or threads) and not triton and not cuda"),
    ],
}
ENVIRONMENT = {"FASTPREF_TEST_SEED": "0"}  # unless the caller sets it: two runs of a gate should agree
EXTRA = "FASTPREF_BENCH_EXTRA_TESTS"  # more test files that must pass, separated by os.pathsep; it cannot remove any


def required(benchmarks) -> list[tuple[Path, str]]:
    """(test file, -k expression) of what must pass before these benchmark modules may report."""
    extra = [(Path(path), "") for path in os.environ.get(EXTRA, "").split(os.pathsep) if path]
    chosen = {entry: None for name in benchmarks for entry in _OPS[name]}  # a dict keeps the order
    return extra + [(TESTS / file, keyword) for file, keyword in chosen]


def red(tests) -> str | None:
    """The end of the first failing run's output, or None when everything passed."""
    for path, keyword in tests:
        command = [sys.executable, "-m", "pytest", path, "-q", "-x", "-k", keyword, "-p", "no:cacheprovider"]
        # from here, not from the root, whose fastpref is the bare source tree
        done = subprocess.run(command, cwd=HERE, env=ENVIRONMENT | os.environ, capture_output=True, text=True)
        if done.returncode != 0:  # 5, nothing collected, is no proof either
            return f"{path.name}, exit code {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}"
    return None
