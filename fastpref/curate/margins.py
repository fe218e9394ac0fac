"""Which pairs to keep: margins of several sources clipped, normalised and combined as votes.

Deng et al., "Less is More: Improving LLM Alignment via Preference Data Selection", NeurIPS 2025, arXiv 2502.14560
(BeeS). Each source of margins ("labelled winner minus labelled loser") becomes a p in [0, 1] by a linear map between
two clip bounds, and the sources vote as if they were conditionally independent: P = prod p / (prod p + prod (1 - p)).
P is a score to rank pairs by. It is not calibrated against anything, and should not be read as a probability.
"""

import enum
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fastpref.curate.notices import DataWarning
from fastpref.curate.pools import as_pools, blocks, share_of

START = {"external": 1.5, "implicit": 2.0}  # the search for the upper bound begins at the largest margin over this
COMBINATIONS = ("mul", "add", "add_normalized", "max", "min")
ONE_VOTE = 0.8  # a correlation above which two sources count one vote twice
CORRELATED_PAIRS = 10  # fewest pairs whose correlation says anything: chance alone often gives 0.8 to five
MOST_CLIPPED = 0.25  # of the margins; a bound above which more lie has cut no thin tail
BOUND = 100.0  # stands for the infinite log-odds of p = 0 and p = 1; others are within about 60 of 0
RANKED_PAIRS = 100_000  # most pairs whose ranks are correlated
BLOCK = 1 << 15  # pairs that stay in the cache through all steps


class MarginSource(NamedTuple):
    """What became of one source's margins."""

    kind: str  # "external" or "implicit"
    lower: float
    upper: float
    clipped_low: float  # share of the pairs below `lower`
    clipped_high: float  # share of the pairs above `upper`
    missing: int  # margins that were NaN or infinite and count as 0
    smallest: float
    largest: float


@dataclass(frozen=True)
class MarginScores:
    """What `bees` makes of the margins. Arrays without a shape are [pairs], float64."""

    how: str
    score: np.ndarray  # what ranks: log-odds for "mul", never squashed; -inf where `require_positive` rules a pair out
    p: np.ndarray | None  # score to rank by, in [0, 1]; None for "add", "max" and "min", which have none
    tie_break: np.ndarray  # sum over the sources of margin / upper
    sources: dict[str, MarginSource]
    pearson: np.ndarray  # [sources, sources], over the pairs that both sources rate; NaN where one is constant
    spearman: np.ndarray  # [sources, sources], of at most RANKED_PAIRS of these pairs, drawn with a fixed seed

    @property
    def share_at_one(self) -> float:
        """Share of the pairs with P == 1, which P alone cannot rank; NaN without pairs or without p."""
        return share_of(self.p == 1) if self.p is not None else math.nan


def external_margins(score_chosen, score_rejected) -> np.ndarray:
    """[pairs] score of the chosen response minus score of the rejected one; NaN where either is NaN."""
    return _difference("score_chosen", score_chosen, "score_rejected", score_rejected)


def implicit_margins(policy_chosen, policy_rejected, ref_chosen, ref_rejected) -> np.ndarray:
    """[pairs] (policy - reference) of the chosen response minus that of the rejected one, in nats.

    All four are [pairs] log-probs summed over the response tokens; the policy is a model trained on some preferences,
    the reference the one it was trained from. There is no beta: the clip bound -2 is in these units.
    """
    policy = _difference("policy_chosen", policy_chosen, "policy_rejected", policy_rejected)
    reference = _difference("ref_chosen", ref_chosen, "ref_rejected", ref_rejected)
    return _difference("policy_chosen", policy, "ref_chosen", reference)


def bees(margins, *, how="mul", kinds=None, lower=-2.0, upper=None, require_positive=False) -> MarginScores:
    """Combines the margins of any number of sources into one score per pair.

    margins: name -> [pairs] numbers, labelled winner minus labelled loser. NaN and infinities count as 0, and are
        counted. The lower bound belongs to reward-model scores and to log-probs without beta; see the warnings.
    how: "mul": the sources vote, score = sum of logit(p), p = sigmoid(score) = prod p / (prod p + prod (1 - p)), with
        0.5 where one source says 0 and another 1.
        "add", "max", "min": of the raw margins, as in the authors' first version; sources with a larger scale weigh
        more. "add_normalized": sum of the p. The name of a source: its raw margins alone.
    kinds: name -> "external" or "implicit", which differ in where the search for the upper bound begins. By default a
        source named "implicit" is implicit and every other one external.
    lower: clip bound, one number or name -> number.
    upper: name -> number for the sources whose upper bound is not searched; one number is for all. The search: from
        U = int(largest / 2) for implicit and int(largest / 1.5) for external margins, U grows by 1 until the margins
        above it are fewer than one per unit, or fewer than 30.
    require_positive: pairs with a margin <= 0 in any source are never selected (score -inf, p 0). The authors' code
        has no such rule.

    p of a source is (clip(margin) - lower) / (largest clipped margin - lower), and 0 throughout where no margin is
    above `lower`. Warns where margins are missing; where the sources are added up ("mul", "add", "add_normalized") and
    two correlate above 0.8 (Pearson or Spearman, of at least 10 pairs); and, for "mul" and "add_normalized", where a
    bound does not suit the scale: `lower` clips nothing, or is another number than 0 and less than 1 % of the standard
    deviation, or the search, which takes steps of 1, ends at an upper bound that is not above `lower` or that clips
    more than a quarter of the margins. Raises ValueError for sources of different lengths, unknown names and wrong
    bounds.
    """
    sources = _checked_margins(margins)
    if how not in COMBINATIONS and how not in sources:
        raise ValueError(f"how must be one of {[*COMBINATIONS, *sources]}, got {how!r}")
    kinds = _per_source("kinds", kinds, sources)
    for name, kind in kinds.items():
        if kind not in START:
            raise ValueError(f'kinds[{name!r}] must be "external" or "implicit", got {kind!r}')
    lowers, uppers = _bounds("lower", lower, sources), _bounds("upper", upper, sources)
    if missing_bounds := [name for name in sources if name not in lowers]:
        raise ValueError(f"lower must name every source, got none for {missing_bounds}")

    rated = {name: np.isfinite(margin) for name, margin in sources.items()}
    pearson, spearman, compared = _correlations(sources, rated)
    values, described = {}, {}
    for name, margin in sources.items():
        missing = int(margin.size - np.count_nonzero(rated[name]))
        values[name] = value = np.where(rated[name], margin, 0.0) if missing else margin
        kind = kinds.get(name, "implicit" if name == "implicit" else "external")
        smallest, largest = (float(value.min()), float(value.max())) if value.size else (math.nan, math.nan)
        top = uppers[name] if name in uppers else _upper_bound(value, kind)
        if name in uppers and not top > lowers[name]:
            raise ValueError(f"upper of {name!r} must be above lower {lowers[name]:g}, got {top:g}")
        described[name] = MarginSource(
            kind, lowers[name], top, share_of(value < lowers[name]), share_of(value > top), missing, smallest, largest
        )
    del rated
    _warn_of_margins(values, described)
    if how in ("mul", "add", "add_normalized"):
        _warn_of_one_vote(list(described), pearson, spearman, compared)
    if how in ("mul", "add_normalized"):
        _warn_of_bounds(values, described, searched=described.keys() - uppers.keys())

    score, p, tie_break = _combine(values, described, how, require_positive)
    return MarginScores(how, score, p, tie_break, described, pearson, spearman)


def normalised_margins(margin, source: MarginSource) -> np.ndarray:
    """[pairs] p of one source, in [0, 1]: its margins between the two bounds of `MarginScores.sources`."""
    margin = as_vector("margin", margin)
    return _p(np.where(np.isfinite(margin), margin, 0.0), source)


class TopSelection(NamedTuple):
    indices: np.ndarray  # int64 [selected], best first
    threshold: float  # the lowest selected score; NaN when nothing was
    tied_at_cut: float  # share of the selected that have this very score, if a pair left out has it too; else 0
    share_at_one: float  # share of the selected with P == 1, whose order P alone does not give; NaN without p


def select_top(scores, *, k=None, fraction=None, tie_break=None) -> TopSelection:
    """The k pairs with the largest scores, or the fraction of all pairs, round(fraction * pairs) of them.

    scores: MarginScores, or [pairs] numbers, where -inf is never selected (then fewer than k may be, with a warning).
    tie_break: [pairs] numbers that rank pairs of equal scores, larger first; by default that of MarginScores. Then
        the lower index is first.

    Raises ValueError unless exactly one of k and fraction is given, for k outside [0, pairs], a fraction outside
    [0, 1] and NaN scores.
    """
    p = None
    if isinstance(scores, MarginScores):
        scores, p, tie_break = scores.score, scores.p, scores.tie_break if tie_break is None else tie_break
    scores = as_vector("scores", scores)
    if np.isnan(scores).any():
        raise ValueError(f"scores must not be NaN, got {np.isnan(scores).sum()} of {len(scores)}")
    if tie_break is not None:
        tie_break = as_vector("tie_break", tie_break)
        if len(tie_break) != len(scores):
            raise ValueError(f"tie_break must have shape {[len(scores)]} to match scores, got {[len(tie_break)]}")
    k = _count(k, fraction, len(scores), "pairs")
    if k and (allowed := np.count_nonzero(scores > -math.inf)) < k:
        text = f"only {allowed} of {len(scores)} pairs may be selected, {k - allowed} fewer than asked for"
        warnings.warn(DataWarning("fewer-selected", text), stacklevel=2)
        k = allowed
    if k == 0:
        return TopSelection(np.empty(0, np.int64), math.nan, 0.0, math.nan)
    threshold = np.partition(scores, len(scores) - k)[len(scores) - k]
    above, tied = np.flatnonzero(scores > threshold), np.flatnonzero(scores == threshold)
    taken = k - len(above)
    chosen = np.concatenate([above, tied[_order(scores[tied], _at(tie_break, tied))[:taken]]])
    chosen = chosen[_order(scores[chosen], _at(tie_break, chosen))]
    return TopSelection(
        chosen,
        float(threshold),
        taken / k if taken < len(tied) else 0.0,
        share_of(p[chosen] == 1) if p is not None else math.nan,
    )


class Part(enum.IntEnum):
    """Of the margins, as `partition` divides them."""

    BOTTOM = -1  # margin < -edge
    MIDDLE = 0  # |margin| <= edge
    TOP = 1  # margin > edge


def partition(margins, edge=1.0) -> np.ndarray:
    """[pairs] int8, a `Part`. edge: the authors take 1, for perplexity margins 0.1. NaN counts as 0."""
    margins = as_vector("margins", margins)
    if not 0 <= edge < math.inf:
        raise ValueError(f"edge must be a number >= 0, got {edge!r}")
    return (margins > edge).astype(np.int8) - (margins < -edge)


class PromptSelection(NamedTuple):
    """The prompts that are kept, the widest margin first; [selected]."""

    prompts: np.ndarray  # int64
    chosen: np.ndarray  # int64, column of the largest reward in the pool, the first of equal ones
    rejected: np.ndarray  # int64, column of the smallest
    margin: np.ndarray  # float64, largest minus smallest reward
    tied_at_cut: float  # as in TopSelection


def select_prompts(rewards, fraction=0.25, *, k=None, valid=None, offsets=None) -> PromptSelection:
    """One round of the iterative variant: the prompts whose best and worst response are furthest apart.

    rewards: [prompts, n], or [responses] with offsets; NaN and invalid ones are none.
    fraction: of all prompts; the authors keep 5,000 of 20,000 in every round. Of equal margins the lower prompt is
        first.
    k: how many prompts, in place of fraction.

    Prompts with fewer than two different rewards are never selected, with a warning when that leaves too few.
    """
    pools = as_pools("rewards", rewards, valid, offsets)
    margin = np.full(len(pools.offsets) - 1, -math.inf)
    chosen, rejected = (np.full(len(margin), -1) for _ in range(2))
    for prompts, flat in blocks(pools.offsets):
        pool = pools.values[flat]
        rated = ~np.isnan(pool)
        best = np.argmax(np.where(rated, pool, -math.inf), axis=1)
        worst = np.argmin(np.where(rated, pool, math.inf), axis=1)
        row = np.arange(len(prompts))
        gap = pool[row, best] - pool[row, worst]
        margin[prompts] = np.where(gap > 0, gap, -math.inf)
        chosen[prompts], rejected[prompts] = best, worst
    asked = _count(k, fraction if k is None else None, len(margin), "prompts")
    usable = int(np.count_nonzero(margin > 0))
    if usable < asked:
        text = (
            f"only {usable} of {len(margin)} prompts have two different rewards, {asked - usable} fewer than asked for"
        )
        warnings.warn(DataWarning("fewer-selected", text), stacklevel=2)
    top = select_top(margin, k=min(asked, usable))
    kept = top.indices
    return PromptSelection(kept, chosen[kept], rejected[kept], margin[kept], top.tied_at_cut)


def compare_selections(margins, k, *, how="mul", seed=0, **options) -> "SelectionComparison":
    """The k pairs that `how` selects beside those of each source alone, of the raw sum, and of chance.

    margins: as for `bees`, which gets `options` too. `selected` maps each name to [k] int64 indices, best first;
    "random" is drawn with `seed`. Raises ValueError as `bees` and `select_top` do.
    """
    main = bees(margins, how=how, **options)
    sources = _checked_margins(margins)
    raw = {name: np.where(np.isfinite(margin), margin, 0.0) for name, margin in sources.items()}
    scores = {how: main} | {name: score for name, score in (*raw.items(), ("add", sum(raw.values()))) if name != how}
    selected = {name: select_top(score, k=k).indices for name, score in scores.items()}
    selected["random"] = np.random.default_rng(seed).permutation(len(main.score))[:k]
    names = list(selected)
    overlap = np.array(
        [[np.isin(selected[a], selected[b]).mean() if len(selected[a]) else math.nan for b in names] for a in names]
    )
    return SelectionComparison(selected, overlap)


class SelectionComparison(NamedTuple):
    selected: dict[str, np.ndarray]  # name -> int64 [k], best first
    overlap: np.ndarray  # [names, names] share of the row's pairs that the column's selection has too

    def table(self) -> list[dict]:
        """One row per selection: its name, how many pairs, and its overlap with each of the others."""
        names = list(self.selected)
        return [
            {"selection": a, "pairs": len(self.selected[a])} | dict(zip(names, map(float, row), strict=True))
            for a, row in zip(names, self.overlap, strict=True)
        ]


# ---- bounds


def _upper_bound(margin, kind) -> float:
    """Where the thin right tail of the margins begins: fewer than one pair per unit above it, or fewer than 30."""
    if not margin.size:
        return math.nan
    largest = float(margin.max())
    start = int(largest / START[kind])
    # m > U is ceil(m) > U for a whole U, so one histogram of the tail answers every step of the search. With fewer than
    # one pair per unit the search stops at once: the histogram has no more bins than there are pairs.
    tail = margin[margin > start]
    if len(tail) < largest - start:
        return float(start)
    # counts[j]: start + j - 1 < m <= start + j
    counts = np.bincount((np.ceil(tail) - start).astype(np.int64), minlength=1)
    above = len(tail) - np.cumsum(counts)  # pairs above start + j
    upper = start + np.arange(len(counts))
    stops = (above < largest - upper) | (above < 30)  # none is above the last one, so the search ends there at last
    return float(upper[np.argmax(stops)])


# ---- votes


def _combine(values, described, how, require_positive):
    """Block by block, so that every step finds the last one's numbers in the cache."""
    pairs = len(next(iter(values.values())))
    score, tie_break = np.empty(pairs), np.empty(pairs)
    p = None if how in ("add", "max", "min") else np.empty(pairs)
    for start in range(0, pairs, BLOCK):
        part = slice(start, start + BLOCK)
        raw = {name: value[part] for name, value in values.items()}
        tie_break[part] = sum(raw[name] / (s.upper if s.upper > 0 else 1.0) for name, s in described.items())
        if how == "mul":
            score[part] = sum(_log_odds(raw[name], s) for name, s in described.items())
            with np.errstate(over="ignore"):
                p[part] = 1 / (1 + np.exp(-score[part]))
        elif how == "add_normalized":
            score[part] = sum(_p(raw[name], s) for name, s in described.items())
            p[part] = score[part] / len(described)
        elif how in values:
            score[part], p[part] = raw[how], _p(raw[how], described[how])
        else:
            score[part] = {"add": np.add, "max": np.maximum, "min": np.minimum}[how].reduce(list(raw.values()))
        if require_positive:
            out = ~np.logical_and.reduce([margin > 0 for margin in raw.values()])
            score[part][out] = -math.inf
            if p is not None:
                p[part][out] = 0.0
    return score, p, tie_break


def _span(source) -> float:
    """The largest clipped margin minus the lower bound; 0 where no margin is above that."""
    return max(min(source.largest, source.upper) - source.lower, 0.0)


def _p(margin, source) -> np.ndarray:
    span = _span(source)
    return np.clip((margin - source.lower) / span, 0, 1) if span > 0 else np.zeros(len(margin))


def _log_odds(margin, source) -> np.ndarray:
    """log(p / (1 - p)) of one source, from q and span - q: 1 - p would round where p is near 1."""
    span = _span(source)
    if span == 0:
        return np.full(len(margin), -BOUND)
    q = np.clip(margin - source.lower, 0, span)
    with np.errstate(divide="ignore"):  # p = 0 and p = 1
        return np.clip(np.log(q / (span - q)), -BOUND, BOUND)


# ---- what the user should know


def _correlations(sources, rated):
    """[S, S] each: Pearson and Spearman over the pairs that both sources rate, and how many these are."""
    margins, known = list(sources.values()), list(rated.values())
    compared = np.full((len(margins), len(margins)), len(margins[0]))
    if all(own.all() for own in known):
        return *_correlated(margins), compared
    pearson, spearman = np.empty(compared.shape), np.empty(compared.shape)
    for i, j in zip(*np.triu_indices(len(margins)), strict=True):
        both = known[i] & known[j]
        own = _correlated([margins[i][both], margins[j][both]])
        for table, found in zip((pearson, spearman), own, strict=True):
            table[i, j] = table[j, i] = found[0, 1]
        compared[i, j] = compared[j, i] = np.count_nonzero(both)
    return pearson, spearman, compared


def _correlated(table):
    """([S, S] Pearson, [S, S] Spearman) of margins [pairs] that are all rated."""
    few, pairs = table, len(table[0])
    if pairs > RANKED_PAIRS:
        drawn = np.random.default_rng(0).choice(pairs, RANKED_PAIRS, replace=False)
        few = [margin[drawn] for margin in table]
    return _pearson(table), _pearson([mean_ranks(margin) for margin in few])


def _pearson(table) -> np.ndarray:
    if len(table[0]) == 0:
        return np.full((len(table), len(table)), np.nan)
    scaled = []
    for row in table:
        # squares of huge margins would overflow, and a constant has no correlation, whatever its mean rounds to
        size = np.abs(row).max() or 1.0
        centred = row / size
        centred -= centred.mean()
        norm = math.sqrt(centred @ centred) if row.min() < row.max() else math.nan
        centred /= norm
        scaled.append(centred)
    return np.clip([[a @ b for b in scaled] for a in scaled], -1, 1)


def mean_ranks(values) -> np.ndarray:
    """[n] ranks from 0; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def _warn(id, message) -> None:
    warnings.warn(DataWarning(id, message), stacklevel=4)  # of the caller of `bees`


def _warn_of_margins(values, described) -> None:
    for name, source in described.items():
        if source.missing:
            text = f"margins[{name!r}] has {source.missing} of {len(values[name])} NaN or infinite, which count as 0"
            _warn("missing-margins", text)


def _warn_of_one_vote(names, pearson, spearman, compared) -> None:
    for i, j in zip(*np.triu_indices(len(names), 1), strict=True):
        # a NaN (a constant source) is not above either
        alike = pearson[i, j] > ONE_VOTE or spearman[i, j] > ONE_VOTE
        if alike and compared[i, j] >= CORRELATED_PAIRS:
            _warn(
                "votes-agree",
                f"{names[i]!r} and {names[j]!r} are one vote counted twice: Pearson {pearson[i, j]:.2f}, Spearman "
                f"{spearman[i, j]:.2f}, above {ONE_VOTE}; leave one out, or take a margin that is judged otherwise",
            )


def _warn_of_bounds(values, described, searched) -> None:
    for name, source in described.items():
        if not len(values[name]):
            continue
        spread = float(values[name].std())
        if source.smallest >= source.lower:
            _warn(
                "clip-bounds",
                f"lower={source.lower:g} clips none of the {len(values[name])} margins of {name!r}, which begin at "
                f"{source.smallest:.3g} and have a standard deviation of {spread:.3g}: give lower= on their scale",
            )
        elif 0 < abs(source.lower) < spread / 100:
            _warn(
                "clip-bounds",
                f"lower={source.lower:g} is {100 * abs(source.lower) / spread:.2g} % of the standard deviation "
                f"{spread:.3g} of the margins of {name!r}: the {100 * source.clipped_low:.0f} % below it all count as "
                "p = 0; give lower= on their scale",
            )
        if name in searched and source.upper <= source.lower < source.largest:
            _warn(
                "clip-bounds",
                f"the search for the upper bound of {name!r} ends at {source.upper:g}, not above lower="
                f"{source.lower:g}: every margin counts as p = 0; give upper= on their scale",
            )
        elif name in searched and source.clipped_high > MOST_CLIPPED:
            _warn(
                "clip-bounds",
                f"the search for the upper bound of {name!r} ends at {source.upper:g}, and the "
                f"{100 * source.clipped_high:.0f} % of the margins above it all count as p = 1; give upper= on their "
                "scale",
            )


# ---- arguments


def as_vector(name, values) -> np.ndarray:
    """[pairs] float64. Raises ValueError or TypeError naming the argument."""
    try:
        values = np.asarray(values)
        if values.dtype.kind not in "fiub":
            raise TypeError(f"{name} must be numbers, got {values.dtype}")
        values = values.astype(np.float64, copy=False)
    except ValueError as error:
        raise ValueError(f"{name} must have shape [pairs], got a ragged list") from error
    if values.ndim != 1:
        raise ValueError(f"{name} must have shape [pairs], got {list(values.shape)}")
    return values


def _difference(minuend, a, subtrahend, b) -> np.ndarray:
    a, b = as_vector(minuend, a), as_vector(subtrahend, b)
    if len(a) != len(b):
        raise ValueError(f"{subtrahend} must have shape {[len(a)]} to match {minuend}, got {[len(b)]}")
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, a missing margin
        return a - b


def _checked_margins(margins) -> dict[str, np.ndarray]:
    if not isinstance(margins, Mapping) or not margins:
        raise TypeError(f"margins must be a mapping of at least one name to [pairs], got {type(margins).__name__}")
    if taken := [name for name in margins if name in COMBINATIONS or name == "random"]:
        raise ValueError(f"margins must not be named like a combination, got {taken}")
    sources = {name: as_vector(f"margins[{name!r}]", margin) for name, margin in margins.items()}
    lengths = {name: len(margin) for name, margin in sources.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"margins must all have the same length, got {lengths}")
    return sources


def _per_source(argument, values, sources) -> dict:
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise TypeError(f"{argument} must map names of sources, got {type(values).__name__}")
    if unknown := [name for name in values if name not in sources]:
        raise ValueError(f"{argument} must name sources of margins {list(sources)}, got {unknown}")
    return dict(values)


def _bounds(argument, values, sources) -> dict[str, float]:
    if values is not None and not isinstance(values, Mapping):
        values = dict.fromkeys(sources, values)
    bounds = {}
    for name, bound in _per_source(argument, values, sources).items():
        if isinstance(bound, bool) or not isinstance(bound, int | float | np.number) or not math.isfinite(bound):
            raise ValueError(f"{argument} of {name!r} must be a finite number, got {bound!r}")
        bounds[name] = float(bound)
    return bounds


def _count(k, fraction, available, what) -> int:
    """How many of the available ones are asked for."""
    if (k is None) == (fraction is None):
        raise ValueError(f"exactly one of k and fraction must be given, got k={k!r} and fraction={fraction!r}")
    if k is None:
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must lie in [0, 1], got {fraction!r}")
        return round(fraction * available)
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 0 <= k <= available:
        raise ValueError(f"k must be an integer from 0 to the {available} {what}, got {k!r}")
    return int(k)


def _at(values, indices):
    return None if values is None else values[indices]


def _order(scores, tie_break) -> np.ndarray:
    """Positions by score, then tie_break, both descending, then position."""
    return np.lexsort((-scores,) if tie_break is None else (-tie_break, -scores))
