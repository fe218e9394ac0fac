"""OptSpace: completion of a low-rank matrix from some of its entries, without corruptions.

Keshavan, Montanari, Oh, "Matrix Completion from a Few Entries", IEEE Trans. Inf. Theory 2010, arXiv:0901.3150, with the
constants of the authors' MATLAB code: an SVD of the trimmed, rescaled matrix, then gradient descent on the column
spaces X, Y of L = X S Y^T with S refitted after every step. The first step of CURATRON (`preference_matrix.denoise`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import _checks

FIRST_STEP, HALVINGS = 0.1, 20  # of the line search


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
        low_rank, iterations, residual = _complete(flat, rank, tol, max_iter, seed)
    return OptSpaceResult(
        low_rank.to(matrix.dtype).view(matrix.shape),
        iterations.view(lead),
        residual.view(lead),
        (residual * rank**0.5 < tol).view(lead),
    )


def _complete(matrix: Tensor, rank: int, tol: float, max_iter: int, seed: int):
    batch, m, n = matrix.shape
    observed = ~matrix.isnan()
    count = observed.sum((-2, -1)).double()
    data = torch.where(observed, matrix, 0)
    norm = torch.linalg.vector_norm(data, dim=(-2, -1))
    rescale = torch.where(norm > 0, (count * rank).sqrt() / norm.clamp(min=1e-300), 1.0)
    data = data * rescale[:, None, None]

    u, _, vh = torch.linalg.svd(torch.where(_trimmed(observed, seed), data, 0), full_matrices=False)
    x, y = m**0.5 * u[..., :rank], n**0.5 * vh.mT[..., :rank]
    s = _core(data, observed, x, y)

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
        s = torch.where(running[:, None, None], _core(data, observed, x, y), s)
        residual = misfit(x, y, s)
        iterations += running
    unit = torch.where(norm > 0, rescale, 1.0)[:, None, None]
    # the rescaled entries have root mean square root(rank)
    relative = torch.linalg.vector_norm(residual, dim=(-2, -1)) / root_count / rank**0.5
    return x @ s @ y.mT / unit, iterations, relative


def _core(data: Tensor, observed: Tensor, x: Tensor, y: Tensor) -> Tensor:
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
