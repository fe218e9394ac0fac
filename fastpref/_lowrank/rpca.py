"""Robust PCA, M = L + S: L of low rank, S few but arbitrary corruptions, entries possibly missing (NaN).

The public function: its checks, the choice of a solver, and the result of one large matrix.

                  rank given      no rank: min |L|_* + lambda |S|_1 (Candes, Li, Ma, Wright 2011)
    one matrix    large_rpca      large_ialm; ialm for whole rows and columns
    a batch       batched_rpca    batched_ialm

A fit without a rank is followed by one of the rank it found where noise or corrupted lines left traces in it.
"""

import itertools
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from fastpref import _checks, _library, _native
from fastpref._lowrank import ialm, ialm_pass
from fastpref._lowrank.annealing import CUTOFF
from fastpref._lowrank.batched_ialm import batched_ialm, is_small
from fastpref._lowrank.batches import batch_units, check_finite, fixed_rank_batch, in_units, rank_free_batch
from fastpref._lowrank.large_ialm import large_ialm
from fastpref._lowrank.large_rpca import LargeSolve, Stop, fixed_rank
from fastpref._lowrank.noise import EXACT
from fastpref._lowrank.one_matrix import Lines, OneMatrix, judge_entries
from fastpref._lowrank.outliers import outliers
from fastpref._lowrank.residual_pass import STRUCTURES
from fastpref._lowrank.result import (
    RPCAInfo,
    RPCAProgress,
    RPCAResult,
    SparseCOO,
    check_size,
    empty_result,
    warm_factors,
)
from fastpref._lowrank.storage import check_matrix, entries

CORRUPTIONS = ("entries", "rows", "columns")
METHODS = ("auto", "annealed", "altproj", "ialm")
SPARSE = ("none", "coo", "dense")


def rpca(
    matrix: Tensor,
    *,
    rank: int | None = None,
    structure: str = "general",
    corruption: str = "entries",
    method: str = "auto",
    lam: float | None = None,
    tol: float | None = None,
    max_iter: int | None = None,
    scale: float = 1.0,
    warm: RPCAResult | None = None,
    sparse: str = "none",
    callback: Callable[[RPCAProgress], object] | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> RPCAResult:
    """M = L + S: the low-rank part of a matrix, and the few entries (rows, columns) that are not of it.

    Args:
        matrix: [m, n], or a batch [..., m, n] of small ones; float32, float64, bfloat16, float16, or, one matrix only,
            int8; NaN (int8: -128) is missing. One matrix is read where it lies, memory-mapped files too.
        rank: of L; None finds it with the convex program, which holds one more matrix of this size (on a GPU, and for
            whole rows and columns, some ten).
        structure: "skew" for M = -M^T, of even rank: half is read, and L is skew to rounding.
        corruption: what S consists of: "entries", whole "rows" or whole "columns" (one matrix only).
        method: "annealed", "altproj" (clean, well-conditioned data: a third of the iterations), "ialm" (the convex
            program, rank=None), or "auto": altproj first where little is missing, kept only when it explains the
            matrix.
        lam: weight of |S|_1 in the convex program; default 1 / sqrt(observed share * max(m, n)).
        tol: relative residual, or three times the relative change of the factors, at which it has converged; default
            1e-6, 1e-7 for float64.
        max_iter: default 300; 1000 without a rank.
        scale: of an int8 matrix: what the stored numbers are multiplied by.
        warm: an earlier result for a similar matrix of the same shape and rank.
        sparse: what of S is returned: "none", "coo" (a SparseCOO) or "dense".
        callback: called with an RPCAProgress after each iteration over one matrix; true stops, not converged.
        group: process group over which the rows of one matrix are spread: U and row rates are those of this rank's
            rows, everything else is the whole matrix's, the same on all ranks. Rows may be spread unevenly.
        backend: None (the fastest), "native", "triton" (of one matrix with a rank) or "reference".

    Returns:
        RPCAResult. Its low_rank() is NaN where the observed entries do not determine L: rows and columns with too few
        of them, and cells between parts of the matrix that share none (`info.row_part`, `info.column_part`). Matrices
        that did not converge say so in info.converged; they do not hold up the others, and their low_rank() is NaN
        beyond the size of what was observed. With a rank, converged means that the iteration came to rest: where much
        is corrupted and the matrix small that may be at a wrong answer, of which info.scale and info.outlier_rate tell.
        Without, that the duality gap has closed too; gap is that of the convex program's L, before a fit of its rank
        undoes what noise made of it.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, shape or combination, and infinite entries.

    Warns:
        RuntimeWarning: where the rank of one matrix looks over- or under-stated.
    """
    _checks.tensor("matrix", matrix)
    if matrix.dim() < 2:
        raise ValueError(f"matrix must have shape [..., m, n], got {list(matrix.shape)}")
    for name, value, choices in (
        ("structure", structure, STRUCTURES),
        ("corruption", corruption, CORRUPTIONS),
        ("method", method, METHODS),
        ("sparse", sparse, SPARSE),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {value!r}")
    if max_iter is not None:
        _checks.positive_int("max_iter", max_iter)
    for name, value in (("tol", tol), ("lam", lam)):
        if value is not None:
            _checks.positive(name, value)
    skew = structure == "skew"
    if skew and matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"structure='skew' needs square matrices, got shape {list(matrix.shape)}")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed process group, got {type(group).__name__}")
    *lead, m, n = matrix.shape
    if rank is not None:
        _check_rank(rank, m, n, structure, lam, method, group)
    elif method in ("annealed", "altproj"):
        raise ValueError(f"method={method!r} needs a rank, got None")
    elif named := [name for name, given in (("warm", warm), ("group", group)) if given is not None]:
        raise ValueError(f"{named[0]} needs a rank, got None")
    matrix = matrix.detach()
    tol = tol if tol is not None else (1e-7 if matrix.dtype == torch.float64 else 1e-6)
    max_iter = max_iter or (300 if rank is not None else 1000)
    with torch.no_grad():
        if not matrix.numel() and group is None:
            return empty_result(matrix, rank or 0, sparse)
        if matrix.dim() == 2:
            check_matrix(matrix)
            if skew:
                _check_skew(matrix)
        else:
            single_only = {
                "corruption": corruption != "entries",
                "callback": callback is not None,
                "group": group is not None,
                "scale": scale != 1.0,
            }
            matrix = _checked_batch(matrix, single_only, rank, skew, method, backend)
        factors = None if warm is None else warm_factors(warm, (*lead, m, rank), (*lead, rank, n))
        if matrix.dim() > 2:
            options = {"skew": skew, "tol": tol, "max_iter": max_iter, "sparse": sparse, "backend": backend or ""}
            units = batch_units(matrix)
            if units is not None:
                matrix = matrix / units[..., None, None]
                factors = None if factors is None else (factors[0] / units[..., None, None], factors[1])
            if rank is None:
                result = rank_free_batch(matrix, lam=lam, **options)
            else:
                result = fixed_rank_batch(matrix, rank, warm=factors, **options)
            return result if units is None else in_units(result, units)
        data = OneMatrix(matrix, scale, structure, group, backend)
        stop = Stop(tol, max_iter, _reporter(callback))
        if rank is None:
            fit, gap = _rank_free(data, corruption, lam, stop)
        else:
            if factors is not None:
                left, right = factors
                factors = left / data.magnitude, right
            fit, gap = fixed_rank(data, rank, corruption, method, stop, factors), None
        return _one_result(data, fit, corruption, sparse, gap)


def _check_skew(matrix: Tensor) -> None:
    """64 rows of a matrix, or 64 matrices of a batch, against their transposes."""
    chosen = torch.linspace(0, len(matrix) - 1, min(64, len(matrix)), dtype=torch.float64).long().to(matrix.device)
    there, back = matrix[chosen], matrix[:, chosen].mT if matrix.dim() == 2 else matrix[chosen].mT
    there, back = entries(there, torch.float64), entries(back, torch.float64)
    off = (there + back).abs()
    rounding = 8 * torch.finfo(matrix.dtype).eps if matrix.dtype.is_floating_point else 0.0
    wrong = (off > rounding * (there.abs() + back.abs())) | (there.isnan() != back.isnan())
    if wrong.any():
        where = wrong.nonzero()[0].tolist()
        value, other = there[tuple(where)].item(), back[tuple(where)].item()
        where[0] = int(chosen[where[0]])
        mirror = [*where[:-2], where[-1], where[-2]]
        raise ValueError(f"structure='skew' needs matrix = -matrix^T, got {value} at {where} and {other} at {mirror}")


def _check_rank(rank, m, n, structure, lam, method, group) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank must be an int or None, got {type(rank).__name__}")
    if rank < 0 or (rank > min(m, n) and group is None):
        raise ValueError(f"rank must be between 0 and min(m, n) = {min(m, n)}, got {rank}")
    if structure == "skew" and rank % 2:
        raise ValueError(f"rank must be even for structure='skew', got {rank}")
    if lam is not None or method == "ialm":
        raise ValueError(f"{'lam' if lam is not None else 'method=' + repr(method)} belongs to rank=None, got {rank=}")


def _checked_batch(
    matrix: Tensor, single_only: dict[str, bool], rank: int | None, skew: bool, method: str, backend: str | None
) -> Tensor:
    """A batch in float32 or float64; single_only: what is for one matrix, and whether it was given."""
    if named := [name for name, given in single_only.items() if given]:
        raise ValueError(f"{named[0]} is for one matrix, got a batch of shape {list(matrix.shape)}")
    if method == "altproj":
        raise ValueError("method='altproj' is for one matrix; batches are annealed")
    if not matrix.dtype.is_floating_point:
        raise TypeError(f"matrix must be floating-point in a batch, got {matrix.dtype}")
    _library.check_backend("batched_rpca", backend)
    matrix = matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()
    if skew:
        _check_skew(matrix)
    chosen = _library.choose_backend("batched_rpca", backend or "", _native.device_kind(matrix))
    if rank is None or chosen == "reference":
        check_finite(matrix)
    return matrix


def _reporter(callback: Callable[[RPCAProgress], object] | None):
    """Stop's report; iterations are counted over all solvers that one call tries."""
    if callback is None:
        return None
    count = itertools.count(1)
    return lambda residual, sigma, rank: callback(RPCAProgress(next(count), residual, sigma, rank))


# ---- one large matrix ----


def _rank_free(data: OneMatrix, corruption: str, lam: float | None, stop: Stop) -> tuple[LargeSolve, Tensor]:
    """The convex program, and its gap; where noise shrinks L, or lines leave traces in it, a fit of the rank found."""
    entrywise, skew = corruption == "entries", data.structure == "skew"
    report = None
    if stop.report is not None:
        report = lambda iteration, residual, rank: stop.by_caller(residual, float("nan"), rank)  # noqa: E731
    options = {"lam": lam, "tol": stop.tol, "max_iter": stop.max_iter}
    if entrywise and report is None and is_small(*data.matrix.shape):
        found = batched_ialm(_dense(data), **options)
    elif entrywise and data.backend in (None, "native") and ialm_pass.is_native(data.matrix):
        found = large_ialm(data.matrix, scale=data.unit, backend=data.backend, report=report, **options)
    else:
        found = ialm.ialm(_dense(data), corruption=corruption, report=report, **options)
    rank = int(found.rank)
    noisy = float(found.dense_share) > ialm.NOISY and entrywise
    if noisy:
        rank = ialm.rank_by_gap(found.S[0])
    if skew:
        rank += rank % 2
    root = found.S[0].sqrt()
    left, right = (found.U[0] * root)[:, :rank], (found.Vh[0].mT * root)[:, :rank]
    spent, certified = int(found.iterations), bool(found.converged)
    polished = rank and left.shape[1] == rank and (noisy or skew or not entrywise)
    if polished and spent < stop.max_iter:
        warm = None if noisy else (left, right)
        left_over = stop._replace(max_iter=min(300, stop.max_iter - spent))
        fit = fixed_rank(data, rank, corruption, "annealed", left_over, warm)
        fit = fit._replace(iterations=spent + fit.iterations, converged=certified and fit.converged)
    else:
        read = data.read(left, right, "identity", torch.inf)
        fit = LargeSolve(left, right, spent, certified, read.median)
        if entrywise:
            fit = fit._replace(verdict=judge_entries(data, left, right, fit.median))
    return fit, found.gap[0]


def _dense(data: OneMatrix) -> Tensor:
    """[1, m, n], NaN where missing."""
    return (entries(data.matrix, data.dtype) * data.unit).unsqueeze(0)


def _one_result(data: OneMatrix, found: LargeSolve, corruption: str, sparse: str, gap: Tensor | None) -> RPCAResult:
    matrix, rank, magnitude = data.matrix, found.left.shape[1], data.magnitude
    u, s, v = data.decompose(found.left, found.right)
    check_size((s * magnitude).to(u.dtype), data.top * magnitude)
    root = s.sqrt().to(u.dtype)
    left, right = u * root, v * root
    verdict, lines = found.verdict, None
    if verdict is None:
        lines = Lines(data, corruption)
        verdict = lines.judge(left, right)
    elif gap is None:
        _warn_of_rank(data, u, s, v, verdict.sigma)
    whole = None
    if sparse != "none":
        if lines is None:
            listed = outliers(matrix, left, right, verdict.threshold, scale=data.unit)
        else:
            listed = lines.outliers(verdict.wrong, left, right)
        if sparse == "coo":
            whole = SparseCOO(torch.stack([listed.rows, listed.columns], 1), listed.values * magnitude)
        else:
            whole = torch.zeros(matrix.shape, dtype=data.dtype, device=matrix.device)
            whole[listed.rows, listed.columns] = listed.values * magnitude
    number = {"dtype": torch.float64, "device": matrix.device}
    converged = found.converged and data.observed > 0
    parts = data.parts(rank)
    info = RPCAInfo(
        rank=torch.tensor(rank, device=matrix.device),
        iterations=torch.tensor(found.iterations, device=matrix.device),
        residual=torch.tensor(verdict.residual, **number),
        gap=torch.tensor(torch.nan, **number) if gap is None else gap,
        converged=torch.tensor(converged, device=matrix.device),
        scale=torch.tensor(verdict.sigma * magnitude, **number),
        outlier_rate=torch.tensor(verdict.rate, **number),
        row_outlier_rate=verdict.row_rates,
        column_outlier_rate=verdict.column_rates,
        condition=s[0] / s[-1] if rank else torch.tensor(torch.nan, **number),
        row_part=parts.rows,
        column_part=parts.columns,
        bound=torch.tensor(torch.inf if converged else data.top * magnitude, **number),
    )
    return RPCAResult(u, (s * magnitude).to(u.dtype), v.mT, whole, info)


def _warn_of_rank(data: OneMatrix, u, s, v, sigma: float) -> None:
    """Says so when the last component looks like corruption taken for structure, or the residual has structure left."""
    rank = len(s)
    if rank == 0 or data.group is not None or not s[0] > 0:
        return
    # participation of entries in the last component: about 1/9 for a generic one, less for one made of few entries
    last_u, last_v = u[:, -1].double(), v[:, -1].double()
    spread = 1 / (last_u.pow(4).sum() * last_v.pow(4).sum() * data.rows * data.columns)
    if s[-1] < 1e-6 * s[0] or (min(data.rows, data.columns) >= 20 and spread < 0.01):
        warnings.warn(
            f"rank={rank} looks over-stated: the last component, {float(s[-1] / s[0]):.1e} of the first, rests on few "
            "entries, which may be corruptions taken for structure",
            RuntimeWarning,
            stacklevel=4,
        )
    elif sigma > EXACT * data.mean and min(data.rows, data.columns) >= 20:
        root = s.sqrt().to(u.dtype)
        left, right = u * root, v * root
        probe = torch.randn(data.columns, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(right)
        # the residual's largest singular value against noise's, by power steps on the clipped residual
        for _ in range(4):
            probe = probe / probe.norm()
            wide = torch.cat([right, probe], 1)
            found = data.read(torch.cat([left, 0 * left[:, :1]], 1), wide, "soft", CUTOFF * sigma).left[:, -1:]
            size = found.norm()
            narrow = torch.cat([left, found / size.clamp(min=1e-30)], 1)
            probe = data.read(narrow, torch.cat([right, 0 * probe], 1), "soft", CUTOFF * sigma).right[:, -1:]
        noise = sigma * data.share**0.5 * (data.rows**0.5 + data.columns**0.5)
        if size > 2 * noise:
            warnings.warn(
                f"rank={rank} looks under-stated: what is left has a component of {float(size):.3g}, where noise alone "
                f"would have {noise:.3g}",
                RuntimeWarning,
                stacklevel=4,
            )
