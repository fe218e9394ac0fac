"""Preference data: numpy arrays in, numpy arrays out. Nothing here imports torch."""

from fastpref.curate.pairs import DropReason, PairSelection, select_pairs
from fastpref.curate.samples import InputError, RowProblem, ScoredSamples, read_scored_samples, to_logit

__all__ = [
    "DropReason",
    "InputError",
    "PairSelection",
    "RowProblem",
    "ScoredSamples",
    "read_scored_samples",
    "select_pairs",
    "to_logit",
]
