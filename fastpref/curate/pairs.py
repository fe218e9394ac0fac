"""One preference pair per prompt, picked from the distribution of the rewards of its responses.

Xiao et al., "Finding the Sweet Spot: Preference Data Construction for Scaling Preference Optimization", ACL 2025,
arXiv 2502.16825: chosen = the best response, rejected = the response nearest to mean - 2 std rather than the worst
one, which becomes an outlier as the pool grows. Their selection script is not public; nearest-to-target is the
reading that agrees with the names of their checkpoints, and the rules for ties and degenerate pools are ours.
"""

import enum
import math
import re
from dataclasses import dataclass

import numpy as np


class DropReason(enum.IntEnum):
    """Why a prompt gives no pair; `KEPT` where it does."""

    KEPT = 0
    TOO_FEW = 1  # fewer than two valid rewards
    NO_SPREAD = 2  # all valid rewards equal, so std = 0
    SAME_RESPONSE = 3  # both targets pick one response
    NOT_BETTER = 4  # reward of chosen <= reward of rejected


@dataclass(frozen=True)
class PairSelection:
    """One pair per prompt; every array is [prompts].

    Dropped prompts (`keep` False) have -1 as `chosen` and `rejected` and NaN in the per-pair numbers. `mean`, `std` and
    `target` (the value the rejected response was sought at, in units of reward) are NaN only where there are fewer
    than two valid rewards.
    """

    chosen: np.ndarray  # int64, column in `rewards`
    rejected: np.ndarray  # int64
    keep: np.ndarray  # bool
    reason: np.ndarray  # int8, a DropReason
    score_chosen: np.ndarray  # float64
    score_rejected: np.ndarray  # float64
    mean: np.ndarray  # float64, over the valid rewards of the prompt
    std: np.ndarray  # float64, with the caller's ddof
    target: np.ndarray  # float64, -inf for "min"
    minimum: np.ndarray  # float64, the lowest valid reward
    percentile: np.ndarray  # float64, where the rejected response ranks: 0 = the pool's minimum, 100 = its maximum

    @property
    def gap(self) -> np.ndarray:
        """[prompts] score_chosen - score_rejected, > 0 wherever a pair was kept."""
        return self.score_chosen - self.score_rejected

    @property
    def target_below_min(self) -> float:
        """Share of the kept prompts whose target lies below every reward: there the rule is min. NaN if none."""
        return _share((self.target < self.minimum)[self.keep])

    @property
    def rejected_is_min(self) -> float:
        """Share of the kept prompts whose rejected response has the lowest reward of its pool; NaN if none."""
        return _share((self.score_rejected == self.minimum)[self.keep])

    @property
    def rejected_percentile(self) -> float:
        """Median of `percentile` over the kept prompts; NaN if none."""
        return float(np.median(self.percentile[self.keep])) if self.keep.any() else math.nan

    def dropped(self) -> dict[str, int]:
        """Number of dropped prompts by reason, in lower case; reasons that did not occur are left out."""
        counts = np.bincount(self.reason, minlength=len(DropReason))
        return {reason.name.lower(): int(counts[reason]) for reason in DropReason if reason and counts[reason]}


def select_pairs(rewards, chosen="max", rejected="mean-2std", *, valid=None, ddof=0) -> PairSelection:
    """Picks the chosen and the rejected response of every prompt by target value.

    rewards: [prompts, responses], any real dtype. NaN and infinities are no reward: pad ragged pools with NaN.
    chosen, rejected: "max", "min", "mean", or "mean+<k>std" / "mean-<k>std" with any number k. The response nearest to
        that value is taken. At a tie the chosen one is the higher reward, the rejected one the lower, and of equal
        rewards the first.
    valid: [prompts, responses] bool, False leaves a response out.
    ddof: 0 for the population std, 1 for the sample std.

    A prompt gives no pair when it has fewer than two valid rewards, no spread, one response for both targets, or a
    chosen reward that is not above the rejected one; `reason` says which. Up to five responses mean - 2 std is never
    inside the pool (|r - mean| <= std * sqrt(n - 1)), so there the default is exactly max against min.
    Statistics are taken in float64 over the sorted rewards: the result does not depend on the order of the responses.
    Raises ValueError for a wrong shape, an unknown target or another ddof.
    """
    chosen_k, rejected_k = _parse_target("chosen", chosen), _parse_target("rejected", rejected)
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof!r}")
    pools = _sort_pools(_masked_rewards(rewards, valid), ddof)
    chosen_at = _nearest(pools, chosen_k, prefer_high=True)
    rejected_at = _nearest(pools, rejected_k, prefer_high=False)
    score_chosen, score_rejected = _pick(pools.rewards, chosen_at), _pick(pools.rewards, rejected_at)

    minimum, maximum = pools.rewards[:, 0], _pick(pools.rewards, np.maximum(pools.count - 1, 0))
    reason = np.select(
        [pools.count < 2, minimum == maximum, chosen_at == rejected_at, score_chosen <= score_rejected],
        [DropReason.TOO_FEW, DropReason.NO_SPREAD, DropReason.SAME_RESPONSE, DropReason.NOT_BETTER],
        DropReason.KEPT,
    ).astype(np.int8)
    keep = reason == DropReason.KEPT
    enough = pools.count >= 2
    return PairSelection(
        chosen=np.where(keep, _pick(pools.order, chosen_at), -1),
        rejected=np.where(keep, _pick(pools.order, rejected_at), -1),
        keep=keep,
        reason=reason,
        score_chosen=np.where(keep, score_chosen, np.nan),
        score_rejected=np.where(keep, score_rejected, np.nan),
        mean=np.where(enough, np.ldexp(pools.mean, pools.exponent), np.nan),
        std=np.where(enough, np.ldexp(pools.std, pools.exponent), np.nan),
        target=np.where(enough, np.ldexp(_target(pools, rejected_k), pools.exponent), np.nan),
        minimum=minimum,
        # Sorted and ties resolved to the first: the position is the number of lower rewards.
        percentile=np.where(keep, 100 * rejected_at / np.maximum(pools.count - 1, 1), np.nan),
    )


_TARGET = re.compile(r"mean(?:(?P<k>[+-](?:\d+\.?\d*|\.\d+))std)?")


def _parse_target(argument, name) -> float:
    """The k of the target mean + k * std; -inf and inf stand for min and max."""
    extremes = {"min": -math.inf, "max": math.inf}
    if name in extremes:
        return extremes[name]
    match = _TARGET.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise ValueError(f'{argument} must be "max", "min", "mean" or like "mean-2std", got {name!r}')
    return float(match["k"] or 0)


def _masked_rewards(rewards, valid) -> np.ndarray:
    """[prompts, responses >= 1] float64 with NaN for everything that is no reward."""
    try:
        rewards = np.asarray(rewards, dtype=np.float64)
    except ValueError as error:
        raise ValueError("rewards must be [prompts, responses] numbers, ragged pools padded with NaN") from error
    if rewards.ndim != 2:
        raise ValueError(f"rewards must have shape [prompts, responses], got {list(rewards.shape)}")
    usable = np.isfinite(rewards)
    if valid is not None:
        valid = np.asarray(valid)
        if valid.dtype != bool or valid.shape != rewards.shape:
            raise ValueError(
                f"valid must be bool with shape {list(rewards.shape)} to match rewards, "
                f"got {valid.dtype} {list(valid.shape)}"
            )
        usable &= valid
    if rewards.shape[1] == 0:
        return np.full((len(rewards), 1), np.nan)
    return np.where(usable, rewards, np.nan)


@dataclass(frozen=True)
class _Pools:
    rewards: np.ndarray  # [prompts, responses] ascending, NaN last
    order: np.ndarray  # [prompts, responses] original column of each; equal rewards keep their order
    count: np.ndarray  # [prompts] valid rewards
    exponent: np.ndarray  # [prompts] scaled = rewards * 2**-exponent, so that |scaled| <= 1
    scaled: np.ndarray  # [prompts, responses]
    mean: np.ndarray  # [prompts] of scaled
    std: np.ndarray  # [prompts] of scaled


def _sort_pools(rewards, ddof) -> _Pools:
    order = np.argsort(rewards, axis=1, kind="stable")
    rewards = np.take_along_axis(rewards, order, axis=1)
    usable = np.isfinite(rewards)
    count = usable.sum(axis=1)
    # A power of two rounds nothing, and keeps the squares of the std from under- or overflowing.
    exponent = np.frexp(np.where(usable, np.abs(rewards), 0).max(axis=1))[1]
    scaled = np.ldexp(rewards, -exponent[:, None])
    mean = np.where(usable, scaled, 0).sum(axis=1) / np.maximum(count, 1)
    deviation = np.where(usable, scaled - mean[:, None], 0)
    std = np.sqrt((deviation**2).sum(axis=1) / np.maximum(count - ddof, 1))
    return _Pools(rewards, order, count, exponent, scaled, mean, std)


def _target(pools, k) -> np.ndarray:
    """[prompts] target in scaled units."""
    return np.full_like(pools.mean, k) if math.isinf(k) else pools.mean + k * pools.std


def _nearest(pools, k, *, prefer_high) -> np.ndarray:
    """[prompts] position in the sorted pool of the first reward that is nearest to the target."""
    last = np.maximum(pools.count - 1, 0)
    # Beyond the pool the nearest reward is the extreme one: clipping says so without rounding, for infinite k too.
    target = np.clip(_target(pools, k), pools.scaled[:, 0], _pick(pools.scaled, last))
    distance = np.abs(pools.scaled - target[:, None])
    # The mean carries a few roundings, which must not decide a tie (two responses are both 1 std from their mean).
    tied = distance <= np.fmin.reduce(distance, axis=1)[:, None] + 8 * np.finfo(np.float64).eps
    if not prefer_high:
        return np.argmax(tied, axis=1)
    highest = tied.shape[1] - 1 - np.argmax(tied[:, ::-1], axis=1)
    return np.argmax(pools.rewards == _pick(pools.rewards, highest)[:, None], axis=1)


def _pick(table, column) -> np.ndarray:
    """table[i, column[i]] for every row i."""
    return np.take_along_axis(table, column[:, None], axis=1)[:, 0]


def _share(flags) -> float:
    return float(flags.mean()) if flags.size else math.nan
