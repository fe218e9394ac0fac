"""What low-rank fits of many small matrices leave of them: the decomposition of each L, and its outliers, counted.

An entry is an outlier where |D - L| exceeds five standard deviations of the noise, 1.4826 median |D - L|, and a part of
the mean |D| that rounding may account for. The reference is plain PyTorch; the native kernel reads each matrix twice
while it is in cache, and writes nothing of its size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import _library, _native
from fastpref._lowrank.noise import EXACT, MAD, OUTLIER, outlier_bound

_CHUNK = 1 << 22  # entries that the reference works through at a time


class BatchVerdict(NamedTuple):
    U: Tensor  # [B, m, r] orthonormal
    S: Tensor  # [B, r] descending
    Vh: Tensor  # [B, r, n]
    mean: Tensor  # [B] float64, mean |D| over the observed entries
    residual: Tensor  # [B] float64, |D - L| without the outliers / |D|
    rate: Tensor  # [B] float64, share of outliers
    worst: Tensor  # [B] float64, the largest share in a row or column
    row_rates: Tensor  # [B, m] float64
    column_rates: Tensor  # [B, n] float64


def _decompose(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, r = torch.linalg.qr(left.double())
    p, t = torch.linalg.qr(right.double())
    u, s, vh = torch.linalg.svd(r @ t.mT)
    return (q @ u).to(left.dtype), s.to(left.dtype), (vh @ p.mT).to(left.dtype)


def _counts(mask: Tensor) -> tuple[Tensor, Tensor]:
    """By row and by column; sums of numbers are faster than of booleans."""
    ones = mask.float()
    return ones.sum(-1).double(), ones.sum(-2).double()


def _judge_ref(matrix: Tensor, left: Tensor, right: Tensor, median: Tensor) -> BatchVerdict:
    observed = ~matrix.isnan()
    clean = torch.where(observed, matrix, 0).double()
    residual = torch.where(observed, clean - left.double() @ right.double().mT, 0)
    row_seen, column_seen = _counts(observed)
    total = row_seen.sum(-1).clamp(min=1)
    mean = clean.abs().sum((-2, -1)) / total
    far = residual.abs() > outlier_bound(median.double(), mean)[:, None, None]
    rows, columns = _counts(far)
    row_rates, column_rates = rows / row_seen.clamp(min=1), columns / column_seen.clamp(min=1)
    norm = torch.linalg.vector_norm(clean, dim=(-2, -1))
    rest = torch.linalg.vector_norm(residual * ~far, dim=(-2, -1))
    worst = torch.cat([row_rates, column_rates], -1).amax(-1)
    rate = rows.sum(-1) / total
    residual = rest / norm.where(norm > 0, 1.0)
    return BatchVerdict(*_decompose(left, right), mean, residual, rate, worst, row_rates, column_rates)


def batched_verdict_ref(matrix: Tensor, left: Tensor, right: Tensor, median: Tensor) -> BatchVerdict:
    step = max(1, _CHUNK // max(matrix.shape[1] * matrix.shape[2], 1))
    chunks = zip(*(tensor.split(step) for tensor in (matrix, left, right, median)), strict=True)
    return BatchVerdict(*map(torch.cat, zip(*(_judge_ref(*chunk) for chunk in chunks), strict=True)))


def _native_verdict(matrix: Tensor, left: Tensor, right: Tensor, median: Tensor) -> BatchVerdict:
    (batch, m, n), rank = matrix.shape, left.shape[-1]
    matrix, left, right = (tensor.contiguous() for tensor in (matrix, left, right))
    median = median.double().contiguous()
    u, s, vh = matrix.new_empty(batch, m, rank), matrix.new_empty(batch, rank), matrix.new_empty(batch, rank, n)
    sums, row_rates, column_rates = (torch.empty(batch, size, dtype=torch.float64) for size in (4, m, n))
    threads = min(torch.get_num_threads(), batch)
    workspace = torch.empty(threads * _native._core.batched_verdict_workspace(m, n, rank), dtype=torch.uint8)
    _native._core.batched_verdict_cpu(
        matrix.data_ptr(),
        matrix.dtype == torch.float64,
        batch,
        m,
        n,
        rank,
        left.data_ptr(),
        right.data_ptr(),
        median.data_ptr(),
        OUTLIER * MAD,
        EXACT,
        u.data_ptr(),
        s.data_ptr(),
        vh.data_ptr(),
        sums.data_ptr(),
        row_rates.data_ptr(),
        column_rates.data_ptr(),
        workspace.data_ptr(),
        threads,
    )
    return BatchVerdict(u, s, vh, *sums.t().contiguous(), row_rates, column_rates)


_library.OPS["batched_verdict"] = {"native": _library.native_cpu_reason, "reference": _library.reference_reason}


def batched_verdict(matrix: Tensor, left: Tensor, right: Tensor, median: Tensor, backend: str = "") -> BatchVerdict:
    """[B, m, n] float32 or float64, NaN missing; factors [B, m, r] and [B, n, r] of its dtype; median |D - L| [B]."""
    backend = _library.choose_backend("batched_verdict", backend, _native.device_kind(matrix))
    if backend == "native" and matrix.numel():
        return _native_verdict(matrix, left, right, median)
    if not matrix.shape[0]:
        m, n = matrix.shape[1:]
        empty = [torch.empty(0, *size, dtype=torch.float64, device=matrix.device) for size in [()] * 4 + [(m,), (n,)]]
        return BatchVerdict(left, left[:, 0] if m else left.sum(1), right.mT, *empty)
    return batched_verdict_ref(matrix, left, right, median)
