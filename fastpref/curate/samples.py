"""Scored samples: several responses per prompt, each with a score, from JSON Lines or Parquet.

A row is `{"prompt": str, "responses": [str, ...], "scores": [number, ...]}`; further fields are ignored. A row that is
not like that is reported with file and line and left out, never repaired.
"""

import gzip
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

SCORE_FIELDS = ("scores", "win_prob")


class InputError(ValueError):
    """Something the user can mend; the command line prints its message as one line and exits with code 2."""


@dataclass(frozen=True)
class RowProblem:
    """One row that was left out."""

    path: str
    row: int  # line of a JSON Lines file, row of a Parquet file, both from 1
    reason: str

    def __str__(self):
        return f"{self.path}:{self.row}: {self.reason}"


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
    """Reads `.jsonl`, `.jsonl.gz` or `.parquet`, told apart by their first bytes rather than by name.

    score_field: name of the field with the scores. None: the first row that has one of `SCORE_FIELDS` decides for the
        whole file, so that two units are never mixed.

    Blank lines hold no row and are skipped. Raises InputError when the file as a whole cannot be read.
    """
    path = os.fspath(path)
    prompts, responses, scores, problems = [], [], [], []
    for number, row in _numbered_rows(path):
        try:
            if isinstance(row, _Unreadable):
                raise ValueError(row.reason)
            if not isinstance(row, dict):
                raise ValueError(f"a row must be an object, got {type(row).__name__}")
            if score_field is None:
                score_field = next((field for field in SCORE_FIELDS if field in row), None)
            prompt, pool, pool_scores = _parse_row(row, score_field)
        except ValueError as error:
            problems.append(RowProblem(path, number, str(error)))
            continue
        prompts.append(prompt)
        responses.append(pool)
        scores.append(pool_scores)
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


@dataclass(frozen=True)
class _Unreadable:
    reason: str


def _numbered_rows(path) -> Iterator[tuple[int, object]]:
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
        yield from _parquet_rows(path) if magic == b"PAR1" else _json_rows(path, magic)
    except (OSError, EOFError) as error:  # gzip: EOFError for a cut file, BadGzipFile is an OSError
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _json_rows(path, magic) -> Iterator[tuple[int, object]]:
    opener = gzip.open if magic[:2] == b"\x1f\x8b" else open
    with opener(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            line = line.strip()
            if not line:
                continue
            try:
                # utf-8-sig: files from Windows start with a byte-order mark.
                yield number, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                yield number, _Unreadable(f"not UTF-8 at byte {error.start}")
            except json.JSONDecodeError as error:
                yield number, _Unreadable(f"not JSON: {error.msg} at column {error.colno}")
            except (RecursionError, ValueError) as error:
                yield number, _Unreadable(f"not JSON: {error}")


def _parquet_rows(path) -> Iterator[tuple[int, object]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f'{path} is a Parquet file, which needs pyarrow: pip install "fastpref[demo]"') from error
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pyarrow.ArrowException as error:
        raise InputError(f"cannot read {path} after row {number}: {error}".splitlines()[0]) from error


def _parse_row(row, score_field) -> tuple[str, list[str], np.ndarray]:
    """Raises ValueError with the reason when the row is malformed."""
    for field in ("prompt", "responses"):
        if field not in row:
            raise ValueError(f"no field {field!r}")
    if score_field is None or score_field not in row:
        raise ValueError(f"no field {score_field!r}" if score_field else "no field 'scores' (or name it: score_field)")
    prompt, responses, scores = row["prompt"], row["responses"], row[score_field]
    _check_text("prompt", prompt)
    for name, value in (("responses", responses), (score_field, scores)):
        if not isinstance(value, list):
            raise ValueError(f"{name} must be a list, got {type(value).__name__}")
    if len(responses) != len(scores):
        raise ValueError(f"{score_field} must have one entry per response, got {len(scores)} for {len(responses)}")
    for index, response in enumerate(responses):
        _check_text(f"responses[{index}]", response)
    return prompt, responses, np.array([_number(f"{score_field}[{i}]", score) for i, score in enumerate(scores)])


def _check_text(name, value) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        # JSON can spell half a surrogate pair; no tokenizer and no UTF-8 file can hold it.
        raise ValueError(f"{name} holds a lone surrogate, which is not Unicode text") from None


def _number(name, value) -> float:
    # bool is an int in Python, but `true` is no score.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got an integer beyond float64") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number
