"""Scored samples from JSON Lines (also .gz) or Parquet: several responses per prompt, each with one score or more.

`read_samples` keeps what every method needs in columns of at most 64 bytes per response and leaves the texts in the
file, where `texts` and `write_pairs` read them a second time. `read_scored_samples` holds all of it. What a row may
look like is said in `fastpref.curate.rows`. Blank lines hold no row; a malformed row is reported with its line and left
out, never repaired.
"""

import math
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from fastpref.curate.files.rows import Fields, Text, check_unicode
from fastpref.curate.files.rows import score_fields as fields_with_scores
from fastpref.errors import InputError


@dataclass(frozen=True)
class RowProblem:
    """One row that was left out."""

    path: str
    row: int  # line of a JSON Lines file, row of a Parquet file, both from 1
    reason: str

    def __str__(self):
        return f"{self.path}:{self.row}: {self.reason}"


# ---- without the texts


@dataclass(frozen=True)
class Samples:
    """What is known of every response without its text. The responses of prompt p are offsets[p]:offsets[p + 1]."""

    path: str
    offsets: np.ndarray  # int64 [prompts + 1]
    scores: dict[str, np.ndarray]  # by field, float64 [responses], NaN = no score
    lengths: np.ndarray  # int32 [responses], characters, or what the file says
    text_hash: np.ndarray  # uint64 [responses], equal for equal texts
    blank: np.ndarray  # bool [responses], empty or white space only
    truncated: np.ndarray | None  # bool [responses], False where a row does not say; None where no row does
    sources: np.ndarray | None  # int32 [responses], index into source_names, -1 = unknown; None where no row says
    source_names: list[str]  # ascending
    prompt_hash: np.ndarray  # uint64 [prompts]
    row: np.ndarray  # int64 [prompts], line of a JSON Lines file, row of a Parquet file, both from 1
    position: np.ndarray  # int64 [prompts], byte at which the line begins (unpacked), rows before it in a Parquet file
    conversational: np.ndarray  # bool [prompts], lists of messages
    problems: list[RowProblem]
    fields: Fields  # as they were read
    stamp: tuple[int, int]  # size in bytes and time of change of the file, in ns

    @property
    def prompts(self) -> int:
        return len(self.row)

    @property
    def responses(self) -> int:
        return len(self.text_hash)


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
    from fastpref.curate.files import processes, reading

    path = os.fspath(path)
    if isinstance(score_fields, str):
        raise TypeError(f"score_fields must be a sequence of names, got the string {score_fields!r}")
    fields = Fields(None if score_fields is None else tuple(score_fields), source_field, length_field)
    stamp, total = reading.stamp(path), reading.extent(path)
    if fields.scores is None:
        fields = fields._replace(scores=reading.first_score_fields(path))
    workers = processes.worth(stamp[0]) if workers is None else workers

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
    samples = reading.joined(path, columns(), fields, stamp)
    reading.check_unchanged(samples)
    return samples


def texts(samples: Samples, prompts=None) -> Iterator[tuple[Text, list[Text]]]:
    """The prompt and the responses of each of `prompts` (indices, strictly increasing; None: all), from the file.

    Raises InputError when the file is not the one that was read.
    """
    from fastpref.curate.files import reading

    prompts = np.arange(samples.prompts) if prompts is None else np.asarray(prompts, dtype=np.int64)
    if (np.diff(prompts) <= 0).any():
        raise ValueError("prompts must be strictly increasing indices")
    if len(prompts) and not 0 <= prompts[0] <= prompts[-1] < samples.prompts:
        raise ValueError(f"prompts must lie in [0, {samples.prompts}), got {prompts[0]} to {prompts[-1]}")
    for part, here, known in reading.parts_again(samples, prompts):
        for prompt, row in zip(prompts[here], reading.same_rows(samples.path, part, known), strict=True):
            before = samples.text_hash[samples.offsets[prompt] : samples.offsets[prompt + 1]]
            if (reading.text_hash(row.responses) != before).any():
                raise reading.changed(samples.path)
            yield row.prompt, row.responses


def text_hashes(path) -> np.ndarray:
    """uint64 [texts], ascending: the hashes by which `Samples` knows the texts of a file, to find those held out.

    A row is a string, or an object whose fields are looked through, whatever their names: strings, lists of strings and
    lists of messages. Every text counts as a string and as one message, of a user and of an assistant.

    Raises InputError when the file or a row cannot be read.
    """
    from fastpref.curate.files import reading

    path = os.fspath(path)
    found = set()
    for number, row in reading.numbered_rows(path, None):
        if not isinstance(row, str | dict):
            reason = row if isinstance(row, ValueError) else f"a row must be an object, got {type(row).__name__}"
            raise InputError(str(RowProblem(path, number, str(reason))))
        found.update(reading.hashes_of_texts(row))
    return np.sort(np.frombuffer(b"".join(found), ">u8").astype(np.uint64))


# ---- with the texts


@dataclass(frozen=True)
class ScoredSamples:
    path: str  # where they came from
    prompts: list[str]
    responses: list[list[str]]  # ragged
    scores: list[np.ndarray]  # float64, finite, as long as the responses of the prompt
    problems: list[RowProblem]
    score_field: str | None  # the field the scores came from; None without a single row

    def head(self, prompts) -> "ScoredSamples":
        """The first so many prompts; the problems of the whole file."""
        return replace(
            self, prompts=self.prompts[:prompts], responses=self.responses[:prompts], scores=self.scores[:prompts]
        )

    def score_matrix(self) -> np.ndarray:
        """[prompts, most responses] float64, short pools padded with NaN."""
        width = max(map(len, self.scores), default=0)
        matrix = np.full((len(self.scores), width), np.nan)
        for row, scores in zip(matrix, self.scores, strict=True):
            row[: len(scores)] = scores
        return matrix


def read_scored_samples(path, score_field=None) -> ScoredSamples:
    """Reads a file of strings as `read_samples` does, with the texts; every response must have a score.

    score_field: name of the field with the scores. None: the first row that has a usual one decides for the whole file.

    Raises InputError when the file as a whole cannot be read.
    """
    from fastpref.curate.files import reading

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


def to_logit(probability, clamp=1e-8) -> np.ndarray:
    """log(p / (1 - p)) in float64; p outside [clamp, 1 - clamp] is moved to that bound, NaN stays NaN.

    Raises ValueError when a value lies outside [0, 1].
    """
    probability = np.asarray(probability, dtype=np.float64)
    if ((probability < 0) | (probability > 1)).any():
        raise ValueError(
            f"probability must lie in [0, 1], got {np.nanmin(probability):g} to {np.nanmax(probability):g}"
        )
    probability = np.clip(probability, clamp, 1 - clamp)
    return np.log(probability) - np.log1p(-probability)
