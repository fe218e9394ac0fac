"""Fits of all prompts of a table: one score per item, or a skew matrix of low rank by rpca or as CURATRON has it."""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref._lowrank.bradley_terry import BradleyTerryResult, Edges, bradley_terry, ridge_doubts
from fastpref._lowrank.curatron import NcRPCAResult, ncrpca, optspace
from fastpref._lowrank.rpca import rpca
from fastpref.preference_matrix._table import CHUNK, Preferences, chunks_of, is_small, scatter_pairs

FEW_ITEMS = 20  # below, a low-rank fit hardly denoises
PAIRS_PER_RANK = 4  # and item, below which a low-rank fit does not recover


class TableFit(NamedTuple):
    """What the solver has for P prompts of N items, and at the pairs [E]."""

    values: Tensor  # [E] psi of the fitted P(i beats j)
    scores: Tensor  # [P, N] row means of the fitted matrix within the item's component
    converged: Tensor  # [P]
    components: Tensor  # [P, N]
    low_rank: Tensor | None  # [P, N, N]; None: scores[i] - scores[j]
    ridge_doubts: list[str]  # of votes, what the ridge of their scores did


def fit_scores(table: Preferences, values: Tensor | None, backend: str | None) -> TableFit:
    """Robust Bradley-Terry scores of link values [E], or (None) of the votes."""
    with warnings.catch_warnings():  # said once of all prompts, by `denoise`
        warnings.filterwarnings("ignore", ".* ridge of ", RuntimeWarning)
        found = [_fit_chunk(table, values, backend, *chunk) for chunk in chunks_of(table)]
    shape = (table.num_prompts, table.num_items)
    if not found:
        empty = table.wins_i.new_zeros(shape)
        return TableFit(table.wins_i, empty, empty.new_zeros(shape[0], dtype=torch.bool), empty.long(), None, [])
    scores = torch.cat([part.scores.flatten() for part in found]).double().view(shape)
    converged = torch.cat([part.info.converged.flatten() for part in found])
    components = torch.cat([part.components.flatten() for part in found]).view(shape)
    difference = scores[table.prompt, table.i] - scores[table.prompt, table.j]
    separated, share = (
        torch.cat([getattr(part.info, name).flatten() for part in found]) for name in ("separated", "ridge_share")
    )
    return TableFit(difference, scores, converged, components, None, ridge_doubts(separated, share))


def _fit_chunk(table: Preferences, values: Tensor | None, backend, prompts: slice, pairs: slice) -> BradleyTerryResult:
    i, j = table.i[pairs], table.j[pairs]
    if is_small(table):
        if values is None:
            wins = scatter_pairs(table, prompts, pairs, table.wins_i[pairs], table.wins_j[pairs])
            return bradley_terry(wins=wins, backend=backend)
        logits = scatter_pairs(table, prompts, pairs, values[pairs], -values[pairs])
        return bradley_terry(logits, backend=backend)
    edges = Edges(i, j, table.wins_i[pairs], table.wins_j[pairs], None, table.num_items)
    if values is not None:
        edges = Edges(i, j, None, None, values[pairs], table.num_items)
    return bradley_terry(edges=edges, backend=backend)


def fit_table(
    table: Preferences, values: Tensor, by_votes: bool, method: str, rank: int, backend: str | None
) -> TableFit:
    simple = fit_scores(table, None if by_votes else values, backend)
    if method == "bradley_terry" or not table.num_prompts:
        return simple
    if table.num_items < FEW_ITEMS:
        warnings.warn(
            f"method={method!r} hardly denoises {table.num_items} items: a low-rank fit needs {FEW_ITEMS} or more; "
            "pool items, or take method='bradley_terry' where preferences are transitive",
            RuntimeWarning,
            stacklevel=3,
        )
    n, per_prompt = table.num_items, len(table.i) / table.num_prompts
    if per_prompt < min(PAIRS_PER_RANK * rank * n, n * (n - 1) / 2):
        warnings.warn(
            f"method={method!r} of rank {rank} has {per_prompt / n:.1f} N pairs of N items, and needs some "
            f"{PAIRS_PER_RANK * rank} N to tell corrupted ones: compare more pairs, or take method='bradley_terry'",
            RuntimeWarning,
            stacklevel=3,
        )
    parts, converged = [], []
    for prompts, pairs in chunks_of(table):
        matrix = scatter_pairs(table, prompts, pairs, values[pairs], -values[pairs])
        matrix.diagonal(dim1=-2, dim2=-1).fill_(0.0)
        if method == "rpca":
            one = len(matrix) == 1 and not is_small(table)
            found = rpca(matrix[0] if one else matrix, rank=rank, structure="skew", backend=backend)
            low_rank = found.low_rank().reshape(matrix.shape)
        else:
            found = _curatron(matrix, rank)
            low_rank = found.low_rank
        parts.append((low_rank - low_rank.mT) / 2)
        converged.append((found.info if method == "rpca" else found).converged.reshape(-1))
    low_rank = torch.cat(parts)
    components = simple.components
    same = (components.unsqueeze(-1) == components.unsqueeze(-2)) & ~simple.scores.isnan().unsqueeze(-1)
    low_rank = torch.where(same, low_rank, torch.nan)
    scores = low_rank.nanmean(-1)  # over what the comparisons determine
    values = low_rank[table.prompt, table.i, table.j]
    return TableFit(values, scores, torch.cat(converged), components, low_rank, [])


def _curatron(matrix: Tensor, rank: int) -> NcRPCAResult:
    """Holes by OptSpace, what was observed kept, then non-convex robust PCA."""
    missing = matrix.isnan()
    holes = missing.any((-2, -1))
    if holes.any():
        completed = optspace(matrix[holes], rank).low_rank
        matrix = matrix.clone()
        matrix[holes] = torch.where(missing[holes], (completed - completed.mT) / 2, matrix[holes])
    return ncrpca(matrix, rank, skew=True)


def copeland_scores(fit: TableFit) -> Tensor:
    """Items of the same component that an item beats."""
    prompts, items = fit.scores.shape
    beaten = torch.full_like(fit.scores, torch.nan)
    step = max(1, CHUNK // max(items, 1))
    for prompt in range(prompts):
        for begin in range(0, items, step):
            rows = slice(begin, begin + step)
            if fit.low_rank is not None:
                better = fit.low_rank[prompt, rows] > 0
            else:
                better = fit.scores[prompt, rows, None] > fit.scores[prompt]
                better &= fit.components[prompt, rows, None] == fit.components[prompt]
            beaten[prompt, rows] = better.sum(-1).double()
    return torch.where(fit.scores.isnan(), torch.nan, beaten)
