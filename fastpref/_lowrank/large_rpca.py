"""Fixed-rank robust PCA of one large matrix: each iteration one read of it, with r x r algebra around it.

L is two thin factors; nothing of the matrix's size is written. Two solvers share that read:

    altproj    accelerated alternating projections (Cai, Cai, Wei 2019, arXiv:1711.05519): hard thresholds and tangent-
               space projections; some 15 iterations, for clean and well-conditioned data
    annealed   Cauchy's weights whose cutoff shrinks from the largest entry to the noise, around scaled gradient steps
               (Tong, Ma, Chi 2021, arXiv:2005.08898); 45 to 110 iterations, for everything else
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref._lowrank.annealing import (
    AWAY,
    BLIND,
    COMPLETE,
    CUTOFF,
    FINEST,
    Schedule,
    inverse_gram,
    ridged_inverse,
    schedules,
)
from fastpref._lowrank.noise import MAD, Fit, explains, is_better
from fastpref._lowrank.one_matrix import Lines, OneMatrix, Verdict, judge_entries
from fastpref._lowrank.residual_pass import histogram_mean


class LargeSolve(NamedTuple):
    left: Tensor
    right: Tensor
    iterations: int
    converged: bool
    median: float
    stopped: bool = False  # by the callback
    verdict: Verdict | None = None  # of corrupted entries


class Stop(NamedTuple):
    """What ends a solve: its tolerance, its iterations, or the caller."""

    tol: float
    max_iter: int
    report: Callable[[float, float, int], object] | None = None  # of residual, sigma and rank; true stops

    def by_caller(self, residual: float, sigma: float, rank: int) -> bool:
        """Reports an iteration."""
        return self.report is not None and bool(self.report(residual, sigma, rank))


def _relative(step: Tensor, factor: Tensor, data: OneMatrix | None = None) -> float:
    """|step| / |factor|; with data, of rows that lie on all ranks."""
    squares = torch.stack([step.double().square().sum(), factor.double().square().sum()])
    if data is not None:
        data.sum(squares)
    return float((squares[0] / squares[1].clamp(min=1e-300)).sqrt())


def annealed(data: OneMatrix, left, right, schedule: Schedule, stop: Stop, corruption: str, warm: bool) -> LargeSolve:
    """From given factors; where they are warm the cutoff begins at their noise."""
    left, right = left.clone(), right.clone()
    skew = data.structure == "skew"
    if skew:  # right = left core stays so under scaled steps, and keeps the product skew
        core = torch.linalg.lstsq(left.double(), right.double()).solution
        core = ((core - core.mT) / 2).to(data.dtype)
        right = left @ core
    lines = None if corruption == "entries" else Lines(data, corruption)
    finest = FINEST * data.mean
    read = data.read(left, right, "identity", torch.inf, squares=lines is not None)
    if lines is not None:
        zeta = lines.largest(read)
    else:
        zeta = (
            CUTOFF * MAD * read.median
            if warm
            else min(data.max(read.max_kept).item(), schedule.first * histogram_mean(read.histogram))
        )
    zeta = max(zeta, finest)
    quiet, size = 0, schedule.step / data.share
    for iteration in range(1, stop.max_iter + 1):
        if lines is None:
            read = data.read(left, right, "cauchy", zeta)
            median = read.median
        else:
            weights, median = lines.weights(read, zeta)
            read = data.read(left, right, "identity", torch.inf, squares=True, **weights)
        residual = read.sum_squares**0.5 / data.norm
        left_step = size * (read.left @ inverse_gram(right))
        change = _relative(left_step, left, data)
        if skew:
            left += left_step
            right = left @ core
        else:
            right_step = size * (read.right @ ridged_inverse(data.gram(left)).to(data.dtype))
            change = max(change, _relative(right_step, right))
            left += left_step
            right += right_step
        zeta = max(schedule.decay * zeta, finest, CUTOFF * MAD * median if iteration > BLIND else 0.0)
        quiet = quiet + 1 if change < stop.tol else 0
        if stop.by_caller(residual, MAD * median, left.shape[1]):
            return LargeSolve(left, right, iteration, False, median, stopped=True)
        done = read.sum_squares**0.5 < stop.tol * data.typical or quiet == 3
        if done or not change < AWAY:
            break
    converged = done
    median = data.read(left, right, "cauchy", zeta).median
    if not median <= 2 * data.top:  # the steps, scaled up for missing entries, led away: too little is observed
        left, right, converged = torch.zeros_like(left), torch.zeros_like(right), False
        median = data.read(left, right, "identity", torch.inf).median
    return LargeSolve(left, right, iteration, converged, median)


def altproj(data: OneMatrix, rank: int, left, right, stop: Stop) -> LargeSolve:
    """From factors of the start; thresholds beta (s_{r+1} + gamma^t s_1), gamma = 1/2, beta = 1 / (2 (mn)^(1/4))."""
    u, s, v = data.decompose(left, right)
    beta = 0.5 / (data.total_rows * data.columns) ** 0.25
    first, zeta = s[0].item(), 4 * beta * s[0].item()
    best, worse = float("inf"), 0
    for iteration in range(1, stop.max_iter + 1):
        root = s.sqrt().clamp(min=1e-30 * max(first, 1e-30)).to(data.dtype)
        read = data.read(u * root, v * root, "hard", max(zeta, 1e-300))
        residual = read.sum_squares**0.5 / data.norm
        if stop.by_caller(residual, MAD * read.median, rank):
            return LargeSolve(u * root, v * root, iteration, False, read.median, stopped=True)
        if read.sum_squares**0.5 < stop.tol * data.typical and explains(read.median, data.mean, stop.tol):
            return LargeSolve(u * root, v * root, iteration, True, read.median)
        best, worse = (residual, 0) if residual < 0.9 * best else (best, worse + 1)
        if worse == 6:
            break
        ev, etu = (read.left / root).double(), (read.right / root).double()
        wide_u, wide_v = u.double(), v.double()
        w = data.sum(wide_u.mT @ ev)
        q1, r1 = torch.linalg.qr(etu - wide_v @ w.mT)
        outside = ev - wide_u @ w
        if data.group is None:
            q2, r2 = torch.linalg.qr(outside)
        else:
            q2 = data.orthonormal(outside)
            r2 = data.sum(q2.mT @ outside)
        zero = torch.zeros_like(w)
        middle = torch.cat([torch.cat([s.diag() + w, r1.mT], 1), torch.cat([r2, zero], 1)])
        p, sigma, qh = torch.linalg.svd(middle)
        u = (torch.cat([wide_u, q2], 1) @ p[:, :rank]).to(data.dtype)
        v = (torch.cat([wide_v, q1], 1) @ qh.mT[:, :rank]).to(data.dtype)
        s = sigma[:rank]
        zeta = beta * (sigma[rank].item() + 0.5**iteration * sigma[0].item())
        zeta = max(zeta, 10 * stop.tol * data.mean)  # no entry that is explained may pass for an outlier
    return LargeSolve(u * root, v * root, iteration, False, read.median)


def fixed_rank(data: OneMatrix, rank: int, corruption: str, method: str, stop: Stop, warm) -> LargeSolve:
    """The fit of this rank by the solver that suits the data, from warm factors (left, right) or from None."""
    max_iter = stop.max_iter
    entries = corruption == "entries"

    def judged(found: LargeSolve) -> LargeSolve:
        if not entries:
            return found
        return found._replace(verdict=judge_entries(data, found.left, found.right, found.median))

    if data.norm == 0 or rank == 0:
        left, right = data.thin(rank)
        median = data.read(left, right, "identity", torch.inf).median
        return judged(LargeSolve(left, right, 0, data.observed > 0, median))
    if warm is not None and not warm[1].any():  # nothing, from which no step leads away
        warm = None
    left, right = data.start_factors(rank) if warm is None else warm
    plain = entries and data.structure == "general" and rank < min(data.total_rows, data.columns)
    if method == "altproj" and not plain:
        raise ValueError(
            "method='altproj' needs structure='general', corruption='entries' and rank < min(m, n), got "
            f"structure={data.structure!r}, corruption={corruption!r}, rank={rank}"
        )
    spent, best = 0, None
    if method == "altproj" or (method == "auto" and plain and warm is None and data.share >= 0.9):
        budget = max_iter if method == "altproj" else min(40, max_iter)
        found = judged(altproj(data, rank, left, right, stop._replace(max_iter=budget)))
        exact = found.converged and not found.verdict.suspicious and found.verdict.residual <= 3 * stop.tol
        if method == "altproj" or found.stopped or exact:
            return found
        spent, best = found.iterations, found if found.iterations == max_iter else None
    tries = schedules(data.share >= COMPLETE, rank >= min(data.total_rows, data.columns))
    tries = tries[:1] if warm is not None else tries
    for attempt, schedule in enumerate(tries):
        if spent == max_iter:
            break
        budget = math.ceil((max_iter - spent) * (schedule.most if attempt < len(tries) - 1 else 1.0))
        begin = left, right
        if schedule.again and best.right.any():
            begin = best.left, best.right
        found = annealed(data, *begin, schedule, stop._replace(max_iter=budget), corruption, warm is not None)
        found = judged(found)
        spent += found.iterations
        new, same = _compared(found, data, stop.tol), False
        if best is None:
            best = found
        else:
            better, same = is_better(new, _compared(best, data, stop.tol))
            same &= found.converged
            best = found if better else best
        if found.stopped or ((new.explained or same) and not (entries and found.verdict.suspicious)):
            break
    return best._replace(iterations=spent)


def _compared(found: LargeSolve, data: OneMatrix, tol: float) -> Fit:
    rate = found.verdict.rate if found.verdict is not None else 0.0
    return Fit(*map(torch.tensor, (found.median, rate, explains(found.median, data.mean, tol))))
