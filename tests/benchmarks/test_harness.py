"""Rounds, memory and truth that a number rests on, and the gate before it."""

from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CPU = torch.device("cpu")


@pytest.mark.filterwarnings("ignore")
def test_the_bare_product_is_read_before_every_run(load, linear_case):
    contest, peers = load("harness.contest"), load("peers.linear")
    case = linear_case("linear_logps")
    kept = {"fastpref_linear", "plain_head", "plain_head_counted"}
    made = contest.LinearContest(case, CPU, leave_out=dict.fromkeys(peers.LOGPS_PEERS.keys() - kept, "not here"))
    made.rounds.few = frozenset({"plain_head"})
    made.rounds.play(4)
    assert {name: len(samples) for name, samples in made.rounds.samples.items()} == {
        "fastpref_linear": 4,
        "plain_head": made.rounds.FEW,
        "plain_head_counted": 4,
    }
    assert all(len(made.rounds.unit_samples[name]) == len(made.rounds.samples[name]) for name in kept)
    record = made.record()
    assert record["unit_flop"] == 2 * 16 * 16 * 300  # half of the tokens count
    assert record["gradient_bytes"] == (32 + 300) * 16 * 4
    assert record["plan"]["kind"] == "recompute"
    assert record["competitors"]["gemm"]["rounds"] == 4 + 2 + 4
    assert record["competitors"]["plain_head"]["times_unit"] > 0


def test_truth_in_float64_is_autograds(load, monkeypatch):
    measure = load("harness.measure")
    hidden, weight = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (7, 11))
    labels = torch.tensor([3, -100, 0, 10, 5, -100, 5])
    grad = torch.randn(7, dtype=torch.float64)
    monkeypatch.setattr(measure.HeadTruth, "ROWS", 2)
    truth = measure.HeadTruth(hidden.detach(), weight.detach(), labels)
    truth.differentiate(grad, trained=True)
    kept = labels != -100
    logps = torch.log_softmax(hidden @ weight.t(), -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    logps = torch.where(kept, logps, 0.0)
    logps.backward(grad)
    torch.testing.assert_close(truth.logps, logps.detach())
    assert truth.hidden_errors(hidden.grad).max() < 1e-12
    assert truth.weight_error(weight.grad) < 1e-12
    assert truth.logps_errors(logps.detach() + 1).min() > 0.99


def test_rounds_restore_what_a_peer_overwrites(load):
    contest = load("harness.contest")
    case = contest.Case("token_logps", "step", 8, 50, "float32")
    made = contest.Contest(case, CPU, leave_out=dict.fromkeys(("compiled", "trl_selective"), "not here"))
    before = made.logits.values.clone()
    made.rounds.play(2)
    torch.testing.assert_close(made.logits.values, before, rtol=0, atol=0)
    record = made.record({"read_gbps": 10.0, "copy_gbps": 20.0})
    assert record["floor_bytes"] == 3 * 8 * 50 * 4
    assert "fastpref_inplace" in record["competitors"]
    assert record["absent"]["compiled"] == "not here"


def test_peak_memory_sees_an_allocation(load):
    measure = load("harness.measure")
    with measure.PeakMemory(CPU) as peak:
        torch.ones(64 << 20, dtype=torch.uint8)
    if peak.bytes is None:
        pytest.skip("this system does not tell a process its resident peak")
    assert 63 << 20 <= peak.bytes < 80 << 20  # the kernel counts pages per thread, in batches


def test_red_tests_are_refused(run, tmp_path):
    red = tmp_path / "test_red.py"
    red.write_text("def test_red():\n    assert 1 == 2\n")
    out = tmp_path / "results.json"
    done = run(
        "-m", "pytest", BENCHMARKS / "bench_token_logps.py", "-p", "no:cacheprovider", "--benchmark-json", out,
        FASTPREF_BENCH_EXTRA_TESTS=str(red),
    )  # fmt: skip
    assert done.returncode == 1
    assert "no benchmark is reported, because fastpref's own tests fail: test_red.py" in done.stdout + done.stderr
    assert not out.exists()


def test_the_gate_cannot_be_emptied(load, monkeypatch, tmp_path):
    verify = load("harness.verify")
    green = tmp_path / "test_green.py"
    green.write_text("def test_green():\n    pass\n")
    monkeypatch.setenv("FASTPREF_BENCH_EXTRA_TESTS", str(green))
    required = verify.required(["bench_token_logps"])
    assert [[path.name for path in gate.paths] for gate in required] == [["test_green.py"], ["test_token_logps.py"]]
    assert verify.red(required[:1]) is None
    nothing = verify.red([verify.Gate([green], "no_such_test")])
    assert "exit code 5" in nothing


def test_the_gate_finds_its_tests(load, run):
    verify = load("harness.verify")
    assert {path.stem for path in BENCHMARKS.glob("bench_*.py")} == set(verify.GATES)
    tests = [[*map(str, paths), "-k", keyword] for paths, keyword in verify.required(verify.GATES)]
    # one process for all: most of the time is its imports
    collect = f"""
import pytest
for test in {tests!r}:
    assert pytest.main([*test, "--collect-only", "-q", "-p", "no:cacheprovider"]) == 0, test
"""
    done = run("-c", collect)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
