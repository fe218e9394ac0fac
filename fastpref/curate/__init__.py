"""Preference data: numpy arrays in, numpy arrays out. Nothing here imports torch."""

from fastpref.curate.clean import (
    CleanedJudges,
    CleanedScores,
    Consensus,
    Exclusion,
    SourceReport,
    audit,
    consensus,
    denoise_judges,
    denoise_scores,
    exclude,
    supplied,
    vote_consensus,
)
from fastpref.curate.hygiene import Flag, Hygiene, RepeatedTexts, split_of
from fastpref.curate.pairs import DropReason, PairSelection, select_pairs
from fastpref.curate.samples import InputError, RowProblem, ScoredSamples, read_scored_samples, to_logit

__all__ = [
    "CleanedJudges",
    "CleanedScores",
    "Consensus",
    "DropReason",
    "Exclusion",
    "Flag",
    "Hygiene",
    "InputError",
    "PairSelection",
    "RepeatedTexts",
    "RowProblem",
    "ScoredSamples",
    "SourceReport",
    "audit",
    "consensus",
    "denoise_judges",
    "denoise_scores",
    "exclude",
    "read_scored_samples",
    "select_pairs",
    "split_of",
    "supplied",
    "to_logit",
    "vote_consensus",
]
