"""Preference data: numpy arrays in, numpy arrays out. Nothing here imports torch."""

from fastpref.curate.files import Coded, read_metadata, write_pairs
from fastpref.curate.pairs import DropReason, PairSelection, select_pairs
from fastpref.curate.samples import (
    InputError,
    RowProblem,
    Samples,
    ScoredSamples,
    read_samples,
    read_scored_samples,
    texts,
    to_logit,
)

__all__ = [
    "Coded",
    "DropReason",
    "InputError",
    "PairSelection",
    "RowProblem",
    "Samples",
    "ScoredSamples",
    "read_metadata",
    "read_samples",
    "read_scored_samples",
    "select_pairs",
    "texts",
    "to_logit",
    "write_pairs",
]
