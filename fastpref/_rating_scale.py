"""What the scale of rating gaps means for RDPO and ML-RDPO: numpy alone, for the data side as for the losses."""

from typing import NamedTuple

import numpy as np


class RatingScale(NamedTuple):
    """Of a set of rating gaps and a β; see `losses.rating_scale`."""

    median: float
    std: float
    suggested_beta_rating: float
    suggested_variance: float
    initial_offset: float


def of_gaps(gap, beta: float) -> RatingScale:
    """The same as `losses.rating_scale`, where the numbers are explained, of an array."""
    gap = np.asarray(gap, dtype=np.float64).ravel()
    rated = gap[~np.isnan(gap)]
    nonzero = np.abs(rated[rated != 0])
    if not len(nonzero):
        raise ValueError(
            "gap must hold at least one rating that is neither NaN nor 0, "
            f"got {len(gap)} values: {len(gap) - len(rated)} NaN, {len(rated)} zero"
        )
    if not np.isfinite(rated).all():
        raise ValueError("gap must be finite or NaN, got 'an infinite value'")
    median = float(np.median(nonzero))
    return RatingScale(
        median=median,
        std=float(rated.std()),
        suggested_beta_rating=2 * beta * median,
        suggested_variance=float(np.square(rated).mean()),
        initial_offset=beta / 0.3 * median,
    )
