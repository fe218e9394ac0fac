"""Items in the order of their scores, and which of them are tied."""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import _checks
from fastpref.preference_matrix._denoise import Denoised, several_components


class Ordering(NamedTuple):
    """What `order` returns."""

    indices: Tensor  # [..., N] int64, best first; tied items by index, items without a score last
    ranks: Tensor  # [..., N] int64 of each item, 1 the best; tied items share the smallest; -1: no score
    tied: Tensor  # [..., N] bool, the item shares its rank


# ---- cleaning ----


def order(scores, *, tolerance: float | None = None) -> Ordering:
    """Orders items by their scores, and says which are tied.

    Args:
        scores: [..., N], or a Denoised; NaN: no score.
        tolerance: items whose scores differ by no more are tied, and so are chains of them; default 1e-6 of the spread
            of a row's scores.

    Scores of items in different components of the comparison graph cannot be compared (DenoiseInfo.components): of a
    Denoised with such scores it warns (RuntimeWarning).
    """
    if isinstance(scores, Denoised) and (several := several_components(scores.scores, scores.info.components)):
        warnings.warn(
            f"scores of {several} comparison graph(s) fall into several components (info.components), between which "
            "ranks mean nothing: order each component by itself",
            RuntimeWarning,
            stacklevel=2,
        )
    scores = _checks.real("scores", scores.scores if isinstance(scores, Denoised) else scores)
    if scores.dim() < 1:
        raise ValueError(f"scores must have shape [..., N], got {list(scores.shape)}")
    _checks.finite_or_nan("scores", scores)
    if tolerance is not None:
        _checks.not_negative("tolerance", tolerance)
    x = scores.detach().double()
    if not x.shape[-1]:
        empty = torch.zeros(x.shape, dtype=torch.int64, device=x.device)
        return Ordering(empty, empty.clone(), empty.bool())
    there = ~x.isnan()
    descending, indices = torch.where(there, x, -torch.inf).sort(dim=-1, descending=True, stable=True)
    gaps = -descending.diff(dim=-1)  # inf before the items without a score, NaN between them
    if tolerance is None:
        spread = x.nan_to_num(nan=-torch.inf).amax(-1) - x.nan_to_num(nan=torch.inf).amin(-1)
        limit = (1e-6 * spread.clamp(min=0)).nan_to_num(posinf=0.0).unsqueeze(-1)
    else:
        limit = torch.full_like(x[..., :1], tolerance)
    fresh = torch.cat([torch.ones_like(there[..., :1]), ~(gaps <= limit)], -1)  # opens a group of ties
    place = torch.arange(x.shape[-1], device=x.device).expand(x.shape)
    first = torch.where(fresh, place, 0).cummax(-1).values
    alone = fresh & torch.cat([fresh[..., 1:], torch.ones_like(fresh[..., :1])], -1)
    sorted_there = there.gather(-1, indices)
    ranks = torch.zeros_like(indices).scatter(-1, indices, torch.where(sorted_there, first + 1, -1))
    tied = torch.zeros_like(there).scatter(-1, indices, ~alone & sorted_there)
    # tied items by index: a stable sort by rank alone
    by_rank = torch.where(there, ranks, x.shape[-1] + 1).sort(dim=-1, stable=True).indices
    return Ordering(by_rank, ranks, tied)
