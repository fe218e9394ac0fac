"""Preference matrices: built from comparisons or scores, cleaned of corrupted pairs, ordered; and audits of sources.

P[i, j] is the probability that i is preferred to j, P[i, j] + P[j, i] = 1. Through a link psi it becomes a
skew-symmetric matrix M = psi(P), psi the logit (Bradley-Terry), the probit (Thurstone) or the identity minus 1/2, which
is w_i - w_j where one score explains all preferences, and of low rank where a few dimensions do. Corrupted pairs are
few and arbitrary. Comparisons are kept as a list of pairs, some 3 N per prompt of N items; a dense matrix is the
special case. CURATRON: Nguyen, Naresh, Tulabandhula, arXiv 2403.02745; Rajkumar and Agarwal, COLT 2016.
"""

import warnings
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import _checks
from fastpref._lowrank.bradley_terry import Edges, bradley_terry, pair_terms
from fastpref._lowrank.curatron import ncrpca, optspace
from fastpref._lowrank.noise import EXACT, MAD
from fastpref._lowrank.rpca import rpca
from fastpref.preference_matrix._comparisons import (
    CHANCE,
    CHUNK,
    VISIBLE,
    Preferences,
    as_column,
    as_indices,
)
from fastpref.preference_matrix._sources import (
    ACTIONS,
    NothingToClean,
)

LINKS = ("logit", "probit", "identity")
METHODS = ("auto", "rpca", "bradley_terry", "curatron")
RANKINGS = ("row_mean", "copeland")
REASONS = (
    "cleaned",
    "no cycle of comparisons, or none at all: every one of them is fitted exactly, so that none contradicts another",
    "one score column explains every comparison exactly (the matrix is w_i - w_j under the link, exactly of rank 2)",
    "every pair is unanimous and no comparison contradicts another: an order, with nothing against it",
)
CLAMP = 1e-6  # of probabilities whose number of votes is not known
SMALL_ITEMS = 128  # of prompts solved as a batch of dense matrices; larger ones as edges, prompt by prompt
FEW_ITEMS = 20  # below, a low-rank fit hardly denoises
PAIRS_PER_RANK = 4  # and item, below which a low-rank fit does not recover
USUAL_SPREAD = 0.5  # standard deviation of scores, in logits
INTRANSITIVE = 0.3  # share of corrupted pairs from which one score may not be the structure


class CorruptedPairs(NamedTuple):
    """Pairs i < j that the fit does not believe, the least believed first."""

    indices: Tensor  # [K, d] int64: prompt (or the batch indices of a matrix), i, j
    observed: Tensor  # [K] float64, P(i beats j) as it was
    fitted: Tensor  # [K] float64, as the other pairs have it
    residual: Tensor  # [K] float64, in noise scales; without noise, in 1e-4 of the mean |psi(P)| over the threshold


class DenoiseInfo(NamedTuple):
    """Per matrix, [...] of the batch or [num_prompts]."""

    method: str
    converged: Tensor  # bool
    scale: Tensor  # float64 of the noise, under the link (votes: in binomial standard deviations)
    outlier_rate: Tensor  # float64, share of the compared pairs that are corrupted
    reason: Tensor  # int64, index into REASONS; 0: cleaned. Others are returned as they were
    components: Tensor  # [..., N] int64: scores of items in different components cannot be compared


class Denoised(NamedTuple):
    """What `denoise` returns."""

    probabilities: Tensor  # [..., N, N], or [E] for Preferences: after the action; NaN: missing or masked
    scores: Tensor  # [..., N] float64, by which items are ranked; NaN: an item without comparisons
    corrupted: CorruptedPairs
    info: DenoiseInfo


class Ordering(NamedTuple):
    """What `order` returns."""

    indices: Tensor  # [..., N] int64, best first; tied items by index, items without a score last
    ranks: Tensor  # [..., N] int64 of each item, 1 the best; tied items share the smallest; -1: no score
    tied: Tensor  # [..., N] bool, the item shares its rank


# ---- links ----


def apply_link(probability: Tensor, link: str) -> Tensor:
    """psi(P): logit, probit, or P - 1/2."""
    if link == "logit":
        return probability.logit()
    return torch.special.ndtri(probability) if link == "probit" else probability - 0.5


def invert_link(value: Tensor, link: str) -> Tensor:
    """P, between 0 and 1; the inverse of apply_link."""
    if link == "logit":
        return value.sigmoid()
    return torch.special.ndtr(value) if link == "probit" else (value + 0.5).clamp(0, 1)


# ---- cleaning ----


class _Fit(NamedTuple):
    """What the solver has for P prompts of N items, and at the pairs [E]."""

    values: Tensor  # [E] psi of the fitted P(i beats j)
    scores: Tensor  # [P, N] row means of the fitted matrix within the item's component
    converged: Tensor  # [P]
    components: Tensor  # [P, N]
    low_rank: Tensor | None  # [P, N, N]; None: scores[i] - scores[j]


def denoise(
    preferences,
    *,
    link: str = "logit",
    method: str = "auto",
    action: str = "mask",
    rank: int = 2,
    ranking: str = "row_mean",
    threshold: float = 5.0,
    smoothing: float = 0.5,
    clamp: float | None = None,
    backend: str | None = None,
) -> Denoised:
    """Finds the corrupted pairs of preference matrices, and scores their items without them.

    Args:
        preferences: Preferences (votes), or [..., N, N] of P(i preferred to j) with P[i, j] + P[j, i] = 1; NaN on both
            sides: missing; the diagonal is 1/2 or NaN. Every prompt (matrix) is cleaned on its own. Computed in
            float64, returned in the dtype of the matrix, integers as float64.
        link: "logit", "probit" or "identity": where preferences are differences of scores.
        method: "bradley_terry": one score per item, robustly fitted, votes by their likelihood (link="logit") rather
            than through frequencies. "rpca": a skew matrix of the given rank, for intransitive preferences, fit to the
            pairs that are there. "curatron": the paper's pipeline, holes filled by OptSpace before robust PCA as
            published. "auto": bradley_terry for rank=2, else rpca.
        action: what becomes of corrupted pairs: "mask": NaN. "replace": the fit's value. "low_rank": all pairs, of a
            tensor the missing ones too, become the fit's; that loses what the structure does not explain, and with it
            more often than not the best item, which is why it is not the default.
        rank: of the matrix under the link, even; 2 is one score per item.
        ranking: `scores` are the "row_mean" of the fitted matrix (bradley_terry: the scores themselves), or "copeland":
            the number of items beaten.
        threshold: in scales of the noise, 1.4826 * median |residual|; votes: in binomial standard deviations too.
        smoothing: added to the wins of both sides of Preferences before a link (bradley_terry on votes needs none).
        clamp: P is moved into [clamp, 1 - clamp] before a link; default 1e-6, for Preferences 1 / (2 votes + 2). Not
            for the identity.
        backend: of bradley_terry and rpca.

    Returns:
        Denoised. P[i, j] + P[j, i] = 1 to rounding in all that is returned.

    Raises:
        NothingToClean (a ValueError): where no matrix has anything to clean: see REASONS; or votes that all prompts
            together do not tell from coin tosses, and are enough to. In a batch, matrices of these kinds beside others
            are returned as they were, with the reason in `info.reason`.
        TypeError, ValueError: for other types, shapes and values, and matrices that are not P[i, j] + P[j, i] = 1.

    Warns:
        RuntimeWarning: of what makes the result doubtful and what to do: too few items or pairs for a low-rank fit,
            too few votes to flag any pair or to tell them from coin tosses, comparison graphs of several components, so
            many corrupted pairs that preferences may be intransitive.
    """
    for name, value, choices in (
        ("link", link, LINKS),
        ("method", method, METHODS),
        ("action", action, ACTIONS),
        ("ranking", ranking, RANKINGS),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {value!r}")
    _checks.positive_int("rank", rank)
    if rank % 2 or (method == "bradley_terry" and rank != 2):
        raise ValueError(f"rank must be even, and 2 for method='bradley_terry', got {rank} for method={method!r}")
    _checks.positive("threshold", threshold)
    _checks.not_negative("smoothing", smoothing)
    if clamp is not None:
        _checks.between("clamp", clamp, 0, 0.5)
    has_votes = isinstance(preferences, Preferences)
    given = None if has_votes else _checks.real("preferences", preferences)
    table = _checked(preferences) if has_votes else _table("preferences", given)
    n = table.num_items
    method = method if method != "auto" else "bradley_terry" if rank == 2 else "rpca"
    if method != "bradley_terry" and not rank <= n:
        raise ValueError(f"rank must be at most the number of items, {n}, got {rank}")
    by_votes = has_votes and link == "logit" and method == "bradley_terry"
    with torch.no_grad():
        raw = table.probabilities()
        votes = table.wins_i + table.wins_j
        inner, edge = _inner(table, raw, has_votes, link, smoothing, clamp)
        values, edge = apply_link(inner, link), apply_link(1 - edge, link)
        fit = _fit(table, values, by_votes, method, rank, backend)
        if has_votes:
            _refuse_coin_tosses(table)
        eps = 1e-12 if has_votes else torch.finfo(given.dtype).eps / 2
        blur = _blur(raw, link, eps)
        consistent = fit if method == "bradley_terry" and not has_votes else None
        reason = _reasons(table, raw, values, edge, blur, fit, consistent, has_votes, link, backend)
        _refuse_all(reason)
        if by_votes:
            residual = pair_terms(raw, votes, fit.values, "counts", 1.0)[0]
            scale = MAD * _medians(residual.abs(), table)
            bound = threshold * scale.clamp(min=1)[table.prompt]
        else:
            residual = _residual(values, fit.values, edge)
            scale = MAD * _medians(residual.abs(), table)
            mean = _sums(values.abs(), table) / _sums(torch.ones_like(values), table).clamp(min=1)
            bound = torch.maximum(threshold * scale, EXACT * mean)[table.prompt] + blur
        kept = reason[table.prompt] == 0
        corrupted = (residual.abs() > bound) & kept
        _warn(table, fit, corrupted, votes, by_votes, method, threshold)

        fitted = invert_link(fit.values, link)
        listed = corrupted.nonzero().flatten()
        strength = threshold * residual[listed] / bound[listed]
        listed, strength = listed[(by := strength.abs().argsort(descending=True, stable=True))], strength[by]
        scores = _copeland(fit) if ranking == "copeland" else fit.scores
        lead = (table.num_prompts,) if has_votes else given.shape[:-2]
        where = torch.unravel_index(table.prompt[listed], lead) if len(lead) != 1 else (table.prompt[listed],)
        pairs = CorruptedPairs(
            torch.stack([*where, table.i[listed], table.j[listed]], 1), raw[listed], fitted[listed], strength
        )
        info = DenoiseInfo(
            method,
            fit.converged.view(lead),
            scale.view(lead),
            (_sums(corrupted.double(), table) / _sums(torch.ones_like(raw), table)).view(lead),
            reason.view(lead),
            fit.components.view(*lead, n),
        )
        chosen = kept if action == "low_rank" else corrupted
        cleaned = torch.where(chosen, torch.nan if action == "mask" else fitted, raw)
        if not has_votes:
            cleaned = _dense_like(given, table, cleaned, chosen, fit, reason, action, link)
    return Denoised(cleaned, scores.view(*lead, n), pairs, info)


def _checked(table: Preferences) -> Preferences:
    """Preferences may have been put together by hand."""
    prompts, n = table.num_prompts, table.num_items
    _checks.natural("preferences.num_prompts", prompts)
    _checks.natural("preferences.num_items", n)
    i = as_indices("preferences.i", table.i, None)
    prompt, j = (as_indices(f"preferences.{name}", getattr(table, name), i) for name in ("prompt", "j"))
    wins_i, wins_j = (as_column(f"preferences.{name}", getattr(table, name), i) for name in ("wins_i", "wins_j"))
    key = (prompt * n + i) * n + j
    if not ((i >= 0) & (i < j) & (j < n) & (prompt >= 0) & (prompt < prompts)).all() or not (key.diff() > 0).all():
        raise ValueError(
            "preferences must list every pair once, sorted by prompt, i and j, with i < j < num_items and prompt < "
            "num_prompts, as from_comparisons does"
        )
    if not ((wins_i >= 0) & (wins_j >= 0) & (wins_i + wins_j > 0) & (wins_i + wins_j < torch.inf)).all():
        raise ValueError("preferences must have finite wins_i and wins_j >= 0 with at least one vote in each pair")
    return Preferences(prompt, i, j, wins_i, wins_j, prompts, n)


def _table(name: str, p: Tensor) -> Preferences:
    """The pairs of [..., N, N] probabilities, as one vote each."""
    if p.dim() < 2 or p.shape[-1] != p.shape[-2]:
        raise ValueError(f"{name} must have shape [..., N, N], or be Preferences, got {list(p.shape)}")
    outside = (p < 0) | (p > 1)
    if outside.any():
        at = outside.nonzero()[0].tolist()
        raise ValueError(f"{name} must lie between 0 and 1 (NaN: missing), got {p[tuple(at)].item()} at {at}")
    off = (p.double() + p.double().mT - 1).abs()
    off = torch.where(p.isnan() != p.mT.isnan(), torch.inf, off.nan_to_num(0, posinf=torch.inf))
    if off.numel() and off.max() > max(4 * torch.finfo(p.dtype).eps, 1e-6):
        at = torch.unravel_index(off.argmax(), off.shape)
        at = [int(index) for index in at]
        if at[-2] == at[-1]:
            raise ValueError(f"{name} must have 1/2 or NaN on the diagonal, got {p[tuple(at)].item()} at {at}")
        raise ValueError(
            f"{name} must have P[i, j] + P[j, i] = 1, got {p[tuple(at)].item()} and {p.mT[tuple(at)].item()} at {at}. "
            "If the two are answers to the two presentation orders, pass both to from_comparisons, which reports the "
            "order effect before it balances them"
        )
    n = p.shape[-1]
    lead = p.shape[:-2]
    flat = p.detach().reshape(lead.numel(), n, n)
    seen = (~flat.isnan()).triu(1)
    prompt, i, j = seen.nonzero(as_tuple=True)
    upper, lower = flat[seen].double(), flat.mT[seen].double()
    wins = torch.where(lower < upper, 1 - lower, upper)  # the smaller one has more digits
    return Preferences(prompt, i, j, wins, 1 - wins, lead.numel(), n)


def _inner(table: Preferences, raw: Tensor, has_votes: bool, link: str, smoothing: float, clamp: float | None):
    """[E] probabilities that a link can take, and what they were moved to at least."""
    p = table.probabilities(smoothing) if has_votes else raw
    if link == "identity":
        edge = torch.zeros_like(p)
    elif clamp is not None:
        edge = torch.full_like(p, clamp)
    else:
        edge = 1 / (2 * (table.wins_i + table.wins_j) + 2) if has_votes else torch.full_like(p, CLAMP)
    return torch.minimum(torch.maximum(p, edge), 1 - edge), edge


def _residual(values: Tensor, fitted: Tensor, edge: Tensor) -> Tensor:
    """values - fitted; 0 where a value stands at the edge of what the link takes and the fit lies beyond."""
    at_edge = values.abs() >= edge * (1 - 1e-12)
    return torch.where(at_edge & (fitted * values.sign() > edge), 0.0, values - fitted)


def _blur(p: Tensor, link: str, eps: float) -> Tensor:
    """How far rounding of P moves its link."""
    least = 1e-12
    high, low = (p + eps).clamp(least, 1 - least), (p - eps).clamp(least, 1 - least)
    return apply_link(high, link) - apply_link(low, link)


def _sums(values: Tensor, table: Preferences) -> Tensor:
    """[E] -> [P]."""
    return values.new_zeros(table.num_prompts).index_add_(0, table.prompt, values)


def _medians(values: Tensor, table: Preferences) -> Tensor:
    """[E] -> [P], the lower one; 0 of nothing."""
    order = values.argsort(stable=True)
    order = order[table.prompt[order].argsort(stable=True)]
    count = torch.bincount(table.prompt, minlength=table.num_prompts)
    if not len(values):
        return values.new_zeros(table.num_prompts)
    middle = count.cumsum(0) - count + (count - 1).clamp(min=0) // 2
    return torch.where(count > 0, values[order[middle.clamp(max=len(values) - 1)]], 0.0)


def _chunks(table: Preferences):
    """Slices of prompts, and of their pairs, that fit a batch of dense matrices (prompt by prompt for many items)."""
    n = max(table.num_items, 1)
    step = max(1, CHUNK // n**2) if n <= SMALL_ITEMS else 1
    begins = torch.arange(0, table.num_prompts + step, step, device=table.prompt.device).clamp(max=table.num_prompts)
    places = torch.searchsorted(table.prompt, begins).tolist()
    bounds = zip(pairwise(begins.tolist()), pairwise(places), strict=True)
    return [(slice(*prompts), slice(*pairs)) for prompts, pairs in bounds if prompts[0] < prompts[1]]


def _scatter(table: Preferences, prompts: slice, pairs: slice, upper: Tensor, lower: Tensor) -> Tensor:
    """[p, N, N] with upper [e] at i, j and lower at j, i; NaN elsewhere."""
    n = table.num_items
    matrix = upper.new_full((prompts.stop - prompts.start, n, n), torch.nan)
    at = table.prompt[pairs] - prompts.start
    matrix[at, table.i[pairs], table.j[pairs]] = upper
    matrix[at, table.j[pairs], table.i[pairs]] = lower
    return matrix


def _one_score(table: Preferences, values: Tensor | None, backend: str | None) -> _Fit:
    """Robust Bradley-Terry scores of link values [E], or (None) of the votes."""
    found = []
    for prompts, pairs in _chunks(table):
        i, j = table.i[pairs], table.j[pairs]
        if table.num_items <= SMALL_ITEMS:
            if values is None:
                wins = _scatter(table, prompts, pairs, table.wins_i[pairs], table.wins_j[pairs])
                found.append(bradley_terry(wins=wins, backend=backend))
            else:
                logits = _scatter(table, prompts, pairs, values[pairs], -values[pairs])
                found.append(bradley_terry(logits, backend=backend))
        else:
            edges = Edges(i, j, table.wins_i[pairs], table.wins_j[pairs], None, table.num_items)
            if values is not None:
                edges = Edges(i, j, None, None, values[pairs], table.num_items)
            found.append(bradley_terry(edges=edges, backend=backend))
    shape = (table.num_prompts, table.num_items)
    if not found:
        empty = table.wins_i.new_zeros(shape)
        return _Fit(table.wins_i, empty, empty.new_zeros(shape[0], dtype=torch.bool), empty.long(), None)
    scores = torch.cat([part.scores.flatten() for part in found]).double().view(shape)
    converged = torch.cat([part.info.converged.flatten() for part in found])
    components = torch.cat([part.components.flatten() for part in found]).view(shape)
    difference = scores[table.prompt, table.i] - scores[table.prompt, table.j]
    return _Fit(difference, scores, converged, components, None)


def _fit(table: Preferences, values: Tensor, by_votes: bool, method: str, rank: int, backend: str | None) -> _Fit:
    simple = _one_score(table, None if by_votes else values, backend)
    if method == "bradley_terry" or not table.num_prompts:
        return simple
    if table.num_items < FEW_ITEMS:
        warnings.warn(
            f"method={method!r} hardly denoises {table.num_items} items: a low-rank fit needs {FEW_ITEMS} or more; "
            "pool items, or take method='bradley_terry' where preferences are transitive",
            RuntimeWarning,
            stacklevel=3,
        )
    n, per_prompt = table.num_items, len(table.i) / table.num_prompts
    if per_prompt < min(PAIRS_PER_RANK * rank * n, n * (n - 1) / 2):
        warnings.warn(
            f"method={method!r} of rank {rank} has {per_prompt / n:.1f} N pairs of N items, and needs some "
            f"{PAIRS_PER_RANK * rank} N to tell corrupted ones: compare more pairs, or take method='bradley_terry'",
            RuntimeWarning,
            stacklevel=3,
        )
    parts, converged = [], []
    for prompts, pairs in _chunks(table):
        matrix = _scatter(table, prompts, pairs, values[pairs], -values[pairs])
        matrix.diagonal(dim1=-2, dim2=-1).fill_(0.0)
        if method == "rpca":
            one = len(matrix) == 1 and table.num_items > SMALL_ITEMS
            found = rpca(matrix[0] if one else matrix, rank=rank, structure="skew", backend=backend)
            low_rank = found.low_rank().reshape(matrix.shape)
        else:
            found = _curatron(matrix, rank)
            low_rank = found.low_rank
        parts.append((low_rank - low_rank.mT) / 2)
        converged.append((found.info if method == "rpca" else found).converged.reshape(-1))
    low_rank = torch.cat(parts)
    components = simple.components
    same = (components.unsqueeze(-1) == components.unsqueeze(-2)) & ~simple.scores.isnan().unsqueeze(-1)
    low_rank = torch.where(same, low_rank, torch.nan)
    scores = low_rank.nansum(-1) / same.sum(-1)
    return _Fit(low_rank[table.prompt, table.i, table.j], scores, torch.cat(converged), components, low_rank)


def _curatron(matrix: Tensor, rank: int):
    """Holes by OptSpace, what was observed kept, then non-convex robust PCA."""
    missing = matrix.isnan()
    holes = missing.any((-2, -1))
    if holes.any():
        completed = optspace(matrix[holes], rank).low_rank
        matrix = matrix.clone()
        matrix[holes] = torch.where(missing[holes], (completed - completed.mT) / 2, matrix[holes])
    return ncrpca(matrix, rank, skew=True)


def _copeland(fit: _Fit) -> Tensor:
    """Items of the same component that an item beats."""
    prompts, items = fit.scores.shape
    beaten = torch.full_like(fit.scores, torch.nan)
    step = max(1, CHUNK // max(items, 1))
    for prompt in range(prompts):
        for begin in range(0, items, step):
            rows = slice(begin, begin + step)
            if fit.low_rank is not None:
                better = fit.low_rank[prompt, rows] > 0
            else:
                better = fit.scores[prompt, rows, None] > fit.scores[prompt]
                better &= fit.components[prompt, rows, None] == fit.components[prompt]
            beaten[prompt, rows] = better.sum(-1).double()
    return torch.where(fit.scores.isnan(), torch.nan, beaten)


def _dense_like(given, table, cleaned, chosen, fit, reason, action, link) -> Tensor:
    """The matrices as they were given, with the chosen pairs changed on both sides."""
    flat = given.detach().reshape(table.num_prompts, table.num_items, table.num_items)
    if action == "low_rank":
        low_rank = fit.low_rank
        if low_rank is None:
            same = fit.components.unsqueeze(-1) == fit.components.unsqueeze(-2)
            low_rank = torch.where(same, fit.scores.unsqueeze(-1) - fit.scores.unsqueeze(-2), torch.nan)
        upper = invert_link(low_rank, link).triu(1)
        whole = (upper + (1 - upper.mT).tril(-1)).to(given.dtype)
        whole.diagonal(dim1=-2, dim2=-1).copy_(flat.diagonal(dim1=-2, dim2=-1))
        return torch.where((reason == 0)[:, None, None], whole, flat).view(given.shape)
    out = flat.clone()
    at = table.prompt[chosen], table.i[chosen], table.j[chosen]
    new = cleaned[chosen].to(given.dtype)
    out[at] = new
    out[at[0], at[2], at[1]] = 1 - new
    return out.view(given.shape)


# ---- refusals and warnings ----


def _reasons(
    table, raw, values, edge, blur, fit: _Fit, consistent: _Fit | None, has_votes: bool, link: str, backend: str | None
) -> Tensor:
    """[P], index into REASONS."""
    prompts, n = table.num_prompts, table.num_items
    reason = torch.zeros(prompts, dtype=torch.int64, device=raw.device)
    pairs = torch.bincount(table.prompt, minlength=prompts)
    components = fit.components.amax(1) + 1 if n else reason

    # unanimous, and no cycle of wins
    lone = (raw > 0) & (raw < 1)
    unanimous = (_sums(lone.double(), table) == 0) & (pairs > 0)
    winner = table.prompt * n + torch.where(raw > 0.5, table.i, table.j)
    loser = table.prompt * n + torch.where(raw > 0.5, table.j, table.i)
    alive = unanimous[table.prompt]
    while alive.any():
        beaten = torch.zeros(prompts * n, dtype=torch.bool, device=raw.device)
        beaten[loser[alive]] = True
        following = alive & beaten[winner]
        if torch.equal(following, alive):
            break
        alive = following
    reason[unanimous & (_sums(alive.double(), table) == 0)] = 3

    # one score column: the raw frequencies, where the link can take them, are differences exactly
    graded = _sums((~lone).double(), table) == 0
    inside = graded if has_votes and link != "identity" else pairs > 0
    if consistent is None and inside.any():
        least = raw.new_tensor(0.0 if link == "identity" else CLAMP)
        values = apply_link(raw.clamp(least, 1 - least), link)
        edge = apply_link(1 - least, link)
        consistent = _one_score(table, values, backend)
    if consistent is not None:
        mean = _sums(values.abs(), table) / pairs.clamp(min=1)
        far = _residual(values, consistent.values, edge).abs() > 1e-6 * mean[table.prompt] + 2 * blur
        reason[inside & (_sums(far.double(), table) == 0) & (pairs > 0)] = 2
    reason[pairs <= n - components] = 1
    return reason


def _refuse_all(reason: Tensor) -> None:
    if len(reason) and (reason > 0).all():
        counts = torch.bincount(reason, minlength=len(REASONS))
        worst = int(counts.argmax())
        raise NothingToClean(
            f"preferences has nothing to clean in any of its {len(reason)} matrices; {int(counts[worst])} of them: "
            f"{REASONS[worst]}"
        )


def _refuse_coin_tosses(table: Preferences) -> None:
    """Whole votes of all prompts against coin tosses: the balances of the items, and of pairs with several votes."""
    votes = table.wins_i + table.wins_j
    if not ((2 * table.wins_i) % 1 == 0).all() or not (votes % 1 == 0).all():
        return  # graded votes vary less than coins
    nodes = table.num_prompts * table.num_items
    balance, cast = votes.new_zeros(nodes), votes.new_zeros(nodes)
    for item, sign in ((table.i, 1), (table.j, -1)):
        node = table.prompt * table.num_items + item
        balance.index_add_(0, node, sign * (table.wins_i - table.wins_j))
        cast.index_add_(0, node, votes)
    compared = cast > 0
    items = int(compared.sum())
    if not items:
        return
    by_items = float(((balance.square() / cast)[compared].sum() - items) / (2 * items) ** 0.5)
    spare = float((2 * (1 - 1 / votes)).sum())
    by_pairs = float(((table.wins_i - table.wins_j).square() / votes).sum() - len(votes)) / max(spare, 1e-300) ** 0.5
    if by_items >= CHANCE or (spare and by_pairs >= CHANCE):
        return
    found = f"its votes do not differ from coin tosses (z = {by_items:.1f} over the items"
    found += f", {by_pairs:.1f} over the pairs" * (spare > 0) + f"; {CHANCE:g} needed)"
    # a balance of c votes varies by c + c^2 w^2 / 4, w the logits between an item and those it meets
    usual = USUAL_SPREAD**2 / 4 * float(cast.sum()) / (2 * items) ** 0.5
    if usual >= VISIBLE:
        raise NothingToClean(
            f"preferences has nothing to clean: {found}. The items are exchangeable, or the judges guess"
        )
    warnings.warn(
        f"preferences may have nothing to clean: {found}, but are too few to tell: scores with a standard deviation of "
        f"{USUAL_SPREAD:g} would give z = {usual:.1f}. Collect more votes",
        RuntimeWarning,
        stacklevel=3,
    )


def _warn(table, fit: _Fit, corrupted, votes, by_votes: bool, method: str, threshold: float) -> None:
    if several := _in_several_components(fit.scores, fit.components):
        warnings.warn(
            f"{several} of {table.num_prompts} comparison graphs fall into several components (info.components), "
            "between which scores mean nothing: compare items across them",
            RuntimeWarning,
            stacklevel=3,
        )
    few = float((2 * votes <= threshold).double().mean()) if by_votes and len(votes) else 0.0
    if few > 0.5:
        warnings.warn(
            f"{100 * few:.0f} % of the pairs have so few votes that no outcome of theirs is {threshold:g} standard "
            "deviations off: they are weighed down where they contradict the rest, but not listed; collect more votes "
            "per pair, or lower threshold",
            RuntimeWarning,
            stacklevel=3,
        )
    rate = float(corrupted.double().mean()) if len(corrupted) else 0.0
    if method == "bradley_terry" and rate > INTRANSITIVE:
        warnings.warn(
            f"{100 * rate:.0f} % of the pairs contradict the scores: preferences may be intransitive; try rank=4",
            RuntimeWarning,
            stacklevel=3,
        )


def _in_several_components(scores: Tensor, components: Tensor) -> int:
    """How many rows of [..., N]; items without comparisons, which have no score, do not count."""
    if not scores.shape[-1]:
        return 0
    return int((components.amax(-1) + 1 - scores.isnan().sum(-1) > 1).sum())


# ---- ordering ----


def order(scores, *, tolerance: float | None = None) -> Ordering:
    """Orders items by their scores, and says which are tied.

    Args:
        scores: [..., N], or a Denoised; NaN: no score.
        tolerance: items whose scores differ by no more are tied, and so are chains of them; default 1e-6 of the spread
            of a row's scores.

    Scores of items in different components of the comparison graph cannot be compared (DenoiseInfo.components): of a
    Denoised with such scores it warns (RuntimeWarning).
    """
    if isinstance(scores, Denoised) and (several := _in_several_components(scores.scores, scores.info.components)):
        warnings.warn(
            f"scores of {several} comparison graph(s) fall into several components (info.components), between which "
            "ranks mean nothing: order each component by itself",
            RuntimeWarning,
            stacklevel=2,
        )
    scores = _checks.real("scores", scores.scores if isinstance(scores, Denoised) else scores)
    if scores.dim() < 1:
        raise ValueError(f"scores must have shape [..., N], got {list(scores.shape)}")
    _checks.finite_or_nan("scores", scores)
    if tolerance is not None:
        _checks.not_negative("tolerance", tolerance)
    x = scores.detach().double()
    if not x.shape[-1]:
        empty = torch.zeros(x.shape, dtype=torch.int64, device=x.device)
        return Ordering(empty, empty.clone(), empty.bool())
    there = ~x.isnan()
    descending, indices = torch.where(there, x, -torch.inf).sort(dim=-1, descending=True, stable=True)
    gaps = -descending.diff(dim=-1)  # inf before the items without a score, NaN between them
    if tolerance is None:
        spread = x.nan_to_num(nan=-torch.inf).amax(-1) - x.nan_to_num(nan=torch.inf).amin(-1)
        limit = (1e-6 * spread.clamp(min=0)).nan_to_num(posinf=0.0).unsqueeze(-1)
    else:
        limit = torch.full_like(x[..., :1], tolerance)
    fresh = torch.cat([torch.ones_like(there[..., :1]), ~(gaps <= limit)], -1)  # opens a group of ties
    place = torch.arange(x.shape[-1], device=x.device).expand(x.shape)
    first = torch.where(fresh, place, 0).cummax(-1).values
    alone = fresh & torch.cat([fresh[..., 1:], torch.ones_like(fresh[..., :1])], -1)
    sorted_there = there.gather(-1, indices)
    ranks = torch.zeros_like(indices).scatter(-1, indices, torch.where(sorted_there, first + 1, -1))
    tied = torch.zeros_like(there).scatter(-1, indices, ~alone & sorted_there)
    # tied items by index: a stable sort by rank alone
    by_rank = torch.where(there, ranks, x.shape[-1] + 1).sort(dim=-1, stable=True).indices
    return Ordering(by_rank, ranks, tied)
