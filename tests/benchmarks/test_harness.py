"""The benchmarks' own machinery: peers that compute the same thing, a gate that holds, a GPU run rehearsed on a CPU."""

import importlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def run(*command, **environment):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=BENCHMARKS,  # not the root, whose fastpref is the bare source tree
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("op", ["token_logps", "preference"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peers_agree_with_float64(load, op, dtype, monkeypatch):
    contest, peers = load("contest"), load("peers")
    monkeypatch.setattr(peers, "COMPILER", "aot_eager")
    case = contest.Case(op, "step", 24, 300, dtype, masked=0.5, loss="rdpo" if op == "preference" else "")
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


LINEAR = {"tokens": 32, "hidden_size": 16, "vocab": 300, "masked": 0.5}
LINEAR_SUBJECTS = {"linear_logps": "fastpref_linear", "linear_preference": "fastpref_linear_step"}


def linear_case(contest, op, dtype="float32", trained=True, reference="given", **more):
    step = {"loss": "sigmoid", "reference": reference} if op == "linear_preference" else {}
    return contest.LinearCase(op, "step", dtype=dtype, trained=trained, **(LINEAR | step | more))


@pytest.fixture
def uncompiled():
    """The peers that compile themselves run as they are written: seconds less for each."""
    warnings.simplefilter("ignore")  # the peers' warnings are theirs
    with torch.compiler.set_stance("force_eager"):
        yield


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
def test_peers_agree_with_float64_from_hidden_states(load, op, dtype, trained, reference):
    contest, peers = load("contest"), load("linear_peers")
    made = contest.LinearContest(linear_case(contest, op, dtype, trained, reference), CPU)
    table = peers.LOGPS_PEERS if op == "linear_logps" else peers.STEP_PEERS
    plain = "plain_head" if op == "linear_logps" else "plain_head_step"
    assert made.checks.keys() >= {LINEAR_SUBJECTS[op], plain}
    assert made.checks.keys() | made.absent.keys() == table.keys()  # present, or absent with a reason
    assert all(made.absent.values())
    for name, check in made.checks.items():
        exact = dtype == "float32" or (name.startswith("fastpref") and "rounded" not in name)
        assert check["error"] <= (1e-5 if exact else 0.2), name
        assert check["hidden_error"] <= (1e-5 if dtype == "float32" else 5e-2), name
        assert ("weight_error" in check) == trained
        assert not trained or check["weight_error"] <= (1e-5 if dtype == "float32" else 5e-2), name


@pytest.mark.filterwarnings("ignore")
def test_the_bare_product_is_read_before_every_run(load):
    contest, peers = load("contest"), load("linear_peers")
    case = linear_case(contest, "linear_logps")
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


def test_truth_in_float64_is_autograds(load):
    measure = load("measure")
    hidden, weight = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (7, 11))
    labels = torch.tensor([3, -100, 0, 10, 5, -100, 5])
    grad = torch.randn(7, dtype=torch.float64)
    measure.HeadTruth.ROWS = 2
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


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore")
def test_accuracy_table(load, capsys, tmp_path):
    accuracy = load("accuracy")
    shape = ["--vocab", "300", "--lengths", "8", "32", "--hidden-size", "64"]
    assert accuracy.main([*shape, "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "| V=300, L=8 | V=300, L=32 |" in text
    (path,) = tmp_path.glob("*-accuracy.json")
    results = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == text
    errors = {(e["dtype"], e["what"], e["at"]): e["error"] for e in results["errors"] if e["peer"] == "fastpref"}
    for dtype in ("float32", "bfloat16"):
        assert errors[dtype, "logps max", None] < 2e-5
        assert errors[dtype, "margin", "L=32"] < 5e-4
        assert errors[dtype, "sure", "p=0.9999"] < 1e-4
        assert errors[dtype, "token", "p=0.9999"] < (1e-4 if dtype == "float32" else 1e-2)
        assert errors[dtype, "step", "head"] < (1e-4 if dtype == "float32" else 1e-2)
    with pytest.raises(SystemExit):
        accuracy.main(["--lengths", "3", "32"])
    assert "--lengths must divide the longest, 32" in capsys.readouterr().err


def test_rounds_restore_what_a_peer_overwrites(load):
    contest = load("contest")
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
    measure = load("measure")
    with measure.PeakMemory(CPU) as peak:
        torch.ones(64 << 20, dtype=torch.uint8)
    if peak.bytes is None:
        pytest.skip("this system does not tell a process its resident peak")
    assert 63 << 20 <= peak.bytes < 80 << 20  # the kernel counts pages per thread, in batches


def test_red_tests_are_refused(tmp_path):
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
    verify = load("verify")
    green = tmp_path / "test_green.py"
    green.write_text("def test_green():\n    pass\n")
    monkeypatch.setenv("FASTPREF_BENCH_EXTRA_TESTS", str(green))
    required = verify.required(["bench_token_logps"])
    assert [path.name for path, _ in required] == ["test_green.py", "test_token_logps.py"]
    assert verify.red(required[:1]) is None
    nothing = verify.red([(green, "no_such_test")])
    assert "exit code 5" in nothing


def test_the_gate_finds_its_tests(load):
    verify = load("verify")
    assert {path.stem for path in BENCHMARKS.glob("bench_*.py")} == set(verify._OPS)
    tests = [[str(path), "-k", keyword] for path, keyword in verify.required(verify._OPS)]
    # one process for all: most of the time is its imports
    collect = f"""
import pytest
for test in {tests!r}:
    assert pytest.main([*test, "--collect-only", "-q", "-p", "no:cacheprovider"]) == 0, test
"""
    done = run("-c", collect)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]


RECORD = {
    "op": "token_logps", "mode": "step", "tokens": 8, "vocab": 50, "dtype": "float32", "masked": 0.5, "loss": "",
    "name": "step-8x50", "rounds": 5, "gradient_bytes": 1600, "bandwidth_kind": "copy",
    "absent": {"liger": "runs on GPUs only", "trl_kernel": "runs on GPUs only"},
    "competitors": {
        name: {
            "title": title, "median_ms": 2.0, "min_ms": 1.0, "max_ms": 4.0, "times_subject": 1.0,
            "speedup_over_plain": 3.25, "gbps": 12.0, "bandwidth_share": 0.5, "peak_bytes": None, "error": 1e-6,
            "gradient_error": 1e-7,
        }
        for name, title in {"fastpref_default": "fastpref", "eager": "log_softmax + gather"}.items()
    },
}  # fmt: skip


def test_report(load, tmp_path, capsys, monkeypatch):
    report = load("report")
    raw = {
        "machine_info": {"date": "2026-01-02T00:00:00Z", "cpu": "a CPU", "versions": {"torch": "2.13"}},
        "benchmarks": [{"extra_info": RECORD | {"bandwidth": {"copy_gbps": 24.0}}}, {"extra_info": {}}],
    }
    path = tmp_path / "small.json"
    path.write_text(json.dumps(raw))
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # not installed
    assert report.main([str(path)]) == 0
    text = path.with_suffix(".md").read_text()
    assert "# Benchmarks, 2026-01-02, a CPU" in text
    assert "| log_softmax + gather | 2 | 1–4 | 3.25× | 12 | 50 % | ? | 1.0e-06 | 1.0e-07 |" in text
    assert "Absent: liger, trl_kernel: runs on GPUs only." in text
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not path.with_suffix(".png").exists()


@pytest.mark.filterwarnings("ignore")
def test_report_of_a_head(load, tmp_path):
    contest, peers, report = load("contest"), load("linear_peers"), load("report")
    kept = {"fastpref_linear_step", "plain_head_step"}
    leave_out = dict.fromkeys(peers.STEP_PEERS.keys() - kept, "not here")
    record = contest.measured(linear_case(contest, "linear_preference"), CPU, {}, 0.0, leave_out=leave_out)
    record = json.loads(json.dumps(record))
    raw = {"machine_info": {"cpu": "a CPU"}, "benchmarks": [{"extra_info": record}]}
    text = report.markdown(report.load(raw))
    assert (
        "## linear_preference, forward and backward, T=32, H=16, V=300, float32, trained head, 50 % ignored, sigmoid, "
        "reference given" in text
    )
    assert "| bare GEMM (U) | 1.00 |" in text
    assert "\n| fastpref | " in text
    assert "fastpref's plan: pair_resident, 3.0 GEMM passes, float32" in text
    assert "gradients 0.0 MiB" in text
    assert "GB/s counts" not in text  # the legend of the benchmarks from logits


def test_report_draws(load, tmp_path):
    pytest.importorskip("matplotlib")
    load("report").plot({"cases": [RECORD]}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.slow
def test_gpu_rehearsal(tmp_path):
    done = run(BENCHMARKS / "gpu.py", "--dry-run", "--installed", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*-dry-run.json")
    results = json.loads(path.read_text())
    assert results["finished"]
    assert results["dry_run"]
    assert {stage["status"] for stage in results["stages"].values()} == {"done", "left out"}
    assert results["refused"] == {}
    assert results["build_info"]["native"]
    assert [case["name"] for case in results["cases"]] == [
        "step-8x300-bfloat16-masked50",
        "forward-8x300-bfloat16-masked50",
        "rdpo-step-8x300-bfloat16-masked50",
        "rdpo-step-32x64-float32-masked50",
        "sigmoid-step-16x24x300-bfloat16-trained-masked50-reference_given",
        "sigmoid-step-16x24x300-bfloat16-frozen-masked50-reference_given",
        "step-16x24x300-bfloat16-trained-masked50",
        "step-16x24x300-bfloat16-frozen-masked50",
    ]
    for case in results["cases"]:
        assert any("native" in name for name in case["competitors"])
        assert any("triton" in name for name in case["competitors"])
    assert {"native-cpu", "triton-cpu"} <= results["tests"]["by_backend"].keys()
    assert results["tests"]["failures"] == []
    text = path.with_suffix(".md").read_text()
    assert "nothing in this file was measured on a GPU" in text
    assert text.count("\n## token_logps") == 2
    assert text.count("\n## preference") == 2
    assert text.count("\n## linear_preference") == 2
    assert text.count("\n## linear_logps") == 2


def test_gpu_without_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run(BENCHMARKS / "gpu.py", "--out", tmp_path)
    assert done.returncode == 2
    assert "no GPU is visible to torch; --dry-run" in done.stderr


def test_a_stage_that_hangs_is_cut_short_and_kept(load, tmp_path):
    gpu = load("gpu")
    seen = []
    code = "import time; print('{\"case\": 1}', flush=True); time.sleep(60)"
    ended = gpu._call([sys.executable, "-c", code], dict(os.environ), 2, tmp_path, seen.append)
    assert ended.status == "out of time"
    assert ended.output == seen[-1] == '{"case": 1}\n'
    failed = gpu._call([sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ), 20, tmp_path, seen.append)
    assert failed.status == "failed, exit code 3"


def test_red_backends_are_refused(load, tmp_path):
    gpu = load("gpu")
    outcomes = tmp_path / "outcomes.jsonl"
    lines = [
        {"test": "tests/test_token_logps.py::test_x[native-cuda-odd]", "outcome": "passed"},
        {"test": "tests/test_token_logps.py::test_x[native-cuda-deep]", "outcome": "failed", "reason": "off by 1"},
        {"test": "tests/test_token_logps.py::test_x[triton-cuda-odd]", "outcome": "passed"},
        {"test": "tests/test_token_logps.py::test_y", "outcome": "skipped", "reason": "no GPU"},
    ]
    outcomes.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tally = gpu._tally(outcomes)
    assert tally["by_backend"]["native-cuda"] == {"passed": 1, "failed": 1, "skipped": 0}
    run = gpu.Run(gpu._parser().parse_args(["--out", str(tmp_path)]), tmp_path)
    run.pytest = lambda *_: run.results.update(tests=tally) or "failed, exit code 1"
    run.numerics()
    assert list(run.results["refused"]) == ["native"]


def test_results_name_no_paths(load, tmp_path):
    gpu = load("gpu")
    run = gpu.Run(gpu._parser().parse_args(["--out", str(tmp_path)]), tmp_path / "scratch")
    log = f"{tmp_path}/scratch/site/x.py\nLooking in /opt/wheels, https://docs.org/a/b\n{gpu.ROOT}/tests/test_x.py:3"
    scrubbed = run.scrubbed({"stages": [{"log_tail": log, "seconds": 1.5}]})
    assert scrubbed["stages"][0]["log_tail"] == (
        "<scratch>/site/x.py\nLooking in .../wheels, https://docs.org/a/b\n./tests/test_x.py:3"
    )
    assert scrubbed["stages"][0]["seconds"] == 1.5
