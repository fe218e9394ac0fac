"""What IN is, and whether the flags fit it: read, checked and held in memory before torch is imported."""

import os
from typing import NamedTuple

import numpy as np

from fastpref._whole_file import format_of
from fastpref.cli.denoise import files
from fastpref.cli.denoise.layouts import NUMBER_ROLES, Choice, choose_layout, late_columns
from fastpref.cli.denoise.options import COMPARISON_OPTIONS, MATRIX_OPTIONS, DenoiseOptions, check_ending
from fastpref.errors import InputError

PLOTS = (".pdf", ".png", ".svg")
ARRAYS = (".npy", ".npz")
COPIES = {"entries": 1, "rows": 10, "columns": 10}  # of the matrix that the convex program holds beside it
BATCH_ENTRIES = 1 << 24  # of a batch that are solved at a time


class Names(NamedTuple):
    """Names of the rows and columns of triples, and the triples' places in the matrix."""

    rows: object  # pyarrow.Array
    columns: object
    row: np.ndarray  # [triples] int64
    column: np.ndarray
    roles: dict[str, str]  # what the table calls row, column and value


class Input(NamedTuple):
    """One of a matrix (or a batch) and comparisons."""

    read_as: str | None  # layout and columns of a table, for the summary
    matrix: np.ndarray | None = None  # [m, n] or [batch, m, n], of a dtype that is solved as it is
    names: Names | None = None  # of triples
    comparisons: object = None  # votes.Comparisons
    warnings: tuple[str, ...] = ()


def open_input(options: DenoiseOptions) -> Input:
    """Reads and checks IN, and the flags and the endings of the outputs against it.

    Raises:
        InputError: For everything that the user can mend; nothing was written by then.
    """
    outputs = [path for path in (options.output_file, options.flagged, options.plot) if path is not None]
    for index, path in enumerate(outputs):
        for other in outputs[:index]:
            if os.path.realpath(path) == os.path.realpath(other):
                raise InputError(f"{path} would overwrite another output")
    try:
        return _opened(options, outputs)
    except MemoryError as error:
        raise InputError(f"not enough memory to read {options.name}") from error


def _opened(options: DenoiseOptions, outputs: list) -> Input:
    _refuse_overwriting(outputs, options.inputs)
    if options.plot is not None:
        check_ending("--plot", options.plot, PLOTS)
    if any(format_of(name) in ARRAYS for name in options.inputs):
        if len(options.inputs) > 1:
            raise InputError(f"a matrix is one file, got {len(options.inputs)}: {', '.join(options.inputs)}")
        return _array_input(options)
    return _table_input(options, outputs)


def _refuse_overwriting(outputs, sources) -> None:
    for path in outputs:
        for source in sources:
            if os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
                raise InputError(f"{path} would overwrite IN")


# ---- a matrix


def _array_input(options: DenoiseOptions) -> Input:
    options.refuse((*COMPARISON_OPTIONS, "layout"), "a matrix")
    if options.columns:
        raise InputError("--columns is not for a matrix")
    wanted = options.output or "low-rank"
    check_ending("OUT", options.output_file, (".npz",) if wanted == "factors" else (".npy",), f" for --output {wanted}")
    array = files.read_array(options.inputs[0], options.array, options.max_dense)
    if array.size == 0:
        raise InputError(f"{options.name} is empty: shape {list(array.shape)}")
    if array.dtype.newbyteorder("=") not in files.AS_IT_LIES or not array.dtype.isnative:
        dtype = np.dtype(np.float64 if array.dtype.itemsize > 2 and array.dtype.kind in "iu" else np.float32)
        if array.dtype.kind == "f":
            dtype = array.dtype.newbyteorder("=")
        files.check_memory(array.size * dtype.itemsize, options.max_dense, f"as {dtype} {options.name} takes")
        array = array.astype(dtype)
    _check_rank_free(array[: at_a_time(array)] if array.ndim == 3 else array, options)
    return Input(None, array)


def at_a_time(array: np.ndarray) -> int:
    """Matrices of a batch that are solved together."""
    return max(1, BATCH_ENTRIES // max(array[0].size, 1))


def _check_rank_free(matrix: np.ndarray, options: DenoiseOptions) -> None:
    if options.rank is None:
        size = (1 + COPIES[options.corruption or "entries"]) * matrix.size * max(matrix.itemsize, 4)
        files.check_memory(size, options.max_dense, "without --rank the convex program takes about")


# ---- a table


def _table_input(options: DenoiseOptions, outputs) -> Input:
    from fastpref.cli.denoise import tables  # needs pyarrow
    from fastpref.curate.files.containers import check_marks, check_unique, column_names, read_table
    from fastpref.curate.files.sources import find_sources

    options.refuse(("array",), "a table")
    sources = find_sources(options.inputs)
    _refuse_overwriting(outputs, [source.path for source in sources])
    names = [column_names(source) for source in sources]
    found = list(dict.fromkeys(name for header in names for name in header))
    choice = choose_layout(options.name, found, options.layout, options.columns)
    for source, header in zip(sources, names, strict=True):
        check_unique(source, header, [name for name in header if name in choice.columns.values()])
    if choice.layout == "triples":
        options.refuse(COMPARISON_OPTIONS, "triples, which are a matrix")
        wanted = options.output or "low-rank"
        formats = (".npz",) if wanted == "factors" else tables.FORMATS
        check_ending("OUT", options.output_file, formats, f" for --output {wanted} of triples")
    else:
        options.refuse(MATRIX_OPTIONS, f"comparisons, which {options.name} holds ({choice.layout})")
        check_ending("OUT", options.output_file, tables.FORMATS, " for comparisons")
        if options.flagged is not None:
            check_ending("--flagged", options.flagged, tables.FORMATS)
        if choice.layout == "logits" and options.robust is False:
            raise InputError("--no-robust is for votes: it is maximum likelihood, which logits do not have")
    for source in sources:
        check_marks(source, [name for role, name in choice.columns.items() if role in NUMBER_ROLES])
    table = read_table(sources, list(choice.columns.values()), late_columns(choice, found, options.columns))
    read_as = f"read as {choice}"
    if (description := sources[0].description) not in ("CSV with ','", "JSON Lines", "Parquet"):
        read_as += f" ({description})"
    if choice.layout == "triples":
        return _triples(table, choice, options, read_as)
    from fastpref.cli.denoise.votes import read_comparisons

    comparisons = read_comparisons(table, choice, options.name, found, options.layout is not None)
    return Input(read_as, comparisons=comparisons, warnings=tuple(comparisons.warnings))


def _triples(table, choice: Choice, options: DenoiseOptions, read_as: str) -> Input:
    """The dense matrix of the triples; cells without one are missing."""
    from fastpref.cli.denoise import tables

    names = [tables.names_of(table, choice.columns[role]) for role in ("row", "column")]
    skew = options.structure == "skew"
    if skew:
        rows, (row, column) = tables.index_names(*names)
        columns = rows
    else:
        rows, (row,) = tables.index_names(names[0])
        columns, (column,) = tables.index_names(names[1])
    if not len(row):
        raise InputError(f"{options.name} holds no triples")
    values, huge = tables.measures_of(table, choice.columns["value"])
    said = [f"{huge} values of a size of 1e30 or more are taken as missing"] if huge else []
    for what, found in (("rows", rows), ("columns", columns)):
        if twins := tables.near_twins(found):
            said.append(f"the {what} {twins[0]!r} and {twins[1]!r} differ only in white space, and count as two")
    size = len(rows) * len(columns) * values.itemsize
    files.check_memory(size, options.max_dense, f"{len(rows)} rows by {len(columns)} columns, dense, take")
    _, first, inverse, count = np.unique(
        row * len(columns) + column, return_index=True, return_inverse=True, return_counts=True
    )
    if (count > 1).any():
        again = int(np.flatnonzero(first[inverse] != np.arange(len(row)))[0])
        cell = f"({rows[int(row[again])]}, {columns[int(column[again])]})"
        earlier = table.place(int(first[inverse[again]]))
        raise InputError(f"{table.place(again)}: has another value for {cell} than {earlier}")
    matrix = np.full((len(rows), len(columns)), np.nan)
    if skew:
        matrix[column, row] = -values
        there = matrix[row, column]
        if (at := tables.first_row(~np.isnan(there) & (there != values))) is not None:
            raise InputError(f"{table.place(at)}: is not skew-symmetric with its mirror image: {values[at]:g}")
    matrix[row, column] = values
    _check_rank_free(matrix, options)
    return Input(read_as, matrix, Names(rows, columns, row, column, choice.columns), warnings=tuple(said))
