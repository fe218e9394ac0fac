"""How a matrix is stored that the large solvers read where it lies: its dtype, its layout, its missing entries.

A missing entry is NaN, in int8 -128. Rows or columns are contiguous, at any distance: slices, transposes and memory-
mapped files are read without a copy. What is computed from a matrix, thin factors above all, has `factor_dtype`.
"""

import torch
from torch import Tensor

from fastpref import _checks, _native

MATRIX_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8)
DTYPE_CODES = _native.DTYPE_CODES | {torch.float64: 3, torch.int8: 4}  # csrc/residual_pass.h
BLOCK_BYTES = 8 << 20  # of float64 rows that a reference works through at a time


def factor_dtype(matrix: Tensor) -> torch.dtype:
    """The dtype of factors and arithmetic: float64 for a float64 matrix, else float32."""
    return torch.float64 if matrix.dtype == torch.float64 else torch.float32


def lies_by_rows(matrix: Tensor) -> bool:
    rows, columns = matrix.shape
    return (columns <= 1 or matrix.stride(1) == 1) and (rows <= 1 or matrix.stride(0) >= columns)


def entries(block: Tensor, dtype: torch.dtype) -> Tensor:
    """Entries as floating-point numbers, NaN where missing."""
    values = block.to(dtype)
    return values.masked_fill(block == -128, torch.nan) if block.dtype == torch.int8 else values


def row_blocks(matrix: Tensor, most: int = BLOCK_BYTES):
    """Slices of rows that fit `most` bytes in float64."""
    rows, columns = matrix.shape
    step = max(1, most // (8 * max(columns, 1)))
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


# ---- checks ----


def check_matrix(matrix) -> None:
    """matrix is two-dimensional, of a dtype that is read as it lies, with contiguous rows or contiguous columns."""
    _checks.tensor("matrix", matrix)
    if matrix.dtype not in MATRIX_DTYPES:
        raise TypeError(f"matrix must be float32, float64, bfloat16, float16 or int8, got {matrix.dtype}")
    if matrix.dim() != 2:
        raise ValueError(f"matrix must have shape [m, n], got {list(matrix.shape)}")
    if not lies_by_rows(matrix) and not lies_by_rows(matrix.t()):
        raise ValueError(
            "matrix must have contiguous rows that do not overlap (row stride >= n), or contiguous columns; "
            f"call .contiguous(), which copies it; got strides {matrix.stride()} for shape {list(matrix.shape)}"
        )


def check_factors(matrix: Tensor, left, right) -> None:
    dtype = factor_dtype(matrix)
    for name, factor, length in (("left", left, matrix.shape[0]), ("right", right, matrix.shape[1])):
        _checks.tensor(name, factor)
        if factor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} for a {matrix.dtype} matrix, got {factor.dtype}")
        if factor.dim() != 2 or factor.shape[0] != length:
            raise ValueError(
                f"{name} must have shape [{length}, r] to match matrix {list(matrix.shape)}, got {list(factor.shape)}"
            )
        _checks.same_device(name, factor, "matrix", matrix)
    if left.shape[1] != right.shape[1]:
        raise ValueError(
            f"left and right must have as many columns, got shapes {list(left.shape)} and {list(right.shape)}"
        )


def check_number(name: str, value, meaning: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {meaning}, got {type(value).__name__}")


def check_scale(scale) -> None:
    check_number("scale", scale, "a finite float")
    if not abs(scale) < torch.inf:
        raise ValueError(f"scale must be a finite float, got {scale}")
