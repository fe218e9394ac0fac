"""Scored samples from JSON Lines (also .gz) or Parquet: several responses per prompt, each with one score or more.

`read_samples` keeps what every method needs in columns of at most 64 bytes per response and leaves the texts in the
file, where `texts` and `write_pairs` read them a second time. `read_scored_samples` holds all of it. What a row may
look like is said in `fastpref.curate.files.rows`. Blank lines hold no row; a malformed row is reported with its line
and left out, never repaired.
"""

import math
import os
from collections import deque
from collections.abc import Iterator

import numpy as np

from fastpref.curate.files import processes
from fastpref.curate.files.rows import Fields, Text, check_unicode
from fastpref.curate.files.rows import score_fields as fields_with_scores
from fastpref.curate.files.table import RowProblem, Samples, ScoredSamples
from fastpref.errors import InputError


def read_samples(
    path, *, score_fields=None, source_field=None, length_field=None, workers=None, progress=None
) -> Samples:
    """Reads `.jsonl`, `.jsonl.gz` or `.parquet`, told apart by their first bytes rather than by name.

    score_fields: names of the fields with the scores, all of which every row must have. None: the first row that has
        "scores" or else "win_prob" (UltraFeedback: "overall_score" and "fine-grained_score", pairs: "score") decides
        for the whole file, so that two units are never mixed.
    source_field: the field that says where each response comes from. None: "sources" ("model", "source") where a row
        has it.
    length_field: the field of given lengths, such as tokens. None: "lengths" ("length", "len") where a row has it, and
        the number of characters elsewhere.
    workers: processes. None: one per CPU that this process may use, for files large enough to be worth them.
    progress: called with (done, total), in bytes of the file or in rows of a Parquet file.

    Raises InputError when the file as a whole cannot be read.
    """
    from fastpref.curate.files import reading  # needs orjson and xxhash, which not every installation has

    path = os.fspath(path)
    if isinstance(score_fields, str):
        raise TypeError(f"score_fields must be a sequence of names, got the string {score_fields!r}")
    fields = Fields(None if score_fields is None else tuple(score_fields), source_field, length_field)
    stamp, total = reading.stamp(path), reading.extent(path)
    if fields.scores is None:
        fields = fields._replace(scores=reading.first_score_fields(path))
    workers = processes.worthwhile_processes(stamp[0]) if workers is None else workers

    def tasks():
        for part in reading.parts(path, fields):
            done.append(part.done)
            yield path, part, fields

    def columns():
        for part in processes.in_processes(reading.columns_of_part, tasks(), workers):
            yield part
            if progress is not None:
                progress(done.popleft(), total)

    done = deque()
    samples = reading.joined_columns(path, columns(), fields, stamp)
    reading.check_unchanged(samples)
    return samples


def texts(samples: Samples, prompts=None) -> Iterator[tuple[Text, list[Text]]]:
    """The prompt and the responses of each of `prompts` (indices, strictly increasing; None: all), from the file.

    Raises InputError when the file is not the one that was read.
    """
    from fastpref.curate.files import reading  # needs orjson and xxhash

    prompts = np.arange(samples.prompts) if prompts is None else np.asarray(prompts, dtype=np.int64)
    if (np.diff(prompts) <= 0).any():
        raise ValueError("prompts must be strictly increasing indices")
    if len(prompts) and not 0 <= prompts[0] <= prompts[-1] < samples.prompts:
        raise ValueError(f"prompts must lie in [0, {samples.prompts}), got {prompts[0]} to {prompts[-1]}")
    for part, here, known in reading.parts_again(samples, prompts):
        for prompt, row in zip(prompts[here], reading.same_rows(samples.path, part, known), strict=True):
            before = samples.text_hash[samples.offsets[prompt] : samples.offsets[prompt + 1]]
            if (reading.text_hash(row.responses) != before).any():
                raise reading.changed_error(samples.path)
            yield row.prompt, row.responses


def text_hashes(path) -> np.ndarray:
    """uint64 [texts], ascending: the hashes by which `Samples` knows the texts of a file, to find those held out.

    A row is a string, or an object whose fields are looked through, whatever their names: strings, lists of strings and
    lists of messages. Every text counts as a string and as one message, of a user and of an assistant.

    Raises InputError when the file or a row cannot be read.
    """
    from fastpref.curate.files import reading  # needs orjson and xxhash

    path = os.fspath(path)
    found = set()
    for number, row in reading.numbered_rows(path, None):
        if not isinstance(row, str | dict):
            reason = row if isinstance(row, ValueError) else f"a row must be an object, got {type(row).__name__}"
            raise InputError(str(RowProblem(path, number, str(reason))))
        found.update(reading.hashes_of_texts(row))
    return np.sort(np.frombuffer(b"".join(found), ">u8").astype(np.uint64))


# ---- with the texts


def read_scored_samples(path, score_field=None) -> ScoredSamples:
    """Reads a file of strings as `read_samples` does, with the texts; every response must have a score.

    score_field: name of the field with the scores. None: the first row that has a usual one decides for the whole file.

    Raises InputError when the file as a whole cannot be read.
    """
    from fastpref.curate.files import reading  # needs orjson and xxhash

    path = os.fspath(path)
    prompts, responses, scores, problems = [], [], [], []
    for number, row in reading.numbered_rows(path, Fields(score_field and (score_field,))):
        try:
            if score_field is None:
                score_field = next(iter(fields_with_scores(row) or ()), None)
            parsed = reading.valid_row(row, Fields(None if score_field is None else (score_field,)))
            check_unicode(parsed)
            if not isinstance(parsed.prompt, str):
                raise ValueError("prompt must be a string, got list")
            (pool_scores,) = parsed.scores.values()
            if (missing := next((i for i, score in enumerate(pool_scores) if math.isnan(score)), None)) is not None:
                raise ValueError(f"{score_field}[{missing}] must be a number, got none")
        except ValueError as error:
            problems.append(RowProblem(path, number, str(error)))
            continue
        prompts.append(parsed.prompt)
        responses.append(parsed.responses)
        scores.append(np.array(pool_scores))
    return ScoredSamples(path, prompts, responses, scores, problems, score_field)
