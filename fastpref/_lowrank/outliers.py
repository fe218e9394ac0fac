"""Where a matrix D is far from a product of thin factors: |R| > threshold, R = scale * D - left right^T.

What robust PCA reports of its sparse part. The residual is formed a few rows at a time and nothing of D's size is
written; a list is preceded by a count, which sizes it. A missing entry is NaN (int8: -128), and no outlier.

Floor: one read of D and 2 r flops per entry; twice for a list.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import _library, _native
from fastpref._lowrank.storage import (
    DTYPE_CODES,
    check_factors,
    check_matrix,
    check_number,
    check_scale,
    entries,
    lies_by_rows,
    row_blocks,
)


class OutlierCounts(NamedTuple):
    rows: Tensor  # [m] int64: outliers of a row
    columns: Tensor  # [n] int64: of a column
    row_observed: Tensor  # [m] int64: entries that are not missing
    column_observed: Tensor  # [n] int64
    rest_squares: Tensor  # [] float64: sum of R^2 over the other observed entries


class OutlierList(NamedTuple):
    rows: Tensor  # [k] int64
    columns: Tensor  # [k] int64, sorted by row, then by column
    values: Tensor  # [k] of the factors' dtype: R


# ---- reference ----


def _residual_blocks(matrix, left, right, scale):
    for block in row_blocks(matrix):
        yield block, entries(matrix[block], left.dtype).mul(scale).addmm_(left[block], right.t(), alpha=-1)


def _count_ref(matrix, left, right, threshold, scale) -> OutlierCounts:
    m, n = matrix.shape
    rows, row_observed = (torch.zeros(m, dtype=torch.int64, device=matrix.device) for _ in range(2))
    columns, column_observed = (torch.zeros(n, dtype=torch.int64, device=matrix.device) for _ in range(2))
    rest = torch.zeros((), dtype=torch.float64, device=matrix.device)
    for block, residual in _residual_blocks(matrix, left, right, scale):
        far, there = residual.abs() > threshold, ~residual.isnan()
        rows[block], row_observed[block] = far.sum(1), there.sum(1)
        columns += far.sum(0)
        column_observed += there.sum(0)
        rest += residual.masked_fill(far | ~there, 0.0).double().square().sum()
    return OutlierCounts(rows, columns, row_observed, column_observed, rest)


def _list_ref(matrix, left, right, threshold, scale) -> OutlierList:
    found = [(torch.empty(0, 2, dtype=torch.int64, device=matrix.device), left.new_empty(0))]
    for block, residual in _residual_blocks(matrix, left, right, scale):
        where = (residual.abs() > threshold).nonzero()
        values = residual[where[:, 0], where[:, 1]]
        where[:, 0] += block.start
        found.append((where, values))
    where, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    return OutlierList(where[:, 0].contiguous(), where[:, 1].contiguous(), values)


# ---- native ----


def _native_args(matrix, left, right, threshold, scale):
    """The kernels' arguments, and the tensors they point to."""
    (m, n), rank = matrix.shape, left.shape[1]
    padding = _native._core.outliers_padding
    padded = (n + padding - 1) // padding * padding
    left, across = left.contiguous(), left.new_zeros(rank, padded)
    across[:, :n] = right.t()
    args = _native._core.Outliers(
        matrix.data_ptr(),
        DTYPE_CODES[matrix.dtype],
        m,
        n,
        matrix.stride(0),
        left.data_ptr(),
        across.data_ptr(),
        rank,
        padded,
        scale,
        threshold,
    )
    return args, padded, (left, across)


def _native_count(matrix, left, right, threshold, scale) -> OutlierCounts:
    args, padded, _kept = _native_args(matrix, left, right, threshold, scale)
    threads, (m, n) = torch.get_num_threads(), matrix.shape
    rows, observed = (torch.empty(m, dtype=torch.int64) for _ in range(2))
    rest = torch.empty(m, dtype=torch.float64)
    wide = torch.int64 if left.dtype == torch.float64 else torch.int32
    by_column = torch.zeros(threads, 2, padded, dtype=wide)
    _native._core.outliers_count_cpu(
        args, rows.data_ptr(), observed.data_ptr(), by_column.data_ptr(), rest.data_ptr(), threads
    )
    columns, column_observed = by_column.sum(0)[:, :n].long()
    return OutlierCounts(rows, columns, observed, column_observed, rest.sum())


def _native_list(matrix, left, right, threshold, scale) -> OutlierList:
    counts = _native_count(matrix, left, right, threshold, scale).rows
    args, _, _kept = _native_args(matrix, left, right, threshold, scale)
    first = torch.zeros(len(counts) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=first[1:])
    total = int(first[-1])
    rows, columns = (torch.zeros(total, dtype=torch.int64) for _ in range(2))
    values = left.new_zeros(total)
    _native._core.outliers_list_cpu(
        args, first.data_ptr(), rows.data_ptr(), columns.data_ptr(), values.data_ptr(), torch.get_num_threads()
    )
    return OutlierList(rows, columns, values)


_library.OPS["outliers"] = {"native": _library.native_cpu_reason, "reference": _library.reference_reason}


def _checked(matrix, left, right, threshold, scale, backend):
    check_matrix(matrix)
    check_factors(matrix, left, right)
    for name, factor in (("left", left), ("right", right)):
        if not factor.isfinite().all():
            raise ValueError(f"{name} must be finite, got {factor[~factor.isfinite()][0].item()}")
    check_number("threshold", threshold, "a float that is not negative")
    if not threshold >= 0:
        raise ValueError(f"threshold must not be negative, got {threshold}")
    check_scale(scale)
    _library.check_backend("outliers", backend)
    backend = _library.choose_backend("outliers", backend or "", matrix.device.type)
    tensors = (t.detach() for t in (matrix, left, right))
    return *tensors, float(threshold), float(scale), backend == "native"


# ---- public ----


def outlier_counts(
    matrix: Tensor,
    left: Tensor,
    right: Tensor,
    threshold: float,
    *,
    scale: float = 1.0,
    backend: str | None = None,
) -> OutlierCounts:
    """How many entries have |R| > threshold, by row and by column, and how many are observed.

    Args:
        matrix, left, right, scale: as residual_pass takes them.
        threshold: not negative; inf counts what is observed.
        backend: None (the fastest), "native" or "reference".

    Raises:
        TypeError, ValueError: for arguments of the wrong type, shape, dtype, device or memory layout.
        RuntimeError: for a backend that cannot serve, with the reason.
    """
    matrix, left, right, threshold, scale, native = _checked(matrix, left, right, threshold, scale, backend)
    count = _native_count if native else _count_ref
    if lies_by_rows(matrix):
        return count(matrix, left, right, threshold, scale)
    columns, rows, column_observed, row_observed, rest = count(matrix.t(), right, left, threshold, scale)
    return OutlierCounts(rows, columns, row_observed, column_observed, rest)


def outliers(
    matrix: Tensor,
    left: Tensor,
    right: Tensor,
    threshold: float,
    *,
    scale: float = 1.0,
    backend: str | None = None,
) -> OutlierList:
    """Where |R| > threshold, and R there: a list of (row, column, R), sorted by row, then by column.

    Args:
        matrix, left, right, scale: as residual_pass takes them.
        threshold: not negative.
        backend: None (the fastest), "native" or "reference".

    Raises:
        TypeError, ValueError: for arguments of the wrong type, shape, dtype, device or memory layout.
        RuntimeError: for a backend that cannot serve, with the reason.
    """
    matrix, left, right, threshold, scale, native = _checked(matrix, left, right, threshold, scale, backend)
    find = _native_list if native else _list_ref
    if lies_by_rows(matrix):
        return find(matrix, left, right, threshold, scale)
    columns, rows, values = find(matrix.t(), right, left, threshold, scale)
    order = (rows * matrix.shape[1] + columns).argsort()
    return OutlierList(rows[order], columns[order], values[order])
