"""Wrong scores in ragged pools: whole sources that game the judge, single wrong scores, and pairs a judge got wrong.

The solvers are those of `fastpref.preference_matrix`; here pools with a source per response become the matrices they
want, and their findings come back per response. They are told apart because they need different data: `audit` looks for
sources whose scores the other sources do not explain, `denoise_scores` for single scores that contradict the rest of
their row and column, `consensus` for single scores that contradict other judges of the response, `denoise_judges` and
`vote_consensus` for compared pairs that contradict the other pairs of their prompt. Torch is imported inside calls.
"""

import warnings
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from fastpref.curate.hygiene import as_sources
from fastpref.curate.notices import DataWarning
from fastpref.curate.pools import as_pools, per_prompt
from fastpref.curate.scale import to_logit

EXCLUSION_MODES = ("both", "chosen", "none")
FLAGGING = 200  # prompts of a source from which it is flagged; power of z > 3 on real scores: 0.8 here, 0.5 at 50
MOST_CELLS = 1 << 28  # of a matrix, 2 GiB
MOST_PROMPTS = 20_000  # audited; the bootstrap draws so many times the resamples
LEAST_SOURCES = 3  # under the median prompt
UPPER_QUARTILE = 1.1503  # of |x|, of a normal distribution in standard deviations. Of ratings and of the distances to
# a median of three, half are next to 0, so that the median says nothing of the noise
FEW_ITEMS = 10  # of one prompt, up to which robust PCA of its pairwise matrix leaves half of the error or more


@dataclass(frozen=True)
class SourceReport:
    """Per source, [S] by code; NaN in the numbers of sources that could not be audited."""

    unexplained: np.ndarray  # float64, share of the source's variance that the other sources' structure leaves
    low: np.ndarray  # float64, bootstrap interval of the share, by resampled prompts
    high: np.ndarray
    z: np.ndarray  # float64, robust: (share - median) / (1.4826 MAD) over the audited sources
    order: np.ndarray  # int64 codes, the least explained first
    flagged: np.ndarray  # bool, z above the threshold, on enough prompts
    reference: np.ndarray  # bool, constant: a baseline that the others were scored against
    prompts: np.ndarray  # int64, of the audited prompts those with a score of the source
    rank: int  # of the structure
    audited_prompts: int
    repeated: int  # scores beyond the first of a source under one prompt; a source counts with their mean
    as_chosen: np.ndarray | None  # int64, pairs of the given selection with its response as the chosen one
    as_rejected: np.ndarray | None
    names: list[str] | None


def audit(
    scores,
    sources,
    *,
    offsets=None,
    valid=None,
    names=None,
    probability=False,
    selection=None,
    rank=None,
    threshold=3.0,
    least_prompts=FLAGGING,
    most_prompts=MOST_PROMPTS,
    resamples=200,
    confidence=0.9,
    seed=0,
) -> SourceReport:
    """Ranks the sources of scored responses by how little the other sources explain their scores.

    scores, offsets, valid: ragged pools; all scores there are, those of copies and of canned texts too.
    sources: integer codes like scores, -1 for unknown (left out). Of several scores of a source under one prompt the
        mean is audited.
    names: of the sources, by code, for the report.
    probability: scores are probabilities, audited as logits.
    selection: a PairSelection (or anything with `chosen` and `rejected`) made without exclusion: the report then says
        how many pairs each source supplied to it.
    rank: of the structure the sources share. At most (n - 2) // 2 where half of the prompts have scores of n sources or
        fewer: with fewer beside it a structure fits whatever it is given. Default the largest up to 3.
    threshold: of z. least_prompts: with fewer scored prompts a source is ranked, never flagged.
    most_prompts: a random sample of so many is audited. resamples, confidence: of the bootstrap. seed: of both.

    Outlying is not guilty: a source of its own kind is outlying too. Raises ValueError where the structure cannot be
    told from chance: fewer than three sources per prompt, exchangeable sources, one source (NothingToClean of
    fastpref.preference_matrix), or fewer audited sources than the rank needs; for wrong shapes and values too.
    Warns (UserWarning) where there are fewer than `least_prompts` prompts.
    """
    from fastpref import preference_matrix

    pools, codes = _with_sources(scores, sources, offsets, valid, probability)
    count = _num_sources(codes, names)
    supply = (None, None) if selection is None else supplied(codes, selection, offsets=pools.offsets, num_sources=count)
    rows, repeated = _with_two_sources(pools, codes, count)
    if len(rows) > most_prompts:
        rows = np.random.default_rng(seed).choice(rows, most_prompts, replace=False)
    audited = np.isin(per_prompt(pools.offsets), rows)
    matrix = _pivot(pools._replace(values=np.where(audited, pools.values, np.nan)), codes, count).matrix
    rank = _rank(matrix, rank)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "scores has .* prompts", RuntimeWarning)  # said below
        found = preference_matrix.audit_sources(
            matrix, rank, threshold=threshold, resamples=resamples, confidence=confidence, seed=seed
        )
    if len(rows) < least_prompts:
        text = f"sources were scored on {len(rows)} prompts: they are ranked, none is flagged; score {least_prompts}"
        warnings.warn(DataWarning("few-prompts-to-audit", text), stacklevel=2)
    prompts = found.observed.numpy()
    return SourceReport(
        unexplained=found.outlyingness.numpy(),
        low=found.low.numpy(),
        high=found.high.numpy(),
        z=found.z.numpy(),
        order=found.order.numpy(),
        flagged=found.flagged.numpy() & (prompts >= least_prompts),
        reference=found.reference.numpy(),
        prompts=prompts,
        rank=found.rank,
        audited_prompts=len(rows),
        repeated=repeated,
        as_chosen=supply[0],
        as_rejected=supply[1],
        names=None if names is None else list(names),
    )


class Exclusion(NamedTuple):
    """What `select_pairs` takes."""

    valid: np.ndarray  # bool like sources, False: the response leaves the pool and its moments
    choosable: np.ndarray  # bool like sources, False: it is never chosen


def exclude(sources, flagged, mode="both") -> Exclusion:
    """Takes the responses of flagged sources out of the pools.

    sources: integer codes, -1 for unknown, of any shape.
    flagged: [S] bool, by code.
    mode: "both": they are neither chosen nor rejected, and not in the moments. "chosen": they are only never chosen.
        "none": all stay.

    Raises ValueError or TypeError for other modes, codes and masks.
    """
    if mode not in EXCLUSION_MODES:
        raise ValueError(f"mode must be one of {EXCLUSION_MODES}, got {mode!r}")
    sources = as_sources(sources, np.shape(sources))
    flagged = np.asarray(flagged)
    if flagged.dtype != bool or flagged.ndim != 1:
        raise ValueError(f"flagged must be bool with shape [sources], got {flagged.dtype} {list(flagged.shape)}")
    if sources.size and sources.max() >= len(flagged):
        raise ValueError(f"sources must be below {len(flagged)}, the length of flagged, got {sources.max()}")
    trusted = ~np.append(flagged, False)[sources]  # -1 reads the last: unknown sources stay
    everything = np.ones(sources.shape, bool)
    return Exclusion(trusted if mode == "both" else everything, everything if mode == "none" else trusted)


def supplied(sources, selection, *, offsets=None, num_sources=None) -> tuple[np.ndarray, np.ndarray]:
    """How many pairs each source supplied: as the chosen and as the rejected response, int64 [S] each.

    sources: integer codes, [prompts, n] or [responses] with offsets; unknown ones (-1) are not counted.
    selection: has `chosen` and `rejected`, columns within the pool, [prompts] or [prompts, k], -1 for none.
    """
    sources = as_sources(sources, np.shape(sources))
    offsets = as_pools("sources", sources, offsets=offsets).offsets
    sources = sources.reshape(-1)
    count = _num_sources(sources, None) if num_sources is None else num_sources
    prompts = len(offsets) - 1
    totals = []
    for name in ("chosen", "rejected"):
        column = np.asarray(getattr(selection, name))
        if column.ndim not in (1, 2) or len(column) != prompts:
            raise ValueError(
                f"selection.{name} must have shape [{prompts}] or [{prompts}, k], got {list(column.shape)}"
            )
        column = column.reshape(prompts, -1)
        if (column >= np.diff(offsets)[:, None]).any():
            raise ValueError(f"selection.{name} must be columns of its pools, got {column.max()}")
        code = sources[(offsets[:-1, None] + column)[column >= 0]]
        totals.append(np.bincount(code[code >= 0], minlength=count))
    return totals[0], totals[1]


@dataclass(frozen=True)
class CleanedScores:
    scores: np.ndarray  # float64 like the input, after the action; NaN: no score, or masked
    flagged: np.ndarray  # bool, wrong scores
    chosen_changed: int  # prompts whose best response is another one now
    prompts: int  # with a score
    scale: float  # of the noise, in units of the score (probabilities: logits)
    rank: int
    converged: bool

    @property
    def share(self) -> float:
        """Share of the prompts whose best response is another one now; NaN of none."""
        return self.chosen_changed / self.prompts if self.prompts else float("nan")


def denoise_scores(
    scores, sources, *, offsets=None, valid=None, probability=False, action="mask", rank=None, threshold=5.0
) -> CleanedScores:
    """Finds single wrong scores by robust PCA of the [prompts, sources] matrix minus its columns' offsets.

    scores, offsets, valid: ragged pools. sources: integer codes like scores; responses of unknown source (-1) are left
        as they are. A source has one score under a prompt: collapse copies, or give its samples codes of their own.
    probability: scores are probabilities, cleaned and returned as logits.
    action: "mask": wrong scores become NaN. "replace": they become the fit's. "low_rank": all scores do, which loses
        what the structure does not explain and with it the best response of most prompts (it warns).
    rank: of the structure, at most (n - 2) // 2 where half of the prompts have scores of n sources or fewer; default
        the largest up to 3.
    threshold: in scales of the noise.

    A source that is wrong throughout is structure here: audit first. Raises ValueError (of nothing to clean:
    NothingToClean of fastpref.preference_matrix) for sources=None, since columns that are no fixed identities have
    nothing in common, for exchangeable sources, one source, and fewer than three sources per prompt; for wrong shapes
    and values too.
    """
    from fastpref import preference_matrix

    if sources is None:
        raise preference_matrix.NothingToClean(
            "scores has no sources: samples of one policy are exchangeable, so that no column tells what a score "
            "should be; give sources, or the scores of several judges to consensus"
        )
    pools, codes = _with_sources(scores, sources, offsets, valid, probability)
    table = _pivot(pools, codes, _num_sources(codes, None))
    if table.repeated:
        raise ValueError(
            f"sources must occur once under a prompt, got {table.repeated} scores more: collapse copies (hygiene), or "
            "give the samples of one source codes of their own"
        )
    rank = _rank(table.matrix, rank)
    found = preference_matrix.denoise_scores(table.matrix, rank=rank, action=action, threshold=threshold)
    wrong = np.zeros(table.matrix.shape, bool)
    wrong[tuple(found.corrupted.numpy().T)] = True
    flagged = np.zeros(len(pools.values), bool)
    flagged[table.responses] = wrong[table.row, table.source]
    after = pools.values.copy()
    after[table.responses] = found.scores.numpy()[table.row, table.source]
    prompt = per_prompt(pools.offsets)
    prompts = len(np.unique(prompt[~np.isnan(pools.values)]))
    changed = _best_changed(pools.values, after, prompt)
    if action == "low_rank":
        masked = _best_changed(pools.values, np.where(flagged, np.nan, pools.values), prompt)
        _warn_low_rank(changed, masked, prompts)
    shape = np.shape(scores)
    return CleanedScores(
        after.reshape(shape), flagged.reshape(shape), changed, prompts, found.scale, rank, found.converged
    )


@dataclass(frozen=True)
class CleanedJudges:
    """Corrupted pairs are [K], i < j, the least believed first."""

    probabilities: np.ndarray | None  # [..., N, N] after the action; None: of score columns
    scores: np.ndarray  # float64 [..., N], or [responses]: by which to rank; NaN: an item that was never compared
    indices: np.ndarray  # int64 [K, d]: matrix or prompt, i, j
    observed: np.ndarray  # float64 [K], share of the votes for i
    fitted: np.ndarray  # float64 [K], as the other pairs have it
    residual: np.ndarray  # float64 [K], in scales of the noise
    chosen_changed: int  # matrices whose best item by `scores` is not the one with the most votes
    prompts: int
    cleaned: np.ndarray  # bool [...], False: nothing to clean there, returned as it was
    converged: np.ndarray  # bool [...]

    @property
    def share(self) -> float:
        """Share of the matrices whose best item changed; NaN of none."""
        return self.chosen_changed / self.prompts if self.prompts else float("nan")


def denoise_judges(
    preferences, *, action="mask", method="auto", rank=2, link="logit", threshold=5.0, clamp=None
) -> CleanedJudges:
    """Finds the wrong pairs of judges' preference matrices; `fastpref.preference_matrix.denoise` on arrays.

    preferences: [..., N, N] of P(i preferred to j), P[i, j] + P[j, i] = 1, NaN on both sides: not compared.
    action: "mask", "replace" (wrong pairs only), or "low_rank" (all pairs; warns).
    method, rank, link, threshold, clamp: as there. "rpca" and "curatron" (and "auto" with a rank above 2) are refused
        for 10 items or fewer, where they leave half of the error or more: take method="bradley_terry", which
        recovers one score per item from 5 items on.

    Raises ValueError: NothingToClean of fastpref.preference_matrix where no matrix has anything to clean, such as one
    made from a single score column; and for wrong shapes and values.
    """
    from fastpref import preference_matrix

    given = np.asarray(preferences)
    generic = method in ("rpca", "curatron") or (method == "auto" and rank != 2)
    if generic and given.ndim >= 2 and given.shape[-1] <= FEW_ITEMS:
        raise ValueError(
            f"method must be 'bradley_terry' (rank 2) for {given.shape[-1]} items: up to {FEW_ITEMS} robust PCA leaves "
            f"half of the error or more, got method={method!r} with rank={rank}"
        )
    options = {"method": method, "rank": rank, "link": link, "threshold": threshold, "clamp": clamp}
    found = preference_matrix.denoise(given, action=action, **options)
    result = _judged(found, found.probabilities.numpy(), given, found.scores.numpy())
    if action == "low_rank":
        _warn_low_rank(result.chosen_changed, None, result.prompts)
    return result


@dataclass(frozen=True)
class Consensus:
    scores: np.ndarray  # float64 [responses], mean of the judges' scores that were kept, in their spreads; NaN: none
    judges: np.ndarray  # float64 [responses, J] as given, the flagged ones NaN
    flagged: np.ndarray  # bool [responses, J]
    centre: np.ndarray  # float64 [J], median of the judge's scores
    spread: np.ndarray  # float64 [J], mean distance from it
    noise: np.ndarray  # float64 [J], scale of the judge's distance from the others' median, in spreads
    undecided: int  # responses on which half of the judges or more would be flagged: none is
    chosen_changed: int  # prompts whose best response is another one than by the mean of all scores
    prompts: int  # with a score

    @property
    def share(self) -> float:
        """Share of the prompts whose best response is another one; NaN of none."""
        return self.chosen_changed / self.prompts if self.prompts else float("nan")


def consensus(scores, *, offsets, valid=None, threshold=5.0) -> Consensus:
    """One score per response from the scores of three judges or more; single wrong ones are masked.

    Each judge's scores are measured from their median in units of their mean distance from it. A score is wrong when it
    is more than `threshold` noise scales of its judge (the upper quartile of |distance| over 1.15) from the median of
    the judges for that response, by more than one level where it gives ratings, and most of its judges are not.

    scores: [responses, J] on linear scales (logits of probabilities), which may differ; NaN where a judge gave none.
    offsets: [prompts + 1]. valid: [responses] bool, False leaves a response out (NaN).

    Raises ValueError for fewer than three judges whose scores vary, wrong shapes and values.
    """
    scores, offsets = _judge_columns(scores, offsets, valid)
    if not threshold > 0:
        raise ValueError(f"threshold must be positive, got {threshold!r}")
    seen = ~np.isnan(scores)
    count = np.maximum(seen.sum(0), 1)
    centre = _quantile(scores, 0.5, 0)
    spread = np.where(seen, np.abs(scores - centre), 0).sum(0) / count
    varied = spread > 0
    if varied.sum() < 3:
        raise ValueError(
            f"scores must have three columns of judges that vary, got {varied.sum()} of {len(spread)}: when two "
            "differ, nothing says which of them is wrong"
        )
    standard = (scores - centre) / np.where(varied, spread, np.nan)
    distance = np.abs(standard - _quantile(standard, 0.5, 1)[:, None])
    noise = _quantile(distance, 0.75, 0) / UPPER_QUARTILE
    steps = [np.diff(np.unique(column[~np.isnan(column)])) for column in standard.T]
    step = np.array([np.median(column) if len(column) else np.nan for column in steps])
    flagged = distance > np.maximum(threshold * noise, 1.5 * step)
    outvoted = 2 * flagged.sum(1) < seen.sum(1)
    undecided = int((flagged.any(1) & ~outvoted).sum())
    flagged &= outvoted[:, None]
    kept = np.where(flagged, np.nan, standard)
    prompt = per_prompt(offsets)
    before, after = _mean(standard), _mean(kept)
    return Consensus(
        after,
        np.where(flagged, np.nan, scores),
        flagged,
        centre,
        spread,
        noise,
        undecided,
        _best_changed(before, after, prompt),
        len(np.unique(prompt[~np.isnan(before)])),
    )


def vote_consensus(scores, *, offsets, valid=None, temperature=None, threshold=5.0) -> CleanedJudges:
    """One score per response from the pairs of each prompt on which the judges vote, whatever their scales.

    A robust Bradley-Terry fit of the votes gives the scores, which are logits and compare within a prompt only. Votes
    do not know by how much, least where all judges agree that one response is the best, whose lead is then that of the
    fit's ridge: where the scales can be compared, `consensus` picks the best response more often.

    scores: [responses, J], NaN where a judge gave none; offsets: [prompts + 1]. valid: [responses] bool, False leaves a
        response out (NaN).
    temperature: None: one vote for the higher score; otherwise sigmoid((s_i - s_j) / temperature) of one.
    threshold: of corrupted pairs, in noise scales; with few judges no pair is that far off.

    Raises ValueError: NothingToClean of fastpref.preference_matrix for one score column, and for judges that agree no
    more than chance; and for wrong shapes and values. Memory grows with prompts * (largest pool) * J.
    """
    from fastpref import preference_matrix

    scores, offsets = _judge_columns(scores, offsets, valid)
    prompt = per_prompt(offsets)
    place = np.arange(len(scores)) - offsets[prompt]
    padded = np.full((len(offsets) - 1, int(np.diff(offsets).max(initial=0)), scores.shape[1]), np.nan)
    padded[prompt, place] = scores
    votes = preference_matrix.from_scores(padded, temperature=temperature)
    with warnings.catch_warnings():  # few judges are often of one mind; then the order alone is theirs, as said above
        warnings.filterwarnings("ignore", ".* ridge of ", RuntimeWarning)
        found = preference_matrix.denoise(votes, method="bradley_terry", threshold=threshold)
    fitted = found.scores.numpy()
    return replace(_judged(found, None, votes.dense().numpy(), fitted), scores=fitted[prompt, place])


def _judge_columns(scores, offsets, valid) -> tuple[np.ndarray, np.ndarray]:
    """[responses, J] float64 with NaN for what is no score; and the offsets."""
    scores = np.asarray(scores)
    if scores.ndim != 2:
        raise ValueError(f"scores must have shape [responses, judges], got {list(scores.shape)}")
    pools = [as_pools("scores", column, valid, offsets) for column in scores.T]
    if not pools:
        raise ValueError("scores must have a column per judge, got none")
    return np.stack([pool.values for pool in pools], 1), pools[0].offsets


def _quantile(values, level, axis) -> np.ndarray:
    """NaN where there is nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN|Mean of empty slice", RuntimeWarning)
        return np.nanquantile(values, level, axis)


def _mean(values) -> np.ndarray:
    """Over the last axis; NaN where there is nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        return np.nanmean(values, -1)


def _judged(found, probabilities, given, after) -> CleanedJudges:
    """given: [..., N, N] of P, whose best item has the largest mean."""
    items = given.shape[-1]
    before = _mean(np.where(np.eye(items, dtype=bool), np.nan, given))
    prompt = np.repeat(np.arange(before.size // max(items, 1)), items)
    seen = ~np.isnan(before.reshape(-1))
    return CleanedJudges(
        probabilities,
        after,
        found.corrupted.indices.numpy(),
        found.corrupted.observed.numpy(),
        found.corrupted.fitted.numpy(),
        found.corrupted.residual.numpy(),
        _best_changed(before.reshape(-1), after.reshape(-1), prompt),
        len(np.unique(prompt[seen])),
        found.info.reason.numpy() == 0,
        found.info.converged.numpy(),
    )


def _warn_low_rank(changed, masked, prompts) -> None:
    beside = "" if masked is None else f" ({masked} if only wrong scores were masked)"
    text = (
        f"action='low_rank' changes the best response of {changed} of {prompts} prompts{beside}: the best of the fit "
        "is seldom the best response, and sources that game the judge gain by it; take action='mask'"
    )
    warnings.warn(DataWarning("low-rank-scores", text), stacklevel=3)


def _with_sources(scores, sources, offsets, valid, probability):
    """The pools, as logits if they are probabilities, and flat source codes."""
    pools = as_pools("scores", scores, valid, offsets)
    codes = as_sources(sources, np.shape(scores)).reshape(-1)
    return (pools._replace(values=to_logit(pools.values)) if probability else pools), codes


def _num_sources(codes, names) -> int:
    count = int(codes.max(initial=-1)) + 1
    if names is None:
        return count
    if len(names) < count:
        raise ValueError(f"names must have an entry per source, {count}, got {len(names)}")
    return len(names)


class _Table(NamedTuple):
    matrix: np.ndarray  # [rows, sources] float64, NaN: missing; rows are prompts with a score
    responses: np.ndarray  # [k] index of every usable response
    row: np.ndarray  # [k] its place in the matrix
    source: np.ndarray  # [k]
    repeated: int  # responses beyond the first of a source under a prompt


def _with_two_sources(pools, codes, count) -> tuple[np.ndarray, int]:
    """The prompts with scores of two sources or more, ascending; the scores beyond the first of a source under one."""
    usable = ~np.isnan(pools.values) & (codes >= 0)
    cells = np.unique(per_prompt(pools.offsets)[usable] * count + codes[usable])
    return np.flatnonzero(np.bincount(cells // max(count, 1)) > 1), int(usable.sum()) - len(cells)


def _pivot(pools, codes, count) -> _Table:
    responses = np.flatnonzero(~np.isnan(pools.values) & (codes >= 0))
    prompt, source, values = per_prompt(pools.offsets)[responses], codes[responses], pools.values[responses]
    scored = np.bincount(prompt, minlength=len(pools.offsets) - 1) > 0
    rows = int(scored.sum())
    if rows * count > MOST_CELLS:
        raise ValueError(
            f"sources must be codes from 0 without large gaps: {rows} prompts and codes up to {count - 1} make a "
            f"matrix of {rows * count} numbers, more than {MOST_CELLS}"
        )
    row = (np.cumsum(scored) - 1)[prompt]
    cell = row * count + source
    matrix = np.full(rows * count, np.nan)
    repeated = len(cell) - np.count_nonzero(np.bincount(cell, minlength=rows * count))
    if repeated:
        by = np.lexsort((values, cell))  # added in the order of the values, whatever order they came in
        cell, begins, sizes = np.unique(cell[by], return_index=True, return_counts=True)
        values = np.add.reduceat(values[by], begins) / sizes
    matrix[cell] = values
    return _Table(matrix.reshape(rows, count), responses, row, source, repeated)


def _rank(matrix, rank) -> int:
    """The rank of the structure that so many sources per prompt can tell: by default 3, or as much as they allow."""
    import torch

    from fastpref.preference_matrix._refusals import NothingToClean, constant_columns

    varied = ~constant_columns(torch.as_tensor(matrix)).numpy()
    sources = (~np.isnan(matrix[:, varied])).sum(1)
    typical = int(np.median(sources[sources > 0])) if (sources > 0).any() else 0
    most = min(max((typical - 2) // 2, 1), len(matrix) - 2)
    if typical < LEAST_SOURCES:
        raise NothingToClean(
            f"scores must have {LEAST_SOURCES} sources that vary under a typical prompt, got {typical}: when two "
            "differ, nothing says which of them is wrong"
        )
    if most < 1:
        raise ValueError(f"scores must have 3 prompts with sources, got {len(matrix)}")
    if rank is not None and rank > most:
        raise ValueError(
            f"rank must be at most {most} for {len(matrix)} prompts of typically {typical} scored sources, got {rank}"
        )
    return min(3, most) if rank is None else rank


def _best_changed(before, after, prompt) -> int:
    """Prompts none of whose best responses is among the best ones after; flat [responses], NaN: no score."""
    prompts = int(prompt.max(initial=-1)) + 1

    def best(values):
        values = np.where(np.isnan(values), -np.inf, values)
        top = np.full(prompts, -np.inf)
        np.maximum.at(top, prompt, values)
        return (values == top[prompt]) & (values > -np.inf)

    had = best(before)
    stays = np.zeros(prompts, bool)
    stays[prompt[had & best(after)]] = True
    return len(np.unique(prompt[had])) - int(stays.sum())
