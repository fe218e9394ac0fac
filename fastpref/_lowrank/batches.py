"""Robust PCA of a batch of small matrices: which solver it goes to, and the result of all of them.

With a rank they are annealed (`batched_rpca`). Without one the convex program (`batched_ialm`) finds the ranks, and
where noise shrinks L, or for a skew structure, a fit of the rank it found takes its place.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref._lowrank import ialm
from fastpref._lowrank.batched_ialm import batched_ialm, is_small
from fastpref._lowrank.batched_rpca import batched_annealed
from fastpref._lowrank.batched_verdict import BatchVerdict, batched_verdict
from fastpref._lowrank.determined import batch_parts, everything
from fastpref._lowrank.noise import MAD, outlier_bound
from fastpref._lowrank.result import RPCAInfo, RPCAResult, SparseCOO, check_size, condition_number


class BatchFit(NamedTuple):
    left: Tensor  # [B, m, r], zero beyond a matrix's own rank
    right: Tensor  # [B, n, r]
    rank: Tensor  # [B]
    iterations: Tensor
    converged: Tensor
    median: Tensor  # of |R|
    gap: Tensor


def fixed_rank_batch(
    matrix: Tensor, rank: int, *, skew: bool, tol: float, max_iter: int, warm, sparse: str, backend: str
) -> RPCAResult:
    """[..., m, n] float32 or float64; warm factors are [..., m, rank] and [..., n, rank], or None."""
    m, n = matrix.shape[-2:]
    flat = matrix.reshape(matrix.shape[:-2].numel(), m, n)
    if warm is not None:
        left, right = warm
        warm = left.reshape(-1, m, rank).to(matrix), right.reshape(-1, n, rank).to(matrix)
    found, verdict = batched_annealed(flat, rank, skew=skew, tol=tol, max_iter=max_iter, warm=warm, backend=backend)
    if not verdict.mean.isfinite().all():  # the kernels read every entry, and stop at once at such a one
        check_finite(matrix)
    ranks = torch.full_like(found.iterations, rank)
    gap = torch.full(ranks.shape, torch.nan, dtype=torch.float64, device=ranks.device)
    fit = BatchFit(found.left, found.right, ranks, found.iterations, found.converged, found.median, gap)
    return _batch_result(matrix, fit, verdict, skew, sparse)


def rank_free_batch(
    matrix: Tensor, *, skew: bool, lam: float | None, tol: float, max_iter: int, sparse: str, backend: str
) -> RPCAResult:
    """[..., m, n] float32 or float64, finite, NaN missing."""
    flat = matrix.reshape(matrix.shape[:-2].numel(), *matrix.shape[-2:])
    if not backend and not is_small(*flat.shape[1:]):
        backend = "reference"
    found = batched_ialm(flat, lam=lam, tol=tol, max_iter=max_iter, backend=backend)
    root = found.S.sqrt().unsqueeze(-2)
    left, right = found.U * root, found.Vh.mT * root
    rank, iterations, converged, median = (
        tensor.clone() for tensor in (found.rank, found.iterations, found.converged, found.median)
    )
    noisy = found.dense_share > ialm.NOISY
    for b in noisy.nonzero().flatten().tolist():
        rank[b] = ialm.rank_by_gap(found.S[b])
    if skew:
        rank += rank % 2
    keep = torch.arange(left.shape[-1], device=left.device) < rank.unsqueeze(-1)
    left, right = left * keep.unsqueeze(-2), right * keep.unsqueeze(-2)
    for r in (rank[noisy | skew]).unique().tolist():  # fits of the rank that was found, without the shrinkage
        part = ((noisy | skew) & (rank == r)).nonzero().flatten()
        if r == 0 or r > left.shape[-1]:
            continue
        warm = None
        if skew and not noisy[part].any():
            warm = left[part, :, :r], right[part, :, :r]
        part = part[iterations[part] < max_iter]
        if not len(part):
            continue
        fit, _ = batched_annealed(flat[part], r, skew=skew, tol=tol, max_iter=300, warm=warm, backend=backend)
        left[part], right[part] = left[part] * 0, right[part] * 0
        left[part, :, :r], right[part, :, :r] = fit.left, fit.right
        iterations[part] += fit.iterations
        converged[part] &= fit.converged
        median[part] = fit.median
    fit = BatchFit(left, right, rank, iterations, converged, median, found.gap)
    return _batch_result(matrix, fit, batched_verdict(flat, left, right, median, backend), skew, sparse)


def batch_units(matrix: Tensor) -> Tensor | None:
    """Powers of two [...] of the sizes of matrices whose squares leave the dtype, 1 for others; None: no such one."""
    limit = torch.finfo(matrix.dtype).max ** 0.25
    top = matrix.detach().abs().nan_to_num(nan=0.0, posinf=0.0).amax((-2, -1)).double()
    far = (top > limit) | ((top < 1 / limit) & (top > 0))
    if not far.any():
        return None
    most = 126 if matrix.dtype == torch.float32 else 1022  # they and their inverses are numbers of the dtype, too
    return torch.where(far, torch.exp2(torch.frexp(top).exponent.clamp(-most, most).double()), 1.0).to(matrix.dtype)


def in_units(result: RPCAResult, units: Tensor) -> RPCAResult:
    """The result of matrices that were divided by units [...]."""
    s, sparse, info = result.S * units.unsqueeze(-1), result.sparse, result.info
    check_size(s, float(units.amax()))
    if isinstance(sparse, SparseCOO):
        sparse = sparse._replace(values=sparse.values * units[tuple(sparse.indices[:, :-2].T)])
    elif sparse is not None:
        sparse = sparse * units[..., None, None]
    info = info._replace(scale=info.scale * units, bound=info.bound * units)
    return RPCAResult(result.U, s, result.Vh, sparse, info)


def check_finite(matrix: Tensor) -> None:
    infinite = matrix.isinf().nonzero()
    if len(infinite):
        where = infinite[0].tolist()
        raise ValueError(f"matrix must be finite (NaN: missing), got {matrix[tuple(where)].item()} at {where}")


def _batch_result(matrix: Tensor, found: BatchFit, verdict: BatchVerdict, skew: bool, sparse: str) -> RPCAResult:
    *lead, m, n = matrix.shape
    rank = found.left.shape[-1]
    s = verdict.S * (torch.arange(rank, device=matrix.device) < found.rank.unsqueeze(-1))
    parts, bound = everything(matrix), torch.full(lead, torch.inf, dtype=torch.float64, device=matrix.device)
    if matrix.numel():
        flat = matrix.reshape(-1, m, n)
        if flat.isnan().any():
            parts = batch_parts(flat, found.rank, skew)
        if (lost := ~found.converged).any():
            bound.view(-1)[lost] = flat[lost].abs().nan_to_num(nan=0.0).amax((1, 2)).double()
    info = RPCAInfo(
        rank=found.rank.view(lead),
        iterations=found.iterations.view(lead),
        residual=verdict.residual.view(lead),
        gap=found.gap.view(lead),
        converged=found.converged.view(lead),
        scale=(MAD * found.median.double()).view(lead),
        outlier_rate=verdict.rate.view(lead),
        row_outlier_rate=verdict.row_rates.view(*lead, m),
        column_outlier_rate=verdict.column_rates.view(*lead, n),
        condition=condition_number(s, found.rank).view(lead),
        row_part=parts.rows.view(*lead, m),
        column_part=parts.columns.view(*lead, n),
        bound=bound,
    )
    whole = None if sparse == "none" else _sparse_part(matrix, found, verdict, sparse)
    u, vh = verdict.U.view(*lead, m, rank), verdict.Vh.view(*lead, rank, n)
    return RPCAResult(u, s.view(*lead, rank), vh, whole, info)


def _sparse_part(matrix: Tensor, found: BatchFit, verdict: BatchVerdict, sparse: str) -> Tensor | SparseCOO:
    *lead, m, n = matrix.shape
    flat = matrix.reshape(-1, m, n) if matrix.numel() else matrix.new_empty(len(found.rank), m, n)
    bound = outlier_bound(found.median, verdict.mean.to(matrix.dtype))[:, None, None]
    dense, listed = torch.zeros_like(flat) if sparse == "dense" else None, []
    chunk = max(1, (1 << 24) // max(m * n, 1))
    for begin in range(0, len(flat), chunk):
        part = slice(begin, begin + chunk)
        residual = flat[part] - found.left[part] @ found.right[part].mT
        far = residual.abs() > bound[part]
        if dense is not None:
            dense[part] = torch.where(far, residual, 0)
        else:
            where = far.nonzero()
            listed.append((where + where.new_tensor([begin, 0, 0]), residual[far]))
    if dense is not None:
        return dense.view(matrix.shape)
    indices = torch.cat([i for i, _ in listed]) if listed else torch.empty(0, 3, dtype=torch.int64)
    if len(lead) != 1:
        indices = torch.cat([torch.stack(torch.unravel_index(indices[:, 0], lead), 1), indices[:, 1:]], 1)
    return SparseCOO(indices, torch.cat([v for _, v in listed]) if listed else flat.new_empty(0))
