"""Rows per response, wherever they stand in their files, as pools: a row per prompt in a file of JSON Lines.

The key of a prompt is its prompt_id, else the hash of its messages, tools, images and other context. Rows go by their
key to as many temporary files as leave each small enough for memory; the pools of each are joined in the order in which
their prompts first appear.
"""

import heapq
import math
import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import orjson

from fastpref.curate.files.containers import numbered_rows
from fastpref.curate.files.rows import Fields, Row, context_of, parse_row, top_fields, without_bad_unicode
from fastpref.curate.files.sources import Source, temporary_folder
from fastpref.curate.files.table import RowProblem
from fastpref.curate.files.texts import as_json, prompt_digest

PARTITION = 1 << 27  # bytes of rows that are grouped at a time
UNPACKED = 8  # times the size of a packed file, about
MOST_PARTITIONS = 256


class Grouped(NamedTuple):
    """The pools of rows per response."""

    source: Source  # of pools, in the order of their first rows
    numbers: np.ndarray  # int64 [pools], the line or row of the first
    problems: list[RowProblem]  # of rows that were left out
    rows: int  # that were read


def group_rows(name: str, sources: Sequence[Source], fields: Fields) -> Grouped:
    """Groups the rows of some sources by their prompt.

    Args:
        name: Of the input, for messages.
        sources: All of one layout.
        fields: What to read; its layout has a row per response.

    Raises:
        InputError: A source cannot be read.
    """
    size = sum(os.path.getsize(source.path) * (UNPACKED if source.packing else 1) for source in sources)
    count = min(MOST_PARTITIONS, size // PARTITION + 1)
    problems: list[RowProblem] = []
    handle, path = tempfile.mkstemp(dir=temporary_folder(), suffix=".jsonl")
    with open(handle, "wb") as out, tempfile.TemporaryDirectory(dir=temporary_folder()) as folder:
        rows, paths = _partitioned(sources, fields, folder, count, problems)
        runs = [_pools_of_partition(path, fields, problems) for path in paths]
        runs = runs if count == 1 else [_spilled(run, f"{path}.pools") for run, path in zip(runs, paths, strict=True)]
        numbers = []
        for _, number, pool in heapq.merge(*runs):
            numbers.append(number)
            out.write(pool + b"\n")
    problems.sort(key=lambda problem: (problem.path, problem.row))
    return Grouped(Source(name, path, "json-lines"), np.array(numbers, np.int64), problems, rows)


def _partitioned(sources, fields, folder, count, problems) -> tuple[int, list[str]]:
    """Writes every row to the file of its key. Returns the number of rows, and the files."""
    paths = [os.path.join(folder, str(k)) for k in range(count)]
    files = [open(path, "wb") for path in paths]  # noqa: SIM115
    wanted, order = top_fields(fields), 0
    try:
        for source in sources:
            of_source = fields._replace(cells=source.delimiter)
            for number, value in numbered_rows(source, wanted):
                order += 1
                try:
                    if isinstance(value, ValueError):
                        raise value
                    row = without_bad_unicode(parse_row(value, of_source), of_source)
                    key = row.prompt_id.encode() if row.prompt_id is not None else prompt_digest(row)
                    line = _line(order, number, source.name, key.hex(), row)
                except ValueError as error:
                    problems.append(RowProblem(source.name, number, str(error)))
                    continue
                files[zlib.crc32(key) % count].write(line + b"\n")
    finally:
        for file in files:
            file.close()
    return order, paths


def _line(order: int, number: int, name: str, key: str, row: Row) -> bytes:
    if any(isinstance(value, bytes) for carried in row.carried.values() for value in _values_in(carried)):
        raise ValueError("a column beside the prompt holds bytes, which no file of pools can: save images as files")
    scores = [None if math.isnan(values[0]) else values[0] for values in (row.scores | row.beside).values()]
    beside = [None if values is None else values[0] for values in (row.sources, row.lengths, row.truncated)]
    prompt = [row.prompt, context_of(row)]
    further = [row.prompt_id, row.carried]
    return orjson.dumps([order, number, name, key, prompt, further, row.responses[0], scores, beside], as_json)


def _values_in(value) -> Iterator:
    """A value and all that it holds."""
    yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _values_in(item)


def _pools_of_partition(path: str, fields: Fields, problems: list[RowProblem]) -> Iterator[tuple[int, int, bytes]]:
    """Order and number of the first row, and the pool, of every prompt of a partition, in order."""
    pools: dict[str, list] = {}
    with open(path, "rb") as file:
        for line in file:
            order, number, name, key, prompt, further, response, scores, beside = orjson.loads(line)
            pool = pools.setdefault(key, [order, number, prompt, further, [], [], []])
            if pool[2] != prompt:
                reason = f"another prompt than the first row of prompt_id {further[0]}"
                problems.append(RowProblem(name, number, reason))
                continue
            for column, value in zip(pool[4:], (response, scores, beside), strict=True):
                column.append(value)
    for key in list(pools):
        order, number, (prompt, _), further, responses, scores, beside = pools.pop(key)
        yield order, number, orjson.dumps(_pool(fields, prompt, further, responses, scores, beside))


def _pool(fields: Fields, text, further, responses, scores, beside) -> dict:
    prompt_id, carried = further  # of the first row
    pool = carried | {
        name: list(column)
        for name, column in zip((*fields.scores, *fields.beside), zip(*scores, strict=True), strict=True)
    }
    pool |= {"prompt": text, "responses": responses, "prompt_id": prompt_id}
    for name, column in zip(("sources", "lengths", "truncated"), zip(*beside, strict=True), strict=True):
        if all(value is not None for value in column) or (name == "sources" and any(column)):
            pool[name] = list(column)
    return pool


def _spilled(run: Iterator[tuple[int, int, bytes]], path: str) -> Iterator[tuple[int, int, bytes]]:
    """The same from a file, so that a partition's rows are let go before the next one's are read."""
    with open(path, "wb") as file:
        for order, number, pool in run:
            file.write(b"%d\t%d\t%s\n" % (order, number, pool))

    def again():
        with open(path, "rb") as file:
            for line in file:
                order, number, pool = line.rstrip(b"\n").split(b"\t", 2)
                yield int(order), int(number), pool

    return again()
