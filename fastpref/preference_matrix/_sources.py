"""Which sources' scores move unlike those of the others: an audit of [prompts, sources] scores by structure alone.

A source that games the judge is consistent: its whole column is off, which entry-wise robust PCA takes for structure.
What gives it away is that the other sources do not explain it. For each source s, with the columns centred:

    1. the left singular subspace of rank r of the matrix without column s;
    2. the share of column s's variance outside that subspace.

Leaving a column out is a rank-one downdate of the Gram matrix K = X X^T = U diag(d) U^T: with c = U^T x_s the
eigenvalues of K - x_s x_s^T are the roots of the secular equation sum_i c_i^2 / (d_i - lambda) = 1 (Golub 1973), one
between any two d, and U (c / (d - lambda)) their eigenvectors. So one eigendecomposition, of the smaller of the two
Gram matrices, serves all sources: O(P S k + k^3 + S P k r) with k = min(P, S), and no SVD per source.
"""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import _checks
from fastpref._lowrank.noise import EXACT, MAD
from fastpref._lowrank.rpca import rpca
from fastpref.preference_matrix._refusals import NothingToClean, constant_columns, refuse_exchangeable
from fastpref.preference_matrix._table import ACTIONS

SECULAR_STEPS = 60  # at most; about six are taken
TIED = 1e-13  # of the largest eigenvalue
FILL_STEPS = 100  # of alternating least squares, where entries are missing
FEW_PROMPTS = 100


class SourceAudit(NamedTuple):
    """Per source, [S]. NaN in all numbers of reference sources and of those with fewer than 2 (r + 2) scores."""

    outlyingness: Tensor  # float64, 0 to 1: share of the source's variance that the others' structure leaves
    z: Tensor  # float64, (outlyingness - median) / (1.4826 MAD) over the audited sources
    low: Tensor  # float64, interval of the outlyingness, by resampled prompts
    high: Tensor
    order: Tensor  # int64, sources by outlyingness, largest first; then the ones that were not audited
    flagged: Tensor  # bool, z > threshold
    reference: Tensor  # bool, constant: a baseline that the others were scored against
    observed: Tensor  # int64, scores of the source
    rank: int  # of the structure


def audit_sources(
    scores,
    rank: int | None = None,
    *,
    threshold: float = 3.0,
    resamples: int = 200,
    confidence: float = 0.9,
    seed: int = 0,
) -> SourceAudit:
    """Ranks the sources of [prompts, sources] scores by how little the other sources explain them.

    Args:
        scores: numbers on a linear scale (logits of win probabilities, not the probabilities); NaN is missing. Computed
            in float64.
        rank: of the structure the sources share; default 3, at most S - 2. Three is where the audit was tried on real
            scores; it is not estimated from the data.
        threshold: of z.
        resamples: bootstrap samples of the prompts, for the interval; 0: none (NaN). The structure of the other sources
            is held, so that all of them together cost about as much as the audit.
        confidence: of the interval.
        seed: of the resampling, and of the permutations behind the refusal.

    Outlying is not guilty: a source of its own kind (another language, a base model) is outlying too. The median source
    is the yardstick: when half of the sources are corrupted, none is flagged.

    Raises NothingToClean (a ValueError) for one column, and for exchangeable columns: samples of one policy, whose
    column number means nothing. ValueError for infinite entries, wrong shapes and ranks; TypeError for other types.

    Warns where fewer than 100 prompts were scored.
    """
    scores = _checks.real("scores", scores)
    if scores.dim() != 2:
        raise ValueError(f"scores must have shape [prompts, sources], got {list(scores.shape)}")
    _checks.positive("threshold", threshold)
    _checks.natural("resamples", resamples)
    _checks.between("confidence", confidence, 0, 1)
    _checks.natural("seed", seed)
    _checks.finite_or_nan("scores", scores)
    with torch.no_grad():
        x = scores.detach().double()
        seen = ~x.isnan()
        observed = seen.sum(0)
        reference = constant_columns(x)
        sources = len(observed)
        if rank is not None:
            _checks.positive_int("rank", rank)
        candidates = (~reference & (observed > 0)).nonzero().flatten()
        if len(candidates) < 2:
            raise NothingToClean(
                f"scores has {len(candidates)} column(s) that vary of {sources}: the audit compares a source with the "
                "others"
            )
        rank = min(3, len(candidates) - 2) if rank is None else rank
        audited = candidates[observed[candidates] >= 2 * (rank + 2)]
        if rank < 1 or len(audited) < rank + 2:
            raise ValueError(
                f"rank must be at most the number of audited sources - 2, got rank={max(rank, 1)} for {len(audited)} "
                f"sources with at least {2 * (max(rank, 1) + 2)} scores"
            )
        refuse_exchangeable(x[:, audited], seed)
        prompts = int(seen[:, audited].any(1).sum())
        if prompts < FEW_PROMPTS:
            warnings.warn(
                f"scores has {prompts} prompts: on so few the audit overlooks outlying sources and flags others by "
                "chance (trials on 57 real sources: 0.3 at 100 prompts, 0.8 at 50); score more prompts",
                RuntimeWarning,
                stacklevel=2,
            )
        share, low, high = _outlyingness(x[:, audited], rank, resamples, confidence, seed)

    def spread(values):
        return x.new_full((sources,), torch.nan).index_copy(0, audited, values)

    centre = share.median()
    distance = (share - centre).abs()
    z = (share - centre) / (MAD * distance.median().clamp(min=torch.finfo(torch.float64).eps))
    order = spread(share).nan_to_num(nan=-1.0).argsort(descending=True, stable=True)
    z = spread(z)
    return SourceAudit(spread(share), z, spread(low), spread(high), order, z > threshold, reference, observed, rank)


class DenoisedScores(NamedTuple):
    """What `denoise_scores` returns."""

    scores: Tensor  # [prompts, sources], corrupted entries NaN (or the fit's, by the action)
    corrupted: Tensor  # [K, 2] int64, prompt and source, the largest residual first
    residual: Tensor  # [K] float64, of these, in noise scales
    scale: float  # of the noise
    converged: bool


def denoise_scores(
    scores, *, rank: int | None = None, action: str = "mask", threshold: float = 5.0, backend: str | None = None
) -> DenoisedScores:
    """Finds single wrong scores in [prompts, sources] by robust PCA of the columns minus their offsets.

    A source that is wrong throughout is structure to this function: `audit_sources` is for those.

    Args:
        scores: numbers on a linear scale (logits of probabilities); NaN: missing. Returned in their dtype, integers as
            float64.
        rank: of the structure, at most the number of columns that vary - 2: with fewer beside it, an entry that is off
            cannot be told from the others of its row. Default 3, or as much as that allows.
        action: "mask": corrupted entries become NaN. "replace": they become the fit's. "low_rank": all entries do; the
            best response of a prompt is then seldom the best of the fit.
        threshold: in scales of the noise, which are larger by the share of the numbers that the fit has for itself.
        backend: of rpca.

    Raises NothingToClean for one column or exchangeable columns, and ValueError and TypeError as audit_sources does.
    """
    scores = _checks.real("scores", scores)
    if scores.dim() != 2:
        raise ValueError(f"scores must have shape [prompts, sources], got {list(scores.shape)}")
    if action not in ACTIONS:
        raise ValueError(f"action must be one of {ACTIONS}, got {action!r}")
    if rank is not None:
        _checks.positive_int("rank", rank)
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
        most = min(part.shape) - 2
        rank = min(3, most) if rank is None else rank
        if not 1 <= rank <= most:
            raise ValueError(
                f"rank must be at most {most}, the number of prompts or of sources that vary - 2, got {max(rank, 1)} "
                f"for {len(part)} prompts and {len(varied)} such sources"
            )
        refuse_exchangeable(part, 0)
        centre, residual = 0, part
        for _ in range(2):  # medians of the scores are not the offsets that leave a matrix of this rank
            centre = centre + residual.nanmedian(0).values.nan_to_num(0)  # of a column whose fit nothing determines
            centred = part - centre
            found = rpca(centred, rank=rank, backend=backend)
            low_rank = found.low_rank()
            residual = centred - low_rank
        sigma = float(found.info.scale)
        # the fit follows the entries it was made of, by this share of their noise, and so is off where it was not
        followed = (rank * (sum(part.shape) - rank) + len(varied)) / float((~part.isnan()).sum())
        bound = max(threshold * sigma / max(1 - followed, 0.1), EXACT * float(centred.abs().nanmean()))
        wrong = residual.abs() > bound
        fitted = low_rank + centre
        changed = torch.where(wrong, torch.nan if action == "mask" else fitted, part)
        out = x.clone()
        out[:, varied] = fitted if action == "low_rank" else changed
        where = wrong.nonzero()
        strength = threshold * residual[wrong] / bound
        by = strength.abs().argsort(descending=True, stable=True)
        listed = torch.stack([where[:, 0], varied[where[:, 1]]], 1)[by]
    return DenoisedScores(out.to(scores.dtype), listed, strength[by], sigma, bool(found.info.converged))


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """Columns minus their means, missing entries 0; and where they are not."""
    seen = ~x.isnan()
    x = torch.where(seen, x, 0)
    mean = x.sum(0) / seen.sum(0).clamp(min=1)
    return torch.where(seen, x - mean, 0), seen


def _filled(x: Tensor, seen: Tensor, rank: int) -> Tensor:
    """Missing entries from a fit of this rank to the others, by alternating least squares on the filled matrix."""
    if seen.all():
        return x
    generator = torch.Generator().manual_seed(0)
    right = torch.randn(x.shape[1], rank, generator=generator, dtype=torch.float64).to(x.device)
    fitted = torch.zeros_like(x)
    for _ in range(FILL_STEPS):
        full = torch.where(seen, x, fitted)
        left = torch.linalg.qr(full @ right).Q
        right = full.mT @ left
        following = left @ right.mT
        change = torch.linalg.vector_norm(following - fitted) / torch.linalg.vector_norm(following).clamp(min=1e-300)
        fitted = following
        if change < 1e-4:
            break
    full = torch.where(seen, x, fitted)
    return full - full.mean(0)


def _outlyingness(x: Tensor, rank: int, resamples: int, confidence: float, seed: int):
    """Shares, and the bounds of their intervals, [S] each."""
    data, seen = _centred(x)
    full = _filled(data, seen, rank)
    prompts, sources = full.shape
    if prompts <= sources:
        d, u = torch.linalg.eigh(full @ full.mT)
        d, u = d.flip(0).clamp(min=0), u.flip(1)
    else:  # from the smaller Gram matrix; directions that no source uses are left out
        d, v = torch.linalg.eigh(full.mT @ full)
        d, v = d.flip(0).clamp(min=0), v.flip(1)
        kept = d > 1e-24 * d[0]
        d, v = d[kept], v[:, kept]
        u = torch.linalg.qr(full @ v).Q
    coordinates = u.mT @ full  # [k, S]
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(prompts, (resamples, prompts), generator=generator)
    weights = torch.zeros(resamples, prompts, dtype=torch.float64)
    weights.scatter_add_(1, draws, torch.ones_like(draws, dtype=torch.float64))
    weights = weights.to(x.device)
    shares, boots = [], []
    chunk = max(1, (1 << 18) // max(prompts, len(d)))
    for begin in range(0, sources, chunk):
        part = slice(begin, begin + chunk)
        directions = _downdated(d, coordinates[:, part].mT, rank)  # [chunk, rank, k]
        basis = (directions @ u.mT).mT  # [chunk, P, rank]
        there = seen[:, part].mT.unsqueeze(-1)
        column = data[:, part].mT.unsqueeze(-1)  # missing entries 0
        if not there.all():
            basis = torch.where(there, basis, 0)
            gram = basis.mT @ basis
            fit = torch.linalg.pinv(gram, hermitian=True) @ (basis.mT @ column)
        else:
            fit = basis.mT @ column
        left_over = (column - basis @ fit).squeeze(-1).square().mT  # [P, chunk]
        squares = column.squeeze(-1).square().mT
        shares.append(left_over.sum(0) / squares.sum(0))
        boots.append((weights @ left_over) / (weights @ squares))
    share = torch.cat(shares)
    if not resamples:
        return share, torch.full_like(share, torch.nan), torch.full_like(share, torch.nan)
    tail = (1 - confidence) / 2
    low, high = torch.cat(boots, 1).nanquantile(torch.tensor([tail, 1 - tail], dtype=torch.float64).to(x.device), dim=0)
    return share, low, high.clamp(max=1)  # of prompts drawn twice the column's mean is another


def _downdated(d: Tensor, c: Tensor, rank: int) -> Tensor:
    """[S, rank, k]: unit eigenvectors of diag(d) - c_s c_s^T for its largest eigenvalues; d [k] descending, c [S, k].

    The j-th eigenvalue lies between d[j] and d[j + 1]. It is sought as its difference from the nearer of the two, so
    that no digit of d - lambda is lost, by the two-pole interpolation of Bunch, Nielsen, Sorensen 1978.
    """
    k = len(d)
    squares = c.square()
    squares = torch.maximum(squares, 1e-30 * squares.sum(1, keepdim=True))  # [S, k]; no zero: no eigenvalue at a pole
    ends = torch.cat([d, d.new_zeros(1)])  # where rank = k the last eigenvalue may fall to 0
    vectors = []
    for j in range(min(rank, k)):
        gap = ends[j] - ends[j + 1]
        if gap <= TIED * d[0]:  # an eigenvector of both, at right angles to c: it explains nothing
            vectors.append(torch.zeros_like(c))
            continue
        nearer_below = _secular(squares, d - ends[j + 1], torch.full_like(c[:, 0], gap / 2), j)[:2].sum(0) > 1
        # from here on everything is relative to d[j], or to d[j + 1] where that is nearer
        poles = torch.where(nearer_below[:, None], d - ends[j + 1], d - ends[j])  # [S, k]
        upper = torch.where(nearer_below, gap, 0.0)
        lower = upper - gap
        root = (upper + lower) / 2
        low = torch.where(nearer_below, 0.0, lower / 2)
        high = torch.where(nearer_below, upper / 2, 0.0)
        for _ in range(SECULAR_STEPS):
            above, below, above_slope, below_slope = _secular(squares, poles, root, j)
            excess = 1 - above - below  # falls as the root grows
            high = torch.where(excess < 0, root, high)
            low = torch.where(excess > 0, root, low)
            to_upper, to_lower = upper - root, lower - root
            first, second = above_slope * to_upper.square(), below_slope * to_lower.square()
            a = excess + above_slope * to_upper + below_slope * to_lower
            b = first + second - a * (to_upper + to_lower)
            q = b.abs() + (b.square() - 4 * a * to_upper * to_lower * excess).clamp(min=0).sqrt()
            step = torch.where(b > 0, -2 * to_upper * to_lower * excess / q, q / (2 * a))
            following = root + step
            inside = (following >= low) & (following <= high)
            following = torch.where(inside, following, (low + high) / 2)
            settled = ((following - root).abs() <= 1e-10 * following.abs()).all()
            root = following
            if settled:
                break
        vector = c / (poles - root[:, None])
        vectors.append(vector / torch.linalg.vector_norm(vector, dim=1, keepdim=True).clamp(min=1e-300))
    return torch.stack(vectors, 1)


def _secular(squares: Tensor, poles: Tensor, root: Tensor, j: int) -> Tensor:
    """[4, S]: sum c_i^2 / (d_i - lambda) over i <= j and over i > j, and the derivatives of both."""
    inverse = 1 / (poles - root[:, None])
    term = squares * inverse
    slope = term * inverse
    return torch.stack(
        [term[:, : j + 1].sum(1), term[:, j + 1 :].sum(1), slope[:, : j + 1].sum(1), slope[:, j + 1 :].sum(1)]
    )
