"""Builds, tests and measures fastpref on a GPU, in one command and under nine minutes: `python benchmarks/gpu.py`.

For any machine with a GPU; needs no internet. Builds into a scratch folder against the torch that is there (no
isolation, no dependencies), runs the GPU tests, then the benchmarks, and writes JSON and Markdown after every stage: a
stage that fails or runs out of time is recorded with the end of its log, and the next goes on. A backend whose numerics
tests fail, or did not run, is not measured. `--dry-run` walks the same path on a CPU, under Triton's interpreter.

Exit code: 0 done, 1 a stage failed (results are written all the same), 2 there is no GPU.
"""

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from harness import report, verify

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LIMIT_S = 520
BACKENDS = ("native", "triton")
# what later stages are sure to keep, in their order; what a stage leaves over goes to those after it
KEPT_S = {"describe": 70, "build": 110, "numerics": 90, "measure": 130, "tests": 80, "sanitizer": 45}


def main(argv=None) -> int:
    arguments = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="fastpref-gpu-") as scratch:
        run = Run(arguments, Path(scratch))
        if run.describe() != "done":
            run.write()
            print(f"torch could not be asked about this machine: see {run.path}.json", file=sys.stderr)
            return 1
        if run.results["machine"]["gpu"] is None and not arguments.dry_run:
            print("no GPU is visible to torch; --dry-run walks the same path on a CPU", file=sys.stderr)
            return 2
        for stage in (run.build, run.numerics, run.measure, run.tests, run.sanitizer):
            stage()
            run.write()
        run.results["finished"] = True
        run.write()
    print(f"wrote {run.path}.json and .md")
    return 1 if any(stage["status"] not in ("done", "left out") for stage in run.results["stages"].values()) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = os.environ.get("OUT") or HERE / "results"
    parser.add_argument("--out", type=Path, default=default, help="folder for the results ($OUT, or %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny shapes, Triton's interpreter")
    parser.add_argument("--installed", action="store_true", help="take the fastpref that is installed: no build")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="for everything (%(default)s)")
    return parser


class Ended(NamedTuple):
    status: str  # done, failed or "out of time"
    seconds: float
    output: str  # stdout
    log: str  # both, the end


class Run:
    """The stages in their order, and the results they fill in."""

    def __init__(self, arguments, scratch: Path):
        self.dry_run, self.installed, self.scratch = arguments.dry_run, arguments.installed, scratch
        self.start, self.limit = time.monotonic(), arguments.limit_s
        self.out = Path(arguments.out)
        self.path = None
        self.outcomes = scratch / "outcomes.jsonl"
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH")])),
            "FASTPREF_TEST_SEED": os.environ.get("FASTPREF_TEST_SEED", "0"),
            "FASTPREF_OUTCOMES": str(self.outcomes),
        }
        if self.dry_run:
            self.environment["TRITON_INTERPRET"] = "1"
        self.results = {
            "kind": "gpu",
            "dry_run": self.dry_run,
            "finished": False,
            "machine": {},
            "build_info": None,
            "bandwidth": {},
            "stages": {},
            "tests": None,
            "refused": {},
            "not_run": {},
            "cases": [],
        }

    # ---- stages ----

    def describe(self) -> str:
        ended = self.call("describe", [sys.executable, HERE / "harness" / "machine.py"])
        if ended.status == "done":
            self.results["machine"] = json.loads(ended.output.splitlines()[-1])
        machine = self.results["machine"]
        date = machine.get("date", datetime.date.today().isoformat())[:10]
        device = "dry-run" if self.dry_run else (machine.get("gpu") or {}).get("name", "unknown-gpu")
        self.out.mkdir(parents=True, exist_ok=True)
        self.path = _unused(self.out / f"{date}-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}")
        return ended.status

    def build(self):
        if self.installed:
            self.leave_out("build", "--installed: the fastpref that is there")
        else:
            self._build()
        code = "import fastpref, json; print(json.dumps(fastpref.build_info(), default=str))"
        ended = self.call("import", [sys.executable, "-c", code], kept=60)
        if ended.status == "done":
            self.results["build_info"] = info = json.loads(ended.output.splitlines()[-1])
            self.results["machine"]["versions"]["fastpref"] = info["version"]

    def _build(self):
        site = self.scratch / "site"
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), self.environment["PYTHONPATH"]]))
        pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps"]
        pip += ["--target", site, "-C", f"build-dir={self.scratch / 'build'}"]
        cuda = ["-C", f"cmake.define.FASTPREF_CUDA={'OFF' if self.dry_run else 'ON'}"]
        if gpu := self.results["machine"].get("gpu"):
            # this GPU alone: the release's list would take minutes
            cuda += ["-C", f"cmake.define.CMAKE_CUDA_ARCHITECTURES={gpu['capability'].replace('.', '')}"]
        ended = self.call("build", [*pip, *cuda, ROOT])
        if ended.status == "done":
            return
        self.results["not_run"]["native kernels"] = "their build failed: its log is in the JSON, stages.build"
        shutil.rmtree(site, ignore_errors=True)
        self.call("build without native code", [*pip, ROOT], kept=60, environment={"FASTPREF_PURE": "1"})

    def numerics(self):
        """What the benchmarks are gated by."""
        words = "(test_one_row or test_leading_dimensions) and cpu" if self.dry_run else ""
        status = self.pytest("numerics", _gate_files(), "" if self.dry_run else "cuda and numerics", words)
        counts = self.results["tests"]["by_backend"]
        for backend in BACKENDS:
            count = counts.get(self.tested(backend), {"passed": 0, "failed": 0})
            if count["failed"] or not count["passed"] or status == "out of time":
                tests = f"{count['failed']} numerics tests failed and {count['passed']} passed ({status})"
                self.results["refused"][backend] = f"not reported, because {tests}"

    def measure(self):
        ended = self.call("bandwidth", self.child("bandwidth"), kept=60)
        if ended.status != "done":
            self.results["not_run"]["benchmarks"] = "the bandwidth could not be measured"
            return
        seconds = self.seconds_for("measure") - 15
        command = self.child("cases", seconds, json.dumps(self.results["refused"]))
        self.call("measure", [*command, "--bandwidth", json.dumps(self.results["bandwidth"])])

    def tests(self):
        """All GPU tests that were not part of the numerics."""
        if self.dry_run:
            self.pytest("tests", verify.tests_of("logps/token_logps"), words="test_int32_labels")
            return
        others = sorted(set(verify.TESTS.rglob("test_*.py")) - set(_gate_files()))
        self.pytest("numerics of other ops", others, "cuda and numerics", kept=self.seconds_for("tests") / 2)
        self.pytest("tests", [verify.TESTS], "cuda and not numerics")

    def sanitizer(self):
        tool = shutil.which("compute-sanitizer")
        if tool is None and not self.dry_run:
            self.leave_out("sanitizer", "compute-sanitizer is not on the PATH")
            self.results["not_run"]["compute-sanitizer"] = "it is not on the PATH"
            return
        watched = [] if self.dry_run else [tool, "--tool", "memcheck", "--error-exitcode", "9"]
        # with torch's caching allocator an access beyond a tensor stays inside its pool, unseen
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        ended = self.call("sanitizer", [*watched, *self.child("tiny")], environment=environment)
        if self.dry_run or ended.status != "done":
            reason = (
                "a dry run has no GPU" if self.dry_run else f"{ended.status}: its log is in the JSON, stages.sanitizer"
            )
            self.results["not_run"]["compute-sanitizer"] = reason

    # ---- how a stage runs ----

    def child(self, *arguments):
        dry = ["--dry-run"] if self.dry_run else []
        return [sys.executable, HERE / "harness" / "gpu_measure.py", *map(str, arguments), *dry]

    def tested(self, backend: str) -> str:
        """How test ids name it; under the dry run the CPU stands in."""
        return f"{backend}-cpu" if self.dry_run else f"{backend}-cuda"

    def pytest(self, stage, files, markers="", words="", kept=None) -> str:
        """markers, words: pytest's -m and -k, "" for all tests."""
        command = [sys.executable, "-m", "pytest", *files, "-q", "-m", markers, "-k", words]
        command += ["-p", "harness.outcomes", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        if not self.dry_run and importlib.util.find_spec("xdist"):  # most of the time goes into Triton's compiler
            command += ["-n", str(min(8, os.cpu_count() or 1))]
        path = os.pathsep.join(filter(None, [self.environment["PYTHONPATH"], str(HERE)]))
        ended = self.call(stage, command, kept, environment={"PYTHONPATH": path})
        self.results["tests"] = _tally(self.outcomes)
        return ended.status

    def call(self, stage, command, kept=None, environment=None) -> Ended:
        seconds = self.seconds_for(stage) if kept is None else min(kept, self.seconds_for("sanitizer"))
        print(f"{stage}: at most {seconds:.0f} s", flush=True)
        ended = _call(command, self.environment | (environment or {}), seconds, self.scratch, self.take)
        record = {"status": ended.status, "seconds": round(ended.seconds, 1)}
        if ended.status != "done":
            record["log_tail"] = ended.log
        self.results["stages"][stage] = record
        print(f"{stage}: {ended.status} after {ended.seconds:.0f} s", flush=True)
        return ended

    def leave_out(self, stage, reason):
        self.results["stages"][stage] = {"status": "left out", "seconds": 0, "note": reason}

    def seconds_for(self, stage) -> float:
        """What is left, less what the stages after it keep."""
        names = list(KEPT_S)
        later = sum(KEPT_S[name] for name in names[names.index(stage) + 1 :]) * self.limit / sum(KEPT_S.values())
        return max(self.limit - (time.monotonic() - self.start) - later, 5)

    def scrubbed(self, value):
        """Results are published: no paths of this machine, only what is at their end."""
        if isinstance(value, dict):
            return {self.scrubbed(key): self.scrubbed(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.scrubbed(item) for item in value]
        if not isinstance(value, str):
            return value
        for path, name in ((self.scratch, "<scratch>"), (ROOT, "."), (sys.prefix, "<python>")):
            value = value.replace(str(path), name)
        return re.sub(r"(?<![\w.>:/])/(?:[\w.+@-]+/)+", ".../", value)

    def take(self, output: str):
        """What a measuring child has printed so far: kept at once, should this process not live to see its end."""
        pieces = [json.loads(line) for line in output.splitlines() if line.startswith("{") and line.endswith("}")]
        fresh = [piece["case"] for piece in pieces if "case" in piece and piece["case"] not in self.results["cases"]]
        self.results["cases"] += fresh
        for piece in pieces:
            self.results["bandwidth"] |= piece.get("bandwidth", {})
            self.results["not_run"] |= piece.get("not_run", {})
        if fresh:
            self.write()

    def write(self):
        results = self.scrubbed(self.results)
        never = dict(results["not_run"])
        for backend, reason in results["refused"].items():
            never[f"benchmarks of {backend}"] = reason
        if self.dry_run:
            never["everything on a GPU"] = "this is a dry run"
        self.path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        self.path.with_suffix(".md").write_text(report.markdown(results | {"not_run": never}))


def _gate_files() -> list[Path]:
    """The tests whose numerics say which backends are measured."""
    return [path for op in ("logps/token_logps", "logps/linear_logps") for path in verify.tests_of(op)]


def _call(command, environment, seconds, folder, take) -> Ended:
    """In a process group of its own, which a time-out ends whole. `take` gets what was printed, as it grows."""
    start = time.monotonic()
    with open(folder / "stdout", "w+") as stdout, open(folder / "stderr", "w+") as stderr:
        process = subprocess.Popen(
            list(map(str, command)), stdout=stdout, stderr=stderr, env=environment, cwd=folder, start_new_session=True
        )
        try:
            while process.poll() is None and time.monotonic() < start + seconds:
                time.sleep(0.2)
                take(Path(stdout.name).read_text())
            status = {None: "out of time", 0: "done"}.get(process.poll(), f"failed, exit code {process.returncode}")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    output, errors = Path(stdout.name).read_text(), Path(stderr.name).read_text()
    take(output)
    return Ended(status, time.monotonic() - start, output, output[-3000:] + errors[-3000:])


def _tally(outcomes: Path) -> dict:
    """Counts per backend, failures with their reasons, reasons of skips."""
    by_backend, failures, skips = {}, [], {}
    lines = outcomes.read_text().splitlines() if outcomes.exists() else []
    for line in map(json.loads, lines):
        outcome = "failed" if line["outcome"] in ("failed", "error") else line["outcome"]
        backend = re.search(r"\[.*?(native|triton|reference)-(cpu|cuda)", line["test"])
        group = f"{backend[1]}-{backend[2]}" if backend else "other"
        by_backend.setdefault(group, {"passed": 0, "failed": 0, "skipped": 0})[outcome] += 1
        if outcome == "failed":
            failures.append({"test": line["test"], "reason": line["reason"]})
        elif outcome == "skipped":
            skips[line["reason"]] = skips.get(line["reason"], 0) + 1
    return {"by_backend": by_backend, "failures": failures, "skip_reasons": skips}


def _unused(path: Path) -> Path:
    """Earlier results of the same day are kept."""
    candidate, n = path, 1
    while candidate.with_suffix(".json").exists():
        n += 1
        candidate = path.with_name(f"{path.name}-{n}")
    return candidate


if __name__ == "__main__":
    sys.exit(main())
