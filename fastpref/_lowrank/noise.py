"""What of a residual R = D - L is noise, what is corruption, and which of two fits is the better one.

The noise's standard deviation sigma comes from the median |R|, which few and arbitrary corruptions do not move.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MAD = 1.4826  # of a normal distribution: standard deviation / median |x|
OUTLIER = 5.0  # standard deviations of the noise
EXACT = 1e-4  # of mean |D|: no smaller residual is an outlier
MISFIT = 0.5  # share of outliers in a row or column from which the fit itself may be wrong there


def outlier_bound(median, mean):
    """The |R| beyond which an entry is an outlier, of median |R| and mean |D|; floats or tensors."""
    noise, least = OUTLIER * MAD * median, EXACT * mean
    return torch.maximum(noise, least) if isinstance(noise, Tensor) else max(noise, least)


def explains(median, mean, tol: float):
    """A median residual of rounding's size says that the matrix is explained, outliers apart."""
    return median <= 10 * tol * mean


class Fit(NamedTuple):
    """What one fit is compared with another by: tensors of one shape."""

    median: Tensor  # |R|
    rate: Tensor  # share of outliers
    explained: Tensor  # bool


def is_better(new: Fit, old: Fit) -> tuple[Tensor, Tensor]:
    """Whether new is the better fit: of two alike the one with fewer outliers, else the closer one; and whether it is
    the same as the old one, by the same measures."""
    near = (new.median <= 1.2 * old.median) & (old.median <= 1.2 * new.median)
    alike = near | (new.explained & old.explained)
    same = alike & ((new.rate - old.rate).abs() <= 0.01)
    return torch.where(alike, new.rate < old.rate, new.median < old.median), same
