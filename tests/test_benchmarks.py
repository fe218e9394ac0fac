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
