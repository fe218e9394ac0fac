"""The rows of a file, and their columns: what `read_samples` and `write_pairs` read with.

orjson parses, XXH3 hashes. A part of a file is read on its own, so that several processes can share it.
"""

import gzip
import json
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from fastpref.curate.rows import Fields, Row, Text, check_unicode, parse_row, score_fields, top_fields
from fastpref.curate.samples import InputError, RowProblem, Samples

try:
    import orjson
    from xxhash import xxh3_64_digest
except ImportError as error:
    raise InputError(f'reading samples needs {error.name}: pip install "fastpref[cli]"') from error


def stamp(path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns


def first_score_fields(path) -> tuple[str, ...] | None:
    for _, _, row in numbered_rows(path, Fields()):
        try:
            if (found := score_fields(row)) is not None:
                return found
        except ValueError:  # malformed: the pass over all rows says so
            continue
    return None


def rows_again(samples: Samples, prompts: np.ndarray) -> Iterator[Row]:
    """The rows of these prompts (strictly increasing), without scores. Raises InputError when the file has changed."""
    changed = InputError(f"{samples.path} changed after its scores were read")
    if stamp(samples.path) != samples.stamp:
        raise changed
    fields = Fields(scores=())
    wanted = iter(prompts)
    prompt = next(wanted, None)
    for number, _, row in numbered_rows(samples.path, fields):
        if prompt is None:
            break
        if number < samples.row[prompt]:
            continue
        try:
            parsed = valid_row(row, fields)
        except ValueError:
            raise changed from None
        if number > samples.row[prompt] or _hashes([parsed.prompt])[0] != samples.prompt_hash[prompt]:
            raise changed
        yield parsed
        prompt = next(wanted, None)
    if prompt is not None:
        raise changed


class _Columns(NamedTuple):
    """A part of the rows, as the fields of Samples; sources are numbered within the part."""

    counts: np.ndarray
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


def columns_of(path, rows, fields) -> _Columns:
    counts, lengths, blank, truncated, sources, prompt_hash, text_hash = [], [], [], [], [], [], []
    numbers, positions, conversational, problems = [], [], [], []
    scores = {name: [] for name in fields.scores or ()}
    codes: dict[str | None, int] = {None: -1}
    for number, position, row in rows:
        try:
            parsed = valid_row(row, fields)
            plain = [_plain(text) for text in parsed.responses]
            try:
                hashes = _digests([parsed.prompt, *parsed.responses])
            except (UnicodeEncodeError, orjson.JSONEncodeError):
                check_unicode(parsed)
                raise
        except ValueError as error:
            problems.append(RowProblem(path, number, str(error)))
            continue
        prompt_hash.append(hashes[:8])
        text_hash.append(hashes[8:])
        count = len(plain)
        counts.append(count)
        for name, values in parsed.scores.items():
            scores[name] += values
        lengths += map(len, plain) if parsed.lengths is None else parsed.lengths
        blank += [not text or text.isspace() for text in plain]
        truncated.append((count, parsed.truncated))
        sources.append((count, parsed.sources and [codes.setdefault(name, len(codes) - 1) for name in parsed.sources]))
        numbers.append(number)
        positions.append(position)
        conversational.append(not isinstance(parsed.prompt, str))
    del codes[None]
    return _Columns(
        np.array(counts, np.int64),
        {name: np.array(values, np.float64) for name, values in scores.items()},
        np.array(lengths, np.int32),
        np.frombuffer(b"".join(text_hash), ">u8").astype(np.uint64),
        np.array(blank, bool),
        _said(truncated, False, bool),
        _said(sources, -1, np.int32),
        list(codes),
        np.frombuffer(b"".join(prompt_hash), ">u8").astype(np.uint64),
        np.array(numbers, np.int64),
        np.array(positions, np.int64),
        np.array(conversational, bool),
        problems,
    )


def _said(values, unknown, dtype) -> np.ndarray | None:
    """values: (responses of the row, one value for each or None)."""
    if all(said is None for _, said in values):
        return None
    return np.array([x for count, said in values for x in ([unknown] * count if said is None else said)], dtype)


def joined(path, parts: list[_Columns], fields, stamp) -> Samples:
    names: dict[str, int] = {}
    for k, part in enumerate(parts):
        if part.sources is not None:
            # one more, for the unknown source -1
            codes = np.array([*(names.setdefault(name, len(names)) for name in part.source_names), -1], np.int32)
            parts[k] = part._replace(sources=codes[part.sources])

    def column(name, unknown=None):
        arrays = [getattr(part, name) for part in parts]
        if all(array is None for array in arrays):
            return None
        return np.concatenate(
            [
                np.full(len(part.lengths), unknown) if array is None else array
                for part, array in zip(parts, arrays, strict=True)
            ]
        )

    return Samples(
        path=path,
        offsets=np.concatenate([[0], np.cumsum(column("counts"))]).astype(np.int64),
        scores={name: np.concatenate([part.scores[name] for part in parts]) for name in fields.scores or ()},
        lengths=column("lengths"),
        text_hash=column("text_hash"),
        blank=column("blank"),
        truncated=column("truncated", False),
        sources=column("sources", np.int32(-1)),
        source_names=list(names),
        prompt_hash=column("prompt_hash"),
        row=column("row"),
        position=column("position"),
        conversational=column("conversational"),
        problems=[problem for part in parts for problem in part.problems],
        fields=fields,
        stamp=stamp,
    )


def _plain(text: Text) -> str:
    return text if isinstance(text, str) else "".join(message["content"] for message in text)


def _digests(texts: list[Text]) -> bytes:
    """8 bytes for each text: XXH3 of its UTF-8, of a conversation's JSON."""
    return b"".join([xxh3_64_digest(text.encode() if isinstance(text, str) else orjson.dumps(text)) for text in texts])


def _hashes(texts) -> np.ndarray:
    return np.frombuffer(_digests(texts), ">u8").astype(np.uint64)


# ---- the rows of a file


def numbered_rows(path, fields: Fields) -> Iterator[tuple[int, int, object]]:
    """Line or row from 1, byte at which it begins, and its value, a ValueError where there is none."""
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
        yield from _parquet_rows(path, fields) if magic == b"PAR1" else _json_rows(path, magic)
    except (OSError, EOFError) as error:  # gzip: EOFError for a cut file, BadGzipFile is an OSError
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _json_rows(path, magic) -> Iterator[tuple[int, int, object]]:
    opener = gzip.open if magic[:2] == b"\x1f\x8b" else open
    position = 0
    with opener(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            row = _json_row(line, number)
            if row is not None:
                yield number, position, row
            position += len(line)


def _json_row(line, number):
    """The value, the ValueError that says why there is none, or None for a blank line."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        line = line.strip()
    if not line:
        return None
    try:
        # What orjson refuses: NaN, and a byte-order mark (files from Windows start with one). It words reasons better.
        return json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return ValueError(f"not JSON: {error.msg} at column {error.colno}")
    except (RecursionError, ValueError) as error:
        return ValueError(f"not JSON: {error}")


def _parquet_rows(path, fields) -> Iterator[tuple[int, int, object]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f'{path} is a Parquet file, which needs pyarrow: pip install "fastpref[cli]"') from error
    number = 0
    try:
        file = parquet.ParquetFile(path)
        wanted = top_fields(fields)
        columns = [name for name in file.schema_arrow.names if name in wanted]
        for batch in file.iter_batches(batch_size=256, columns=columns):
            for row in _python_rows(batch):
                number += 1
                yield number, 0, row
    except pyarrow.ArrowException as error:
        raise InputError(f"cannot read {path} after row {number}: {error}".splitlines()[0]) from error


def _python_rows(batch) -> list:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [ValueError(f"not UTF-8 at byte {error.start} of a string")]
        return [row for k in range(batch.num_rows) for row in _python_rows(batch.slice(k, 1))]


def valid_row(row, fields) -> Row:
    if isinstance(row, ValueError):
        raise row
    return parse_row(row, fields)
