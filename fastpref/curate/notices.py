"""What curation has to say about data: every kind of notice has an id that stays, and a severity.

A method issues one as a warning, `warnings.warn(DataWarning("length-decides", text), stacklevel=2)`; a run of the
pipeline gathers them. The ids are in the summary, in --json and on the page of a run, and `NOTICES` says of each what
it means and what to do about it.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from fastpref._warnings import recorded_warnings

SEVERITIES = ("serious", "warning", "finding")  # most urgent first; a finding never makes --strict fail


class NoticeKind(NamedTuple):
    """What one id stands for."""

    severity: str
    title: str  # for a reader who does not know this package
    advice: str  # what to do, in one sentence
    technical: bool = False  # about options rather than data: not on the page


NOTICES: dict[str, NoticeKind] = {
    "repeated-text-chosen": NoticeKind(
        "serious",
        "One text wins under many prompts",
        "Leave such texts out with --apply: they are canned, or made to please the judge.",
    ),
    "test-data-chosen": NoticeKind(
        "serious",
        "Test data is among the pairs",
        "Leave it out with --apply, or the test will measure memory.",
    ),
    "flagged-source-left-in": NoticeKind(
        "serious",
        "A model whose scores do not fit the others is still in the pairs",
        "Leave its responses out with --exclude both, or read some of them to see that they deserve their scores.",
    ),
    "contradicting-scores": NoticeKind(
        "serious",
        "Two scores of one response contradict each other",
        "Leave these responses out with --apply, or correct their scores.",
    ),
    "sentinel-scores": NoticeKind(
        "warning",
        "A score looks like a mark for 'no score'",
        "If it is one, say so with --missing and the value; if it is a score, ignore this.",
    ),
    "most-labels-reversed": NoticeKind(
        "serious",
        "Most published labels contradict their scores",
        "Check whether a low score is the better one, or whether the labels were exchanged.",
    ),
    "negative-margins": NoticeKind(
        "warning",
        "Some pairs have a negative margin",
        "A loss that uses the margin (RDPO, ML-RDPO) pushes these the other way: --labels agree drops them, "
        "--labels scores exchanges their sides.",
    ),
    "bad-rows": NoticeKind("warning", "Rows that could not be read", "--bad-rows lists each with its reason."),
    "bad-responses": NoticeKind(
        "warning", "Responses that could not be read", "Their prompts keep the others; --bad-rows lists each."
    ),
    "length-decides": NoticeKind(
        "warning",
        "The longer response nearly always wins",
        "A model trained on such pairs learns to write longer: try --length-control match, or another --rejected.",
    ),
    "rule-below-pool": NoticeKind(
        "warning",
        "The rule for rejected is beyond the scores there are",
        "It then takes the worst response: --rejected quantile:0.10 or min_of_5 do not.",
    ),
    "audit-skipped": NoticeKind("warning", "Sources could not be checked", "The reason is in the text."),
    "clean-skipped": NoticeKind("warning", "Single scores could not be checked", "The reason is in the text."),
    "low-rank-scores": NoticeKind(
        "warning", "Fitted scores took the place of scores", "Use --clean mask, which only leaves wrong ones out."
    ),
    "stage-order": NoticeKind(
        "warning", "Stages in an unusual order", "Leave --order out for the usual one.", technical=True
    ),
    "missing-margins": NoticeKind(
        "warning", "Pairs without a margin", "They count as undecided in the selection.", technical=True
    ),
    "clip-bounds": NoticeKind(
        "warning",
        "The bounds of the selection do not fit the scores",
        "Give --select-lower and --select-upper.",
        technical=True,
    ),
    "fewer-selected": NoticeKind("warning", "Fewer pairs than asked for", "Ask for fewer, or lower the bounds."),
    "routing-ties": NoticeKind(
        "warning",
        "Ties at the border of routing",
        "Give --tau as a number, or turn --tau-inclusive on or off.",
        technical=True,
    ),
    "goals-left-out": NoticeKind("warning", "Pairs without a goal", "They have no finite score and were left out."),
    "length-slope": NoticeKind(
        "warning", "The slope of length is inexact", "Use fewer sources, or --length-control none.", technical=True
    ),
    "relabelled": NoticeKind("finding", "Labels that were replaced by scores", "They differ from the published ones."),
    "some-labels-reversed": NoticeKind(
        "finding", "Published labels that the scores contradict", "Read a few of them: label or score is wrong."
    ),
    "contradicting-scores-out": NoticeKind(
        "finding", "Responses left out for their contradicting scores", "Correct the scores to have them back."
    ),
    "flagged-source-out": NoticeKind(
        "finding",
        "A model whose scores do not fit the others was kept out",
        "Read some of its responses; --exclude none lets it in again.",
    ),
    "renamed-columns": NoticeKind(
        "finding", "Columns that came along under another name", "Their own names are those of columns of pairs."
    ),
    "one-response": NoticeKind("finding", "Prompts with one response", "There is nothing to compare it with."),
    "small-pools": NoticeKind(
        "finding", "Few responses per prompt", "With five or fewer the rejected response is the worst one."
    ),
    "votes-agree": NoticeKind(
        "finding",
        "Two scores say the same",
        "They count as two votes in a selection, though they are one.",
        technical=True,
    ),
    "default-bounds": NoticeKind(
        "finding",
        "The default bounds of the selection clip little",
        "Give --select-lower on the scale of the margins.",
        technical=True,
    ),
    "few-prompts-to-audit": NoticeKind(
        "finding", "Few prompts to check sources by", "Sources are ranked, none is flagged."
    ),
    "other": NoticeKind("warning", "Something else", "The text says what.", technical=True),
}


class Notice(NamedTuple):
    """One thing a run has to say."""

    id: str
    text: str

    @property
    def kind(self) -> NoticeKind:
        return NOTICES[self.id]

    @property
    def severity(self) -> str:
        return self.kind.severity

    def as_dict(self) -> dict[str, str]:
        """As the summary has it."""
        return {"id": self.id, "severity": self.severity, "text": self.text}


class DataWarning(UserWarning):
    """A warning about data, of a kind in NOTICES.

    Args:
        id: its key there.
        text: what was found, with numbers.
    """

    def __init__(self, id: str, text: str):
        super().__init__(text)
        self.id = id


@contextlib.contextmanager
def collected_notices() -> Iterator[list[Notice]]:
    """Gives a list that holds a notice for every warning of this library at the end, each once, in order."""
    found: list[Notice] = []
    with recorded_warnings(DataWarning, UserWarning, RuntimeWarning) as caught:
        yield found
    found += dict.fromkeys(Notice(getattr(message, "id", "other"), str(message)) for message in caught)


def by_severity(notices: list[Notice]) -> list[Notice]:
    """Returns them with the most urgent first, equal ones in their order."""
    return sorted(notices, key=lambda notice: SEVERITIES.index(notice.severity))
