"""Pairs with their texts, as JSON Lines (also .gz) or Parquet: the second pass over a file of samples."""

import contextlib
import gzip
import json
import os
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastpref._whole_file import whole_file
from fastpref.curate.files import processes
from fastpref.curate.files.arrow_types import arrow_array, arrow_type, widened
from fastpref.curate.files.formats import (
    TEXTS,
    check_format,
    dataset_info,
    is_conversational,
    shaped_rows,
    text_columns,
)
from fastpref.curate.files.rows import Row
from fastpref.curate.files.table import Coded, RowProblem, Samples
from fastpref.curate.pairs import PLACES
from fastpref.errors import InputError

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")
METADATA = b"fastpref"  # its key in the schema of a Parquet file
GZIP_LEVEL = 3
BLOCK = 1024  # rows put into order at a time
ROW_GROUP = 1 << 26  # bytes of JSON


class Written(NamedTuple):
    rows: int
    sft_rows: int


def write_pairs(
    samples: Samples,
    pairs,
    out,
    *,
    format="trl",
    sft=None,
    to_sft=None,
    rewrite=None,
    metadata=None,
    workers=None,
    progress=None,
) -> Written:
    """Reads the texts of the pairs and writes a row for each, in the order given.

    pairs: name -> [pairs] array or list. `prompt` (index into samples), `chosen` and `rejected` (columns within its
        pool) are needed; everything else becomes a column as it is, a string or a number alone the same in every row.
        From the samples come, where they are not given, `prompt_id` (the row's own, else a hash of the prompt),
        `chosen_id` and `rejected_id` (the columns), `source_*`, `len_*`, and the `margin` of `score_chosen` and
        `score_rejected`. A number that is not finite becomes null.
    out: ends in .jsonl, .jsonl.gz or .parquet, and is not there before it is complete.
    format: one of `formats.FORMATS`, which are explained there: "trl", "trl-conversational", "axolotl", "llamafactory"
        (which gets its entry in the dataset_info.json of the folder), "swift", "openrlhf", "kto" (two rows a pair).
    sft, to_sft: a second file, and bool [pairs]: the pairs whose chosen response goes there instead, as prompt and
        completion, or as one conversation where the format has those.
    rewrite: function(row) -> rows in its place, each a dict. Rows have the columns above, with the texts as for TRL.
    metadata: a mapping for JSON, which `read_metadata` gives back: in the schema of a Parquet file, beside JSON Lines
        in a file of the same name with ".meta.json" behind it.
    workers, progress: as in `read_samples`.

    Raises InputError when the file of the samples has changed, when its texts do not fit the format and when an output
    cannot be written; ValueError for pairs that are not of these samples.
    """
    from fastpref.curate.files import reading  # needs orjson and xxhash

    out, sft = os.fspath(out), None if sft is None else os.fspath(sft)
    _check_outputs(samples, out, sft, format)
    prompt, chosen, rejected = _indices(samples, pairs)
    columns = pair_columns(samples, pairs)
    to_sft = _sft_mask(sft, to_sft, len(prompt))
    in_file = np.argsort(prompt, kind="stable")  # pairs in the order of the file
    prompts, first = np.unique(prompt[in_file], return_index=True)
    first = np.append(first, len(prompt))
    conversational = bool(samples.conversational[prompts].any())
    if not is_conversational(format) and conversational and not samples.conversational[prompts].all():
        raise InputError(
            f"{samples.path} holds strings and lists of messages, and a file of pairs can only hold one of them: "
            "write --format trl-conversational"
        )
    workers = processes.worthwhile_processes(samples.size) if workers is None else workers
    done, total = deque(), sum(map(reading.extent, samples.files))

    def tasks():
        for part, here, known in reading.parts_again(samples, prompts):
            done.append(part.done)
            these = in_file[first[here.start] : first[here.stop]]
            row = np.repeat(np.arange(here.stop - here.start), np.diff(first[here.start : here.stop + 1]))
            values = {name: _take_entries(column, these) for name, column in columns.items()}
            picked = Picked(row, chosen[these], rejected[these], to_sft[these], values)
            begin = samples.offsets[prompt[these]]
            hashes = samples.text_hash[begin + picked.chosen], samples.text_hash[begin + picked.rejected]
            yield samples.files[part.file], part, known, picked, hashes, samples.fields, format, finished

    def blocks():
        for block in processes.in_processes(_lines_of_part, tasks(), workers):
            yield block
            if progress is not None:
                progress(done.popleft(), total)

    finished = rewrite is None and format != "kto"  # a line stays one line
    written = [0, 0]
    with contextlib.ExitStack() as stack:
        sinks = []
        for k, path in enumerate((out, sft)):
            if path is not None:
                names = ["prompt_id", *text_columns(format, bool(k))]
                sinks.append(stack.enter_context(_sink(path, names, column_types(columns), metadata)))
        place = 0
        for lines in _in_given_order(blocks(), in_file, Path(out).parent):
            routed = to_sft[place : place + len(lines)]
            place += len(lines)
            for k, sink in enumerate(sinks):
                own = [line for line, to in zip(lines, routed.tolist(), strict=True) if to == k]
                if not finished:
                    own = [line for row in own for line in _rewritten(row, rewrite, format)]
                sink(own)
                written[k] += len(own)
    for k, path in enumerate((out, sft)):
        if format == "llamafactory" and path is not None:
            _write_dataset_info(path, dataset_info(path, samples.fields.carried, bool(k)))
    if progress is not None:
        progress(total, total)
    return Written(*written)


def write_problems(problems: list[RowProblem], path) -> None:
    """The rows and responses that were left out, as JSON Lines: file, row and reason."""
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for problem in problems:
            file.write(json.dumps({"file": problem.path, "row": problem.row, "reason": problem.reason}) + "\n")


def read_metadata(path) -> dict | None:
    """What `write_pairs` was given as metadata for this file; None where there was none."""
    path = os.fspath(path)
    try:
        if path.endswith(".parquet"):
            from pyarrow import parquet

            held = (parquet.read_schema(path).metadata or {}).get(METADATA)
        else:
            held = Path(path_of_metadata(path)).read_bytes() if os.path.exists(path_of_metadata(path)) else None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    return None if held is None else json.loads(held)


# ---- columns and rows


def pair_columns(samples: Samples, pairs) -> dict[str, object]:
    """The columns of the pairs but for their texts, in order: arrays [pairs], Coded, or one value for all."""
    prompt, chosen, rejected = _indices(samples, pairs)
    flat = {"chosen": samples.offsets[prompt] + chosen, "rejected": samples.offsets[prompt] + rejected}
    columns = {name: pairs[name] for name in ("score_chosen", "score_rejected") if name in pairs}
    if len(columns) == 2:
        columns["margin"] = np.subtract(*(np.asarray(scores, np.float64) for scores in columns.values()))
    if samples.sources is not None:
        columns |= {f"source_{side}": Coded(samples.sources[at], samples.source_names) for side, at in flat.items()}
    columns |= {f"len_{side}": samples.lengths[at] for side, at in flat.items()}
    columns |= {"chosen_id": chosen, "rejected_id": rejected}
    columns |= {name: column for name, column in pairs.items() if name not in PLACES}
    for name, column in columns.items():
        if isinstance(column, np.generic):
            columns[name] = column.item()
        elif not _alone(column):
            values = np.asarray(column.codes if isinstance(column, Coded) else column)
            if values.shape != prompt.shape:
                raise ValueError(f"pairs[{name!r}] must have shape [{len(prompt)}], got {list(values.shape)}")
            columns[name] = Coded(values, column.names) if isinstance(column, Coded) else values
    return columns


def row_names(columns, carried, format) -> list[str]:
    """The columns of the rows of `pair_rows_of`, shaped, in order, where there is no row to tell."""
    return list(dict.fromkeys(["prompt_id", *text_columns(format, False), *carried, *columns]))


class Picked(NamedTuple):
    """Pairs of some rows."""

    row: np.ndarray  # [pairs] index into the rows
    chosen: np.ndarray  # [pairs] column within the pool
    rejected: np.ndarray
    to_sft: np.ndarray  # [pairs] bool
    columns: dict[str, object]  # as of `pair_columns`


def carried_names(carried, names) -> dict[str, str]:
    """What the columns that come along are called in the output, beside columns of these names."""
    taken = {"prompt_id", *TEXTS, *names}
    return {name: f"input_{name}" if name in taken else name for name in carried}


def pair_rows_of(rows: list[Row], hashes: np.ndarray, picked: Picked, carried, format) -> list[dict]:
    """The output row of every pair, with the texts as for TRL.

    hashes: uint64 [rows], of the prompts. carried: names of the columns that the rows hand on; one that has the name of
    a column of the pairs gets "input_" before it.
    """
    names = list(picked.columns)
    carried = carried_names(carried, names)
    values = zip(*(_values(column, len(picked.row)) for column in picked.columns.values()), strict=True)
    places = (picked.row.tolist(), picked.chosen.tolist(), picked.rejected.tolist(), picked.to_sft.tolist())
    found = []
    for r, chosen, rejected, to_sft, own in zip(*places, values, strict=True):
        row = rows[r]
        prompt, texts = row.prompt, [row.responses[chosen], row.responses[rejected]]
        if is_conversational(format) and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        texts = {"completion": texts[0]} if to_sft else {"chosen": texts[0], "rejected": texts[1]}
        known = {"prompt_id": row.prompt_id or f"{hashes[r]:016x}", "prompt": prompt}
        known |= texts | {written: row.carried.get(name) for name, written in carried.items()}
        found.append(known | dict(zip(names, own, strict=True)))
    return found


def _alone(column) -> bool:
    return column is None or isinstance(column, str | int | float)


def _take_entries(column, index):
    if _alone(column):
        return column
    if isinstance(column, Coded):
        return Coded(column.codes[index], column.names)
    return column[index]


def _values(column, count) -> list:
    """As Python has them, None for numbers that are not finite."""
    if _alone(column):
        column = np.full(count, column)
    if isinstance(column, Coded):
        names = [*column.names, None]
        return [names[code] for code in column.codes.tolist()]
    if column.dtype.kind == "f" and not (finite := np.isfinite(column)).all():
        column = np.where(finite, column.astype(object), None)
    return column.tolist()


def _indices(samples, pairs) -> list[np.ndarray]:
    for name in PLACES:
        if name not in pairs:
            raise ValueError(f"pairs must have {', '.join(PLACES)}, got {', '.join(pairs)}")
    found = [np.asarray(pairs[name]) for name in PLACES]
    for name, index in zip(PLACES, found, strict=True):
        if index.ndim != 1 or (index.dtype.kind not in "iu" and index.size) or len(index) != len(found[0]):
            raise ValueError(
                f"pairs[{name!r}] must be integers [{len(found[0])}], got {index.dtype} {list(index.shape)}"
            )
    found = [index.astype(np.int64) for index in found]
    limits = [np.full(len(found[0]), samples.prompts)]
    if found[0].size and 0 <= found[0].min() <= found[0].max() < samples.prompts:
        limits += [np.diff(samples.offsets)[found[0]]] * 2
    for name, index, limit in zip(PLACES, found, limits, strict=False):
        if (wrong := np.flatnonzero((index < 0) | (index >= limit))).size:
            k = wrong[0]
            raise ValueError(f"pairs[{name!r}][{k}] must lie in [0, {limit[k]}), got {index[k]}")
    return found


# ---- the second pass


def _lines_of_part(source, part, known, picked, hashes, fields, format, finished) -> tuple[bytes, np.ndarray]:
    """The rows of the pairs as JSON, one after the other, and the bytes of each. hashes: of chosen and rejected."""

    from fastpref.curate.files import reading  # needs orjson, xxhash and pyarrow
    from fastpref.curate.files.texts import text_hash

    rows = reading.same_rows(source, part, known, fields)
    for index, before in zip((picked.chosen, picked.rejected), hashes, strict=True):
        texts = [rows[r].responses[k] for r, k in zip(picked.row.tolist(), index.tolist(), strict=True)]
        if (text_hash(texts) != before).any():
            raise reading.changed_error(source.name)
    found = pair_rows_of(rows, known.prompt_hash, picked, fields.carried, format)
    if finished:
        found = [shaped for row in found for shaped in shaped_rows(row, format)]
    lines = list(map(_json_line, found))
    return b"".join(lines), np.array([len(line) for line in lines], np.int64)


def _json_line(row: dict) -> bytes:
    """The row as JSON. Raises InputError where a column holds what JSON has no word for, as those of Parquet can."""
    import orjson

    try:
        return orjson.dumps(row, _json_value)
    except orjson.JSONEncodeError:
        for name, value in row.items():
            try:
                orjson.dumps(value, _json_value)
            except orjson.JSONEncodeError as error:
                raise InputError(
                    f"the column {name} cannot be written ({error}), in prompt {row['prompt_id']}: leave it out; of "
                    "pictures, rows can hold the paths"
                ) from error
        raise


def _json_value(value) -> float:
    if isinstance(value, Decimal):
        return float(value)
    raise TypeError


def _in_given_order(blocks: Iterable[tuple[bytes, np.ndarray]], in_file, folder) -> Iterator[list[bytes]]:
    """The lines in blocks, from blocks in the order of the file; through a temporary file where the orders differ."""
    if (np.diff(in_file) == 1).all():
        for lines, sizes in blocks:
            ends = np.cumsum(sizes).tolist()
            yield [lines[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
        return
    with tempfile.TemporaryFile(dir=folder) as spill:
        sizes = []
        for lines, own in blocks:
            spill.write(lines)
            sizes.append(own)
        spill.flush()
        size = np.concatenate(sizes)
        begin = np.cumsum(size) - size
        place = np.empty_like(in_file)  # of each pair in the file
        place[in_file] = np.arange(len(in_file))
        for block in range(0, len(place), BLOCK):
            these = place[block : block + BLOCK]
            where = zip(size[these].tolist(), begin[these].tolist(), strict=True)
            yield [os.pread(spill.fileno(), *at) for at in where]


def _rewritten(line, rewrite, format) -> list[bytes]:
    import orjson

    row = orjson.loads(line)
    rows = [row] if rewrite is None else rewrite(row)
    return [orjson.dumps(shaped) for each in rows for shaped in shaped_rows(each, format)]


# ---- the outputs


def _check_outputs(samples, out, sft, format) -> None:
    check_format(format)
    taken = {os.path.realpath(source.path): "the samples" for source in samples.inputs}
    for path in (out, sft):
        if path is None:
            continue
        check_ending(path, format)
        if what := taken.get(os.path.realpath(path)):
            raise InputError(f"{path} would overwrite {what}")
        taken[os.path.realpath(path)] = "another output"


def check_ending(path, format) -> None:
    """Raises InputError for an output whose name has no known ending, or one that the format's host cannot read."""
    if not path.endswith(ENDINGS):
        raise InputError(f"the output must end in {', '.join(ENDINGS)}, got {path}")
    if format == "llamafactory" and path.endswith(".gz"):
        raise InputError(f"LLaMA-Factory does not read .gz: the output must end in .jsonl or .parquet, got {path}")


def _write_dataset_info(path, entry) -> None:
    """Adds the entry to the dataset_info.json beside the file, where others may stand already."""
    listing = Path(path).parent / "dataset_info.json"
    try:
        known = json.loads(listing.read_bytes()) if listing.exists() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"cannot add {path} to {listing}, which is no JSON: {error}") from error
    if not isinstance(known, dict):
        raise InputError(f"cannot add {path} to {listing}, which holds no object")
    with whole_file(listing) as temporary:
        temporary.write_text(json.dumps(known | entry, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sft_mask(sft, to_sft, pairs) -> np.ndarray:
    if (sft is None) != (to_sft is None):
        raise ValueError("sft and to_sft must be given together")
    if to_sft is None:
        return np.zeros(pairs, bool)
    to_sft = np.asarray(to_sft)
    if to_sft.dtype != bool or to_sft.shape != (pairs,):
        raise ValueError(f"to_sft must be bool [{pairs}], got {to_sft.dtype} {list(to_sft.shape)}")
    return to_sft


@contextlib.contextmanager
def _sink(path, texts, types, metadata) -> Iterator:
    """A function that appends lines of JSON to the file.

    For a Parquet file: types of `column_types`, and texts, the first columns' names where there is no row to tell.
    """
    parquet = path.endswith(".parquet")
    with contextlib.ExitStack() as stack:
        if metadata is not None and not parquet:
            beside = stack.enter_context(whole_file(path_of_metadata(path), like=path))
            # a name of a file may hold bytes that are no UTF-8: in a string of JSON they become its escapes
            text = json.dumps(metadata, indent=2, ensure_ascii=False) + "\n"
            beside.write_text(text, encoding="utf-8", errors="backslashreplace")
        temporary = stack.enter_context(whole_file(path))
        try:
            with _parquet_rows(temporary, texts, types, metadata) if parquet else _lines(temporary, path) as append:
                yield append
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    if metadata is None and not parquet:
        Path(path_of_metadata(path)).unlink(missing_ok=True)  # that of rows which are no more


@contextlib.contextmanager
def _lines(path, name) -> Iterator:
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "wb"))
        if name.endswith(".gz"):  # without name and time, so that equal rows make equal files
            file = stack.enter_context(gzip.GzipFile("", "wb", GZIP_LEVEL, file, mtime=0))
        yield lambda lines: file.write(b"".join([line + b"\n" for line in lines]))


def path_of_metadata(path) -> str:
    """Returns the file beside a file of JSON Lines in which its metadata stand."""
    return f"{path}.meta.json"


@contextlib.contextmanager
def _parquet_rows(path, texts, types, metadata) -> Iterator:
    """A function that appends lines. The types of columns that are not known follow from all rows, which therefore wait
    in a file beside the output until the last one has come."""
    import orjson

    shapes, rows = {}, 0
    with tempfile.TemporaryFile(dir=Path(path).parent) as waiting:

        def append(lines):
            nonlocal shapes, rows
            for line in lines:
                row = orjson.loads(line)
                shapes = shapes or dict.fromkeys(row)
                if row.keys() != shapes.keys():
                    raise InputError(
                        f"every row of a Parquet file must have the columns {', '.join(shapes)}, got "
                        f"{', '.join(row)} in row {rows + 1}: write .jsonl"
                    )
                for name in shapes:
                    if name not in types:
                        shapes[name] = widened(shapes[name], row[name])
                rows += 1
            waiting.write(b"".join([line + b"\n" for line in lines]))

        yield append
        waiting.seek(0)
        if not rows:
            shapes = dict.fromkeys(texts, "string") | types
        _write_row_groups(path, waiting, {name: types.get(name, shape) for name, shape in shapes.items()}, metadata)


def _write_row_groups(path, lines, types, metadata) -> None:
    """lines: of JSON, whose columns have these types."""
    import orjson
    from pyarrow import Table, parquet

    held = None
    if metadata is not None:
        held = {METADATA: json.dumps(metadata, ensure_ascii=False).encode("utf-8", "backslashreplace")}
    schema = schema_of(types).with_metadata(held)
    # pyarrow opens no path that is not UTF-8
    with open(path, "wb") as file, parquet.ParquetWriter(file, schema) as writer:
        group, size = [], 0
        while line := lines.readline():
            group.append(orjson.loads(line))
            size += len(line)
            if size >= ROW_GROUP:
                writer.write_table(Table.from_arrays(arrays_of(group, types), schema=schema))
                group, size = [], 0
        if group:
            writer.write_table(Table.from_arrays(arrays_of(group, types), schema=schema))


def column_types(columns) -> dict[str, object]:
    """The pyarrow types of the columns of `pair_columns`."""
    return {name: _arrow_type(column) for name, column in columns.items()}


def schema_of(types):
    """The pyarrow schema of columns whose types are pyarrow's, or a `Shape`."""
    import pyarrow

    fields = [
        (name, known if isinstance(known, pyarrow.DataType) else arrow_type(known)) for name, known in types.items()
    ]
    return pyarrow.schema(fields)


def arrays_of(rows: list[dict], types) -> list:
    """The columns of rows as pyarrow arrays; types as in `schema_of`."""
    import pyarrow

    arrays = []
    for name, known in types.items():
        values = [row[name] for row in rows]
        plain = isinstance(known, pyarrow.DataType)
        arrays.append(pyarrow.array(values, known) if plain else arrow_array(values, known))
    return arrays


def _arrow_type(column):
    import pyarrow

    if isinstance(column, Coded):
        return pyarrow.string()
    if _alone(column) or column.dtype.kind in "OU":
        return pyarrow.array([column] if _alone(column) else column.tolist()).type
    return pyarrow.from_numpy_dtype(column.dtype)
