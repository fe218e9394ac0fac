"""Stage construct: the pairs of every prompt, by the distribution of its scores."""

from dataclasses import dataclass, replace

import numpy as np

from fastpref.curate.length import match_length
from fastpref.curate.pairs import DropReason, PairSelection, select_pairs
from fastpref.curate.pipeline.options import Options
from fastpref.curate.pipeline.state import PairReason, State
from fastpref.curate.routing import Route


@dataclass(frozen=True)
class ConstructOptions(Options):
    """As the arguments of `select_pairs`."""

    chosen: str = "max"
    rejected: str = "mean-2std"
    scale: str = "raw"
    ddof: int = 0
    on_degenerate: str = "warn"
    min_chosen: float | str | None = None
    min_gap: float | str | None = None
    max_gap: float | str | None = None
    pairs_per_prompt: int = 1


def construct_pairs(state: State, config) -> State:
    samples, options = state.samples, config.construct
    selection = picked_pairs(state, config, on_degenerate=options.on_degenerate)
    if "length" in config.order and config.length.control == "match":
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
        "pairs": len(pairs["prompt"]),
        "dropped": dropped,
        "share_below_min": selection.share_below_min,
        "share_rejected_min": selection.share_rejected_min,
        "median_percentile": selection.median_percentile,
        "median_pool": np.median(selection.n_pool),
    }
    return replace(state, pairs=pairs).with_summary("construct", summary)


def picked_pairs(state: State, config, on_degenerate: str) -> PairSelection:
    """The pairs of the rule of this run, of the responses as they are now."""
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
