"""Rows per response, wherever they stand in their files, as pools: a row per prompt in a file of JSON Lines.

The key of a prompt is its prompt_id, else the hash of its messages, tools, images and other context. Rows go by their
key to as many temporary files as leave each small enough for memory; the pools of each are joined in the order in which
their prompts first appear.
"""

import contextlib
import hashlib
import heapq
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import orjson

from fastpref.curate.files.containers import numbered_rows, open_parquet
from fastpref.curate.files.layouts import is_context
from fastpref.curate.files.rows import Fields, Row, context_of, parse_row, top_fields, without_bad_unicode
from fastpref.curate.files.sources import Source, reading_errors, temporary_file, temporary_folder
from fastpref.curate.files.table import RowProblem
from fastpref.curate.files.texts import as_json, prompt_digest

PARTITION = 1 << 27  # bytes of rows that are grouped at a time
UNPACKED = 8  # times the size of a packed file, about
MOST_PARTITIONS = 256  # files that are open at a time
MOST_SPLITS = 3  # times that a partition is split: rows of one prompt stay together, however many they are


class Grouped(NamedTuple):
    """The pools of rows per response."""

    source: Source  # of pools, in the order of their first rows
    numbers: np.ndarray  # int64 [pools], the line or row of the first
    problems: list[RowProblem]  # of rows that were left out
    rows: int  # that were read
    counts: dict[str, int]  # values of carried columns that are in no pool, by what they are


def group_rows(name: str, sources: Sequence[Source], fields: Fields) -> Grouped:
    """Groups the rows of some sources by their prompt.

    Args:
        name: Of the input, for messages.
        sources: All of one layout.
        fields: What to read; its layout has a row per response.

    Raises:
        InputError: A source cannot be read.
    """
    count = min(MOST_PARTITIONS, sum(map(_unpacked_size, sources)) // PARTITION + 1)
    left_out = _LeftOut([], Counter())
    out, path = temporary_file(".jsonl")
    with out, tempfile.TemporaryDirectory(dir=temporary_folder()) as folder:
        rows, paths = _partitioned(sources, fields, folder, count, left_out.problems)
        pools = _pools(paths[0], fields, left_out) if count == 1 else _merged_pools(paths, fields, left_out)
        numbers = []
        for _, number, pool in pools:
            numbers.append(number)
            out.write(pool + b"\n")
    problems, others = left_out
    problems.sort(key=lambda problem: (problem.path, problem.row))
    counts = {f"values of {name} that are not that of their prompt's first row": n for name, n in others.items()}
    return Grouped(Source(name, path, "json-lines"), np.array(numbers, np.int64), problems, rows, counts)


def _unpacked_size(source: Source) -> int:
    """Bytes of its rows, about: Parquet packs columns, which its row groups tell."""
    if source.container == "parquet":
        with reading_errors(source.name):
            metadata = open_parquet(source).metadata
            return sum(metadata.row_group(k).total_byte_size for k in range(metadata.num_row_groups))
    return os.path.getsize(source.path) * (UNPACKED if source.packing else 1)


def _partitioned(sources, fields, folder, count, problems) -> tuple[int, list[str]]:
    """Writes every row to the file of its key. Returns the number of rows, and the files."""
    paths = [os.path.join(folder, str(k)) for k in range(count)]
    wanted, order = top_fields(fields), 0
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(path, "wb")) for path in paths]
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
                files[_partition(key.hex(), 0, count)].write(line + b"\n")
    return order, paths


def _partition(key: str, split: int, count: int) -> int:
    """Which one of so many the rows of a key go to, independent of where they went in another split."""
    digest = hashlib.blake2b(key.encode(), digest_size=8, salt=bytes([split])).digest()
    return int.from_bytes(digest, "big") % count


class _LeftOut(NamedTuple):
    """What is in no pool, as of `Grouped`."""

    problems: list[RowProblem]
    other_values: Counter[str]  # by column


_Run: TypeAlias = Iterator[tuple[int, int, bytes]]  # order and number of the first row, and the pool, in order


def _merged_pools(paths: list[str], fields: Fields, left_out: _LeftOut, split: int = 1) -> _Run:
    """The pools of some partitions, each of which is let go before the next one is read."""
    return heapq.merge(*(_spilled(_pools(path, fields, left_out, split), f"{path}.pools") for path in paths))


def _pools(path: str, fields: Fields, left_out: _LeftOut, split: int = 1) -> _Run:
    """The pools of a partition, which is split once more where it came out too large for memory."""
    count = min(MOST_PARTITIONS, os.path.getsize(path) // PARTITION + 1)
    if count <= 2 or split > MOST_SPLITS:  # sizes scatter about the one that was aimed at
        return _pools_in_memory(path, fields, left_out)
    parts = [f"{path}.{k}" for k in range(count)]
    with open(path, "rb") as rows, contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(part, "wb")) for part in parts]
        for line in rows:
            files[_partition(orjson.loads(line)[3], split, count)].write(line)
    os.remove(path)
    return _merged_pools(parts, fields, left_out, split + 1)


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


def _pools_in_memory(path: str, fields: Fields, left_out: _LeftOut) -> _Run:
    pools: dict[str, list] = {}
    with open(path, "rb") as file:
        for line in file:
            order, number, name, key, prompt, further, response, scores, beside = orjson.loads(line)
            pool = pools.setdefault(key, [order, number, prompt, further, [], [], []])
            if pool[2] != prompt:
                reason = f"another prompt than the first row of prompt_id {further[0]}"
                left_out.problems.append(RowProblem(name, number, reason))
                continue
            first = pool[3][1]
            others = [name for name, value in further[1].items() if value != first[name] and not is_context(name)]
            left_out.other_values.update(others)
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


def _spilled(run: _Run, path: str) -> _Run:
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
