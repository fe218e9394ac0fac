"""Processes of the GPU command: cut short at a time-out, and begun anew where one item has taken them down."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

START_S = 60  # for imports and the GPU's context


class Ended(NamedTuple):
    status: str  # "done", "failed, exit code N", "out of time" or "stopped"
    seconds: float
    output: str  # stdout
    log: str  # both, the end


def call(command, environment, seconds, folder: Path, watch: Callable[[str], bool] = lambda output: False) -> Ended:
    """In a process group of its own, which a time-out ends whole. watch(stdout so far) is asked again and again; where
    it says True the process is stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    start, stopped = time.monotonic(), False
    with open(folder / "stdout", "w+") as stdout, open(folder / "stderr", "w+") as stderr:
        process = subprocess.Popen(
            list(map(str, command)), stdout=stdout, stderr=stderr, env=environment, cwd=folder, start_new_session=True
        )
        try:
            while process.poll() is None and not stopped and time.monotonic() < start + seconds:
                time.sleep(0.1)
                stopped = watch(Path(stdout.name).read_text())
            code = process.poll()
            status = "done" if code == 0 else f"failed, exit code {code}"
            if code is None:
                status = "stopped" if stopped else "out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    output, errors = Path(stdout.name).read_text(), Path(stderr.name).read_text()
    watch(output)
    return Ended(status, time.monotonic() - start, output, output[-3000:] + errors[-3000:])


class _Progress:
    """What a worker has said so far: `take` gets each item's result once, as soon as it is there."""

    def __init__(self, take):
        self.take = take
        self.names, self.ended, self.current = None, [], None
        self.since, self.limit = time.monotonic(), START_S
        self._read = 0

    def __call__(self, output: str) -> bool:
        whole = output[: output.rfind("\n") + 1]
        for line in whole[self._read :].splitlines():
            if line.startswith('{"names"'):
                self.names = json.loads(line)["names"]
            elif line.startswith('{"begin"'):
                said = json.loads(line)
                self.current, self.since, self.limit = said["begin"], time.monotonic(), said["cap_s"]
            elif line.startswith('{"end"'):
                said = json.loads(line)
                self.current, self.since, self.limit = None, time.monotonic(), START_S
                self.ended.append(said["end"])
                self.take(said["end"], said["result"])
        self._read = len(whole)
        return time.monotonic() > self.since + self.limit


def work(command: list, environment: dict, deadline: float, folder: Path, take: Callable[[str, dict], None]) -> str:
    """Has a worker.py go through its items. One that takes the process down, or longer than its cap, has failed, and
    another process goes on with those after it.

    Returns "done", "out of time", or "failed: " and the end of the log of a process that did not get as far as an
    item. take(name, result) is called for each item, as soon as its result is there.
    """
    finished, left = [], []
    while True:
        seconds = deadline - time.monotonic()
        if seconds < 1:
            break
        progress = _Progress(take)
        ended = call([*command, "--without", *finished], environment, seconds, folder, progress)
        if progress.names is None:
            return "out of time" if ended.status == "out of time" else f"failed: {ended.status}\n{ended.log}"
        finished += progress.ended
        left = [name for name in progress.names if name not in progress.ended]
        if not left or ended.status == "out of time":
            break
        if progress.current is None and not progress.ended:
            return f"failed: {ended.status}\n{ended.log}"
        if (name := progress.current) is not None:
            lines = ended.log.strip().splitlines() or [""]
            reason = f"took longer than its {progress.limit:.0f} s"
            take(name, {"failed": reason if ended.status == "stopped" else f"{ended.status}: {lines[-1][-300:]}"})
            finished.append(name)
            left.remove(name)
    for name in left:
        take(name, {"not_run": "out of time"})
    return "out of time" if left else "done"
