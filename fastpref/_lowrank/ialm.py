"""Rank-free robust PCA: min |L|_* + lambda |S|_1 with L + S = M on what is observed, and a proof of how good it is.

Inexact augmented Lagrangian (Lin, Chen, Ma 2010, arXiv:1009.5055) with the singular values above the threshold taken
from a subspace that is carried from one iteration to the next, instead of a full SVD. A small residual proves nothing:
with a penalty that grows geometrically the iteration is feasible soon, and may be far from optimal. The relative
duality gap (the dual matrix scaled into the feasible set, its spectral norm bounded from above) does. Where it is open,
and from the start where entries are missing, the penalty is balanced: it grows only while the residual is large beside
the change of S, the residual of the dual. Where that leaves the gap open the subspace lags behind, and takes one more
step per iteration.
"""

from typing import NamedTuple

import torch
from torch import Tensor

GAP = 1e-3  # relative duality gap that counts as closed
RHO = 1.5  # the penalty's growth
BALANCE = 0.1  # residual over change, from which a balanced penalty grows
SETTLED = 1e-4  # change at which the gap is looked at
LOWERED = 1e-4, 0.1  # the penalty, at most and at least, where it grew freely and the gap is open
PAUSE = 5  # iterations before the gap is looked at again
SHARE = 0.02  # of rows or columns taken to be corrupted, for lambda
NOISY = 0.5  # share of S that is not zero: there is noise, and the rank is not that of L
FALL = 5.0  # ratio of a singular value of L to the first one of noise
_EXTRA = 5  # directions beside the predicted rank
_FAINT = 100  # times tol, relative to the largest singular value
_EXACT_NORM = 512  # up to this size the spectral norm comes from an SVD


class IALMSolve(NamedTuple):
    U: Tensor  # [B, m, q], q the largest rank of the batch
    S: Tensor  # [B, q], descending, zero beyond a matrix's own rank
    Vh: Tensor  # [B, q, n]
    rank: Tensor  # [B] int64
    iterations: Tensor  # [B] int64
    residual: Tensor  # [B] float64, |M - L - S| / |M|
    gap: Tensor  # [B] float64
    converged: Tensor  # [B] bool: residual below tol, and the gap closed
    dense_share: Tensor  # [B] float64, entries of S that are not zero: near 1 where there is noise


def default_lambda(observed: Tensor, corruption: str) -> Tensor:
    """1 / sqrt(p max(m, n)); for whole columns 3 / (7 sqrt(SHARE n)) (Xu, Caramanis, Sanghavi 2012, theorem 1)."""
    m, n = observed.shape[-2:]
    if corruption == "entries":
        return entries_lambda(observed.sum((-2, -1)), m, n)
    lines = m if corruption == "rows" else n
    return torch.full(observed.shape[:1], 3 / 7 / (SHARE * lines) ** 0.5, dtype=torch.float64, device=observed.device)


def entries_lambda(count: Tensor, m: int, n: int) -> Tensor:
    """The default for single entries, of matrices of which `count` entries are observed."""
    share = count.double() / max(m * n, 1)
    return 1 / (share.clamp(min=1e-30) * max(m, n)).sqrt()


def _over_entries(values: Tensor) -> Tensor:
    """[B] -> [B, 1, 1]."""
    return values[:, None, None]


class _Penalty:
    """The part of the objective that S pays, by corruption."""

    def __init__(self, lam: Tensor, corruption: str):
        self.lam, self.dim = lam, {"entries": None, "rows": -1, "columns": -2}[corruption]

    def _sizes(self, w: Tensor) -> Tensor:
        return w.abs() if self.dim is None else torch.linalg.vector_norm(w, dim=self.dim, keepdim=True)

    def shrink(self, w: Tensor, mu: Tensor) -> Tensor:
        threshold = _over_entries((self.lam / mu).to(w.dtype))
        if self.dim is None:
            return w - w.clamp(-threshold, threshold)
        return w * (1 - threshold / self._sizes(w).clamp(min=1e-30)).clamp(min=0)

    def value(self, s: Tensor) -> Tensor:
        return self.lam * self._sizes(s).double().sum((-2, -1))

    def dual(self, y: Tensor) -> Tensor:
        return self._sizes(y).double().amax((-2, -1)) / self.lam


class PenaltySchedule:
    """The penalties mu of a batch [B], the subspace steps per iteration, and when the gap is looked at."""

    def __init__(self, spectral: Tensor, complete: Tensor):
        self.mu = 1.25 / spectral
        self.top = 1e7 * self.mu
        self.balanced = ~complete
        self.grows = torch.ones_like(complete)
        self.steps = torch.ones_like(complete, dtype=torch.int64)
        self.next_look = torch.zeros_like(self.steps)

    def expected(self) -> Tensor:
        """What mu will be after this iteration, unless the residual or the gap turns it."""
        return torch.where(self.grows, torch.minimum(RHO * self.mu, self.top), self.mu)

    def done(self, running: Tensor, iteration: int, residual: Tensor, change: Tensor, tol: float) -> Tensor:
        """Whose gap is to be looked at."""
        settled = ~self.balanced | (change < SETTLED)
        return running & (residual < tol) & (iteration >= self.next_look) & settled

    def advance(self, running: Tensor, iteration: int, residual: Tensor, change: Tensor, open_gap: Tensor) -> None:
        """To the next iteration; open_gap: those that are done but for their gap."""
        self.grows = running & (~self.balanced | (residual >= BALANCE * change))
        back = self.mu * (residual / (BALANCE * change).clamp(min=1e-300)).clamp(*LOWERED)
        self.mu = torch.where(open_gap & ~self.balanced, back, self.expected())
        self.steps += open_gap & self.balanced
        self.next_look = torch.where(open_gap, iteration + PAUSE, self.next_look)
        self.balanced = self.balanced | open_gap


def start_directions(n: int, d: int, generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randn(n, min(15, d), generator=generator, dtype=torch.float64).to(like)


def next_directions(vh: Tensor, above: int, d: int, generator: torch.Generator) -> Tensor:
    """[..., n, k]: right singular vectors, and more where `above` are above the threshold (Lin, Chen, Ma 2010)."""
    k, n = vh.shape[-2:]
    wanted = min((above + 1 if above < k - _EXTRA else above + max(1, d // 20)) + _EXTRA, d)
    if wanted <= k:
        return vh.mT[..., :wanted]
    fresh = torch.randn(n, wanted - k, generator=generator, dtype=torch.float64).to(vh)
    return torch.cat([vh.mT, fresh.expand(*vh.shape[:-2], -1, -1)], -1)


def orthonormal(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Q, and R in float64. In float32 the factorisation's rounding would show in the dual matrix, mu times as large."""
    q, r = torch.linalg.qr(columns.double())
    return q.to(columns.dtype), r


def thresholded(p: Tensor, q: Tensor, r: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors of p (q r)^T, [..., m, k] and [..., k, n], and how far its values are above, float64, or 0."""
    left, s, right = torch.linalg.svd(r.mT)
    return p @ left.to(p), (s - threshold).clamp(min=0), right.to(q) @ q.mT


def significant_rank(sigma: Tensor, rank: Tensor, tol: float) -> Tensor:
    """The rank without singular values [..., k] of rounding's size."""
    return torch.minimum(rank, (sigma > _FAINT * tol * sigma[..., :1]).sum(-1)) if sigma.shape[-1] else rank


def spectral_norm_above(y: Tensor) -> Tensor:
    """[B] an upper bound of |Y|_2: exact for small matrices."""
    if min(y.shape[-2:]) <= _EXACT_NORM:
        return torch.linalg.matrix_norm(y.double(), 2)
    return norm_above(lambda x: y @ x, lambda x: y.mT @ x, y)


def norm_above(times, transposed, like: Tensor) -> Tensor:
    """|Y|_2 and no less, of matrices [..., n] like `like`: block power steps on Y x and Y^T x, plus Ritz's residual."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(like.shape[-1], 12, generator=generator, dtype=torch.float64).to(like)
    q = q.expand(*like.shape[:-2], -1, -1)
    for _ in range(100):
        q = torch.linalg.qr(q).Q
        u, s, vh = torch.linalg.svd(times(q), full_matrices=False)
        back = transposed(u)
        top, value = back[..., :1], s[..., :1, None]
        residual = torch.linalg.vector_norm(top - q @ vh[..., :1, :].mT * value, dim=(-2, -1))
        value = s[..., 0]
        if (residual <= 1e-4 * value).all():
            break
        q = back
    return (value + residual).double()


def norm_below(times, transposed, like: Tensor) -> Tensor:
    """|D|_2 to a few percent, from below; arguments as norm_above's."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(like.shape[-1], 2, generator=generator, dtype=torch.float64).to(like)
    x = x.expand(*like.shape[:-2], -1, -1)
    for _ in range(8):
        x = torch.linalg.qr(transposed(times(x))).Q
    return torch.linalg.matrix_norm(times(x).double(), 2)


def relative_gap(inner, spectral, dual, nuclear, sparse) -> Tensor:
    """1 - dual objective / primal: <Y, D>, |Y|_2, Y's dual norm of S's penalty, |L|_* and what S pays."""
    size = torch.maximum(spectral, dual).clamp(min=1e-300)
    return 1 - inner / size / (nuclear + sparse).clamp(min=1e-300)


def ialm(matrix: Tensor, *, lam=None, tol: float, max_iter: int, corruption: str = "entries", report=None) -> IALMSolve:
    """[B, m, n] float32 or float64, NaN missing. report(iteration, residual, rank) after each; true stops."""
    batch, m, n = matrix.shape
    d = min(m, n)
    device = matrix.device
    observed = ~matrix.isnan()
    data = torch.where(observed, matrix, 0)
    complete = bool(observed.all())
    count = observed.sum((-2, -1))
    given = None if lam is None else torch.full((batch,), float(lam), device=device).double()
    lam = default_lambda(observed, corruption) if given is None else given
    penalty = _Penalty(lam, corruption)
    norm = torch.linalg.vector_norm(data.double(), dim=(-2, -1))
    running = norm > 0
    spectral = torch.where(running, norm_below(lambda x: data @ x, lambda x: data.mT @ x, data), 1.0)
    y = data / _over_entries(torch.maximum(spectral, penalty.dual(data)).to(data.dtype))
    schedule = PenaltySchedule(spectral, count == m * n)
    iterations = torch.zeros(batch, dtype=torch.int64, device=device)
    rank = torch.zeros_like(iterations)
    residual = torch.zeros(batch, dtype=torch.float64, device=device)
    gap = torch.full((batch,), torch.nan, dtype=torch.float64, device=device)
    converged = ~running & (count > 0)
    sparse, low = torch.zeros_like(data), torch.zeros_like(data)
    generator = torch.Generator().manual_seed(0)
    q = start_directions(n, d, generator, data).expand(batch, -1, -1)
    u, sigma, vh = data.new_zeros(batch, m, 0), data.new_zeros(batch, 0), data.new_zeros(batch, 0, n)
    for iteration in range(1, max_iter + 1):
        if not running.any():
            break
        mu = schedule.mu
        inverse_mu = _over_entries((1 / mu).to(data.dtype))
        a = data - sparse + y * inverse_mu
        if not complete:
            a = torch.where(observed, a, low)
        for _ in range(2 if iteration == 1 else int(schedule.steps[running].max())):
            p = orthonormal(a @ q)[0]
            q, r = orthonormal(a.mT @ p)
        u_new, excess, vh_new = thresholded(p, q, r, 1 / mu.unsqueeze(-1))
        above = (excess > 0).sum(-1)
        low_new = (u_new * excess.unsqueeze(-2).to(p)) @ vh_new
        w = data - low_new + y * inverse_mu
        w = torch.where(observed, w, 0)
        sparse_new = penalty.shrink(w, mu)
        y_new = (w - sparse_new) * _over_entries(mu.to(data.dtype))
        left_over = torch.linalg.vector_norm((y_new - y) * inverse_mu, dim=(-2, -1)).double() / norm.clamp(min=1e-300)
        dual_change = torch.where(observed, sparse_new - sparse, low_new - low) * _over_entries(mu.to(data.dtype))
        change = torch.linalg.vector_norm(dual_change, dim=(-2, -1)) / torch.linalg.vector_norm(y_new, dim=(-2, -1))
        go = _over_entries(running)
        y, sparse, low = torch.where(go, y_new, y), torch.where(go, sparse_new, sparse), torch.where(go, low_new, low)
        residual = torch.where(running, left_over, residual)
        rank = torch.where(running, above, rank)
        u, vh = _merge_where(go, u_new, u, -1), _merge_where(go, vh_new, vh, -2)
        sigma = _merge_where(running.unsqueeze(-1), excess.to(data.dtype), sigma, -1)
        iterations += running
        change = change.double()
        done = schedule.done(running, iteration, residual, change, tol)
        if done.any():
            gap[done] = _gap(y[done], data[done], sigma[done], sparse[done], lam[done], corruption)
        closed = done & (gap <= GAP)
        converged |= closed
        schedule.advance(running, iteration, residual, change, done & ~closed)
        running = running & ~closed
        q = next_directions(vh_new, int(above.max()), d, generator)
        if report is not None and report(iteration, float(residual.max()), int(rank.max())):
            running = torch.zeros_like(running)
            converged = torch.zeros_like(converged)
    rank = significant_rank(sigma, rank, tol)
    most = int(rank.max()) if batch else 0
    share = (sparse != 0).sum((-2, -1)).double() / count.clamp(min=1)
    sigma = sigma[..., :most] * (torch.arange(most, device=device) < rank.unsqueeze(-1))
    return IALMSolve(
        U=u[..., :most],
        S=sigma,
        Vh=vh[..., :most, :],
        rank=rank,
        iterations=iterations,
        residual=residual,
        gap=gap,
        converged=converged,
        dense_share=share,
    )


def rank_by_gap(sigma: Tensor) -> int:
    """Where singular values [q], descending, fall off to those that noise left above the threshold; all of them where
    none do. What is below a thousandth of the first is noise in any case, and falls off as it may."""
    sigma = sigma[sigma > 0].double()
    if len(sigma) < 2:
        return len(sigma)
    floored = sigma.clamp(min=1e-3 * sigma[0])
    ratios = floored[:-1] / floored[1:]
    return int(ratios.argmax()) + 1 if ratios.max() > FALL else len(sigma)


def _merge_where(mask: Tensor, new: Tensor, old: Tensor, dim: int) -> Tensor:
    """new where mask, both widened to the longer of the two along dim."""
    if new.shape[dim] == old.shape[dim]:
        return torch.where(mask, new, old)
    size = max(new.shape[dim], old.shape[dim])
    wide = []
    for tensor in (new, old):
        shape = list(tensor.shape)
        shape[dim] = size - tensor.shape[dim]
        wide.append(torch.cat([tensor, tensor.new_zeros(shape)], dim))
    return torch.where(mask, *wide)


def _gap(y, data, sigma, sparse, lam, corruption) -> Tensor:
    penalty = _Penalty(lam, corruption)
    inner, nuclear = (y.double() * data).sum((-2, -1)), sigma.double().sum(-1)
    return relative_gap(inner, spectral_norm_above(y), penalty.dual(y), nuclear, penalty.value(sparse))
