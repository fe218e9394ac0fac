"""Scored samples, or pairs that are published: several responses per prompt, in any of the layouts of `layouts`.

`read_samples` keeps what every method needs in columns of at most 64 bytes per response and leaves the texts in the
file, where `texts` and `write_pairs` read them a second time. `read_scored_samples` holds all of it. Blank lines hold
no row; a malformed row is reported with its line and left out, never repaired.
"""

import math
import os
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from fastpref.curate.files import processes
from fastpref.curate.files.rows import Text, without_bad_unicode
from fastpref.curate.files.table import RowProblem, Samples, ScoredSamples
from fastpref.errors import InputError

if TYPE_CHECKING:
    from fastpref.curate.files.inputs import Inputs


def read_samples(
    path,
    *,
    score_fields=None,
    source_field=None,
    length_field=None,
    layout=None,
    columns=None,
    keep=(),
    missing=(),
    workers=None,
    progress=None,
) -> Samples:
    """Reads JSON Lines, a JSON array, CSV, Parquet or Arrow, told apart by their first bytes rather than by name.

    path: a file, packed by gzip or zstd or not; a glob; a folder; "-" for stdin; an address that fsspec opens; or a
        list of these.
    score_fields: names of the fields with the scores, all of which every row must have. None: the usual ones of the
        layout, as the first row that has any says for the whole input, so that two units are never mixed.
    source_field: the field that says where each response comes from. None: "sources" ("model", "source") where a row
        has it.
    length_field: the field of given lengths, such as tokens. None: "lengths" ("length", "len") where a row has it, and
        the number of characters elsewhere.
    layout: a name of `fastpref curate --help-layouts`. None: the only one that fits the columns.
    columns: role -> column, where the file calls it otherwise.
    keep: columns that reach the rows of `write_pairs`, beside tools, images and others that change what a prompt means.
    missing: scores that stand for none, such as -1.
    workers: processes. None: one per CPU that this process may use, for files large enough to be worth them.
    progress: called with (done, total), in bytes of the files or in rows of Parquet files.

    Raises InputError when the input as a whole cannot be read.
    """
    from fastpref.curate.files import reading  # needs orjson, xxhash and pyarrow, which not every installation has

    inputs = find_inputs(
        path,
        score_fields=score_fields,
        source_field=source_field,
        length_field=length_field,
        layout=layout,
        columns=columns,
        keep=keep,
        missing=missing,
    )
    stamp, total = reading.stamp(inputs.inputs), sum(map(reading.extent, inputs.files))
    size = sum(os.path.getsize(source.path) for source in inputs.files)
    workers = processes.worthwhile_processes(size) if workers is None else workers

    def tasks():
        for part in reading.parts(inputs.files, inputs.fields):
            done.append(part.done)
            yield inputs.files[part.file], part, inputs.fields

    def columns_of_parts():
        for part in processes.in_processes(reading.columns_of_part, tasks(), workers):
            yield part
            if progress is not None:
                progress(done.popleft(), total)

    done = deque()
    known = {name: getattr(inputs, name) for name in ("inputs", "files", "layout", "read_as", "scored")}
    if inputs.rows is not None:
        known["rows"] = inputs.rows
    samples = reading.joined_columns(inputs.name, columns_of_parts(), inputs.fields, stamp=stamp, **known)
    if inputs.numbers is not None:
        samples.row[:] = inputs.numbers[samples.row - 1]
        samples.problems.extend(inputs.problems)
        samples.counts.update(inputs.counts)
    reading.check_unchanged(samples)
    return samples


def find_inputs(path, *, score_fields, source_field, length_field, layout, columns, keep, missing) -> "Inputs":
    """The files of an input and what is read of them; arguments and errors as of `read_samples`."""
    from fastpref.curate.files.inputs import Request, open_inputs

    if isinstance(score_fields, str):
        raise TypeError(f"score_fields must be a sequence of names, got the string {score_fields!r}")
    scores = None if score_fields is None else tuple(score_fields)
    request = Request(scores, source_field, length_field, layout, dict(columns or {}), tuple(keep), tuple(missing))
    return open_inputs(path, request)


def texts(samples: Samples, prompts=None) -> Iterator[tuple[Text, list[Text]]]:
    """The prompt and the responses of each of `prompts` (indices, strictly increasing; None: all), from the file.

    Raises InputError when the file is not the one that was read.
    """
    from fastpref.curate.files import reading  # needs orjson, xxhash and pyarrow
    from fastpref.curate.files.texts import text_hash

    prompts = np.arange(samples.prompts) if prompts is None else np.asarray(prompts, dtype=np.int64)
    if (np.diff(prompts) <= 0).any():
        raise ValueError("prompts must be strictly increasing indices")
    if len(prompts) and not 0 <= prompts[0] <= prompts[-1] < samples.prompts:
        raise ValueError(f"prompts must lie in [0, {samples.prompts}), got {prompts[0]} to {prompts[-1]}")
    for part, here, known in reading.parts_again(samples, prompts):
        rows = reading.same_rows(samples.files[part.file], part, known, samples.fields)
        for prompt, row in zip(prompts[here], rows, strict=True):
            row = without_bad_unicode(row, samples.fields)
            before = samples.text_hash[samples.offsets[prompt] : samples.offsets[prompt + 1]]
            if (text_hash(row.responses) != before).any():
                raise reading.changed_error(samples.path)
            yield row.prompt, row.responses


def text_hashes(path) -> np.ndarray:
    """uint64 [texts], ascending: the hashes by which `Samples` knows the texts of a file, to find those held out.

    A row is a string, or an object whose fields are looked through, whatever their names: strings, lists of strings and
    lists of messages. Every text counts as a string and as one message, of a user and of an assistant.

    Raises InputError when the file or a row cannot be read.
    """
    from fastpref.curate.files.containers import numbered_rows  # needs orjson and pyarrow
    from fastpref.curate.files.sources import find_sources
    from fastpref.curate.files.texts import hashes_of_texts

    found = set()
    for source in find_sources(path):
        for number, row in numbered_rows(source):
            if not isinstance(row, str | dict):
                reason = row if isinstance(row, ValueError) else f"a row must be an object, got {type(row).__name__}"
                raise InputError(str(RowProblem(source.name, number, str(reason))))
            found.update(hashes_of_texts(row))
    return np.sort(np.frombuffer(b"".join(found), ">u8").astype(np.uint64))


# ---- with the texts


def read_scored_samples(path, score_field=None) -> ScoredSamples:
    """Reads a file of strings as `read_samples` does, with the texts; every response must have a score.

    score_field: name of the field with the scores. None: the first row that has a usual one decides for the whole file.

    Raises InputError when the file as a whole cannot be read.
    """
    from fastpref.curate.files import reading  # needs orjson, xxhash and pyarrow
    from fastpref.curate.files.inputs import Request, open_inputs

    inputs = open_inputs(path, Request(None if score_field is None else (score_field,)))
    score_field = next(iter(inputs.fields.scores or ()), None)
    prompts, responses, scores, problems = [], [], [], []
    fields = inputs.fields._replace(scores=inputs.fields.scores and (score_field,))
    for path_of_row, number, row in reading.placed_rows(inputs.files, fields):
        try:
            parsed = without_bad_unicode(reading.valid_row(row, fields), fields)
            if not isinstance(parsed.prompt, str):
                raise ValueError("prompt must be a string, got list")
            (pool_scores,) = parsed.scores.values()
            if parsed.bad:
                raise ValueError(next(iter(parsed.bad.values())))
            if (missing := next((i for i, score in enumerate(pool_scores) if math.isnan(score)), None)) is not None:
                raise ValueError(f"{score_field}[{missing}] must be a number, got none")
        except ValueError as error:
            problems.append(RowProblem(path_of_row, number, str(error)))
            continue
        prompts.append(parsed.prompt)
        responses.append(parsed.responses)
        scores.append(np.array(pool_scores))
    return ScoredSamples(inputs.name, prompts, responses, scores, problems, score_field)
