"""curate.hygiene: every check against a loop over prompts, its edges, and the real samples."""

import gzip
import json
import os
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.curate import to_logit
from fastpref.curate.hygiene import Flag, hygiene, split_of

NAN, INF = np.nan, np.inf


def text_hash(text) -> int:
    """Any hash will do."""
    return zlib.crc32(text.encode()) * 0x9E3779B97F4A7C15 % 2**64


def report(pools, prompts=None, **options):
    """pools: per prompt a list of (text, score) or (text, score, source)."""
    flat = [response for pool in pools for response in pool]
    prompts = [f"prompt {p}" for p in range(len(pools))] if prompts is None else prompts
    if flat and len(flat[0]) == 3:
        options["sources"] = np.array([response[2] for response in flat])
    return hygiene(
        np.array([response[1] for response in flat], dtype=float),
        offsets=np.cumsum([0, *map(len, pools)]),
        text_hash=np.array([text_hash(response[0]) for response in flat], dtype=np.uint64),
        blank=np.array([not response[0].strip() for response in flat], dtype=bool),
        prompt_hash=np.array([text_hash(prompt) for prompt in prompts], dtype=np.uint64),
        **options,
    )


def by_loops(pools, prompts, banned, limit):
    """The same, one prompt and one response at a time: flags and scores."""
    under = {}
    for pool, prompt in zip(pools, prompts, strict=True):
        for text, *_ in pool:
            if text.strip():
                under.setdefault(text, set()).add(prompt)
    flags, scores = [], []
    for pool, prompt in zip(pools, prompts, strict=True):
        groups = {}
        for index, (text, score, source) in enumerate(pool):
            if text.strip() and np.isfinite(score):
                groups.setdefault(text, []).append((source if source >= 0 else 99, index))
        for index, (text, score, _) in enumerate(pool):
            flag = 0
            copies = sorted(groups.get(text, []))
            if not np.isfinite(score):
                flag |= Flag.NO_SCORE
                score = NAN
            if not text.strip():
                flag |= Flag.BLANK
            elif len(under[text]) > limit:
                flag |= Flag.REPEATED_TEXT
            if prompt in banned or (text.strip() and text in banned):
                flag |= Flag.CONTAMINATED
            if copies and not flag & (Flag.NO_SCORE | Flag.BLANK):
                if copies[0][1] != index:
                    flag |= Flag.DUPLICATE
                else:
                    score = np.mean([pool[other][1] for _, other in copies])
            flags.append(int(flag))
            scores.append(score)
    return flags, scores


TEXTS = st.sampled_from(["a", "b", "c", "d", "e", "", " \n"])
SCORES = st.sampled_from([NAN, INF, -1.5, 0.1, 0.2, 0.3, 7.0])
RESPONSES = st.tuples(TEXTS, SCORES, st.integers(-1, 3))


@settings(deadline=None, max_examples=150)
@given(st.lists(st.lists(RESPONSES, max_size=6), max_size=6), st.data())
def test_against_loops(pools, data):
    prompts = data.draw(st.lists(st.sampled_from("xyz"), min_size=len(pools), max_size=len(pools)))
    banned = data.draw(st.sets(st.sampled_from("axz")))
    share = data.draw(st.sampled_from([0.0, 0.5]))
    found = report(
        pools,
        prompts,
        repeated_share=share,
        repeated_least=1,
        banned_hash=np.array([text_hash(text) for text in banned], dtype=np.uint64),
    )
    limit = max(1, share * len(set(prompts)))
    flags, scores = by_loops(pools, prompts, banned, limit)
    assert found.reason.dtype == np.uint8 and found.reason.tolist() == flags
    np.testing.assert_allclose(found.scores, scores, rtol=1e-15)
    assert found.repeated_limit == limit
    assert found.duplicate_prompts.tolist() == [prompt in prompts[:p] for p, prompt in enumerate(prompts)]
    assert found.contaminated_prompts.tolist() == [prompt in banned for prompt in prompts]
    ends = np.cumsum([len(pool) for pool in pools], dtype=int)
    left = [flags[end - len(pool) : end].count(0) for end, pool in zip(ends, pools, strict=True)]
    assert found.too_few.tolist() == [number < 2 for number in left]
    assert np.array_equal(found.valid, found.reason == 0)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(RESPONSES, max_size=8), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_order_within_a_prompt_changes_indices_only(pools, random):
    """Texts and scores of what stays are the same to the last bit, and so are the counts."""

    def outcome(pools):
        found = report(pools, repeated_least=1, repeated_share=0)
        flat = [response for pool in pools for response in pool]
        prompt = np.repeat(np.arange(len(pools)), [len(pool) for pool in pools])
        rows = zip(prompt.tolist(), flat, found.reason.tolist(), found.scores.tolist(), strict=True)
        stays = sorted((p, text, source, score) for p, (text, _, source), reason, score in rows if reason == 0)
        repeated = found.repeated
        return stays, found.counts(), repr(found.copies_std), repeated.text_hash.tolist(), repeated.prompts.tolist()

    shuffled = [random.sample(pool, len(pool)) for pool in pools]
    assert outcome(shuffled) == outcome(pools)


def test_a_constant_on_all_scores_changes_nothing():
    pools = [[("a", 1.0), ("a", 2.0), ("b", 4.0)], [("c", 0.5), ("d", NAN)]]
    moved = [[(text, score + 16) for text, score in pool] for pool in pools]
    found, again = report(pools), report(moved)
    assert np.array_equal(found.reason, again.reason)
    np.testing.assert_allclose(again.scores, found.scores + 16)
    assert again.copies_std == pytest.approx(found.copies_std)


def test_the_report_changes_nothing_given():
    scores = np.array([0.0, 0.25, 0.75, NAN])
    hashes = np.array([1, 2, 2, 3], np.uint64)
    arrays = {
        "offsets": np.array([0, 4]),
        "text_hash": hashes,
        "blank": np.zeros(4, bool),
        "prompt_hash": np.array([9], np.uint64),
        "sources": np.array([3, 2, 1, 0]),
    }
    for array in (scores, *arrays.values()):
        array.flags.writeable = False
    found = hygiene(scores, **arrays, probability=True)
    assert found.reason.tolist() == [0, Flag.DUPLICATE, 0, Flag.NO_SCORE]
    assert scores.tolist()[:3] == [0.0, 0.25, 0.75]


# ---- copies


def test_copies_have_one_score_between_them():
    found = report([[("a", 1.0), ("b", 5.0), ("a", 2.0), ("a", 6.0)], [("a", 0.0), ("c", 1.0), ("c", 1.0)]])
    assert found.reason.tolist() == [0, 0, Flag.DUPLICATE, Flag.DUPLICATE, 0, 0, Flag.DUPLICATE]
    assert found.scores.tolist() == [3.0, 5.0, 2.0, 6.0, 0.0, 1.0, 1.0]
    # 4 + 1 + 9 around the mean of three, 0 around that of two: 3 degrees of freedom
    assert found.copies_std == pytest.approx((14 / 3) ** 0.5)
    assert found.counts()["duplicate"] == 3
    assert np.isnan(report([[("a", 1.0)], [("a", 2.0)]]).copies_std)


def test_equal_scores_of_copies_stay_as_they_are():
    found = report([[("a", 0.1)] * 3 + [("b", 1.0)]], probability=True)
    assert found.scores[0] == 0.1
    assert found.copies_std == 0


def test_the_lowest_source_stays():
    found = report([[("a", 1.0, -1), ("a", 2.0, 7), ("a", 3.0, 2), ("b", 1.0, 0)]])
    assert found.valid.tolist() == [False, False, True, True]
    assert found.scores[2] == 2.0
    found = report([[("a", 1.0, 4), ("a", NAN, 0)]])  # a copy without a score is none
    assert found.reason.tolist() == [0, Flag.NO_SCORE]
    assert found.scores[0] == 1.0


def test_probabilities_are_clamped_counted_and_averaged_as_logits():
    found = report([[("a", 0.0), ("b", 1.0), ("c", 1e-9), ("d", 0.5), ("e", 1e-4), ("e", 1e-2)]], probability=True)
    assert found.clamped == 3 and found.counts()["clamped"] == 3
    assert found.scores[:4].tolist() == [1e-8, 1 - 1e-8, 1e-8, 0.5]
    assert to_logit(found.scores[4]) == pytest.approx(to_logit([1e-4, 1e-2]).mean())
    assert found.copies_std == pytest.approx(to_logit([1e-4, 1e-2]).std(ddof=1))
    assert report([[("a", 0.0)]], probability=True, clamp=0.01).scores[0] == 0.01
    plain = report([[("a", 0.0), ("b", -3.0)]])
    assert plain.clamped == 0 and plain.scores.tolist() == [0.0, -3.0]


# ---- one text under many prompts


@pytest.mark.parametrize(("prompts", "least_flagged"), [(100, 4), (300, 4), (400, 5), (1000, 11)])
def test_repeated_texts_are_more_than_three_and_one_per_cent(prompts, least_flagged):
    for often in (least_flagged - 1, least_flagged):
        pools = [[("canned" if p < often else f"own {p}", 1.0), (f"other {p}", 2.0)] for p in range(prompts)]
        found = report(pools)
        flagged = (found.reason & Flag.REPEATED_TEXT) > 0
        assert flagged.sum() == (often if often == least_flagged else 0)
        assert found.repeated_limit == max(3, 0.01 * prompts)
        assert found.repeated.prompts.tolist() == [often] * (often == least_flagged)


def test_repeated_texts_are_listed_by_how_often():
    pools = [[("x", 1.0), ("y", 1.0), ("y", 1.5), (" ", 0.0)] for _ in range(5)] + [[("y", 1.0), ("", 2.0)]]
    found = report(pools)
    assert found.repeated.text_hash.tolist() == [text_hash("y"), text_hash("x")]
    assert found.repeated.prompts.tolist() == [6, 5]
    assert found.repeated.responses.tolist() == [11, 5]
    assert found.repeated.first.tolist() == [1, 0]
    assert found.counts()["repeated_texts"] == 2 and found.counts()["repeated_text"] == 16
    assert (found.reason[2], found.reason[3]) == (Flag.DUPLICATE | Flag.REPEATED_TEXT, Flag.BLANK)


def test_a_text_counts_once_under_a_prompt_asked_twice():
    pools = [[("yes", 1.0), ("yes", 0.0)]] * 8
    assert not (report(pools, ["same"] * 8).reason & Flag.REPEATED_TEXT).any()
    assert (report(pools).reason & Flag.REPEATED_TEXT).all()
    assert report(pools, ["same"] * 8).duplicate_prompts.tolist() == [False] + [True] * 7


# ---- test data


def test_contamination():
    banned = np.array([text_hash("tested?"), text_hash("answer"), text_hash("")], dtype=np.uint64)
    pools = [[("fine", 1.0), ("answer", 2.0), ("", 0.0)], [("a", 1.0), ("b", 2.0)]]
    found = report(pools, ["asked?", "tested?"], banned_hash=banned)
    assert found.reason.tolist() == [0, Flag.CONTAMINATED, Flag.BLANK, Flag.CONTAMINATED, Flag.CONTAMINATED]
    assert found.contaminated_prompts.tolist() == [False, True]
    assert found.counts()["contaminated_prompts"] == 1
    assert found.too_few.tolist() == [True, True]


def test_split_is_of_the_prompt_alone():
    hashes = np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64)
    test = split_of(hashes, test_share=0.1)
    assert test.dtype == bool and abs(test.mean() - 0.1) < 0.01
    assert np.array_equal(split_of(hashes[::-1][:500], test_share=0.1), test[::-1][:500])
    assert not (test & ~split_of(hashes, test_share=0.2)).any()  # a larger test set has all of a smaller one
    other = split_of(hashes, test_share=0.1, salt=1)
    assert abs((test & other).mean() - 0.01) < 0.005
    assert not split_of(hashes, test_share=0).any() and split_of(hashes, test_share=1).all()
    small = split_of(np.arange(20_000, dtype=np.uint64), test_share=0.3)  # hashes that are none
    assert abs(small.mean() - 0.3) < 0.02 and abs(np.corrcoef(small[1:], small[:-1])[0, 1]) < 0.03
    assert len(split_of(hashes[:0], test_share=0.5)) == 0


def test_split_refuses():
    hashes = np.zeros(3, np.uint64)
    with pytest.raises(ValueError, match=r"test_share must lie in \[0, 1\], got 1.5"):
        split_of(hashes, test_share=1.5)
    with pytest.raises(TypeError, match="salt must be an int, got str"):
        split_of(hashes, test_share=0.5, salt="a")
    with pytest.raises(ValueError, match=r"salt must lie in \[0, 2\^64\), got -1"):
        split_of(hashes, test_share=0.5, salt=-1)
    with pytest.raises(TypeError, match="prompt_hash must be uint64 hashes, got int64"):
        split_of(np.zeros(3, int), test_share=0.5)


# ---- edges


def test_nothing():
    for pools in ([], [[]], [[], []]):
        found = report(pools)
        assert len(found.reason) == 0 and found.too_few.tolist() == [True] * len(pools)
        assert not any(value for key, value in found.counts().items() if key != "too_few")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"text_hash": np.zeros(3, np.int64)}, TypeError, "text_hash must be uint64 hashes, got int64"),
        ({"text_hash": np.zeros(4, np.uint64)}, ValueError, r"text_hash must have shape \[3\], got \[4\]"),
        ({"prompt_hash": np.zeros(1, np.uint64)}, ValueError, r"prompt_hash must have shape \[2\], got \[1\]"),
        ({"banned_hash": np.zeros((2, 2), np.uint64)}, ValueError, r"banned_hash must have shape \[banned\], got"),
        ({"blank": np.zeros(3)}, ValueError, "blank must be bool"),
        ({"offsets": np.array([0, 1, 2])}, ValueError, "offsets must run from 0 to 3"),
        ({"sources": np.zeros(3)}, TypeError, "sources must be integer codes, -1 for unknown, got float64"),
        ({"sources": np.zeros(2, int)}, ValueError, r"sources must have shape \[3\] to match scores, got \[2\]"),
        ({"sources": np.array([0, -2, 0])}, ValueError, "sources must be >= 0, or -1 for unknown, got -2"),
        ({"scores": np.array([0.0, 2.0, 1.0]), "probability": True}, ValueError, r"must lie in \[0, 1\], got 0 to 2"),
        ({"clamp": 0.5}, ValueError, "clamp must lie between 0 and 0.5, .*, got 0.5"),
        ({"clamp": 1e-17}, ValueError, "1 - clamp below 1 in float64, got 1e-17"),
        ({"repeated_share": -1}, ValueError, "repeated_share must be >= 0 and finite, got -1"),
        ({"repeated_least": NAN}, ValueError, "repeated_least must be >= 0 and finite, got nan"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {
        "scores": np.zeros(3),
        "offsets": np.array([0, 1, 3]),
        "text_hash": np.arange(3, dtype=np.uint64),
        "blank": np.zeros(3, bool),
        "prompt_hash": np.arange(2, dtype=np.uint64),
    }
    hygiene(**arguments)
    with pytest.raises(error, match=message):
        hygiene(**{**arguments, **change})


def test_large_pools_are_not_slow_paths():
    """A million responses in pools of very different sizes: counts that can be known in advance."""
    sizes = np.concatenate([np.full(60_000, 15), np.full(100, 1000)])
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    responses = int(offsets[-1])
    hashes = np.arange(responses, dtype=np.uint64)
    hashes[offsets[:-1]] = 2**63  # one text under all prompts
    hashes[offsets[:-1] + 2] = hashes[offsets[:-1] + 1]  # and a copy in each
    found = hygiene(
        np.ones(responses),
        offsets=offsets,
        text_hash=hashes,
        blank=np.zeros(responses, bool),
        prompt_hash=np.arange(len(sizes), dtype=np.uint64),
    )
    assert found.counts()["duplicate"] == found.counts()["repeated_text"] == len(sizes)
    assert found.repeated.prompts.tolist() == [len(sizes)]


@pytest.mark.skipif("FASTPREF_SCORED_SAMPLES" not in os.environ, reason="FASTPREF_SCORED_SAMPLES names no file")
def test_real_samples():
    """The source that answers everything with one text is found by that alone, and every response of it."""
    with gzip.open(os.environ["FASTPREF_SCORED_SAMPLES"], "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    names = sorted({name for row in rows for name in row["models"]})
    pools = [
        [(text, score, names.index(name)) for text, score, name in zip(*map(row.get, fields), strict=True)]
        for row in rows
        for fields in [("responses", "win_prob", "models")]
    ]
    found = report(pools, [row["prompt"] for row in rows], probability=True)
    counts = found.counts()
    assert (counts["blank"], counts["clamped"], counts["no_score"]) == (16, 6, 0)
    assert counts["duplicate"] == 477
    source = np.array([response[2] for pool in pools for response in pool])
    null = source == names.index("NullModel")
    assert found.repeated.prompts[0] == 403 and null[found.repeated.first[0]]
    assert (found.reason[null] & Flag.REPEATED_TEXT).all()
    assert ((found.reason & Flag.REPEATED_TEXT) > 0).mean() < 0.02
