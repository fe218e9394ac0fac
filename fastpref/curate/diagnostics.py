"""What a set of pairs is made of: how good the chosen responses are, how far the rejected ones lie below them.

Pan et al., "What Matters in Data for DPO?", NeurIPS 2025, arXiv 2508.18312: at its optimum DPO gives
pi(y) ~ pi_ref(y) * (pi_chosen(y) / pi_rejected(y))**(1 / beta), so a good response that is never chosen gains nothing,
and the rejected ones matter through the ratio alone. Hence the order here: the quality of the chosen responses first,
the contrast second, and controls that move one while the other is held.

Pairs are a `PairSelection` or a mapping with the integer arrays "prompt", "chosen" and "rejected", all [pairs]: the
prompt, and the two columns within its pool. Rewards are padded [prompts, n] or flat with offsets, as everywhere.
"""

import enum
import math
import warnings
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from fastpref.curate.pairs import columns_of, places_of, select_pairs
from fastpref.curate.pools import Pools, as_pools, blocks
from fastpref.curate.scale import sort_pools, tied_runs

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


# ---- chosen quality and contrast


class PairMeasures(NamedTuple):
    """Per pair, float64 [pairs]."""

    score_chosen: np.ndarray
    score_rejected: np.ndarray
    percentile_chosen: np.ndarray  # percentage of the pool's other responses that score lower
    percentile_rejected: np.ndarray
    z_chosen: np.ndarray  # in standard deviations (ddof 0) from the mean of the pool; 0 where all rewards are equal
    z_rejected: np.ndarray

    @property
    def gap(self) -> np.ndarray:
        """score_chosen - score_rejected."""
        return self.score_chosen - self.score_rejected


@dataclass(frozen=True)
class Diagnosis:
    """Means over the pairs; NaN where there is no pair."""

    pairs: int
    prompts: int  # that give at least one pair
    chosen_quality: float  # Q_w, mean reward of the chosen responses
    chosen_percentile: float
    chosen_z: float
    rejected_quality: float
    rejected_percentile: float
    rejected_z: float
    contrast: float  # G, mean of the gaps
    contrast_quantiles: dict[float, float]
    not_better: int  # pairs whose chosen response does not score higher
    measures: PairMeasures


def diagnose(rewards, pairs, *, valid=None, offsets=None, quantiles=QUANTILES) -> Diagnosis:
    """Chosen quality Q_w and contrast G of a set of pairs, absolutely and within the pools.

    rewards: [prompts, n], or [responses] with offsets; NaN and infinities are no reward. They need not be the scores
        the pairs were picked by: another judge's say whether the pairs hold up under it.
    pairs: a PairSelection, or a mapping with "prompt", "chosen", "rejected".
    valid: bool like rewards, False leaves a response out of its pool.
    quantiles: of the gap.

    Raises ValueError for pairs that name no response, or one without a reward.
    """
    pools = as_pools("rewards", rewards, valid, offsets)
    quantiles = _levels(quantiles)
    prompt, chosen, rejected = _places(pairs, pools)
    measures = _measure(pools, prompt, chosen, rejected)
    gap = measures.gap
    return Diagnosis(
        pairs=len(prompt),
        prompts=len(np.unique(prompt)),
        chosen_quality=_mean(measures.score_chosen),
        chosen_percentile=_mean(measures.percentile_chosen),
        chosen_z=_mean(measures.z_chosen),
        rejected_quality=_mean(measures.score_rejected),
        rejected_percentile=_mean(measures.percentile_rejected),
        rejected_z=_mean(measures.z_rejected),
        contrast=_mean(gap),
        contrast_quantiles={q: float(np.quantile(gap, q)) if len(gap) else math.nan for q in quantiles},
        not_better=int((gap <= 0).sum()),
        measures=measures,
    )


def _levels(quantiles) -> list[float]:
    levels = [float(q) for q in quantiles]
    if not all(0 <= q <= 1 for q in levels):
        raise ValueError(f"quantiles must lie in [0, 1], got {levels}")
    return levels


def _places(pairs, pools: Pools) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`places_of` pairs that have a reward on both sides."""
    prompt, chosen, rejected = places_of(pairs, pools.offsets)
    for name, place in (("chosen", chosen), ("rejected", rejected)):
        missing = np.isnan(pools.values[place])
        if missing.any():
            at = int(np.argmax(missing))
            raise ValueError(
                f"pairs must name responses with a reward: {name} has none in {missing.sum()} of {len(place)} pairs, "
                f"the first is response {place[at] - pools.offsets[prompt[at]]} of prompt {prompt[at]}"
            )
    return prompt, chosen, rejected


def _measure(pools, prompt, chosen, rejected) -> PairMeasures:
    score_chosen, score_rejected = pools.values[chosen], pools.values[rejected]
    seen = np.concatenate([[0], np.cumsum(np.isfinite(pools.values))])[pools.offsets]
    others = np.maximum(np.diff(seen)[prompt] - 1, 1)
    z = pool_z(pools)
    return PairMeasures(
        score_chosen,
        score_rejected,
        100 * _lower(pools, prompt, score_chosen) / others,
        100 * _lower(pools, prompt, score_rejected) / others,
        z[chosen],
        z[rejected],
    )


def pool_z(pools: Pools) -> np.ndarray:
    """float64 [responses]: (reward - mean) / std (ddof 0) of the prompt, 0 where all its rewards are equal."""
    z = np.full(len(pools.values), np.nan)
    for _, places in blocks(pools.offsets):
        rewards = pools.values[places]
        block = sort_pools(rewards, "raw")
        equal = block.lowest == block.highest  # the rounding of their mean is no spread
        scaled = rewards * np.ldexp(1.0, -block.exponent)[:, None]
        distance = np.where(equal[:, None], 0 * scaled, scaled - block.center[:, None])
        z[places] = distance / np.where(equal | (block.count == 0), 1, block.spread)[:, None]
    return z


def _lower(pools, prompt, score) -> np.ndarray:
    """int64 [pairs], responses of the pair's pool that score lower."""
    sizes = np.diff(pools.offsets)[prompt]
    lower = np.zeros(len(prompt), np.int64)
    for pairs, own in blocks(np.concatenate([[0], np.cumsum(sizes)])):
        pool = pools.values[pools.offsets[prompt[pairs]][:, None] + np.arange(own.shape[1])]
        lower[pairs] = (pool < score[pairs, None]).sum(1)
    return lower


def _mean(values) -> float:
    return float(values.mean()) if len(values) else math.nan


# ---- five buckets


class Bucket(enum.IntEnum):
    WORST = 0
    LOW = 1
    MEDIUM = 2
    HIGH = 3
    BEST = 4


BUCKET_DATASETS = tuple((Bucket.BEST, rejected) for rejected in (Bucket.HIGH, Bucket.MEDIUM, Bucket.LOW)) + tuple(
    (chosen, Bucket.WORST) for chosen in (Bucket.BEST, Bucket.HIGH, Bucket.MEDIUM, Bucket.LOW)
)


class PoolBuckets(NamedTuple):
    label: np.ndarray  # int8, in the shape of rewards: a Bucket, -1 without a reward
    representative: np.ndarray  # int64 [prompts, 5], column of the response that stands for each bucket, -1: empty


def buckets(rewards, *, valid=None, offsets=None) -> PoolBuckets:
    """Every response's place in its pool, in five: worst, low, medium, high, best.

    By rank, in parts as equal as can be: a response with r lower ones of n is in part floor(5 * (r + 1/2) / n). The
    highest reward is always best and the lowest worst, so pools of two have only these, pools of three these and
    medium, pools of four all but medium. Equal rewards share a bucket (the one of their mean rank), so with ties one
    can be empty; where all are equal there is no better and worse, and all are medium.

    The highest response stands for best, the lowest for worst, the middle one (of two the lower) for the others; of
    equal rewards the first.
    """
    pools = as_pools("rewards", rewards, valid, offsets)
    label = np.full(len(pools.values), -1, np.int8)
    representative = np.full((len(pools.offsets) - 1, len(Bucket)), -1, np.int64)
    for prompts, flat in blocks(pools.offsets):
        rewards_of = pools.values[flat]
        order = np.argsort(rewards_of, axis=1, kind="stable")
        ordered = np.take_along_axis(rewards_of, order, axis=1)
        count = np.isfinite(ordered).sum(1)
        first, last = (position.T for position in tied_runs(ordered.T))
        ranked = _bucket_of(first, last, count[:, None])
        label[np.take_along_axis(flat, order, axis=1)] = ranked
        for bucket in Bucket:
            inside = (ranked == bucket).sum(1)
            middle = ((ranked >= 0) & (ranked < bucket)).sum(1) + (inside - 1) // 2
            at = {Bucket.WORST: np.zeros_like(count), Bucket.BEST: count - 1}.get(bucket, middle)
            at = np.take_along_axis(first, np.maximum(at, 0)[:, None], axis=1)
            column = np.take_along_axis(order, at, axis=1)[:, 0]
            representative[prompts, bucket] = np.where(inside > 0, column, -1)
    return PoolBuckets(label.reshape(np.shape(rewards)), representative)


def _bucket_of(first, last, count) -> np.ndarray:
    """int8 like first: the bucket of the reward that holds the positions first to last of count."""
    size = np.maximum(2 * count, 1)
    place, rest = np.divmod(5 * (first + last + 1), size)
    place -= (rest == 0) & (place > Bucket.MEDIUM)  # a bound between two parts goes to the one nearer to the middle
    lowest, highest = first == 0, last >= count - 1
    place = np.select(
        [first >= count, lowest & highest, lowest, highest], [-1, Bucket.MEDIUM, Bucket.WORST, Bucket.BEST], place
    )
    return place.astype(np.int8)


def bucket_pairs(rewards, *, same_prompts=True, valid=None, offsets=None) -> dict[str, dict[str, np.ndarray]]:
    """Seven sets of pairs that hold one side and move the other: "best-vs-high" ... "low-vs-worst" (`BUCKET_DATASETS`).

    same_prompts: only prompts with five non-empty buckets, so that the sets differ in nothing else; False: every prompt
        that has the two buckets.

    Each set is a mapping of arrays [pairs]: prompt, chosen, rejected (int64), score_chosen, score_rejected (float64).
    Warns when no prompt has five non-empty buckets.
    """
    pools = as_pools("rewards", rewards, valid, offsets)
    stands_for = buckets(pools.values, offsets=pools.offsets).representative
    usable = (stands_for >= 0).all(1) if same_prompts else np.ones(len(stands_for), bool)
    if same_prompts and len(stands_for) and not usable.any():
        warnings.warn(
            f"none of {len(stands_for)} prompts has a response in each of the five buckets, so every set is empty; "
            "same_prompts=False takes each set from the prompts that have its two",
            UserWarning,
            stacklevel=2,
        )
    sets = {}
    for better, worse in BUCKET_DATASETS:
        prompt = np.flatnonzero(usable & (stands_for[:, better] >= 0) & (stands_for[:, worse] >= 0))
        chosen, rejected = stands_for[prompt, better], stands_for[prompt, worse]
        sets[f"{better.name}-vs-{worse.name}".lower()] = {
            "prompt": prompt,
            "chosen": chosen,
            "rejected": rejected,
            "score_chosen": pools.values[pools.offsets[prompt] + chosen],
            "score_rejected": pools.values[pools.offsets[prompt] + rejected],
        }
    return sets


# ---- one moved while the other is held


class Control(NamedTuple):
    """Pairs in quantile bins of a held quantity (rows), and inside each in quantile bins of a moved one (columns)."""

    held_bin: np.ndarray  # int64 [pairs]
    moved_bin: np.ndarray  # int64 [pairs], counted inside the held bin
    count: np.ndarray  # int64 [bins, bins]
    held: np.ndarray  # float64 [bins, bins], mean of the held quantity; NaN in empty cells
    moved: np.ndarray  # float64 [bins, bins]
    outcome: np.ndarray | None  # float64 [bins, bins]
    moved_by: float  # top moved bin minus bottom one, mean over the held bins weighted by their pairs
    held_by: float  # the same of the held quantity: what the bins did not hold; 0 would be perfect
    effect: float  # the same of the outcome; NaN without one
    stderr: float


class EqualGap(NamedTuple):
    quality_moved: Control  # chosen quality, at equal gap
    gap_moved: Control  # gap, at equal chosen quality


def equal_gap(rewards, pairs, *, outcome=None, quality="raw", bins=5, valid=None, offsets=None) -> EqualGap:
    """What chosen quality does at equal gap, and what the gap does at equal chosen quality.

    Chosen quality and gap go together, so the mean of anything by the one is also about the other. Here the pairs are
    cut into bins by quantiles of the one, and each bin by quantiles of the other.

    outcome: [pairs], anything measured per pair (an implicit margin, a loss, 0/1 of being ranked right); NaN is left
        out of the outcome alone. None: only the bins, to train on their corners.
    quality: "raw" (the chosen reward), "percentile" or "z" (within the pool).
    bins: of each.

    stderr is that of independent pairs. Raises ValueError for an unknown quality or wrong shapes.
    """
    if quality not in ("raw", "percentile", "z"):
        raise ValueError(f'quality must be "raw", "percentile" or "z", got {quality!r}')
    if isinstance(bins, bool) or not isinstance(bins, int | np.integer) or bins < 2:
        raise ValueError(f"bins must be an integer of at least 2, got {bins!r}")
    measures = diagnose(rewards, pairs, valid=valid, offsets=offsets).measures
    chosen_quality = getattr(measures, {"raw": "score", "percentile": "percentile", "z": "z"}[quality] + "_chosen")
    if outcome is not None:
        outcome = np.asarray(outcome, dtype=np.float64)
        if outcome.shape != chosen_quality.shape:
            raise ValueError(f"outcome must have shape [{len(chosen_quality)}], got {list(outcome.shape)}")
        if np.isinf(outcome).any():
            raise ValueError(f"outcome must be finite or NaN, got {np.isinf(outcome).sum()} infinite values")
    return EqualGap(
        _control(measures.gap, chosen_quality, outcome, bins), _control(chosen_quality, measures.gap, outcome, bins)
    )


def _control(held, moved, outcome, bins) -> Control:
    held_bin = _quantile_bins(held, bins)
    moved_bin = np.zeros_like(held_bin)
    for bin_ in range(bins):
        inside = held_bin == bin_
        moved_bin[inside] = _quantile_bins(moved[inside], bins)
    cell = held_bin * bins + moved_bin

    def means(values):
        seen = ~np.isnan(values)
        count = np.bincount(cell[seen], minlength=bins * bins)
        size = np.where(count > 0, count, np.nan)
        mean = np.bincount(cell[seen], values[seen], bins * bins) / size
        squares = np.bincount(cell[seen], (values[seen] - mean[cell[seen]]) ** 2, bins * bins)
        variance = squares / np.where(count > 1, count - 1, np.nan)
        return count.reshape(bins, bins), mean.reshape(bins, bins), (variance / size).reshape(bins, bins)

    def top_minus_bottom(count, mean, squared_error):
        both = (count[:, 0] > 0) & (count[:, -1] > 0)
        weight = count.sum(1) * both
        if not weight.any():
            return math.nan, math.nan
        weight = (weight / weight.sum())[both]
        error = (weight**2 * (squared_error[:, -1] + squared_error[:, 0])[both]).sum()
        return float(weight @ (mean[:, -1] - mean[:, 0])[both]), math.sqrt(error)

    count, held_means, _ = held_numbers = means(held)
    _, moved_means, _ = moved_numbers = means(moved)
    effect, outcome_means = (math.nan, math.nan), None
    if outcome is not None:
        _, outcome_means, _ = outcome_numbers = means(outcome)
        effect = top_minus_bottom(*outcome_numbers)
    return Control(
        held_bin,
        moved_bin,
        count,
        held_means,
        moved_means,
        outcome_means,
        top_minus_bottom(*moved_numbers)[0],
        top_minus_bottom(*held_numbers)[0],
        *effect,
    )


def _quantile_bins(values, bins) -> np.ndarray:
    """int64 like values, 0 to bins - 1; equal values share a bin, so bins can be unequal and empty."""
    if not len(values):
        return np.zeros(0, np.int64)
    return np.searchsorted(np.quantile(values, np.arange(1, bins) / bins), values, side="left")


class Swap(NamedTuple):
    pairs: dict[str, np.ndarray]  # prompt, chosen, rejected, score_chosen, score_rejected: [pairs], all of them
    swapped: np.ndarray  # bool [pairs]: the rejected response is another one
    unable: int  # pairs that kept theirs: there is no new one, or it does not score below the chosen one
    quality_change: float  # of Q_w; 0 by construction
    contrast_before: float
    contrast_after: float


def swap_rejected(rewards, pairs, rejected, *, valid=None, offsets=None) -> Swap:
    """The same pairs with other rejected responses: what the choice of the rejected one alone does.

    rejected: a target of `select_pairs` ("min", "mean-2std", ...), taken from each pair's pool; or integers [pairs],
        columns within the pool, -1 to keep a pair's own.

    Every pair stays, with its chosen response, so that the two sets differ in the rejected ones alone.
    """
    pools = as_pools("rewards", rewards, valid, offsets)
    prompt, chosen, old = _places(pairs, pools)
    if isinstance(rejected, str):
        selection = select_pairs(pools.values, rejected=rejected, offsets=pools.offsets, on_degenerate="ignore")
        column = selection.rejected[prompt]
    else:
        column = np.asarray(rejected)
        if column.shape != prompt.shape or column.dtype.kind not in "iu":
            raise ValueError(
                f"rejected must be a target of select_pairs or integers of shape [{len(prompt)}], "
                f"got {column.dtype} {list(column.shape)}"
            )
    given = column >= 0
    new = np.where(given, pools.offsets[prompt] + column, old)
    if (outside := new >= pools.offsets[prompt + 1]).any():
        at = int(np.argmax(outside))
        size = np.diff(pools.offsets)[prompt[at]]
        raise ValueError(f"rejected must lie within the pool, got {column[at]} in a pool of {size} at {at}")
    below = pools.values[new] < pools.values[chosen]
    new = np.where(below, new, old)
    table = {
        "prompt": prompt,
        "chosen": chosen - pools.offsets[prompt],
        "rejected": new - pools.offsets[prompt],
        "score_chosen": pools.values[chosen],
        "score_rejected": pools.values[new],
    }
    before, after = (_mean(pools.values[chosen] - pools.values[place]) for place in (old, new))
    quality = _mean(table["score_chosen"]) - _mean(pools.values[chosen])
    return Swap(table, new != old, int((~given | ~below).sum()), quality, before, after)


# ---- on-policy


class OnPolicyShare(NamedTuple):
    """Shares in [0, 1]; NaN where there is nothing to take a share of."""

    chosen: float
    rejected: float
    both: float  # pairs with both responses on-policy
    pool: float  # of all responses


def on_policy_share(on_policy, pairs, *, valid=None, offsets=None) -> OnPolicyShare:
    """How much of the pairs the policy to be trained has written itself.

    on_policy: bool per response, [prompts, n] or [responses] with offsets.
    valid: bool like on_policy, False for what is no response: the padding of a padded pool.
    """
    on_policy = np.asarray(on_policy)
    if on_policy.dtype != bool:
        raise TypeError(f"on_policy must be bool, got {on_policy.dtype}")
    pools = as_pools("on_policy", on_policy, valid, offsets)
    _, chosen, rejected = _places(pairs, pools)
    chosen, rejected = pools.values[chosen], pools.values[rejected]
    pool = pools.values[np.isfinite(pools.values)]
    return OnPolicyShare(_mean(chosen), _mean(rejected), _mean(chosen * rejected), _mean(pool))


class Mix(NamedTuple):
    pairs: dict[str, np.ndarray]  # the columns that both sets have, and "on_policy" bool
    replaced: int
    quality_before: float  # Q_w of the pairs that were replaced; NaN without score_chosen
    quality_after: float


def mix_on_policy(pairs, on_policy_pairs, fraction=0.2, *, seed=0) -> Mix:
    """Replaces a share of the pairs by the on-policy pairs of the same prompts.

    pairs, on_policy_pairs: PairSelection or mappings of arrays over the same prompts; of the second at most one pair
        per prompt, for example `select_pairs(rewards, valid=on_policy)`.
    fraction: of the pairs, rounded; 0.2 is the paper's. Which ones is drawn by seed.

    Warns when fewer prompts have an on-policy pair than were asked for, and when the mean reward of the chosen falls:
    on-policy pairs help where their chosen responses are good, and only there.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must lie in [0, 1], got {fraction!r}")
    table, other = columns_of(pairs), columns_of(on_policy_pairs)
    prompts, at = np.unique(other["prompt"], return_index=True)
    if len(prompts) < len(other["prompt"]):
        raise ValueError(
            "on_policy_pairs must have at most one pair per prompt, "
            f"got {len(other['prompt'])} of {len(prompts)} prompts"
        )
    found = np.minimum(np.searchsorted(prompts, table["prompt"]), max(len(prompts) - 1, 0))
    has = prompts[found] == table["prompt"] if len(prompts) else np.zeros(len(table["prompt"]), bool)
    wanted, candidates = round(fraction * len(has)), np.flatnonzero(has)
    if len(candidates) < wanted:
        warnings.warn(
            f"{wanted} of {len(has)} pairs were to be replaced, but only {len(candidates)} are of prompts with an "
            "on-policy pair; sample more prompts from the policy, or lower fraction",
            UserWarning,
            stacklevel=2,
        )
    drawn = np.random.default_rng(seed).permutation(candidates)[:wanted]
    mixed = {}
    for name in (name for name in table if name in other):
        mixed[name] = np.array(table[name], np.result_type(table[name], other[name]))
        mixed[name][drawn] = other[name][at[found[drawn]]]
    mixed["on_policy"] = np.zeros(len(has), bool)
    mixed["on_policy"][drawn] = True
    before, after = math.nan, math.nan
    if "score_chosen" in mixed:
        before, after = _mean(table["score_chosen"][drawn]), _mean(mixed["score_chosen"][drawn])
        if after < before:
            warnings.warn(
                f"the mean reward of the chosen response of the {len(drawn)} replaced pairs falls from {before:.4g} to "
                f"{after:.4g}; on-policy pairs help only where their chosen responses are good",
                UserWarning,
                stacklevel=2,
            )
    return Mix(mixed, len(drawn), before, after)


# ---- prompts worth more samples


@dataclass(frozen=True)
class ResampleReport:
    """Per prompt, [prompts]."""

    n: np.ndarray  # int64, responses with a reward
    best: np.ndarray  # float64, NaN without rewards
    top_gap: np.ndarray  # float64, best minus second best; NaN below two rewards
    gain: np.ndarray  # float64, expected gain of the best reward by doubling n; NaN below two rewards
    below_floor: np.ndarray  # bool
    unresolved: np.ndarray  # bool, top_gap below the noise of the judge
    too_few: np.ndarray  # bool
    large_gain: np.ndarray  # bool

    @property
    def worth(self) -> np.ndarray:
        """bool [prompts], any of the four."""
        return self.below_floor | self.unresolved | self.too_few | self.large_gain

    @property
    def order(self) -> np.ndarray:
        """int64 [prompts], the prompts by gain, largest first; the ones without a known gain last."""
        return np.argsort(-np.where(np.isnan(self.gain), -np.inf, self.gain), kind="stable")


def resample(
    rewards, *, floor=None, judge_noise=None, least=5, least_gain=None, estimator="normal", valid=None, offsets=None
) -> ResampleReport:
    """Which prompts deserve more responses, and what doubling their number is expected to bring.

    floor: a best reward below it leaves nothing good to choose; None: no such test.
    judge_noise: standard deviation of the judge's rewards for one response; a gap of the top two below it leaves the
        chosen response to chance. None: no such test.
    least: pools with fewer rewards are too small.
    least_gain: a gain above it is worth the samples; None: no such test.
    estimator: of the gain E[max of 2n draws] - E[max of n draws], with n the number of rewards.
        "normal": rewards of a prompt are N(mean, std**2), so the gain is std * (m(2n) - m(n)), m(n) the expected
            maximum of n standard normals; the sample standard deviation is divided by its bias c4(n), which makes the
            estimate unbiased. Where a reward has a ceiling it is too high.
        "empirical": draws with replacement from the pool itself, sum_i (x_(i+1) - x_(i)) * (p_i - p_i**2) with
            p_i = (i / n)**n and x ascending. Nothing above the pool's best enters it, so it is too low.
    """
    for name, value in (("floor", floor), ("judge_noise", judge_noise), ("least_gain", least_gain)):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value!r}")
    if judge_noise is not None and judge_noise < 0:
        raise ValueError(f"judge_noise must be at least 0, got {judge_noise!r}")
    if estimator not in ("normal", "empirical"):
        raise ValueError(f'estimator must be "normal" or "empirical", got {estimator!r}')
    pools = as_pools("rewards", rewards, valid, offsets)
    prompts = len(pools.offsets) - 1
    n = np.zeros(prompts, np.int64)
    best, top_gap, gain = (np.full(prompts, np.nan) for _ in range(3))
    for rows, flat in blocks(pools.offsets):
        block = sort_pools(pools.values[flat], "raw", ddof=1)
        ordered, count = block.rewards, block.count
        n[rows] = count
        at = np.arange(len(rows))
        best[rows] = ordered[at, np.maximum(count - 1, 0)]
        top_gap[rows] = np.where(count > 1, best[rows] - ordered[at, np.maximum(count - 2, 0)], np.nan)
        if estimator == "normal":
            factors = np.array([_gain_factor(size) for size in range(flat.shape[1] + 1)])
            gain[rows] = block.unscaled(block.spread) * factors[count]
        else:
            gain[rows] = np.where(count > 1, _empirical_gain(ordered, count), np.nan)
    nothing = np.zeros(prompts, bool)
    return ResampleReport(
        n=n,
        best=best,
        top_gap=top_gap,
        gain=gain,
        below_floor=nothing if floor is None else best < floor,
        unresolved=nothing if judge_noise is None else top_gap < judge_noise,
        too_few=n < least,
        large_gain=nothing if least_gain is None else gain > least_gain,
    )


def _empirical_gain(ordered, count) -> np.ndarray:
    """[prompts] from ordered [prompts, n], NaN last."""
    rise = np.diff(ordered, axis=1)
    lower = np.arange(1, ordered.shape[1])
    below = np.minimum(lower / np.maximum(count, 1)[:, None], 1) ** count[:, None]
    return np.where(np.isfinite(rise), rise * (below - below**2), 0).sum(1)


@cache
def _gain_factor(n) -> float:
    """(m(2n) - m(n)) / c4(n): expected rise of the maximum in units of the sample standard deviation (ddof 1)."""
    if n < 2:
        return math.nan
    bias = math.sqrt(2 / (n - 1)) * math.exp(math.lgamma(n / 2) - math.lgamma((n - 1) / 2))
    return (expected_max(2 * n) - expected_max(n)) / bias


@cache
def expected_max(n) -> float:
    """Expected maximum of n standard normals, to about 1e-12: the integral of x n phi(x) Phi(x)**(n - 1)."""
    x, log_density, log_below = _normal_grid()
    step = x[1] - x[0]
    # The trapezoid rule converges exponentially for a smooth integrand that vanishes at both ends.
    return float((x * n * np.exp(log_density + (n - 1) * log_below)).sum() * step)


@cache
def _normal_grid() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, log phi(x), log Phi(x)."""
    x = np.arange(-1200, 1201) / 100
    above = np.array([math.erfc(value / math.sqrt(2)) / 2 for value in x])
    log_below = np.where(x > 0, np.log1p(-np.where(x > 0, above, 0)), np.log(above[::-1]))
    return x, -(x**2) / 2 - math.log(2 * math.pi) / 2, log_below
