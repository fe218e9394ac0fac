"""Preference matrices: built from comparisons or scores, cleaned of corrupted pairs, ordered; and audits of sources.

P[i, j] is the probability that i is preferred to j, P[i, j] + P[j, i] = 1. Through a link psi it becomes a skew-symmetric
matrix M = psi(P), psi the logit (Bradley-Terry), the probit (Thurstone) or the identity minus 1/2, which is w_i - w_j
where one score explains all preferences, and of low rank where a few dimensions do. Corrupted pairs are few and
arbitrary. Comparisons are kept as a list of pairs, about 3 N per prompt being enough for N items; a dense matrix is the
special case. CURATRON: Nguyen, Naresh, Tulabandhula, arXiv 2403.02745; Rajkumar and Agarwal, COLT 2016.
"""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import _checks
from fastpref.batched_rpca import EXACT, MAD
from fastpref.bradley_terry import Edges, bradley_terry, pair_terms
from fastpref.ncrpca import ncrpca
from fastpref.optspace import optspace
from fastpref.rpca import rpca
from fastpref.source_audit import (
    NothingToClean,
    SourceAudit,
    audit_sources,
    constant_columns,
    refuse_exchangeable,
    standard_ranks,
)

__all__ = [
    "CorruptedPairs",
    "DenoiseInfo",
    "Denoised",
    "DenoisedScores",
    "JudgeReport",
    "NothingToClean",
    "Ordering",
    "Preferences",
    "SourceAudit",
    "apply_link",
    "audit_sources",
    "denoise",
    "denoise_scores",
    "from_comparisons",
    "from_scores",
    "invert_link",
    "order",
]

LINKS = ("logit", "probit", "identity")
METHODS = ("auto", "rpca", "bradley_terry", "curatron")
ACTIONS = ("mask", "replace", "low_rank")
RANKINGS = ("row_mean", "copeland")
REASONS = (
    "cleaned",
    "no cycle of comparisons: every one of them is fitted exactly, so that none contradicts another",
    "one score column explains every comparison exactly (the matrix is w_i - w_j under the link, exactly of rank 2)",
    "every pair is unanimous and no comparison contradicts another: an order, with nothing against it",
)
CLAMP = 1e-6  # of probabilities whose number of votes is not known
SMALL_ITEMS = 128  # of prompts solved as a batch of dense matrices; larger ones as edges, prompt by prompt
FEW_ITEMS = 20  # below, a low-rank fit hardly denoises
CHUNK = 1 << 24  # entries of a batch of dense matrices at a time
INTRANSITIVE = 0.3  # share of corrupted pairs from which one score may not be the structure
DECISIVE, ONE_ORDER = 3.0, 0.1  # |z| of a judge's order effect; share of its pairs shown in one order
CHANCE, ENOUGH = 2.0, 32  # z of votes against coin tosses, and the items from which it is looked at


class JudgeReport(NamedTuple):
    """Per judge, [J], over the pairs it saw in both presentation orders; NaN without such pairs."""

    votes: Tensor  # float64, all it cast
    pairs: Tensor  # int64, pairs of items it compared
    both_orders: Tensor  # int64, of those, seen in both orders
    inconsistency: Tensor  # float64, share of these in which the orders have different winners
    first_advantage: Tensor  # float64, P(the item shown first wins) - 1/2
    order_effect: Tensor  # float64, the same in logits: P(first wins) = sigmoid(w_first - w_second + effect)
    z: Tensor  # float64, first_advantage over its standard error


class Preferences(NamedTuple):
    """Compared pairs, each once: sorted by prompt, i, j; i < j."""

    prompt: Tensor  # [E] int64
    i: Tensor  # [E] int64
    j: Tensor  # [E] int64
    wins_i: Tensor  # [E] float64
    wins_j: Tensor  # [E] float64
    num_prompts: int
    num_items: int  # per prompt
    judges: JudgeReport | None = None  # where comparisons were given in order

    def probabilities(self, smoothing: float = 0.0) -> Tensor:
        """[E] float64, P(i beats j) = (wins_i + smoothing) / (votes + 2 smoothing)."""
        return (self.wins_i + smoothing) / (self.wins_i + self.wins_j + 2 * smoothing)

    def dense(self, values: Tensor | None = None) -> Tensor:
        """[num_prompts, N, N] of P, or of other values [E] with values[j, i] = 1 - values[i, j]; NaN: not compared."""
        values = self.probabilities() if values is None else values
        n = self.num_items
        matrix = values.new_full((self.num_prompts, n, n), torch.nan)
        matrix[self.prompt, self.i, self.j] = values
        matrix[self.prompt, self.j, self.i] = 1 - values
        matrix.diagonal(dim1=-2, dim2=-1).fill_(0.5)
        return matrix


class CorruptedPairs(NamedTuple):
    """Pairs i < j that the fit does not believe, the least believed first."""

    indices: Tensor  # [K, d] int64: prompt (or the batch indices of a matrix), i, j
    observed: Tensor  # [K] float64, P(i beats j) as it was
    fitted: Tensor  # [K] float64, as the other pairs have it
    residual: Tensor  # [K] float64, in noise scales: how far beyond the noise


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


# ---- building ----


def from_comparisons(
    i, j, wins, *, votes=1.0, prompt=None, judge=None, num_items: int | None = None, num_prompts: int | None = None
) -> Preferences:
    """Collects comparisons; both presentation orders are balanced, and reported per judge before that.

    Args:
        i, j: [C] integers, the item shown first and the one shown second.
        wins: [C] how often i was preferred, out of `votes`: 0 to votes, ties 1/2, a judge's probability as it is. NaN: no
            comparison.
        votes: [C] or a number > 0.
        prompt, judge: [C] integers from 0; default 0. Pairs of different prompts are never mixed.
        num_items, num_prompts: default the largest index + 1.

    Returns:
        Preferences. For each judge and pair the win shares of the two orders count the same, whatever their numbers of
        votes, so that an order effect cancels; then the votes of the judges are added. `judges` is a JudgeReport.

    Raises:
        TypeError, ValueError: naming the argument and the first wrong entry.

    Warns:
        RuntimeWarning: for judges that favour an order (|z| > 3) and saw more than 10 % of their pairs in one order.
    """
    i = _indices("i", i, None)
    j = _indices("j", j, i)
    prompt = _indices("prompt", prompt if prompt is not None else torch.zeros_like(i), i)
    judge = _indices("judge", judge if judge is not None else torch.zeros_like(i), i)
    if (own := i == j).any():
        at = int(own.nonzero()[0])
        raise ValueError(f"i and j must be different items, got {int(i[at])} against itself at {at}")
    items = _size("num_items", num_items, torch.cat([i, j]))
    prompts = _size("num_prompts", num_prompts, prompt)
    judges = int(judge.max()) + 1 if len(judge) else 0
    if prompts * items**2 * max(judges, 1) * 2 >= 2**63:
        raise ValueError(f"prompts * items^2 * judges must fit 62 bits, got {prompts} * {items}^2 * {judges}")
    votes = _column("votes", votes, i)
    wins = _column("wins", wins, i)
    there = ~wins.isnan()
    if (bad := there & ~((votes > 0) & votes.isfinite())).any():
        at = int(bad.nonzero()[0])
        raise ValueError(f"votes must be positive and finite, got {votes[at].item()} at {at}")
    if (bad := there & ~((wins >= 0) & (wins <= votes))).any():
        at = int(bad.nonzero()[0])
        raise ValueError(f"wins must lie between 0 and votes, got {wins[at].item()} of {votes[at].item()} at {at}")
    i, j, prompt, judge, wins, votes = (column[there] for column in (i, j, prompt, judge, wins, votes))

    first = i < j  # the lower item was shown first
    low, high = torch.minimum(i, j), torch.maximum(i, j)
    key = ((prompt * items + low) * items + high) * max(judges, 1) + judge
    pairs, place = torch.unique(key, return_inverse=True)
    slot = place * 2 + (~first).long()
    won = wins.new_zeros(2 * len(pairs)).index_add_(0, slot, torch.where(first, wins, votes - wins)).view(-1, 2)
    cast = wins.new_zeros(2 * len(pairs)).index_add_(0, slot, votes).view(-1, 2)
    share = won / cast  # P(lower item wins) when it is shown first, second; NaN: that order was not shown
    report = _judge_report(share, cast, pairs % max(judges, 1), judges)
    _warn_of_order(report)
    share, cast = share.nanmean(1), cast.sum(1)

    pairs, place = torch.unique(pairs // max(judges, 1), return_inverse=True)
    wins_low = wins.new_zeros(len(pairs)).index_add_(0, place, share * cast)
    wins_high = wins.new_zeros(len(pairs)).index_add_(0, place, (1 - share) * cast)
    low, high = pairs // items % max(items, 1), pairs % max(items, 1)
    return Preferences(pairs // max(items, 1) ** 2, low, high, wins_low, wins_high, prompts, items, report)


def _indices(name: str, value, like: Tensor | None) -> Tensor:
    index = torch.as_tensor(value)
    if index.numel() == 0:
        index = index.long()
    _checks.integers(name, index)
    if index.dim() != 1 or (like is not None and index.shape != like.shape):
        raise ValueError(
            f"{name} must have shape {[len(like)] if like is not None else '[C]'}, got {list(index.shape)}"
        )
    if (index < 0).any():
        at = int((index < 0).nonzero()[0])
        raise ValueError(f"{name} must be >= 0, got {int(index[at])} at {at}")
    return index.long()


def _size(name: str, given: int | None, index: Tensor) -> int:
    least = int(index.max()) + 1 if len(index) else 0
    if given is None:
        return least
    _checks.natural(name, given)
    if given < least:
        raise ValueError(f"{name} must be at least {least}, the largest index + 1, got {given}")
    return given


def _column(name: str, value, like: Tensor) -> Tensor:
    column = torch.as_tensor(value).to(like.device)
    if column.is_complex():
        raise TypeError(f"{name} must be real numbers, got {column.dtype}")
    column = column.double()
    if column.dim() == 0:
        return column.expand(like.shape)
    if column.shape != like.shape:
        raise ValueError(f"{name} must have shape {list(like.shape)} like i, got {list(column.shape)}")
    return column


def _judge_report(share: Tensor, cast: Tensor, judge: Tensor, judges: int) -> JudgeReport:
    """share, cast: [pairs of a judge, 2 orders], of the lower item; judge: [pairs]."""

    def total(values):
        return values.new_zeros(judges).index_add_(0, judge, values)

    both = (~share.isnan()).all(1)
    shown_first, shown_second = share.nan_to_num(0.5).unbind(1)
    number = total(both.double())
    none = torch.where(number > 0, 1.0, torch.nan)
    opposite = both & ((shown_first - 0.5) * (shown_second - 0.5) < 0)
    gain = torch.where(both, (shown_first - shown_second) / 2, 0)  # of being shown first
    mean = total(gain) / number
    variance = (total(gain.square()) / number - mean.square()).clamp(min=0) / (number - 1)
    # ratio of "the first wins both" to "the second wins both": exp(2 effect), whatever the items are worth
    first_both = total(torch.where(both, shown_first * (1 - shown_second), 0)) + 0.5
    second_both = total(torch.where(both, (1 - shown_first) * shown_second, 0)) + 0.5
    z = torch.where(mean == 0, 0.0, mean / variance.sqrt())
    return JudgeReport(
        total(cast.sum(1)),
        torch.bincount(judge, minlength=judges),
        number.long(),
        total(opposite.double()) / number,
        mean,
        none * (first_both / second_both).log() / 2,
        torch.where(number > 1, z, torch.nan),
    )


def _warn_of_order(report: JudgeReport) -> None:
    single = 1 - report.both_orders / report.pairs.clamp(min=1)
    for judge in ((report.z.abs() > DECISIVE) & (single > ONE_ORDER)).nonzero().flatten().tolist():
        effect = float(report.order_effect[judge])
        warnings.warn(
            f"judge {judge} favours the item shown {'first' if effect > 0 else 'second'} by {abs(effect):.2f} logits (z = "
            f"{float(report.z[judge]):.1f}), and {100 * float(single[judge]):.0f} % of its pairs were shown in one order "
            "only, where that cannot be balanced: show them in the other order too",
            RuntimeWarning,
            stacklevel=3,
        )


def from_scores(scores, *, temperature: float | None = None) -> Preferences:
    """Compares all items of a prompt by the scores several judges gave them.

    Args:
        scores: [N, J] or [prompts, N, J], one column per judge; NaN: not scored. Judges may have different scales.
        temperature: None: each judge casts one vote per pair, for the higher score, half each where they are equal. Or the
            scale of the scores: a vote is sigmoid((s_i - s_j) / temperature), which keeps how much better an item is.

    Returns:
        Preferences: all pairs that some judge scored both items of.

    Raises:
        NothingToClean (a ValueError): for one score column, whose every preference matrix is w_i - w_j under some link, and
            where the judges agree no more than chance would have them (items that are exchangeable).
        TypeError, ValueError: for other types and shapes, and infinite entries.
    """
    scores = torch.as_tensor(scores)
    _checks.floats("scores", scores)
    if scores.dim() not in (2, 3):
        raise ValueError(f"scores must have shape [N, J] or [prompts, N, J], got {list(scores.shape)}")
    _checks.finite_or_nan("scores", scores)
    if temperature is not None:
        _checks.positive("temperature", temperature)
    scores = scores.detach().double()
    scores = scores.unsqueeze(0) if scores.dim() == 2 else scores
    prompts, items, judges = scores.shape
    varied = ~constant_columns(scores.flatten(0, 1)) & ~scores.isnan().flatten(0, 1).all(0)
    if int(varied.sum()) < 2:
        raise NothingToClean(
            f"scores has {int(varied.sum())} score column(s) that vary of {judges}: any preference matrix of one column is "
            "w_i - w_j under its link, with nothing in it to contradict an entry; take the column itself"
        )
    _refuse_disagreement(scores)
    i, j = torch.triu_indices(items, items, 1, device=scores.device)
    found = []
    step = max(1, CHUNK // max(len(i) * judges, 1))
    for begin in range(0, prompts, step):
        part = scores[begin : begin + step]
        difference = part[:, i] - part[:, j]  # [step, pairs, J]
        if temperature is None:
            vote = torch.where(difference == 0, 0.5, (difference > 0).double())
        else:
            vote = torch.sigmoid(difference / temperature)
        seen = ~difference.isnan()
        wins, votes = torch.where(seen, vote, 0).sum(-1), seen.sum(-1)
        where, pair = (votes > 0).nonzero(as_tuple=True)
        won = wins[where, pair]
        found.append((where + begin, i[pair], j[pair], won, votes[where, pair] - won))
    columns = [torch.cat(column) for column in zip(*found, strict=True)]
    return Preferences(*columns, prompts, items)


def _refuse_disagreement(scores: Tensor) -> None:
    """Friedman's test, all prompts pooled: do the judges rank the items alike, or items alike over the judges?"""
    prompts, items, judges = scores.shape
    ranks = standard_ranks(scores.mT.reshape(prompts * judges, items)).view(prompts, judges, items)
    present = (ranks != 0).any(-1).sum(1)  # [prompts], judges that tell items apart
    usable = present > 1
    degrees = (~scores.isnan()).any(-1).sum(1) - 1
    chi2 = ranks.sum(1).square().sum(-1) / present.clamp(min=1) * degrees / (degrees + 1).clamp(min=1)
    total, freedom = chi2[usable].sum(), degrees[usable].sum()
    if freedom < ENOUGH:
        return
    variance = (2 * degrees * (present - 1) / present.clamp(min=1))[usable].sum()
    z = float((total - freedom) / variance.sqrt())
    if z < CHANCE:
        raise NothingToClean(
            f"scores has exchangeable items: its columns agree about them no more than chance would (Friedman's test over "
            f"all prompts: z = {z:.1f}, {CHANCE:g} needed), so that their preferences are noise. Samples of one policy have "
            "no common order across prompts; compare them within a prompt"
        )


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
        preferences: Preferences (votes), or a floating-point tensor [..., N, N] of P(i preferred to j) with P[i, j] +
            P[j, i] = 1; NaN on both sides: missing; the diagonal is 1/2 or NaN. Every prompt (matrix) is cleaned on its
            own. Computed in float64, returned in the dtype of the tensor.
        link: "logit", "probit" or "identity": where preferences are differences of scores.
        method: "bradley_terry": one score per item, robustly fitted, votes by their likelihood (link="logit") rather than
            through frequencies. "rpca": a skew matrix of the given rank, for intransitive preferences, fit to the pairs
            that are there. "curatron": the paper's pipeline, holes filled by OptSpace before robust PCA as published.
            "auto": bradley_terry for rank=2, else rpca.
        action: what becomes of corrupted pairs: "mask": NaN. "replace": the fit's value. "low_rank": all pairs, of a
            tensor the missing ones too, become the fit's; that loses what the structure does not explain, and with it
            more often than not the best item, which is why it is not the default.
        rank: of the matrix under the link, even; 2 is one score per item.
        ranking: `scores` are the "row_mean" of the fitted matrix (bradley_terry: the scores themselves), or "copeland": the
            number of items beaten.
        threshold: in scales of the noise, 1.4826 * median |residual|; votes: in binomial standard deviations too.
        smoothing: added to the wins of both sides of Preferences before a link (bradley_terry on votes needs none).
        clamp: P is moved into [clamp, 1 - clamp] before a link; default 1e-6, for Preferences 1 / (2 votes + 2). Not for
            the identity.
        backend: of bradley_terry and rpca.

    Returns:
        Denoised. P[i, j] + P[j, i] = 1 to rounding in all that is returned.

    Raises:
        NothingToClean (a ValueError): where no matrix has anything to clean: see REASONS; or votes that all prompts
            together do not tell from coin tosses. In a batch, matrices of these kinds beside others are returned as they
            were, with the reason in `info.reason`.
        TypeError, ValueError: for other types, shapes and values, and matrices that are not P[i, j] + P[j, i] = 1.

    Warns:
        RuntimeWarning: of what makes the result doubtful and what to do: too few items for a low-rank fit, too few votes
            to flag any pair, comparison graphs of several components, so many corrupted pairs that preferences may be
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
    if smoothing != 0:
        _checks.positive("smoothing", smoothing)
    if clamp is not None and not 0 < clamp < 0.5:
        raise ValueError(f"clamp must lie between 0 and 1/2, got {clamp}")
    given = preferences
    table = preferences if isinstance(preferences, Preferences) else _table("preferences", preferences)
    n = table.num_items
    method = method if method != "auto" else "bradley_terry" if rank == 2 else "rpca"
    if method != "bradley_terry" and not rank <= n:
        raise ValueError(f"rank must be at most the number of items, {n}, got {rank}")
    has_votes = isinstance(given, Preferences)
    by_votes = has_votes and link == "logit" and method == "bradley_terry"
    with torch.no_grad():
        raw = table.probabilities()
        votes = table.wins_i + table.wins_j
        values = apply_link(_inner(table, raw, has_votes, link, smoothing, clamp), link)
        fit = _fit(table, values, by_votes, method, rank, backend)
        if has_votes:
            _refuse_coin_tosses(table)
        eps = 1e-12 if has_votes else 4 * torch.finfo(torch.as_tensor(given).dtype).eps
        blur = _blur(raw, link, eps)
        consistent = fit if method == "bradley_terry" and not by_votes else None
        reason = _reasons(table, raw, values, blur, fit, consistent, link, backend)
        _refuse_all(reason)
        if by_votes:
            residual = pair_terms(raw, votes, fit.values, "counts", 1.0)[0]
            scale = MAD * _medians(residual.abs(), table)
            bound = threshold * scale.clamp(min=1)[table.prompt]
        else:
            residual = values - fit.values
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
        lead = (table.num_prompts,) if has_votes else torch.as_tensor(given).shape[:-2]
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
            cleaned = _dense_like(torch.as_tensor(given), table, cleaned, chosen, fit, reason, action, link)
    return Denoised(cleaned, scores.view(*lead, n), pairs, info)


def _table(name: str, given) -> Preferences:
    """The pairs of [..., N, N] probabilities, as one vote each."""
    p = torch.as_tensor(given)
    _checks.floats(name, p)
    if p.dim() < 2 or p.shape[-1] != p.shape[-2]:
        raise ValueError(f"{name} must have shape [..., N, N], or be Preferences, got {list(p.shape)}")
    outside = (p < 0) | (p > 1)
    if outside.any():
        at = outside.nonzero()[0].tolist()
        raise ValueError(f"{name} must lie between 0 and 1 (NaN: missing), got {p[tuple(at)].item()} at {at}")
    off = (p.double() + p.double().mT - 1).abs()
    off = torch.where(p.isnan() != p.mT.isnan(), torch.inf, off.nan_to_num(0, posinf=torch.inf))
    if off.numel() and off.max() > 16 * torch.finfo(p.dtype).eps:
        at = torch.unravel_index(off.argmax(), off.shape)
        at = [int(index) for index in at]
        raise ValueError(
            f"{name} must have P[i, j] + P[j, i] = 1, got {p[tuple(at)].item()} and {p.mT[tuple(at)].item()} at {at}. If "
            "the two are answers to the two presentation orders, pass both to from_comparisons, which reports the order "
            "effect before it balances them"
        )
    n = p.shape[-1]
    lead = p.shape[:-2]
    flat = p.detach().reshape(lead.numel(), n, n)
    seen = (~flat.isnan()).triu(1)
    prompt, i, j = seen.nonzero(as_tuple=True)
    wins = flat[seen].double()
    return Preferences(prompt, i, j, wins, 1 - wins, lead.numel(), n)


def _inner(
    table: Preferences, raw: Tensor, has_votes: bool, link: str, smoothing: float, clamp: float | None
) -> Tensor:
    """Probabilities a link can take."""
    p = table.probabilities(smoothing) if has_votes else raw
    if link == "identity":
        return p
    if clamp is None:
        clamp = 1 / (2 * (table.wins_i + table.wins_j) + 2) if has_votes else torch.full_like(p, CLAMP)
    else:
        clamp = torch.full_like(p, clamp)
    return torch.minimum(torch.maximum(p, clamp), 1 - clamp)


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
    begins = begins.tolist()
    return [
        (slice(*prompts), slice(*pairs))
        for prompts, pairs in zip(
            zip(begins, begins[1:], strict=False), zip(places, places[1:], strict=False), strict=True
        )
        if prompts[0] < prompts[1]
    ]


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
    scores = torch.cat([part.scores.reshape(-1, shape[1]) for part in found]).double()
    converged = torch.cat([part.info.converged.reshape(-1) for part in found])
    components = torch.cat([part.components.reshape(-1, shape[1]) for part in found])
    difference = scores[table.prompt, table.i] - scores[table.prompt, table.j]
    return _Fit(difference, scores, converged, components, None)


def _fit(table: Preferences, values: Tensor, by_votes: bool, method: str, rank: int, backend: str | None) -> _Fit:
    simple = _one_score(table, None if by_votes else values, backend)
    if method == "bradley_terry" or not table.num_prompts:
        return simple
    if table.num_items < FEW_ITEMS:
        warnings.warn(
            f"method={method!r} hardly denoises {table.num_items} items: a low-rank fit needs {FEW_ITEMS} or more; pool "
            "items, or take method='bradley_terry' where preferences are transitive",
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


def _reasons(table, raw, values, blur, fit: _Fit, consistent: _Fit | None, link: str, backend: str | None) -> Tensor:
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
    inside = _sums((~lone).double(), table) == 0 if link != "identity" else pairs > 0
    if consistent is None and inside.any():
        p = raw if link == "identity" else raw.clamp(CLAMP, 1 - CLAMP)
        values = apply_link(p, link)
        consistent = _one_score(table, values, backend)
    if consistent is not None:
        mean = _sums(values.abs(), table) / pairs.clamp(min=1)
        far = (values - consistent.values).abs() > 1e-6 * mean[table.prompt] + 8 * blur
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
    """Whole votes of all prompts against coin tosses: by the items' balances, and by the pairs' where they have several."""
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
    if items < ENOUGH:
        return
    by_items = float(((balance.square() / cast)[compared].sum() - items) / (2 * items) ** 0.5)
    spare = float((2 * (1 - 1 / votes)).sum())
    by_pairs = float(((table.wins_i - table.wins_j).square() / votes).sum() - len(votes)) / max(spare, 1e-300) ** 0.5
    if by_items < CHANCE and (spare == 0 or by_pairs < CHANCE):
        raise NothingToClean(
            f"preferences has nothing to clean: its votes do not differ from coin tosses (z = {by_items:.1f} over the items"
            + (f", {by_pairs:.1f} over the pairs" if spare else "")
            + f"; {CHANCE:g} needed). The items are exchangeable, or the judges guess"
        )


def _warn(table, fit: _Fit, corrupted, votes, by_votes: bool, method: str, threshold: float) -> None:
    single = fit.scores.isnan().sum(1)
    several = int((fit.components.amax(1) + 1 - single > 1).sum()) if table.num_items else 0
    if several:
        warnings.warn(
            f"{several} of {table.num_prompts} comparison graphs fall into several components (info.components), between "
            "which scores mean nothing: compare items across them",
            RuntimeWarning,
            stacklevel=3,
        )
    few = float((2 * votes <= threshold).double().mean()) if by_votes and len(votes) else 0.0
    if few > 0.5:
        warnings.warn(
            f"{100 * few:.0f} % of the pairs have so few votes that no outcome of theirs is {threshold:g} standard deviations "
            "off: they are weighed down where they contradict the rest, but not listed; collect more votes per pair, or "
            "lower threshold",
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


# ---- scores of sources ----


class DenoisedScores(NamedTuple):
    """What `denoise_scores` returns."""

    scores: Tensor  # [prompts, sources], corrupted entries NaN (or the fit's, by the action)
    corrupted: Tensor  # [K, 2] int64, prompt and source, the largest residual first
    residual: Tensor  # [K] float64, of these, in noise scales
    scale: float  # of the noise
    converged: bool


def denoise_scores(
    scores, *, rank: int = 3, action: str = "mask", threshold: float = 5.0, backend: str | None = None
) -> DenoisedScores:
    """Finds single wrong scores in [prompts, sources] by robust PCA of the columns minus their medians.

    A source that is wrong throughout is structure to this function: `audit_sources` is for those.

    Args:
        scores: floating-point tensor or array on a linear scale (logits of probabilities); NaN: missing.
        rank: of the structure.
        action: "mask": corrupted entries become NaN. "replace": they become the fit's. "low_rank": all entries do; the
            best response of a prompt is then seldom the best of the fit.
        threshold: in scales of the noise.
        backend: of rpca.

    Raises NothingToClean for one column or exchangeable columns, and ValueError and TypeError as audit_sources does.
    """
    scores = torch.as_tensor(scores)
    _checks.floats("scores", scores)
    if scores.dim() != 2:
        raise ValueError(f"scores must have shape [prompts, sources], got {list(scores.shape)}")
    if action not in ACTIONS:
        raise ValueError(f"action must be one of {ACTIONS}, got {action!r}")
    _checks.positive("threshold", threshold)
    _checks.finite_or_nan("scores", scores)
    with torch.no_grad():
        x = scores.detach().double()
        varied = (~constant_columns(x) & ~x.isnan().all(0)).nonzero().flatten()
        if len(varied) < 2:
            raise NothingToClean(
                f"scores has {len(varied)} column(s) that vary of {x.shape[1]}: nothing to compare with"
            )
        part = x[:, varied]
        refuse_exchangeable("scores", part, "sources", 0)
        centre = part.nanmedian(0).values
        centred = part - centre
        found = rpca(centred, rank=rank, backend=backend)
        low_rank = found.low_rank()
        scale = float(found.info.scale)
        bound = max(threshold * scale, EXACT * float(centred.abs().nanmean()))
        residual = centred - low_rank
        wrong = residual.abs() > bound
        fitted = low_rank + centre
        changed = torch.where(wrong, torch.nan if action == "mask" else fitted, part)
        out = x.clone()
        out[:, varied] = fitted if action == "low_rank" else changed
        where = wrong.nonzero()
        strength = threshold * residual[wrong] / bound
        by = strength.abs().argsort(descending=True, stable=True)
        listed = torch.stack([where[:, 0], varied[where[:, 1]]], 1)[by]
    return DenoisedScores(out.to(scores.dtype), listed, strength[by], scale, bool(found.info.converged))


# ---- ordering ----


def order(scores, *, tolerance: float | None = None) -> Ordering:
    """Orders items by their scores, and says which are tied.

    Args:
        scores: [..., N] floating-point tensor or array, or a Denoised; NaN: no score.
        tolerance: items whose scores differ by no more are tied, and so are chains of them; default 1e-6 of the spread of
            a row's scores.

    Scores of items in different components of the comparison graph cannot be compared (DenoiseInfo.components).
    """
    scores = torch.as_tensor(scores.scores if isinstance(scores, Denoised) else scores)
    _checks.floats("scores", scores)
    if scores.dim() < 1:
        raise ValueError(f"scores must have shape [..., N], got {list(scores.shape)}")
    _checks.finite_or_nan("scores", scores)
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise ValueError(f"tolerance must be >= 0 and finite, got {tolerance}")
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
