"""Preference data: numpy arrays in, numpy arrays out. Importing this imports no torch: what needs a model is lazy."""

from importlib import import_module
from typing import TYPE_CHECKING

from fastpref.curate.files import Coded, read_metadata, write_pairs
from fastpref.curate.goals import add_goal, goal_records, goal_reward, goal_rewrite, goal_text, rescale_scores
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
from fastpref.curate.scale import rescale

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
    "Coded",
    "DropReason",
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
    "ResponseLogps",
    "Route",
    "Routes",
    "RowProblem",
    "Samples",
    "ScoredSamples",
    "SelectionComparison",
    "TopSelection",
    "add_goal",
    "all_pairings",
    "bees",
    "compare_selections",
    "difficulty",
    "distributed_order",
    "easy_to_hard",
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
    "partition",
    "read_metadata",
    "read_samples",
    "read_scored_samples",
    "remove_length",
    "rescale",
    "rescale_scores",
    "response_logps",
    "route_by_margin",
    "select_pairs",
    "select_prompts",
    "select_top",
    "texts",
    "to_logit",
    "truncated",
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
