"""Rank-free robust PCA of one large matrix: the steps of `ialm`, each two reads of it and of a state of its size.

The matrix is read where it lies, by `ialm_pass`; everything else is thin factors. Floor per step of a float32 matrix
with L of rank q and k directions: 20 bytes and 2 q + 4 k flops per entry.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastpref._lowrank import ialm, ialm_pass
from fastpref._lowrank.residual_pass import residual_pass
from fastpref._lowrank.storage import factor_dtype, lies_by_rows


def _times(state: ialm_pass.State, product: Callable, backend: str | None, **penalties) -> tuple[Callable, Callable]:
    """x -> A x and x -> A^T x, or with dual_product those of Y."""
    return tuple(
        lambda x, transposed=side: product(state, x, transposed=transposed, backend=backend, **penalties)
        for side in (False, True)
    )


def _start_dual(state: ialm_pass.State, largest: float, backend: str | None) -> Tensor:
    """T = Y = D over the larger of its norms, of which largest is |D|_max / lam; |D|_2, [1]."""
    like = state.t.new_empty(state.matrix.shape[1])
    ialm_pass.set_dual(state, 1 / largest)  # 0 where D is missing: D need not be read for Y
    times = _times(state._replace(complete=True), ialm_pass.dual_product, backend)
    spectral = largest * ialm.norm_below(*times, like).reshape(1)
    state.t.mul_(min(1.0, largest / float(spectral)))
    return spectral


def _gap_of(state: ialm_pass.State, nuclear: Tensor, mu: float, backend: str | None) -> Tensor:
    sums = ialm_pass.dual_sums(state, mu=mu, backend=backend)
    like = state.t.new_empty(state.matrix.shape[1])
    spectral = ialm.norm_above(*_times(state, ialm_pass.dual_product, backend), like)
    largest = torch.tensor(sums.largest / state.lam, dtype=torch.float64)
    return ialm.relative_gap(sums.inner, spectral, largest, nuclear, state.lam * sums.sparse)


def large_ialm(
    matrix: Tensor,
    *,
    scale: float = 1.0,
    lam: float | None = None,
    tol: float,
    max_iter: int,
    report=None,
    backend: str | None = None,
) -> ialm.IALMSolve:
    """[m, n] of any dtype and layout that residual_pass reads, on CPU -> IALMSolve of a batch of one.

    lam and report are ialm's; corruption is of entries. backend is ialm_pass's.
    """
    if not lies_by_rows(matrix):
        found = large_ialm(
            matrix.t(), scale=scale, lam=lam, tol=tol, max_iter=max_iter, report=report, backend=backend
        )  # fmt: skip
        return found._replace(U=found.Vh.mT, Vh=found.U.mT)
    m, n = matrix.shape
    d = min(m, n)
    dtype = factor_dtype(matrix)
    nothing = (torch.zeros(side, 0, dtype=dtype) for side in (m, n))
    data = residual_pass(matrix, *nothing, psi="identity", scale=scale, backend=backend)
    count, norm = data.observed.reshape(1), data.sum_squares.sqrt().reshape(1)
    lam = float(ialm.entries_lambda(count, m, n)) if lam is None else float(lam)
    rank, iterations = torch.zeros(2, 1, dtype=torch.int64)
    residual, gap = torch.zeros(1, dtype=torch.float64), torch.full((1,), torch.nan, dtype=torch.float64)
    running = norm > 0
    converged = ~running & (count > 0)
    u, vh, sigma = torch.zeros(m, 0, dtype=dtype), torch.zeros(0, n, dtype=dtype), torch.zeros(0).double()
    share = torch.zeros(1, dtype=torch.float64)
    if running:
        complete = count == m * n
        state = ialm_pass.new_state(matrix, scale, lam, bool(complete))
        spectral = _start_dual(state, float(data.max_kept) / lam, backend)
        schedule = ialm.PenaltySchedule(spectral, complete)
        mu = formed_at = float(schedule.mu)
        generator = torch.Generator().manual_seed(0)
        q = ialm.start_directions(n, d, generator, u)
        product = None  # A q
    for iteration in range(1, max_iter + 1):
        if not running:
            break
        forward, backward = _times(state, ialm_pass.ialm_product, backend, mu=formed_at, mu_next=mu)
        for again in range(2 if iteration == 1 else int(schedule.steps)):
            p = ialm.orthonormal(forward(q) if again or product is None else product)[0]
            q, r = ialm.orthonormal(backward(p))
        u, sigma, vh = ialm.thresholded(p, q, r, 1 / schedule.mu)
        rank[0] = above = int((sigma > 0).sum())
        q = ialm.next_directions(vh, above, d, generator)
        expected = float(schedule.expected())
        step = ialm_pass.ialm_update(
            state, (u * sigma.to(dtype))[:, :above], q, mu=mu, mu_before=formed_at, mu_next=expected, backend=backend
        )  # fmt: skip
        formed_at = mu
        residual, iterations[0] = step.residual / norm, iteration
        change = step.change / step.dual
        done = schedule.done(running, iteration, residual, change, tol)
        if done:
            gap[0] = _gap_of(state, sigma.sum(), formed_at, backend)
        converged = done & (gap <= ialm.GAP)
        schedule.advance(running, iteration, residual, change, done & ~converged)
        running = running & ~converged
        mu = float(schedule.mu)
        product = step.products if mu == expected else None
        if report is not None and report(iteration, float(residual), above):
            running, converged = torch.zeros_like(running), torch.zeros_like(converged)
    if iterations:
        share = ialm_pass.dual_sums(state, mu=formed_at, backend=backend).nonzero / count.double()
    rank = ialm.significant_rank(sigma, rank, tol)
    most = int(rank)
    return ialm.IALMSolve(
        U=u[None, :, :most],
        S=sigma[None, :most].to(dtype),
        Vh=vh[None, :most],
        rank=rank,
        iterations=iterations,
        residual=residual,
        gap=gap,
        converged=converged,
        dense_share=share,
    )
