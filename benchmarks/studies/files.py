"""Pairs from a large file: `python benchmarks/studies/files.py [--gigabytes 1] [--format jsonl] [--workers N]`.

Writes a file of samples (prompts of 16 responses of 1 kB, with line breaks, one in nine not all ASCII); then a fresh
process reads its scores, picks a pair per prompt and writes the pairs. Prints the seconds of each, responses per second
of all, and the most memory that its processes took together, looked at every 20 ms.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fastpref.curate import read_samples, select_pairs, write_pairs
from harness import machine
from harness.report import table

RESPONSES, BYTES = 16, 1000
NOT_ASCII = 0.11  # share of the responses, as among answers of language models to English questions
TEXT = """the of and to in is that for it as was with be by on not he his but at are this have from or had an they
which one you were her all she there would their we him been has when who will more no if out so said what up its about
into than them can only other new some could time these two may then do first any my now such like our over man me even
most made after also did many before must through back years where much your way well down should because each just
those people how too little state good very make world still own see men work long get here between both life being
under never day same another know while last might us great old year off come since against go came right used take
three"""
MARKED = ['"quoted"', "naïve", "café", "—"]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--format", choices=["jsonl", "jsonl.gz", "parquet"], default="jsonl")
    parser.add_argument("--workers", type=int, help="processes (default: as read_samples chooses)")
    parser.add_argument("--shuffle", action="store_true", help="write the pairs in another order than the file's")
    parser.add_argument("--folder", type=Path, help="for the file, which is removed at the end (default: temporary)")
    parser.add_argument("--out", type=Path, help="folder for a .json and a .md beside what is printed")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # the fresh process: the samples' path
    arguments = parser.parse_args(argv)
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder, f"samples.{arguments.format}")
        write_samples(path, arguments.gigabytes)
        command = [sys.executable, __file__, "--measure", path, *(sys.argv[1:] if argv is None else argv)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return done.returncode
    record = json.loads(done.stdout)
    rows = [[name, f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"] for name, value in record.items()]
    text = table(["", "value"], rows)
    print(text)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        settings = {"format": arguments.format, "shuffle": arguments.shuffle}
        found = {"machine": machine.facts(), "settings": settings, "record": record}
        (arguments.out / "files.json").write_text(json.dumps(found, indent=2) + "\n")
        (arguments.out / "files.md").write_text(text + "\n")
    return 0


def write_samples(path: Path, gigabytes: float) -> None:
    """Rows of about RESPONSES * BYTES; every response is its own text, for it begins with a number of its own."""
    import gzip

    rng = np.random.default_rng(0)
    bodies = []
    for _ in range(2048):
        words = rng.choice(TEXT.split() + MARKED * (rng.random() < NOT_ASCII), 400)
        breaks = rng.random(400) < 0.03
        body = "".join(word + ("\n" if newline else " ") for word, newline in zip(words, breaks, strict=True))
        bodies.append(body.encode()[: BYTES - 10].decode(errors="ignore"))
    prompts = max(1, round(gigabytes * 1e9 / (RESPONSES * BYTES)))
    scores = rng.normal(size=(prompts, RESPONSES)).round(4)

    def rows(begin, end):
        picks = rng.integers(0, len(bodies), (end - begin, RESPONSES)).tolist()
        for number, pick in zip(range(begin, end), picks, strict=True):
            responses = [f"{number:07d}.{k:x} {bodies[body]}" for k, body in enumerate(pick)]
            yield {"prompt": f"Question {number}?", "responses": responses, "scores": scores[number].tolist()}

    blocks = ((begin, min(begin + 1000, prompts)) for begin in range(0, prompts, 1000))
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        writer = None
        for block in blocks:
            part = pyarrow.Table.from_pylist(list(rows(*block)))
            writer = writer or parquet.ParquetWriter(path, part.schema)
            writer.write_table(part)
        writer.close()
        return
    import orjson

    with gzip.open(path, "wb", 1) if path.suffix == ".gz" else open(path, "wb") as file:
        for block in blocks:
            file.write(b"".join(orjson.dumps(row) + b"\n" for row in rows(*block)))


def measure(arguments) -> dict:
    path, workers = arguments.measure, arguments.workers
    peak = [0]

    def watch():
        while True:
            peak[0] = max(peak[0], resident())
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()
    seconds, before = {}, time.perf_counter()

    def lap(name):
        nonlocal before
        seconds[name] = time.perf_counter() - before
        before = time.perf_counter()

    samples = read_samples(path, workers=workers)
    lap("read, s")
    selection = select_pairs(samples.scores["scores"], offsets=samples.offsets, rejected="quantile:0.10")
    pairs = selection.table() | {"rule": selection.rule, "scale": selection.scale}
    if arguments.shuffle:
        order = np.random.default_rng(0).permutation(len(pairs["prompt"]))
        pairs = {name: column if isinstance(column, str) else column[order] for name, column in pairs.items()}
    lap("select, s")
    written = write_pairs(samples, pairs, f"{path}.pairs.jsonl", workers=workers)
    lap("write, s")
    held = sum(getattr(samples, name).nbytes for name in ("offsets", "lengths", "text_hash", "blank", "prompt_hash"))
    held += samples.row.nbytes + samples.position.nbytes + samples.conversational.nbytes
    held += sum(scores.nbytes for scores in samples.scores.values())
    return {
        "file, GB": os.path.getsize(path) / 1e9,
        "responses": samples.responses,
        "pairs": written.rows,
        **seconds,
        "responses/s": round(samples.responses / sum(seconds.values())),
        "held per response, bytes": held / samples.responses,
        "memory, GiB": peak[0] / 2**30,
    }


def resident() -> int:
    """Bytes of memory of this process and those it has started, as far as /proc knows (Linux)."""
    pids = [os.getpid()]
    for children in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            pids += children.read_text().split()
    pages = 0
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.exit(main())
