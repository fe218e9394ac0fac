"""Preference data: numpy arrays in, numpy arrays out. Nothing here imports torch."""

from fastpref.curate.length import AdjustedScores, LengthReport, length_report, match_length, remove_length
from fastpref.curate.pairs import DropReason, PairSelection, all_pairings, select_pairs
from fastpref.curate.samples import InputError, RowProblem, ScoredSamples, read_scored_samples, to_logit
from fastpref.curate.scale import rescale

__all__ = [
    "AdjustedScores",
    "DropReason",
    "InputError",
    "LengthReport",
    "PairSelection",
    "RowProblem",
    "ScoredSamples",
    "all_pairings",
    "length_report",
    "match_length",
    "read_scored_samples",
    "remove_length",
    "rescale",
    "select_pairs",
    "to_logit",
]
