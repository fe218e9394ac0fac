"""Stage construct: the pairs of every prompt, by the distribution of its scores or as they were published."""

import warnings
from dataclasses import dataclass, replace

import numpy as np

from fastpref.curate.length import match_length
from fastpref.curate.notices import DataWarning
from fastpref.curate.pairs import DropReason, PairSelection, published_pairs, select_pairs, small_pool
from fastpref.curate.pipeline.options import Options, choice
from fastpref.curate.pipeline.state import PairReason, State
from fastpref.curate.routing import Route
from fastpref.errors import InputError

LABELS = ("published", "scores", "agree")
MOSTLY = 0.5  # share of published pairs that their scores contradict, beyond which all of them are in doubt
FEWEST_PAIRS = 20  # for that


@dataclass(frozen=True)
class ConstructOptions(Options):
    """As the arguments of `select_pairs`; and labels, what becomes of pairs whose sides were published: "published",
    the sides stay; "scores", the higher score is chosen; "agree", those leave that their scores contradict."""

    chosen: str = "max"
    rejected: str = "mean-2std"
    labels: str = choice("published", LABELS)
    scale: str = "raw"
    ddof: int = 0
    on_degenerate: str = "ignore"
    min_chosen: float | str | None = None
    min_gap: float | str | None = None
    max_gap: float | str | None = None
    pairs_per_prompt: int = 1


def construct_pairs(state: State, config) -> State:
    samples, options = state.samples, config.construct
    selection = picked_pairs(state, config, on_degenerate=options.on_degenerate)
    if "length" in config.order and config.length.control == "match":
        if state.published:
            raise InputError(
                "length.control match chooses another rejected response, and published pairs have no other: leave it "
                "out, or give pools of responses"
            )
        selection = match_length(
            selection,
            state.score,
            samples.lengths,
            band=config.length.band,
            min_gap=options.min_gap,
            max_gap=options.max_gap,
            valid=state.usable,
            offsets=samples.offsets,
        )
    pairs = selection.table()
    del pairs["score_chosen"], pairs["score_rejected"]  # they are those of the responses, by their index
    if state.published:
        del pairs["z_chosen"], pairs["z_rejected"], pairs["rank_rejected"]  # there is no pool
    pairs["reason"] = np.full(len(pairs["prompt"]), PairReason.KEPT, np.int8)
    pairs["route"] = np.full(len(pairs["prompt"]), Route.PREF, np.int8)
    dropped = selection.dropped()
    if not state.taken.all():
        untaken = np.count_nonzero(~state.taken) * options.pairs_per_prompt
        dropped[DropReason.TOO_FEW.name.lower()] -= untaken
        dropped = {name: count for name, count in dropped.items() if count} | {"not_selected": untaken}
    summary = {
        "rule": selection.rule,
        "scale": selection.scale,
        "labels": options.labels if samples.published else None,
        "pairs": len(pairs["prompt"]),
        "dropped": dropped,
        "share_below_min": selection.share_below_min,
        "small_pools": selection.small_pools,
        "share_rejected_min": selection.share_rejected_min,
        "median_percentile": selection.median_percentile,
        "median_pool": np.median(selection.n_pool),
    }
    state = replace(state, pairs=pairs).with_summary("construct", summary)
    if samples.published:
        summary |= _said_of_labels(state, reversed_ones=dropped.get(DropReason.REVERSED.name.lower(), 0))
    elif selection.small_pools:
        most = small_pool(options.rejected, options.scale, options.ddof)
        text = (
            f"{selection.small_pools} of {len(pairs['prompt'])} pairs come from pools of {most} responses or fewer, "
            f"where the rule {options.rejected} is min: none of so few can lie that far below their mean"
        )
        warnings.warn(DataWarning("small-pools", text), stacklevel=2)
    return state.with_summary("construct", summary)


def _said_of_labels(state, reversed_ones) -> dict:
    """How the published sides and the scores agree, for the summary; warns where they do not."""
    margin = state.margin(state.score)
    compared = int((~np.isnan(margin)).sum()) + reversed_ones
    against = int((margin < 0).sum()) + reversed_ones
    if not state.published:  # the scores have decided
        against = int((state.pairs["chosen"] == 1).sum())
        if against:
            text = f"{against} of {compared} pairs have their published sides exchanged, as their scores want it"
            warnings.warn(DataWarning("relabelled", text), stacklevel=3)
    elif against:
        text = f"the scores contradict the published sides of {against} of {compared} pairs"
        mostly = compared >= FEWEST_PAIRS and against > MOSTLY * compared
        warnings.warn(DataWarning("most-labels-reversed" if mostly else "some-labels-reversed", text), stacklevel=3)
    return {"compared": compared, "reversed": against, "tied": int((margin == 0).sum())}


def picked_pairs(state: State, config, on_degenerate: str) -> PairSelection:
    """The pairs of the rule of this run, of the responses as they are now."""
    if state.published:
        return published_pairs(
            state.score,
            offsets=state.samples.offsets,
            valid=state.usable,
            choosable=state.choosable,
            strength=state.samples.strength,
            min_chosen=config.construct.min_chosen,
            min_gap=config.construct.min_gap,
            max_gap=config.construct.max_gap,
            agree=config.construct.labels == "agree",
        )
    options = config.construct
    return select_pairs(
        state.score,
        options.chosen,
        options.rejected,
        valid=state.usable,
        offsets=state.samples.offsets,
        choosable=state.choosable,
        scale=options.scale,
        ddof=options.ddof,
        on_degenerate=on_degenerate,
        min_chosen=options.min_chosen,
        min_gap=options.min_gap,
        max_gap=options.max_gap,
        pairs_per_prompt=options.pairs_per_prompt,
        seed=config.seed,
    )
