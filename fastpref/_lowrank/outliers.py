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


class _Search(NamedTuple):
    """For |unit D - left right^T| > threshold."""

    matrix: Tensor
    left: Tensor
    right: Tensor
    threshold: float
    unit: float  # of what is stored in the matrix

    def transposed(self) -> "_Search":
        return self._replace(matrix=self.matrix.t(), left=self.right, right=self.left)


# ---- reference ----


def _residual_blocks(search: _Search):
    matrix, left, right = search.matrix, search.left, search.right
    for block in row_blocks(matrix):
        yield block, entries(matrix[block], left.dtype).mul(search.unit).addmm_(left[block], right.t(), alpha=-1)


def _count_ref(search: _Search) -> OutlierCounts:
    (m, n), device = search.matrix.shape, search.matrix.device
    rows, row_observed = (torch.zeros(m, dtype=torch.int64, device=device) for _ in range(2))
    columns, column_observed = (torch.zeros(n, dtype=torch.int64, device=device) for _ in range(2))
    rest = torch.zeros((), dtype=torch.float64, device=device)
    for block, residual in _residual_blocks(search):
        far, there = residual.abs() > search.threshold, ~residual.isnan()
        rows[block], row_observed[block] = far.sum(1), there.sum(1)
        columns += far.sum(0)
        column_observed += there.sum(0)
        rest += residual.masked_fill(far | ~there, 0.0).double().square().sum()
    return OutlierCounts(rows, columns, row_observed, column_observed, rest)


def _list_ref(search: _Search) -> OutlierList:
    found = [(torch.empty(0, 2, dtype=torch.int64, device=search.matrix.device), search.left.new_empty(0))]
    for block, residual in _residual_blocks(search):
        where = (residual.abs() > search.threshold).nonzero()
        values = residual[where[:, 0], where[:, 1]]
        where[:, 0] += block.start
        found.append((where, values))
    where, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    return OutlierList(where[:, 0].contiguous(), where[:, 1].contiguous(), values)


# ---- native ----


class _NativeArgs(NamedTuple):
    args: object  # the kernels'
    padded: int  # columns of what is summed by column
    kept: tuple[Tensor, Tensor]  # the factors that args points to


def _native_args(search: _Search) -> _NativeArgs:
    matrix, (m, n), rank = search.matrix, search.matrix.shape, search.left.shape[1]
    padding = _native._core.outliers_padding
    padded = (n + padding - 1) // padding * padding
    left, across = search.left.contiguous(), search.left.new_zeros(rank, padded)
    across[:, :n] = search.right.t()
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
        search.unit,
        search.threshold,
    )
    return _NativeArgs(args, padded, (left, across))


def _native_count(search: _Search) -> OutlierCounts:
    native = _native_args(search)
    threads, (m, n) = torch.get_num_threads(), search.matrix.shape
    rows, observed = (torch.empty(m, dtype=torch.int64) for _ in range(2))
    rest = torch.empty(m, dtype=torch.float64)
    wide = torch.int64 if search.left.dtype == torch.float64 else torch.int32
    by_column = torch.zeros(threads, 2, native.padded, dtype=wide)
    _native._core.outliers_count_cpu(
        native.args, rows.data_ptr(), observed.data_ptr(), by_column.data_ptr(), rest.data_ptr(), threads
    )
    columns, column_observed = by_column.sum(0)[:, :n].long()
    return OutlierCounts(rows, columns, observed, column_observed, rest.sum())


def _native_list(search: _Search) -> OutlierList:
    counts = _native_count(search).rows
    native = _native_args(search)
    first = torch.zeros(len(counts) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=first[1:])
    total = int(first[-1])
    rows, columns = (torch.zeros(total, dtype=torch.int64) for _ in range(2))
    values = search.left.new_zeros(total)
    _native._core.outliers_list_cpu(
        native.args, first.data_ptr(), rows.data_ptr(), columns.data_ptr(), values.data_ptr(), torch.get_num_threads()
    )
    return OutlierList(rows, columns, values)


_library.OPS["outliers"] = {"native": _library.native_cpu_reason, "reference": _library.reference_reason}


def _checked_search(matrix, left, right, threshold, scale) -> _Search:
    check_matrix(matrix)
    check_factors(matrix, left, right)
    for name, factor in (("left", left), ("right", right)):
        if not factor.isfinite().all():
            raise ValueError(f"{name} must be finite, got {factor[~factor.isfinite()][0].item()}")
    check_number("threshold", threshold, "a float that is not negative")
    if not threshold >= 0:
        raise ValueError(f"threshold must not be negative, got {threshold}")
    check_scale(scale)
    return _Search(matrix.detach(), left.detach(), right.detach(), float(threshold), float(scale))


def _is_native(matrix: Tensor, backend: str | None) -> bool:
    _library.check_backend("outliers", backend)
    return _library.choose_backend("outliers", backend or "", _native.device_kind(matrix)) == "native"


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
    search = _checked_search(matrix, left, right, threshold, scale)
    count = _native_count if _is_native(matrix, backend) else _count_ref
    if lies_by_rows(matrix):
        return count(search)
    found = count(search.transposed())
    return OutlierCounts(
        rows=found.columns,
        columns=found.rows,
        row_observed=found.column_observed,
        column_observed=found.row_observed,
        rest_squares=found.rest_squares,
    )


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
    search = _checked_search(matrix, left, right, threshold, scale)
    find = _native_list if _is_native(matrix, backend) else _list_ref
    if lies_by_rows(matrix):
        return find(search)
    found = find(search.transposed())
    order = (found.columns * matrix.shape[1] + found.rows).argsort()
    return OutlierList(found.columns[order], found.rows[order], found.values[order])
