"""Preference data: numpy arrays in, numpy arrays out.

Importing this imports no torch: names marked * do, when they are first used. Numbers per response are [prompts, n], NaN
where there is none, or [responses] with offsets [prompts + 1].

The whole pipeline
    run                  from a file of scored samples to files of pairs, as a config says
    CurateConfig         what `run` does: a table per stage, a field per option
    config_from_toml     a CurateConfig from a TOML file
    CurateResult         what `run` returns: state, rows, summary, and notices (`curate.notices` explains their ids)
    InputError           raised for an input, option or output that is wrong

Files
    read_samples         scored samples without their texts
    Samples              what is known of every response without its text
    texts                the texts of samples, read a second time
    text_hashes          hashes of the texts of a file, such as those to decontaminate by
    read_scored_samples  scored samples with their texts
    ScoredSamples        prompts, responses and scores
    RowProblem           a row that was left out, and why
    write_pairs          pairs with their texts, as trainers read them (`curate.files.formats`)
    Coded                a column of names of which most occur often
    read_metadata        what `write_pairs` was given as metadata
    pair_rows            rows of samples to rows of pairs, for engines that map batches

Scales of scores
    to_logit             log(p / (1 - p)) of probabilities
    rescale              raw, logit, mad or normal_score

Hygiene and splits (`curate.hygiene.hygiene` finds copies, blanks, repeated and banned texts)
    Hygiene              its report
    Flag                 why a response would leave
    RepeatedTexts        texts under more prompts than a text of its own should be
    split_of             whether a prompt belongs to the test set

Wrong scores
    audit                sources whose scores the other sources do not explain
    SourceReport         what `audit` finds, per source
    exclude              masks that leave out the responses of flagged sources
    Exclusion            these masks: which responses are in the pool, and which may be chosen
    supplied             how many pairs each source supplies
    denoise_scores       single scores that the others of their prompt and source contradict
    CleanedScores        what `denoise_scores` finds
    denoise_judges       wrong pairs in judges' preference matrices
    vote_consensus       one score per response from the pairs on which judges vote
    CleanedJudges        what these two find
    consensus            one score per response from three judges or more
    Consensus            what `consensus` finds

Length
    length_report        how far length alone explains the pairs
    LengthReport         what it finds
    remove_length        scores less what goes with length within a prompt and a source
    AdjustedScores       these scores, and the slope
    match_length         pairs whose sides are near in length

Pairs
    select_pairs         the chosen and the rejected response of every prompt, by the distribution of its rewards
    all_pairings         every chosen above every rejected target of a grid
    PairSelection        the pairs of every prompt
    DropReason           why there is no pair

Margins and selection
    external_margins     of scores
    implicit_margins     of log-probs of a policy and its reference
    bees                 margins of several sources combined into one score per pair
    MarginScores         what `bees` makes of the margins
    MarginSource         what became of one source's margins
    normalised_margins   margins of one source in [0, 1]
    select_top           the pairs with the largest scores
    TopSelection         which these are
    compare_selections   a selection beside those of each source, of the raw sum, and of chance
    SelectionComparison  their pairs and overlaps
    select_prompts       the prompts whose best and worst response are furthest apart
    PromptSelection      which these are
    partition            margins in three parts
    Part                 bottom, middle, top

Routing and order
    route_by_margin      pairs of small margin go to SFT
    Routes               where every pair goes
    Route                SFT or the preference loss
    difficulty           of each pair, by one of the known signals
    easy_to_hard         the order of a curriculum
    distributed_order    one rank's part of an order
    learning_order       the loss of each pair under models that did not see it
    LearningOrder        what `learning_order` finds
    keep_easiest         the easiest share of the pairs

Goals
    goal_records         every pair twice, once for the score of each of its responses
    goal_reward          what a goal-conditioned pair prefers by
    goal_rewrite         puts the goal of a row into its prompt, for `write_pairs`
    goal_text            the text of a goal
    add_goal             a prompt with the text
    rescale_scores       scores moved from one range to another

What a set of pairs is worth
    diagnose             chosen quality and contrast
    Diagnosis            what it finds

With a model
    implicit_rewards *   beta (log pi - log pi_ref) of every response
    ImplicitRewards *    what it returns
    response_logps *     log-probs of every response under one model
    ResponseLogps *      what it returns
    pair_batches *       batches of pairs from token ids
    pair_logps *         log-probs of pairs under a model
    PairLogps *          what it returns
    pair_influence *     what a step on each pair takes off the validation loss
    loss_diff *          the loss of each pair, less that after training on validation pairs
    irm *                implicit reward margins
    PairScores *         what these three return
    truncated *          pairs of medium score
    intersection *       pairs whose every score is medium
    keep_rate *          the interval of scores that keeps a share of the pairs
    Kept *               what these three return
"""

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
