"""The two algorithms of CURATRON as their authors published them: OptSpace fills holes, ncrpca takes corruptions out.

Keshavan, Montanari, Oh, "Matrix Completion from a Few Entries", IEEE Trans. Inf. Theory 2010, arXiv:0901.3150: an SVD
of the trimmed, rescaled matrix, then gradient descent on the column spaces X, Y of L = X S Y^T with S refitted after
every step. Netrapalli, Niranjan, Sanghavi, Anandkumar, Jain, "Non-convex Robust PCA", NIPS 2014, arXiv:1410.7660:
alternating projections, dense and plain. Both have the constants of the authors' MATLAB code.

They are here for comparison with the paper (`preference_matrix.denoise(method="curatron")`): `rpca` is faster, reads
missing entries as missing, and needs less of the data.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import _checks

FIRST_STEP, HALVINGS = 0.1, 20  # of OptSpace's line search
STOP, SMALLEST, STALLED, SHRINK, MAX_ITER = 1e-3, 1e-3, 0.1, 0.9, 51  # of ncrpca


# ---- OptSpace ----


class OptSpaceResult(NamedTuple):
    low_rank: Tensor  # [..., m, n]
    iterations: Tensor  # [...] int64
    residual: Tensor  # [...] float64, root mean square over the observed entries, relative to theirs
    converged: Tensor  # [...] bool: root(rank) times that is below tol


def optspace(matrix: Tensor, rank: int, *, tol: float = 1e-6, max_iter: int = 50, seed: int = 0) -> OptSpaceResult:
    """Completes [..., m, n] matrices of the given rank; NaN is missing.

    Args:
        matrix: float32 or float64; computed in float64.
        rank: 1 to min(m, n).
        tol: root(rank) times the residual at which it stops.
        max_iter: gradient steps, each with a line search of up to 20 halvings.
        seed: of the entries that rows and columns with more than twice the mean number lose for the first SVD.

    Raises ValueError for infinite entries and ranks out of range. A matrix without entries, or of zeros, gives zeros.
    """
    _checks.floats("matrix", matrix)
    if matrix.dim() < 2:
        raise ValueError(f"matrix must have shape [..., m, n], got {list(matrix.shape)}")
    m, n = matrix.shape[-2:]
    _checks.positive_int("rank", rank)
    if rank > min(m, n):
        raise ValueError(f"rank must be between 1 and min(m, n) = {min(m, n)}, got {rank}")
    _checks.positive("tol", tol)
    _checks.positive_int("max_iter", max_iter)
    _checks.natural("seed", seed)
    _checks.finite_or_nan("matrix", matrix)
    lead = matrix.shape[:-2]
    flat = matrix.detach().double().reshape(lead.numel(), m, n)
    with torch.no_grad():
        low_rank, iterations, residual = _completed(flat, rank, tol, max_iter, seed)
    return OptSpaceResult(
        low_rank.to(matrix.dtype).view(matrix.shape),
        iterations.view(lead),
        residual.view(lead),
        (residual * rank**0.5 < tol).view(lead),
    )


def _completed(matrix: Tensor, rank: int, tol: float, max_iter: int, seed: int):
    batch, m, n = matrix.shape
    observed = ~matrix.isnan()
    count = observed.sum((-2, -1)).double()
    data = torch.where(observed, matrix, 0)
    norm = torch.linalg.vector_norm(data, dim=(-2, -1))
    rescale = torch.where(norm > 0, (count * rank).sqrt() / norm.clamp(min=1e-300), 1.0)
    data = data * rescale[:, None, None]

    u, _, vh = torch.linalg.svd(torch.where(_trimmed(observed, seed), data, 0), full_matrices=False)
    x, y = m**0.5 * u[..., :rank], n**0.5 * vh.mT[..., :rank]
    s = _middle(data, observed, x, y)

    def misfit(x, y, s):
        return torch.where(observed, x @ s @ y.mT - data, 0)

    iterations = torch.zeros(batch, dtype=torch.int64, device=matrix.device)
    residual = misfit(x, y, s)
    root_count = count.sqrt().clamp(min=1)
    for _ in range(max_iter):
        cost = residual.square().sum((-2, -1))
        running = cost.sqrt() / root_count >= tol
        if not running.any():
            break
        to_x, to_y = residual @ y @ s.mT, residual.mT @ x @ s
        to_x = to_x - x @ (x.mT @ to_x) / m  # along the manifold of column spaces
        to_y = to_y - y @ (y.mT @ to_y) / n
        slope = to_x.square().sum((-2, -1)) + to_y.square().sum((-2, -1))
        step = torch.where(running, FIRST_STEP, 0.0).double()
        for _ in range(HALVINGS):
            t = step[:, None, None]
            moved = misfit(x - t * to_x, y - t * to_y, s).square().sum((-2, -1))
            short = (moved - cost) / 2 <= -step / 2 * slope
            if (short | ~running).all():
                break
            step = torch.where(short, step, step / 2)
        t = step[:, None, None]
        x, y = x - t * to_x, y - t * to_y
        s = torch.where(running[:, None, None], _middle(data, observed, x, y), s)
        residual = misfit(x, y, s)
        iterations += running
    rescale = torch.where(norm > 0, rescale, 1.0)[:, None, None]
    # the rescaled entries have root mean square root(rank)
    relative = torch.linalg.vector_norm(residual, dim=(-2, -1)) / root_count / rank**0.5
    return x @ s @ y.mT / rescale, iterations, relative


def _middle(data: Tensor, observed: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The [rank, rank] S of the least |X S Y^T - data| over the observed entries."""
    batch, rank = len(x), x.shape[-1]
    seen = observed.to(x)
    pairs_x = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)  # [B, m, rank^2]
    pairs_y = (y.unsqueeze(-1) * y.unsqueeze(-2)).flatten(-2)
    normal = (pairs_x.mT @ seen @ pairs_y).view(batch, rank, rank, rank, rank)  # [p, q, s, t] of x_p x_q y_s y_t
    normal = normal.permute(0, 1, 3, 2, 4).reshape(batch, rank**2, rank**2)
    right = (x.mT @ data @ y).reshape(batch, rank**2, 1)
    # singular where there are few entries: the smallest solution then
    return (torch.linalg.pinv(normal, hermitian=True, rtol=1e-12) @ right).view(batch, rank, rank)


def _trimmed(observed: Tensor, seed: int) -> Tensor:
    """Columns, then rows, with more than twice their mean number of entries lose a random surplus."""
    if observed.numel() == 0:
        return observed
    generator = torch.Generator().manual_seed(seed)
    for dim in (-2, -1):
        limit = 2 * observed.sum((-2, -1), keepdim=True) / observed.shape[-3 - dim]
        if not (observed.sum(dim, keepdim=True) > limit).any():
            continue
        draw = torch.rand(observed.shape, generator=generator).to(observed.device)
        place = torch.where(observed, draw, 2.0).argsort(dim).argsort(dim)
        observed = observed & (place < limit.ceil())
    return observed


# ---- non-convex robust PCA ----


class NcRPCAResult(NamedTuple):
    low_rank: Tensor  # [..., m, n]
    sparse: Tensor  # [..., m, n], no entry between 0 and 1e-3
    iterations: Tensor  # [...] int64
    residual: Tensor  # [...] float64, |M - L - S| / |M|
    converged: Tensor  # [...] bool: below 1e-3


def ncrpca(matrix: Tensor, rank: int, *, skew: bool = False) -> NcRPCAResult:
    """[..., m, n] float32 or float64, nothing missing -> M = L + S, L of the given rank.

    skew: M = -M^T. The rank starts at 2 and grows by even steps, since singular values come in pairs, and L and S stay
        skew; it must be even. Otherwise it starts at 1.

    Raises ValueError for entries that are not finite, ranks out of range, and skew with an odd rank or of a matrix that
        is not M = -M^T.
    """
    _checks.floats("matrix", matrix)
    if matrix.dim() < 2:
        raise ValueError(f"matrix must have shape [..., m, n], got {list(matrix.shape)}")
    m, n = matrix.shape[-2:]
    _checks.positive_int("rank", rank)
    if rank > min(m, n) or (skew and (rank % 2 or m != n)):
        wanted = "even, of a square matrix, and " if skew else ""
        raise ValueError(f"rank must be {wanted}at most min(m, n), got {rank} for shape {list(matrix.shape)}")
    if not matrix.isfinite().all():
        where = (~matrix.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"matrix must be finite and complete, got {matrix[tuple(where)].item()} at {where}")
    if skew and matrix.numel():
        off, largest = float((matrix.double() + matrix.double().mT).abs().max()), float(matrix.abs().max())
        if off > max(4 * torch.finfo(matrix.dtype).eps, 1e-6) * largest:
            raise ValueError(f"matrix must be M = -M^T for skew=True, got M + M^T up to {off:.3g}")
    lead = matrix.shape[:-2]
    data = matrix.detach().double().reshape(lead.numel(), m, n)
    low_rank, sparse, iterations, error = _alternating(data, rank, skew)
    return NcRPCAResult(
        low_rank.to(matrix.dtype).view(matrix.shape),
        sparse.to(matrix.dtype).view(matrix.shape),
        iterations.view(lead),
        error.view(lead),
        (error < STOP).view(lead),
    )


def _alternating(data: Tensor, rank: int, skew: bool):
    batch, m, n = data.shape
    like = {"dtype": torch.float64, "device": data.device}
    norm = torch.linalg.vector_norm(data, dim=(-2, -1))
    size = torch.where(norm > 0, norm, 1.0)
    now = torch.full((batch,), 2 if skew else 1, device=data.device)  # rank of this stage
    factor = torch.ones(batch, **like)
    last = torch.full((batch,), torch.inf, **like)
    top = torch.linalg.matrix_norm(data, 2) if data.numel() else norm
    support = data.abs() > (top / max(n, 1) ** 0.5)[:, None, None]
    sparse = torch.where(support, data, 0)
    low_rank = torch.zeros_like(data)
    error = torch.where(norm > 0, 1.0, 0.0).double()
    iterations = torch.zeros(batch, dtype=torch.int64, device=data.device)
    index = torch.arange(min(m, n), device=data.device)
    for _ in range(MAX_ITER):
        run = (error >= STOP).nonzero().flatten()
        if not len(run):
            break
        given, stage = data[run], now[run]
        u, s, vh = torch.linalg.svd(given - sparse[run], full_matrices=False)
        fitted = (u * (s * (index < stage[:, None])).unsqueeze(-2)) @ vh
        if skew:
            fitted = (fitted - fitted.mT) / 2  # against rounding
        beyond = torch.cat([s, s.new_zeros(len(run), 1)], 1).gather(1, stage[:, None])
        zeta = factor[run] * beyond.squeeze(1) / n**0.5
        support[run] |= (given - fitted).abs() > zeta[:, None, None]
        low_rank[run] = fitted
        sparse[run] = torch.where(support[run], given - fitted, 0)
        miss = torch.linalg.vector_norm(given - fitted - sparse[run], dim=(-2, -1))
        stalled = (last[run] - miss) / last[run] <= STALLED  # not in the first round: inf / inf
        grow = stalled & (stage < rank)
        if grow.any():
            now[run] = torch.where(grow, _next_rank(given - sparse[run], stage, rank, skew), stage)
        factor[run] = torch.where(stalled & ~grow, SHRINK * factor[run], factor[run])
        last[run] = miss
        error[run] = miss / size[run]
        iterations[run] += 1
    return low_rank, torch.where(sparse.abs() < SMALLEST, 0, sparse), iterations, error


def _next_rank(data: Tensor, stage: Tensor, rank: int, skew: bool) -> Tensor:
    """Where the singular values beyond the stage's fall most, up to `rank`; the last of them counts as a fall of 1."""
    s = torch.linalg.svdvals(data)[:, :rank].clamp(min=1e-300)
    falls = torch.cat([s[:, :-1] / s[:, 1:], s.new_ones(len(s), 1)], 1)
    place = torch.arange(1, rank + 1, device=data.device)
    allowed = place > stage[:, None]
    if skew:
        allowed &= place % 2 == 0
    return place[torch.where(allowed, falls, -1.0).argmax(1)]
