"""curate.length: the report, the slope within prompt and source, and rejected responses of matched length."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastpref.curate import DropReason, length_report, match_length, remove_length, rescale, select_pairs

NAN, INF = np.nan, np.inf


def select(rewards, **options):
    return select_pairs(rewards, on_degenerate="ignore", **options)


# ---- report


def test_report_of_four_pairs():
    rewards = np.tile([3.0, 1.0, 2.0], (4, 1))
    lengths = np.array([[30, 10, 99], [40, 10, 5], [10, 10, 1], [5, 20, 20]])
    truncated = lengths == 10
    report = length_report(lengths, select(rewards), truncated=truncated)
    assert report.pairs == 4
    assert report.longest_wins == (1 + 1 + 0.5 + 0) / 4
    assert report.median_ratio == pytest.approx(math.sqrt(3 * 1))  # ratios 3, 4, 1, 1/4, between on the log scale
    assert report.chosen_in_top_decile == 2 / 4
    assert report.truncated_share == 4 / 12
    assert report.truncated_chosen == 1 / 4 and report.truncated_rejected == 3 / 4
    padded = [np.pad(x, ((0, 0), (0, 2)), constant_values=value) for x, value in ((lengths + 0.0, NAN), (truncated, 0))]
    assert length_report(padded[0], select(rewards), truncated=padded[1]) == report
    unknown = length_report(lengths, select(rewards))
    assert math.isnan(unknown.truncated_share) and math.isnan(unknown.truncated_chosen) and unknown[:4] == report[:4]


def test_report_against_a_loop():
    generator = np.random.default_rng(0)
    sizes = generator.integers(0, 40, size=300)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    rewards, lengths = generator.normal(size=offsets[-1]), generator.integers(0, 200, size=offsets[-1])
    lengths = np.where(generator.random(len(lengths)) < 0.05, NAN, lengths)
    rewards[np.isnan(lengths)] = NAN
    selection = select(rewards, rejected="mean-1std", pairs_per_prompt=2, offsets=offsets)
    table = selection.table()
    wins, ratios, top = [], [], []
    for p, chosen, rejected in zip(table["prompt"], table["chosen"], table["rejected"], strict=True):
        pool = lengths[offsets[p] : offsets[p + 1]]
        wins.append(np.heaviside(max(pool[chosen], 1) - max(pool[rejected], 1), 0.5))
        ratios.append(math.log(max(pool[chosen], 1) / max(pool[rejected], 1)))
        top.append((pool > pool[chosen]).sum() < 0.1 * (~np.isnan(pool)).sum())
    for pairs in (selection, table):
        report = length_report(lengths, pairs, offsets=offsets)
        assert report.pairs == len(wins) > 500
        assert report.longest_wins == pytest.approx(np.mean(wins))
        assert report.median_ratio == pytest.approx(math.exp(np.median(ratios)))
        assert report.chosen_in_top_decile == pytest.approx(np.mean(top))


def test_report_without_pairs():
    report = length_report(np.ones((2, 3)), select(np.zeros((2, 3))), truncated=np.ones((2, 3), bool))
    assert report.pairs == 0 and report.truncated_share == 1
    assert np.isnan([*report[1:4], report.truncated_chosen, report.truncated_rejected]).all()


def test_a_selection_from_other_prompts_is_refused():
    with pytest.raises(ValueError, match="pairs must be a selection from 5 prompts, got one from 1"):
        length_report(np.ones((5, 2)), select([[2.0, 1.0]]))


PAIRS = {"prompt": [0], "chosen": [0], "rejected": [1]}


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([[1, 2, -3]], {}, "lengths must be >= 0, got -3"),
        ([[1, NAN, 3]], {}, "lengths must be given for every response of a pair, got none for 1 pairs"),
        ([[1, 2, 3]], {"truncated": [True]}, r"truncated must be bool with shape \[1, 3\] to match lengths"),
        ([[1, 2, 3]], {"pairs": PAIRS | {"rejected": [3]}}, "rejected within the pool, got 3 in a pool of 3"),
        ([[1, 2, 3]], {"pairs": PAIRS | {"chosen": [-1]}}, "chosen within the pool, got -1"),
        ([[1, 2, 3]], {"pairs": PAIRS | {"prompt": [1]}}, "prompts from 0 to 0, got 1 to 1"),
        ([[1, 2, 3]], {"pairs": PAIRS | {"prompt": [0, 0]}}, r"one shape \[pairs\], got \[\[2\], \[1\], \[1\]\]"),
        ([[1, 2, 3]], {"pairs": {"prompt": [0]}}, "pairs must be a PairSelection or have"),
        ([[1, 2, 3]], {"pairs": [0]}, "pairs must be a PairSelection or have"),
        ([[1, 2, 3]], {"pairs": PAIRS | {"chosen": [0.5]}}, "pairs must have chosen as integers, got float64"),
    ],
)
def test_wrong_arguments_of_the_report(lengths, options, message):
    options = {"pairs": PAIRS} | options
    with pytest.raises((ValueError, TypeError), match=message):
        length_report(lengths, options.pop("pairs"), **options)


# ---- slope


def planted(seed=0, prompts=150, sources=12, slope=0.7, noise=0.0, missing=0.3):
    """Scores with effects of prompt and source; the better sources are the more verbose ones too."""
    generator = np.random.default_rng(seed)
    quality = np.sort(generator.normal(size=sources))
    verbosity = np.linspace(3, 7, sources)
    lengths = np.round(np.exp(verbosity + generator.normal(size=(prompts, sources)))).clip(1)
    scores = generator.normal(size=(prompts, 1)) + 2 * quality + slope * np.log(lengths)
    scores += noise * generator.normal(size=scores.shape)
    scores[generator.random(scores.shape) < missing] = NAN
    return scores, lengths, np.tile(np.arange(sources), (prompts, 1))


def by_least_squares(scores, lengths, sources=None, used=None):
    """The slope from the whole design matrix of dummies."""
    used = np.isfinite(scores) if used is None else used
    rows, columns = np.nonzero(used)
    design = [np.log(np.maximum(lengths, 1))[used][:, None], np.eye(len(scores))[rows]]
    if sources is not None:
        design.append(np.eye(sources.max() + 1)[sources[rows, columns]])
    return np.linalg.lstsq(np.hstack(design), scores[used], rcond=None)[0][0]


@pytest.mark.parametrize("with_sources", [True, False])
def test_slope_against_dummies(with_sources):
    scores, lengths, sources = planted(noise=1.0)
    sources = sources if with_sources else None
    adjusted, slope = remove_length(scores, lengths, sources=sources)
    assert slope == pytest.approx(by_least_squares(scores, lengths, sources), rel=1e-9)
    # What is left has no slope, and every prompt its mean.
    assert remove_length(adjusted, lengths, sources=sources).slope == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(np.nanmean(adjusted, axis=1), np.nanmean(scores, axis=1), atol=1e-12)
    np.testing.assert_array_equal(np.isnan(adjusted), np.isnan(scores))


def test_a_better_and_more_verbose_source_is_not_a_preference_for_length():
    scores, lengths, sources = planted(slope=0.7)
    assert remove_length(scores, lengths, sources=sources).slope == pytest.approx(0.7, abs=1e-9)
    assert remove_length(scores, lengths).slope > 1


@pytest.mark.parametrize("level", [0, 1e6])
def test_effects_that_are_not_there(level):
    """One source, or columns that are centred already: what is left to solve for is rounding."""
    generator = np.random.default_rng(0)
    scores, lengths = generator.normal(size=(200, 20)), np.exp(generator.normal(5, 1, size=(200, 20)))
    one = remove_length(scores + level, lengths, sources=np.full((200, 20), 3))
    assert one.slope == pytest.approx(by_least_squares(scores, lengths), rel=1e-6)
    assert np.isfinite(one.scores).all()
    sources = np.tile(np.arange(20), (200, 1))
    centred = scores - scores.mean(axis=0)
    centred -= centred.mean(axis=1, keepdims=True)
    slope = by_least_squares(scores, lengths, sources)
    assert remove_length(centred + level, lengths, sources=sources).slope == pytest.approx(slope, rel=1e-6)
    evened = np.exp(np.log(lengths) - np.log(lengths).mean(axis=0) + 9)
    slope = by_least_squares(scores, evened, sources)
    assert remove_length(scores + level, evened, sources=sources).slope == pytest.approx(slope, rel=1e-6)
    same = np.repeat(generator.normal(size=(200, 1)), 20, axis=1)
    assert remove_length(same, lengths, sources=sources).slope == pytest.approx(0, abs=1e-12)


def test_weakly_connected_sources():
    """A chain of sources, each met only beside its neighbours, and one of its own: many steps, one exact slope."""
    generator = np.random.default_rng(0)
    prompts = 400
    sources = (np.arange(prompts)[:, None] * 60 // prompts + np.array([0, 1])) % 61
    sources[-1] = 61
    lengths = np.exp(generator.normal(5, 1, size=(prompts, 2)))
    scores = generator.normal(size=(prompts, 1)) + generator.normal(size=62)[sources] + 0.3 * np.log(lengths)
    assert remove_length(scores, lengths, sources=sources).slope == pytest.approx(0.3, abs=1e-8)


def test_flagged_responses_are_adjusted_but_not_fitted():
    scores, lengths, sources = planted(noise=0.5)
    flagged = sources == 3
    scores[flagged] = 5 - 3 * np.log(lengths[flagged])
    adjusted, slope = remove_length(scores, lengths, sources=sources, flagged=flagged)
    assert slope == pytest.approx(by_least_squares(scores, lengths, sources, np.isfinite(scores) & ~flagged), rel=1e-9)
    assert slope == pytest.approx(0.7, abs=0.05)
    assert remove_length(scores, lengths, sources=sources).slope < 0.6
    log_length = np.where(np.isnan(scores), NAN, np.log(lengths))
    expected = scores - slope * (log_length - np.nanmean(log_length, axis=1, keepdims=True))
    np.testing.assert_allclose(adjusted, expected, atol=1e-12)


def test_flat_pools_and_unknown_sources_and_lengths():
    scores, lengths, sources = planted(noise=0.5, missing=0)
    lengths[3, 4] = NAN
    codes = np.where(sources == 0, -1, sources + 100)
    padded, slope = remove_length(scores, lengths, sources=codes)
    offsets = np.arange(len(scores) + 1) * scores.shape[1]
    flat = remove_length(scores.ravel(), lengths.ravel(), sources=codes.ravel(), offsets=offsets)
    np.testing.assert_array_equal(flat.scores, padded.ravel())
    assert flat.slope == slope == pytest.approx(by_least_squares(scores, lengths, sources, ~np.isnan(lengths)))
    assert padded[3, 4] == scores[3, 4]
    several = np.where((sources == 0) & (lengths > 50), -7, codes)  # unknown all the same
    assert remove_length(scores, lengths, sources=several).slope == slope


def test_infinite_scores_are_none():
    scores, lengths, _ = planted(missing=0)
    with_holes = np.where(lengths > 500, NAN, scores)
    expected = remove_length(with_holes, lengths)
    found = remove_length(np.where(lengths > 500, INF, scores), lengths)
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert found.slope == expected.slope


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ([[1.0, 2.0]], [[3.0, 3.0]]),
            "lengths must vary within a prompt and a source .* got 2 responses in 1 prompts",
        ),
        (([[1.0], [2.0]], [[3.0], [4.0]]), "lengths must vary"),
        (([[NAN, NAN]], [[3.0, 4.0]]), "got 0 responses in 0 prompts"),
        ((np.empty((0, 3)), np.empty((0, 3))), "got 0 responses"),
        (([[1.0, 2.0]], [[3.0]]), r"lengths must have shape \[1, 2\], one per response, got \[1, 1\]"),
        (([[1.0, 2.0]], [[3.0, -4.0]]), "lengths must be >= 0, got -4"),
        (([[1.0, 2.0]], [[3.0, 4.0]], [[0.0, 1.0]]), r"sources must be integers with shape \[1, 2\] .* got float64"),
        (([[1.0, 2.0]], [[3.0, 4.0]], [0, 1]), r"sources must be integers with shape \[1, 2\] .* got int64 \[2\]"),
        (([[1.0, 2.0]], [[3.0, 4.0]], [[0, 1]]), "lengths must vary within a prompt and a source"),
        (([[1.0, 2.0]], [[3.0, 4.0]], None, [True]), r"flagged must be bool with shape \[1, 2\] to match scores"),
    ],
)
def test_wrong_arguments_of_the_slope(arguments, message):
    scores, lengths, sources, flagged = (*arguments, None, None)[:4]
    with pytest.raises(ValueError, match=message):
        remove_length(scores, lengths, sources=sources, flagged=flagged)


def test_sources_that_are_not_solved_in_time_are_warned_about(monkeypatch):
    from fastpref.curate import length

    monkeypatch.setattr(length, "STEPS", 2)
    scores, lengths, sources = planted(noise=1.0)
    with pytest.warns(UserWarning, match=r"the effects of 12 sources are not solved after 2 steps"):
        remove_length(scores, lengths, sources=sources)


# ---- match


def match_one(rewards, lengths, selection, p, band, scale, slots):
    """The rule of match_length for one prompt, with its ties: the columns of the rejected responses."""
    pool, length = rewards[p], np.log(np.maximum(lengths[p], 1))
    value = pool if scale in ("raw", "mad") else rescale(rewards, scale)[p]
    keep = selection.keep.reshape(-1, slots)[p]
    chosen, worse = selection.chosen.reshape(-1, slots)[p].max(), selection.rejected.reshape(-1, slots)[p][keep]
    target = selection.target[p]
    if math.isnan(target):
        target = value[worse[0]]
    target = min(max(target, np.nanmin(value)), np.nanmax(value))
    reach = max(band * selection.std[p], np.abs(value[worse] - target).max())
    candidates = [
        j
        for j in range(len(pool))
        if abs(value[j] - target) <= reach and value[j] < value[chosen] and pool[j] == pool[j]
    ]
    candidates.sort(key=lambda j: (abs(length[j] - length[chosen]), abs(value[j] - target), value[j], j))
    return candidates[: len(worse)]


@pytest.mark.parametrize("scale", ["raw", "logit", "mad", "normal_score"])
@pytest.mark.parametrize("rejected", ["mean-2std", "mean-0.5std", "min", "quantile:0.2"])
@pytest.mark.parametrize(("slots", "band"), [(1, 0.5), (1, 0), (3, 1.5), (9, 0)])
def test_match_against_a_loop(scale, rejected, slots, band):
    generator = np.random.default_rng(0)
    rewards = np.round(generator.random((60, 15)), 2)
    rewards[generator.random(rewards.shape) < 0.1] = NAN
    lengths = generator.integers(0, 60, size=rewards.shape)
    selection = select(rewards, rejected=rejected, scale=scale, pairs_per_prompt=slots)
    matched = match_length(selection, rewards, lengths, band=band)
    kept = selection.keep.reshape(-1, slots)
    for p in range(60):
        if kept[p].any():
            found = matched.rejected.reshape(-1, slots)[p][kept[p]]
            assert list(found) == match_one(rewards, lengths, selection, p, band, scale, slots)
            score = rewards[p, found]
            assert (matched.score_rejected.reshape(-1, slots)[p][kept[p]] == score).all()
            rank = (rewards[p][:, None] < score).sum(axis=0)
            assert (matched.rank_rejected.reshape(-1, slots)[p][kept[p]] == rank).all()
    np.testing.assert_array_equal(matched.keep, selection.keep)
    np.testing.assert_array_equal(matched.chosen, selection.chosen)
    assert (matched.gap[matched.keep] > 0).all()
    assert (matched.rejected[~matched.keep] == -1).all() and np.isnan(matched.score_rejected[~matched.keep]).all()
    assert matched.rule == f"max vs {rejected}, matched in length"


def test_a_match_that_changes_nothing_is_the_selection():
    rewards = np.random.default_rng(0).normal(size=(80, 20))
    selection = select(rewards, rejected="mean-1std")
    same = match_length(selection, rewards, np.full(rewards.shape, 7), band=0)
    for name in ("rejected", "score_rejected", "rank_rejected", "percentile"):
        np.testing.assert_array_equal(getattr(same, name), getattr(selection, name), err_msg=name)
    np.testing.assert_allclose(same.z_rejected, selection.z_rejected, atol=1e-12)


def test_matched_pairs_are_nearer_in_length():
    generator = np.random.default_rng(0)
    rewards = generator.normal(size=(500, 30))
    lengths = np.exp(5 + rewards + generator.normal(size=rewards.shape))
    selection = select(rewards)
    before, after = (length_report(lengths, s) for s in (selection, match_length(selection, rewards, lengths, band=1)))
    assert before.median_ratio > 2 * after.median_ratio and before.longest_wins > after.longest_wins
    assert before.chosen_in_top_decile == after.chosen_in_top_decile


def test_a_drawn_response_is_matched_around_its_own_reward():
    rewards = np.array([[9.0, 1.0, 1.1, 5.0, 5.1, 8.0, 8.1]])
    lengths = np.array([[50, 1, 50, 1, 50, 1, 50]])
    selection = select(rewards, rejected="min_of_1", seed=1)
    matched = match_length(selection, rewards, lengths, band=0.1)
    assert abs(matched.score_rejected[0] - selection.score_rejected[0]) <= 0.1 + 1e-12
    assert lengths[0, matched.rejected[0]] == 50


def test_of_several_drawn_responses_the_lowest_is_matched_around():
    generator = np.random.default_rng(0)
    rewards = generator.permuted(np.tile(np.arange(12.0), (50, 1)), axis=1)
    lengths = 10 + 3 * rewards
    found = []
    for order in (slice(None), slice(None, None, -1)):
        selection = select(rewards[:, order], rejected="min_of_4", pairs_per_prompt=3)
        found.append(match_length(selection, rewards[:, order], lengths[:, order], band=0).score_rejected)
    np.testing.assert_array_equal(found[0], found[1])
    # the longest three within reach, from the lowest one drawn to the highest
    highest = selection.score_rejected.max(axis=1)
    np.testing.assert_array_equal(found[0], highest[:, None] - np.arange(3))


@pytest.mark.parametrize(
    "bounds", [{"min_gap": 2.0}, {"max_gap": 2.0}, {"min_gap": "quantile:0.5"}, {"min_gap": 1.5, "max_gap": 2.5}]
)
@pytest.mark.parametrize("slots", [1, 3])
def test_matched_pairs_keep_the_bounds_on_the_gap(bounds, slots):
    generator = np.random.default_rng(0)
    rewards = np.where(generator.random((200, 20)) < 0.1, NAN, generator.normal(size=(200, 20)))
    lengths = generator.integers(1, 500, size=rewards.shape)
    selection = select(rewards, rejected="mean-0.5std", pairs_per_prompt=slots, **bounds)
    matched = match_length(selection, rewards, lengths, band=2, **bounds)
    free = match_length(selection, rewards, lengths, band=2)
    gaps = [np.abs(pool[:, None] - pool)[np.triu_indices(20, 1)] for pool in rewards]
    low, high = bounds.get("min_gap", 0), bounds.get("max_gap", INF)
    if isinstance(low, str):
        low = np.nanquantile(gaps, 0.5, axis=1).reshape(-1, *[1] * (slots > 1))
    kept = selection.keep
    np.testing.assert_array_equal(matched.keep, kept)
    assert ((matched.gap >= low) & (matched.gap <= high))[kept].all()
    assert not ((free.gap >= low) & (free.gap <= high))[kept].all()


def test_ragged_pools_and_missing_lengths():
    rewards = np.array([5.0, 1.0, 1.1, 3.0, 2.0])
    lengths = np.array([10.0, NAN, 30.0, 5.0, 5.0])
    offsets = np.array([0, 3, 3, 5])
    selection = select(rewards, offsets=offsets)
    assert selection.rejected.tolist() == [1, -1, 1]
    matched = match_length(selection, rewards, lengths, offsets=offsets)
    assert matched.rejected.tolist() == [2, -1, 1] and matched.rank_rejected.tolist() == [1, -1, 0]
    no_match = match_length(selection, rewards, lengths, offsets=offsets, band=0.01)
    assert no_match.rejected.tolist() == [1, -1, 1]
    left_out = match_length(selection, rewards, lengths, offsets=offsets, valid=np.arange(5) != 2)
    assert left_out.rejected.tolist() == [1, -1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"band": -1}, "band must be a number >= 0, got -1"),
        ({"band": "wide"}, "band must be a number >= 0, got 'wide'"),
        ({"rewards": np.zeros((2, 3))}, "rewards must have the 1 prompts of selection, got 2"),
        ({"rewards": np.array([[1.0, 2.0, 4.0]])}, "rewards must be those of selection, got others for 1 of 1 pairs"),
        ({"rewards": np.array([[3.0, 1.0]])}, "pairs must have chosen within the pool, got 2 in a pool of 2"),
        ({"min_gap": 2.5}, "min_gap and max_gap must be those of selection, got 2.5 and None, .* 1 prompts"),
        ({"max_gap": "wide"}, "max_gap must be a finite number or"),
        ({"lengths": np.zeros((1, 2))}, r"lengths must have shape \[1, 3\]"),
    ],
)
def test_wrong_arguments_of_the_match(change, message):
    rewards = np.array([[1.0, 2.0, 3.0]])
    arguments = {"selection": select(rewards), "rewards": rewards, "lengths": rewards} | change
    with pytest.raises(ValueError, match=message):
        match_length(**arguments)


# ---- properties

# Of equal rewards the first is chosen, which may be the longer or the shorter: here no two are equal.
POOLS = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 4), st.integers(2, 20)),
    elements=st.integers(-500, 500).map(float),
    unique=True,
)


@settings(max_examples=100, deadline=None)
@given(POOLS, st.randoms(use_true_random=False), st.integers(-99, 99), st.integers(0, 5))
def test_neither_order_nor_level_matter(rewards, random, level, seed):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, 50, size=rewards.shape)
    rewards = np.where(generator.random(rewards.shape) < 0.1, NAN, rewards)
    order = list(range(rewards.shape[1]))
    random.shuffle(order)
    found = []
    for pools, long in ((rewards, lengths), (rewards[:, order] + level, lengths[:, order])):
        selection = select(pools, rejected="mean-1std")
        matched = match_length(selection, pools, long)
        try:
            adjusted, slope = remove_length(pools, long)
        except ValueError as error:
            assert "lengths must vary" in str(error)
            adjusted, slope = pools, NAN
        found.append((matched.gap, matched.rank_rejected, length_report(long, selection), slope, adjusted))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])
    assert found[0][2] == pytest.approx(found[1][2], nan_ok=True)
    assert found[0][3] == pytest.approx(found[1][3], abs=1e-9, nan_ok=True)
    np.testing.assert_allclose(found[0][4][:, order] + level, found[1][4], atol=1e-9)


def test_all_reasons_survive_a_match():
    rewards = np.array([[1.0, 1.0], [1.0, NAN], [1.0, 2.0]])
    matched = match_length(select(rewards), rewards, np.ones((3, 2)))
    assert matched.reason.tolist() == [DropReason.NO_SPREAD, DropReason.TOO_FEW, DropReason.KEPT]
