"""A pytest plugin (-p outcomes): one JSON line per test as it ends, so that a run that is cut short still tells."""

import json
import os


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        _write(report.nodeid, report.outcome, report)


def pytest_collectreport(report):
    if report.outcome == "failed":
        _write(report.nodeid, "error", report)


def _write(test, outcome, report):
    if "PYTEST_XDIST_WORKER" in os.environ:  # the controller hears of it too
        return
    line = {"test": test, "outcome": outcome, "seconds": round(getattr(report, "duration", 0.0), 3)}
    if outcome == "skipped":
        line["reason"] = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    elif outcome != "passed":
        line["reason"] = report.longreprtext[-1500:]
    with open(os.environ["FASTPREF_OUTCOMES"], "a") as file:
        file.write(json.dumps(line) + "\n")
