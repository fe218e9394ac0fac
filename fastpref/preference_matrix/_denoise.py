"""Preference matrices cleaned of corrupted pairs.

Under its link a preference matrix is w_i - w_j where one score explains all preferences, and of low rank where a few
dimensions do. Corrupted pairs are few and arbitrary: they are what a robust fit (`_fits`) leaves. CURATRON: Nguyen,
Naresh, Tulabandhula, arXiv 2403.02745; Rajkumar and Agarwal, COLT 2016.
"""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import _checks
from fastpref._lowrank.bradley_terry import pair_terms
from fastpref._lowrank.noise import EXACT, MAD
from fastpref.preference_matrix._fits import TableFit, copeland_scores, fit_scores, fit_table
from fastpref.preference_matrix._refusals import NothingToClean, refuse_coin_tosses
from fastpref.preference_matrix._table import (
    ACTIONS,
    LINKS,
    Preferences,
    apply_link,
    checked_table,
    invert_link,
    medians_of,
    sums_of,
    table_of,
)

METHODS = ("auto", "rpca", "bradley_terry", "curatron")
RANKINGS = ("row_mean", "copeland")
REASONS = (
    "cleaned",
    "no cycle of comparisons, or none at all: every one of them is fitted exactly, so that none contradicts another",
    "one score column explains every comparison exactly (the matrix is w_i - w_j under the link, exactly of rank 2)",
    "every pair is unanimous and no comparison contradicts another: an order, with nothing against it",
)
CLAMP = 1e-6  # of probabilities whose number of votes is not known
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


class _Linked(NamedTuple):
    """The probabilities of a table, [E], and what the link makes of them."""

    raw: Tensor  # as they are
    values: Tensor  # under the link, moved away from where it is infinite
    edge: Tensor  # to these values at most
    blur: Tensor  # how far rounding of raw moves the link


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
            too few votes to flag any pair, to tell them from coin tosses or to give scores that are finite without a
            ridge, comparison graphs of several components, so many corrupted pairs that preferences may be
            intransitive.
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
    table = checked_table(preferences) if has_votes else table_of("preferences", given)
    n = table.num_items
    method = method if method != "auto" else "bradley_terry" if rank == 2 else "rpca"
    if method != "bradley_terry" and not rank <= n:
        raise ValueError(f"rank must be at most the number of items, {n}, got {rank}")
    by_votes = has_votes and link == "logit" and method == "bradley_terry"
    with torch.no_grad():
        raw = table.probabilities()
        votes = table.wins_i + table.wins_j
        inner, edge = _linkable(table, raw, has_votes, link, smoothing, clamp)
        values, edge = apply_link(inner, link), apply_link(1 - edge, link)
        fit = fit_table(table, values, by_votes, method, rank, backend)
        if has_votes:
            refuse_coin_tosses(table)
        eps = 1e-12 if has_votes else torch.finfo(given.dtype).eps / 2
        blur = _blur(raw, link, eps)
        consistent = fit if method == "bradley_terry" and not has_votes else None
        linked = _Linked(raw, values, edge, blur)
        reason = _reasons(table, linked, fit, consistent, has_votes, link, backend)
        _refuse_all(reason)
        if by_votes:
            residual = pair_terms(raw, votes, fit.values, "counts", 1.0)[0]
            sigma = MAD * medians_of(residual.abs(), table)
            bound = threshold * sigma.clamp(min=1)[table.prompt]
        else:
            residual = _residual(values, fit.values, edge)
            sigma = MAD * medians_of(residual.abs(), table)
            mean = sums_of(values.abs(), table) / sums_of(torch.ones_like(values), table).clamp(min=1)
            bound = torch.maximum(threshold * sigma, EXACT * mean)[table.prompt] + blur
        kept = reason[table.prompt] == 0
        corrupted = (residual.abs() > bound) & kept
        _warn_of_doubts(table, fit, corrupted, votes, by_votes, method, threshold)

        fitted = invert_link(fit.values, link)
        listed = corrupted.nonzero().flatten()
        strength = threshold * residual[listed] / bound[listed]
        listed, strength = listed[(by := strength.abs().argsort(descending=True, stable=True))], strength[by]
        scores = copeland_scores(fit) if ranking == "copeland" else fit.scores
        lead = (table.num_prompts,) if has_votes else given.shape[:-2]
        where = torch.unravel_index(table.prompt[listed], lead) if len(lead) != 1 else (table.prompt[listed],)
        pairs = CorruptedPairs(
            indices=torch.stack([*where, table.i[listed], table.j[listed]], 1),
            observed=raw[listed],
            fitted=fitted[listed],
            residual=strength,
        )
        info = DenoiseInfo(
            method=method,
            converged=fit.converged.view(lead),
            scale=sigma.view(lead),
            outlier_rate=(sums_of(corrupted.double(), table) / sums_of(torch.ones_like(raw), table)).view(lead),
            reason=reason.view(lead),
            components=fit.components.view(*lead, n),
        )
        chosen = kept if action == "low_rank" else corrupted
        cleaned = torch.where(chosen, torch.nan if action == "mask" else fitted, raw)
        if not has_votes:
            cleaned = _dense_like(given, table, cleaned, chosen, fit, reason, action, link)
    return Denoised(cleaned, scores.view(*lead, n), pairs, info)


def _linkable(table: Preferences, raw: Tensor, has_votes: bool, link: str, smoothing: float, clamp: float | None):
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
    table: Preferences, linked: _Linked, fit: TableFit, consistent: TableFit | None, has_votes: bool, link: str, backend
) -> Tensor:
    """[P], index into REASONS; consistent: a fit of one score to the raw probabilities, where it is there already."""
    raw, values, edge = linked.raw, linked.values, linked.edge
    prompts, n = table.num_prompts, table.num_items
    reason = torch.zeros(prompts, dtype=torch.int64, device=raw.device)
    pairs = torch.bincount(table.prompt, minlength=prompts)
    components = fit.components.amax(1) + 1 if n else reason

    # unanimous, and no cycle of wins
    lone = (raw > 0) & (raw < 1)
    unanimous = (sums_of(lone.double(), table) == 0) & (pairs > 0)
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
    reason[unanimous & (sums_of(alive.double(), table) == 0)] = 3

    # one score column: the raw frequencies, where the link can take them, are differences exactly
    graded = sums_of((~lone).double(), table) == 0
    inside = graded if has_votes and link != "identity" else pairs > 0
    if consistent is None and inside.any():
        least = raw.new_tensor(0.0 if link == "identity" else CLAMP)
        values = apply_link(raw.clamp(least, 1 - least), link)
        edge = apply_link(1 - least, link)
        consistent = fit_scores(table, values, backend)
    if consistent is not None:
        mean = sums_of(values.abs(), table) / pairs.clamp(min=1)
        far = _residual(values, consistent.values, edge).abs() > 1e-6 * mean[table.prompt] + 2 * linked.blur
        reason[inside & (sums_of(far.double(), table) == 0) & (pairs > 0)] = 2
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


def _warn_of_doubts(table, fit: TableFit, corrupted, votes, by_votes: bool, method: str, threshold: float) -> None:
    if several := several_components(fit.scores, fit.components):
        warnings.warn(
            f"{several} of {table.num_prompts} comparison graphs fall into several components (info.components), "
            "between which scores mean nothing: compare items across them",
            RuntimeWarning,
            stacklevel=3,
        )
    for text in fit.ridge_doubts:
        warnings.warn(text, RuntimeWarning, stacklevel=3)
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


def several_components(scores: Tensor, components: Tensor) -> int:
    """How many rows of [..., N]; items without comparisons, which have no score, do not count."""
    if not scores.shape[-1]:
        return 0
    return int((components.amax(-1) + 1 - scores.isnan().sum(-1) > 1).sum())
