"""curate.select_pairs: methods.md section 1, rule by rule."""

import dataclasses
import functools
import itertools
import math
import warnings
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastpref import curate
from fastpref.curate import DropReason, all_pairings, to_logit
from fastpref.curate import pairs as pairs_module
from fastpref.curate.pairs import without

pytestmark = pytest.mark.numerics

NAN, INF = np.nan, np.inf

# In most pools here mean - 2 std lies below every reward, which is warned about.
select_pairs = functools.partial(curate.select_pairs, on_degenerate="ignore")


def select_one(rewards, *rules, **options):
    """The selection for a single prompt, as plain numbers."""
    pairs = select_pairs(np.asarray([rewards], dtype=float), *rules, **options)
    return int(pairs.chosen[0]), int(pairs.rejected[0]), DropReason(pairs.reason[0])


# ---- the rule


def test_rejected_is_the_response_nearest_to_the_target():
    rewards = np.random.default_rng(0).normal(size=(50, 200))
    pairs = select_pairs(rewards)
    for row, pool in enumerate(rewards):
        target = pool.mean() - 2 * pool.std()
        assert pairs.chosen[row] == pool.argmax()
        assert pairs.rejected[row] == np.abs(pool - target).argmin()
        assert pairs.target[row] == pytest.approx(target)
        assert pairs.mean[row] == pytest.approx(pool.mean(), abs=1e-12)
        assert pairs.std[row] == pytest.approx(pool.std())
        assert pairs.score_rejected[row] == pool[pairs.rejected[row]]
        assert pairs.percentile[row] == pytest.approx(100 * (pool < pool[pairs.rejected[row]]).sum() / 199)
    assert np.array_equal(pairs.gap, pairs.score_chosen - pairs.score_rejected)
    assert pairs.keep.all() and pairs.dropped() == {}


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_up_to_five_responses_the_rule_is_min(n, ddof):
    rewards = np.random.default_rng(n).standard_cauchy(size=(2000, n))
    pairs = select_pairs(rewards, ddof=ddof)
    assert np.array_equal(pairs.rejected, rewards.argmin(axis=1))
    assert pairs.share_rejected_min == 1 and pairs.median_percentile == 0


# The mean reward of the rejected response, N(0, 1) rewards: own runs of methods.md section 1, (ii). The standard error
# over 20,000 prompts is at most 0.005 (min_of_5 has a spread of 0.67), the table is rounded to 0.01 or 0.001.
@pytest.mark.parametrize(
    ("n", "rule_mean", "min_mean", "draw_mean", "rule_is_min"),
    [
        (16, -1.74, -1.77, -1.16, 0.96),
        (64, -1.94, -2.34, -1.16, 0.27),
        (200, -1.984, -2.747, -1.163, 0.005),
        (400, -1.994, -2.971, -1.161, 0.0),
    ],
)
def test_normal_rewards(n, rule_mean, min_mean, draw_mean, rule_is_min):
    rewards = np.random.default_rng(n).normal(size=(20_000, n))
    rule, lowest, draw = (select_pairs(rewards, rejected=name) for name in ("mean-2std", "min", "min_of_5"))
    assert rule.score_rejected.mean() == pytest.approx(rule_mean, abs=0.015)
    assert lowest.score_rejected.mean() == pytest.approx(min_mean, abs=0.015)
    # Without the chosen one the draws are a little lower.
    assert draw.score_rejected.mean() == pytest.approx(draw_mean, abs=0.02 + 2 / n)
    assert rule.share_rejected_min == pytest.approx(rule_is_min, abs=0.012)
    assert lowest.share_rejected_min == 1
    # Below the minimum the rule is min; the converse need not hold.
    assert rule.share_below_min <= rule.share_rejected_min
    if n == 200:
        assert rule.score_rejected.std() == pytest.approx(0.137, abs=0.01)
        assert draw.score_rejected.std() == pytest.approx(0.67, abs=0.02)


@pytest.mark.parametrize("n", [10, 20, 21, 30, 64, 200, 400])
def test_one_outlier(n):
    rewards = np.random.default_rng(n).normal(size=(500, n))
    rewards[:, 3] = -10
    assert ((select_pairs(rewards).rejected == 3) == (n == 10)).all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("min", 0), ("mean-1.5std", 0), ("mean-1std", 1), ("mean", 2), ("mean+.5std", 3), ("mean+1.std", 3), ("max", 4)],
)
def test_targets(name, expected):
    # mean 0, std sqrt(2): targets -2.1, -1.4, 0, 0.7, 1.4
    rewards = [-2.0, -1.0, 0.0, 1.0, 2.0]
    assert select_one(rewards, chosen=name, rejected="min")[0] == (expected or -1)
    assert select_one(rewards, chosen="max", rejected=name)[1] == (expected if expected < 4 else -1)


@pytest.mark.parametrize("name", ["", "median", "mean-2", "mean2std", "mean-std", "mean--2std", "mean-2stds", None, 2])
def test_unknown_targets_are_refused(name):
    with pytest.raises(ValueError, match="rejected must be"):
        select_pairs(np.zeros((1, 4)), rejected=name)


@pytest.mark.parametrize("name", ["min_of_0", "min_of_", "min_of_-1", "quantile:1.1", "quantile:", "quantile:-0.1"])
def test_unknown_ranks_are_refused(name):
    with pytest.raises(ValueError, match="rejected must be"):
        select_pairs(np.zeros((1, 4)), rejected=name)


# ---- ties


def test_a_tie_in_distance_gives_the_lower_rejected_and_the_higher_chosen():
    # 0.1 and 0.3: their float64 mean is nearer to one of the two by one rounding, which must not decide.
    assert select_one([0.3, 0.1], chosen="max", rejected="mean") == (0, 1, DropReason.KEPT)
    assert select_one([0.3, 0.1], chosen="mean", rejected="min") == (0, 1, DropReason.KEPT)
    assert select_one([0.1, 0.3, 0.7, 0.9], chosen="mean", rejected="mean") == (2, 1, DropReason.KEPT)


def test_equal_rewards_give_the_first_response():
    assert select_one([1.0, 5.0, 1.0, 5.0, 3.0]) == (1, 0, DropReason.KEPT)
    assert select_one([3.0, 5.0, 1.0, 5.0, 1.0]) == (1, 2, DropReason.KEPT)


# ---- what gives no pair


@pytest.mark.parametrize(
    ("rewards", "options", "reason"),
    [
        ([], {}, DropReason.TOO_FEW),
        ([1.0], {}, DropReason.TOO_FEW),
        ([NAN, INF, -INF, 2.0], {}, DropReason.TOO_FEW),
        ([NAN, NAN], {}, DropReason.TOO_FEW),
        ([0.1, 0.1, 0.1], {}, DropReason.NO_SPREAD),
        ([0.0, -0.0], {}, DropReason.NO_SPREAD),
        ([1.0, 2.0, 9.0], {"rejected": "max"}, DropReason.SAME_RESPONSE),
        ([1.0, 2.0, 9.0], {"chosen": "min", "rejected": "max"}, DropReason.NOT_BETTER),
    ],
)
def test_dropped_prompts_say_why(rewards, options, reason):
    assert select_one(rewards, **options) == (-1, -1, reason)
    pairs = select_pairs(np.asarray([rewards], dtype=float), **options)
    assert not pairs.keep[0] and pairs.dropped() == {reason.name.lower(): 1}
    assert np.isnan([pairs.score_chosen[0], pairs.gap[0], pairs.percentile[0], pairs.share_rejected_min]).all()


def test_no_prompt_at_all():
    pairs = select_pairs(np.empty((0, 4)))
    assert pairs.chosen.shape == (0,) and pairs.dropped() == {} and np.isnan(pairs.median_percentile)


def test_ragged_pools_by_nan_and_by_mask_agree_with_each_pool_alone():
    generator = np.random.default_rng(5)
    lengths = generator.integers(1, 40, size=200)
    lengths[0] = 40
    rewards = generator.normal(size=(200, 40))
    valid = np.arange(40) < lengths[:, None]
    by_mask = select_pairs(rewards, valid=valid)
    by_nan = select_pairs(np.where(valid, rewards, NAN))
    for row, length in enumerate(lengths):
        alone = select_pairs(rewards[row : row + 1, :length])
        for field in ("chosen", "rejected", "keep", "reason"):
            assert getattr(by_mask, field)[row] == getattr(by_nan, field)[row] == getattr(alone, field)[0]


def test_infinite_rewards_are_invalid():
    assert select_one([INF, 3.0, 1.0, -INF, 2.0]) == (1, 2, DropReason.KEPT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rewards": [1.0, 2.0]}, r"rewards must have shape \[prompts, responses\], got \[2\]"),
        ({"rewards": [[1.0], [1.0, 2.0]]}, "padded with NaN"),
        ({"rewards": np.zeros((2, 3)), "valid": np.ones((2, 2), bool)}, r"valid must be bool with shape \[2, 3\]"),
        ({"rewards": np.zeros((2, 3)), "valid": np.ones((2, 3))}, "got float64"),
        ({"rewards": np.zeros((2, 3)), "ddof": 2}, "ddof must be 0 or 1, got 2"),
        ({"rewards": np.zeros((2, 3)), "choosable": [True]}, r"choosable must be bool with shape \[2, 3\] to match"),
        ({"rewards": np.zeros(3), "offsets": [0, 2]}, "offsets must run from 0 to 3"),
        ({"rewards": np.zeros((2, 3)), "scale": "log"}, "scale must be one of .*, got 'log'"),
        ({"rewards": np.full((2, 3), -0.1), "scale": "logit"}, r"rewards must lie in \[0, 1\]"),
        ({"rewards": np.zeros((2, 3)), "chosen": "min_of_5"}, "chosen must be .*, got 'min_of_5'"),
        ({"rewards": np.zeros((2, 3)), "on_degenerate": "min"}, "on_degenerate must be .*, got 'min'"),
        ({"rewards": np.zeros((2, 3)), "on_degenerate": None}, "on_degenerate must be .*, got None"),
        ({"rewards": np.zeros((2, 3)), "min_gap": "0.5"}, "min_gap must be a finite number or .*, got '0.5'"),
        ({"rewards": np.zeros((2, 3)), "max_gap": "quantile:2"}, "max_gap must be a finite number or"),
        ({"rewards": np.zeros((2, 3)), "min_chosen": NAN}, "min_chosen must be a finite number or .*, got nan"),
        ({"rewards": np.zeros((2, 3)), "pairs_per_prompt": 0}, "pairs_per_prompt must be an integer >= 1, got 0"),
        ({"rewards": np.zeros((2, 3)), "pairs_per_prompt": 1.0}, "pairs_per_prompt must be an integer >= 1"),
        ({"rewards": np.zeros((2, 3)), "pairs_per_prompt": True}, "pairs_per_prompt must be an integer >= 1"),
        ({"rewards": np.zeros((2, 3)), "chosen": ["max"]}, r"chosen must be .*, got \['max'\]"),
        ({"rewards": np.zeros((2, 3)), "seed": -1}, "seed must be an integer >= 0, got -1"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        select_pairs(**arguments)


# ---- against a loop over the prompts


def reference(pool, chosen=INF, rejected=-2.0, choosable=None, ddof=0, slots=1):
    """(column of chosen, columns of rejected) of one prompt by mean + k std; pools without ties in distance."""
    usable = np.isfinite(pool)
    mean, std = pool[usable].mean(), pool[usable].std(ddof=ddof)

    def nearest(k, eligible):
        target = {INF: pool[usable].max(), -INF: pool[usable].min()}.get(k, mean + k * std)
        return np.argsort(np.where(eligible, np.abs(pool - target), INF), kind="stable")

    best = nearest(chosen, usable if choosable is None else usable & choosable)[0]
    return best, nearest(rejected, usable)[:slots]


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize(
    ("chosen", "rejected"), [("max", "mean-2std"), ("mean+1std", "mean-0.5std"), ("mean+.3std", "min")]
)
@pytest.mark.parametrize("slots", [1, 3])
def test_ragged_pools_with_holes_and_unchoosable_responses(ddof, chosen, rejected, slots):
    generator = np.random.default_rng(7)
    sizes = generator.integers(0, 40, size=300)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    rewards = generator.normal(size=offsets[-1])
    rewards[generator.random(len(rewards)) < 0.1] = NAN
    valid = generator.random(len(rewards)) < 0.9
    choosable = generator.random(len(rewards)) < 0.5
    options = {"valid": valid, "offsets": offsets, "choosable": choosable, "ddof": ddof, "pairs_per_prompt": slots}
    pairs = select_pairs(rewards, chosen, rejected, **options)
    k = {"max": INF, "min": -INF, "mean+.3std": 0.3, "mean-2std": -2, "mean+1std": 1, "mean-0.5std": -0.5}
    shape = (300, slots)
    reasons = set()
    for p, (begin, end) in enumerate(itertools.pairwise(offsets)):
        pool, mask = np.where(valid, rewards, NAN)[begin:end], choosable[begin:end]
        reason = pairs.reason.reshape(shape)[p]
        reasons |= set(reason)
        assert pairs.n_pool[p] == np.isfinite(pool).sum()
        if np.isfinite(pool).sum() < 2:
            assert (reason == DropReason.TOO_FEW).all()
            continue
        if not (np.isfinite(pool) & mask).any():
            assert (reason == DropReason.NO_CHOOSABLE).all() or pairs.n_pool[p] < slots
            continue
        best, worse = reference(pool, k[chosen], k[rejected], mask, ddof, slots)
        for slot in range(slots):
            expected = DropReason.KEPT
            if slot >= pairs.n_pool[p]:
                expected = DropReason.TOO_FEW
            elif worse[slot] == best:
                expected = DropReason.SAME_RESPONSE
            elif pool[worse[slot]] > pool[best]:
                expected = DropReason.NOT_BETTER
            assert reason[slot] == expected
            if expected == DropReason.KEPT:
                assert pairs.chosen.reshape(shape)[p, slot] == best
                assert pairs.rejected.reshape(shape)[p, slot] == worse[slot]
                assert pairs.rank_rejected.reshape(shape)[p, slot] == (pool < pool[worse[slot]]).sum()
                z = (pool - np.nanmean(pool)) / np.nanstd(pool, ddof=ddof)
                assert pairs.z_rejected.reshape(shape)[p, slot] == pytest.approx(z[worse[slot]], abs=1e-12)
                assert pairs.z_chosen.reshape(shape)[p, slot] == pytest.approx(z[best], abs=1e-12)
    assert {DropReason.KEPT, DropReason.TOO_FEW} <= reasons


def assert_same(a, b, prompts=slice(None)):
    """Bit for bit, where a holds the prompts of b that are named."""
    for field in dataclasses.fields(a):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, np.ndarray):
            np.testing.assert_array_equal(left, right[prompts], err_msg=field.name)


@pytest.mark.parametrize("scale", ["raw", "logit", "mad", "normal_score"])
@pytest.mark.parametrize("rejected", ["mean-2std", "quantile:0.3", "min_of_3"])
def test_nothing_depends_on_the_other_prompts_or_the_padding(scale, rejected, monkeypatch):
    generator = np.random.default_rng(5)
    sizes = generator.integers(0, 12, size=400)
    valid = np.arange(12) < sizes[:, None]
    rewards = np.round(generator.random((400, 12)), 2)
    options = {"rejected": rejected, "scale": scale}
    padded = select_pairs(rewards, valid=valid, **options)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    assert_same(select_pairs(rewards[valid], offsets=offsets, **options), padded)
    monkeypatch.setattr(pairs_module, "BLOCK", 60)  # prompts in many blocks, on threads
    assert_same(select_pairs(rewards, valid=valid, **options), padded)
    assert_same(select_pairs(rewards[:123], valid=valid[:123], **options), padded, slice(123))
    if rejected != "min_of_3":  # drawn by the index of the prompt
        for p in range(60):
            assert_same(select_pairs(rewards[p : p + 1, : sizes[p]], **options), padded, slice(p, p + 1))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.uint8, np.bool_])
def test_any_real_dtype(dtype):
    rewards = np.random.default_rng(0).integers(0, 2 if dtype is np.bool_ else 99, size=(50, 30)).astype(dtype)
    assert_same(select_pairs(rewards), select_pairs(rewards.astype(float)))


def test_a_wrong_block_raises_from_its_thread(monkeypatch):
    monkeypatch.setattr(pairs_module, "BLOCK", 10)
    rewards = np.random.default_rng(0).random((100, 5))
    rewards[77, 2] = 1.5
    with pytest.raises(ValueError, match=r'rewards must lie in \[0, 1\] for scale="logit", got .* to 1.5'):
        select_pairs(rewards, scale="logit")


# ---- rules by rank


@pytest.mark.parametrize("q", [0, 0.1, 0.25, 0.5, 1])
def test_a_quantile_is_the_response_of_the_nearest_rank(q):
    for n in (2, 4, 9, 11, 58):
        rewards = np.random.default_rng(n).normal(size=(40, n))
        pairs = select_pairs(rewards, rejected=f"quantile:{q}")
        rank = np.ceil(q * (n - 1) - 0.5)  # half way, the lower one
        assert pairs.rank_rejected.max() in (-1, rank)
        assert pairs.keep.all() == (rank < n - 1)
        columns = np.argsort(rewards, axis=1)[:, int(rank)]
        assert (pairs.rejected == np.where(rank < n - 1, columns, -1)).all()
        assert pairs.share_below_min == 0
        if rank < n - 1:
            assert (pairs.target == pairs.score_rejected).all()
            assert pairs.share_rejected_min == (rank == 0)


def test_a_quantile_of_tied_rewards_and_for_the_chosen():
    assert select_one([3.0, 1.0, 1.0, 1.0, 1.0], rejected="quantile:0.5") == (0, 1, DropReason.KEPT)
    assert select_one([1.0, 2.0, 3.0, 4.0], chosen="quantile:0.5", rejected="min") == (2, 0, DropReason.KEPT)


@pytest.mark.parametrize("rejected", ["quantile:0.1", "quantile:.5", "min_of_5"])
def test_rules_by_rank_do_not_mind_monotone_scales(rejected):
    rewards = np.random.default_rng(0).random((200, 30))
    plain = select_pairs(rewards, rejected=rejected)
    for other in (
        select_pairs(rewards**7, rejected=rejected),
        select_pairs(rewards, rejected=rejected, scale="logit"),
        select_pairs(rewards, rejected=rejected, scale="mad"),
        select_pairs(rewards, rejected=rejected, scale="normal_score"),
    ):
        np.testing.assert_array_equal(other.rejected, plain.rejected)
        np.testing.assert_array_equal(other.chosen, plain.chosen)


@pytest.mark.parametrize(("n", "m"), [(6, 5), (7, 5), (16, 5), (16, 1), (30, 10)])
def test_the_lowest_of_a_draw(n, m):
    """Frequencies of every rank against C(n - 2 - r, m - 1) / C(n - 1, m), the chosen one being left out."""
    prompts = 40_000
    rewards = np.random.default_rng(0).permuted(np.tile(np.arange(float(n)), (prompts, 1)), axis=1)
    ranks = select_pairs(rewards, rejected=f"min_of_{m}", seed=1).rank_rejected
    share = np.bincount(ranks, minlength=n) / prompts
    exact = [math.comb(n - 2 - r, m - 1) / math.comb(n - 1, m) for r in range(n - 1)] + [0]
    error = np.sqrt(np.multiply(exact, np.subtract(1, exact)) / prompts)
    assert (np.abs(share - exact) <= 4.5 * error + 1e-12).all()


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_lowest_of_a_draw_of_everything_is_min(n):
    rewards = np.random.default_rng(n).normal(size=(500, n))
    assert np.array_equal(select_pairs(rewards, rejected="min_of_5").rejected, rewards.argmin(axis=1))


def test_draws_are_by_seed_and_prompt_alone():
    rewards = np.random.default_rng(0).normal(size=(300, 20))
    first, again = (select_pairs(rewards, rejected="min_of_5", seed=3) for _ in range(2))
    assert_same(first, again)
    assert (select_pairs(rewards, rejected="min_of_5", seed=4).rejected != first.rejected).mean() > 0.5
    reversed_pools = select_pairs(rewards[:, ::-1], rejected="min_of_5", seed=3)
    np.testing.assert_array_equal(19 - reversed_pools.rejected, first.rejected)


def test_a_draw_of_tied_rewards_is_the_first_of_them():
    rewards = np.random.default_rng(0).integers(0, 4, size=(300, 12)).astype(float)
    pairs = select_pairs(rewards, rejected="min_of_2")
    kept = np.flatnonzero(pairs.keep)
    assert len(kept) > 200 and len(set(pairs.score_rejected[kept])) > 1
    for row in kept:
        assert pairs.rejected[row] == np.argmax(rewards[row] == pairs.score_rejected[row])
        assert pairs.rank_rejected[row] == (rewards[row] < pairs.score_rejected[row]).sum()


def test_the_chosen_response_is_not_drawn():
    rewards = np.random.default_rng(0).normal(size=(500, 6))
    pairs = select_pairs(rewards, chosen="quantile:0.6", rejected="min_of_1")
    assert pairs.dropped().keys() == {"not_better"}  # rank 3 of 0 .. 5 is chosen, and 2 of the other 5 are above it
    assert pairs.keep.mean() == pytest.approx(0.6, abs=0.1)
    assert np.bincount(pairs.rank_rejected[pairs.keep]).tolist()[:3] == pytest.approx([100] * 3, abs=40)


def test_several_of_a_draw():
    rewards = np.random.default_rng(0).normal(size=(3000, 12))
    pairs = select_pairs(rewards, rejected="min_of_5", pairs_per_prompt=7)
    assert (pairs.reason[:, 5:] == DropReason.TOO_FEW).all() and pairs.keep[:, :5].all()
    assert (np.diff(pairs.rank_rejected[:, :5]) > 0).all()
    # The j-th lowest of 5 out of 11 ranks 0 .. 10 has mean 12 j / 6 - 1.
    np.testing.assert_allclose(pairs.rank_rejected[:, :5].mean(axis=0), 2 * np.arange(1, 6) - 1, atol=0.15)
    few = select_pairs(rewards[:, :3], rejected="min_of_5", pairs_per_prompt=4)
    assert (few.reason == [DropReason.KEPT, DropReason.KEPT, DropReason.SAME_RESPONSE, DropReason.TOO_FEW]).all()


# ---- scales


def test_logit_is_the_logit_of_the_rewards():
    p = np.random.default_rng(0).random((100, 30)) ** 4
    p[0, :2] = 0, 1
    on_scale, plain = select_pairs(p, scale="logit"), select_pairs(to_logit(p))
    for name in ("chosen", "rejected", "mean", "std", "target", "minimum", "z_chosen", "z_rejected"):
        np.testing.assert_array_equal(getattr(on_scale, name), getattr(plain, name), err_msg=name)
    rows = np.arange(100)
    np.testing.assert_array_equal(on_scale.score_rejected, p[rows, on_scale.rejected])
    assert on_scale.scale == "logit"


def test_probabilities_that_are_clamped_together_are_one_reward():
    assert select_one([0.0, 1e-9, 1e-10], scale="logit") == (-1, -1, DropReason.NO_SPREAD)
    clamped = {"chosen": "quantile:0.5", "rejected": "min", "scale": "logit"}
    assert select_one([0.0, 1e-10, 0.5], **clamped) == (-1, -1, DropReason.NOT_BETTER)
    assert select_one([1 - 1e-12, 1.0, 0.5, 1e-9, 0.0], scale="logit") == (1, 4, DropReason.KEPT)


def test_mad_against_a_loop():
    rewards = np.random.default_rng(0).standard_cauchy(size=(100, 41))
    rewards[:, 30:] = np.where(np.arange(11) < np.arange(100)[:, None] % 12, rewards[:, 30:], NAN)
    pairs = select_pairs(rewards, scale="mad")
    for row, padded in enumerate(rewards):
        pool = padded[~np.isnan(padded)]
        mad = 1.4826 * np.median(np.abs(pool - np.median(pool)))
        assert pairs.mean[row] == pytest.approx(np.median(pool)) and pairs.std[row] == pytest.approx(mad)
        assert pairs.rejected[row] == np.abs(pool - np.median(pool) + 2 * mad).argmin()
        assert pairs.z_chosen[row] == pytest.approx((pool.max() - np.median(pool)) / mad)


def test_mad_does_not_follow_an_outlier():
    rewards = np.random.default_rng(0).normal(size=(200, 16))
    rewards[:, 3] = -30
    assert (select_pairs(rewards).rejected == 3).mean() > 0.95
    assert not (select_pairs(rewards, scale="mad").rejected == 3).any()


def test_mad_of_zero_gives_no_target_but_extremes():
    rewards = [1.0, 1.0, 1.0, 0.0, 2.0]
    assert select_one(rewards, scale="mad") == (-1, -1, DropReason.NO_SPREAD)
    assert select_one(rewards, scale="mad", rejected="min") == (4, 3, DropReason.KEPT)
    assert select_one(rewards, scale="mad", rejected="quantile:0.5") == (4, 0, DropReason.KEPT)


@pytest.mark.parametrize(("n", "rank"), [(10, 0), (38, 0), (39, 1), (58, 1), (200, 4)])
def test_normal_scores_pick_a_fixed_rank(n, rank):
    """Nearest to -2 of the quantiles of (r + 1/2) / n."""
    rewards = np.random.default_rng(0).standard_cauchy(size=(50, n))
    pairs = select_pairs(rewards, scale="normal_score")
    assert (pairs.rank_rejected == rank).all()
    assert (pairs.mean == 0).all() and (pairs.std == 1).all() and (pairs.target == -2).all()
    assert pairs.z_rejected == pytest.approx(NormalDist().inv_cdf((rank + 0.5) / n))


# ---- bounds


def test_bounds_on_the_chosen_and_on_the_gap():
    rewards = np.random.default_rng(0).normal(size=(400, 16))
    free = select_pairs(rewards)
    for name, value, reason, outside in (
        ("min_chosen", 1.5, DropReason.LOW_CHOSEN, free.score_chosen < 1.5),
        ("min_gap", 3.0, DropReason.SMALL_GAP, free.gap < 3),
        ("max_gap", 4.0, DropReason.LARGE_GAP, free.gap > 4),
    ):
        bounded = select_pairs(rewards, **{name: value})
        assert 20 < outside.sum() < 380
        np.testing.assert_array_equal(bounded.reason, np.where(outside, reason, DropReason.KEPT))
        np.testing.assert_array_equal(bounded.chosen, np.where(outside, -1, free.chosen))
    exact = select_pairs([[1.0, 3.0]], min_chosen=3, min_gap=2, max_gap=2)
    assert exact.keep.all()  # a bound itself is inside


def test_bounds_as_quantiles_within_the_prompt():
    generator = np.random.default_rng(0)
    rewards = np.where(generator.random((300, 20)) < 0.2, NAN, generator.standard_cauchy(size=(300, 20)))
    for chosen, rejected in (("max", "min"), ("mean+1std", "mean-1std"), ("mean", "mean-1std")):
        free = select_pairs(rewards, chosen, rejected)
        for q in (0.3, 0.6, 0.9):
            low = select_pairs(rewards, chosen, rejected, min_chosen=f"quantile:{q}")
            small = select_pairs(rewards, chosen, rejected, min_gap=f"quantile:{q}")
            large = select_pairs(rewards, chosen, rejected, max_gap=f"quantile:{q}")
            for row in np.flatnonzero(free.keep):
                pool = rewards[row][~np.isnan(rewards[row])]
                gaps = np.abs(pool[:, None] - pool)[np.triu_indices(len(pool), 1)]
                assert low.keep[row] == (free.score_chosen[row] >= np.quantile(pool, q))
                assert small.keep[row] == (free.gap[row] >= np.quantile(gaps, q))
                assert large.keep[row] == (free.gap[row] <= np.quantile(gaps, q))


def test_quantiles_of_gaps_in_parts(monkeypatch):
    rewards = np.random.default_rng(0).normal(size=(50, 9))
    options = {"chosen": "mean+1std", "rejected": "mean-1std", "max_gap": "quantile:0.7"}
    whole = select_pairs(rewards, **options)
    assert 0 < whole.keep.sum() < 50
    monkeypatch.setattr(pairs_module, "GAPS", 100)
    assert_same(select_pairs(rewards, **options), whole)
    assert select_one([1.0], min_gap="quantile:0.5")[2] == DropReason.TOO_FEW


def test_the_first_reason_counts():
    bounds = {"min_chosen": 9, "min_gap": 9, "max_gap": -9}
    assert select_one([1.0], **bounds)[2] == DropReason.TOO_FEW
    assert select_one([1.0, 1.0], **bounds)[2] == DropReason.NO_SPREAD
    assert select_one([1.0, 2.0], rejected="max", **bounds)[2] == DropReason.SAME_RESPONSE
    assert select_one([1.0, 2.0], **bounds)[2] == DropReason.LOW_CHOSEN
    assert select_one([1.0, 2.0], **bounds | {"min_chosen": None})[2] == DropReason.SMALL_GAP
    assert select_one([1.0, 2.0], max_gap=-9)[2] == DropReason.LARGE_GAP


# ---- who may be chosen


def test_an_unchoosable_response_may_be_rejected_and_counts_in_the_moments():
    rewards = np.array([[9.0, 5.0, 1.0, 0.0]])
    choosable = np.array([[False, True, True, False]])
    pairs = select_pairs(rewards, choosable=choosable)
    assert (pairs.chosen[0], pairs.rejected[0]) == (1, 3) and pairs.mean[0] == 3.75
    assert pairs.rule == "max vs mean-2std"


def test_of_equal_rewards_the_first_that_may_be_chosen():
    choosable = np.array([[False, True, True, True]])
    assert select_one([5.0, 1.0, 5.0, 5.0], choosable=choosable) == (2, 1, DropReason.KEPT)
    assert select_one([5.0, 1.0, 1.0, 1.0], choosable=choosable) == (-1, -1, DropReason.SAME_RESPONSE)
    assert select_one([5.0, 1.0, 1.0, 1.0], choosable=~choosable) == (0, 1, DropReason.KEPT)
    assert select_one([5.0, 1.0, 1.0, 1.0], choosable=choosable & False)[2] == DropReason.NO_CHOOSABLE
    assert select_one([5.0, NAN, NAN, 1.0], choosable=np.array([[False, True, True, False]]))[2] == (
        DropReason.NO_CHOOSABLE
    )


@pytest.mark.parametrize("place", [2, 3, 4])
def test_a_quantile_among_tied_rewards_of_which_one_may_be_chosen(place):
    """q (n - 1) = 1.6: nearest to it is rank 2, a 5, whichever of the three 5s may be chosen."""
    choosable = np.array([[True, True, place == 2, place == 3, place == 4]])
    rewards = [1.0, 4.0, 5.0, 5.0, 5.0]
    assert select_one(rewards, "quantile:0.4", "min", choosable=choosable) == (place, 0, DropReason.KEPT)


def test_equal_rewards_are_one_reason_wherever_they_stand():
    for choosable in itertools.permutations([True, False, True]):
        mask = np.array([[*choosable, True]])
        reason = select_one([5.0, 5.0, 5.0, 1.0], rejected="max", choosable=mask)[2]
        assert reason == DropReason.SAME_RESPONSE


@pytest.mark.parametrize("options", [{}, {"rejected": "min_of_3"}, {"scale": "normal_score"}, {"pairs_per_prompt": 3}])
def test_when_all_may_be_chosen_the_mask_changes_nothing(options):
    rewards = np.random.default_rng(0).integers(0, 9, size=(200, 12))
    assert_same(select_pairs(rewards, choosable=rewards >= 0, **options), select_pairs(rewards, **options))


# ---- several pairs per prompt


def test_a_smaller_number_of_pairs_is_the_first_of_a_larger_one():
    rewards = np.random.default_rng(0).integers(0, 30, size=(300, 16)).astype(float)
    for rejected in ("mean-2std", "mean", "min", "quantile:0.2", "min_of_5"):
        many = select_pairs(rewards, rejected=rejected, pairs_per_prompt=5)
        one = select_pairs(rewards, rejected=rejected)
        assert many.keep.shape == (300, 5) and one.keep.shape == (300,)
        for name in ("chosen", "rejected", "keep", "reason", "score_rejected", "z_rejected", "rank_rejected"):
            np.testing.assert_array_equal(getattr(many, name)[:, 0], getattr(one, name), err_msg=name)
        assert many.percentile.shape == many.gap.shape == (300, 5)
        for row in range(300):
            used = many.rejected[row][many.keep[row]]
            assert len(set(used)) == len(used)
            assert (rewards[row, used] == many.score_rejected[row][many.keep[row]]).all()


@pytest.mark.parametrize("rejected", ["mean", "mean+0.1std", "min", "quantile:0.5"])
def test_of_equal_rewards_the_first_is_the_earliest_pick(rejected):
    # mean 2.86; the walk reaches the three 2s from above or from below
    pairs = select_pairs([[2.0, 9.0, 2.0, 3.0, 2.0, 1.0, 1.0]], rejected=rejected, pairs_per_prompt=6)
    assert [c for c in pairs.rejected[0] if c in (0, 2, 4)] == [0, 2, 4]


def test_the_lower_of_two_that_are_second_nearest():
    pairs = select_pairs([[10.0, 3.0, 1.0, 2.0, -6.0]], rejected="mean", pairs_per_prompt=4)
    assert pairs.mean[0] == 2 and pairs.rejected.tolist() == [[3, 2, 1, 4]]


def test_the_table_of_pairs():
    rewards = np.array([[1.0, 2.0, 4.0], [1.0, 1.0, 1.0], [7.0, 6.0, NAN]])
    table = select_pairs(rewards, rejected="min", pairs_per_prompt=2).table()
    expected = {
        "prompt": [0, 0, 2],
        "chosen": [2, 2, 0],
        "rejected": [0, 1, 1],
        "rank_rejected": [0, 1, 0],
        "score_chosen": [4, 4, 7],
        "score_rejected": [1, 2, 6],
        "n_pool": [3, 3, 2],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(table[name], values, err_msg=name)
    assert {len(column) for column in table.values()} == {3}
    assert {"z_chosen", "z_rejected"} <= table.keys()


# ---- all pairings


@pytest.mark.parametrize("scale", ["raw", "mad"])
def test_all_pairings_of_the_grid(scale):
    generator = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(generator.integers(0, 30, size=100))])
    rewards = generator.normal(size=offsets[-1])
    choosable = generator.random(len(rewards)) < 0.8
    options = {"offsets": offsets, "choosable": choosable, "scale": scale, "ddof": 1}
    pairings = all_pairings(rewards, **options)
    names = ["min", "mean-2std", "mean-1std", "mean", "mean+1std", "mean+2std", "max"]
    assert list(pairings) == [(names[c], names[r]) for c in range(7) for r in range(c)] and len(pairings) == 21
    for (chosen, rejected), pairs in pairings.items():
        alone = select_pairs(rewards, chosen, rejected, **options)
        assert_same(pairs, alone)
        assert pairs.rule == alone.rule == f"{chosen} vs {rejected}"
        np.testing.assert_equal(pairs.share_below_min, alone.share_below_min)


def test_pairings_of_another_grid():
    assert list(all_pairings(np.eye(3), ks=[-0.25, 1.5])) == [("mean+1.5std", "mean-0.25std")]
    close = all_pairings(np.eye(3), ks=[-1e-7, 1.0000001, 1.0000002, 1234567.5])
    assert len(close) == 6
    for chosen, rejected in close:
        assert select_pairs(np.eye(3), chosen, rejected).rule == f"{chosen} vs {rejected}"
    for ks in ([], [1], [1, 0], [0, 0], [0, NAN]):
        with pytest.raises(ValueError, match="ks must be two or more ascending numbers"):
            all_pairings(np.eye(3), ks=ks)


# ---- degenerate targets


def bounded_scores():
    """Pools of 30 near a floor: mean - 2 std lies below the minimum of all but the last four of 100."""
    rewards = np.random.default_rng(0).random((100, 30)) ** 8
    rewards[96:] = np.random.default_rng(1).normal(size=(4, 30))
    rewards[96:, 0] = -3.5
    return rewards


def test_degenerate_targets_are_warned_about_with_numbers():
    message = r"mean-2std lies below .* for 96.0% of the prompts \(more than 20%; median pool: 30 responses\)"
    with pytest.warns(UserWarning, match=message) as caught:
        pairs = curate.select_pairs(bounded_scores())
    assert caught[0].filename == __file__
    assert pairs.share_below_min == 0.96 and pairs.share_rejected_min >= 0.96 and pairs.keep.all()
    with pytest.raises(ValueError, match="mean-2std lies below every reward"):
        curate.select_pairs(bounded_scores(), on_degenerate="error")


def test_degenerate_prompts_are_dropped():
    pairs = curate.select_pairs(bounded_scores(), on_degenerate="drop")
    assert pairs.dropped() == {"degenerate": 96} and pairs.keep[96:].all()
    assert pairs.share_below_min == 0.96 and (pairs.rejected[:96] == -1).all() and np.isnan(pairs.gap[:96]).all()
    several = curate.select_pairs(bounded_scores(), on_degenerate="drop", pairs_per_prompt=2)
    assert several.dropped() == {"degenerate": 192}


@pytest.mark.parametrize("rule", ["min_of_5", "quantile:0.10", "min_of_12"])
def test_a_rule_in_place_of_a_degenerate_one(rule):
    replaced = curate.select_pairs(bounded_scores(), on_degenerate=rule, seed=2)
    plain = curate.select_pairs(bounded_scores(), rejected=rule, seed=2)
    assert_same(replaced, plain)
    assert plain.rule == f"max vs {rule}" and replaced.rule == f"max vs {rule} for mean-2std"
    assert replaced.share_below_min == 0.96


@pytest.mark.parametrize("action", ["warn", "error", "drop", "min_of_5", "quantile:0.10"])
@pytest.mark.parametrize("rejected", ["min", "mean", "quantile:0", "min_of_5", "mean-1std"])
def test_rules_that_do_not_degenerate(action, rejected):
    """Asked for by name, or with a target inside the pool."""
    rewards = np.random.default_rng(0).normal(size=(100, 30))
    pairs = curate.select_pairs(rewards, rejected=rejected, on_degenerate=action)
    assert pairs.keep.all() and pairs.rule == f"max vs {rejected}"


def test_pools_without_spread_have_no_target_to_count():
    rewards = np.concatenate([bounded_scores()[94:], np.ones((30, 30)), np.full((5, 30), NAN)])
    assert select_pairs(rewards).share_below_min == 2 / 6


def test_up_to_a_fifth_is_no_degenerate_rule():
    rewards = bounded_scores()
    fifth = np.concatenate([rewards[:1], np.tile(rewards[96:], (1, 1))])
    assert curate.select_pairs(fifth).share_below_min == 0.2
    with pytest.warns(UserWarning, match="40.0%"):
        curate.select_pairs(np.concatenate([fifth[:1], fifth[:4]]))


def test_pairs_can_be_taken_out_with_a_reason():
    pairs = select_pairs(np.arange(12.0).reshape(4, 3), pairs_per_prompt=2)
    less = without(pairs, np.array([True, False, False, True]), DropReason.LARGE_GAP)
    assert less.dropped() == {"large_gap": 4} and less.keep[1:3].all()
    assert (less.chosen[[0, 3]] == -1).all() and np.isnan(less.z_chosen[[0, 3]]).all()
    np.testing.assert_array_equal(less.rejected[1:3], pairs.rejected[1:3])
    nothing = without(less, np.ones((4, 2), bool), DropReason.SMALL_GAP)
    assert nothing.dropped() == {"large_gap": 4, "small_gap": 4}


# ---- numbers at the edge


@pytest.mark.parametrize("factor", [5e-324, 1e-310, 1e-160, 1e160, 1e307])
def test_the_smallest_and_largest_numbers(factor):
    pool = np.array([[7.0, 1.0, 3.0, 4.0, 8.0, 2.0, 16.0]])
    plain, pairs = (select_pairs(pool * f, rejected="mean-0.5std") for f in (1, factor))
    assert (pairs.chosen, pairs.rejected) == (plain.chosen, plain.rejected) and pairs.keep.all()
    assert pairs.z_rejected == pytest.approx(plain.z_rejected)


def test_a_gap_beyond_the_largest_number():
    pairs = select_pairs([[1e308, -1e308, 0.0]], rejected="min", min_gap=1)
    assert pairs.keep.all() and pairs.score_rejected == -1e308
    assert select_one([1e308, -1e308, 0.0], rejected="min", max_gap=1)[2] == DropReason.LARGE_GAP


# ---- properties

POOLS = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 4), st.integers(1, 30)),
    elements=st.one_of(st.integers(-9, 9).map(float), st.floats(-1e3, 1e3), st.just(NAN)),
)


RULES = ["mean-2std", "mean-1std", "mean", "min", "quantile:0.3", "min_of_3"]
SCALES = ["raw", "logit", "mad", "normal_score"]


@settings(max_examples=150, deadline=None)
@given(
    POOLS,
    st.randoms(use_true_random=False),
    st.sampled_from(["max", "mean", "mean+1std", "quantile:0.7"]),
    st.sampled_from([*RULES, "max"]),
    st.sampled_from(SCALES),
)
def test_the_order_of_the_responses_does_not_matter(rewards, random, chosen, rejected, scale):
    permutation = list(range(rewards.shape[1]))
    random.shuffle(permutation)
    if scale == "logit":
        rewards = np.clip(np.abs(rewards) / 9, 0, 1)
    choosable = np.random.default_rng(0).random(rewards.shape) < 0.6
    options = {"chosen": chosen, "rejected": rejected, "scale": scale, "pairs_per_prompt": 2}
    pairs, permuted = (
        select_pairs(rewards[:, order], choosable=choosable[:, order], **options)
        for order in (slice(None), permutation)
    )
    for field in dataclasses.fields(pairs):
        if field.name not in ("chosen", "rejected"):
            left, right = getattr(pairs, field.name), getattr(permuted, field.name)
            np.testing.assert_array_equal(left, right, err_msg=field.name)


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 30)), elements=st.integers(-50, 50).map(float)),
    st.integers(-1000, 1000),
    st.integers(-300, 300),
    st.sampled_from(RULES),
    st.sampled_from(["raw", "mad", "normal_score"]),
)
def test_shift_and_scale_do_not_matter(rewards, shift, power, rejected, scale):
    # Integers and powers of two, so that the transform itself rounds nothing.
    pairs = select_pairs(rewards, rejected=rejected, scale=scale, min_gap="quantile:0.6")
    moved = select_pairs((rewards + shift) * 2.0**power, rejected=rejected, scale=scale, min_gap="quantile:0.6")
    for field in ("chosen", "rejected", "reason", "percentile"):
        np.testing.assert_array_equal(getattr(pairs, field), getattr(moved, field), err_msg=field)
    np.testing.assert_array_equal(moved.gap, pairs.gap * 2.0**power)


@settings(max_examples=150, deadline=None)
@given(POOLS)
def test_a_kept_pair_is_valid(rewards):
    pairs = select_pairs(rewards)
    kept = np.flatnonzero(pairs.keep)
    assert (pairs.gap[kept] > 0).all()
    assert np.array_equal(rewards[kept, pairs.chosen[kept]], np.nanmax(rewards[kept], axis=1, initial=-INF))
    assert np.array_equal(rewards[kept, pairs.rejected[kept]], pairs.score_rejected[kept])
    assert (pairs.chosen[~pairs.keep] == -1).all() and (pairs.rejected[~pairs.keep] == -1).all()


# ---- cost of the import


def test_curate_does_not_import_torch(python):
    code = "import sys, fastpref.curate; print('torch' in sys.modules)"
    assert python(code).stdout.strip() == "False"


@pytest.mark.parametrize(("scale", "ddof"), [("raw", 0), ("raw", 1), ("logit", 0), ("normal_score", 0)])
@pytest.mark.parametrize("k", [1, 1.5, 2, 3])
def test_small_pools_have_the_rule_min(scale, ddof, k):
    """In no pool of that size can a reward lie k standard deviations below the mean, and in the next one it can."""
    size = pairs_module.small_pool(f"mean-{k}std", scale, ddof)
    rng = np.random.default_rng()
    rewards = rng.uniform(size=(200, size))
    rewards[0, 1:], rewards[0, 0] = 0.7, 0.3  # the furthest that one can be from the others
    found = select_pairs(rewards, rejected=f"mean-{k}std", scale=scale, ddof=ddof)
    assert (found.rank_rejected[found.keep] == 0).all() and found.small_pools == found.keep.sum()
    more = np.full((1, size + 1), 0.7) if scale != "normal_score" else rng.uniform(size=(1, size + 1))
    more[0, 0] = 0.3 if scale != "normal_score" else 0.0
    found = select_pairs(more, rejected=f"mean-{k}std", scale=scale, ddof=ddof)
    assert found.target[0] > found.minimum[0] - 1e-9 and found.small_pools == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curate.select_pairs(rewards, rejected=f"mean-{k}std", scale=scale, ddof=ddof, on_degenerate="warn")
    assert (
        pairs_module.small_pool("min")
        == pairs_module.small_pool("quantile:0.1")
        == pairs_module.small_pool("mean-2std", "mad")
        == 0
    )
    assert pairs_module.small_pool("mean-2std") == 5
