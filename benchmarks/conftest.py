"""The gate before the benchmarks, the facts beside them, and --full."""

import contextlib
import sys
import warnings
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness import machine, verify


def pytest_addoption(parser):
    with contextlib.suppress(ValueError):  # tests/ has it too, in a run of both
        parser.addoption("--full", action="store_true", help="longer batches, every vocabulary, larger heads: hours")


def pytest_generate_tests(metafunc):
    """`case` is each of the module's DEFAULT, with --full each of its FULL."""
    if "case" in metafunc.fixturenames:
        cases = metafunc.module.FULL if metafunc.config.getoption("full") else metafunc.module.DEFAULT
        metafunc.parametrize("case", cases, ids=str)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    if session.config.option.collectonly:
        return
    # pytest-benchmark's warning at the end of a failed run would, as an error, bury why it failed
    warnings.filterwarnings("ignore", message="Not saving anything")
    names = dict.fromkeys(item.path.stem for item in session.items if item.path.stem in verify.GATES)
    if not names:
        return
    if failure := verify.red(verify.required(names)):
        pytest.exit(f"no benchmark is reported, because fastpref's own tests fail: {failure}", returncode=1)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()  # it holds the host's name
    machine_info.update(machine.facts())


def pytest_benchmark_update_commit_info(config, commit_info):
    for key in set(commit_info) - {"id", "time", "dirty"}:
        del commit_info[key]
