"""Rounds, memory and truth that a number rests on, and the gate before it."""

import ast
import re
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
    nothing = verify.red([verify.Gate([green], "numerics")])
    assert "exit code 5" in nothing


def test_the_gate_finds_its_tests(load, run, full):
    verify = load("harness.verify")
    assert {path.stem for path in BENCHMARKS.glob("bench_*.py")} == set(verify.GATES)
    gates = verify.required(verify.GATES)
    for paths, markers in gates:
        assert re.match(r"numerics\b", markers)
        assert "pytest.mark.numerics" in "".join(path.read_text() for path in paths), paths
    if not full:
        return
    tests = [[*map(str, paths), "-m", markers] for paths, markers in gates]
    # one process for all: most of the time is its imports
    collect = f"""
import pytest
for test in {tests!r}:
    assert pytest.main([*test, "--collect-only", "-q", "-p", "no:cacheprovider"]) == 0, test
"""
    done = run("-c", collect)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]


def test_what_benchmarks_import_is_there(load, run, full):
    """From fastpref and from each other; with --full every benchmark is collected, its peers' packages included."""
    own = ("fastpref", "harness", "peers", "studies", "bench_token_logps", "bench_linear_logps")
    for path in BENCHMARKS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in own:
                module = load(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name) or load(f"{node.module}.{alias.name}"), path
    if not full:
        return
    benchmarks = sorted(BENCHMARKS.glob("bench_*.py"))
    done = run("-m", "pytest", *benchmarks, "--collect-only", "-qq", "-p", "no:cacheprovider")
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    assert all(f"{path.name}: " in done.stdout for path in benchmarks)


def test_a_missing_op_has_no_gate(load):
    with pytest.raises(FileNotFoundError, match=r"there is no tests/logps/test_nothing\.py"):
        load("harness.verify").tests_of("logps/nothing")


@pytest.mark.parametrize("case", ["entries", "missing", "conditioned", "noisy"])
def test_corrupted_matrices(load, case):
    options = {
        "entries": {},
        "missing": {"observed": 0.25},
        "conditioned": {"condition": 20.0},
        "noisy": {"noise": 0.5},
    }[case]
    low, data = load("harness.problem").corrupted(60, 40, 3, 0.2, dtype=torch.float64, size=5.0, **options)
    singular = torch.linalg.svdvals(low)
    assert singular[2] > 1e-10 * singular[0] > singular[3]
    seen = ~data.isnan()
    assert seen.double().mean().item() == pytest.approx(options.get("observed", 1.0), abs=0.05)
    error = (data - low)[seen].abs() / low.abs().mean()
    if case == "noisy":
        assert 0.5 < error.square().mean().sqrt() < 2
    else:
        assert (error > 0).double().mean().item() == pytest.approx(0.2, abs=0.05)
        assert 4 < error.max() <= 5
    if case == "conditioned":
        assert singular[0] / singular[2] == pytest.approx(20, rel=1e-6)


def test_corrupted_scores(load):
    w, low, data = load("harness.problem").corrupted_scores(50, 0.2, dtype=torch.float64)
    torch.testing.assert_close(low, w[:, None] - w)
    torch.testing.assert_close(data, -data.t())
    assert (data != low).double().mean().item() == pytest.approx(0.2, abs=0.05)
