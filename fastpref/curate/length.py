"""Length of responses: how far it alone explains the pairs, and two ways to take it out.

Lengths are characters or tokens, and enter as their logarithm: responses of one prompt differ by factors (on scored
samples of many models chosen ones are often ten times as long as rejected ones), and on a linear scale the few longest
ones would set the slope. An empty response counts as one character.
"""

import math
import warnings
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fastpref.curate.notices import DataWarning
from fastpref.curate.pairs import PairSelection, gap_bound, parse_bounds, places_of
from fastpref.curate.pools import Pools, as_mask, as_pools, per_prompt, pool_table, same_size, share_of
from fastpref.curate.scale import rescale, sort_pools

STEPS = 1000  # of conjugate gradients
OF_REJECTED = ("rejected", "score_rejected", "z_rejected", "rank_rejected")
ROUNDED = 64 * np.finfo(np.float64).eps  # of the norm of the numbers: a gradient below that is their rounding
SOLVED = 1e-10  # of the gradient of the least-squares problem before its first step


class LengthReport(NamedTuple):
    """Shares in [0, 1]; NaN without pairs, and without knowledge of what was truncated."""

    pairs: int
    longest_wins: float  # accuracy of "the longer response is the chosen one"; a tie is half right
    median_ratio: float  # length of chosen / length of rejected
    chosen_in_top_decile: float  # pairs whose chosen response has fewer than a tenth of its pool longer than it
    truncated_share: float  # of all responses
    truncated_chosen: float  # of the chosen responses
    truncated_rejected: float


def length_report(lengths, pairs, *, truncated=None, offsets=None) -> LengthReport:
    """How far length alone explains the pairs.

    lengths: [prompts, responses] numbers >= 0, or [responses] with offsets; NaN where there is no response.
    pairs: a PairSelection, or a mapping with equally long integer arrays "prompt", "chosen" and "rejected", the last
        two columns within the pool (what `PairSelection.table` gives).
    truncated: bool like lengths, True where the response was cut off; None where that is not known.

    Raises ValueError for negative lengths, wrong shapes, and pairs outside their pools or without lengths; TypeError
    for pairs that are not integers.
    """
    pools = _lengths(lengths, offsets)
    prompt, chosen, rejected = places_of(pairs, pools.offsets)
    log_length = _log(pools.values)
    of_chosen, of_rejected = log_length[chosen], log_length[rejected]
    if (bad := np.isnan(of_chosen) | np.isnan(of_rejected)).any():
        raise ValueError(f"lengths must be given for every response of a pair, got none for {bad.sum()} pairs")
    cut = None
    if truncated is not None:
        cut = as_mask("truncated", truncated, "lengths", np.shape(lengths)).reshape(-1)

    return LengthReport(
        pairs=len(prompt),
        longest_wins=share_of((of_chosen > of_rejected) + 0.5 * (of_chosen == of_rejected)),
        median_ratio=float(np.exp(np.median(of_chosen - of_rejected))) if len(prompt) else math.nan,
        chosen_in_top_decile=share_of(_in_top_decile(log_length, pools.offsets, prompt, of_chosen)),
        truncated_share=math.nan if cut is None else share_of(cut[~np.isnan(pools.values)]),
        truncated_chosen=math.nan if cut is None else share_of(cut[chosen]),
        truncated_rejected=math.nan if cut is None else share_of(cut[rejected]),
    )


class AdjustedScores(NamedTuple):
    scores: np.ndarray  # float64, in the shape of the scores
    slope: float  # of the score, per unit of log length


def remove_length(scores, lengths, *, sources=None, flagged=None, offsets=None) -> AdjustedScores:
    """Scores less the part that goes with log length within a prompt and a source.

    score = effect of the prompt + effect of the source + slope * log(length) + rest is fitted by least squares. With
    the source's effect in it, a source that is both better and more verbose does not pass for a preference for length.
    The slope's part of each score is then taken off, relative to the prompt's mean log length, so that the mean score
    of a prompt stays what it was.

    scores: [prompts, responses], or [responses] with offsets [prompts + 1]; NaN and infinities are no score.
    lengths: numbers >= 0 like scores. Without one (NaN) a score is left as it is.
    sources: integers like scores; negative: unknown, which counts as one more source. None: prompt effects only.
    flagged: bool like scores, responses that are not fitted (a source that games the judge would bend the slope), but
        adjusted like the others. Fit after the audit of the sources, not before.

    Raises ValueError for wrong shapes, negative lengths, and lengths that vary in no prompt and source.
    """
    shape = np.shape(scores)
    pools = as_pools("scores", scores, offsets=offsets)
    log_length = _log(_lengths(lengths, offsets, shape).values)
    known = ~np.isnan(pools.values) & ~np.isnan(log_length)
    fitted = known if flagged is None else known & ~as_mask("flagged", flagged, "scores", shape).reshape(-1)
    prompt = per_prompt(pools.offsets)
    source = None
    if sources is not None:
        sources = np.asarray(sources)
        if sources.dtype.kind not in "iu" or sources.shape != shape:
            raise ValueError(
                f"sources must be integers with shape {list(shape)} to match scores, "
                f"got {sources.dtype} {list(sources.shape)}"
            )
        source = np.unique(np.maximum(sources, -1).reshape(-1)[fitted], return_inverse=True)[1]
    x, y = _without_effects(np.stack([log_length[fitted], pools.values[fitted]]), prompt[fitted], source)
    spread = x @ x
    if not spread > 1e-12 * max(1, len(x)):
        raise ValueError(
            f"lengths must vary within a prompt and a source for a slope to be fitted, got {len(x)} responses in "
            f"{len(np.unique(prompt[fitted]))} prompts where they do not"
        )
    slope = float(x @ y / spread)
    adjusted = pools.values.copy()
    adjusted[known] -= slope * _within(log_length[known], prompt[known])
    return AdjustedScores(adjusted.reshape(shape), slope)


def match_length(
    selection, rewards, lengths, *, band=0.5, min_gap=None, max_gap=None, valid=None, offsets=None
) -> PairSelection:
    """The selection with each rejected response replaced by the one nearest in length to the chosen response.

    Candidates are the responses whose reward is below that of the chosen one and within band * std of the target, on
    the scale of the selection. The target is moved into the pool where it lies outside, and the band reaches at least
    to the response that was selected, so that every pair stays a pair. Where no target was sought ("min_of") the band
    is around the selected response, of several the lowest. Nearest means the smallest ratio of lengths; at a tie the
    candidate nearer to the target, then the lower reward, then the first. With several pairs per prompt they get the
    nearest, the second nearest, and so on.

    rewards, valid, offsets: those that were selected from.
    lengths: numbers >= 0 like rewards. A response without one (NaN) is taken last.
    band: in std of the prompt, >= 0.
    min_gap, max_gap: the bounds that `select_pairs` was given, which the new pairs keep too.

    Raises ValueError for wrong shapes, negative lengths and another band, and for rewards and bounds that are not those
    of the selection.
    """
    if not isinstance(band, int | float | np.number) or not 0 <= band < math.inf:
        raise ValueError(f"band must be a number >= 0, got {band!r}")
    bounds = parse_bounds(min_gap=min_gap, max_gap=max_gap)
    pools = as_pools("rewards", rewards, valid, offsets)
    _check_rewards(pools, selection)
    log_length = _log(_lengths(lengths, offsets, np.shape(rewards)).values)
    # "mad" measures in units of rewards too: median and 1.4826 MAD are the selection's mean and std.
    on_scale = pools.values
    if selection.scale not in ("raw", "mad"):
        on_scale = rescale(on_scale, selection.scale, offsets=pools.offsets)
    slots = 1 if selection.keep.ndim == 1 else selection.keep.shape[1]
    chosen, kept = selection.chosen.reshape(-1, slots), selection.keep.reshape(-1, slots)
    columns = {name: getattr(selection, name).reshape(-1, slots).copy() for name in OF_REJECTED}

    for prompts, size in same_size(pools.offsets):
        reward, value, length = (
            pool_table(x, pools.offsets, prompts, size) for x in (pools.values, on_scale, log_length)
        )
        keep, worse = kept[prompts], columns["rejected"][prompts]
        # Without a pair the columns are -1, and what is found for them is not used.
        best = chosen[prompts].max(axis=1)
        rows = np.arange(len(keep))
        target = np.clip(selection.target[prompts], np.fmin.reduce(value, axis=1), np.fmax.reduce(value, axis=1))
        target = np.where(np.isnan(target), value[rows, worse[rows, keep.argmax(axis=1)]], target)
        distance = np.abs(value - target[:, None])
        reach = np.where(keep, distance[rows[:, None], worse], 0).max(axis=1)
        inside = distance <= np.fmax(band * selection.std[prompts], reach)[:, None]
        candidate = inside & (value < value[rows, best][:, None])
        gap = reward[rows, best][:, None] - reward
        if bounds.min_gap:
            candidate &= gap >= np.reshape(gap_bound(sort_pools(reward, "raw"), bounds.min_gap), (-1, 1))
        if bounds.max_gap:
            candidate &= gap <= np.reshape(gap_bound(sort_pools(reward, "raw"), bounds.max_gap), (-1, 1))
        if (short := candidate.sum(axis=1) < keep.sum(axis=1)).any():
            raise ValueError(
                f"min_gap and max_gap must be those of selection, got {min_gap!r} and {max_gap!r}, outside of which "
                f"lie pairs of {np.count_nonzero(short)} prompts or more"
            )
        apart = np.nan_to_num(np.abs(length - length[rows, best][:, None]), nan=np.finfo(np.float64).max)
        order = np.lexsort((value, distance, np.where(candidate, apart, np.inf)), axis=1)
        matched = np.take_along_axis(order, np.maximum(np.cumsum(keep, axis=1) - 1, 0), axis=1)
        score = np.take_along_axis(reward, matched, axis=1)
        std = selection.std[prompts, None]
        z = np.take_along_axis(value, matched, axis=1) - selection.mean[prompts, None]
        found = {
            "rejected": matched,
            "score_rejected": score,
            "z_rejected": np.divide(z, std, out=np.full_like(z, np.nan), where=std > 0),
            "rank_rejected": np.count_nonzero(reward[:, None] < score[:, :, None], axis=2),
        }
        for name, values in found.items():
            columns[name][prompts] = np.where(keep, values, columns[name][prompts])
    columns = {name: values.reshape(selection.keep.shape) for name, values in columns.items()}
    return replace(selection, **columns, rule=f"{selection.rule}, matched in length")


def _check_rewards(pools, selection) -> None:
    prompts = len(pools.offsets) - 1
    if prompts != len(selection.keep):
        raise ValueError(f"rewards must have the {len(selection.keep)} prompts of selection, got {prompts}")
    _, chosen, rejected = places_of(selection, pools.offsets)
    differs = pools.values[chosen] != selection.score_chosen[selection.keep]
    differs |= pools.values[rejected] != selection.score_rejected[selection.keep]
    if differs.any():
        raise ValueError(f"rewards must be those of selection, got others for {differs.sum()} of {len(differs)} pairs")


# ---- what the three have in common


def _lengths(lengths, offsets, shape=None) -> Pools:
    if shape is not None and np.shape(lengths) != shape:
        raise ValueError(f"lengths must have shape {list(shape)}, one per response, got {list(np.shape(lengths))}")
    pools = as_pools("lengths", lengths, offsets=offsets)
    if (pools.values < 0).any():
        raise ValueError(f"lengths must be >= 0, got {np.nanmin(pools.values):g}")
    return pools


def _log(lengths) -> np.ndarray:
    return np.log(np.maximum(lengths, 1))


# ---- pairs


def _in_top_decile(lengths, offsets, prompt, length) -> np.ndarray:
    """bool [pairs], whether fewer than a tenth of the pool of `prompt` is longer than `length`."""
    result = np.zeros(len(prompt), bool)
    of_pairs = np.concatenate([[0], np.cumsum(np.diff(offsets)[prompt])])
    for which, size in same_size(of_pairs):
        pools = pool_table(lengths, offsets, prompt[which], size)
        longer = np.count_nonzero(pools > length[which][:, None], axis=1)
        result[which] = longer < np.count_nonzero(~np.isnan(pools), axis=1) / 10
    return result


# ---- slope


def _within(values, group) -> np.ndarray:
    """Values [m] minus the means of their groups [m]."""
    return values - (np.bincount(group, values) / np.maximum(np.bincount(group), 1))[group]


def _without_effects(values, prompt, source) -> np.ndarray:
    """values [2, m] minus their least-squares effects of prompt and source.

    Prompt means are taken off exactly; the sources' effects are then found by conjugate gradients on the least-squares
    problem that is left (CGLS; Bjorck, "Numerical Methods for Least Squares Problems", 7.4), each scaled by the square
    root of its number of responses.
    """
    rounded = ROUNDED**2 * np.square(values).sum(axis=1)
    values = np.stack([_within(column, prompt) for column in values])
    if source is None or not len(source):
        return values
    weight = 1 / np.sqrt(np.bincount(source))
    for rest, least in zip(values, rounded, strict=True):
        gradient = weight * np.bincount(source, rest)
        direction, squares = gradient, gradient @ gradient
        enough = max(SOLVED**2 * squares, least)
        for _ in range(STEPS):
            if squares <= enough:
                break
            change = _within((weight * direction)[source], prompt)
            rest -= squares / (change @ change) * change
            gradient = weight * np.bincount(source, rest)
            squares, before = gradient @ gradient, squares
            direction = gradient + squares / before * direction
        else:
            text = (
                f"the effects of {len(weight)} sources are not solved after {STEPS} steps (gradient "
                f"{math.sqrt(squares / enough):.1g} times what would be): the slope of length is inexact"
            )
            warnings.warn(DataWarning("length-slope", text), stacklevel=3)
    return values
