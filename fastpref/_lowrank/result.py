"""What robust PCA returns, and what is made of a result: that of nothing, and the factors for a warm start."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref._lowrank.storage import factor_dtype


class RPCAInfo(NamedTuple):
    """Per matrix, [...] of the batch."""

    __module__ = "fastpref"

    rank: Tensor  # int64
    iterations: Tensor  # int64
    residual: Tensor  # float64, |D - L - S| / |D| over the observed entries, S the outliers
    gap: Tensor  # float64, relative duality gap of the convex program; NaN where a rank was given
    converged: Tensor  # bool
    scale: Tensor  # float64, of the noise: 1.4826 * median |D - L|
    outlier_rate: Tensor  # float64, share of the observed entries more than 5 scales off
    row_outlier_rate: Tensor  # [..., m] float64
    column_outlier_rate: Tensor  # [..., n] float64
    condition: Tensor  # float64, largest over smallest singular value of L
    row_part: Tensor  # [..., m] int64: the observed entries determine L where row_part == column_part
    column_part: Tensor  # [..., n] int64; such cells, by counting: see `determined`
    bound: Tensor  # float64, largest |D| of a fit that did not converge, beyond which its L means nothing; else inf


class SparseCOO(NamedTuple):
    __module__ = "fastpref"

    indices: Tensor  # [K, dimensions of the matrix] int64
    values: Tensor  # [K]


class RPCAResult(NamedTuple):
    """L = U diag(S) Vh, singular values descending, 0 beyond a matrix's own rank; `sparse` is D - L at the outliers."""

    __module__ = "fastpref"

    U: Tensor  # [..., m, r]
    S: Tensor  # [..., r]
    Vh: Tensor  # [..., r, n]
    sparse: Tensor | SparseCOO | None
    info: RPCAInfo

    def low_rank(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """L, dense, or these rows of it.

        NaN where the observed entries do not determine it (`info.row_part` is not `info.column_part`), and where a fit
        that did not converge lies beyond all that was observed (`info.bound`).
        """
        low_rank = (self.U[..., rows, :] * self.S.unsqueeze(-2)) @ self.Vh
        row_part, column_part = self.info.row_part[..., rows], self.info.column_part
        if row_part.any() or column_part.any():
            low_rank = torch.where(row_part.unsqueeze(-1) == column_part.unsqueeze(-2), low_rank, torch.nan)
        if self.info.bound.isfinite().any():
            low_rank = torch.where(low_rank.abs() <= self.info.bound[..., None, None], low_rank, torch.nan)
        return low_rank


class RPCAProgress(NamedTuple):
    __module__ = "fastpref"

    iteration: int
    residual: float  # |E| / |D|: what the fit still pulls at
    scale: float  # 1.4826 * median |R|; NaN before it is known
    rank: int


def empty_result(matrix: Tensor, rank: int, sparse: str) -> RPCAResult:
    """Of a matrix, or a batch, without entries: zeros."""
    *lead, m, n = matrix.shape
    floating = {"dtype": factor_dtype(matrix), "device": matrix.device}
    number = {"dtype": torch.float64, "device": matrix.device}
    rank = min(rank, m, n)
    whole = {"none": None, "dense": matrix.new_zeros(matrix.shape, dtype=floating["dtype"])}.get(
        sparse, SparseCOO(torch.empty(0, matrix.dim(), dtype=torch.int64), torch.empty(0, **floating))
    )
    zeros, unknown = torch.zeros(lead, **number), torch.full(lead, torch.nan, **number)
    info = RPCAInfo(
        rank=zeros.long() + rank,
        iterations=zeros.long(),
        residual=zeros,
        gap=unknown,
        converged=zeros.bool(),
        scale=zeros,
        outlier_rate=zeros,
        row_outlier_rate=torch.zeros(*lead, m, **number),
        column_outlier_rate=torch.zeros(*lead, n, **number),
        condition=unknown,
        row_part=torch.zeros(*lead, m, **number).long(),
        column_part=torch.zeros(*lead, n, **number).long(),
        bound=torch.full(lead, torch.inf, **number),
    )
    u, vh = torch.zeros(*lead, m, rank, **floating), torch.zeros(*lead, rank, n, **floating)
    return RPCAResult(u, torch.zeros(*lead, rank, **floating), vh, whole, info)


def check_size(s: Tensor, top: float) -> None:
    """Raises ValueError for singular values that are no numbers any more; top: about the largest |entry|."""
    if not s.isfinite().all():
        raise ValueError(
            f"matrix is too large: with entries of about {top:.3g} its singular values leave {s.dtype}; scale it down"
        )


def warm_factors(warm: RPCAResult, u_shape, vh_shape) -> tuple[Tensor, Tensor]:
    """left and right of an earlier result, none of their components 0; raises where it does not fit."""
    if not isinstance(warm, RPCAResult):
        raise TypeError(f"warm must be an RPCAResult, got {type(warm).__name__}")
    if tuple(warm.U.shape) != tuple(u_shape) or tuple(warm.Vh.shape) != tuple(vh_shape):
        raise ValueError(
            f"warm must have U of shape {list(u_shape)} and Vh of shape {list(vh_shape)}, got {list(warm.U.shape)} and "
            f"{list(warm.Vh.shape)}"
        )
    # components of size 0 would stay so
    root = warm.S.clamp(min=1e-3 * warm.S.amax(-1, keepdim=True)).sqrt().unsqueeze(-2)
    return warm.U * root, warm.Vh.mT * root


def condition_number(s: Tensor, rank: Tensor) -> Tensor:
    """[B], of singular values [B, r], descending, of which the first `rank` count; NaN where none do."""
    if s.shape[-1] == 0:
        return torch.full(rank.shape, torch.nan, dtype=torch.float64, device=s.device)
    last = s.gather(-1, (rank - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(rank > 0, (s[:, 0] / last).double(), torch.nan)
