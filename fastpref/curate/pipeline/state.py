"""What one stage of the pipeline hands to the next."""

import enum
import math
import warnings
from dataclasses import dataclass, field, replace

import numpy as np

from fastpref.curate.files.table import Samples
from fastpref.curate.length import LengthReport, length_report
from fastpref.curate.notices import DataWarning, Notice
from fastpref.curate.pairs import PLACES


class LeftOut(enum.IntEnum):
    """Why a response takes no part; `KEPT` where it does. Of several reasons the first."""

    KEPT = 0
    NO_SCORE = 1
    BLANK = 2
    DUPLICATE = 3  # of another response of its prompt
    REPEATED_TEXT = 4  # one text under many prompts
    CONTAMINATED = 5  # it or its prompt stands in a file that must not be trained on
    FLAGGED_SOURCE = 6
    CORRUPTED_SCORE = 7
    CONTRADICTED_SCORE = 8  # by another score of the response


class PairReason(enum.IntEnum):
    """Why a pair is not written; `KEPT` where it is."""

    KEPT = 0
    LEFT_OUT = 1  # a stage after construction left out one of its responses, or its chosen one as such
    NOT_BETTER = 2  # a stage after construction changed the scores so
    NOT_SELECTED = 3


@dataclass(frozen=True)
class State:
    samples: Samples
    score: np.ndarray  # float64 [responses], what pairs are constructed by; NaN where there is none
    left_out: np.ndarray  # uint8 [responses], a LeftOut
    choosable: np.ndarray  # bool [responses]; False: may be rejected, is never chosen
    flags: np.ndarray  # uint8 [responses], what hygiene found, a sum of its Flags
    taken: np.ndarray  # bool [prompts]; False: prompts that a selection before construction left out
    pairs: dict[str, np.ndarray] | None = None  # [pairs] each: prompt, chosen, rejected, reason (a PairReason), ...
    summaries: dict[str, dict] = field(default_factory=dict)  # by stage, ready for JSON
    notices: tuple[Notice, ...] = ()
    published: bool = False  # the sides of every pair stay as they were published, whatever the scores say

    @property
    def valid(self) -> np.ndarray:
        """bool [responses]."""
        return self.left_out == LeftOut.KEPT

    @property
    def usable(self) -> np.ndarray:
        """bool [responses], the valid ones of the prompts that were not left out."""
        return self.valid & np.repeat(self.taken, np.diff(self.samples.offsets))

    @property
    def kept(self) -> np.ndarray:
        """bool [pairs]."""
        return self.pairs["reason"] == PairReason.KEPT

    @property
    def kept_pairs(self) -> dict[str, np.ndarray]:
        """Prompt, chosen and rejected, the columns in the pool, of the pairs that are written."""
        kept = self.kept
        return {name: self.pairs[name][kept] for name in PLACES}

    def place(self, side) -> np.ndarray:
        """int64 [pairs], index among all responses of each pair's "chosen" or "rejected"."""
        return self.samples.offsets[self.pairs["prompt"]] + self.pairs[side]

    def margin(self, column) -> np.ndarray:
        """float64 [pairs], a number per response of the chosen minus that of the rejected one."""
        return column[self.place("chosen")] - column[self.place("rejected")]

    def margins(self) -> np.ndarray:
        """float64 [pairs], of the scores; of published pairs without them their published strength; NaN for neither."""
        margin = self.margin(self.score)
        if not self.published or self.samples.strength is None:
            return margin
        return np.where(np.isnan(margin), self.samples.strength[self.pairs["prompt"]], margin)

    def length_report(self) -> LengthReport:
        """How far length alone explains the kept pairs."""
        samples = self.samples
        return length_report(samples.lengths, self.kept_pairs, truncated=samples.truncated, offsets=samples.offsets)

    # ---- what a stage makes of it

    def leave_out(self, which, reason: LeftOut) -> "State":
        """Without some responses from here on, and the pairs made with them; a response keeps its first reason."""
        left_out = np.where(which & self.valid, reason, self.left_out).astype(np.uint8)
        return replace(self, left_out=left_out)._with_checked_pairs()

    def rescored(self, scores) -> "State":
        """With other scores; NaN leaves a response out, unless it had no score before and needs none."""
        lost = np.isnan(scores) & ~np.isnan(self.score) & self.valid
        left_out = np.where(lost, LeftOut.NO_SCORE, self.left_out).astype(np.uint8)
        return replace(self, score=scores, left_out=left_out)._with_checked_pairs()

    def _with_checked_pairs(self) -> "State":
        """After construction the pairs stay, but those that would not be made any more are dropped."""
        if self.pairs is None:
            return self
        kept, valid = self.kept, self.valid
        missing = kept & ~((valid & self.choosable)[self.place("chosen")] & valid[self.place("rejected")])
        worse = kept & ~missing & ~(self.margin(self.score) > 0) & (not self.published)
        reason = np.where(missing, PairReason.LEFT_OUT, np.where(worse, PairReason.NOT_BETTER, self.pairs["reason"]))
        return replace(self, pairs=self.pairs | {"reason": reason.astype(np.int8)})

    def with_summary(self, stage: str, summary: dict) -> "State":
        return replace(self, summaries=self.summaries | {stage: as_json(summary)})

    def skipped(self, stage: str, why: str) -> "State":
        """Nothing done by the stage."""
        return self.with_summary(stage, {"skipped": why})

    def refused(self, stage: str, error: ValueError, *, asked: bool) -> "State":
        """Nothing done, because the method refused the data; warns if the stage was asked for."""
        if asked:
            warnings.warn(DataWarning(f"{stage}-skipped", f"{stage} did nothing: {error}"), stacklevel=3)
        return self.skipped(stage, str(error))


def as_json(value):
    """The value as JSON has it: plain numbers and lists, None for what is not finite."""
    if isinstance(value, dict):
        return {name: as_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return as_json(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
