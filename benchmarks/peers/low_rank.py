"""What others do where fastpref has rpca, svt and bradley_terry."""

import math

import numpy as np
import torch


def svt_by_svd(a, threshold):
    """[B, m, n], [B] -> singular values less the threshold, as a user writes it."""
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    return (u * (s - threshold.unsqueeze(-1)).clamp(min=0).unsqueeze(-2)) @ vh


def svt_by_gram(a, threshold):
    """The same by the eigenvectors of the Gram matrix, in the matrix's dtype."""
    squares, v = torch.linalg.eigh(a.mT @ a)
    share = (1 - threshold.unsqueeze(-1) / squares.clamp(min=1e-30).sqrt()).clamp(min=0)
    return ((a @ v) * share.unsqueeze(-2)) @ v.mT


def ialm(data, rho, tol, svt=svt_by_svd):
    """Inexact augmented Lagrangian (Lin, Chen, Ma 2010) on [B, m, n], until its slowest member has converged."""
    lam = 1 / math.sqrt(max(data.shape[-2:]))
    norm = data.norm(dim=(-2, -1))
    spectral = torch.linalg.matrix_norm(data, 2)
    y = data / torch.maximum(spectral, data.abs().amax((-2, -1)) / lam)[:, None, None]
    mu, sparse = 1.25 / spectral, torch.zeros_like(data)
    for _ in range(500):
        inverse = (1 / mu)[:, None, None]
        low = svt(data - sparse + y * inverse, 1 / mu)
        w = data - low + y * inverse
        sparse = w - w.clamp(-lam * inverse, lam * inverse)
        residual = data - low - sparse
        y, mu = y + residual / inverse, mu * rho
        if (residual.norm(dim=(-2, -1)) / norm).max() < tol:
            break
    return low


def ialm_gram(data, rho, tol):
    return ialm(data, rho, tol, svt_by_gram)


def ialm_randomized(data, rho, tol):
    """One matrix; scikit-learn's randomised SVD (two power steps, from scratch each time) of a predicted rank."""
    from sklearn.utils.extmath import randomized_svd

    d = data.numpy()
    side, k = min(d.shape), 15
    lam, norm = 1 / math.sqrt(max(d.shape)), np.linalg.norm(d)
    spectral = float(randomized_svd(d, 1, n_iter=4, random_state=0)[1][0])
    y = d / max(spectral, np.abs(d).max() / lam)
    mu, sparse = 1.25 / spectral, np.zeros_like(d)
    for _ in range(500):
        u, s, vh = randomized_svd(d - sparse + y / mu, k, n_iter=2, random_state=0)
        rank = int((s > 1 / mu).sum())
        low = (u[:, :rank] * (s[:rank] - 1 / mu)) @ vh[:rank]
        w = d - low + y / mu
        sparse = w - np.clip(w, -lam / mu, lam / mu)
        residual = d - low - sparse
        y, mu = y + mu * residual, mu * rho
        k = min(rank + 1 if rank < k else rank + round(0.05 * side), side)
        if np.linalg.norm(residual) / norm < tol:
            break
    return torch.from_numpy(low)


def by_tensorly(data):
    """With the weight of |S|_1 at which its program is robust PCA; its default is another."""
    from tensorly.decomposition import robust_pca

    low, _ = robust_pca(data.numpy(), reg_E=2 / math.sqrt(max(data.shape)), n_iter_max=100, verbose=False)
    return torch.from_numpy(np.asarray(low))


def by_choix(wins):
    import choix

    return torch.from_numpy(choix.ilsr_pairwise_dense(wins.numpy(), alpha=1e-9))


def by_evalica(wins):
    """The comparisons as the lists evalica takes, made beforehand."""
    import evalica

    i, j = wins.nonzero(as_tuple=True)
    names, counts = [str(k) for k in range(len(wins))], wins[i, j].tolist()
    left, right = [names[k] for k in i], [names[k] for k in j]
    winners = [evalica.Winner.X] * len(left)

    def run(_):
        scores = evalica.bradley_terry(left, right, winners, weights=counts).scores
        return torch.tensor([scores[name] for name in names], dtype=torch.float64).log()

    return run


def residual_composed(zeta):
    """What a user writes for a residual pass with the Cauchy psi: R and E are tensors of the matrix's size."""

    def composed(matrix, left, right):
        residual = matrix - left @ right.t()
        seen = ~residual.isnan()
        e = torch.where(seen, residual / (1 + (residual / zeta).square()), 0.0)
        kept = residual.abs() <= zeta
        return e @ right, e.t() @ left, e.square().sum(), seen.sum(), kept.sum()

    return composed
