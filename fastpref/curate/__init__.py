"""Preference data: numpy arrays in, numpy arrays out. Nothing here imports torch."""

from fastpref.curate.goals import add_goal, goal_records, goal_reward, goal_rewrite, goal_text, rescale_scores
from fastpref.curate.margins import MarginScores, MarginSource, Part, PromptSelection, SelectionComparison, TopSelection, bees, compare_selections, external_margins, implicit_margins, normalised_margins, partition, select_prompts, select_top
from fastpref.curate.pairs import DropReason, PairSelection, all_pairings, select_pairs
from fastpref.curate.routing import LearningOrder, Route, Routes, difficulty, distributed_order, easy_to_hard, keep_easiest, learning_order, route_by_margin
from fastpref.curate.samples import InputError, RowProblem, ScoredSamples, read_scored_samples, to_logit
from fastpref.curate.scale import rescale

__all__ = [
    "DropReason",
    "InputError",
    "LearningOrder",
    "MarginScores",
    "MarginSource",
    "PairSelection",
    "Part",
    "PromptSelection",
    "Route",
    "Routes",
    "RowProblem",
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
    "keep_easiest",
    "learning_order",
    "normalised_margins",
    "partition",
    "read_scored_samples",
    "rescale",
    "rescale_scores",
    "route_by_margin",
    "select_pairs",
    "select_prompts",
    "select_top",
    "to_logit",
]
