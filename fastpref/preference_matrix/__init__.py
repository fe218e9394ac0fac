"""Preference matrices, built from comparisons or scores, cleaned of corrupted pairs, ordered; and audits of sources.

Building them
    from_comparisons    who was preferred to whom -> Preferences; presentation orders balanced, and reported per judge
    from_scores         scores of several judges -> Preferences
    Preferences         compared pairs, each once, with the votes for either side
    JudgeReport         per judge: its votes, inconsistency and preference for an order of presentation
    apply_link          probabilities -> logits, probits, or what is above 1/2
    invert_link         the inverse of apply_link

Cleaning them
    denoise             finds corrupted pairs, and scores the items without them -> Denoised
    Denoised            the cleaned probabilities, the scores, the corrupted pairs and a DenoiseInfo
    DenoiseInfo         per matrix: convergence, noise, share of corrupted pairs, why it was left as it was
    CorruptedPairs      the pairs that the fit does not believe, with their observed and fitted probabilities
    REASONS             what the numbers in DenoiseInfo.reason mean
    NothingToClean      raised (a ValueError) for data in which nothing tells right from wrong

Ordering items
    order               best first, and which are tied -> Ordering
    Ordering            indices, ranks and ties

Scores of many sources
    audit_sources       which columns of [prompts, sources] the other sources do not explain -> SourceAudit
    SourceAudit         per source: outlyingness, z, interval, order, flag
    denoise_scores      finds single wrong entries of [prompts, sources] -> DenoisedScores
    DenoisedScores      the cleaned scores and the corrupted entries
"""

from fastpref.preference_matrix._comparisons import from_comparisons, from_scores
from fastpref.preference_matrix._denoise import REASONS, CorruptedPairs, Denoised, DenoiseInfo, denoise
from fastpref.preference_matrix._ordering import Ordering, order
from fastpref.preference_matrix._refusals import NothingToClean
from fastpref.preference_matrix._sources import DenoisedScores, SourceAudit, audit_sources, denoise_scores
from fastpref.preference_matrix._table import JudgeReport, Preferences, apply_link, invert_link

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
