"""Rank-free robust PCA of many small matrices at once: the convex program of `ialm`, each matrix stopping on its own.

The native kernel (csrc/cpu/batched_ialm.cpp) is that module's iteration, solved whole per matrix in cache; its PyTorch
loop is the reference. The spectral norm in the gap is bounded from above by a factorisation of s^2 - Y^T Y with s from
the subspace, which adds up to 1e-4 to the gap.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import _library, _native
from fastpref._lowrank import ialm
from fastpref._lowrank.batched_rpca import median_of

SHORTER, ENTRIES = 512, 1 << 20  # of matrices that one thread solves faster than PyTorch does with all


class BatchIALM(NamedTuple):
    """An IALMSolve, and what a fit of the ranks it found begins with."""

    U: Tensor  # [B, m, q], q the largest rank of the batch; zero beyond a matrix's own rank, as S and Vh
    S: Tensor  # [B, q], descending
    Vh: Tensor  # [B, q, n]
    rank: Tensor  # [B] int64
    iterations: Tensor  # [B] int64
    residual: Tensor  # [B] float64, |M - L - S| / |M|
    gap: Tensor  # [B] float64
    converged: Tensor  # [B] bool: residual below tol, and the gap closed
    dense_share: Tensor  # [B] float64, observed entries of S that are not zero
    median: Tensor  # [B] of |M - L| over the observed entries


def is_small(m: int, n: int) -> bool:
    return min(m, n) <= SHORTER and m * n <= ENTRIES


def batched_ialm_ref(matrix: Tensor, lam: float | None, tol: float, max_iter: int) -> BatchIALM:
    found = ialm.ialm(matrix, lam=lam, tol=tol, max_iter=max_iter)
    residual = matrix - (found.U * found.S.unsqueeze(-2)) @ found.Vh
    return BatchIALM(**found._asdict(), median=median_of(residual, ~matrix.isnan()))


def _native_solve(matrix: Tensor, lam: float | None, tol: float, max_iter: int) -> BatchIALM:
    batch, m, n = matrix.shape
    d = min(m, n)
    if lam is None:
        weights = ialm.default_lambda(~matrix.isnan(), "entries")
    else:
        weights = torch.full((batch,), float(lam), dtype=torch.float64)
    matrix = matrix.contiguous()
    core, threads, double = _native._core, torch.get_num_threads(), matrix.dtype == torch.float64
    threads = min(threads, batch)
    u, vh, s = matrix.new_empty(batch, d, m), matrix.new_empty(batch, d, n), matrix.new_empty(batch, d)
    rank, iterations = torch.empty(batch, dtype=torch.int64), torch.empty(batch, dtype=torch.int64)
    residual, gap, median, share = (torch.empty(batch, dtype=torch.float64) for _ in range(4))
    converged = torch.empty(batch, dtype=torch.bool)
    workspace = torch.empty(threads * core.batched_ialm_workspace(m, n, double), dtype=torch.uint8)
    core.batched_ialm_cpu(
        matrix.data_ptr(),
        double,
        batch,
        m,
        n,
        weights.data_ptr(),
        tol,
        max_iter,
        u.data_ptr(),
        vh.data_ptr(),
        s.data_ptr(),
        rank.data_ptr(),
        iterations.data_ptr(),
        residual.data_ptr(),
        gap.data_ptr(),
        median.data_ptr(),
        share.data_ptr(),
        converged.data_ptr(),
        workspace.data_ptr(),
        threads,
    )
    most = int(rank.max())
    own = torch.arange(most) < rank.unsqueeze(-1)
    u, vh = (torch.where(own.unsqueeze(-1), vectors[:, :most], 0) for vectors in (u, vh))
    s = torch.where(own, s[:, :most], 0)
    return BatchIALM(
        U=u.mT,
        S=s,
        Vh=vh,
        rank=rank,
        iterations=iterations,
        residual=residual,
        gap=gap,
        converged=converged,
        dense_share=share,
        median=median.to(matrix.dtype),
    )


_library.OPS["batched_ialm"] = {
    "native": lambda device: _library.native_reason(device) if device == "cpu" else "there is no GPU kernel yet",
    "reference": _library.reference_reason,
}


def batched_ialm(
    matrix: Tensor, *, lam: float | None = None, tol: float, max_iter: int, backend: str = ""
) -> BatchIALM:
    """[B, m, n] float32 or float64, finite, NaN missing; lam None is ialm.default_lambda."""
    backend = _library.choose_backend("batched_ialm", backend, _native.device_kind(matrix))
    if backend == "native" and matrix.numel():
        return _native_solve(matrix, lam, tol, max_iter)
    return batched_ialm_ref(matrix, lam, tol, max_iter)
