"""Stage clean: single scores that the other scores of their prompt and source contradict."""

from dataclasses import dataclass

import numpy as np

from fastpref.curate.clean import denoise_scores
from fastpref.curate.pipeline.options import Options, check_at_least_one, check_positive, choice
from fastpref.curate.pipeline.state import LeftOut, State

CLEAN = ("mask", "replace", "low_rank", "none")  # the actions of `denoise_scores`, or nothing


@dataclass(frozen=True)
class CleanOptions(Options):
    action: str = choice("mask", CLEAN)
    threshold: float = 5.0
    rank: int | None = None

    def check(self) -> None:
        check_positive("clean.threshold", self.threshold)
        check_at_least_one("clean.rank", self.rank)


def clean_scores(state: State, config) -> State:
    samples, options = state.samples, config.clean
    if options.action == "none":
        return state.skipped("clean", "not asked for")
    if samples.sources is None or not samples.scored:
        return state.skipped("clean", "no sources" if samples.sources is None else "no scores")
    try:
        found = denoise_scores(
            state.score,
            samples.sources,
            offsets=samples.offsets,
            valid=state.valid,
            action=options.action,
            rank=options.rank,
            threshold=options.threshold,
        )
    except ValueError as error:
        return state.refused("clean", error, asked=config.read.sources is not None)
    if options.action == "mask":
        state = state.leave_out(found.flagged, LeftOut.CORRUPTED_SCORE)
    summary = {
        "action": options.action,
        "flagged": int(found.flagged.sum()),
        "scores": int(state.valid.sum()),
        "best_changed": found.chosen_changed,
        "prompts": found.prompts,
        "noise_scale": found.scale,
        "rank": found.rank,
        "converged": found.converged,
    }
    scores = np.where(state.valid, found.scores, state.score)
    return state.rescored(scores).with_summary("clean", summary)
