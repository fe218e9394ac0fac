"""Non-convex robust PCA by alternating projections, dense and plain: the RPCA step of CURATRON as published.

Netrapalli, Niranjan, Sanghavi, Anandkumar, Jain, "Non-convex Robust PCA", NIPS 2014, arXiv:1410.7660, with the
constants of the authors' MATLAB code. `rpca` is faster, reads missing entries as missing, and needs less of the data:
this one is here for comparison with the paper.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import _checks

STOP, SMALLEST, STALLED, SHRINK, MAX_ITER = 1e-3, 1e-3, 0.1, 0.9, 51


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
    low_rank, sparse, iterations, error = _project(data, rank, skew)
    return NcRPCAResult(
        low_rank.to(matrix.dtype).view(matrix.shape),
        sparse.to(matrix.dtype).view(matrix.shape),
        iterations.view(lead),
        error.view(lead),
        (error < STOP).view(lead),
    )


def _project(data: Tensor, rank: int, skew: bool):
    batch, m, n = data.shape
    like = {"dtype": torch.float64, "device": data.device}
    norm = torch.linalg.vector_norm(data, dim=(-2, -1))
    unit = torch.where(norm > 0, norm, 1.0)
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
        error[run] = miss / unit[run]
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
