"""Samples and columns of pairs in memory: numbers with the texts left in their file, or everything at once."""

import os
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from fastpref.curate.files.rows import Fields
from fastpref.curate.files.sources import Source


@dataclass(frozen=True)
class RowProblem:
    """One row that was left out."""

    path: str
    row: int  # line of JSON Lines and CSV, row of other files, both from 1
    reason: str

    def __str__(self):
        return f"{self.path}:{self.row}: {self.reason}"


@dataclass(frozen=True)
class Samples:
    """What is known of every response without its text. The responses of prompt p are offsets[p]:offsets[p + 1]."""

    path: str  # what messages call the input
    offsets: np.ndarray  # int64 [prompts + 1]
    scores: dict[str, np.ndarray]  # by field, float64 [responses], NaN = no score
    lengths: np.ndarray  # int32 [responses], characters, or what the file says
    text_hash: np.ndarray  # uint64 [responses], equal for equal texts
    blank: np.ndarray  # bool [responses], empty or white space only
    truncated: np.ndarray | None  # bool [responses], False where a row does not say; None where no row does
    sources: np.ndarray | None  # int32 [responses], index into source_names, -1 = unknown; None where no row says
    source_names: list[str]  # ascending
    prompt_hash: np.ndarray  # uint64 [prompts], of the prompt with its tools, images and other context
    row: np.ndarray  # int64 [prompts], line of JSON Lines and CSV, row of other files; from 1; of a group the first
    position: np.ndarray  # int64 [prompts], ascending; where the row begins, as `reading` counts
    conversational: np.ndarray  # bool [prompts], lists of messages
    problems: list[RowProblem]  # rows that were left out
    fields: Fields  # as they were read
    stamp: tuple[int, int] = (0, 0)  # size in bytes and time of change of the files, in ns
    strength: np.ndarray | None = None  # float64 [prompts], how much the first response is preferred, by the file
    bad_responses: list[RowProblem] = field(default_factory=list)  # that were left out of a pool
    beside: dict[str, np.ndarray] = field(default_factory=dict)  # like scores: columns of numbers not asked for
    counts: dict[str, int] = field(default_factory=dict)  # rows and scores that say nothing, by reason: ties, ...
    inputs: tuple[Source, ...] = ()  # the files that were given
    files: tuple[Source, ...] = ()  # those that are read: these, or one of pools that were grouped
    layout: str = "pools"
    read_as: str = ""  # the layout, and the columns of its roles
    rows: int = 0  # that were read, blank lines aside
    scored: bool = True  # False: the scores only say which response is preferred

    @property
    def size(self) -> int:
        """Bytes of the files that are read."""
        return sum(os.path.getsize(source.path) for source in self.files)

    @property
    def published(self) -> bool:
        """Whether every pool is a published pair: the chosen response first, then the rejected one."""
        return self.fields.published

    @property
    def prompts(self) -> int:
        return len(self.row)

    @property
    def responses(self) -> int:
        return len(self.text_hash)


@dataclass(frozen=True)
class ScoredSamples:
    """Samples with their texts, every response with a score."""

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


class Coded(NamedTuple):
    """A column of names of which most occur often."""

    codes: np.ndarray  # [pairs] integers, index into names, -1 = none
    names: list[str]
