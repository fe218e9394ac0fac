"""Preference matrices: built from comparisons or scores, cleaned of corrupted pairs, ordered; and audits of sources."""

from fastpref.preference_matrix._comparisons import JudgeReport, Preferences, from_comparisons, from_scores
from fastpref.preference_matrix._denoise import (
    REASONS,
    CorruptedPairs,
    Denoised,
    DenoiseInfo,
    Ordering,
    apply_link,
    denoise,
    invert_link,
    order,
)
from fastpref.preference_matrix._sources import (
    DenoisedScores,
    NothingToClean,
    SourceAudit,
    audit_sources,
    denoise_scores,
)

__all__ = [
    "REASONS",
    "CorruptedPairs",
    "DenoiseInfo",
    "Denoised",
    "DenoisedScores",
    "JudgeReport",
    "NothingToClean",
    "Ordering",
    "Preferences",
    "SourceAudit",
    "apply_link",
    "audit_sources",
    "denoise",
    "denoise_scores",
    "from_comparisons",
    "from_scores",
    "invert_link",
    "order",
]
