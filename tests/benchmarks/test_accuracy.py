"""The table of errors against float64."""

import json

import pytest


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
