"""The columns of a table as names and numbers, and tables that are written: Parquet, CSV and JSON Lines."""

import json
from collections.abc import Iterable, Sequence

import numpy as np

from fastpref.curate.files.containers import Table, as_numbers
from fastpref.curate.files.rows import LARGEST_SCORE
from fastpref.errors import InputError

try:
    import pyarrow
    import pyarrow.compute
    import pyarrow.csv
    import pyarrow.parquet
except ImportError as error:
    raise InputError('tables need pyarrow: pip install "fastpref[cli]"') from error

FORMATS = (".parquet", ".csv", ".jsonl")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a cell begins that a spreadsheet would compute


def names_of(table: Table, column: str) -> pyarrow.ChunkedArray:
    """Returns a column of names, strings or integers, none of which is missing. Raises InputError otherwise."""
    values = table.columns[column]
    is_integer = pyarrow.types.is_integer(values.type)
    if pyarrow.types.is_null(values.type):
        values = values.cast(pyarrow.string())
    elif not (is_integer or pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type)):
        raise InputError(f"column {column} of {table.sources[0].name} must hold strings or integers, got {values.type}")
    absent = values.is_null()
    if not is_integer:
        absent = pyarrow.compute.or_kleene(absent, pyarrow.compute.equal(values, ""))
    if (row := first_row(absent.to_numpy())) is not None:
        raise InputError(f"{table.place(row)}: {column} must hold a name, got none")
    return values


def measures_of(table: Table, column: str) -> tuple[np.ndarray, int]:
    """Returns a column as float64, NaN where missing, and how many are so for a size of LARGEST_SCORE or more."""
    values = as_numbers(table, column)
    huge = np.abs(values) >= LARGEST_SCORE  # infinity, too
    return np.where(huge, np.nan, values), int(huge.sum())


def first_row(condition: np.ndarray) -> int | None:
    """Returns the first row, counted from 0, in which the condition holds."""
    rows = np.flatnonzero(condition)
    return int(rows[0]) if len(rows) else None


def index_names(*columns: pyarrow.ChunkedArray) -> tuple[pyarrow.Array, list[np.ndarray]]:
    """Returns the distinct names in order of appearance, and every column as int64 indices into them."""
    if len({values.type for values in columns}) > 1:
        columns = [values.cast(pyarrow.string()) for values in columns]
    chunks = [chunk for values in columns for chunk in values.chunks]
    distinct = pyarrow.chunked_array(chunks, columns[0].type).unique()
    return distinct, [pyarrow.compute.index_in(values, distinct).to_numpy().astype(np.int64) for values in columns]


def near_twins(names: pyarrow.Array) -> tuple[str, str] | None:
    """Returns two of the distinct names that differ only in white space at their ends, if there are any."""
    if pyarrow.types.is_integer(names.type):
        return None
    bare = pyarrow.compute.utf8_trim_whitespace(names)
    if len(bare.unique()) == len(names):
        return None
    seen = {}
    for name, short in zip(names.to_pylist(), bare.to_pylist(), strict=True):
        if short in seen:
            return seen[short], name
        seen[short] = name
    return None


# ---- written


def to_table(columns: dict) -> pyarrow.Table:
    """Makes a table of Arrow columns and of numbers, whose NaN becomes null."""
    arrays = [
        column if isinstance(column, pyarrow.Array) else pyarrow.array(np.ascontiguousarray(column), from_pandas=True)
        for column in columns.values()
    ]
    return pyarrow.table(arrays, names=list(columns))


def write_table(path, format: str, tables: Iterable[pyarrow.Table], csv_safe: bool) -> None:
    """Writes tables of one schema, at least one, one after the other into one file.

    csv_safe: in CSV, texts that a spreadsheet would take for a formula get an apostrophe in front.
    """
    tables = iter(tables)
    first = next(tables)
    if format == ".jsonl":
        with open(path, "w", encoding="utf-8") as file:
            for table in (first, *tables):
                for batch in table.to_batches(max_chunksize=1 << 14):
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in batch.to_pylist())
        return
    make = pyarrow.parquet.ParquetWriter
    if format == ".csv":
        make = pyarrow.csv.CSVWriter
        if csv_safe:
            first, tables = _without_formulas(first), map(_without_formulas, tables)
    with make(path, first.schema) as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)


def _without_formulas(table: pyarrow.Table) -> pyarrow.Table:
    is_a = pyarrow.types
    columns = [
        _quoted(column) if is_a.is_string(column.type) or is_a.is_large_string(column.type) else column
        for column in table.columns
    ]
    return pyarrow.table(columns, names=_plain_names(table.column_names))


def _quoted(column: pyarrow.ChunkedArray) -> pyarrow.ChunkedArray:
    compute = pyarrow.compute
    begins = [compute.starts_with(column, sign) for sign in FORMULA]
    risky = begins[0]
    for one in begins[1:]:
        risky = compute.or_(risky, one)
    apostrophe, nothing = (pyarrow.scalar(text, column.type) for text in ("'", ""))
    return compute.if_else(risky, compute.binary_join_element_wise(apostrophe, column, nothing), column)


def _plain_names(names: Sequence[str]) -> list[str]:
    return [f"'{name}" if name.startswith(FORMULA) else name for name in names]
