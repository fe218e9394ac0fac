"""Preference data: numpy arrays in, numpy arrays out. Nothing here imports torch."""

from fastpref.curate.batches import pair_rows
from fastpref.curate.diagnostics import Diagnosis, diagnose
from fastpref.curate.files import Coded, read_metadata, write_pairs
from fastpref.curate.length import AdjustedScores, LengthReport, length_report, match_length, remove_length
from fastpref.curate.pairs import DropReason, PairSelection, all_pairings, select_pairs
from fastpref.curate.samples import (
    InputError,
    RowProblem,
    Samples,
    ScoredSamples,
    read_samples,
    read_scored_samples,
    text_hashes,
    texts,
    to_logit,
)
from fastpref.curate.scale import rescale

__all__ = [
    "AdjustedScores",
    "Coded",
    "Diagnosis",
    "DropReason",
    "InputError",
    "LengthReport",
    "PairSelection",
    "RowProblem",
    "Samples",
    "ScoredSamples",
    "all_pairings",
    "diagnose",
    "length_report",
    "match_length",
    "pair_rows",
    "read_metadata",
    "read_samples",
    "read_scored_samples",
    "remove_length",
    "rescale",
    "select_pairs",
    "text_hashes",
    "texts",
    "to_logit",
    "write_pairs",
]
