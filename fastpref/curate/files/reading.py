"""A file of samples in parts: the rows of a part, their columns, and the rows once more for their texts.

A position is the byte at which a line begins (unpacked), or the number of rows before it in a Parquet file: it grows
from row to row. orjson parses and XXH3 hashes.
"""

import contextlib
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from stat import S_ISREG
from typing import NamedTuple

import numpy as np

from fastpref.curate.files.rows import Fields, Row, Text, check_unicode, parse_row, score_fields, top_fields
from fastpref.curate.files.table import RowProblem, Samples
from fastpref.errors import InputError

try:
    import orjson
    from xxhash import xxh3_64_digest
except ImportError as error:
    raise InputError(f'reading samples needs {error.name}: pip install "fastpref[cli]"') from error

PART = 1 << 23  # bytes of lines in a part
BUFFER = 1 << 20  # bytes of each Parquet column read at a time
PARQUET_ROWS = 256  # made into Python objects at a time
ROW_GROUP = 1 << 26  # bytes; a larger one, and some files are a single one, is more than a part


class FilePart(NamedTuple):
    begin: int  # positions
    end: int
    done: int  # how far into the file it leads, in the units of `extent`
    lines: bytes | None = None  # of a packed file; others are read where they are needed
    row_group: int | None = None  # of a Parquet file
    table: bytes | None = None  # Arrow stream, of rows in a row group that is larger than ROW_GROUP


def stamp(path) -> tuple[int, int]:
    """Size in bytes and time of change in ns."""
    with _readable(path):
        status = os.stat(path)
    if not S_ISREG(status.st_mode):
        raise InputError(f"cannot read {path}: it must be a regular file, for it is read twice")
    return status.st_size, status.st_mtime_ns


def extent(path) -> int:
    """Bytes, or rows of a Parquet file."""
    with _readable(path):
        return _open_parquet(path).metadata.num_rows if _magic(path) == b"PAR1" else os.path.getsize(path)


def parts(path, fields: Fields | None) -> Iterator[FilePart]:
    """The whole file in order, cut at ends of lines or into row groups. fields: that are looked at; None: all."""
    with _readable(path):
        magic = _magic(path)
        if magic == b"PAR1":
            metadata, end = _open_parquet(path).metadata, 0
            for group in range(metadata.num_row_groups):
                begin, end = end, end + metadata.row_group(group).num_rows
                if metadata.row_group(group).total_byte_size <= ROW_GROUP:
                    yield FilePart(begin, end, end, row_group=group)
                else:
                    yield from _parts_of_row_group(path, group, begin, fields)
        elif magic[:2] == b"\x1f\x8b":
            with open(path, "rb") as packed, gzip.open(packed) as file:
                end = 0
                while lines := file.read(PART):
                    lines += file.readline()
                    begin, end = end, end + len(lines)
                    yield FilePart(begin, end, packed.tell(), lines)
        else:
            with open(path, "rb") as file:
                size, end = os.path.getsize(path), 0
                while end < size:
                    begin = end
                    file.seek(begin + PART)
                    file.readline()
                    end = min(file.tell(), size)
                    yield FilePart(begin, end, end)


def part_rows(path, part: FilePart, fields: Fields | None, only=None) -> Iterator[tuple[int, object]]:
    """Position and value of the rows of a part: None for a blank line, a ValueError for a row that cannot be read.

    only: ascending positions in the part, of the rows that are wanted.
    """
    if part.row_group is not None or part.table is not None:
        yield from _parquet_rows(path, part, fields, only)
        return
    lines = part.lines
    if lines is None:
        with _readable(path), open(path, "rb") as file:
            file.seek(part.begin)
            lines = file.read(part.end - part.begin)
    file = io.BytesIO(lines)
    if only is None:
        position = part.begin
        for line in file:
            yield position, _json_row(line, position == 0)
            position += len(line)
    else:
        for position in only:
            file.seek(position - part.begin)
            yield position, _json_row(file.readline(), position == 0)


def numbered_rows(path, fields: Fields | None) -> Iterator[tuple[int, object]]:
    """Line or row from 1 and the value of every row of the file but blank lines. fields: None for all of them."""
    number = 0
    for part in parts(path, fields):
        for _, row in part_rows(path, part, fields):
            number += 1
            if row is not None:
                yield number, row


def valid_row(row, fields: Fields) -> Row:
    if isinstance(row, ValueError):
        raise row
    return parse_row(row, fields)


def first_score_fields(path) -> tuple[str, ...] | None:
    for _, row in numbered_rows(path, Fields()):
        with contextlib.suppress(ValueError):  # a malformed row: the pass over all of them says so
            if (found := score_fields(row)) is not None:
                return found
    return None


@contextlib.contextmanager
def _readable(path):
    try:
        yield
    # gzip: EOFError for a cut file, BadGzipFile is an OSError
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _magic(path) -> bytes:
    with open(path, "rb") as file:
        return file.read(4)


def _json_row(line, first: bool):
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        line = line.strip()
        if not line:
            return None
        row = _json_or_reason(line, first)
    return ValueError("a row must be an object, got null") if row is None else row


def _json_or_reason(line, first: bool):
    try:
        # For NaN and the byte-order mark of files from Windows, which orjson does not read, and for clearer reasons.
        return json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return ValueError(f"not JSON: {error.msg} at column {error.colno}")
    except (RecursionError, ValueError) as error:
        return ValueError(f"not JSON: {error}")


def _open_parquet(path):
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f'{path} is a Parquet file, which needs pyarrow: pip install "fastpref[cli]"') from error
    try:
        return parquet.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False)
    except pyarrow.ArrowException as error:
        raise InputError(f"cannot read {path}: {error}".splitlines()[0]) from error


def _parts_of_row_group(path, group, begin, fields) -> Iterator[FilePart]:
    import pyarrow

    def part():
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, batches[0].schema) as stream:
            for batch in batches:
                stream.write_batch(batch)
        return FilePart(begin, end, end, table=sink.getvalue().to_pybytes())

    batches, end = [], begin
    for batch in _batches(path, group, begin, fields):
        batches.append(batch)
        end += batch.num_rows
        if sum(batch.nbytes for batch in batches) >= PART:
            yield part()
            batches, begin = [], end
    if batches:
        yield part()


def _batches(path, group, position, fields) -> Iterator:
    import pyarrow

    file = _open_parquet(path)
    columns = None
    if fields is not None:
        wanted = top_fields(fields)
        columns = [name for name in file.schema_arrow.names if name in wanted]
    try:
        for batch in file.iter_batches(PARQUET_ROWS, row_groups=[group], columns=columns):
            yield batch
            position += batch.num_rows
    except pyarrow.ArrowException as error:
        raise InputError(f"cannot read {path} after row {position}: {error}".splitlines()[0]) from error


def _parquet_rows(path, part, fields, only) -> Iterator[tuple[int, object]]:
    import pyarrow

    position = part.begin
    stream = part.table and pyarrow.ipc.open_stream(part.table)
    for batch in stream or _batches(path, part.row_group, position, fields):
        positions = np.arange(position, position + batch.num_rows)
        position += batch.num_rows
        if only is not None:
            positions = positions[np.isin(positions, only)]
            batch = batch.take(pyarrow.array(positions - position + batch.num_rows))
        yield from zip(positions.tolist(), _python_rows(batch), strict=True)


def _python_rows(batch) -> list:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [ValueError(f"not UTF-8 at byte {error.start} of a string")]
        return [row for k in range(batch.num_rows) for row in _python_rows(batch.slice(k, 1))]


# ---- the columns of a part


class Columns(NamedTuple):
    """As in Samples, of the rows of a part; sources are numbered within it, and rows from 1."""

    rows: int  # of the part, with blank lines and malformed rows
    counts: np.ndarray  # int64 [prompts], responses
    scores: dict[str, np.ndarray]
    lengths: np.ndarray
    text_hash: np.ndarray
    blank: np.ndarray
    truncated: np.ndarray | None
    sources: np.ndarray | None
    source_names: list[str]
    prompt_hash: np.ndarray
    row: np.ndarray
    position: np.ndarray
    conversational: np.ndarray
    problems: list[RowProblem]


def columns_of_part(path, part: FilePart, fields: Fields) -> Columns:
    return columns_of(path, part_rows(path, part, fields), fields)


def columns_of(path, rows, fields: Fields) -> Columns:
    """rows: position and value of each, as of `part_rows`."""
    counts, numbers, positions, conversational, problems = [], [], [], [], []
    lengths, blank, prompt_hash, text_hashes, truncated, sources = [], [], [], [], [], []
    scores = {name: [] for name in fields.scores or ()}
    codes: dict[str | None, int] = {None: -1}
    number = 0
    for number, (position, value) in enumerate(rows, start=1):
        if value is None:
            continue
        try:
            row = valid_row(value, fields)
            prompt_digest, *digests = _digests(row)
        except ValueError as error:
            problems.append(RowProblem(path, number, str(error)))
            continue
        numbers.append(number)
        positions.append(position)
        prompt_hash.append(prompt_digest)
        text_hashes += digests
        counts.append(len(row.responses))
        conversational.append(not isinstance(row.prompt, str))
        for name, values in row.scores.items():
            scores[name] += values
        plain = [_plain(text) for text in row.responses] if conversational[-1] else row.responses
        lengths += map(len, plain) if row.lengths is None else row.lengths
        blank += [not text or text.isspace() for text in plain]
        truncated.append(row.truncated)
        sources.append(row.sources and [codes.setdefault(name, len(codes) - 1) for name in row.sources])
    del codes[None]
    return Columns(
        rows=number,
        counts=np.array(counts, np.int64),
        scores={name: np.array(values, np.float64) for name, values in scores.items()},
        lengths=np.array(lengths, np.int32),
        text_hash=_uint64(b"".join(text_hashes)),
        blank=np.array(blank, bool),
        truncated=_where_said(truncated, counts, False, bool),
        sources=_where_said(sources, counts, -1, np.int32),
        source_names=list(codes),
        prompt_hash=_uint64(b"".join(prompt_hash)),
        row=np.array(numbers, np.int64),
        position=np.array(positions, np.int64),
        conversational=np.array(conversational, bool),
        problems=problems,
    )


def joined_columns(path, parts: Iterable[Columns], fields: Fields, stamp) -> Samples:
    """The columns of all parts, which come in order."""
    names = ("counts", "lengths", "text_hash", "blank", "truncated", "sources", "prompt_hash", "row", "position")
    gathered = {name: [] for name in (*names, "conversational")}
    scores = {name: [] for name in fields.scores or ()}
    rows, problems, codes, said = 0, [], {}, set()
    for part in parts:
        columns = part._asdict()
        for name, unknown, dtype in (("truncated", False, bool), ("sources", -1, np.int32)):
            if columns[name] is None:
                columns[name] = np.full(len(part.lengths), unknown, dtype)
            else:
                said.add(name)
        # one code more, for the unknown source -1
        code = [*(codes.setdefault(name, len(codes)) for name in part.source_names), -1]
        columns["sources"] = np.array(code, np.int32)[columns["sources"]]
        columns["row"] += rows
        problems += [replace(problem, row=problem.row + rows) for problem in part.problems]
        rows += part.rows
        for name, arrays in gathered.items():
            arrays.append(columns[name])
        for name, arrays in scores.items():
            arrays.append(part.scores[name])
    # for the types, of a file without rows too
    empty = columns_of(path, [], fields)._asdict() | {"truncated": np.empty(0, bool), "sources": np.empty(0, np.int32)}
    # what is joined is let go
    columns = {name: np.concatenate([empty[name], *gathered.pop(name)]) for name in list(gathered)}
    counts = columns.pop("counts")
    # by name, so that codes do not depend on the order of the responses
    names = sorted(codes)
    code = {name: k for k, name in enumerate(names)}
    columns["sources"] = np.array([*map(code.get, codes), -1], np.int32)[columns["sources"]]
    return Samples(
        path=path,
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        scores={name: np.concatenate([np.empty(0), *scores.pop(name)]) for name in list(scores)},
        source_names=names,
        problems=problems,
        fields=fields,
        stamp=stamp,
        **columns | {name: None for name in ("truncated", "sources") if name not in said},
    )


def text_hash(texts: list[Text]) -> np.ndarray:
    """uint64 [texts]: XXH3 of the UTF-8 of a string, or of the JSON of a conversation."""
    return _uint64(b"".join(map(_digest, texts)))


def _digests(row: Row) -> list[bytes]:
    """Of the prompt, then of every response."""
    try:
        return list(map(_digest, [row.prompt, *row.responses]))
    except (UnicodeEncodeError, orjson.JSONEncodeError):
        check_unicode(row)
        raise


def _digest(text: Text) -> bytes:
    return xxh3_64_digest(text.encode() if isinstance(text, str) else orjson.dumps(text))


def hashes_of_texts(row) -> list[bytes]:
    """The digest of every text of a row, as a string, as a message and as a part of its conversation."""
    found = []
    for value in row.values() if isinstance(row, dict) else [row]:
        values = value if isinstance(value, list) else [value]
        texts = [text for text in values if isinstance(text, str)]
        messages = [{key: m.get(key) for key in ("role", "content")} for m in values if isinstance(m, dict)]
        if messages and len(messages) == len(values) and all(isinstance(m["content"], str) for m in messages):
            texts += [message["content"] for message in messages]
            found.append(xxh3_64_digest(orjson.dumps(messages)))
        for text in texts:
            found.append(xxh3_64_digest(text.encode(errors="surrogatepass")))
            for role in ("user", "assistant"):
                with contextlib.suppress(orjson.JSONEncodeError):  # a lone surrogate, which no sample has either
                    found.append(xxh3_64_digest(orjson.dumps([{"role": role, "content": text}])))
    return found


def _uint64(digests: bytes) -> np.ndarray:
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def _plain(conversation) -> str:
    return "".join([message["content"] for message in conversation])


def _where_said(values, counts, unknown, dtype) -> np.ndarray | None:
    """values: of every row, one for each response or None; None where no row says."""
    if all(said is None for said in values):
        return None
    pools = [[unknown] * count if said is None else said for said, count in zip(values, counts, strict=True)]
    return np.array([value for pool in pools for value in pool], dtype)


# ---- the texts


AGAIN = Fields(scores=())


class Known(NamedTuple):
    """What pass 1 found out about some prompts of a part."""

    position: np.ndarray  # [prompts] ascending
    counts: np.ndarray  # [prompts] responses
    prompt_hash: np.ndarray  # [prompts]


def parts_again(samples: Samples, prompts: np.ndarray) -> Iterator[tuple[FilePart, slice, Known]]:
    """The parts that hold some of these ascending prompts, and which. Raises InputError when the file has changed."""
    check_unchanged(samples)
    known = Known(samples.position[prompts], np.diff(samples.offsets)[prompts], samples.prompt_hash[prompts])
    for part in parts(samples.path, AGAIN):
        here = slice(*np.searchsorted(known.position, [part.begin, part.end]).tolist())
        if here.start < here.stop:
            yield part, here, Known(*(column[here] for column in known))
    check_unchanged(samples)


def same_rows(path, part: FilePart, known: Known) -> list[Row]:
    """The rows of these prompts once more, without scores. Raises InputError when they are others."""
    try:
        rows = [valid_row(value, AGAIN) for _, value in part_rows(path, part, AGAIN, known.position.tolist())]
    except ValueError:
        raise changed_error(path) from None
    same = [len(row.responses) for row in rows] == known.counts.tolist()
    if not same or (text_hash([row.prompt for row in rows]) != known.prompt_hash).any():
        raise changed_error(path)
    return rows


def changed_error(path) -> InputError:
    return InputError(f"{path} changed after its scores were read")


def check_unchanged(samples: Samples) -> None:
    if stamp(samples.path) != samples.stamp:
        raise changed_error(samples.path)
