"""One large matrix, or this rank's rows of it: its reads, and what a fit of it leaves as outliers.

The matrix is read where it lies, by `residual_pass` and `outliers`; sums over its rows go over the ranks of a process
group. Corruption is of single entries (`judge_entries`) or of whole rows or columns (`Lines`).
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastpref._lowrank.annealing import CLIP, FINEST
from fastpref._lowrank.determined import Observed, Parts, everything, find_parts, one_part
from fastpref._lowrank.noise import EXACT, MAD, MISFIT, OUTLIER, outlier_bound
from fastpref._lowrank.outliers import OutlierList, outlier_counts, outliers
from fastpref._lowrank.residual_pass import histogram_mean, histogram_median, residual_pass
from fastpref._lowrank.storage import factor_dtype, row_blocks

SMALL = 1e-6  # sizes of the largest entry, or their inverses, from which a matrix is rescaled


class Read(NamedTuple):
    """What a residual pass gives, of the rows of all ranks but where it says otherwise."""

    left: Tensor  # [m, r] E right, this rank's rows
    right: Tensor  # [n, r] E^T left, of all rows
    sum_squares: float
    observed: int
    max_kept: Tensor  # [], of this rank's rows
    histogram: Tensor  # of |R|
    median: float  # of |R|
    row_squares: Tensor  # [m] of this rank's rows, or [0]
    column_squares: Tensor  # [n] or [0]


class OneMatrix:
    """The matrix, or this rank's rows of it, behind its one reader."""

    def __init__(self, matrix, unit: float, structure: str, group, backend: str | None):
        self.matrix, self.structure, self.group, self.backend = matrix, structure, group, backend
        self.unit = unit  # of the stored numbers
        self.magnitude = 1.0  # what everything here is divided by, where squares of the sizes would leave float32
        self.dtype = factor_dtype(matrix)
        self.rows, self.columns = matrix.shape
        found = self._pass(*self.thin(0), "identity", torch.inf)
        self.top = self.max(found.max_kept).item()
        if 0 < self.top < SMALL or 1 / SMALL < self.top < torch.inf:
            exponent = math.frexp(self.top)[1]
            self.magnitude = 2.0 ** min(max(exponent, -1022), 1023)  # it and its inverse are numbers, too
            self.unit, self.top = self.unit / self.magnitude, self.top / self.magnitude
            found = self._pass(*self.thin(0), "identity", torch.inf)
        everything = self._over_ranks(found)
        self.observed, self.norm = everything.observed, everything.sum_squares**0.5
        self.total_rows = self.sum(torch.tensor([self.rows], device=matrix.device))[0].item()
        self.share = self.observed / max(self._entries(), 1)
        self.mean = min(histogram_mean(everything.histogram), self.top)
        self.typical = self.mean * self.observed**0.5  # |D|, were all entries of mean size: outliers do not count more

    def _entries(self) -> int:
        n = self.columns
        return n * (n - 1) if self.structure == "skew" else self.total_rows * n

    def outlier_counts(self, left, right, threshold: float):
        found = outlier_counts(self.matrix, left, right, threshold, scale=self.unit)
        for part in (found.columns, found.column_observed, found.rest_squares):
            self.sum(part)
        return found

    def observed_lines(self) -> tuple[Tensor, Tensor]:
        """Observed entries of this rank's rows, and of the columns."""
        found = self.outlier_counts(*self.thin(0), torch.inf)
        return found.row_observed, found.column_observed

    def parts(self, rank: int) -> Parts:
        """What the entries determine of a fit of this rank; of this rank's rows, and the columns."""
        skew = self.structure == "skew"
        if self.observed >= self._entries():
            return everything(self.matrix)

        def blocks():
            for block in row_blocks(self.matrix):
                part = self.matrix[block]
                yield block, (part != -128 if part.dtype == torch.int8 else ~part.isnan()).unsqueeze(0)

        shape, device = (1, self.rows, self.columns), self.matrix.device
        observed, rank = Observed(blocks, shape, device, self.sum, self.least), torch.tensor([rank], device=device)
        found, settled = one_part(observed, rank, skew)
        if not settled:
            found = find_parts(observed, rank, skew)
        return Parts(found.rows[0], found.columns[0])

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

    def least(self, tensor: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self.group)
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
            scale=self.unit,
            structure=self.structure,
            backend=self.backend,
            **options,
        )

    def read(self, left, right, psi, zeta, **options) -> Read:
        return self._over_ranks(self._pass(left, right, psi, zeta, **options))

    def _over_ranks(self, found) -> Read:
        """Of all ranks' rows."""
        sums = torch.cat([torch.stack([found.sum_squares, found.observed.double()]), found.histogram.double()])
        if self.group is not None:
            self.sum(sums)
            self.sum(found.right_grad)
            if found.column_squares.numel():
                self.sum(found.column_squares)
        squares, observed = sums[:2].tolist()
        histogram = sums[2:]
        median = histogram_median(histogram)
        return Read(
            left=found.left_grad,
            right=found.right_grad,
            sum_squares=squares,
            observed=int(observed),
            max_kept=found.max_kept,
            histogram=histogram,
            median=0.0 if median != median else median,
            row_squares=found.row_squares,
            column_squares=found.column_squares,
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

    def decompose(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """left right^T as U [m, r], S [r] float64, V [n, r]."""
        wide_left, wide_right = left.double(), right.double()
        q = self.orthonormal(wide_left)
        v, r = torch.linalg.qr(wide_right)
        p, s, qh = torch.linalg.svd(self.sum(q.mT @ wide_left) @ r.mT)
        return (q @ p).to(left.dtype), s, (v @ qh.mT).to(left.dtype)

    def start_factors(self, rank: int) -> tuple[Tensor, Tensor]:
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


# ---- outliers ----


class Verdict(NamedTuple):
    """What L = left right^T leaves of the matrix, beyond a threshold taken for corrupted."""

    threshold: float
    rate: float
    row_rates: Tensor  # [m]
    column_rates: Tensor  # [n]
    residual: float  # |D - L - S| / |D|
    sigma: float  # of the noise
    suspicious: bool = False  # a row or column is mostly outliers: it may be one that the fit got wrong
    wrong: Tensor | None = None  # bool, the rows or columns that are corrupted as wholes


def judge_entries(data: OneMatrix, left, right, median: float) -> Verdict:
    """Of a fit with this median |R|: single entries beyond `outlier_bound` are outliers."""
    threshold = outlier_bound(median, data.mean)
    found = data.outlier_counts(left, right, threshold)
    row_rates, column_rates = _share(found.rows, found.row_observed), _share(found.columns, found.column_observed)
    worst = torch.cat([column_rates.new_zeros(1), row_rates, column_rates]).amax()
    return Verdict(
        threshold=threshold,
        rate=float(_share(found.columns.sum(), found.column_observed.sum())),
        row_rates=row_rates,
        column_rates=column_rates,
        residual=float(found.rest_squares) ** 0.5 / data.norm if data.norm else 0.0,
        sigma=MAD * median,
        suspicious=float(data.max(worst)) > MISFIT,
    )


def _share(counts: Tensor, observed: Tensor) -> Tensor:
    return counts.double() / observed.clamp(min=1)


class Lines:
    """Rows or columns that are corrupted as wholes: weights by the size of their residuals."""

    def __init__(self, data: OneMatrix, corruption: str):
        self.data, self.rows = data, corruption == "rows"
        self.observed = data.observed_lines()
        self.counts = self.observed[0 if self.rows else 1].double()

    def sizes(self, read: Read) -> Tensor:
        """Root mean squares of the lines' residuals; NaN: an empty line."""
        squares = read.row_squares if self.rows else read.column_squares
        return (squares / self.counts.where(self.counts > 0, torch.nan)).sqrt()

    def all_sizes(self, read: Read) -> Tensor:
        sizes = self.sizes(read)
        if not self.rows or self.data.group is None:
            return sizes
        every = [None] * dist.get_world_size(self.data.group)
        dist.all_gather_object(every, sizes.cpu(), group=self.data.group)
        return torch.cat(every).to(sizes.device)

    def largest(self, read: Read) -> float:
        return float(self.all_sizes(read).nan_to_num(0.0).amax())

    def weights(self, read: Read, zeta: float) -> tuple[dict, float]:
        """Cauchy's, as residual_pass takes them, and the median size as if of |R|."""
        sizes = self.sizes(read)
        weights = (1 / (1 + (sizes / zeta) ** 2)).nan_to_num(0.0).to(self.data.dtype)
        median = float(self.all_sizes(read).nanmedian().nan_to_num(0.0)) / MAD
        return {"row_weights" if self.rows else "column_weights": weights}, median

    def _part(self, wrong: Tensor) -> Tensor:
        """The lines that are wrong, copied."""
        matrix = self.data.matrix
        return (matrix[wrong] if self.rows else matrix[:, wrong]).contiguous()

    def judge(self, left: Tensor, right: Tensor) -> Verdict:
        """All observed entries of the lines that are far off are outliers."""
        data = self.data
        read = data.read(left, right, "identity", torch.inf, squares=True)
        sizes = self.sizes(read)
        sigma = float(self.all_sizes(read).nanmedian().nan_to_num(0.0))
        wrong = sizes > max(OUTLIER * sigma, EXACT * data.mean)
        squares = torch.where(wrong, 0.0, read.row_squares if self.rows else read.column_squares).sum().reshape(1)
        kept = float(data.sum(squares) if self.rows else squares) ** 0.5
        none = data.thin(0)
        nothing = (none[0][wrong], none[1]) if self.rows else (none[0], none[1][wrong])
        inside = outlier_counts(self._part(wrong), *nothing, torch.inf)
        rows, columns = self.observed
        if self.rows:
            row_counts, column_counts = rows * wrong, data.sum(inside.column_observed)
        else:
            row_counts, column_counts = inside.row_observed, columns * wrong
        return Verdict(
            threshold=0.0,
            rate=float(_share(column_counts.sum(), columns.sum())),
            row_rates=_share(row_counts, rows),
            column_rates=_share(column_counts, columns),
            residual=kept / data.norm if data.norm else 0.0,
            sigma=sigma,
            wrong=wrong,
        )

    def outliers(self, wrong: Tensor, left: Tensor, right: Tensor) -> OutlierList:
        left, right = (left[wrong], right) if self.rows else (left, right[wrong])
        found = outliers(self._part(wrong), left, right, 0.0, scale=self.data.unit)
        lines = wrong.nonzero().flatten()
        if self.rows:
            return found._replace(rows=lines[found.rows])
        return found._replace(columns=lines[found.columns])
