"""Stage length: scores less what goes with length. Matching the length of a pair's sides is part of construct."""

from dataclasses import dataclass

import numpy as np

from fastpref.curate.length import remove_length
from fastpref.curate.pipeline.options import Options, choice
from fastpref.curate.pipeline.state import State

LENGTH_CONTROL = ("none", "within_source", "match")


@dataclass(frozen=True)
class LengthOptions(Options):
    control: str = choice("none", LENGTH_CONTROL)
    band: float = 0.5


def control_length(state: State, config) -> State:
    samples, control = state.samples, config.length.control
    if control != "within_source":
        # "match" chooses among responses, which is done where the pairs are made
        return state.with_summary("length", {"control": control})
    found = remove_length(
        np.where(state.valid, state.score, np.nan),
        samples.lengths,
        sources=samples.sources,
        flagged=~state.choosable,
        offsets=samples.offsets,
    )
    scores = np.where(state.valid, found.scores, state.score)
    return state.rescored(scores).with_summary("length", {"control": control, "slope": found.slope})
