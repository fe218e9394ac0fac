"""Tables from any source: the columns that are asked for, as Arrow, and the line or row of each entry.

Columns of CSV are strings, with null for an empty field; those of JSON have the type of their values; those of Parquet
and Arrow are as the file has them, but for dictionaries, views and extensions, which are made plain. Columns that are
not asked for are not parsed, so that nothing in them can go wrong.
"""

import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fastpref.curate.files.lines import BOM, csv_records, json_elements, line_blocks
from fastpref.curate.files.sources import Source, reading_errors
from fastpref.errors import InputError

try:
    import orjson
    import pyarrow
    import pyarrow.compute
    import pyarrow.ipc
    import pyarrow.parquet
except ImportError as error:
    raise InputError(f'tables need {error.name}: pip install "fastpref[cli]"') from error

ROWS = 1 << 14  # of a batch that is made of Python objects
BUFFER = 1 << 20  # bytes of each Parquet column read at a time
OBJECT_ROWS = 256  # of a batch that is made into Python objects
MOST_HEAD_ROWS = 4096
HEAD_ROWS = 256  # that are looked at before the others; of JSON Lines those of the first block
MOST_BLANKS = 4  # between a key and its colon that are looked through

_IS_BLANK = np.isin(np.arange(256), [*b" \t\r"])


class Batch(NamedTuple):
    """Some rows of a source."""

    table: pyarrow.RecordBatch
    numbers: (
        np.ndarray
    )  # int64 [rows]: the line at which each begins; of Parquet, Arrow and JSON arrays its row; from 1


class Table(NamedTuple):
    """All rows of some sources."""

    columns: dict[str, pyarrow.ChunkedArray]
    sources: list[Source]
    source: np.ndarray  # int32 [rows], index into sources
    numbers: np.ndarray  # int64 [rows], as of Batch

    def place(self, row: int) -> str:
        """Returns "file:line" of a row, counted from 0."""
        return f"{self.sources[self.source[row]].name}:{self.numbers[row]}"


def column_names(source: Source) -> list[str]:
    """Returns the columns of a source, in order; of JSON the keys of its first rows, as far as they are objects.

    Raises:
        InputError: The source cannot be read.
    """
    if source.container == "csv":
        _, header = next(csv_records(source), (1, []))
        if isinstance(header, ValueError):
            raise InputError(f"{source.name}:1: {header}")
        return header
    if source.container in ("json-lines", "json-array"):
        return list(dict.fromkeys(name for row in first_rows(source) for name in row))
    return arrow_names(source)


def first_rows(source: Source) -> list[dict]:
    """Returns the first rows that are objects; in JSON Lines those of a first block, of which a column may be in few.

    Raises:
        InputError: The source cannot be read.
    """
    if source.container == "json-lines":
        block = next(line_blocks(source), None)
        lines = [] if block is None else block.lines.split(b"\n")
        values = [json_value(line, k == 0) for k, line in enumerate(lines[:MOST_HEAD_ROWS])]
    else:
        once = None  # columns that are there twice must not be asked for
        if source.container != "json-array":
            once = [name for name, count in Counter(column_names(source)).items() if count == 1]
        values = [row for _, row in itertools.islice(numbered_rows(source, once), HEAD_ROWS)]
    return [row for row in values if isinstance(row, dict)]


def read_batches(
    source: Source, columns: Sequence[str] | None = None, absent: frozenset[str] = frozenset()
) -> Iterator[Batch]:
    """Reads the columns of a source in order.

    Args:
        source: From `find_sources`.
        columns: Names, all of which the batches have; in JSON a key that a row lacks is null. None: all.
        absent: Further columns that would be wanted, and that `column_names` does not have: a later row of JSON must
            not have them either.

    Raises:
        InputError: The source cannot be read, has no such column or has it twice, or a row is malformed; one line with
            the file, and the line or row where it is known.
    """
    if columns is None or source.container not in ("json-lines", "json-array"):
        known = column_names(source)
        columns = list(known) if columns is None else list(columns)
        if missing := [name for name in columns if name not in known]:
            raise InputError(f"{source.name} has no column {', '.join(missing)}, found {', '.join(known)}")
        check_unique(source, known, columns)
    if source.container == "csv":
        return _csv_batches(source, columns)
    if source.container in ("json-lines", "json-array"):
        return _json_batches(source, list(columns), absent)
    return _arrow_batches(source, columns)


def read_table(
    sources: Sequence[Source], columns: Sequence[str] | None = None, absent: frozenset[str] = frozenset()
) -> Table:
    """Reads the columns of all sources, one below the other. Arguments and errors are those of `read_batches`.

    Columns of numbers that are integers in one part and not in another become float64.

    Raises:
        InputError: As `read_batches`, or a column is of types that do not go together.
    """
    tables, numbers, counts = [], [], []
    for source in sources:
        counts.append(0)
        for batch in read_batches(source, columns, absent):
            tables.append(pyarrow.Table.from_batches([batch.table]))
            numbers.append(batch.numbers)
            counts[-1] += len(batch.numbers)
    names = list(columns) if columns is not None else list(dict.fromkeys(n for t in tables for n in t.column_names))
    for name in names:
        found = dict.fromkeys(_family(table.schema.field(name).type) for table in tables if name in table.column_names)
        found.pop("null", None)
        if len(found) > 1:
            raise InputError(f"{sources[0].name}: the column {name} holds {' and '.join(found)}: must be of one kind")
    if tables:
        joined = pyarrow.concat_tables(tables, promote_options="permissive")
    else:
        joined = pyarrow.table({name: pyarrow.array([], pyarrow.null()) for name in names})
    return Table(
        {name: joined[name] for name in names},
        list(sources),
        np.repeat(np.arange(len(sources), dtype=np.int32), counts),
        np.concatenate([np.empty(0, np.int64), *numbers]),
    )


def as_numbers(table: Table, name: str) -> np.ndarray:
    """Returns a column as float64 [rows], NaN for null, an empty field and NaN itself; true is 1 and false 0.

    A field of CSV with ';' may have a decimal comma.

    Raises:
        InputError: An entry is no number, with its file and line.
    """
    column = table.columns[name]
    kind = column.type
    if pyarrow.types.is_boolean(kind):
        column = column.cast(pyarrow.int8())
    elif pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        return _parsed_numbers(table, name)
    elif _family(kind) not in ("numbers", "null"):
        raise InputError(f"column {name} of {table.sources[0].name} must hold numbers, got {kind}")
    return column.cast(pyarrow.float64(), safe=False).to_numpy()


def check_unique(source: Source, names: Sequence[str], wanted: Sequence[str]) -> None:
    """Raises InputError for wanted columns that a source has more than once: it is not known which one is meant."""
    if repeated := [name for name in dict.fromkeys(wanted) if list(names).count(name) > 1]:
        raise InputError(f"{source.name} has more than one column {', '.join(repeated)}")


def numbered_rows(source: Source, columns: Sequence[str] | None = None) -> Iterator[tuple[int, object]]:
    """Reads the rows of a source in order: the line or row as of Batch, and a dict, or a ValueError with the reason.

    Args:
        source: From `find_sources`.
        columns: Those that are wanted, each of which must be there once; CSV and JSON give the others, too. None: all.

    Raises:
        InputError: The source cannot be read.
    """
    if source.container in ("json-lines", "json-array"):
        yield from json_rows(source)
    elif source.container == "csv":
        records = csv_records(source)
        header = next(records, (1, []))[1]
        if isinstance(header, ValueError):
            raise InputError(f"{source.name}:1: {header}")
        check_unique(source, header, [name for name in header if name and (columns is None or name in columns)])
        for number, record in records:
            yield number, record if isinstance(record, ValueError) else record_as_row(header, record)
    else:
        names = arrow_names(source)
        wanted = None if columns is None else [name for name in names if name in columns]
        check_unique(source, names, names if wanted is None else wanted)
        number = 0
        for batch in arrow_batches(source, wanted, OBJECT_ROWS):
            for row in python_rows(batch):
                number += 1
                yield number, row


def record_as_row(header: list[str], record: list[str]) -> dict[str, str | None]:
    """Returns a record of CSV as an object; an empty field is null."""
    return {name: text or None for name, text in zip(header, record, strict=True)}


def python_rows(batch: pyarrow.RecordBatch) -> list:
    """Returns the rows of a batch as Python has them; a ValueError where a string is not UTF-8."""
    try:
        return batch.to_pylist()
    except (UnicodeDecodeError, pyarrow.ArrowException, OverflowError, ValueError) as error:
        if batch.num_rows == 1:
            if isinstance(error, UnicodeDecodeError):
                return [ValueError(f"not UTF-8 at byte {error.start} of a string")]
            return [ValueError(" ".join(str(error).split()))]
        return [row for k in range(batch.num_rows) for row in python_rows(batch.slice(k, 1))]


# ---- rows of JSON


def json_rows(source: Source) -> Iterator[tuple[int, object]]:
    """Reads JSON Lines or a JSON array: the line or element, from 1, and its value; a ValueError where it is no JSON.

    Blank lines are no rows. A null is a ValueError, for a row must be an object.
    """
    number = 0
    if source.container == "json-array":
        elements = json_elements(source)
        while text := b"".join([element + b"\n" for element in itertools.islice(elements, OBJECT_ROWS)]):
            for row in _values_of_lines(text, False):
                number += 1
                yield number, row
        return
    for block in line_blocks(source):
        for row in _values_of_lines(block.lines, block.begin == 0):
            number += 1
            if row is not None:
                yield number, row


def _values_of_lines(text: bytes, first: bool) -> Iterator:
    lines = io.BytesIO(text).readlines()
    for k, (line, count) in enumerate(zip(lines, key_counts(text, lines), strict=True)):
        yield without_repeats(line, json_value(line, first and k == 0), count)


def key_counts(text: bytes, lines: Sequence[bytes]) -> list[int]:
    """Returns how many keys the objects of each line of a text hold, a repeated one as often as it stands there.

    Counted are the quotes before colons, but for those that are escaped. It is too many where a string begins with a
    colon, and never too few.
    """
    characters = np.frombuffer(text, np.uint8)
    at = np.flatnonzero(characters == ord(":")) - 1
    for _ in range(MOST_BLANKS):
        if not (blank := _IS_BLANK[characters[at]]).any():
            break
        at = at - blank
    at = at[at >= 2]  # before the first key there is a brace and a quote
    at = at[(characters[at] == ord('"')) | _IS_BLANK[characters[at]]]
    escaped = (characters[at - 1] == ord("\\")) & (characters[at - 2] != ord("\\"))
    ends = np.cumsum(np.fromiter(map(len, lines), np.int64, len(lines)))
    return np.diff(np.searchsorted(at[~escaped], ends), prepend=0).tolist()


def without_repeats(line: bytes, value, count: int):
    """Returns the value of a line; a ValueError where one of its objects holds a key twice, of which the last one won.

    count: of the line, from `key_counts`. A value with as many keys has lost none; other lines are parsed once more.
    """
    if type(value) is not dict or count == len(value):
        return value
    if count == _keys_of_messages(value) or count == _keys_within(value):
        return value
    repeated = []

    def keep(pairs):
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            repeated.extend(name for name, often in Counter(names).items() if often > 1)

    try:
        json.loads(line.decode("utf-8-sig"), object_pairs_hook=keep, parse_int=str)
    except RecursionError as error:
        return ValueError(f"not JSON: {error}")
    return ValueError(f"the key {repeated[0]!r} stands there more than once") if repeated else value


def _keys_of_messages(value: dict) -> int:
    """How many keys it and the objects in its lists have, but for what these hold: most rows end there."""
    lists = [part for part in value.values() if type(part) is list]
    return len(value) + sum([len(item) for part in lists for item in part if type(item) is dict])


def _keys_within(value: dict) -> int:
    """How many keys it and the objects in it have."""
    found, waiting = 0, [value]
    for part in waiting:  # which grows
        if type(part) is dict:
            found += len(part)
            part = part.values()
        waiting += [item for item in part if type(item) in (dict, list)]
    return found


def json_value(line: bytes, first: bool):
    """Returns the value of a line of JSON, None for a blank one, a ValueError with the reason for another.

    first: of the file, which may begin with a byte-order mark.
    """
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        line = line.strip()
        if not line or (first and line == BOM):
            return None
        row = _json_or_reason(line, first)
    return ValueError("a row must be an object, got null") if row is None else row


def _json_or_reason(line: bytes, first: bool):
    try:
        # For NaN and the byte-order mark of files from Windows, which orjson does not read, and for clearer reasons.
        return json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return ValueError(f"not JSON: {error.msg} at column {error.colno}")
    except (RecursionError, ValueError) as error:
        return ValueError(f"not JSON: {error}")


def _json_batches(source: Source, columns: list[str], absent: frozenset[str]) -> Iterator[Batch]:
    rows = json_rows(source)
    while block := list(itertools.islice(rows, ROWS)):
        for number, row in block:
            if not isinstance(row, dict):
                reason = row if isinstance(row, ValueError) else f"a row must be an object, got {type(row).__name__}"
                raise InputError(f"{source.name}:{number}: {reason}")
            if late := [name for name in absent.intersection(row) if row[name] is not None]:
                raise InputError(
                    f"{source.name}:{number}: {late[0]} is a column of this row and of none of the first: have such a "
                    "row at the top"
                )
        numbers = [number for number, _ in block]
        if wrong := [name for name in columns if not _is_unicode(name)]:
            raise InputError(
                f"{source.name}: the column {wrong[0]!r} holds a lone surrogate, which is not Unicode text"
            )
        arrays = [_json_array(source, name, [row.get(name) for _, row in block], numbers) for name in columns]
        yield Batch(pyarrow.RecordBatch.from_arrays(arrays, names=columns), np.array(numbers, np.int64))


_JSON_TYPES = {str: "text", bool: "true or false", int: "numbers", float: "numbers", list: "lists", dict: "objects"}


def _json_array(source: Source, name: str, values: list, numbers: list[int]) -> pyarrow.Array:
    families = {}
    for value, number in zip(values, numbers, strict=True):
        if value is not None:
            families.setdefault(_JSON_TYPES[type(value)], number)
    if len(families) > 1:
        (one, _), (other, number) = sorted(families.items(), key=lambda item: item[1])[:2]
        raise InputError(f"{source.name}:{number}: {name} holds {other} here and {one} before: must be of one kind")
    kinds = set(map(type, values))
    try:
        if float in kinds:
            return pyarrow.array([None if value is None else float(value) for value in values], pyarrow.float64())
        return pyarrow.array(values)
    except OverflowError:  # integers beyond 64 bits
        return pyarrow.array([None if value is None else _as_float(value) for value in values], pyarrow.float64())
    except UnicodeEncodeError:
        number = next(n for value, n in zip(values, numbers, strict=True) if not _is_unicode(value))
        raise InputError(f"{source.name}:{number}: {name} holds a lone surrogate, which is not Unicode text") from None
    except pyarrow.ArrowException as error:
        raise InputError(f"{source.name}: {name} cannot be a column: {error}".splitlines()[0]) from error


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:  # beyond float64, too
        return float("inf") if value > 0 else float("-inf")


def _is_unicode(value) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


# ---- CSV


def _csv_batches(source: Source, columns: list[str]) -> Iterator[Batch]:
    records = csv_records(source)
    _, header = next(records, (1, []))
    places = [header.index(name) for name in columns]
    while block := list(itertools.islice(records, ROWS)):
        for number, record in block:
            if isinstance(record, ValueError):
                raise InputError(f"{source.name}:{number}: {record}")
        arrays = [pyarrow.array([record[k] or None for _, record in block], pyarrow.string()) for k in places]
        numbers = np.array([number for number, _ in block], np.int64)
        yield Batch(pyarrow.RecordBatch.from_arrays(arrays, names=columns), numbers)


_DECIMAL_COMMA = re.compile(r"\s*[+-]?\d*,\d+\s*")
_THOUSANDS = re.compile(r"\s*[+-]?[1-9]\d{0,2}[.,]\d{3}\s*")  # or a number with three decimals


def check_marks(source: Source, columns: Sequence[str]) -> None:
    """Raises InputError where a number of a CSV with ';', such as "6.000", may be six or six thousand.

    Where some number has a comma that can only be decimal, a dot is none; elsewhere a comma may be either.

    columns: of numbers.
    """
    if source.delimiter != ";":
        return
    records = csv_records(source)
    _, header = next(records, (1, []))
    places = [k for k, name in enumerate(header) if name in columns]
    decimal, doubtful = False, {}
    for number, record in records:
        if isinstance(record, ValueError):
            continue
        for k in places:
            if _THOUSANDS.fullmatch(record[k]):
                doubtful.setdefault("," if "," in record[k] else ".", (number, header[k], record[k].strip()))
            elif _DECIMAL_COMMA.fullmatch(record[k]):
                decimal = True
    if found := doubtful.get("." if decimal else ","):
        number, name, text = found
        one, other = (re.sub("[.,]", mark, text) for mark in (".", ""))
        raise InputError(
            f"{source.name}:{number}: {name} may be {one} or {other}, got {text!r}: write thousands without a mark"
        )


def _parsed_numbers(table: Table, name: str) -> np.ndarray:
    texts = table.columns[name]
    comma = np.array([source.delimiter == ";" for source in table.sources])[table.source]
    if comma.any():
        with_comma = pyarrow.compute.replace_substring(texts, ",", ".", max_replacements=1)
        texts = pyarrow.compute.if_else(pyarrow.array(comma), with_comma, texts)
    texts = pyarrow.compute.utf8_trim_whitespace(texts)
    absent = pyarrow.compute.is_in(texts, value_set=pyarrow.array(["", "NA", "N/A", "null", "None"], texts.type))
    texts = pyarrow.compute.if_else(absent, None, texts)
    try:
        return texts.cast(pyarrow.float64()).to_numpy()
    except pyarrow.ArrowInvalid:
        pass
    numbers = np.full(len(texts), np.nan)
    for row, text in enumerate(texts.to_pylist()):
        try:
            numbers[row] = np.nan if text is None else _number(text)
        except ValueError:
            said = table.columns[name][row].as_py()
            raise InputError(f"{table.place(row)}: {name} must be a number, got {said[:40]!r}") from None
    return numbers


def _number(text: str) -> float:
    if text.lower() in ("true", "false"):
        return float(text.lower() == "true")
    if "_" in text:  # float() reads 1_000
        raise ValueError(text)
    return float(text)


# ---- Arrow


def schema_of(source: Source) -> pyarrow.Schema:
    """Returns the schema of a Parquet or Arrow source. Raises InputError where it cannot be read."""
    with reading_errors(source.name):
        if source.container == "parquet":
            return open_parquet(source).schema_arrow
        with pyarrow.OSFile(source.path) as file:
            opened = pyarrow.ipc.open_file if source.container == "arrow" else pyarrow.ipc.open_stream
            return opened(file).schema


def arrow_names(source: Source) -> list[str]:
    """Returns the columns of a Parquet or Arrow source. Raises InputError where they cannot be read."""
    schema = schema_of(source)
    with reading_errors(source.name):  # a damaged name is no UTF-8
        return schema.names


def open_parquet(source: Source) -> pyarrow.parquet.ParquetFile:
    """Opens a Parquet source. Raises InputError where it cannot be read."""
    with reading_errors(source.name):
        return pyarrow.parquet.ParquetFile(source.path, buffer_size=BUFFER, pre_buffer=False)


def arrow_batches(source: Source, columns: list[str] | None, rows: int = ROWS) -> Iterator[pyarrow.RecordBatch]:
    """Reads the record batches of a Parquet or Arrow source, of at most so many rows, as they are in the file."""
    with reading_errors(source.name):
        if source.container == "parquet":
            yield from open_parquet(source).iter_batches(rows, columns=columns)
            return
        with pyarrow.OSFile(source.path) as file:
            for batch in _ipc_batches(source, file, columns):
                yield from (batch.slice(begin, rows) for begin in range(0, batch.num_rows, rows))


def _ipc_batches(source: Source, file, columns: list[str] | None) -> Iterator[pyarrow.RecordBatch]:
    def options(schema):
        wanted = None if columns is None else [k for k, name in enumerate(schema.names) if name in columns]
        return pyarrow.ipc.IpcReadOptions(included_fields=wanted or None)

    if source.container == "arrow-stream":
        schema = schema_of(source)
        for batch in pyarrow.ipc.open_stream(file, options=options(schema)):
            batch.validate(full=True)  # lengths and offsets of a damaged file lead anywhere
            yield batch
        return
    reader = pyarrow.ipc.open_file(file, options=options(pyarrow.ipc.open_file(file).schema))
    for k in range(reader.num_record_batches):
        batch = reader.get_batch(k)
        batch.validate(full=True)
        yield batch


def _arrow_batches(source: Source, columns: list[str]) -> Iterator[Batch]:
    row = 0
    for batch in arrow_batches(source, columns):
        with reading_errors(source.name, row + 1):
            arrays = [_plain(batch.column(name)) for name in columns]
            table = pyarrow.RecordBatch.from_arrays(arrays, names=columns)
        yield Batch(table, np.arange(row + 1, row + 1 + batch.num_rows))
        row += batch.num_rows


def _plain(array: pyarrow.Array) -> pyarrow.Array:
    """Without dictionary, view and extension; text that is checked to be UTF-8."""
    if isinstance(array, pyarrow.ExtensionArray):
        array = array.storage
    if pyarrow.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if str(array.type) == "string_view":
        array = array.cast(pyarrow.string())
    if pyarrow.types.is_string(array.type) or pyarrow.types.is_large_string(array.type):
        array.validate(full=True)
    return array


def _family(kind: pyarrow.DataType) -> str:
    """What can be joined into one column."""
    is_a = pyarrow.types
    if is_a.is_integer(kind) or is_a.is_floating(kind) or is_a.is_decimal(kind):
        return "numbers"
    if is_a.is_string(kind) or is_a.is_large_string(kind):
        return "text"
    return "true or false" if is_a.is_boolean(kind) else str(kind)
