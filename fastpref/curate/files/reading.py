"""Files of preferences in parts: the rows of a part, their columns, and the rows once more for their texts.

A position grows from row to row through all files: the number of the file, and within it the byte at which a line
begins (unpacked), or the number of rows before it in Parquet and Arrow. Rows of CSV and of JSON arrays are made lines
of JSON, whose bytes count. orjson parses and XXH3 hashes.
"""

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fastpref.curate.files.containers import (
    OBJECT_ROWS,
    arrow_batches,
    arrow_names,
    check_unique,
    json_value,
    key_counts,
    open_parquet,
    python_rows,
    record_as_row,
    without_repeats,
)
from fastpref.curate.files.lines import LONGEST_ROW, csv_records, json_elements, line_blocks
from fastpref.curate.files.rows import (
    LARGEST_SCORE,
    Fields,
    Row,
    Tie,
    parse_row,
    plain_text,
    top_fields,
    without_bad_unicode,
)
from fastpref.curate.files.sources import Source, reading_errors, source_stamp
from fastpref.curate.files.table import RowProblem, Samples
from fastpref.curate.files.texts import UNENCODABLE, as_uint64, digests_of, prompt_hash
from fastpref.errors import InputError

try:
    import orjson
except ImportError as error:
    raise InputError(f'reading samples needs {error.name}: pip install "fastpref[cli]"') from error

PART = 1 << 23  # bytes of lines in a part
ROW_GROUP = 1 << 26  # bytes; a larger one, and some files are a single one, is more than a part
FILE = 1 << 44  # positions of one file


class FilePart(NamedTuple):
    """Some rows of one file."""

    begin: int  # positions within the file
    end: int
    done: int  # how far into the file it leads, in the units of `extent`
    lines: bytes | None = None  # of JSON; those of a plain file are read where they are needed
    row_group: int | None = None  # of a Parquet file
    table: bytes | None = None  # Arrow stream
    file: int = 0  # which of the files
    numbers: np.ndarray | None = None  # int64 [lines], the line at which each row of CSV begins
    errors: dict[int, str] | None = None  # by position, of records of CSV

    @property
    def base(self) -> int:
        """What is added to a position within the file."""
        return self.file * FILE


def stamp(sources: Sequence[Source]) -> tuple[int, int]:
    """Size in bytes and time of change in ns, the sums over all files: equal as long as none has changed."""
    sizes, times = zip(*map(source_stamp, sources), strict=True)
    return sum(sizes), sum(times)


def extent(source: Source) -> int:
    """Bytes, or rows of a Parquet file."""
    if source.container == "parquet":
        with reading_errors(source.name):
            return open_parquet(source).metadata.num_rows
    return os.path.getsize(source.path)


def parts(sources: Sequence[Source], fields: Fields | None) -> Iterator[FilePart]:
    """All files in order, cut at ends of lines or into row groups. fields: that are looked at; None: all."""
    before = 0
    for number, source in enumerate(sources):
        if source.container == "parquet":
            found = _parts_of_parquet(source, fields)
        elif source.container in ("arrow", "arrow-stream"):
            found = _parts_of_batches(
                source, arrow_batches(source, _wanted(source, fields), OBJECT_ROWS), 0, extent(source)
            )
        elif source.container == "csv":
            found = _parts_of_csv(source, fields)
        elif source.container == "json-array":
            found = _parts_of_lines(source, ((element, None, None) for element in json_elements(source)))
        elif source.seekable:
            found = _parts_of_plain(source)
        else:
            found = (
                FilePart(block.begin, block.begin + len(block.lines), block.done, block.lines)
                for block in line_blocks(source, PART)
            )
        for part in found:
            yield part._replace(file=number, done=before + part.done)
        before += extent(source)


def part_rows(source: Source, part: FilePart, fields: Fields | None, only=None) -> Iterator[tuple[int, object]]:
    """Position and value of the rows of a part: None for a blank line, a ValueError for a row that cannot be read.

    only: ascending positions within the file, of the rows that are wanted.
    """
    if part.row_group is not None or part.table is not None:
        yield from _arrow_rows(source, part, fields, only)
        return
    lines = part.lines
    if lines is None:
        with reading_errors(source.name), open(source.path, "rb") as file:
            file.seek(part.begin)
            lines = file.read(part.end - part.begin)
    errors = part.errors or {}
    if only is None:
        position, split = part.begin, io.BytesIO(lines).readlines()
        for line, count in zip(split, key_counts(lines, split), strict=True):
            value = ValueError(errors[position]) if position in errors else json_value(line, position == 0)
            yield position, without_repeats(line, value, count)
            position += len(line)
        return
    file = io.BytesIO(lines)
    for position in only:
        file.seek(position - part.begin)
        yield position, json_value(file.readline(), position == 0)


def placed_rows(sources: Sequence[Source], fields: Fields) -> Iterator[tuple[str, int, object]]:
    """Name of the file, line or row from 1, and value of every row but blank lines."""
    number, file = 0, 0
    for part in parts(sources, fields):
        number, file = number if part.file == file else 0, part.file
        for k, (_, row) in enumerate(part_rows(sources[file], part, fields)):
            number += 1
            if row is not None:
                yield sources[file].name, number if part.numbers is None else int(part.numbers[k]), row


def valid_row(row, fields: Fields) -> Row:
    """The row, parsed. Raises ValueError with the reason where it is malformed or could not be read."""
    if isinstance(row, ValueError):
        raise row
    return parse_row(row, fields)


def _wanted(source: Source, fields: Fields | None) -> list[str] | None:
    """The columns to read of an Arrow file; each must be there once."""
    names = arrow_names(source)
    wanted = None if fields is None else [name for name in names if name in top_fields(fields)]
    check_unique(source, names, names if wanted is None else wanted)
    return wanted


def _parts_of_plain(source: Source) -> Iterator[FilePart]:
    with reading_errors(source.name), open(source.path, "rb") as file:
        size, end = os.path.getsize(source.path), 0
        while end < size:
            begin = end
            file.seek(begin + PART)
            if len(file.readline(LONGEST_ROW)) == LONGEST_ROW:
                raise InputError(f"{source.name}: a line of more than {LONGEST_ROW >> 20} MiB near byte {begin + PART}")
            end = min(file.tell(), size)
            yield FilePart(begin, end, end)


def _parts_of_lines(source: Source, rows: Iterable[tuple[bytes, int | None, str | None]]) -> Iterator[FilePart]:
    """Of lines of JSON without their line feeds, the line of the file of each, and what is wrong with it."""
    total = extent(source)

    def part():
        found = None if numbers[:1] in ([], [None]) else np.array(numbers, np.int64)
        return FilePart(begin, begin + size, total, b"\n".join([*lines, b""]), numbers=found, errors=errors or None)

    begin, size, lines, numbers, errors = 0, 0, [], [], {}
    for line, number, error in rows:
        if error is not None:
            errors[begin + size] = error
        lines.append(line)
        numbers.append(number)
        size += len(line) + 1
        if size >= PART:
            yield part()
            begin, size, lines, numbers, errors = begin + size, 0, [], [], {}
    if lines:
        yield part()


def _parts_of_csv(source: Source, fields: Fields | None) -> Iterator[FilePart]:
    records = csv_records(source)
    _, header = next(records, (1, []))
    if isinstance(header, ValueError):
        raise InputError(f"{source.name}:1: {header}")
    check_unique(source, header, [name for name in header if name and (fields is None or name in top_fields(fields))])

    def rows():
        for number, record in records:
            if isinstance(record, ValueError):
                yield b"null", number, str(record)
            else:
                yield orjson.dumps(record_as_row(header, record)), number, None

    yield from _parts_of_lines(source, rows())


def _parts_of_parquet(source: Source, fields: Fields | None) -> Iterator[FilePart]:
    columns = _wanted(source, fields)
    with reading_errors(source.name):
        file = open_parquet(source)
        groups = [file.metadata.row_group(k) for k in range(file.metadata.num_row_groups)]
        sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    end = 0
    for group, (rows, size) in enumerate(sizes):
        begin, end = end, end + rows
        if size <= ROW_GROUP:
            yield FilePart(begin, end, end, row_group=group)
        else:
            yield from _parts_of_batches(source, _batches_of_group(source, group, columns), begin, None)


def _batches_of_group(source: Source, group: int, columns) -> Iterator:
    with reading_errors(source.name):
        yield from open_parquet(source).iter_batches(OBJECT_ROWS, row_groups=[group], columns=columns)


def _parts_of_batches(source: Source, found: Iterable, begin: int, total: int | None) -> Iterator[FilePart]:
    """total: the extent; None: the rows so far are how far it leads."""
    import pyarrow

    def part():
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, batches[0].schema) as stream:
            for batch in batches:
                stream.write_batch(batch)
        return FilePart(begin, end, end if total is None else total, table=sink.getvalue().to_pybytes())

    batches, end, size = [], begin, 0
    for batch in found:
        batches.append(batch)
        end += batch.num_rows
        size += batch.nbytes
        if size >= PART:
            with reading_errors(source.name, begin + 1):
                whole = part()
            yield whole
            batches, begin, size = [], end, 0
    if batches:
        with reading_errors(source.name, begin + 1):
            whole = part()
        yield whole


def _arrow_rows(source: Source, part: FilePart, fields, only) -> Iterator[tuple[int, object]]:
    import pyarrow

    position = part.begin
    if part.table is not None:
        batches = pyarrow.ipc.open_stream(part.table)
    else:
        batches = _batches_of_group(source, part.row_group, _wanted(source, fields))
    for batch in batches:
        positions = np.arange(position, position + batch.num_rows)
        position += batch.num_rows
        with reading_errors(source.name, int(position) - batch.num_rows + 1):  # the first row of the batch
            if only is not None:
                positions = positions[np.isin(positions, only)]
                batch = batch.take(pyarrow.array(positions - position + batch.num_rows))
            rows = python_rows(batch)
        yield from zip(positions.tolist(), rows, strict=True)


# ---- the columns of a part


class Columns(NamedTuple):
    """As in Samples, of the rows of a part; sources are numbered within it, and rows from 1."""

    rows: int  # of the part, with blank lines and malformed rows; 0 where rows are numbered through the whole file
    read: int  # without blank lines
    counts: np.ndarray  # int64 [prompts], responses
    scores: dict[str, np.ndarray]
    beside: dict[str, np.ndarray]
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
    strength: np.ndarray  # float64 [prompts], NaN where a row does not say
    problems: list[RowProblem]
    bad_responses: list[RowProblem]
    left_out: dict[str, int]  # by reason: rows and scores that are not as others and no problems
    file: int = 0


def columns_of_part(source: Source, part: FilePart, fields: Fields) -> Columns:
    """The columns of the rows of a part."""
    fields = fields._replace(cells=source.delimiter)
    columns = columns_of(source.name, part_rows(source, part, fields), fields, part.numbers)
    return columns._replace(position=columns.position + part.base, file=part.file)


def columns_of(path, rows, fields: Fields, line_numbers: np.ndarray | None = None) -> Columns:
    """rows: position and value of each, as of `part_rows`; line_numbers: of each, where they are known."""
    counts, numbers, positions, conversational, problems = [], [], [], [], []
    lengths, blank, prompt_hash, text_hashes, truncated, sources = [], [], [], [], [], []
    strength, bad_responses, left_out = [], [], {}
    scores, beside = ({name: [] for name in names} for names in (fields.scores or (), fields.beside))
    codes: dict[str | None, int] = {None: -1}
    number = count = read = 0
    for count, (position, value) in enumerate(rows, start=1):
        if value is None:
            continue
        read += 1
        number = count if line_numbers is None else int(line_numbers[count - 1])
        try:
            row, digests = _row_and_digests(value, fields)
        except Tie as error:
            left_out[str(error)] = left_out.get(str(error), 0) + 1
            continue
        except ValueError as error:
            problems.append(RowProblem(path, number, str(error)))
            continue
        bad_responses += [RowProblem(path, number, reason) for reason in row.bad.values()]
        numbers.append(number)
        positions.append(position)
        prompt_hash.append(digests[0])
        text_hashes += digests[1:]
        counts.append(len(row.responses))
        conversational.append(not isinstance(row.prompt, str))
        strength.append(np.nan if row.strength is None else row.strength)
        for name, values in row.scores.items():
            scores[name] += values
        for name, values in row.beside.items():
            beside[name] += values
        plain = [plain_text(text) for text in row.responses] if conversational[-1] else row.responses
        lengths += map(len, plain) if row.lengths is None else row.lengths
        blank += [not text or text.isspace() for text in plain]
        truncated.append(row.truncated)
        sources.append(row.sources and [codes.setdefault(name, len(codes) - 1) for name in row.sources])
    del codes[None]
    return Columns(
        rows=count if line_numbers is None else 0,
        read=read,
        counts=np.array(counts, np.int64),
        scores={name: _known(name, np.array(values, np.float64), fields, left_out) for name, values in scores.items()},
        beside={name: np.array(values, np.float64) for name, values in beside.items()},
        lengths=np.array(lengths, np.int32),
        text_hash=as_uint64(b"".join(text_hashes)),
        blank=np.array(blank, bool),
        truncated=_where_said(truncated, counts, False, bool),
        sources=_where_said(sources, counts, -1, np.int32),
        source_names=list(codes),
        prompt_hash=as_uint64(b"".join(prompt_hash)),
        row=np.array(numbers, np.int64),
        position=np.array(positions, np.int64),
        conversational=np.array(conversational, bool),
        strength=np.array(strength, np.float64),
        problems=problems,
        bad_responses=bad_responses,
        left_out=left_out,
    )


def _row_and_digests(value, fields: Fields) -> tuple[Row, list[bytes]]:
    row = valid_row(value, fields)
    try:
        return row, digests_of(row)
    except UNENCODABLE:
        row = without_bad_unicode(row, fields)
    try:
        return row, digests_of(row)
    except UNENCODABLE as error:
        raise ValueError(f"a column beside the prompt holds what is no JSON: {error}") from None


def _known(name: str, scores: np.ndarray, fields: Fields, left_out: dict[str, int]) -> np.ndarray:
    """With NaN for numbers that stand for none, which are counted."""
    for what, none in (
        (f"{name} of a size of {LARGEST_SCORE:g} or more", np.abs(scores) >= LARGEST_SCORE),
        (f"{name} declared as missing", np.isin(scores, fields.missing)),
    ):
        if count := int(none.sum()):
            left_out[what] = left_out.get(what, 0) + count
            scores = np.where(none, np.nan, scores)
    return scores


def joined_columns(path, parts: Iterable[Columns], fields: Fields, **known) -> Samples:
    """The columns of all parts, which come in order. known: what Samples has beside them."""
    names = ("counts", "lengths", "text_hash", "blank", "truncated", "sources", "prompt_hash", "row", "position")
    gathered = {name: [] for name in (*names, "conversational", "strength")}
    tables = {"scores": {name: [] for name in fields.scores or ()}, "beside": {name: [] for name in fields.beside}}
    rows, read, file, codes, said, left_out = 0, 0, 0, {}, set(), {}
    problems = {"problems": [], "bad_responses": []}
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
        rows, file = rows if part.file == file else 0, part.file
        columns["row"] = columns["row"] + rows
        for name, found in problems.items():
            found += [replace(problem, row=problem.row + rows) for problem in columns[name]]
        for reason, count in part.left_out.items():
            left_out[reason] = left_out.get(reason, 0) + count
        rows += part.rows
        read += part.read
        for name, arrays in gathered.items():
            arrays.append(columns[name])
        for table, found in tables.items():
            for name, arrays in found.items():
                arrays.append(columns[table][name])
    # for the types, of a file without rows too
    empty = columns_of(path, [], fields)._asdict() | {"truncated": np.empty(0, bool), "sources": np.empty(0, np.int32)}
    # what is joined is let go
    columns = {name: np.concatenate([empty[name], *gathered.pop(name)]) for name in list(gathered)}
    counts = columns.pop("counts")
    if np.isnan(columns["strength"]).all():
        columns["strength"] = None
    # by name, so that codes do not depend on the order of the responses
    names = sorted(codes)
    code = {name: k for k, name in enumerate(names)}
    columns["sources"] = np.array([*map(code.get, codes), -1], np.int32)[columns["sources"]]
    found = {
        "path": path,
        "offsets": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        **{
            table: {name: np.concatenate([np.empty(0), *found.pop(name)]) for name in list(found)}
            for table, found in tables.items()
        },
        "source_names": names,
        "fields": fields,
        "rows": read,
        "counts": left_out,
        **problems,
        **columns,
    }
    return Samples(**found | {name: None for name in ("truncated", "sources") if name not in said} | known)


def _where_said(values, counts, unknown, dtype) -> np.ndarray | None:
    """values: of every row, one for each response or None; None where no row says."""
    if all(said is None for said in values):
        return None
    pools = [[unknown] * count if said is None else said for said, count in zip(values, counts, strict=True)]
    return np.array([value for pool in pools for value in pool], dtype)


# ---- the texts


class Known(NamedTuple):
    """What pass 1 found out about some prompts of a part."""

    position: np.ndarray  # [prompts] ascending, within the file
    counts: np.ndarray  # [prompts] responses
    prompt_hash: np.ndarray  # [prompts]


def parts_again(samples: Samples, prompts: np.ndarray) -> Iterator[tuple[FilePart, slice, Known]]:
    """The parts that hold some of these ascending prompts, and which. Raises InputError when the file has changed."""
    check_unchanged(samples)
    known = Known(samples.position[prompts], np.diff(samples.offsets)[prompts], samples.prompt_hash[prompts])
    for part in parts(samples.files, fields_again(samples.fields)):
        here = slice(*np.searchsorted(known.position, [part.base + part.begin, part.base + part.end]).tolist())
        if here.start < here.stop:
            found = Known(*(column[here] for column in known))
            yield part, here, found._replace(position=found.position - part.base)
    check_unchanged(samples)


def fields_again(fields: Fields) -> Fields:
    """What pass 2 reads: all but the scores."""
    return fields._replace(scores=(), source=None, length=None)


def same_rows(source: Source, part: FilePart, known: Known, fields: Fields) -> list[Row]:
    """The rows of these prompts once more, without scores. Raises InputError when they are others."""
    fields = fields_again(fields)._replace(cells=source.delimiter)
    try:
        rows = [valid_row(value, fields) for _, value in part_rows(source, part, fields, known.position.tolist())]
        same = [len(row.responses) for row in rows] == known.counts.tolist()
        same = same and not (prompt_hash(rows) != known.prompt_hash).any()
    except ValueError:
        same = False
    if not same:
        raise changed_error(source.name)
    return rows


def changed_error(path) -> InputError:
    """For a file that is not what it was in pass 1."""
    return InputError(f"{path} changed after its scores were read")


def check_unchanged(samples: Samples) -> None:
    """Raises InputError where a file of the samples has changed, by its size or time."""
    if stamp(samples.inputs) != samples.stamp:
        raise changed_error(samples.path)
