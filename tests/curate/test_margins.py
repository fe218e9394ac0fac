"""curate.margins: methods.md section 2, rule by rule."""

import itertools
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastpref.curate import (
    Part,
    bees,
    compare_selections,
    external_margins,
    implicit_margins,
    normalised_margins,
    partition,
    read_scored_samples,
    select_pairs,
    select_prompts,
    select_top,
    to_logit,
)
from fastpref.curate.margins import RANKED_PAIRS

NAN, INF = np.nan, np.inf
EXTERNAL = [5, 1, -3, 10, 0.5]
IMPLICIT = [8, -1, 2, 30, -40]
SHRINKAGE = Path(__file__).resolve().parents[2] / "benchmarks" / "studies" / "recipes" / "shrinkage.py"


def quiet_bees(margins, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bees(margins, **options)


def searched_upper(margin, divisor):
    """The search as it is written down: one step, one count."""
    largest = max(margin)
    upper = int(largest / divisor)
    while True:
        count = sum(upper < m <= largest for m in margin)
        if count < largest - upper or count < 30 or upper > largest:
            return upper
        upper += 1


def as_published(external, implicit, upper_external, upper_implicit):
    """P by the ratio, with 0.5 for 0/0."""
    p = []
    for m, upper in ((external, upper_external), (implicit, upper_implicit)):
        q = np.clip(np.asarray(m, float), -2, upper) + 2
        p.append(q / q.max() if q.max() > 0 else np.zeros(len(q)))
    yes, no = p[0] * p[1], (1 - p[0]) * (1 - p[1])
    with np.errstate(invalid="ignore"):
        return np.where(yes + no > 0, yes / (yes + no), 0.5)


# ---- margins


def test_margins_are_winner_minus_loser():
    np.testing.assert_array_equal(external_margins([3, 1, NAN, INF], [1, 4, 0, INF]), [2, -3, NAN, NAN])
    # (-10 + 12) - (-11 + 11.5): policy minus reference, chosen minus rejected, no beta
    margin = implicit_margins([-10.0, -25.0], [-12.0, -20.0], [-11.0, -24.0], [-11.5, -22.0])
    np.testing.assert_allclose(margin, [1.5, -3.0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: external_margins([1, 2], [1]),
            ValueError,
            r"score_rejected must have shape \[2\] to match score_chosen",
        ),
        (lambda: external_margins([[1]], [1]), ValueError, r"score_chosen must have shape \[pairs\], got \[1, 1\]"),
        (lambda: external_margins(["a"], [1]), TypeError, "score_chosen must be numbers, got <U1"),
        (lambda: implicit_margins([1], [1], [1, 2], [1]), ValueError, "ref_rejected must have shape"),
        (lambda: implicit_margins([1], [1], [1, 2], [1, 2]), ValueError, "ref_chosen must have shape"),
    ],
)
def test_margins_of_other_shapes(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- bees: the published method


@pytest.mark.numerics
def test_worked_example():
    scores = quiet_bees({"external": EXTERNAL, "implicit": IMPLICIT})
    assert scores.sources["external"].upper == 6 and scores.sources["implicit"].upper == 15
    p_ex = normalised_margins(EXTERNAL, scores.sources["external"])
    p_im = normalised_margins(IMPLICIT, scores.sources["implicit"])
    np.testing.assert_allclose(p_ex, [0.875, 0.375, 0, 1, 0.3125], atol=1e-6)
    np.testing.assert_allclose(p_im, [0.588235, 0.058824, 0.235294, 1, 0], atol=1e-6)
    np.testing.assert_allclose(scores.p, [0.909091, 0.036145, 0, 1, 0], atol=1e-6)
    assert scores.sources["external"].clipped_high == scores.sources["implicit"].clipped_high == 0.2
    assert scores.sources["external"].clipped_low == 0.2 and scores.sources["implicit"].clipped_low == 0.2
    assert scores.sources["implicit"].smallest == -40 and scores.sources["implicit"].largest == 30
    assert scores.share_at_one == 0.2
    np.testing.assert_allclose(scores.pearson, np.corrcoef(EXTERNAL, IMPLICIT))
    assert scores.spearman[0, 1] == pytest.approx(0.7)
    np.testing.assert_allclose(scores.tie_break, np.array(EXTERNAL) / 6 + np.array(IMPLICIT) / 15)


MARGINS = hnp.arrays(
    np.float64,
    st.integers(1, 200),
    elements=st.one_of(st.integers(-40, 40).map(float), st.floats(-300, 300), st.sampled_from([-2.0, 0.0, 1e-9])),
)


@pytest.mark.numerics
@settings(max_examples=300, deadline=None)
@given(MARGINS, st.floats(0.01, 3), st.sampled_from([("external", 1.5), ("implicit", 2.0)]))
def test_upper_bound_is_that_of_the_step_by_step_search(margin, scale, kind):
    margin = margin * scale
    scores = quiet_bees({"m": margin}, kinds={"m": kind[0]})
    assert scores.sources["m"].upper == searched_upper(margin.tolist(), kind[1])


@pytest.mark.parametrize("spread", [0.3, 1, 4, 15])
@pytest.mark.parametrize(("kind", "divisor"), [("external", 1.5), ("implicit", 2.0)])
def test_upper_bound_of_many_pairs(spread, kind, divisor):
    # 20,000 pairs: the search takes several steps, and stops for either reason
    margin = np.random.default_rng(3).normal(1, spread, 20_000)
    assert quiet_bees({"m": margin}, kinds={"m": kind}).sources["m"].upper == searched_upper(margin, divisor)


@pytest.mark.numerics
@pytest.mark.parametrize(
    ("margin", "kind", "upper"),
    [
        ([3.0] * 29, "external", 2),  # fewer than 30 above int(3 / 1.5)
        ([3.0] * 30, "external", 3),
        (range(46, 91), "implicit", 61),  # one per unit above 45 is enough; 29 above 61 are too few
        (range(47, 91), "implicit", 45),
        ([-3.0, -5.0], "external", -2),
        ([0.0, -5.0], "external", 0),
    ],
)
def test_where_the_search_stops(margin, kind, upper):
    assert searched_upper(list(margin), {"external": 1.5, "implicit": 2.0}[kind]) == upper
    assert quiet_bees({"m": list(margin)}, kinds={"m": kind}).sources["m"].upper == upper


@pytest.mark.parametrize("margin", [[1e300, -1e300, 5.0], [-1e300, -5.0], [2.0**60, 0.0], [-1e308, 1e308]])
def test_huge_margins(margin):
    scores = quiet_bees({"a": margin, "implicit": margin})
    assert scores.sources["a"].upper == int(max(margin) / 1.5)
    assert scores.sources["implicit"].upper == int(max(margin) / 2)
    assert np.isfinite(scores.score).all() and ((scores.p >= 0) & (scores.p <= 1)).all()


@pytest.mark.numerics
@settings(max_examples=200, deadline=None)
@given(hnp.arrays(np.float64, st.tuples(st.just(2), st.integers(1, 60)), elements=st.floats(-50, 50)))
def test_p_is_the_published_ratio(margins):
    scores = quiet_bees({"external": margins[0], "implicit": margins[1]})
    uppers = [scores.sources[name].upper for name in ("external", "implicit")]
    np.testing.assert_allclose(scores.p, as_published(*margins, *uppers), atol=1e-12)
    # the score orders as P does, and goes on where P has arrived at 1
    order = np.argsort(scores.score)
    assert (np.diff(scores.p[order]) >= 0).all()


def test_a_zero_against_a_one_is_one_half():
    external = np.concatenate([[50.0, -50.0], np.linspace(-5, 5, 40)])
    scores = bees({"external": external, "implicit": -external})
    assert scores.p[0] == scores.p[1] == 0.5 and scores.score[0] == 0


def test_pairs_clipped_by_one_source_are_ranked_by_the_other():
    external = np.array([9.0, 9.0, 12.0, 3.0, -4.0])  # upper bound 8: the first three are clipped
    implicit = np.array([1.0, 4.0, 2.0, 3.0, -4.0])
    scores = quiet_bees({"external": external, "implicit": implicit}, upper={"external": 8, "implicit": 6})
    assert (scores.p[:3] == 1).all()  # P cannot tell them apart
    assert scores.share_at_one == 0.6
    top = select_top(scores, k=3)
    assert top.indices.tolist() == [1, 2, 0]
    assert top.share_at_one == 1 and top.tied_at_cut == 0


def test_pairs_clipped_by_both_sources_are_ranked_by_how_far():
    external = np.array([9.0, 9.0, 30.0, 9.0, -4.0])
    implicit = np.array([7.0, 9.0, 7.0, 7.0, -4.0])
    scores = quiet_bees({"external": external, "implicit": implicit}, upper={"external": 8, "implicit": 6})
    assert len(set(scores.score[:4])) == 1
    top = select_top(scores, k=3)
    assert top.indices.tolist() == [2, 1, 0]  # 0 and 3 are equal: the first
    assert top.tied_at_cut == 1
    np.testing.assert_allclose(scores.tie_break, external / 8 + implicit / 6)


def test_an_upper_bound_of_zero_divides_nothing():
    scores = quiet_bees({"m": [0.5, -1.0, 0.25]})
    assert scores.sources["m"].upper == 0 and scores.tie_break.tolist() == [0.5, -1, 0.25]


def test_three_sources():
    rng = np.random.default_rng(0)
    margins = {name: rng.normal(1, 3, 500) for name in ("a", "b", "implicit")}
    scores = bees(margins)
    p = np.array([normalised_margins(margins[name], scores.sources[name]) for name in margins])
    yes, no = p.prod(axis=0), (1 - p).prod(axis=0)
    plain = yes + no > 0
    np.testing.assert_allclose(scores.p[plain], (yes / (yes + no))[plain], atol=1e-12)
    assert [source.kind for source in scores.sources.values()] == ["external", "external", "implicit"]
    assert scores.pearson.shape == (3, 3)


@pytest.mark.parametrize("margin", [[-3.0, -2.0, -7.0], [-2.0] * 4])
@pytest.mark.parametrize("kind", ["external", "implicit"])
def test_all_margins_at_most_the_lower_bound(margin, kind):
    scores = quiet_bees({"m": margin, "other": np.linspace(-5, 5, len(margin))}, kinds={"m": kind})
    assert (normalised_margins(margin, scores.sources["m"]) == 0).all()
    assert (scores.p <= 0.5).all() and np.isfinite(scores.score).all()
    assert (quiet_bees({"m": margin}, kinds={"m": kind}).p < 1e-40).all()


def test_p_without_a_margin_at_the_upper_bound_is_relative_to_the_largest():
    # U = int(0.9 / 1.5) = 0 would clip; a given U of 4 does not
    scores = quiet_bees({"m": [-2.0, 0.0, 1.0]}, upper=4)
    np.testing.assert_allclose(scores.p, [0, 2 / 3, 1], atol=1e-12)


# ---- other combinations


@pytest.mark.parametrize(
    ("how", "expected"),
    [("add", [13, 0, -1, 40, -39.5]), ("max", [8, 1, 2, 30, 0.5]), ("min", [5, -1, -3, 10, -40])],
)
def test_combinations_of_raw_margins(how, expected):
    scores = quiet_bees({"external": EXTERNAL, "implicit": IMPLICIT}, how=how)
    assert scores.score.tolist() == expected and scores.p is None and math.isnan(scores.share_at_one)


def test_sum_of_normalised_margins_and_single_sources():
    margins = {"external": EXTERNAL, "implicit": IMPLICIT}
    scores = quiet_bees(margins, how="add_normalized")
    np.testing.assert_allclose(scores.score, [0.875 + 0.588235, 0.433824, 0.235294, 2, 0.3125], atol=1e-6)
    np.testing.assert_allclose(scores.p, scores.score / 2)
    alone = quiet_bees(margins, how="implicit")
    assert alone.score.tolist() == IMPLICIT
    np.testing.assert_allclose(alone.p, normalised_margins(IMPLICIT, alone.sources["implicit"]))


def test_require_positive():
    margins = {"external": EXTERNAL, "implicit": IMPLICIT}
    scores = quiet_bees(margins, require_positive=True)
    assert np.isneginf(scores.score).tolist() == [False, True, True, False, True]
    assert scores.p[[1, 2, 4]].tolist() == [0, 0, 0]
    with pytest.warns(UserWarning, match="only 2 of 5 pairs may be selected, 1 fewer than asked for"):
        assert select_top(scores, k=3).indices.tolist() == [3, 0]
    assert np.isneginf(quiet_bees(margins, how="add", require_positive=True).score).sum() == 3


# ---- what is said


def normal_margins(seed=0, n=400):
    """Two sources that agree a little."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=n)
    return {"external": 1 + 2 * truth + rng.normal(0, 3, n), "implicit": 1 + 4 * truth + rng.normal(0, 8, n)}


def test_plain_margins_warn_of_nothing():
    scores = bees(normal_margins())
    assert 0 < scores.pearson[0, 1] < 0.5 and 0 < scores.spearman[0, 1] < 0.5


@pytest.mark.parametrize("transform", [lambda m: m * 3, np.exp, lambda m: m + 0.5 * np.sin(7 * m)])
@pytest.mark.parametrize("how", ["mul", "add"])
def test_one_vote_counted_twice(transform, how):
    margins = normal_margins() | {"again": transform(normal_margins()["external"])}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bees(margins, how=how)
    said = [str(w.message) for w in caught if "one vote" in str(w.message)]
    assert len(said) == 1 and said[0].startswith("'external' and 'again' are one vote counted twice: Pearson")
    assert all(w.filename == __file__ for w in caught)


@pytest.mark.parametrize("how", ["external", "max", "min"])
def test_sources_that_are_not_added_up_are_not_counted_twice(how):
    margins = normal_margins() | {"again": normal_margins()["external"]}
    scores = bees(margins, how=how)  # a warning is an error here
    assert scores.pearson[0, 2] == pytest.approx(1)


@pytest.mark.parametrize("pairs", [1, 2, 3, 9])
def test_few_pairs_say_nothing_of_one_vote(pairs):
    # two pairs always correlate by 1 or -1
    margins = {"external": np.arange(pairs) - 3.0, "implicit": 3 * np.arange(pairs) - 3.0}
    assert bees(margins, how="add").score.shape == (pairs,)
    more = {name: np.arange(10) - 3.0 for name in margins}
    more["implicit"][pairs:] = NAN  # what one source lacks is not compared
    with pytest.warns(UserWarning) as caught:
        bees(more, how="add")
    assert not any("one vote" in str(w.message) for w in caught)
    with pytest.warns(UserWarning, match="one vote counted twice"):
        bees({name: np.arange(10) - 3.0 for name in margins}, how="add")


def test_a_lower_bound_of_zero_suits_every_scale():
    bees({"external": np.random.default_rng(0).normal(0, 1000, 500)}, lower=0)


@pytest.mark.numerics
def test_an_upper_bound_that_the_search_leaves_below_the_lower_one():
    margin = np.random.default_rng(0).normal(3, 1, 50)
    with pytest.warns(UserWarning, match=r"of 'external' ends at 3, not above lower=4: every margin counts as p = 0"):
        scores = bees({"external": margin}, lower=4)
    assert scores.sources["external"].largest > 4 and (scores.p < 1e-40).all()
    bees({"external": margin}, lower=4, upper=5)


def test_an_upper_bound_that_cuts_no_thin_tail():
    margin = np.random.default_rng(0).normal(0, 0.3, 50)  # 29 above 0 are fewer than 30: no step
    clipped = (margin > 0).mean()
    message = rf"of 'external' ends at 0, and the {100 * clipped:.0f} % of the margins above it all count as p = 1"
    with pytest.warns(UserWarning, match=message):
        scores = bees({"external": margin}, lower=-0.2)
    assert scores.share_at_one == clipped > 0.5
    bees({"external": margin}, lower=-0.2, upper=0.5)
    bees({"external": margin}, how="add")


def test_lower_bound_that_clips_nothing():
    rng = np.random.default_rng(0)
    with pytest.warns(UserWarning, match=r"lower=-2 clips none of the 300 margins of 'win_prob', which begin at 0\.0"):
        bees({"win_prob": rng.random(300)})
    small = rng.normal(0, 0.3, 300)
    with pytest.warns(UserWarning, match=r"lower=-2 clips none of the 300 margins of 'win_prob', which begin at -1\."):
        bees({"win_prob": small})
    bees({"win_prob": small}, lower={"win_prob": -0.2})  # on its scale: silence
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bees({"win_prob": rng.random(300)}, how="max")  # no bound is used


def test_lower_bound_far_below_the_scale():
    margins = {"implicit": np.random.default_rng(0).normal(0, 1000, 500)}
    message = r"lower=-2 is 0\.2 % of the standard deviation .* of the margins of 'implicit': the \d+ % below it"
    with pytest.warns(UserWarning, match=message):
        bees(margins)


def test_missing_margins_count_as_zero_and_are_counted():
    margins = normal_margins()
    zero = margins["external"].copy()
    zero[[3, 7, 9]] = 0
    holed = zero.copy()
    holed[[3, 7, 9]] = NAN, INF, -INF
    with pytest.warns(UserWarning, match=r"margins\['external'\] has 3 of 400 NaN or infinite, which count as 0"):
        scores = bees(margins | {"external": holed})
    expected = bees(margins | {"external": zero})
    np.testing.assert_array_equal(scores.score, expected.score)
    assert scores.sources["external"] == expected.sources["external"]._replace(missing=3)
    assert scores.sources["implicit"].missing == 0
    # the correlation is over what both rate
    kept = np.isfinite(holed)
    np.testing.assert_allclose(scores.pearson, np.corrcoef(holed[kept], margins["implicit"][kept]))
    upper = scores.sources["external"].upper
    assert normalised_margins(holed, scores.sources["external"])[3] == 2 / (2 + upper)


def test_a_source_with_few_margins_hides_no_other():
    margins = normal_margins()
    margins |= {"again": margins["external"] + 0.1, "rare": np.where(np.arange(400) < 30, margins["implicit"], NAN)}
    margins["again"][:20] = NAN
    with pytest.warns(UserWarning) as caught:
        scores = bees(margins)
    said = [str(w.message) for w in caught if "one vote" in str(w.message)]
    assert [text.partition(" are one vote")[0] for text in said] == ["'external' and 'again'", "'implicit' and 'rare'"]
    for (i, a), (j, b) in itertools.product(enumerate(margins.values()), repeat=2):
        both = np.isfinite(a) & np.isfinite(b)
        assert scores.pearson[i, j] == pytest.approx(np.corrcoef(a[both], b[both])[0, 1])
    assert np.array_equal(scores.spearman, scores.spearman.T) and scores.spearman[0, 2] == pytest.approx(1)


def test_correlation_with_a_constant_is_none():
    scores = quiet_bees({"external": normal_margins()["external"], "implicit": np.full(400, 0.1)})
    assert np.isnan(scores.pearson[0, 1]) and np.isnan(scores.spearman[0, 1])
    assert scores.pearson[0, 0] == pytest.approx(1)


def test_ranks_share_ties_and_a_sample_stands_for_very_many():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 4, 300)
    b = a + rng.integers(0, 4, 300)

    def ranks(values):
        return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])

    scores = quiet_bees({"a": a, "b": b})
    assert scores.spearman[0, 1] == pytest.approx(np.corrcoef(ranks(a), ranks(b))[0, 1], abs=1e-12)
    many = rng.normal(size=(2, 3 * RANKED_PAIRS))
    many[1] += many[0]
    scores = bees({"a": many[0], "b": many[1]})
    # normal, Pearson 0.707: Spearman is 6 / pi * asin(r / 2) = 0.690, and the standard error below 0.003
    assert scores.pearson[0, 1] == pytest.approx(np.corrcoef(many)[0, 1])
    assert scores.spearman[0, 1] == pytest.approx(6 / np.pi * np.arcsin(0.5**0.5 / 2), abs=0.01)


@pytest.mark.parametrize("how", ["mul", "add", "add_normalized", "max", "min", "external"])
def test_no_pairs(how):
    scores = bees({"external": [], "implicit": []}, how=how)
    assert scores.score.shape == (0,) and math.isnan(scores.share_at_one)
    assert select_top(scores, fraction=0.5).indices.shape == (0,)


def test_more_pairs_than_a_block():
    rng = np.random.default_rng(1)
    margins = {"external": rng.normal(1, 3, 100_001), "implicit": rng.normal(1, 9, 100_001)}
    scores = bees(margins)
    uppers = [scores.sources[name].upper for name in margins]
    np.testing.assert_allclose(scores.p, as_published(*margins.values(), *uppers), atol=1e-12)
    single = quiet_bees({name: margin.astype(np.float32) for name, margin in margins.items()})
    np.testing.assert_allclose(single.p, scores.p, atol=1e-4)


def test_the_callers_arrays_are_left_alone():
    margins = normal_margins()
    before = {name: margin.copy() for name, margin in margins.items()}
    for how in ("mul", "add", "add_normalized", "external"):
        bees(margins, how=how, require_positive=True)
    for name, margin in margins.items():
        np.testing.assert_array_equal(margin, before[name])


@settings(max_examples=100, deadline=None)
@given(MARGINS, st.randoms(use_true_random=False))
def test_the_order_of_the_pairs_does_not_matter(margin, random):
    permutation = list(range(len(margin)))
    random.shuffle(permutation)
    margins = {"external": margin, "implicit": 20 * np.sin(margin)}
    scores = quiet_bees(margins)
    permuted = quiet_bees({name: m[permutation] for name, m in margins.items()})
    np.testing.assert_array_equal(permuted.score, scores.score[permutation])
    assert permuted.sources == scores.sources


@pytest.mark.parametrize(
    ("margins", "options", "error", "message"),
    [
        ({"a": [1, 2], "b": [1]}, {}, ValueError, r"margins must all have the same length, got \{'a': 2, 'b': 1\}"),
        ([1, 2], {}, TypeError, "margins must be a mapping of at least one name"),
        ({}, {}, TypeError, "margins must be a mapping of at least one name"),
        ({"a": [[1]]}, {}, ValueError, r"margins\['a'\] must have shape \[pairs\]"),
        ({"a": [[1], [1, 2]]}, {}, ValueError, r"margins\['a'\] must have shape \[pairs\]"),
        ({"a": ["x"]}, {}, TypeError, r"margins\['a'\] must be numbers"),
        ({"add": [1]}, {}, ValueError, r"margins must not be named like a combination, got \['add'\]"),
        ({"a": [1]}, {"how": "mean"}, ValueError, r"how must be one of \['mul', .*'a'\], got 'mean'"),
        (
            {"a": [1]},
            {"kinds": {"b": "external"}},
            ValueError,
            r"kinds must name sources .* got \['b'\]",
        ),
        ({"a": [1]}, {"kinds": {"a": "judge"}}, ValueError, r'kinds\[\'a\'\] must be "external" or "implicit"'),
        ({"a": [1]}, {"kinds": "external"}, TypeError, "kinds must map names of sources, got str"),
        ({"a": [1]}, {"lower": NAN}, ValueError, "lower of 'a' must be a finite number, got nan"),
        ({"a": [1]}, {"lower": None}, ValueError, r"lower must name every source, got none for \['a'\]"),
        ({"a": [1]}, {"upper": {"a": -2}}, ValueError, "upper of 'a' must be above lower -2, got -2"),
        ({"a": [1]}, {"upper": {"b": 3}}, ValueError, r"upper must name sources of margins \['a'\], got \['b'\]"),
    ],
)
def test_wrong_arguments_of_bees(margins, options, error, message):
    with pytest.raises(error, match=message):
        bees(margins, **options)


# ---- selection


@pytest.mark.numerics
@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(np.float64, st.integers(0, 40), elements=st.integers(-3, 3).map(float)),
    st.data(),
)
def test_top_k_is_the_head_of_a_full_sort(scores, data):
    k = data.draw(st.integers(0, len(scores)))
    tie_break = data.draw(st.none() | st.just(np.arange(len(scores)) % 3))
    top = select_top(scores, k=k, tie_break=tie_break)
    second = np.zeros(len(scores)) if tie_break is None else tie_break
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], -second[i], i))
    assert top.indices.tolist() == order[:k] and top.indices.dtype == np.int64
    if k:
        cut = scores[order[k - 1]]
        assert top.threshold == cut
        divided = any(scores[i] == cut for i in order[k:])
        assert top.tied_at_cut == (sum(scores[i] == cut for i in order[:k]) / k if divided else 0)
    else:
        assert math.isnan(top.threshold)


@pytest.mark.parametrize(
    ("pairs", "fraction", "expected"), [(403, 0.1, 40), (100, 0.29, 29), (10, 1, 10), (10, 0, 0), (3, 0.1, 0)]
)
def test_fraction(pairs, fraction, expected):
    assert select_top(np.arange(pairs), fraction=fraction).indices.tolist() == list(range(pairs))[::-1][:expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of k and fraction must be given, got k=None and fraction=None"),
        ({"k": 1, "fraction": 0.5}, "exactly one of k and fraction"),
        ({"k": 4}, "k must be an integer from 0 to the 3 pairs, got 4"),
        ({"k": 1.5}, "k must be an integer"),
        ({"k": True}, "k must be an integer"),
        ({"fraction": 1.5}, r"fraction must lie in \[0, 1\], got 1.5"),
        ({"fraction": NAN}, r"fraction must lie in \[0, 1\], got nan"),
        ({"k": 1, "tie_break": [1, 2]}, r"tie_break must have shape \[3\] to match scores, got \[2\]"),
        ({"k": 1, "scores": [1, NAN, NAN]}, "scores must not be NaN, got 2 of 3"),
    ],
)
def test_wrong_arguments_of_select_top(options, message):
    with pytest.raises(ValueError, match=message):
        select_top(**{"scores": [1.0, 2.0, 3.0]} | options)


def test_partition():
    parts = partition([3, 1, 1.1, 0, -1, -1.5, NAN])
    assert [Part(part).name for part in parts] == ["TOP", "MIDDLE", "TOP", "MIDDLE", "MIDDLE", "BOTTOM", "MIDDLE"]
    assert parts.dtype == np.int8
    assert partition([0.2, -0.2, 0.1], edge=0.1).tolist() == [Part.TOP, Part.BOTTOM, Part.MIDDLE]
    for edge in (-1, NAN, INF):
        with pytest.raises(ValueError, match="edge must be a number >= 0"):
            partition([1], edge=edge)


def test_compare_selections():
    margins = normal_margins(n=1000)
    found = compare_selections(margins, 100, seed=5)
    assert list(found.selected) == ["mul", "external", "implicit", "add", "random"]
    expected = {
        "mul": select_top(bees(margins), k=100).indices,
        "external": np.argsort(-margins["external"])[:100],
        "implicit": np.argsort(-margins["implicit"])[:100],
        "add": np.argsort(-(margins["external"] + margins["implicit"]))[:100],
    }
    for name, indices in expected.items():
        np.testing.assert_array_equal(found.selected[name], indices)
    assert len(set(found.selected["random"].tolist())) == 100
    np.testing.assert_array_equal(found.selected["random"], compare_selections(margins, 100, seed=5).selected["random"])
    assert (np.diag(found.overlap) == 1).all()
    both = set(expected["external"]) & set(expected["implicit"])
    assert found.overlap[1, 2] == found.overlap[2, 1] == len(both) / 100
    assert found.overlap[4, 0] < 0.3  # 0.1 by chance
    row = found.table()[1]
    assert row["selection"] == "external" and row["pairs"] == 100 and row["implicit"] == len(both) / 100
    assert list(compare_selections(margins, 3, how="add").selected) == ["add", "external", "implicit", "random"]
    positive = compare_selections(margins, 100, how="external", require_positive=True).selected["external"]
    assert (margins["implicit"][positive] > 0).all() and (margins["implicit"][found.selected["external"]] < 0).any()


# ---- prompts


def best_prompts(pools, fraction):
    """Prompt by prompt, in plain Python."""
    rows = []
    for prompt, pool in enumerate(pools):
        rated = [(r, j) for j, r in enumerate(pool) if math.isfinite(r)]
        if len({r for r, _ in rated}) < 2:
            continue
        chosen = max(rated, key=lambda rj: (rj[0], -rj[1]))
        rejected = min(rated)
        rows.append((-(chosen[0] - rejected[0]), prompt, chosen[1], rejected[1]))
    return sorted(rows)[: round(fraction * len(pools))]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([NAN, INF, -1.0, 0.0, 1.5, 2.0, 3.0]), max_size=5), max_size=20),
    st.sampled_from([0.25, 0.5, 1.0]),
)
def test_prompts_of_the_iterative_variant(pools, fraction):
    offsets = np.concatenate([[0], np.cumsum([len(pool) for pool in pools])]).astype(np.int64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="only .* prompts have two different rewards")
        found = select_prompts(np.array([r for pool in pools for r in pool]), fraction, offsets=offsets)
    expected = best_prompts(pools, fraction)
    assert found.prompts.tolist() == [row[1] for row in expected]
    assert found.chosen.tolist() == [row[2] for row in expected]
    assert found.rejected.tolist() == [row[3] for row in expected]
    assert found.margin.tolist() == [-row[0] for row in expected]


def test_prompts_keep_a_quarter_by_default():
    rewards = np.random.default_rng(0).normal(size=(2000, 6))
    found = select_prompts(rewards)
    spread = rewards.max(axis=1) - rewards.min(axis=1)
    np.testing.assert_array_equal(found.prompts, np.argsort(-spread)[:500])
    np.testing.assert_array_equal(found.chosen, rewards[found.prompts].argmax(axis=1))
    np.testing.assert_array_equal(select_prompts(rewards, k=7).prompts, found.prompts[:7])
    with pytest.raises(ValueError, match="k must be an integer from 0 to the 2000 prompts, got 2001"):
        select_prompts(rewards, k=2001)
    valid = np.ones((2000, 6), bool)
    valid[:, 2] = False
    assert (select_prompts(rewards, valid=valid).chosen != 2).all()


def test_prompts_without_spread_are_never_selected():
    with pytest.warns(UserWarning, match="only 1 of 3 prompts have two different rewards, 1 fewer than asked for"):
        found = select_prompts([[1.0, 1.0], [2.0, 3.0], [NAN, 5.0]], 0.67)
    assert found.prompts.tolist() == [1] and found.margin.tolist() == [1]


# ---- the theory


def run_shrinkage(folder, *options):
    done = subprocess.run([sys.executable, SHRINKAGE, *options], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_shrinkage_and_inflation(tmp_path):
    """The run of methods.md section 2.3: noise shortens the fitted reward, the largest margins lengthen it."""
    rows = json.loads(run_shrinkage(tmp_path, "--json"))
    assert [row["noise"] for row in rows] == [0, 1, 2, 4]
    np.testing.assert_allclose([row["all"] for row in rows], [2.03, 1.73, 1.26, 0.75], atol=0.01)
    np.testing.assert_allclose([row["top"] for row in rows], [4.06, 5.42, 5.33, 2.26], atol=0.01)
    np.testing.assert_allclose([row["random"] for row in rows], [2.06, 1.86, 1.33, 0.76], atol=0.01)
    assert min(row["all_cosine"] for row in rows) >= 0.999
    assert min(row["top_cosine"] for row in rows) >= 0.995


def test_shrinkage_prints_a_table(tmp_path):
    lines = run_shrinkage(tmp_path, "--seed", "1").splitlines()
    assert "true length 2, 20,000 pairs, seed 1" in lines[0]
    assert [line.split("|")[1].strip() for line in lines[4:]] == ["0", "1", "2", "4"]


# ---- real scores


@pytest.mark.skipif("FASTPREF_SCORED_SAMPLES" not in os.environ, reason="FASTPREF_SCORED_SAMPLES names no file")
def test_real_scores():
    """Judge logits of real samples, max against a lower response: P alone ties most of the top tenth."""
    matrix = read_scored_samples(os.environ["FASTPREF_SCORED_SAMPLES"]).score_matrix()
    logits = to_logit(matrix)
    pairs = select_pairs(logits, rejected="mean")
    noisy = pairs.gap + np.random.default_rng(0).normal(0, np.nanstd(pairs.gap), len(pairs.gap))
    with pytest.warns(UserWarning, match="lower=-2 clips none"):
        scores = bees({"external": pairs.gap, "implicit": noisy})
    top = select_top(scores, fraction=0.1)
    assert len(top.indices) == round(0.1 * len(matrix))
    assert top.share_at_one > 0.5
    assert len(np.unique(scores.score[top.indices])) > len(top.indices) / 2
    # one judge's probabilities and their logits are one vote
    with pytest.warns(UserWarning) as caught:
        bees({"logit": pairs.gap, "again": pairs.gap + 1e-3 * noisy}, lower=0.5)
    assert any("one vote counted twice" in str(w.message) for w in caught)
