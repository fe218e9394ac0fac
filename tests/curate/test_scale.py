"""curate.rescale: every scale against a loop over the prompts."""

from statistics import NormalDist

import numpy as np
import pytest

from fastpref.curate import rescale, to_logit

NAN, INF = np.nan, np.inf


def one_by_one(pool, scale):
    usable = pool[np.isfinite(pool)]
    if scale == "mad":
        distance = pool - np.median(usable)
        return distance / (1.4826 * np.median(np.abs(distance[np.isfinite(pool)])))
    less, equal = (usable < pool[:, None]).sum(axis=1), (usable == pool[:, None]).sum(axis=1)
    return np.array([NormalDist().inv_cdf(p) for p in (less + equal / 2) / len(usable)])


@pytest.mark.parametrize("scale", ["mad", "normal_score"])
def test_scales_within_a_prompt(scale):
    generator = np.random.default_rng(0)
    sizes = generator.integers(0, 30, size=200)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    rewards = generator.integers(-20, 20, size=offsets[-1]).astype(float)
    rewards[generator.random(len(rewards)) < 0.1] = INF
    valid = generator.random(len(rewards)) < 0.9
    result = rescale(rewards, scale, valid=valid, offsets=offsets)
    usable = np.isfinite(rewards) & valid
    padded = np.full((200, 30), NAN)
    padded[np.arange(30) < sizes[:, None]] = rewards
    mask = np.zeros((200, 30), bool)
    mask[np.arange(30) < sizes[:, None]] = valid
    np.testing.assert_array_equal(rescale(padded, scale, valid=mask)[np.arange(30) < sizes[:, None]], result)
    compared = 0
    for p in range(200):
        here = slice(offsets[p], offsets[p + 1])
        pool = rewards[here][usable[here]]
        expected = one_by_one(pool, scale) if len(set(pool)) > 2 else result[here][usable[here]]
        if np.isfinite(expected).all():
            np.testing.assert_allclose(result[here][usable[here]], expected, atol=1e-12)
            compared += len(set(pool)) > 2
        assert np.isnan(result[here][~usable[here]]).all()
    assert compared > 150


def test_raw_and_logit():
    p = np.array([[0.0, 0.25, NAN], [1.0, INF, 0.5]])
    raw = rescale(p, "raw")
    np.testing.assert_array_equal(raw, [[0, 0.25, NAN], [1, NAN, 0.5]])
    np.testing.assert_array_equal(rescale(raw, "logit"), to_logit(raw))
    assert not np.shares_memory(rescale(p[:, :2], "raw"), p)


def test_scales_of_pools_without_spread():
    rewards = np.array([[2.0, 2.0, 2.0, 5.0], [3.0, NAN, NAN, NAN], [NAN, NAN, NAN, NAN]])
    assert np.isnan(rescale(rewards, "mad")).all()
    scores = rescale(rewards, "normal_score")
    quantile = NormalDist().inv_cdf
    np.testing.assert_allclose(scores[0], [quantile(0.375)] * 3 + [quantile(0.875)])
    np.testing.assert_array_equal(scores[1:], [[0, NAN, NAN, NAN], [NAN] * 4])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
@pytest.mark.parametrize("scale", ["raw", "logit", "mad", "normal_score"])
def test_nothing_to_rescale(shape, scale):
    assert rescale(np.empty(shape), scale).shape == shape


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"scale must be one of .*, got 'z'"):
        rescale(np.zeros((2, 2)), "z")
    with pytest.raises(ValueError, match=r"rewards must lie in \[0, 1\] for scale=\"logit\", got -1 to 0"):
        rescale([[0.0, -1.0]], "logit")
    with pytest.raises(ValueError, match=r"valid must be bool with shape \[2, 2\]"):
        rescale(np.zeros((2, 2)), "raw", valid=[True])
