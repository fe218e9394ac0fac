"""curate.suspects: marks for missing scores, and scores that another one contradicts."""

import numpy as np
import pytest

from fastpref.curate.suspects import find_contradictions, find_marks


def pools(rng, prompts=200, size=4):
    return np.arange(prompts + 1) * size, rng.integers(1, 11, prompts * size).astype(float)


@pytest.mark.parametrize("mark", [-1.0, -100.0, 999.0, -99.0, -9999.0])
@pytest.mark.parametrize("scale", ["stars", "reward", "likert"])
def test_marks_are_found(mark, scale):
    rng = np.random.default_rng()
    offsets, scores = pools(rng)
    if scale == "reward":
        scores = rng.uniform(0, 1, len(scores))
    if scale == "likert":
        scores = rng.integers(0, 5, len(scores)).astype(float)
    rows = rng.choice(200, 3, replace=False)  # 1.5 % of the prompts
    scores[offsets[rows]] = mark
    scores[5] = np.nan
    (found,) = find_marks(scores, offsets)
    expected = int((scores == mark).sum())
    assert found == (mark, expected, len(np.unique(np.flatnonzero(scores == mark) // 4)))


def test_what_is_no_mark():
    rng = np.random.default_rng()
    offsets, scores = pools(rng)
    assert find_marks(scores, offsets) == []
    rare = scores.copy()
    rare[0] = -1.0  # under one prompt of 200
    assert find_marks(rare, offsets) == []
    normal = rng.normal(0, 3, len(scores))
    normal[::40] = -1.0  # among the others
    assert find_marks(normal, offsets) == []
    votes = rng.choice([-1.0, 0.0, 1.0], len(scores))  # a scale of its own
    assert find_marks(votes, offsets) == [] == find_marks(rng.choice([-1.0, 1.0], len(scores)), offsets)
    top = np.where(scores == 10, 100.0, scores)  # the end of a scale
    assert find_marks(top, offsets) == [] == find_marks(np.full(len(scores), np.nan), offsets)


def two_columns(rng, responses=1600, noise=0.35):
    """Two ratings of one thing, on different scales, rounded as judges do."""
    worth = rng.normal(size=responses)
    overall = np.clip(np.round(2 * (5.5 + 2 * (worth + noise * rng.normal(size=responses)))) / 2, 1, 10)
    fine = np.clip(np.round(4 * (3 + worth + noise * rng.normal(size=responses))) / 4, 1, 5)
    return overall, fine


@pytest.mark.parametrize("turned", [False, True], ids=["scores", "a rank beside a score"])
def test_contradicting_scores_are_found_and_few_others(turned):
    rng = np.random.default_rng()
    overall, fine = two_columns(rng)
    low = np.flatnonzero(fine <= 1.75)
    wrong = rng.choice(low, 15, replace=False)
    overall[wrong] = 10.0
    found = find_contradictions({"overall": overall, "fine": -fine if turned else fine})
    assert set(wrong) <= set(found.response) and len(found.response) <= 20
    assert (found.column == 1).all() and (np.abs(np.diff(np.abs(found.distance))) >= 0).all()
    assert (found.distance[np.isin(found.response, wrong)] > 5).all()  # the first column ranks it higher


def test_columns_of_other_things_are_not_compared():
    rng = np.random.default_rng()
    overall, fine = two_columns(rng)
    apart = {"helpfulness": overall, "verbosity": rng.permutation(fine)}
    assert len(find_contradictions(apart).response) == 0
    assert len(find_contradictions({"overall": overall[:15], "fine": fine[:15]}).response) == 0  # too few to tell
    assert len(find_contradictions({"overall": overall}).response) == 0
    missing = np.where(rng.random(len(fine)) < 0.3, np.nan, fine)
    missing[:50], overall[:50] = np.nan, 10.0
    assert not set(find_contradictions({"overall": overall, "fine": missing}).response) & set(range(50))


def test_equal_columns_do_not_contradict():
    scores = np.random.default_rng().integers(1, 6, 500).astype(float)
    assert len(find_contradictions({"a": scores, "b": 2 * scores}).response) == 0
    wrong = scores.copy()
    wrong[7] = 5.0 if scores[7] <= 2 else 1.0
    wrong[8:], scores[8:] = np.sort(wrong[8:]), np.sort(wrong[8:])
    assert 7 in find_contradictions({"a": scores, "b": wrong}).response or abs(wrong[7] - scores[7]) < 3


def test_columns_that_often_disagree_are_not_compared():
    rng = np.random.default_rng()
    overall, fine = two_columns(rng)
    rare, often = overall.copy(), overall.copy()
    low = rng.permutation(np.flatnonzero(fine <= 2.25))
    rare[low[:10]], often[low[:150]] = 10.0, 10.0
    assert set(find_contradictions({"a": rare, "b": fine}).response) >= set(low[:10])
    assert len(find_contradictions({"a": often, "b": fine}).response) == 0
