"""Builds, tests and measures fastpref on a GPU, in one command and under nine minutes: `python benchmarks/gpu.py`.

For any machine with a GPU; needs no internet. Builds into a scratch folder against the torch that is there (no
isolation, no dependencies); launches every variant of every kernel once against float64; measures the loss half and the
low-rank half against their peers; runs all GPU tests, and a memory checker where there is one. JSON and Markdown are
written after every stage: what fails or runs out of time is recorded with the end of its log, and the next goes on.
Red numerics do not stop a measurement: its row says that it is not proved, and why. The last lines on stdout are a
short table. FASTPREF_COMMIT names the commit where there is no .git.

`--dry-run` runs the same code at tiny shapes on a CPU whose tensors are taken for a GPU's: the kernels' PTX is executed
by the simulator of tests/ptxsim, every access checked. It needs nvcc, cmake and g++. `--few` leaves most items out.

Exit code: 0 done, 1 something failed (results are written all the same), 2 there is no GPU, or nothing to simulate it.
"""

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness import gpu_table, report, verify
from harness.children import Ended, call, work
from peers.published import PUBLISHED

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LIMIT_S = 520
# what later stages are sure to keep, in their order; what a stage leaves over goes to those after it
KEPT_S = {"describe": 30, "build": 110, "contact": 60, "measure": 130, "low_rank": 85, "tests": 75, "sanitizer": 30}
CUDA_TESTS = ("logps", "lowrank", "preference_matrix")  # folders of tests/ with every test that is marked cuda
PROCESSES, CONTACT_S = 8, 60  # that meet the kernels first: most of the time goes into Triton's compiler


def main(argv=None) -> int:
    arguments = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="fastpref-gpu-") as scratch:
        run = Run(arguments, Path(scratch))
        if run.describe() != "done":
            run.write()
            print(f"torch could not be asked about this machine: see {run.path}.json", file=sys.stderr)
            return 1
        if run.results["machine"]["gpu"] is None and not arguments.dry_run:
            print("no GPU is visible to torch; --dry-run executes the same on a CPU", file=sys.stderr)
            return 2
        for stage in (run.build, run.contact, run.measure, run.low_rank, run.tests, run.sanitizer):
            stage()
            run.write()
        run.results["finished"] = True
        run.write()
    print(f"wrote {run.path}.json and .md")
    print("\n".join(run.table()))
    return 1 if run.has_failed() else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = os.environ.get("OUT") or HERE / "results"
    parser.add_argument("--out", type=Path, default=default, help="folder for the results ($OUT, or %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny shapes, kernels on the simulator")
    parser.add_argument("--few", action="store_true", help="some items of each stage, to see that the command works")
    parser.add_argument(
        "--simulator", type=Path, default=ROOT / ".pytest_cache" / "d" / "ptxsim",
        help="where a dry run's simulator is built, or is already (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--installed", action="store_true", help="take the fastpref that is installed: no build")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="for everything (%(default)s)")
    return parser


class Run:
    """The stages in their order, and the results they fill in."""

    def __init__(self, arguments, scratch: Path):
        self.dry_run, self.few, self.installed = arguments.dry_run, arguments.few, arguments.installed
        self.simulator, self.scratch = arguments.simulator, scratch
        self.start, self.limit = time.monotonic(), arguments.limit_s
        self.out = Path(arguments.out)
        self.path = None
        self.outcomes = scratch / "outcomes.jsonl"
        self.environment = os.environ | {
            "FASTPREF_TEST_SEED": os.environ.get("FASTPREF_TEST_SEED", "0"),
            "FASTPREF_OUTCOMES": str(self.outcomes),
        }
        self.results = {
            "kind": "gpu",
            "dry_run": self.dry_run,
            "finished": False,
            "machine": {},
            "build_info": None,
            "bandwidth": {},
            "stages": {},
            "contact": {},
            "tests": None,
            "published": PUBLISHED,
            "not_run": {},
            "cases": [],
        }
        self._lock = threading.Lock()

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
        if self.dry_run:
            command = [sys.executable, verify.TESTS / "ptxsim" / "ptxsim_build.py", self.simulator, "--core"]
            ended = self.call("simulator", command, kept=self.seconds_for("build"))
            if ended.status == "done":
                library, core = ended.output.splitlines()[-2:]
                self.environment["PTXSIM_LIBRARY"] = library.partition("=")[2]
                self.environment["FASTPREF_SIMULATED_CORE"] = core

    def _build(self):
        site = self.scratch / "site"
        paths = [str(site), self.environment.get("PYTHONPATH", "")]
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
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

    def contact(self):
        """Every variant of every kernel once, a line each; Triton's cache is warm afterwards."""

        def take(name, result):
            if "build_info" in result:
                self.results["build_info"] = info = result["build_info"]
                self.results["machine"]["versions"]["fastpref"] = info["version"]
                return
            self.results["contact"][name] = result
            parts = ", ".join(f"{part} {said['error']:.1e}" if isinstance(said["error"], float) else f"{part} {said}"
                              for part, said in result.get("parts", {}).items())  # fmt: skip
            word = "ok" if result.get("ok") else result.get("failed") or result.get("not_run") or "WRONG"
            print(f"{name}: {word}{': ' if parts else ''}{parts}", flush=True)

        self.items("contact", take, 1 if self.dry_run else PROCESSES)

    def measure(self):
        self.items("measure", self.take_case)

    def low_rank(self):
        self.items("low_rank", self.take_case)

    def tests(self):
        """All that are marked cuda, the numerics of every op first."""
        if self.dry_run:
            self.pytest("tests", verify.tests_of("logps/token_logps"), "", "test_int32_labels or test_one_row")
        else:
            self.pytest("tests", [verify.TESTS / folder for folder in CUDA_TESTS], "cuda")

    def sanitizer(self):
        """The native kernels' variants once more, under a memory checker."""
        if self.dry_run:
            self.leave_out("sanitizer", "the simulator has checked every access")
            return
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            self.leave_out("sanitizer", "compute-sanitizer is not on the PATH")
            self.results["not_run"]["compute-sanitizer"] = "it is not on the PATH"
            return
        watched = [tool, "--tool", "memcheck", "--error-exitcode", "9"]
        # with torch's caching allocator an access beyond a tensor stays inside its pool, unseen
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = [*watched, *self.worker("contact"), "--few"]
        ended = self.call("sanitizer", command, environment=environment)
        if ended.status != "done":
            self.results["not_run"]["compute-sanitizer"] = f"{ended.status}: its log is in the JSON, stages.sanitizer"

    # ---- how a stage runs ----

    def worker(self, kind: str) -> list:
        return [sys.executable, HERE / "harness" / "worker.py", kind]

    def items(self, kind: str, take, processes: int = 1):
        """The items of a kind, in so many processes at a time. take(name, result) of each."""
        start, seconds = time.monotonic(), self.seconds_for(kind)
        if kind == "contact" and not self.dry_run:
            seconds = min(seconds, CONTACT_S)
        print(f"{kind}: at most {seconds:.0f} s", flush=True)

        def locked(name, result):
            with self._lock:
                take(name, result)

        def share(i: int) -> str:
            command = [*self.worker(kind), *(["--few"] if self.few else []), "--share", i, processes]
            return work(command, self.environment, start + seconds, self.scratch / f"{kind}-{i}", locked)

        with ThreadPoolExecutor(processes) as pool:
            statuses = set(pool.map(share, range(processes)))
        status = "done" if statuses == {"done"} else max(statuses - {"done"}, key=len)
        record = {"status": status.partition(":")[0], "seconds": round(time.monotonic() - start, 1)}
        if ":" in status:
            record["log_tail"] = status
            self.results["not_run"][kind] = "its processes failed: their log is in the JSON"
        self.results["stages"][kind] = record
        print(f"{kind}: {record['status']} after {record['seconds']:.0f} s", flush=True)

    def take_case(self, name: str, result: dict):
        """What a measuring child has done so far is kept at once, should this process not live to see its end."""
        if "case" in result:
            self.results["cases"].append(result["case"])
            print(f"{name}: measured in {result['item_seconds']:.1f} s", flush=True)
            self.write()
        elif "bandwidth" in result:
            self.results["bandwidth"] |= result["bandwidth"]
        else:
            self.results["not_run"][name] = reason = " ".join((result.get("failed") or result["not_run"]).split())
            print(f"{name}: {reason}", flush=True)

    def pytest(self, stage, paths, markers="", words=""):
        """markers, words: pytest's -m and -k, "" for all tests."""
        command = [*pytest_command(paths, markers, words), "-p", "harness.outcomes"]
        if not self.dry_run and importlib.util.find_spec("xdist"):
            command += ["-n", str(min(12, os.cpu_count() or 1))]
        path = os.pathsep.join(filter(None, [self.environment.get("PYTHONPATH", ""), str(HERE)]))
        self.call(stage, command, environment={"PYTHONPATH": path})
        self.results["tests"] = _tally(self.outcomes)

    def call(self, stage, command, kept=None, environment=None) -> Ended:
        seconds = self.seconds_for(stage) if kept is None else min(kept, self.seconds_for("sanitizer"))
        print(f"{stage}: at most {seconds:.0f} s", flush=True)
        ended = call(command, self.environment | (environment or {}), seconds, self.scratch / stage.replace(" ", "-"))
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

    def has_failed(self) -> bool:
        stages = (stage["status"] for stage in self.results["stages"].values())
        return (
            any(status not in ("done", "left out") for status in stages)
            or not all(contact.get("ok") for contact in self.results["contact"].values())
            or bool(self.results["not_run"])
        )

    def write(self):
        gpu_table.mark(self.results)
        results = self.scrubbed(self.results)
        never = dict(results["not_run"])
        if self.dry_run:
            never["everything on a GPU"] = "this is a dry run"
        self.path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        self.path.with_suffix(".md").write_text(report.markdown(results | {"not_run": never}))

    def table(self) -> list[str]:
        return gpu_table.short(self.results)


def pytest_command(paths, markers: str, words: str = "") -> list:
    options = ["-q", "-m", markers, "-k", words, "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    return [sys.executable, "-m", "pytest", *paths, *options]


def _tally(outcomes: Path) -> dict:
    """Counts per backend, passes per op and backend, failures with their reasons, reasons of skips, how many did not
    run. A test that failed in a process that then ended may have two lines."""
    lines = [json.loads(line) for line in outcomes.read_text().splitlines()] if outcomes.exists() else []
    collected = max((line["collected"] for line in lines if "collected" in line), default=0)
    tests = {}
    for line in lines:
        if "test" in line and tests.get(line["test"], {}).get("outcome") != "failed":
            tests[line["test"]] = line | {"outcome": "failed" if line["outcome"] == "error" else line["outcome"]}
    by_backend, passed, failures, skips = {}, {}, [], {}
    for test, line in tests.items():
        found = re.search(r"\[.*?(native|triton|reference)-(cpu|cuda)", test)
        group = f"{found[1]}-{found[2]}" if found else "other"
        by_backend.setdefault(group, {"passed": 0, "failed": 0, "skipped": 0})[line["outcome"]] += 1
        if line["outcome"] == "failed":
            failures.append({"test": test, "reason": line["reason"]})
        elif line["outcome"] == "skipped":
            skips[line["reason"]] = skips.get(line["reason"], 0) + 1
        else:
            counts = passed.setdefault(gpu_table.op_of_test(test) or "other", {})
            backend = gpu_table.backend_of_test(test) or "any"
            counts[backend] = counts.get(backend, 0) + 1
    return {
        "by_backend": by_backend,
        "passed": passed,
        "failures": failures,
        "skip_reasons": skips,
        "collected": collected,
        "not_run": max(collected - len(tests), 0),
    }


def _unused(path: Path) -> Path:
    """Earlier results of the same day are kept."""
    candidate, n = path, 1
    while candidate.with_suffix(".json").exists():
        n += 1
        candidate = path.with_name(f"{path.name}-{n}")
    return candidate


if __name__ == "__main__":
    sys.exit(main())
