"""The same function on many tasks in a few Python processes of our own.

Not multiprocessing: forking a process that has threads (numpy and pyarrow start some) can hang, and spawning runs the
caller's script again, which must be prepared for it.
"""

import contextlib
import json
import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

MOST_PROCESSES = 8  # reading from disk and one Python that joins the results: more would wait for them
_SERVE = f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {__name__} import serve_calls; serve_calls()"


def available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worthwhile_processes(size: int) -> int:
    """Processes for a file of so many bytes: one per available CPU, 1 where starting takes longer."""
    return max(1, min(MOST_PROCESSES, available_cpus(), size >> 25))


def in_processes(function: Callable, tasks: Iterable[tuple], workers: int) -> Iterator:
    """function(*task) of every task, in order; with one worker here. The function must be importable by name.

    Tasks are drawn as they are needed, two ahead per worker, so neither they nor the results pile up.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if workers == 1:
        for task in tasks:
            yield function(*task)
        return
    processes = [_start_process() for _ in range(workers)]
    idle = queue.SimpleQueue()
    for process in processes:
        idle.put(process)

    def call(task):
        process = idle.get()
        try:
            return _call_process(process, function, task)
        finally:
            idle.put(process)

    threads = ThreadPoolExecutor(workers)
    running = deque()
    try:
        for task in tasks:
            running.append(threads.submit(call, task))
            if len(running) > 2 * workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for process in processes:
            process.kill()  # they hold nothing
            process.wait()
        threads.shutdown(cancel_futures=True)
        for process in processes:
            with contextlib.suppress(BrokenPipeError):  # of a task that was half sent
                process.stdin.close()
            process.stdout.close()


def serve_calls() -> None:
    """The loop of a worker: calls come in by stdin, results go out by stdout, until stdin ends."""
    calls, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed must not get among the results
    while True:
        try:
            function, task = pickle.load(calls)
        except EOFError:
            return
        try:
            answer = True, function(*task)
        except Exception as error:
            answer = False, _picklable(error)
        pickle.dump(answer, results, pickle.HIGHEST_PROTOCOL)
        results.flush()


def _picklable(error) -> Exception:
    """The error, or what it says where pickle cannot make it again."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _start_process() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", _SERVE, json.dumps([path for path in sys.path if isinstance(path, str)])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is the caller's, who ends them
    )


def _call_process(process, function, task):
    try:
        pickle.dump((function, task), process.stdin, pickle.HIGHEST_PROTOCOL)
        process.stdin.flush()
        done, value = pickle.load(process.stdout)
    except (BrokenPipeError, EOFError, pickle.UnpicklingError) as error:
        raise RuntimeError(f"a process ended with exit code {process.wait()}") from error
    if not done:
        raise value
    return value
