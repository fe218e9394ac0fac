"""curate.clean: pools with sources against the matrices they stand for, what is refused, and the real samples."""

import gzip
import json
import os
import warnings
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref import preference_matrix
from fastpref.curate import select_pairs, to_logit
from fastpref.curate.clean import (
    audit,
    consensus,
    denoise_judges,
    denoise_scores,
    exclude,
    supplied,
    vote_consensus,
)
from fastpref.preference_matrix import NothingToClean

NAN = np.nan
doubtful_rank = pytest.mark.filterwarnings("ignore:rank=3 looks over-stated:RuntimeWarning")


def sources_matrix(prompts=300, sources=40, planted=(5, 17), noise=0.8, seed=0):
    """[prompts, sources] float64: rank-3 structure with noise, and planted columns of their own."""
    generator = np.random.default_rng(seed)
    loadings = generator.normal(size=(3, sources))
    loadings[0] = 1 + 0.3 * loadings[0]
    x = generator.normal(size=(prompts, 3)) * [2.0, 1.0, 0.7] @ loadings
    x += noise * generator.normal(size=x.shape)
    x[:, planted] = 2 * generator.normal(size=(prompts, len(planted))) + 3
    return x


def few_per_prompt(x, most, seed=0):
    """Leaves `most` entries of each row."""
    keys = np.random.default_rng(seed).random(x.shape)
    return np.where(keys.argsort(1).argsort(1) < most, x, NAN)


def as_pools(x, seed=0):
    """scores, sources, offsets: the entries of a matrix that are there, those of a row in random order."""
    generator = np.random.default_rng(seed)
    scores, sources = [], []
    for row in x:
        columns = generator.permutation(np.flatnonzero(~np.isnan(row)))
        scores.append(row[columns])
        sources.append(columns)
    return np.concatenate(scores), np.concatenate(sources), np.cumsum([0, *map(len, scores)])


# ---- audit


def test_audit_is_that_of_the_matrix():
    x = sources_matrix()
    x[np.random.default_rng(1).random(x.shape) < 0.1] = NAN
    x[:, 9] = 0.5
    expected = preference_matrix.audit_sources(x)
    scores, sources, offsets = as_pools(x)
    found = audit(scores, sources, offsets=offsets)
    assert found.flagged[[5, 17]].all() and found.flagged.sum() < 8
    assert found.reference.nonzero()[0].tolist() == [9]
    assert (found.rank, found.audited_prompts, found.repeated) == (3, 300, 0)
    assert found.as_chosen is None and found.names is None
    for ours, theirs in (
        ("unexplained", "outlyingness"),
        ("z", "z"),
        ("low", "low"),
        ("high", "high"),
        ("order", "order"),
        ("flagged", "flagged"),
        ("prompts", "observed"),
    ):
        np.testing.assert_array_equal(getattr(found, ours), getattr(expected, theirs).numpy())
    again = audit(*as_pools(x, seed=1)[:2], offsets=offsets)
    np.testing.assert_array_equal(again.unexplained, found.unexplained)
    np.testing.assert_allclose(audit(scores + 100, sources, offsets=offsets).unexplained, found.unexplained, rtol=1e-9)
    padded = audit(x, np.tile(np.arange(40), (300, 1)))
    np.testing.assert_array_equal(padded.unexplained, found.unexplained)


def test_audit_of_probabilities_is_that_of_their_logits():
    x = sources_matrix(250, 12, planted=(3,))
    scores, sources, offsets = as_pools(x)
    logits = audit(scores, sources, offsets=offsets)
    found = audit(1 / (1 + np.exp(-scores)), sources, offsets=offsets, probability=True)
    np.testing.assert_allclose(found.unexplained, logits.unexplained, rtol=1e-5)


def test_a_source_twice_under_a_prompt_counts_with_its_mean():
    x = sources_matrix(220, 10, planted=(2,))
    scores, sources, offsets = as_pools(x)
    apart = np.random.default_rng(3).normal(size=len(scores))
    twice = np.stack([scores - apart, scores + apart], 1).reshape(-1)
    found = audit(twice, np.repeat(sources, 2), offsets=2 * offsets)
    assert found.repeated == len(scores)
    np.testing.assert_allclose(found.unexplained, audit(scores, sources, offsets=offsets).unexplained)


def test_unknown_sources_and_invalid_responses_are_left_out():
    x = sources_matrix(220, 10, planted=(2,))
    scores, sources, offsets = as_pools(x)
    expected = audit(scores, sources, offsets=offsets)
    more = np.concatenate([scores.reshape(220, 10), np.full((220, 2), 50.0)], 1).reshape(-1)
    codes = np.concatenate([sources.reshape(220, 10), np.tile([-1, 4], (220, 1))], 1).reshape(-1)
    valid = np.tile(np.arange(12) < 11, 220)
    found = audit(more, codes, offsets=np.arange(221) * 12, valid=valid)
    np.testing.assert_array_equal(found.unexplained, expected.unexplained)
    assert found.repeated == 0


def test_flags_need_200_prompts():
    scores, sources, offsets = as_pools(sources_matrix(199))
    with pytest.warns(UserWarning, match="were scored on 199 prompts: they are ranked, none is flagged") as said:
        found = audit(scores, sources, offsets=offsets)
    assert len(said) == 1 and said[0].filename == __file__
    assert (found.z[[5, 17]] > 3).all() and not found.flagged.any()
    assert set(found.order[:2]) == {5, 17}
    assert audit(scores, sources, offsets=offsets, least_prompts=100).flagged[[5, 17]].all()
    with pytest.warns(UserWarning, match="scored on 60 prompts"):  # and no second warning of the solver's
        audit(*as_pools(sources_matrix(60))[:2], offsets=np.arange(61) * 40)


def test_a_source_of_few_prompts_is_never_flagged():
    x = sources_matrix(400)
    x[150:, 17] = NAN
    scores, sources, offsets = as_pools(x)
    found = audit(scores, sources, offsets=offsets)
    assert found.z[17] > 3 and found.prompts[17] == 150
    assert found.flagged[5] and not found.flagged[17]


def test_many_prompts_are_sampled():
    scores, sources, offsets = as_pools(sources_matrix(1000, 12, planted=(5,)))
    found = audit(scores, sources, offsets=offsets, most_prompts=300)
    assert found.audited_prompts == 300 and found.prompts.max() == 300
    assert found.order[0] == 5 and found.flagged[5]
    again = audit(scores, sources, offsets=offsets, most_prompts=300)
    np.testing.assert_array_equal(again.z, found.z)
    twice = audit(*(np.repeat(x, 2) for x in (scores, sources)), offsets=2 * offsets, most_prompts=300)
    np.testing.assert_array_equal(twice.z, found.z)
    assert twice.repeated == len(scores)  # of all prompts
    assert not np.array_equal(audit(scores, sources, offsets=offsets, most_prompts=300, seed=1).z, found.z)


@pytest.mark.parametrize("seed", range(3))
def test_four_of_seventeen_sources_per_prompt(seed):
    """The shape of UltraFeedback: a structure of rank 3 would fit four scores whatever they are."""
    x = few_per_prompt(sources_matrix(2000, 17, planted=(5,), seed=seed), 4)
    scores, sources, offsets = as_pools(x)
    found = audit(scores, sources, offsets=offsets)
    assert found.rank == 1
    assert found.order[0] == 5 and found.flagged[5] and found.flagged.sum() <= 3
    assert found.prompts.min() > 300 and found.audited_prompts == 2000
    with pytest.raises(ValueError, match=r"rank must be at most 1 .* typically 4 scored sources, got 3"):
        audit(scores, sources, offsets=offsets, rank=3)


@pytest.mark.parametrize(("most", "rank"), [(5, 1), (6, 2), (7, 2), (8, 3)])
def test_the_rank_that_so_many_sources_per_prompt_can_tell(most, rank):
    scores, sources, offsets = as_pools(few_per_prompt(sources_matrix(400, 17, planted=(5,)), most))
    assert audit(scores, sources, offsets=offsets, resamples=0).rank == rank


@pytest.mark.parametrize("call", [audit, denoise_scores])
def test_too_few_sources_are_refused(call):
    scores, sources, offsets = as_pools(few_per_prompt(sources_matrix(300, 17, planted=()), 2))
    with pytest.raises(NothingToClean, match="must have 3 sources that vary under a typical prompt, got 2"):
        call(scores, sources, offsets=offsets)
    with pytest.raises(NothingToClean, match=r"got [01]:"):
        call(np.random.default_rng(0).normal(size=300), np.zeros(300, int), offsets=np.arange(301))
    with pytest.raises(NothingToClean, match="got 0"):
        call(np.full(8, NAN), np.zeros(8, int), offsets=np.array([0, 8]))
    with pytest.raises(NothingToClean, match="got 0"):
        call(np.zeros(0), np.zeros(0, int), offsets=np.array([0]))
    with pytest.raises(ValueError, match="scores must have 3 prompts with sources, got 2"):
        call(np.arange(12.0), np.tile(np.arange(6), 2), offsets=np.array([0, 6, 12]))


@pytest.mark.parametrize("call", [audit, denoise_scores])
def test_samples_of_one_policy_are_refused(call):
    scores = np.random.default_rng(0).normal(size=(400, 16)) + np.random.default_rng(1).normal(size=(400, 1))
    with pytest.raises(NothingToClean, match="exchangeable sources"):
        call(scores, np.tile(np.arange(16), (400, 1)))


@pytest.mark.parametrize("call", [audit, denoise_scores])
def test_bad_pools(call):
    scores, sources, offsets = as_pools(sources_matrix(30, 6, planted=()))
    with pytest.raises(ValueError, match=r"sources must be codes from 0 .* 30 prompts and codes up to 1000000005 make"):
        call(scores, sources + 10**9, offsets=offsets)
    with pytest.raises(ValueError, match="offsets must run from 0 to 180"):
        call(scores, sources, offsets=offsets[:-1])
    with pytest.raises(ValueError, match=r"sources must have shape \[180\] to match scores, got \[179\]"):
        call(scores, sources[1:], offsets=offsets)
    with pytest.raises(TypeError, match="sources must be integer codes, -1 for unknown, got float64"):
        call(scores, sources * 1.0, offsets=offsets)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        call(scores, sources, offsets=offsets, probability=True)


def test_names():
    scores, sources, offsets = as_pools(sources_matrix(220, 10, planted=(2,)))
    names = [f"model {s}" for s in range(11)]
    found = audit(scores, sources, offsets=offsets, names=names)
    assert found.names == names and len(found.z) == 11 and found.prompts[10] == 0 and np.isnan(found.z[10])
    with pytest.raises(ValueError, match="names must have an entry per source, 10, got 9"):
        audit(scores, sources, offsets=offsets, names=names[:9])


# ---- exclusion


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(-1, 4), max_size=12), st.lists(st.booleans(), min_size=5, max_size=6))
def test_exclude(codes, flagged):
    trusted = [code < 0 or not flagged[code] for code in codes]
    codes, flagged = np.array(codes, dtype=np.int32), np.array(flagged)
    expected = {
        "both": (trusted, trusted),
        "chosen": ([True] * len(codes), trusted),
        "none": ([True] * len(codes),) * 2,
    }
    for mode, (valid, choosable) in expected.items():
        found = exclude(codes, flagged, mode)
        assert found.valid.tolist() == valid and found.choosable.tolist() == choosable
    assert exclude(codes.reshape(1, -1), flagged).valid.shape == (1, len(codes))


def test_exclude_refuses():
    with pytest.raises(ValueError, match=r"mode must be one of .*, got 'rejected'"):
        exclude(np.zeros(3, int), np.zeros(1, bool), "rejected")
    with pytest.raises(ValueError, match="sources must be below 2, the length of flagged, got 2"):
        exclude(np.arange(3), np.zeros(2, bool))
    with pytest.raises(ValueError, match=r"flagged must be bool with shape \[sources\], got int64"):
        exclude(np.arange(3), np.zeros(3, int))


def test_supplied_pairs():
    x = few_per_prompt(sources_matrix(100, 9, planted=()), 6)
    pairs = select_pairs(x, on_degenerate="ignore")
    sources = np.tile(np.r_[np.arange(8), -1], (100, 1))
    chosen, rejected = supplied(sources, pairs)
    by_hand = np.zeros((2, 8), int)
    for prompt in np.flatnonzero(pairs.keep):
        for side, column in enumerate((pairs.chosen[prompt], pairs.rejected[prompt])):
            if column < 8:
                by_hand[side, column] += 1
    assert chosen.tolist() == by_hand[0].tolist() and rejected.tolist() == by_hand[1].tolist()
    assert by_hand.min() > 0
    # ragged, several pairs per prompt, one without
    selection = SimpleNamespace(
        chosen=np.array([[0, 0], [-1, -1], [1, 0]]), rejected=np.array([[1, 2], [-1, -1], [0, 1]])
    )
    chosen, rejected = supplied([3, 0, 1, 2, 0, 3], selection, offsets=[0, 3, 4, 6], num_sources=5)
    assert chosen.tolist() == [1, 0, 0, 3, 0] and rejected.tolist() == [2, 1, 0, 1, 0]
    with pytest.raises(ValueError, match=r"selection.chosen must have shape \[3\] or \[3, k\], got \[2\]"):
        supplied([0, 0, 0], SimpleNamespace(chosen=np.zeros(2, int)), offsets=[0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"selection\.chosen must be columns of its pools, got 1"):
        supplied([0, 0, 0], SimpleNamespace(chosen=np.array([0, 1, 0])), offsets=[0, 1, 2, 3])


# ---- single wrong scores


def flipped(seed, prompts=400, sources=40):
    x = sources_matrix(prompts, sources, planted=(), noise=0.25, seed=seed) - 6  # a flip makes the best
    wrong = np.random.default_rng(seed + 100).random(x.shape) < 0.05
    return x, np.where(wrong, -x, x), wrong


def changed_by_hand(before, after, offsets):
    count = 0
    for begin, end in pairwise(offsets):
        pool, then = before[begin:end], after[begin:end]
        if np.isfinite(pool).any():
            best = set(np.flatnonzero(pool == np.nanmax(pool)))
            still = set(np.flatnonzero(then == np.nanmax(then))) if np.isfinite(then).any() else set()
            count += not best & still
    return count


@doubtful_rank
@pytest.mark.parametrize("action", ["mask", "replace"])
def test_denoise_is_that_of_the_matrix(action):
    _, dirty, wrong = flipped(0)
    dirty[np.random.default_rng(0).random(dirty.shape) < 0.1] = NAN
    expected = preference_matrix.denoise_scores(dirty, action=action)
    scores, sources, offsets = as_pools(dirty)
    found = denoise_scores(scores, sources, offsets=offsets, action=action)
    prompt = np.repeat(np.arange(400), np.diff(offsets))
    np.testing.assert_array_equal(found.scores, expected.scores.numpy()[prompt, sources])
    assert found.flagged.sum() == len(expected.corrupted)
    assert np.array_equal(found.scores[~found.flagged], scores[~found.flagged])
    assert np.isnan(found.scores[found.flagged]).all() == (action == "mask")
    assert wrong[prompt, sources][found.flagged].mean() > 0.9
    assert (found.prompts, found.rank, found.scale) == (400, 3, expected.scale)
    assert found.chosen_changed == changed_by_hand(scores, found.scores, offsets) > 40
    assert found.share == found.chosen_changed / 400
    again = denoise_scores(*as_pools(dirty, seed=1)[:2], offsets=offsets, action=action)
    assert again.chosen_changed == found.chosen_changed
    np.testing.assert_array_equal(np.sort(again.scores), np.sort(found.scores))
    padded = denoise_scores(dirty, np.tile(np.arange(40), (400, 1)), action=action)
    np.testing.assert_array_equal(padded.scores[prompt, sources], found.scores)
    assert padded.flagged.shape == (400, 40) and padded.chosen_changed == found.chosen_changed


@doubtful_rank
def test_low_rank_replaces_everything_and_says_what_that_costs():
    _, dirty, _ = flipped(1)
    scores, sources, offsets = as_pools(dirty)
    masked = denoise_scores(scores, sources, offsets=offsets)
    with pytest.warns(UserWarning) as said:
        fit = denoise_scores(scores, sources, offsets=offsets, action="low_rank")
    (message,) = [str(warning.message) for warning in said if "low_rank" in str(warning.message)]
    assert f"changes the best response of {fit.chosen_changed} of 400 prompts" in message
    assert f"({masked.chosen_changed} if only wrong scores were masked)" in message and "take action='mask'" in message
    assert np.array_equal(fit.flagged, masked.flagged)
    assert fit.chosen_changed > masked.chosen_changed
    assert (fit.scores != scores).mean() > 0.99


@doubtful_rank
def test_what_is_left_as_it_is():
    _, dirty, _ = flipped(2, 250, 12)
    scores, sources, offsets = as_pools(dirty)
    expected = denoise_scores(scores, sources, offsets=offsets)
    wide = np.concatenate([scores.reshape(250, 12), np.tile([[500.0, 900.0, NAN]], (250, 1))], 1)
    codes = np.concatenate([sources.reshape(250, 12), np.tile([[-1, 3, 4]], (250, 1))], 1)
    valid = np.ones(wide.shape, bool)
    valid[:, 13] = False
    found = denoise_scores(wide, codes, valid=valid)
    np.testing.assert_array_equal(found.scores[:, :12].reshape(-1), expected.scores)
    assert (found.scores[:, 12] == 500).all() and np.isnan(found.scores[:, 13:]).all()
    assert not found.flagged[:, 12:].any()
    assert found.chosen_changed == 0  # the response of unknown source is the best one before and after
    probabilities = denoise_scores(1 / (1 + np.exp(-scores)), sources, offsets=offsets, probability=True)
    assert np.array_equal(probabilities.flagged, expected.flagged)
    np.testing.assert_allclose(probabilities.scores, expected.scores, rtol=1e-6)


@doubtful_rank
@pytest.mark.parametrize("per_prompt", [4, 6, 17])
def test_masking_few_sources_per_prompt(per_prompt):
    """Of 17 sources: the rank follows from what half of the prompts have, and masking keeps more of the best."""
    clean, dirty, wrong = flipped(3, 1500, 17)
    there = ~np.isnan(few_per_prompt(dirty, per_prompt))
    clean, dirty = np.where(there, clean, NAN), np.where(there, dirty, NAN)
    scores, sources, offsets = as_pools(dirty)
    found = denoise_scores(scores, sources, offsets=offsets)
    assert found.rank == {4: 1, 6: 2, 17: 3}[per_prompt]
    after = np.full(dirty.shape, NAN)
    after[np.repeat(np.arange(1500), np.diff(offsets)), sources] = found.scores

    def kept(x):
        return (np.where(np.isnan(x), -np.inf, x).argmax(1) == np.nanargmax(clean, 1)).mean()

    assert kept(after) > kept(dirty) + 0.05
    assert wrong[there & np.isnan(after)].mean() > 0.75


def test_denoise_refuses():
    _, dirty, _ = flipped(0, 100, 12)
    scores, sources, offsets = as_pools(dirty)
    with pytest.raises(NothingToClean, match="scores has no sources: samples of one policy are exchangeable"):
        denoise_scores(scores, None, offsets=offsets)
    with pytest.raises(ValueError, match="sources must occur once under a prompt, got 100 scores more"):
        denoise_scores(scores, np.where(sources == 3, 4, sources), offsets=offsets)
    with pytest.raises(ValueError, match="action must be one of"):
        denoise_scores(scores, sources, offsets=offsets, action="overwrite")
    with pytest.raises(ValueError, match=r"rank must be at most 5 for 100 prompts .* got 6"):
        denoise_scores(scores, sources, offsets=offsets, rank=6)


# ---- judges


def judged(items=12, matrices=30, corrupted=4, seed=0):
    """[matrices, N, N] Bradley-Terry probabilities with pairs of the best item the wrong way round; and the scores."""
    generator = np.random.default_rng(seed)
    w = generator.normal(size=(matrices, items))
    p = 1 / (1 + np.exp(w[:, None, :] - w[:, :, None]))
    dirty = p.copy()
    for matrix, scores in zip(dirty, w, strict=True):
        best = scores.argmax()
        for other in generator.permutation(np.delete(np.arange(items), best))[:corrupted]:
            matrix[best, other], matrix[other, best] = matrix[other, best], matrix[best, other]
    return p, dirty, w


def test_wrong_pairs_are_masked():
    p, dirty, w = judged()
    found = denoise_judges(dirty)
    wrong = np.abs(dirty - p) > 1e-9
    assert np.array_equal(np.isnan(found.probabilities), wrong)
    assert {tuple(index) for index in found.indices} == set(zip(*np.nonzero(np.triu(wrong)), strict=True))
    at = tuple(found.indices.T)
    np.testing.assert_allclose(found.observed, dirty[at])
    np.testing.assert_allclose(found.fitted, p[at], atol=1e-6)
    assert (found.scores.argmax(1) == w.argmax(1)).all()
    off_diagonal = ~np.eye(12, dtype=bool)
    raw = (dirty * off_diagonal).sum(2).argmax(1)
    assert found.chosen_changed == (raw != w.argmax(1)).sum() > 10
    assert found.prompts == 30 and found.share == found.chosen_changed / 30
    assert found.cleaned.all() and found.converged.all() and found.residual.shape == (len(found.indices),)
    replaced = denoise_judges(dirty, action="replace").probabilities
    np.testing.assert_allclose(replaced, p, atol=1e-6)
    assert np.array_equal(replaced[~wrong], dirty[~wrong])
    with pytest.warns(UserWarning, match=rf"changes the best response of {found.chosen_changed} of 30 prompts: "):
        denoise_judges(dirty, action="low_rank")
    one = denoise_judges(dirty[0])
    np.testing.assert_allclose(one.scores, found.scores[0], atol=1e-6)
    assert one.prompts == 1 and one.cleaned.shape == ()


@pytest.mark.parametrize("options", [{"method": "rpca"}, {"method": "curatron"}, {"rank": 4}])
def test_generic_rpca_of_ten_items_is_refused(options):
    _, dirty, _ = judged(10)
    with pytest.raises(ValueError, match=r"method must be 'bradley_terry' \(rank 2\) for 10 items"):
        denoise_judges(dirty, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # eleven items are few
        denoise_judges(judged(11)[1], **options)


def test_matrices_of_one_score_column_are_refused():
    p, _, _ = judged()
    with pytest.raises(NothingToClean, match="one score column explains every comparison"):
        denoise_judges(p)
    with pytest.raises(ValueError, match=r"preferences must have shape \[..., N, N\]"):
        denoise_judges(np.zeros((3, 4)))


def judge_columns(prompts=300, size=8, judges=5, rate=0.05, seed=0):
    """Scores [responses, judges] of different scales, some with the sign changed; which; the quality; offsets."""
    generator = np.random.default_rng(seed)
    quality = generator.normal(size=(prompts * size, 1)) + np.repeat(generator.normal(size=(prompts, 1)), size, 0)
    scores = (quality + 0.5 * generator.normal(size=(prompts * size, judges))) * 10.0 ** np.arange(judges)
    wrong = generator.random(scores.shape) < rate
    return np.where(wrong, -scores, scores), wrong, quality[:, 0], np.arange(prompts + 1) * size


def best_kept(scores, quality, size=8):
    return (np.nan_to_num(scores, nan=-99).reshape(-1, size).argmax(1) == quality.reshape(-1, size).argmax(1)).mean()


@pytest.mark.parametrize("seed", range(3))
def test_consensus_masks_what_other_judges_contradict(seed):
    scores, wrong, quality, offsets = judge_columns(seed=seed)
    found = consensus(scores, offsets=offsets)
    assert wrong[found.flagged].mean() > 0.9
    visible = wrong & (np.abs(quality) > 1.5)[:, None]
    assert found.flagged[visible].mean() > 0.8
    assert np.array_equal(np.isnan(found.judges), found.flagged)
    assert np.array_equal(found.judges[~found.flagged], scores[~found.flagged])
    mean = (scores / scores.std(0)).mean(1)
    assert best_kept(found.scores, quality) > best_kept(mean, quality) + 0.02
    assert 0 < found.chosen_changed < 150 and found.prompts == 300


def test_consensus_by_hand():
    """Three judges, the second apart by 1 now and then, the third in other units and wrong about the best response."""
    base = np.arange(101.0)
    scores = np.stack([base, base + np.tile([1, -1, 0], 34)[:101], 100 * base + 7], 1)
    scores[100, 2] = 7.0
    scores[50] = [50.0, 0.0, 10007.0]  # three opinions
    found = consensus(scores, offsets=[0, 60, 101])
    assert np.argwhere(found.flagged).tolist() == [[100, 2]] and found.undecided == 1
    np.testing.assert_allclose(found.centre[0], 50)
    np.testing.assert_allclose(found.spread[0], 50 * 51 / 101)  # twice 1 + ... + 50
    np.testing.assert_allclose(found.scores[100], ((scores[100, :2] - found.centre[:2]) / found.spread[:2]).mean())
    everyone = ((scores[50] - found.centre) / found.spread).mean()
    np.testing.assert_allclose(found.scores[50], everyone)
    assert (found.chosen_changed, found.prompts, found.share) == (1, 2, 0.5)


def test_consensus_of_ratings_and_gaps():
    scores, _, _, offsets = judge_columns(judges=4, rate=0.03)
    scores = np.clip(np.round(scores / scores.std(0) + 3), 1, 5)  # on five levels most judges agree exactly
    scores[::9, 0] = NAN
    scores[:8] = NAN
    constant = np.full((len(scores), 1), 2.0)
    valid = np.ones(len(scores), bool)
    valid[8] = False
    found = consensus(np.concatenate([scores, constant], 1), offsets=offsets, valid=valid)
    assert np.isnan(found.scores[:9]).all() and np.isfinite(found.scores[9:]).all()
    assert found.prompts == 299
    assert 0 < found.flagged.mean() < 0.06 and not found.flagged[:, 4].any()
    order = np.random.default_rng(0).permutation(5)
    again = consensus(np.concatenate([scores, constant], 1)[:, order], offsets=offsets, valid=valid)
    np.testing.assert_allclose(again.scores, found.scores)


def test_a_rating_one_level_off_is_no_wrong_one():
    """Four judges that agree nearly always, so that there is next to no noise."""
    ratings = np.tile(np.arange(1.0, 6.0), 40)
    scores = np.stack([ratings] * 4, 1)
    scores[0:200:20, 0] += 1  # 1 by three, 2 by one
    scores[5, 1] = 5.0  # 1 by three
    scores[10, :2] = 5.0  # 1 by two, 5 by two
    scores[12, :2] = 1.0, 5.0  # half of them off, on either side
    found = consensus(scores, offsets=np.arange(41) * 5)
    assert (found.noise < 0.1).all()
    assert np.argwhere(found.flagged).tolist() == [[5, 1]] and found.undecided == 2


@pytest.mark.parametrize("call", [consensus, vote_consensus])
def test_bad_judges(call):
    scores, _, _, offsets = judge_columns(20)
    with pytest.raises(ValueError, match=r"scores must have shape \[responses, judges\], got \[160\]"):
        call(scores[:, 0], offsets=offsets)
    with pytest.raises(ValueError, match="scores must have a column per judge, got none"):
        call(scores[:, :0], offsets=offsets)
    with pytest.raises(ValueError, match=r"column\(s\) that vary|columns of judges that vary, got 0"):
        call(scores[:0], offsets=[0])
    with pytest.raises(ValueError, match="offsets must run from 0 to 160"):
        call(scores, offsets=offsets[:-1])
    with pytest.raises(ValueError, match=r"1 score column\(s\) that vary|three columns of judges that vary, got 1"):
        call(np.concatenate([scores[:, :1], np.ones((160, 3))], 1), offsets=offsets)


def test_consensus_needs_three_judges():
    scores, _, _, offsets = judge_columns(20, judges=2)
    with pytest.raises(ValueError, match="when two differ, nothing says which of them is wrong"):
        consensus(scores, offsets=offsets)
    with pytest.raises(ValueError, match="threshold must be positive, got 0"):
        consensus(judge_columns(20)[0], offsets=offsets, threshold=0)


def test_votes_ignore_scales():
    scores, _, quality, offsets = judge_columns(rate=0)
    keep = np.random.default_rng(5).random(len(scores)) < 0.9
    prompt = np.repeat(np.arange(300), 8)[keep]
    offsets = np.searchsorted(prompt, np.arange(301))
    scores, quality = scores[keep], quality[keep]
    found = vote_consensus(scores, offsets=offsets)
    cubed = vote_consensus(scores**3, offsets=offsets)
    np.testing.assert_array_equal(cubed.scores, found.scores)
    assert found.scores.shape == (len(scores),) and np.isfinite(found.scores).all()
    by_prompt = [slice(*pair) for pair in pairwise(offsets)]
    votes = [
        (scores[part][:, None] > scores[part][None]).mean(2).sum(1).argmax() == found.scores[part].argmax()
        for part in by_prompt
    ]
    assert np.mean(votes) > 0.9  # of all pairs, the fit ranks much as the numbers of wins do
    right = [quality[part].argmax() == found.scores[part].argmax() for part in by_prompt]
    single = [quality[part].argmax() == scores[part][:, 0].argmax() for part in by_prompt]
    assert np.mean(right) > np.mean(single) + 0.05
    assert found.prompts == 300 and found.probabilities is None
    graded = vote_consensus(scores / scores.std(0), offsets=offsets, temperature=0.5)
    assert not np.array_equal(graded.scores, found.scores)


def test_judges_that_disagree_are_refused():
    noise = np.random.default_rng(0).normal(size=(3000, 4))
    with pytest.raises(NothingToClean, match="exchangeable items"):
        vote_consensus(noise, offsets=np.arange(301) * 10)


def test_torch_stays_out_until_it_is_needed(python):
    code = """
import sys
import numpy as np
from fastpref.curate.clean import consensus, exclude, supplied
from fastpref.curate.hygiene import hygiene, split_of
exclude(np.zeros(3, int), np.zeros(1, bool))
x = np.random.default_rng(0).normal(size=(50, 1)) + 0.1 * np.random.default_rng(1).normal(size=(50, 4))
consensus(x, offsets=[0, 25, 50])
print("torch" in sys.modules)
"""
    result = python(code)
    assert result.stdout.strip() == "False", result.stderr


# ---- the real samples


@pytest.fixture(scope="module")
def real():
    """Logits [403, 58] with NaN, and the sources' names."""
    if "FASTPREF_SCORED_SAMPLES" not in os.environ:
        pytest.skip("FASTPREF_SCORED_SAMPLES names no file")
    with gzip.open(os.environ["FASTPREF_SCORED_SAMPLES"], "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    names = sorted({name for row in rows for name in row["models"]})
    x = np.full((len(rows), len(names)), NAN)
    for prompt, row in enumerate(rows):
        x[prompt, [names.index(name) for name in row["models"]]] = to_logit(row["win_prob"])
    return x, names


def test_real_audit(real):
    x, names = real
    null = names.index("NullModel")
    pairs = select_pairs(x, on_degenerate="ignore")
    codes = np.tile(np.arange(58), (403, 1))
    found = audit(x, codes, names=names, selection=pairs)
    assert [names[source] for source in found.order[:2]] == ["NullModel", "gpt4_gamed"]
    assert found.flagged.nonzero()[0].tolist() == [null]
    assert found.unexplained[null] == pytest.approx(0.86, abs=0.01) and found.low[null] > 0.75
    assert [names[source] for source in found.reference.nonzero()[0]] == ["gpt4_1106_preview"]
    assert found.as_chosen[null] == 79 and found.as_rejected[null] == 0
    assert found.as_rejected[names.index("gpt4_gamed")] == 77
    assert found.as_chosen.sum() == found.as_rejected.sum() == pairs.keep.sum()
    for mode, supplies in (("both", 0), ("none", 79)):
        left = exclude(codes, found.flagged, mode)
        assert supplied(codes, select_pairs(x, valid=left.valid, on_degenerate="ignore"))[0][null] == supplies
    probability = 1 / (1 + np.exp(-x))
    np.testing.assert_allclose(audit(probability, codes, probability=True).z, found.z, rtol=1e-4)


@doubtful_rank
@pytest.mark.parametrize("seed", range(3))
def test_real_flips(real, seed):
    """5 % of the logits with the sign changed: how often is the best response still the best?"""
    x, _ = real
    best = np.nanargmax(x, 1)
    wrong = np.random.default_rng(seed).random(x.shape) < 0.05
    dirty = np.where(wrong, -x, x)
    found = denoise_scores(dirty, np.tile(np.arange(58), (403, 1)))
    kept = [(np.where(np.isnan(scores), -np.inf, scores).argmax(1) == best).mean() for scores in (dirty, found.scores)]
    assert kept[0] <= 0.30
    assert kept[1] >= 0.80
    assert wrong[found.flagged].mean() > 0.7
    assert found.chosen_changed == changed_by_hand(dirty.reshape(-1), found.scores.reshape(-1), np.arange(404) * 58)


@doubtful_rank
def test_real_cheat_gains_by_low_rank(real):
    x, names = real
    codes = np.tile(np.arange(58), (403, 1))
    null = names.index("NullModel")

    def chosen(scores):
        return int((np.where(np.isnan(scores), -np.inf, scores).argmax(1) == null).sum())

    masked = denoise_scores(x, codes)
    with pytest.warns(UserWarning, match="sources that game the judge gain by it"):
        fit = denoise_scores(x, codes, action="low_rank")
    assert chosen(x) == 79
    assert chosen(fit.scores) > 140 and fit.share > 0.5
    assert chosen(masked.scores) < 100 and masked.share < 0.1
