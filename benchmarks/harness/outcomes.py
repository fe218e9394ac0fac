"""A pytest plugin (-p harness.outcomes): a JSON line per test as it ends, so that a run that is cut short still tells.

The lines are appended to the file that FASTPREF_OUTCOMES names.
"""

import json
import os


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # pytest-xdist's controller hears of its workers' tests too
        config.pluginmanager.register(Outcomes(), "fastpref-outcomes")


class Outcomes:
    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            _write(report.nodeid, report.outcome, report)

    def pytest_collectreport(self, report):
        if report.outcome == "failed":
            _write(report.nodeid, "error", report)


def _write(test, outcome, report):
    line = {"test": test, "outcome": outcome, "seconds": round(getattr(report, "duration", 0.0), 3)}
    if outcome == "skipped":
        line["reason"] = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    elif outcome != "passed":
        line["reason"] = report.longreprtext[-1500:]
    with open(os.environ["FASTPREF_OUTCOMES"], "a") as file:
        file.write(json.dumps(line) + "\n")
