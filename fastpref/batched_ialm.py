"""Rank-free robust PCA of many small matrices at once: the convex program of `ialm`, each matrix stopping on its own.

The native kernel (csrc/cpu/batched_ialm.cpp) is that module's iteration, solved whole per matrix in cache; its PyTorch
loop is the reference. The spectral norm in the gap is bounded from above by a factorisation of s^2 - Y^T Y with s from
the subspace, which adds up to 1e-4 to the gap.
"""

import torch
from torch import Tensor

from fastpref import _library, _native, ialm
from fastpref.ialm import IALMSolve


def _native_solve(matrix: Tensor, lam: Tensor, tol: float, max_iter: int) -> IALMSolve:
    batch, m, n = matrix.shape
    d = min(m, n)
    matrix = matrix.contiguous()
    core, threads, double = _native._core, torch.get_num_threads(), matrix.dtype == torch.float64
    threads = max(1, min(threads, batch))
    u, vh, s = matrix.new_empty(batch, d, m), matrix.new_empty(batch, d, n), matrix.new_empty(batch, d)
    rank, iterations = torch.empty(batch, dtype=torch.int64), torch.empty(batch, dtype=torch.int64)
    residual, gap, median, share = (torch.empty(batch, dtype=torch.float64) for _ in range(4))
    converged = torch.empty(batch, dtype=torch.bool)
    workspace = torch.empty(threads * core.batched_ialm_workspace(m, n, double) + 64, dtype=torch.uint8)
    core.batched_ialm_cpu(
        matrix.data_ptr(),
        double,
        batch,
        m,
        n,
        lam.data_ptr(),
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
        (workspace.data_ptr() + 63) // 64 * 64,
        threads,
    )
    most = int(rank.max())
    own = torch.arange(most) < rank.unsqueeze(-1)
    u, vh = (torch.where(own.unsqueeze(-1), vectors[:, :most], 0) for vectors in (u, vh))
    s = torch.where(own, s[:, :most], 0)
    return IALMSolve(u.mT, s, vh, rank, iterations, residual, gap, converged, share)


_library.OPS["batched_ialm"] = {
    "native": lambda device: _library.native_reason(device) if device == "cpu" else "there is no GPU kernel yet",
    "reference": _library.reference_reason,
}


def batched_ialm(
    matrix: Tensor, *, lam: float | None = None, tol: float, max_iter: int, backend: str = ""
) -> IALMSolve:
    """[B, m, n] float32 or float64, finite, NaN missing -> IALMSolve."""
    backend = _library.choose_backend("batched_ialm", backend, matrix.device.type)
    if backend == "reference" or matrix.numel() == 0:
        return ialm.ialm(matrix, lam=lam, tol=tol, max_iter=max_iter)
    if lam is None:
        weights = ialm.default_lambda(~matrix.isnan(), "entries")
    else:
        weights = torch.full((len(matrix),), float(lam), dtype=torch.float64)
    return _native_solve(matrix, weights, tol, max_iter)
