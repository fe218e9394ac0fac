"""Every peer computes the same thing: it agrees with float64, or is absent with a reason."""

import importlib.util
import warnings

import pytest
import torch

CPU = torch.device("cpu")
LINEAR_SUBJECTS = {"linear_logps": "fastpref_linear", "linear_preference": "fastpref_linear_step"}


def thinned(left_out, full):
    """Most of the time is Triton's interpreter; the other cases have each dtype, each table and each kind of head."""
    if left_out and not full:
        pytest.skip("with --full alone")


@pytest.mark.parametrize("op", ["token_logps", "preference"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peers_agree_with_float64(load, op, dtype, monkeypatch, full):
    thinned((op, dtype) in (("token_logps", "float32"), ("preference", "bfloat16")), full)
    contest, peers = load("harness.contest"), load("peers.token")
    monkeypatch.setattr(peers, "COMPILER", "aot_eager")
    case = contest.Case(
        op, "step", 24 if full else 8, 300, dtype, masked=0.5, loss="rdpo" if op == "preference" else ""
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers' warnings are theirs
        made = contest.Contest(case, CPU)
    assert made.checks.keys() >= {contest.SUBJECT[op], "eager" if op == "token_logps" else "eager_step"}
    table = peers.TOKEN_PEERS if op == "token_logps" else peers.PREFERENCE_PEERS
    assert made.checks.keys() | made.absent.keys() == table.keys()  # present, or absent with a reason
    assert all(made.absent.values())
    for name, check in made.checks.items():
        rounds_logps = dtype == "bfloat16" and not name.startswith(("fastpref", "one_pass", "eager_fp32"))
        assert check["error"] <= (0.2 if rounds_logps else 1e-5), name
        assert check["gradient_error"] <= (1e-5 if dtype == "float32" else 2e-2), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", ["ref_logits", "packed", "stats"])
def test_variants_of_a_step_agree_with_float64(load, variant):
    contest, peers = load("harness.contest"), load("peers.token")
    kept = {"fastpref_step", "fastpref_vectors", "eager_step", "one_pass_step"}
    leave_out = dict.fromkeys(peers.PREFERENCE_PEERS.keys() - kept, "not here")
    case = contest.Case("preference", "step", 16, 300, "float32", 0.5, loss="rdpo", variant=variant)
    made = contest.Contest(case, CPU, leave_out=leave_out)
    assert made.checks.keys() == kept
    for name, check in made.checks.items():
        assert check["error"] <= 1e-5 and check["gradient_error"] <= 1e-5, name


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("op", "dtype", "trained", "reference"),
    [
        ("linear_logps", "float32", False, ""),
        ("linear_logps", "bfloat16", True, ""),
        ("linear_preference", "float32", True, "scored"),
        ("linear_preference", "bfloat16", False, "given"),
    ],
)
def test_peers_agree_with_float64_from_hidden_states(load, linear_case, op, dtype, trained, reference, full):
    thinned((op, dtype) == ("linear_logps", "float32"), full)
    contest, peers = load("harness.contest"), load("peers.linear")
    made = contest.LinearContest(linear_case(op, dtype, trained, reference, tokens=32 if full else 16), CPU)
    table = peers.LOGPS_PEERS if op == "linear_logps" else peers.STEP_PEERS
    plain = "plain_head" if op == "linear_logps" else "plain_head_step"
    assert made.checks.keys() >= {LINEAR_SUBJECTS[op], plain}
    assert made.checks.keys() | made.absent.keys() == table.keys()  # present, or absent with a reason
    assert all(made.absent.values())
    if importlib.util.find_spec("trl"):  # as its trainer runs it, and of the tokens that count as on a GPU
        assert sum(name.startswith("trl_head") for name in made.checks) == 3
    for name, check in made.checks.items():
        exact = dtype == "float32" or (name.startswith("fastpref") and "rounded" not in name)
        assert check["error"] <= (1e-5 if exact else 0.2), name
        assert check["hidden_error"] <= (1e-5 if dtype == "float32" else 5e-2), name
        assert ("weight_error" in check) == trained
        assert not trained or check["weight_error"] <= (1e-5 if dtype == "float32" else 5e-2), name
