"""Pairs and lengths on AlpacaEval's development scores, 403 prompts of 58 sources, against methods.md section 11.

FASTPREF_SCORED_SAMPLES names the file.
"""

import gzip
import json
import os
import warnings
from typing import NamedTuple

import numpy as np
import pytest

from fastpref.curate import length_report, match_length, remove_length, select_pairs, to_logit

FILE = os.environ.get("FASTPREF_SCORED_SAMPLES")
pytestmark = pytest.mark.skipif(FILE is None, reason="FASTPREF_SCORED_SAMPLES names no file")


class Scored(NamedTuple):
    scores: np.ndarray
    lengths: np.ndarray
    sources: np.ndarray  # names
    offsets: np.ndarray


@pytest.fixture(scope="module")
def scored():
    with gzip.open(FILE, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    return Scored(
        np.concatenate([row["win_prob"] for row in rows]),
        np.concatenate([[len(text) for text in row["responses"]] for row in rows]),
        np.concatenate([row["models"] for row in rows]),
        np.concatenate([[0], np.cumsum([len(row["win_prob"]) for row in rows])]),
    )


def places(selection, offsets):
    table = selection.table()
    return offsets[table["prompt"]] + table["chosen"], offsets[table["prompt"]] + table["rejected"]


# Rejected responses under 20 characters and from gpt4_gamed, in percent.
@pytest.mark.parametrize(
    ("rejected", "scale", "junk", "gamed"),
    [
        ("min", "raw", 22.6, 19.4),
        ("mean-2std", "raw", 22.3, 19.4),
        ("mean-2std", "logit", 22.3, 19.1),
        ("mean-2std", "normal_score", 10.2, 8.2),
        ("quantile:0.10", "raw", 7.4, 4.2),
    ],
)
def test_what_is_rejected(scored, rejected, scale, junk, gamed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pairs = select_pairs(scored.scores, rejected=rejected, scale=scale, offsets=scored.offsets)
    best, worse = places(pairs, scored.offsets)
    assert len(best) == 403
    assert 100 * (scored.lengths[worse] < 20).mean() == pytest.approx(junk, abs=0.051)
    assert 100 * (scored.sources[worse] == "gpt4_gamed").mean() == pytest.approx(gamed, abs=0.051)
    assert (scored.sources[best] == "NullModel").sum() == 79


def test_mad_of_logits(scored):
    """19.4 and 16.6 there; here 19.6 and 16.9, one prompt more."""
    logits = to_logit(scored.scores)
    with pytest.warns(UserWarning, match="lies below every reward"):
        pairs = select_pairs(logits, scale="mad", offsets=scored.offsets)
    _, worse = places(pairs, scored.offsets)
    assert 100 * (scored.lengths[worse] < 20).mean() == pytest.approx(19.4, abs=0.4)
    assert 100 * (scored.sources[worse] == "gpt4_gamed").mean() == pytest.approx(16.6, abs=0.4)


def test_the_lowest_of_five(scored):
    """8.9 and 6.5 for one seed; here the mean of many."""
    junk, gamed = [], []
    for seed in range(60):
        pairs = select_pairs(scored.scores, rejected="min_of_5", offsets=scored.offsets, seed=seed)
        _, worse = places(pairs, scored.offsets)
        junk.append(100 * (scored.lengths[worse] < 20).mean())
        gamed.append(100 * (scored.sources[worse] == "gpt4_gamed").mean())
    assert np.mean(junk) == pytest.approx(8.9, abs=2) and np.mean(gamed) == pytest.approx(6.5, abs=2)


def test_the_target_is_below_the_pool(scored):
    for scale, low, high in (("raw", 0.98, 1), ("logit", 0.9, 0.98)):
        with pytest.warns(UserWarning, match=r"mean-2std lies below every reward of its pool for 9\d\.\d% of"):
            pairs = select_pairs(scored.scores, scale=scale, offsets=scored.offsets)
        assert low < pairs.share_below_min <= high and pairs.share_rejected_min > 0.95
        assert pairs.median_percentile == 0


def test_length(scored):
    pairs = select_pairs(scored.scores, rejected="min", offsets=scored.offsets)
    report = length_report(scored.lengths, pairs, offsets=scored.offsets)
    assert report.longest_wins == pytest.approx(0.948, abs=0.005)
    assert report.median_ratio == pytest.approx(9.7, abs=0.3)
    matched = match_length(pairs, scored.scores, scored.lengths, offsets=scored.offsets)
    assert length_report(scored.lengths, matched, offsets=scored.offsets).median_ratio < report.median_ratio / 2


def test_length_control_before_the_audit_makes_it_worse(scored):
    """NullModel is chosen in 19.6 % of the prompts without, in 27 to 31 % with it there."""
    logits = to_logit(scored.scores)
    codes = np.unique(scored.sources, return_inverse=True)[1]
    for sources in (codes, None):
        adjusted = remove_length(logits, scored.lengths, sources=sources, offsets=scored.offsets)
        assert adjusted.slope > 1
        best, _ = places(select_pairs(adjusted.scores, rejected="min", offsets=scored.offsets), scored.offsets)
        assert 0.24 < (scored.sources[best] == "NullModel").mean() < 0.35
