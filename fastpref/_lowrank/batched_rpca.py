"""Fixed-rank robust PCA of many small matrices at once: annealed M-estimation, each matrix stopping on its own.

The solver is `annealing`'s. The native kernel (csrc/cpu/batched_rpca.cpp) solves a matrix whole, in cache: floor, one
read of the batch and one write of its factors. A missing entry is NaN.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import _library, _native
from fastpref._lowrank.annealing import (
    AWAY,
    BLIND,
    CLIP,
    COMPLETE,
    CUTOFF,
    FINEST,
    TRIES,
    Schedule,
    inverse_gram,
    schedules,
)
from fastpref._lowrank.batched_verdict import BatchVerdict, batched_verdict
from fastpref._lowrank.noise import MAD, MISFIT, Fit, explains, is_better


class BatchSolve(NamedTuple):
    left: Tensor  # [B, m, r]
    right: Tensor  # [B, n, r]
    iterations: Tensor  # [B] int64
    median: Tensor  # [B] median |R| over the observed entries
    converged: Tensor  # [B] bool


def _directions(matrix: Tensor, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(matrix.shape[-1], rank, generator=generator, dtype=torch.float64).to(matrix)


def start_factors(matrix: Tensor, observed: Tensor, rank: int, skew: bool) -> tuple[Tensor, Tensor]:
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


def batched_annealed_ref(matrix: Tensor, rank: int, skew: bool, attempt: int, tol: float, max_iter: int, warm=None):
    """[B, m, n] float32 or float64 -> BatchSolve, in batched PyTorch."""
    observed = ~matrix.isnan()
    clean = torch.where(observed, matrix, 0)
    count = observed.sum((-2, -1))
    share = (count / max(matrix.shape[-2] * matrix.shape[-1], 1)).to(matrix.dtype).clamp(min=1e-30)
    full_rank = rank == min(matrix.shape[1:])
    chosen = [schedules(little_missing, full_rank)[-1 if full_rank else attempt] for little_missing in (False, True)]
    schedule = Schedule(*matrix.new_tensor(chosen)[(share >= COMPLETE).long()].unbind(-1))  # of tensors, [B] each
    mean = clean.abs().sum((-2, -1)) / count.clamp(min=1)
    norm = torch.linalg.vector_norm(clean, dim=(-2, -1))
    left, right = start_factors(matrix, observed, rank, skew)
    if warm is not None and rank:  # unless that is nothing, from which no step leads away
        something = (warm[0].abs().amax((-2, -1)) > 0)[:, None, None]
        left, right = (torch.where(something, own, cold) for own, cold in zip(warm, (left, right), strict=True))
    if skew:  # right = left core stays so under scaled steps, and keeps the product skew
        core = torch.linalg.lstsq(left.double(), right.double()).solution
        core = ((core - core.mT) / 2).to(matrix.dtype)
        right = left @ core
    residual = torch.where(observed, clean - left @ right.mT, 0)
    if warm is None:
        cutoff = torch.minimum(
            clean.abs().amax((-2, -1)), schedule.first * residual.abs().sum((-2, -1)) / count.clamp(min=1)
        )
    elif chosen[0].again:
        cutoff = residual.abs().amax((-2, -1))
    else:
        cutoff = CUTOFF * MAD * median_of(residual, observed)
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
        e = residual / (1 + (residual / cutoff[:, None, None].clamp(min=torch.finfo(matrix.dtype).tiny)) ** 2)
        size = (schedule.step / share * running)[:, None, None]
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
        following = torch.maximum(schedule.decay * cutoff, FINEST * mean)
        if iteration >= BLIND:
            following = torch.maximum(following, CUTOFF * MAD * median_of(residual, observed))
        cutoff = torch.where(running, following, cutoff)
        quiet = torch.where(change < tol, quiet + 1, 0)
        lost |= running & ~(change < AWAY)
        running &= ~lost
        done = (torch.linalg.vector_norm(e, dim=(-2, -1)) < tol * mean * count.sqrt()) | (quiet >= 3)
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


def _native_solve(matrix: Tensor, rank: int, skew: bool, attempt: int, tol: float, max_iter: int, warm) -> BatchSolve:
    batch, m, n = matrix.shape
    matrix = matrix.contiguous()
    core, threads, double = _native._core, min(torch.get_num_threads(), batch), matrix.dtype == torch.float64
    if warm is None:
        left, right = matrix.new_empty(batch, m, rank), matrix.new_empty(batch, n, rank)
    else:
        left, right = (factor.clone(memory_format=torch.contiguous_format) for factor in warm)
    iterations, converged = torch.empty(batch, dtype=torch.int64), torch.empty(batch, dtype=torch.bool)
    median = torch.empty(batch, dtype=torch.float64)
    directions = _directions(matrix, rank).contiguous()
    workspace = torch.empty(threads * core.batched_rpca_workspace(m, n, rank, double), dtype=torch.uint8)
    core.batched_rpca_cpu(
        matrix.data_ptr(),
        double,
        skew,
        warm is not None,
        attempt,
        batch,
        m,
        n,
        rank,
        directions.data_ptr(),
        tol,
        max_iter,
        left.data_ptr(),
        right.data_ptr(),
        iterations.data_ptr(),
        median.data_ptr(),
        converged.data_ptr(),
        workspace.data_ptr(),
        threads,
    )
    return BatchSolve(left, right, iterations, median.to(matrix.dtype), converged)


_library.OPS["batched_rpca"] = {
    "native": _library.native_cpu_reason,
    "reference": _library.reference_reason,
}


def _solve_attempt(matrix: Tensor, rank: int, skew: bool, attempt: int, tol: float, max_iter: int, warm, backend: str):
    backend = _library.choose_backend("batched_rpca", backend, _native.device_kind(matrix))
    if backend == "native" and matrix.numel() and rank:
        return _native_solve(matrix, rank, skew, attempt, tol, max_iter, warm)
    return batched_annealed_ref(matrix, rank, skew, attempt, tol, max_iter, warm)


def batched_annealed(
    matrix: Tensor,
    rank: int,
    *,
    skew: bool,
    tol: float,
    max_iter: int,
    warm: tuple[Tensor, Tensor] | None = None,
    backend: str = "",
) -> tuple[BatchSolve, BatchVerdict]:
    """[B, m, n], with the cutoff shrinking slowly where much is missing, quickly elsewhere; matrices that are left
    unexplained are tried again by other schedules, and keep the fit with the smaller median residual."""

    full_rank = rank == min(matrix.shape[1:])

    def tried(matrix, attempt, budget, warm=None):
        fit = _solve_attempt(matrix, rank, skew, attempt, tol, budget, warm, backend)
        return fit, batched_verdict(matrix, fit.left, fit.right, fit.median, backend)

    tries = 1 if full_rank or warm is not None or not rank else TRIES
    orders = [schedules(little_missing, full_rank) for little_missing in (False, True)]

    def share(attempt):
        return 1.0 if attempt == tries - 1 else max(order[attempt].most for order in orders)

    fit, verdict = tried(matrix, 0, math.ceil(share(0) * max_iter), warm)
    unexplained = ~explains(fit.median, verdict.mean, tol) | (verdict.worst > MISFIT)
    for attempt in range(1, tries):
        again = (unexplained & (fit.iterations < max_iter)).nonzero().flatten()
        if not len(again):
            break
        budget = math.ceil(share(attempt) * (max_iter - int(fit.iterations[again].max())))
        found = (fit.left[again], fit.right[again]) if orders[0][attempt].again else None
        retry, second = tried(matrix[again], attempt, budget, found)
        new = Fit(retry.median, second.rate, explains(retry.median, second.mean, tol))
        old = Fit(fit.median[again], verdict.rate[again], explains(fit.median[again], second.mean, tol))
        better, same = is_better(new, old)
        unexplained[again] = ~(new.explained | same & retry.converged) | (second.worst > MISFIT)
        for kept, other in zip((*fit, *verdict), (*retry, *second), strict=True):
            if kept is not fit.iterations:
                kept[again[better]] = other[better]
        fit.iterations[again] += retry.iterations
    return fit, verdict
