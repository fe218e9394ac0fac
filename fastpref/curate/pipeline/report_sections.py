"""The sections of the report: what each measures, in words, a plot and a table."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fastpref.curate.diagnostics import diagnose, pool_z
from fastpref.curate.length import LengthReport, length_report
from fastpref.curate.pipeline import report_plots
from fastpref.curate.pools import as_pools

SOURCES_SHOWN = 30


@dataclass(frozen=True)
class PickedScores:
    rewards: np.ndarray  # [prompts, n], or [responses] with offsets; NaN = none
    pairs: object  # PairSelection, or a mapping with "prompt", "chosen", "rejected": [pairs]
    offsets: np.ndarray | None = None
    unit: str = "reward"  # for the axes: "logit of win_prob"


@dataclass(frozen=True)
class SourceTable:
    """Per source, [sources]."""

    names: Sequence[str]
    unexplained: np.ndarray  # share of the source's variance that the others do not explain; NaN where not audited
    low: np.ndarray  # interval of it
    high: np.ndarray
    flagged: np.ndarray  # bool
    chosen: np.ndarray  # int, chosen responses the source supplies, or would have supplied
    confidence: float = 0.9  # of the interval


@dataclass(frozen=True)
class MarginPairs:
    """[pairs], before the selection."""

    external: np.ndarray
    implicit: np.ndarray
    kept: np.ndarray  # bool


@dataclass(frozen=True)
class PairLengths:
    chosen: np.ndarray  # int [pairs]
    rejected: np.ndarray
    unit: str = "characters"
    found: LengthReport | None = None  # of the pairs in their pools; None: what these lengths alone can say


class Figure(NamedTuple):
    name: str
    png: bytes
    description: str


class Section(NamedTuple):
    title: str
    text: str
    figure: Figure | None = None
    head: Sequence[str] = ()
    rows: Sequence[Sequence[object]] = ()
    open: bool = True  # whether the table is shown at once


def sections_of(data) -> list[Section]:
    """The sections of a ReportData; what it lacks has none."""
    makers = (
        (_sources, data.sources),
        (_before_after, data.before_after or None),
        (_scores, data.scores),
        (_lengths, data.lengths),
        (_margins, data.margins),
        (_counts, data.counts or None),
        (_rating_scale, data.rating_scale or None),
    )
    return [make(part) for make, part in makers if part is not None]


def _before_after(rows) -> Section:
    text = (
        "Before: the best against the worst response of every prompt, by the scores as they stand in the file (of "
        "published pairs: the sides as they were published). After: the pairs that were written."
    )
    return Section("Before and after", text, None, ["", "before", "after"], rows)


def _scores(scores: PickedScores) -> Section:
    found = diagnose(scores.rewards, scores.pairs, offsets=scores.offsets)
    pools = as_pools("rewards", scores.rewards, offsets=scores.offsets)
    quantiles = ", ".join(f"{number(100 * q)} %: {number(value)}" for q, value in found.contrast_quantiles.items())
    text = (
        f"{number(found.pairs)} pairs of {number(found.prompts)} prompts. The mean score of the chosen responses is "
        f"{number(found.chosen_quality)}, and they lie {number(found.contrast)} above the rejected ones in the mean; "
        f"quantiles of that margin: {quantiles}. Scores are in units of {scores.unit}; z counts standard deviations "
        "from the mean of the prompt's own responses. Values beyond an axis count in its outermost bar."
    )
    rows = [
        ["mean score", found.chosen_quality, found.rejected_quality],
        ["mean percentile among the prompt's responses", found.chosen_percentile, found.rejected_percentile],
        ["mean z among the prompt's responses", found.chosen_z, found.rejected_z],
    ]
    png = report_plots.scores(pools.values, pool_z(pools), found.measures, scores.unit)
    figure = Figure("scores.png", png, "Distributions of all, chosen and rejected scores")
    return Section("Where the pairs were picked", text, figure, ["", "chosen", "rejected"], rows)


def _sources(sources: SourceTable) -> Section:
    names = np.array([str(name) for name in sources.names], object)
    share, low, high = (np.asarray(part, float) for part in (sources.unexplained, sources.low, sources.high))
    flagged, chosen = np.asarray(sources.flagged, bool), np.asarray(sources.chosen)
    _same_length("SourceTable", names=names, unexplained=share, low=low, high=high, flagged=flagged, chosen=chosen)
    order = np.argsort(-np.nan_to_num(share, nan=-1.0), kind="stable")
    names, share, low, high, flagged, chosen = (part[order] for part in (names, share, low, high, flagged, chosen))
    which = f" ({', '.join(names[flagged])}), with {number(int(chosen[flagged].sum()))} chosen responses"
    text = (
        f"{number(int(flagged.sum()))} of {number(len(names))} sources do not fit{which if flagged.any() else ''}. A "
        "source is who wrote a response, usually a model. Most of how its scores vary from prompt to prompt follows "
        "from the scores of the others; the share that does not is how it is ranked here, the bar its "
        f"{number(100 * sources.confidence)} % interval. A source may be unlike the others for a good reason: read "
        "some of its responses before you judge."
    )
    if len(names) > SOURCES_SHOWN:
        text += f" The plot shows the first {SOURCES_SHOWN}."
    rows = [
        [
            place,
            name,
            "–" if math.isnan(at) else f"{at:.3f}",
            "–" if math.isnan(lowest) else f"{lowest:.3f} to {highest:.3f}",
            "does not fit" if bad else "not compared" if math.isnan(at) else "fits",
            int(wins),
        ]
        for place, (name, at, lowest, highest, bad, wins) in enumerate(
            zip(names, share, low, high, flagged, chosen, strict=True), start=1
        )
    ]
    png = report_plots.sources(*(part[:SOURCES_SHOWN] for part in (names, share, low, high, flagged, chosen)))
    figure = Figure("sources.png", png, "Unexplained share of every source, and chosen responses it supplies")
    head = ["", "source", "unexplained share", "interval", "", "chosen responses"]
    return Section("Who wrote the responses", text, figure, head, rows, open=len(rows) <= SOURCES_SHOWN)


def _margins(margins: MarginPairs) -> Section:
    external, implicit = (np.asarray(part, float) for part in (margins.external, margins.implicit))
    kept = np.asarray(margins.kept, bool)
    _same_length("MarginPairs", external=external, implicit=implicit, kept=kept)
    both = np.isfinite(external) & np.isfinite(implicit)
    x, y = external[both], implicit[both]
    agree = (np.sign(x) == np.sign(y)).mean() if len(x) else math.nan
    varies = len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0
    correlation = float(np.corrcoef(x, y)[0, 1]) if varies else math.nan
    text = (
        f"{number(int(kept.sum()))} of {number(len(kept))} pairs kept. The external margin is how far the scores are "
        "apart, the implicit one how much more the model itself already prefers the chosen response than its reference "
        f"does. Their signs agree on {percent(agree)} of the pairs, their correlation is "
        f"{number(round(correlation, 2))}."
    )
    if len(x) > report_plots.POINTS:
        text += " Pairs beyond an axis count in its outermost cells."
    if not both.all():
        text += f" {number(int((~both).sum()))} pairs lack one of the two."
    png = report_plots.margins(x, y, kept[both])
    figure = Figure("margins.png", png, "External against implicit margins, kept pairs marked")
    return Section("Scores against the model's own preference", text, figure)


def _counts(counts: Mapping[str, Mapping[str, int]]) -> Section:
    worded = {
        what: {str(reason).replace("_", " ").lower(): int(count) for reason, count in reasons.items()}
        for what, reasons in counts.items()
    }
    rows = [
        [what, reason, count, percent(count / max(sum(reasons.values()), 1))]
        for what, reasons in worded.items()
        for reason, count in reasons.items()
    ]
    figure = Figure("counts.png", report_plots.counts(worded), "What was kept and what was dropped, by reason")
    return Section("Kept and dropped", "Each is counted once.", figure, ["of", "", "number", "share"], rows)


def _lengths(lengths: PairLengths) -> Section:
    chosen, rejected = (np.asarray(part, float) for part in (lengths.chosen, lengths.rejected))
    _same_length("PairLengths", chosen=chosen, rejected=rejected)
    found = lengths.found
    if found is None:
        zero = np.zeros(len(chosen), np.int64)
        pairs = {"prompt": np.arange(len(chosen)), "chosen": zero, "rejected": zero + 1}
        found = length_report(np.stack([chosen, rejected], 1), pairs)._replace(chosen_in_top_decile=math.nan)
    text = (
        f"Taking the longer response for the chosen one is right on {percent(found.longest_wins)} of the pairs (equal "
        f"lengths count half). The chosen one is {number(found.median_ratio)} times as long as the rejected one at "
        "the median. Far from 50 %, a model learns from these pairs how long to write rather than what."
    )
    if not math.isnan(found.chosen_in_top_decile):
        text += f" {percent(found.chosen_in_top_decile)} of the chosen ones are in the longest tenth of their pool."
    if not math.isnan(found.truncated_share):
        text += (
            f" Truncated: {percent(found.truncated_share)} of all responses, {percent(found.truncated_chosen)} of "
            f"the chosen and {percent(found.truncated_rejected)} of the rejected ones."
        )
    png = report_plots.lengths(np.maximum(chosen, 1), np.maximum(rejected, 1), lengths.unit)
    return Section("Length", text, Figure("lengths.png", png, "Lengths of chosen and rejected responses"))


_RATING = {
    "beta": "β of the loss",
    "median": "median gap |g| of the pairs that are no ties",
    "std": "standard deviation of the gaps",
    "suggested_beta_rating": "β₁ for RDPO: its offset then starts at a median of ½ nat",
    "suggested_variance": "V for ML-RDPO: its square term then starts at a mean of ½",
    "initial_offset": "median offset in nats that β₁ = 0.3 would give; far above 1 it saturates RDPO",
}


def _rating_scale(scale: Mapping[str, float]) -> Section:
    rows = [[name, value, _RATING.get(name, "")] for name, value in scale.items()]
    text = "For losses that use how far the scores are apart. Others do not need this."
    return Section("For losses that use the margin", text, None, ["", "", ""], rows, open=False)


def _same_length(name, **parts) -> None:
    shapes = {field: list(part.shape) for field, part in parts.items()}
    first = next(iter(shapes.values()))
    if len(first) != 1 or any(shape != first for shape in shapes.values()):
        raise ValueError(f"the arrays of {name} must be vectors of one length, got {shapes}")


def number(value) -> str:
    """A cell of a table."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if isinstance(value, float | np.floating):
        return "–" if math.isnan(value) else f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    return str(value)


def percent(share) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f} %"
