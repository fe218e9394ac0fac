"""Preference data: numpy arrays in, numpy arrays out. Nothing here imports torch."""

from fastpref.curate.diagnostics import Diagnosis, diagnose
from fastpref.curate.pairs import DropReason, PairSelection, all_pairings, select_pairs
from fastpref.curate.samples import InputError, RowProblem, ScoredSamples, read_scored_samples, to_logit
from fastpref.curate.scale import rescale

__all__ = [
    "Diagnosis",
    "DropReason",
    "InputError",
    "PairSelection",
    "RowProblem",
    "ScoredSamples",
    "all_pairings",
    "diagnose",
    "read_scored_samples",
    "rescale",
    "select_pairs",
    "to_logit",
]
