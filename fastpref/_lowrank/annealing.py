"""What the annealed solvers share, of one matrix and of many: their constants, their schedules and the step's scaling.

Cauchy's weights 1 / (1 + (R / cutoff)^2), with a cutoff that shrinks geometrically from the largest entry down to the
noise, around scaled gradient steps on the factors of L = left right^T (Tong, Ma, Chi 2021, arXiv:2005.08898): an entry
that L cannot explain loses its say, however large it is. csrc/cpu/batched_rpca.cpp has the same constants.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CUTOFF = 3.0  # of Cauchy's weights, in standard deviations of the noise
FINEST = 1e-9  # of mean |D|: the smallest cutoff
CLIP = 3.0  # of mean |D|: larger entries are clipped for the start
AWAY = 10.0  # relative change of a factor at which steps, scaled up for missing entries, lead away: too little observed
BLIND = 5  # iterations before the median counts as noise
COMPLETE = 0.9  # observed share from which little is missing
_RIDGE = 1e-10  # of the trace of a factor's Gram matrix


class Schedule(NamedTuple):
    decay: float  # of the cutoff, per iteration
    first: float  # of mean |R| at the start: the first cutoff; inf: it is the largest |R|
    step: float  # of the scaled gradient; divided by the observed share
    most: float  # share of the iterations that are left, where another schedule follows
    again: bool = False  # from the fit found so far: rows that it gave up come back, the rest is nearly right


QUICK, SLOW, LOW = Schedule(0.75, 8.0, 0.9, 0.2), Schedule(0.9, 4.0, 0.7, 0.4), Schedule(0.9, 2.0, 0.7, 1.0)
AGAIN = Schedule(0.9, float("inf"), 0.7, 0.5, again=True)
STILL = Schedule(1.0, 8.0, 0.9, 1.0)  # of full rank, which explains every entry
TRIES = 3


def schedules(little_missing: bool, full_rank: bool) -> tuple[Schedule, ...]:
    """In the order of trying: the next is for a matrix that the ones before leave unexplained."""
    if full_rank:
        return (STILL,)
    return (QUICK, AGAIN, SLOW) if little_missing else (SLOW, AGAIN, LOW)


def inverse_gram(factor: Tensor) -> Tensor:
    """(factor^T factor)^-1 [..., r, r] with a ridge, in factor's dtype; zero where factor is."""
    wide = factor.double()
    return ridged_inverse(wide.mT @ wide).to(factor.dtype)


def ridged_inverse(gram: Tensor) -> Tensor:
    """Of Gram matrices [..., r, r], with a ridge; zero where they are."""
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    size = torch.where(trace > 0, trace, 1.0)
    ridge = torch.diag_embed((_RIDGE * size).unsqueeze(-1).expand(gram.shape[:-1]))
    return torch.linalg.inv(gram + ridge) * (trace > 0)[..., None, None]
