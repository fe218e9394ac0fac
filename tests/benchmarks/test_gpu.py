"""The one GPU command, rehearsed on a CPU with the kernels on the simulator."""

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture
def simulator(request, tmp_path) -> Path:
    """Where tests/ptxsim builds the simulator too."""
    missing = [tool for tool in ("nvcc", "cmake", "g++") if shutil.which(tool) is None]
    if missing and os.environ.get("FASTPREF_EXPECT_NATIVE") == "1":
        pytest.fail(f"not on PATH: {missing}")
    if missing:
        pytest.skip(f"not on PATH: {missing}")
    pytest.importorskip("triton")
    cached = hasattr(request.config, "cache")
    return request.config.cache.mkdir("ptxsim") if cached else tmp_path / "ptxsim"


@pytest.fixture
def gpu(load, tmp_path):
    module = load("gpu")
    return module, module.Run(module._parser().parse_args(["--out", str(tmp_path)]), tmp_path / "scratch")


def rehearsed(run, simulator, out, *options) -> tuple[dict, str, str]:
    done = run(BENCHMARKS / "gpu.py", "--dry-run", "--installed", "--simulator", simulator, "--limit-s", "1500",
               "--out", out, *options, TRITON_INTERPRET="0")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*-dry-run.json")
    return json.loads(path.read_text()), path.with_suffix(".md").read_text(), done.stdout


@pytest.mark.slow
def test_rehearsal(run, simulator, tmp_path):
    results, text, printed = rehearsed(run, simulator, tmp_path, "--few")
    assert results["finished"] and results["dry_run"]
    assert {stage["status"] for stage in results["stages"].values()} == {"done", "left out"}
    assert list(results["stages"]) == [
        "describe", "build", "simulator", "contact", "measure", "low_rank", "tests", "sanitizer",
    ]  # fmt: skip
    assert results["build_info"]["native"]
    assert len(results["contact"]) == 13
    assert all(said["ok"] for said in results["contact"].values())
    assert {said["backend"] for said in results["contact"].values()} == {"native", "triton"}
    assert {case["op"] for case in results["cases"]} == {
        "preference", "token_logps", "linear_preference", "residual_pass", "bradley_terry", "svt",
    }  # fmt: skip
    for case in results["cases"]:
        if "problem" not in case:
            assert any("native" in name for name in case["competitors"])
            assert any("triton" in name for name in case["competitors"])
    assert results["tests"]["failures"] == [] and results["tests"]["not_run"] == 0
    assert results["tests"]["passed"]["token_logps"]["native"]
    assert "nothing in this file was measured on a GPU" in text
    assert "## First contact: 13 of 13 kernel variants agree with float64" in text
    assert "QuACK" in text
    table = printed[printed.index("wrote ") :].splitlines()[1:]
    assert 10 < len(table) <= 40
    assert "no time means anything" in table[0]


@pytest.mark.slow
@pytest.mark.full
def test_every_item_rehearsed(run, simulator, tmp_path):
    results, _, printed = rehearsed(run, simulator, tmp_path)
    assert len(results["contact"]) > 100
    assert all(said["ok"] for said in results["contact"].values()), printed
    assert len(results["cases"]) == 16 + 17
    assert len(printed[printed.index("wrote ") :].splitlines()) <= 41


def test_gpu_without_a_gpu(run, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run(BENCHMARKS / "gpu.py", "--out", tmp_path)
    assert done.returncode == 2
    assert "no GPU is visible to torch; --dry-run" in done.stderr


# ---- processes ----


def test_a_stage_that_hangs_is_cut_short_and_kept(load, tmp_path):
    children = load("harness.children")
    code = "print('a line', flush=True); import time; time.sleep(60)"
    ended = children.call([sys.executable, "-c", code], dict(os.environ), 2, tmp_path)
    assert ended.status == "out of time"
    assert ended.output == "a line\n"
    failed = children.call([sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ), 20, tmp_path)
    assert failed.status == "failed, exit code 3"


WORKER = """
import json, os, sys, time
def say(**line): print(json.dumps(line), flush=True)
names = [n for n in ("a", "dies", "b", "hangs", "c", "last") if n not in sys.argv]
say(names=names)
for name in names:
    say(begin=name, cap_s=1)
    if name == "dies":
        sys.exit("context lost")
    if name == "hangs":
        time.sleep(60)
    say(end=name, result={"pid": os.getpid()})
    if name == "b":
        sys.exit(3)
"""


def test_an_item_that_takes_its_process_down_costs_no_other(load, tmp_path):
    children, results = load("harness.children"), {}
    command, deadline = [sys.executable, "-c", WORKER], time.monotonic() + 40
    status = children.work(command, dict(os.environ), deadline, tmp_path, results.__setitem__)
    assert status == "done"
    assert results["dies"] == {"failed": "failed, exit code 1: context lost"}
    assert results["hangs"] == {"failed": "took longer than its 1 s"}
    assert len({results[name]["pid"] for name in ("a", "b", "c")}) == 3
    assert results["c"] == results["last"]


def test_a_worker_that_cannot_start_ends_the_stage(load, tmp_path):
    children, results = load("harness.children"), {}
    command, environment = [sys.executable, "-c", "import nothing_of_this_name"], dict(os.environ)
    status = children.work(command, environment, time.monotonic() + 20, tmp_path, results.__setitem__)
    assert status.startswith("failed: failed, exit code 1") and "nothing_of_this_name" in status
    assert not results
    late = children.work([sys.executable, "-c", WORKER], environment, time.monotonic() + 0.5, tmp_path, print)
    assert late == "done"  # no process was begun, and nothing is known to be missing


BREAKS = """
import torch

def test_a_breaks_the_context(monkeypatch):
    def dead():
        raise RuntimeError("an illegal memory access was encountered")
    torch.cuda.is_initialized = lambda: True
    torch.cuda.synchronize = dead
    dead()

def test_b_is_run_by_another_worker():
    assert not torch.cuda.is_initialized()
"""


def test_a_broken_context_ends_its_worker_and_not_the_tests(run, load, gpu, tmp_path):
    pytest.importorskip("xdist")
    module, _ = gpu
    (tmp_path / "test_breaks.py").write_text(BREAKS)
    outcomes = tmp_path / "outcomes.jsonl"
    command = [*module.pytest_command([tmp_path / "test_breaks.py"], "")[1:], "-p", "harness.outcomes", "-n", "1"]
    done = run(*command, PYTHONPATH=f"{BENCHMARKS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
               FASTPREF_OUTCOMES=str(outcomes))  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    tests = module._tally(outcomes)
    assert tests["by_backend"]["other"] == {"passed": 1, "failed": 1, "skipped": 0}
    assert "an illegal memory access was encountered" in tests["failures"][0]["reason"]
    assert (tests["collected"], tests["not_run"]) == (2, 0)


def test_the_gpu_is_busy_while_a_run_is_enqueued(load, monkeypatch):
    """The start mark comes after a sleep on the device, and the sleep after the caches are overwritten."""
    measure, cases, calls = load("harness.measure"), load("harness.gpu_measure"), []

    class Memory:
        def zero_(self):
            calls.append("flush")

    on_gpu = SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.cuda, "_sleep", calls.append)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: Memory())
    cases.flusher(on_gpu)()
    assert calls == ["flush", measure.SLEEP_CYCLES]
    monkeypatch.setattr(measure, "new_marks", lambda device: lambda: calls.append("mark"))
    subject = measure.FunctionCompetitor("one", "one", lambda: calls.append("run"))
    rounds = measure.Rounds([subject], on_gpu, "one", cases.flusher(on_gpu))
    rounds.play_others()
    rounds.play_subject()
    assert calls[2:] == ["flush", measure.SLEEP_CYCLES, "mark", "run", "mark"]


# ---- which rows are proved ----


def test_red_numerics_mark_a_row_and_stop_nothing(load, gpu, tmp_path):
    module, run = gpu
    table, outcomes = load("harness.gpu_table"), tmp_path / "outcomes.jsonl"
    passed = [
        "tests/logps/test_token_logps.py::test_x[native-cuda-odd]",
        "tests/logps/test_token_logps.py::test_x[triton-cuda-odd]",
        "tests/logps/test_preference.py::test_cuda_is_cpu[rdpo-False]",
        "tests/lowrank/test_on_a_gpu.py::test_svt_is_the_cpus",
    ]
    red = "tests/logps/test_token_logps.py::test_x[native-cuda-deep]"
    lines = [{"collected": 7}, *({"test": test, "outcome": "passed"} for test in passed)]
    lines += [{"test": red, "outcome": "failed", "reason": "off by 1"}, {"test": red, "outcome": "passed"}]
    lines += [{"test": "tests/logps/test_token_logps.py::test_y", "outcome": "skipped", "reason": "no GPU"}]
    outcomes.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.results["tests"] = tests = module._tally(outcomes)
    assert tests["by_backend"]["native-cuda"] == {"passed": 1, "failed": 1, "skipped": 0}
    assert (tests["collected"], tests["not_run"]) == (7, 1)
    for op in ("token_logps", "preference", "linear_logps"):
        for backend in table.BACKENDS:
            run.results["contact"][f"{op}-{backend}"] = {"op": op, "backend": backend, "ok": True}
    run.results["contact"]["preference-triton"]["ok"] = False
    reasons = {
        (op, backend): table.unproven(run.results, op, backend)
        for op, backend in [(op, b) for op in ("token_logps", "preference", "linear_logps") for b in table.BACKENDS]
        + [("residual_pass", "triton"), ("svt", None), ("rpca", None)]
    }
    assert reasons == {
        ("token_logps", "native"): "1 of its tests failed, test_token_logps.py::test_x[native-cuda-deep]",
        ("token_logps", "triton"): None,
        ("preference", "native"): None,
        ("preference", "triton"): "first contact: 1 of 1 not ok, preference-triton",
        ("linear_logps", "native"): "none of its tests has passed in this run",
        ("linear_logps", "triton"): "none of its tests has passed in this run",
        ("residual_pass", "triton"): "no first contact",
        ("svt", None): None,
        ("rpca", None): "none of its tests has passed in this run",
    }
    run.results["not_run"] = {f"item {i}": "out of time" for i in range(60)}
    short = table.short(run.results)
    assert len(short) == table.LINES
    assert "not ok: preference-triton" in short[2] and "1 failed, 1 skipped; 1 did not run" in short[3]
    assert short[-1].startswith("26 more")


# ---- no test is left out ----


def collected(run, module, paths, markers) -> set[str]:
    command = [*module.pytest_command(paths, markers)[1:], "--collect-only", "-n0"]
    done = run(*command)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return set(re.findall(r"^\S+::.*$", done.stdout, re.MULTILINE))


def test_no_cuda_test_lies_outside_the_folders_of_the_stage(request, gpu):
    """Of all tests that this session has collected: in a run of the whole suite, of all there are."""
    module, _ = gpu
    folders = [TESTS / folder for folder in module.CUDA_TESTS]
    marked = [item.path for item in request.session.items if item.get_closest_marker("cuda")]
    assert all(any(folder in path.parents for folder in folders) for path in marked)


def test_the_stage_of_tests_takes_all_that_are_marked_cuda(run, gpu, full):
    """Other ops' numerics are not the first file's: with --full all folders are collected, else a file of each."""
    module, _ = gpu
    folders = [TESTS / folder for folder in module.CUDA_TESTS]
    if full:
        assert collected(run, module, folders, "cuda") == collected(run, module, [TESTS], "cuda")
    else:
        folders = [TESTS / "logps" / "test_token_logps.py", TESTS / "lowrank" / "test_residual_pass.py"]
    found = collected(run, module, folders, "cuda")
    assert sum("test_residual_pass.py::test_matches_float64[" in test for test in found) == 200
    assert sum("test_token_logps.py::test_matches_float64[" in test for test in found) == 168


def test_results_name_no_paths(gpu, tmp_path):
    module, run = gpu
    log = f"{tmp_path}/scratch/site/x.py\nLooking in /opt/wheels, https://docs.org/a/b\n{module.ROOT}/tests/test_x.py:3"
    scrubbed = run.scrubbed({"stages": [{"log_tail": log, "seconds": 1.5}]})
    assert scrubbed["stages"][0]["log_tail"] == (
        "<scratch>/site/x.py\nLooking in .../wheels, https://docs.org/a/b\n./tests/test_x.py:3"
    )
    assert scrubbed["stages"][0]["seconds"] == 1.5


def test_the_commit_of_a_copy_is_what_the_environment_says(load, monkeypatch, tmp_path):
    machine = load("harness.machine")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit() == "unknown: not a git checkout"
    monkeypatch.setenv("FASTPREF_COMMIT", "abc123")
    assert machine.commit() == "abc123"
