"""curate.diagnostics: methods.md section 6, against a loop over the prompts, closed forms and Monte Carlo."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastpref import losses
from fastpref.curate import select_pairs
from fastpref.curate.diagnostics import (
    BUCKET_DATASETS,
    Bucket,
    bucket_pairs,
    buckets,
    diagnose,
    equal_gap,
    expected_max,
    mix_on_policy,
    on_policy_share,
    resample,
    swap_rejected,
)

NAN, INF = np.nan, np.inf


def ragged(generator, prompts=60, most=12):
    """Flat rewards with ties and holes, and their offsets."""
    offsets = np.concatenate([[0], generator.integers(0, most + 1, prompts).cumsum()])
    rewards = generator.normal(size=offsets[-1]).round(1)
    rewards[generator.random(len(rewards)) < 0.1] = NAN
    return rewards, offsets


def random_pairs(rewards, offsets, generator, per_prompt=2):
    """Pairs of any two responses with a reward, several of a prompt."""
    pairs = {"prompt": [], "chosen": [], "rejected": []}
    for prompt, (begin, end) in enumerate(itertools.pairwise(offsets)):
        usable = np.flatnonzero(np.isfinite(rewards[begin:end]))
        for _ in range(per_prompt if len(usable) > 1 else 0):
            chosen, rejected = generator.choice(usable, 2, replace=False)
            for name, value in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
                pairs[name].append(value)
    return {name: np.array(values) for name, values in pairs.items()}


# ---- quality and contrast


def test_worked_example():
    rewards = np.array([[1.0, 3.0, 2.0, NAN], [5.0, 5.0, 9.0, 1.0]])
    found = diagnose(rewards, {"prompt": [0, 1, 1], "chosen": [1, 2, 0], "rejected": [0, 3, 1]})
    assert (found.pairs, found.prompts, found.not_better) == (3, 2, 1)
    assert found.chosen_quality == pytest.approx((3 + 9 + 5) / 3)
    assert found.rejected_quality == pytest.approx((1 + 1 + 5) / 3)
    assert found.contrast == pytest.approx((2 + 8 + 0) / 3)
    assert found.measures.percentile_chosen == pytest.approx([100, 100, 100 / 3])
    assert found.measures.percentile_rejected == pytest.approx([0, 0, 100 / 3])
    assert found.measures.z_chosen == pytest.approx([1.5**0.5, 4 / 8**0.5, 0])
    assert found.measures.z_rejected == pytest.approx([-(1.5**0.5), -4 / 8**0.5, 0])
    assert found.contrast_quantiles[0.5] == 2
    assert np.array_equal(found.measures.gap, [2, 8, 0])


def test_against_a_loop_over_the_pairs():
    generator = np.random.default_rng(0)
    rewards, offsets = ragged(generator)
    pairs = random_pairs(rewards, offsets, generator)
    found = diagnose(rewards, pairs, offsets=offsets)
    for at, (prompt, *columns) in enumerate(zip(*pairs.values(), strict=True)):
        pool = rewards[offsets[prompt] : offsets[prompt + 1]]
        seen = pool[np.isfinite(pool)]
        for side, column in zip(("chosen", "rejected"), columns, strict=True):
            measures = {name: getattr(found.measures, f"{name}_{side}")[at] for name in ("score", "percentile", "z")}
            assert measures["score"] == pool[column]
            assert measures["percentile"] == pytest.approx(100 * (seen < pool[column]).sum() / (len(seen) - 1))
            z = (pool[column] - seen.mean()) / seen.std() if np.ptp(seen) else 0
            assert measures["z"] == pytest.approx(z, abs=1e-12)
    assert found.chosen_percentile == found.measures.percentile_chosen.mean()
    assert found.rejected_z == found.measures.z_rejected.mean()
    assert found.contrast_quantiles == {q: np.quantile(found.measures.gap, q) for q in (0.05, 0.25, 0.5, 0.75, 0.95)}


def test_padded_masked_and_flat_pools_agree():
    generator = np.random.default_rng(1)
    rewards, valid = generator.normal(size=(40, 9)), generator.random((40, 9)) < 0.8
    valid[:, :2] = True
    pairs = {"prompt": np.arange(40), "chosen": np.zeros(40, int), "rejected": np.ones(40, int)}
    padded = diagnose(np.where(valid, rewards, NAN), pairs)
    masked = diagnose(rewards, pairs, valid=valid)
    flat = diagnose(rewards[valid], pairs, offsets=np.concatenate([[0], valid.sum(1).cumsum()]))
    for other in (masked, flat):
        for ours, theirs in zip(padded.measures, other.measures, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_a_selection_is_its_kept_pairs():
    rewards = np.random.default_rng(2).normal(size=(30, 8))
    rewards[3] = 0
    selection = select_pairs(rewards, rejected="min")
    found = diagnose(rewards, selection)
    assert found.pairs == found.prompts == 29
    assert found.chosen_quality == pytest.approx(selection.score_chosen[selection.keep].mean())
    assert found.contrast == pytest.approx(selection.gap[selection.keep].mean())
    assert (found.chosen_percentile, found.rejected_percentile) == (100, 0)


def test_no_pair_and_no_prompt():
    for rewards in (np.empty((0, 4)), np.ones((3, 4)), np.empty((2, 0))):
        found = diagnose(rewards, {"prompt": [], "chosen": [], "rejected": []})
        assert found.pairs == found.prompts == found.not_better == 0
        assert np.isnan([found.chosen_quality, found.chosen_z, found.contrast, found.contrast_quantiles[0.5]]).all()


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        ({"prompt": [0], "chosen": [0]}, ValueError, 'PairSelection or have "prompt", "chosen" and "rejected"'),
        ({"prompt": [2], "chosen": [0], "rejected": [1]}, ValueError, "prompts from 0 to 1, got 2 to 2"),
        ({"prompt": [-1], "chosen": [0], "rejected": [1]}, ValueError, "got -1 to -1"),
        ({"prompt": [1], "chosen": [3], "rejected": [1]}, ValueError, "chosen within the pool, got 3 in a pool of 3"),
        ({"prompt": [1], "chosen": [0], "rejected": [-1]}, ValueError, "rejected within the pool, got -1"),
        (
            {"prompt": [0, 0], "chosen": [0, 0], "rejected": [1, 2]},
            ValueError,
            "none in 1 of 2 pairs.* response 2 of p",
        ),
        ({"prompt": [0], "chosen": [0.0], "rejected": [1]}, TypeError, "chosen as integers, got float64"),
        ({"prompt": [0, 1], "chosen": [0], "rejected": [1]}, ValueError, r"of one shape \[pairs\], got \[\[2\], \[1\]"),
        (np.zeros((2, 3)), ValueError, "pairs must be a PairSelection or have"),
    ],
)
def test_pairs_that_name_no_response_are_refused(pairs, error, message):
    with pytest.raises(error, match=message):
        diagnose(np.array([[1.0, 2.0, NAN], [1.0, 2.0, 3.0]]), pairs)


def test_a_quantile_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"quantiles must lie in \[0, 1\], got \[50.0\]"):
        diagnose(np.ones((1, 2)), {"prompt": [], "chosen": [], "rejected": []}, quantiles=[50])


@pytest.mark.parametrize("value", [0.1, 0.7, 1e-300, -3.3])
def test_equal_rewards_are_at_their_mean(value):
    # The float64 mean of three times 0.1 is not 0.1.
    found = diagnose(np.full((1, 3), value), {"prompt": [0], "chosen": [0], "rejected": [1]}).measures
    assert (found.z_chosen[0], found.z_rejected[0], found.percentile_chosen[0]) == (0, 0, 0)


@pytest.mark.parametrize("scale", [2.0**-1000, 2.0**1000])
def test_z_neither_overflows_nor_underflows(scale):
    rewards = np.random.default_rng(11).normal(size=(5, 6))
    pairs = select_pairs(rewards, rejected="min")
    with np.errstate(all="raise"):
        found = diagnose(rewards * scale, pairs).measures
    assert np.array_equal(found.z_chosen, diagnose(rewards, pairs).measures.z_chosen)


# ---- buckets


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([7.0], "m"),
        ([7.0, 3.0], "bw"),
        ([2.0, 7.0, 3.0], "wbm"),
        ([4.0, 2.0, 7.0, 3.0], "hwbl"),
        ([1.0, 2.0, 3.0, 4.0, 5.0], "wlmhb"),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "wlmmhb"),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], "wllmhhb"),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], "wwlmmhbb"),
        ([5.0, 5.0, 5.0], "mmm"),
        ([1.0, 5.0, 5.0, NAN], "wbb-"),
        ([1.0, 1.0, 3.0, 5.0, 5.0], "wwmbb"),
        ([0.0, 1.0, 1.0, 1.0, 2.0], "wmmmb"),
        ([0.0, 1.0, 1.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0], "wlllmmhhbb"),  # the tie is on the bound of worst and low
        ([NAN, INF], "--"),
    ],
)
def test_bucket_labels(rewards, expected):
    label = buckets(np.array([rewards])).label
    assert label.shape == (1, len(rewards)) and label.dtype == np.int8
    assert label[0].tolist() == ["wlmhb".find(letter) for letter in expected]
    # Turned upside down, best is worst.
    mirrored = buckets(-np.array([rewards])).label[0]
    assert mirrored.tolist() == [at if at < 0 else 4 - at for at in label[0]]


@pytest.mark.parametrize("n", [5, 10, 16, 57, 200])
def test_buckets_are_of_equal_size(n):
    label = buckets(np.random.default_rng(n).normal(size=(20, n))).label
    sizes = np.array([np.bincount(row, minlength=5) for row in label])
    assert sizes.max() - sizes.min() <= (0 if n % 5 == 0 else 1)


def test_representatives():
    rewards = np.array([[1.0, 9.0, 5.0, 7.0, 3.0, 9.0, NAN], [2.0, 1.0, NAN, 2.0, NAN, NAN, NAN]])
    # ascending 1 3 5 7 9 9 in w l m m b b: the two best share a bucket, which leaves none for high
    assert buckets(rewards).representative.tolist() == [[0, 4, 2, -1, 1], [1, -1, -1, -1, 0]]
    ten = buckets(np.arange(10.0)[None]).representative
    assert ten.tolist() == [[0, 2, 4, 6, 9]]
    assert buckets(np.empty((2, 0))).representative.tolist() == [[-1] * 5] * 2


def test_bucket_pairs_hold_one_side_and_move_the_other():
    rewards = np.random.default_rng(3).normal(size=(50, 20))
    sets = bucket_pairs(rewards)
    assert list(sets) == [
        *("best-vs-high", "best-vs-medium", "best-vs-low"),
        *("best-vs-worst", "high-vs-worst", "medium-vs-worst", "low-vs-worst"),
    ]
    found = {name: diagnose(rewards, pairs) for name, pairs in sets.items()}
    for name, pairs in sets.items():
        assert np.array_equal(pairs["prompt"], np.arange(50))
        assert (pairs["score_chosen"] > pairs["score_rejected"]).all()
        assert np.array_equal(pairs["score_chosen"], rewards[pairs["prompt"], pairs["chosen"]])
        assert found[name].not_better == 0
    for first in ("best-vs-high", "best-vs-medium", "best-vs-low"):
        assert np.array_equal(sets[first]["chosen"], sets["best-vs-worst"]["chosen"])
        assert found[first].chosen_quality == rewards.max(1).mean()
    for last in ("high-vs-worst", "medium-vs-worst", "low-vs-worst"):
        assert np.array_equal(sets[last]["rejected"], rewards.argmin(1))
    contrast = [found[f"best-vs-{worse}"].contrast for worse in ("high", "medium", "low", "worst")]
    assert contrast == sorted(contrast) and len(set(contrast)) == 4
    quality = [found[f"{better}-vs-worst"].chosen_quality for better in ("low", "medium", "high", "best")]
    assert quality == sorted(quality) and len(set(quality)) == 4


def test_bucket_pairs_of_small_pools():
    rewards = np.array([[1.0, 2.0, NAN, NAN, NAN], [1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 2.0, 3.0, NAN, NAN]])
    same = bucket_pairs(rewards)
    assert {len(pairs["prompt"]) for pairs in same.values()} == {1}
    each = bucket_pairs(rewards, same_prompts=False)
    assert each["best-vs-worst"]["prompt"].tolist() == [0, 1, 2]
    assert each["best-vs-medium"]["prompt"].tolist() == [1, 2]
    assert each["best-vs-high"]["prompt"].tolist() == [1]
    with pytest.warns(UserWarning, match="none of 2 prompts has a response in each of the five buckets"):
        empty = bucket_pairs(rewards[[0, 2]])
    assert all(len(column) == 0 for pairs in empty.values() for column in pairs.values())
    assert set(empty) == {f"{a.name}-vs-{b.name}".lower() for a, b in BUCKET_DATASETS}


# ---- controls


def controlled_pairs(generator, prompts=4000):
    """Pools of two with chosen quality and gap that go together, as flat rewards and pairs."""
    quality = generator.normal(size=prompts)
    gap = np.exp(0.8 * quality + 0.6 * generator.normal(size=prompts))
    rewards = np.stack([quality, quality - gap], 1)
    pairs = {"prompt": np.arange(prompts), "chosen": np.zeros(prompts, int), "rejected": np.ones(prompts, int)}
    return rewards, pairs, quality, gap


def test_equal_gap_tells_quality_from_gap():
    rewards, pairs, quality, gap = controlled_pairs(np.random.default_rng(4))
    noise = np.random.default_rng(5).normal(size=len(gap))
    # The outcome is about the quality alone: between bins of the gap it differs all the same, because both go together.
    found = equal_gap(rewards, pairs, outcome=quality + 0.1 * noise, bins=10)
    assert found.quality_moved.effect > 1
    assert abs(found.quality_moved.effect - found.quality_moved.moved_by) < 4 * found.quality_moved.stderr + 0.02
    low, high = np.quantile(gap, [0.1, 0.9])
    raw = quality[gap > high].mean() - quality[gap < low].mean()
    assert found.gap_moved.effect < raw / 8  # what quality is left inside a bin
    assert found.gap_moved.effect == pytest.approx(found.gap_moved.held_by, abs=0.05)
    assert found.gap_moved.moved_by > 1


def test_controls_against_a_loop():
    generator = np.random.default_rng(6)
    rewards, pairs, quality, gap = controlled_pairs(generator, 600)
    outcome = generator.normal(size=600)
    outcome[::7] = NAN
    control = equal_gap(rewards, pairs, outcome=outcome, bins=3).quality_moved
    gap = rewards[:, 0] - rewards[:, 1]
    cuts = np.quantile(gap, [1 / 3, 2 / 3])
    effects, variances, weights = [], [], []
    for row in range(3):
        inside = np.digitize(gap, cuts, right=True) == row
        assert np.array_equal(control.held_bin == row, inside)
        inner = np.digitize(quality, np.quantile(quality[inside], [1 / 3, 2 / 3]), right=True)
        cells = []
        for column in range(3):
            cell = inside & (inner == column)
            assert np.array_equal((control.held_bin == row) & (control.moved_bin == column), cell)
            assert control.count[row, column] == cell.sum() > 60
            assert control.held[row, column] == pytest.approx(gap[cell].mean())
            assert control.moved[row, column] == pytest.approx(quality[cell].mean())
            assert control.outcome[row, column] == pytest.approx(np.nanmean(outcome[cell]))
            seen = outcome[cell & np.isfinite(outcome)]
            cells.append((seen.mean(), seen.var(ddof=1) / len(seen), len(seen)))
        effects.append(cells[2][0] - cells[0][0])
        variances.append(cells[2][1] + cells[0][1])
        weights.append(sum(size for _, _, size in cells))
    weights = np.array(weights) / sum(weights)
    assert control.effect == pytest.approx(weights @ effects)
    assert control.stderr == pytest.approx(math.sqrt(weights**2 @ variances))


@pytest.mark.parametrize("quality", ["raw", "percentile", "z"])
def test_qualities_to_hold(quality):
    generator = np.random.default_rng(7)
    rewards, offsets = ragged(generator, 200)
    pairs = random_pairs(rewards, offsets, generator)
    found = equal_gap(rewards, pairs, quality=quality, bins=2, offsets=offsets)
    measures = diagnose(rewards, pairs, offsets=offsets).measures
    values = getattr(measures, {"raw": "score_chosen"}.get(quality, f"{quality}_chosen"))
    assert np.array_equal(found.gap_moved.held_bin, values > np.median(values))
    assert np.array_equal(found.quality_moved.held_bin, measures.gap > np.median(measures.gap))
    assert found.quality_moved.outcome is None and math.isnan(found.quality_moved.effect)


def test_controls_of_equal_values_and_of_nothing():
    pairs = {"prompt": np.arange(4), "chosen": np.ones(4, int), "rejected": np.zeros(4, int)}
    same = equal_gap(np.array([[1.0, 2.0]] * 4), pairs, outcome=np.arange(4.0))
    assert same.quality_moved.count.sum() == 4 and same.quality_moved.count.max() == 4
    assert math.isnan(same.quality_moved.effect) and math.isnan(same.gap_moved.moved_by)
    empty = equal_gap(np.ones((2, 2)), {"prompt": [], "chosen": [], "rejected": []})
    assert empty.gap_moved.count.sum() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quality": "length"}, 'quality must be "raw", "percentile" or "z", got \'length\''),
        ({"bins": 1}, "bins must be an integer of at least 2, got 1"),
        ({"bins": 2.5}, "bins must be an integer of at least 2, got 2.5"),
        ({"bins": True}, "bins must be an integer of at least 2, got True"),
        ({"outcome": np.array([1.0, INF])}, "outcome must be finite or NaN, got 1 infinite values"),
        ({"outcome": np.zeros(3)}, r"outcome must have shape \[2\], got \[3\]"),
    ],
)
def test_wrong_controls(options, message):
    with pytest.raises(ValueError, match=message):
        equal_gap(np.array([[1.0, 2.0]]), {"prompt": [0, 0], "chosen": [1, 1], "rejected": [0, 0]}, **options)


# ---- swapping the rejected


def test_swap_changes_the_contrast_alone():
    rewards = np.random.default_rng(8).normal(size=(100, 30))
    pairs = select_pairs(rewards, rejected="min")
    swap = swap_rejected(rewards, pairs, "mean-1std")
    assert swap.quality_change == 0
    assert swap.contrast_before == pytest.approx(diagnose(rewards, pairs).contrast)
    assert swap.contrast_after == pytest.approx(diagnose(rewards, swap.pairs).contrast)
    assert swap.contrast_after < swap.contrast_before - 0.5
    assert swap.swapped.all() and swap.unable == 0
    assert np.array_equal(swap.pairs["chosen"], pairs.chosen)
    assert np.array_equal(swap.pairs["rejected"], select_pairs(rewards, rejected="mean-1std").rejected)
    assert np.array_equal(swap.pairs["score_rejected"], rewards[np.arange(100), swap.pairs["rejected"]])


def test_pairs_that_cannot_be_swapped_stay():
    rewards = np.array([[1.0, 2.0, 3.0, 4.0]] * 4)
    pairs = {"prompt": np.arange(4), "chosen": np.full(4, 2), "rejected": np.zeros(4, int)}
    rewards[1, 3] = 3.0
    swap = swap_rejected(rewards, pairs, np.array([1, 3, -1, 0]))  # below, equal to the chosen one, none, the same
    assert swap_rejected(rewards, pairs, np.full(4, 3)).unable == 4
    assert swap.pairs["rejected"].tolist() == [1, 0, 0, 0]
    assert swap.swapped.tolist() == [True, False, False, False] and swap.unable == 2
    assert (swap.contrast_before, swap.contrast_after) == (2, 1.75)
    with pytest.raises(ValueError, match=r"rejected must be a target .* shape \[4\], got float64 \[4\]"):
        swap_rejected(rewards, pairs, np.zeros(4))
    with pytest.raises(ValueError, match="rejected must lie within the pool, got 9 in a pool of 4 at 3"):
        swap_rejected(rewards, pairs, np.array([1, 1, 1, 9]))
    with pytest.raises(ValueError, match="rejected must be"):
        swap_rejected(rewards, pairs, "worst")


# ---- on-policy


def test_on_policy_share():
    on_policy = np.array([[True, False, False], [True, True, False]])
    pairs = {"prompt": [0, 0, 1, 1], "chosen": [0, 1, 0, 2], "rejected": [1, 2, 1, 0]}
    assert on_policy_share(on_policy, pairs) == (0.5, 0.5, 0.25, 0.5)
    assert on_policy_share(on_policy.ravel(), pairs, offsets=[0, 3, 6]) == (0.5, 0.5, 0.25, 0.5)
    valid = np.array([[True, True, True], [True, False, True]])
    assert on_policy_share(on_policy, {"prompt": [1], "chosen": [0], "rejected": [2]}, valid=valid) == (1, 0, 0, 0.4)
    assert np.isnan(on_policy_share(on_policy, {"prompt": [], "chosen": [], "rejected": []})[:3]).all()
    with pytest.raises(TypeError, match="on_policy must be bool, got int64"):
        on_policy_share(on_policy.astype(int), pairs)


def off_and_on_policy(prompts=100):
    generator = np.random.default_rng(9)
    rewards = generator.normal(size=(prompts, 10))
    rewards[:, 5:] += 2  # the policy's own
    own = np.broadcast_to(np.arange(10) >= 5, rewards.shape)
    return rewards, *(select_pairs(rewards, rejected="min", valid=valid) for valid in (~own, own))


def test_mix_on_policy():
    rewards, off, on = off_and_on_policy()
    mix = mix_on_policy(off, on, 0.2)
    assert mix.replaced == 20 == mix.pairs["on_policy"].sum()
    drawn = mix.pairs["on_policy"]
    for name in ("chosen", "rejected", "score_chosen", "score_rejected"):
        assert np.array_equal(mix.pairs[name], np.where(drawn, getattr(on, name), getattr(off, name)))
    assert np.array_equal(mix.pairs["prompt"], np.arange(100))
    assert list(mix.pairs) == [*off.table(), "on_policy"]  # in this order, whatever the hashes of the names
    assert mix.quality_before == pytest.approx(off.score_chosen[drawn].mean())
    assert mix.quality_after == pytest.approx(on.score_chosen[drawn].mean()) and mix.quality_after > mix.quality_before
    assert diagnose(rewards, mix.pairs).not_better == 0
    again, other = mix_on_policy(off, on, 0.2), mix_on_policy(off, on, 0.2, seed=1)
    assert np.array_equal(again.pairs["on_policy"], drawn) and not np.array_equal(other.pairs["on_policy"], drawn)
    assert mix_on_policy(off, on, 0).replaced == 0 and mix_on_policy(off, on, 1).replaced == 100


def test_mix_of_several_pairs_per_prompt_and_few_on_policy_ones():
    off = {"prompt": [0, 0, 1, 2], "chosen": [0, 1, 0, 0], "rejected": [2, 2, 1, 1]}
    on = {"prompt": [2, 0], "chosen": [5, 6], "rejected": [7, 8]}
    with pytest.warns(UserWarning, match="4 of 4 pairs were to be replaced, but only 3"):
        mix = mix_on_policy(off, on, 1.0)
    assert mix.pairs["chosen"].tolist() == [6, 6, 0, 5] and mix.pairs["rejected"].tolist() == [8, 8, 1, 7]
    assert math.isnan(mix.quality_after)
    with pytest.warns(UserWarning, match="2 of 4 pairs were to be replaced, but only 0"):
        none = mix_on_policy(off, {"prompt": [], "chosen": [], "rejected": []}, 0.5)
    assert none.replaced == 0 and none.pairs["chosen"].tolist() == off["chosen"]


def test_a_mix_that_lowers_the_chosen_quality_warns():
    _, off, on = off_and_on_policy()
    with pytest.warns(UserWarning, match=r"of the 20 replaced pairs falls from \S+ to \S+; on-policy"):
        mix_on_policy(on, off)


@pytest.mark.parametrize(
    ("on", "fraction", "message"),
    [
        ({"prompt": [0], "chosen": [0], "rejected": [1]}, 1.5, r"fraction must lie in \[0, 1\], got 1.5"),
        ({"prompt": [0, 0], "chosen": [0, 0], "rejected": [1, 2]}, 0.5, "at most one pair per prompt, got 2 of 1"),
        ({"prompt": [0]}, 0.5, "pairs must be a PairSelection or have"),
    ],
)
def test_wrong_mixes(on, fraction, message):
    with pytest.raises(ValueError, match=message):
        mix_on_policy({"prompt": [0], "chosen": [0], "rejected": [1]}, on, fraction)


# ---- prompts worth more samples


@pytest.mark.parametrize(
    ("n", "expected"),
    # methods.md section 1; the first three are closed forms
    [
        *((1, 0), (2, 1 / math.sqrt(math.pi)), (3, 1.5 / math.sqrt(math.pi))),
        *((5, 1.163), (10, 1.539), (20, 1.868), (50, 2.249), (100, 2.508), (200, 2.746), (400, 2.968)),
    ],
)
def test_expected_maximum_of_normals(n, expected):
    assert expected_max(n) == pytest.approx(expected, abs=1e-12 if n < 4 else 6e-4)


@pytest.mark.parametrize("n", [2, 5, 16])
def test_normal_gain_is_unbiased(n):
    """Against the maxima of 2n and of n fresh normals with the same mean and standard deviation."""
    generator = np.random.default_rng(n)
    pools = 3 + 1.7 * generator.normal(size=(100_000, n))
    found = resample(pools)
    more = 3 + 1.7 * generator.normal(size=(100_000, 2 * n))
    truth = more.max(1) - pools.max(1)
    error = math.hypot(truth.std(), found.gain.std()) / math.sqrt(100_000)
    assert found.gain.mean() == pytest.approx(truth.mean(), abs=5 * error)
    assert error < 0.02 * truth.mean()


def test_empirical_gain_against_draws_from_the_pool():
    generator = np.random.default_rng(10)
    pool = np.array([0.3, 2.0, 2.0, 5.0, 1.0, NAN])
    gain = resample(pool[None], estimator="empirical").gain[0]
    draws = pool[generator.integers(5, size=(200_000, 10))]
    truth = draws.max(1) - draws[:, :5].max(1)
    assert gain == pytest.approx(truth.mean(), abs=5 * truth.std() / math.sqrt(200_000))
    # exactly, from the distribution function of the maximum
    values, below = np.unique(pool[:5]), np.array([1, 2, 4, 5]) / 5
    exact = [(np.diff(below**k, prepend=0) * values).sum() for k in (5, 10)]
    assert gain == pytest.approx(exact[1] - exact[0], rel=1e-12)


def test_resample_numbers_and_tests():
    rewards = np.array(
        [
            [1.0, 4.0, 3.9, 0.0, 2.0, 2.5],  # top two closer than the judge's noise
            [5.0, 1.0, 2.0, 3.0, 0.0, 1.5],  # nothing to say
            [-5.0, 0.4, -6.0, -7.0, -8.0, -9.0],  # best below the floor
            [3.0, 9.0, NAN, NAN, NAN, INF],  # too few
            [2.0] + [NAN] * 5,
            [NAN] * 6,
        ]
    )
    found = resample(rewards, floor=1.0, judge_noise=0.2)
    assert found.n.tolist() == [6, 6, 6, 2, 1, 0]
    np.testing.assert_array_equal(found.best, [4.0, 5.0, 0.4, 9.0, 2.0, NAN])
    np.testing.assert_allclose(found.top_gap, [0.1, 2.0, 5.4, 6.0, NAN, NAN])
    assert found.below_floor.tolist() == [False, False, True, False, False, False]
    assert found.unresolved.tolist() == [True, False, False, False, False, False]
    assert found.too_few.tolist() == [False, False, False, True, True, True]
    assert found.worth.tolist() == [True, False, True, True, True, True]
    assert np.isnan(found.gain[4:]).all() and (found.gain[:4] > 0).all()
    assert found.order[-2:].tolist() == [4, 5] and (np.diff(found.gain[found.order[:4]]) <= 0).all()
    assert not resample(rewards, least=0).worth.any()
    gainful = resample(rewards, least=0, least_gain=1.0)
    assert np.array_equal(gainful.worth, found.gain > 1) and gainful.worth.any() and not gainful.worth.all()
    for estimator in ("normal", "empirical"):
        assert resample(np.full((1, 4), 0.1), estimator=estimator).gain[0] == pytest.approx(0, abs=1e-15)
    assert len(resample(np.empty((0, 3))).order) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"floor": NAN}, "floor must be finite, got nan"),
        ({"judge_noise": -1.0}, "judge_noise must be at least 0, got -1.0"),
        ({"least_gain": INF}, "least_gain must be finite"),
        ({"estimator": "uniform"}, 'estimator must be "normal" or "empirical", got \'uniform\''),
    ],
)
def test_wrong_resampling(options, message):
    with pytest.raises(ValueError, match=message):
        resample(np.ones((1, 3)), **options)


# ---- properties

POOLS = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 4), st.integers(1, 20)),
    elements=st.one_of(st.integers(-9, 9).map(float), st.just(NAN)),
)


@settings(max_examples=100, deadline=None)
@given(POOLS, st.randoms(use_true_random=False))
def test_the_order_of_the_responses_does_not_matter(rewards, random):
    permutation = list(range(rewards.shape[1]))
    random.shuffle(permutation)
    permuted = rewards[:, permutation]
    place = np.argsort(permutation)
    ours, theirs = buckets(rewards), buckets(permuted)
    assert np.array_equal(ours.label, theirs.label[:, place])
    assert np.array_equal(ours.representative < 0, theirs.representative < 0)
    for estimator in ("normal", "empirical"):
        for one, other in zip(
            *(vars(resample(r, floor=0.0, judge_noise=2.0, estimator=estimator)).values() for r in (rewards, permuted)),
            strict=True,
        ):
            np.testing.assert_array_equal(one, other)
    sets, others = bucket_pairs(rewards, same_prompts=False), bucket_pairs(permuted, same_prompts=False)
    for name, pairs in sets.items():
        for column in ("prompt", "score_chosen", "score_rejected"):
            assert np.array_equal(pairs[column], others[name][column])
        moved = pairs | {side: place[pairs[side]] for side in ("chosen", "rejected")}
        for one, other in zip(diagnose(rewards, pairs).measures, diagnose(permuted, moved).measures, strict=True):
            np.testing.assert_array_equal(one, other)


@settings(max_examples=100, deadline=None)
@given(POOLS, st.integers(-100, 100))
def test_a_constant_on_the_rewards_moves_the_quality_alone(rewards, constant):
    ours, theirs = buckets(rewards), buckets(rewards + constant)
    assert np.array_equal(ours.label, theirs.label) and np.array_equal(ours.representative, theirs.representative)
    for estimator in ("normal", "empirical"):
        gains = [resample(r, estimator=estimator).gain for r in (rewards, rewards + constant)]
        np.testing.assert_allclose(*gains, atol=1e-12)
    pairs = bucket_pairs(rewards, same_prompts=False)["best-vs-worst"]
    found, moved = diagnose(rewards, pairs), diagnose(rewards + constant, pairs)
    assert found.contrast_quantiles == pytest.approx(moved.contrast_quantiles, nan_ok=True)
    assert found.chosen_quality + constant == pytest.approx(moved.chosen_quality, nan_ok=True)
    np.testing.assert_allclose(found.measures.z_chosen, moved.measures.z_chosen, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(POOLS)
def test_buckets_follow_the_rewards(rewards):
    label, representative = buckets(rewards)
    for pool, own, columns in zip(rewards, label, representative, strict=True):
        seen = np.isfinite(pool)
        assert np.array_equal(own >= 0, seen)
        order = np.argsort(pool[seen], kind="stable")
        assert (np.diff(own[seen][order]) >= 0).all()
        for bucket in Bucket:
            assert (columns[bucket] >= 0) == (own == bucket).any()
            assert columns[bucket] < 0 or own[columns[bucket]] == bucket
        if len(np.unique(pool[seen])) > 1:
            assert pool[columns[Bucket.BEST]] == np.nanmax(pool)
            assert pool[columns[Bucket.WORST]] == np.nanmin(pool)


# ---- why chosen quality comes first


@pytest.mark.parametrize("seed", range(3))
def test_the_optimum_of_dpo_is_the_reference_times_a_power_of_the_ratio(seed):
    """pi(y) ~ pi_ref(y) * (pi_w(y) / pi_l(y))**(1 / beta), over all pairs of six responses; Newton in float64."""
    generator, beta = torch.Generator().manual_seed(seed), 0.7
    draw = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    chosen, rejected, reference = draw.log_softmax(1)
    better, worse = (index.flatten() for index in torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij"))
    weight = (chosen[better] + rejected[worse]).exp()

    def loss(free):
        logps = torch.cat([free, free.new_zeros(1)]).log_softmax(0)
        pairs = losses.Pairs(logps[better], logps[worse], reference[better], reference[worse])
        return weight @ losses.LOSSES["sigmoid"](pairs, beta=beta)

    free = torch.zeros(5, dtype=torch.float64)
    for _ in range(50):
        gradient = torch.autograd.functional.jacobian(loss, free)
        step = torch.linalg.solve(torch.autograd.functional.hessian(loss, free), gradient)
        free = free - step * min(1.0, 1 / step.abs().max().item())
    expected = (reference + (chosen - rejected) / beta).log_softmax(0)
    found = torch.cat([free, free.new_zeros(1)]).log_softmax(0)
    assert gradient.abs().max() < 1e-12
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
    # The same pairs with another rejected distribution give another optimum, the reference alone is none.
    assert (found - reference).abs().max() > 0.1
