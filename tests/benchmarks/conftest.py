"""The benchmarks as modules and as commands, from outside the checkout's root."""

import importlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def full(request):
    """Whether --full asks for what is left out otherwise."""
    return request.config.getoption("full", False)


@pytest.fixture
def load(monkeypatch):
    """Imports a module of the benchmarks by its name there, "harness.contest"."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def run():
    """Runs Python with a command line, and waits for its end."""
    # pytest-benchmark refuses to measure where these say that it is one of several workers: the process is not
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST_")}

    def run(*command, **environment):
        return subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=BENCHMARKS,  # not the root, whose fastpref is the bare source tree
            env=own | environment,
            capture_output=True,
            text=True,
            timeout=1500,
        )

    return run


@pytest.fixture
def linear_case(load):
    """A small case from hidden states and LM head."""
    contest = load("harness.contest")

    def made(op, dtype="float32", trained=True, reference="given", **more):
        size = {"tokens": 32, "hidden_size": 16, "vocab": 300, "masked": 0.5}
        step = {"loss": "sigmoid", "reference": reference} if op == "linear_preference" else {}
        return contest.LinearCase(op, "step", dtype=dtype, trained=trained, **(size | step | more))

    return made


@pytest.fixture
def uncompiled():
    """The peers that compile themselves run as they are written: seconds less for each."""
    warnings.simplefilter("ignore")  # the peers' warnings are theirs
    with torch.compiler.set_stance("force_eager"):
        yield
