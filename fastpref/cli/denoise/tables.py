"""Reads and writes tables by Arrow: Parquet, CSV and JSON Lines of comparisons or (row, column, value) triples."""

import json
from collections.abc import Iterable

import numpy as np

from fastpref._whole_file import format_of
from fastpref.errors import InputError

try:
    import pyarrow
    import pyarrow.compute
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet
except ImportError as error:
    raise InputError('tables need pyarrow: pip install "fastpref[cli]"') from error

FORMATS = (".parquet", ".csv", ".jsonl")
# how a table is read -> the roles of its columns
LAYOUTS = {
    "triples": ("row", "column", "value"),
    "votes": ("i", "j", "wins_i", "wins_j"),
    "winners": ("winner", "loser"),
    "logits": ("i", "j", "value"),
}
NAMES = ("row", "column", "i", "j", "winner", "loser", "prompt")  # of items: kept as they are, in CSV as text


def read_table(path, layout: str | None, columns: dict[str, str]) -> tuple[dict, str]:
    """Returns the columns of a layout, role -> pyarrow.ChunkedArray, and the layout.

    layout: None for the only one whose columns are all there. columns: role -> name of the column in the file.
    """
    try:
        whole = pyarrow.json.read_json(path) if format_of(path) == ".jsonl" else None
        found = _column_names(path) if whole is None else whole.column_names
        known = {role for roles in LAYOUTS.values() for role in (*roles, "prompt")}
        if unknown := set(columns) - known:
            raise InputError(f"--columns: no layout has a role {', '.join(unknown)}, only {', '.join(sorted(known))}")
        if missing := [name for name in columns.values() if name not in found]:
            raise InputError(f"{path} has no column {', '.join(missing)}, found {', '.join(found)}")
        layout = layout or _only_layout(path, columns, found)
        roles = LAYOUTS[layout]
        if layout != "triples" and columns.get("prompt", "prompt") in found:
            roles = (*roles, "prompt")
        if unknown := set(columns).difference(roles, () if layout == "triples" else ("prompt",)):
            raise InputError(f"--columns: {layout} has no role {', '.join(unknown)}, only {', '.join(roles)}")
        names = {role: columns.get(role, role) for role in roles} | columns
        if missing := [name for name in names.values() if name not in found]:
            raise InputError(f"{path} has no column {', '.join(missing)} for {layout}, found {', '.join(found)}")
        if repeated := [name for name in names.values() if found.count(name) > 1]:
            raise InputError(f"{path} has more than one column {', '.join(repeated)}")
        if len(set(names.values())) < len(names):
            raise InputError(
                f"--columns must name a column for each role, got one twice in {', '.join(names.values())}"
            )
        read = _read_columns(path, names) if whole is None else whole
        table = {role: read[name] for role, name in names.items()}
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except pyarrow.ArrowException as error:
        raise InputError(f"cannot read {path}: {error}".splitlines()[0]) from error
    for role, name in names.items():
        _check_column(f"column {name} of {path}", table[role], role)
    return table, layout


def _column_names(path) -> list[str]:
    if format_of(path) == ".parquet":
        return pyarrow.parquet.read_schema(path).names
    with pyarrow.csv.open_csv(path) as reader:
        return reader.schema.names


def _only_layout(path, columns, found) -> str:
    fitting = [
        name
        for name, roles in LAYOUTS.items()
        if all(columns.get(role, role) in found for role in roles) and set(columns) <= {*roles, "prompt"}
    ]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        problem = f"fit several layouts, choose with --layout: {', '.join(fitting)}"
    else:
        layouts = "; ".join(f"{name}: {', '.join(roles)}" for name, roles in LAYOUTS.items())
        problem = f"fit no layout ({layouts}); rename with --columns"
    raise InputError(f"{path}: its columns {', '.join(found)} {problem}")


def _read_columns(path, names: dict[str, str]) -> pyarrow.Table:
    wanted = list(names.values())
    if format_of(path) == ".parquet":
        return pyarrow.parquet.read_table(path, columns=wanted)
    # typed, or a name such as 007 would become a number
    types = {name: pyarrow.string() if role in NAMES else pyarrow.float64() for role, name in names.items()}
    options = pyarrow.csv.ConvertOptions(column_types=types, include_columns=wanted)
    return pyarrow.csv.read_csv(path, convert_options=options)


def _check_column(what: str, values: pyarrow.ChunkedArray, role: str) -> None:
    is_integer = pyarrow.types.is_integer(values.type)
    if role not in NAMES:
        if not (is_integer or pyarrow.types.is_floating(values.type)):
            raise InputError(f"{what} must hold numbers, got {values.type}")
        return
    if not (is_integer or pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type)):
        raise InputError(f"{what} must hold strings or integers, got {values.type}")
    absent = values.is_null()
    if not is_integer:
        absent = pyarrow.compute.or_kleene(absent, pyarrow.compute.equal(values, ""))
    if (row := first_row(absent.to_numpy())) is not None:
        raise InputError(f"{what} must hold a name in every row, got none in row {row}")


def first_row(condition: np.ndarray) -> int | None:
    """Returns the first row, counted from 1, in which the condition holds."""
    rows = np.flatnonzero(condition)
    return int(rows[0]) + 1 if len(rows) else None


def as_numbers(values: pyarrow.ChunkedArray) -> np.ndarray:
    """Returns the column as float64, or float32 where it is; NaN for null."""
    dtype = values.type if values.type == pyarrow.float32() else pyarrow.float64()
    return values.cast(dtype).to_numpy()


def index_names(*columns: pyarrow.ChunkedArray) -> tuple[pyarrow.Array, list[np.ndarray]]:
    """Returns the distinct names in order of appearance, and every column as int64 indices into them."""
    if len({values.type for values in columns}) > 1:
        columns = [values.cast(pyarrow.string()) for values in columns]
    chunks = [chunk for values in columns for chunk in values.chunks]
    distinct = pyarrow.chunked_array(chunks, columns[0].type).unique()
    return distinct, [pyarrow.compute.index_in(values, distinct).to_numpy().astype(np.int64) for values in columns]


def to_table(columns: dict) -> pyarrow.Table:
    """Makes a table of Arrow columns and of numbers, whose NaN becomes null."""
    arrays = [
        column if isinstance(column, pyarrow.Array) else pyarrow.array(np.ascontiguousarray(column), from_pandas=True)
        for column in columns.values()
    ]
    return pyarrow.table(arrays, names=list(columns))


def write_table(path, format: str, tables: Iterable[pyarrow.Table]) -> None:
    """Writes tables of one schema, at least one, one after the other into one file."""
    tables = iter(tables)
    first = next(tables)
    if format == ".jsonl":
        with open(path, "w", encoding="utf-8") as file:
            for table in (first, *tables):
                for batch in table.to_batches(max_chunksize=1 << 14):
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in batch.to_pylist())
        return
    make = pyarrow.parquet.ParquetWriter if format == ".parquet" else pyarrow.csv.CSVWriter
    with make(path, first.schema) as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)
