"""A pytest plugin (-p harness.outcomes): a JSON line per test as it ends, so that a run that is cut short still tells.

The lines are appended to the file that FASTPREF_OUTCOMES names, after one that says how many tests there are. What is
marked `numerics` runs first. A worker of pytest-xdist whose GPU context an error has left unusable writes its line and
ends: every later test would fail in it, and xdist starts another.
"""

import json
import os

import pytest

from harness import machine


def pytest_configure(config):
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(_Worker(), "fastpref-worker")
    else:  # pytest-xdist's controller hears of its workers' tests too
        config.pluginmanager.register(Outcomes(), "fastpref-outcomes")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("numerics") is None)
    _append({"collected": len(items)})


class Outcomes:
    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            _write(report.nodeid, report.outcome, report)

    def pytest_collectreport(self, report):
        if report.outcome == "failed":
            _write(report.nodeid, "error", report)


class _Worker:
    def pytest_runtest_logreport(self, report):
        if report.outcome == "failed" and not machine.context_works():
            _write(report.nodeid, "failed", report)
            os._exit(3)


def _write(test, outcome, report):
    line = {"test": test, "outcome": outcome, "seconds": round(getattr(report, "duration", 0.0), 3)}
    if outcome == "skipped":
        line["reason"] = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    elif outcome != "passed":
        line["reason"] = report.longreprtext[-1500:]
    _append(line)


def _append(line: dict):
    with open(os.environ["FASTPREF_OUTCOMES"], "a") as file:
        file.write(json.dumps(line) + "\n")
