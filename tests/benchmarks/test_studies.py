"""Studies: their tables at small sizes, and that every command runs by its path."""

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
COMMANDS = (
    "gpu.py",
    "harness/worker.py",
    "harness/report.py",
    "studies/accuracy.py",
    "studies/files.py",
    "studies/recovery.py",
    "studies/recipes/run.py",
    "studies/recipes/shrinkage.py",
)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore")
def test_accuracy_table(load, capsys, tmp_path):
    accuracy = load("studies.accuracy")
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


def test_recovery_table(load, capsys, tmp_path, monkeypatch):
    recovery = load("studies.recovery")
    monkeypatch.setattr(recovery, "N", 60)
    monkeypatch.setattr(recovery, "CASES", {name: recovery.CASES[name] for name in ("5 % corrupted", "30 %")})
    assert recovery.main(["--seeds", "2", "--rank-free-seeds", "1", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    (path,) = tmp_path.glob("*-recovery.json")
    assert path.with_suffix(".md").read_text() == text
    records = json.loads(path.read_text())["records"]
    assert [(r["case"], r["rank"], r["seeds"]) for r in records] == [
        ("5 % corrupted", 5, 2),
        ("30 %", 5, 2),
        ("5 % corrupted", None, 1),
        ("30 %", None, 1),
    ]
    assert records[0]["within_1e-6"] == 1
    assert "| 5 % corrupted | given | 2 | 100 % |" in text


def test_commands_run_by_their_paths(run, tmp_path):
    """Each with its own folder on the path in place of the benchmarks', as Python has it, and without their modules."""
    as_commands = f"""
import runpy, sys
path = [p for p in sys.path if p]
for command in {[str(BENCHMARKS / command) for command in COMMANDS]!r}:
    sys.argv, sys.path = [command, "--help"], [command.rpartition("/")[0], *path]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("harness", "peers", "studies")]:
        del sys.modules[name]
    try:
        runpy.run_path(command, run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, command
"""
    done = run("-c", as_commands)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("usage: ") == len(COMMANDS)


def test_pairs_from_a_large_file(run, full, tmp_path):
    if not full:
        pytest.skip("--full: two processes for one table")
    done = run(BENCHMARKS / "studies" / "files.py", "--gigabytes", "0.001", "--workers", "1", "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "files.json").read_text())["record"]
    assert record["responses"] == 16 * 62
    assert record["pairs"] == 62
