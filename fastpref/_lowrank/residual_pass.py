"""One read of a matrix D against thin factors: what robust PCA needs of R = scale * D - left right^T, and no more.

With the low-rank part kept as two thin factors, an iteration of accelerated alternating projections, of scaled gradient
descent or of annealed M-estimation needs the clipped residual E = psi(R) only in the products E right and E^T left, and
a few sums. In plain PyTorch R and E are two tensors of D's size, written and read several times. Here D is read once,
tile by tile, and nothing of its size is written. A missing entry is NaN (int8: -128), and there E is 0.

Floor: one read of D, and 6 r flops per entry (three products with a factor of r columns).

psi, with zeta the scale beyond which an entry counts as corrupted:
    hard      R where |R| <= zeta, else 0          (alternating projections: Netrapalli et al. 2014, arXiv:1410.7660)
    soft      R clipped to [-zeta, zeta]           (Huber)
    cauchy    R / (1 + (R / zeta)^2)               (a redescending M-estimator)
    identity  R
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import _checks, _library, _native, operators
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

try:
    import triton
    import triton.language as tl
except ImportError:  # _library.triton_reason gives this as the reason
    triton = None

PSI = ("hard", "soft", "cauchy", "identity")
STRUCTURES = ("general", "skew")
BINS = 8160  # of |R|: 32 per power of two, over all of float32
_BIN_SHIFT = 18  # bits of a float32 below its bin
_SAMPLE_ROWS, _SAMPLE_COLUMNS = 8, 32  # a block of entries that the histogram takes or leaves
_SAMPLE_SHIFT = 23  # odd: from one band of rows to the next, the blocks taken move on to other columns
_REFERENCE_BYTES = 64 << 20  # the reference works through the rows in float64 blocks of this size


class ResidualPass(NamedTuple):
    """What one read of the matrix gives. Factors and their products are float64 for a float64 matrix, else float32."""

    left_grad: Tensor  # [m, r]: E right
    right_grad: Tensor  # [n, r]: E^T left
    sum_squares: Tensor  # [] float64: sum of E^2
    observed: Tensor  # [] int64: entries that are not missing
    kept: Tensor  # [] int64: observed entries with |R| <= zeta
    max_kept: Tensor  # [] float64: the largest |R| among the kept, 0 where there is none
    histogram: Tensor  # [BINS] int64: |R| of (a subset of) the observed entries
    row_squares: Tensor  # [m] float64: sum of R^2 over the row's observed entries; [0] unless squares=True
    column_squares: Tensor  # [n] float64: the same of the columns


class _Terms(NamedTuple):
    """What E is, given R: w_i w_j psi(R)."""

    psi: str
    zeta: float
    unit: float  # of what is stored in the matrix
    skew: bool  # the upper triangle of a skew-symmetric matrix is read
    row_weights: Tensor | None
    column_weights: Tensor | None
    squares: bool  # also the sums of R^2 by row and by column

    def transposed(self) -> "_Terms":
        return self._replace(row_weights=self.column_weights, column_weights=self.row_weights)


# ---- reference: the specification ----


def _sample_stride(m: int, n: int) -> int:
    """One block in so many enters the histogram: all of them up to 2^15 entries, then fewer, at least one in 256.

    A power of two, so that _SAMPLE_SHIFT leads through every residue and no column is left out of a tall matrix.
    """
    stride = 1
    while stride < 256 and m * n > stride << 15:
        stride *= 2
    return stride


def _sampled(rows: Tensor, columns: Tensor, stride: int) -> Tensor:
    """[rows, columns] bool: the entries that enter the histogram."""
    band = rows.div(_SAMPLE_ROWS, rounding_mode="floor") * _SAMPLE_SHIFT
    return (band.unsqueeze(1) + columns.div(_SAMPLE_COLUMNS, rounding_mode="floor")) % stride == 0


def _psi(residual: Tensor, psi: str, zeta: float) -> Tensor:
    if psi == "hard":
        return residual.where(residual.abs() <= zeta, 0.0)
    if psi == "soft":
        return residual.clamp(-zeta, zeta)
    if psi == "cauchy":
        return residual / (1 + (residual / zeta).square())
    return residual


def _reference(matrix: Tensor, left: Tensor, right: Tensor, terms: _Terms) -> tuple[ResidualPass, float]:
    """What residual_pass_ref returns, and the largest |R|."""
    m, n = matrix.shape
    device = matrix.device
    skew, row_weights, column_weights = terms.skew, terms.row_weights, terms.column_weights
    left, right = left.double(), right.double()
    row_weights = torch.ones(m, device=device).double() if row_weights is None else row_weights.double()
    column_weights = torch.ones(n, device=device).double() if column_weights is None else column_weights.double()
    left_grad = torch.zeros_like(left)
    right_grad = torch.zeros_like(right)
    sum_squares, max_kept, top = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(3))
    observed, kept = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
    histogram = torch.zeros(BINS, dtype=torch.int64, device=device)
    row_squares = torch.zeros(m, dtype=torch.float64, device=device)
    column_squares = torch.zeros(n, dtype=torch.float64, device=device)
    columns = torch.arange(n, device=device)
    stride = _sample_stride(m, n)
    for block in row_blocks(matrix, _REFERENCE_BYTES):
        rows = torch.arange(block.start, block.stop, device=device)
        values = entries(matrix[block], torch.float64)
        if skew:
            values = values.masked_fill(columns <= rows.unsqueeze(1), torch.nan)
        seen = ~values.isnan()
        residual = values.mul(terms.unit).addmm_(left[block], right.t(), alpha=-1)
        e = _psi(residual, terms.psi, terms.zeta) * row_weights[block].unsqueeze(1) * column_weights
        e = e.where(seen, 0.0)
        magnitude = residual.abs().where(seen, 0.0)
        keeps = seen & (magnitude <= terms.zeta)
        left_grad[block] += e @ right
        right_grad += e.t() @ left[block]
        if skew:  # E below the diagonal is -E^T
            left_grad -= e.t() @ right[block]
            right_grad[block] -= e @ left
        sum_squares += e.square().sum()
        observed += seen.sum()
        kept += keeps.sum()
        if magnitude.numel():
            max_kept = torch.maximum(max_kept, magnitude.where(keeps, 0.0).amax())
            top = torch.maximum(top, magnitude.amax())
        bits = magnitude[seen & _sampled(rows, columns, stride)].float().view(torch.int32)
        histogram += torch.bincount((bits >> _BIN_SHIFT).clamp_(max=BINS - 1), minlength=BINS)
        if terms.squares:
            row_squares[block] += magnitude.square().sum(1)
            column_squares += magnitude.square().sum(0)
    if not terms.squares:
        row_squares, column_squares = row_squares[:0].clone(), column_squares[:0].clone()
    result = ResidualPass(
        left_grad, right_grad, sum_squares, observed, kept, max_kept, histogram, row_squares, column_squares
    )
    return _doubled(result, skew), float(top)


def _check_largest(largest: float, matrix: Tensor) -> None:
    """Raises where the largest |R| is not finite."""
    if largest < torch.inf:
        return
    for block in row_blocks(matrix, _REFERENCE_BYTES):
        infinite = matrix[block].isinf()
        if infinite.any():
            row, column = infinite.nonzero()[0].tolist()
            value, row = float(matrix[block][row, column]), row + block.start
            raise ValueError(f"matrix must be finite or missing (NaN), got {value} at row {row}, column {column}")
    raise ValueError("scale * matrix - left right^T must be finite, but a factor is not, or the product overflows")


def residual_pass_ref(
    matrix: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    psi: str = "cauchy",
    zeta: float = torch.inf,
    scale: float = 1.0,
    structure: str = "general",
    row_weights: Tensor | None = None,
    column_weights: Tensor | None = None,
    squares: bool = False,
) -> ResidualPass:
    """What residual_pass computes, in plain float64 PyTorch, in blocks of rows; float64 products whatever the input."""
    terms = _Terms(psi, zeta, scale, structure == "skew", row_weights, column_weights, squares)
    result, largest = _reference(matrix, left, right, terms)
    _check_largest(largest, matrix)
    return result


# ---- what the kernels share ----


def _product_factors(left: Tensor, right: Tensor, skew: bool) -> tuple[Tensor, Tensor]:
    """The factors that E is multiplied with, by row and by column, contiguous; R takes their first r columns.

    E of a skew-symmetric matrix is U - U^T, U its upper triangle: E right = U right - U^T right and
    E^T left = U^T left - U left, so U meets [left | -right] and [right | -left].
    """
    if skew:
        return torch.cat([left, -right], 1), torch.cat([right, -left], 1)
    return left.contiguous(), right.contiguous()


def _from_products(by_row, by_column, rank, skew):
    """left_grad and right_grad from the products with _product_factors."""
    if skew:
        return by_row[:, :rank] + by_column[:, rank:], by_column[:, :rank] + by_row[:, rank:]
    return by_row, by_column


def _doubled(upper: ResidualPass, skew: bool) -> ResidualPass:
    """The sums of a whole skew-symmetric matrix from those of its upper triangle."""
    if not skew:
        return upper
    squares = upper.row_squares + upper.column_squares
    return upper._replace(
        sum_squares=upper.sum_squares * 2,
        observed=upper.observed * 2,
        kept=upper.kept * 2,
        histogram=upper.histogram * 2,
        row_squares=squares,
        column_squares=squares.clone(),
    )


# ---- Triton ----

# A program takes a block of rows through a range of columns. E right stays in registers from the first column to the
# last. E^T left needs sums over rows, that is over programs: each writes its own part, [columns, r] per block of rows,
# and the parts are added up afterwards, in order. That moves r / _BLOCK_M of D's size once more out and in; float
# atomics would move as much and not be deterministic, a second kernel along columns would read D again. Rows go in
# slabs, so that the parts of one slab are all that is ever held. Factors of more than 32 columns cost a read of D for
# each 32: more of them do not fit into registers beside the tile.
_BLOCK_M, _BLOCK_N = 64, 32
_SLAB = 64  # blocks of rows
_PROGRAMS = 512  # a few per multiprocessor
_LAUNCH = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": True}  # the default changes to off in Triton 3.10

if triton is not None:
    _PSI = {name: index for index, name in enumerate(PSI)}
    _HARD, _SOFT, _CAUCHY = (tl.constexpr(_PSI[name]) for name in ("hard", "soft", "cauchy"))
    _INF = tl.constexpr(float("inf"))
    _NAN = tl.constexpr(float("nan"))
    _T_BINS = tl.constexpr(BINS)
    _T_BIN_SHIFT = tl.constexpr(_BIN_SHIFT)
    _T_SAMPLE_ROWS, _T_SAMPLE_COLUMNS = tl.constexpr(_SAMPLE_ROWS), tl.constexpr(_SAMPLE_COLUMNS)
    _T_SAMPLE_SHIFT = tl.constexpr(_SAMPLE_SHIFT)

    @triton.jit
    def _residual_pass_kernel(
        matrix_ptr,  # [M, N], rows `stride` apart
        left_ptr,  # [M, width] fp32: R takes the first `rank` columns
        right_ptr,  # [N, width] fp32
        row_weights_ptr,  # [M] fp32
        column_weights_ptr,  # [N] fp32
        row_parts_ptr,  # [groups, M, BLOCK_Q] fp32: E right[:, first_q:] over a group of columns
        column_parts_ptr,  # [blocks of this slab, N, BLOCK_Q] fp32: E^T left[:, first_q:] over a block of rows
        squares_ptr,  # [blocks, groups] fp32: sum of E^2
        kept_top_ptr,  # [blocks, groups] fp32
        counts_ptr,  # [2, blocks, groups] int32: observed, kept
        histogram_ptr,  # [BINS] int32
        row_squares_ptr,  # [groups, M] fp32
        column_squares_ptr,  # [blocks, N] fp32
        first_block,
        blocks,
        M,
        N,
        stride,
        rank,
        width,
        first_q,
        columns_per_group,
        sample_mask,
        scale,
        zeta,
        inverse_zeta,
        PSI: tl.constexpr,
        UPPER: tl.constexpr,
        WEIGHTED: tl.constexpr,
        SQUARES: tl.constexpr,
        STATS: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        BLOCK_Q: tl.constexpr,
    ):
        slab_block = tl.program_id(0)
        block = first_block + slab_block
        group = tl.program_id(1)
        groups = tl.num_programs(1)
        scale = tl.cast(scale, tl.float32)
        zeta = tl.cast(zeta, tl.float32)
        inverse_zeta = tl.cast(inverse_zeta, tl.float32)
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        lane = tl.arange(0, BLOCK_N)
        ks = tl.arange(0, BLOCK_K)
        qs = first_q + tl.arange(0, BLOCK_Q)
        row_offsets = rows.to(tl.int64)
        begin = group * columns_per_group
        end = tl.minimum(begin + columns_per_group, N)
        if UPPER:  # groups are whole blocks, so this is where one begins
            begin = tl.maximum(begin, (block * BLOCK_M + 1) // BLOCK_N * BLOCK_N)
        a_q = tl.load(
            left_ptr + row_offsets[:, None] * width + qs[None, :],
            mask=(rows < M)[:, None] & (qs < width)[None, :],
            other=0.0,
        )
        row_part = tl.zeros((BLOCK_M, BLOCK_Q), tl.float32)
        squares = tl.zeros((BLOCK_M,), tl.float32)
        kept_top = tl.zeros((BLOCK_M,), tl.float32)
        observed = tl.zeros((BLOCK_M,), tl.int32)
        kept = tl.zeros((BLOCK_M,), tl.int32)
        row_squares = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(begin, end, BLOCK_N):
            cols = start + lane
            inside = (rows < M)[:, None] & (cols < N)[None, :]
            if UPPER:
                inside = inside & (cols[None, :] > rows[:, None])
            stored = tl.load(matrix_ptr + row_offsets[:, None] * stride + cols[None, :], mask=inside, other=0)
            value = stored.to(tl.float32)
            if matrix_ptr.dtype.element_ty == tl.int8:
                seen = inside & (value != -128.0)
            else:
                seen = inside & (value == value)
            r = value * scale
            for k in range(0, rank, BLOCK_K):
                a = tl.load(
                    left_ptr + row_offsets[:, None] * width + (k + ks)[None, :],
                    mask=(rows < M)[:, None] & (k + ks < rank)[None, :],
                    other=0.0,
                )
                b = tl.load(
                    right_ptr + cols.to(tl.int64)[None, :] * width + (k + ks)[:, None],
                    mask=(cols < N)[None, :] & (k + ks < rank)[:, None],
                    other=0.0,
                )
                r -= tl.dot(a, b, input_precision="ieee")
            size = tl.abs(r)
            if PSI == _HARD:
                e = tl.where(size <= zeta, r, 0.0)
            elif PSI == _SOFT:
                e = tl.minimum(tl.maximum(r, -zeta), zeta)
            elif PSI == _CAUCHY:
                t = r * inverse_zeta
                e = r / (1.0 + t * t)
            else:
                e = r
            e = tl.where(seen, tl.where(size < _INF, e, _NAN), 0.0)
            if WEIGHTED:
                e *= tl.load(row_weights_ptr + rows, mask=rows < M, other=0.0)[:, None]
                e *= tl.load(column_weights_ptr + cols, mask=cols < N, other=0.0)[None, :]
            if STATS:
                squares += tl.sum(e * e, 1)
                keeps = seen & (size <= zeta)
                observed += tl.sum(seen.to(tl.int32), 1)
                kept += tl.sum(keeps.to(tl.int32), 1)
                kept_top = tl.maximum(kept_top, tl.max(tl.where(keeps, size, 0.0), 1))
                place = (rows // _T_SAMPLE_ROWS * _T_SAMPLE_SHIFT)[:, None] + (cols // _T_SAMPLE_COLUMNS)[None, :]
                counted = seen & ((place & sample_mask) == 0)
                if tl.max(tl.max(counted.to(tl.int32), 1), 0) > 0:
                    bins = tl.minimum(size.to(tl.int32, bitcast=True) >> _T_BIN_SHIFT, _T_BINS - 1)
                    tl.atomic_add(histogram_ptr + bins, 1, mask=counted, sem="relaxed")
                if SQUARES:
                    square = tl.where(seen, r * r, 0.0)
                    row_squares += tl.sum(square, 1)
                    column_square = column_squares_ptr + block.to(tl.int64) * N + cols
                    tl.store(column_square, tl.sum(square, 0), mask=cols < N)
            b_q = tl.load(
                right_ptr + cols.to(tl.int64)[:, None] * width + qs[None, :],
                mask=(cols < N)[:, None] & (qs < width)[None, :],
                other=0.0,
            )
            row_part += tl.dot(e, b_q, input_precision="ieee")
            column_part = tl.dot(tl.trans(e), a_q, input_precision="ieee")
            out = column_parts_ptr + (slab_block.to(tl.int64) * N + cols)[:, None] * BLOCK_Q + (qs - first_q)[None, :]
            tl.store(out, column_part, mask=(cols < N)[:, None] & (qs >= 0)[None, :])
        out = row_parts_ptr + (group * M + row_offsets)[:, None] * BLOCK_Q + (qs - first_q)[None, :]
        tl.store(out, row_part, mask=(rows < M)[:, None] & (qs >= 0)[None, :])
        if STATS:
            program = block * groups + group
            tl.store(squares_ptr + program, tl.sum(squares, 0))
            tl.store(kept_top_ptr + program, tl.max(kept_top, 0))
            tl.store(counts_ptr + program, tl.sum(observed, 0))
            tl.store(counts_ptr + blocks * groups + program, tl.sum(kept, 0))
            if SQUARES:
                tl.store(row_squares_ptr + group * M + row_offsets, row_squares, mask=rows < M)


def _factor_block(columns: int) -> int:
    """Columns of a factor held at once: what tl.dot takes, and no more than registers hold."""
    return min(32, max(16, 1 << max(columns - 1, 0).bit_length()))


class _Parts(NamedTuple):
    """What the programs write, each its own part."""

    row: Tensor  # [groups, M, BLOCK_Q]
    column: Tensor  # [blocks of a slab, N, BLOCK_Q]
    squares: Tensor  # [blocks * groups]
    kept_top: Tensor  # [blocks * groups]
    counts: Tensor  # [2, blocks * groups] int32
    histogram: Tensor  # [BINS] int32
    row_squares: Tensor  # [groups, M], or [groups, 0]
    column_squares: Tensor  # [blocks, N], or [blocks, 0]


def _new_parts(m: int, n: int, blocks: int, groups: int, block_q: int, squares: bool, like: Tensor) -> _Parts:
    square_sums, kept_top = like.new_zeros(2, blocks * groups)
    return _Parts(
        row=like.new_empty(groups, m, block_q),
        column=like.new_empty(min(blocks, _SLAB), n, block_q),
        squares=square_sums,
        kept_top=kept_top,
        counts=torch.zeros(2, blocks * groups, dtype=torch.int32, device=like.device),
        histogram=torch.zeros(BINS, dtype=torch.int32, device=like.device),
        row_squares=like.new_zeros(groups, m if squares else 0),
        column_squares=like.new_zeros(blocks, n if squares else 0),
    )


def _triton_pass(matrix: Tensor, left: Tensor, right: Tensor, terms: _Terms) -> tuple[ResidualPass, float]:
    m, n = matrix.shape
    rank = left.shape[1]
    left, right = _product_factors(left, right, terms.skew)
    width = left.shape[1]
    row_weights, column_weights = terms.row_weights, terms.column_weights
    weighted = row_weights is not None or column_weights is not None
    if weighted:
        row_weights = left.new_ones(m) if row_weights is None else row_weights.contiguous()
        column_weights = left.new_ones(n) if column_weights is None else column_weights.contiguous()
    blocks, column_blocks = -(-m // _BLOCK_M), -(-n // _BLOCK_N)
    groups = max(1, min(column_blocks, -(-_PROGRAMS // max(min(blocks, _SLAB), 1))))
    columns_per_group = -(-column_blocks // groups) * _BLOCK_N
    block_q = _factor_block(width)
    by_row, by_column = torch.zeros_like(left), torch.zeros_like(right)
    parts = _new_parts(m, n, blocks, groups, block_q, terms.squares, left)
    for first_q in range(0, max(width, 1) if m and n else 0, block_q):
        taken = slice(first_q, min(first_q + block_q, width))
        for first_block in range(0, blocks, _SLAB):
            slab = min(_SLAB, blocks - first_block)
            if terms.skew:  # nothing is written below the diagonal
                parts.column.zero_()
            _native.launch_triton(
                _residual_pass_kernel,
                (slab, groups),
                matrix,
                left,
                right,
                row_weights if weighted else left,
                column_weights if weighted else right,
                *parts,
                first_block,
                blocks,
                m,
                n,
                matrix.stride(0),
                rank,
                width,
                first_q,
                columns_per_group,
                _sample_stride(m, n) - 1,
                terms.unit,
                terms.zeta,
                min(1 / terms.zeta, torch.finfo(torch.float32).max),
                PSI=_PSI[terms.psi],
                UPPER=terms.skew,
                WEIGHTED=weighted,
                SQUARES=terms.squares,
                STATS=first_q == 0,
                BLOCK_M=_BLOCK_M,
                BLOCK_N=_BLOCK_N,
                BLOCK_K=_factor_block(rank),
                BLOCK_Q=block_q,
                **_LAUNCH,
            )
            by_column[:, taken] += parts.column[:slab].sum(0)[:, : taken.stop - taken.start]
        by_row[:, taken] = parts.row.sum(0)[:, : taken.stop - taken.start]
    left_grad, right_grad = _from_products(by_row, by_column, rank, terms.skew)
    totals = parts.counts.sum(1, dtype=torch.int64)
    kept_top = parts.kept_top
    result = ResidualPass(
        left_grad,
        right_grad,
        sum_squares=parts.squares.sum(dtype=torch.float64),
        observed=totals[0].clone(),
        kept=totals[1].clone(),
        max_kept=kept_top.amax().double() if kept_top.numel() else left.new_zeros((), dtype=torch.float64),
        histogram=parts.histogram.long(),
        row_squares=parts.row_squares.sum(0, dtype=torch.float64),
        column_squares=parts.column_squares.sum(0, dtype=torch.float64),
    )
    return _doubled(result, terms.skew), 0.0  # E is NaN where R is not finite: to look would be to wait for the GPU


# ---- native ----


def _native_pass(matrix: Tensor, left: Tensor, right: Tensor, terms: _Terms) -> tuple[ResidualPass, float]:
    m, n = matrix.shape
    rank = left.shape[1]
    left, right = _product_factors(left, right, terms.skew)
    weights = terms.row_weights, terms.column_weights
    row_weights, column_weights = (None if w is None else w.contiguous() for w in weights)
    by_row, by_column = torch.empty_like(left), torch.empty_like(right)
    row_squares = torch.empty(m if terms.squares else 0, dtype=torch.float64)
    column_squares = torch.empty(n if terms.squares else 0, dtype=torch.float64)
    sums = torch.empty(3, dtype=torch.float64)  # of E^2, max_kept, the largest |R|
    counts = torch.empty(2 + BINS, dtype=torch.int64)  # observed, kept, the histogram
    args = _native._core.ResidualPass(
        matrix.data_ptr(),
        DTYPE_CODES[matrix.dtype],
        m,
        n,
        matrix.stride(0),
        left.data_ptr(),
        right.data_ptr(),
        rank,
        left.shape[1],
        PSI.index(terms.psi),
        terms.zeta,
        terms.unit,
        terms.skew,
        _native.address(row_weights),
        _native.address(column_weights),
        _sample_stride(m, n),
        by_row.data_ptr(),
        by_column.data_ptr(),
        terms.squares,
        row_squares.data_ptr(),
        column_squares.data_ptr(),
        sums.data_ptr(),
        counts.data_ptr(),
    )
    workspace = _native.empty(_native._core.residual_pass_workspace(args), torch.uint8, matrix.device)
    _native._core.residual_pass_cpu(args, workspace.data_ptr(), torch.get_num_threads())
    left_grad, right_grad = _from_products(by_row, by_column, rank, terms.skew)
    result = ResidualPass(
        left_grad,
        right_grad,
        sum_squares=sums[0].clone(),  # clones: outputs of an operator must not share memory
        observed=counts[0].clone(),
        kept=counts[1].clone(),
        max_kept=sums[1].clone(),
        histogram=counts[2:].clone(),
        row_squares=row_squares,
        column_squares=column_squares,
    )
    return _doubled(result, terms.skew), float(sums[2])


# ---- operator: the backend is chosen here, on real tensors ----


_library.OPS["residual_pass"] = {
    "native": _library.native_cpu_reason,
    "triton": _library.triton_reason,
    "reference": _library.reference_reason,
}


def _choose(matrix: Tensor, backend: str) -> str:
    if matrix.dtype == torch.float64 and backend == "triton":
        raise TypeError("backend='triton' takes float32, bfloat16, float16 or int8 matrices, got torch.float64")
    if matrix.dtype == torch.float64 and _native.device_kind(matrix) != "cpu":
        return "reference"
    return _library.choose_backend("residual_pass", backend, _native.device_kind(matrix))


def _pass(matrix, left, right, psi, zeta, scale, skew, row_weights, column_weights, squares, backend):
    run = {"native": _native_pass, "triton": _triton_pass, "reference": _reference}[_choose(matrix, backend)]
    terms = _Terms(psi, zeta, scale, skew, row_weights, column_weights, squares)
    if lies_by_rows(matrix):
        result, largest = run(matrix, left, right, terms)
    else:  # columns are what lies contiguous: the transpose is a view of which rows are
        found, largest = run(matrix.t(), right, left, terms.transposed())
        result = found._replace(
            left_grad=found.right_grad,
            right_grad=found.left_grad,
            row_squares=found.column_squares,
            column_squares=found.row_squares,
        )
    _check_largest(largest, matrix)
    return tuple(
        result._replace(left_grad=result.left_grad.to(left.dtype), right_grad=result.right_grad.to(right.dtype))
    )


def _pass_fake(matrix, left, right, psi, zeta, scale, skew, row_weights, column_weights, squares, backend):
    m, n = matrix.shape

    def number(dtype):
        return left.new_empty((), dtype=dtype)

    return tuple(
        ResidualPass(
            left_grad=left.new_empty(left.shape),
            right_grad=right.new_empty(right.shape),
            sum_squares=number(torch.float64),
            observed=number(torch.int64),
            kept=number(torch.int64),
            max_kept=number(torch.float64),
            histogram=left.new_empty((BINS,), dtype=torch.int64),
            row_squares=left.new_empty((m if squares else 0,), dtype=torch.float64),
            column_squares=left.new_empty((n if squares else 0,), dtype=torch.float64),
        )
    )


# ---- public ----


def residual_pass(
    matrix: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    psi: str = "cauchy",
    zeta: float = torch.inf,
    scale: float = 1.0,
    structure: str = "general",
    row_weights: Tensor | None = None,
    column_weights: Tensor | None = None,
    squares: bool = False,
    backend: str | None = None,
) -> ResidualPass:
    """E right, E^T left and statistics of E = w_i w_j psi(R), R = scale * matrix - left right^T, in one read of matrix.

    Args:
        matrix: [m, n] float32, float64, bfloat16, float16 or int8; NaN (int8: -128) is missing, and there E is 0. Read
            where it lies, which may be a memory-mapped file: rows with unit stride and any distance, or a transpose of
            such rows.
        left, right: [m, r] and [n, r], any r >= 0; float64 for a float64 matrix, else float32. Finite.
        psi: "hard", "soft", "cauchy" or "identity", as the module describes them.
        zeta: the scale of psi, positive; inf keeps everything.
        scale: what the stored numbers are multiplied by.
        structure: "skew" for a skew-symmetric matrix and product left right^T: only the upper triangle is read (of a
            column-major matrix the lower one), and the other half follows from it, missing entries included. The
            diagonal, which is 0, is not read, and not counted as observed.
        row_weights, column_weights: [m] and [n], of the factors' dtype: multiplied onto E.
        squares: also the sums of R^2 by row and by column.
        backend: None (the fastest), "native", "triton" or "reference".

    Returns:
        ResidualPass, detached: this is not differentiable. `observed`, `kept`, `max_kept`, `histogram` and the sums by
        row and column are of R, whatever the weights. `histogram` counts blocks of 8 x 32 entries: all of them up to
        2^15 entries, then every second, fourth, ... up to every 256th, moved along from one band of 8 rows to the next,
        the same on every backend; bin b holds the float32 numbers whose upper bits are b (histogram_median reads it).
        The result does not depend on the number of threads.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, shape, dtype, device or memory layout, and on CPU for an
            infinite entry, which it names, factors that are not finite, or a residual beyond the range of the dtype (in
            Triton E is NaN there).
        RuntimeError: for a backend that cannot serve, with the reason.
    """
    check_matrix(matrix)
    check_factors(matrix, left, right)
    for name, value, choices in (("psi", psi, PSI), ("structure", structure, STRUCTURES)):
        if value not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {value!r}")
    check_number("zeta", zeta, "a positive float")
    if not zeta > 0:
        raise ValueError(f"zeta must be positive, got {zeta}")
    check_scale(scale)
    if structure == "skew" and matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"structure='skew' needs a square matrix, got shape {list(matrix.shape)}")
    for name, weights, length in (("row_weights", row_weights, 0), ("column_weights", column_weights, 1)):
        if weights is not None:
            _checks.vector(name, weights, matrix.shape[length], "one per " + name[:-8], "matrix", matrix)
            if weights.dtype != left.dtype:
                raise TypeError(f"{name} must be {left.dtype} like left, got {weights.dtype}")
    _library.check_backend("residual_pass", backend)
    row_weights, column_weights = (None if w is None else w.detach() for w in (row_weights, column_weights))
    terms = _Terms(psi, float(zeta), float(scale), structure == "skew", row_weights, column_weights, squares)
    return ResidualPass(*operators.residual_pass(matrix.detach(), left.detach(), right.detach(), *terms, backend or ""))


def histogram_mean(histogram: Tensor) -> float:
    """The mean of what a ResidualPass.histogram counts, to a percent; 0 where it is empty."""
    if histogram.sum() == 0:
        return 0.0
    counts = histogram.cpu()
    edges = (torch.arange(len(counts) + 1, dtype=torch.int32) << _BIN_SHIFT).view(torch.float32).double()
    middle = ((edges[:-1] + edges[1:]) / 2).where(counts > 0, 0.0)
    return float((middle * counts).sum() / counts.sum())


def histogram_median(histogram: Tensor) -> float:
    """The median of what a ResidualPass.histogram counts, to 1.6 % (half a bin); NaN where it is empty."""
    counts = histogram.cpu().cumsum(0)
    total = int(counts[-1])
    if total == 0:
        return float("nan")
    bin_ = int(torch.searchsorted(counts, (total - 1) // 2, right=True))
    if bin_ == 0:
        return 0.0  # zero, or a subnormal number
    low, high = torch.tensor([bin_ << _BIN_SHIFT, (bin_ + 1) << _BIN_SHIFT], dtype=torch.int32).view(torch.float32)
    return float(low.double() + high.double()) / 2
