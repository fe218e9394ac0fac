"""Fixed-rank robust PCA of many small matrices at once: annealed M-estimation, each matrix stopping on its own.

Cauchy's weights with a cutoff that shrinks geometrically, from the largest entry down to the noise (three times the
normalised median residual), around scaled gradient steps on the factors of L = left right^T (Tong, Ma, Chi 2021, for
the steps): an entry that L cannot explain loses its say, however large it is. A missing entry is NaN.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import _library, _native

MAD = 1.4826  # of a normal distribution: standard deviation / median |x|
STEP = 0.7  # of the scaled gradient
CUTOFF = 3.0  # of Cauchy's weights, in standard deviations of the noise
FINEST = 1e-9  # of mean |D|: the smallest cutoff
CLIP = 3.0  # of mean |D|: larger entries are clipped for the start
AWAY = 10.0  # relative change of a factor at which steps, scaled up for missing entries, lead away: too little observed
BLIND = 5  # iterations before the median counts as noise
SLOW, QUICK = 0.9, 0.8  # the cutoff per iteration
MISFIT = 0.5  # share of outliers in a row or column from which the fit itself may be wrong there
OUTLIER = 5.0  # standard deviations of the noise
EXACT = 1e-4  # of mean |D|: no smaller residual is an outlier
_RIDGE = 1e-10  # of the trace of a factor's Gram matrix


class BatchSolve(NamedTuple):
    left: Tensor  # [B, m, r]
    right: Tensor  # [B, n, r]
    iterations: Tensor  # [B] int64
    median: Tensor  # [B] median |R| over the observed entries
    converged: Tensor  # [B] bool


def shrinkage(observed_share: float) -> tuple[float, float]:
    """The cutoff's factor per iteration, and the other one, for a matrix that the first leaves unexplained."""
    return (SLOW, QUICK) if observed_share < 0.9 else (QUICK, SLOW)


def outlier_bound(median, mean):
    """The |R| beyond which an entry is an outlier; floats or tensors."""
    noise, least = OUTLIER * MAD * median, EXACT * mean
    return torch.maximum(noise, least) if isinstance(noise, Tensor) else max(noise, least)


def explains(median, mean, tol: float):
    """A median residual of rounding's size says that the matrix is explained, outliers apart."""
    return median <= 10 * tol * mean


def inverse_gram(factor: Tensor) -> Tensor:
    """(factor^T factor)^-1 [..., r, r] with a ridge, in factor's dtype; zero where factor is."""
    wide = factor.double()
    return inverse(wide.mT @ wide).to(factor.dtype)


def inverse(gram: Tensor) -> Tensor:
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    size = torch.where(trace > 0, trace, 1.0)
    ridge = torch.diag_embed((_RIDGE * size).unsqueeze(-1).expand(gram.shape[:-1]))
    return torch.linalg.inv(gram + ridge) * (trace > 0)[..., None, None]


def _directions(matrix: Tensor, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(matrix.shape[-1], rank, generator=generator, dtype=torch.float64).to(matrix)


def start(matrix: Tensor, observed: Tensor, rank: int, skew: bool) -> tuple[Tensor, Tensor]:
    """Factors of the clipped matrix, missing entries 0 and the rest scaled up for them, by three block power steps."""
    count = observed.sum((-2, -1)).clamp(min=1)
    clean = torch.where(observed, matrix, 0)
    bound = (CLIP * clean.abs().sum((-2, -1)) / count)[:, None, None]
    clipped = clean.clamp(-bound, bound) * (matrix.shape[-2] * matrix.shape[-1] / count)[:, None, None]
    q = _directions(matrix, rank).expand(len(matrix), -1, -1)
    for _ in range(3):
        p = torch.linalg.qr(clipped @ q).Q
        q = torch.linalg.qr(clipped.mT @ p).Q
    if skew:
        return q, q @ (q.mT @ clipped @ q).mT
    return clipped @ q, q.clone()


def batched_annealed_ref(matrix: Tensor, rank: int, skew: bool, gamma: Tensor, tol: float, max_iter: int, warm=None):
    """[B, m, n] float32 or float64, gamma [B] -> BatchSolve, in batched PyTorch."""
    observed = ~matrix.isnan()
    clean = torch.where(observed, matrix, 0)
    count = observed.sum((-2, -1))
    share = (count / max(matrix.shape[-2] * matrix.shape[-1], 1)).to(matrix.dtype).clamp(min=1e-30)
    mean = clean.abs().sum((-2, -1)) / count.clamp(min=1)
    norm = torch.linalg.vector_norm(clean, dim=(-2, -1))
    left, right = start(matrix, observed, rank, skew) if warm is None else warm
    left, right = left.clone(), right.clone()
    if skew:  # right = left core stays so under scaled steps, and keeps the product skew
        core = torch.linalg.lstsq(left.double(), right.double()).solution
        core = ((core - core.mT) / 2).to(matrix.dtype)
        right = left @ core
    cutoff = clean.abs().amax((-2, -1)) if warm is None else CUTOFF * MAD * median_of(clean - left @ right.mT, observed)
    cutoff = torch.maximum(cutoff, FINEST * mean)
    iterations = torch.zeros(len(matrix), dtype=torch.int64, device=matrix.device)
    quiet = torch.zeros_like(iterations)
    running = (count > 0) & (norm > 0)
    converged = ~running & (count > 0)
    lost = torch.zeros_like(running)
    for iteration in range(max_iter):
        if not running.any():
            break
        residual = torch.where(observed, clean - left @ right.mT, 0)
        e = residual / (1 + (residual / cutoff[:, None, None].clamp(min=1e-300)) ** 2)
        size = (STEP / share * running)[:, None, None]
        left_step = size * (e @ right @ inverse_gram(right))
        change = torch.linalg.vector_norm(left_step, dim=(-2, -1)) / _norm(left)
        if skew:
            left = left + left_step
            right = left @ core
        else:
            right_step = size * (e.mT @ left @ inverse_gram(left))
            change = torch.maximum(change, torch.linalg.vector_norm(right_step, dim=(-2, -1)) / _norm(right))
            left, right = left + left_step, right + right_step
        iterations += running
        following = torch.maximum(gamma.to(cutoff) * cutoff, FINEST * mean)
        if iteration >= BLIND:
            following = torch.maximum(following, CUTOFF * MAD * median_of(residual, observed))
        cutoff = torch.where(running, following, cutoff)
        quiet = torch.where(change < tol, quiet + 1, 0)
        lost |= running & ~(change < AWAY)
        running &= ~lost
        done = (torch.linalg.vector_norm(e, dim=(-2, -1)) < tol * norm) | (quiet >= 3)
        converged |= running & done
        running &= ~done
    median = median_of(clean - left @ right.mT, observed)
    lost |= ~(median <= 2 * clean.abs().amax((-2, -1)))
    left, right = (factor.masked_fill(lost[:, None, None], 0) for factor in (left, right))
    median = torch.where(lost, median_of(clean, observed), median)
    converged &= ~lost
    return BatchSolve(left, right, iterations, median, converged)


def _norm(factor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(factor, dim=(-2, -1)).clamp(min=1e-300 if factor.dtype == torch.float64 else 1e-30)


def median_of(residual: Tensor, observed: Tensor) -> Tensor:
    return torch.where(observed, residual.abs(), torch.nan).flatten(1).nanmedian(-1).values.nan_to_num(0.0)


def _native_solve(matrix: Tensor, rank: int, skew: bool, gamma: Tensor, tol: float, max_iter: int, warm) -> BatchSolve:
    batch, m, n = matrix.shape
    matrix = matrix.contiguous()
    core, threads, double = _native._core, torch.get_num_threads(), matrix.dtype == torch.float64
    if warm is None:
        left, right = matrix.new_empty(batch, m, rank), matrix.new_empty(batch, n, rank)
    else:
        left, right = (factor.clone(memory_format=torch.contiguous_format) for factor in warm)
    iterations, converged = torch.empty(batch, dtype=torch.int64), torch.empty(batch, dtype=torch.bool)
    median, gamma = torch.empty(batch, dtype=torch.float64), gamma.double().contiguous()
    directions = _directions(matrix, rank).contiguous()
    workspace = torch.empty(threads * core.batched_rpca_workspace(m, n, rank, double) + 64, dtype=torch.uint8)
    core.batched_rpca_cpu(
        matrix.data_ptr(),
        double,
        skew,
        warm is not None,
        batch,
        m,
        n,
        rank,
        directions.data_ptr(),
        gamma.data_ptr(),
        tol,
        max_iter,
        left.data_ptr(),
        right.data_ptr(),
        iterations.data_ptr(),
        median.data_ptr(),
        converged.data_ptr(),
        (workspace.data_ptr() + 63) // 64 * 64,
        threads,
    )
    return BatchSolve(left, right, iterations, median.to(matrix.dtype), converged)


_library.OPS["batched_rpca"] = {
    "native": _library.native_cpu_reason,
    "reference": _library.reference_reason,
}


def _solve(matrix: Tensor, rank: int, skew: bool, gamma: Tensor, tol: float, max_iter: int, warm, backend: str):
    backend = _library.choose_backend("batched_rpca", backend, matrix.device.type)
    if backend == "native" and matrix.numel() and rank:
        return _native_solve(matrix, rank, skew, gamma, tol, max_iter, warm)
    return batched_annealed_ref(matrix, rank, skew, gamma, tol, max_iter, warm)


def _outliers(matrix: Tensor, found: BatchSolve, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Share of outliers [B], and the largest share in a row or column [B]."""
    far = (matrix - found.left @ found.right.mT).abs() > outlier_bound(found.median, mean)[:, None, None]
    seen = ~matrix.isnan()
    lines = [(far.sum(dim) / seen.sum(dim).clamp(min=1)).amax(-1) for dim in (-1, -2)]
    return far.sum((-2, -1)) / seen.sum((-2, -1)).clamp(min=1), torch.maximum(*lines)


def batched_annealed(
    matrix: Tensor,
    rank: int,
    *,
    skew: bool,
    tol: float,
    max_iter: int,
    warm: tuple[Tensor, Tensor] | None = None,
    backend: str = "",
) -> BatchSolve:
    """[B, m, n] -> BatchSolve: with the cutoff shrinking slowly where much is missing, quickly elsewhere; matrices that
    are left unexplained are tried again the other way, and keep the fit with the smaller median residual."""
    observed = ~matrix.isnan()
    count = observed.sum((-2, -1))
    share = count / max(matrix.shape[-2] * matrix.shape[-1], 1)
    mean = torch.where(observed, matrix, 0).abs().sum((-2, -1)) / count.clamp(min=1)
    gamma = torch.where(share < 0.9, SLOW, QUICK)
    found = _solve(matrix, rank, skew, gamma, tol, max_iter, warm, backend)
    rate, worst = _outliers(matrix, found, mean)
    again = (~explains(found.median, mean, tol) | (worst > MISFIT)).nonzero().flatten()
    if len(again) and warm is None:
        other = torch.where(share[again] < 0.9, QUICK, SLOW)
        retry = _solve(matrix[again], rank, skew, other, tol, max_iter, None, backend)
        old, size = found.median[again], mean[again]
        closer, fewer = retry.median < 0.99 * old, _outliers(matrix[again], retry, size)[0] < rate[again]
        better = torch.where(explains(retry.median, size, tol) & explains(old, size, tol), fewer, closer)
        for old, new in zip(found[:2] + found[3:], retry[:2] + retry[3:], strict=True):
            old[again[better]] = new[better]
        found.iterations[again] += retry.iterations
    return found
