"""Tables and a plot from a run's JSON."""

import json
import sys

import pytest
import torch

CPU = torch.device("cpu")
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
    report = load("harness.report")
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
def test_report_of_a_head(load, linear_case, tmp_path):
    contest, peers, report = load("harness.contest"), load("peers.linear"), load("harness.report")
    kept = {"fastpref_linear_step", "plain_head_step"}
    leave_out = dict.fromkeys(peers.STEP_PEERS.keys() - kept, "not here")
    record = contest.measured(linear_case("linear_preference"), CPU, {}, 0.0, leave_out=leave_out)
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
    load("harness.report").plot({"cases": [RECORD]}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
