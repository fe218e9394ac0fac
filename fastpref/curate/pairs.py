"""Preference pairs picked from the distribution of the rewards of a prompt's responses.

Xiao et al., "Finding the Sweet Spot: Preference Data Construction for Scaling Preference Optimization", ACL 2025,
arXiv 2502.16825: chosen = the best response, rejected = the response nearest to mean - 2 std rather than the worst
one, which becomes an outlier as the pool grows. Their selection script is not public; nearest-to-target is the
reading that agrees with the names of their checkpoints, and the rules for ties and degenerate pools are ours.
"""

import enum
import math
import re
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from fastpref.curate.files.processes import available_cpus
from fastpref.curate.notices import DataWarning
from fastpref.curate.pools import as_flat, as_mask, as_usable, pool_table, same_size, share_of
from fastpref.curate.scale import SortedPools, check_scale, quantile, sort_pools, tied_runs

DEGENERATE_SHARE = 0.2  # of targets below the minimum of their pool, beyond which on_degenerate acts
BLOCK = 1 << 17  # responses at a time: small enough for the cache, large enough for numpy
GAPS = 1 << 20  # differences between two rewards at a time, for their quantiles
PLACES = ("prompt", "chosen", "rejected")  # what pairs are, whatever else is known of them
TIED = 8 * np.finfo(np.float64).eps  # the mean carries a few roundings, which must not decide a tie


class DropReason(enum.IntEnum):
    """Why there is no pair; `KEPT` where there is one."""

    KEPT = 0
    TOO_FEW = 1  # fewer than two valid rewards, or than this pair of the prompt needs
    NO_SPREAD = 2  # all valid rewards equal on the scale, or a target measured in a spread of 0
    SAME_RESPONSE = 3  # both targets pick one response, or two of equal reward
    NOT_BETTER = 4  # reward of chosen < reward of rejected, or equal on the scale
    NO_CHOOSABLE = 5  # no valid reward may be chosen
    DEGENERATE = 6  # the target lies below every reward, and on_degenerate="drop"
    LOW_CHOSEN = 7  # chosen below min_chosen
    SMALL_GAP = 8  # gap below min_gap
    LARGE_GAP = 9  # gap above max_gap
    REVERSED = 10  # a published pair whose scores contradict it, where only those that agree are asked for


@dataclass(frozen=True)
class PairSelection:
    """The pairs of every prompt: arrays are [prompts], those of pairs [prompts, k] with pairs_per_prompt = k > 1.

    Where there is no pair (`keep` False) `chosen`, `rejected` and `rank_rejected` are -1 and the other numbers of the
    pair NaN. `mean`, `std`, `target` and `minimum` are on the scale (logits for "logit"; for "normal_score" 0, 1, k and
    the lowest normal score), with median and 1.4826 MAD in place of mean and std for "mad". Mean, std and target are
    NaN where there are fewer than two valid rewards; `target` also for "min_of_<m>", which seeks none.
    """

    chosen: np.ndarray  # int64, column in the pool
    rejected: np.ndarray  # int64
    keep: np.ndarray  # bool
    reason: np.ndarray  # int8, a DropReason
    score_chosen: np.ndarray  # float64, as given, on no other scale
    score_rejected: np.ndarray  # float64
    z_chosen: np.ndarray  # float64, (score on the scale - mean) / std
    z_rejected: np.ndarray  # float64
    rank_rejected: np.ndarray  # int64, the number of lower rewards in the pool; 0 is its minimum
    n_pool: np.ndarray  # int64 [prompts], valid rewards
    mean: np.ndarray  # float64 [prompts]
    std: np.ndarray  # float64 [prompts], with the caller's ddof
    target: np.ndarray  # float64 [prompts], the value the rejected response was sought at; -inf for "min"
    minimum: np.ndarray  # float64 [prompts], the lowest valid reward
    share_below_min: float  # of the prompts with spread: the target of the rule asked for lies below every reward
    small_pools: int  # prompts with a pair and so few rewards that the rule asked for can only be min; see `small_pool`
    rule: str  # "max vs mean-2std"; "max vs min_of_5 for mean-2std" where on_degenerate replaced the rule
    scale: str

    @property
    def gap(self) -> np.ndarray:
        """score_chosen - score_rejected, > 0 wherever a pair was kept."""
        return self.score_chosen - self.score_rejected

    @property
    def percentile(self) -> np.ndarray:
        """float64, where the rejected response ranks: 0 = the pool's minimum, 100 = its maximum."""
        size = np.maximum(self.n_pool - 1, 1).reshape(-1, *[1] * (self.keep.ndim - 1))
        return np.where(self.keep, 100 * self.rank_rejected / size, np.nan)

    @property
    def share_rejected_min(self) -> float:
        """Share of the pairs whose rejected response has the lowest reward of its pool; NaN if there are none."""
        return share_of(self.rank_rejected[self.keep] == 0)

    @property
    def median_percentile(self) -> float:
        """Median of `percentile` over the pairs; NaN if there are none."""
        return float(np.median(self.percentile[self.keep])) if self.keep.any() else math.nan

    def dropped(self) -> dict[str, int]:
        """Number of missing pairs by reason, in lower case; reasons that did not occur are left out."""
        counts = np.bincount(self.reason.ravel(), minlength=len(DropReason))
        return {reason.name.lower(): int(counts[reason]) for reason in DropReason if reason and counts[reason]}

    def table(self) -> dict[str, np.ndarray]:
        """The pairs alone, one entry per pair and array, by prompt; `prompt` is the prompt's index."""
        prompt = np.nonzero(self.keep)[0]
        columns = {name: getattr(self, name)[self.keep] for name in (*INDICES, *NUMBERS)}
        return {"prompt": prompt, **columns, "n_pool": self.n_pool[prompt]}


def select_pairs(
    rewards,
    chosen="max",
    rejected="mean-2std",
    *,
    valid=None,
    offsets=None,
    choosable=None,
    scale="raw",
    ddof=0,
    on_degenerate="warn",
    min_chosen=None,
    min_gap=None,
    max_gap=None,
    pairs_per_prompt=1,
    seed=0,
) -> PairSelection:
    """Picks the chosen and the rejected response of every prompt by the distribution of its rewards.

    rewards: [prompts, responses], any real dtype; or [responses] with offsets [prompts + 1], where those of prompt p
        are offsets[p]:offsets[p + 1]. NaN and infinities are no reward: pad ragged pools with NaN.
    chosen, rejected: the response nearest to a target: "max", "min", "mean", or "mean+<k>std" / "mean-<k>std" with any
        number k. "quantile:<q>" is the response whose rank is nearest to q (n - 1), counted from the lowest.
        rejected="min_of_<m>" is the lowest of m responses drawn without replacement, other than the chosen one where
        there are more than m: with m = 5 the rule the authors ship. At a tie the chosen one is the higher reward, the
        rejected one the lower, and of equal rewards the first.
    valid: bool like rewards, False leaves a response out.
    choosable: bool like rewards. Where False a response is never chosen; it may be rejected, and counts in the moments.
    scale: what moments and distances are taken of. "raw"; "logit" of probabilities in [0, 1]; "mad": median and
        1.4826 MAD in place of mean and std; "normal_score": the normal quantile of (rank - 1/2) / n, so that mean - 2
        std is -2. Ranks, and so "quantile" and "min_of", are the same on all of them.
    ddof: 0 for the population std, 1 for the sample std.
    on_degenerate: what happens when more than 20 % of the targets of a rejected "mean-<k>std" lie below every reward of
        their pool, where the rule is no other than "min": "warn" (DataWarning), "error" (ValueError), "ignore", "drop"
        these prompts, or a "min_of_<m>" or "quantile:<q>" that takes the rule's place for all prompts. Pools that no
        target can lie within, for the number of their rewards (`small_pools`), are not counted and not dropped: the
        rule there is min.
    min_chosen, min_gap, max_gap: bounds, in units of rewards, on score_chosen and on score_chosen - score_rejected; a
        pair outside is dropped. Or "quantile:<q>" within the prompt: of its rewards for min_chosen, of the differences
        between any two of its rewards for the gaps.
    pairs_per_prompt: k pairs, the chosen response against each of the k nearest to the target ("min_of": the k lowest
        drawn), nearest first; the first ones are those of a smaller k.
    seed: of the draws of "min_of"; one number per prompt is drawn, by its index.

    Without a pair, `reason` says why. Up to five responses mean - 2 std is never inside the pool (|r - mean| <= std *
    sqrt(n - 1)), so there the default is exactly max against min, which `small_pools` counts; for normal rewards it
    still is in 96 % of pools of 16.
    Statistics are taken in float64 over the sorted rewards: the result does not depend on the order of the responses,
    nor on the other prompts or the padding.
    Raises ValueError for wrong shapes, rules and options, TypeError for rewards that are not numbers.
    """
    chosen, rejected = _parse_rule("chosen", chosen), _parse_rule("rejected", rejected)
    replacement = _parse_on_degenerate(on_degenerate)
    bounds = parse_bounds(min_chosen=min_chosen, min_gap=min_gap, max_gap=max_gap)
    for name, value, least in (("pairs_per_prompt", pairs_per_prompt, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    data = _checked(rewards, valid, offsets, choosable, scale, ddof)

    def select(rule) -> PairSelection:
        return _select(data, [(chosen, rule)], bounds, pairs_per_prompt, seed)[0]

    selection = select(rejected)
    if rejected.kind != "target" or math.isinf(rejected.number):
        return selection
    large = selection.n_pool > _small_pool(rejected, scale, ddof)
    share = _share_below(selection, large)
    if not share > DEGENERATE_SHARE:
        return selection
    if replacement is not None:
        replaced = select(replacement)
        rule = f"{replaced.rule} for {rejected.name}"
        return replace(replaced, share_below_min=selection.share_below_min, rule=rule)
    if on_degenerate == "drop":
        return without(selection, large & (selection.target < selection.minimum), DropReason.DEGENERATE)
    if on_degenerate == "ignore":
        return selection
    worst = ""
    if selection.keep.any():
        worst = f": the rejected response is the worst of its pool in {selection.share_rejected_min:.1%} of the pairs"
    message = (
        f"{rejected.name} lies below every reward of its pool for {share:.1%} of the prompts (more than "
        f"{DEGENERATE_SHARE:.0%}; median pool: {np.median(selection.n_pool[large]):g} responses). There the rule is "
        f"min{worst}. "
        'rejected="quantile:0.10", "min_of_5" and larger pools avoid that; rejected="min" is the same rule by its name'
    )
    if on_degenerate == "error":
        raise ValueError(message)
    warnings.warn(DataWarning("rule-below-pool", message), stacklevel=2)
    return selection


def published_pairs(
    scores,
    *,
    offsets,
    valid,
    choosable=None,
    strength=None,
    min_chosen=None,
    min_gap=None,
    max_gap=None,
    agree=False,
) -> PairSelection:
    """The two responses of every prompt as they were published, the first one chosen, where both are valid.

    scores: [responses] float64, NaN where there is none; the bounds and `agree` go by them.
    strength: [prompts] float64, the margin of a pair without scores, NaN where there is none; or None.
    min_chosen, min_gap, max_gap: as of `select_pairs`. A quantile within a prompt of two is always met.
    agree: pairs that their scores contradict are dropped.

    There is no pool: the numbers that say where a response lies in it are NaN.
    """
    first = offsets[:-1]
    two = np.diff(offsets) == 2
    chosen, rejected = (np.where(two, first + k, 0) for k in (0, 1))
    scores = {side: np.where(two, scores[at], np.nan) for side, at in (("chosen", chosen), ("rejected", rejected))}
    margin = scores["chosen"] - scores["rejected"]
    if strength is not None:
        margin = np.where(np.isnan(margin), strength, margin)
    bounds = parse_bounds(min_chosen=min_chosen, min_gap=min_gap, max_gap=max_gap)
    reason = np.full(len(first), DropReason.KEPT, np.int8)
    for which, why in (
        (_beyond(margin, bounds.max_gap, np.greater), DropReason.LARGE_GAP),
        (_beyond(margin, bounds.min_gap, np.less), DropReason.SMALL_GAP),
        (_beyond(scores["chosen"], bounds.min_chosen, np.less), DropReason.LOW_CHOSEN),
        ((margin < 0) & agree, DropReason.REVERSED),
        (False if choosable is None else ~choosable[chosen], DropReason.NO_CHOOSABLE),
        (~(two & valid[chosen] & valid[rejected]), DropReason.TOO_FEW),
    ):
        reason[which] = why
    keep = reason == DropReason.KEPT
    nan = np.full(len(first), math.nan)
    return PairSelection(
        chosen=np.where(keep, 0, -1),
        rejected=np.where(keep, 1, -1),
        keep=keep,
        reason=reason,
        **{f"score_{side}": np.where(keep, column, np.nan) for side, column in scores.items()},
        z_chosen=nan,
        z_rejected=nan,
        rank_rejected=np.where(keep, 0, -1),
        n_pool=np.diff(offsets),
        mean=nan,
        std=nan,
        target=nan,
        minimum=nan,
        share_below_min=math.nan,
        small_pools=0,
        rule="published",
        scale="raw",
    )


def _beyond(values, bound: "_Bound | None", compare) -> np.ndarray:
    """Where a value is beyond a bound."""
    return np.zeros(len(values), bool) if bound is None or bound.within else compare(values, bound.number)


def small_pool(rejected, scale="raw", ddof=0) -> int:
    """The number of rewards up to which a rejected "mean-<k>std" is min, whatever the rewards are; 0: of no pool.

    One of n rewards is at most sqrt(n - 1) population standard deviations from their mean, so that none of five is
    beyond two; with the sample's standard deviation at most (n - 1) / sqrt(n). The lowest normal score is the quantile
    of 1 / (2 n). A distance in MADs has no bound.
    """
    return _small_pool(_parse_rule("rejected", rejected), scale, ddof)


def _small_pool(rule, scale, ddof) -> int:
    k = rule.number
    if rule.kind != "target" or not -math.inf < k < 0 or scale == "mad":
        return 0
    if scale == "normal_score":
        return int(0.5 / NormalDist().cdf(k))
    return int(k * k + 1 if ddof == 0 else (k * k + 2 - k * math.sqrt(k * k + 4)) / 2)


def _share_below(selection, which) -> float:
    """Share of targets below the pool, among those prompts that have spread; NaN if there are none."""
    first = selection.reason if selection.reason.ndim == 1 else selection.reason[:, 0]
    spread_out = which & ~np.isin(first, (DropReason.TOO_FEW, DropReason.NO_SPREAD))
    return share_of((selection.target < selection.minimum)[spread_out])


def all_pairings(
    rewards,
    ks=(-math.inf, -2, -1, 0, 1, 2, math.inf),
    *,
    valid=None,
    offsets=None,
    choosable=None,
    scale="raw",
    ddof=0,
) -> dict[tuple[str, str], PairSelection]:
    """Every chosen above every rejected target of a grid mean + k std: the 21 pairings of the paper's seven points.

    ks: two or more numbers, ascending; -inf and inf stand for min and max.
    The other arguments are those of `select_pairs`. Nothing is warned about; `share_below_min` says how often a target
    is outside the pool.

    Returns the selections by the names of their targets: `all_pairings(rewards)["max", "mean-2std"]`. Their arrays per
    prompt, but for the target, are shared.
    """
    grid = [float(k) for k in ks]
    if len(grid) < 2 or not all(np.diff(grid) > 0):
        raise ValueError(f"ks must be two or more ascending numbers, got {ks!r}")
    rules = [_Rule("target", k, _target_name(k)) for k in grid]
    pairings = [(rules[c], rules[r]) for c in range(len(rules)) for r in range(c)]
    data = _checked(rewards, valid, offsets, choosable, scale, ddof)
    selections = _select(data, pairings, _Bounds(), 1, 0)
    return {(c.name, r.name): selection for (c, r), selection in zip(pairings, selections, strict=True)}


def without(selection: PairSelection, pairs, reason: DropReason) -> PairSelection:
    """The selection less the pairs that are True in `pairs`, bool [prompts] or like `keep`; they get the reason."""
    pairs = np.asarray(pairs)
    drop = selection.keep & (pairs if pairs.ndim == selection.keep.ndim else pairs[:, None])
    return replace(
        selection,
        keep=selection.keep & ~drop,
        reason=np.where(drop, np.int8(reason), selection.reason),
        **{name: np.where(drop, -1, getattr(selection, name)) for name in INDICES},
        **{name: np.where(drop, np.nan, getattr(selection, name)) for name in NUMBERS},
    )


def columns_of(pairs) -> dict[str, np.ndarray]:
    """The columns of pairs as arrays, with "prompt", "chosen" and "rejected" as int64 [pairs].

    pairs: a PairSelection, or a mapping with equally long integer arrays under these names, the last two columns within
        the pool of the prompt.

    Raises ValueError for other columns and shapes, TypeError for what is no integer.
    """
    columns = pairs.table() if isinstance(pairs, PairSelection) else pairs
    if not isinstance(columns, Mapping) or not set(PLACES) <= columns.keys():
        raise ValueError(f'pairs must be a PairSelection or have "prompt", "chosen" and "rejected", got {pairs!r:.80}')
    columns = {name: np.asarray(column) for name, column in columns.items()}
    for name in PLACES:
        if columns[name].size and columns[name].dtype.kind not in "iu":
            raise TypeError(f"pairs must have {name} as integers, got {columns[name].dtype}")
        columns[name] = columns[name].astype(np.int64, copy=False)
    shapes = [list(columns[name].shape) for name in PLACES]
    if len(shapes[0]) != 1 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"pairs must have prompt, chosen and rejected of one shape [pairs], got {shapes}")
    return columns


def places_of(pairs, offsets) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int64 [pairs] each: the prompts of pairs, and where their chosen and rejected responses are in a flat array.

    Raises what `columns_of` raises, and ValueError for pairs outside the prompts and their pools and for a selection
    from another number of prompts.
    """
    prompt, chosen, rejected = map(columns_of(pairs).get, PLACES)
    prompts = len(offsets) - 1
    if isinstance(pairs, PairSelection) and len(pairs.keep) != prompts:
        raise ValueError(f"pairs must be a selection from {prompts} prompts, got one from {len(pairs.keep)}")
    if not len(prompt):
        return prompt, chosen, rejected
    if not 0 <= prompt.min() <= prompt.max() < prompts:
        raise ValueError(f"pairs must have prompts from 0 to {prompts - 1}, got {prompt.min()} to {prompt.max()}")
    size = np.diff(offsets)[prompt]
    for name, column in (("chosen", chosen), ("rejected", rejected)):
        if (outside := (column < 0) | (column >= size)).any():
            at = int(np.argmax(outside))
            raise ValueError(f"pairs must have {name} within the pool, got {column[at]} in a pool of {size[at]}")
    return prompt, offsets[prompt] + chosen, offsets[prompt] + rejected


# ---- arguments


class _Rule(NamedTuple):
    kind: str  # "target", "quantile", "min_of"
    number: float  # k of mean + k std, -inf and inf for min and max; q; m
    name: str


_TARGET_PATTERN = re.compile(r"mean(?:(?P<k>[+-](?:\d+\.?\d*|\.\d+))std)?")
_DRAW = re.compile(r"min_of_(?P<m>[1-9]\d*)")
_QUANTILE_PATTERN = re.compile(r"quantile:(?P<q>\d+\.?\d*|\.\d+)")


def _parse_rule(argument, name) -> _Rule:
    text = name if isinstance(name, str) else ""
    extremes = {"min": -math.inf, "max": math.inf}
    if text in extremes:
        return _Rule("target", extremes[text], name)
    if match := _TARGET_PATTERN.fullmatch(text):
        return _Rule("target", float(match["k"] or 0), name)
    if (q := _quantile(text)) is not None:
        return _Rule("quantile", q, name)
    if argument != "chosen" and (match := _DRAW.fullmatch(text)):
        return _Rule("min_of", int(match["m"]), name)
    draw = "" if argument == "chosen" else ', "min_of_<m>"'
    raise ValueError(f'{argument} must be "max", "min", "mean", like "mean-2std", "quantile:<q>"{draw}, got {name!r}')


def _target_name(k) -> str:
    """The shortest that `_parse_rule` reads as this k."""
    extremes = {-math.inf: "min", 0.0: "mean", math.inf: "max"}
    return extremes.get(k) or f"mean{np.format_float_positional(k, trim='-', sign=True)}std"


def _quantile(text) -> float | None:
    """The q of "quantile:<q>"; None when the text is something else."""
    match = _QUANTILE_PATTERN.fullmatch(text) if isinstance(text, str) else None
    q = float(match["q"]) if match else None
    return q if q is None or q <= 1 else None


def _parse_on_degenerate(name) -> _Rule | None:
    """The rule that replaces a degenerate one; None for the other actions."""
    if name in ("warn", "ignore", "drop", "error"):
        return None
    try:
        rule = _parse_rule("on_degenerate", name)
    except ValueError:
        rule = None
    if rule is None or rule.kind == "target":
        raise ValueError(
            'on_degenerate must be "warn", "ignore", "drop", "error" or a rule "min_of_<m>" or "quantile:<q>", '
            f"got {name!r}"
        )
    return rule


class _Bound(NamedTuple):
    number: float
    within: bool  # number is a quantile within the prompt


class _Bounds(NamedTuple):
    min_chosen: _Bound | None = None
    min_gap: _Bound | None = None
    max_gap: _Bound | None = None


def parse_bounds(**bounds) -> _Bounds:
    parsed = {}
    for name, value in bounds.items():
        if value is None:
            continue
        if (q := _quantile(value)) is not None:
            parsed[name] = _Bound(q, True)
        elif isinstance(value, int | float | np.number) and math.isfinite(value):
            parsed[name] = _Bound(float(value), False)
        else:
            raise ValueError(f'{name} must be a finite number or "quantile:<q>", got {value!r}')
    return _Bounds(**parsed)


# ---- selection

INDICES = ("chosen", "rejected", "rank_rejected")  # -1 where there is no pair
NUMBERS = ("score_chosen", "score_rejected", "z_chosen", "z_rejected")  # NaN there


class _Data(NamedTuple):
    rewards: np.ndarray  # [responses], any real dtype
    offsets: np.ndarray  # int64 [prompts + 1]
    valid: np.ndarray | None  # bool [responses]
    choosable: np.ndarray | None  # bool [responses]
    scale: str
    ddof: int


def _checked(rewards, valid, offsets, choosable, scale, ddof) -> _Data:
    rewards, offsets = as_flat("rewards", rewards, offsets)
    masks = [
        None if mask is None else as_mask(name, mask, "rewards", rewards.shape).reshape(-1)
        for name, mask in (("valid", valid), ("choosable", choosable))
    ]
    check_scale(scale)
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof!r}")
    return _Data(rewards.reshape(-1), offsets, *masks, scale, ddof)


def _select(data, pairings, bounds, slots, seed) -> list[PairSelection]:
    """One selection for each of the pairings (chosen rule, rejected rule)."""
    prompts = len(data.offsets) - 1
    shared = {"n_pool": np.zeros(prompts, np.int64)}
    shared |= {name: np.full(prompts, np.nan) for name in ("mean", "std", "minimum")}
    selected = []
    for _ in pairings:
        columns = {name: np.full((prompts, slots), -1) for name in INDICES}
        columns |= {name: np.full((prompts, slots), np.nan) for name in NUMBERS}
        columns |= {
            "reason": np.full((prompts, slots), DropReason.TOO_FEW, np.int8),
            "target": np.full(prompts, np.nan),
        }
        selected.append(columns)
    draws = None
    if any(rejected.kind == "min_of" for _, rejected in pairings):
        draws = np.stack([np.random.default_rng([seed, slot]).random(prompts) for slot in range(slots)])

    def work(which, size):
        block = _read_block(data, which, size)
        pools, enough = block.pools, block.pools.count >= 2
        shared["n_pool"][which] = pools.count
        shared["minimum"][which] = pools.unscaled(pools.lowest)
        shared["mean"][which] = np.where(enough, pools.unscaled(pools.center), np.nan)
        shared["std"][which] = np.where(enough, pools.unscaled(pools.spread), np.nan)
        for (chosen, rejected), columns in zip(pairings, selected, strict=True):
            columns["target"][which] = np.where(enough, pools.unscaled(_target(pools, rejected)), np.nan)
            best = _pick_chosen(block, chosen)
            if rejected.kind == "min_of":
                picks = _drawn(block, int(rejected.number), best.rank, draws[:, which])
            else:
                picks = _nearest_ones(block, rejected, slots)
            spread = pools.spread if _needs_spread(chosen) or _needs_spread(rejected) else None
            earlier = []
            for slot, (position, there) in enumerate(picks):
                worse = _pick_rejected(block, position, earlier)
                earlier.append(worse.reward)
                reason = _reasons(block, best, worse, there, spread, bounds)
                keep = reason == DropReason.KEPT
                columns["reason"][which, slot] = reason
                zs = pools.z(best.scaled), pools.z(worse.scaled)
                indices, numbers = (best.column, worse.column, worse.rank), (best.reward, worse.reward, *zs)
                for names, found, none in ((INDICES, indices, -1), (NUMBERS, numbers, np.nan)):
                    for name, values in zip(names, found, strict=True):
                        columns[name][which, slot] = values if keep.all() else np.where(keep, values, none)

    _in_threads(work, same_size(data.offsets, BLOCK))
    results = []
    for (chosen, rejected), columns in zip(pairings, selected, strict=True):
        target, reason = columns["target"], columns["reason"]
        spread_out = ~np.isin(reason[:, 0], (DropReason.TOO_FEW, DropReason.NO_SPREAD))
        below = math.nan if rejected.kind == "min_of" else share_of((target < shared["minimum"])[spread_out])
        pairs = columns | {"keep": reason == DropReason.KEPT}
        del pairs["target"]
        if slots == 1:
            pairs = {name: values[:, 0] for name, values in pairs.items()}
        rule = f"{chosen.name} vs {rejected.name}"
        few = shared["n_pool"] <= _small_pool(rejected, data.scale, data.ddof)
        small = int(np.count_nonzero(few & (columns["reason"][:, 0] == DropReason.KEPT)))
        results.append(
            PairSelection(
                **pairs,
                **shared,
                target=target,
                share_below_min=below,
                small_pools=small,
                rule=rule,
                scale=data.scale,
            )
        )
    return results


def _in_threads(work, blocks) -> None:
    """Calls work on every block, on as many threads as the process may use cores: numpy lets go of the interpreter."""
    blocks = list(blocks)
    cores = available_cpus()
    if len(blocks) < 8 or cores == 1:
        for block in blocks:
            work(*block)
        return
    with ThreadPoolExecutor(min(cores, len(blocks))) as threads:
        for _ in threads.map(lambda block: work(*block), blocks):  # raises what a block raised
            pass


class _Block(NamedTuple):
    """Prompts with pools of one size; k of them, n responses each."""

    rewards: np.ndarray  # [k, n] float64 in the caller's order, NaN for none
    pools: SortedPools
    choosable: np.ndarray  # [k, n] rewards that may be chosen, NaN for the others
    eligible: np.ndarray | None  # [n, k] bool, which of the sorted ones these are; None: all


def _read_block(data, which, size) -> _Block:
    def rows(values):
        return None if values is None else pool_table(values, data.offsets, which, size)

    rewards = as_usable(rows(data.rewards), rows(data.valid))
    if data.choosable is None:
        return _Block(rewards, sort_pools(rewards, data.scale, data.ddof), rewards, None)
    choosable = rows(data.choosable) & ~np.isnan(rewards)
    order = np.argsort(rewards, axis=1)
    pools = sort_pools(np.take_along_axis(rewards, order, axis=1), data.scale, data.ddof)
    return _Block(rewards, pools, np.where(choosable, rewards, np.nan), np.take_along_axis(choosable, order, axis=1).T)


class _Pick(NamedTuple):
    """[k] each."""

    column: np.ndarray  # in the caller's pool
    reward: np.ndarray
    scaled: np.ndarray
    rank: np.ndarray  # position in the sorted pool; for a rejected one that of the first that is equal


def _pick_chosen(block, rule) -> _Pick:
    pools = block.pools
    if rule.number == math.inf and block.eligible is None:
        position = pools.last
    else:
        places, want, slack = _sought(pools, rule)
        if block.eligible is not None:
            eligible = _any_of_equal(pools, block.eligible) if rule.kind == "quantile" else block.eligible
            places = np.where(eligible, places, np.nan)
        tied = _tied(places, want, slack)
        position = len(tied) - 1 - np.argmax(tied[::-1], axis=0)
    reward = pools.reward_at(position)
    column = np.argmax(block.choosable == reward[:, None], axis=1)
    return _Pick(column, reward, pools.at(position), position)


def _any_of_equal(pools, flags) -> np.ndarray:
    """[n, k] bool of the sorted rewards: whether one of the same reward has the flag. Their own order is arbitrary."""
    first, last = tied_runs(pools.rewards.T)
    rows = np.arange(len(flags))[:, None]
    before = np.maximum.accumulate(np.where(flags, rows, -1), axis=0)
    after = np.minimum.accumulate(np.where(flags, rows, len(flags))[::-1], axis=0)[::-1]
    return (before >= first) | (after <= last)


def _pick_rejected(block, position, earlier) -> _Pick:
    """Of equal rewards the first one as the earliest pick of its prompt. earlier: [k] rewards of each pick before."""
    pools = block.pools
    reward = pools.reward_at(position)
    equal = block.rewards == reward[:, None]
    if not earlier:  # the position is that of the first already
        return _Pick(np.argmax(equal, axis=1), reward, pools.at(position), position)
    taken = sum(reward == before for before in earlier)
    column = np.argmax(np.cumsum(equal, axis=1) > taken[:, None], axis=1)
    return _Pick(column, reward, pools.at(position), _first_equal(pools, position))


def _first_equal(pools, position) -> np.ndarray:
    """[k] lowest position of the same reward."""
    return np.argmax(pools.rewards == pools.reward_at(position)[:, None], axis=1)


def _target(pools, rule) -> np.ndarray:
    """[k] in scaled units; NaN for a draw, which seeks no value."""
    if rule.kind == "min_of":
        return np.full_like(pools.center, np.nan)
    if rule.kind == "quantile":
        return pools.at(np.argmax(_tied(*_sought(pools, rule)), axis=0))
    return (
        np.full_like(pools.center, rule.number)
        if math.isinf(rule.number)
        else pools.center + rule.number * pools.spread
    )


def _sought(pools, rule) -> tuple[np.ndarray, np.ndarray, float]:
    """Places [n, k] of the sorted responses, the place [k] sought among them, and what counts as a tie.

    Rewards for a target, positions for a quantile; NaN where there is no reward.
    """
    if rule.kind == "quantile":
        positions = np.arange(float(len(pools.scaled)))[:, None]
        return (
            np.where(np.isnan(pools.scaled), np.nan, positions),
            rule.number * pools.last,
            TIED * len(positions),
        )
    # Beyond the pool the nearest reward is the extreme one: clipping says so without rounding, for infinite k too.
    want = np.clip(_target(pools, rule), pools.lowest, pools.highest)
    return pools.scaled, want, 0 if math.isinf(rule.number) else TIED


def _tied(places, want, slack) -> np.ndarray:
    """[n, k] bool, the places nearest to the one sought."""
    distance = np.subtract(places, want)
    np.abs(distance, out=distance)
    return distance <= np.fmin.reduce(distance, axis=0) + slack


def _nearest_ones(block, rule, slots):
    """Yields (position [k], there [k] bool) for the nearest, the second nearest, ...; the lower one at a tie."""
    pools = block.pools
    places, want, slack = _sought(pools, rule)
    columns = np.arange(len(want))
    # A target below the pool has been moved to the lowest place, which needs no search.
    inside = want > places[0]
    inside = slice(None) if inside.all() else np.flatnonzero(inside)
    position = np.zeros(len(want), np.int64)
    position[inside] = np.argmax(_tied(places[:, inside], want[inside], slack), axis=0)
    if rule.kind == "quantile":
        position = _first_equal(pools, position)
    below, above = position - 1, position + 1
    yield position, pools.count > 0
    for _ in range(slots - 1):
        room_below, room_above = below >= 0, above < pools.count
        low = np.abs(places[np.maximum(below, 0), columns] - want)
        high = np.abs(places[np.minimum(above, len(places) - 1), columns] - want)
        downwards = room_below & (~room_above | (low <= high + slack))
        yield np.where(downwards, below, np.where(room_above, above, 0)), room_below | room_above
        below, above = below - downwards, above + ~downwards


def _drawn(block, m, chosen, draws):
    """Yields (position [k], there [k] bool) for the lowest, the second lowest, ... of m responses drawn.

    chosen: [k] position of the chosen response, which is not drawn where there are more than m.
    draws: [slots, k] uniform in [0, 1), each turned into the position of the lowest of the draws that are left.
    """
    count = block.pools.count
    without_chosen = count > m
    left = np.where(without_chosen, count - 1, count)
    base = np.zeros_like(count)
    for slot, uniform in enumerate(draws):
        there = (left > 0) & (m > 0)
        step = _lowest_of(m, left, uniform)
        position = base + step
        position += without_chosen & (position >= chosen)
        position = np.where(there, position, 0)
        yield (_first_equal(block.pools, position) if slot == 0 else position), there
        base, left, m = base + step + 1, left - step - 1, m - 1


def _lowest_of(m, sizes, uniform) -> np.ndarray:
    """[k], the lowest of min(m, size) numbers drawn from 0 .. size - 1 without replacement, from a uniform one."""
    lowest = np.zeros_like(sizes)
    if m < 1:
        return lowest
    for size in np.unique(sizes[sizes > m]):
        # P(lowest > r) = prod over the draws j of (size - 1 - r - j) / (size - j)
        draw = np.arange(m)[:, None]
        higher = np.prod((size - 1 - np.arange(size - m + 1) - draw) / (size - draw), axis=0)
        lowest[sizes == size] = np.searchsorted(1 - higher, uniform[sizes == size], side="right")
    return lowest


def _needs_spread(rule) -> bool:
    return rule.kind == "target" and rule.number != 0 and math.isfinite(rule.number)


@np.errstate(over="ignore")  # a gap may be infinite
def _reasons(block, best, worse, there, spread, bounds) -> np.ndarray:
    """[k] int8. there: bool, whether there is a response to reject; spread: of the rules that are measured in it."""
    pools = block.pools
    with np.errstate(over="ignore"):  # beyond the largest float64, and so beyond every bound
        gap = best.reward - worse.reward
    flat_pool = pools.lowest == pools.highest
    # The first that applies counts, so it is written last.
    checks = [
        (bounds.max_gap and gap > gap_bound(pools, bounds.max_gap), DropReason.LARGE_GAP),
        (bounds.min_gap and gap < gap_bound(pools, bounds.min_gap), DropReason.SMALL_GAP),
        (bounds.min_chosen and best.reward < _chosen_bound(pools, bounds.min_chosen), DropReason.LOW_CHOSEN),
        (best.scaled <= worse.scaled, DropReason.NOT_BETTER),
        (best.reward == worse.reward, DropReason.SAME_RESPONSE),
        (block.eligible is not None and ~block.eligible.any(axis=0), DropReason.NO_CHOOSABLE),
        (flat_pool if spread is None else flat_pool | (spread == 0), DropReason.NO_SPREAD),
        ((pools.count < 2) | ~there, DropReason.TOO_FEW),
    ]
    reason = np.zeros(len(gap), np.int8)
    for applies, name in checks:
        if applies is not None and applies is not False:
            reason[applies] = name
    return reason


def _chosen_bound(pools, bound):
    return quantile(pools.rewards.T, pools.count, bound.number) if bound.within else bound.number


def gap_bound(pools, bound):
    """A number, or [k]: a quantile of the differences between any two rewards of a pool."""
    if not bound.within:
        return bound.number
    prompts, size = pools.rewards.shape
    low, high = np.triu_indices(size, 1)
    if not len(low):
        return np.full(prompts, np.nan)
    result = np.empty(prompts)
    step = max(1, GAPS // len(low))
    for begin in range(0, prompts, step):
        rows = slice(begin, begin + step)
        gaps = np.sort(pools.rewards[rows, high] - pools.rewards[rows, low], axis=1)
        count = pools.count[rows]
        result[rows] = quantile(gaps.T, count * (count - 1) // 2, bound.number)
    return result
