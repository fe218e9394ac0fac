"""The scale on which the rewards of a prompt are compared, and their centre and spread on it.

Work goes in blocks of a few thousand prompts with pools of one size, sorted once and then laid out [n, k]: sums over a
prompt's rewards then run from the lowest reward to the highest, one after the other, so that their rounding depends
neither on the order of the responses nor on the padding or the other prompts.
"""

import functools
import statistics
from dataclasses import dataclass

import numpy as np

from fastpref.curate.pools import as_flat, as_mask, as_usable, pool_table, same_size

SCALES = ("raw", "logit", "mad", "normal_score")
MAD_TO_STD = 1.4826  # of a normal distribution


def to_logit(probability, clamp=1e-8) -> np.ndarray:
    """log(p / (1 - p)) in float64; p outside [clamp, 1 - clamp] is moved to that bound, NaN stays NaN.

    Raises ValueError when a value lies outside [0, 1].
    """
    probability = np.asarray(probability, dtype=np.float64)
    if ((probability < 0) | (probability > 1)).any():
        raise ValueError(
            f"probability must lie in [0, 1], got {np.nanmin(probability):g} to {np.nanmax(probability):g}"
        )
    probability = np.clip(probability, clamp, 1 - clamp)
    return np.log(probability) - np.log1p(-probability)


def rescale(rewards, scale, *, valid=None, offsets=None) -> np.ndarray:
    """Rewards on another scale, float64 in the shape they came in; NaN where there is no reward.

    rewards: [prompts, responses], or [responses] with offsets [prompts + 1]; NaN, infinities and responses whose
        `valid` (bool, like rewards) is False are none.
    scale: "raw"; "logit": log(p / (1 - p)) of probabilities in [0, 1], clamped to [1e-8, 1 - 1e-8]; "mad":
        (reward - median) / (1.4826 MAD) of the prompt, NaN where the MAD is 0; "normal_score": the normal quantile of
        (rank - 1/2) / n within the prompt, equal rewards at their mean rank.

    Raises ValueError for another scale, wrong shapes, and rewards outside [0, 1] with "logit".
    """
    check_scale(scale)
    rewards, offsets = as_flat("rewards", rewards, offsets)
    valid = None if valid is None else as_mask("valid", valid, "rewards", rewards.shape)
    values = as_usable(rewards, valid)
    if scale == "raw":
        return values.copy()
    if scale == "logit":
        return _logit(values)
    result = np.full(values.size, np.nan)
    index = np.arange(values.size)
    for prompts, size in same_size(offsets):
        pools = pool_table(values.reshape(-1), offsets, prompts, size)
        order = np.argsort(pools, axis=1, kind="stable")
        places = np.take_along_axis(pool_table(index, offsets, prompts, size), order, axis=1)
        block = sort_pools(pools, scale)
        result[places] = block.z(block.scaled).T
    return result.reshape(values.shape)


def check_scale(scale) -> None:
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {SCALES}, got {scale!r}")


@dataclass(frozen=True)
class SortedPools:
    """Pools of k prompts; NaN, for no reward, comes last."""

    rewards: np.ndarray  # [k, n] ascending, as given
    count: np.ndarray  # [k] rewards
    scaled: np.ndarray  # [n, k] rewards on the scale, times 2**-exponent, so that moments neither over- nor underflow
    exponent: np.ndarray  # [k]
    center: np.ndarray  # [k] mean of scaled, median for "mad", 0 for "normal_score"
    spread: np.ndarray  # [k] std, 1.4826 MAD, 1

    @functools.cached_property
    def last(self) -> np.ndarray:
        """[k] position of the highest reward, 0 without one."""
        return np.maximum(self.count - 1, 0)

    @functools.cached_property
    def lowest(self) -> np.ndarray:
        """[k] of scaled; NaN without a reward."""
        return self.scaled[0]

    @functools.cached_property
    def highest(self) -> np.ndarray:
        return self.at(self.last)

    def at(self, position) -> np.ndarray:
        """[k] of scaled, at the position [k] of each sorted pool."""
        prompts = len(self.count)
        return self.scaled.reshape(-1).take(position * prompts + np.arange(prompts))

    def reward_at(self, position) -> np.ndarray:
        """[k] of rewards, likewise."""
        prompts, size = self.rewards.shape
        return self.rewards.reshape(-1).take(np.arange(0, prompts * size, size) + position)

    def unscaled(self, values) -> np.ndarray:
        """[k] of scaled values, on the scale itself."""
        with np.errstate(over="ignore"):
            return np.ldexp(values, self.exponent)

    def z(self, scaled) -> np.ndarray:
        """Distances from the centre in spreads; NaN without spread."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.spread > 0, (scaled - self.center) / self.spread, np.nan)


def sort_pools(rewards, scale, ddof=0) -> SortedPools:
    """rewards: [k, n >= 1] float64, NaN for none."""
    ordered = np.sort(rewards, axis=1)
    prompts, size = ordered.shape
    missing = np.isnan(ordered.T) if np.isnan(ordered[:, -1]).any() else None
    count = np.full(prompts, size) if missing is None else size - np.count_nonzero(missing, axis=0)
    if scale == "normal_score":
        scores = _normal_scores(ordered.T, count)
        zero = np.zeros(prompts)
        return SortedPools(ordered, count, scores, np.zeros(prompts, np.int32), zero, zero + 1)

    on_scale = _logit(ordered) if scale == "logit" else ordered
    last = on_scale[np.arange(prompts), np.maximum(count - 1, 0)]
    largest = np.fmax(np.maximum(np.abs(on_scale[:, 0]), np.abs(last)), 0)  # 0 without a reward
    exponent = np.frexp(largest)[1]
    # In two steps, as 2**1073 is no float64; a power of two rounds nothing.
    step = np.clip(exponent, -1000, 1000)
    scaled = np.multiply(on_scale.T, np.ldexp(1.0, -step), order="C")
    if (rest := exponent - step).any():
        scaled *= np.ldexp(1.0, -rest)
    if scale == "mad":
        center = quantile(scaled, count, 0.5)
        spread = MAD_TO_STD * quantile(np.sort(np.abs(scaled - center), axis=0), count, 0.5)
        return SortedPools(ordered, count, scaled, exponent, center, spread)
    present = scaled if missing is None else np.where(missing, 0, scaled)
    mean = _sums(present) / np.maximum(count, 1)
    deviation = present - mean
    if missing is not None:
        deviation[missing] = 0
    variance = _sums(np.multiply(deviation, deviation, out=deviation)) / np.maximum(count - ddof, 1)
    return SortedPools(ordered, count, scaled, exponent, mean, np.sqrt(variance))


def quantile(ordered, count, q) -> np.ndarray:
    """[k], of [n, k] ascending columns with `count` numbers each, NaN last: interpolated between ranks, as numpy."""
    position = q * np.maximum(count - 1, 0)
    below = position.astype(np.int64)
    above = np.minimum(below + 1, np.maximum(count - 1, 0))
    columns = np.arange(len(count))
    low, high = ordered[below, columns], ordered[above, columns]
    return low + (position - below) * (high - low)


def _sums(columns) -> np.ndarray:
    """[k], of [n, k] column by column from the top; numpy sums a single column in another order."""
    if columns.shape[1] == 1:
        return np.repeat(columns, 2, axis=1).sum(axis=0)[:1]
    return columns.sum(axis=0)


def _logit(values) -> np.ndarray:
    low, high = np.fmin.reduce(values, axis=None, initial=np.inf), np.fmax.reduce(values, axis=None, initial=-np.inf)
    if low < 0 or high > 1:
        raise ValueError(f'rewards must lie in [0, 1] for scale="logit", got {low:g} to {high:g}')
    return to_logit(values)


def tied_runs(ordered) -> tuple[np.ndarray, np.ndarray]:
    """[n, k] each, of [n, k] ascending columns: the first and the last row of the same number."""
    size, prompts = ordered.shape
    rows = np.arange(size)[:, None]
    differs = ordered[1:] != ordered[:-1]
    edge = np.ones((1, prompts), bool)
    first = np.maximum.accumulate(np.where(np.vstack([edge, differs]), rows, 0), axis=0)
    last = np.minimum.accumulate(np.where(np.vstack([differs, edge]), rows, size)[::-1], axis=0)[::-1]
    return first, last


def _normal_scores(ordered, count) -> np.ndarray:
    """[n, k] of [n, k] ascending columns, NaN last."""
    size, prompts = ordered.shape
    first, last = tied_runs(ordered)
    scores = np.full((size, prompts), np.nan)
    for n in np.unique(count[count > 0]):
        columns = count == n
        scores[:n, columns] = _normal_quantiles(int(n))[(first + last)[:n, columns]]
    return scores


@functools.lru_cache(maxsize=64)
def _normal_quantiles(n) -> np.ndarray:
    """[2 n - 1] float64: at twice the rank r from 0, the normal quantile of (r + 1/2) / n."""
    quantile_of = statistics.NormalDist().inv_cdf
    return np.array([quantile_of((twice + 1) / (2 * n)) for twice in range(2 * n - 1)])
