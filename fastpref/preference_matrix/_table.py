"""Compared pairs as a table, the links that make matrices of them, and the sums, batches and matrices of a table.

P[i, j] is the probability that i is preferred to j, P[i, j] + P[j, i] = 1. Through a link psi it becomes a
skew-symmetric matrix M = psi(P), psi the logit (Bradley-Terry), the probit (Thurstone) or the identity minus 1/2.
Comparisons are kept as a list of pairs, some 3 N per prompt of N items; a dense matrix is the special case.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import _checks

LINKS = ("logit", "probit", "identity")
ACTIONS = ("mask", "replace", "low_rank")  # what becomes of corrupted entries
CHUNK = 1 << 24  # entries of dense tensors at a time
SMALL_ITEMS = 128  # of prompts solved as a batch of dense matrices; larger ones as edges, prompt by prompt


class JudgeReport(NamedTuple):
    """Per judge, [J], over the pairs it saw in both presentation orders; NaN without such pairs."""

    votes: Tensor  # float64, all it cast
    pairs: Tensor  # int64, pairs of items it compared
    both_orders: Tensor  # int64, of those, seen in both orders
    inconsistency: Tensor  # float64, share of these in which the orders have different winners
    first_advantage: Tensor  # float64, P(the item shown first wins) - 1/2
    order_effect: Tensor  # float64, the same in logits: P(first wins) = sigmoid(w_first - w_second + effect)
    z: Tensor  # float64, first_advantage over its standard error


class Preferences(NamedTuple):
    """Compared pairs, each once: sorted by prompt, i, j; i < j."""

    prompt: Tensor  # [E] int64
    i: Tensor  # [E] int64
    j: Tensor  # [E] int64
    wins_i: Tensor  # [E] float64, not whole numbers where the presentation orders were not shown alike
    wins_j: Tensor  # [E] float64
    num_prompts: int
    num_items: int  # per prompt
    judges: JudgeReport | None = None  # where comparisons were given in order

    def probabilities(self, smoothing: float = 0.0) -> Tensor:
        """[E] float64, P(i beats j) = (wins_i + smoothing) / (votes + 2 smoothing)."""
        return (self.wins_i + smoothing) / (self.wins_i + self.wins_j + 2 * smoothing)

    def dense(self, values: Tensor | None = None) -> Tensor:
        """[num_prompts, N, N] of P, or of other values [E] with values[j, i] = 1 - values[i, j]; NaN: not compared."""
        values = self.probabilities() if values is None else values
        n = self.num_items
        matrix = values.new_full((self.num_prompts, n, n), torch.nan)
        matrix[self.prompt, self.i, self.j] = values
        matrix[self.prompt, self.j, self.i] = 1 - values
        matrix.diagonal(dim1=-2, dim2=-1).fill_(0.5)
        return matrix


# ---- links ----


def apply_link(probability: Tensor, link: str) -> Tensor:
    """psi(P): logit, probit, or P - 1/2."""
    if link == "logit":
        return probability.logit()
    return torch.special.ndtri(probability) if link == "probit" else probability - 0.5


def invert_link(value: Tensor, link: str) -> Tensor:
    """P, between 0 and 1; the inverse of apply_link."""
    if link == "logit":
        return value.sigmoid()
    return torch.special.ndtr(value) if link == "probit" else (value + 0.5).clamp(0, 1)


# ---- tables ----


def as_indices(name: str, value, like: Tensor | None) -> Tensor:
    """int64 [C], or like `like`; on its device."""
    index = _checks.array(name, value)
    if index.numel() and index.dtype != torch.int64:
        raise TypeError(f"{name} must be integers, got {index.dtype}")
    if index.dim() != 1 or (like is not None and index.shape != like.shape):
        raise ValueError(
            f"{name} must have shape {[len(like)] if like is not None else '[C]'}, got {list(index.shape)}"
        )
    if (index < 0).any():
        at = int((index < 0).nonzero()[0])
        raise ValueError(f"{name} must be >= 0, got {int(index[at])} at {at}")
    return index.long() if like is None else index.to(like.device, torch.int64)


def as_column(name: str, value, like: Tensor) -> Tensor:
    """float64, like `like`; a number is repeated."""
    found = _checks.real(name, value).to(like.device, torch.float64)
    if found.dim() == 0:
        return found.expand(like.shape)
    if found.shape != like.shape:
        raise ValueError(f"{name} must have shape {list(like.shape)} like i, got {list(found.shape)}")
    return found


def checked_table(table: Preferences) -> Preferences:
    """Preferences may have been put together by hand."""
    prompts, n = table.num_prompts, table.num_items
    _checks.natural("preferences.num_prompts", prompts)
    _checks.natural("preferences.num_items", n)
    i = as_indices("preferences.i", table.i, None)
    prompt, j = (as_indices(f"preferences.{name}", getattr(table, name), i) for name in ("prompt", "j"))
    wins_i, wins_j = (as_column(f"preferences.{name}", getattr(table, name), i) for name in ("wins_i", "wins_j"))
    key = (prompt * n + i) * n + j
    if not ((i >= 0) & (i < j) & (j < n) & (prompt >= 0) & (prompt < prompts)).all() or not (key.diff() > 0).all():
        raise ValueError(
            "preferences must list every pair once, sorted by prompt, i and j, with i < j < num_items and prompt < "
            "num_prompts, as from_comparisons does"
        )
    if not ((wins_i >= 0) & (wins_j >= 0) & (wins_i + wins_j > 0) & (wins_i + wins_j < torch.inf)).all():
        raise ValueError("preferences must have finite wins_i and wins_j >= 0 with at least one vote in each pair")
    return Preferences(prompt, i, j, wins_i, wins_j, prompts, n)


def table_of(name: str, p: Tensor) -> Preferences:
    """The pairs of [..., N, N] probabilities, as one vote each."""
    if p.dim() < 2 or p.shape[-1] != p.shape[-2]:
        raise ValueError(f"{name} must have shape [..., N, N], or be Preferences, got {list(p.shape)}")
    outside = (p < 0) | (p > 1)
    if outside.any():
        at = outside.nonzero()[0].tolist()
        raise ValueError(f"{name} must lie between 0 and 1 (NaN: missing), got {p[tuple(at)].item()} at {at}")
    off = (p.double() + p.double().mT - 1).abs()
    off = torch.where(p.isnan() != p.mT.isnan(), torch.inf, off.nan_to_num(0, posinf=torch.inf))
    if off.numel() and off.max() > max(4 * torch.finfo(p.dtype).eps, 1e-6):
        at = torch.unravel_index(off.argmax(), off.shape)
        at = [int(index) for index in at]
        if at[-2] == at[-1]:
            raise ValueError(f"{name} must have 1/2 or NaN on the diagonal, got {p[tuple(at)].item()} at {at}")
        raise ValueError(
            f"{name} must have P[i, j] + P[j, i] = 1, got {p[tuple(at)].item()} and {p.mT[tuple(at)].item()} at {at}. "
            "If the two are answers to the two presentation orders, pass both to from_comparisons, which reports the "
            "order effect before it balances them"
        )
    n = p.shape[-1]
    lead = p.shape[:-2]
    flat = p.detach().reshape(lead.numel(), n, n)
    seen = (~flat.isnan()).triu(1)
    prompt, i, j = seen.nonzero(as_tuple=True)
    upper, lower = flat[seen].double(), flat.mT[seen].double()
    wins = torch.where(lower < upper, 1 - lower, upper)  # the smaller one has more digits
    return Preferences(prompt, i, j, wins, 1 - wins, lead.numel(), n)


# ---- per prompt ----


def sums_of(values: Tensor, table: Preferences) -> Tensor:
    """[E] -> [P]."""
    return values.new_zeros(table.num_prompts).index_add_(0, table.prompt, values)


def medians_of(values: Tensor, table: Preferences) -> Tensor:
    """[E] -> [P], the lower one; 0 of nothing."""
    order = values.argsort(stable=True)
    order = order[table.prompt[order].argsort(stable=True)]
    count = torch.bincount(table.prompt, minlength=table.num_prompts)
    if not len(values):
        return values.new_zeros(table.num_prompts)
    middle = count.cumsum(0) - count + (count - 1).clamp(min=0) // 2
    return torch.where(count > 0, values[order[middle.clamp(max=len(values) - 1)]], 0.0)


def is_small(table: Preferences) -> bool:
    return table.num_items <= SMALL_ITEMS


def chunks_of(table: Preferences):
    """Slices of prompts, and of their pairs, that fit a batch of dense matrices (prompt by prompt for many items)."""
    n = max(table.num_items, 1)
    step = max(1, CHUNK // n**2) if is_small(table) else 1
    begins = torch.arange(0, table.num_prompts + step, step, device=table.prompt.device).clamp(max=table.num_prompts)
    places = torch.searchsorted(table.prompt, begins).tolist()
    bounds = zip(pairwise(begins.tolist()), pairwise(places), strict=True)
    return [(slice(*prompts), slice(*pairs)) for prompts, pairs in bounds if prompts[0] < prompts[1]]


def scatter_pairs(table: Preferences, prompts: slice, pairs: slice, upper: Tensor, lower: Tensor) -> Tensor:
    """[p, N, N] with upper [e] at i, j and lower at j, i; NaN elsewhere."""
    n = table.num_items
    matrix = upper.new_full((prompts.stop - prompts.start, n, n), torch.nan)
    at = table.prompt[pairs] - prompts.start
    matrix[at, table.i[pairs], table.j[pairs]] = upper
    matrix[at, table.j[pairs], table.i[pairs]] = lower
    return matrix
