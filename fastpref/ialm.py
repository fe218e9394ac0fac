"""Rank-free robust PCA: min |L|_* + lambda |S|_1 with L + S = M on what is observed, and a proof of how good it is.

Inexact augmented Lagrangian (Lin, Chen, Ma 2010, arXiv:1009.5055) with the singular values above the threshold taken
from a subspace that is carried from one iteration to the next, instead of a full SVD. A small residual proves nothing:
with a penalty that grows geometrically the iteration is feasible soon, and may be far from optimal. The relative
duality gap (the dual matrix scaled into the feasible set, its spectral norm bounded from above) does. Where it is open,
and from the start where entries are missing, the penalty is balanced: it grows only while the residual is large beside
the change of S, the residual of the dual.
"""

from typing import NamedTuple

import torch
from torch import Tensor

GAP = 1e-3  # relative duality gap that counts as closed
RHO = 1.5  # the penalty's growth
BALANCE = 0.1  # residual over change, from which a balanced penalty grows
SETTLED = 1e-4  # change at which the gap is looked at, halved where it is open
SHARE = 0.02  # of rows or columns taken to be corrupted, for lambda
NOISY = 0.5  # share of S that is not zero: there is noise, and the rank is not that of L
_EXTRA = 5  # directions beside the predicted rank
_FAINT = 100  # times tol, relative to the largest singular value
_EXACT_NORM = 512  # up to this size the spectral norm comes from an SVD


class IALMSolve(NamedTuple):
    U: Tensor  # [B, m, q], q the largest rank of the batch
    S: Tensor  # [B, q], zero beyond a matrix's own rank
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
        share = observed.sum((-2, -1)).double() / max(m * n, 1)
        return 1 / (share.clamp(min=1e-30) * max(m, n)).sqrt()
    lines = m if corruption == "rows" else n
    return torch.full(observed.shape[:1], 3 / 7 / (SHARE * lines) ** 0.5, dtype=torch.float64, device=observed.device)


def _column(values: Tensor) -> Tensor:
    return values[:, None, None]


class _Penalty:
    """The part of the objective that S pays, by corruption."""

    def __init__(self, lam: Tensor, corruption: str):
        self.lam, self.dim = lam, {"entries": None, "rows": -1, "columns": -2}[corruption]

    def _sizes(self, w: Tensor) -> Tensor:
        return w.abs() if self.dim is None else torch.linalg.vector_norm(w, dim=self.dim, keepdim=True)

    def shrink(self, w: Tensor, mu: Tensor) -> Tensor:
        threshold = _column((self.lam / mu).to(w.dtype))
        if self.dim is None:
            return w - w.clamp(-threshold, threshold)
        return w * (1 - threshold / self._sizes(w).clamp(min=1e-30)).clamp(min=0)

    def value(self, s: Tensor) -> Tensor:
        return self.lam * self._sizes(s).double().sum((-2, -1))

    def dual(self, y: Tensor) -> Tensor:
        return self._sizes(y).double().amax((-2, -1)) / self.lam


def spectral_norm_above(y: Tensor, q: Tensor | None = None) -> Tensor:
    """[B] an upper bound of |Y|_2: exact for small matrices, else block power steps plus the Ritz residual."""
    if min(y.shape[-2:]) <= _EXACT_NORM:
        return torch.linalg.matrix_norm(y.double(), 2)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(y.shape[-1], 12, generator=generator, dtype=torch.float64).to(y) if q is None else q
    for _ in range(100):
        q = torch.linalg.qr(q.expand(len(y), -1, -1)).Q
        p = y @ q
        u, s, vh = torch.linalg.svd(p, full_matrices=False)
        top, value = u[..., :1], s[..., 0]
        residual = torch.linalg.vector_norm(y.mT @ top - q @ vh[..., :1, :].mT * _column(value), dim=(-2, -1))
        if (residual <= 1e-4 * value).all():
            break
        q = y.mT @ u
    return (value + residual).double()


def ialm(matrix: Tensor, *, lam=None, tol: float, max_iter: int, corruption: str = "entries", report=None) -> IALMSolve:
    """[B, m, n] float32 or float64, NaN missing. report(iteration, residual, rank) after each; true stops."""
    batch, m, n = matrix.shape
    d = min(m, n)
    device = matrix.device
    observed = ~matrix.isnan()
    data = torch.where(observed, matrix, 0)
    complete = bool(observed.all())
    count = observed.sum((-2, -1))
    lam = (
        default_lambda(observed, corruption)
        if lam is None
        else torch.full((batch,), float(lam), device=device).double()
    )
    penalty = _Penalty(lam, corruption)
    norm = torch.linalg.vector_norm(data.double(), dim=(-2, -1))
    spectral = _estimate_norm(data).clamp(min=1e-300)
    running = norm > 0
    y = data / _column(torch.maximum(spectral, penalty.dual(data)).clamp(min=1e-300).to(data.dtype))
    start = 1.25 / spectral
    mu, top = start.clone(), 1e7 * start
    balanced = count < m * n
    settled = torch.full_like(mu, SETTLED)
    iterations = torch.zeros(batch, dtype=torch.int64, device=device)
    rank = torch.zeros_like(iterations)
    residual = torch.zeros(batch, dtype=torch.float64, device=device)
    gap = torch.full((batch,), torch.nan, dtype=torch.float64, device=device)
    converged = ~running & (count > 0)
    sparse, low = torch.zeros_like(data), torch.zeros_like(data)
    k = min(15, d)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(n, k, generator=generator, dtype=torch.float64).to(data).expand(batch, -1, -1)
    u, sigma, vh = data.new_zeros(batch, m, 0), data.new_zeros(batch, 0), data.new_zeros(batch, 0, n)
    for iteration in range(1, max_iter + 1):
        if not running.any():
            break
        inverse_mu = _column((1 / mu).to(data.dtype))
        a = data - sparse + y * inverse_mu
        if not complete:
            a = torch.where(observed, a, low)
        for _ in range(2 if iteration == 1 else 1):
            p = torch.linalg.qr(a @ q).Q
            q, r = torch.linalg.qr(a.mT @ p)
        left, s, right = torch.linalg.svd(r.mT.double())
        excess = (s - _column(1 / mu).squeeze(-1)).clamp(min=0)
        above = (excess > 0).sum(-1)
        u_new, vh_new = p @ left.to(p), right.to(q) @ q.mT
        low_new = (u_new * excess.unsqueeze(-2).to(p)) @ vh_new
        w = data - low_new + y * inverse_mu
        w = torch.where(observed, w, 0)
        sparse_new = penalty.shrink(w, mu)
        y_new = (w - sparse_new) * _column(mu.to(data.dtype))
        left_over = torch.linalg.vector_norm((y_new - y) * inverse_mu, dim=(-2, -1)).double() / norm.clamp(min=1e-300)
        dual_change = torch.where(observed, sparse_new - sparse, low_new - low) * _column(mu.to(data.dtype))
        change = torch.linalg.vector_norm(dual_change, dim=(-2, -1)) / torch.linalg.vector_norm(y_new, dim=(-2, -1))
        go = _column(running)
        y, sparse, low = torch.where(go, y_new, y), torch.where(go, sparse_new, sparse), torch.where(go, low_new, low)
        residual = torch.where(running, left_over, residual)
        rank = torch.where(running, above, rank)
        if excess.shape[-1] == sigma.shape[-1]:
            u, vh = torch.where(go, u_new, u), torch.where(go, vh_new, vh)
            sigma = torch.where(running.unsqueeze(-1), excess.to(data.dtype), sigma)
        else:
            u, vh = _merge(go, u_new, u, -1), _merge(go, vh_new, vh, -2)
            sigma = _merge(running.unsqueeze(-1), excess.to(data.dtype), sigma, -1)
        iterations += running
        change = change.double()
        behind = ~balanced | (residual >= BALANCE * change)
        following = torch.where(running & behind, torch.minimum(RHO * mu, top), mu)
        done = running & (residual < tol) & (~balanced | (change < settled))
        if done.any():
            found = _gap(y[done], data[done], sigma[done], penalty, sparse[done], lam[done], corruption)
            gap[done] = found
            closed = torch.zeros_like(done)
            closed[done] = found <= GAP
            converged |= closed
            running = running & ~closed
            again = done & ~closed
            settled = torch.where(again & balanced, settled / 2, settled)
            back = (residual / (BALANCE * change)).clamp(max=1)
            following = torch.where(again & ~balanced, mu * back, following)
            balanced = balanced | again
        mu = following
        predicted = int(torch.where(above < k - _EXTRA, above + 1, (above + max(1, d // 20))).max()) if batch else 0
        wanted = min(predicted + _EXTRA, d)
        if wanted > k:
            fresh = torch.randn(n, wanted - k, generator=generator, dtype=torch.float64).to(data)
            q = torch.cat([vh_new.mT, fresh.expand(batch, -1, -1)], -1)
        else:
            q = vh_new.mT[..., :wanted]
        k = wanted
        if report is not None and report(iteration, float(residual.max()), int(rank.max())):
            running = torch.zeros_like(running)
            converged = torch.zeros_like(converged)
    if sigma.shape[-1]:  # singular values of rounding's size are none
        rank = torch.minimum(rank, (sigma > _FAINT * tol * sigma[:, :1]).sum(-1))
    most = int(rank.max()) if batch else 0
    share = (sparse != 0).sum((-2, -1)).double() / count.clamp(min=1)
    sigma = sigma[..., :most] * (torch.arange(most, device=device) < rank.unsqueeze(-1))
    return IALMSolve(
        u[..., :most], sigma, vh[..., :most, :], rank, iterations, residual, gap, converged, share
    )  # fmt: skip


def rank_by_gap(sigma: Tensor) -> int:
    """Where singular values [q], descending, some of them noise, fall off most."""
    sigma = sigma[sigma > 0].double()
    if len(sigma) < 2:
        return len(sigma)
    half = max(2, (len(sigma) + 1) // 2)
    return int((sigma[: half - 1] / sigma[1:half]).argmax()) + 1


def _merge(mask: Tensor, new: Tensor, old: Tensor, dim: int) -> Tensor:
    """new where mask, both widened to the longer of the two along dim."""
    size = max(new.shape[dim], old.shape[dim])
    wide = []
    for tensor in (new, old):
        shape = list(tensor.shape)
        shape[dim] = size - tensor.shape[dim]
        wide.append(torch.cat([tensor, tensor.new_zeros(shape)], dim))
    return torch.where(mask, *wide)


def _estimate_norm(data: Tensor) -> Tensor:
    """[B] |D|_2 to a few percent, from below."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(data.shape[-1], 2, generator=generator, dtype=torch.float64).to(data).expand(len(data), -1, -1)
    for _ in range(8):
        x = torch.linalg.qr(data.mT @ (data @ x)).Q
    return torch.linalg.matrix_norm((data @ x).double(), 2)


def _gap(y, data, sigma, penalty: _Penalty, sparse, lam, corruption) -> Tensor:
    own = _Penalty(lam, corruption)
    size = torch.maximum(spectral_norm_above(y), own.dual(y)).clamp(min=1e-300)
    primal = sigma.double().sum(-1) + own.value(sparse)
    return 1 - (y.double() * data).sum((-2, -1)) / size / primal.clamp(min=1e-300)
