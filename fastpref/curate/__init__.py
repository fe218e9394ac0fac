"""Preference data: numpy arrays in, numpy arrays out. Importing this imports no torch: what needs a model is lazy."""

from importlib import import_module
from typing import TYPE_CHECKING

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
from fastpref.curate.diagnostics import Diagnosis, diagnose
from fastpref.curate.files.batches import pair_rows
from fastpref.curate.files.samples import read_samples, read_scored_samples, text_hashes, texts
from fastpref.curate.files.table import Coded, RowProblem, Samples, ScoredSamples
from fastpref.curate.files.writing import read_metadata, write_pairs
from fastpref.curate.goals import add_goal, goal_records, goal_reward, goal_rewrite, goal_text, rescale_scores
from fastpref.curate.hygiene import Flag, Hygiene, RepeatedTexts, split_of
from fastpref.curate.length import AdjustedScores, LengthReport, length_report, match_length, remove_length
from fastpref.curate.margins import (
    MarginScores,
    MarginSource,
    Part,
    PromptSelection,
    SelectionComparison,
    TopSelection,
    bees,
    compare_selections,
    external_margins,
    implicit_margins,
    normalised_margins,
    partition,
    select_prompts,
    select_top,
)
from fastpref.curate.pairs import DropReason, PairSelection, all_pairings, select_pairs
from fastpref.curate.pipeline.config import CurateConfig, config_from_toml
from fastpref.curate.pipeline.run import CurateResult, run
from fastpref.curate.routing import (
    LearningOrder,
    Route,
    Routes,
    difficulty,
    distributed_order,
    easy_to_hard,
    keep_easiest,
    learning_order,
    route_by_margin,
)
from fastpref.curate.scale import rescale, to_logit
from fastpref.errors import InputError

if TYPE_CHECKING:
    from fastpref.curate.influence import (
        Kept,
        PairLogps,
        PairScores,
        intersection,
        irm,
        keep_rate,
        loss_diff,
        pair_batches,
        pair_influence,
        pair_logps,
        truncated,
    )
    from fastpref.curate.rewards import ImplicitRewards, ResponseLogps, implicit_rewards, response_logps

# name -> module that imports torch
_WITH_TORCH = {
    "ImplicitRewards": "fastpref.curate.rewards",
    "ResponseLogps": "fastpref.curate.rewards",
    "implicit_rewards": "fastpref.curate.rewards",
    "response_logps": "fastpref.curate.rewards",
    "Kept": "fastpref.curate.influence",
    "PairLogps": "fastpref.curate.influence",
    "PairScores": "fastpref.curate.influence",
    "intersection": "fastpref.curate.influence",
    "irm": "fastpref.curate.influence",
    "keep_rate": "fastpref.curate.influence",
    "loss_diff": "fastpref.curate.influence",
    "pair_batches": "fastpref.curate.influence",
    "pair_influence": "fastpref.curate.influence",
    "pair_logps": "fastpref.curate.influence",
    "truncated": "fastpref.curate.influence",
}
__all__ = [
    "AdjustedScores",
    "CleanedJudges",
    "CleanedScores",
    "Coded",
    "Consensus",
    "CurateConfig",
    "CurateResult",
    "Diagnosis",
    "DropReason",
    "Exclusion",
    "Flag",
    "Hygiene",
    "ImplicitRewards",
    "InputError",
    "Kept",
    "LearningOrder",
    "LengthReport",
    "MarginScores",
    "MarginSource",
    "PairLogps",
    "PairScores",
    "PairSelection",
    "Part",
    "PromptSelection",
    "RepeatedTexts",
    "ResponseLogps",
    "Route",
    "Routes",
    "RowProblem",
    "Samples",
    "ScoredSamples",
    "SelectionComparison",
    "SourceReport",
    "TopSelection",
    "add_goal",
    "all_pairings",
    "audit",
    "bees",
    "compare_selections",
    "config_from_toml",
    "consensus",
    "denoise_judges",
    "denoise_scores",
    "diagnose",
    "difficulty",
    "distributed_order",
    "easy_to_hard",
    "exclude",
    "external_margins",
    "goal_records",
    "goal_reward",
    "goal_rewrite",
    "goal_text",
    "implicit_margins",
    "implicit_rewards",
    "intersection",
    "irm",
    "keep_easiest",
    "keep_rate",
    "learning_order",
    "length_report",
    "loss_diff",
    "match_length",
    "normalised_margins",
    "pair_batches",
    "pair_influence",
    "pair_logps",
    "pair_rows",
    "partition",
    "read_metadata",
    "read_samples",
    "read_scored_samples",
    "remove_length",
    "rescale",
    "rescale_scores",
    "response_logps",
    "route_by_margin",
    "run",
    "select_pairs",
    "select_prompts",
    "select_top",
    "split_of",
    "supplied",
    "text_hashes",
    "texts",
    "to_logit",
    "truncated",
    "vote_consensus",
    "write_pairs",
]


def __getattr__(name):
    if name not in _WITH_TORCH:
        raise AttributeError(f"module 'fastpref.curate' has no attribute {name!r}")
    value = getattr(import_module(_WITH_TORCH[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
