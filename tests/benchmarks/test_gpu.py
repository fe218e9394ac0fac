"""The one GPU command, rehearsed on a CPU."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.slow
def test_gpu_rehearsal(run, tmp_path):
    done = run(BENCHMARKS / "gpu.py", "--dry-run", "--installed", "--limit-s", "1500", "--out", tmp_path)
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


def test_gpu_without_a_gpu(run, tmp_path):
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
        {"test": "test_token_logps.py::test_x[native-cuda-odd]", "outcome": "passed"},
        {
            "test": "test_token_logps.py::test_x[native-cuda-deep]",
            "outcome": "failed",
            "reason": "off by 1",
        },
        {"test": "test_token_logps.py::test_x[triton-cuda-odd]", "outcome": "passed"},
        {"test": "test_token_logps.py::test_y", "outcome": "skipped", "reason": "no GPU"},
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
