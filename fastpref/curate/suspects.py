"""Scores that are probably no scores: marks for "missing", and those that another score of the response contradicts."""

from collections.abc import Mapping
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from fastpref.curate.margins import mean_ranks
from fastpref.curate.pools import per_prompt
from fastpref.curate.scale import MAD_TO_STD

# What files hold where there is no score. Ends of scales, such as 0, 10 and 100, are none of them.
MARKS = (-1.0, -9.0, -99.0, -100.0, -999.0, -1000.0, -9999.0, -99999.0, 999.0, 9999.0, 99999.0)
MARKED_SHARE = 0.01  # of the prompts that have the mark, from which on it is no chance
FEWEST_VALUES = 3  # of the rest: fewer, such as 0 and 1 beside -1, are a scale that the mark belongs to
FEWEST_COMPARED = 20  # responses with both scores, from which on they say how one goes with the other
ALIKE = 0.7  # rank correlation of two columns, below which they measure different things
FAR = 5.0  # robust standard deviations between the two ranks of a response
PLACES_APART = 1 / 3  # of all responses between the two ranks, for columns that agree to the last digit
MOST = 0.05  # of the responses; columns that contradict each other more often measure different things
LEAST_SPREAD = 0.1  # of these differences, for columns that agree in nearly every response


class Mark(NamedTuple):
    """A value that probably stands for no score."""

    value: float
    responses: int
    prompts: int


def find_marks(scores, offsets) -> list[Mark]:
    """Finds values that mark a missing score: known ones, outside all other scores, under 1 % of the prompts or more.

    Args:
        scores: [responses] numbers, NaN where there is none.
        offsets: [prompts + 1].

    Returns:
        The marks, most frequent first.
    """
    scores = np.asarray(scores, np.float64)
    known = np.isin(scores, MARKS)
    if not known.any():
        return []
    rest = scores[~known & ~np.isnan(scores)]
    if len(np.unique(rest)) < FEWEST_VALUES:
        return []
    prompt, prompts, low, high = per_prompt(offsets), len(offsets) - 1, rest.min(), rest.max()
    found = []
    for value in np.unique(scores[known]):
        here = scores == value
        under = len(np.unique(prompt[here]))
        if not low <= value <= high and under >= max(2, MARKED_SHARE * prompts):
            found.append(Mark(float(value), int(here.sum()), under))
    return sorted(found, key=lambda mark: -mark.responses)


class Contradictions(NamedTuple):
    """Responses whose scores contradict each other, the furthest apart first; [k] each."""

    response: np.ndarray  # int64, index
    column: np.ndarray  # int64, index of the column that contradicts the first one
    distance: np.ndarray  # float64, robust standard deviations; > 0: the first column ranks it higher


def find_contradictions(columns: Mapping[str, np.ndarray]) -> Contradictions:
    """Finds responses that the first column ranks quite otherwise than another one that goes with it elsewhere.

    Both columns become normal scores of their ranks, so that neither their scale nor the shape of their relation
    matters, and the differences are measured in robust standard deviations (1.4826 MAD) of all of them. Columns that
    measure different things are not compared: those whose rank correlation is within 0.7 of 0, or that contradict each
    other in more than 5 % of the responses. One that falls with the other (a rank, where 1 is best) is turned around.

    Args:
        columns: name -> [responses] numbers, NaN where there is none; the first one is compared with every other.

    Returns:
        The responses more than 5 standard deviations off, if a third of all responses are between their two ranks.
    """
    (_, first), *others = columns.items()
    count = len(first)
    furthest, column = np.zeros(count), np.zeros(count, np.int64)
    for k, (_, other) in enumerate(others, start=1):
        both = np.flatnonzero(~np.isnan(first) & ~np.isnan(other))
        if len(both) < FEWEST_COMPARED:
            continue
        ranks = [(mean_ranks(values[both]) + 0.5) / len(both) for values in (first, other)]
        one, two = map(_normal_scores, ranks)
        alike = one @ two / max(np.sqrt((one @ one) * (two @ two)), 1e-300)
        if abs(alike) < ALIKE:
            continue
        apart = one - np.sign(alike) * two
        apart -= np.median(apart)
        apart /= max(MAD_TO_STD * np.median(np.abs(apart)), LEAST_SPREAD)
        places = ranks[0] - (ranks[1] if alike > 0 else 1 - ranks[1])
        apart[np.abs(places) < PLACES_APART] = 0
        if np.count_nonzero(np.abs(apart) > FAR) > MOST * len(both):
            continue
        beyond = np.abs(apart) > np.abs(furthest[both])
        furthest[both[beyond]], column[both[beyond]] = apart[beyond], k
    found = np.flatnonzero(np.abs(furthest) > FAR)
    found = found[np.argsort(-np.abs(furthest[found]), kind="stable")]
    return Contradictions(found, column[found], furthest[found])


def _normal_scores(ranks) -> np.ndarray:
    """The normal quantiles of ranks in (0, 1), interpolated to 1e-6."""
    cdf = NormalDist().cdf
    grid = np.linspace(-6, 6, 6001)
    return np.interp(ranks, [cdf(z) for z in grid.tolist()], grid)
