"""Robust PCA, M = L + S: L of low rank, S few but arbitrary corruptions, entries possibly missing (NaN).

With a rank given, L is two thin factors and an iteration is one read of the matrix (`residual_pass`) with r x r algebra
around it; nothing of the matrix's size is written. Two solvers share that read:

    altproj    accelerated alternating projections (Cai, Cai, Wei 2019, arXiv:1711.05519): hard thresholds and tangent-
               space projections; some 15 iterations, for clean and well-conditioned data
    annealed   Cauchy's weights whose cutoff shrinks from the largest entry to the noise, around scaled gradient steps
               (Tong, Ma, Chi 2021, arXiv:2005.08898); 45 to 110 iterations, for everything else

Without a rank, the convex program min |L|_* + lambda |S|_1 (Candes, Li, Ma, Wright 2011) finds it.
"""

import itertools
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastpref import _checks, _library
from fastpref._lowrank import ialm, ialm_pass
from fastpref._lowrank.annealing import (
    AWAY,
    BLIND,
    CLIP,
    COMPLETE,
    CUTOFF,
    FINEST,
    inverse_gram,
    ridged_inverse,
    schedules,
)
from fastpref._lowrank.batched_ialm import batched_ialm, is_small
from fastpref._lowrank.batched_rpca import batched_annealed
from fastpref._lowrank.batched_verdict import BatchVerdict, batched_verdict
from fastpref._lowrank.large_ialm import large_ialm
from fastpref._lowrank.noise import EXACT, MAD, MISFIT, OUTLIER, Fit, explains, is_better, outlier_bound
from fastpref._lowrank.outliers import Outliers, outlier_counts, outliers
from fastpref._lowrank.residual_pass import STRUCTURES, histogram_median, residual_pass
from fastpref._lowrank.storage import check_matrix, entries, factor_dtype

CORRUPTIONS = ("entries", "rows", "columns")
METHODS = ("auto", "annealed", "altproj", "ialm")
SPARSE = ("none", "coo", "dense")
SMALL = 1e-6  # sizes of the largest entry, or their inverses, from which a matrix is rescaled


class RPCAInfo(NamedTuple):
    """Per matrix, [...] of the batch."""

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


class SparseCOO(NamedTuple):
    indices: Tensor  # [K, dimensions of the matrix] int64
    values: Tensor  # [K]


class RPCAResult(NamedTuple):
    """L = U diag(S) Vh, singular values descending, 0 beyond a matrix's own rank; `sparse` is D - L at the outliers."""

    U: Tensor  # [..., m, r]
    S: Tensor  # [..., r]
    Vh: Tensor  # [..., r, n]
    sparse: Tensor | SparseCOO | None
    info: RPCAInfo

    def low_rank(self) -> Tensor:
        """L, dense."""
        return (self.U * self.S.unsqueeze(-2)) @ self.Vh


class RPCAProgress(NamedTuple):
    iteration: int
    residual: float  # |E| / |D|: what the fit still pulls at
    scale: float  # 1.4826 * median |R|; NaN before it is known
    rank: int


# ---- one large matrix ----


class _Read(NamedTuple):
    left: Tensor  # [m, r] E right, this rank's rows
    right: Tensor  # [n, r] E^T left, of all rows
    sum_squares: float
    observed: int
    max_kept: Tensor  # [], of this rank's rows
    median: float  # of |R|
    row_squares: Tensor
    column_squares: Tensor


class _Data:
    """The matrix, or this rank's rows of it, behind its one reader."""

    def __init__(self, matrix, scale, structure, group, backend):
        self.matrix, self.scale, self.structure, self.group, self.backend = matrix, scale, structure, group, backend
        self.unit = 1.0  # everything below is in this unit, by which sizes whose squares leave float32 are divided
        self.dtype = factor_dtype(matrix)
        self.rows, self.columns = matrix.shape
        found = self._pass(*self.thin(0), "identity", torch.inf)
        self.top = self.max(found.max_kept).item()
        if 0 < self.top < SMALL or 1 / SMALL < self.top < torch.inf:
            self.unit = 2.0 ** math.frexp(self.top)[1]
            self.scale, self.top = self.scale / self.unit, self.top / self.unit
            found = self._pass(*self.thin(0), "identity", torch.inf)
        everything = self._shared(found)
        self.observed, self.norm = everything.observed, everything.sum_squares**0.5
        self.total_rows = self.sum(torch.tensor([self.rows], device=matrix.device))[0].item()
        self.share = self.observed / max(self._entries(), 1)
        self.mean = min(self.mean_size(), self.top)
        self.typical = self.mean * self.observed**0.5  # |D|, were all entries of mean size: outliers do not count more

    def _entries(self) -> int:
        n = self.columns
        return n * (n - 1) if self.structure == "skew" else self.total_rows * n

    def mean_size(self) -> float:
        """Mean |R| of the last read, to a percent: from its histogram."""
        counts = self._histogram
        if counts.sum() == 0:
            return 0.0
        edges = (torch.arange(len(counts) + 1, dtype=torch.int32) << 18).view(torch.float32).double()
        middle = ((edges[:-1] + edges[1:]) / 2).where(counts.cpu() > 0, 0.0)
        return float((middle * counts.cpu()).sum() / counts.sum())

    def outlier_counts(self, left, right, threshold: float):
        found = outlier_counts(self.matrix, left, right, threshold, scale=self.scale)
        for part in (found.columns, found.column_observed, found.rest_squares):
            self.sum(part)
        return found

    def observed_lines(self) -> tuple[Tensor, Tensor]:
        """Observed entries of this rank's rows, and of the columns."""
        found = self.outlier_counts(*self.thin(0), torch.inf)
        return found.row_observed, found.column_observed

    def thin(self, rank: int) -> tuple[Tensor, Tensor]:
        like = {"dtype": self.dtype, "device": self.matrix.device}
        return torch.zeros(self.rows, rank, **like), torch.zeros(self.columns, rank, **like)

    def sum(self, tensor: Tensor) -> Tensor:
        """Over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def gram(self, left: Tensor) -> Tensor:
        """left^T left over all rows, float64."""
        wide = left.double()
        return self.sum(wide.mT @ wide)

    def _pass(self, left, right, psi, zeta, **options):
        return residual_pass(
            self.matrix,
            left,
            right,
            psi=psi,
            zeta=zeta,
            scale=self.scale,
            structure=self.structure,
            backend=self.backend,
            **options,
        )

    def read(self, left, right, psi, zeta, **options) -> _Read:
        return self._shared(self._pass(left, right, psi, zeta, **options))

    def _shared(self, found) -> _Read:
        """Of all ranks' rows."""
        sums = torch.cat([torch.stack([found.sum_squares, found.observed.double()]), found.histogram.double()])
        if self.group is not None:
            self.sum(sums)
            self.sum(found.right_grad)
            if found.column_squares.numel():
                self.sum(found.column_squares)
        squares, observed = sums[:2].tolist()
        self._histogram = sums[2:]
        median = histogram_median(self._histogram)
        return _Read(
            found.left_grad,
            found.right_grad,
            squares,
            int(observed),
            found.max_kept,
            0.0 if median != median else median,
            found.row_squares,
            found.column_squares,
        )

    def orthonormal(self, left: Tensor) -> Tensor:
        """A basis of left's columns, whose rows lie on all ranks; zero columns where there are fewer directions."""
        if self.group is None:
            return torch.linalg.qr(left).Q
        q = left.double()
        for _ in range(2):
            values, vectors = torch.linalg.eigh(self.gram(q))
            there = values > 1e-24 * values.amax().clamp(min=1e-300)
            q = (q @ vectors) * torch.where(there, values.clamp(min=1e-300).rsqrt(), 0.0)
        return q.to(left.dtype)

    def start(self, rank: int) -> tuple[Tensor, Tensor]:
        """Factors of the matrix clipped at three times its mean |D|, by block power steps."""
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(self.columns, rank, generator=generator, dtype=torch.float64).to(self.matrix.device, self.dtype)
        no_left, no_right = self.thin(rank)
        clip = max(CLIP * self.mean, FINEST)
        before = 0.0
        for _ in range(3):
            p = self.orthonormal(self.read(no_left, q, "soft", clip).left)
            q, r = torch.linalg.qr(self.read(p, no_right, "soft", clip).right)
            least = float(torch.linalg.svdvals(r.double())[-1])
            if least < 1.1 * before:
                break
            before = least
        p = self.read(no_left, q, "soft", clip).left / self.share
        if self.structure == "skew":
            core = q.double().mT @ p.double()
            return q, q @ ((core - core.mT) / 2).mT.to(self.dtype)
        return p, q


class _Verdict(NamedTuple):
    """What L = left right^T leaves of the matrix, beyond a threshold taken for corrupted."""

    threshold: float
    rate: float
    row_rates: Tensor  # [m]
    column_rates: Tensor  # [n]
    residual: float  # |D - L - S| / |D|
    suspicious: bool  # a row or column is mostly outliers: it may be one that the fit got wrong


class _Solve(NamedTuple):
    left: Tensor
    right: Tensor
    iterations: int
    converged: bool
    median: float
    stopped: bool = False  # by the callback
    verdict: _Verdict | None = None  # of corrupted entries


def _judge(data: _Data, left, right, threshold: float) -> _Verdict:
    found = data.outlier_counts(left, right, threshold)
    row_rates, column_rates = _rates(found.rows, found.row_observed), _rates(found.columns, found.column_observed)
    worst = torch.cat([column_rates.new_zeros(1), row_rates, column_rates]).amax()
    return _Verdict(
        threshold,
        float(_rates(found.columns.sum(), found.column_observed.sum())),
        row_rates,
        column_rates,
        float(found.rest_squares) ** 0.5 / data.norm if data.norm else 0.0,
        float(data.max(worst)) > MISFIT,
    )


def _rates(counts: Tensor, observed: Tensor) -> Tensor:
    return counts.double() / observed.clamp(min=1)


def _relative(step: Tensor, factor: Tensor, data: _Data | None = None) -> float:
    """|step| / |factor|; with data, of rows that lie on all ranks."""
    squares = torch.stack([step.double().square().sum(), factor.double().square().sum()])
    if data is not None:
        data.sum(squares)
    return float((squares[0] / squares[1].clamp(min=1e-300)).sqrt())


def _annealed(data: _Data, left, right, schedule, tol, max_iter, report, corruption, warm) -> _Solve:
    left, right = left.clone(), right.clone()
    skew = data.structure == "skew"
    if skew:  # right = left core stays so under scaled steps, and keeps the product skew
        core = torch.linalg.lstsq(left.double(), right.double()).solution
        core = ((core - core.mT) / 2).to(data.dtype)
        right = left @ core
    lines = None if corruption == "entries" else _Lines(data, corruption)
    finest = FINEST * data.mean
    read = data.read(left, right, "identity", torch.inf, squares=lines is not None)
    if lines is not None:
        zeta = lines.largest(read)
    else:
        zeta = (
            CUTOFF * MAD * read.median
            if warm
            else min(data.max(read.max_kept).item(), schedule.first * data.mean_size())
        )
    zeta = max(zeta, finest)
    quiet, size = 0, schedule.step / data.share
    for iteration in range(1, max_iter + 1):
        if lines is None:
            read = data.read(left, right, "cauchy", zeta)
            median = read.median
        else:
            weights, median = lines.weigh(read, zeta)
            read = data.read(left, right, "identity", torch.inf, squares=True, **weights)
        residual = read.sum_squares**0.5 / data.norm
        left_step = size * (read.left @ inverse_gram(right))
        change = _relative(left_step, left, data)
        if skew:
            left += left_step
            right = left @ core
        else:
            right_step = size * (read.right @ ridged_inverse(data.gram(left)).to(data.dtype))
            change = max(change, _relative(right_step, right))
            left += left_step
            right += right_step
        zeta = max(schedule.decay * zeta, finest, CUTOFF * MAD * median if iteration > BLIND else 0.0)
        quiet = quiet + 1 if change < tol else 0
        if report(iteration, residual, MAD * median, left.shape[1]):
            return _Solve(left, right, iteration, False, median, True)
        done = read.sum_squares**0.5 < tol * data.typical or quiet == 3
        if done or not change < AWAY:
            break
    converged = done
    median = data.read(left, right, "cauchy", zeta).median
    if not median <= 2 * data.top:  # the steps, scaled up for missing entries, led away: too little is observed
        left, right, converged = torch.zeros_like(left), torch.zeros_like(right), False
        median = data.read(left, right, "identity", torch.inf).median
    return _Solve(left, right, iteration, converged, median)


class _Lines:
    """Rows or columns that are corrupted as wholes: weights by the size of their residuals."""

    def __init__(self, data: _Data, corruption: str):
        self.data, self.rows = data, corruption == "rows"
        self.observed = data.observed_lines()
        self.counts = self.observed[0 if self.rows else 1].double()

    def sizes(self, read: _Read) -> Tensor:
        """Root mean squares of the lines' residuals; NaN: an empty line."""
        squares = read.row_squares if self.rows else read.column_squares
        return (squares / self.counts.where(self.counts > 0, torch.nan)).sqrt()

    def all_sizes(self, read: _Read) -> Tensor:
        sizes = self.sizes(read)
        if not self.rows or self.data.group is None:
            return sizes
        every = [None] * dist.get_world_size(self.data.group)
        dist.all_gather_object(every, sizes.cpu(), group=self.data.group)
        return torch.cat(every).to(sizes.device)

    def largest(self, read: _Read) -> float:
        return float(self.all_sizes(read).nan_to_num(0.0).amax())

    def weigh(self, read: _Read, zeta: float) -> tuple[dict, float]:
        sizes = self.sizes(read)
        weights = (1 / (1 + (sizes / zeta) ** 2)).nan_to_num(0.0).to(self.data.dtype)
        median = float(self.all_sizes(read).nanmedian().nan_to_num(0.0)) / MAD
        return {"row_weights" if self.rows else "column_weights": weights}, median

    def _part(self, wrong: Tensor) -> Tensor:
        """The lines that are wrong, copied."""
        matrix = self.data.matrix
        return (matrix[wrong] if self.rows else matrix[:, wrong]).contiguous()

    def verdict(self, wrong: Tensor, residual: float) -> _Verdict:
        """All observed entries of the lines that are wrong count as outliers."""
        part, none = self._part(wrong), self.data.thin(0)
        left, right = (none[0][wrong], none[1]) if self.rows else (none[0], none[1][wrong])
        inside = outlier_counts(part, left, right, torch.inf)
        rows, columns = self.observed
        if self.rows:
            row_counts, column_counts = rows * wrong, self.data.sum(inside.column_observed)
        else:
            row_counts, column_counts = inside.row_observed, columns * wrong
        return _Verdict(
            0.0,
            float(_rates(column_counts.sum(), columns.sum())),
            _rates(row_counts, rows),
            _rates(column_counts, columns),
            residual,
            False,
        )

    def entries(self, wrong: Tensor, left: Tensor, right: Tensor) -> Outliers:
        left, right = (left[wrong], right) if self.rows else (left, right[wrong])
        found = outliers(self._part(wrong), left, right, 0.0, scale=self.data.scale)
        lines = wrong.nonzero().flatten()
        if self.rows:
            return found._replace(rows=lines[found.rows])
        return found._replace(columns=lines[found.columns])


def _altproj(data: _Data, rank: int, left, right, tol, max_iter, report) -> _Solve:
    """From factors of the start; thresholds beta (s_{r+1} + gamma^t s_1), gamma = 1/2, beta = 1 / (2 (mn)^(1/4))."""
    u, s, v = _svd_of(data, left, right)
    beta = 0.5 / (data.total_rows * data.columns) ** 0.25
    first, zeta = s[0].item(), 4 * beta * s[0].item()
    best, worse = float("inf"), 0
    for iteration in range(1, max_iter + 1):
        root = s.sqrt().clamp(min=1e-30 * max(first, 1e-30)).to(data.dtype)
        read = data.read(u * root, v * root, "hard", max(zeta, 1e-300))
        residual = read.sum_squares**0.5 / data.norm
        if report(iteration, residual, MAD * read.median, rank):
            return _Solve(u * root, v * root, iteration, False, read.median, True)
        if read.sum_squares**0.5 < tol * data.typical and explains(read.median, data.mean, tol):
            return _Solve(u * root, v * root, iteration, True, read.median)
        best, worse = (residual, 0) if residual < 0.9 * best else (best, worse + 1)
        if worse == 6:
            break
        ev, etu = (read.left / root).double(), (read.right / root).double()
        wide_u, wide_v = u.double(), v.double()
        w = data.sum(wide_u.mT @ ev)
        q1, r1 = torch.linalg.qr(etu - wide_v @ w.mT)
        outside = ev - wide_u @ w
        if data.group is None:
            q2, r2 = torch.linalg.qr(outside)
        else:
            q2 = data.orthonormal(outside)
            r2 = data.sum(q2.mT @ outside)
        zero = torch.zeros_like(w)
        middle = torch.cat([torch.cat([s.diag() + w, r1.mT], 1), torch.cat([r2, zero], 1)])
        p, sigma, qh = torch.linalg.svd(middle)
        u = (torch.cat([wide_u, q2], 1) @ p[:, :rank]).to(data.dtype)
        v = (torch.cat([wide_v, q1], 1) @ qh.mT[:, :rank]).to(data.dtype)
        s = sigma[:rank]
        zeta = beta * (sigma[rank].item() + 0.5**iteration * sigma[0].item())
        zeta = max(zeta, 10 * tol * data.mean)  # no entry that is explained may pass for an outlier
    return _Solve(u * root, v * root, iteration, False, read.median)


def _svd_of(data: _Data, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """left right^T as U [m, r], S [r] float64, V [n, r]."""
    wide_left, wide_right = left.double(), right.double()
    q = data.orthonormal(wide_left)
    v, r = torch.linalg.qr(wide_right)
    p, s, qh = torch.linalg.svd(data.sum(q.mT @ wide_left) @ r.mT)
    return (q @ p).to(left.dtype), s, (v @ qh.mT).to(left.dtype)


def _fixed_rank(data, rank, corruption, method, tol, max_iter, warm, report) -> _Solve:
    entries = corruption == "entries"

    def judged(found: _Solve) -> _Solve:
        if not entries:
            return found
        return found._replace(verdict=_judge(data, found.left, found.right, outlier_bound(found.median, data.mean)))

    if data.norm == 0 or rank == 0:
        left, right = data.thin(rank)
        median = data.read(left, right, "identity", torch.inf).median
        return judged(_Solve(left, right, 0, data.observed > 0, median))
    if warm is not None and not warm[1].any():  # nothing, from which no step leads away
        warm = None
    left, right = data.start(rank) if warm is None else warm
    plain = entries and data.structure == "general" and rank < min(data.total_rows, data.columns)
    if method == "altproj" and not plain:
        raise ValueError(
            "method='altproj' needs structure='general', corruption='entries' and rank < min(m, n), got "
            f"structure={data.structure!r}, corruption={corruption!r}, rank={rank}"
        )
    spent, best = 0, None
    if method == "altproj" or (method == "auto" and plain and warm is None and data.share >= 0.9):
        budget = max_iter if method == "altproj" else min(40, max_iter)
        found = judged(_altproj(data, rank, left, right, tol, budget, report))
        exact = found.converged and not found.verdict.suspicious and found.verdict.residual <= 3 * tol
        if method == "altproj" or found.stopped or exact:
            return found
        spent, best = found.iterations, found if found.iterations == max_iter else None
    tries = schedules(data.share >= COMPLETE, rank >= min(data.total_rows, data.columns))
    tries = tries[:1] if warm is not None else tries
    for attempt, schedule in enumerate(tries):
        if spent == max_iter:
            break
        budget = math.ceil((max_iter - spent) * (schedule.most if attempt < len(tries) - 1 else 1.0))
        begin = left, right
        if schedule.again and best.right.any():
            begin = best.left, best.right
        found = judged(_annealed(data, *begin, schedule, tol, budget, report, corruption, warm is not None))
        spent += found.iterations
        new, same = _compared(found, data, tol), False
        if best is None:
            best = found
        else:
            better, same = is_better(new, _compared(best, data, tol))
            same &= found.converged
            best = found if better else best
        if found.stopped or ((new.explained or same) and not (entries and found.verdict.suspicious)):
            break
    return best._replace(iterations=spent)


def _compared(found: _Solve, data: _Data, tol: float) -> Fit:
    rate = found.verdict.rate if found.verdict is not None else 0.0
    return Fit(*map(torch.tensor, (found.median, rate, explains(found.median, data.mean, tol))))


def _warn_of_rank(data: _Data, u, s, v, scale) -> None:
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
            stacklevel=5,
        )
    elif scale > EXACT * data.mean and min(data.rows, data.columns) >= 20:
        root = s.sqrt().to(u.dtype)
        left, right = u * root, v * root
        probe = torch.randn(data.columns, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(right)
        # the residual's largest singular value against noise's, by power steps on the clipped residual
        for _ in range(4):
            probe = probe / probe.norm()
            wide = torch.cat([right, probe], 1)
            found = data.read(torch.cat([left, 0 * left[:, :1]], 1), wide, "soft", CUTOFF * scale).left[:, -1:]
            size = found.norm()
            narrow = torch.cat([left, found / size.clamp(min=1e-30)], 1)
            probe = data.read(narrow, torch.cat([right, 0 * probe], 1), "soft", CUTOFF * scale).right[:, -1:]
        noise = scale * data.share**0.5 * (data.rows**0.5 + data.columns**0.5)
        if size > 2 * noise:
            warnings.warn(
                f"rank={rank} looks under-stated: what is left has a component of {float(size):.3g}, where noise alone "
                f"would have {noise:.3g}",
                RuntimeWarning,
                stacklevel=5,
            )


def _single(matrix, rank, structure, corruption, method, tol, max_iter, scale, warm, sparse, report, group, backend):
    data = _Data(matrix, scale, structure, group, backend)
    if warm is not None:
        warm = warm[0] / data.unit, warm[1]
    return _result(data, _fixed_rank(data, rank, corruption, method, tol, max_iter, warm, report), corruption, sparse)


def _reporter(callback):
    count = itertools.count(1)  # over all solvers that one call tries

    def report(_, residual, noise, rank):
        return callback is not None and callback(RPCAProgress(next(count), residual, noise, rank))

    return report


def _dense(matrix: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """[1, m, n], NaN where missing."""
    return (entries(matrix, dtype) * scale).unsqueeze(0)


def _rank_free(matrix, structure, corruption, lam, tol, max_iter, scale, sparse, callback, backend) -> RPCAResult:
    """The convex program; where noise shrinks L, or lines leave traces in it, a fit of the rank it found."""
    data = _Data(matrix, scale, structure, None, backend)
    report = _reporter(callback)
    options = {
        "lam": lam,
        "tol": tol,
        "max_iter": max_iter,
        "report": lambda iteration, residual, rank: report(iteration, residual, float("nan"), rank),
    }
    entrywise = corruption == "entries"
    if entrywise and callback is None and is_small(*matrix.shape):
        found = batched_ialm(_dense(matrix, data.scale, data.dtype), lam=lam, tol=tol, max_iter=max_iter)
    elif entrywise and backend in (None, "native") and ialm_pass.is_native(matrix):
        found = large_ialm(matrix, scale=data.scale, backend=backend, **options)
    else:
        found = ialm.ialm(_dense(matrix, data.scale, data.dtype), corruption=corruption, **options)
    rank = int(found.rank)
    noisy = float(found.dense_share) > ialm.NOISY and corruption == "entries"
    if noisy:
        rank = ialm.rank_by_gap(found.S[0])
    if structure == "skew":
        rank += rank % 2
    root = found.S[0].sqrt()
    left, right = (found.U[0] * root)[:, :rank], (found.Vh[0].mT * root)[:, :rank]
    spent, certified = int(found.iterations), bool(found.converged)
    polished = rank and left.shape[1] == rank and (noisy or structure == "skew" or corruption != "entries")
    if polished and spent < max_iter:
        warm = None if noisy else (left, right)
        fit = _fixed_rank(data, rank, corruption, "annealed", tol, min(300, max_iter - spent), warm, report)
        fit = fit._replace(iterations=spent + fit.iterations, converged=certified and fit.converged)
    else:
        read = data.read(left, right, "identity", torch.inf)
        fit = _Solve(left, right, spent, certified, read.median)
        if corruption == "entries":
            fit = fit._replace(verdict=_judge(data, left, right, outlier_bound(fit.median, data.mean)))
    return _result(data, fit, corruption, sparse, found.gap[0])


def _result(data: _Data, found: _Solve, corruption: str, sparse: str, gap: Tensor | None = None) -> RPCAResult:
    matrix, rank = data.matrix, found.left.shape[1]
    u, s, v = _svd_of(data, found.left, found.right)
    root = s.sqrt().to(u.dtype)
    noise = MAD * found.median
    verdict, lines = found.verdict, None
    if verdict is not None:
        if gap is None:
            _warn_of_rank(data, u, s, v, noise)
    else:
        lines = _Lines(data, corruption)
        read = data.read(u * root, v * root, "identity", torch.inf, squares=True)
        sizes, every = lines.sizes(read), lines.all_sizes(read)
        noise = float(every.nanmedian().nan_to_num(0.0))
        wrong = sizes > max(OUTLIER * noise, EXACT * data.mean)
        squares = torch.where(wrong, 0.0, read.row_squares if lines.rows else read.column_squares).sum().reshape(1)
        kept = float(data.sum(squares) if lines.rows else squares) ** 0.5
        verdict = lines.verdict(wrong, kept / data.norm if data.norm else 0.0)
    whole = None
    if sparse != "none":
        if lines is None:
            listed = outliers(matrix, u * root, v * root, verdict.threshold, scale=data.scale)
        else:
            listed = lines.entries(wrong, u * root, v * root)
        if sparse == "coo":
            whole = SparseCOO(torch.stack(listed[:2], 1), listed.values * data.unit)
        else:
            whole = torch.zeros(matrix.shape, dtype=data.dtype, device=matrix.device)
            whole[listed.rows, listed.columns] = listed.values * data.unit
    number = {"dtype": torch.float64, "device": matrix.device}
    info = RPCAInfo(
        torch.tensor(rank, device=matrix.device),
        torch.tensor(found.iterations, device=matrix.device),
        torch.tensor(verdict.residual, **number),
        torch.tensor(torch.nan, **number) if gap is None else gap,
        torch.tensor(found.converged and data.observed > 0, device=matrix.device),
        torch.tensor(noise * data.unit, **number),
        torch.tensor(verdict.rate, **number),
        verdict.row_rates,
        verdict.column_rates,
        s[0] / s[-1] if rank else torch.tensor(torch.nan, **number),
    )
    return RPCAResult(u, (s * data.unit).to(u.dtype), v.mT, whole, info)


# ---- many small matrices ----


class _BatchFit(NamedTuple):
    left: Tensor  # [B, m, r], zero beyond a matrix's own rank
    right: Tensor  # [B, n, r]
    rank: Tensor  # [B]
    iterations: Tensor
    converged: Tensor
    median: Tensor  # of |R|
    gap: Tensor

    @classmethod
    def of(cls, found, gap: Tensor | None = None) -> "_BatchFit":
        rank = torch.full_like(found.iterations, found.left.shape[-1])
        gap = torch.full(rank.shape, torch.nan, dtype=torch.float64, device=rank.device) if gap is None else gap
        return cls(found.left, found.right, rank, found.iterations, found.converged, found.median, gap)


def _rank_free_batch(matrix, structure, lam, tol, max_iter, sparse, backend) -> RPCAResult:
    flat = matrix.reshape(matrix.shape[:-2].numel(), *matrix.shape[-2:])
    if not backend and not is_small(*flat.shape[1:]):
        backend = "reference"
    found = batched_ialm(flat, lam=lam, tol=tol, max_iter=max_iter, backend=backend)
    root = found.S.sqrt().unsqueeze(-2)
    left, right = found.U * root, found.Vh.mT * root
    rank, iterations, converged, median = (
        tensor.clone() for tensor in (found.rank, found.iterations, found.converged, found.median)
    )
    noisy = found.dense_share > ialm.NOISY
    skew = structure == "skew"
    for b in noisy.nonzero().flatten().tolist():
        rank[b] = ialm.rank_by_gap(found.S[b])
    if skew:
        rank += rank % 2
    keep = torch.arange(left.shape[-1], device=left.device) < rank.unsqueeze(-1)
    left, right = left * keep.unsqueeze(-2), right * keep.unsqueeze(-2)
    for r in (rank[noisy | skew]).unique().tolist():  # fits of the rank that was found, without the shrinkage
        part = ((noisy | skew) & (rank == r)).nonzero().flatten()
        if r == 0 or r > left.shape[-1]:
            continue
        warm = None
        if skew and not noisy[part].any():
            warm = left[part, :, :r], right[part, :, :r]
        part = part[iterations[part] < max_iter]
        if not len(part):
            continue
        fit, _ = batched_annealed(flat[part], r, skew=skew, tol=tol, max_iter=300, warm=warm, backend=backend)
        left[part], right[part] = left[part] * 0, right[part] * 0
        left[part, :, :r], right[part, :, :r] = fit.left, fit.right
        iterations[part] += fit.iterations
        converged[part] &= fit.converged
        median[part] = fit.median
    fit = _BatchFit(left, right, rank, iterations, converged, median, found.gap)
    return _batch_result(matrix, fit, batched_verdict(flat, left, right, median, backend), sparse)


def _batch_result(matrix: Tensor, found: _BatchFit, verdict: BatchVerdict, sparse: str) -> RPCAResult:
    *lead, m, n = matrix.shape
    rank = found.left.shape[-1]
    s = verdict.S * (torch.arange(rank, device=matrix.device) < found.rank.unsqueeze(-1))
    info = RPCAInfo(
        found.rank.view(lead),
        found.iterations.view(lead),
        verdict.residual.view(lead),
        found.gap.view(lead),
        found.converged.view(lead),
        (MAD * found.median.double()).view(lead),
        verdict.rate.view(lead),
        verdict.row_rates.view(*lead, m),
        verdict.column_rates.view(*lead, n),
        _condition(s, found.rank).view(lead),
    )
    whole = None if sparse == "none" else _batch_sparse(matrix, found, verdict, sparse)
    u, vh = verdict.U.view(*lead, m, rank), verdict.Vh.view(*lead, rank, n)
    return RPCAResult(u, s.view(*lead, rank), vh, whole, info)


def _batch_sparse(matrix: Tensor, found: _BatchFit, verdict: BatchVerdict, sparse: str) -> Tensor | SparseCOO:
    *lead, m, n = matrix.shape
    flat = matrix.reshape(-1, m, n) if matrix.numel() else matrix.new_empty(len(found.rank), m, n)
    bound = outlier_bound(found.median, verdict.mean.to(matrix.dtype))[:, None, None]
    dense, listed = torch.zeros_like(flat) if sparse == "dense" else None, []
    chunk = max(1, (1 << 24) // max(m * n, 1))
    for begin in range(0, len(flat), chunk):
        part = slice(begin, begin + chunk)
        residual = flat[part] - found.left[part] @ found.right[part].mT
        far = residual.abs() > bound[part]
        if dense is not None:
            dense[part] = torch.where(far, residual, 0)
        else:
            where = far.nonzero()
            listed.append((where + where.new_tensor([begin, 0, 0]), residual[far]))
    if dense is not None:
        return dense.view(matrix.shape)
    indices = torch.cat([i for i, _ in listed]) if listed else torch.empty(0, 3, dtype=torch.int64)
    if len(lead) != 1:
        indices = torch.cat([torch.stack(torch.unravel_index(indices[:, 0], lead), 1), indices[:, 1:]], 1)
    return SparseCOO(indices, torch.cat([v for _, v in listed]) if listed else flat.new_empty(0))


def _condition(s: Tensor, rank: Tensor) -> Tensor:
    if s.shape[-1] == 0:
        return torch.full(rank.shape, torch.nan, dtype=torch.float64, device=s.device)
    last = s.gather(-1, (rank - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(rank > 0, (s[:, 0] / last).double(), torch.nan)


# ---- public ----


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
        RPCAResult. Matrices that did not converge say so in info.converged; they do not hold up the others. With a
        rank, converged means that the iteration came to rest: where much is corrupted and the matrix small that may be
        at a wrong answer, of which info.scale and info.outlier_rate tell. Without, that the duality gap has closed too;
        gap is that of the convex program's L, before a fit of its rank undoes what noise made of it.

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
    if structure == "skew" and matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"structure='skew' needs square matrices, got shape {list(matrix.shape)}")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed process group, got {type(group).__name__}")
    m, n = matrix.shape[-2:]
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
            return _empty(matrix, rank or 0, sparse)
        if matrix.dim() == 2:
            check_matrix(matrix)
            if structure == "skew":
                _check_skew(matrix)
            if rank is None:
                return _rank_free(
                    matrix, structure, corruption, lam, tol, max_iter, scale, sparse, callback, backend
                )  # fmt: skip
            factors = None if warm is None else _warm_factors(warm, (m, rank), (rank, n))
            return _single(
                matrix, rank, structure, corruption, method, tol, max_iter, scale, factors, sparse,
                _reporter(callback), group, backend,
            )  # fmt: skip
        single_only = {
            "corruption": corruption != "entries",
            "callback": callback is not None,
            "group": group is not None,
            "scale": scale != 1.0,
        }
        if named := [name for name, given in single_only.items() if given]:
            raise ValueError(f"{named[0]} is for one matrix, got a batch of shape {list(matrix.shape)}")
        if method == "altproj":
            raise ValueError("method='altproj' is for one matrix; batches are annealed")
        if not matrix.dtype.is_floating_point:
            raise TypeError(f"matrix must be floating-point in a batch, got {matrix.dtype}")
        matrix = matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()
        lead = matrix.shape[:-2]
        _library.check_backend("batched_rpca", backend)
        if structure == "skew":
            _check_skew(matrix)
        if rank is None or _library.choose_backend("batched_rpca", backend or "", matrix.device.type) == "reference":
            _check_finite(matrix)
        if rank is None:
            return _rank_free_batch(matrix, structure, lam, tol, max_iter, sparse, backend or "")
        factors = None
        if warm is not None:
            left, right = _warm_factors(warm, (*lead, m, rank), (*lead, rank, n))
            factors = left.reshape(-1, m, rank).to(matrix), right.reshape(-1, n, rank).to(matrix)
        flat = matrix.reshape(lead.numel(), m, n)
        skew = structure == "skew"
        found, verdict = batched_annealed(
            flat, rank, skew=skew, tol=tol, max_iter=max_iter, warm=factors, backend=backend or ""
        )
        if not verdict.mean.isfinite().all():  # the kernels read every entry, and stop at once at such a one
            _check_finite(matrix)
        return _batch_result(matrix, _BatchFit.of(found), verdict, sparse)


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


def _empty(matrix: Tensor, rank: int, sparse: str) -> RPCAResult:
    *lead, m, n = matrix.shape
    floating = {"dtype": factor_dtype(matrix), "device": matrix.device}
    number = {"dtype": torch.float64, "device": matrix.device}
    rank = min(rank, m, n)
    whole = {"none": None, "dense": matrix.new_zeros(matrix.shape, dtype=floating["dtype"])}.get(
        sparse, SparseCOO(torch.empty(0, matrix.dim(), dtype=torch.int64), torch.empty(0, **floating))
    )
    zeros, unknown = torch.zeros(lead, **number), torch.full(lead, torch.nan, **number)
    info = RPCAInfo(
        zeros.long() + rank,
        zeros.long(),
        zeros,
        unknown,
        zeros.bool(),
        zeros,
        zeros,
        torch.zeros(*lead, m, **number),
        torch.zeros(*lead, n, **number),
        unknown,
    )
    u, vh = torch.zeros(*lead, m, rank, **floating), torch.zeros(*lead, rank, n, **floating)
    return RPCAResult(u, torch.zeros(*lead, rank, **floating), vh, whole, info)


def _check_finite(matrix: Tensor) -> None:
    infinite = matrix.isinf().nonzero()
    if len(infinite):
        where = infinite[0].tolist()
        raise ValueError(f"matrix must be finite (NaN: missing), got {matrix[tuple(where)].item()} at {where}")


def _check_rank(rank, m, n, structure, lam, method, group) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank must be an int or None, got {type(rank).__name__}")
    if rank < 0 or (rank > min(m, n) and group is None):
        raise ValueError(f"rank must be between 0 and min(m, n) = {min(m, n)}, got {rank}")
    if structure == "skew" and rank % 2:
        raise ValueError(f"rank must be even for structure='skew', got {rank}")
    if lam is not None or method == "ialm":
        raise ValueError(f"{'lam' if lam is not None else 'method=' + repr(method)} belongs to rank=None, got {rank=}")


def _warm_factors(warm: RPCAResult, u_shape, vh_shape) -> tuple[Tensor, Tensor]:
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
