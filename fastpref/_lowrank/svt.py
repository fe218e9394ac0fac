"""Singular-value thresholding of a batch of matrices: L = U diag(max(sigma - tau, 0)) V^T, and its derivative.

The proximal operator of the nuclear norm (Cai, Candes, Shen 2010, arXiv:0810.3286). The singular vectors of one side
suffice: L = A V diag(max(1 - tau / sigma, 0)) V^T. On the CPU small matrices are solved by one-sided Jacobi rotations,
one matrix per vector lane, all in cache (csrc/cpu/svt.cpp): floor, one read and one write of the batch. In PyTorch
small float32 matrices go through the Gram matrix in float64, whose squared condition costs them nothing; the rest
through an SVD, as does every derivative.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import _autograd, _checks, _library, _native, operators

# Crossovers, measured on one core with AVX-512 by benchmarks/bench_svt.py. Jacobi is faster than the others by about
# SIZE / sqrt(M N) when its vectors, of 64 bytes with a matrix per lane, are full, and pays for empty lanes.
JACOBI_SIZE = {torch.float32: 128, torch.float64: 60}
JACOBI_LANES = {torch.float32: 16, torch.float64: 8}
# the shorter side up to which Gram and eigh beat an SVD
GRAM_SIZE = 32


class SVTResult(NamedTuple):
    __module__ = "fastpref"

    low_rank: Tensor  # [..., M, N]
    rank: Tensor  # [...] int64, singular values above the threshold


def svt_ref(matrix: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """[B, M, N], [B] -> L [B, M, N] and rank [B], by a float64 SVD: the specification."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept = (s - threshold.double().unsqueeze(-1)).clamp(min=0)
    return (u * kept.unsqueeze(-2)) @ vh, (kept > 0).sum(-1)


def _share_kept(s: Tensor, threshold: Tensor) -> Tensor:
    """max(sigma - tau, 0) / sigma, 1 for sigma = tau = 0: the slope that f has there from the right."""
    above = s > threshold
    return torch.where(above, 1 - threshold / s.where(above, 1.0), ((threshold == 0) & (s == 0)).to(s.dtype))


def jacobi_is_faster(matrix: Tensor) -> bool:
    batch, m, n = matrix.shape
    lanes = JACOBI_LANES[matrix.dtype]
    return -(-batch // lanes) * lanes * math.sqrt(m * n) <= JACOBI_SIZE[matrix.dtype] * batch


def _by_svd(matrix: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = (s - threshold.unsqueeze(-1)).clamp(min=0)
    return (u * kept.unsqueeze(-2)) @ vh, (kept > 0).sum(-1)


def _by_gram(matrix: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    if matrix.shape[-2] < matrix.shape[-1]:
        low, rank = _by_gram(matrix.mT, threshold)
        return low.mT.contiguous(), rank
    wide = matrix.double()
    squares, v = torch.linalg.eigh(wide.mT @ wide)
    s = squares.clamp(min=0).sqrt()
    share = _share_kept(s, threshold.double().unsqueeze(-1))
    return (((wide @ v) * share.unsqueeze(-2)) @ v.mT).to(matrix.dtype), (s > threshold.double().unsqueeze(-1)).sum(-1)


def _by_torch(matrix: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    finite = matrix.isfinite().flatten(1).all(-1)
    if _native.device_kind(matrix) == "cpu" and not finite.all():
        _raise_for(matrix)
    gram = min(matrix.shape[1:]) <= GRAM_SIZE and matrix.dtype == torch.float32
    low, rank = (_by_gram if gram else _by_svd)(matrix.where(finite[:, None, None], 0), threshold)
    return low.where(finite[:, None, None], torch.nan), rank


def _by_jacobi(matrix: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    core, (batch, m, n) = _native._core, matrix.shape
    matrix, threshold = matrix.contiguous(), threshold.contiguous()
    is_double = matrix.dtype == torch.float64
    low = _native.empty(matrix.shape, matrix.dtype, matrix.device)
    rank = torch.empty(batch, dtype=torch.int64)
    threads = min(torch.get_num_threads(), -(-batch // 4))
    workspace = torch.empty(threads * core.svt_workspace(m, n), dtype=torch.uint8)
    pointers = low.data_ptr(), rank.data_ptr(), workspace.data_ptr()
    core.svt_cpu(matrix.data_ptr(), threshold.data_ptr(), is_double, batch, m, n, *pointers, threads)
    if (worst := rank.min()) < 0:
        if worst == -2:
            _raise_for(matrix)
        raise RuntimeError(f"the Jacobi sweeps of matrix {rank.argmin().item()} of the batch did not converge")
    return low, rank


def _raise_for(matrix: Tensor):
    where = (~matrix.isfinite()).nonzero()[0].tolist()
    raise ValueError(f"matrix must be finite, got {matrix[tuple(where)].item()} at {where} of the flattened batch")


_library.OPS["svt"] = {"native": _library.native_cpu_reason, "reference": _library.reference_reason}


def _fwd(matrix: Tensor, threshold: Tensor, backend: str):
    if matrix.numel() == 0:
        return torch.zeros_like(matrix), torch.zeros(len(matrix), dtype=torch.int64, device=matrix.device)
    device = _native.device_kind(matrix)
    if not backend:
        served = _library.native_cpu_reason(device) is None
        backend = "native" if served and jacobi_is_faster(matrix) else "reference"
    chosen = _library.choose_backend("svt", backend, device)
    return (_by_jacobi if chosen == "native" else _by_torch)(matrix, threshold)


def _fwd_fake(matrix, threshold, backend):
    return (
        torch.empty_like(matrix, memory_format=torch.contiguous_format),
        matrix.new_empty(len(matrix), dtype=torch.int64),
    )


class _SVTFunction(torch.autograd.Function):
    """The derivative of a spectral function is a self-adjoint map: forward and backward are the same formula."""

    @staticmethod
    def forward(matrix, threshold, backend):
        return operators.svt(matrix, threshold, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return _autograd.pad_gradients(ctx)
        matrix, threshold = ctx.saved_tensors
        finite = matrix.isfinite().flatten(1).all(-1)[:, None, None]
        u, s, vh = torch.linalg.svd(matrix.where(finite, 0), full_matrices=False)
        tau = threshold.unsqueeze(-1)
        kept, share = (s - tau).clamp(min=0), _share_kept(s, tau)
        above = s > tau
        inner = u.mT @ grad @ vh.mT
        # f(s) = max(s - tau, 0) is linear on either side of tau, so its divided differences never divide by a tie
        i, j = above.unsqueeze(-1), above.unsqueeze(-2)
        gap = (s.unsqueeze(-1) - s.unsqueeze(-2)).abs()
        across = torch.maximum(kept.unsqueeze(-1), kept.unsqueeze(-2)) / gap.where(i ^ j, 1.0)
        none = (tau.unsqueeze(-1) == 0).to(s.dtype)  # where both are 0: the slope of f from the right
        difference = torch.where(i & j, 1.0, torch.where(i ^ j, across, none))
        total = s.unsqueeze(-1) + s.unsqueeze(-2)
        sums = torch.where(
            total > 0, (kept.unsqueeze(-1) + kept.unsqueeze(-2)) / total.where(total > 0, 1.0), none.expand_as(total)
        )
        core = difference * (inner + inner.mT) / 2 + sums * (inner - inner.mT) / 2
        # what leaves the spans of U and V, of which at most one is not everything
        left = (grad @ vh.mT - u @ inner) * share.unsqueeze(-2)
        right = share.unsqueeze(-1) * (u.mT @ grad - inner @ vh)
        matrix_grad = (u @ core @ vh + left @ vh + u @ right).where(finite, torch.nan)
        threshold_grad = -torch.where(above, inner.diagonal(dim1=-2, dim2=-1), 0.0).sum(-1)
        gradients = matrix_grad, threshold_grad
        return _autograd.pad_gradients(ctx, *_autograd.differentiable_once(gradients, grad, matrix, threshold))


def svt(matrix: Tensor, threshold: float | Tensor, *, backend: str | None = None) -> SVTResult:
    """Singular values lowered by a threshold, those below it removed.

    Differentiable once by matrix and by threshold, except where a singular value equals its threshold; equal singular
    values, as skew matrices always have, are no obstacle.

    Args:
        matrix: [..., M, N] float32, float64, bfloat16 or float16 (16 bits are computed in float32 and rounded).
        threshold: not negative; a number, or [...], one per matrix.
        backend: None (the fastest for the size), "native" (CPU) or "reference" (PyTorch's eigh and svd).

    Returns:
        SVTResult: low_rank [..., M, N] in matrix's dtype, rank [...].

    Raises:
        TypeError, ValueError: for arguments of the wrong type or shape, a negative threshold, and on CPU an entry that
            is not finite (on a GPU that matrix's result is NaN).
    """
    _checks.floats("matrix", matrix)
    if matrix.dim() < 2:
        raise ValueError(f"matrix must have shape [..., M, N], got {list(matrix.shape)}")
    _library.check_backend("svt", backend)
    lead = matrix.shape[:-2]
    wide = matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()
    if isinstance(threshold, Tensor):
        _checks.floats("threshold", threshold)
        if threshold.shape not in (lead, torch.Size([])):
            raise ValueError(f"threshold must have shape {list(lead)} or [], got {list(threshold.shape)}")
        _checks.same_device("threshold", threshold, "matrix", matrix)
        if _native.device_kind(threshold) == "cpu" and not torch.compiler.is_compiling() and not (threshold >= 0).all():
            raise ValueError(f"threshold must not be negative, got {threshold.min().item()}")
    else:
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
            raise TypeError(f"threshold must be a number or a tensor, got {type(threshold).__name__}")
        if not 0 <= threshold < float("inf"):
            raise ValueError(f"threshold must not be negative, and finite, got {threshold}")
        threshold = wide.new_tensor(threshold)
    count = lead.numel()
    flat = wide.reshape(count, *matrix.shape[-2:])
    thresholds = threshold.to(wide.dtype).expand(lead).reshape(count)
    _autograd.refuse_transforms("svt", flat, thresholds)
    if torch.is_grad_enabled() and (flat.requires_grad or thresholds.requires_grad):
        low, rank = _SVTFunction.apply(flat, thresholds, backend or "")
    else:
        low, rank = operators.svt(flat, thresholds, backend or "")
    return SVTResult(low.to(matrix.dtype).view(matrix.shape), rank.view(lead))
