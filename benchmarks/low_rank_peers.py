"""What others do where fastpref has rpca and bradley_terry, and the problems both are given."""

import math

import torch


def corrupted(m, n, rank, share, seed=0, dtype=torch.float32):
    """L [m, n] float64, and D with a share of the entries off by up to 10 mean |L|."""
    rng = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(side, rank, generator=rng, dtype=torch.float64) for side in (m, n))
    low = left @ right.t()
    wrong = torch.rand(m, n, generator=rng) < share
    off = (2 * torch.rand(m, n, generator=rng, dtype=torch.float64) - 1) * 10 * low.abs().mean()
    return low, (low + wrong * off).to(dtype)


def corrupted_scores(items, share, seed=0, dtype=torch.float32):
    """w [items] float64, L = w 1^T - 1 w^T, and D with a share of the pairs off by up to 10 mean |L|."""
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(items, generator=rng, dtype=torch.float64)
    w -= w.mean()
    low = w.unsqueeze(1) - w
    wrong = (torch.rand(items, items, generator=rng) < share).triu(1)
    off = wrong * (2 * torch.rand(items, items, generator=rng, dtype=torch.float64) - 1) * 10 * low.abs().mean()
    return w, low, (low + off - off.t()).to(dtype)


def _by_svd(a, threshold):
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    return (u * (s - threshold.unsqueeze(-1)).clamp(min=0).unsqueeze(-2)) @ vh


def _by_gram(a, threshold):
    squares, v = torch.linalg.eigh(a.mT @ a)
    s = squares.clamp(min=0).sqrt()
    share = torch.where(s > threshold.unsqueeze(-1), 1 - threshold.unsqueeze(-1) / s.clamp(min=1e-30), 0.0)
    return ((a @ v) * share.unsqueeze(-2)) @ v.mT


def ialm(data, rho, tol, threshold=_by_svd):
    """Inexact augmented Lagrangian (Lin, Chen, Ma 2010) on [B, m, n], until its slowest member has converged."""
    lam = 1 / math.sqrt(max(data.shape[-2:]))
    norm = data.norm(dim=(-2, -1))
    spectral = torch.linalg.matrix_norm(data, 2)
    y = data / torch.maximum(spectral, data.abs().amax((-2, -1)) / lam)[:, None, None]
    mu, sparse = 1.25 / spectral, torch.zeros_like(data)
    for _ in range(500):
        inverse = (1 / mu)[:, None, None]
        low = threshold(data - sparse + y * inverse, 1 / mu)
        w = data - low + y * inverse
        sparse = w - w.clamp(-lam * inverse, lam * inverse)
        residual = data - low - sparse
        y, mu = y + residual / inverse, mu * rho
        if (residual.norm(dim=(-2, -1)) / norm).max() < tol:
            break
    return low


def ialm_gram(data, rho, tol):
    return ialm(data, rho, tol, _by_gram)


def share_recovered(found, low) -> float:
    """Of matrices, or score vectors, with a relative error below 1e-3."""
    dims = tuple(range(1, low.dim()))
    error = (found.double() - low).square().sum(dims).sqrt() / low.square().sum(dims).sqrt()
    return (error < 1e-3).double().mean().item()
